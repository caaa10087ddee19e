// The split-KV plan, shared by the tensor-core (paged_decode) and the float32 (paged_simt) kernels.
//
// Work is counted in units of kKeyTile keys of one item; an item is (sequence, KV head, tile of kRowTile query rows),
// where the rows of a KV head are its (token, head in the GQA group) pairs, token-major. All units of the batch form
// one line, ordered by sequence, head, row tile, key. The line is cut into one stretch for each CTA of a fixed grid:
//   - planned (num_splits 0): even stretches. Items shorter than kWholeTiles are moved to one side of a cut whole.
//     Where all items are equally long and not more than the CTAs, up to 1/16 of the CTAs stay idle if that makes every
//     item a whole number of stretches: then no CTA starts a second one. (Whole items for several a CTA were slower,
//     510 us for 490 at 128 x 4096.) At most two pieces of a CTA's stretch are partial items, so the workspace has two
//     slots a CTA whatever the batch.
//   - fixed (num_splits n): every item is cut into n even partitions, so that the bits of a sequence do not depend on
//     the rest of the batch; the line is cut between partitions only. n = 1 is the one-pass version.
// Every CTA computes its own two cuts when it starts, from seq_lens and query_len (a block-wide prefix sum, one round
// trip to memory; a plan kernel in front would cost a launch and a chain of them), so a CUDA graph can be replayed with
// other lengths.
//
// The CTA that completes an item (a counter of units that have arrived, zeroed by a small kernel in front, beside which
// the attention kernel already runs on sm_90 and later) merges its partial results, always in key order: the outcome
// does not depend on which CTA came last. Split-KV with a combine is Flash-Decoding (Dao et al., 2023); an even cut of
// one line of work is stream-K (Osama et al., 2023, arXiv:2301.03598), which FlashInfer (Ye et al., 2025,
// arXiv:2501.01005) uses for ragged attention.
#pragma once

#include "attention_math.cuh"

namespace pagedkv {

constexpr int kRowTile = 16;
constexpr int kKeyTile = 64;
constexpr int kFullTiles = 4;   // a second CTA on a multiprocessor is worth its part of a merge from so many units each
constexpr int kWholeTiles = 4;  // items of at most this many units are never split by the planned mode

struct Cut {
  int64_t unit;         // where on the line
  int64_t items;        // items before `seq`
  int seq, item, tile;  // the same place as coordinates; item = KV head * row tiles + row tile
  int first, last;      // planned mode, cut inside an item: the CTAs that hold its first and its last unit
};

struct Plan {
  int* arrived;        // [counters] units of a split item whose partial results are written
  float* partial_out;  // [slots, kRowTile, dim] unnormalised
  float* partial_max;  // [slots, kRowTile]
  float* partial_sum;  // [slots, kRowTile]
  int64_t max_items;   // fixed mode: items that the workspace has room for
  int counters;
  int ctas;
  int sms;
  int splits;  // 0: planned
};

// Allocates the workspace in `like`'s caching allocator; `dim` is the row length of partial_out. The returned tensor
// keeps it alive: the caller may drop it once the kernels are enqueued, since the allocator is stream-ordered.
Tensor make_plan(const AttentionParams& p, int dim, int num_splits, int ctas, const Tensor& like, Plan& plan);

// Sets plan.arrived to zero. What is launched behind it by launch_planned runs beside it where the device can.
void launch_zero(const Plan& plan, cudaStream_t stream);

// Rows of `out` that no sequence owns or that see no key become 0, their lse -inf; `out_size` is the size of an element
// of `out`. For kernels without a plan: for_each_piece does so itself. Also 0 into `next_item`, where there is one.
void launch_fill(const AttentionParams& p, int out_size, cudaStream_t stream);

struct Device {
  int index, sms, smem_per_block;
  bool overlap;  // kernels compiled for this device understand programmatic dependent launch
};
const Device& current_device();

// Launches a kernel that goes through its pieces by for_each_piece.
template <class... P, class... A>
void launch_planned(void (*kernel)(P...), const Plan& plan, int threads, size_t shared, cudaStream_t stream,
                    A&&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(plan.ctas)), config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared, config.stream = stream, config.attrs = &attribute;
  if (plan.counters > 0) {
    launch_zero(plan, stream);
    config.numAttrs = current_device().overlap ? 1 : 0;
  }
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...));
}

