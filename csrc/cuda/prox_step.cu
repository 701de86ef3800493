// The fused proximal gradient step, in one launch:
//
//   p      = sum_k gradients[k] / count                          average gradient
//   y      = -rho S_eta(p)                                       KKT image of delta
//   stats  = ||delta - y||^2, ||delta||^2, ||y||^2, ||p||^2, non-zeros of y
//   v      = (1 - gamma / rho) delta - gamma p                   gradient step, gamma = step_size
//   delta  = S_{gamma eta}(v)                                    proximal map of gamma eta Omega
//   total += p or delta
//   noisy[k] = x + delta + sigma z(k)                            next noisy copies
//
// S_t is the identity without a penalty, v - clip(v, -t, t) for l1, and v_g max(1 - t w_g / ||v_g||, 0) for groups.
//
// A block owns quads of one input. Where quads are few, `slices` threads share each quad: all of them load gradients
// and write noisy copies; the first one adds and steps. The order of the statistics' sums depends on the extents alone.
// With groups, an input has three kinds of blocks, each of which waits for the one before: blocks that average the
// gradients, blocks that sum over the groups, and blocks that step.
#include "../shrinkage.h"
#include "gradients.cuh"
#include "groups.cuh"
#include "noise.cuh"

namespace moreau::cuda {
namespace {

constexpr int kQuads = Sizes::quads;
constexpr int kQuadWarps = kQuads / kWarp;
// Blocks of one input.
MOREAU_LIMIT(kMostBlocks, Sizes::most_blocks, blocks);

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
struct Statistics {
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

int64_t blocks_each(const Extents& e) { return std::min((Quads(e, 0).count() + kQuads - 1) / kQuads, kMostBlocks); }

// Whether quads are loaded as vectors in every tensor.
template <class T>
bool whole_vectors(const ProxStep& a, const Quads& quads) {
  using S = state_t<T>;
  return quads.whole() && aligned(static_cast<const T*>(a.gradients)) && aligned(static_cast<const T*>(a.x)) &&
         aligned(static_cast<const T*>(a.noisy)) && aligned(static_cast<const S*>(a.gradient)) &&
         aligned(static_cast<const S*>(a.displacement)) && aligned(static_cast<const S*>(a.total)) &&
         aligned(a.groups.labels);
}

// --- the step of one quad --------------------------------------------------------------------------------------------

// Shrinkage of the lanes of a quad without groups: v by gamma eta, p by eta.
template <class S>
struct Thresholds {
  S step_size, of[kLanes];

  __device__ __forceinline__ Thresholds(const ProxStep& a, const Scalars<S>& k, int64_t input, const Quad& quad)
      : step_size(k.step_size) {
    const S* __restrict__ eta = static_cast<const S*>(a.eta) + input * a.eta_input;
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      of[lane] = 0;  // soft_threshold(v, 0) is v
      if (a.penalty == Penalty::l1 && quad.has(lane))
        of[lane] = eta[(quad.offset + lane * quad.stride) * a.eta_feature];
    }
  }
  __device__ __forceinline__ S shrink_p(int lane, S p) const { return soft_threshold(p, of[lane]); }
  __device__ __forceinline__ S shrink_v(int lane, S v) const { return soft_threshold(v, step_size * of[lane]); }
};

// The factors of a group, adjacent in memory, so that one load brings both.
template <class S>
struct alignas(2 * sizeof(S)) Factors {
  S of_v, of_p;
};

// v times the factor of its group: exactly +0 for the factor 0, and NaN for NaN.
template <class S>
__device__ __forceinline__ S scaled(S v, S factor) {
  return factor == S(0) ? S(0) * (v - v) : v * factor;
}

// Shrinkage of the lanes of a quad with groups.
template <class S>
struct Scales {
  Factors<S> of[kLanes];

