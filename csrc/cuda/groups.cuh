// Division of an input's groups over blocks, and sums over the members of every group.
#pragma once

#include "../kernels.h"
#include "reduce.cuh"

namespace moreau::cuda {

constexpr int kChunk = Sizes::chunk, kLaneMembers = Sizes::lane_members, kParts = Sizes::parts;

// Chunk k of an input owns the groups that start in [k * kChunk, (k + 1) * kChunk) of `order`, as a whole; its last
// group can extend beyond the chunk. Members have 32-bit numbers, as in `order`.

inline int64_t chunks(const Extents& e) { return (e.channels * e.positions + kChunk - 1) / kChunk; }

struct Chunk {
  const int32_t* order;
  const int32_t* offsets;
  const int32_t* labels;
  int32_t group, groups_end;
  int32_t member, members_end;

  __device__ __forceinline__ Chunk(const Groups& groups, int64_t features, int64_t input, int64_t k) {
    const int64_t row = groups.per_input ? input : 0;
    order = groups.order + row * features;
    labels = groups.labels + row * features;
    offsets = groups.offsets + row * (groups.count + 1);
    group = k == 0 ? 0 : first_at(k * kChunk);
    groups_end = (k + 1) * kChunk >= features ? int32_t(groups.count) : first_at((k + 1) * kChunk);
    member = offsets[group];
    members_end = offsets[groups_end];
  }

 private:
  // The first non-empty group that starts at `position` or later; groups.count if there is none.
  __device__ __forceinline__ int32_t first_at(int64_t position) const {
    const int32_t g = labels[order[position]];
    return offsets[g] == position ? g : g + 1;
  }
};

// Calls add(member, sums) for every `stride`-th member from `first` on. The loads of four members are in flight
// together.
template <int kCount, class Add>
__device__ __forceinline__ void add_members(double (&sums)[kCount], int64_t first, int64_t last, int64_t stride,
                                            const Add& add) {
#pragma unroll 4
  for (int64_t member = first; member < last; member += stride) add(int32_t(member), sums);
}

// Calls done(g, sums) once for every non-empty group g of a chunk, with the sums of add(member, sums) over its members.
// One lane sums a group of up to kLaneMembers members, a warp one of up to kChunk members, kParts warps a larger one.
// The order of a sum depends on the size of the group alone, not on the size of the block. Every thread of the block
// calls this; `shared` is scratch memory.
template <int kCount, class Add, class Done>
__device__ __forceinline__ void group_sums(const Chunk& chunk, double (&shared)[kParts][kCount], const Add& add,
                                           const Done& done) {
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const int warp = thread / kWarp, lane = thread % kWarp, warps = threads / kWarp;
  bool large = false;  // whether the chunk has a group of more than kLaneMembers members
  for (int64_t g = chunk.group + thread; g < chunk.groups_end; g += threads) {
    const int32_t first = chunk.offsets[g], last = chunk.offsets[g + 1];
    large = large || last - first > kLaneMembers;
    if (last == first || last - first > kLaneMembers) continue;
    double sums[kCount] = {};
    add_members(sums, first, last, 1, add);
    done(g, sums);
  }
  if (!__syncthreads_or(large)) return;
  for (int64_t g = chunk.group + warp; g < chunk.groups_end; g += warps) {
    const int32_t first = chunk.offsets[g], last = chunk.offsets[g + 1];
    if (last - first <= kLaneMembers || last - first > kChunk) continue;
    double sums[kCount] = {};
    add_members(sums, first + lane, last, kWarp, add);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = lanes_sum<kWarp>(sums[i]);
    if (lane == 0) done(g, sums);
  }
  // A group of more than kChunk members ends beyond the chunk, so it is the last non-empty one.
  if (chunk.members_end - chunk.member <= kChunk) return;
  const int32_t g = chunk.labels[chunk.order[chunk.members_end - 1]];
  const int32_t first = chunk.offsets[g], last = chunk.members_end;
  if (last - first <= kChunk) return;
  for (int part = warp; part < kParts; part += warps) {
    double sums[kCount] = {};
    add_members(sums, int64_t(first) + part * kWarp + lane, last, kParts * kWarp, add);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = lanes_sum<kWarp>(sums[i]);
    if (lane == 0)
#pragma unroll
      for (int i = 0; i < kCount; ++i) shared[part][i] = sums[i];
  }
  __syncthreads();
  if (thread > 0) return;
  double sums[kCount] = {};
  for (int part = 0; part < kParts; ++part)
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] += shared[part][i];
  done(g, sums);
}

}  // namespace moreau::cuda
