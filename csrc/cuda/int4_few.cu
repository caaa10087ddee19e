// int4_linear for up to 16 rows (decoding), 16-bit activations: bound by the bytes of the weights.
// units: PAGEDKV_TYPE=__half,__nv_bfloat16
//
// Algorithm: y^T = W x^T on mma.m16n8k16 as in int4_mma.cu, with the same fragments of W straight from memory: of a
// slice of 32 inputs and 32 outputs a lane's four words are 16 consecutive bytes and a warp's 512, so nothing passes
// through shared memory. A CTA owns 32 outputs; its warps have even runs of K each and are added up in order at the
// end, through shared memory. All orders are fixed by the shapes: equal calls give equal bits.
//
// What counts is how many bytes are under way: every warp keeps kRing slices (of 512 bytes) with their scales and zeros
// in flight, in registers, and the number of warps of a CTA is chosen so that all CTAs run at once, 16 warps an SM: 64
// KiB, twice what 4.28 TB/s at a microsecond of latency ask for. x comes through L1, a slice ahead.
//
// Numbers: as in int4_mma.cu; a group's sum is scaled in float32 when the group ends.
//
// Floor: bytes of W / 4.28 TB/s (an H200's copy bandwidth). An SM's issue slots: about 60 a slice, 3.7 us for
// 14336 x 4096, where the bytes take 7.
#include <algorithm>

#include "int4.h"
#include "int4_tile.cuh"

namespace pagedkv {
namespace {

constexpr int kMostWarps = 16, kWarpsPerSm = 16;  // 128 registers a thread
constexpr int kSlice = 32;

// How the factors of a lane's four outputs are read: 16 or 32 bits each in one load, or any way they may lie.
enum class Read { kNarrow, kWide, kEach };

// Scales and zeros (or offsets) of a lane's four outputs in a group: bits as in memory, or of floats (kEach).
template <Read kRead, bool kOffsets>
struct Raw {
  static constexpr int kWords = kRead == Read::kNarrow ? 2 : 4;
  uint32_t scale[kWords];
  uint32_t other[kOffsets ? kWords : 1];
};

template <Read kRead, int kWords>
__device__ __forceinline__ void load_factors(uint32_t (&to)[kWords], const void* from, ScalarType type, int64_t at,
                                             int count) {
  if constexpr (kRead == Read::kNarrow) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(from) + at));
    to[0] = v.x, to[1] = v.y;
  } else if constexpr (kRead == Read::kWide) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint32_t*>(from) + at));
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
#pragma unroll
    for (int b = 0; b < 4; ++b) to[b] = b < count ? __float_as_uint(load_scale(from, type, at + b)) : 0u;
  }
}

template <Read kRead>
__device__ __forceinline__ float factor(const uint32_t* words, int b, ScalarType type) {
  if constexpr (kRead != Read::kNarrow) return __uint_as_float(words[b]);
  const uint32_t bits = words[b / 2] >> 16 * (b % 2);
  if (type == ScalarType::BFloat16) return __uint_as_float(bits << 16);
  return __half2float(__ushort_as_half(uint16_t(bits)));
}

