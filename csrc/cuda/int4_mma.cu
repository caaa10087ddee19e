// int4_linear for 16-bit activations on tensor cores (mma.sync m16n8k16, float32 sums), sm_80 and later. From
// kInt4Expand rows on, int4.cu turns to cuBLAS.
// units: PAGEDKV_TYPE=__half,__nv_bfloat16
//
// Algorithm: y^T = W x^T, so that weights are the 16 rows of a product and few rows of x fill its 8 columns. Of a slice
// of 32 inputs and 32 outputs a lane's words are 16 consecutive bytes and a warp's 512, and they are its fragments of W
// for four mma (int4.h): they come straight from memory into registers, nothing passes through shared memory. A warp
// has 32 outputs, 8, 16 or 32 rows and a run of K; warps of a CTA with the same outputs are added up in order at the
// end. All orders are fixed by the shapes: equal calls give equal bits. A nibble becomes a number by
//
//     0x6400 | q is the half 1024 + q        0x4300 | q is the bfloat16 128 + q
//
// minus the same of its zero, exactly. Sums of a step (1, 2 or 4 slices of one group) are float32 and are scaled in
// float32, so scales of any type lose nothing. Offsets: y += (offset + 8 scale) * sum(x), the sum from an mma with
// ones.
//
// What counts is how many bytes are under way: every warp keeps kRing slices and their factors in flight, and as many
// warps run as registers allow: 16 an SM and 64 KiB, twice what 4.28 TB/s at a microsecond of latency ask for. x comes
// through L1, a slice ahead; with more rows a CTA has more outputs, since each CTA reads all of x from L2.
//
// Floor: bytes of W / 4.28 TB/s (an H200's copy bandwidth). The other limit is instructions: 44 turn a slice into
// numbers, about 70 in all; a version with 190, which followed groups slice by slice, took 22.2 us for 14336 x 4096
// where the bytes take 7.2.
#include <algorithm>

#include "int4.h"
#include "int4_tile.cuh"

namespace pagedkv {
namespace {

constexpr int kSlice = 32;
// Warps of a CTA and of an SM: 128 registers a thread, for 32 rows 255.
constexpr int most_warps(int tiles) { return tiles > 2 ? 8 : 16; }

// How the factors of a lane's four outputs are read: 16 or 32 bits each in one load, those of Q4_K, or any way they may
// lie.
enum class Read { kNarrow, kWide, kQ4K, kEach };

// Scales and zeros (or offsets) of a lane's four outputs in a group: bits as in memory, or of floats (kEach).
template <Read kRead, bool kOffsets>
struct Raw {
  static constexpr int kWords = kRead == Read::kNarrow ? 2 : kRead == Read::kQ4K ? 3 : 4;  // kQ4K: the 6-bit ones first
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
// 6-bit numbers at `at`, their halves at `super`
__device__ __forceinline__ void load_factors(uint32_t (&to)[3], const uint8_t* sub, const void* from, int64_t at,
                                             int64_t super) {
  const uint2 v = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(from) + super));
  to[0] = __ldg(reinterpret_cast<const uint32_t*>(sub + at)), to[1] = v.x, to[2] = v.y;
}

template <Read kRead>
__device__ __forceinline__ float factor(const uint32_t* words, int b, ScalarType type) {
  if constexpr (kRead == Read::kQ4K)
    return float(words[0] >> 8 * b & 63) * __half2float(__ushort_as_half(uint16_t(words[1 + b / 2] >> 16 * (b % 2))));
  if constexpr (kRead != Read::kNarrow) return __uint_as_float(words[b]);
  const uint32_t bits = words[b / 2] >> 16 * (b % 2);
  if (type == ScalarType::BFloat16) return __uint_as_float(bits << 16);
  return __half2float(__ushort_as_half(uint16_t(bits)));
}

// kStep: slices that are loaded and scaled together, all of one group.
template <class T, int kTiles, Read kRead, int kStep, bool kOffsets>
__global__ void __launch_bounds__(32 * most_warps(kTiles))
    int4_kernel(const __grid_constant__ Int4Params p, int warps_k) {
  constexpr bool kManyFactors = kRead == Read::kEach || (kRead != Read::kNarrow && kOffsets);
  constexpr int kRing = (kTiles == 2 && kStep < 4) || kManyFactors ? 4 : 8, kSteps = kRing / kStep;  // slices, steps
  constexpr int kSums = 2 * kTiles * 4;
  constexpr int kSliceWords = kSlice / kInt4Word * kInt4Block / 4;  // in 16 bytes
  extern __shared__ __align__(16) float sums[];                     // [warp][sum][lane]
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), warps_n = (blockDim.x >> 5) / warps_k;
  const int warp_n = warp / warps_k, warp_k = warp % warps_k;
  const int64_t first_block = int64_t(blockIdx.x) * warps_n, blocks = (p.n + kInt4Block - 1) / kInt4Block;
  const int64_t block = min(first_block + warp_n, blocks - 1);  // one too many does the last one's work again
  const int64_t n = block * kInt4Block + 4 * g;
  const int count = int(min(int64_t(4), max(int64_t(0), p.n - n)));  // of this lane's outputs
  const int slices = int(p.k_padded / kSlice), steps = slices / kStep;
  const int begin = int(int64_t(steps) * warp_k / warps_k), end = int(int64_t(steps) * (warp_k + 1) / warps_k);
  const int of_group = p.group >= p.k ? max(1, steps) : int(p.group / (kSlice * kStep));  // steps of a group

