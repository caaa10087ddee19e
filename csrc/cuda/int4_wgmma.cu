// int4_linear for 9 and more rows of 16-bit activations on Hopper (sm_90a).
// units: PAGEDKV_TYPE=__half,__nv_bfloat16
//
// Weights with offsets, float32 scales and odd sizes stay with int4_mma.cu or int4.cu.
//
// Algorithm: y^T = W x^T, W from registers as the A operand, x from shared memory as B. A lane's 16 bytes of a slice
// (32 inputs, 32 outputs; int4.h) are its fragments for two products (wgmma) of 64 outputs: a warp has a block of 32
// outputs, rows of A are outputs in the order that suits. Inputs of a slice are renamed, so x is brought into that
// order first (arrange_kernel), in tiles which bulk copies bring to shared memory.
//
// A tile is kOutputs outputs and kRows rows. Warpgroups:
//   producer   two warps copy weights and one factors (cp.async), a lane x; kStages ahead, also across tiles, and the
//              weights before x is arranged
//   consumers  make the numbers of a step while the products of the one before run
// CTAs stay. They take whole tiles as long as there is one for each; what is left is cut along K into equal parts
// (stream-K), whose sums go to memory and are added up in order by reduce_kernel. All orders are fixed by the shapes:
// equal calls give equal bits. The three kernels overlap (programmatic dependent launch).
//
// Consumers, by rows:
//   more than 96  consume: two warpgroups with 128 outputs each. A number becomes (q - zero) * scale in 16 bits,
//   rounded
//                 once, as in the stock dequantised weight; a float16 scale under bfloat16 activations is kept as the
//                 sum of two bfloat16, one product and one fused multiply-add.
//   17 to 96      consume_few: four warpgroups with 64 outputs each; a lane takes two words of its 16 bytes. Numbers
//   are
//                 q - zero, exactly, and the sums of a set (inputs of a stage in one group) are scaled in float32: a
//                 product for each sum, not for each pair of weights, and scales of any type lose nothing. More than 64
//                 rows are two tiles.
//   9 to 16       consume_warps: the same sums by mma.sync, a warp to a block of outputs, x as it lies.
//
// Floor: the larger of bytes of W / 4.28 TB/s and 2 m n k / 790 TFLOP/s (an H200's). Instructions: 16 pairs of a slice
// take 12 shifts, 16 lop3 and 16 subtractions; in consume 16 products, or 32 with two factors, on top.
//
// Tried: x by cp.async of 4 bytes in the order of the lanes: 41 cycles each, 180 us for m = 1024 of 4096 x 4096.
// Weights straight into a ring of registers, as in int4_mma.cu: the fence in front of products waits for loads under
// way, so a stage takes a latency of memory: 31 us for 14336 x 4096 whatever m is up to 64.
//
// 28672 x 4096 at m = 16, 32, 64, us: consume 41, 40, 53; consume_few with stages of 64 inputs 36, 41, 48, of 128 (half
// of the instructions that are not arithmetic) 29, 34, 44, with hold() 29, 33, 42; consume_warps 26, 33, 55.
// consume_few at m = 16 without products 19, without making numbers 24, without copies of weights 27: a wgmma with A
// from registers takes about 25 cycles more than its columns ask for, which few columns do not hide. 14336 x 4096 at m
// = 1024, consume: 266; without products 186, without making numbers 214.
#include <algorithm>

#include "int4.h"
#include "int4_tile.cuh"
#include "reduce.cuh"
#include "wgmma.cuh"

