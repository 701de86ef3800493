// Momentum after a proximal step, in two launches: the inner products that it is judged by, then the step itself, which
// depends on their sums over all of an input.
#include "../momentum.h"
#include "quads.cuh"
#include "reduce.cuh"

namespace moreau::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Blocks of one input beyond which they stride; the last one sums as many partials.
constexpr int64_t kMostBlocks = 1024;

// Layout does not matter here: four features that follow each other in memory.
struct Fours {
  int64_t features, count, blocks;

  explicit Fours(int64_t all) : features(all), count((all + kLanes - 1) / kLanes) {
    blocks = std::max<int64_t>(1, std::min((count + kThreads - 1) / kThreads, kMostBlocks));
  }
  MOREAU_HD Quad operator[](int64_t i) const {
    const int64_t offset = i * kLanes, left = features - offset;
    return {offset, 1, 0, left >= kLanes ? (1u << kLanes) - 1 : (1u << left) - 1};
  }
};

template <class S>
bool vectors(const Momentum& a) {
  bool all = a.features % kLanes == 0;
  for (const void* p : {(const void*)a.point, (const void*)a.previous, (const void*)a.here, (const void*)a.before,
                        a.gradient, (const void*)a.last_gradient, (const void*)a.change, (const void*)a.squares,
                        (const void*)a.points, (const void*)a.gradients})
    all = all && aligned(static_cast<const S*>(p));
  return all;
}

template <class S, bool kVector>
__global__ void __launch_bounds__(kThreads, 2) momentum_products_kernel(Momentum a, Fours fours) {
  for (int64_t item = blockIdx.x; item < a.batch * fours.blocks; item += gridDim.x) {
    const Division at = divide(item, fours.blocks);
    const int64_t input = at.quotient, block = at.remainder;
    const auto row = [&](const void* tensor) { return static_cast<const S*>(tensor) + input * a.features; };
    double sums[kProducts] = {};
    for (int64_t i = block * kThreads + threadIdx.x; i < fours.count; i += fours.blocks * kThreads) {
      const Quad quad = fours[i];
      // Empty lanes are 0 in all of them.
      const Pack<S> point = load_quad<kVector>(row(a.point), quad),
                    previous = load_quad<kVector>(row(a.previous), quad);
      const Pack<S> here = load_quad<kVector>(row(a.here), quad), before = load_quad<kVector>(row(a.before), quad);
      const Pack<S> gradient = load_quad<kVector>(row(a.gradient), quad);
      const Pack<S> last = load_quad<kVector>(row(a.last_gradient), quad);
      const Pack<S> change = load_quad<kVector>(row(a.change), quad);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        const double back = S(here.v[lane] - point.v[lane]), step = S(point.v[lane] - previous.v[lane]);
        const double way = S(here.v[lane] - before.v[lane]), turn = S(gradient.v[lane] - last.v[lane]);
        const double old = change.v[lane];
        sums[product::uphill] = fma(back, step, sums[product::uphill]);
        sums[product::turned] = fma(step, old, sums[product::turned]);
        sums[product::length] = fma(old, old, sums[product::length]);
        sums[product::way] = fma(way, way, sums[product::way]);
        sums[product::bend] = fma(way, turn, sums[product::bend]);
        sums[product::square] = fma(turn, turn, sums[product::square]);
      }
    }
    finish_sums<kWarps>(sums, a.partials + input * fours.blocks * kProducts, a.arrivals + input, block, fours.blocks,
                        a.products + input * kProducts);
  }
}

// to += weight * values at one quad.
template <bool kVector, class S>
__device__ __forceinline__ void add_scaled(void* tensor, int64_t first, const Quad& quad, const Pack<S>& values,
                                           S weight) {
  S* to = static_cast<S*>(tensor) + first;
  Pack<S> total = load_quad<kVector>(to, quad);
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) total.v[lane] += weight * values.v[lane];
  store_quad<kVector>(to, quad, total.v);
}

template <class S, bool kVector>
__global__ void __launch_bounds__(kThreads) momentum_update_kernel(Momentum a, Fours fours) {
  for (int64_t item = blockIdx.x; item < a.batch * fours.blocks; item += gridDim.x) {
    const Division at = divide(item, fours.blocks);
    const int64_t input = at.quotient, first = input * a.features;
    const S factor = a.products[input * kProducts + product::uphill] > 0 ? S(0) : S(a.momentum);
    const auto row = [&](void* tensor) { return static_cast<S*>(tensor) + first; };
    for (int64_t i = at.remainder * kThreads + threadIdx.x; i < fours.count; i += fours.blocks * kThreads) {
      const Quad quad = fours[i];
      const Pack<S> gradient = load_quad<kVector>(static_cast<const S*>(a.gradient) + first, quad);
      const Pack<S> here = load_quad<kVector>(row(a.here), quad);
      if (a.squares) {
        const Pack<S> last = load_quad<kVector>(row(a.last_gradient), quad);
        Pack<S> squares = load_quad<kVector>(row(a.squares), quad);
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
          const S turn = gradient.v[lane] - last.v[lane];
          squares.v[lane] += S(a.samples / 2) * turn * turn;
        }
        store_quad<kVector>(row(a.squares), quad, squares.v);
      }
      if (a.points) {
        add_scaled<kVector>(a.points, first, quad, here, S(a.samples));
        add_scaled<kVector>(a.gradients, first, quad, gradient, S(a.samples));
      }
      const Pack<S> point = load_quad<kVector>(row(a.point), quad),
                    previous = load_quad<kVector>(row(a.previous), quad);
      S step[kLanes], next[kLanes];
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        step[lane] = point.v[lane] - previous.v[lane];
        next[lane] = point.v[lane] + factor * step[lane];
      }
      store_quad<kVector>(row(a.last_gradient), quad, gradient.v);
      store_quad<kVector>(row(a.before), quad, here.v);
      store_quad<kVector>(row(a.previous), quad, point.v);
      store_quad<kVector>(row(a.change), quad, step);
      store_quad<kVector>(row(a.point), quad, next);
      store_quad<kVector>(row(a.here), quad, next);
    }
    if (a.sums && at.remainder == 0 && threadIdx.x == 0) add_to_sums(a, input);
  }
}

template <class S>
void products(const Momentum& a, void* stream) {
  const Fours fours(a.features);
  const auto kernel = vectors<S>(a) ? momentum_products_kernel<S, true> : momentum_products_kernel<S, false>;
  launch("momentum_products", kernel, a.batch * fours.blocks, kThreads, 0, stream, a, fours);
}

template <class S>
void update(const Momentum& a, void* stream) {
  const Fours fours(a.features);
  const auto kernel = vectors<S>(a) ? momentum_update_kernel<S, true> : momentum_update_kernel<S, false>;
  launch("momentum_update", kernel, a.batch * fours.blocks, kThreads, 0, stream, a, fours);
}

}  // namespace

int64_t momentum_partials(int64_t features) { return Fours(features).blocks; }

void momentum_products(const Momentum& a, int device, void* stream) {
  if (a.batch == 0) return;
  const DeviceGuard guard(device, "momentum_products");
  a.dtype == Dtype::f64 ? products<double>(a, stream) : products<float>(a, stream);
}

void momentum_update(const Momentum& a, int device, void* stream) {
  if (a.batch == 0) return;
  const DeviceGuard guard(device, "momentum_update");
  a.dtype == Dtype::f64 ? update<double>(a, stream) : update<float>(a, stream);
}

}  // namespace moreau::cuda
