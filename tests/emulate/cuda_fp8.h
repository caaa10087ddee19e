// Stand-in for CUDA's header of this name: e4m3, whose conversion from float saturates (torch's own gives NaN).
#pragma once

#include <torch/headeronly/util/Float8_e4m3fn.h>

#include "cuda_fp16.h"

using __nv_fp8_storage_t = unsigned char;
using __nv_fp8x2_storage_t = unsigned short;
enum __nv_fp8_interpretation_t { __NV_E4M3 };
enum __nv_saturation_t { __NV_SATFINITE };

struct __nv_fp8_e4m3 {
  __nv_fp8_storage_t __x;
  __nv_fp8_e4m3() = default;
  explicit __nv_fp8_e4m3(float x)
      : __x(x != x ? 0x7f
                   : torch::headeronly::Float8_e4m3fn(x > 448.f    ? 448.f
                                                      : x < -448.f ? -448.f
                                                                   : x)
                         .x) {}
  explicit operator float() const {
    return torch::headeronly::Float8_e4m3fn(__x, torch::headeronly::Float8_e4m3fn::from_bits());
  }
};

inline __half_raw __nv_cvt_fp8_to_halfraw(__nv_fp8_storage_t x, __nv_fp8_interpretation_t) {
  __nv_fp8_e4m3 value;
  value.__x = x;
  return {__half(float(value)).x};
}
inline __half2_raw __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t x, __nv_fp8_interpretation_t kind) {
  return {__nv_cvt_fp8_to_halfraw(__nv_fp8_storage_t(x), kind).x,
          __nv_cvt_fp8_to_halfraw(__nv_fp8_storage_t(x >> 8), kind).x};
}
inline __nv_fp8x2_storage_t __nv_cvt_float2_to_fp8x2(float2 x, __nv_saturation_t, __nv_fp8_interpretation_t) {
  return __nv_fp8x2_storage_t(__nv_fp8_e4m3(x.x).__x | __nv_fp8_e4m3(x.y).__x << 8);
}
