// Paged attention for few query rows a KV head over int8 and fp8 (e4m3) caches, 16-bit queries: paged_decode.cuh for
// caches of half the bytes, for which its instructions are too many.
//
// The plan, the warps' blocks of 16 keys and their pipelines of cp.async are those of paged_decode.cuh. A tile is
// turned around: keys are the rows of mma.m16n8k16 and the query rows its 8 columns, so that a GQA group of up to 8
// heads takes half the products, half the softmax and half the registers that 16 rows would (kTiles 2 has 16 rows in
// two tiles).
//     S^T [16 keys, 8 rows] += K [16 keys, 16 dims] Q^T, a k-step for each 16-byte chunk of a key
//     O^T [16 dims, 8 rows] += V^T [16 dims, 16 keys] P^T, a tile of dimensions for each chunk
// 8-bit numbers stay so in shared memory. ldmatrix moves pairs of bytes: of a chunk of K a lane gets dimensions 4t ..
// 4t + 3 of keys g and g + 8 where the operand wants 2t, 2t + 1, 2t + 8, 2t + 9, so Q is stored with its dimensions
// permuted to match. Of a chunk of V (.trans) it gets dimensions 2g, 2g + 1 of keys 2t, 2t + 1, 2t + 8, 2t + 9: the
// even dimensions become rows 0 .. 7 of the operand, the odd ones rows 8 .. 15. S^T becomes P^T's operand by movmatrix.
//
// Conversion to fp16 is exact. K of int8: the byte x + 128, with zeros in front, is the subnormal fp16 number
// (x + 128) / 2^24, so one permutation makes two numbers; the accumulator starts at minus what a key of zeros (bytes of
// 128) gives, computed once by the same products. For V that would lose bits, since a long sum of 128s stays in O:
// 0x6400 | byte is 1152 + x, and 1152 is subtracted. fp8: the hardware's conversion.
//
// A query of bfloat16 is scaled, row by row, to below 4 by a power of two, exactly as far as fp16 reaches. The scales
// of K multiply logits. Those of V multiply P in float32, relative to the largest one so far, and times 256 to keep
// small weights out of fp16's subnormal numbers. The maximum that exponents are relative to moves only when a logit
// exceeds it by 2^kSlack: P may reach 2^kSlack, which fp16 has room for, and nearly every block goes without the
// reduction over lanes and the scaling of O (one vote finds out, for V's scales, too).
//
// Scales lie [token, head], so a warp uses 4 of the 32 bytes that it fetches for each; the rest is for warps that work
// at other heads of the same sequence. K and V therefore give way in L2 (evict_first): without, 645 MB came from memory
// for 554 (32 x 8192, 8 heads of 128), with, 538.
//
// Shared memory: kWarps x kStages x (16 K rows, 16 V rows, scales [key % 8][K, V][key / 8]), then Q, then softmax
// states. When a run ends, a warp's slots hold its O for the merge. Registers at kDim 128, one tile: O 32, Q 32 / 2,
// S 8.
//
// Floor: bytes of K, V and scales / memory bandwidth (4.28 TB/s on an H200): 129 us at 32 x 8192. Per 16 keys of 128
// dimensions and a warp: 343 instructions, 627 in paged_decode.cuh's form, with a part of 90 of the copies (190 before:
// half a warp copies 8 keys, so a lane needs one page; what a lane keeps is kept from being computed again, 42 fewer).
// Without computing, 132 us at 32 x 8192 and 126 without the scales; with scales [head, token], 132.1 for 132.4. L2
// fetching 256 bytes at a time reads other heads for nothing: 192 us for 141.5 with 32 heads.
// Tried: 4 CTAs of 2 slots a warp for many items (128 registers, 220 bytes spilled outside of the loop). In one
// process, us, int8, those and 2 CTAs of 5 slots: 32 heads 32 x 2048 158 and 140, x 512 52 and 42, 128 x 1024 84.6
// and 72.4 (warps on their own all three), 64 ragged of 2048 83 and 77.5. There the price of starting with an item
// counts: 16 units of the plan's line for it, as for caches of 16 bits, 85, 32 (the same bytes) 77.5, 64 86. 3 CTAs of
// 3: 32 x 8192 140.5 for 134, ragged 90. Beside caches of bfloat16 in one run, us, int8: 32 x 8192 135 (247), 32 x
// 4096 70.5 (128), 32 heads 32 x 2048 140 (243), 64 ragged 77 (132).
#pragma once

