// int4_linear on tensor cores (mma.sync m16n8k16, float32 sums), for sm_80 and later.
// units: PAGEDKV_TYPE=__half,__nv_bfloat16
//
// Algorithm: y^T = W x^T, so that weights are the 16 rows of a product and few rows of x fill its 8 columns. A warp
// owns 32 outputs; of a slice of 32 inputs lane (g, t) (4 g + t) reads 16 bytes of words, which are its fragments of W
// for four mma (int4.h), and 16 bytes of each eighth row of x, its fragments of x for two. A nibble becomes a number by
//
//     0x6400 | q is the half 1024 + q        0x4300 | q is the bfloat16 128 + q
//
// minus the same of its zero, exactly. Sums of one group are float32 and are scaled in float32 when the group ends, so
// scales of any type lose nothing. Offsets: y += (offset + 8 scale) * sum(x), the sum from an mma with ones.
//
// Shapes: up to 16 rows, the four warps of a CTA take the slices of a stage in turn, for the same 32 outputs, and are
// added up in order through shared memory; above, they have 128 outputs and 32 or 64 rows. Where the grid leaves SMs
// idle, K is split over CTAs as well, whose sums a second kernel adds up in order. All orders are fixed by the shapes:
// equal calls give equal bits.
//
// Pipeline: stages of 128 inputs, cp.async; scales and zeros of the next group are loaded a group ahead.
//
// Shared memory: words as in memory, [16][8 chunks of 16 bytes], x [rows][16 chunks]; chunks are permuted so that eight
// lanes (two g, four t) hit all banks.
//
// Floor: bytes of W / 4.28 TB/s (an H200's copy bandwidth) for few rows.
#include <algorithm>

#include "int4.h"
#include "tensor_core.cuh"

namespace pagedkv {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kSlice = 32, kSlices = kInt4StageK / kSlice;  // inputs of a slice; slices of a stage

template <int kRows_>
struct Shape {
  static constexpr int kRows = kRows_;  // of x in a CTA
  static constexpr int kWarpsK = kRows <= 16 ? 4 : 1, kWarpsN = kWarps / kWarpsK;
  static constexpr int kOutputs = kWarpsN * kInt4Block;
  static constexpr int kStages = kRows <= 32 ? 4 : 3;
  static constexpr int kTiles = kRows / 8;                           // of 8 rows
  static constexpr int kWeightBytes = kInt4Block * kInt4StageK / 2;  // of a block in a stage
  static constexpr int kXStart = kWarpsN * kWeightBytes;             // in a stage
  static constexpr int kStageBytes = kXStart + kRows * kInt4StageK * 2;
  static constexpr int kBytes = kStages * kStageBytes;
  static_assert(kBytes <= 99 * 1024, "sm_86 and sm_89 give a CTA no more");
};

// What the four outputs of a lane need in a group.
template <bool kOffsets>
struct Factors {
  float scale[4];
  float offset[kOffsets ? 4 : 1];
  uint32_t zero[kOffsets ? 1 : 4];  // as the pair that is subtracted
};

template <class T>
__device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
  using T2 = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const T2 d = __hsub2(*reinterpret_cast<const T2*>(&a), *reinterpret_cast<const T2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&d);
}

