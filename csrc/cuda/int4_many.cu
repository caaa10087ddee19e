// int4_linear for many rows (65 and more) of 16-bit activations on Hopper's tensor cores (wgmma, sm_90a).
// units: PAGEDKV_TYPE=__half,__nv_bfloat16
//
// Weights with offsets, float32 scales and odd sizes stay with int4_mma.cu or int4.cu.
//
// Algorithm: y^T = W x^T, W from registers as the A operand, x from shared memory as B. A tile is 128 or 192 outputs
// and kRows rows, 256, 128 or 64. Warpgroups:
//   producer   copies x and words (boxes of the copy engine), scales and zeros (cp.async) into a ring of stages, also
//              across tiles
//   consumers  two or three, each 64 outputs and all rows: a number is made once for 256 rows. A warp has 16 outputs,
//              half of a block of 32, of which a lane has two neighbours. Numbers of a slice of 32 inputs are made
//              while the products of the slice before run.
// A lane of a fragment needs pair t of words, t = its place in its row of four: those four read the same words
// (broadcast), and each shifts by its own 4 t. So inputs keep their order, and x is read as it is.
//
// A number becomes (q - zero) * scale in 16 bits, rounded once, as in the stock dequantised weight; a float16 scale
// under bfloat16 activations is kept as the sum of two bfloat16, one product and one fused multiply-add.
//
// Sums go to y by way of shared memory, as boxes. For many rows, two CTAs side by side in the outputs are a cluster,
// and each copies half of x for both. CTAs stay, and take whole tiles in turn. Tiles of the last round, if they do not
// fill it, may be cut along K: between the CTAs of a cluster, which exchange sums through their shared memory,
// or in more parts, whose sums go to memory and are added up in order by reduce_kernel. All orders are fixed by the
// shapes: equal calls give equal bits.
//
// Floor: 2 m n k / 790 TFLOP/s (an H200's). 14336 x 4096 at m = 256 (1024), us: 45 (161), cuBLAS on weights of 16 bits
// 45 (151).
//
// What it took (14336 x 4096 at m = 1024, us, tiles not cut): one thread for all copies, and bias, activation and
// residual done for a pair of outputs at a time, which is 300 KB of code to fetch for each tile: 305. The latter step
// by step over all sums: 232. A thread for each kind of copies, and y by way of shared memory: 174; without numbers
// made 161, without products 172, so that waiting for copies is much of it. Five stages for four, fewer copies, words
// loaded before the products in front of theirs: 173. Words ahead into L2: 20 more. Tiles of the last round cut along
// K: 161.
//
// Where the time goes, in cycles (6144 x 4096 at m = 256, tiles of 256 rows in halves of K; 1.8 GHz): until the kernel
// in front is done 1300, x arrives 3700, products 33500 (32768 at the tensor cores' rate), exchange 5700, y 2400; 26 us
// for 30 with the sums by way of memory. Remote stores run at some 17 bytes a cycle, so that 64 KB take 3800 of the
// exchange. Three consumers with 128 rows, whose exchange is 48 KB and which leave 4 SMs idle for 36: 25 us.
//
// With 128 rows making numbers is not hidden: 41000 cycles a tile of 4096 inputs, 36000 without (ideal 32768); with
// three consumers 61000, 51000 without (49152). It is not for lack of slots to issue in, 25 instructions for 64 cycles
// of products. Products of 16, 32 or 64 inputs at a time: equal within 3 %. Consumers that take turns at the tensor
// cores (named barriers): 47000. Clusters of four, for quarters of K: only 30 fit on the 132 SMs. Three consumers with
// y in one turn, as now, have room for three stages, with two turns for four: 11008 x 4096 at m = 256 took 40 us with
// four, 45 with three, in different runs.
#include <cuda.h>

#include <algorithm>

