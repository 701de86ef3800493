#include "vector.h"

// MOREAU_PORTABLE compiles the baseline alone; tests/csrc/test_clones.py compares the clones with it.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(MOREAU_PORTABLE)
#define MOREAU_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define MOREAU_CLONES
#endif
#define MOREAU_INLINE inline __attribute__((always_inline))

namespace moreau::cpu {
namespace {

template <class S>
MOREAU_INLINE void normals_body(S* __restrict z, const uint32_t* __restrict words, int64_t batches) {
  for (int64_t batch = 0; batch < batches; ++batch, words += 4 * kBatch, z += 4 * kBatch)
    for (int64_t i = 0; i < kBatch; ++i) {
      S four[4];
      normals<S>({{words[i], words[kBatch + i], words[2 * kBatch + i], words[3 * kBatch + i]}}, four);
      z[4 * i] = four[0], z[4 * i + 1] = four[1], z[4 * i + 2] = four[2], z[4 * i + 3] = four[3];
    }
}

template <class T, class S>
MOREAU_INLINE void add_rows_body(S* __restrict sum, const T* __restrict g, int64_t rows, int64_t stride, int64_t n,
                                 bool carry) {
  if (!carry)
    for (int64_t i = 0; i < n; ++i) sum[i] = S(0);
  int64_t k = 0;
  // Four rows at a time save three of four loads and stores of `sum`; the additions keep the order of the rows.
  // Measured on data in memory: 32 GB/s, against 24 one row at a time and 21 by columns. Explicit prefetching gains
  // nothing.
  for (; k + 4 <= rows; k += 4, g += 4 * stride) {
    const T *a = g, *b = g + stride, *c = g + 2 * stride, *d = g + 3 * stride;
    for (int64_t i = 0; i < n; ++i) sum[i] = (((sum[i] + load(a[i])) + load(b[i])) + load(c[i])) + load(d[i]);
  }
  for (; k < rows; ++k, g += stride)
    for (int64_t i = 0; i < n; ++i) sum[i] += load(g[i]);
}

template <class T, class S>
MOREAU_INLINE void base_body(S* __restrict base, const T* __restrict x, const S* __restrict displacement, int64_t n) {
  if (displacement)
    for (int64_t i = 0; i < n; ++i) base[i] = load(x[i]) + displacement[i];
  else
    for (int64_t i = 0; i < n; ++i) base[i] = load(x[i]);
}

template <class T, class S>
MOREAU_INLINE void noisy_body(T* __restrict out, const S* __restrict base, const S* __restrict z, S sigma, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(out + i, base[i] + sigma * z[i]);
}

template <class T, class S>
MOREAU_INLINE void pair_body(T* __restrict plus, T* __restrict minus, const S* __restrict base, const S* __restrict z,
                             S sigma, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const S noise = sigma * z[i];
    store(plus + i, base[i] + noise);
    store(minus + i, base[i] - noise);
  }
}

template <class T, class S>
MOREAU_INLINE void copy_body(T* __restrict out, const S* __restrict base, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(out + i, base[i]);
}

// Sums in kLanes lanes, added in a fixed order, so that every clone gives the same bits.
template <int kCount>
struct Lanes {
  double lanes[kCount][kLanes] = {};

