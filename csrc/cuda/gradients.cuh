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

// Rows in flight before the first is added: with 8 a warp waits 4 times for memory at 32 samples, not 32 times. Scalar
// loads of a quad make do with half of it; double fits no more beside the state of a step.
template <class T, bool kVector>
constexpr int kRows = sizeof(T) == 8 ? 2 : kVector ? 8 : 4;

// sum += the rows at one quad; `rows` is the input's first row. Empty lanes hold nothing of meaning afterwards.
template <bool kVector, class T, class S>
__device__ __forceinline__ void add_rows(S (&sum)[kLanes], const T* rows, int64_t samples, int64_t features,
                                         const Quad& quad) {
  if (quad.lanes == 0) return;
  if constexpr (kVector) {
    // Kept as loaded until added: on their own, 16-bit values would take a register each.
    using Held = std::conditional_t<sizeof(T) == 2, uint2, Pack<T>>;
    rows += quad.offset;
    for_rows<kRows<T, true>>(samples, [&](auto count, int64_t k) {
      Held held[decltype(count)::value];
#pragma unroll
      for (int r = 0; r < decltype(count)::value; ++r)
        held[r] = *reinterpret_cast<const Held*>(rows + (k + r) * features);
#pragma unroll
      for (int r = 0; r < decltype(count)::value; ++r) {
        Pack<T> row;
        memcpy(&row, &held[r], sizeof row);
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) sum[lane] += load(row.v[lane]);
      }
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

// The same at one feature.
template <class T, class S>
__device__ __forceinline__ S add_rows(S sum, const T* rows, int64_t samples, int64_t features, int64_t offset) {
  rows += offset;
  for_rows<sizeof(T) == 8 ? 4 : 8>(samples, [&](auto count, int64_t k) {
    T held[decltype(count)::value];
#pragma unroll
    for (int r = 0; r < decltype(count)::value; ++r) held[r] = rows[(k + r) * features];
#pragma unroll
    for (int r = 0; r < decltype(count)::value; ++r) sum += load(held[r]);
  });
  return sum;
}

}  // namespace moreau::cuda
