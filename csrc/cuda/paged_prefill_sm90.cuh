// Attention of many query rows over a paged or dense 16-bit KV cache on Hopper's tensor cores (wgmma, sm_90a). What
// paged_prefill.cuh does by mma.sync, for head_dim 33 .. 256, without 8-bit caches and with a query aligned to 16
// bytes; the rest stays there, and so do all other GPUs.
//
// Algorithm: FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608) over pages. Work item: kRows = 128 or 192 query
// rows of one sequence and one KV head, the heads that share it packed as rows (row = token * group + head in group).
// Keys are walked upwards in tiles of kKeys from key 0, with an online softmax; tiles that no row sees are not visited,
// only those that an edge crosses are masked.
//
// A CTA stays on its SM and takes items from a counter in global memory until there are no more, the next one when its
// last is about to end: those of the first sequence first, in it as many KV heads side by side as fit in L2, the last
// rows first, which under a causal mask have most keys. Three or four warpgroups:
//   producer   a warp each for K, V, Q and for planning. The planner works items out and hands them to all others
//              through a ring, and looks for pages that do not exist. The loaders look pages up and let the copy engine
//              (cp.async.bulk.tensor, one thread) bring boxes of 64 columns: 16 keys, or 8 if a page has no more; of
//              the query, whole groups of heads. Where an edge crosses a box they copy single rows. What nobody may
//              read (keys that no row needs, pages that do not exist) is given coordinates outside of the tensor, and
//              comes in as zeros.
//   consumers  each with 64 of the rows. Three of them take one step after the other (S = Q K, softmax, O += P V): what
//              runs under a softmax are the products of the other two. Two of them must overlap with themselves. A
//              step, for tile j, across items:
//                S = Q K(j) issued | O += P(j - 1) V(j - 1) issued | S done: masks, maximum, exponentials of j, under
//                the products of the other | O done: rescale, or write it where an item ends | P(j)
//              In head_dim 256 they issue in turns (named barriers), so that one's softmax runs under the other's
//              products.
// Two consumers where there are few items, or the head is too wide for the registers of three
// (paged_prefill_sm90_units.cu).
//
// Shared memory: kQStages of Q [kRows, kDim], kStages of K and of V [kKeys, kDim], in the blocks of wgmma.cuh: K-major
// for Q and K, and the same layout read as MN-major for V. Barriers: `full` is completed by the copy engine's bytes,
// `empty` by a lane of each consumer warp. An item stays in the ring until it is written: what the masks and the
// results need of it is read from there when it is needed.
//
// The kernel overlaps with those around it (wait_for_previous). Its two counters are 0 when it starts and when it ends,
// and producers without anything left to load write the rows that no sequence owns or that see no key: there is no
// kernel in front for either.
//
// Registers: 24 or 32 a thread for the producer; 240 for two consumers, which hold O (kDim / 2), S (kKeys / 2) and P
// (kKeys / 4), 160 for three, where P takes the place of S. A row of S lies in 4 lanes; packed to 16 bit it is the A
// operand of P V as it stands.
//
// Floor: 4 * rows * keys * head_dim flops (half of it when causal) at the 790 TFLOP/s of an H200's dense bf16. Each
// item reads its keys through L2: 4 * kDim bytes a key for 4 * kRows * kDim flops a key, 5 TB/s at 640 TFLOP/s and 128
// rows.
//
// Measured on an H200 (TFLOP/s; causal, bf16, page 16, 32/8 heads, head_dim 128; graph replay of this kernel alone, the
// last three lines in one run; at 32k the clock falls):
//                                                                   512    2k    8k   32k   512 after 16k
//   four warps copy by cp.async, three stages                       129   358   455   448
//   one warp issues all boxes, from lane == 0                       115   328   437   464   399
//   a warp each for K and V, elect.sync instead of lane == 0        121   402   602   573   540
//   the query by the copy engine too, a ring of items               132   396   612   573   588
//   next item late; items and masks out of the way of the loop      136   473   629         596
//   the same with three consumers, 192 rows                         111   479   679   666   457 (fewer items than SMs)
// No kernel in front, which took 0 into the counter and filled rows, and the start under the end of the kernel before
// (whole calls, us): 512 17.8 -> 15.1, 2k 76.2 -> 71.5, 2k of 32 KV heads 83.4 -> 77.3, 9 heads of 64 29.4 -> 28.0.
// FA3 as in vLLM makes 618 at 8k, 590 at 32k and 635 after 16k beside 667, 646 and 593, cuBLAS 669 in the same run.
// To ptxas lane == 0 may be many lanes: it wraps every copy in a loop over them, and the loader is what all wait for.
// When items were taken as soon as the ring had room, the first CTAs had five of them before others had two: a third
// of the time at 2k. The rest is the time of the softmax, which a consumer's products wait for; it went into addresses
// of barriers worked out again from a special register, items moved from register to register, and five jumps over code
// that does not run, each a miss of the instruction cache.
//   head_dim 64, 8k    384 before; two consumers 422, three 488 (447 overlapped with themselves)
//   head_dim 256, 8k   625 before; 727 (711 without turns)
//   softcap 50, 8k     404 before; 555 by tanh.approx. Its relative error of 2^-11 is a quarter of a rounding to bf16,
//                      but far from float32: where an lse is asked for, tanh costs ten instructions.
//   window 4096, 16k   584 before; 665
// Rows have the same bits by two consumers and by three.
//
// Tried without gain: some of the exponentials by polynomials on the multipliers (1, 2 or 3 of 8: 4, 8, 13 % slower),
// the soft cap by an odd polynomial where all logits of a warp's tile lie below it (10 % slower: 8k 1176 us for 1073;
// tanh.approx and ex2.approx of 16-bit pairs are two instructions of their unit, too), turns of two consumers in
// head_dim 128 (512 after 16k: 255 us for 252), a third stage of K and V in place of a second one of Q (0 .. 5 %
// slower), a part of the next tile fetched into L2 by each CTA (0 .. 1 % slower), two tiles' notice of an item's end
// instead of one, 16 MB of L2 or all heads side by side (+- 2 %), 24 against 40 registers for the producer, L2
// promotion of 0, 128 or 256 bytes. Long prompts run into the power limit: at 8k an H200 clocked 1.67 GHz at 729 W,
// with a soft cap 1.89 GHz; what costs instructions there costs clocks.
#pragma once

