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
//   producer   a warp each for K, V, Q and for planning. The planner works items out and hands them to all others
//              through a ring. The loaders look pages up and let the copy engine (cp.async.bulk.tensor, one thread)
//              bring boxes of 64 columns: 16 keys, or 8 if a page has no more; of the query, whole groups of heads.
//              Where an edge crosses a box they copy single rows. What nobody may read (keys that no row needs, pages
//              that do not exist) is given coordinates outside of the tensor, and comes in as zeros.
//   consumers  each with 64 of the rows. A step of the loop, for tile j, across items:
//                S = Q K(j) issued | O += P(j - 1) V(j - 1) issued | S done: masks, maximum, exponentials of j, under
//                the products of the other | O done: rescale, or write it where an item ends | P(j)
//              They issue in turns (named barriers), so that one's softmax runs under the other's products.
//
// Shared memory: kQStages of Q [128, kDim], kStages of K and of V [kKeys, kDim], in the blocks of wgmma.cuh: K-major
// for Q and K, and the same layout read as MN-major for V. Barriers: `full` is completed by the copy engine's bytes,
// `empty` by a lane of each of the 8 consumer warps.
//
// Registers: 24 a thread for the producer, 240 for the consumers, which hold O (kDim / 2), S (kKeys / 2) and P (kKeys /
// 4). A row of S lies in 4 lanes; packed to 16 bit it is the A operand of P V as it stands.
//
// Floor: 4 * rows * keys * head_dim flops (half of it when causal) at the 790 TFLOP/s of an H200's dense bf16. Each
// item reads its keys through L2: 4 * kDim bytes a key for 512 * kDim flops a key, 5 TB/s at 640 TFLOP/s.
//
// Measured on an H200 (TFLOP/s; causal, bf16, page 16, 32/8 heads, head_dim 128; graph replay of this kernel alone):
//                                                                   512    2k    8k   32k   512 after 16k
//   four warps copy by cp.async, three stages                       129   358   455   448
//   one warp issues all boxes, from lane == 0                       115   328   437   464   399
//   a warp each for K and V, elect.sync instead of lane == 0        121   402   602   573   540
//   the query by the copy engine too, a ring of items               135   421   619   567   534
//   the same without loads (wrong, and cooler: the tiles hold NaN)  139   447   671   717   670
// To ptxas lane == 0 may be many lanes: it wraps every copy in a loop over them, and the loader is what all wait for.
// Head_dim 64 and 256 in the last form at 8k: 395 and 630. A softcap of 50: 396, the tanh being 10 more instructions an
// element; a window of 1024: 405. At 32k the clock falls: cuDNN makes 595 there in the same run.
//
// ncu at 8k: 3015 clocks a tile, tensor cores 67 % busy. A consumer is held 1100 of them issuing its products, which
// blocks it while the other's are running, and its softmax and what is around it take the other 1900, in which the
// other one issues: time follows the instructions between the products. Tried without gain: no turns, no `hold`, 24
// against 40 registers for the producer (+- 2 %), L2 promotion of 0, 128 or 256 bytes.
#pragma once

#include <cuda.h>

#include "paged_prefill.cuh"
#include "wgmma.cuh"

namespace pagedkv::prefill::sm90 {

template <int kDim_>
struct Shape {
  static constexpr int kDim = kDim_;
  static_assert(kDim == 64 || kDim == 128 || kDim == 256);
  static constexpr int kKeys = kDim > 128 ? 64 : 128;
  static constexpr int kStages = kDim > 64 ? 2 : 4, kQStages = kDim > 128 ? 1 : 2;
  static constexpr int kConsumers = 2;  // warpgroups
  static_assert(64 * kConsumers == kRows);
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * (65536 / kThreads / 8 * 8),
                "setmaxnreg would wait for registers that nobody gives");