// Waits for the kernel in front of this one to be complete, its memory visible, where they may overlap.
__device__ __forceinline__ void wait_for_zero() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// work of a sequence ------------------------------------------------------------------------------------------------

struct SeqWork {
  int len;        // positions: the last row sits at len - 1
  int keys;       // readable keys, <= len
  int tokens;     // query tokens
  int row_tiles;  // of each KV head
  int tiles;      // units of each item (an upper bound over its row tiles); 0: nothing to do
};

// AttentionParams::window_tiles.
inline int window_tiles(int group, int window, bool causal) {
  if (window == 0 || group == 0) return 1 << 30;
  // tokens that the rows of one tile can belong to
  const int span = group % kRowTile == 0   ? 1
                   : kRowTile % group == 0 ? kRowTile / group
                                           : (kRowTile - 2 + group) / group + 1;
  const int64_t width = span - 1 + (causal ? int64_t(window) : 2 * int64_t(window) - 1);
  return int((width + kKeyTile - 2) / kKeyTile + 1);
}

__device__ __forceinline__ SeqWork seq_work(const AttentionParams& p, int seq) {
  SeqWork w;
  const int group = p.num_heads / p.num_kv_heads;
  w.len = max(0, __ldg(p.seq_lens + seq));
  w.tokens = max(0, min(__ldg(p.query_len + seq), p.num_tokens));
  w.keys = readable_keys(p, w.len);
  w.row_tiles = int((int64_t(w.tokens) * group + kRowTile - 1) / kRowTile);
  w.tiles = w.tokens > 0 ? (w.keys + kKeyTile - 1) / kKeyTile : 0;
  w.tiles = min(w.tiles, p.window_tiles);
  return w;
}

// Fixed mode: partitions of an item of `tiles` units, the one that unit `tile` is in, and where partition j begins.
__device__ __forceinline__ int partitions(int splits, int tiles) { return min(splits, tiles); }
__device__ __forceinline__ int partition_of(int tile, int tiles, int n) {
  return int((int64_t(tile + 1) * n - 1) / tiles);
}
__device__ __forceinline__ int partition_begin(int j, int tiles, int n) { return int(int64_t(tiles) * j / n); }

// cuts --------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {  // of non-negative numbers
  return ((a | b) >> 32) == 0 ? int64_t(uint32_t(a) / uint32_t(b)) : a / b;
}

struct Totals {
  int64_t units, items;
  int64_t rows;  // rows of `out` that are known to see a key (none is counted twice: sequences own disjoint rows)
  int longest;   // units of the longest item

  __device__ __forceinline__ void add(const Totals& t) {
    units += t.units, items += t.items, rows += t.rows, longest = max(longest, t.longest);
  }
};

// Shared memory of for_each_piece.
struct PlanScratch {
  Totals warps[4];
  Cut cuts[2];
};

__device__ __forceinline__ Totals seq_totals(const AttentionParams& p, int seq, const SeqWork& w) {
  Totals t{0, w.tiles > 0 ? int64_t(w.row_tiles) * p.num_kv_heads : 0, 0, w.tiles};
  t.units = t.items * w.tiles;
  const int start = __ldg(p.query_start + seq);
  const bool all_see = w.tokens <= w.keys && w.keys == w.len && (p.causal || p.window == 0);
  if (all_see && start >= 0 && start <= p.num_tokens - w.tokens) t.rows = w.tokens;
  return t;
}

