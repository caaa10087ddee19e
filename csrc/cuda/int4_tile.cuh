// From packed words to fragments of tensor cores, for the kernels of int4_linear.
#pragma once

#include "tensor_core.cuh"

namespace pagedkv {

// What a number is written on top of: 0x6400 | q is the half 1024 + q, 0x4300 | q the bfloat16 128 + q.
template <class T>
__device__ __forceinline__ constexpr uint32_t int4_bias() {
  return std::is_same_v<T, __half> ? 0x64006400u : 0x43004300u;
}

template <class T>
__device__ __forceinline__ uint32_t subtract_pair(uint32_t a, uint32_t b) {
  using T2 = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const T2 d = __hsub2(*reinterpret_cast<const T2*>(&a), *reinterpret_cast<const T2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&d);
}

// Zero b (0..16) of four in bytes, as the pair that is subtracted.
template <class T>
__device__ __forceinline__ uint32_t int4_zero_pair(uint32_t zeros, int b) {
  return __byte_perm(zeros, int4_bias<T>(), 0x5050 | b | b << 8);  // byte 5 is the upper one of the bias
}

// (a & mask) ^ bits in one instruction: the compiler makes two, for it wants both constants as immediates.
__device__ __forceinline__ uint32_t and_xor(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(mask), "r"(bits), "n"(0x6a));
  return r;
}

template <class T>
__device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b) {
  using T2 = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const T2 d = __hmul2(*reinterpret_cast<const T2*>(&a), *reinterpret_cast<const T2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&d);
}
template <class T>
__device__ __forceinline__ uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  using T2 = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const T2 d =
      __hfma2(*reinterpret_cast<const T2*>(&a), *reinterpret_cast<const T2*>(&b), *reinterpret_cast<const T2*>(&c));
  return *reinterpret_cast<const uint32_t*>(&d);
}

// Of a lane's outputs, in both halves. With kSplit a float16 scale is the sum of two bfloat16.
template <class T, bool kSplit, int kOutputs>
struct Int4Factors {
  uint32_t zero[kOutputs], scale[kOutputs], rest[kSplit ? kOutputs : 1];
  // scales(i): those of outputs 2 i and 2 i + 1. Zeros in bytes
  template <class Scales>
  __device__ __forceinline__ void set(const Scales& scales, uint32_t zeros) {
    const auto twice = [](uint32_t bits) { return bits | bits << 16; };
#pragma unroll
    for (int b = 0; b < kOutputs; ++b) {
      const uint32_t bits = scales(b / 2) >> 16 * (b % 2) & 0xffff;
      zero[b] = int4_zero_pair<T>(zeros, b);
      if constexpr (kSplit) {
        const float value = __half2float(__ushort_as_half(uint16_t(bits)));
        const __nv_bfloat16 high = __float2bfloat16(value), low = __float2bfloat16(value - __bfloat162float(high));
        scale[b] = twice(__bfloat16_as_ushort(high)), rest[b] = twice(__bfloat16_as_ushort(low));
      } else {
        scale[b] = twice(bits);
      }
    }
  }
  // The lowest four bits of both halves, numbers of output b -> weights
  __device__ __forceinline__ uint32_t weights(uint32_t halves, int b) const {
    const uint32_t number = and_xor(halves, 0x000f000fu, int4_bias<T>() | 0x00080008u);
    const uint32_t whole = subtract_pair<T>(number, zero[b]);
    if constexpr (kSplit)
      return fma_pair<T>(whole, scale[b], multiply_pair<T>(whole, rest[b]));
    else
      return multiply_pair<T>(whole, scale[b]);
  }
};

// A lane's four words of a slice of 32 inputs -> a[part][half of the slice], less the zeros (pairs of bias + zero), or
// with kCentred less 8, exactly.
template <class T, bool kCentred>
__device__ __forceinline__ void int4_fragments(const uint4& words, const uint32_t (&zero)[4], uint32_t (&a)[2][2][4]) {
  const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int b = 0; b < 4; ++b)
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const uint32_t number = and_xor(w[b] >> 4 * pair, 0x000f000fu, int4_bias<T>() | 0x00080008u);
      a[b / 2][pair / 2][b % 2 + pair % 2 * 2] =
          subtract_pair<T>(number, kCentred ? int4_bias<T>() + 0x00080008u : zero[b]);
    }
}

// The same words as numbers q + int4_fold_bias, 12 shifts and 16 lop3. What they are too large by is left to the sums:
// sum x (q + bias) - (bias + zero) sum x. A half has 64, whose steps are 1/16, for float32 to lose less of the
// difference.
template <class T>
__device__ __forceinline__ constexpr float int4_fold_bias() {
  return std::is_same_v<T, __half> ? 64.f : 128.f;
}
template <class T>
__device__ __forceinline__ void int4_numbers(const uint4& words, uint32_t (&a)[2][2][4]) {
  const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int b = 0; b < 4; ++b)
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t& to = a[b / 2][pair / 2][b % 2 + pair % 2 * 2];
      if constexpr (std::is_same_v<T, __half>)
        to = and_xor(pair == 0 ? w[b] << 4 : w[b] >> (pair == 0 ? 0 : 4 * (pair - 1)), 0x00f000f0u, 0x54805480u);
      else
        to = and_xor(w[b] >> 4 * pair, 0x000f000fu, 0x43084308u);
    }
}

// sum += the inputs of each row (an mma with ones).
template <class T>
__device__ __forceinline__ void int4_add_inputs(float (&sum)[4], const uint4& x) {
  constexpr uint32_t kOne = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
  const uint32_t ones[4] = {kOne, kOne, kOne, kOne};
  mma_16816<T>(sum, ones, x.x, x.y);
  mma_16816<T>(sum, ones, x.z, x.w);
}

}  // namespace pagedkv
