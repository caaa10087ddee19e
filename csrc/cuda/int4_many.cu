// int4_linear for many rows (65 and more) of 16-bit activations on Hopper's tensor cores (wgmma, sm_90a).
// units: PAGEDKV_TYPE=__half,__nv_bfloat16
//
// Weights with offsets, float32 scales and odd sizes stay with int4_wgmma.cu, int4_mma.cu or int4.cu.
//
// Algorithm: y^T = W x^T, W from registers as the A operand, x from shared memory as B. A tile is 128 outputs and kRows
// rows. Warpgroups:
//   producer   a lane copies x (in boxes) and weights (1 KB of a block of 32 outputs), kStages ahead, also across tiles
//   consumers  two, each 64 outputs and all rows: a number is made once for 256 rows. A warp has 16 outputs, half of a
//              block of 32, of which a lane has two neighbours. Numbers of 32 inputs are made while the products of
//              those before run.
// A lane of a fragment needs pair t of words, t = its place in its row of four: those four read the same words
// (broadcast), and each shifts by its own 4 t. So inputs keep their order, and x is read as it is.
//
// Two CTAs side by side in the outputs are a cluster: each copies half of x for both. Of 128 x 256 alone, copies would
// take 36 bytes a cycle from L2 on each SM, more than it gives; so it is 20.
//
// A number becomes (q - zero) * scale in 16 bits, rounded once, as in the stock dequantised weight; a float16 scale
// under bfloat16 activations is kept as the sum of two bfloat16, one product and one fused multiply-add.
#include <cuda.h>

#include <algorithm>

#include "int4.h"
#include "int4_tile.cuh"
#include "reduce.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace pagedkv {
namespace {

constexpr int kOutputs = 128, kBlocks = kOutputs / kInt4Block;    // of a tile
constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);  // warpgroups
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // setmaxnreg

// Shared memory of a stage: x, boxes [kRows, 64] as wgmma.cuh has it; words [blocks][4 kSlices][32]; of each slice that
// begins a group, and the first one, scales and zeros [outputs].
template <int kRows_>
struct Shape {
  static constexpr int kRows = kRows_;
  static constexpr int kInputs = 64 * 256 / kRows, kSlices = kInputs / kInt4Block;  // slices of 32
  static constexpr int kXBytes = kRows * kInputs * 2, kWordBytes = kOutputs * kInputs / 2, kFactorBytes = 3 * kOutputs;
  static constexpr int kStageBytes = (kXBytes + kWordBytes + kSlices * kFactorBytes + 1023) / 1024 * 1024;
  static constexpr int kOutBytes = kRows * 128;  // of a consumer's outputs on their way to y
  static constexpr int kStages = (225 * 1024 - kConsumers * kOutBytes) / kStageBytes;
  static constexpr int kBytes = kConsumers * kOutBytes + kStages * kStageBytes + 1024;
  static constexpr int kSums = kRows / 2;  // of a thread
};

template <int kStages>
struct Barriers {
  uint64_t full[kStages], empty[kStages];
};

struct Work {
  CUtensorMap x;                           // boxes of 64 inputs and the rows that a CTA copies
  CUtensorMap y;                           // boxes of 64 outputs and the rows of a tile
  int slices, of_group;                    // of 32 inputs; those of a group
  int stages;                              // of a tile
  int row_tiles, output_tiles, per_group;  // tiles of clusters; row tiles that are next to each other
  int whole;                               // tiles that are not cut along K
  int parts, of_part;                      // of the others, and their stages
  int items;                               // of all clusters: tiles and parts of tiles
  float4* partial;                         // [tiles of CTAs that are cut][parts][kRows / 8][threads of the consumers]
};

struct Place {
  int row, output;
};
// Tiles of some rows lie next to each other, for L2 to keep their x, and in that group those of the same weights.
__device__ __forceinline__ Place find_place(const Work& w, int tile) {
  const int group = tile / (w.per_group * w.output_tiles), first = group * w.per_group;
  const int in_group = tile - first * w.output_tiles, rows = min(w.per_group, w.row_tiles - first);
  const int output = in_group / rows;
  return {first + in_group - output * rows, output};
}