// This CTA's cuts [blockIdx.x] and [blockIdx.x + 1], into shared memory; returns the batch's totals. All threads call,
// 128 at most.
__device__ __forceinline__ Totals make_cuts(const AttentionParams& p, const Plan& plan, PlanScratch& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, threads = blockDim.x;
  const int share = (p.num_seqs + threads - 1) / threads;  // sequences a thread, in a row
  const int first = min(p.num_seqs, int(threadIdx.x) * share), last = min(p.num_seqs, first + share);
  Totals mine{0, 0, 0, 0};
#pragma unroll 1
  for (int s = first; s < last; ++s) mine.add(seq_totals(p, s, seq_work(p, s)));
  Totals upto = mine;  // inclusive prefix sum
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const Totals t{__shfl_up_sync(0xffffffffu, upto.units, d), __shfl_up_sync(0xffffffffu, upto.items, d),
                   __shfl_up_sync(0xffffffffu, upto.rows, d), __shfl_up_sync(0xffffffffu, upto.longest, d)};
    if (lane >= d) upto.add(t);
  }
  if (lane == 31) shared.warps[warp] = upto;
  __syncthreads();
  Totals total{0, 0, 0, 0};
#pragma unroll 1
  for (int w = 0; w < threads / 32; ++w) {
    if (w == warp) upto.add(total);
    total.add(shared.warps[w]);
  }
  const int64_t all = total.units;
  int64_t used = max(int64_t(1), min(int64_t(plan.ctas), all));
  if (plan.splits == 0) used = min(used, max(int64_t(plan.sms), all / kFullTiles));
  if (plan.splits == 0 && all > 0 && total.longest * total.items == all) {
    const int64_t even = quotient(used, total.items) * total.items;
    if (16 * even >= 15 * used) used = even;
  }
#pragma unroll 1
  for (int e = 0; e < 2; ++e) {
    const int64_t c = int64_t(blockIdx.x) + e;
    Cut cut{c < used ? quotient(all * c, used) : all, total.items, p.num_seqs, 0, 0, 0, 0};
    if (cut.unit >= all) {
      if (threadIdx.x == 0) shared.cuts[e] = cut;
    } else if (cut.unit < upto.units && cut.unit >= upto.units - mine.units) {
      int64_t begin = upto.units - mine.units;
      cut.items = upto.items - mine.items;
      SeqWork w;
      Totals t;
#pragma unroll 1
      for (cut.seq = first;; ++cut.seq) {
        w = seq_work(p, cut.seq);
        t = seq_totals(p, cut.seq, w);
        if (cut.unit < begin + t.units) break;
        begin += t.units, cut.items += t.items;
      }
      cut.item = int(quotient(cut.unit - begin, w.tiles));
      cut.tile = int(cut.unit - begin - int64_t(cut.item) * w.tiles);
      int moved = cut.tile;
      if (plan.splits > 0) {
        const int n = partitions(plan.splits, w.tiles);
        moved = partition_begin(partition_of(cut.tile, w.tiles, n), w.tiles, n);
      } else if (w.tiles <= kWholeTiles) {
        moved = 2 * cut.tile < w.tiles ? 0 : w.tiles;
      }
      cut.unit += moved - cut.tile;
      cut.tile = moved;
      if (moved == w.tiles) {  // the next item, perhaps of another sequence
        cut.tile = 0;
        if (++cut.item == t.items) ++cut.seq, cut.item = 0, cut.items += t.items;
      } else if (plan.splits == 0 && moved > 0) {
        // Such an item is longer than kWholeTiles, so no cut inside it was moved, and none was moved across its ends:
        // cut i is at or before unit u of it if all * i / used, rounded down, is.
        const int64_t start = cut.unit - cut.tile;
        cut.first = int(quotient((start + 1) * used - 1, all));
        cut.last = int(quotient((start + w.tiles) * used - 1, all));
      }
      shared.cuts[e] = cut;
    }
  }
  __syncthreads();
  return total;
}

// Rows `step` apart from `first`, those that see no key: 0, and -inf in lse. All lanes of a warp call.
__device__ __forceinline__ void fill_rows(const AttentionParams& p, int out_size, int64_t first, int64_t step) {
  auto sees_a_key = [&](int seq, int64_t row) {
    const SeqWork w = seq_work(p, seq);
    const int64_t token = row - __ldg(p.query_start + seq);
    if (token < 0 || token >= w.tokens) return false;
    const KeyRange r = visible_keys(p, w.len - w.tokens + int(token), w.keys);
    return r.lo < r.hi;
  };
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int64_t row = first; row < p.num_tokens; row += step) {
    bool seen = false;
#pragma unroll 1
    for (int s = 0; s < p.num_seqs && !seen; s += 32)
      seen = __any_sync(0xffffffffu, s + lane < p.num_seqs && sees_a_key(s + lane, row));
    if (seen) continue;
    const int64_t bytes = int64_t(p.num_heads) * p.head_dim * out_size;  // a multiple of 16: head_dim is one of 8
    uint4* out = reinterpret_cast<uint4*>(static_cast<uint8_t*>(p.out) + row * bytes);
#pragma unroll 1
    for (int64_t i = lane; i < bytes / 16; i += 32) out[i] = make_uint4(0, 0, 0, 0);
#pragma unroll 1
    for (int h = lane; p.lse && h < p.num_heads; h += 32) p.lse[row * p.num_heads + h] = kNegInf;
  }
}

