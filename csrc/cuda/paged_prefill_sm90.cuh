// Attention of many query rows over a paged or dense 16-bit KV cache on Hopper's tensor cores (wgmma, sm_90a). What
// paged_prefill.cuh does by mma.sync, for head_dim 33 .. 256, without 8-bit caches and with a query aligned to 16
// bytes; the rest stays there, and so do all other GPUs.
//
// Algorithm: FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608) over pages. Work item: kRows = 128 query rows of
// one sequence and one KV head, the heads that share it packed as rows (row = token * group + head in group). Keys are
// walked upwards in tiles of kKeys from key 0, with an online softmax; tiles that no row sees are not visited, only
// those that an edge crosses are masked.
//
// A CTA stays on its SM and takes items from a counter in global memory until there are no more: those of the first
// sequence first, in it the last rows first, which under a causal mask have most keys, KV heads side by side. Three
// warpgroups:
//   producer   resolves pages, copies Q, K and V by cp.async (a page's rows are far too short for bulk copies to pay),
//              kStages tiles ahead, also across items. Rows that nobody may read come in as zeros.
//   consumers  each with 64 of the rows. A step of the loop, for tile j:
//                S = Q K(j) issued | O += P(j - 1) V(j - 1) issued | S done: masks, maximum, exponentials of j, under
//                the products of the other | O done: rescale, P(j)
//              They issue in turns (named barriers), so that one's softmax runs under the other's products.
//
// Shared memory: Q [128, kDim], kStages of K and of V [kKeys, kDim], in the blocks of wgmma.cuh: K-major for Q and K,
// and the same layout read as MN-major for V. Barriers: `full` is completed by the producer's 128 threads when their
// copies have landed, `empty` by a lane of each of the 8 consumer warps. The item travels with Q. cp.async writes
// through the generic proxy and wgmma reads through the asynchronous one: a copying thread fences before it arrives.
//
// Registers: 40 a thread for the producer, 232 for the consumers, which hold O (kDim / 2), S (kKeys / 2) and P (kKeys /
// 4). A row of S lies in 4 lanes; packed to 16 bit it is the A operand of P V as it stands.
//
// Floor: 4 * rows * keys * head_dim flops (half of it when causal) at the 790 TFLOP/s of an H200's dense bf16. Each
// item reads its keys through L2: 4 * kDim bytes a key for 512 * kDim flops a key, 5 TB/s at 640 TFLOP/s.
#pragma once

#include "paged_prefill.cuh"
#include "wgmma.cuh"

namespace pagedkv::prefill::sm90 {

template <int kDim_>
struct Shape {
  static constexpr int kDim = kDim_;
  static_assert(kDim == 64 || kDim == 128 || kDim == 256);
  static constexpr int kKeys = kDim > 128 ? 64 : 128;
  static constexpr int kStages = kDim > 128 ? 2 : kDim > 64 ? 3 : 4;
  static constexpr int kConsumers = 2;  // warpgroups
  static_assert(64 * kConsumers == kRows);
  static constexpr int kThreads = 128 * (1 + kConsumers);

  static constexpr int kChunks = kDim / 8;        // 16-byte chunks in a row, one for each lane of a copy
  static constexpr int kCopyRows = 32 / kChunks;  // rows that a warp copies at once
  static constexpr int kQBlock = kRows * 128;     // bytes of 64 columns
  static constexpr int kKvBlock = kKeys * 128;
  static constexpr int kQBytes = kQBlock * (kDim / 64);
  static constexpr int kTileBytes = kKvBlock * (kDim / 64);
  static constexpr int kBytes = kQBytes + 2 * kStages * kTileBytes + 1024;  // what alignment may cost
  static_assert(kBytes <= 226 * 1024, "a CTA's limit, less the barriers");
};

// Row r of a tile is copied by warp `copier` and is bit `place` there.
template <int kCopyRows>
__device__ __forceinline__ int copier(int r) {
  return (r / kCopyRows) % 4;
}
template <int kCopyRows>
__device__ __forceinline__ int place(int r) {
  return r / (4 * kCopyRows) * kCopyRows + r % kCopyRows;
}
template <int kCopyRows>
__device__ __forceinline__ int copied_row(int warp, int place) {
  return (place / kCopyRows * 4 + warp) * kCopyRows + place % kCopyRows;
}

struct Item {
  int sequence, row_tile, kv_head;  // sequence < 0: no more
};

template <int kStages>
struct Barriers {
  uint64_t q_full, q_empty, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  uint4 holes[kStages];  // a word a copying warp: keys in reach whose page does not exist
  Item item;
  int next[2];  // numbers of items, on their way to all of the producer
};

enum NamedBarrier { kProducerBarrier = 1, kTurnBarrier };  // 0 is __syncthreads; a turn for each consumer

// An item's rows and the keys that they see.
struct Geometry {
  int kv_head, first_token, first_head, rows, query_start, shift, keys, begin, end, all_begin, all_end, group;
  uint32_t magic;