  MOREAU_INLINE void fold(double* to) const {
    static_assert(kLanes == 8, "the sum below has eight terms");
    for (int k = 0; k < kCount; ++k) {
      const double* l = lanes[k];
      to[k] = ((l[0] + l[1]) + (l[2] + l[3])) + ((l[4] + l[5]) + (l[6] + l[7]));
    }
  }
};

struct Statistics : Lanes<kStatistics> {
  template <class S>
  MOREAU_INLINE void add(int64_t lane, S displacement, S image, S p) {
    const double d = displacement, y = image, g = p, gap = d - y;
    lanes[residual2][lane] += gap * gap;
    lanes[displacement2][lane] += d * d;
    lanes[image2][lane] += y * y;
    lanes[gradient2][lane] += g * g;
    lanes[nonzero][lane] += image != S(0) ? 1.0 : 0.0;
  }
};

struct Products : Lanes<kProducts> {
  template <class S>
  MOREAU_INLINE void add(int64_t lane, S x_minus_y_s, S step_s, S last_s, S dx_s, S dg_s) {
    const double x_minus_y = x_minus_y_s, step = step_s, last = last_s, dx = dx_s, dg = dg_s;
    lanes[product::restart_product][lane] += x_minus_y * step;
    lanes[product::step_dot_last][lane] += step * last;
    lanes[product::last_sq][lane] += last * last;
    lanes[product::dx_dx][lane] += dx * dx;
    lanes[product::dx_dg][lane] += dx * dg;
    lanes[product::dg_dg][lane] += dg * dg;
  }
};

template <class S>
MOREAU_INLINE void products_body(const S* __restrict y, const S* __restrict y_prev, const S* __restrict x,
                                 const S* __restrict x_prev, const S* __restrict gradient,
                                 const S* __restrict last_gradient, const S* __restrict last_step, int64_t n,
                                 double* products) {
  Products sums;
  const auto add = [&](int64_t lane, int64_t i) {
    sums.add<S>(lane, x[i] - y[i], y[i] - y_prev[i], last_step[i], x[i] - x_prev[i], gradient[i] - last_gradient[i]);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) add(lane, i + lane);
  for (; i < n; ++i) add(i % kLanes, i);
  sums.fold(products);
}

template <class S>
MOREAU_INLINE void momentum_body(S* __restrict y, S* __restrict y_prev, S* __restrict x, S* __restrict x_prev,
                                 S* __restrict last_gradient, S* __restrict last_step, const S* __restrict gradient,
                                 S beta, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const S step = y[i] - y_prev[i], next = y[i] + beta * step;
    x_prev[i] = x[i];
    y_prev[i] = y[i];
    last_step[i] = step;
    last_gradient[i] = gradient[i];
    y[i] = x[i] = next;
  }
}

// displacement = shrink_v(keep displacement - gamma p), and the statistics of the incoming displacement, with the image
// y = -rho shrink_p(p), in float64. shrink_v(v, i) and shrink_p(p, i) are the proximal maps at feature i.
template <class S, class ShrinkV, class ShrinkP>
MOREAU_INLINE void step_body(S* __restrict displacement, const S* __restrict p, const Scalars<S>& k, int64_t n,
                             double* statistics, ShrinkV shrink_v, ShrinkP shrink_p) {
  Statistics sums;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const S d = displacement[i + lane], g = p[i + lane];
      sums.add(lane, d, S(-k.rho * shrink_p(g, i + lane)), g);
      displacement[i + lane] = shrink_v(k.keep * d - k.step_size * g, i + lane);
    }
  for (; i < n; ++i) {
    const S d = displacement[i], g = p[i];
    sums.add(i % kLanes, d, S(-k.rho * shrink_p(g, i)), g);
    displacement[i] = shrink_v(k.keep * d - k.step_size * g, i);
  }
  sums.fold(statistics);
}

template <class S>
MOREAU_INLINE void step_dispatch(S* displacement, const S* p, const Scalars<S>& k, const S* eta, int64_t eta_feature,
                                 int64_t n, double* statistics) {
  const S gamma = k.step_size;
  if (eta_feature == 0) {
    const S one = *eta, t = gamma * one;
    step_body(
        displacement, p, k, n, statistics, [t](S v, int64_t) { return soft_threshold(v, t); },
        [one](S v, int64_t) { return soft_threshold(v, one); });
  } else {
    step_body(
        displacement, p, k, n, statistics, [eta, gamma](S v, int64_t i) { return soft_threshold(v, gamma * eta[i]); },
        [eta](S v, int64_t i) { return soft_threshold(v, eta[i]); });
  }
}

// v times the factor of its group: exactly +0 for the factor 0, and NaN for NaN.
template <class S>
MOREAU_INLINE S scaled(S v, S factor) {
  return factor == S(0) ? S(0) * (v - v) : v * factor;
}

template <class S>
MOREAU_INLINE void group_step_body(S* displacement, const S* p, const Scalars<S>& k, const int32_t* labels,
                                   const S* factors, int64_t n, double* statistics) {
  step_body(
      displacement, p, k, n, statistics, [=](S v, int64_t i) { return scaled(v, factors[2 * int64_t(labels[i])]); },
      [=](S g, int64_t i) { return scaled(g, factors[2 * int64_t(labels[i]) + 1]); });
}

}  // namespace

