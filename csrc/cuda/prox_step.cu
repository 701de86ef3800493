// The fused step: mean of the gradients, pull to zero, shrinkage, statistics, next noisy copies, in one launch.
//
// Elementwise penalties: a block owns quads of one input; its first 64 threads sum the gradients and step, then all
// `slices` x 64 write the noisy copies. Groups: a block owns the groups that start in one chunk of the sorted members;
// it averages, forms the norms, and steps. Either way statistics are summed in an order that follows from the extents.
#include "../shrinkage.h"
#include "gradients.cuh"
#include "groups.cuh"
#include "noise.cuh"

namespace moreau::cuda {
namespace {

// 64 quads: one CIFAR-10 image (3072 features) makes 12 blocks, a batch of 64 images 768 for the 132 multiprocessors of
// an H200.
constexpr int kQuads = 64;
constexpr int kQuadWarps = kQuads / kWarp;
// 512 threads leave 128 registers each. Double has half as many threads and two blocks, which leaves as many.
template <class T>
constexpr int kMostSlices = sizeof(T) == 8 ? 4 : 8;
// Blocks of one input beyond which they stride: 4096 already fill any card, and the last one sums as many partials.
constexpr int64_t kMostBlocks = 4096;

template <class S>
struct Scalars {
  S keep, step_size, rho, count;

  __device__ __forceinline__ Scalars(const ProxStep& a, int64_t input)
      : step_size(static_cast<const S*>(a.step_size)[input]),
        rho(static_cast<const S*>(a.rho)[input]),
        count(S(a.count)) {
    keep = S(1) - step_size / rho;
  }
  __device__ __forceinline__ S pull(S displacement, S p) const { return keep * displacement - step_size * p; }
};

// The statistics of one thread.
struct Sums {
  double of[kStatistics] = {};

  template <class S>
  __device__ __forceinline__ void add(S displacement, S image, S p) {
    const double d = displacement, y = image, g = p, gap = d - y;
    of[residual2] = fma(gap, gap, of[residual2]);
    of[displacement2] = fma(d, d, of[displacement2]);
    of[image2] = fma(y, y, of[image2]);
    of[gradient2] = fma(g, g, of[gradient2]);
    of[nonzero] += image != S(0) ? 1.0 : 0.0;
  }
};

int64_t blocks_each(const Extents& e) {
  return std::min((Quads(e, 0).count() + kQuads - 1) / kQuads, kMostBlocks);
}

// --- none, l1 --------------------------------------------------------------------------------------------------------

// The new displacement of one quad, its sums and running total; returns x + displacement where noisy copies follow.
template <bool kVector, class T, class S>
__device__ __forceinline__ void step_quad(const ProxStep& a, const Scalars<S>& k, int64_t input, int64_t features,
                                          const Quad& quad, Sums& sums, S (&base)[kLanes]) {
  S* gradient = static_cast<S*>(a.gradient) + input * features;
  S* displacement = static_cast<S*>(a.displacement) + input * features;
  Pack<S> p{};
  if (a.carry) p = load_quad<kVector>(gradient, quad);
  add_rows<kVector>(p.v, static_cast<const T*>(a.gradients) + input * a.samples * features, a.samples, features, quad);
  const Pack<S> d = load_quad<kVector>(displacement, quad);
  const S* eta = static_cast<const S*>(a.eta) + input * a.eta_input;
  S next[kLanes];
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    S threshold = 0;  // which leaves every value as it is
    if (a.penalty == Penalty::l1 && quad.has(lane))
      threshold = eta[(quad.offset + lane * quad.stride) * a.eta_feature];
    p.v[lane] /= k.count;
    const S image = -k.rho * soft_threshold(p.v[lane], threshold);
    next[lane] = soft_threshold(k.pull(d.v[lane], p.v[lane]), k.step_size * threshold);
    if (quad.has(lane)) sums.add(d.v[lane], image, p.v[lane]);
  }
  store_quad<kVector>(gradient, quad, p.v);
  store_quad<kVector>(displacement, quad, next);
  if (a.total_of != Total::none) {
    S* to = static_cast<S*>(a.total) + input * features;
    Pack<S> total = load_quad<kVector>(to, quad);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane)
      total.v[lane] += a.total_of == Total::gradient ? p.v[lane] : next[lane];
    store_quad<kVector>(to, quad, total.v);
  }
  if (a.noise.samples == 0) return;
  const Pack<T> x = load_quad<kVector>(static_cast<const T*>(a.x) + input * features, quad);
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) base[lane] = load(x.v[lane]) + next[lane];
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kQuads* kMostSlices<T>, sizeof(T) == 8 ? 2 : 1)
    prox_step_kernel(ProxStep a, Quads quads, Draws draws, int64_t blocks) {
  using S = state_t<T>;
  __shared__ S bases[kQuads][kLanes];
  const int here = int(threadIdx.x) % kQuads, slice = int(threadIdx.x) / kQuads, slices = int(blockDim.x) / kQuads;
  const int64_t features = quads.features(), count = quads.count();
  for (int64_t item = blockIdx.x; item < a.extents.batch * blocks; item += gridDim.x) {
    const Division at = divide(item, blocks);
    const int64_t input = at.quotient, block = at.remainder;
    const Scalars<S> k(a, input);
    Sums sums;
    // The bounds are the block's, since its threads meet at barriers.
    for (int64_t first = block * kQuads; first < count; first += blocks * kQuads) {
      const bool mine = first + here < count;
      const Quad quad = quads[mine ? first + here : 0];
      if (mine && slice == 0) step_quad<kVector, T>(a, k, input, features, quad, sums, bases[here]);
      if (draws.count == 0) continue;
      __syncthreads();
      if (mine)
        write_noisy<kVector>(static_cast<T*>(a.noisy) + input * a.noise.samples * features, features, quad, bases[here],
                             a.noise, draws, input, slice, slices);
      __syncthreads();
    }
    finish_sums<kQuadWarps>(sums.of, a.partials + input * blocks * kStatistics, a.arrivals + input, block, blocks,
                            a.statistics + input * kStatistics);
  }
}