  __device__ __forceinline__ int token_of(int r) const {
    return first_token + int(__umulhi(2u * uint32_t(first_head + r), magic));
  }
  __device__ __forceinline__ int head_of(int r, int token) const {
    return first_head + r - (token - first_token) * group;
  }
  __device__ __forceinline__ Geometry(const Params& p, const Item& item) {
    const AttentionParams& a = p.a;
    const int query_len = a.query_len[item.sequence], seq_len = a.seq_lens[item.sequence];
    const int first_row = item.row_tile * kRows;
    group = p.group, magic = p.group_magic;
    kv_head = item.kv_head;
    first_token = first_row / group;
    first_head = first_row - first_token * group;
    rows = int(min(int64_t(kRows), int64_t(query_len) * group - first_row));
    query_start = a.query_start[item.sequence];
    shift = seq_len - query_len;  // from a query's token number to its position
    keys = readable_keys(a, seq_len);
    const int first = shift + first_token, last = shift + token_of(rows - 1);
    const KeyRange some = visible_keys(a, first, last, keys);  // seen by some row
    begin = some.lo, end = some.hi;
    all_begin = visible_keys(a, last, keys).lo;  // seen by every row
    all_end = visible_keys(a, first, keys).hi;
  }
};

#ifdef PAGEDKV_WGMMA

// The item of number n, which never falls, over all sequences. All lanes of a warp take part.
struct Cursor {
  int sequence = 0, before = 0;  // 32 sequences from here on are looked at; items of those in front

  __device__ __forceinline__ Item find(const Params& p, int n, int lane) {
    const AttentionParams& a = p.a;
    for (; sequence < a.num_seqs; sequence += 32) {
      const int s = sequence + lane;
      int tiles = 0;
      if (s < a.num_seqs && a.seq_lens[s] > 0 && a.query_len[s] > 0)
        tiles = int((int64_t(min(a.query_len[s], a.max_query_len)) * p.group + kRows - 1) / kRows);
      const int items = tiles * a.num_kv_heads;
      int sum = items;  // up to and with this lane's
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int left = __shfl_up_sync(~0u, sum, d);
        if (lane >= d) sum += left;
      }
      const int total = __shfl_sync(~0u, sum, 31);
      if (n - before < total) {
        const int owner = __ffs(__ballot_sync(~0u, n - before < sum)) - 1;
        const int m = n - before - __shfl_sync(~0u, sum - items, owner);
        const int row_tiles = __shfl_sync(~0u, tiles, owner);
        const int row = m / a.num_kv_heads;
        return {sequence + owner, row_tiles - 1 - row, m - row * a.num_kv_heads};
      }
      before += total;
    }
    return {-1, 0, 0};
  }
};

// The producer's part of a copy: its rows of a tile, one for each lane at `offset` bytes from `base`, which is the
// lane's own chunk of row 0.
template <class S, int kTileRows>
__device__ __forceinline__ void copy_tile(uint32_t tile, const char* base, int64_t offset, uint32_t exist, bool column,
                                          int warp, int lane) {
  const int chunk = lane % S::kChunks, below = lane / S::kChunks;
  const uint32_t block = tile + chunk / 8 * (kTileRows * 128);
#pragma unroll 4
  for (int i = 0; i < kTileRows / (4 * S::kCopyRows); ++i) {
    const int place = i * S::kCopyRows + below;
    const int64_t row = __shfl_sync(~0u, static_cast<long long>(offset), place);
    const uint32_t target = block + wgmma::swizzle128(copied_row<S::kCopyRows>(warp, place), chunk % 8);
    cp_async<16>(target, base + row, column && (exist >> place & 1));
  }
}

