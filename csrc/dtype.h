// Storage types, their state types, and dispatch on the run-time tag.
#pragma once

#include <cstdint>
#include <cstring>

#include "check.h"
#include "kernels.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MOREAU_HD __host__ __device__ __forceinline__
#else
#define MOREAU_HD inline __attribute__((always_inline))
#endif

namespace moreau {

// Host forms of the two half types: bits, converted by integer arithmetic that vectorises without F16C.
struct half_bits {
  uint16_t bits;
};
struct bfloat_bits {
  uint16_t bits;
};
static_assert(sizeof(half_bits) == 2 && sizeof(bfloat_bits) == 2, "tensors are arrays of them");

template <class T>
struct State {
  using type = float;
};
template <>
struct State<double> {
  using type = double;
};
template <class T>
using state_t = typename State<T>::type;

// Storage to state and back, rounded to nearest even.
MOREAU_HD float load(float v) { return v; }
MOREAU_HD double load(double v) { return v; }
MOREAU_HD void store(float* to, float v) { *to = v; }
MOREAU_HD void store(double* to, double v) { *to = v; }

#ifdef __CUDACC__
MOREAU_HD float load(__half v) { return __half2float(v); }
MOREAU_HD float load(__nv_bfloat16 v) { return __bfloat162float(v); }
MOREAU_HD void store(__half* to, float v) { *to = __float2half_rn(v); }
MOREAU_HD void store(__nv_bfloat16* to, float v) { *to = __float2bfloat16_rn(v); }
#else
MOREAU_HD float as_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}
MOREAU_HD uint32_t as_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}

MOREAU_HD float load(bfloat_bits v) { return as_float(uint32_t(v.bits) << 16); }
MOREAU_HD float load(half_bits v) {
  // After the shift the exponent is 112 too small. The product corrects it and normalises subnormals.
  const uint32_t magnitude = uint32_t(v.bits & 0x7fffu) << 13;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinities and NaN
  const uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);
  return as_float(finite | special | uint32_t(v.bits & 0x8000u) << 16);
}

MOREAU_HD void store(bfloat_bits* to, float v) {
  const uint32_t u = as_bits(v);
  const uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;  // to nearest, ties to even
  const uint32_t quiet = (u >> 16) | 0x40u;
  to->bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}
MOREAU_HD void store(half_bits* to, float v) {
  const uint32_t u = as_bits(v), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  // Normal range: rebias the exponent by -112 and round to nearest even.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Below 2^-14: the sum with 0.5 has the bits of a subnormal half at its end, rounded by the addition.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t bits = magnitude < 0x38800000u ? subnormal : normal;
  bits = magnitude >= 0x477ff000u ? 0x7c00u : bits;  // 65520 and above round to infinity
  bits = magnitude > 0x7f800000u ? 0x7e00u : bits;
  to->bits = uint16_t(bits | sign);
}
#endif

// Calls f with a value of the storage type.
template <class F>
void dispatch(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32: return f(float{});
    case Dtype::f64: return f(double{});
#ifdef __CUDACC__
    case Dtype::f16: return f(__half{});
    case Dtype::bf16: return f(__nv_bfloat16{});
#else
    case Dtype::f16: return f(half_bits{});
    case Dtype::bf16: return f(bfloat_bits{});
#endif
  }
  fail("unknown dtype tag ", int(dtype));
}

}  // namespace moreau
