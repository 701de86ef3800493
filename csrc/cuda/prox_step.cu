// The fused step: mean of the gradients, pull to zero, shrinkage, statistics, next noisy copies, in one launch.
//
// Elementwise penalties: a block owns quads of one input. Groups: a block owns the groups that start in one chunk of
// the sorted members, and works on the quads that hold them. Where quads are few, `slices` threads share each of them:
// all load gradients and write noisy copies, the first one adds and steps. Statistics are summed in an order that
// follows from the extents and the groups.
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
// 512 threads leave 128 registers each; double, which needs more, has half as many threads.
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

// Whether quads travel as vectors in every tensor.
template <class T>
bool whole_vectors(const ProxStep& a, const Quads& quads) {
  using S = state_t<T>;
  return quads.whole() && aligned(static_cast<const T*>(a.gradients)) && aligned(static_cast<const T*>(a.x)) &&
         aligned(static_cast<const T*>(a.noisy)) && aligned(static_cast<const S*>(a.gradient)) &&
         aligned(static_cast<const S*>(a.displacement)) && aligned(static_cast<const S*>(a.total));
}

// --- none, l1 --------------------------------------------------------------------------------------------------------

// The new displacement of one quad from the sum of its gradients, its statistics and running total.
template <bool kVector, class S>
__device__ __forceinline__ void step_quad(const ProxStep& a, const Scalars<S>& k, int64_t input, int64_t features,
                                          const Quad& quad, Pack<S>& p, Sums& sums) {
  S* gradient = static_cast<S*>(a.gradient) + input * features;
  S* displacement = static_cast<S*>(a.displacement) + input * features;
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
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kQuads* kMostSlices<T>, 1)
    prox_step_kernel(ProxStep a, Quads quads, Draws draws, int64_t blocks) {
  using S = state_t<T>;
  extern __shared__ uint4 staged[];  // for slices alone
  const Copies<T> copies{static_cast<const T*>(a.x), static_cast<const S*>(a.displacement), static_cast<T*>(a.noisy)};
  const Team team(kQuads);
  const int64_t features = quads.features(), count = quads.count();
  for (int64_t item = blockIdx.x; item < a.extents.batch * blocks; item += gridDim.x) {
    const Division at = divide(item, blocks);
    const int64_t input = at.quotient, block = at.remainder;
    const Scalars<S> k(a, input);
    const T* gradients = static_cast<const T*>(a.gradients) + input * a.samples * features;
    Sums sums;
    // The bounds are the block's, since its threads meet at barriers.
    for (int64_t first = block * kQuads; first < count; first += blocks * kQuads) {
      const bool mine = first + team.here < count;
      const Quad quad = quads[mine ? first + team.here : 0];
      Pack<S> p{};
      if (mine && team.slice == 0 && a.carry)
        p = load_quad<kVector>(static_cast<const S*>(a.gradient) + input * features, quad);
      if (team.slices > 1)
        add_rows_together<kVector>(p.v, gradients, a.samples, features, quad, mine, team,
                                   reinterpret_cast<Held<T>*>(staged));
      else if (mine)
        add_rows<kVector>(p.v, gradients, a.samples, features, quad);
      if (mine && team.slice == 0) step_quad<kVector>(a, k, input, features, quad, p, sums);
    }
    // Its barriers also let every thread see the new displacement. The copies come last, when no sum is held any more:
    // the registers are needed for the keys of the ten rounds.
    finish_sums<kQuadWarps>(sums.of, a.partials + input * blocks * kStatistics, a.arrivals + input, block, blocks,
                            a.statistics + input * kStatistics);
    if (draws.count == 0) continue;
    for (int64_t i = block * kQuads + team.here; i < count; i += blocks * kQuads)
      write_copies<kVector, false>(copies, features, quads[i], a.noise, draws, input, team.slice, team.slices);
  }
}

template <class T>
void run_elementwise(const ProxStep& a, void* stream) {
  using S = state_t<T>;
  const Quads quads(a.extents, a.noise.element_offset);
  const Draws draws(a.noise);
  const int64_t blocks = blocks_each(a.extents);
  const auto kernel = whole_vectors<T>(a, quads) ? prox_step_kernel<T, true> : prox_step_kernel<T, false>;
  const int64_t rows = std::max<int64_t>(a.samples, draws.count);
  const int slices = slices_for(a.extents.batch * quads.count(), rows, kMostSlices<T>), threads = kQuads * slices;
  const size_t stage = slices > 1 ? kStaged<T, true> * threads * sizeof(Held<T>) : 0;  // at most 32 KB
  launch("prox_step", kernel, a.extents.batch * blocks, threads, stage, stream, a, quads, draws, blocks);
}

