// Paged attention for few query rows a KV head (decode, speculative decoding, or any number with V2), 16-bit queries.
//
// A team of CTAs works through its runs of the plan (attention_plan.cuh): one KV head of one sequence, 16 query rows
// (the GQA group's heads times the query tokens, packed so that a key is read once for all of them), a stretch of keys.
// Its warps take the blocks of 16 keys in turn, each with a pipeline of its own: kStages slots of K and V in shared
// memory filled by cp.async, so no barrier is needed between warps until the run ends, when they merge their online
// softmax states. Warps on their own (solo) have runs of their own, and meet nobody. Per 16 keys: S = Q K^T (2 n-tiles
// of mma.m16n8k16, K by ldmatrix), logits, online softmax in float32, P rounded once to the query's type, O += P V (V
// by ldmatrix.trans; the accumulator layout of S is the operand layout of P). O is rescaled only when a maximum moved.
//
// 8-bit caches have a kernel of their own (paged_decode_quantized.cuh).
//
// Shared memory: kWarps x kStages x (16 K rows, 16 V rows), then Q [16, kDim], then softmax
// states. Rows are swizzled by 16-byte chunk, not padded. When a run ends, a warp's slots hold its O [16, kDim + 8]
// float32 for the merge. Registers at kDim 128: O 64, Q 32 (kept in shared memory above 128), S 8.
//
// Floor: KV bytes / memory bandwidth (4.28 TB/s on an H200); arithmetic is 16 / group times what is useful, and stays
// below that floor. Reading the same pages and doing nothing with them takes 2.8, 9.5, 61 and 238 us for 4, 32, 256 and
// 1024 MiB. Sources: PagedAttention (arXiv:2309.06180), FlashAttention-2 (arXiv:2307.08691), Flash-Decoding
// (2023), FlashInfer (arXiv:2501.01005, tensor cores for grouped decode).
#pragma once

#include "attention_plan.cuh"

namespace pagedkv {

constexpr int kDecodeWarps = 4;
template <int kDim>
struct DecodeLayout {
  static_assert(kDim % 32 == 0 && kDim <= 256);
  static constexpr int kWarps = kDecodeWarps;
  static constexpr int kKeys = 16;                         // a slot's keys
  static constexpr int kChunks = kDim / 8;                 // 16-byte chunks of a row
  static constexpr int kTileBytes = kKeys * kChunks * 16;  // K or V
  static constexpr int kSlotBytes = 2 * kTileBytes;
  // CTAs a multiprocessor that registers and shared memory are sized for.
  static constexpr int kResident = kDim <= 128 ? 2 : 1;
  static constexpr int kStages = kSlotBytes * 6 <= 24576 ? 6 : kSlotBytes * 3 >= 24576 ? 3 : 24576 / kSlotBytes;
  static constexpr int kWarpBytes = kStages * kSlotBytes;
  static constexpr int kMergeStride = part_row<kDim>;
  static_assert(kWarpBytes % 16 == 0 && kRowTile * kMergeStride * 4 <= kWarpBytes);
  static constexpr int kQueryBytes = kRowTile * kDim * 2;
  static_assert(kDim > 128 || kQueryBytes <= kSlotBytes);  // where warps on their own keep it first