struct Item {
  int tile, begin, end;  // stages
  int slot;              // of `partial`, for each CTA of the cluster; -1: this is the whole tile
};
__device__ __forceinline__ Item find_item(const Work& w, int item) {
  if (item < w.whole) return {item, 0, w.stages, -1};
  const int slot = item - w.whole, cut = slot / w.parts, begin = (slot - cut * w.parts) * w.of_part;
  return {w.whole + cut, begin, min(begin + w.of_part, w.stages), slot};
}

// kCount neighbouring outputs of a row
template <class T, int kCount>
__device__ __forceinline__ void store_outputs(const Int4Params& p, int64_t row, int64_t n, float (&sum)[kCount]) {
  if (row >= p.m || n >= p.n) return;
  if (p.bias) {
    const auto bias = load_vec<T, kCount>(static_cast<const T*>(p.bias) + n);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] += to_float(bias.v[i]);
  }
  apply<kCount>(p.act, sum);
  if (p.residual) {
    const auto residual = load_vec<T, kCount>(static_cast<const T*>(p.residual) + row * p.n + n);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] += to_float(residual.v[i]);
  }
  Vec<T, kCount> out;
#pragma unroll
  for (int i = 0; i < kCount; ++i) out.v[i] = from_float<T>(sum[i]);
  store_vec(static_cast<T*>(p.y) + row * p.n + n, out);
}

// The first of a lane's two outputs in a tile; the other is the next.
__device__ __forceinline__ int lane_output(int warp, int lane) { return warp * 16 + lane / 4 * 2; }

#ifdef PAGEDKV_WGMMA

// One thread each of three warps: x, words, scales and zeros.
constexpr int kProducers = 3;

template <class S>
__device__ __forceinline__ void produce(const Int4Params& p, const Work& work, Barriers<S::kStages>& barriers,
                                        uint32_t shared, int warp, int rank, int size) {
  wgmma::Ring<S::kStages> ring;
  const int clusters = int(gridDim.x) / size;
  wait_for_previous();
  for (int item = int(blockIdx.x) / size; item < work.items; item += clusters) {
    const Item it = find_item(work, item);
    const Place at = find_place(work, it.tile);
    const int tile = at.output * size + rank, first = tile * kOutputs;
    const int outputs = first < p.n ? min(kOutputs, int(p.n) - first) : 0;
    int slice = it.begin * S::kSlices;
    if (warp == 0) {
      const int share = S::kRows / size, row = at.row * S::kRows + rank * share;
#pragma unroll 1
      for (int stage = it.begin; stage < it.end; ++stage) {
        uint64_t& full = barriers.full[ring.index];
        const uint32_t to = shared + ring.index * S::kStageBytes + rank * share * 128;
        wgmma::barrier_wait(barriers.empty[ring.index], ring.parity ^ 1);
        wgmma::barrier_arrive_expecting(full, S::kXBytes);
#pragma unroll
        for (int i = 0; i < S::kInputs / 64; ++i)
          wgmma::copy_box_to_all(to + i * S::kRows * 128, work.x, full, stage * S::kInputs + i * 64, row, size);
        ring.advance();
      }
    } else if (warp == 1) {
      const int blocks = (outputs + kInt4Block - 1) / kInt4Block;
      const int64_t block_bytes = int64_t(work.slices) * 512;
      const char* from = reinterpret_cast<const char*>(p.packed) + tile * kBlocks * block_bytes + slice * 512;
#pragma unroll 1
      for (int stage = it.begin; stage < it.end; ++stage, slice += S::kSlices, from += S::kSlices * 512) {
        uint64_t& full = barriers.full[ring.index];
        const uint32_t to = shared + ring.index * S::kStageBytes + S::kXBytes;
        const int bytes = min(S::kSlices, work.slices - slice) * 512;
        wgmma::barrier_wait(barriers.empty[ring.index], ring.parity ^ 1);
        wgmma::barrier_arrive_expecting(full, blocks * bytes);
#pragma unroll
        for (int i = 0; i < kBlocks; ++i)
          if (i < blocks) wgmma::copy_bytes(to + i * (S::kSlices * 512), from + i * block_bytes, bytes, full);
        ring.advance();
      }
    } else {
      int64_t from = int64_t(slice / work.of_group) * p.n + first;
      int left = slice % work.of_group == 0 ? 0 : work.of_group - slice % work.of_group;  // before the next group
      if (left != 0) from += p.n;
#pragma unroll 1
      for (int stage = it.begin; stage < it.end; ++stage, slice += S::kSlices) {
        uint64_t& full = barriers.full[ring.index];
        const uint32_t to = shared + ring.index * S::kStageBytes + S::kXBytes + S::kWordBytes;
        wgmma::barrier_wait(barriers.empty[ring.index], ring.parity ^ 1);
        const int slices = min(S::kSlices, work.slices - slice);
        const bool middle = stage == it.begin && left != 0;  // of a group
        int groups = middle;
        for (int i = left; i < slices; i += work.of_group) ++groups;
        wgmma::barrier_arrive_expecting(full, groups * outputs * (p.zeros ? 3 : 2));
        auto copy = [&](int i, int64_t source) {
          if (outputs == 0) return;
          const uint32_t target = to + i * S::kFactorBytes;
          wgmma::copy_bytes(target, static_cast<const char*>(p.scales) + source * 2, outputs * 2, full);
          if (p.zeros) wgmma::copy_bytes(target + 2 * kOutputs, p.zeros + source, outputs, full);
        };
        if (middle) copy(0, from - p.n);
#pragma unroll 1
        for (; left < slices; left += work.of_group, from += p.n) copy(left, from);
        left -= S::kSlices;
        ring.advance();
      }
    }
  }
}