  template <bool kVector>
  __device__ __forceinline__ static Scales load(const Factors<S>* factors, const int32_t* labels, const Quad& quad) {
    const Pack<int32_t> groups = load_quad<kVector>(labels, quad);
    Scales scales;
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane)
      scales.of[lane] = kVector || quad.has(lane) ? factors[groups.v[lane]] : Factors<S>{};
    return scales;
  }
  __device__ __forceinline__ S shrink_p(int lane, S p) const { return scaled(p, of[lane].of_p); }
  __device__ __forceinline__ S shrink_v(int lane, S v) const { return scaled(v, of[lane].of_v); }
};

// From the average gradient p of one quad: its new displacement, its statistics and its running total.
template <bool kVector, class S, class Rule>
__device__ __forceinline__ void step_quad(const ProxStep& a, const Scalars<S>& k, int64_t row, const Quad& quad,
                                          const Pack<S>& p, const Rule& rule, Statistics& sums) {
  S* displacement = static_cast<S*>(a.displacement) + row;
  const Pack<S> d = load_quad<kVector>(displacement, quad);
  S next[kLanes];
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    next[lane] = rule.shrink_v(lane, k.pull(d.v[lane], p.v[lane]));
    if (quad.has(lane)) sums.add(d.v[lane], S(-k.rho * rule.shrink_p(lane, p.v[lane])), p.v[lane]);
  }
  store_quad<kVector>(displacement, quad, next);
  if (a.total_of == Total::none) return;
  S* __restrict__ to = static_cast<S*>(a.total) + row;
  Pack<S> total = load_quad<kVector>(to, quad);
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) total.v[lane] += a.total_of == Total::gradient ? p.v[lane] : next[lane];
  store_quad<kVector>(to, quad, total.v);
}

// The work of one block on an input: quads block * kQuads ... and every blocks * kQuads further.
template <class T, bool kVector>
struct Work {
  using S = state_t<T>;
  const ProxStep& a;
  const Quads& quads;
  const Draws& draws;
  Team team;
  int64_t input, block, blocks, features, count;
  Scalars<S> k;

  __device__ __forceinline__ Work(const ProxStep& args, const Quads& all, const Draws& drawn, int64_t of, int64_t mine,
                                  int64_t each)
      : a(args),
        quads(all),
        draws(drawn),
        team(kQuads),
        input(of),
        block(mine),
        blocks(each),
        features(all.features()),
        count(all.count()),
        k(args, of) {}

  // Calls each(quad, mine) for the quads of the block. All threads make the same number of calls, since they meet at
  // barriers; mine = false where a thread has no quad.
  template <class Each>
  __device__ __forceinline__ void for_quads(const Each& each) const {
    for (int64_t first = block * kQuads; first < count; first += blocks * kQuads) {
      const bool mine = first + team.index < count;
      each(quads[mine ? first + team.index : 0], mine);
    }
  }

  // p = sum_k gradients[k] / count, written to a.gradient. The step is a second loop that reads p again: in one loop
  // with the sums of the step, the registers would hold fewer loads in flight.
  __device__ __forceinline__ void average(uint4* staged) const {
    const T* __restrict__ gradients = static_cast<const T*>(a.gradients) + input * a.samples * features;
    S* gradient = static_cast<S*>(a.gradient) + input * features;
    for_quads([&](const Quad& quad, bool mine) {
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
      store_quad<kVector>(gradient, quad, p.v);
    });
  }

  // The step, with the shrinkage rule_of(quad) of each quad.
  template <class RuleOf>
  __device__ __forceinline__ Statistics step(const RuleOf& rule_of) const {
    const int64_t row = input * features;
    Statistics sums;
    for_quads([&](const Quad& quad, bool mine) {
      if (!mine || team.slice > 0) return;
      const Pack<S> p = load_quad<kVector>(static_cast<const S*>(a.gradient) + row, quad);
      step_quad<kVector>(a, k, row, quad, p, rule_of(quad), sums);
    });
    return sums;
  }