namespace pagedkv {
namespace {

// Shared memory of a stage: x, for each 64 inputs [kRows, 64] as wgmma.cuh has it, or for consume_warps rows as they
// are, kXPitch bytes apart (with which the 16 bytes of eight lanes, two rows of four, lie in different banks); the
// words of each block, [slices][4][32], chunk c of row j in place c ^ 2 (j % 4), so that the lanes of a fragment hit
// all banks; scales and zeros [outputs] of each set of slices, which share a group.
template <int kRows_, int kSets_, bool kFew_>
struct Shape {
  static constexpr int kRows = kRows_;                                                         // of x in a tile
  static constexpr int kSlices = kFew_ ? 4 : 2, kSets = kSets_, kSetSlices = kSlices / kSets;  // of a stage
  static constexpr bool kFew = kFew_, kWarps = kFew && kRows <= 16;  // consume_few, consume_warps; neither: consume
  static constexpr int kOutputs = 256;                               // of a tile
  static constexpr int kParts = kFew && !kWarps ? 1 : 2;             // of 64 outputs, that a consumer has
  static constexpr int kConsumers = kOutputs / (64 * kParts);        // warpgroups
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kBlocks = kOutputs / kInt4Block;
  // setmaxnreg: what the CTA is launched with is shared out anew
  static constexpr int kProducerRegisters = kParts == 1 ? 32 : 40;
  static constexpr int kConsumerRegisters =
      (65536 / kThreads / 8 * 8 * (1 + kConsumers) - kProducerRegisters) / kConsumers / 8 * 8;
  static constexpr int kXPitch = 320;  // of consume_warps, in bytes
  static constexpr int kXBytes = kRows * (kWarps ? kXPitch : 64 * kSlices), kWordBytes = kBlocks * 512 * kSlices,
                       kFactorBytes = 3 * kOutputs;
  static constexpr int kStageBytes = (kXBytes + kWordBytes + kSets * kFactorBytes + 1023) / 1024 * 1024;
  static constexpr int kStages = std::min(20, 224 * 1024 / kStageBytes);
  static constexpr int kBytes = kStages * kStageBytes + 1024;
};

template <int kStages>
struct Barriers {
  uint64_t full[kStages], empty[kStages];
};

struct Work {
  const unsigned char* x;  // [stages][rows][128 bytes], see arrange_kernel
  int64_t rows;            // a multiple of a tile's
  int slices, of_group;    // slices of a group
  int stages;              // of a tile
  int row_tiles;           // tiles are numbered along the rows first
  int whole;               // tiles that one CTA does alone: every gridDim.x-th
  int units, per;          // stages of the other tiles, those of one CTA
  float4* partial;         // [2 CTAs][2][kRows / 8][threads of the consumers]: a CTA's first and last part of a tile
};

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

// The first of a lane's neighbouring outputs in a tile, two for each part: four of a block of 32, or a half of those.
template <class S>
__device__ __forceinline__ int lane_output(int group, int warp, int lane) {
  if constexpr (S::kParts == 1) return (group * 2 + warp / 2) * kInt4Block + lane / 4 * 4 + warp % 2 * 2;
  return (group * 4 + warp) * kInt4Block + lane / 4 * 4;
}

// x [m, k] -> the tiles that products read: [stages][rows][64 inputs], where the inputs of a
// slice are in the order of the lanes' registers and chunks of 16 bytes swizzled as wgmma.cuh has it. A thread has 32
// inputs of a row: words j = 0 .. 3 of four pairs, and pair q of all words makes chunk q.
template <class T>
__global__ void __launch_bounds__(256)
    arrange_kernel(const __grid_constant__ Int4Params p, uint4* out, int64_t rows, int slices) {
  begin_kernel();  // the products behind may start to copy weights
  const Quotient at = divide(int64_t(blockIdx.x) * 256 + threadIdx.x, slices);
  const int64_t row = at.q;
  const int slice = int(at.r);
  if (row >= rows) return;
  uint4 word[4] = {};
  const T* const from = static_cast<const T*>(p.x) + row * p.x_stride + slice * kInt4Block;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (row < p.m && slice * kInt4Block < p.k_padded) word[j] = reinterpret_cast<const uint4*>(from)[j];
  uint4* const to = out + (slice / 2 * rows + row) * 8;
  const int first = slice % 2 * 4, turn = int(row % 8);
  to[first ^ turn] = make_uint4(word[0].x, word[1].x, word[2].x, word[3].x);
  to[(first + 1) ^ turn] = make_uint4(word[0].y, word[1].y, word[2].y, word[3].y);
  to[(first + 2) ^ turn] = make_uint4(word[0].z, word[1].z, word[2].z, word[3].z);
  to[(first + 3) ^ turn] = make_uint4(word[0].w, word[1].w, word[2].w, word[3].w);
}

#ifdef PAGEDKV_WGMMA

struct Segment {
  int tile, begin, end;  // stages
  int slot;              // of `partial`; -1: this is the whole tile
};

struct Cursor {
  int tile, unit, end;
  bool first = true;
  __device__ __forceinline__ explicit Cursor(const Work& w)
      : tile(int(blockIdx.x)), unit(int(blockIdx.x) * w.per), end(min(unit + w.per, w.units)) {}
  __device__ __forceinline__ bool next(const Work& w, Segment& s) {
    if (tile < w.whole) {
      s = {tile, 0, w.stages, -1};
      tile += int(gridDim.x);
      return true;
    }
    if (unit >= end) return false;
    const int of = unit / w.stages, begin = unit - of * w.stages, stop = min(w.stages, begin + end - unit);
    s = {w.whole + of, begin, stop, stop - begin == w.stages ? -1 : 2 * int(blockIdx.x) + (first ? 0 : 1)};
    unit += stop - begin, first = false;
    return true;
  }
};

// The warps of the producer: two copy weights, one factors, one x.
constexpr int kWordThreads = 64;

template <class S>
__device__ __forceinline__ void produce(const Int4Params& p, const Work& work, Barriers<S::kStages>& barriers,
                                        uint32_t shared, int warp, int lane) {
  wgmma::Ring<S::kStages> ring;
  Cursor cursor(work);
  Segment s;
  if (warp == 3) {
    if (!S::kWarps && lane > 0) return;
    wait_for_previous();
    while (cursor.next(work, s)) {
      const int tile_m = s.tile % work.row_tiles;
      if constexpr (S::kWarps) {  // two rows at a time
        const int64_t step = 4 * p.x_stride, first = int64_t(tile_m) * S::kRows + lane / 16;
        const char* const any = static_cast<const char*>(p.x) + lane % 16 * 16;
        const char* start = any + first * p.x_stride * 2 + s.begin * 256;
        const int rows = int(min(int64_t(S::kRows), p.m - first));
#pragma unroll 1
        for (int stage = s.begin; stage < s.end; ++stage, start += 256) {
          wgmma::barrier_wait(barriers.empty[ring.index], ring.parity ^ 1);
          const uint32_t to = shared + ring.index * S::kStageBytes + lane / 16 * S::kXPitch + lane % 16 * 16;
          const bool exists = stage * 16 + lane % 16 < work.slices * 4;
          const char* at = start;
#pragma unroll
          for (int i = 0; i < S::kRows; i += 2, at += step) {
            const bool ok = exists && i < rows;
            cp_async<16>(to + i * S::kXPitch, ok ? at : any, ok);
          }
          wgmma::barrier_arrive_copies(barriers.full[ring.index]);
          ring.advance();
        }
      } else {
        constexpr int kCopies = S::kSlices / 2, kBytes = S::kXBytes / kCopies;
        const unsigned char* from = work.x + (s.begin * kCopies * work.rows + int64_t(tile_m) * S::kRows) * 128;
#pragma unroll 1
        for (int stage = s.begin; stage < s.end; ++stage) {
          wgmma::barrier_wait(barriers.empty[ring.index], ring.parity ^ 1);
#pragma unroll
          for (int i = 0; i < kCopies; ++i, from += work.rows * 128)
            wgmma::copy_bulk(shared + ring.index * S::kStageBytes + i * kBytes, from, kBytes,
                             barriers.full[ring.index]);
          ring.advance();
        }
      }
    }
  } else if (warp == 2) {
    while (cursor.next(work, s)) {
      const int64_t first = int64_t(s.tile / work.row_tiles) * S::kOutputs;
      int slice = s.begin * S::kSlices, group = slice / work.of_group, in_group = slice - group * work.of_group;
#pragma unroll 1
      for (int stage = s.begin; stage < s.end; ++stage) {
        wgmma::barrier_wait(barriers.empty[ring.index], ring.parity ^ 1);
        const uint32_t to = shared + ring.index * S::kStageBytes + S::kXBytes + S::kWordBytes;
#pragma unroll
        for (int i = 0; i < S::kSets; ++i) {
          const bool exists = slice < work.slices;
#pragma unroll
          for (int j = 0; j < S::kOutputs / 128; ++j) {
            const int output = 128 * j + 4 * lane;
            const bool ok = exists && first + output < p.n;
            const int64_t from = ok ? group * p.n + first + output : 0;
            cp_async<8>(to + i * S::kFactorBytes + output * 2, static_cast<const char*>(p.scales) + from * 2, ok);
            if (p.zeros) cp_async<4>(to + i * S::kFactorBytes + 2 * S::kOutputs + output, p.zeros + from, ok);
          }
          slice += S::kSetSlices, in_group += S::kSetSlices;
          if (in_group >= work.of_group) in_group = 0, ++group;
        }
        wgmma::barrier_arrive_copies(barriers.full[ring.index]);
        ring.advance();
      }
    }
  } else {
    // Chunk (row, c) of every block
    const int row = warp * 4 + lane / 8, c = lane % 8, blocks = int((p.n + kInt4Block - 1) / kInt4Block);
    const uint32_t target = shared + S::kXBytes + row * 128 + (c ^ 2 * (row % 4)) * 16;
    const int64_t block_bytes = int64_t(work.slices) * (kInt4Block * kInt4Block / 2);
    while (cursor.next(work, s)) {
      const int first = s.tile / work.row_tiles * S::kBlocks;
      const char* from = reinterpret_cast<const char*>(p.packed) + first * block_bytes + s.begin * (S::kSlices * 512) +
                         row * 128 + c * 16;
#pragma unroll 1
      for (int stage = s.begin; stage < s.end; ++stage, from += S::kSlices * 512) {
        wgmma::barrier_wait(barriers.empty[ring.index], ring.parity ^ 1);
#pragma unroll
        for (int i = 0; i < S::kBlocks; ++i)
#pragma unroll
          for (int j = 0; j < S::kSlices / 2; ++j) {
            const bool ok = stage * S::kSlices + j * 2 + warp < work.slices && first + i < blocks;
            cp_async<16>(target + ring.index * S::kStageBytes + (i * S::kSlices + j * 2) * 512,
                         ok ? from + i * block_bytes + j * 1024 : reinterpret_cast<const char*>(p.packed), ok);
          }
        wgmma::barrier_arrive_copies(barriers.full[ring.index]);
        ring.advance();
      }
    }
  }
  cp_async_wait<0>();
}

// A lane's words of a slice -> the fragments of its two products of 64 outputs
template <class F>
__device__ __forceinline__ void make_weights(const F& factors, const uint4& words, uint32_t (&a)[2][2][4]) {
  const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int b = 0; b < 4; ++b)
#pragma unroll
    for (int pair = 0; pair < 4; ++pair)
      a[b / 2][pair / 2][b % 2 + pair % 2 * 2] = factors.weights(w[b] >> 4 * pair, b);
}

// A consumer's sums of a segment: done, or to memory. d as products leave it, see wgmma_ptx.cuh.
template <class S, class T>
__device__ __forceinline__ void finish(const Int4Params& p, const Work& work, const Segment& s,
                                       float (&sum)[2][S::kRows / 2], int group, int warp, int lane) {
  constexpr int kRows = S::kRows, kThreads = 128 * S::kConsumers;
  if (s.slot >= 0) {
    float4* const to = work.partial + int64_t(s.slot) * (kRows / 4 * kThreads) + group * 128 + warp * 32 + lane;
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j)
        to[(part * (kRows / 8) + j) * kThreads] =
            make_float4(sum[part][4 * j], sum[part][4 * j + 1], sum[part][4 * j + 2], sum[part][4 * j + 3]);
    return;
  }
  const int tile_n = s.tile / work.row_tiles, tile_m = s.tile - tile_n * work.row_tiles;
  const int64_t n = int64_t(tile_n) * S::kOutputs + lane_output<S>(group, warp, lane);
  const int64_t row = int64_t(tile_m) * kRows + 2 * (lane & 3);
#pragma unroll
  for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float out[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) out[b] = sum[b / 2][4 * j + b % 2 * 2 + e];
      store_outputs<T, 4>(p, row + 8 * j + e, n, out);
    }
}