template <class T, int kRows, bool kOffsets>
__global__ void __launch_bounds__(kThreads) int4_kernel(const __grid_constant__ Int4Params p) {
  using S = Shape<kRows>;
  constexpr uint32_t kBias = std::is_same_v<T, __half> ? 0x64006400u : 0x43004300u;  // 1024 or 128
  constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
  extern __shared__ __align__(128) unsigned char shared[];
  const int thread = threadIdx.x, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int warp = __shfl_sync(~0u, thread >> 5, 0);  // tells the compiler that it is uniform
  const int warp_n = warp / S::kWarpsK, warp_k = warp % S::kWarpsK;
  const int64_t first_n = int64_t(blockIdx.x) * S::kOutputs, first_row = int64_t(blockIdx.y) * S::kRows;
  const int64_t begin = int64_t(blockIdx.z) * p.stages * kInt4StageK;
  const int64_t end = min(p.k_padded, begin + int64_t(p.stages) * kInt4StageK);
  const int stages = int((end - begin + kInt4StageK - 1) / kInt4StageK);
  const uint32_t base = smem_address(shared);

  auto load_stage = [&](int stage) {
    if (stage >= stages) return;
    const int64_t k = begin + int64_t(stage) * kInt4StageK;
    const uint32_t to = base + stage % S::kStages * S::kStageBytes;
    const int row = thread >> 3, chunk = thread & 7;  // of 16 rows of words with 8 chunks
#pragma unroll
    for (int b = 0; b < S::kWarpsN; ++b) {
      const int64_t block = first_n / kInt4Block + b, word = k / kInt4Word + row;
      const bool valid = block * kInt4Block < p.n && word < p.k_padded / kInt4Word;
      const uint32_t* from =
          valid ? p.packed + (block * (p.k_padded / kInt4Word) + word) * kInt4Block + chunk * 4 : p.packed;
      cp_async<16>(to + b * S::kWeightBytes + (row * 8 + (chunk ^ (2 * (row & 3)))) * 16, from, valid);
    }
#pragma unroll
    for (int i = 0; i < S::kRows * 16 / kThreads; ++i) {
      const int r = (i * kThreads + thread) >> 4, c = thread & 15;
      const bool valid = first_row + r < p.m && k + c * 8 < p.k;
      const T* from = static_cast<const T*>(p.x) + (valid ? (first_row + r) * p.x_stride + k + c * 8 : 0);
      cp_async<16>(to + S::kXStart + (r * 16 + (c ^ (4 * (r & 1)))) * 16, from, valid);
    }
  };

  const int64_t n = first_n + warp_n * kInt4Block + 4 * g;  // the first of this lane's outputs
  auto load_factors = [&](int64_t k) {
    Factors<kOffsets> f{};
    const int64_t group = k / p.group, row = group * p.n;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const bool valid = n + b < p.n && k < p.k;
      if constexpr (kOffsets) {
        const ScaleOffset of = valid ? load_scale_offset(p, group, n + b) : ScaleOffset{};
        f.scale[b] = of.scale, f.offset[b] = of.offset;
      } else {
        f.scale[b] = valid ? load_scale(p.scales, p.scale_type, row + n + b) : 0.f;
        f.zero[b] = kBias + (valid && p.zeros ? p.zeros[row + n + b] : 8u) * 0x00010001u;
      }
    }
    return f;
  };
  // The first of this warp's slices after k in another group.
  constexpr int kStep = S::kWarpsK * kSlice;
  auto next_group = [&](int64_t k) {
    const int64_t left = (k / p.group + 1) * p.group - k;
    return k + (left + kStep - 1) / kStep * kStep;
  };

  float total[2][S::kTiles][4] = {}, sum[2][S::kTiles][4] = {};
  float x_sum[kOffsets ? S::kTiles : 1][4] = {};
#pragma unroll
  for (int s = 0; s < S::kStages - 1; ++s) {
    load_stage(s);
    cp_async_commit();
  }
  int64_t k = begin + warp_k * kSlice, change = next_group(k);
  Factors<kOffsets> now = load_factors(k), next = load_factors(change);
  auto flush = [&]() {
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int b = 2 * part + e / 2;
          float& to = total[part][j][e];
          to = fmaf(now.scale[b], sum[part][j][e], to);
          if constexpr (kOffsets) to = fmaf(fmaf(8.f, now.scale[b], now.offset[b]), x_sum[j][e & 1], to);
          sum[part][j][e] = 0.f;
        }
    if constexpr (kOffsets)
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) x_sum[j][e] = 0.f;
  };

#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    cp_async_wait<S::kStages - 2>();
    __syncthreads();
    load_stage(stage + S::kStages - 1);
    cp_async_commit();
    const unsigned char* const from = shared + stage % S::kStages * S::kStageBytes;
#pragma unroll
    for (int i = 0; i < kSlices / S::kWarpsK; ++i, k += kStep) {
      if (k >= end) break;
      if (k >= change) {
        flush();
        now = next;
        change = next_group(k);
        next = load_factors(change);
      }
      const int slice = i * S::kWarpsK + warp_k;
      const uint4 words =
          *reinterpret_cast<const uint4*>(from + warp_n * S::kWeightBytes + ((4 * slice + t) * 8 + (g ^ (2 * t))) * 16);
      const uint32_t w[4] = {words.x, words.y, words.z, words.w};
      uint32_t a[2][2][4];  // [part][half of the slice]
#pragma unroll
      for (int b = 0; b < 4; ++b)
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const uint32_t number = ((w[b] >> 4 * pair) & 0x000f000fu) ^ (kBias | 0x00080008u);
          const uint32_t zero = kOffsets ? kBias + 0x00080008u : now.zero[kOffsets ? 0 : b];
          a[b / 2][pair / 2][b % 2 + pair % 2 * 2] = subtract<T>(number, zero);
        }
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j) {
        const int c = 4 * slice + t;
        const uint4 x =
            *reinterpret_cast<const uint4*>(from + S::kXStart + ((8 * j + g) * 16 + (c ^ (4 * (g & 1)))) * 16);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          mma_16816<T>(sum[part][j], a[part][0], x.x, x.y);
          mma_16816<T>(sum[part][j], a[part][1], x.z, x.w);
        }
        if constexpr (kOffsets) {
          const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
          mma_16816<T>(x_sum[j], ones, x.x, x.y);
          mma_16816<T>(x_sum[j], ones, x.z, x.w);
        }
      }
    }
  }
  flush();

  if constexpr (S::kWarpsK > 1) {  // add up the warps, in order
    constexpr int kSums = 2 * S::kTiles * 4;
    static_assert((S::kWarpsK - 1) * kSums * 32 * 4 <= S::kBytes);
    float* const sums = reinterpret_cast<float*>(shared);  // [warp - 1][sum][lane]
    cp_async_wait<0>();
    __syncthreads();
    if (warp_k > 0)
#pragma unroll
      for (int i = 0; i < kSums; ++i)
        sums[((warp_k - 1) * kSums + i) * 32 + lane] = total[i / (kSums / 2)][i / 4 % S::kTiles][i % 4];
    __syncthreads();
    if (warp_k > 0) return;
#pragma unroll
    for (int other = 0; other < S::kWarpsK - 1; ++other)
#pragma unroll
      for (int i = 0; i < kSums; ++i)
        total[i / (kSums / 2)][i / 4 % S::kTiles][i % 4] += sums[(other * kSums + i) * 32 + lane];
  }

  const bool vectors = p.n % 4 == 0;