#include <cuda.h>

#include "attention_plan.cuh"
#include "paged_prefill.cuh"
#include "wgmma.cuh"

namespace pagedkv::prefill::sm90 {

template <int kDim_, int kConsumers_>
struct Shape {
  static constexpr int kDim = kDim_, kConsumers = kConsumers_;  // the latter are warpgroups
  static_assert(kDim == 64 || kDim == 128 || kDim == 256);
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kKeys = kDim > 128 ? 64 : 128;
  static constexpr int kStages = kDim > 64 ? 2 : 4, kQStages = kDim > 128 ? 1 : 2;
  static constexpr bool kOverlap = kConsumers == 2;  // products of a warpgroup run under its own softmax
  static constexpr bool kTurns = kDim > 128;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = kConsumers > 2 ? 32 : 24, kConsumerRegisters = kConsumers > 2 ? 160 : 240;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * (65536 / kThreads / 8 * 8),
                "setmaxnreg would wait for registers that nobody gives");

  static constexpr int kQBlock = kRows * 128;  // bytes of 64 columns
  static constexpr int kKvBlock = kKeys * 128;
  static constexpr int kQBytes = kQBlock * (kDim / 64);
  static constexpr int kTileBytes = kKvBlock * (kDim / 64);
  static constexpr int kTiles = kQStages * kQBytes + 2 * kStages * kTileBytes;
  static constexpr int kBytes = kTiles + 2048;  // 1024 for the barriers, and what alignment may cost
  static_assert(kBytes <= 227 * 1024, "a CTA's limit");
};