// --- group -----------------------------------------------------------------------------------------------------------

// The quads that hold the members of a chunk, a window of members at a time. A quad belongs to the first of its members
// that the chunk owns, and has the lanes of them all: with pixels its four features are of four groups.
constexpr int kWindow = 1024;

struct Window {
  int32_t quads[kWindow];
  uint8_t lanes[kWindow];
  int counts[kWindow / kGroupThreads][kGroupWarps];

  // Makes the list of the members [first, first + kWindow) and returns its length. Every thread of the block calls it.
  __device__ __forceinline__ int list(const Chunk& chunk, const Quads& all, int64_t first) {
    const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
    const int64_t last = first + kWindow < chunk.members_end ? first + kWindow : chunk.members_end;
    int length = 0;
    __syncthreads();  // nobody reads the previous list any more
#pragma unroll 1
    for (int round = 0; first < last; ++round, first += kGroupThreads) {
      const int64_t member = first + threadIdx.x;
      int64_t number = 0;
      unsigned owned = 0;
      bool leads = false;
      if (member < last) {
        const int64_t offset = chunk.order[member];
        number = all.holding(offset);
        const Quad quad = all[number];
#pragma unroll
        for (int part = kLanes - 1; part >= 0; --part)
          if (quad.has(part)) {
            const int64_t other = quad.offset + part * quad.stride;
            const int32_t group = chunk.labels[other];
            if (group >= chunk.group && group < chunk.groups_end) owned |= 1u << part, leads = other == offset;
          }
      }
      const unsigned leaders = __ballot_sync(kFullWarp, leads);
      if (lane == 0) counts[round][warp] = __popc(leaders);
      __syncthreads();
      int before = length + __popc(leaders & ((1u << lane) - 1u));
#pragma unroll
      for (int other = 0; other < kGroupWarps; ++other) {
        if (other < warp) before += counts[round][other];
        length += counts[round][other];
      }
      if (leads) quads[before] = int32_t(number), lanes[before] = uint8_t(owned);
    }
    __syncthreads();
    return length;
  }

  __device__ __forceinline__ Quad operator()(const Quads& all, int at) const {
    Quad quad = all[quads[at]];
    quad.lanes = lanes[at];
    return quad;
  }
};

// v * factor; exactly +0 for a factor of 0, and NaN for NaN.
template <class S>
__device__ __forceinline__ S scaled(S v, S factor) {
  return factor == S(0) ? S(0) * (v - v) : v * factor;
}