__device__ __forceinline__ uint32_t twice(uint32_t bits) { return bits | bits << 16; }

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

// Of a lane's two outputs, in both halves. With kSplit a float16 scale is the sum of two bfloat16.
template <class T, bool kSplit>
struct Factors {
  uint32_t zero[2], scale[2], rest[kSplit ? 2 : 1];
  __device__ __forceinline__ void set(uint32_t scales, uint32_t zeros) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint32_t bits = scales >> 16 * b & 0xffff;
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
  // Words j of 32 inputs [j][output] -> the fragments of their two products.
  __device__ __forceinline__ void apply(const uint2 (&words)[4], int shift, uint32_t (&a)[2][4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        uint32_t& to = a[j / 2][b + j % 2 * 2];
        const uint32_t word = b == 0 ? words[j].x : words[j].y;
        const uint32_t number = and_xor(word >> shift, 0x000f000fu, int4_bias<T>() | 0x00080008u);
        const uint32_t whole = subtract_pair<T>(number, zero[b]);
        if constexpr (kSplit)
          to = fma_pair<T>(whole, scale[b], multiply_pair<T>(whole, rest[b]));
        else
          to = multiply_pair<T>(whole, scale[b]);
      }
  }
};

// A lane's sums of a tile: d[4 j + 2 h + e] is output n + h of row 8 j + e. Each step goes over all of them, for what
// is unrolled here must stay small: with everything done for a pair at a time, 128 rows of code took longer to fetch
// than the products (30 us a tile).
template <class T, int kSums>
__device__ __forceinline__ void finish_tile(const Int4Params& p, int64_t row, int64_t n, float (&d)[kSums]) {
  if (n >= p.n) return;
  if (p.bias) {
    const auto bias = load_vec<T, 2>(static_cast<const T*>(p.bias) + n);
#pragma unroll
    for (int i = 0; i < kSums; ++i) d[i] += to_float(bias.v[i / 2 % 2]);
  }
  if (p.act != Act::kNone) {
    constexpr int kTurn = 8;  // the sums move on, so that one piece of code is for all
#pragma unroll 1
    for (int turn = 0; turn < kSums / kTurn; ++turn) {
      float first[kTurn];
#pragma unroll
      for (int i = 0; i < kTurn; ++i) first[i] = d[i];
      apply<kTurn>(p.act, first);
#pragma unroll
      for (int i = 0; i < kSums; ++i) d[i] = i + kTurn < kSums ? d[i + kTurn] : first[i + kTurn - kSums];
    }
  }
  if (p.residual) {
    const T* from = static_cast<const T*>(p.residual) + row * p.n + n;
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) {  // j, e
      if (row + i / 2 * 8 + i % 2 < p.m) {
        const auto residual = load_vec<T, 2>(from + (i / 2 * 8 + i % 2) * p.n);
        d[i / 2 * 4 + i % 2] += to_float(residual.v[0]), d[i / 2 * 4 + 2 + i % 2] += to_float(residual.v[1]);
      }
    }
  }
}

