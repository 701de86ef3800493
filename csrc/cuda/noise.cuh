// The draws of a chunk of the noise bank, and the noisy copies made from them.
#pragma once

#include "quads.cuh"

namespace moreau::cuda {

// With antithetic pairs one draw serves the rows of samples 2k and 2k + 1. Where a chunk starts or ends inside a pair,
// one of the two rows is not in it.
struct Draws {
  int64_t first, count, rows_each, sample_offset, samples;

  explicit Draws(const Noise& noise)
      : rows_each(noise.antithetic ? 2 : 1), sample_offset(noise.sample_offset), samples(noise.samples) {
    first = sample_offset / rows_each;
    count = samples == 0 ? 0 : noise.sigma ? (sample_offset + samples - 1) / rows_each - first + 1 : samples;
  }

  // The sample that is drawn; the other one of a pair is its negative.
  __device__ __forceinline__ uint32_t sample(int64_t draw) const { return uint32_t((first + draw) * rows_each); }

  // Calls write(row, sigma) for the rows of a draw.
  template <class S, class Write>
  __device__ __forceinline__ void rows(int64_t draw, S sigma, Write write) const {
    const int64_t row = (first + draw) * rows_each - sample_offset;
    if (row >= 0) write(row, sigma);
    if (rows_each == 2 && row + 1 < samples) write(row + 1, -sigma);
  }
};

// noisy[k] = base + sigma z(k) at one quad, for every `slices`-th draw from `slice`. `noisy` is the input's first row.
template <bool kVector, class T, class S>
__device__ __forceinline__ void write_noisy(T* noisy, int64_t features, const Quad& quad, const S (&base)[kLanes],
                                            const Noise& noise, const Draws& draws, int64_t input, int64_t slice,
                                            int64_t slices) {
  if (!noise.sigma) {
    for (int64_t k = slice; k < draws.count; k += slices) store_quad<kVector>(noisy + k * features, quad, base);
    return;
  }
  const S sigma = static_cast<const S*>(noise.sigma)[input];
  const uint64_t key = uint64_t(noise.keys[input]);
  const uint32_t step = uint32_t(*noise.step);
  for (int64_t draw = slice; draw < draws.count; draw += slices) {
    S z[kLanes];
    normals<S>(philox(key, quad.block, draws.sample(draw), step), z);
    draws.rows(draw, sigma, [&](int64_t row, S signed_sigma) {
      S copy[kLanes];
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) copy[lane] = base[lane] + signed_sigma * z[lane];
      store_quad<kVector>(noisy + row * features, quad, copy);
    });
  }
}

// How many threads share the copies of one quad: a power of two up to `most`, enough to fill a card with few inputs.
inline int slices_for(int64_t quads, int64_t draws, int most) {
  int slices = 1;
  while (2 * slices <= most && 2 * slices <= draws && quads * slices < kBusy) slices *= 2;
  return slices;
}

}  // namespace moreau::cuda