// What the kernel is given: the call, and its tensors as the copy engine sees them.
struct Call {
  Params p;
  CUtensorMap k, v;          // boxes of 64 columns and 1 << box_shift keys, which never straddle two pages
  CUtensorMap k_row, v_row;  // and of one key
  CUtensorMap q, q_row;      // likewise: a group's heads of 1 << q_box_shift tokens, one head of a token
  int box_shift, q_box_shift;
  int* counters;  // [2], of take_counters: items that were taken beyond each CTA's first, CTAs that take no more
};

// A work item: its rows and the keys that they see.
struct Item {
  int rows;                     // none: the last item has been
  int first_tile, last_tile;    // of the keys
  int plain_tile, plain_tiles;  // the first that needs no mask, and how many there are
  int sequence, kv_head, first_token, first_head, query_start, shift;
  int begin, end;       // keys that some row sees
  int first_key, keys;  // those that exist: a dense sequence may reach over the ends of K and V

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
  template <class S>
  __device__ __forceinline__ Item(S, const Params& p, int sequence_, int seq_len, int query_len, int query_start_,
                                  int row_tile, int kv_head_)
      : sequence(sequence_), kv_head(kv_head_), query_start(query_start_) {
    const AttentionParams& a = p.a;
    const int first_row = row_tile * S::kRows, length = readable_keys(a, seq_len);
    first_token = first_row / p.group;
    first_head = first_row - first_token * p.group;
    rows = int(min(int64_t(S::kRows), int64_t(query_len) * p.group - first_row));
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
    first_tile = begin / S::kKeys, last_tile = (end - 1) / S::kKeys;
    // Seen by every row: from where the last row's keys begin to where the first row's end
    const int all_begin = max(visible_keys(a, last, keys).lo, first_key), all_end = visible_keys(a, first, keys).hi;
    plain_tile = (all_begin + S::kKeys - 1) / S::kKeys;
    plain_tiles = max(0, all_end / S::kKeys - plain_tile);
  }
};
static_assert(sizeof(Item) % 4 == 0);

constexpr int kItems = 4;  // on their way through the CTA

template <class S>
struct Barriers {
  uint64_t wanted, item_full[kItems], item_checked[kItems], item_empty[kItems];
  uint64_t q_full[S::kQStages], q_empty[S::kQStages];
  uint64_t k_full[S::kStages], k_empty[S::kStages], v_full[S::kStages], v_empty[S::kStages];
  Item items[kItems];
  int holes[kItems];  // a page of the item does not exist; from item_checked on
};

constexpr int64_t kL2Bytes = 32 << 20;  // of an H200's 50 MB, which two halves share

enum NamedBarrier { kTurnBarrier = 1 };  // 0 is __syncthreads; a turn for each consumer

#ifdef PAGEDKV_WGMMA

// Takes items from the counter, over all sequences. All lanes of a warp take part.
template <class S>
struct Planner {
  const Params& p;
  int* const counters;
  const int lane;
  int sequence = 0, before = 0;  // 32 sequences from here on are looked at; items of those in front
  int n = blockIdx.x;            // of the next item

  // The next item that has something to do; without rows when there are no more.
  __device__ __forceinline__ Item next(bool first) {
    Item item;
    do {
      if (!first) {
        if (lane == 0) n = int(gridDim.x) + atomicAdd(counters, 1);
        n = __shfl_sync(~0u, n, 0);
      }
      first = false;
      item = find();
    } while (item.rows > 0 && item.begin >= item.end);
    return item;
  }

  // There are no more items. The last CTA to find out leaves the counters as they were.
  __device__ __forceinline__ void finish() const {
    if (lane > 0) return;
    __threadfence();
    if (atomicAdd(counters + 1, 1) == int(gridDim.x) - 1) counters[0] = counters[1] = 0;
  }

  // Whether a page of the item does not exist.
  __device__ __forceinline__ bool holes(const Item& item) const {
    if (!p.a.block_tables) return false;
    const int* const table = p.a.block_tables + item.sequence * p.a.table_stride;
    const int last = (item.end - 1) >> p.page_shift;
    bool missing = false;
#pragma unroll 4
    for (int i = (item.begin >> p.page_shift) + lane; i <= last; i += 32)
      missing |= uint32_t(table[i]) >= uint32_t(p.pages);
    return __any_sync(~0u, missing);
  }