#include "paged_decode.cuh"

namespace pagedkv {

template <int kDim, int kTiles>
struct QuantizedLayout {
  static_assert(kDim % 32 == 0 && kDim <= 256 && (kTiles == 1 || kTiles == 2));
  static constexpr int kWarps = kDecodeWarps;
  static constexpr int kRows = 8 * kTiles;         // query rows
  static constexpr int kKeys = 16;                 // a slot's keys
  static constexpr int kChunks = kDim / 16;        // 16-byte chunks of a key
  static constexpr int kTileBytes = kKeys * kDim;  // K or V
  static constexpr int kSlotBytes = 2 * kTileBytes + 2 * kKeys * 4;
  // CTAs a multiprocessor that registers and shared memory are sized for, and the slots of a warp.
  static constexpr int kResident = kDim <= 64 ? 3 : kDim * kTiles <= 256 ? 2 : 1;
  static constexpr int kStages = kDim <= 32 ? 6 : kDim <= 64 ? 3 : kDim <= 128 ? 5 : 3;
  static constexpr int kWarpBytes = kStages * kSlotBytes;
  static constexpr bool kQueryInRegisters = kDim * kTiles <= 256;
  static constexpr int kQueryBytes = kRows * kDim * 2;
  static_assert(kSlotBytes % 128 == 0 && kRows * part_row<kDim> * 4 <= kWarpBytes);
  static_assert(!kQueryInRegisters || kQueryBytes <= kSlotBytes);  // where warps on their own keep it first