  static constexpr int kQBlock = kRows * 128;  // bytes of 64 columns
  static constexpr int kKvBlock = kKeys * 128;
  static constexpr int kQBytes = kQBlock * (kDim / 64);
  static constexpr int kTileBytes = kKvBlock * (kDim / 64);
  static constexpr int kBytes = kQStages * kQBytes + 2 * kStages * kTileBytes + 1024;  // what alignment may cost
  static_assert(kBytes <= 226 * 1024, "a CTA's limit, less the barriers");
};

// What the kernel is given: the call, and its tensors as the copy engine sees them.
struct Call {
  Params p;
  CUtensorMap k, v;          // boxes of 64 columns and 1 << box_shift keys, which never straddle two pages
  CUtensorMap k_row, v_row;  // and of one key
  CUtensorMap q, q_row;      // likewise: a group's heads of 1 << q_box_shift tokens, one head of a token
  int box_shift, q_box_shift;
};

// A work item: its rows and the keys that they see.
struct Item {
  int sequence, kv_head, first_token, first_head, rows, query_start, shift;  // no rows: the last item has been
  int begin, end, all_begin, all_end;  // keys that some row sees, that every row sees
  int first_key, keys;                 // those that exist: a dense sequence may reach over the ends of K and V

  __device__ __forceinline__ int token_of(const Params& p, int r) const {
    return first_token + int(__umulhi(2u * uint32_t(first_head + r), p.group_magic));
  }
  __device__ __forceinline__ int head_of(const Params& p, int r, int token) const {  // of all query heads
    return kv_head * p.group + first_head + r - (token - first_token) * p.group;
  }
  __device__ __forceinline__ KeyRange seen(const Params& p, int r) const {
    const KeyRange range = visible_keys(p.a, shift + token_of(p, r), keys);
    return {max(range.lo, first_key), range.hi};
  }

  Item() = default;
  __device__ __forceinline__ Item(const Params& p, int sequence_, int row_tile, int kv_head_)
      : sequence(sequence_), kv_head(kv_head_) {
    const AttentionParams& a = p.a;
    const int query_len = a.query_len[sequence], seq_len = a.seq_lens[sequence];
    const int first_row = row_tile * kRows, length = readable_keys(a, seq_len);
    first_token = first_row / p.group;
    first_head = first_row - first_token * p.group;
    rows = int(min(int64_t(kRows), int64_t(query_len) * p.group - first_row));
    query_start = a.query_start[sequence];
    shift = seq_len - query_len;  // from a query's token number to its position
    first_key = 0, keys = length;
    if (!a.block_tables) {
      const int64_t start = a.key_start[sequence];
      first_key = int(min(int64_t(length), max(int64_t(0), -start)));
      keys = int(max(int64_t(0), min(int64_t(length), a.num_blocks - start)));
    }
    const int first = shift + first_token, last = shift + token_of(p, rows - 1);
    const KeyRange some = visible_keys(a, first, last, length);
    begin = some.lo, end = some.hi;
    all_begin = max(visible_keys(a, last, keys).lo, first_key);
    all_end = visible_keys(a, first, keys).hi;
  }
};

constexpr int kItems = 4;  // on their way through the CTA

template <class S>
struct Barriers {
  uint64_t item_full[kItems], item_empty[kItems], q_full[S::kQStages], q_empty[S::kQStages];
  uint64_t k_full[S::kStages], k_empty[S::kStages], v_full[S::kStages], v_empty[S::kStages];
  uint32_t holes[S::kStages];  // a bit for each 8 keys: their page does not exist
  Item items[kItems];
};

enum NamedBarrier { kTurnBarrier = 1 };  // 0 is __syncthreads; a turn for each consumer

#ifdef PAGEDKV_WGMMA

// Takes items from the counter, over all sequences. All lanes of a warp take part.
struct Planner {
  const Params& p;
  const int lane;
  int sequence = 0, before = 0;  // 32 sequences from here on are looked at; items of those in front
  int n = blockIdx.x;            // of the next item