  static constexpr int bytes(int warps) {
    return warps * kWarpBytes + kQueryBytes + 4 * int(sizeof(Part)) + int(sizeof(PlanScratch)) + int(sizeof(Snapshot));
  }
};

// Uniform facts about the pointers, found on the host.
struct DecodeAccess {
  bool query_pairs;  // query rows may be read 4 bytes at a time
  bool wide;         // 8-bit rows may be read 16 bytes at a time (they may be aligned to 8 only)
  Divisor by_step;   // keys from one of a warp's blocks to the next, where a CTA's warps share runs
};

// Copies of 16 rows of K or V into a slot; zeros for rows that are not valid and behind a row's end.
template <int kChunks>
__device__ __forceinline__ void copy_valid_rows(uint32_t target, const uint8_t* first, const uint8_t* second,
                                                int64_t row_stride, int row_bytes, uint32_t valid_rows) {
#pragma unroll 1
  for (int e = threadIdx.x % 32; e < 16 * kChunks; e += 32) {
    const int r = e / kChunks, c = e % kChunks;
    const bool valid = (valid_rows >> r) & 1;
    const uint8_t* source = (r < 8 ? first : second) + (r & 7) * row_stride + c * 16;
    cp_async<16>(target + swizzle<kChunks>(r, c) * 16, source, valid && c * 16 < row_bytes);
  }
}

// The same where all of it is valid, as nearly every time: few instructions, a uniform step from row to row.
template <int kChunks>
__device__ __forceinline__ void copy_rows(uint32_t target, const uint8_t* first, const uint8_t* second,
                                          int64_t row_stride) {
  const int lane = threadIdx.x % 32;
  if constexpr (32 % kChunks == 0 && kChunks >= 4) {
    constexpr int kRows = 32 / kChunks;  // a pass
    const int r = lane / kChunks, c = lane % kChunks;
    const int64_t from = r * row_stride + c * 16;
    first += from, second += from;
#pragma unroll
    for (int i = 0; i < 8; i += kRows) {
      const uint32_t to = target + swizzle<kChunks>(i + r, c) * 16;
      cp_async_stream(to, first);
      cp_async_stream(to + 8 * kChunks * 16, second);  // the swizzle repeats every 8 rows
      first += kRows * row_stride, second += kRows * row_stride;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunks / 2; ++i) {
      const int e = lane + 32 * i, r = e / kChunks, c = e % kChunks;
      cp_async<16>(target + swizzle<kChunks>(r, c) * 16, (r < 8 ? first : second) + (r & 7) * row_stride + c * 16,
                   true);
    }
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(32 * kDecodeWarps, DecodeLayout<kDim>::kResident)
    paged_decode_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Plan plan,
                        const DecodeAccess access) {
  using L = DecodeLayout<kDim>;
  constexpr bool kQueryInRegisters = kDim <= 128;
  constexpr int kSteps = kDim / 16;   // k-steps of Q K^T
  constexpr int kColumns = kDim / 8;  // n-tiles of P V

  prefetch_planned(p, plan);
  extern __shared__ __align__(128) uint8_t shared[];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  uint8_t* const my_slots = shared + warp * L::kWarpBytes;
  Part* const parts = reinterpret_cast<Part*>(shared + warps * L::kWarpBytes + L::kQueryBytes);
  PlanScratch& scratch = *reinterpret_cast<PlanScratch*>(parts + 4);

  const uint32_t slots = smem_address(my_slots);
  const Logit logit(p);
  const int row_bytes = p.head_dim * 2;
  const int64_t k_row = p.k_stride_t * 2, v_row = p.v_stride_t * 2;
  // ldmatrix: the row and chunk that this lane points at, for matrices in the order K and V want them
  const int k_lane_row = (lane / 16) * 8 + lane % 8, k_lane_chunk = (lane / 8) % 2;
  const int v_lane_row = ((lane / 8) % 2) * 8 + lane % 8, v_lane_chunk = lane / 16;

  // ---- this CTA's stretch and its first run. They are found while the kernel in front still runs, from lengths that
  // it may be writing: again, once it is complete, if those have changed.
  Snapshot& snapshot = *reinterpret_cast<Snapshot*>(&scratch + 1);
  Sequences sequences(p);
  Stretch stretch;
  Run run;
  bool solo, more, loaded = false;  // loaded: page_ids and next_ids are the run's
  int crew, mate, begin, step;      // the warps that share a run, which one this is, and its blocks of 16 keys
  // Pages of 16 of the warp's blocks at a time, one load ahead of their use and unchecked until then (a test beside the
  // load would wait for it): lane l holds the page of block first + l % 16, of its keys 0 .. 7 or 8 .. 15.
  int page_ids, next_ids;
  auto start_run = [&] {
    run = next_run(p, plan, sequences, stretch);
    begin = max(run.key_begin, run.seen.lo & ~(L::kKeys - 1)) + (my_rank(plan) * crew + mate) * L::kKeys;
    step = (crew << plan.team_shift) * L::kKeys;
  };
  auto page_at = [&](int key) { return p.block_tables + int64_t(run.seq) * p.table_stride + (key >> p.block_shift); };
  auto load_pages = [&](int first) {
    const int key = begin + (first + lane % 16) * step + lane / 16 * 8;
    return key < run.key_end ? *page_at(key) : -1;
  };
  const bool few = p.num_seqs <= Snapshot::kMost;
#pragma unroll 1
  for (bool early = kOverlap && few;; early = false) {
    if (!early) wait_for_previous();
    if (few) sequences = snapshot.take(p);
    stretch = plan_stretch<kQueryInRegisters>(p, plan, scratch, sequences);
    solo = kQueryInRegisters && stretch.solo;
    crew = solo ? 1 : warps, mate = solo ? 0 : warp;
    more = stretch.left > 0;
    if (more) start_run();
    if (!early) break;
    if (plan.ahead && more && begin + (L::kStages - 1) * step < run.key_end) {
      const int key = begin + lane % 16, page = guess(page_at(key));
      const auto *const k = static_cast<const uint16_t*>(p.k), *const v = static_cast<const uint16_t*>(p.v);
      if (page >= 0 && page < p.num_blocks)
        bring_to_l2(lane < 16 ? k + k_offset(p, page, key, run.kv_head) : v + v_offset(p, page, key, run.kv_head),
                    row_bytes);
    }
    wait_for_previous();
    if (more) page_ids = load_pages(0), next_ids = load_pages(16);
    loaded = !snapshot.outdated(p);
    if (loaded) break;
  }
  // Warps on their own have their queries in the slot that is filled last, until they are in registers.
  uint8_t* const query_tile = solo ? my_slots + (L::kStages - 1) * L::kSlotBytes : shared + warps * L::kWarpBytes;
  const uint32_t query_at = smem_address(query_tile);
  int pending = 0;
#pragma unroll 1
  while (more) {
    // ---- this warp's blocks of 16 keys
    const int behind = run.key_end - begin + step - 1;  // 0 blocks where it is too small
    const int blocks = begin < run.key_end ? (solo ? behind / L::kKeys : access.by_step(behind)) : 0;
    const uint8_t* const k_base = static_cast<const uint8_t*>(p.k) + run.kv_head * p.k_stride_h * 2;
    const uint8_t* const v_base = static_cast<const uint8_t*>(p.v) + run.kv_head * p.v_stride_h * 2;
    uint32_t usable = 0;  // 2 bits a slot: whether its first and last 8 keys have a page (pages hold at least 8)

    if (!loaded) page_ids = load_pages(0), next_ids = load_pages(16);
    loaded = false;
    auto pages = [&](int block) {
      auto usable_page = [&](int page) { return page >= 0 && page < p.num_blocks ? page : -1; };
      return int2{usable_page(__shfl_sync(0xffffffffu, page_ids, block % 16)),
                  usable_page(__shfl_sync(0xffffffffu, page_ids, 16 + block % 16))};
    };
    auto fill_slot = [&](int slot, int key, int2 page) {
      usable = (usable & ~(3u << (2 * slot))) | (uint32_t(page.x >= 0) | uint32_t(page.y >= 0) << 1) << (2 * slot);
      // rows that may be read: in [lo, end) and on a usable page; all others become zeros, since 0 * NaN is NaN
      const int first_row = max(0, run.seen.lo - key), end_row = max(0, min(L::kKeys, run.key_end - key));
      uint32_t rows = ((1u << end_row) - 1) & ~((1u << min(first_row, L::kKeys)) - 1);
      rows &= (page.x >= 0 ? 0x00ffu : 0u) | (page.y >= 0 ? 0xff00u : 0u);
      const int x = max(page.x, 0), y = max(page.y, 0);
      const uint32_t k_at = slots + slot * L::kSlotBytes, v_at = k_at + L::kTileBytes;
      const uint8_t* const k0 = k_base + k_offset(p, x, key, 0) * 2;
      const uint8_t* const v0 = v_base + v_offset(p, x, key, 0) * 2;
      const uint8_t *k1 = k0 + 8 * k_row, *v1 = v0 + 8 * v_row;
      if (p.block_size < L::kKeys) {
        k1 = k_base + k_offset(p, y, key + 8, 0) * 2;
        v1 = v_base + v_offset(p, y, key + 8, 0) * 2;
      }
      if (rows == 0xffffu && row_bytes == L::kChunks * 16) {
        copy_rows<L::kChunks>(k_at, k0, k1, k_row);
        copy_rows<L::kChunks>(v_at, v0, v1, v_row);
      } else {
        copy_valid_rows<L::kChunks>(k_at, k0, k1, k_row, row_bytes, rows);
        copy_valid_rows<L::kChunks>(v_at, v0, v1, v_row, row_bytes, rows);
      }
    };

    // ---- Q's rows, every crew-th one to this warp: four loads of each lane fly while the pipeline is filled
    constexpr int kWords = (kDim / 2 + 31) / 32;
    uint32_t words[4][kWords];
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
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int pair = lane + 32 * i;
        if (r >= kRowTile || 2 * pair >= kDim) continue;
        *reinterpret_cast<uint32_t*>(query_tile + swizzle<kDim / 8>(r, pair / 4) * 16 + pair % 4 * 4) = in[i];
      }
    };
#pragma unroll
    for (int u = 0; u < 4; ++u) read_query(mate + u * crew, words[u]);
#pragma unroll 1
    for (int i = 0; i < L::kStages - 1; ++i) {
      if (i < blocks) fill_slot(i, begin + i * step, pages(i));
      cp_async_commit();
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) store_query(mate + u * crew, words[u]);
    if (crew < 4) {
#pragma unroll 1
      for (int r = mate + 4 * crew; r < run.rows; r += crew) {
        read_query(r, words[0]);
        store_query(r, words[0]);
      }
      const int padding = max(4 * crew, run.rows);  // rows of zeros from there on
      for (int i = padding * (kDim / 8) + mate * 32 + lane; i < kRowTile * (kDim / 8); i += crew * 32)
        reinterpret_cast<uint4*>(query_tile)[i] = make_uint4(0, 0, 0, 0);
    }
    meet_crew(solo);

    auto load_query = [&](uint32_t (&a)[4], int s) {
      ldmatrix_x4(a, query_at + swizzle<kDim / 8>(v_lane_row, 2 * s + v_lane_chunk) * 16);
    };
    uint32_t q[kQueryInRegisters ? kSteps : 1][4];
    if constexpr (kQueryInRegisters) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) load_query(q[s], s);
    }

    // ---- this lane's two rows, g and g + 8
    KeyRange seen[2];
    int position[2];
    float slope[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = g + 8 * h;
      position[h] = run.position(plan, r);
      seen[h] = r < run.rows ? visible_keys(p, position[h], run.keys) : KeyRange{0, 0};
      slope[h] = p.alibi_slopes && r < run.rows ? p.alibi_slopes[run.head(plan, r)] * kLog2e : 0.f;
    }

    // Keys that all of the run's rows see. Rows that pad the tile then see them, too: their results go nowhere.
    const int all_lo = visible_keys(p, run.position(plan, run.rows - 1), run.keys).lo;
    const int all_hi = visible_keys(p, run.position(plan, 0), run.keys).hi;

    float o[kColumns][4] = {};
    float top[2] = {kNegInf, kNegInf}, sum[2] = {0.f, 0.f};
    auto attend = [&](int slot, int key) {
      const uint32_t k_at = slots + slot * L::kSlotBytes, v_at = k_at + L::kTileBytes;

      float x[2][4] = {};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        uint32_t b[4];
        ldmatrix_x4(b, k_at + swizzle<L::kChunks>(k_lane_row, 2 * s + k_lane_chunk) * 16);
        if constexpr (!kQueryInRegisters) load_query(q[0], s);
        const auto& a = q[kQueryInRegisters ? s : 0];
        mma_16816<T>(x[0], a, b[0], b[1]);
        mma_16816<T>(x[1], a, b[2], b[3]);
      }

      // ---- logits and the new maxima; element e of n-tile n: row g + 8 * (e / 2), key 8n + 2t + e % 2
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i / 4][i % 4] *= logit.mul;
      if (logit.cap > 0) {
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i / 4][i % 4] = logit.capped(x[i / 4][i % 4]);
      }
      if (p.alibi_slopes) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int h = i % 4 / 2, pos = key + 8 * (i / 4) + 2 * t + i % 2;
          x[i / 4][i % 4] += slope[h] * float(pos - position[h]);
        }
      }
      const uint32_t usable_halves = (usable >> (2 * slot)) & 3;
      if (usable_halves != 3 || key < all_lo || key + L::kKeys > all_hi) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int n = i / 4, h = i % 4 / 2, pos = key + 8 * n + 2 * t + i % 2;
          // no test against key_end: it is a multiple of 16, or nothing is visible from there on
          const bool visible = (usable_halves >> n) & 1 && pos >= seen[h].lo && pos < seen[h].hi;
          if (!visible) x[n][i % 4] = kNegInf;
        }
      }
      float tile_top[2];