MOREAU_CLONES void normals_range(float* z, const uint32_t* words, int64_t batches) {
  normals_body<float>(z, words, batches);
}
void normals_range(double* z, const uint32_t* words, int64_t batches) { normals_body<double>(z, words, batches); }

#define MOREAU_DEFINE(T, S)                                                                              \
  MOREAU_CLONES void add_rows(S* sum, const T* g, int64_t rows, int64_t stride, int64_t n, bool carry) { \
    add_rows_body<T, S>(sum, g, rows, stride, n, carry);                                                 \
  }                                                                                                      \
  MOREAU_CLONES void base_range(S* base, const T* x, const S* displacement, int64_t n) {                 \
    base_body<T, S>(base, x, displacement, n);                                                           \
  }                                                                                                      \
  MOREAU_CLONES void noisy_range(T* out, const S* base, const S* z, S sigma, int64_t n) {                \
    noisy_body<T, S>(out, base, z, sigma, n);                                                            \
  }                                                                                                      \
  MOREAU_CLONES void noisy_pair(T* plus, T* minus, const S* base, const S* z, S sigma, int64_t n) {      \
    pair_body<T, S>(plus, minus, base, z, sigma, n);                                                     \
  }                                                                                                      \
  MOREAU_CLONES void copy_range(T* out, const S* base, int64_t n) { copy_body<T, S>(out, base, n); }
MOREAU_DEFINE(float, float)
MOREAU_DEFINE(double, double)
MOREAU_DEFINE(half_bits, float)
MOREAU_DEFINE(bfloat_bits, float)
#undef MOREAU_DEFINE

#define MOREAU_DEFINE(S)                                                                                             \
  MOREAU_CLONES void mean_range(S* p, S count, int64_t n) {                                                          \
    for (int64_t i = 0; i < n; ++i) p[i] /= count;                                                                   \
  }                                                                                                                  \
  MOREAU_CLONES void step_range(S* displacement, const S* p, const Scalars<S>& k, const S* eta, int64_t eta_feature, \
                                int64_t n, double* statistics) {                                                     \
    step_dispatch<S>(displacement, p, k, eta, eta_feature, n, statistics);                                           \
  }                                                                                                                  \
  MOREAU_CLONES void group_step_range(S* displacement, const S* p, const Scalars<S>& k, const int32_t* labels,       \
                                      const S* factors, int64_t n, double* statistics) {                             \
    group_step_body<S>(displacement, p, k, labels, factors, n, statistics);                                          \
  }                                                                                                                  \
  MOREAU_CLONES void add_range(S* __restrict total, const S* __restrict v, int64_t n) {                              \
    for (int64_t i = 0; i < n; ++i) total[i] += v[i];                                                                \
  }                                                                                                                  \
  MOREAU_CLONES void add_scaled_range(S* __restrict total, const S* __restrict v, S weight, int64_t n) {             \
    for (int64_t i = 0; i < n; ++i) total[i] += weight * v[i];                                                       \
  }                                                                                                                  \
  MOREAU_CLONES void add_change_range(S* __restrict total, const S* __restrict gradient,                             \
                                      const S* __restrict last_gradient, S weight, int64_t n) {                      \
    for (int64_t i = 0; i < n; ++i) {                                                                                \
      const S dg = gradient[i] - last_gradient[i];                                                                   \
      total[i] += weight * dg * dg;                                                                                  \
    }                                                                                                                \
  }                                                                                                                  \
  MOREAU_CLONES void products_range(const S* y, const S* y_prev, const S* x, const S* x_prev, const S* gradient,     \
                                    const S* last_gradient, const S* last_step, int64_t n, double* products) {       \
    products_body<S>(y, y_prev, x, x_prev, gradient, last_gradient, last_step, n, products);                         \
  }                                                                                                                  \
  MOREAU_CLONES void momentum_range(S* y, S* y_prev, S* x, S* x_prev, S* last_gradient, S* last_step,                \
                                    const S* gradient, S beta, int64_t n) {                                          \
    momentum_body<S>(y, y_prev, x, x_prev, last_gradient, last_step, gradient, beta, n);                             \
  }
MOREAU_DEFINE(float)
MOREAU_DEFINE(double)
#undef MOREAU_DEFINE

}  // namespace moreau::cpu