template <class T>
void run_elementwise(const ProxStep& a, void* stream) {
  using S = state_t<T>;
  const Quads quads(a.extents, a.noise.element_offset);
  const Draws draws(a.noise);
  const int64_t blocks = blocks_each(a.extents);
  const bool vector = quads.whole() && aligned(static_cast<const T*>(a.gradients)) &&
                      aligned(static_cast<const T*>(a.x)) && aligned(static_cast<const T*>(a.noisy)) &&
                      aligned(static_cast<const S*>(a.gradient)) && aligned(static_cast<const S*>(a.displacement)) &&
                      aligned(static_cast<const S*>(a.total));
  const auto kernel = vector ? prox_step_kernel<T, true> : prox_step_kernel<T, false>;
  const int threads = kQuads * slices_for(a.extents.batch * quads.count(), draws.count, kMostSlices<T>);
  launch("prox_step", kernel, a.extents.batch * blocks, threads, stream, a, quads, draws, blocks);
}

// --- group -----------------------------------------------------------------------------------------------------------

// Normals for the 32 features that a warp holds, in any order: features of one noise block share a Philox call, which
// is made by whichever lane is next. kDrawn calls are held at a time, so 32 features in 8 blocks draw 16 samples.
constexpr int kDrawn = 128;

template <class T, class S>
__device__ __forceinline__ void write_noisy_members(const ProxStep& a, const Draws& draws, int64_t input, bool mine,
                                                    int64_t offset, S base, uint64_t (&blocks)[kWarp],
                                                    S (&drawn)[kDrawn][kLanes]) {
  const Extents& e = a.extents;
  const int64_t features = e.channels * e.positions;
  T* noisy = static_cast<T*>(a.noisy) + input * a.noise.samples * features + offset;
  if (!a.noise.sigma) {
    if (mine)
      for (int64_t k = 0; k < draws.count; ++k) store(noisy + k * features, base);
    return;
  }
  const S sigma = static_cast<const S*>(a.noise.sigma)[input];
  const uint64_t key = uint64_t(a.noise.keys[input]);
  const uint32_t step = uint32_t(*a.noise.step);
  const Division at = divide(offset, e.channels);
  const uint64_t element = uint64_t(a.noise.element_offset + at.remainder * e.positions + at.quotient);
  const int lane = int(threadIdx.x) % kWarp;
  // The first lane of each block stands for it; features beyond the chunk share a block of their own and no lane.
  const unsigned peers = __match_any_sync(kFullWarp, mine ? element / kLanes : ~uint64_t(0));
  const int leader = __ffs(int(peers)) - 1;
  const unsigned leaders = __ballot_sync(kFullWarp, mine && lane == leader);
  const int held = __popc(leaders), rank = __popc(leaders & ((1u << leader) - 1u));
  if (held == 0) return;
  if (mine && lane == leader) blocks[rank] = element / kLanes;
  __syncwarp();
  const int batch = kDrawn / held;
  for (int64_t start = 0; start < draws.count; start += batch) {
    const int now = int(draws.count - start < batch ? draws.count - start : batch);
    for (int i = lane; i < now * held; i += kWarp) {
      S z[kLanes];
      normals<S>(philox(key, blocks[i % held], draws.sample(start + i / held), step), z);
#pragma unroll
      for (int part = 0; part < kLanes; ++part) drawn[i][part] = z[part];
    }
    __syncwarp();
    if (mine)
      for (int i = 0; i < now; ++i) {
        const S z = drawn[i * held + rank][element % kLanes];
        draws.rows(start + i, sigma, [&](int64_t row, S signed_sigma) {
          store(noisy + row * features, base + signed_sigma * z);
        });
      }
    __syncwarp();
  }
}