template <class S, class T, bool kSplit>
__device__ __forceinline__ void consume(const Int4Params& p, const Work& work, Barriers<S::kStages>& barriers,
                                        const unsigned char* shared, int group, int warp, int lane) {
  constexpr int kRows = S::kRows, kThreads = 128 * S::kConsumers;
  constexpr bool kFine = S::kSets > 1;
  const int t = lane & 3, g = lane >> 2, output = lane_output<S>(group, warp, lane);
  const uint64_t x_base = wgmma::descriptor(smem_address(shared), 16);
  const unsigned char* const words = shared + S::kXBytes + (group * 4 + warp) * 1024 + t * 128 + (g ^ 2 * t) * 16;
  const unsigned char* const scales = shared + S::kXBytes + S::kWordBytes + 2 * output;
  const unsigned char* const zeros = shared + S::kXBytes + S::kWordBytes + 2 * S::kOutputs + output;

  auto release = [&](int index) {
    __syncwarp();
    if (lane == 0) wgmma::barrier_arrive(barriers.empty[index]);
  };
  wgmma::Ring<S::kStages> ring;
  Cursor cursor(work);
  Segment s;
  while (cursor.next(work, s)) {
    float sum[2][kRows / 2];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) sum[part][i] = 0.f;
      wgmma::pin(sum[part]);
    }
    uint32_t a[2][2][2][4];
    Int4Factors<T, kSplit, 4> factors;
    int left = 0, span = work.of_group - s.begin * 2 % work.of_group;  // slices of this group, of the next
    int before = -1;