  static constexpr int bytes(int warps) {
    return warps * kWarpBytes + kQueryBytes + kWarps * kRows * 4 + kWarps * int(sizeof(Part)) +
           int(sizeof(PlanScratch));
  }
};

// Four stored numbers of a key -> two pairs of fp16, times 1 / kUnit, plus those of kMinusZero's negative.
template <KVType kKV>
struct KeyNumbers;
template <>
struct KeyNumbers<KVType::kInt8> {
  static constexpr float kUnit = 0x1p24f;
  static constexpr uint32_t kMinusZero = 0x80808080u;  // -128 / 2^24, twice
  static __device__ __forceinline__ void convert(uint32_t bytes, uint32_t& first, uint32_t& second) {
    const uint32_t above = bytes ^ 0x80808080u;
    first = __byte_perm(above, 0u, 0x4140);
    second = __byte_perm(above, 0u, 0x4342);
  }
};
template <>
struct KeyNumbers<KVType::kFp8> {
  static constexpr float kUnit = 1.f;
  static constexpr uint32_t kMinusZero = 0;
  static __device__ __forceinline__ void convert(uint32_t bytes, uint32_t& first, uint32_t& second) {
    dequantize4<__half, KVType::kFp8, true>(bytes, first, second);
  }
};

// The address of chunk c + s of a row of a swizzled tile, from that of chunk c, where c < 2 and s is even; the tile
// starts at a multiple of 128 bytes.
template <int kChunks>
__device__ __forceinline__ uint32_t chunk_at(uint32_t address, int s) {
  constexpr int kMask = kChunks % 8 == 0 ? 7 : kChunks % 4 == 0 ? 3 : 0;
  return (address ^ ((s & kMask) * 16)) + (s & ~kMask) * 16;
}
// The same from row r to row r + i, where neither sum of bits carries.
template <int kChunks>
__device__ __forceinline__ uint32_t row_at(uint32_t address, int i) {
  return (address ^ (swizzle<kChunks>(i, 0) % kChunks * 16)) + i * kChunks * 16;
}

// Hides from the compiler how x came about, so that it stays in registers and is not computed again where it is used.
__device__ __forceinline__ void keep(uint32_t& x) { asm volatile("mov.b32 %0, %1;" : "=r"(x) : "r"(x)); }
__device__ __forceinline__ void keep(const uint8_t*& x) { asm volatile("mov.b64 %0, %1;" : "=l"(x) : "l"(x)); }

template <class T, KVType kKV, int kDim, int kTiles>
__global__ void __launch_bounds__(32 * kDecodeWarps, QuantizedLayout<kDim, kTiles>::kResident)
    paged_decode_quantized_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Plan plan,
                                  const DecodeAccess access) {
  using L = QuantizedLayout<kDim, kTiles>;
  using Key = KeyNumbers<kKV>;
  constexpr bool kScaledQuery = !std::is_same_v<T, __half>;
  constexpr float kWeight = 256.f, kSlack = 6.f;
  constexpr int kSteps = kDim / 16;
  constexpr bool kSolo = L::kQueryInRegisters;

  begin_planned(p, plan);
  extern __shared__ __align__(128) uint8_t shared[];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  uint8_t* const my_slots = shared + warp * L::kWarpBytes;
  float* query_scales = reinterpret_cast<float*>(shared + warps * L::kWarpBytes + L::kQueryBytes);
  Part* const parts = reinterpret_cast<Part*>(query_scales + L::kWarps * L::kRows);
  PlanScratch& scratch = *reinterpret_cast<PlanScratch*>(parts + L::kWarps);

  const uint32_t slots = smem_address(my_slots), last_slot = slots + (L::kStages - 1) * L::kSlotBytes;
  const Logit logit(p);
  const int64_t k_row = p.k_stride_t, v_row = p.v_stride_t;
  const uint32_t scale_row = uint32_t(p.num_kv_heads) * 4, scale_block = scale_row << p.block_shift;
  const uint64_t once = read_once();

  // Copies: half a warp takes 8 keys, this lane the chunk copy_chunk of key copy_row (and of others) and a scale.
  const int half = lane / 16, copy_row = lane % 16 / L::kChunks, copy_chunk = lane % 16 % L::kChunks;
  uint32_t copy_to = swizzle<L::kChunks>(8 * half + copy_row, copy_chunk) * 16;
  uint32_t scale_to = 2 * L::kTileBytes + lane % 8 * 16 + (lane & 8) + half * 4;
  uint32_t matrix_at = swizzle<L::kChunks>(lane % 16, half) * 16;  // what this lane points ldmatrix at
  keep(copy_to), keep(scale_to), keep(matrix_at);

  // Warps on their own have their queries in the slot that is filled last, until they are in registers.
  Stretch stretch = plan_stretch<kSolo>(p, plan, scratch);
  const bool solo = kSolo && stretch.solo;
  const int crew = solo ? 1 : warps, mate = solo ? 0 : warp;  // warps that share a run, and which one this is
  uint8_t* const query_tile = solo ? my_slots + (L::kStages - 1) * L::kSlotBytes : shared + warps * L::kWarpBytes;
  const uint32_t query_at = smem_address(query_tile);
  if (solo) query_scales += warp * L::kRows;
  int pending = 0;
#pragma unroll 1
  while (stretch.left > 0) {
    const Run run = next_run(p, plan, stretch);
    // ---- this warp's blocks of 16 keys
    const int begin = max(run.key_begin, run.seen.lo & ~(L::kKeys - 1)) + (my_rank(plan) * crew + mate) * L::kKeys;
    const int step = (crew << plan.team_shift) * L::kKeys;
    const int behind = run.key_end - begin + step - 1;  // 0 blocks where it is too small
    const int blocks = begin < run.key_end ? (solo ? behind / L::kKeys : access.by_step(behind)) : 0;
    const uint32_t readable = uint32_t(run.key_end - run.seen.lo);  // keys from run.seen.lo on
    const uint8_t* const k_base = static_cast<const uint8_t*>(p.k) + run.kv_head * p.k_stride_h;
    const uint8_t* const v_base = static_cast<const uint8_t*>(p.v) + run.kv_head * p.v_stride_h;
    const uint8_t* k_lane = k_base + copy_row * k_row + copy_chunk * 16;
    const uint8_t* v_lane = v_base + copy_row * v_row + copy_chunk * 16;
    const uint8_t* scales_lane = reinterpret_cast<const uint8_t*>((lane & 8 ? p.v_scale : p.k_scale) + run.kv_head);
    keep(k_lane), keep(v_lane), keep(scales_lane);

    // Pages of 16 of the warp's blocks at a time, one load ahead of their use and unchecked until then (a test beside
    // the load would wait for it): lane l holds the page of block first + l % 16, of its keys 0 .. 7 or 8 .. 15.
    const int* const table = p.block_tables + int64_t(run.seq) * p.table_stride;
    auto load_pages = [&](int first) {
      const int key = begin + (first + lane % 16) * step + 8 * half;
      return key < run.key_end ? table[key >> p.block_shift] : -1;
    };
    int page_ids = load_pages(0), next_ids = load_pages(16);

    uint32_t pageless = 0;  // 2 bits a block, the latest lowest: whether its first and last 8 keys have no page
    // Block `block` of the warp, keys from `first` on. All of it is valid nearly every time. Otherwise keys outside of
    // [lo, end) or without a page become zeros, since 0 * NaN is NaN.
    auto fill_slot = [&](uint32_t slot, int block, int first) {
      const int key = first + 8 * half;
      const int found = __shfl_sync(0xffffffffu, page_ids, block % 16 + 16 * half);
      const bool usable = uint32_t(found) < uint32_t(p.num_blocks);
      const uint32_t page = usable ? found : 0, at = key & (p.block_size - 1);
      const bool valid = usable && uint32_t(key + lane % 8 - run.seen.lo) < readable;
      const int64_t k_at = page * p.k_stride_block + at * k_row, v_at = page * p.v_stride_block + at * v_row;
      pageless <<= 2;
      if (__all_sync(0xffffffffu, valid && access.wide)) {
        const uint32_t to = slot + copy_to;
        if constexpr (16 % L::kChunks == 0) {
          constexpr int kRows = 16 / L::kChunks;  // a pass
          const uint8_t *k = k_lane + k_at, *v = v_lane + v_at;
          const bool within = copy_chunk * 16 < p.head_dim;
#pragma unroll
          for (int i = 0; i < 8; i += kRows) {
            cp_async_stream < kDim<128 ? 64 : 128>(row_at<L::kChunks>(to, i), k, within, once);
            cp_async_stream < kDim<128 ? 64 : 128>(row_at<L::kChunks>(to, i) + L::kTileBytes, v, within, once);
            k += kRows * k_row, v += kRows * v_row;
          }
        } else {
#pragma unroll
          for (int i = 0; i < L::kChunks / 2; ++i) {
            const int e = lane % 16 + 16 * i, r = e / L::kChunks, c = e % L::kChunks;
            const uint32_t to_chunk = slot + swizzle<L::kChunks>(8 * half + r, c) * 16;
            const bool within = c * 16 < p.head_dim;
            cp_async_stream < kDim<128 ? 64 : 128>(to_chunk, k_base + k_at + r * k_row + c * 16, within, once);
            cp_async_stream <
                kDim<128 ? 64 : 128>(to_chunk + L::kTileBytes, v_base + v_at + r * v_row + c * 16, within, once);
          }
        }
      } else {
        const uint32_t without = __ballot_sync(0xffffffffu, !usable);
        pageless |= (without & 1) | (without >> 16 & 1) << 1;
        const uint32_t rows = __ballot_sync(0xffffffffu, valid) >> (16 * half);
#pragma unroll 1
        for (int e = lane % 16; e < 8 * 2 * L::kChunks; e += 16) {
          const int r = e / (2 * L::kChunks), c = e % (2 * L::kChunks);  // 8 bytes: rows may be aligned to no more
          const uint32_t to = slot + swizzle<L::kChunks>(8 * half + r, c / 2) * 16 + c % 2 * 8;
          const bool within = (rows >> r & 1) && c * 8 < p.head_dim;
          cp_async<8>(to, k_base + k_at + r * k_row + c * 8, within);
          cp_async<8>(to + L::kTileBytes, v_base + v_at + r * v_row + c * 8, within);
        }
      }
      cp_async_line<4>(slot + scale_to,
                       scales_lane + uint64_t(page) * scale_block + uint64_t(at + lane % 8) * scale_row, valid);
    };

    // ---- Q's rows, every crew-th one to this warp: loads fly while the pipeline is filled
    constexpr int kWords = (kDim / 2 + 31) / 32, kMine = kSolo ? 4 : L::kRows / L::kWarps;
    uint32_t words[kMine][kWords];
    auto read_query = [&](int r, uint32_t (&out)[kWords]) {
      const int64_t row = r < run.rows ? run.query_row(p, plan, r) : -1;
      const uint16_t* const q =
          static_cast<const uint16_t*>(p.q) + max(row, int64_t(0)) * p.q_stride_t + run.head(plan, r) * p.q_stride_h;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int pair = lane + 32 * i;
        out[i] = 0;
        if (row < 0 || 2 * pair >= p.head_dim) continue;
        out[i] = access.query_pairs ? *reinterpret_cast<const uint32_t*>(q + 2 * pair)
                                    : uint32_t(q[2 * pair]) | uint32_t(q[2 * pair + 1]) << 16;
      }
    };
    auto store_query = [&](int r, uint32_t (&in)[kWords]) {
      if constexpr (kScaledQuery) {
        auto low = [](uint32_t w) { return __uint_as_float(w << 16); };
        auto high = [](uint32_t w) { return __uint_as_float(w & 0xffff0000u); };
        float largest = 0.f;
#pragma unroll
        for (int i = 0; i < kWords; ++i) largest = fmaxf(largest, fmaxf(fabsf(low(in[i])), fabsf(high(in[i]))));
        for (int d = 16; d > 0; d /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, d));
        const uint32_t exponent = min(max(__float_as_uint(largest) >> 23, 1u), 253u);
        const float scale = __uint_as_float((254 - exponent) << 23);
        if (r < L::kRows && lane == 0) query_scales[r] = __uint_as_float(exponent << 23);
#pragma unroll
        for (int i = 0; i < kWords; ++i) in[i] = pack2<__half>(low(in[i]) * scale, high(in[i]) * scale);
      }
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int pair = lane + 32 * i;
        if (r >= L::kRows || 2 * pair >= kDim) continue;
        const int at = (pair & ~7) + (pair & 7) / 2 + 4 * (pair & 1);
        *reinterpret_cast<uint32_t*>(query_tile + swizzle<kDim / 8>(r, at / 4) * 16 + at % 4 * 4) = in[i];
      }
    };