  // The next item that has something to do; without rows when there are no more.
  __device__ __forceinline__ Item next() {
    Item item;
    do {
      int following = 0;
      if (lane == 0) following = int(gridDim.x) + atomicAdd(p.a.next_item, 1);
      item = find();
      n = __shfl_sync(~0u, following, 0);
    } while (item.rows > 0 && item.begin >= item.end);
    return item;
  }

 private:
  __device__ __forceinline__ Item find() {
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
        return Item(p, sequence + owner, row_tiles - 1 - row, m - row * a.num_kv_heads);
      }
      before += total;
    }
    Item none;
    none.rows = 0;
    return none;
  }
};

// The next item in the ring, for the warp. Only the lane that arrives reads what will be overwritten.
template <class S>
__device__ __forceinline__ Item take_item(Barriers<S>& barriers, wgmma::Ring<kItems>& ring, int lane) {
  wgmma::barrier_wait(barriers.item_full[ring.index], ring.parity);
  const int* const words = reinterpret_cast<const int*>(&barriers.items[ring.index]);
  Item item;
#pragma unroll
  for (int i = 0; i < int(sizeof(Item) / 4); ++i)
    reinterpret_cast<int*>(&item)[i] = __shfl_sync(~0u, lane == 0 ? words[i] : 0, 0);
  if (lane == 0) wgmma::barrier_arrive(barriers.item_empty[ring.index]);
  ring.advance();
  return item;
}

// Warps 0 and 1 of the producer: an item's tiles of K, or of V. Lane l looks after box l of each tile.
template <class S>
struct Loader {
  const Call& call;
  const Item& item;
  const int lane;
  const int begin = max(item.begin, item.first_key), end = min(item.end, item.keys);  // that are wanted and exist
  const int nowhere = call.p.a.block_tables ? call.p.pages : 1;
  const uint32_t first_row = call.p.a.block_tables ? 0 : uint32_t(call.p.a.key_start[item.sequence]);
  const int row_mask = call.p.a.block_tables ? (1 << call.p.page_shift) - 1 : -1;

  __device__ __forceinline__ int row_of(int key) const { return int(first_row + uint32_t(key & row_mask)); }
  __device__ __forceinline__ int key_of(int tile) const { return tile * S::kKeys + (lane << call.box_shift); }
  __device__ __forceinline__ bool in_reach(int tile) const {
    return lane << call.box_shift < S::kKeys && key_of(tile) + (1 << call.box_shift) > begin && key_of(tile) < end;
  }
  // The last coordinate of this lane's box. Keys that no row needs and pages that do not exist lie outside of the map:
  // they come in as zeros and are masked.
  __device__ __forceinline__ int page_of(int tile) const {
    const AttentionParams& a = call.p.a;
    if (!in_reach(tile)) return nowhere;
    if (!a.block_tables) return 0;
    const int page = a.block_tables[item.sequence * a.table_stride + (key_of(tile) >> call.p.page_shift)];
    return uint32_t(page) < uint32_t(nowhere) ? page : nowhere;
  }
  __device__ __forceinline__ void copy(const CUtensorMap& boxes, const CUtensorMap& rows, uint32_t target,
                                       uint64_t& barrier, int tile, int page) const {
    const int key0 = tile * S::kKeys, box_rows = 1 << call.box_shift;
    auto copy_columns = [&](const CUtensorMap& map, int row, int from, int to) {
#pragma unroll
      for (int block = 0; block < S::kDim / 64; ++block)
        wgmma::copy_box(target + block * S::kKvBlock + row * 128, map, barrier, 64 * block, from, item.kv_head, to);
    };
    if (lane == 0) wgmma::barrier_arrive_expecting(barrier, S::kTileBytes);
    if (key0 >= begin && key0 + S::kKeys <= end) {
#pragma unroll 1
      for (int row = 0; row < S::kKeys; row += 4 * box_rows) {
        int pages[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) pages[i] = __shfl_sync(~0u, page, (row >> call.box_shift) + i);
        if (wgmma::elect())
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int r = row + i * box_rows;
            copy_columns(boxes, r, row_of(key0 + r), pages[i]);
          }
      }
    } else {  // an edge crosses the tile: single rows from the box that it crosses
#pragma unroll 1
      for (int row = 0; row < S::kKeys; row += box_rows) {
        const int box_page = __shfl_sync(~0u, page, row >> call.box_shift), key = key0 + row;
        const bool whole = box_page == nowhere || (key >= begin && key + box_rows <= end);
        if (wgmma::elect())
#pragma unroll 1
          for (int r = 0; r < box_rows; r += whole ? box_rows : 1) {
            const bool exists = whole || (key + r >= begin && key + r < end);
            copy_columns(whole ? boxes : rows, row + r, row_of(key + r), exists ? box_page : nowhere);
          }
      }
    }
  }
  __device__ __forceinline__ void load(const CUtensorMap& boxes, const CUtensorMap& rows, uint32_t tiles,
                                       uint64_t* full, uint64_t* empty, wgmma::Ring<S::kStages>& ring,
                                       uint32_t* holes) const {
    const int first_tile = item.begin / S::kKeys, last_tile = (item.end - 1) / S::kKeys;
    int page = page_of(first_tile), ahead = page_of(first_tile + 1);
#pragma unroll 1
    for (int tile = first_tile; tile <= last_tile; ++tile) {
      wgmma::barrier_wait(empty[ring.index], ring.parity ^ 1);
      if (holes) {
        const bool hole = in_reach(tile) && page == nowhere;
        const uint32_t bits = __ballot_sync(~0u, __shfl_sync(~0u, int(hole), lane >> (call.box_shift - 3)));
        if (lane == 0) holes[ring.index] = bits;
      }
      copy(boxes, rows, tiles + ring.index * S::kTileBytes, full[ring.index], tile, page);
      ring.advance();
      page = ahead, ahead = page_of(tile + 2);
    }
  }
};