// pieces ------------------------------------------------------------------------------------------------------------

// A CTA's piece of one item: keys [key_begin, key_end) for `rows` rows from `row_begin` of a KV head.
struct Piece {
  int seq, kv_head, group;
  int query_start, len, keys, tokens;
  int row_begin, rows;
  KeyRange seen;  // what the piece's rows see, all together
  int key_begin, key_end;
  int units, tiles;  // this piece's, the item's
  // Partial results (not where units == tiles). Planned: the cut (in shared memory) inside the item. Fixed: the item's
  // place among all, and this piece's among its parts.
  const Cut* cut;
  int64_t index;
  int part;

  __device__ __forceinline__ bool whole() const { return units == tiles; }
  __device__ __forceinline__ int parts(const Plan& plan) const {
    return plan.splits > 0 ? partitions(plan.splits, tiles) : cut->last - cut->first + 1;
  }
  __device__ __forceinline__ int64_t part_slot(const Plan& plan, int i) const {
    if (plan.splits > 0) return index * plan.splits + i;
    return 2 * int64_t(cut->first + i) + (i == 0);  // of an item's CTAs only the first has it last in its stretch
  }
  __device__ __forceinline__ int64_t slot(const Plan& plan) const {
    return part_slot(plan, plan.splits > 0 ? part : int(blockIdx.x) - cut->first);
  }
  __device__ __forceinline__ int counter(const Plan& plan) const { return plan.splits > 0 ? int(index) : cut->first; }
  // Row r of the piece: its token within the sequence, its query head, its KV position.
  __device__ __forceinline__ int token(int r) const { return (row_begin + r) / group; }
  __device__ __forceinline__ int head(int r) const { return kv_head * group + (row_begin + r) % group; }
  __device__ __forceinline__ int position(int r) const { return len - tokens + token(r); }
  // Row of `query` and `out`, or -1 where a wrong query_start points outside.
  __device__ __forceinline__ int64_t query_row(const AttentionParams& p, int r) const {
    const int64_t row = int64_t(query_start) + token(r);
    return row >= 0 && row < p.num_tokens ? row : -1;
  }
};