#pragma unroll
    for (int u = 0; u < kMine; ++u) read_query(mate + u * crew, words[u]);
#pragma unroll 1
    for (int i = 0; i < L::kStages - 1; ++i) {
      if (i < blocks)
        fill_slot(slots + i * L::kSlotBytes, i, begin + i * step);
      else
        pageless <<= 2;
      cp_async_commit();
    }
#pragma unroll
    for (int u = 0; u < kMine; ++u) store_query(mate + u * crew, words[u]);
#pragma unroll 1
    for (int r = mate + kMine * crew; r < L::kRows; r += crew) {  // fewer warps
      read_query(r, words[0]);
      store_query(r, words[0]);
    }
    meet_crew(solo);

    auto load_query = [&](uint32_t (&b)[4], int n, int s) {  // tile n, k-steps s and s + 1
      ldmatrix_x4(b, query_at + swizzle<kDim / 8>(8 * n + lane % 8, 2 * s + lane / 8) * 16);
    };
    constexpr int kLoads = kTiles * kSteps / 2;  // of Q
    uint32_t q[L::kQueryInRegisters ? kLoads : 1][4];
    float zero[kTiles][4] = {};  // minus what a key of zeros gives
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      auto& b = q[L::kQueryInRegisters ? i : 0];
      load_query(b, i % kTiles, i / kTiles * 2);
      if constexpr (Key::kMinusZero != 0) {
        const uint32_t a[4] = {Key::kMinusZero, Key::kMinusZero, Key::kMinusZero, Key::kMinusZero};
        mma_16816<__half>(zero[i % kTiles], a, b[0], b[1]);
        mma_16816<__half>(zero[i % kTiles], a, b[2], b[3]);
      }
    }

    // ---- this lane's rows, 2t and 2t + 1 of each tile. Element e of a tile of S^T: key g + 8 * (e / 2), row e % 2.
    KeyRange seen[kTiles][2];
    int position[kTiles][2];
    float slope[kTiles][2], row_mul[kTiles][2];
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const int n = i / 2, h = i % 2, r = 8 * n + 2 * t + h;
      position[n][h] = run.position(plan, r);
      seen[n][h] = r < run.rows ? visible_keys(p, position[n][h], run.keys) : KeyRange{0, 0};
      row_mul[n][h] = kScaledQuery ? query_scales[r] : 1.f;
      slope[n][h] = p.alibi_slopes && r < run.rows ? p.alibi_slopes[run.head(plan, r)] * kLog2e : 0.f;
    }
    // Blocks that begin in [plain_lo, plain_hi] are seen whole by all of the run's rows (then rows that pad the tile
    // see them, too: their results go nowhere), and their logits are products times a number.
    const bool plain = logit.cap <= 0 && !p.alibi_slopes;
    const int plain_lo = plain ? visible_keys(p, run.position(plan, run.rows - 1), run.keys).lo : INT_MAX;
    const int plain_hi = visible_keys(p, run.position(plan, 0), run.keys).hi - L::kKeys;

    float o[kTiles][kSteps][4] = {};
    // Exponents are those of the logit + bottom; slack is how far that may rise, -infinity while bottom is unknown.
    // Rows that pad the tile never ask for a move: a sequence's bits must not depend on kTiles.
    float bottom[kTiles][2] = {}, slack[kTiles][2], sum[kTiles][2] = {};
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i)
      slack[i / 2][i % 2] = 8 * (i / 2) + 2 * t + i % 2 < run.rows ? kNegInf : -kNegInf;
    float unit = 1e-30f,
          weight = kWeight / unit;  // o counts in unit / kWeight, the largest |V scale| so far being unit

    auto attend = [&](uint32_t slot, int key) {
      const uint32_t matrices = slot + matrix_at;
      float x[kTiles][4], y[kTiles][4] = {};
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) x[i / 4][i % 4] = zero[i / 4][i % 4];
#pragma unroll
      for (int s = 0; s < kSteps; s += 2) {  // two chunks, keys 0 .. 7 and 8 .. 15 of each
        uint32_t b[4], a[2][4];
        ldmatrix_x4(b, chunk_at<L::kChunks>(matrices, s));
#pragma unroll
        for (int i = 0; i < 4; ++i) Key::convert(b[i], a[i / 2][i % 2], a[i / 2][i % 2 + 2]);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          auto& w = q[L::kQueryInRegisters ? s / 2 * kTiles + n : 0];
          if constexpr (!L::kQueryInRegisters) load_query(w, n, s);
          mma_16816<__half>(x[n], a[0], w[0], w[1]);
          mma_16816<__half>(y[n], a[1], w[2], w[3]);
        }
      }

      // ---- logits: x times mul
      const float4 scales =  // of K: keys g and g + 8; of V
          *reinterpret_cast<const float4*>(my_slots + (slot - slots) + 2 * L::kTileBytes + g * 16);
      float mul[kTiles][4];
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) {
        const int n = i / 4, e = i % 4;
        x[n][e] += y[n][e];
        mul[n][e] = logit.mul * Key::kUnit * (e < 2 ? scales.x : scales.y);
        if constexpr (kScaledQuery) mul[n][e] *= row_mul[n][e % 2];
      }
      const uint32_t no_page = pageless >> (2 * (L::kStages - 1)) & 3;
      if (no_page || key < plain_lo || key > plain_hi) {
#pragma unroll
        for (int i = 0; i < 4 * kTiles; ++i) {
          const int n = i / 4, e = i % 4, h = e % 2, pos = key + g + 8 * (e / 2);
          x[n][e] *= mul[n][e], mul[n][e] = 1.f;
          if (logit.cap > 0) x[n][e] = logit.capped(x[n][e]);
          x[n][e] += slope[n][h] * float(pos - position[n][h]);
          // no test against key_end: it is a multiple of 16, or nothing is visible from there on
          const bool visible = !(no_page >> (e / 2) & 1) && pos >= seen[n][h].lo && pos < seen[n][h].hi;
          if (!visible) x[n][e] = kNegInf;
        }
      }

      // ---- exponents, relative to a new maximum where they rose too far
      const float largest = fmaxf(fabsf(scales.z), fabsf(scales.w));
      bool move = largest > unit;
      float d[kTiles][4];
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const int n = i / 2, h = i % 2;
#pragma unroll
        for (int e = h; e < 4; e += 2) d[n][e] = fmaf(x[n][e], mul[n][e], bottom[n][h]);
        move = move || fmaxf(d[n][h], d[n][h + 2]) > slack[n][h];
      }
      if (__any_sync(0xffffffffu, move)) {
        auto over_keys = [](float a) {  // the maximum over the lanes of a row
#pragma unroll
          for (int s = 4; s < 32; s *= 2) a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, s));
          return a;
        };
        const float new_unit = over_keys(fmaxf(unit, largest)), units = unit / new_unit;
        unit = new_unit;
        weight = kWeight / unit;
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) {
          const int n = i / 2, h = i % 2;
          const float top = slack[n][h] == kNegInf ? kNegInf : -bottom[n][h];
          const float now = fmaxf(top, over_keys(fmaxf(x[n][h] * mul[n][h], x[n][h + 2] * mul[n][h + 2])));
          const float shrink = now == top ? 1.f : exp2_fast(top - now);
          if (now != kNegInf) bottom[n][h] = -now, slack[n][h] = kSlack;
          sum[n][h] *= shrink;
#pragma unroll
          for (int m = 0; m < kSteps; ++m) o[n][m][h] *= shrink * units, o[n][m][h + 2] *= shrink * units;
#pragma unroll
          for (int e = h; e < 4; e += 2) d[n][e] = fmaf(x[n][e], mul[n][e], bottom[n][h]);
        }
      }
      const float weights[2] = {scales.z * weight, scales.w * weight};
      uint32_t w[kTiles][2];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[n][e % 2] += d[n][e] = exp2_fast(d[n][e]);