// Warp 2: an item's queries, packed rows. Rows that do not exist are zeros as far as a warp of consumers has others.
template <class S>
__device__ __forceinline__ void copy_queries(const Call& call, const Item& item, uint32_t q_tile, uint64_t& barrier) {
  const Params& p = call.p;
  const int padded = (item.rows + 15) & ~15, box_rows = p.group << call.q_box_shift;
  if (!wgmma::elect()) return;
  wgmma::barrier_arrive_expecting(barrier, padded * (2 * S::kDim));
  int head = item.first_head, token = item.query_start + item.first_token;
#pragma unroll 1
  for (int r = 0; r < padded;) {
    const bool whole = head == 0 && r + box_rows <= item.rows;
#pragma unroll
    for (int block = 0; block < S::kDim / 64; ++block)
      wgmma::copy_box(q_tile + block * S::kQBlock + r * 128, whole ? call.q : call.q_row, barrier, 64 * block, head,
                      item.kv_head, r < item.rows ? token : p.a.num_tokens);
    if (whole) {
      r += box_rows, token += 1 << call.q_box_shift;
    } else {
      ++r;
      if (++head == p.group) head = 0, ++token;
    }
  }
}

template <class S>
__device__ __forceinline__ void produce(const Call& call, Barriers<S>& barriers, uint32_t q_tiles, uint32_t k_tiles,
                                        uint32_t v_tiles, int warp, int lane) {
  wgmma::Ring<kItems> item_ring;
  if (warp < 2) {
    wgmma::Ring<S::kStages> ring;
    for (;;) {
      const Item item = take_item(barriers, item_ring, lane);
      if (item.rows == 0) return;
      const Loader<S> loader{call, item, lane};
      if (warp == 0)
        loader.load(call.k, call.k_row, k_tiles, barriers.k_full, barriers.k_empty, ring, barriers.holes);
      else
        loader.load(call.v, call.v_row, v_tiles, barriers.v_full, barriers.v_empty, ring, nullptr);
    }
  }
  if (warp == 2) {
    wgmma::Ring<S::kQStages> ring;
    for (;;) {
      const Item item = take_item(barriers, item_ring, lane);
      if (item.rows == 0) return;
      wgmma::barrier_wait(barriers.q_empty[ring.index], ring.parity ^ 1);
      copy_queries<S>(call, item, q_tiles + ring.index * S::kQBytes, barriers.q_full[ring.index]);
      ring.advance();
    }
  }
  Planner planner{call.p, lane};
  for (;;) {
    const Item item = planner.next();
    wgmma::barrier_wait(barriers.item_empty[item_ring.index], item_ring.parity ^ 1);
    if (lane == 0) {
      barriers.items[item_ring.index] = item;
      wgmma::barrier_arrive(barriers.item_full[item_ring.index]);
    }
    if (item.rows == 0) return;
    item_ring.advance();
  }
}