// To the box [kRows][64 outputs] in shared memory, in the swizzle of wgmma.cuh: lanes of a warp hit all banks.
template <class T, int kSums>
__device__ __forceinline__ void stage_tile(unsigned char* box, int warp, int lane, const float (&d)[kSums]) {
  const int t = lane & 3, g = lane >> 2;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    unsigned char* const to = box + wgmma::swizzle128(2 * t + e, warp * 2 + g / 4) + g % 4 * 4;
#pragma unroll
    for (int j = 0; j < kSums / 4; ++j)
      store_vec(reinterpret_cast<T*>(to + j * 1024),
                Vec<T, 2>{from_float<T>(d[4 * j + e]), from_float<T>(d[4 * j + 2 + e])});
  }
}

template <class S, class T, bool kSplit>
__device__ __forceinline__ void consume(const Int4Params& p, const Work& work, Barriers<S::kStages>& barriers,
                                        const unsigned char* shared, unsigned char* out, int warp, int lane, int rank,
                                        int size) {
  constexpr int kBatch = S::kSlices / 2;  // slices whose products are issued together
  const int t = lane & 3, g = lane >> 2, output = lane_output(warp, lane);
  const uint64_t x_base = wgmma::descriptor(smem_address(shared), 16);
  const unsigned char* const words = shared + S::kXBytes + warp / 2 * (S::kSlices * 512) + warp % 2 * 64 + g * 8;
  const unsigned char* const scales = shared + S::kXBytes + S::kWordBytes + 2 * output;
  const unsigned char* const zeros = shared + S::kXBytes + S::kWordBytes + 2 * kOutputs + output;

  auto release = [&](int index) {
    __syncwarp();
    if (lane < size) wgmma::barrier_arrive_at(barriers.empty[index], lane);
  };
  wgmma::Ring<S::kStages> ring;
  const int clusters = int(gridDim.x) / size;
  for (int item = int(blockIdx.x) / size; item < work.items; item += clusters) {
    const Item it = find_item(work, item);
    float sum[S::kSums];
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) sum[i] = 0.f;
    wgmma::pin(sum);
    uint32_t a[2][kBatch][2][4];
    Factors<T, kSplit> factors;
    int left = 0, span = work.of_group - it.begin * S::kSlices % work.of_group;  // slices of this group, of the next
    int before = -1;
#pragma unroll 1
    for (int stage = it.begin; stage < it.end; ++stage) {
      wgmma::barrier_wait(barriers.full[ring.index], ring.parity);
      const int base = ring.index * S::kStageBytes;
      const uint64_t x = x_base + base / 16;
      uint2 word[S::kSlices][4];
#pragma unroll
      for (int j = 0; j < 4 * S::kSlices; ++j)
        word[j / 4][j % 4] = *reinterpret_cast<const uint2*>(words + base + j * 128);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int s = 0; s < kBatch; ++s) {
          const int slice = i * kBatch + s;
          if (left == 0 && stage * S::kSlices + slice < work.slices) {  // beyond, x is 0
            const int from = base + slice * S::kFactorBytes;
            factors.set(*reinterpret_cast<const uint32_t*>(scales + from),
                        p.zeros ? *reinterpret_cast<const uint16_t*>(zeros + from) : 0x0808u);
            left = span, span = work.of_group;
          }
          --left;
          factors.apply(word[slice], 4 * t, a[i][s]);
        }
        wgmma::fence();
#pragma unroll
        for (int s = 0; s < kBatch; ++s)
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            const int slice = i * kBatch + s;
            wgmma::multiply_add<T, S::kRows, false>(sum, a[i][s][step],
                                                    x + slice / 2 * (S::kRows * 8) + slice % 2 * 4 + step * 2);
          }
        wgmma::commit();
        wgmma::wait<1>();  // the batch before is done
        if (i == 0 && before >= 0) release(before);
      }
      before = ring.index;
      ring.advance();
    }
    wgmma::wait<0>();
    wgmma::pin(sum);
    release(before);

    if (it.slot >= 0) {
      float4* const to = work.partial + (int64_t(it.slot) * size + rank) * (S::kSums / 4 * 128 * kConsumers);
#pragma unroll
      for (int j = 0; j < S::kSums / 4; ++j)
        to[j * (128 * kConsumers) + warp * 32 + lane] =
            make_float4(sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]);
    } else {
      const Place at = find_place(work, it.tile);
      const int row = at.row * S::kRows, n = (at.output * size + rank) * kOutputs;
      const bool issues = warp % 4 == 0 && lane == 0;
      finish_tile<T>(p, row + 2 * t, n + output, sum);
      if (issues) wgmma::wait_stores<true>();  // what was there has been read
      wgmma::named_sync(1 + warp / 4, 128);
      stage_tile<T>(out + warp / 4 * S::kOutBytes, warp % 4, lane, sum);
      wgmma::fence_async_proxy();
      wgmma::named_sync(1 + warp / 4, 128);
      if (issues) wgmma::store_box(work.y, smem_address(out) + warp / 4 * S::kOutBytes, n + warp / 4 * 64, row);
    }
  }
  wgmma::wait_stores<false>();
}