 private:
  // KV heads side by side, as many as L2 has room for: what one CTA reads, others that are as far find there.
  __device__ __forceinline__ int heads_together(int keys) const {
    const int64_t bytes = int64_t(keys) * p.a.head_dim * 4;
    int heads = 1;
    while (2 * heads <= p.a.num_kv_heads && 2 * heads * bytes <= kL2Bytes) heads *= 2;
    return 2 * heads <= p.a.num_kv_heads ? heads : p.a.num_kv_heads;
  }
  __device__ __forceinline__ Item find() {
    const AttentionParams& a = p.a;
    for (; sequence < a.num_seqs; sequence += 32) {
      const int s = sequence + lane;
      int tiles = 0, keys = 0, queries = 0, start = 0;
      if (s < a.num_seqs) keys = a.seq_lens[s], queries = a.query_len[s], start = a.query_start[s];
      if (keys > 0 && queries > 0)
        tiles = int((int64_t(min(queries, a.max_query_len)) * p.group + S::kRows - 1) / S::kRows);
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
        const int row_tiles = __shfl_sync(~0u, tiles, owner);
        keys = __shfl_sync(~0u, keys, owner);
        queries = __shfl_sync(~0u, queries, owner);
        start = __shfl_sync(~0u, start, owner);
        const int heads = heads_together(keys);
        int m = n - before - __shfl_sync(~0u, sum - items, owner);
        const int first_head = m / (heads * row_tiles) * heads;
        m -= first_head * row_tiles;
        const int width = min(heads, a.num_kv_heads - first_head), row = m / width;
        return Item(S{}, p, sequence + owner, keys, queries, start, row_tiles - 1 - row, first_head + m - row * width);
      }
      before += total;
    }
    Item none;
    none.rows = 0;
    return none;
  }
};