template <class S, class T>
__device__ __forceinline__ void consume(const Params& p, Barriers<S>& barriers, uint32_t q_tiles, uint32_t k_tiles,
                                        uint32_t v_tiles, int group, int warp, int lane) {
  constexpr int kDim = S::kDim, kKeys = S::kKeys;
  const AttentionParams& a = p.a;
  // Products, to which a block of 64 columns is four steps of 16
  const uint64_t q_base = wgmma::descriptor(q_tiles + group * 64 * 128, 16);
  const uint64_t k_base = wgmma::descriptor(k_tiles, 16), v_base = wgmma::descriptor(v_tiles, S::kKvBlock);
  float out[kDim / 2], s[kKeys / 2];
  uint32_t weights[kKeys / 16][4];
  wgmma::Ring<kItems> item_ring;
  wgmma::Ring<S::kQStages> q_ring;
  wgmma::Ring<S::kStages> k_ring, v_ring;
  auto multiply_k = [&] {
    wgmma::pin(s);
    wgmma::fence();
    const uint64_t q = q_base + q_ring.index * (S::kQBytes / 16), k = k_base + k_ring.index * (S::kTileBytes / 16);
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d)
      wgmma::multiply<T, kKeys>(s, q + d / 4 * (S::kQBlock / 16) + d % 4 * 2,
                                k + d / 4 * (S::kKvBlock / 16) + d % 4 * 2, d > 0);
    wgmma::commit();
    wgmma::pin(s);
  };
  auto multiply_v = [&] {
    wgmma::pin(out);
    wgmma::fence();
    const uint64_t v = v_base + v_ring.index * (S::kTileBytes / 16);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
      wgmma::multiply_add<T, kDim>(out, weights[k], v + k * (2 * wgmma::kAtomBytes / 16));
    wgmma::commit();
    wgmma::pin(out);
  };
  // The lane that arrives for its warp is also the one that reads what the producer will overwrite
  auto release = [&](uint64_t& barrier) {
    __syncwarp();
    if (lane == 0) wgmma::barrier_arrive(barrier);
  };
  auto from_producer = [&](const auto& x) { return __shfl_sync(~0u, lane == 0 ? x : 0, 0); };

  // The item that `s` belongs to, its tile, and the state of its rows: this lane's, and the one 8 below
  const int my_row = group * 64 + warp * 16 + (lane >> 2);
  Item item;
  int tile, last_tile;
  float top[2];     // what is subtracted from a row's logits, in powers of two: about its maximum
  float sum[2];     // this lane's part of the sum of exponentials
  float factor[2];  // of what `out` has to be multiplied by
  bool grown;       // a factor of this warp is not 1

  auto begin_item = [&] {
    const Item next = take_item(barriers, item_ring, lane);
    if (next.rows == 0) return false;
    item = next;
    tile = item.begin / kKeys, last_tile = (item.end - 1) / kKeys;
    top[0] = top[1] = kNegInf, sum[0] = sum[1] = 0.f;
    wgmma::barrier_wait(barriers.q_full[q_ring.index], q_ring.parity);
    return true;
  };
  auto release_k = [&] {
    release(barriers.k_empty[k_ring.index]);
    k_ring.advance();
    if (tile < last_tile) return;
    release(barriers.q_empty[q_ring.index]);
    q_ring.advance();
  };

  // Dot products -> exponentials, in place
  auto softmax = [&](uint32_t holes) {
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
        const int row = min(my_row + 8 * h, item.rows - 1), token = item.token_of(p, row);
        const float slope = a.alibi_slopes[item.head_of(p, row, token)];
        const int distance = lane_key - (item.shift + token);
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) s[4 * n + 2 * h + i] += slope * float(distance + 8 * n + i);
      }
    }
    // Masks
    if (key0 < item.all_begin || key0 + kKeys > item.all_end) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const KeyRange seen = item.seen(p, my_row + 8 * h);
        const int low = seen.lo - lane_key, high = seen.hi - lane_key;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (8 * n + i < low || 8 * n + i >= high) s[4 * n + 2 * h + i] = kNegInf;
      }
    }
    if (holes) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
        if (holes >> n & 1) s[4 * n] = s[4 * n + 1] = s[4 * n + 2] = s[4 * n + 3] = kNegInf;
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

  struct Done {
    Item item;
    float top[2], sum[2];
  };
  auto write = [&](const Done& done) {
  // Normalise and write. The sink is one more term of the sum; a row that saw nothing, since no page exists, becomes
  // 0 and -inf. Neighbouring lanes trade halves, so that each row gets whole sectors of 32 bytes.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = done.sum[h];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const int row = my_row + 8 * h, token = done.item.token_of(p, row);
      const int head = done.item.head_of(p, row, token);
      const int64_t q_row = int64_t(done.item.query_start) + token;
      const bool exists = row < done.item.rows && q_row >= 0 && q_row < a.num_tokens;
      const bool seen = total != 0.f;
      float scale = seen ? 1.f : 0.f, base = done.top[h];
      if (exists) {
        if (seen && a.sinks) {
          const float sink = a.sinks[head] * kLog2e;
          base = fmaxf(base, sink);
          scale = exp2_fast(done.top[h] - base);
          total = total * scale + exp2_fast(sink - base);
        }
        if (seen) scale /= total;
        if (a.lse && (lane & 3) == 0) a.lse[q_row * a.num_heads + head] = seen ? base * kLn2 + logf(total) : kNegInf;
      }
      const bool odd = lane & 1;
      const int column = odd ? 8 + 2 * ((lane & 3) - 1) : 2 * (lane & 3);
      const int64_t at = (q_row * a.num_heads + head) * a.head_dim;
      T* const target = static_cast<T*>(a.out) + at + column;
      float* const states = static_cast<float*>(a.out) + at + 2 * (lane & 3);
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        const float2 low = make_float2(out[8 * d + 2 * h] * scale, out[8 * d + 2 * h + 1] * scale);
        const float2 high = make_float2(out[8 * d + 4 + 2 * h] * scale, out[8 * d + 4 + 2 * h + 1] * scale);
        const uint32_t left = pack2<T>(low.x, low.y), right = pack2<T>(high.x, high.y);
        const uint32_t other = __shfl_xor_sync(~0u, odd ? left : right, 1);
        if (a.states) {
          const int first = 16 * d + 2 * (lane & 3);
          if (exists && first < a.head_dim) *reinterpret_cast<float2*>(states + 16 * d) = low;
          if (exists && first + 8 < a.head_dim) *reinterpret_cast<float2*>(states + 16 * d + 8) = high;
        } else if (exists && 16 * d + column < a.head_dim) {
          *reinterpret_cast<uint2*>(target + 16 * d) = odd ? make_uint2(other, right) : make_uint2(left, other);
        }
      }
    }
  };

  if (!begin_item()) return;
  if (group == 0) wgmma::named_arrive(kTurnBarrier, 256);  // the first turn
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) out[i] = 0.f;
  wgmma::barrier_wait(barriers.k_full[k_ring.index], k_ring.parity);
  uint32_t holes = from_producer(barriers.holes[k_ring.index]);
  multiply_k();
  wgmma::wait<0>();
  wgmma::pin(s);
  release_k();
  softmax(holes);
  pack();
  Done done;
