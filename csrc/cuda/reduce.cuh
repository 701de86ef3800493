// Sums over a block, in an order that depends on its size alone.
#pragma once

#include "launch.cuh"

namespace moreau::cuda {

// Sum over kWidth neighbouring lanes of a warp, the same bits in each of them.
template <int kWidth>
__device__ __forceinline__ double lanes_sum(double value) {
  static_assert(kWidth <= kWarp && (kWidth & (kWidth - 1)) == 0, "a power of two");
#pragma unroll
  for (int apart = kWidth / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(kFullWarp, value, apart);
  return value;
}

// Sums over the first kWarps warps of a block; thread 0 gets them. Every thread of the block calls this. Other uses of
// `shared` have to follow a barrier.
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

// results = the sums of the `blocks` blocks of an input, added in the order of the blocks by the last one to arrive,
// which finds before + blocks - 1 arrivals. Every thread of a block calls this. `partials` is scratch memory of the
// input. `arrivals` is its counter, zero afterwards: arrived blocks in the low half; in the high half the blocks that
// started, for kernels whose blocks wait for each other.
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
    last = (atomicAdd(arrivals, 1) & Sizes::arrived) == int32_t(before + blocks - 1);
  }
  __syncthreads();
  if (last) {
    __threadfence();
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = 0;
    // __ldcg bypasses the first-level cache, which does not see writes of other multiprocessors.
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