template <class T, int kTiles, Read kRead, bool kOffsets>
__global__ void __launch_bounds__(32 * kMostWarps) int4_few_kernel(const __grid_constant__ Int4Params p) {
  constexpr int kRing = kTiles > 1 || kRead != Read::kNarrow ? 4 : 8;
  constexpr int kSums = 2 * kTiles * 4;
  extern __shared__ __align__(16) float sums[];  // [warp][sum][lane]
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), warps = blockDim.x >> 5;
  const int64_t first_n = int64_t(blockIdx.x) * kInt4Block, n = first_n + 4 * g;
  const int count = int(min(int64_t(4), max(int64_t(0), p.n - n)));  // of this lane's outputs
  const int slices = int(p.k_padded / kSlice);
  const int begin = int(int64_t(slices) * warp / warps), end = int(int64_t(slices) * (warp + 1) / warps);
  const int one = max(1, p.group >= p.k ? slices : int(p.group / kSlice));  // slices of a group but the last

  const uint4* const words =
      reinterpret_cast<const uint4*>(p.packed) + blockIdx.x * (p.k_padded / kInt4Word) * (kInt4Block / 4) + t * 8 + g;
  auto load_raw = [&](int64_t group) {
    Raw<kRead, kOffsets> raw{};
    const int64_t at = group * p.n + n;
    if (count > 0) {
      load_factors<kRead>(raw.scale, p.scales, p.scale_type, at, count);
      if constexpr (kOffsets) {
        load_factors<kRead>(raw.other, p.offsets, p.scale_type, at, count);
      } else if (!p.zeros) {
        raw.other[0] = 0x08080808u;
      } else if constexpr (kRead != Read::kEach) {
        raw.other[0] = __ldg(reinterpret_cast<const uint32_t*>(p.zeros + at));
      } else {
#pragma unroll
        for (int b = 0; b < 4; ++b)
          if (b < count) raw.other[0] |= uint32_t(__ldg(p.zeros + at + b)) << 8 * b;
      }
    }
    return raw;
  };

  // ---- the ring: slice s sits in entry (s - begin) % kRing
  uint4 ring[kRing];
  Raw<kRead, kOffsets> raw[kRing];
  int ahead = begin, ahead_group = begin / one, ahead_in_group = begin % one;
  bool first = true;
  auto fetch = [&](int i) {  // the next slice
    if (ahead < end) {
      ring[i] = __ldcs(words + int64_t(ahead) * (kSlice / kInt4Word * kInt4Block / 4));
      if (first || ahead_in_group == 0) raw[i] = load_raw(ahead_group);
      first = false;
      if (++ahead_in_group == one) ahead_in_group = 0, ++ahead_group;
    }
    ++ahead;
  };
#pragma unroll
  for (int i = 0; i < kRing; ++i) fetch(i);

  const T* const x_lane = static_cast<const T*>(p.x) + (int64_t(blockIdx.y) * (8 * kTiles) + g) * p.x_stride + 8 * t;
  const int64_t rows_left = p.m - int64_t(blockIdx.y) * (8 * kTiles);
  auto load_x = [&](uint4(&to)[kTiles], int s) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const bool valid = s < end && 8 * j + g < rows_left && s * kSlice + 8 * t < p.k;
      to[j] = make_uint4(0, 0, 0, 0);
      if (valid) to[j] = __ldg(reinterpret_cast<const uint4*>(x_lane + 8 * j * p.x_stride + s * kSlice));
    }
  };
  uint4 x_next[kTiles];
  load_x(x_next, begin);

  float total[2][kTiles][4] = {}, sum[2][kTiles][4] = {};
  float x_sum[kOffsets ? kTiles : 1][4] = {};
  float scale[4], offset[kOffsets ? 4 : 1];
  uint32_t zero[4];
  int in_group = begin % one;
  auto flush = [&]() {
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int b = 2 * part + e / 2;
          float& to = total[part][j][e];
          to = fmaf(scale[b], sum[part][j][e], to);
          if constexpr (kOffsets) to = fmaf(fmaf(8.f, scale[b], offset[b]), x_sum[j][e & 1], to);
          sum[part][j][e] = 0.f;
        }
    if constexpr (kOffsets)
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) x_sum[j][e] = 0.f;
  };