// Calls f with every piece of this CTA, the same for all its threads; then fills rows of `out` that see no key.
template <class F>
__device__ __forceinline__ void for_each_piece(const AttentionParams& p, const Plan& plan, PlanScratch& shared,
                                               int out_size, F&& f) {
  const bool filled = make_cuts(p, plan, shared).rows == p.num_tokens;
  const Cut &begin = shared.cuts[0], &end = shared.cuts[1];
  int64_t left = end.unit - begin.unit, items_before = begin.items;
  int item = begin.item, tile = begin.tile;
#pragma unroll 1
  for (int seq = begin.seq; left > 0 && seq < p.num_seqs; ++seq, item = 0) {
    const SeqWork w = seq_work(p, seq);
    if (w.tiles == 0) continue;
    Piece piece;
    piece.seq = seq;
    piece.group = p.num_heads / p.num_kv_heads;
    piece.query_start = __ldg(p.query_start + seq);
    piece.len = w.len;
    piece.keys = w.keys;
    piece.tokens = w.tokens;
    piece.tiles = w.tiles;
    const int items = w.row_tiles * p.num_kv_heads;
#pragma unroll 1
    for (; item < items && left > 0; ++item) {
      piece.kv_head = item / w.row_tiles;
      piece.row_begin = (item - piece.kv_head * w.row_tiles) * kRowTile;
      piece.rows = min(kRowTile, w.tokens * piece.group - piece.row_begin);
      piece.seen = visible_keys(p, piece.position(0), piece.position(piece.rows - 1), w.keys);
#pragma unroll 1
      while (tile < w.tiles && left > 0) {
        int edge = w.tiles;
        piece.cut = tile > 0 ? &begin : &end;  // only the first piece can begin, and only the last can end, in an item
        piece.index = items_before + item;
        piece.part = 0;
        if (plan.splits > 0) {
          const int n = partitions(plan.splits, w.tiles);
          piece.part = partition_of(tile, w.tiles, n);
          edge = partition_begin(piece.part + 1, w.tiles, n);
        }
        piece.units = int(min(int64_t(edge - tile), left));
        const int64_t base = piece.seen.lo & ~(kKeyTile - 1);
        piece.key_begin = int(min(base + int64_t(tile) * kKeyTile, int64_t(piece.keys)));
        piece.key_end = int(min(base + int64_t(tile + piece.units) * kKeyTile, int64_t(max(0, piece.seen.hi))));
        tile += piece.units;
        left -= piece.units;
        if (plan.splits < 2 || piece.index < plan.max_items) f(piece);
      }
      tile = 0;
    }
    items_before += items;
  }
  if (!filled) {
    const int warps = blockDim.x / 32;
    fill_rows(p, out_size, int64_t(blockIdx.x) * warps + threadIdx.x / 32, int64_t(gridDim.x) * warps);
  }
  wait_for_zero();  // whatever follows this kernel follows the one in front of it, too
}

// results -----------------------------------------------------------------------------------------------------------

// The logits that row states are kept in. 16-bit kernels: times log2(e), so that exp2 does. Float32: natural, since
// such a result would show the rounding of log2(e) * x.
template <class T>
struct Logits {
  static constexpr bool kNatural = sizeof(T) == 4;
  static __device__ __forceinline__ float from_natural(float x) { return kNatural ? x : x * kLog2e; }
  static __device__ __forceinline__ float exp(float x) { return kNatural ? expf(x) : exp2_fast(x); }
  static __device__ __forceinline__ float lse(float top, float sum) {
    return kNatural ? top + logf(sum) : (top + log2f(sum)) * kLn2;
  }
};

// Writes 4 outputs of one row. acc and sum are unnormalised, relative to `top`; a sum of 0 means no visible key.
template <class T>
__device__ __forceinline__ void write_out(const AttentionParams& p, const Piece& piece, int row, int col, float4 acc,
                                          float top, float sum) {
  using L = Logits<T>;
  const int64_t query_row = piece.query_row(p, row);
  if (query_row < 0) return;
  const int head = piece.head(row);
  const bool empty = sum == 0.f;
  if (p.sinks && !empty) {
    const float sink = L::from_natural(__ldg(p.sinks + head)), base = fmaxf(top, sink), w = L::exp(top - base);
    acc.x *= w, acc.y *= w, acc.z *= w, acc.w *= w;
    sum = sum * w + L::exp(sink - base);
    top = base;
  }
  const int64_t index = query_row * p.num_heads + head;
  const float inv = empty ? 0.f : 1.f / sum;
  if (empty) acc = make_float4(0.f, 0.f, 0.f, 0.f);
  T* out = static_cast<T*>(p.out) + index * p.head_dim + col;
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(out) = make_float4(acc.x * inv, acc.y * inv, acc.z * inv, acc.w * inv);
  } else {
    *reinterpret_cast<uint2*>(out) = make_uint2(pack2<T>(acc.x * inv, acc.y * inv), pack2<T>(acc.z * inv, acc.w * inv));
  }
  if (p.lse && col == 0) p.lse[index] = empty ? kNegInf : L::lse(top, sum);
}

__device__ __forceinline__ void accumulate(float4& acc, float w, float4 x) {
  acc.x += w * x.x, acc.y += w * x.y, acc.z += w * x.z, acc.w += w * x.w;
}