  // The statistics of all blocks of the input, after `before` arrivals of others; then the noisy copies. The barriers
  // of the sums also make the new displacement visible to every thread of the block. The copies come last, when the
  // sums no longer take registers, which the keys of Philox's ten rounds need.
  __device__ __forceinline__ void finish(Statistics& sums, int64_t before) const {
    finish_sums<kQuadWarps>(sums.of, a.partials + input * blocks * kStatistics, a.arrivals + input, block, blocks,
                            a.statistics + input * kStatistics, before);
    if (draws.count == 0) return;
    const Copies<T> copies{static_cast<const T*>(a.x), static_cast<const S*>(a.displacement), static_cast<T*>(a.noisy)};
    for (int64_t i = block * kQuads + team.index; i < count; i += blocks * kQuads)
      write_copies<kVector>(copies, features, quads[i], a.noise, draws, input, team.slice, team.slices);
  }
};

// --- none, l1 --------------------------------------------------------------------------------------------------------

// The step of the head of this file for no penalty and for l1.
template <class T, bool kVector>
__global__ void __launch_bounds__(Tuning<T>::bound, 1)
    prox_step_kernel(ProxStep a, Quads quads, Draws draws, int64_t blocks) {
  using S = state_t<T>;
  MOREAU_DYNAMIC_SHARED(uint4, staged);  // used by slices > 1
  for (int64_t item = blockIdx.x; item < a.extents.batch * blocks; item += gridDim.x) {
    const Division at = divide(item, blocks);
    const Work<T, kVector> work(a, quads, draws, at.quotient, at.remainder, blocks);
    work.average(staged);
    Statistics sums = work.step([&](const Quad& quad) { return Thresholds<S>(a, work.k, work.input, quad); });
    work.finish(sums, 0);
  }
}

// --- group -----------------------------------------------------------------------------------------------------------

// The order of the work. An input has `blocks` items that average, `chunk_blocks` that sum over its groups, and
// `blocks` that step.
struct Stages {
  int64_t batch, blocks, chunks, chunk_blocks, lag;

  MOREAU_HD int64_t each() const { return 2 * blocks + chunk_blocks; }
  MOREAU_HD int64_t items() const { return (batch + 2 * lag) * each(); }

  // The input of an item; outside [0, batch) there is none. A block does the next piece of its input's work, whichever
  // item it has: so a waiting block waits for blocks that have started, in whatever order the GPU starts them. Items
  // that sum over groups follow `lag` inputs after those that average, and items that step another `lag` after them. In
  // the usual order, first to last, they find their data ready; and while some blocks load, others draw noise.
  MOREAU_HD int64_t input(int64_t item) const {
    const Division at = divide(item, each());
    return at.quotient - (at.remainder < blocks ? 0 : at.remainder < blocks + chunk_blocks ? lag : 2 * lag);
  }
};

// Counts a block as arrived: its part is done and visible.
__device__ __forceinline__ void arrive(int32_t* arrivals) {
  __syncthreads();
  if (threadIdx.x > 0) return;
  __threadfence();
  atomicAdd(arrivals, 1);
}

// Waits until `count` blocks have arrived, and makes their writes visible to this block.
__device__ __forceinline__ void wait_for(const int32_t* arrivals, int64_t count) {
  if (threadIdx.x == 0) {
    while ((*static_cast<const volatile int32_t*>(arrivals) & Sizes::arrived) < count) __nanosleep(100);
    __threadfence();
  }
  __syncthreads();
}