// v * factor; exactly +0 for a factor of 0, and NaN for NaN.
template <class S>
__device__ __forceinline__ S scaled(S v, S factor) {
  return factor == S(0) ? S(0) * (v - v) : v * factor;
}

// Two blocks on a multiprocessor: without the word of it, ptxas takes 160 registers for sm_120, where but one fits.
template <class T>
__global__ void __launch_bounds__(kGroupThreads, 2) prox_step_group_kernel(ProxStep a, Draws draws, int64_t chunks_each) {
  using S = state_t<T>;
  __shared__ S factors[kChunk][2];  // of the group whose first member is chunk.start + i: for v, for p
  __shared__ double shared[kGroupWarps][2];
  __shared__ uint64_t blocks[kGroupWarps][kWarp];
  __shared__ S drawn[kGroupWarps][kDrawn][kLanes];
  const int warp = int(threadIdx.x) / kWarp;
  const int64_t features = a.extents.channels * a.extents.positions;
  for (int64_t item = blockIdx.x; item < a.extents.batch * chunks_each; item += gridDim.x) {
    const Division at = divide(item, chunks_each);
    const int64_t input = at.quotient, row = a.groups.per_input ? input : 0;
    const Chunk chunk(a.groups, features, input, at.remainder);
    const Scalars<S> k(a, input);
    const T* gradients = static_cast<const T*>(a.gradients) + input * a.samples * features;
    S* gradient = static_cast<S*>(a.gradient) + input * features;
    S* displacement = static_cast<S*>(a.displacement) + input * features;

    // 1. The averaged gradient.
    for (int64_t member = chunk.member + threadIdx.x; member < chunk.members_end; member += kGroupThreads) {
      const int64_t offset = chunk.order[member];
      const S sum = add_rows(a.carry ? gradient[offset] : S(0), gradients, a.samples, features, offset);
      gradient[offset] = sum / k.count;
    }
    __syncthreads();

    // 2. Norms and factors of the groups.
    group_sums<2>(
        chunk, shared,
        [&](int64_t member, double(&sums)[2]) {
          const int64_t offset = chunk.order[member];
          const S p = gradient[offset];
          const double v = k.pull(displacement[offset], p), g = p;
          sums[0] = fma(v, v, sums[0]);
          sums[1] = fma(g, g, sums[1]);
        },
        [&](int64_t g, int64_t first, int64_t, const double(&sums)[2]) {
          const double threshold = double(static_cast<const S*>(a.eta)[input * a.eta_input]) *
                                   double(static_cast<const S*>(a.groups.weights)[row * a.groups.count + g]);
          factors[first - chunk.start][0] = S(group_factor(sqrt(sums[0]), double(k.step_size) * threshold));
          factors[first - chunk.start][1] = S(group_factor(sqrt(sums[1]), threshold));
        });
    __syncthreads();

    // 3. The step. Every thread makes every round, since the lanes of a warp share their normals.
    Sums sums;
    for (int64_t first = chunk.member; first < chunk.members_end; first += kGroupThreads) {
      const bool mine = first + threadIdx.x < chunk.members_end;
      int64_t offset = 0;
      S base = 0;
      if (mine) {
        offset = chunk.order[first + threadIdx.x];
        const S(&factor)[2] = factors[chunk.offsets[chunk.labels[offset]] - chunk.start];
        const S p = gradient[offset], d = displacement[offset];
        const S next = scaled(k.pull(d, p), factor[0]);
        sums.add(d, S(-k.rho * scaled(p, factor[1])), p);
        displacement[offset] = next;
        if (a.total_of != Total::none)
          static_cast<S*>(a.total)[input * features + offset] += a.total_of == Total::gradient ? p : next;
        if (draws.count > 0) base = load(static_cast<const T*>(a.x)[input * features + offset]) + next;
      }
      if (draws.count > 0) write_noisy_members<T>(a, draws, input, mine, offset, base, blocks[warp], drawn[warp]);
    }
    // Its barriers also keep the next item from `factors` until all have read them.
    finish_sums<kGroupWarps>(sums.of, a.partials + input * chunks_each * kStatistics, a.arrivals + input, at.remainder,
                             chunks_each, a.statistics + input * kStatistics);
  }
}

template <class T>
void run_group(const ProxStep& a, void* stream) {
  const int64_t each = chunks(a.extents);
  launch("prox_step", prox_step_group_kernel<T>, a.extents.batch * each, kGroupThreads, stream, a, Draws(a.noise), each);
}

}  // namespace

int64_t prox_step_partials(const Extents& extents, bool grouped) {
  return grouped ? chunks(extents) : blocks_each(extents);
}

void prox_step(const ProxStep& a, int device, void* stream) {
  if (a.extents.batch * a.extents.channels * a.extents.positions == 0) return;
  const DeviceGuard guard(device, "prox_step");
  dispatch(a.dtype, [&](auto t) {
    using T = decltype(t);
    a.penalty == Penalty::group ? run_group<T>(a, stream) : run_elementwise<T>(a, stream);
  });
}

}  // namespace moreau::cuda