#pragma unroll 1
    for (int stage = s.begin; stage < s.end; ++stage) {
      wgmma::barrier_wait(barriers.full[ring.index], ring.parity);
      const int base = ring.index * S::kStageBytes;
      const uint64_t x = x_base + base / 16;
      const uint4 both[2] = {*reinterpret_cast<const uint4*>(words + base),
                             *reinterpret_cast<const uint4*>(words + base + 512)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (kFine || i == 0) {
          if (left == 0) {
            const int at = base + i * S::kFactorBytes;
            const uint2& pairs = *reinterpret_cast<const uint2*>(scales + at);
            factors.set([&](int i) { return i == 0 ? pairs.x : pairs.y; },
                        p.zeros ? *reinterpret_cast<const uint32_t*>(zeros + at) : 0x08080808u);
            left = span, span = work.of_group;
          }
          left -= kFine ? 1 : 2;
        }
        make_weights(factors, both[i], a[i]);
        wgmma::fence();
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
          for (int part = 0; part < 2; ++part)
            wgmma::multiply_add<T, kRows, false>(sum[part], a[i][part][step], x + i * 4 + step * 2);
        wgmma::commit();
        wgmma::wait<1>();  // the slice before is done
        if (i == 0 && before >= 0) release(before);
      }
      before = ring.index;
      ring.advance();
    }
    wgmma::wait<0>();
#pragma unroll
    for (int part = 0; part < 2; ++part) wgmma::pin(sum[part]);
    release(before);

    finish<S, T>(p, work, s, sum, group, warp, lane);
  }
}