// Two blocks on a multiprocessor: without the word of it, ptxas takes more registers, where but one fits. Double spills
// with 128.
template <class T, bool kVector>
__global__ void __launch_bounds__(kGroupThreads, sizeof(T) == 8 ? 1 : 2)
    prox_step_group_kernel(ProxStep a, Quads quads, Draws draws, int64_t chunks_each) {
  using S = state_t<T>;
  __shared__ S factors[kChunk][2];  // of the group whose first member is chunk.start + i: for v, for p
  __shared__ double shared[kGroupWarps][2];
  __shared__ Window window;
  extern __shared__ uint4 staged[];
  const Copies<T> copies{static_cast<const T*>(a.x), static_cast<const S*>(a.displacement), static_cast<T*>(a.noisy)};
  const int64_t features = quads.features();
  for (int64_t item = blockIdx.x; item < a.extents.batch * chunks_each; item += gridDim.x) {
    const Division at = divide(item, chunks_each);
    const int64_t input = at.quotient, row = a.groups.per_input ? input : 0;
    const Chunk chunk(a.groups, features, input, at.remainder);
    const Scalars<S> k(a, input);
    const T* gradients = static_cast<const T*>(a.gradients) + input * a.samples * features;
    S* gradient = static_cast<S*>(a.gradient) + input * features;
    S* displacement = static_cast<S*>(a.displacement) + input * features;
    int listed = 0;
    // Calls each(quad, mine, team) for the quads of the chunk, as many at a time as the threads of the block can share.
    const auto walk = [&](auto each) {
      for (int64_t first = chunk.member; first < chunk.members_end; first += kWindow) {
        // One window serves both walks.
        if (listed == 0 || chunk.members_end - chunk.member > kWindow) listed = window.list(chunk, quads, first);
        const int warps = (listed + kWarp - 1) / kWarp;
        const Team team(kWarp * (warps < 1 ? 1 : warps < kGroupWarps ? warps : kGroupWarps));
        for (int start = 0; start < listed; start += team.width) {
          const bool mine = team.slice < team.slices && start + team.here < listed;
          each(mine ? window(quads, start + team.here) : Quad{}, mine, team);
        }
      }
    };

    // 1. The averaged gradient.
    walk([&](const Quad& quad, bool mine, const Team& team) {
      Pack<S> p{};
      if (mine && team.slice == 0 && a.carry) p = load_quad<kVector>(gradient, quad);
      if (team.slices > 1)
        add_rows_together<kVector>(p.v, gradients, a.samples, features, quad, mine, team,
                                   reinterpret_cast<Held<T>*>(staged));
      else if (mine)
        add_rows<kVector>(p.v, gradients, a.samples, features, quad);
      if (!mine || team.slice > 0) return;
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) p.v[lane] /= k.count;
      store_members<kVector>(gradient, quad, p.v);
    });
    __syncthreads();

    // 2. Norms and factors of the groups.
    group_sums<2>(
        chunk, shared,
        [&](int32_t member, double(&sums)[2]) {
          const int64_t offset = chunk.order[member];
          const S p = gradient[offset];
          const double v = k.pull(displacement[offset], p), g = p;
          sums[0] = fma(v, v, sums[0]);
          sums[1] = fma(g, g, sums[1]);
        },
        [&](int64_t g, int32_t first, const double(&sums)[2]) {
          const double threshold = double(static_cast<const S*>(a.eta)[input * a.eta_input]) *
                                   double(static_cast<const S*>(a.groups.weights)[row * a.groups.count + g]);
          factors[first - chunk.start][0] = S(group_factor(sqrt(sums[0]), double(k.step_size) * threshold));
          factors[first - chunk.start][1] = S(group_factor(sqrt(sums[1]), threshold));
        });
    __syncthreads();

    // 3. The step.
    Sums sums;
    walk([&](const Quad& quad, bool mine, const Team& team) {
      if (!mine || team.slice > 0) return;
      const Pack<S> p = load_quad<kVector>(gradient, quad), d = load_quad<kVector>(displacement, quad);
      S next[kLanes];
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane)
        if (quad.has(lane)) {
          const int64_t group = chunk.labels[quad.offset + lane * quad.stride];
          const S(&factor)[2] = factors[chunk.offsets[group] - chunk.start];
          next[lane] = scaled(k.pull(d.v[lane], p.v[lane]), factor[0]);
          sums.add(d.v[lane], S(-k.rho * scaled(p.v[lane], factor[1])), p.v[lane]);
        }
      store_members<kVector>(displacement, quad, next);
      if (a.total_of == Total::none) return;
      S* to = static_cast<S*>(a.total) + input * features;
      Pack<S> total = load_quad<kVector>(to, quad);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane)
        total.v[lane] += a.total_of == Total::gradient ? p.v[lane] : next[lane];
      store_members<kVector>(to, quad, total.v);
    });
    // As above; its barriers also keep the next item from `factors` until all have read them.
    finish_sums<kGroupWarps>(sums.of, a.partials + input * chunks_each * kStatistics, a.arrivals + input, at.remainder,
                             chunks_each, a.statistics + input * kStatistics);

    // 4. The copies.
    if (draws.count == 0) continue;
    walk([&](const Quad& quad, bool mine, const Team& team) {
      if (mine)
        write_copies<kVector, true>(copies, features, quad, a.noise, draws, input, team.slice, team.slices);
    });
  }
}

template <class T>
void run_group(const ProxStep& a, void* stream) {
  const Quads quads(a.extents, a.noise.element_offset);
  const int64_t each = chunks(a.extents);
  const auto kernel = whole_vectors<T>(a, quads) ? prox_step_group_kernel<T, true> : prox_step_group_kernel<T, false>;
  const size_t stage = kStaged<T, true> * kGroupThreads * sizeof(Held<T>);
  launch("prox_step", kernel, a.extents.batch * each, kGroupThreads, stage, stream, a, quads, Draws(a.noise), each);
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