#include "int4.h"
#include "int4_tile.cuh"
#include "reduce.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace pagedkv {
namespace {

// Shared memory of a stage: x, boxes [kRows, 64] as wgmma.cuh has it; words [blocks][4 kSlices][32]; of each slice that
// begins a group, and the first one, scales and zeros [outputs].
template <int kRows_, int kConsumers_>
struct Shape {
  static constexpr int kConsumers = kConsumers_, kThreads = 128 * (1 + kConsumers);  // warpgroups
  static constexpr int kProducerRegisters = kConsumers > 2 ? 32 : 40;                // setmaxnreg
  static constexpr int kConsumerRegisters = kConsumers > 2 ? 160 : 232;
  static constexpr int kRows = kRows_, kOutputs = 64 * kConsumers, kBlocks = kOutputs / kInt4Block;  // of a tile
  static constexpr int kInputs = kRows == 256 ? 64 : 128, kSlices = kInputs / kInt4Block;            // slices of 32
  static constexpr int kXBytes = kRows * kInputs * 2, kWordBytes = kOutputs * kInputs / 2, kFactorBytes = 3 * kOutputs;
  static constexpr int kStageBytes = (kXBytes + kWordBytes + kSlices * kFactorBytes + 1023) / 1024 * 1024;
  static constexpr int kQuarter = kRows / 4;              // rows of a box of y
  static constexpr int kTurns = kRows == 256 ? 2 : 1;     // in which sums go to y
  static constexpr int kOutBytes = kRows * 128 / kTurns;  // of a consumer's outputs on their way there
  static constexpr int kStages = (226 * 1024 - kConsumers * kOutBytes) / kStageBytes;
  static constexpr int kBytes = kConsumers * kOutBytes + kStages * (kStageBytes + 16);  // with barriers
  static constexpr int kSums = kRows / 2;                                               // of a thread
};

template <int kStages>
struct Barriers {
  uint64_t full[kStages], empty[kStages];
};

struct Work {
  CUtensorMap x;                           // boxes of 64 inputs and the rows that a CTA copies
  CUtensorMap words;                       // [blocks][slices][256 pairs of bytes], boxes of a stage
  CUtensorMap y;                           // boxes of 64 outputs and some rows of a tile
  int slices, of_group;                    // of 32 inputs; those of a group
  int stages;                              // of a tile
  int row_tiles, output_tiles, per_group;  // tiles of clusters; row tiles that are next to each other
  int whole;                               // tiles that are not cut along K
  int parts, of_part;                      // items of each of the others, and their stages
  int items;                               // of all clusters: tiles and parts of tiles
  int share;        // CTAs of a tile of clusters, side by side in the outputs, which copy x for each other
  bool exchange;    // the CTAs of a cluster have a part each of a tile that is cut, a CTA's
  float4* partial;  // [tiles of CTAs that are cut][parts][kRows / 8][threads of the consumers]
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

struct Item {
  int tile, which;  // of clusters, the CTA's place in it
  int begin, end;   // stages
  int slot;         // of `partial`, for each CTA of the cluster; -1: none
  bool exchange;    // with the cluster's other CTAs, which have other stages
};
__device__ __forceinline__ Item find_item(const Work& w, int item, int rank, int size) {
  if (item < w.whole) return {item, rank, 0, w.stages, -1, false};
  const int slot = item - w.whole;
  if (w.exchange) {
    const int cut = slot / w.share;
    return {w.whole + cut, slot - cut * w.share, w.stages * rank / size, w.stages * (rank + 1) / size, -1, true};
  }
  const int cut = slot / w.parts, begin = (slot - cut * w.parts) * w.of_part;
  return {w.whole + cut, rank, begin, min(begin + w.of_part, w.stages), slot, false};
}

// Three warps: a lane copies x, a lane words, and all lanes of the third scales and zeros. Copies of the copy engine
// are few and large: four more of 1 KB in a stage, to L2 alone, cost a tenth.
constexpr int kArrivals = 1 + 1 + 32;

template <class S>
__device__ __forceinline__ void produce(const Int4Params& p, const Work& work, Barriers<S::kStages>& barriers,
                                        uint32_t shared, int warp, int lane, int rank, int size) {
  if (warp < 2 ? !wgmma::elect() : warp > 2) return;
  wgmma::Ring<S::kStages> ring;
  const int clusters = int(gridDim.x) / size;
  wait_for_previous();
  for (int item = int(blockIdx.x) / size; item < work.items; item += clusters) {
    const Item it = find_item(work, item, rank, size);
    const Place at = find_place(work, it.tile);
    const int tile = at.output * work.share + it.which;
    if (warp == 0) {
      // Boxes of x that are this CTA's to copy, and for how many
      const int share = S::kRows / work.share, first = it.exchange ? 0 : rank;
      const int last = it.exchange ? work.share : rank + 1, others = it.exchange ? 1 : size;
      const int row = at.row * S::kRows;
#pragma unroll 1
      for (int stage = it.begin; stage < it.end; ++stage) {
        uint64_t& full = barriers.full[ring.index];
        const uint32_t to = shared + ring.index * S::kStageBytes;
        wgmma::barrier_wait(barriers.empty[ring.index], ring.parity ^ 1);
        wgmma::barrier_arrive_expecting(full, S::kXBytes);
#pragma unroll 1
        for (int box = first; box < last; ++box)
#pragma unroll
          for (int i = 0; i < S::kInputs / 64; ++i) {
            const uint32_t target = to + i * S::kRows * 128 + box * share * 128;
            if (others == 1)
              wgmma::copy_box(target, work.x, full, stage * S::kInputs + i * 64, row + box * share, 0, 0);
            else
              wgmma::copy_box_to_all(target, work.x, full, stage * S::kInputs + i * 64, row + box * share, others);
          }
        ring.advance();
      }
    } else if (warp == 1) {
#pragma unroll 1
      for (int stage = it.begin; stage < it.end; ++stage) {
        uint64_t& full = barriers.full[ring.index];
        wgmma::barrier_wait(barriers.empty[ring.index], ring.parity ^ 1);
        wgmma::barrier_arrive_expecting(full, S::kWordBytes);
        wgmma::copy_box(shared + ring.index * S::kStageBytes + S::kXBytes, work.words, full, 0, stage * S::kSlices,
                        tile * S::kBlocks, 0);
        ring.advance();
      }
    } else {
      // A lane has 8 scales and 16 zeros
      const int n = tile * S::kOutputs + lane * 8, zero_n = n + lane * 8;
      const bool scales = lane < S::kOutputs / 8, has = n < p.n;
      const bool zeros = p.zeros && lane < S::kOutputs / 16 && zero_n < p.n;
      const uint32_t target = shared + S::kXBytes + S::kWordBytes + lane * 16;
      int slice = it.begin * S::kSlices, group = slice / work.of_group, in_group = slice - group * work.of_group;
#pragma unroll 1
      for (int stage = it.begin; stage < it.end; ++stage) {
        wgmma::barrier_wait(barriers.empty[ring.index], ring.parity ^ 1);
#pragma unroll
        for (int i = 0; i < S::kSlices; ++i, ++slice) {
          if (slice < work.slices && (in_group == 0 || (stage == it.begin && i == 0))) {
            const uint32_t to = target + ring.index * S::kStageBytes + i * S::kFactorBytes;
            const int64_t from = group * p.n;
            if (scales) cp_async<16>(to, static_cast<const char*>(p.scales) + (has ? (from + n) * 2 : 0), has);
            if (zeros) cp_async<16>(to + 2 * S::kOutputs, p.zeros + from + zero_n, true);
          }
          if (++in_group == work.of_group) in_group = 0, ++group;
        }
        wgmma::barrier_arrive_copies(barriers.full[ring.index]);
        ring.advance();
      }
      cp_async_wait<0>();
    }
  }
}

// Words j of 32 inputs [j][output] -> the fragments of their two products.
template <class F>
__device__ __forceinline__ void make_weights(const F& factors, const uint2 (&words)[4], int shift,
                                             uint32_t (&a)[2][4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int b = 0; b < 2; ++b)
      a[j / 2][b + j % 2 * 2] = factors.weights((b == 0 ? words[j].x : words[j].y) >> shift, b);
}

// A lane's sums of a tile: d[4 j + 2 h + e] is output n + h of row 8 j + e; rows begin .. end count. Each step goes
// over all of them, for what is unrolled here must stay small: with everything done for a pair at a time, 128 rows of
// code took longer to fetch than the products (30 us a tile).
template <class T, int kSums>
__device__ __forceinline__ void finish_tile(const Int4Params& p, int64_t row, int64_t n, int begin, int end,
                                            float (&d)[kSums]) {
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
      if (row + i / 2 * 8 + i % 2 < p.m && i / 2 * 8 >= begin && i / 2 * 8 < end) {
        const auto residual = load_vec<T, 2>(from + (i / 2 * 8 + i % 2) * p.n);
        d[i / 2 * 4 + i % 2] += to_float(residual.v[0]), d[i / 2 * 4 + 2 + i % 2] += to_float(residual.v[1]);
      }
    }
  }
}

