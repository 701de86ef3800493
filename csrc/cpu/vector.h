// Inner loops over contiguous memory, compiled once per instruction set (baseline, AVX2, AVX-512) and chosen by the
// loader. Contraction is off (CMakeLists.txt) and reductions keep eight fixed lanes, so that every clone gives the
// same bits. They are called from inside the parallel region: OpenMP's outlined functions are not cloned.
#pragma once

#include "../dtype.h"
#include "../philox.h"
#include "../shrinkage.h"

namespace moreau::cpu {

// A span is at most this many features: x + displacement, noise and sums of one fit a 32 KiB first-level cache.
constexpr int64_t kSpan = 2048;
// Blocks of four normals are made in batches of 16, an AVX-512 register of counters.
constexpr int64_t kBatch = 16;
constexpr int64_t kNormals = kSpan + 8 * kBatch;  // an unaligned span, rounded up to whole batches

template <class S>
struct Scalars {
  S keep;  // 1 - step_size / rho
  S step_size;
  S rho;
  S count;  // of gradients summed
};

// Word w of counter 16 batch + i, at words[64 batch + 16 w + i]
void philox_words(uint32_t* words, int64_t batches, uint64_t key, uint64_t first, uint32_t sample, uint32_t step);
// z[64 batch + 4 i + lane] = the normals made of those words
void normals_range(float* z, const uint32_t* words, int64_t batches);
void normals_range(double* z, const uint32_t* words, int64_t batches);

#define MOREAU_DECLARE(T, S)                                                              \
  /* sum (+)= rows of g, in order; `stride` apart */                                      \
  void add_rows(S* sum, const T* g, int64_t rows, int64_t stride, int64_t n, bool carry); \
  /* base = x + displacement (null: x) */                                                 \
  void base_range(S* base, const T* x, const S* displacement, int64_t n);                 \
  /* out = base + sigma z */                                                              \
  void noisy_range(T* out, const S* base, const S* z, S sigma, int64_t n);                \
  /* plus = base + sigma z, minus = base - sigma z */                                     \
  void noisy_pair(T* plus, T* minus, const S* base, const S* z, S sigma, int64_t n);      \
  void copy_range(T* out, const S* base, int64_t n);
MOREAU_DECLARE(float, float)
MOREAU_DECLARE(double, double)
MOREAU_DECLARE(half_bits, float)
MOREAU_DECLARE(bfloat_bits, float)
#undef MOREAU_DECLARE

#define MOREAU_DECLARE(S)                                                                                          \
  /* p = sum / count in place */                                                                                   \
  void mean_range(S* p, S count, int64_t n);                                                                       \
  /* the step without groups; eta: one value, or one per feature when eta_feature is 1 */                          \
  void step_range(S* displacement, const S* p, const Scalars<S>& k, const S* eta, int64_t eta_feature, int64_t n,  \
                  double* statistics);                                                                             \
  /* the step with the shrinkage factors of each feature's group: factors[2 g] for v, factors[2 g + 1] for p */    \
  void group_step_range(S* displacement, const S* p, const Scalars<S>& k, const int32_t* labels, const S* factors, \
                        int64_t n, double* statistics);                                                            \
  void add_range(S* total, const S* v, int64_t n);                                                                 \
  /* total += weight v */                                                                                          \
  void add_scaled_range(S* total, const S* v, S weight, int64_t n);                                                \
  /* total += weight (gradient - last)^2 */                                                                        \
  void add_change_range(S* total, const S* gradient, const S* last, S weight, int64_t n);                          \
  /* the kProducts of a span */                                                                                    \
  void products_range(const S* point, const S* previous, const S* here, const S* before, const S* gradient,        \
                      const S* last_gradient, const S* change, int64_t n, double* products);                       \
  /* point += factor (point - previous), and what was there moves on */                                            \
  void momentum_range(S* point, S* previous, S* here, S* before, S* last_gradient, S* change, const S* gradient,   \
                      S factor, int64_t n);
MOREAU_DECLARE(float)
MOREAU_DECLARE(double)
#undef MOREAU_DECLARE

}  // namespace moreau::cpu