// The sums of two neighbouring outputs: rows row + 8 j and the next of each j
template <class T, int kRows>
__device__ __forceinline__ void store_tile(const Int4Params& p, int64_t row, int64_t n, float (&sum)[kRows / 2]) {
  if (n >= p.n) return;
  if (p.bias) {
    const auto bias = load_vec<T, 2>(static_cast<const T*>(p.bias) + n);
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) sum[i] += to_float(bias.v[i / 2 % 2]);
  }
  apply<kRows / 2>(p.act, sum);
#pragma unroll
  for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t at = (row + 8 * j + e) * p.n + n;
      float out[2] = {sum[4 * j + e], sum[4 * j + 2 + e]};
      if (row + 8 * j + e >= p.m) continue;
      if (p.residual) {
        const auto residual = load_vec<T, 2>(static_cast<const T*>(p.residual) + at);
        out[0] += to_float(residual.v[0]), out[1] += to_float(residual.v[1]);
      }
      store_vec(static_cast<T*>(p.y) + at, Vec<T, 2>{from_float<T>(out[0]), from_float<T>(out[1])});
    }
}

template <class S, class T>
__device__ __forceinline__ void consume_few(const Int4Params& p, const Work& work, Barriers<S::kStages>& barriers,
                                            const unsigned char* shared, int group, int warp, int lane) {
  constexpr int kRows = S::kRows, kThreads = 128 * S::kConsumers;
  constexpr int kStepSlices = kRows > 32 ? 1 : std::min(2, S::kSetSlices), kSteps = S::kSlices / kStepSlices;
  constexpr int kSetSteps = kSteps / S::kSets;
  const int t = lane & 3, g = lane >> 2, output = lane_output<S>(group, warp, lane);
  const uint64_t x_base = wgmma::descriptor(smem_address(shared), 16);
  const uint32_t x_low = uint32_t(x_base), x_high = uint32_t(x_base >> 32);
  const unsigned char* const words =
      shared + S::kXBytes + (group * 2 + warp / 2) * (512 * S::kSlices) + t * 128 + (g ^ 2 * t) * 16 + warp % 2 * 8;
  const unsigned char* const scales = shared + S::kXBytes + S::kWordBytes + 2 * output;
  const unsigned char* const zeros = shared + S::kXBytes + S::kWordBytes + 2 * S::kOutputs + output;
  const bool has_zeros = p.zeros != nullptr, bfloat = p.scale_type == ScalarType::BFloat16;

  auto release = [&](int index) {
    __syncwarp();
    if (lane == 0) wgmma::barrier_arrive(barriers.empty[index]);
  };
  wgmma::Ring<S::kStages> ring;
  Cursor cursor(work);
  Segment s;
  while (cursor.next(work, s)) {
    float total[kRows / 2], sum[kRows / 2], scale[2] = {};
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) total[i] = sum[i] = 0.f;
    wgmma::pin(sum);
    auto fold = [&] {
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) total[i] = fmaf(scale[i / 2 % 2], sum[i], total[i]);
    };
    uint2 word[kStepSlices];  // of the next step
    uint32_t raw = 0x0808u;   // zeros of its set
    auto load = [&](int index, int step) {
      const int base = index * S::kStageBytes;
#pragma unroll
      for (int i = 0; i < kStepSlices; ++i)
        word[i] = *reinterpret_cast<const uint2*>(words + base + 512 * (step * kStepSlices + i));
      if (step % kSetSteps == 0 && has_zeros)
        raw = *reinterpret_cast<const uint16_t*>(zeros + base + step / kSetSteps * S::kFactorBytes);
    };
    uint32_t a[2][kStepSlices][2][4];
    int before = -1;
    wgmma::barrier_wait(barriers.full[ring.index], ring.parity);
    load(ring.index, 0);