#pragma unroll
      for (int h = 0; h < 2; ++h)
        tile_top[h] = fmaxf(fmaxf(x[0][2 * h], x[0][2 * h + 1]), fmaxf(x[1][2 * h], x[1][2 * h + 1]));
      float shrink[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        tile_top[h] = fmaxf(tile_top[h], __shfl_xor_sync(0xffffffffu, tile_top[h], 1));
        tile_top[h] = fmaxf(tile_top[h], __shfl_xor_sync(0xffffffffu, tile_top[h], 2));
        const float now = fmaxf(top[h], tile_top[h]), base = now == kNegInf ? 0.f : now;
        shrink[h] = now == top[h] ? 1.f : exp2_fast(top[h] - base);  // exactly 1 also for the rows that pad the tile
        top[h] = now;
        float part = 0.f;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) part += x[n][e] = exp2_fast(x[n][e] - base);
        }
        sum[h] = sum[h] * shrink[h] + part;
      }
      if (__any_sync(0xffffffffu, shrink[0] != 1.f || shrink[1] != 1.f)) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          o[c][0] *= shrink[0], o[c][1] *= shrink[0];
          o[c][2] *= shrink[1], o[c][3] *= shrink[1];
        }
      }
      const uint32_t a[4] = {pack2<T>(x[0][0], x[0][1]), pack2<T>(x[0][2], x[0][3]), pack2<T>(x[1][0], x[1][1]),
                             pack2<T>(x[1][2], x[1][3])};
