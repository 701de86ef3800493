// Nesterov's momentum after a proximal step, one launch for each phase: inner products, then the update, which depends
// on their sums over all of an input.
#include "../momentum_step.h"

#include "quads.cuh"
#include "reduce.cuh"

namespace moreau::cuda {
namespace {

constexpr int kThreads = Sizes::momentum_threads;
constexpr int kWarps = kThreads / kWarp;
// Blocks of one input.
MOREAU_LIMIT(kMostBlocks, Sizes::momentum_most_blocks, blocks);

// Quads of four features that follow each other in memory; the layout does not matter here.
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

// Whether quads are loaded as vectors in every tensor.
template <class S>
bool vectors(const MomentumStep& a) {
  bool all = a.features % kLanes == 0;
  for (const void* p : {(const void*)a.y, (const void*)a.y_prev, (const void*)a.x, (const void*)a.x_prev, a.gradient,
                        (const void*)a.last_gradient, (const void*)a.last_step, (const void*)a.squares,
                        (const void*)a.points, (const void*)a.gradients})
    all = all && aligned(static_cast<const S*>(p));
  return all;
}

// products = <x - y, step>, <step, last_step>, ||last_step||^2, ||dx||^2, <dx, dg>, ||dg||^2,
// with step = y - y_prev, dx = x - x_prev, dg = gradient - last_gradient
template <class S, bool kVector>
__global__ void __launch_bounds__(kThreads, Sizes::momentum_products_blocks)
    momentum_step_products_kernel(MomentumStep a, Fours fours) {
  for (int64_t item = blockIdx.x; item < a.batch * fours.blocks; item += gridDim.x) {
    const Division at = divide(item, fours.blocks);
    const int64_t input = at.quotient, block = at.remainder;
    const auto row = [&](const void* tensor) { return static_cast<const S*>(tensor) + input * a.features; };
    double sums[kProducts] = {};
    for (int64_t i = block * kThreads + threadIdx.x; i < fours.count; i += fours.blocks * kThreads) {
      const Quad quad = fours[i];
      // Empty lanes are 0 in all tensors.
      const Pack<S> y = load_quad<kVector>(row(a.y), quad), y_prev = load_quad<kVector>(row(a.y_prev), quad);
      const Pack<S> x = load_quad<kVector>(row(a.x), quad), x_prev = load_quad<kVector>(row(a.x_prev), quad);
      const Pack<S> gradient = load_quad<kVector>(row(a.gradient), quad);
      const Pack<S> last_gradient = load_quad<kVector>(row(a.last_gradient), quad);
      const Pack<S> last_step = load_quad<kVector>(row(a.last_step), quad);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        const double x_minus_y = S(x.v[lane] - y.v[lane]), step = S(y.v[lane] - y_prev.v[lane]);
        const double dx = S(x.v[lane] - x_prev.v[lane]), dg = S(gradient.v[lane] - last_gradient.v[lane]);
        const double last = last_step.v[lane];
        sums[product::restart_product] = fma(x_minus_y, step, sums[product::restart_product]);
        sums[product::step_dot_last] = fma(step, last, sums[product::step_dot_last]);
        sums[product::last_sq] = fma(last, last, sums[product::last_sq]);
        sums[product::dx_dx] = fma(dx, dx, sums[product::dx_dx]);
        sums[product::dx_dg] = fma(dx, dg, sums[product::dx_dg]);
        sums[product::dg_dg] = fma(dg, dg, sums[product::dg_dg]);
      }
    }
    finish_sums<kWarps>(sums, a.partials + input * fours.blocks * kProducts, a.arrivals + input, block, fours.blocks,
                        a.products + input * kProducts);
  }
}

// tensor += weight * values at one quad.
template <bool kVector, class S>
__device__ __forceinline__ void add_scaled(void* tensor, int64_t first, const Quad& quad, const Pack<S>& values,
                                           S weight) {
  S* __restrict__ to = static_cast<S*>(tensor) + first;
  Pack<S> total = load_quad<kVector>(to, quad);
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) total.v[lane] += weight * values.v[lane];
  store_quad<kVector>(to, quad, total.v);
}