#pragma unroll
        for (int i = 0; i < 2; ++i)
          w[n][i] = transpose_8x8(pack2<__half>(d[n][2 * i] * weights[i], d[n][2 * i + 1] * weights[i]));
      }

#pragma unroll
      for (int c = 0; c < L::kChunks; c += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, chunk_at<L::kChunks>(matrices, c) + L::kTileBytes);
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          uint32_t a[4];
          dequantize4<__half, kKV, false>(b[2 * u], a[0], a[1]);
          dequantize4<__half, kKV, false>(b[2 * u + 1], a[2], a[3]);
#pragma unroll
          for (int n = 0; n < kTiles; ++n) mma_16816<__half>(o[n][c + u], a, w[n][0], w[n][1]);
        }
      }
    };

    // ---- the warp's loop: the slot of block i - 1 is refilled once all lanes are past it
    uint32_t slot = slots, free_slot = last_slot;
#pragma unroll 1
    for (int i = 0, key = begin; i < blocks; ++i, key += step) {
      cp_async_wait<L::kStages - 2>();
      __syncwarp();
      const int ahead = i + L::kStages - 1;
      if (ahead < blocks) {
        if (ahead % 16 == 0) {
          page_ids = next_ids;
          next_ids = load_pages(ahead + 16);
        }
        fill_slot(free_slot, ahead, key + (L::kStages - 1) * step);
      } else {
        pageless <<= 2;
      }
      cp_async_commit();
      attend(slot, key);
      free_slot = slot;
      slot = slot == last_slot ? slots : slot + L::kSlotBytes;
    }
    cp_async_wait<0>();
    __syncwarp();  // all lanes have read the last slot: the slots become the merge buffer

    const float back = unit / kWeight;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const int n = i / 2, h = i % 2, r = 8 * n + 2 * t + h;
