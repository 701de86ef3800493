// Sums over the samples of an input, in the order of the samples.
#pragma once

#include <cstring>
#include <type_traits>

#include "quads.cuh"

namespace moreau::cuda {

// Calls add<kRows>(k) for kRows samples from k at a time while as many are left, then for half of it and so on, so that
// loads are in flight together and none needs a test of its own.
template <int kRows, class Add>
__device__ __forceinline__ void for_rows(int64_t samples, Add add, int64_t k = 0) {
#pragma unroll 1
  for (; samples - k >= kRows; k += kRows) add(std::integral_constant<int, kRows>(), k);
  if constexpr (kRows > 1) for_rows<kRows / 2>(samples, add, k);
}

// Rows in flight before the first is added: with 8 a warp waits 4 times for memory at 32 samples, not 32 times, and the
// 20 warps of a multiprocessor have 80 KB in flight, or 40 of half the size, where 30 hide the latency. Scalar loads of
// a quad make do with fewer; double fits no more beside the state of a step.
template <class T, bool kVector>
constexpr int kRows = sizeof(T) == 8 ? 2
                      : !kVector     ? 4
                                     : 8;

// A quad as it is loaded, until it is added: on their own, 16-bit values would take a register each.
template <class T>
struct Held {
  using Word = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
  static constexpr int kWords = kLanes * sizeof(T) / sizeof(Word);
  Word words[kWords];

  template <class S>
  __device__ __forceinline__ void add_to(S (&sum)[kLanes]) const {
    Pack<T> row;
    memcpy(&row, words, sizeof row);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) sum[lane] += load(row.v[lane]);
  }
};

// The quad of one row of gradients. Vectors are marked as the first to leave the caches: nobody reads a gradient twice,
// while the model reads the noisy copies next. Scalar loads share their sectors with those of other lanes.
template <bool kVector, class T>
__device__ __forceinline__ Held<T> hold(const T* row, const Quad& quad) {
  Held<T> held;
  if constexpr (kVector) {
    const auto* words = reinterpret_cast<const typename Held<T>::Word*>(row + quad.offset);
#pragma unroll
    for (int i = 0; i < Held<T>::kWords; ++i) held.words[i] = __ldcs(words + i);
  } else {
    const Pack<T> pack = load_quad<false>(row, quad);
    memcpy(held.words, &pack, sizeof pack);
  }
  return held;
}

// sum += the rows at one quad; `rows` is the input's first row. Empty lanes hold nothing of meaning afterwards.
template <bool kVector, class T, class S>
__device__ __forceinline__ void add_rows(S (&sum)[kLanes], const T* rows, int64_t samples, int64_t features,
                                         const Quad& quad) {
  if (quad.lanes == 0) return;
  if constexpr (kVector) {
    for_rows<kRows<T, true>>(samples, [&](auto count, int64_t k) {
      Held<T> held[decltype(count)::value];
#pragma unroll
      for (int r = 0; r < decltype(count)::value; ++r) held[r] = hold<true>(rows + (k + r) * features, quad);
#pragma unroll
      for (int r = 0; r < decltype(count)::value; ++r) held[r].add_to(sum);
    });
  } else {
    // Empty lanes read what their nearest neighbour reads, which spares a test in front of every load.
    const int least = __ffs(int(quad.lanes)) - 1, most = 31 - __clz(int(quad.lanes));
    const T* lanes[kLanes];
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane)
      lanes[lane] = rows + quad.offset + (lane < least ? least : lane > most ? most : lane) * quad.stride;
    for_rows<kRows<T, false>>(samples, [&](auto count, int64_t k) {
      T held[decltype(count)::value][kLanes];
#pragma unroll
      for (int r = 0; r < decltype(count)::value; ++r)
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) held[r][lane] = lanes[lane][(k + r) * features];
#pragma unroll
      for (int r = 0; r < decltype(count)::value; ++r)
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) sum[lane] += load(held[r][lane]);
    });
  }
}

// How the threads of a block share `width` quads: thread (slice, here) is one of `slices` that work on quad `here`.
struct Team {
  int width, slices, here, slice;

  __device__ __forceinline__ explicit Team(int quads) : width(quads), slices(int(blockDim.x) / quads) {
    here = int(threadIdx.x) % width, slice = int(threadIdx.x) / width;
  }
};

// Rows that each thread of a team has in flight: 32 samples are there after one wait with 8 slices, two with 4. Twice
// as many of half the size; half of it for scalar loads, whose addresses take as many registers again.
template <class T, bool kVector>
constexpr int kStaged = !kVector         ? 2
                        : sizeof(T) == 2 ? 8
                                         : 4;

// The same for a team: every thread loads, and the first one of a quad adds in the order of the rows. Every thread of
// the block calls it; those that hold no quad are not `mine`. `stage` has kStaged<T, true> quads for every thread.
template <bool kVector, class T, class S>
__device__ __forceinline__ void add_rows_together(S (&sum)[kLanes], const T* rows, int64_t samples, int64_t features,
                                                  const Quad& quad, bool mine, const Team& team, Held<T>* stage) {
  constexpr int kEach = kStaged<T, kVector>;
  const int together = kEach * team.slices;
  for (int64_t first = 0; first < samples; first += together, rows += together * features) {
    const int now = int(samples - first < together ? samples - first : together);
    if (mine) {
      Held<T> held[kEach];
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
        const int row = r * team.slices + team.slice;
        if (row < now) held[r] = hold<kVector>(rows + row * features, quad);
      }
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
        const int row = r * team.slices + team.slice;
        if (row < now) stage[row * team.width + team.here] = held[r];
      }
    }
    __syncthreads();
    if (mine && team.slice == 0)
      for_rows<kEach>(now, [&](auto count, int64_t k) {
        Held<T> held[decltype(count)::value];
#pragma unroll
        for (int r = 0; r < decltype(count)::value; ++r) held[r] = stage[(k + r) * team.width + team.here];
#pragma unroll
        for (int r = 0; r < decltype(count)::value; ++r) held[r].add_to(sum);
      });
    __syncthreads();
  }
}

}  // namespace moreau::cuda