#pragma unroll 1
  for (;;) {
    const bool ends = tile == last_tile;
    if (ends) {
      done = {item, {top[0], top[1]}, {sum[0], sum[1]}};
      if (!begin_item()) {
        wgmma::barrier_wait(barriers.v_full[v_ring.index], v_ring.parity);
        multiply_v();
        wgmma::wait<0>();
        wgmma::pin(out);
        write(done);
        return;
      }
    } else {
      ++tile;
    }
    wgmma::barrier_wait(barriers.k_full[k_ring.index], k_ring.parity);
    holes = from_producer(barriers.holes[k_ring.index]);
    wgmma::named_sync(kTurnBarrier + group, 256);
    multiply_k();
    wgmma::barrier_wait(barriers.v_full[v_ring.index], v_ring.parity);
    multiply_v();
    wgmma::named_arrive(kTurnBarrier + (group ^ 1), 256);
    wgmma::wait<1>();
    wgmma::pin(s);
    release_k();
    softmax(holes);
    wgmma::hold(sum[0] + sum[1]);  // or nothing would run under P V
    wgmma::wait<0>();
    wgmma::pin(out);
    wgmma::pin(s);
    release(barriers.v_empty[v_ring.index]);
    v_ring.advance();
    if (ends) {
      write(done);
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) out[i] = 0.f;
    } else {
      rescale();
    }
    pack();
  }
}