template <class S>
__device__ __forceinline__ void produce(const Params& p, Barriers<S::kStages>& barriers, uint32_t q_tile,
                                        uint32_t k_tiles, uint32_t v_tiles, int warp, int lane) {
  const AttentionParams& a = p.a;
  const bool leader = warp == 0 && lane == 0;
  const int chunk = lane % S::kChunks;
  const bool column = chunk < a.head_dim / 8;  // the rest of a row is zero
  const int64_t column_bytes = column ? chunk * 16 : 0;

  // Copies of a tile are announced once those of the next are under way: they must have arrived, and been made visible
  // to the tensor cores by the thread that made them, before it arrives at the barrier.
  uint64_t* copying = nullptr;
  auto announce = [&](uint64_t& barrier) {
    cp_async_commit();
    if (copying) {
      cp_async_wait<1>();
      wgmma::fence_async_proxy();
      wgmma::barrier_arrive(*copying);
    }
    copying = &barrier;
  };

  Cursor cursor;
  wgmma::Ring<S::kStages> k_ring, v_ring;
  uint32_t q_parity = 0;
  int n = blockIdx.x;
  for (int turn = 0;; turn ^= 1) {
    int following = 0;
    if (leader) following = int(gridDim.x) + atomicAdd(a.next_item, 1);
    const Item item = cursor.find(p, n, lane);
    if (item.sequence < 0) break;
    const Geometry g(p, item);
    if (g.begin < g.end) {
      // The item and its queries
      wgmma::barrier_wait(barriers.q_empty, q_parity ^ 1);
      q_parity ^= 1;
      {
        const int r = copied_row<S::kCopyRows>(warp, lane), token = g.token_of(r);
        const int64_t q_row = int64_t(g.query_start) + token;
        const bool ok = r < g.rows && q_row >= 0 && q_row < a.num_tokens;
        const int64_t head = int64_t(g.kv_head) * g.group + g.head_of(r, token);
        const int64_t offset = ok ? 2 * (q_row * a.q_stride_t + head * a.q_stride_h) : 0;
        if (leader) barriers.item = item;
        copy_tile<S, kRows>(q_tile, static_cast<const char*>(a.q) + column_bytes, offset, __ballot_sync(~0u, ok),
                            column, warp, lane);
        announce(barriers.q_full);
      }

      // Lane l looks after one row of each tile. Keys that no row needs, pages that do not exist and rows outside of a
      // dense tensor come in as zeros and are masked, whatever lies there.
      const int64_t table_row = int64_t(item.sequence) * a.table_stride;
      const int* const table = a.block_tables ? a.block_tables + table_row : a.key_start + item.sequence;
      const char* const k_base = static_cast<const char*>(a.k) + g.kv_head * p.k_head + column_bytes;
      const char* const v_base = static_cast<const char*>(a.v) + g.kv_head * p.v_head + column_bytes;
      const int my_row = copied_row<S::kCopyRows>(warp, lane);
      auto in_reach = [&](int tile) {
        const int key = tile * S::kKeys + my_row;
        return my_row < S::kKeys && key >= g.begin && key < g.end;
      };
      auto page_of = [&](int tile) {
        const int key = tile * S::kKeys + my_row, index = key >> p.page_shift;
        if (!in_reach(tile) || index >= p.table_width) return -1;
        return a.block_tables ? table[index] : int(uint32_t(*table) + uint32_t(key));
      };
      const int page_mask = int((1u << p.page_shift) - 1);
      auto offset_of = [&](int tile, int page, int64_t page_bytes, int64_t token_bytes) {
        const int token = (tile * S::kKeys + my_row) & page_mask;
        return uint32_t(page) < uint32_t(p.pages) ? page * page_bytes + token * token_bytes : int64_t(0);
      };
      auto copy_v = [&](int tile, int page, uint32_t exist) {
        wgmma::barrier_wait(barriers.v_empty[v_ring.index], v_ring.parity ^ 1);
        copy_tile<S, S::kKeys>(v_tiles + v_ring.index * S::kTileBytes, v_base,
                               offset_of(tile, page, p.v_block, p.v_token), exist, column, warp, lane);
        announce(barriers.v_full[v_ring.index]);
        v_ring.advance();
      };

      const int first_tile = g.begin / S::kKeys, last_tile = (g.end - 1) / S::kKeys;
      int page = page_of(first_tile), ahead = page_of(first_tile + 1), behind = -1;
      uint32_t behind_exist = 0;
#pragma unroll 1
      for (int tile = first_tile; tile <= last_tile; ++tile) {
        const bool ok = uint32_t(page) < uint32_t(p.pages);
        const uint32_t exist = __ballot_sync(~0u, ok), holes = __ballot_sync(~0u, in_reach(tile) && !ok);
        wgmma::barrier_wait(barriers.k_empty[k_ring.index], k_ring.parity ^ 1);
        copy_tile<S, S::kKeys>(k_tiles + k_ring.index * S::kTileBytes, k_base,
                               offset_of(tile, page, p.k_block, p.k_token), exist, column, warp, lane);
        if (lane == 0) reinterpret_cast<uint32_t*>(&barriers.holes[k_ring.index])[warp] = holes;
        announce(barriers.k_full[k_ring.index]);
        k_ring.advance();
        // The consumers want V of a tile only after K of the next
        if (tile > first_tile) copy_v(tile - 1, behind, behind_exist);
        behind = page, behind_exist = exist;
        page = ahead, ahead = page_of(tile + 2);
      }
      copy_v(last_tile, behind, behind_exist);
    }
    if (leader) barriers.next[turn] = following;
    wgmma::named_sync(kProducerBarrier, 128);
    n = barriers.next[turn];
  }

  cp_async_wait<0>();
  wgmma::fence_async_proxy();
  if (copying) wgmma::barrier_arrive(*copying);
  wgmma::barrier_wait(barriers.q_empty, q_parity ^ 1);
  if (leader) barriers.item.sequence = -1;
  wgmma::barrier_arrive(barriers.q_full);
}