// What is in the ring, for the warp. Only the lane that arrives reads what will be overwritten.
__device__ __forceinline__ Item read_item(const Item& from, int lane) {
  Item item;
#pragma unroll
  for (int i = 0; i < int(sizeof(Item) / 4); ++i) {
    int word = 0;
    if (lane == 0) word = wgmma::load_shared(reinterpret_cast<const int*>(&from)[i]);
    reinterpret_cast<int*>(&item)[i] = __shfl_sync(~0u, word, 0);
  }
  return item;
}
template <class S>
__device__ __forceinline__ Item take_item(Barriers<S>& barriers, wgmma::Count<kItems>& ring, int lane) {
  wgmma::barrier_wait(barriers.item_full[ring.index()], ring.parity());
  const Item item = read_item(barriers.items[ring.index()], lane);
  if (lane == 0) wgmma::barrier_arrive(barriers.item_empty[ring.index()]);
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
  // Announces by `wanted` that it is about to end.
  __device__ __forceinline__ void load(const CUtensorMap& boxes, const CUtensorMap& rows, uint32_t tiles,
                                       uint64_t* full, uint64_t* empty, wgmma::Count<S::kStages>& ring,
                                       uint64_t* wanted) const {
    int page = page_of(item.first_tile), ahead = page_of(item.first_tile + 1);
#pragma unroll 1
    for (int tile = item.first_tile; tile <= item.last_tile; ++tile) {
      if (wanted && lane == 0 && tile == max(item.first_tile, item.last_tile - 1)) wgmma::barrier_arrive(*wanted);
      wgmma::barrier_wait(empty[ring.index()], ring.parity() ^ 1);
      copy(boxes, rows, tiles + ring.index() * S::kTileBytes, full[ring.index()], tile, page);
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
  wgmma::Count<kItems> item_ring;
  if (warp < 2) {
    wgmma::Count<S::kStages> ring;
    for (;;) {
      const Item item = take_item(barriers, item_ring, lane);
      if (item.rows == 0) return;
      const Loader<S> loader{call, item, lane};
      if (warp == 0)
        loader.load(call.k, call.k_row, k_tiles, barriers.k_full, barriers.k_empty, ring, &barriers.wanted);
      else
        loader.load(call.v, call.v_row, v_tiles, barriers.v_full, barriers.v_empty, ring, nullptr);
    }
  }
  if (warp == 2) {
    wgmma::Count<S::kQStages> ring;
    for (;;) {
      const Item item = take_item(barriers, item_ring, lane);
      if (item.rows == 0) return;
      wgmma::barrier_wait(barriers.q_empty[ring.index()], ring.parity() ^ 1);
      copy_queries<S>(call, item, q_tiles + ring.index() * S::kQBytes, barriers.q_full[ring.index()]);
      ring.advance();
    }
  }
  Planner<S> planner{call.p, call.counters, lane};
  wgmma::Count<1> wanted;
  for (bool first = true;; first = false) {
    if (!first) {
      wgmma::barrier_wait(barriers.wanted, wanted.parity());
      wanted.advance();
    }
    const Item item = planner.next(first);
    wgmma::barrier_wait(barriers.item_empty[item_ring.index()], item_ring.parity() ^ 1);
    if (lane == 0) {
      barriers.items[item_ring.index()] = item;
      wgmma::barrier_arrive(barriers.item_full[item_ring.index()]);
    }
    // The loaders are at it; only the consumers need to know this
    const bool holes = item.rows > 0 && planner.holes(item);
    if (lane == 0) {
      barriers.holes[item_ring.index()] = holes;
      wgmma::barrier_arrive(barriers.item_checked[item_ring.index()]);
    }
    if (item.rows == 0) return planner.finish();
    item_ring.advance();
  }
}

// A warpgroup of consumers: its 64 rows of every item.
template <class S, class T>
struct Consumer {
  static constexpr int kDim = S::kDim, kKeys = S::kKeys;
  const Params& p;
  Barriers<S>& barriers;
  const int group, lane;
  const int my_row;    // of the item, and the one 8 below
  const bool unusual;  // logits
  // Products, to which a block of 64 columns is four steps of 16
  const uint32_t q_base, k_base, v_base;
  float out[kDim / 2], s[kKeys / 2];
  uint32_t weights[kKeys / 16][4];
  wgmma::Count<kItems> item_ring;  // of the item that `s` belongs to
  wgmma::Count<S::kQStages> q_ring;
  wgmma::Count<S::kStages> k_ring, v_ring;
  int tile, last_tile, plain_tile, plain_tiles;
  float top[2];     // what is subtracted from a row's logits, in powers of two: about its maximum
  float sum[2];     // this lane's part of the sum of exponentials
  float factor[2];  // of what `out` has to be multiplied by
  bool grown;       // a factor of this warp is not 1

  __device__ __forceinline__ Consumer(const Params& p_, Barriers<S>& barriers_, uint32_t q_tiles, uint32_t k_tiles,
                                      uint32_t v_tiles, int group_, int warp, int lane_)
      : p(p_),
        barriers(barriers_),
        group(group_),
        lane(lane_),
        my_row(group_ * 64 + warp * 16 + (lane_ >> 2)),
        unusual(p_.a.softcap > 0.f || p_.logit_scale != 1.f || p_.a.alibi_slopes),
        q_base(wgmma::descriptor_low(q_tiles + group_ * 64 * 128, 16)),
        k_base(wgmma::descriptor_low(k_tiles, 16)),
        v_base(wgmma::descriptor_low(v_tiles, S::kKvBlock)) {}

  __device__ __forceinline__ void multiply_k() {
    wgmma::pin(s);
    wgmma::fence();
    const uint32_t q = q_base + q_ring.index() * (S::kQBytes / 16), k = k_base + k_ring.index() * (S::kTileBytes / 16);
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d)
      wgmma::multiply<T, kKeys>(s, wgmma::descriptor(q + d / 4 * (S::kQBlock / 16) + d % 4 * 2),
                                wgmma::descriptor(k + d / 4 * (S::kKvBlock / 16) + d % 4 * 2), d > 0);
    wgmma::commit();
    wgmma::pin(s);
  }
  __device__ __forceinline__ void multiply_v() {
    wgmma::pin(out);
    wgmma::fence();
    const uint32_t v = v_base + v_ring.index() * (S::kTileBytes / 16);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
      wgmma::multiply_add<T, kDim>(out, weights[k], wgmma::descriptor(v + k * (2 * wgmma::kAtomBytes / 16)));
    wgmma::commit();
    wgmma::pin(out);
  }
  __device__ __forceinline__ void release(uint64_t& barrier) const {
    __syncwarp();
    if (lane == 0) wgmma::barrier_arrive(barrier);
  }
  __device__ __forceinline__ void release_item(int index) const { release(barriers.item_empty[index]); }
  __device__ __forceinline__ int from_producer(const int& x) const {
    int word = 0;
    if (lane == 0) word = wgmma::load_shared(x);
    return __shfl_sync(~0u, word, 0);
  }
  __device__ __forceinline__ void wait_k() { wgmma::barrier_wait(barriers.k_full[k_ring.index()], k_ring.parity()); }
  __device__ __forceinline__ void wait_v() { wgmma::barrier_wait(barriers.v_full[v_ring.index()], v_ring.parity()); }
  __device__ __forceinline__ void release_k() {
    release(barriers.k_empty[k_ring.index()]);
    k_ring.advance();
    if (tile < last_tile) return;
    release(barriers.q_empty[q_ring.index()]);
    q_ring.advance();
  }
  __device__ __forceinline__ void release_v() {
    release(barriers.v_empty[v_ring.index()]);
    v_ring.advance();
  }

  __device__ __forceinline__ bool begin_item() {
    const int index = item_ring.index();
    wgmma::barrier_wait(barriers.item_checked[index], item_ring.parity());
    const Item& item = barriers.items[index];
    if (from_producer(item.rows) == 0) return false;
    tile = from_producer(item.first_tile), last_tile = from_producer(item.last_tile);
    plain_tile = from_producer(item.plain_tile);
    plain_tiles = from_producer(barriers.holes[index]) ? 0 : from_producer(item.plain_tiles);
    top[0] = top[1] = kNegInf, sum[0] = sum[1] = 0.f;
    wgmma::barrier_wait(barriers.q_full[q_ring.index()], q_ring.parity());
    return true;
  }

  __device__ __forceinline__ bool masked() const { return uint32_t(tile - plain_tile) >= uint32_t(plain_tiles); }
  // Logits that are more than a scaled dot product, and masks.
  __device__ __forceinline__ void adjust() {
    const AttentionParams& a = p.a;
    const int key0 = tile * kKeys, lane_key = key0 + 2 * (lane & 3);  // of s[0]
    if (a.softcap > 0.f) {
      if (a.lse) {  // which is float32: the logits have to be as well
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) s[i] = tanh_fast(s[i] * p.tanh_scale);
      } else {
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) s[i] = tanh_approximate(s[i] * p.tanh_scale);
      }
      if (a.alibi_slopes)
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) s[i] *= a.softcap;
    } else if (p.logit_scale != 1.f) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[i] *= p.logit_scale;
    }
    if (!a.alibi_slopes && !masked()) return;
    const int index = item_ring.index();
    const Item item = read_item(barriers.items[index], lane);
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
    if (masked()) {
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
    if (from_producer(barriers.holes[index])) {  // a lane for each 8 keys looks their page up
      const int key = key0 + 8 * lane;
      const bool wanted = lane < kKeys / 8 && key + 8 > item.begin && key < item.end;
      const int page = wanted ? a.block_tables[item.sequence * a.table_stride + (key >> p.page_shift)] : 0;
      const uint32_t holes = __ballot_sync(~0u, uint32_t(page) >= uint32_t(p.pages));
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
        if (holes >> n & 1) s[4 * n] = s[4 * n + 1] = s[4 * n + 2] = s[4 * n + 3] = kNegInf;
    }
  }

  // Dot products -> exponentials, in place
  __device__ __forceinline__ void softmax() {
    if (unusual || masked()) adjust();
    const float scale = exp2_scale();
    // `top` is the maximum itself: the largest term is 1, which rounding leaves alone. Tiles that move no maximum
    // leave `out` alone.
    grown = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float x = fmaxf(s[2 * h], s[2 * h + 1]);
      float y = fmaxf(s[2 * h + 4], s[2 * h + 5]);
#pragma unroll
      for (int n = 2; n < kKeys / 8; n += 2) {
        x = fmaxf(x, fmaxf(s[4 * n + 2 * h], s[4 * n + 2 * h + 1]));
        y = fmaxf(y, fmaxf(s[4 * n + 2 * h + 4], s[4 * n + 2 * h + 5]));
      }
      x = fmaxf(x, y);
      x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
      x = fmaxf(x, __shfl_xor_sync(~0u, x, 2)) * scale;
      const bool grows = x > top[h];
      factor[h] = grows ? exp2_fast(top[h] - x) : 1.f;
      if (grows) top[h] = x;
      grown |= grows;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float base = top[h] == kNegInf ? 0.f : top[h];  // nothing seen yet: every term is 0
      float even = 0.f, odd = 0.f;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        float &left = s[4 * n + 2 * h], &right = s[4 * n + 2 * h + 1];
        left = exp2_fast(fmaf(left, scale, -base));
        right = exp2_fast(fmaf(right, scale, -base));
        even += left, odd += right;
      }
      sum[h] = sum[h] * factor[h] + (even + odd);
    }
    grown = __any_sync(~0u, grown);
  }
  // From what `adjust` leaves to powers of two.
  __device__ __forceinline__ float exp2_scale() const {
    return p.a.softcap > 0.f && !p.a.alibi_slopes ? p.exp2_scale * p.a.softcap : p.exp2_scale;
  }
  __device__ __forceinline__ void rescale() {
    if (!grown) return;
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) out[i] *= factor[i / 2 % 2];
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) out[i] = 0.f;
  }
  __device__ __forceinline__ void pack() {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[k][i] = pack2<T>(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
  }

  // Normalise and write an item. The sink is one more term of the sum; a row that saw nothing, since no page exists,
  // becomes 0 and -inf. Neighbouring lanes trade halves, so that each row gets whole sectors of 32 bytes.
  __device__ __forceinline__ void write(int index, const float (&tops)[2], const float (&sums)[2]) {
    const AttentionParams& a = p.a;
    const Item item = read_item(barriers.items[index], lane);
    release_item(index);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sums[h];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const int row = my_row + 8 * h, token = item.token_of(p, row);
      const int head = item.head_of(p, row, token);
      const int64_t q_row = int64_t(item.query_start) + token;
      const bool exists = row < item.rows && q_row >= 0 && q_row < a.num_tokens;
      const bool seen = total != 0.f;
      float scale = seen ? 1.f : 0.f, base = tops[h];
      if (exists) {
        if (seen && a.sinks) {
          const float sink = a.sinks[head] * kLog2e;
          base = fmaxf(base, sink);
          scale = exp2_fast(tops[h] - base);
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
  }

  // One tile after the other: what runs under its softmax are the products of other warpgroups.
  __device__ __forceinline__ void walk() {
    while (begin_item()) {
      clear();
#pragma unroll 1
      for (;; ++tile) {
        wait_k();
        multiply_k();
        wgmma::wait<0>();
        wgmma::pin(s);
        release_k();
        softmax();
        rescale();
        pack();
        wait_v();
        multiply_v();
        wgmma::wait<0>();
        wgmma::pin(out);
        release_v();
        if (tile == last_tile) break;
      }
      write(item_ring.index(), top, sum);
      item_ring.advance();
    }
  }

  // Step by step, across items: S = Q K(j) issued | O += P(j - 1) V(j - 1) issued | S done: softmax | O done | P(j).
  __device__ __forceinline__ void walk_overlapped() {
    if (!begin_item()) return;
    constexpr int kTurn = 2 * 128;  // threads of this warpgroup and of the one in front
    if (S::kTurns && group == S::kConsumers - 1) wgmma::named_arrive(kTurnBarrier, kTurn);  // the first turn
    clear();
    wait_k();
    multiply_k();
    wgmma::wait<0>();
    wgmma::pin(s);
    release_k();
    softmax();
    pack();
    float tops[2], sums[2];  // of an item that has ended
#pragma unroll 1
    for (;;) {
      const bool ends = tile == last_tile;
      const int index = item_ring.index();
      if (ends) {
#pragma unroll
        for (int h = 0; h < 2; ++h) tops[h] = top[h], sums[h] = sum[h];
        item_ring.advance();
        if (!begin_item()) {
          wait_v();
          multiply_v();
          wgmma::wait<0>();
          wgmma::pin(out);
          write(index, tops, sums);
          return;
        }
      } else {
        ++tile;
      }
      wait_k();
      if (S::kTurns) wgmma::named_sync(kTurnBarrier + group, kTurn);
      multiply_k();
      wait_v();
      multiply_v();
      if (S::kTurns) wgmma::named_arrive(kTurnBarrier + (group + 1) % S::kConsumers, kTurn);
      wgmma::wait<1>();
      wgmma::pin(s);
      release_k();
      softmax();
      wgmma::hold(sum[0] + sum[1]);  // or nothing would run under P V
      wgmma::wait<0>();
      wgmma::pin(out);
      wgmma::pin(s);
      release_v();
      if (ends) {
        write(index, tops, sums);
        clear();
      } else {
        rescale();
      }
      pack();
    }
  }
};

#endif

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, 1) prefill_sm90_kernel(const __grid_constant__ Call call) {
#ifdef PAGEDKV_WGMMA
  extern __shared__ unsigned char dynamic_shared[];
  const uint32_t padding = -smem_address(dynamic_shared) & 1023, q_tiles = smem_address(dynamic_shared) + padding;
  const uint32_t k_tiles = q_tiles + S::kQStages * S::kQBytes, v_tiles = k_tiles + S::kStages * S::kTileBytes;
  Barriers<S>& barriers = *reinterpret_cast<Barriers<S>*>(wgmma::keep(dynamic_shared + padding + S::kTiles));
  static_assert(sizeof(Barriers<S>) <= 1024);
  release_next();
  const int lane = threadIdx.x & 31;
  const int warp = __shfl_sync(~0u, int(threadIdx.x >> 5), 0);  // tells the compiler that it is uniform
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&call.q, &call.k, &call.v, &call.q_row, &call.k_row, &call.v_row})
      wgmma::prefetch_map(*map);
    constexpr int kWarps = 4 * S::kConsumers;
    wgmma::barrier_init(barriers.wanted, 1);
    for (int i = 0; i < kItems; ++i) {
      wgmma::barrier_init(barriers.item_full[i], 1);
      wgmma::barrier_init(barriers.item_checked[i], 1);
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
  wait_for_previous();
  if (warp < 4) {
    wgmma::give_registers<S::kProducerRegisters>();
    produce<S>(call, barriers, q_tiles, k_tiles, v_tiles, warp, lane);
    // Under the last products
    if (!call.p.a.filled && !all_rows_see(call.p.a))
      fill_rows(call.p.a, sizeof(T), int64_t(blockIdx.x) * 4 + warp, int64_t(gridDim.x) * 4);
  } else {
    wgmma::take_registers<S::kConsumerRegisters>();
    Consumer<S, T> consumer(call.p, barriers, q_tiles, k_tiles, v_tiles, warp / 4 - 1, warp % 4, lane);
    if constexpr (S::kOverlap)
      consumer.walk_overlapped();
    else
      consumer.walk();
  }
#endif
}

// head_dim up to kDim, on a device of so many SMs; one unit of paged_prefill_sm90_units.cu for each kDim.
template <class T, int kDim>
void launch_bucket(const Call& call, int sms, cudaStream_t stream);

}  // namespace pagedkv::prefill::sm90