  // ---- the ring: step s is in entry (s - begin) % kSteps
  const uint4* words =
      reinterpret_cast<const uint4*>(p.packed) + (block * slices + int64_t(begin) * kStep) * kSliceWords + t * 8 + g;
  int group = begin / of_group, in_group = begin % of_group;
  uint4 ring[kRing];
  Raw<kRead, kOffsets> raw[kSteps];
  auto fetch_words = [&](int i, bool more) {
    if (more) ring[i] = __ldcs(words + i % kStep * kSliceWords);
  };
  auto fetch_factors = [&](int i, bool more) {  // after the step's words: moves on to the next step
    if (!more) return;
    const int64_t at = int64_t(group) * p.n + n;
    if (count == 0) {
    } else if constexpr (kRead == Read::kQ4K) {
      const int64_t super = int64_t(group / kQ4KGroups) * p.n + n;
      load_factors(raw[i].scale, p.sub_scales, p.scales, at, super);
      load_factors(raw[i].other, p.sub_mins, p.offsets, at, super);
    } else if (kRead == Read::kEach && kOffsets && p.sub_scales) {
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const ScaleOffset of = b < count ? load_scale_offset(p, group, n + b) : ScaleOffset{};
        raw[i].scale[b % Raw<kRead, kOffsets>::kWords] = __float_as_uint(of.scale);
        raw[i].other[kOffsets ? b % Raw<kRead, kOffsets>::kWords : 0] = __float_as_uint(of.offset);
      }
    } else {
      load_factors<kRead>(raw[i].scale, p.scales, p.scale_type, at, count);
      if constexpr (kOffsets) {
        load_factors<kRead>(raw[i].other, p.offsets, p.scale_type, at, count);
      } else if constexpr (kRead != Read::kEach) {
        if (p.zeros) raw[i].other[0] = __ldg(reinterpret_cast<const uint32_t*>(p.zeros + at));
      } else if (p.zeros) {
        raw[i].other[0] = 0;
#pragma unroll
        for (int b = 0; b < 4; ++b)
          if (b < count) raw[i].other[0] |= uint32_t(__ldg(p.zeros + at + b)) << 8 * b;
      }
    }
    words += kStep * kSliceWords;
    if (++in_group == of_group) in_group = 0, ++group;
  };
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    raw[i] = {};
    if constexpr (!kOffsets) raw[i].other[0] = 0x08080808u;
#pragma unroll
    for (int j = 0; j < kStep; ++j) fetch_words(i * kStep + j, begin + i < end);
    fetch_factors(i, begin + i < end);
  }

  const int64_t first_row = int64_t(blockIdx.y) * (8 * kTiles), rows_left = p.m - first_row;
  const T* x_at = static_cast<const T*>(p.x) + (first_row + g) * p.x_stride + int64_t(begin) * kStep * kSlice + 8 * t;
  uint4 x_next[kTiles];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) x_next[j] = make_uint4(0, 0, 0, 0);
  auto load_x = [&](const T* from) {  // lanes without a row keep their zeros
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      if (8 * j + g < rows_left) x_next[j] = __ldg(reinterpret_cast<const uint4*>(from + 8 * j * p.x_stride));
  };
  if (begin < end) load_x(x_at);

  float total[2][kTiles][4] = {};
#pragma unroll 1
  for (int s0 = begin; s0 < end; s0 += kSteps) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int s = s0 + i;
      if (s >= end) break;
      float scale[4], offset[kOffsets ? 4 : 1];
      uint32_t zero[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        scale[b] = factor<kRead>(raw[i].scale, b, p.scale_type);
        if constexpr (kOffsets)
          offset[b] = kRead == Read::kQ4K ? -factor<kRead>(raw[i].other, b, p.scale_type)
                                          : factor<kRead>(raw[i].other, b, p.scale_type);
        else
          zero[b] = int4_zero_pair<T>(raw[i].other[0], b);
      }
      const bool more = s + kSteps < end;
      float sum[2][kTiles][4] = {}, x_sum[kOffsets ? kTiles : 1][4] = {};
