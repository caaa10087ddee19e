// Device helpers that every attention kernel shares: which keys a row sees, where a key lives, the logit, the 8-bit
// dequantisation.
//
// Conventions. The tensor-core kernels run softmax in base 2: logits are kept times log2(e), so exp2 is the only
// exponential; log-sum-exp values become natural logarithms when they are written. A row's visible keys are one
// interval [lo, hi) whatever the mask (causal, window, both, neither), so that masks and tile skipping share two
// numbers.
#pragma once

#include "attention.h"
#include "tensor_core.cuh"

namespace pagedkv {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kNegInf = -__builtin_huge_valf();

// which keys --------------------------------------------------------------------------------------------------------

struct KeyRange {
  int lo, hi;  // [lo, hi); empty when hi <= lo
};

// Keys of sequence `seq` that may be read: a negative length counts as 0, and the table (or the dense bound) ends it.
__device__ __forceinline__ int readable_keys(const AttentionParams& p, int seq_len) {
  return max(0, min(seq_len, p.max_key_len));
}

// The union of what rows at positions q_first <= ... <= q_last see of `keys` readable keys.
__device__ __forceinline__ KeyRange visible_keys(const AttentionParams& p, int q_first, int q_last, int keys) {
  KeyRange r{0, keys};
  if (p.window > 0) {
    r.lo = max(0, q_first - p.window + 1);
    if (!p.causal) r.hi = min(keys, q_last + p.window);
  }
  if (p.causal) r.hi = min(keys, q_last + 1);
  return r;
}
__device__ __forceinline__ KeyRange visible_keys(const AttentionParams& p, int q_pos, int keys) {
  return visible_keys(p, q_pos, q_pos, keys);
}

// The pool block of key position `pos` (which must be >= 0), or -1 where the table has no usable entry.
__device__ __forceinline__ int block_of(const AttentionParams& p, int seq, int pos) {
  const int i = pos >> p.block_shift;
  if (i >= p.max_blocks) return -1;
  const int block = p.block_tables[int64_t(seq) * p.table_stride + i];
  return block >= 0 && block < p.num_blocks ? block : -1;
}

// Element offset of a key row; pools hold more than 2^31 elements, so every product is 64-bit.
__device__ __forceinline__ int64_t k_offset(const AttentionParams& p, int block, int pos, int kv_head) {
  return block * p.k_stride_block + (pos & (p.block_size - 1)) * p.k_stride_t + kv_head * p.k_stride_h;
}
__device__ __forceinline__ int64_t v_offset(const AttentionParams& p, int block, int pos, int kv_head) {
  return block * p.v_stride_block + (pos & (p.block_size - 1)) * p.v_stride_t + kv_head * p.v_stride_h;
}
// The same for k_scale and v_scale, float32 [num_blocks, block_size, Hkv].
__device__ __forceinline__ int64_t scale_offset(const AttentionParams& p, int block, int pos, int kv_head) {
  return ((int64_t(block) << p.block_shift) + (pos & (p.block_size - 1))) * p.num_kv_heads + kv_head;
}

// logits ------------------------------------------------------------------------------------------------------------

// exp2 with flush of denormals; exp2(-inf) = 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Relative error at most 2^-11.
__device__ __forceinline__ float tanh_approximate(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh for |x| < kTanhNear: an odd polynomial, relative error near 2e-7.
constexpr float kTanhNear = 0.55f;
__device__ __forceinline__ float tanh_near(float x) {
  const float square = x * x;
  float p = fmaf(0.016458757f, square, -0.052684143f);
  p = fmaf(p, square, 0.13320942f);
  p = fmaf(p, square, -0.33332959f);
  return fmaf(p * square, x, x);
}
// Relative error near 2e-7. Near 0 the difference below would keep an absolute error of a rounding at 1, times the
// softcap; hence the polynomial there.
__device__ __forceinline__ float tanh_fast(float x) {
  const float far = 1.f - __fdividef(2.f, exp2_fast(2.f * kLog2e * x) + 1.f);
  return fabsf(x) < kTanhNear ? tanh_near(x) : far;
}

// q.k -> logit * log2(e), without ALiBi, which adds slope * log2(e) * (key position - query position).
struct Logit {
  float mul, cap;

  __device__ __forceinline__ explicit Logit(const AttentionParams& p)
      : mul(p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2e), cap(p.softcap * kLog2e) {}
  __device__ __forceinline__ float capped(float scaled) const { return cap * tanh_fast(scaled); }
  __device__ __forceinline__ float operator()(float qk) const {
    const float x = qk * mul;
    return cap > 0 ? capped(x) : x;
  }
};

// 16-bit pairs --------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ uint32_t pack2(float lo, float hi) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 h = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&h);
  } else {
    const __nv_bfloat162 h = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&h);
  }
}

// Four stored bytes -> two pairs of T, exactly (both formats have fewer significant bits than T). kAdjacent: bytes
// (0, 1) and (2, 3); otherwise (0, 2) and (1, 3), which is what ldmatrix.trans leaves: two dimensions of two keys.
//   int8 -> fp16: 0x6400 | (x + 128) is 1024 + x + 128.    int8 -> bf16: 0x4300 | low 7 bits is 128 + them, and the
//   sign bit raises what is subtracted from 128 to 256.         fp8: the hardware's conversion (emulated before sm_89).
template <class T, KVType kKV, bool kAdjacent>
__device__ __forceinline__ void dequantize4(uint32_t bytes, uint32_t& first, uint32_t& second) {
  static_assert(kKV != KVType::kSame);
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (kKV == KVType::kInt8) {
    constexpr uint32_t kFirst = kAdjacent ? 0x4140 : 0x4240, kSecond = kAdjacent ? 0x4342 : 0x4341;
    if constexpr (kHalf) {
      const uint32_t u = bytes ^ 0x80808080u;
      const __half2 bias = __half2half2(__ushort_as_half(0x6480));  // 1152
      auto convert = [&](uint32_t selector) {
        const uint32_t w = __byte_perm(u, 0x64646464u, selector);
        const __half2 h = __hsub2(*reinterpret_cast<const __half2*>(&w), bias);
        return *reinterpret_cast<const uint32_t*>(&h);
      };
      first = convert(kFirst);
      second = convert(kSecond);
    } else {
      auto convert = [&](uint32_t selector) {
        const uint32_t w = __byte_perm(bytes, 0u, selector);
        const uint32_t a = (w & 0x007f007fu) | 0x43004300u, b = (w & 0x00800080u) | 0x43004300u;
        const __nv_bfloat162 h =
            __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
        return *reinterpret_cast<const uint32_t*>(&h);
      };
      first = convert(kFirst);
      second = convert(kSecond);
    }
  } else {
    const uint32_t w = kAdjacent ? bytes : __byte_perm(bytes, 0u, 0x3120);
    auto convert = [&](uint32_t pair) {
      const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(pair), __NV_E4M3);
      const __half2 h(raw);
      if constexpr (kHalf) {
        return *reinterpret_cast<const uint32_t*>(&h);
      } else {
        const float2 f = __half22float2(h);
        return pack2<T>(f.x, f.y);
      }
    };
    first = convert(w & 0xffffu);
    second = convert(w >> 16);
  }
}

// One stored value -> float, for the scalar kernels.
template <KVType kKV>
__device__ __forceinline__ float dequantize1(uint8_t byte) {
  static_assert(kKV != KVType::kSame);
  if constexpr (kKV == KVType::kInt8) {
    return float(int8_t(byte));
  } else {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(__nv_fp8_storage_t(byte), __NV_E4M3)));
  }
}

}  // namespace pagedkv