#pragma unroll 1
    for (int stage = s.begin; stage < s.end; ++stage) {
      const int index = ring.index, base = index * S::kStageBytes;
      ring.advance();
      uint32_t zero[2];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int set = step / kSetSteps;
        if (step % kSetSteps == 0) zero[0] = int4_zero_pair<T>(raw, 0), zero[1] = int4_zero_pair<T>(raw, 1);
#pragma unroll
        for (int i = 0; i < kStepSlices; ++i) {
          const uint32_t w[2] = {word[i].x, word[i].y};
#pragma unroll
          for (int b = 0; b < 2; ++b)
#pragma unroll
            for (int pair = 0; pair < 4; ++pair)
              a[step % 2][i][pair / 2][b + pair % 2 * 2] =
                  subtract_pair<T>(and_xor(w[b] >> 4 * pair, 0x000f000fu, int4_bias<T>() | 0x00080008u), zero[b]);
        }
        if (step < kSteps - 1) {
          load(index, step + 1);
        } else if (stage + 1 < s.end) {
          wgmma::barrier_wait(barriers.full[ring.index], ring.parity);
          load(ring.index, 0);
        }
        wgmma::hold(a[step % 2][kStepSlices - 1][1][3]);
        wgmma::wait<0>();  // the step before is done
        wgmma::pin(sum);
        if (step == 0 && before >= 0) release(before);
        if (step % kSetSteps == 0) {
          fold();
          const uint32_t bits = *reinterpret_cast<const uint32_t*>(scales + base + set * S::kFactorBytes);
          if (bfloat)
            scale[0] = __uint_as_float(bits << 16), scale[1] = __uint_as_float(bits & 0xffff0000u);
          else
            scale[0] = __half2float(__ushort_as_half(uint16_t(bits))),
            scale[1] = __half2float(__ushort_as_half(uint16_t(bits >> 16)));
        }
        wgmma::fence();
#pragma unroll
        for (int i = 0; i < 2 * kStepSlices; ++i) {
          const int k = step * 2 * kStepSlices + i;  // 16 inputs
          wgmma::multiply_add<T, kRows, false>(
              sum, a[step % 2][i / 2][i % 2],
              uint64_t(x_high) << 32 | (x_low + base / 16 + k / 4 * (kRows * 128 / 16) + k % 4 * 2),
              step % kSetSteps > 0 || i > 0);
        }
        wgmma::commit();
      }
      before = index;
    }
    wgmma::wait<0>();
    wgmma::pin(sum);
    release(before);
    fold();

    if (s.slot >= 0) {
      float4* const to = work.partial + int64_t(s.slot) * (kRows / 8 * kThreads) + group * 128 + warp * 32 + lane;
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j)
        to[j * kThreads] = make_float4(total[4 * j], total[4 * j + 1], total[4 * j + 2], total[4 * j + 3]);
    } else {
      const int tile_n = s.tile / work.row_tiles, tile_m = s.tile - tile_n * work.row_tiles;
      store_tile<T, kRows>(p, int64_t(tile_m) * kRows + 2 * t, int64_t(tile_n) * S::kOutputs + output, total);
    }
  }
}

template <class S, class T>
__device__ __forceinline__ void consume_warps(const Int4Params& p, const Work& work, Barriers<S::kStages>& barriers,
                                              const unsigned char* shared, int group, int warp, int lane) {
  constexpr int kTiles = S::kRows / 8;
  const int t = lane & 3, g = lane >> 2, output = lane_output<S>(group, warp, lane);
  const unsigned char* const inputs = shared + g * S::kXPitch + t * 16;
  const unsigned char* const words =
      shared + S::kXBytes + (group * 4 + warp) * (512 * S::kSlices) + t * 128 + (g ^ 2 * t) * 16;
  const unsigned char* const scales = shared + S::kXBytes + S::kWordBytes + 2 * output;
  const unsigned char* const zeros = shared + S::kXBytes + S::kWordBytes + 2 * S::kOutputs + output;
  const bool has_zeros = p.zeros != nullptr, bfloat = p.scale_type == ScalarType::BFloat16;
  wgmma::Ring<S::kStages> ring;
  Cursor cursor(work);
  Segment s;
  while (cursor.next(work, s)) {
    float total[2][4 * kTiles] = {};
#pragma unroll 1
    for (int stage = s.begin; stage < s.end; ++stage) {
      wgmma::barrier_wait(barriers.full[ring.index], ring.parity);
      const int base = ring.index * S::kStageBytes;
#pragma unroll
      for (int set = 0; set < S::kSets; ++set) {
        const uint2 raw = *reinterpret_cast<const uint2*>(scales + base + set * S::kFactorBytes);
        const uint32_t bytes =
            has_zeros ? *reinterpret_cast<const uint32_t*>(zeros + base + set * S::kFactorBytes) : 0x08080808u;
        uint32_t zero[4];
        float scale[4];
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const uint32_t bits = (b < 2 ? raw.x : raw.y) >> 16 * (b % 2);
          zero[b] = int4_zero_pair<T>(bytes, b);
          scale[b] = bfloat ? __uint_as_float(bits << 16) : __half2float(__ushort_as_half(uint16_t(bits)));
        }
        float sum[2][kTiles][4] = {};
#pragma unroll
        for (int i = set * S::kSetSlices; i < (set + 1) * S::kSetSlices; ++i) {
          uint32_t a[2][2][4];
          int4_fragments<T, false>(*reinterpret_cast<const uint4*>(words + base + 512 * i), zero, a);
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            const uint4 x = *reinterpret_cast<const uint4*>(inputs + base + j * (8 * S::kXPitch) + 64 * i);
#pragma unroll
            for (int part = 0; part < 2; ++part) {
              mma_16816<T>(sum[part][j], a[part][0], x.x, x.y);
              mma_16816<T>(sum[part][j], a[part][1], x.z, x.w);
            }
          }
        }
#pragma unroll
        for (int part = 0; part < 2; ++part)
#pragma unroll
          for (int i = 0; i < 4 * kTiles; ++i)
            total[part][i] = fmaf(scale[2 * part + i % 4 / 2], sum[part][i / 4][i % 4], total[part][i]);
      }
      __syncwarp();
      if (lane == 0) wgmma::barrier_arrive(barriers.empty[ring.index]);
      ring.advance();
    }
    finish<S, T>(p, work, s, total, group, warp, lane);
  }
}