// Ends a piece. Shared memory holds `sets` partial results (one for each warp, or one in all): out[set * set_stride +
// row * row_stride + col] unnormalised, top[set * kRowTile + row] and sum[...] likewise; where sum is 0 the rest of the
// row is not read. They are merged, then written to `out`, or to the workspace, in which case the CTA that completes
// the item merges its parts. All threads call it, after a barrier behind the last write; it ends with a barrier.
template <class T, int kDim>
__device__ __forceinline__ void finish_piece(const AttentionParams& p, const Plan& plan, const Piece& piece,
                                             const float* out, const float* top, const float* sum, int sets,
                                             int set_stride, int row_stride, int* flag) {
  using L = Logits<T>;
  constexpr int kCols = kDim / 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < piece.rows * kCols; i += blockDim.x) {
    const int row = i / kCols, col = (i - row * kCols) * 4;
    if (col >= p.head_dim) continue;
    float best = kNegInf, total = 0.f;
    for (int s = 0; s < sets; ++s) best = fmaxf(best, top[s * kRowTile + row]);
    const float base = best == kNegInf ? 0.f : best;
    float4 acc = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int s = 0; s < sets; ++s) {
      if (sum[s * kRowTile + row] == 0.f) continue;
      const float w = L::exp(top[s * kRowTile + row] - base);
      total += w * sum[s * kRowTile + row];
      accumulate(acc, w, *reinterpret_cast<const float4*>(out + s * set_stride + row * row_stride + col));
    }
    if (piece.whole()) {
      write_out<T>(p, piece, row, col, acc, best, total);
    } else {
      const int64_t at = piece.slot(plan) * kRowTile + row;
      *reinterpret_cast<float4*>(plan.partial_out + at * kDim + col) = acc;
      if (col == 0) plan.partial_max[at] = best, plan.partial_sum[at] = total;
    }
  }
  if (!piece.whole()) {
    // The barrier puts the CTA's stores before the fence, the fence puts them before the counter for the whole GPU.
    __syncthreads();
    if (threadIdx.x == 0) {
      wait_for_zero();
      __threadfence();
      *flag = atomicAdd(plan.arrived + piece.counter(plan), piece.units) + piece.units == piece.tiles;
      __threadfence();
    }
    __syncthreads();
    if (*flag) {
      const int parts = piece.parts(plan), step = plan.splits > 0 ? 1 : 2;
      const int64_t part0 = piece.part_slot(plan, 0), rest = piece.part_slot(plan, 1) - step;
      constexpr int kFlight = 16;  // parts whose loads are in flight together
#pragma unroll 1
      for (int i = threadIdx.x; i < piece.rows * kCols; i += blockDim.x) {
        const int row = i / kCols, col = (i - row * kCols) * 4;
        if (col >= p.head_dim) continue;
        float best = kNegInf, total = 0.f;
        float4 acc = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
        for (int first = 0; first < parts; first += kFlight) {
          float tops[kFlight], sums[kFlight];
          float4 outs[kFlight];
#pragma unroll
          for (int u = 0; u < kFlight; ++u) {
            tops[u] = kNegInf, sums[u] = 0.f, outs[u] = make_float4(0.f, 0.f, 0.f, 0.f);
            if (first + u >= parts) continue;
            const int64_t at = (first + u == 0 ? part0 : rest + (first + u) * step) * kRowTile + row;
            tops[u] = __ldcg(plan.partial_max + at);
            sums[u] = __ldcg(plan.partial_sum + at);
            outs[u] = __ldcg(reinterpret_cast<const float4*>(plan.partial_out + at * kDim + col));
          }
          float now = best;
#pragma unroll
          for (int u = 0; u < kFlight; ++u) now = fmaxf(now, tops[u]);
          const float base = now == kNegInf ? 0.f : now, shrink = L::exp(best - base);
          best = now;
          total *= shrink;
          acc.x *= shrink, acc.y *= shrink, acc.z *= shrink, acc.w *= shrink;
#pragma unroll
          for (int u = 0; u < kFlight; ++u) {
            const float w = L::exp(tops[u] - base);
            total += w * sums[u];  // an empty part is stored as zeros with a maximum of -inf
            accumulate(acc, w, outs[u]);
          }
        }
        write_out<T>(p, piece, row, col, acc, best, total);
      }
    }
  }
  __syncthreads();
}

}  // namespace pagedkv
