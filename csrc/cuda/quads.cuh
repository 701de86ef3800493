// Quads: four features of one input that share a noise block, the unit of work of the elementwise kernels.
//
// A quad holds the elements 4 n .. 4 n + 3 of the noise bank as far as they lie in one channel, so one Philox call
// serves it. Where a channel or the tensor starts inside a block, the first and the last quad of the channel are partly
// empty. Lanes are `channels` apart in memory. Neighbouring threads take neighbouring channels, or neighbouring quads
// of contiguous memory, whose lanes are loaded as one vector where size and addresses allow.
#pragma once

#include "../dtype.h"
#include "../philox.h"
#include "launch.cuh"

namespace moreau::cuda {

// Four values that are loaded and stored together: one word, or two words of 16 bytes for double.
template <class T>
struct alignas(kLanes * sizeof(T) < 16 ? kLanes * sizeof(T) : 16) Pack {
  T v[kLanes];
};
static_assert(sizeof(Pack<float>) == 16 && alignof(Pack<float>) == 16, "one word");
static_assert(sizeof(Pack<double>) == 32 && alignof(Pack<double>) == 16, "two words");
static_assert(sizeof(Pack<uint16_t>) == 8 && alignof(Pack<uint16_t>) == 8, "half a word");

struct Division {
  int64_t quotient, remainder;
};

// n / d and n % d for n >= 0, d > 0. A 64-bit division takes about a hundred instructions, a 32-bit one twenty, and
// nearly all sizes are small.
MOREAU_HD Division divide(int64_t n, int64_t d) {
  if (((n | d) >> 32) == 0) {
    const uint32_t q = uint32_t(n) / uint32_t(d);
    return {int64_t(q), int64_t(uint32_t(n) - q * uint32_t(d))};
  }
  const int64_t q = n / d;
  return {q, n - q * d};
}

struct Quad {
  int64_t offset;  // of lane 0 from the input's first feature; may be negative where lane 0 is empty
  int64_t stride;  // between lanes
  uint64_t block;  // of the noise bank
  unsigned lanes;  // bit i: lane i holds a feature

  MOREAU_HD bool has(int lane) const { return (lanes >> lane & 1u) != 0; }
};

struct Quads {
  int64_t channels, positions, per_channel;
  int64_t element_offset;

  Quads(const Extents& e, int64_t first_element)
      : channels(e.channels), positions(e.positions), element_offset(first_element) {
    // Elements by which a channel can start after its noise block: the same for all channels where the size of a
    // channel is a multiple of a block, up to 3 otherwise.
    const int64_t lead = channels == 1 || positions % kLanes == 0 ? element_offset % kLanes : kLanes - 1;
    per_channel = (positions + lead + kLanes - 1) / kLanes;
  }

  MOREAU_HD int64_t count() const { return channels * per_channel; }
  MOREAU_HD int64_t features() const { return channels * positions; }

  // Whether every quad is full and starts at an offset that is a multiple of four.
  bool whole() const { return channels == 1 && positions % kLanes == 0 && element_offset % kLanes == 0; }

  MOREAU_HD Quad operator[](int64_t i) const {
    const Division at = channels == 1 ? Division{i, 0} : divide(i, channels);
    const int64_t start = element_offset + at.remainder * positions;  // element of the channel's first feature
    const int64_t position = at.quotient * kLanes - (start & (kLanes - 1));
    Quad quad{position * channels + at.remainder, channels, uint64_t(start + position) / kLanes, 0};
    for (int lane = 0; lane < kLanes; ++lane)
      if (position + lane >= 0 && position + lane < positions) quad.lanes |= 1u << lane;
    return quad;
  }
};

template <class T>
bool aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(Pack<T>) == 0;
}

// The lanes of a quad in a row of features; empty lanes are 0. kVector requires Quads::whole() and an aligned row.
template <bool kVector, class T>
__device__ __forceinline__ Pack<T> load_quad(const T* row, const Quad& quad) {
  if constexpr (kVector) {
    return *reinterpret_cast<const Pack<T>*>(row + quad.offset);
  } else {
    Pack<T> pack{};
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane)
      if (quad.has(lane)) pack.v[lane] = row[quad.offset + lane * quad.stride];
    return pack;
  }
}

template <bool kVector, class T, class S>
__device__ __forceinline__ void store_quad(T* row, const Quad& quad, const S (&values)[kLanes]) {
  Pack<T> pack;
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) store(&pack.v[lane], values[lane]);
  if constexpr (kVector) {
    *reinterpret_cast<Pack<T>*>(row + quad.offset) = pack;
  } else {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane)
      if (quad.has(lane)) row[quad.offset + lane * quad.stride] = pack.v[lane];
  }
}

}  // namespace moreau::cuda