// Sums of 8 rows each to the box [rows][64 outputs] in shared memory, in the swizzle of wgmma.cuh: lanes of a warp hit
// all banks.
template <class T, int kFirst, int kCount, int kSums>
__device__ __forceinline__ void stage_rows(unsigned char* box, int warp, int lane, const float (&d)[kSums]) {
  const int t = lane & 3, g = lane >> 2;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    unsigned char* const to = box + wgmma::swizzle128(2 * t + e, warp * 2 + g / 4) + g % 4 * 4;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int at = 4 * (kFirst + j) + e;
      store_vec(reinterpret_cast<T*>(to + j * 1024), Vec<T, 2>{from_float<T>(d[at]), from_float<T>(d[at + 2])});
    }
  }
}

// Sums of a tile that two CTAs have a part of each: each gets its half of the rows from the other, by way of its ring,
// which is free when both have come here.
template <class S>
__device__ __forceinline__ void exchange(unsigned char* ring, int thread, int rank, float (&sum)[S::kSums]) {
  constexpr int kHalf = S::kSums / 2, kConsuming = 128 * S::kConsumers;
  static_assert(kHalf * 4 * kConsuming <= S::kStages * S::kStageBytes);
  float4* const box = reinterpret_cast<float4*>(ring) + thread;
  wgmma::cluster_sync();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half == rank) continue;