#endif

template <class S, class T, bool kSplit>
__global__ void __launch_bounds__(kThreads, 1)
    int4_many_kernel(const __grid_constant__ Int4Params p, const __grid_constant__ Work work) {
#ifdef PAGEDKV_WGMMA
  extern __shared__ unsigned char dynamic_shared[];
  __shared__ Barriers<S::kStages> barriers;
  unsigned char* const out = dynamic_shared + (-smem_address(dynamic_shared) & 1023u);
  unsigned char* const shared = out + kConsumers * S::kOutBytes;
  const int lane = threadIdx.x & 31;
  const int warp = __shfl_sync(~0u, int(threadIdx.x >> 5), 0);  // tells the compiler that it is uniform
  const int rank = wgmma::cluster_rank(), size = wgmma::cluster_size();
  release_next();
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      wgmma::barrier_init(barriers.full[i], kProducers);
      wgmma::barrier_init(barriers.empty[i], 4 * kConsumers * size);
    }
    wgmma::fence_barriers();
  }
  wgmma::cluster_sync();
  if (warp < 4) {
    wgmma::give_registers<kProducerRegisters>();
    if (warp < kProducers && wgmma::elect()) produce<S>(p, work, barriers, smem_address(shared), warp, rank, size);
  } else {
    wgmma::take_registers<kConsumerRegisters>();
    consume<S, T, kSplit>(p, work, barriers, shared, out, warp - 4, lane, rank, size);
  }
  if (size > 1) wgmma::cluster_sync();  // the other CTA of the cluster may still arrive here
#endif
}

