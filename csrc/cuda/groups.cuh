// How blocks share the groups of an input, and sums over the members of every group.
#pragma once

#include "../kernels.h"
#include "reduce.cuh"

namespace moreau::cuda {

// Chunk k of an input owns the groups that start in [k * kChunk, (k + 1) * kChunk) of `order`: whole groups only, of
// which only the last can reach beyond the chunk. Members are counted with 32 bits, as `order` counts them.
constexpr int kChunk = 1024;

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
  // The first group that has members and starts at `position` or later; groups.count where the last one started before.
  __device__ __forceinline__ int32_t first_at(int64_t position) const {
    const int32_t g = labels[order[position]];
    return offsets[g] == position ? g : g + 1;
  }
};

// Up to so many members one lane adds up (pixels); up to kChunk a warp (tiles, tokens); more, kParts warps.
constexpr int kLaneMembers = 32;
constexpr int kParts = 8;

// sums += what add(member, sums) adds for every `stride`-th member from `first` on. Loads of some are in flight
// together.
template <int kCount, class Add>
__device__ __forceinline__ void add_members(double (&sums)[kCount], int64_t first, int64_t last, int64_t stride,
                                            const Add& add) {
#pragma unroll 4
  for (int64_t member = first; member < last; member += stride) add(int32_t(member), sums);
}

// Calls done(g, sums) once for every group g of a chunk that has members, where sums adds up what add(member, sums)
// adds for each of them. The order of a sum follows from the size of the group alone, whatever the size of the block.
// Every thread of the block calls it; `shared` is scratch.
template <int kCount, class Add, class Done>
__device__ __forceinline__ void group_sums(const Chunk& chunk, double (&shared)[kParts][kCount], const Add& add,
                                           const Done& done) {
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const int warp = thread / kWarp, lane = thread % kWarp, warps = threads / kWarp;
  bool tiles = false;  // any that a warp adds up
  for (int64_t g = chunk.group + thread; g < chunk.groups_end; g += threads) {
    const int32_t first = chunk.offsets[g], last = chunk.offsets[g + 1];
    tiles = tiles || last - first > kLaneMembers;
    if (last == first || last - first > kLaneMembers) continue;
    double sums[kCount] = {};
    add_members(sums, first, last, 1, add);
    done(g, sums);
  }
  if (!__syncthreads_or(tiles)) return;
  for (int64_t g = chunk.group + warp; g < chunk.groups_end; g += warps) {
    const int32_t first = chunk.offsets[g], last = chunk.offsets[g + 1];
    if (last - first <= kLaneMembers || last - first > kChunk) continue;
    double sums[kCount] = {};
    add_members(sums, first + lane, last, kWarp, add);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = lanes_sum<kWarp>(sums[i]);
    if (lane == 0) done(g, sums);
  }
  // A longer one starts in this chunk and ends beyond it, so it is the last that has members.
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