#endif

template <class S, class T, bool kSplit>
__global__ void __launch_bounds__(S::kThreads, 1)
    int4_wgmma_kernel(const __grid_constant__ Int4Params p, const __grid_constant__ Work work) {
#ifdef PAGEDKV_WGMMA
  extern __shared__ unsigned char dynamic_shared[];
  __shared__ Barriers<S::kStages> barriers;
  unsigned char* const shared = dynamic_shared + (-smem_address(dynamic_shared) & 1023u);
  const int lane = threadIdx.x & 31;
  const int warp = __shfl_sync(~0u, int(threadIdx.x >> 5), 0);  // tells the compiler that it is uniform
  release_next();
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      wgmma::barrier_init(barriers.full[i], kWordThreads + 32 + (S::kWarps ? 32 : S::kSlices / 2));
      wgmma::barrier_init(barriers.empty[i], 4 * S::kConsumers);
    }
    wgmma::fence_async_proxy();
  }
  __syncthreads();
  if (warp < 4) {
    wgmma::give_registers<S::kProducerRegisters>();
    produce<S>(p, work, barriers, smem_address(shared), warp, lane);
  } else {
    wgmma::take_registers<S::kConsumerRegisters>();
    if constexpr (S::kWarps)
      consume_warps<S, T>(p, work, barriers, shared, warp / 4 - 1, warp % 4, lane);
    else if constexpr (S::kFew)
      consume_few<S, T>(p, work, barriers, shared, warp / 4 - 1, warp % 4, lane);
    else
      consume<S, T, kSplit>(p, work, barriers, shared, warp / 4 - 1, warp % 4, lane);
  }
#endif
}

// The sums of tiles that several CTAs had a part of, in the order of their inputs. One CTA for 8 rows of a tile, whose
// threads have the outputs of the consumers.
template <class S, class T>
__global__ void __launch_bounds__(128 * S::kConsumers)
    reduce_kernel(const __grid_constant__ Int4Params p, const __grid_constant__ Work work) {
  const int tile = int(blockIdx.x), j = int(blockIdx.y), thread = int(threadIdx.x);
  const int first = tile * work.stages / work.per, last = ((tile + 1) * work.stages - 1) / work.per;
  release_next();
  wait_for_previous();
  if (first == last) return;
  float4 sum[S::kParts] = {};
#pragma unroll 4
  for (int c = first; c <= last; ++c) {
    const int slot = 2 * c + (c * work.per < tile * work.stages ? 1 : 0);
    const float4* const from = work.partial + int64_t(slot) * (S::kRows / 4 * S::kOutputs) + thread;
#pragma unroll
    for (int part = 0; part < S::kParts; ++part) {
      const float4 v = from[(part * (S::kRows / 8) + j) * (128 * S::kConsumers)];
      sum[part].x += v.x, sum[part].y += v.y, sum[part].z += v.z, sum[part].w += v.w;
    }
  }
  const int tile_n = (work.whole + tile) / work.row_tiles, tile_m = work.whole + tile - tile_n * work.row_tiles;
  const int64_t n = int64_t(tile_n) * S::kOutputs + lane_output<S>(thread / 128, thread / 32 % 4, thread % 32);
  const int64_t row = int64_t(tile_m) * S::kRows + 8 * j + 2 * (thread & 3);
  float even[2 * S::kParts], odd[2 * S::kParts];
#pragma unroll
  for (int part = 0; part < S::kParts; ++part) {
    even[2 * part] = sum[part].x, even[2 * part + 1] = sum[part].z;
    odd[2 * part] = sum[part].y, odd[2 * part + 1] = sum[part].w;
  }
  store_outputs<T, 2 * S::kParts>(p, row, n, even);
  store_outputs<T, 2 * S::kParts>(p, row + 1, n, odd);
}

// Where it is faster than int4_mma.cu, or than cuBLAS on expanded weights: by weights for each SM. Measured on an H200.
bool pays(const Int4Params& p, int sms) {
  const int64_t weights = p.n * p.k / sms;
  const int64_t least = p.m <= 16 ? 600000 : p.m <= 24 ? 195000 : p.m <= 32 ? 180000 : p.m <= 64 ? 100000 : 60000;
  return p.m <= 512 && weights >= least;
}

