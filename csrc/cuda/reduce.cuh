// Sums over a block, in an order that depends on nothing but its size.
#pragma once

#include "launch.cuh"

namespace moreau::cuda {

// Sum over 2^k neighbouring lanes of a warp, the same bits in each of them.
template <int kWidth>
__device__ __forceinline__ double lanes_sum(double value) {
#pragma unroll
  for (int apart = kWidth / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(kFullWarp, value, apart);
  return value;
}

// Sums over the first kWarps warps, for thread 0; every thread of the block calls it. `shared` is free for other use
// only after a barrier.
template <int kWarps, int kCount>
__device__ __forceinline__ void block_sum(double (&sums)[kCount], double (&shared)[kWarps][kCount]) {
  const int warp = int(threadIdx.x) / kWarp;
  if (warp < kWarps) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = lanes_sum<kWarp>(sums[i]);
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) shared[warp][i] = sums[i];
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      for (int other = 1; other < kWarps; ++other) sums[i] += shared[other][i];
  }
}

// The counter of an input counts the blocks that have done their part in its low half. A kernel whose blocks wait for
// each other counts those that have begun in its high half.
constexpr int32_t kArrived = 0xffff;

// What each of an input's `blocks` blocks adds up, summed over them in order by the last one to arrive, which finds
// `before` + blocks - 1 arrived. Every thread of a block calls it. `partials` is scratch of the input, `arrivals` its
// counter, zero afterwards.
template <int kWarps, int kCount>
__device__ __forceinline__ void finish_sums(double (&sums)[kCount], double* partials, int32_t* arrivals, int64_t block,
                                            int64_t blocks, double* results, int64_t before = 0) {
  __shared__ double shared[kWarps][kCount];
  __shared__ bool last;
  block_sum<kWarps>(sums, shared);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) partials[block * kCount + i] = sums[i];
    __threadfence();  // the sums before the arrival
    last = (atomicAdd(arrivals, 1) & kArrived) == int32_t(before + blocks - 1);
  }
  __syncthreads();
  if (last) {
    __threadfence();
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = 0;
    // Past the first-level cache, which does not see what other multiprocessors wrote.
    if (threadIdx.x < kWarps * kWarp)
      for (int64_t other = threadIdx.x; other < blocks; other += kWarps * kWarp) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) sums[i] += __ldcg(partials + other * kCount + i);
      }
    block_sum<kWarps>(sums, shared);
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) results[i] = sums[i];
      *arrivals = 0;
    }
  }
  __syncthreads();  // before the next item takes `shared` and `last`
}

}  // namespace moreau::cuda