// x, y = y + beta (y - y_prev), beta = restart_product > 0 ? 0 : momentum;
// squares += m/2 (gradient - last_gradient)^2, points += m x, gradients += m gradient
template <class S, bool kVector>
__global__ void __launch_bounds__(kThreads) momentum_step_update_kernel(MomentumStep a, Fours fours) {
  for (int64_t item = blockIdx.x; item < a.batch * fours.blocks; item += gridDim.x) {
    const Division at = divide(item, fours.blocks);
    const int64_t input = at.quotient, first = input * a.features;
    const S beta = a.products[input * kProducts + product::restart_product] > 0 ? S(0) : S(a.momentum);
    const auto row = [&](void* tensor) { return static_cast<S*>(tensor) + first; };
    for (int64_t i = at.remainder * kThreads + threadIdx.x; i < fours.count; i += fours.blocks * kThreads) {
      const Quad quad = fours[i];
      const Pack<S> gradient = load_quad<kVector>(static_cast<const S*>(a.gradient) + first, quad);
      const Pack<S> x = load_quad<kVector>(row(a.x), quad);
      if (a.squares) {
        const Pack<S> last_gradient = load_quad<kVector>(row(a.last_gradient), quad);
        Pack<S> squares = load_quad<kVector>(row(a.squares), quad);
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
          const S dg = gradient.v[lane] - last_gradient.v[lane];
          squares.v[lane] += S(a.samples / 2) * dg * dg;
        }
        store_quad<kVector>(row(a.squares), quad, squares.v);
      }
      if (a.points) {
        add_scaled<kVector>(a.points, first, quad, x, S(a.samples));
        add_scaled<kVector>(a.gradients, first, quad, gradient, S(a.samples));
      }
      const Pack<S> y = load_quad<kVector>(row(a.y), quad), y_prev = load_quad<kVector>(row(a.y_prev), quad);
      S step[kLanes], next[kLanes];
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        step[lane] = y.v[lane] - y_prev.v[lane];
        next[lane] = y.v[lane] + beta * step[lane];
      }
      store_quad<kVector>(row(a.last_gradient), quad, gradient.v);
      store_quad<kVector>(row(a.x_prev), quad, x.v);
      store_quad<kVector>(row(a.y_prev), quad, y.v);
      store_quad<kVector>(row(a.last_step), quad, step);
      store_quad<kVector>(row(a.y), quad, next);
      store_quad<kVector>(row(a.x), quad, next);
    }
    if (a.sums && at.remainder == 0 && threadIdx.x == 0) add_to_sums(a, input);
  }
}

template <class S>
void run(const MomentumStep& a, void* stream) {
  const Fours fours(a.features);
  const bool vector = vectors<S>(a);
  const int64_t items = a.batch * fours.blocks;
  if (includes(a.phases, Phases::products)) {
    const auto kernel = vector ? momentum_step_products_kernel<S, true> : momentum_step_products_kernel<S, false>;
    launch("momentum_step", kernel, items, kThreads, 0, stream, a, fours);
  }
  if (includes(a.phases, Phases::update)) {
    const auto kernel = vector ? momentum_step_update_kernel<S, true> : momentum_step_update_kernel<S, false>;
    launch("momentum_step", kernel, items, kThreads, 0, stream, a, fours);
  }
}

}  // namespace

int64_t momentum_step_partials(int64_t features) { return Fours(features).blocks; }

void momentum_step(const MomentumStep& a, int device, void* stream) {
  if (a.batch == 0) return;
  const DeviceGuard guard(device, "momentum_step");
  a.dtype == Dtype::f64 ? run<double>(a, stream) : run<float>(a, stream);
}

}  // namespace moreau::cuda