#pragma unroll
  for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t row = first_row + 8 * j + 2 * t + e;
      if (row >= p.m || n >= p.n) continue;
      const float values[4] = {total[0][j][e], total[0][j][2 + e], total[1][j][e], total[1][j][2 + e]};
      const int count = int(min(int64_t(4), p.n - n));
      if (p.partial) {
        float* const to = p.partial + (int64_t(blockIdx.z) * p.m + row) * p.n + n;
        if (vectors) {
          *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
        } else {
#pragma unroll
          for (int b = 0; b < 4; ++b)
            if (b < count) to[b] = values[b];
        }
      } else {
        T* const to = static_cast<T*>(p.y) + row * p.n + n;
        Vec<T, 4> out;
#pragma unroll
        for (int b = 0; b < 4; ++b)
          if (b < count) out.v[b] = int4_finish<T>(p, row, n + b, values[b]);
        if (vectors) {
          *reinterpret_cast<Vec<T, 4>*>(to) = out;
        } else {
#pragma unroll
          for (int b = 0; b < 4; ++b)
            if (b < count) to[b] = out.v[b];
        }
      }
    }
}

constexpr int kSumThreads = 256;

template <class T>
__global__ void __launch_bounds__(kSumThreads) int4_sum_kernel(const __grid_constant__ Int4Params p) {
  const int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= p.m * p.n) return;
  float sum = 0.f;
  for (int s = 0; s < p.splits; ++s) sum += p.partial[s * p.m * p.n + i];
  static_cast<T*>(p.y)[i] = int4_finish<T>(p, i / p.n, i % p.n, sum);
}

template <class T, int kRows, bool kOffsets>
void launch(Int4Params& p, const Tensor& like, cudaStream_t stream) {
  using S = Shape<kRows>;
  const int64_t columns = (p.n + S::kOutputs - 1) / S::kOutputs, rows = (p.m + S::kRows - 1) / S::kRows;
  if (rows > 65535) fail("int4_linear: x: got ", p.m, " rows, needs at most ", 65535 * S::kRows);
  const int64_t stages = (p.k_padded + kInt4StageK - 1) / kInt4StageK;
  // Split K until every SM has CTAs enough to hide its memory's latency, but in no parts that are all start-up.
  constexpr int kLeastStages = 4, kMostSplits = 16, kCtasPerSm = kRows <= 16 ? 4 : 1;
  int sms = 1;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, like.get_device_index()));
  const int64_t wanted = std::min(
      {int64_t(kCtasPerSm) * sms / std::max<int64_t>(1, columns * rows), stages / kLeastStages, int64_t(kMostSplits)});
  p.stages = int((stages + std::max<int64_t>(1, wanted) - 1) / std::max<int64_t>(1, wanted));
  p.splits = p.stages == 0 ? 1 : int((stages + p.stages - 1) / p.stages);
  Tensor partial;
  if (p.splits > 1) {
    partial = torch::stable::new_empty(like, {int64_t(p.splits), p.m, p.n}, ScalarType::Float);
    p.partial = partial.mutable_data_ptr<float>();
  }
  const auto kernel = int4_kernel<T, kRows, kOffsets>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes));
  kernel<<<dim3(unsigned(columns), unsigned(rows), unsigned(p.splits)), kThreads, S::kBytes, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (p.splits == 1) return;
  int4_sum_kernel<T><<<unsigned((p.m * p.n + kSumThreads - 1) / kSumThreads), kSumThreads, 0, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T, int kRows>
void launch(Int4Params& p, const Tensor& like, cudaStream_t stream) {
  (p.offsets ? launch<T, kRows, true> : launch<T, kRows, false>)(p, like, stream);
}

}  // namespace

template <>
void launch_int4_mma<PAGEDKV_TYPE>(Int4Params& p, const Tensor& like, cudaStream_t stream) {
  using T = PAGEDKV_TYPE;
  (p.m <= 8 ? launch<T, 8> : p.m <= 16 ? launch<T, 16> : p.m <= 32 ? launch<T, 32> : launch<T, 64>)(p, like, stream);
}

}  // namespace pagedkv