// The step of the head of this file for groups.
template <class T, bool kVector>
__global__ void __launch_bounds__(Tuning<T>::bound, 1)
    prox_step_group_kernel(ProxStep a, Quads quads, Draws draws, Stages stages) {
  using S = state_t<T>;
  __shared__ int32_t ticket;
  __shared__ double shared[kParts][2];
  MOREAU_DYNAMIC_SHARED(uint4, staged);  // used by slices > 1
  const int64_t blocks = stages.blocks, summing = stages.chunk_blocks;
  for (int64_t item = blockIdx.x; item < stages.items(); item += gridDim.x) {
    const int64_t input = stages.input(item), row = a.groups.per_input ? input : 0;
    if (input < 0 || input >= stages.batch) continue;
    int32_t* arrivals = a.arrivals + input;
    if (threadIdx.x == 0) ticket = atomicAdd(arrivals, Sizes::arrived + 1) / (Sizes::arrived + 1);
    __syncthreads();
    const int64_t turn = ticket;
    Factors<S>* factors = static_cast<Factors<S>*>(a.factors) + input * a.groups.count;

    // 1. p = sum_k gradients[k] / count
    if (turn < blocks) {
      const Work<T, kVector> work(a, quads, draws, input, turn, blocks);
      work.average(staged);
      arrive(arrivals);
      continue;
    }

    // 2. factors[g] = max(1 - gamma eta w_g / ||v_g||, 0), max(1 - eta w_g / ||p_g||, 0)
    if (turn < blocks + summing) {
      wait_for(arrivals, blocks);
      const Scalars<S> k(a, input);
      const S* gradient = static_cast<const S*>(a.gradient) + input * quads.features();
      const S* displacement = static_cast<const S*>(a.displacement) + input * quads.features();
      const double eta = double(static_cast<const S*>(a.eta)[input * a.eta_input]);
      const S* weights = static_cast<const S*>(a.groups.weights) + row * a.groups.count;
      for (int64_t i = turn - blocks; i < stages.chunks; i += summing) {
        const Chunk chunk(a.groups, quads.features(), input, i);
        group_sums<2>(
            chunk, shared,
            [&](int32_t member, double (&sums)[2]) {
              const int64_t offset = chunk.order[member];
              const S p = gradient[offset];
              const double v = k.pull(displacement[offset], p), g = p;
              sums[0] = fma(v, v, sums[0]);
              sums[1] = fma(g, g, sums[1]);
            },
            [&](int64_t g, const double (&sums)[2]) {
              const double threshold = eta * double(weights[g]);
              factors[g] = {S(group_factor(sqrt(sums[0]), double(k.step_size) * threshold)),
                            S(group_factor(sqrt(sums[1]), threshold))};
            });
        __syncthreads();  // before the next chunk uses `shared`
      }
      arrive(arrivals);
      continue;
    }

    // 3. The step.
    wait_for(arrivals, blocks + summing);
    const Work<T, kVector> work(a, quads, draws, input, turn - blocks - summing, blocks);
    const int32_t* labels = a.groups.labels + row * work.features;
    Statistics sums =
        work.step([&](const Quad& quad) { return Scales<S>::template load<kVector>(factors, labels, quad); });
    work.finish(sums, blocks + summing);
  }
}

// --- launches --------------------------------------------------------------------------------------------------------

template <class T>
void run(const ProxStep& a, void* stream) {
  const Quads quads(a.extents, a.noise.element_offset);
  const Draws draws(a.noise);
  const int64_t batch = a.extents.batch, blocks = blocks_each(a.extents);
  const bool vectors = whole_vectors<T>(a, quads);
  const int64_t rows = std::max<int64_t>(a.samples, draws.count);
  const int slices = slices_for(batch * quads.count(), rows, Tuning<T>::most_slices), threads = kQuads * slices;
  const size_t stage = slices > 1 ? Tuning<T>::vector_staged * threads * Tuning<T>::quad_bytes : 0;
  if (a.penalty != Penalty::group) {
    const auto kernel = vectors ? prox_step_kernel<T, true> : prox_step_kernel<T, false>;
    return launch("prox_step", kernel, batch * blocks, threads, stage, stream, a, quads, draws, blocks);
  }
  Stages stages{batch, blocks, chunks(a.extents), 0, 0};
  stages.chunk_blocks = std::min(stages.chunks, kMostBlocks);
  // The inputs that the GPU works on at once; at most half of the batch.
  stages.lag = std::min(kBusy / (stages.each() * threads) + 1, (batch - 1) / 2);
  const auto kernel = vectors ? prox_step_group_kernel<T, true> : prox_step_group_kernel<T, false>;
  launch("prox_step", kernel, stages.items(), threads, stage, stream, a, quads, draws, stages);
}

}  // namespace

int64_t prox_step_partials(const Extents& extents) { return blocks_each(extents); }

void prox_step(const ProxStep& a, int device, void* stream) {
  if (a.extents.batch * a.extents.channels * a.extents.positions == 0) return;
  const DeviceGuard guard(device, "prox_step");
  dispatch(a.dtype, [&](auto t) { run<decltype(t)>(a, stream); });
}

}  // namespace moreau::cuda
