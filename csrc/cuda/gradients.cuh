// Sums over the samples of an input, in the order of the samples.
#pragma once

#include <cstring>
#include <type_traits>

#include "quads.cuh"

namespace moreau::cuda {

// Calls add(kRows, k) for the samples k .. k + kRows - 1 while as many are left, then with half of kRows, and so on.
// All loads of one call are in flight together, and no load needs a test of its own.
template <int kRows, class Add>
__device__ __forceinline__ void for_rows(int64_t samples, Add add, int64_t k = 0) {
  static_assert(kRows > 0 && (kRows & (kRows - 1)) == 0, "a power of two");
#pragma unroll 1
  for (; samples - k >= kRows; k += kRows) add(std::integral_constant<int, kRows>(), k);
  if constexpr (kRows > 1) for_rows<kRows / 2>(samples, add, k);
}

// A quad in the words in which it was loaded. As separate values, those of 2 bytes would take a register each.
template <class T>
struct Held {
  using Word = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
  static constexpr int kWords = kLanes * sizeof(T) / sizeof(Word);
  Word words[kWords];
  static_assert(kWords * sizeof(Word) == Tuning<T>::quad_bytes);

  template <class S>
  __device__ __forceinline__ void add_to(S (&sum)[kLanes]) const {
    Pack<T> row;
    memcpy(&row, words, sizeof row);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) sum[lane] += load(row.v[lane]);
  }
};

// The quad of one row of gradients. Vector loads mark their cache lines as the first to evict: a gradient is read once,
// while the model reads the noisy copies next. Scalar loads do not, since lanes share their sectors.
template <bool kVector, class T>
__device__ __forceinline__ Held<T> hold(const T* __restrict__ row, const Quad& quad) {
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

// sum += rows[0] + rows[1] + ... at one quad, from left to right; `rows` is the first row of the input. Sums of empty
// lanes are undefined.
template <bool kVector, class T, class S>
__device__ __forceinline__ void add_rows(S (&sum)[kLanes], const T* __restrict__ rows, int64_t samples,
                                         int64_t features, const Quad& quad) {
  if (quad.lanes == 0) return;
  if constexpr (kVector) {
    for_rows<Tuning<T>::vector_rows>(samples, [&](auto count, int64_t k) {
      Held<T> held[decltype(count)::value];
#pragma unroll
      for (int r = 0; r < decltype(count)::value; ++r) held[r] = hold<true>(rows + (k + r) * features, quad);
#pragma unroll
      for (int r = 0; r < decltype(count)::value; ++r) held[r].add_to(sum);
    });
  } else {
    // An empty lane reads the address of its nearest full neighbour, which saves a test before every load.
    const int least = __ffs(int(quad.lanes)) - 1, most = 31 - __clz(int(quad.lanes));
    const T* lanes[kLanes];
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane)
      lanes[lane] = rows + quad.offset + (lane < least ? least : lane > most ? most : lane) * quad.stride;
    for_rows<Tuning<T>::scalar_rows>(samples, [&](auto count, int64_t k) {
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

// The division of a block's threads over `width` quads: thread (slice, index) is one of `slices` threads on quad
// `index`.
struct Team {
  int width, slices, index, slice;

  __device__ __forceinline__ explicit Team(int quads) : width(quads), slices(int(blockDim.x) / quads) {
    index = int(threadIdx.x) % width, slice = int(threadIdx.x) / width;
  }
};

// add_rows for a team: all threads of a quad load, and its first thread adds, in the order of the rows. Every thread of
// the block calls this, with mine = false if it has no quad. `stage` has Tuning<T>::vector_staged quads for each
// thread.
template <bool kVector, class T, class S>
__device__ __forceinline__ void add_rows_together(S (&sum)[kLanes], const T* __restrict__ rows, int64_t samples,
                                                  int64_t features, const Quad& quad, bool mine, const Team& team,
                                                  Held<T>* stage) {
  constexpr int kEach = kVector ? Tuning<T>::vector_staged : Tuning<T>::scalar_staged;
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
        if (row < now) stage[row * team.width + team.index] = held[r];
      }
    }
    __syncthreads();
    if (mine && team.slice == 0)
      for_rows<kEach>(now, [&](auto count, int64_t k) {
        Held<T> held[decltype(count)::value];
#pragma unroll
        for (int r = 0; r < decltype(count)::value; ++r) held[r] = stage[(k + r) * team.width + team.index];
#pragma unroll
        for (int r = 0; r < decltype(count)::value; ++r) held[r].add_to(sum);
      });
    __syncthreads();
  }
}

}  // namespace moreau::cuda
