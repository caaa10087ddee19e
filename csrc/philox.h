// The random stream of `sample`: Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011)
// and the exponential variates made from it. The CPU kernels draw the words of entries with vectors
// (csrc/cpu/rows.inl); torch_pagedkv/ops/sampling.py holds the specification and the reference.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PAGEDKV_PHILOX static __host__ __device__ __forceinline__
#else
#define PAGEDKV_PHILOX static inline
#endif

namespace pagedkv {

// One row's stream: words 4 g .. 4 g + 3 of (seed, offset) are philox4(stream, g), and those of its groups
// philox4(stream, g, 1).
struct PhiloxStream {
  uint32_t seed_lo, seed_hi, offset_lo, offset_hi;
};

struct PhiloxWords {
  uint32_t x[4];
};

PAGEDKV_PHILOX PhiloxStream philox_stream(int64_t seed, int64_t offset) {
  const uint64_t s = static_cast<uint64_t>(seed), o = static_cast<uint64_t>(offset);
  return {static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32), static_cast<uint32_t>(o),
          static_cast<uint32_t>(o >> 32)};
}

// a * b, both words of it. From the 64-bit product of widened words nvcc makes a wide multiplication and an addition of
// 0.
PAGEDKV_PHILOX uint64_t philox_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t(a) * b;
#endif
}

// Philox4x32-10 of counter (block, heat, offset_lo, offset_hi) under key (seed_lo, seed_hi).
PAGEDKV_PHILOX PhiloxWords philox4(const PhiloxStream& stream, uint32_t block, uint32_t heat = 0) {
  uint32_t c0 = block, c1 = heat, c2 = stream.offset_lo, c3 = stream.offset_hi;
  uint32_t k0 = stream.seed_lo, k1 = stream.seed_hi;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = philox_product(0xD2511F53u, c0), p1 = philox_product(0xCD9E8D57u, c2);
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// w = min((x + 0.5) * 2^-32, 1 - 2^-24) in float32. The exponential variate of the race is E = -log1p(-w), so E >= w.
// The products are exact, so the bits do not depend on whether the compiler contracts to an FMA.
PAGEDKV_PHILOX float philox_uniform(uint32_t x) {
  const float w = static_cast<float>(x) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;  // 2^-32, 2^-33
  const float last = 0.999999940395355224609375f;                                             // 1 - 2^-24
  return w < last ? w : last;
}

}  // namespace pagedkv

#undef PAGEDKV_PHILOX
