// Draws from the noise bank, and the noisy copies made from them.
#pragma once

#include "quads.cuh"

namespace moreau::cuda {

// The draws of a chunk of samples. With antithetic pairs one draw serves the rows of samples 2k and 2k + 1. Where a
// chunk starts or ends inside a pair, it has only one of the two rows.
struct Draws {
  int64_t samples, sample_offset;
  uint32_t first, count, rows_each;

  explicit Draws(const Noise& noise)
      : samples(noise.samples), sample_offset(noise.sample_offset), rows_each(noise.sigma && noise.antithetic ? 2 : 1) {
    first = uint32_t(sample_offset / rows_each);
    count = samples == 0 ? 0 : uint32_t((sample_offset + samples - 1) / rows_each) - first + 1;
  }
};

// noisy[k] = base + sigma z(k) at one quad, for every `slices`-th draw from number `slice` on; store(row, copy) writes
// it.
template <bool kPairs, class T, class S, class Store>
__device__ __forceinline__ void write_draws(T* __restrict__ noisy, int64_t features, uint64_t block,
                                            const S (&base)[kLanes], const Noise& noise, const Draws& draws,
                                            int64_t input, uint32_t slice, uint32_t slices, Store store) {
  constexpr uint32_t kEach = kPairs ? 2 : 1;
  const S sigma = static_cast<const S*>(noise.sigma)[input];
  const uint64_t key = uint64_t(noise.keys[input]);
  const uint32_t step = uint32_t(*noise.step);
  // Row of the draw's first sample; -1 where the chunk starts with the second sample of a pair.
  int64_t row = int64_t(draws.first + slice) * kEach - draws.sample_offset;
  T* to = noisy + row * features;
  for (uint32_t draw = slice; draw < draws.count; draw += slices) {
    S z[kLanes], copy[kLanes];
    normals<S>(philox(key, block, (draws.first + draw) * kEach, step), z);
    if (!kPairs || row >= 0) {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) copy[lane] = fma(sigma, z[lane], base[lane]);
      store(to, copy);
    }
    if (kPairs && row + 1 < draws.samples) {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) copy[lane] = fma(-sigma, z[lane], base[lane]);
      store(to + features, copy);
    }
    to += int64_t(slices) * kEach * features;
    if (kPairs) row += int64_t(slices) * kEach;
  }
}

// The tensors of the noisy copies; a null `displacement` is 0.
template <class T>
struct Copies {
  const T* __restrict__ x;
  const state_t<T>* displacement;
  T* __restrict__ noisy;
};

// noisy[k] = x + displacement + sigma z(k) at one quad.
template <bool kVector, class T>
__device__ __forceinline__ void write_copies(const Copies<T>& a, int64_t features, const Quad& quad, const Noise& noise,
                                             const Draws& draws, int64_t input, uint32_t slice, uint32_t slices) {
  using S = state_t<T>;
  const Pack<T> x = load_quad<kVector>(a.x + input * features, quad);
  Pack<S> displacement{};
  if (a.displacement) displacement = load_quad<kVector>(a.displacement + input * features, quad);
  S base[kLanes];
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    base[lane] = load(x.v[lane]);
    if (a.displacement) base[lane] += displacement.v[lane];  // + 0 would lose the sign of -0
  }
  T* noisy = a.noisy + input * noise.samples * features;
  const auto store = [&](T* row, const S(&copy)[kLanes]) { store_quad<kVector>(row, quad, copy); };
  if (!noise.sigma) {
    for (uint32_t k = slice; k < draws.count; k += slices) store(noisy + int64_t(k) * features, base);
  } else if (draws.rows_each == 2) {
    write_draws<true>(noisy, features, quad.block, base, noise, draws, input, slice, slices, store);
  } else {
    write_draws<false>(noisy, features, quad.block, base, noise, draws, input, slice, slices, store);
  }
}

// Threads that share one quad: a power of two up to `most`, enough to fill the GPU when quads are few.
inline int slices_for(int64_t quads, int64_t draws, int most) {
  int slices = 1;
  while (2 * slices <= most && 2 * slices <= draws && quads * slices < kBusy) slices *= 2;
  return slices;
}

}  // namespace moreau::cuda