#endif

template <class T, int kDim>
__global__ void __launch_bounds__(Shape<kDim>::kThreads, 1) prefill_sm90_kernel(const __grid_constant__ Call call) {
#ifdef PAGEDKV_WGMMA
  using S = Shape<kDim>;
  extern __shared__ unsigned char dynamic_shared[];
  __shared__ Barriers<S> barriers;
  const uint32_t q_tiles = (smem_address(dynamic_shared) + 1023) & ~1023u;
  const uint32_t k_tiles = q_tiles + S::kQStages * S::kQBytes, v_tiles = k_tiles + S::kStages * S::kTileBytes;
  const int lane = threadIdx.x & 31;
  const int warp = __shfl_sync(~0u, int(threadIdx.x >> 5), 0);  // tells the compiler that it is uniform
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&call.q, &call.k, &call.v, &call.q_row, &call.k_row, &call.v_row})
      wgmma::prefetch_map(*map);
    constexpr int kWarps = 4 * S::kConsumers;
    for (int i = 0; i < kItems; ++i) {
      wgmma::barrier_init(barriers.item_full[i], 1);
      wgmma::barrier_init(barriers.item_empty[i], 3 + kWarps);
    }
    for (int i = 0; i < S::kQStages; ++i) {
      wgmma::barrier_init(barriers.q_full[i], 1);
      wgmma::barrier_init(barriers.q_empty[i], kWarps);
    }
    for (int i = 0; i < S::kStages; ++i) {
      wgmma::barrier_init(barriers.k_full[i], 1);
      wgmma::barrier_init(barriers.k_empty[i], kWarps);
      wgmma::barrier_init(barriers.v_full[i], 1);
      wgmma::barrier_init(barriers.v_empty[i], kWarps);
    }
    wgmma::fence_async_proxy();  // the copy engine will see them
  }
  __syncthreads();
  if (warp < 4) {
    wgmma::give_registers<S::kProducerRegisters>();
    produce<S>(call, barriers, q_tiles, k_tiles, v_tiles, warp, lane);
  } else {
    wgmma::take_registers<S::kConsumerRegisters>();
    consume<S, T>(call.p, barriers, q_tiles, k_tiles, v_tiles, warp / 4 - 1, warp % 4, lane);
  }
#endif
}

// head_dim up to kDim; one unit of paged_prefill_sm90_units.cu for each kDim.
template <class T, int kDim>
void launch_bucket(const Call& call, unsigned grid, cudaStream_t stream);

}  // namespace pagedkv::prefill::sm90