#pragma unroll
      for (int c = 0; c < L::kChunks; c += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, v_at + swizzle<L::kChunks>(v_lane_row, c + v_lane_chunk) * 16);
        mma_16816<T>(o[c], a, b[0], b[1]);
        mma_16816<T>(o[c + 1], a, b[2], b[3]);
      }
    };

    // ---- the warp's loop. Block i sits in slot i % kStages; the slot of block i - 1 is refilled once all lanes are
    // past it.
    int slot = 0, free_slot = L::kStages - 1;
#pragma unroll 1
    for (int i = 0; i < blocks; ++i) {
      cp_async_wait<L::kStages - 2>();
      __syncwarp();
      const int ahead = i + L::kStages - 1;
      if (ahead < blocks) {
        if (ahead % 16 == 0) {
          page_ids = next_ids;
          next_ids = load_pages(ahead + 16);
        }
        fill_slot(free_slot, begin + ahead * step, pages(ahead));
      }
      cp_async_commit();
      attend(slot, begin + i * step);
      free_slot = slot;
      slot = slot + 1 == L::kStages ? 0 : slot + 1;
    }
    cp_async_wait<0>();
    __syncwarp();  // all lanes have read the last slot: the slots become the merge buffer

#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
      sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
      const int r = g + 8 * h;
      if (r >= run.rows) continue;
      float* const row = reinterpret_cast<float*>(my_slots) + r * L::kMergeStride;
      if (t == 0) *reinterpret_cast<float2*>(row + kDim) = make_float2(top[h], sum[h]);
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        *reinterpret_cast<float2*>(row + 8 * c + 2 * t) = make_float2(o[c][2 * h], o[c][2 * h + 1]);
    }
    if (lane == 0) parts[warp].rows = reinterpret_cast<const float*>(my_slots);
    meet_crew(solo);
    combine<T, kDim, kDecodeWarps, true>(p, plan, run, solo ? parts + warp : parts, crew, solo);
    if (!run.whole() && plan.splits == 0) {
      if (threadIdx.x == 0) scratch.pending[pending] = run;
      ++pending;
    }
    if (solo)
      __syncwarp();
    else
      meet(plan);
    more = stretch.left > 0;
    if (more) start_run();
  }
  settle<T, kDim, true>(p, plan, scratch, sizeof(T), pending, stretch.filled);
}

// paged_decode.cu instantiates one kDim a compile unit.
template <class T, int kDim>
void launch_decode_dim(const AttentionParams& p, KVType kv, int num_splits, const Tensor& like, cudaStream_t stream);

}  // namespace pagedkv