// The sums of tiles that were cut along K, in the order of their inputs. One CTA for 8 rows of a CTA's tile, whose
// threads have the outputs of the consumers.
template <class S, class T>
__global__ void __launch_bounds__(128 * kConsumers)
    reduce_kernel(const __grid_constant__ Int4Params p, const __grid_constant__ Work work, int size) {
  const int cut = int(blockIdx.x) / size, rank = int(blockIdx.x) - cut * size;
  const int j = int(blockIdx.y), thread = int(threadIdx.x);
  release_next();
  wait_for_previous();
  constexpr int kPart = S::kSums / 4 * 128 * kConsumers;
  const float4* const from = work.partial + (int64_t(cut) * work.parts * size + rank) * kPart + thread;
  float4 sum = {};
#pragma unroll 4
  for (int i = 0; i < work.parts; ++i) {
    const float4 v = from[int64_t(i) * size * kPart + j * (128 * kConsumers)];
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  const Place at = find_place(work, work.whole + cut);
  const int64_t n = int64_t(at.output * size + rank) * kOutputs + lane_output(thread / 32, thread % 32);
  const int64_t row = int64_t(at.row) * S::kRows + 8 * j + 2 * (thread & 3);
  float even[2] = {sum.x, sum.z}, odd[2] = {sum.y, sum.w};
  store_outputs<T, 2>(p, row, n, even);
  store_outputs<T, 2>(p, row + 1, n, odd);
}

// How a product is cut up: rows of a tile, and the parts that K is cut into in the tiles of the last, unfilled round.
struct Cut {
  int rows, parts;
};
Cut choose(const Int4Params& p, int size, int clusters) {
  Cut best{};
  double least = 0;
  for (const int rows : {256, 128}) {
    const int64_t tiles = ceil_div(p.m, rows) * ceil_div(p.n, kOutputs * size), left = tiles % clusters;
    // us of a tile, measured on an H200
    const double tile = double(p.k) / 4096 * (rows == 256 ? 42 : 28);
    for (int parts = 1; parts <= (left > 0 ? 8 : 1) && (parts == 1 || p.k >= 512 * parts); ++parts) {
      const double megabytes = double(left * parts * size) * rows * kOutputs * 4e-6;
      const double time = tile * (double(tiles / clusters) + double(ceil_div(left * parts, clusters)) / parts) +
                          (parts > 1 ? 2 + 0.6 * megabytes : 0);
      if (best.rows == 0 || time < least) best = {rows, parts}, least = time;
    }
  }
  return best;
}

template <class S, class T, bool kSplit>
bool launch(const Int4Params& p, const Tensor& like, int size, int clusters, int parts, cudaStream_t stream) {
  Work work{};
  const int64_t row_tiles = ceil_div(p.m, S::kRows), output_tiles = ceil_div(p.n, kOutputs * size);
  if (!describe_tensor(work.x, p.x, p.k_padded, {{p.m, p.x_stride * 2, S::kRows / size}, {1, 16, 1}, {1, 16, 1}}) ||
      !describe_tensor(work.y, p.y, p.n, {{p.m, p.n * 2, S::kRows}, {1, 16, 1}, {1, 16, 1}}))
    return false;
  work.slices = int(p.k_padded / kInt4Block), work.stages = (work.slices + S::kSlices - 1) / S::kSlices;
  work.of_group = p.group >= p.k ? S::kSlices * work.stages : int(p.group / kInt4Block);
  work.row_tiles = int(row_tiles), work.output_tiles = int(output_tiles);
  work.per_group = 2048 / S::kRows;
  const int64_t tiles = row_tiles * output_tiles;
  work.of_part = int(ceil_div(work.stages, std::min(parts, work.stages)));
  work.parts = int(ceil_div(work.stages, work.of_part));
  work.whole = int(work.parts > 1 ? tiles / clusters * clusters : tiles);
  const int64_t cut = tiles - work.whole;
  work.items = int(work.whole + cut * work.parts);
  Tensor workspace = like;
  if (cut > 0) {
    workspace = torch::stable::new_empty(like, {cut * size * work.parts * S::kRows * kOutputs}, ScalarType::Float);
    work.partial = static_cast<float4*>(workspace.mutable_data_ptr());
  }
  const auto kernel = int4_many_kernel<S, T, kSplit>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes));
  launch_clusters(size, kernel, dim3(unsigned(size * std::min(clusters, work.items))), kThreads, S::kBytes, stream, p,
                  work);
  if (cut > 0)
    launch_kernel(reduce_kernel<S, T>, dim3(unsigned(cut * size), unsigned(S::kRows / 8)), 128 * kConsumers, 0, stream,
                  p, work, size);
  return true;
}

}  // namespace

template <>
bool launch_int4_many<PAGEDKV_TYPE>(const Int4Params& p, const Tensor& like, cudaStream_t stream) {
  using T = PAGEDKV_TYPE;
  constexpr bool kHalf = std::is_same_v<T, __half>;
  const auto aligned = [](const void* q) { return reinterpret_cast<uintptr_t>(q) % 16 == 0; };
  const bool scales = p.scale_type == ScalarType::Half || (!kHalf && p.scale_type == ScalarType::BFloat16);
  if (p.offsets || !scales || p.n % 16 != 0 || p.k == 0 || !aligned(p.packed) || !aligned(p.scales) ||
      !aligned(p.zeros) || !aligned(p.bias) || !aligned(p.residual) || p.m > (1 << 24) || p.n > (1 << 28))
    return false;
  const Int4Device& d = int4_device();
  if (!d.has_wgmma) return false;
  const int size = d.has_clusters && p.n > kOutputs ? 2 : 1, clusters = std::max(1, d.sms / size);
  const Cut cut = choose(p, size, clusters);
  auto run = [&]<int kRows>(std::integral_constant<int, kRows>) {
    using S = Shape<kRows>;
    if constexpr (!kHalf)
      if (p.scale_type == ScalarType::Half) return launch<S, T, true>(p, like, size, clusters, cut.parts, stream);
    return launch<S, T, false>(p, like, size, clusters, cut.parts, stream);
  };
  return cut.rows == 128 ? run(std::integral_constant<int, 128>()) : run(std::integral_constant<int, 256>());
}

}  // namespace pagedkv
