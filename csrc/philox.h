// The noise bank: standard normals as a pure function of (key, step, sample, element).
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with key = the 64-bit key
// of the input and counter = (element block low, element block high, sample, step). One call serves the four
// consecutive elements of a block: words (0, 1) give elements 0 and 1 by Box-Muller, words (2, 3) elements 2 and 3.
// This mapping is version 1, and tests/ops/test_noise.py has its golden values: a change is a breaking change.
//
// The words are the same on every device. The normals are the same on every CPU. A GPU's floats are within kFastError
// of the exact normals, its doubles within the last digits of the mathematical libraries.
#pragma once

#include <cmath>

#include "dtype.h"

namespace moreau {

struct Words {
  uint32_t w[4];
};
static_assert(sizeof(Words) == 16, "one word for each element of a block");

MOREAU_HD Words philox(uint64_t key, uint64_t block, uint32_t sample, uint32_t step) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  uint32_t c0 = uint32_t(block), c1 = uint32_t(block >> 32), c2 = sample, c3 = step;
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif !defined(__CUDACC__)  // nvcc's pass over the host code rejects both pragmas
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
#ifdef __CUDA_ARCH__
    // Inline assembly: for the plain product nvcc adds a zero to the upper half, twenty more instructions a call.
    uint64_t p0, p1;
    asm("mul.wide.u32 %0, %1, 0xD2511F53;" : "=l"(p0) : "r"(c0));
    asm("mul.wide.u32 %0, %1, 0xCD9E8D57;" : "=l"(p1) : "r"(c2));
#else
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
#endif
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1), c3 = uint32_t(p0), c0 = n0, c2 = n2;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// -2 ln(u) for u = (k + 1/2) / 2^32, accurate at both ends: near u = 1 the distance 1 - u is computed from ~k before
// rounding, so that float and double agree to the precision of float everywhere.
MOREAU_HD float minus_two_log(uint32_t k) {
  // u * 2^32 with 24 significant bits; the + 1/2 is exact for small u, where it matters. Signed conversions only:
  // unsigned ones have no AVX2 instruction.
  const float high = float(int32_t(k >> 8)) * 256.0f + (float(int32_t(k & 255u)) + 0.5f);
  const float gap = float(int32_t(~k >> 8)) * 256.0f + (float(int32_t(~k & 255u)) + 0.5f);
  uint32_t bits;
  float scaled = high * 0x1p-32f;
#ifdef __CUDA_ARCH__
  bits = __float_as_uint(scaled);
#else
  std::memcpy(&bits, &scaled, sizeof bits);
#endif
  // u = 2^e * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2))
  const uint32_t shifted = bits - 0x3f3504f3u;
  const int32_t e = int32_t(shifted) >> 23;
  const uint32_t mantissa = (shifted & 0x007fffffu) + 0x3f3504f3u;
  float one_f;
#ifdef __CUDA_ARCH__
  one_f = __uint_as_float(mantissa);
#else
  std::memcpy(&one_f, &mantissa, sizeof one_f);
#endif
  const float f = e == 0 ? gap * -0x1p-32f : one_f - 1.0f;
  // ln(1 + f) = 2 atanh(s), s = f / (2 + f); |s| <= 0.1716, odd series cut at a term below 4e-9
  const float s = f / (2.0f + f), s2 = s * s;
  const float series = 2.0f + s2 * (0.66666667f + s2 * (0.4f + s2 * (0.28571429f + s2 * 0.22222222f)));
  return -2.0f * (float(e) * 0.69314718f + s * series);
}

MOREAU_HD double minus_two_log_exact(uint32_t k) {
  return k < 0x80000000u ? -2.0 * log((double(k) + 0.5) * 0x1p-32) : -2.0 * log1p(-(double(~k) + 0.5) * 0x1p-32);
}

// cos and sin of 2 pi k / 2^32. The top bits are the quarter turn, the rest is an angle within pi/4.
template <class S>
MOREAU_HD void cos_sin(uint32_t k, S& c, S& s);

template <>
MOREAU_HD void cos_sin<float>(uint32_t k, float& c, float& s) {
  const uint32_t quarter = (k + 0x20000000u) >> 30;
  const float a = float(int32_t(k - (quarter << 30))) * 1.4629180792671596e-9f;  // (pi / 2) / 2^30
  const float a2 = a * a;
  // Taylor series; the first omitted term is below 2e-9 in both.
  const float sine =
      a * (1.0f + a2 * (-0.166666667f + a2 * (8.33333333e-3f + a2 * (-1.98412698e-4f + a2 * 2.75573192e-6f))));
  const float cosine =
      1.0f +
      a2 * (-0.5f + a2 * (4.16666667e-2f + a2 * (-1.38888889e-3f + a2 * (2.48015873e-5f - a2 * 2.75573192e-7f))));
  const float x = quarter & 1u ? sine : cosine, y = quarter & 1u ? cosine : sine;
  c = ((quarter + 1u) & 2u) ? -x : x;
  s = (quarter & 2u) ? -y : y;
}

template <>
MOREAU_HD void cos_sin<double>(uint32_t k, double& c, double& s) {
  const uint32_t quarter = (k + 0x20000000u) >> 30;
#ifdef __CUDA_ARCH__
  // sincospi of the exact fraction of a half turn: CUDA's sin and cos use local memory for arguments far beyond pi.
  double sine, cosine;
  sincospi(double(int32_t(k - (quarter << 30))) * 0x1p-31, &sine, &cosine);
#else
  const double a = double(int32_t(k - (quarter << 30))) * (1.5707963267948966 * 0x1p-30);
  const double sine = sin(a), cosine = cos(a);
#endif
  const double x = quarter & 1u ? sine : cosine, y = quarter & 1u ? cosine : sine;
  c = ((quarter + 1u) & 2u) ? -x : x;
  s = (quarter & 2u) ? -y : y;
}