template <class S, class T>
__device__ __forceinline__ void consume(const Params& p, Barriers<S::kStages>& barriers, uint32_t q_tile,
                                        uint32_t k_tiles, uint32_t v_tiles, int group, int warp, int lane) {
  constexpr int kDim = S::kDim, kKeys = S::kKeys;
  const AttentionParams& a = p.a;
  // Products, to which a block of 64 columns is four steps of 16
  const uint64_t q_base = wgmma::descriptor(q_tile + group * 64 * 128, 16);
  const uint64_t k_base = wgmma::descriptor(k_tiles, 16), v_base = wgmma::descriptor(v_tiles, S::kKvBlock);
  float out[kDim / 2], s[kKeys / 2];
  uint32_t weights[kKeys / 16][4];
  auto multiply_k = [&](int stage) {
    wgmma::pin(s);
    wgmma::fence();
    const uint64_t k = k_base + stage * (S::kTileBytes / 16);
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d)
      wgmma::multiply<T, kKeys>(s, q_base + d / 4 * (S::kQBlock / 16) + d % 4 * 2,
                                k + d / 4 * (S::kKvBlock / 16) + d % 4 * 2, d > 0);
    wgmma::commit();
    wgmma::pin(s);
  };
  auto multiply_v = [&](int stage) {
    wgmma::pin(out);
    wgmma::fence();
    const uint64_t v = v_base + stage * (S::kTileBytes / 16);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
      wgmma::multiply_add<T, kDim>(out, weights[k], v + k * (2 * wgmma::kAtomBytes / 16));
    wgmma::commit();
    wgmma::pin(out);
  };
  auto release = [&](uint64_t& barrier) {
    __syncwarp();  // every lane has read `holes`
    if (lane == 0) wgmma::barrier_arrive(barrier);
  };

  wgmma::Ring<S::kStages> k_ring, v_ring;
  uint32_t q_parity = 0;
  if (group == 0) wgmma::named_arrive(kTurnBarrier, 256);  // the first turn
  for (;; q_parity ^= 1) {
    wgmma::barrier_wait(barriers.q_full, q_parity);
    const Item item = barriers.item;
    if (item.sequence < 0) break;
    const Geometry g(p, item);
    const int first_tile = g.begin / kKeys, last_tile = (g.end - 1) / kKeys;
    const int my_row = group * 64 + warp * 16 + (lane >> 2);  // and the one 8 below
    float top[2] = {kNegInf, kNegInf};  // what is subtracted from a row's logits, in powers of two: about its maximum
    float sum[2] = {0.f, 0.f};          // this lane's part of the sum of exponentials
    float factor[2];                    // of what `out` has to be multiplied by
    bool grown;                         // a factor of this warp is not 1
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) out[i] = 0.f;

    // Dot products -> exponentials, in place
    auto softmax = [&](int tile, const uint4& holes) {
      const int key0 = tile * kKeys, lane_key = key0 + 2 * (lane & 3);  // of s[0]
      // Logits that are more than a scaled dot product
      if (a.softcap > 0.f) {
        float large = 0.f;
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) s[i] *= p.tanh_scale, large = fmaxf(large, fabsf(s[i]));
        if (__any_sync(~0u, !(large < kTanhNear))) {
#pragma unroll
          for (int i = 0; i < kKeys / 2; ++i) s[i] = a.softcap * tanh_fast(s[i]);
        } else {  // far from the cap, where tanh needs none of the scarce special functions
#pragma unroll
          for (int i = 0; i < kKeys / 2; ++i) s[i] = a.softcap * tanh_near(s[i]);
        }
      } else if (p.logit_scale != 1.f) {
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) s[i] *= p.logit_scale;
      }
      if (a.alibi_slopes) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = min(my_row + 8 * h, g.rows - 1), token = g.token_of(row);
          const float slope = a.alibi_slopes[g.kv_head * g.group + g.head_of(row, token)];
          const int distance = lane_key - (g.shift + token);
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) s[4 * n + 2 * h + i] += slope * float(distance + 8 * n + i);
        }
      }
      // Masks
      if (key0 < g.all_begin || key0 + kKeys > g.all_end) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const KeyRange seen = visible_keys(a, g.shift + g.token_of(my_row + 8 * h), g.keys);
          const int low = seen.lo - lane_key, high = seen.hi - lane_key;
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
              if (8 * n + i < low || 8 * n + i >= high) s[4 * n + 2 * h + i] = kNegInf;
        }
      }
      if (holes.x | holes.y | holes.z | holes.w) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int r = 8 * n + 2 * (lane & 3) + i, c = copier<S::kCopyRows>(r);
            const uint32_t word = c < 2 ? (c == 0 ? holes.x : holes.y) : (c == 2 ? holes.z : holes.w);
            if (word >> place<S::kCopyRows>(r) & 1) s[4 * n + i] = s[4 * n + 2 + i] = kNegInf;
          }
      }
      // `top` is the maximum itself: the largest term is 1, which rounding leaves alone. Tiles that move no maximum
      // leave `out` alone.
      grown = false;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x = fmaxf(s[2 * h], s[2 * h + 1]);