#pragma unroll
      for (int d = 4; d < 32; d *= 2) sum[n][h] += __shfl_xor_sync(0xffffffffu, sum[n][h], d);
      if (r >= run.rows) continue;
      float* const row = reinterpret_cast<float*>(my_slots) + r * part_row<kDim>;
      const float top = slack[n][h] == kNegInf ? kNegInf : -bottom[n][h];
      if (g == 0) *reinterpret_cast<float2*>(row + kDim) = make_float2(top, sum[n][h]);
#pragma unroll
      for (int m = 0; m < kSteps; ++m)
        *reinterpret_cast<float2*>(row + 16 * m + 2 * g) = make_float2(o[n][m][h] * back, o[n][m][h + 2] * back);
    }
    if (lane == 0) parts[warp].rows = reinterpret_cast<const float*>(my_slots);
    meet_crew(solo);
    combine<T, kDim, L::kWarps>(p, plan, run, solo ? parts + warp : parts, crew, solo);
    if (!run.whole() && plan.splits == 0) {
      if (threadIdx.x == 0) scratch.pending[pending] = run;
      ++pending;
    }
    if (solo)
      __syncwarp();
    else
      meet(plan);
  }
  settle<T, kDim>(p, plan, scratch, sizeof(T), pending, stretch.filled);
}

}  // namespace pagedkv