template <class S>
MOREAU_HD void box_muller(uint32_t a, uint32_t b, S& z0, S& z1);

template <>
MOREAU_HD void box_muller<float>(uint32_t a, uint32_t b, float& z0, float& z1) {
  const float r = sqrtf(minus_two_log(a));
  float c, s;
  cos_sin<float>(b, c, s);
  z0 = r * c, z1 = r * s;
}

template <>
MOREAU_HD void box_muller<double>(uint32_t a, uint32_t b, double& z0, double& z1) {
  const double r = sqrt(minus_two_log_exact(a));
  double c, s;
  cos_sin<double>(b, c, s);
  z0 = r * c, z1 = r * s;
}

// --- Box-Muller in float on a GPU. A normal, with Philox and its copy, takes 33 to 39 instructions on sm_90, against
// 80 with box_muller<float> (benchmarks/sass_table.py). At 8.6 bytes a normal, the memory of an H200 leaves time for
// about 60 instructions.
//
// |z - exact| <= kFastError max(|z|, 1). kIntrinsicsError of that is for the two intrinsics: PTX states a relative
// error of 2^-22 for lg2.approx below 1/2, which the root halves, and of 2^-23 for sqrt.approx. The rest is rounding,
// as in box_muller<float>; tests/cpp/normals.cpp measures 2.9e-7 for both at the corners and over millions of words.
constexpr double kFastError = 6e-7, kIntrinsicsError = 2.4e-7;
static_assert(0x1p-22 / 2 + 0x1p-23 <= kIntrinsicsError && 2.9e-7 + kIntrinsicsError <= kFastError);

MOREAU_HD float fast_log2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  // volatile keeps the compiler from branching around it: almost every warp has both ends of u, so a branch costs more
  // than it saves.
  asm volatile("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2f(x);
#endif
}

MOREAU_HD float fast_sqrt(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return sqrtf(x);
#endif
}

// -2 ln(u) for u = (k + 1/2) / 2^32, positive for every k. As a signed number, k + 1/2 is 2^32 u for u < 1/2 and
// 2^32 (u - 1) for u > 1/2. So one conversion gives 24 bits of u where u is small, and of 1 - u where that is small.
MOREAU_HD float fast_minus_two_log(uint32_t k) {
  const float a = fmaf(float(int32_t(k)), 0x1p-32f, 0x1p-33f);
  // lg2.approx has no relative accuracy near 1. There: -2 ln(1 + a) / a on [-1/2, 0], minimax error 2.3e-8.
  float p = -2.8821805f;
  p = fmaf(p, a, -3.3915513f);
  p = fmaf(p, a, -2.5152783f);
  p = fmaf(p, a, -0.40705103f);
  p = fmaf(p, a, -0.5392189f);
  p = fmaf(p, a, 0.48561105f);
  p = fmaf(p, a, -0.6674012f);
  p = fmaf(p, a, 0.9999857f);
  p = fmaf(p, a, -2.0f);
  const float near = p * a, far = fast_log2(a) * -1.3862944f;
  return a < 0.0f ? near : far;
}

// x, negated where the top bit of `by` is set.
MOREAU_HD float flipped(float x, uint32_t by) {
  uint32_t bits;
#ifdef __CUDA_ARCH__
  bits = __float_as_uint(x);
  return __uint_as_float(bits ^ (by & 0x80000000u));
#else
  std::memcpy(&bits, &x, sizeof bits);
  bits ^= by & 0x80000000u;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

MOREAU_HD void fast_box_muller(uint32_t a, uint32_t b, float& z0, float& z1) {
  const float r = fast_sqrt(fast_minus_two_log(a));
  // As in cos_sin: without its two top bits, b is an angle within pi/4 of a quarter turn. Minimax errors below 1e-8.
  const uint32_t quarter = b + 0x20000000u;
  const float angle = float(int32_t(b << 2)) * 3.6572952e-10f;  // (pi / 2) / 2^32
  const float square = angle * angle;
  float sine = fmaf(fmaf(-1.958736e-4f, square, 8.332745e-3f), square, -0.16666664f);
  sine = fmaf(sine * square, angle, angle);
  float cosine = fmaf(fmaf(fmaf(2.4463161e-5f, square, -1.3887584e-3f), square, 4.166665e-2f), square, -0.5f);
  cosine = fmaf(cosine, square, 1.0f);
  const bool odd = int32_t(quarter << 1) < 0;
  z0 = flipped(r * (odd ? sine : cosine), quarter + 0x40000000u);
  z1 = flipped(r * (odd ? cosine : sine), quarter);
}

// The four normals of one call's words.
template <class S>
MOREAU_HD void normals(const Words& words, S z[4]) {
#ifdef __CUDACC__
  if constexpr (sizeof(S) == sizeof(float)) {
    fast_box_muller(words.w[0], words.w[1], z[0], z[1]);
    fast_box_muller(words.w[2], words.w[3], z[2], z[3]);
    return;
  }
#endif
  box_muller<S>(words.w[0], words.w[1], z[0], z[1]);
  box_muller<S>(words.w[2], words.w[3], z[2], z[3]);
}

}  // namespace moreau