#pragma unroll
      for (int slice = 0; slice < kStep; ++slice) {
        uint4 x[kTiles];
#pragma unroll
        for (int j = 0; j < kTiles; ++j) x[j] = x_next[j];
        if (slice + 1 < kStep)
          load_x(x_at + (slice + 1) * kSlice);
        else if (s + 1 < end)
          load_x(x_at += kStep * kSlice);
        uint32_t a[2][2][4];
        int4_fragments<T, kOffsets>(ring[i * kStep + slice], zero, a);
        fetch_words(i * kStep + slice, more);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            mma_16816<T>(sum[part][j], a[part][0], x[j].x, x[j].y);
            mma_16816<T>(sum[part][j], a[part][1], x[j].z, x[j].w);
          }
          if constexpr (kOffsets) int4_add_inputs<T>(x_sum[j], x[j]);
        }
      }
      fetch_factors(i, more);
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
          }
    }
  }

  // ---- the warps' sums, in order; thread i of the CTA has output i % 32 of a block and a row
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[(warp * kSums + i) * 32 + lane] = total[i / (kSums / 2)][i / 4 % kTiles][i % 4];
  __syncthreads();
  const int rows = int(min(int64_t(8 * kTiles), rows_left));
  for (int i = threadIdx.x; i < rows * warps_n * kInt4Block; i += blockDim.x) {
    const int c = i % kInt4Block, of = i / kInt4Block % warps_n, row = i / kInt4Block / warps_n;  // c = 4 g + b
    const int at = ((c >> 1 & 1) * kTiles + row / 8) * 4 + (c & 1) * 2 + (row & 1);
    const int from = (c & ~3) + (row & 7) / 2;
    float result = 0.f;
    for (int w = of * warps_k; w < (of + 1) * warps_k; ++w) result += sums[(w * kSums + at) * 32 + from];
    const int64_t to = (first_block + of) * kInt4Block + c, to_row = first_row + row;
    if (to < p.n) static_cast<T*>(p.y)[to_row * p.n + to] = int4_finish<T>(p, to_row, to, result);
  }
}

template <class T, int kTiles, Read kRead, int kStep, bool kOffsets>
void launch(const Int4Params& p, int device, cudaStream_t stream) {
  constexpr int kMost = most_warps(kTiles);
  int sms = 1;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  const int64_t blocks = (p.n + kInt4Block - 1) / kInt4Block, rows = (p.m + 8 * kTiles - 1) / (8 * kTiles);
  const int64_t steps = p.k_padded / kSlice / kStep;
  if (rows > 65535) fail("int4_linear: x: got ", p.m, " rows, needs at most ", 65535 * 8 * kTiles);
  // As many outputs a CTA as leave three quarters of the SMs at work, then as many runs of K as all run at once.
  int warps_n = 1, warps_k = 1;
  while (kTiles > 1 && 2 * warps_n <= kMost && blocks * rows / (2 * warps_n) * 4 >= 3 * sms) warps_n *= 2;
  const int64_t ctas = (blocks + warps_n - 1) / warps_n * rows;
  while (2 * warps_n * warps_k <= kMost && 2 * ctas * warps_n * warps_k <= int64_t(sms) * kMost && 2 * warps_k <= steps)
    warps_k *= 2;
  constexpr int kWarpBytes = 2 * kTiles * 4 * 32 * int(sizeof(float));
  static_assert(kMost * kWarpBytes <= 48 * 1024);
  const int warps = warps_n * warps_k;
  const dim3 grid(unsigned(ctas / rows), unsigned(rows));
  const auto kernel = int4_kernel<T, kTiles, kRead, kStep, kOffsets>;
  kernel<<<grid, 32 * warps, warps * kWarpBytes, stream>>>(p, warps_k);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T, int kTiles, Read kRead, int kStep>
void launch(const Int4Params& p, int device, cudaStream_t stream) {
  if constexpr (kRead == Read::kQ4K)
    launch<T, kTiles, kRead, kStep, true>(p, device, stream);
  else
    (p.offsets ? launch<T, kTiles, kRead, kStep, true> : launch<T, kTiles, kRead, kStep, false>)(p, device, stream);
}

template <class T, int kTiles>
void launch(const Int4Params& p, int device, cudaStream_t stream) {
  const auto aligned = [](const void* q, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(q) % bytes == 0; };
  const uintptr_t four = p.scale_type == ScalarType::Float ? 16 : 8;  // bytes of a lane's scales
  const bool at_once = p.n % 4 == 0 && aligned(p.scales, four) && aligned(p.offsets, four) && aligned(p.zeros, 4) &&
                       aligned(p.sub_scales, 4) && aligned(p.sub_mins, 4);
  const auto divides = [&](int step) {
    return p.k_padded % (step * kSlice) == 0 && (p.group >= p.k || p.group % (step * kSlice) == 0);
  };
  if (!at_once)
    launch<T, kTiles, Read::kEach, 1>(p, device, stream);
  else if (p.sub_scales)
    launch<T, kTiles, Read::kQ4K, 1>(p, device, stream);
  else if (p.scale_type == ScalarType::Float)
    launch<T, kTiles, Read::kWide, 1>(p, device, stream);
  else if (divides(4))
    launch<T, kTiles, Read::kNarrow, 4>(p, device, stream);
  else if (divides(2))
    launch<T, kTiles, Read::kNarrow, 2>(p, device, stream);
  else
    launch<T, kTiles, Read::kNarrow, 1>(p, device, stream);
}

}  // namespace

template <>
void launch_int4_mma<PAGEDKV_TYPE>(const Int4Params& p, int device, cudaStream_t stream) {
  using T = PAGEDKV_TYPE;
  (p.m <= 8 ? launch<T, 1> : p.m <= 16 ? launch<T, 2> : launch<T, 4>)(p, device, stream);
}

}  // namespace pagedkv
