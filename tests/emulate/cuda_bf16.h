// Stand-in for CUDA's header of this name: the bfloat16 types and functions that the kernels use.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

using __nv_bfloat16 = torch::headeronly::BFloat16;  // rounds to nearest even, as the hardware does

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __hsub2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {__nv_bfloat16(float(a.x) - float(b.x)), __nv_bfloat16(float(a.y) - float(b.y))};
}
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {__nv_bfloat16(float(a.x) * float(b.x)), __nv_bfloat16(float(a.y) * float(b.y))};
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return {__nv_bfloat16(float(a.x) * float(b.x) + float(c.x)), __nv_bfloat16(float(a.y) * float(b.y) + float(c.y))};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return float(x); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.x; }
// the larger, or what is not NaN
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {__nv_bfloat16(fmaxf(float(a.x), float(b.x))), __nv_bfloat16(fmaxf(float(a.y), float(b.y)))};
}