template <class S, class T, bool kSplit>
void launch(const Int4Params& p, const Tensor& like, const Int4Device& device, cudaStream_t stream) {
  const int sms = device.sms;
  Work work{};
  const int64_t row_tiles = (p.m + S::kRows - 1) / S::kRows, tiles = (p.n + S::kOutputs - 1) / S::kOutputs * row_tiles;
  work.row_tiles = int(row_tiles), work.rows = row_tiles * S::kRows;
  work.slices = int(p.k_padded / kInt4Block), work.stages = (work.slices + S::kSlices - 1) / S::kSlices;
  work.of_group = p.group >= p.k ? S::kSlices * work.stages : int(p.group / kInt4Block);
  // Whole rounds of tiles; what is left is cut along K, so that all CTAs end together.
  const int64_t left = tiles % sms, rounds = tiles / sms;
  int grid = int(std::min<int64_t>(sms, tiles));
  const int part = std::max(std::min(2, work.stages), int((left * work.stages + sms - 1) / sms));
  if (left > 0 && part + 640 / (32 * S::kSlices) < work.stages) {  // adding up takes about 10
    work.whole = int(rounds * sms), work.units = int(left * work.stages), work.per = part;
    grid = rounds > 0 ? sms : (work.units + part - 1) / part;
  } else {
    work.whole = int(tiles), work.per = work.stages;
  }
  const bool split = work.units > 0;
  const int64_t x_bytes = S::kWarps ? 0 : work.stages * work.rows * (64 * S::kSlices);
  const int64_t slots = split ? 2 * ((work.units + work.per - 1) / work.per) : 0;
  const int64_t bytes = x_bytes + slots * S::kRows * S::kOutputs * int64_t(sizeof(float));
  const Tensor workspace = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  work.x = static_cast<const unsigned char*>(workspace.const_data_ptr());
  work.partial = reinterpret_cast<float4*>(static_cast<unsigned char*>(workspace.mutable_data_ptr()) + x_bytes);
  if constexpr (!S::kWarps) {
    const int64_t pieces = work.rows * S::kSlices * work.stages;
    launch_kernel(arrange_kernel<T>, dim3(unsigned((pieces + 255) / 256)), 256, 0, stream, p,
                  static_cast<uint4*>(workspace.mutable_data_ptr()), work.rows, S::kSlices * work.stages);
  }
  const auto kernel = int4_wgmma_kernel<S, T, kSplit>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes));
  launch_kernel(kernel, dim3(unsigned(grid)), S::kThreads, S::kBytes, stream, p, work);
  if (split)
    launch_kernel(reduce_kernel<S, T>, dim3(unsigned(left), unsigned(S::kRows / 8)), 128 * S::kConsumers, 0, stream, p,
                  work);
}

}  // namespace

template <>
bool launch_int4_wgmma<PAGEDKV_TYPE>(const Int4Params& p, const Tensor& like, cudaStream_t stream) {
  using T = PAGEDKV_TYPE;
  constexpr bool kHalf = std::is_same_v<T, __half>;
  const auto aligned = [](const void* q) { return reinterpret_cast<uintptr_t>(q) % 8 == 0; };
  const bool scales = p.scale_type == ScalarType::Half || (!kHalf && p.scale_type == ScalarType::BFloat16);
  if (p.offsets || !scales || p.n % 4 != 0 || p.k == 0 || !aligned(p.scales) || !aligned(p.zeros) || !aligned(p.bias) ||
      !aligned(p.residual) || p.m > (1 << 24) || p.n > (1 << 30))
    return false;
  const Int4Device& d = int4_device();
  if (!d.has_wgmma || !pays(p, d.sms)) return false;
  auto divides = [&](int inputs) { return p.group >= p.k || p.group % inputs == 0; };
  auto run = [&]<int kRows>(std::integral_constant<int, kRows>) {
    if constexpr (kRows <= 64) {
      if (divides(128))
        launch<Shape<kRows, 1, true>, T, false>(p, like, d, stream);
      else if (divides(64))
        launch<Shape<kRows, 2, true>, T, false>(p, like, d, stream);
      else
        launch<Shape<kRows, 4, true>, T, false>(p, like, d, stream);
    } else {
      using Coarse = Shape<kRows, 1, false>;
      using Fine = Shape<kRows, 2, false>;
      if constexpr (!kHalf)
        if (p.scale_type == ScalarType::Half)
          return divides(64) ? launch<Coarse, T, true>(p, like, d, stream) : launch<Fine, T, true>(p, like, d, stream);
      divides(64) ? launch<Coarse, T, false>(p, like, d, stream) : launch<Fine, T, false>(p, like, d, stream);
    }
  };
  if (p.m > 96) {
    run(std::integral_constant<int, 128>());
  } else {  // one tile of rows, or two
    const int64_t rows = p.m > 64 ? (p.m + 1) / 2 : p.m;
    if (rows <= 16)
      run(std::integral_constant<int, 16>());
    else if (rows <= 32)
      run(std::integral_constant<int, 32>());
    else if (rows <= 48)
      run(std::integral_constant<int, 48>());
    else
      run(std::integral_constant<int, 64>());
  }
  return true;
}

}  // namespace pagedkv