#pragma unroll
    for (int j = 0; j < kHalf / 4; ++j) {
      const float* const d = sum + half * kHalf + 4 * j;
      wgmma::store_at(box + j * kConsuming, half, make_float4(d[0], d[1], d[2], d[3]));
    }
  }
  wgmma::cluster_sync();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half != rank) continue;
#pragma unroll
    for (int j = 0; j < kHalf / 4; ++j) {
      const float4 v = box[j * kConsuming];
      float* const d = sum + half * kHalf + 4 * j;
      d[0] += v.x, d[1] += v.y, d[2] += v.z, d[3] += v.w;
    }
  }
}

template <class S, class T, bool kSplit>
__device__ __forceinline__ void consume(const Int4Params& p, const Work& work, Barriers<S::kStages>& barriers,
                                        unsigned char* shared, unsigned char* out, int warp, int lane, int rank,
                                        int size) {
  const int t = lane & 3, g = lane >> 2, output = lane_output(warp, lane);
  const uint64_t x_base = wgmma::descriptor(smem_address(shared), 16);
  const unsigned char* const words = shared + S::kXBytes + warp / 2 * (S::kSlices * 512) + warp % 2 * 64 + g * 8;
  const unsigned char* const scales = shared + S::kXBytes + S::kWordBytes + 2 * output;
  const unsigned char* const zeros = shared + S::kXBytes + S::kWordBytes + 2 * S::kOutputs + output;

  bool alone = false;  // no other CTA copies to this one's ring
  auto release = [&](int index) {
    __syncwarp();
    if (lane < size) wgmma::barrier_arrive_at(barriers.empty[index], alone ? rank : lane);
  };
  wgmma::Ring<S::kStages> ring;
  const int clusters = int(gridDim.x) / size;
  for (int item = int(blockIdx.x) / size; item < work.items; item += clusters) {
    const Item it = find_item(work, item, rank, size);
    const Place at = find_place(work, it.tile);
    const int row = at.row * S::kRows, n = (at.output * work.share + it.which) * S::kOutputs;
    alone = it.exchange;
    float sum[S::kSums];
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) sum[i] = 0.f;
    wgmma::pin(sum);
    uint32_t a[2][2][4];
    Int4Factors<T, kSplit, 2> factors;
    int left = 0, span = work.of_group - it.begin * S::kSlices % work.of_group;  // slices of this group, of the next
    int before = -1;
    uint2 word[S::kSlices][4];
    auto load = [&] {  // of the stage that is next in the ring
      wgmma::barrier_wait(barriers.full[ring.index], ring.parity);
#pragma unroll
      for (int j = 0; j < 4 * S::kSlices; ++j)
        word[j / 4][j % 4] = *reinterpret_cast<const uint2*>(words + ring.index * S::kStageBytes + j * 128);
    };
    load();
#pragma unroll 1
    for (int stage = it.begin; stage < it.end; ++stage) {
      const int index = ring.index, base = index * S::kStageBytes;
      const uint64_t x = x_base + base / 16;
      ring.advance();
#pragma unroll
      for (int slice = 0; slice < S::kSlices; ++slice) {
        if (left == 0 && stage * S::kSlices + slice < work.slices) {  // beyond, x is 0
          const int from = base + slice * S::kFactorBytes;
          const uint32_t pair = *reinterpret_cast<const uint32_t*>(scales + from);
          factors.set([&](int) { return pair; }, p.zeros ? *reinterpret_cast<const uint16_t*>(zeros + from) : 0x0808u);
          left = span, span = work.of_group;
        }
        --left;
        make_weights(factors, word[slice], 4 * t, a[slice % 2]);
        if (slice == S::kSlices - 1 && stage + 1 < it.end) load();
        wgmma::fence();
#pragma unroll
        for (int step = 0; step < 2; ++step)
          wgmma::multiply_add<T, S::kRows, false>(sum, a[slice % 2][step],
                                                  x + slice / 2 * (S::kRows * 8) + slice % 2 * 4 + step * 2);
        wgmma::commit();
        wgmma::wait<1>();  // the slice before is done
        if (slice == 0 && before >= 0) release(before);
      }
      before = index;
    }
    wgmma::wait<0>();
    wgmma::pin(sum);
    release(before);

    if (it.slot >= 0) {
      float4* const to = work.partial + (int64_t(it.slot) * size + rank) * (S::kSums / 4 * 128 * S::kConsumers);
#pragma unroll
      for (int j = 0; j < S::kSums / 4; ++j)
        to[j * (128 * S::kConsumers) + warp * 32 + lane] =
            make_float4(sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]);
    } else {
      int begin = 0, end = 4;  // quarters of the rows
      if (it.exchange) exchange<S>(shared, warp * 32 + lane, rank, sum), begin = 2 * rank, end = begin + 2;
      finish_tile<T>(p, row + 2 * t, n + output, begin * S::kQuarter, end * S::kQuarter, sum);
      const bool issues = warp % 4 == 0 && lane == 0;
      unsigned char* const box = out + warp / 4 * S::kOutBytes;
      constexpr int kOf = 4 / S::kTurns;  // quarters of a turn
      auto quarter = [&]<int kQuarter>(std::integral_constant<int, kQuarter>) {
        constexpr int kCount = S::kQuarter / 8;
        if (kQuarter >= begin && kQuarter < end)
          stage_rows<T, kQuarter * kCount, kCount>(box + kQuarter % kOf * (S::kQuarter * 128), warp % 4, lane, sum);
      };
      auto turn = [&]<int kTurn, int... kQuarter>(std::integral_constant<int, kTurn>,
                                                  std::integer_sequence<int, kQuarter...>) {
        const int first = max(begin, kTurn * kOf), last = min(end, (kTurn + 1) * kOf);
        if (first >= last) return;
        if (issues) wgmma::wait_stores<true>();  // what was there has been read
        wgmma::named_sync(1 + warp / 4, 128);
        (quarter(std::integral_constant<int, kTurn * kOf + kQuarter>()), ...);
        wgmma::fence_async_proxy();
        wgmma::named_sync(1 + warp / 4, 128);
        if (!issues) return;
        for (int q = first; q < last; ++q)
          wgmma::store_box(work.y, smem_address(box) + q % kOf * (S::kQuarter * 128), n + warp / 4 * 64,
                           row + q * S::kQuarter);
      };
      [&]<int... kTurn>(std::integer_sequence<int, kTurn...>) {
        (turn(std::integral_constant<int, kTurn>(), std::make_integer_sequence<int, kOf>()), ...);
      }(std::make_integer_sequence<int, S::kTurns>());
    }
  }
  wgmma::wait_stores<false>();
}

