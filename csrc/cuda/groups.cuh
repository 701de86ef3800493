// How blocks share the groups of an input, and sums over the members of every group.
#pragma once

#include <type_traits>

#include "../kernels.h"
#include "reduce.cuh"

namespace moreau::cuda {

constexpr int kGroupThreads = 256;
constexpr int kGroupWarps = kGroupThreads / kWarp;

// Chunk k of an input owns the groups that start in [k * kChunk, (k + 1) * kChunk) of `order`: whole groups only, at
// most kChunk of them with members, of which only the last can reach beyond the chunk. Members are counted with 32 bits,
// as `order` counts them.
constexpr int kChunk = 256;

inline int64_t chunks(const Extents& e) { return (e.channels * e.positions + kChunk - 1) / kChunk; }

struct Chunk {
  const int32_t* order;
  const int32_t* offsets;
  const int32_t* labels;
  int32_t start;  // k * kChunk
  int32_t group, groups_end;
  int32_t member, members_end;

  __device__ __forceinline__ Chunk(const Groups& groups, int64_t features, int64_t input, int64_t k) {
    const int64_t row = groups.per_input ? input : 0;
    order = groups.order + row * features;
    labels = groups.labels + row * features;
    offsets = groups.offsets + row * (groups.count + 1);
    start = int32_t(k * kChunk);
    group = k == 0 ? 0 : first_at(start);
    groups_end = (k + 1) * kChunk >= features ? int32_t(groups.count) : first_at(start + kChunk);
    member = offsets[group];
    members_end = offsets[groups_end];
  }

 private:
  // The first group that has members and starts at `position` or later; groups.count where the last one started before.
  __device__ __forceinline__ int32_t first_at(int32_t position) const {
    const int32_t g = labels[order[position]];
    return offsets[g] == position ? g : g + 1;
  }
};

// Calls done(g, first, sums) once for every group g whose members begin at `first` of `order`, where sums adds up what
// add(member, sums) adds for each of them. The order of a sum follows from the size of the group alone: eight
// lanes up to 32 members (pixels, tokens), a warp up to 256 (small tiles), else the block. Every thread of the block
// calls it; `shared` is scratch.
template <int kCount, class Add, class Done>
__device__ __forceinline__ void group_sums(const Chunk& chunk, double (&shared)[kGroupWarps][kCount], Add add,
                                           Done done) {
  const int thread = int(threadIdx.x);
  const auto walk = [&](auto width, int least, int most) {
    constexpr int kWidth = decltype(width)::value;
    // All lanes of a warp make the same number of rounds, since they meet in the shuffles.
    for (int64_t round = chunk.group; round < chunk.groups_end; round += kGroupThreads / kWidth) {
      const int64_t g = round + thread / kWidth;
      int32_t first = 0, last = 0;
      if (g < chunk.groups_end) first = chunk.offsets[g], last = chunk.offsets[g + 1];
      const bool mine = last - first >= least && last - first <= most;
      double sums[kCount] = {};
      if (mine)
        for (int32_t member = first + thread % kWidth; member < last; member += kWidth) add(member, sums);
      if (!__any_sync(kFullWarp, mine)) continue;
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i] = lanes_sum<kWidth>(sums[i]);
      if (mine && thread % kWidth == 0) done(g, first, sums);
    }
  };
  walk(std::integral_constant<int, 8>(), 1, 32);
  walk(std::integral_constant<int, kWarp>(), 33, kChunk);
  // A longer one starts in this chunk and ends beyond it, so it is the last that has members.
  if (chunk.members_end - chunk.member <= kChunk) return;
  const int32_t g = chunk.labels[chunk.order[chunk.members_end - 1]];
  const int32_t first = chunk.offsets[g], last = chunk.members_end;
  if (last - first <= kChunk) return;
  double sums[kCount] = {};
  for (int64_t member = first + thread; member < last; member += kGroupThreads) add(int32_t(member), sums);
  block_sum<kGroupWarps>(sums, shared);
  if (thread == 0) done(g, first, sums);
}

}  // namespace moreau::cuda
