// Inner loops over contiguous memory, compiled once per instruction set (baseline, AVX2, AVX-512); the loader selects
// one. Contraction is off (CMakeLists.txt) and reductions use a fixed number of lanes, so that every clone gives the
// same bits. The loops are called from inside the parallel region, since OpenMP's outlined functions are not cloned.
#pragma once

#include "../dtype.h"
#include "../philox.h"
#include "../shrinkage.h"

namespace moreau::cpu {

// Most features of a span.
constexpr int64_t kSpan = 2048;
// Philox calls of a batch; each serves a block of four normals.
constexpr int64_t kBatch = 16;
// Room for the normals of a span that starts inside a block, rounded up to whole batches.
constexpr int64_t kNormals = kSpan + 8 * kBatch;
// Lanes of a reduction.
constexpr int64_t kLanes = 8;

static_assert(3 * kSpan * sizeof(float) <= 32 << 10,
              "x + displacement, noise and sum of a span fit a first-level cache of 32 KiB");
static_assert(kBatch * sizeof(uint32_t) == 64, "one word of every call of a batch fills an AVX-512 register");
static_assert((3 + kSpan + 4 * kBatch - 1) / (4 * kBatch) * (4 * kBatch) <= kNormals,
              "a span that starts up to 3 normals into a block fits its buffer");
static_assert(kLanes * sizeof(double) == 64, "the lanes of a reduction fill an AVX-512 register");

template <class S>
struct Scalars {
  S keep;  // 1 - step_size / rho
  S step_size;
  S rho;
  S count;  // gradients in the sum
};

// Word w of counter 16 batch + i, at words[64 batch + 16 w + i]
void philox_words(uint32_t* words, int64_t batches, uint64_t key, uint64_t first, uint32_t sample, uint32_t step);
// z[64 batch + 4 i + lane] = the normals computed from those words
void normals_range(float* z, const uint32_t* words, int64_t batches);
void normals_range(double* z, const uint32_t* words, int64_t batches);

#define MOREAU_DECLARE(T, S)                                                              \
  /* sum (+)= rows of g, in their order; rows are `stride` apart */                       \
  void add_rows(S* sum, const T* g, int64_t rows, int64_t stride, int64_t n, bool carry); \
  /* base = x + displacement (null: x) */                                                 \
  void base_range(S* base, const T* x, const S* displacement, int64_t n);                 \
  /* out = base + sigma z */                                                              \
  void noisy_range(T* out, const S* base, const S* z, S sigma, int64_t n);                \
  /* plus = base + sigma z, minus = base - sigma z */                                     \
  void noisy_pair(T* plus, T* minus, const S* base, const S* z, S sigma, int64_t n);      \
  /* out = base */                                                                        \
  void copy_range(T* out, const S* base, int64_t n);
MOREAU_DECLARE(float, float)
MOREAU_DECLARE(double, double)
MOREAU_DECLARE(half_bits, float)
MOREAU_DECLARE(bfloat_bits, float)
#undef MOREAU_DECLARE

#define MOREAU_DECLARE(S)                                                                                            \
  /* p = sum / count, in place */                                                                                    \
  void mean_range(S* p, S count, int64_t n);                                                                         \
  /* displacement = S_{gamma eta}(keep displacement - gamma p), and the statistics of the incoming displacement; eta \
     has one value, or one per feature when eta_feature is 1 */                                                      \
  void step_range(S* displacement, const S* p, const Scalars<S>& k, const S* eta, int64_t eta_feature, int64_t n,    \
                  double* statistics);                                                                               \
  /* the same for groups: v_i is multiplied by factors[2 g] and p_i by factors[2 g + 1], g = labels[i] */            \
  void group_step_range(S* displacement, const S* p, const Scalars<S>& k, const int32_t* labels, const S* factors,   \
                        int64_t n, double* statistics);                                                              \
  /* total += v */                                                                                                   \
  void add_range(S* total, const S* v, int64_t n);                                                                   \
  /* total += weight v */                                                                                            \
  void add_scaled_range(S* total, const S* v, S weight, int64_t n);                                                  \
  /* total += weight (gradient - last_gradient)^2 */                                                                 \
  void add_change_range(S* total, const S* gradient, const S* last_gradient, S weight, int64_t n);                   \
  /* the kProducts inner products of a span */                                                                       \
  void products_range(const S* y, const S* y_prev, const S* x, const S* x_prev, const S* gradient,                   \
                      const S* last_gradient, const S* last_step, int64_t n, double* products);                      \
  /* x, y = y + beta (y - y_prev); the previous values move to y_prev, x_prev, last_gradient and last_step */        \
  void momentum_range(S* y, S* y_prev, S* x, S* x_prev, S* last_gradient, S* last_step, const S* gradient, S beta,   \
                      int64_t n);
MOREAU_DECLARE(float)
MOREAU_DECLARE(double)
#undef MOREAU_DECLARE

}  // namespace moreau::cpu