#pragma unroll 1
  for (int s0 = begin; s0 < end; s0 += kRing) {
#pragma unroll
    for (int i = 0; i < kRing; ++i) {
      const int s = s0 + i;
      if (s >= end) break;
      if (s == begin || in_group == 0) {
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          scale[b] = factor<kRead>(raw[i].scale, b, p.scale_type);
          if constexpr (kOffsets)
            offset[b] = factor<kRead>(raw[i].other, b, p.scale_type);
          else
            zero[b] = int4_bias<T>() + (raw[i].other[0] >> 8 * b & 0xffu) * 0x00010001u;
        }
      }
      uint4 x[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) x[j] = x_next[j];
      load_x(x_next, s + 1);
      uint32_t a[2][2][4];
      int4_fragments<T, kOffsets>(ring[i], zero, a);
      fetch(i);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          mma_16816<T>(sum[part][j], a[part][0], x[j].x, x[j].y);
          mma_16816<T>(sum[part][j], a[part][1], x[j].z, x[j].w);
        }
        if constexpr (kOffsets) int4_add_inputs<T>(x_sum[j], x[j]);
      }
      if (++in_group == one || s + 1 == end) {
        flush();
        in_group = 0;
      }
    }
  }

  // ---- the warps' sums, in order; thread i of the CTA has output i % 32 of row i / 32
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[(warp * kSums + i) * 32 + lane] = total[i / (kSums / 2)][i / 4 % kTiles][i % 4];
  __syncthreads();
  const int rows = int(min(int64_t(8 * kTiles), rows_left));
  for (int i = threadIdx.x; i < rows * kInt4Block; i += blockDim.x) {
    const int row = i / kInt4Block, c = i % kInt4Block;  // c = 4 g + b
    const int at = ((c >> 1 & 1) * kTiles + row / 8) * 4 + (c & 1) * 2 + (row & 1);
    const int from = (c & ~3) + (row & 7) / 2;
    float result = 0.f;
    for (int w = 0; w < warps; ++w) result += sums[(w * kSums + at) * 32 + from];
    if (first_n + c >= p.n) continue;
    const int64_t to_row = int64_t(blockIdx.y) * (8 * kTiles) + row;
    static_cast<T*>(p.y)[to_row * p.n + first_n + c] = int4_finish<T>(p, to_row, first_n + c, result);
  }
}

template <class T, int kTiles, Read kRead, bool kOffsets>
void launch(const Int4Params& p, int device, cudaStream_t stream) {
  int sms = 1;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  const int64_t blocks = (p.n + kInt4Block - 1) / kInt4Block, rows = (p.m + 8 * kTiles - 1) / (8 * kTiles);
  const int64_t slices = p.k_padded / kSlice;
  int warps = kMostWarps;
  while (warps > 1 && (blocks * rows * warps > int64_t(sms) * kWarpsPerSm || warps > slices)) warps /= 2;
  const int bytes = warps * 2 * kTiles * 4 * 32 * int(sizeof(float));
  static_assert(kMostWarps * 2 * kTiles * 4 * 32 * sizeof(float) <= 48 * 1024);
  int4_few_kernel<T, kTiles, kRead, kOffsets><<<dim3(unsigned(blocks), unsigned(rows)), 32 * warps, bytes, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T, int kTiles, Read kRead>
void launch(const Int4Params& p, int device, cudaStream_t stream) {
  (p.offsets ? launch<T, kTiles, kRead, true> : launch<T, kTiles, kRead, false>)(p, device, stream);
}

template <class T, int kTiles>
void launch(const Int4Params& p, int device, cudaStream_t stream) {
  const auto aligned = [](const void* q, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(q) % bytes == 0; };
  const uintptr_t four = p.scale_type == ScalarType::Float ? 16 : 8;  // bytes of a lane's scales
  const bool at_once = p.n % 4 == 0 && aligned(p.scales, four) && aligned(p.offsets, four) && aligned(p.zeros, 4);
  if (!at_once)
    launch<T, kTiles, Read::kEach>(p, device, stream);
  else if (p.scale_type == ScalarType::Float)
    launch<T, kTiles, Read::kWide>(p, device, stream);
  else
    launch<T, kTiles, Read::kNarrow>(p, device, stream);
}

}  // namespace

template <>
void launch_int4_few<PAGEDKV_TYPE>(Int4Params& p, int device, cudaStream_t stream) {
  (p.m <= 8 ? launch<PAGEDKV_TYPE, 1> : launch<PAGEDKV_TYPE, 2>)(p, device, stream);
}

}  // namespace pagedkv