#endif

template <class S, class T, bool kSplit>
__global__ void __launch_bounds__(S::kThreads, 1)
    int4_many_kernel(const __grid_constant__ Int4Params p, const __grid_constant__ Work work) {
#ifdef PAGEDKV_WGMMA
  extern __shared__ __align__(1024) unsigned char out[];
  unsigned char* const shared = out + S::kConsumers * S::kOutBytes;
  auto& barriers = *reinterpret_cast<Barriers<S::kStages>*>(shared + S::kStages * S::kStageBytes);
  const int lane = threadIdx.x & 31;
  const int warp = __shfl_sync(~0u, int(threadIdx.x >> 5), 0);  // tells the compiler that it is uniform
  const int rank = wgmma::cluster_rank(), size = wgmma::cluster_size();
  release_next();
  if (threadIdx.x == 0) {
    wgmma::prefetch_map(work.x), wgmma::prefetch_map(work.words), wgmma::prefetch_map(work.y);
    for (int i = 0; i < S::kStages; ++i) {
      wgmma::barrier_init(barriers.full[i], kArrivals);
      wgmma::barrier_init(barriers.empty[i], 4 * S::kConsumers * size);
    }
    wgmma::fence_barriers();
  }
  wgmma::cluster_sync();
  if (warp < 4) {
    wgmma::give_registers<S::kProducerRegisters>();
    produce<S>(p, work, barriers, smem_address(shared), warp, lane, rank, size);
  } else {
    wgmma::take_registers<S::kConsumerRegisters>();
    consume<S, T, kSplit>(p, work, barriers, shared, out, warp - 4, lane, rank, size);
  }
  // In exchange() all threads of a cluster meet twice, and nothing of another CTA comes here afterwards. Else the other
  // CTA of the cluster may still arrive here.
  const int clusters = int(gridDim.x) / size, first = int(blockIdx.x) / size;
  const bool exchanges = work.exchange && first + (work.items - 1 - first) / clusters * clusters >= work.whole;
  if (exchanges && warp < 4) {
    __syncwarp();
    wgmma::cluster_sync();
    wgmma::cluster_sync();
  }
  if (!exchanges && size > 1) wgmma::cluster_sync();
#endif
}