#pragma unroll
        for (int n = 1; n < kKeys / 8; ++n) x = fmaxf(x, fmaxf(s[4 * n + 2 * h], s[4 * n + 2 * h + 1]));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 2)) * p.exp2_scale;
        const bool grows = x > top[h];
        factor[h] = grows ? exp2_fast(top[h] - x) : 1.f;
        if (grows) top[h] = x;
        grown |= grows;
        const float base = top[h] == kNegInf ? 0.f : top[h];  // nothing seen yet: every term is 0
        float even = 0.f, odd = 0.f;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          float &left = s[4 * n + 2 * h], &right = s[4 * n + 2 * h + 1];
          left = exp2_fast(fmaf(left, p.exp2_scale, -base));
          right = exp2_fast(fmaf(right, p.exp2_scale, -base));
          even += left, odd += right;
        }
        sum[h] = sum[h] * factor[h] + (even + odd);
      }
      grown = __any_sync(~0u, grown);
    };
    auto rescale = [&] {
      if (!grown) return;
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) out[i] *= factor[i / 2 % 2];
    };
    auto pack = [&] {
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[k][i] = pack2<T>(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
    };

    wgmma::barrier_wait(barriers.k_full[k_ring.index], k_ring.parity);
    uint4 holes = barriers.holes[k_ring.index];
    multiply_k(k_ring.index);
    wgmma::wait<0>();
    wgmma::pin(s);
    release(barriers.k_empty[k_ring.index]);
    if (first_tile == last_tile) release(barriers.q_empty);
    k_ring.advance();
    softmax(first_tile, holes);
    pack();

#pragma unroll 1
    for (int tile = first_tile + 1; tile <= last_tile; ++tile) {
      wgmma::barrier_wait(barriers.k_full[k_ring.index], k_ring.parity);
      holes = barriers.holes[k_ring.index];
      wgmma::named_sync(kTurnBarrier + group, 256);
      multiply_k(k_ring.index);
      wgmma::barrier_wait(barriers.v_full[v_ring.index], v_ring.parity);
      multiply_v(v_ring.index);
      wgmma::named_arrive(kTurnBarrier + (group ^ 1), 256);
      wgmma::wait<1>();
      wgmma::pin(s);
      release(barriers.k_empty[k_ring.index]);
      if (tile == last_tile) release(barriers.q_empty);
      k_ring.advance();
      softmax(tile, holes);
      wgmma::hold(sum[0] + sum[1]);  // or nothing would run under P V
      wgmma::wait<0>();
      wgmma::pin(out);
      wgmma::pin(s);
      release(barriers.v_empty[v_ring.index]);
      v_ring.advance();
      rescale();
      pack();
    }
    wgmma::barrier_wait(barriers.v_full[v_ring.index], v_ring.parity);
    multiply_v(v_ring.index);
    wgmma::wait<0>();
    wgmma::pin(out);
    release(barriers.v_empty[v_ring.index]);
    v_ring.advance();

    // Normalise and write. The sink is one more term of the sum; a row that saw nothing, since no page exists, becomes
    // 0 and -inf. Neighbouring lanes trade halves, so that each row gets whole sectors of 32 bytes.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sum[h];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const int row = my_row + 8 * h, token = g.token_of(row);
      const int head = g.kv_head * g.group + g.head_of(row, token);
      const int64_t q_row = int64_t(g.query_start) + token;
      const bool exists = row < g.rows && q_row >= 0 && q_row < a.num_tokens;
      const bool seen = total != 0.f;
      float scale = seen ? 1.f : 0.f, base = top[h];
      if (exists) {
        if (seen && a.sinks) {
          const float sink = a.sinks[head] * kLog2e;
          base = fmaxf(base, sink);
          scale = exp2_fast(top[h] - base);
          total = total * scale + exp2_fast(sink - base);
        }
        if (seen) scale /= total;
        if (a.lse && (lane & 3) == 0) a.lse[q_row * a.num_heads + head] = seen ? base * kLn2 + logf(total) : kNegInf;
      }
      const bool odd = lane & 1;
      const int column = odd ? 8 + 2 * ((lane & 3) - 1) : 2 * (lane & 3);
      T* const target = static_cast<T*>(a.out) + (q_row * a.num_heads + head) * a.head_dim + column;
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        const uint32_t left = pack2<T>(out[8 * d + 2 * h] * scale, out[8 * d + 2 * h + 1] * scale);
        const uint32_t right = pack2<T>(out[8 * d + 4 + 2 * h] * scale, out[8 * d + 4 + 2 * h + 1] * scale);
        const uint32_t other = __shfl_xor_sync(~0u, odd ? left : right, 1);
        if (exists && 16 * d + column < a.head_dim)
          *reinterpret_cast<uint2*>(target + 16 * d) = odd ? make_uint2(other, right) : make_uint2(left, other);
      }
    }
  }
}

