// Stand-in for CUDA's header of this name: the half-precision types and functions that the kernels use.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>

using __half = torch::headeronly::Half;  // rounds to nearest even, as the hardware does

struct __half_raw {
  unsigned short x;
  operator __half() const { return __half(x, __half::from_bits()); }
};
struct __half2_raw {
  unsigned short x, y;
};
struct alignas(4) __half2 {
  __half x, y;
  __half2() = default;
  __half2(__half x_, __half y_) : x(x_), y(y_) {}
  explicit __half2(__half2_raw r) : x(__half_raw{r.x}), y(__half_raw{r.y}) {}
};
struct alignas(8) float2 {
  float x, y;
};

inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half2 __hsub2(__half2 a, __half2 b) {
  return {__half(float(a.x) - float(b.x)), __half(float(a.y) - float(b.y))};
}
inline __half2 __hmul2(__half2 a, __half2 b) {
  return {__half(float(a.x) * float(b.x)), __half(float(a.y) * float(b.y))};
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {__half(float(a.x) * float(b.x) + float(c.x)), __half(float(a.y) * float(b.y) + float(c.y))};
}
inline float2 __half22float2(__half2 h) { return {float(h.x), float(h.y)}; }
inline float __half2float(__half h) { return float(h); }
inline __half __ushort_as_half(unsigned short bits) { return __half_raw{bits}; }
// the larger, or what is not NaN
inline __half2 __hmax2(__half2 a, __half2 b) {
  return {__half(fmaxf(float(a.x), float(b.x))), __half(fmaxf(float(a.y), float(b.y)))};
}