// The sums of tiles that were cut along K, in the order of their inputs. One CTA for 8 rows of a CTA's tile, whose
// threads have the outputs of the consumers.
template <class S, class T>
__global__ void __launch_bounds__(128 * S::kConsumers)
    reduce_kernel(const __grid_constant__ Int4Params p, const __grid_constant__ Work work, int size) {
  const int cut = int(blockIdx.x) / size, rank = int(blockIdx.x) - cut * size;
  const int j = int(blockIdx.y), thread = int(threadIdx.x);
  release_next();
  wait_for_previous();
  constexpr int kPart = S::kSums / 4 * 128 * S::kConsumers;
  const float4* const from = work.partial + (int64_t(cut) * work.parts * size + rank) * kPart + thread;
  float4 sum = {};
#pragma unroll 4
  for (int i = 0; i < work.parts; ++i) {
    const float4 v = from[int64_t(i) * size * kPart + j * (128 * S::kConsumers)];
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  const Place at = find_place(work, work.whole + cut);
  const int64_t n = int64_t(at.output * size + rank) * S::kOutputs + lane_output(thread / 32, thread % 32);
  const int64_t row = int64_t(at.row) * S::kRows + 8 * j + 2 * (thread & 3);
  float even[2] = {sum.x, sum.z}, odd[2] = {sum.y, sum.w};
  store_outputs<T, 2>(p, row, n, even);
  store_outputs<T, 2>(p, row + 1, n, odd);
}

// Kinds of tiles, and their times in us on an H200: of a tile with 4096 inputs, of an exchange.
struct Kind {
  int rows, consumers;
  double tile, exchange;
};
constexpr Kind kKinds[] = {{256, 2, 39.5, 2.6}, {128, 2, 24, 2.1}, {128, 3, 35, 2.8}, {64, 2, 20.5, 1.2}};

// How a product is cut up: tiles, CTAs of a cluster, and the parts that K is cut into in the tiles of the last,
// unfilled round, with or without an exchange. Whole tiles of clusters are of `share` CTAs, all of the cluster, which
// pays where many tiles of the same x are under way: 305 us for 324 at 2048 x 14336 x 4096, but 62 for 60 at 128 x
// 28672 x 4096.
struct Cut {
  const Kind* kind = nullptr;
  int size = 1, share = 1, parts = 1;
  bool exchange = false;
};
Cut choose(const Int4Params& p, const Int4Device& device) {
  Cut best;
  double least = 0;
  const auto consider = [&](const Cut& by, double time) {
    if (!best.kind || time < least) best = by, least = time;
  };
  for (const Kind& kind : kKinds)
    for (const int share : {1, 2}) {
      const int outputs = 64 * kind.consumers;
      const bool pairs = device.has_clusters && kind.rows == 256 && p.m > 256 && p.n > outputs;
      if (share == 2 ? !pairs : pairs && p.m > 512) continue;
      const double tile = double(p.k) / 4096 * kind.tile;
      const int64_t row_tiles = ceil_div(p.m, kind.rows), tiles = row_tiles * ceil_div(p.n, outputs * share);
      const int64_t clusters = std::max(1, device.sms / share), left = tiles % clusters, whole = tiles / clusters;
      for (int parts = 1; parts <= (left > 0 ? 8 : 1) && (parts == 1 || p.k >= 512 * parts); ++parts) {
        const double megabytes = double(left * parts * share) * kind.rows * outputs * 4e-6;
        consider({&kind, share, share, parts, false},
                 tile * (double(whole) + double(ceil_div(left * parts, clusters)) / parts) +
                     (parts > 1 ? 0.7 + 0.47 * megabytes : 0));
      }
      // A cluster for each tile that is cut, and whole tiles of clusters of that size
      if (device.has_clusters && p.k_padded >= 256 && left > 0 && (share == 2 || whole == 0) &&
          left * share <= device.sms / 2)
        consider({&kind, 2, share, 2, true}, tile * (double(whole) + 0.5) + kind.exchange);
    }
  return best;
}

template <class S, class T, bool kSplit>
bool launch(const Int4Params& p, const Tensor& like, const Int4Device& device, const Cut& by, cudaStream_t stream) {
  const int size = by.size, clusters = std::max(1, device.sms / size);
  Work work{};
  const int64_t row_tiles = ceil_div(p.m, S::kRows), output_tiles = ceil_div(p.n, S::kOutputs * by.share);
  const int64_t slices = p.k_padded / kInt4Block;
  if (!describe_tensor(work.words, p.packed, 256,
                       {{slices, 512, S::kSlices}, {ceil_div(p.n, kInt4Block), slices * 512, S::kBlocks}, {1, 16, 1}},
                       false) ||
      !describe_tensor(work.x, p.x, p.k_padded, {{p.m, p.x_stride * 2, S::kRows / by.share}, {1, 16, 1}, {1, 16, 1}}) ||
      !describe_tensor(work.y, p.y, p.n, {{p.m, p.n * 2, S::kQuarter}, {1, 16, 1}, {1, 16, 1}}))
    return false;
  work.slices = int(slices), work.stages = (work.slices + S::kSlices - 1) / S::kSlices;
  work.of_group = p.group >= p.k ? S::kSlices * work.stages : int(p.group / kInt4Block);
  work.row_tiles = int(row_tiles), work.output_tiles = int(output_tiles);
  work.per_group = 2048 / S::kRows;
  const int64_t tiles = row_tiles * output_tiles;
  work.of_part = int(ceil_div(work.stages, std::min(by.parts, work.stages)));
  work.parts = by.exchange ? by.share : int(ceil_div(work.stages, work.of_part));
  work.whole = int(by.parts == 1 ? tiles : by.share < size ? 0 : tiles / clusters * clusters);
  work.share = by.share, work.exchange = by.exchange;
  const int64_t cut = tiles - work.whole;
  work.items = int(work.whole + cut * work.parts);
  Tensor workspace = like;
  if (cut > 0 && !by.exchange) {
    workspace = torch::stable::new_empty(like, {cut * size * work.parts * S::kRows * S::kOutputs}, ScalarType::Float);
    work.partial = static_cast<float4*>(workspace.mutable_data_ptr());
  }
  const auto kernel = int4_many_kernel<S, T, kSplit>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes));
  launch_clusters(size, kernel, dim3(unsigned(size * std::min(clusters, work.items))), S::kThreads, S::kBytes, stream,
                  p, work);
  if (cut > 0 && !by.exchange)
    launch_kernel(reduce_kernel<S, T>, dim3(unsigned(cut * size), unsigned(S::kRows / 8)), 128 * S::kConsumers, 0,
                  stream, p, work, size);
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
  if (!d.has_wgmma || int4_is_small(p, d.sms)) return false;
  const Cut by = choose(p, d);
  bool done = false;
  const auto run = [&]<size_t kKind>(std::integral_constant<size_t, kKind>) {
    if (by.kind != &kKinds[kKind]) return;
    using S = Shape<kKinds[kKind].rows, kKinds[kKind].consumers>;
    if constexpr (!kHalf)
      if (p.scale_type == ScalarType::Half) return void(done = launch<S, T, true>(p, like, d, by, stream));
    done = launch<S, T, false>(p, like, d, by, stream);
  };
  [&]<size_t... kKind>(std::index_sequence<kKind...>) {
    (run(std::integral_constant<size_t, kKind>()), ...);
  }(std::make_index_sequence<std::size(kKinds)>());
  return done;
}

}  // namespace pagedkv