#endif

template <class T, int kDim>
__global__ void __launch_bounds__(Shape<kDim>::kThreads, 1) prefill_sm90_kernel(const __grid_constant__ Params p) {
#ifdef PAGEDKV_WGMMA
  using S = Shape<kDim>;
  extern __shared__ unsigned char dynamic_shared[];
  __shared__ Barriers<S::kStages> barriers;
  const uint32_t q_tile = (smem_address(dynamic_shared) + 1023) & ~1023u;
  const uint32_t k_tiles = q_tile + S::kQBytes, v_tiles = k_tiles + S::kStages * S::kTileBytes;
  const int lane = threadIdx.x & 31;
  const int warp = __shfl_sync(~0u, int(threadIdx.x >> 5), 0);  // tells the compiler that it is uniform
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * S::kConsumers;
    wgmma::barrier_init(barriers.q_full, 128);
    wgmma::barrier_init(barriers.q_empty, kWarps);
    for (int i = 0; i < S::kStages; ++i) {
      wgmma::barrier_init(barriers.k_full[i], 128);
      wgmma::barrier_init(barriers.k_empty[i], kWarps);
      wgmma::barrier_init(barriers.v_full[i], 128);
      wgmma::barrier_init(barriers.v_empty[i], kWarps);
    }
  }
  __syncthreads();
  if (warp < 4) {
    wgmma::give_registers<40>();
    produce<S>(p, barriers, q_tile, k_tiles, v_tiles, warp, lane);
  } else {
    wgmma::take_registers<232>();
    consume<S, T>(p, barriers, q_tile, k_tiles, v_tiles, warp / 4 - 1, warp % 4, lane);
  }
#endif
}

// head_dim up to kDim; one unit of paged_prefill_sm90_units.cu for each kDim.
template <class T, int kDim>
void launch_bucket(const Params& p, unsigned grid, cudaStream_t stream);

}  // namespace pagedkv::prefill::sm90
