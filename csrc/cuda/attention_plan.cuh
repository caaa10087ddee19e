// The split-KV plan, shared by the tensor-core (paged_decode) and the float32 (paged_simt) kernels.
//
// An item is (sequence, KV head, tile of kRowTile query rows), where the rows of a KV head are its (token, head in the
// GQA group) pairs, token-major. Its keys are counted in blocks of 16 (or 16 << n, where 28 bits would not hold all).
// All blocks of the batch form one line, ordered by sequence, head, row tile, key. The line is cut into one even
// stretch for each CTA of a fixed grid, which goes through it in runs, each within one item. A run that is a whole item
// gives the item's result; the others are parts and go to the workspace.
//   - planned (num_splits 0): items of at most kWholeBlocks are moved to one side of a cut whole. Where all items are
//     equally long and not more than the CTAs, up to 1/16 of the CTAs stay idle if that makes every item a whole number
//     of stretches: then no CTA starts a second one. (Whole items for several a CTA were slower, 510 us for 490 at
//     128 x 4096.) At most two runs of a CTA's stretch are parts, so the workspace has two slots a CTA.
//   - one pass (num_splits 1): every item is moved to one side of a cut whole.
//   - fixed (num_splits n): every item is cut into n even partitions at most, each a run of its own with a slot of its
//     own, so that the bits of a sequence do not depend on the rest of the batch; the line is cut between partitions
//     only. Batch-invariant mode (kInvariant) is this with partitions by the sequence's own length.
// Every CTA computes its own stretch when it starts, from seq_lens and query_len (a block-wide prefix sum, one round
// trip to memory; a plan kernel in front would cost a launch and a chain of them), so a CUDA graph can be replayed with
// other lengths. This code runs once and cold, so the number of its instructions counts: measured by clock64 at
// 1 x 1024, 2000 instructions stood in front of the first load, which left after 4.8 us; the plan alone took 2.8 us of
// that with 64-bit divisions, 1.4 us without them.
//
// The CTA that completes an item (a counter of blocks that have arrived, zeroed by a small kernel in front, beside
// which the attention kernel already runs on sm_90 and later) merges its partial results, always in key order: the
// outcome does not depend on which CTA came last. Such a merge of 16 parts, alone in a kernel, takes 2.0 us with fences
// around the count and 1.7 us with an atomic that acquires and releases. Split-KV with a combine is Flash-Decoding (Dao
// et al., 2023); an even cut of one line of work is stream-K (Osama et al., 2023, arXiv:2301.03598), which FlashInfer
// (Ye et al., 2025, arXiv:2501.01005) uses for ragged attention.
//
// Tried: a stretch for each warp, with one pipeline from item to item. It served short items (32 x 32 heads x 128 keys:
// 26 us for 32), but cost instructions in the loop, which 8-bit caches have none to spare of (32 x 8192: 176 us for
// 150).
#pragma once

#include "attention_math.cuh"

namespace pagedkv {

constexpr int kRowTile = 16;
constexpr int kBlockKeys = 16;
constexpr int kFullBlocks = 16;   // a second CTA on a multiprocessor is worth its part of a merge from so many each
constexpr int kWholeBlocks = 16;  // items of at most this many blocks are never split by the planned mode
constexpr int kInvariant = -1;    // in place of a number of splits

// Quotients by a number that is known on the host, of numbers below 2^31.
struct Divisor {
  uint32_t magic = 0;
  int shift = 0;

  Divisor() = default;
  explicit Divisor(int n) {
    if (n < 2) return;
    while (int64_t(2) << shift < n) ++shift;
    magic = uint32_t(((int64_t(1) << (32 + shift)) + n - 1) / n);
  }
  __device__ __forceinline__ int operator()(int x) const {
    return magic == 0 ? x : int(__umulhi(uint32_t(x), magic) >> shift);
  }
};

struct Plan {
  int* arrived;     // [counters] blocks of a split item whose partial results are written
  float* partials;  // [slots, rows, part_row]: a row unnormalised, its maximum, the sum of its exponentials
  int rows;         // rows of a slot: those a row tile can have
  int group;        // query heads of a KV head
  Divisor by_group;
  int key_shift;       // log2 of a block's keys
  int window_blocks;   // the most blocks that a tile of rows can see through the window
  int sequence_items;  // a bound on the items of a sequence; where fixed mode's slots of a sequence begin
  int max_parts;       // fixed mode: slots of an item
  int table_lines;     // 128-byte lines of the block tables, where they are few
  int counters;
  int ctas;
  int sms;
  int splits;      // 0: planned
  bool invariant;  // fixed mode, partitions by the length of a sequence alone
  bool fill;       // rows that see no key are this kernel's to fill
};

// Allocates the workspace in `like`'s caching allocator; `dim` is the row length of a partial result. The returned
// tensor keeps them alive: the caller may drop it once the kernel is enqueued, since the allocator is stream-ordered.
Tensor make_plan(const AttentionParams& p, int dim, int num_splits, int ctas, const Tensor& like, Plan& plan);

// Sets plan.arrived to zero. What is launched behind it by launch_planned runs beside it where the device can.
void launch_zero(const Plan& plan, cudaStream_t stream);

// Rows of `out` that no sequence owns or that see no key become 0, their lse -inf; `out_size` is the size of an element
// of `out`. For kernels without a plan: those with one do so themselves. Also 0 into `next_item`, where there is one.
void launch_fill(const AttentionParams& p, int out_size, cudaStream_t stream);

struct Device {
  int index, sms, smem_per_block;
  bool overlap;  // kernels compiled for this device understand programmatic dependent launch
};
const Device& current_device();

// Launches a kernel that begins with plan_stretch and ends with settle.
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
__device__ __forceinline__ void wait_for_zero() { wait_for_previous(); }

// Floats of a row of a partial result; the 8 keep lanes' stores on different banks where that is shared memory.
template <int kDim>
constexpr int part_row = kDim + 8;

// work of a sequence ------------------------------------------------------------------------------------------------

struct SeqSize {
  int len;     // positions: the last row sits at len - 1
  int keys;    // readable keys, <= len
  int tokens;  // query tokens
};
struct SeqWork : SeqSize {
  int row_tiles;  // of each KV head
  int blocks;     // of each item (an upper bound over its row tiles); 0: nothing to do
};

__device__ __forceinline__ SeqSize seq_size(const AttentionParams& p, int seq) {
  const int len = max(0, __ldg(p.seq_lens + seq));
  return {len, readable_keys(p, len), max(0, min(__ldg(p.query_len + seq), p.max_query_len))};
}
__device__ __forceinline__ SeqWork seq_work(const AttentionParams& p, const Plan& plan, int seq) {
  SeqWork w{seq_size(p, seq)};
  w.row_tiles = (w.tokens * plan.group + kRowTile - 1) / kRowTile;
  w.blocks = w.tokens > 0 ? min((w.keys + (1 << plan.key_shift) - 1) >> plan.key_shift, plan.window_blocks) : 0;
  return w;
}

// Fixed mode: blocks of each partition but the last of an item of so many. Batch-invariant mode: 2^((n + 5) / 2) keys
// for up to 2^n, at least 512: a compromise between a sequence alone, which wants many, and full batches, where each
// partition drains the pipeline (32 x 8192 in 8, 16, 32 of them: 269, 282, 299 us for 250 planned; 1 x 8192: 26, 20.5,
// 21.3 for 21.3). Where a sequence has several row tiles, all keys.
__host__ __device__ __forceinline__ int invariant_shift(int log_blocks, int key_shift) {
  const int shift = (log_blocks + key_shift + 5) / 2;
  return (shift > 9 ? shift : 9) - key_shift;
}
__device__ __forceinline__ int partition_blocks(const Plan& plan, int blocks, int tokens) {
  if (!plan.invariant) return (blocks + plan.splits - 1) / plan.splits;
  if (tokens * plan.group > kRowTile) return blocks;
  return 1 << max(0, invariant_shift(32 - __clz(blocks - 1), plan.key_shift));
}

// the line ----------------------------------------------------------------------------------------------------------

struct Place {
  int seq, item, block;  // item = KV head * row tiles + row tile; block within the item
};

// A CTA's stretch of the line, what is left of it.
struct Stretch {
  Place at;
  int left;
};

// Blocks [begin, end) of an item.
struct Run {
  int seq, item, kv_head;
  int query_start, len, keys, tokens;
  int row_begin, rows;  // of the KV head's rows
  KeyRange seen;        // what the rows see, all together
  int key_begin, key_end;
  int begin, end, blocks;  // blocks: the item's

  __device__ __forceinline__ bool whole() const { return end - begin == blocks; }
  // Row r: its token within the sequence, its query head, its KV position.
  __device__ __forceinline__ int token(const Plan& plan, int r) const { return plan.by_group(row_begin + r); }
  __device__ __forceinline__ int head(const Plan& plan, int r) const {
    return kv_head * plan.group + row_begin + r - token(plan, r) * plan.group;
  }
  __device__ __forceinline__ int position(const Plan& plan, int r) const { return len - tokens + token(plan, r); }
  // Row of `query` and `out`, or -1 where a wrong query_start points outside.
  __device__ __forceinline__ int64_t query_row(const AttentionParams& p, const Plan& plan, int r) const {
    const int64_t row = int64_t(query_start) + token(plan, r);
    return row >= 0 && row < p.num_tokens ? row : -1;
  }
};

struct Totals {
  int units, items;
  int rows;     // rows of `out` that are known to see a key (none is counted twice: sequences own disjoint rows)
  int longest;  // blocks of the longest item
};

struct Found {  // where a cut is looked for: sequences from `seq` on, the first of which begins at `begin`
  int seq, begin;
};

// A CTA's stretch; in shared memory.
struct PlanScratch {
  Totals warps[4];
  Found cuts[2];
  Place at;
  int length;
  int begin;  // of the first item that continues into this CTA, and of the last one, on the line
  int last_begin;
  int even, longer;                 // blocks of a stretch; how many of the first stretches have one more
  bool filled;                      // no row of `out` is left to fill
  int done[2], first[2], parts[2];  // of the CTA's pending parts: whether it completes the item, the item's CTAs
  Run pending[2];
};

// The CTA whose stretch holds `unit` of the line.
__device__ __forceinline__ int cta_of(const PlanScratch& shared, int unit) {
  const int head = shared.longer * (shared.even + 1);
  return unit < head ? unit / (shared.even + 1) : shared.longer + (unit - head) / shared.even;
}

// This CTA's stretch: all threads call, 128 at most.
__device__ __forceinline__ Stretch plan_stretch(const AttentionParams& p, const Plan& plan, PlanScratch& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, threads = blockDim.x;
  if (plan.table_lines > 0) {  // few pages: all into L2 while the lengths arrive
    const int line = int(blockIdx.x) + int(threadIdx.x) * int(gridDim.x);
    if (line < plan.table_lines)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(p.block_tables + int64_t(line) * 32) : "memory");
  }
  const int share = (p.num_seqs + threads - 1) / threads;  // sequences a thread, in a row
  const int first = min(p.num_seqs, int(threadIdx.x) * share), last = min(p.num_seqs, first + share);
  Totals mine{0, 0, 0, 0};
#pragma unroll 1
  for (int s = first; s < last; ++s) {
    const int start = __ldg(p.query_start + s);
    const SeqWork w = seq_work(p, plan, s);
    if (w.blocks > 0) {
      const int items = w.row_tiles * p.num_kv_heads;
      mine.units += items * w.blocks, mine.items += items, mine.longest = max(mine.longest, w.blocks);
    }
    const bool all_see = w.tokens <= w.keys && w.keys == w.len && (p.causal || p.window == 0);
    if (all_see && start >= 0 && start <= p.num_tokens - w.tokens) mine.rows += w.tokens;
  }
  int upto = mine.units;  // inclusive prefix sum
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int t = __shfl_up_sync(0xffffffffu, upto, d);
    if (lane >= d) upto += t;
  }
  const int items = __reduce_add_sync(0xffffffffu, mine.items), rows = __reduce_add_sync(0xffffffffu, mine.rows);
  const int longest = __reduce_max_sync(0xffffffffu, mine.longest);
  if (lane == 31) shared.warps[warp] = {upto, items, rows, longest};
  __syncthreads();
  Totals total{0, 0, 0, 0};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if (w * 32 >= threads) continue;
    const Totals t = shared.warps[w];
    if (w < warp) upto += t.units;
    total.units += t.units, total.items += t.items, total.rows += t.rows, total.longest = max(total.longest, t.longest);
  }
  const int all = total.units;
  int used = max(1, min(plan.ctas, all));
  if (plan.splits == 0) {
    used = min(used, max(plan.sms, all / kFullBlocks));
    if (all > 0 && total.longest * total.items == all) {
      const int even = used - used % total.items;
      if (16 * even >= 15 * used) used = even;
    }
  }
  const int even = all / used, longer = all - even * used, cta = blockIdx.x;
  const int cuts[2] = {cta < used ? cta * even + min(cta, longer) : all,
                       cta + 1 < used ? (cta + 1) * even + min(cta + 1, longer) : all};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (cuts[e] < upto && cuts[e] >= upto - mine.units) shared.cuts[e] = {first, upto - mine.units};
  }
  if (threadIdx.x == 0) {
    shared.even = even, shared.longer = longer, shared.filled = total.rows == p.num_tokens;
  }
  __syncthreads();

  // even lanes: the first cut; odd ones: the second
  const int odd = lane & 1;
  int unit = odd ? cuts[1] : cuts[0];
  Place at{p.num_seqs, 0, 0};
  if (unit < all) {
    const Found found = shared.cuts[odd];
    SeqWork w;
    int begin = found.begin, seq_items;
#pragma unroll 1
    for (at.seq = found.seq;; ++at.seq) {
      w = seq_work(p, plan, at.seq);
      seq_items = w.row_tiles * p.num_kv_heads;
      const int units = w.blocks > 0 ? seq_items * w.blocks : 0;
      if (unit < begin + units) break;
      begin += units;
    }
    at.item = (unit - begin) / w.blocks;
    at.block = unit - begin - at.item * w.blocks;
    int moved = at.block;
    if (plan.splits > 1) {
      moved -= moved % partition_blocks(plan, w.blocks, w.tokens);
    } else if (plan.splits == 1 || w.blocks <= kWholeBlocks) {
      moved = 2 * at.block < w.blocks ? 0 : w.blocks;
    }
    unit += moved - at.block;
    at.block = moved;
    if (moved == w.blocks) {  // the next item, perhaps of another sequence
      at.block = 0;
      if (++at.item == seq_items) ++at.seq, at.item = 0;
    }
  }
  const int item_begin = unit - at.block;
  const int begin = __shfl_sync(0xffffffffu, unit, 0), length = __shfl_sync(0xffffffffu, unit, 1) - begin;
  if (threadIdx.x == 0) shared.at = at, shared.length = length, shared.begin = item_begin;
  if (threadIdx.x == 1) shared.last_begin = item_begin;
  Stretch s{{__shfl_sync(0xffffffffu, at.seq, 0), __shfl_sync(0xffffffffu, at.item, 0),
             __shfl_sync(0xffffffffu, at.block, 0)},
            length};
  return s;
}

// The next run of a stretch that has some left; `parts`: fixed mode's runs end where their partition does.
__device__ __forceinline__ Run next_run(const AttentionParams& p, const Plan& plan, Stretch& s, bool parts = true) {
  SeqWork w = seq_work(p, plan, s.at.seq);
#pragma unroll 1
  while (w.blocks == 0 || s.at.item == w.row_tiles * p.num_kv_heads) {
    ++s.at.seq, s.at.item = 0;
    w = seq_work(p, plan, s.at.seq);
  }
  Run r;
  r.seq = s.at.seq, r.item = s.at.item, r.begin = s.at.block, r.blocks = w.blocks;
  r.query_start = __ldg(p.query_start + r.seq);
  r.len = w.len, r.keys = w.keys, r.tokens = w.tokens;
  r.kv_head = w.row_tiles == 1 ? r.item : r.item / w.row_tiles;
  r.row_begin = (r.item - r.kv_head * w.row_tiles) * kRowTile;
  r.rows = min(kRowTile, w.tokens * plan.group - r.row_begin);
  r.seen = visible_keys(p, r.position(plan, 0), r.position(plan, r.rows - 1), w.keys);
  int edge = w.blocks;
  if (parts && plan.splits > 1) {
    edge = min(edge, r.begin + partition_blocks(plan, w.blocks, w.tokens));
  }
  r.end = min(edge, r.begin + s.left);
  const int base = r.seen.lo & ~(kBlockKeys - 1);
  r.key_begin = base + (r.begin << plan.key_shift);
  // the last block of a long item may reach beyond 31 bits
  r.key_end = int(min(base + (int64_t(r.end) << plan.key_shift), int64_t(max(0, r.seen.hi))));
  s.left -= r.end - r.begin;
  s.at.block = r.end;
  if (r.end == w.blocks) s.at.block = 0, ++s.at.item;
  return r;
}

// Rows `step` apart from `first`, those that see no key: 0, and -inf in lse. All lanes of a warp call.
__device__ __forceinline__ void fill_rows(const AttentionParams& p, int out_size, int64_t first, int64_t step) {
  auto sees_a_key = [&](int seq, int64_t row) {
    const SeqSize w = seq_size(p, seq);
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
    const int64_t bytes =
        int64_t(p.num_heads) * p.head_dim * (p.states ? 4 : out_size);  // a multiple of 16: head_dim is one of 8
    uint4* out = reinterpret_cast<uint4*>(static_cast<uint8_t*>(p.out) + row * bytes);
#pragma unroll 1
    for (int64_t i = lane; i < bytes / 16; i += 32) out[i] = make_uint4(0, 0, 0, 0);
#pragma unroll 1
    for (int h = lane; p.lse && h < p.num_heads; h += 32) p.lse[row * p.num_heads + h] = kNegInf;
  }
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

// What makes a row's result from its unnormalised sums, which are relative to `top`; a sum of 0 means no visible key.
struct Ending {
  float mul, lse;
  bool empty;
};
template <class T>
__device__ __forceinline__ Ending ending(const AttentionParams& p, int head, float top, float sum) {
  using L = Logits<T>;
  Ending e{1.f, kNegInf, sum == 0.f};
  if (e.empty) return e;
  if (p.sinks) {
    const float sink = L::from_natural(__ldg(p.sinks + head)), base = fmaxf(top, sink);
    e.mul = L::exp(top - base);
    sum = sum * e.mul + L::exp(sink - base);
    top = base;
  }
  e.mul /= sum;
  if (p.lse) e.lse = L::lse(top, sum);
  return e;
}

template <class T>
__device__ __forceinline__ void store_out(T* out, float4 x, bool empty) {
  if (empty) x = make_float4(0.f, 0.f, 0.f, 0.f);  // it may hold 0 * NaN
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(out) = x;
  } else {
    *reinterpret_cast<uint2*>(out) = make_uint2(pack2<T>(x.x, x.y), pack2<T>(x.z, x.w));
  }
}

// Writes 4 outputs of row `row` of a run.
template <class T>
__device__ __forceinline__ void write_out(const AttentionParams& p, const Plan& plan, const Run& run, int row, int col,
                                          float4 acc, float top, float sum) {
  const int64_t query_row = run.query_row(p, plan, row);
  if (query_row < 0) return;
  const int head = run.head(plan, row);
  const int64_t index = query_row * p.num_heads + head;
  const Ending end = ending<T>(p, head, top, sum);
  acc.x *= end.mul, acc.y *= end.mul, acc.z *= end.mul, acc.w *= end.mul;
  if (p.states)
    store_out(static_cast<float*>(p.out) + index * p.head_dim + col, acc, end.empty);
  else
    store_out(static_cast<T*>(p.out) + index * p.head_dim + col, acc, end.empty);
  if (p.lse && col == 0) p.lse[index] = end.lse;
}

__device__ __forceinline__ void accumulate(float4& acc, float w, float4 x) {
  acc.x += w * x.x, acc.y += w * x.y, acc.z += w * x.z, acc.w += w * x.w;
}

// A partial result of a run, wherever it is.
struct Part {
  Run run;
  const float* rows;  // [run.rows, part_row]
};

// Where a CTA's part of an item goes. Fixed mode: the run's own slot. Otherwise two slots a CTA, the second for an item
// that begins in it.
template <int kDim>
__device__ __forceinline__ float* part_slot(const Plan& plan, const Run& run) {
  int64_t slot = 2 * int64_t(blockIdx.x) + (run.begin == 0);
  if (plan.splits > 1) {
    slot = (int64_t(run.seq) * plan.sequence_items + run.item) * plan.max_parts;
    slot += run.begin / partition_blocks(plan, run.blocks, run.tokens);
  }
  return plan.partials + slot * plan.rows * part_row<kDim>;
}

// Merges the parts of `run`, `count` of kMost at most (those without rows do not count), into `out` where it is a whole
// item, else into its slot. All threads call it.
template <class T, int kDim, int kMost>
__device__ __forceinline__ void combine(const AttentionParams& p, const Plan& plan, const Run& run, const Part* parts,
                                        int count) {
  float* const slot = run.whole() ? nullptr : part_slot<kDim>(plan, run);
  using L = Logits<T>;
  constexpr int kCols = kDim / 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < run.rows * kCols; i += blockDim.x) {
    const int row = i / kCols, col = (i - row * kCols) * 4;
    if (col >= p.head_dim) continue;
    float tops[kMost], sums[kMost], best = kNegInf, total = 0.f;
    float4 outs[kMost], acc = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int u = 0; u < kMost; ++u) {
      tops[u] = kNegInf, sums[u] = 0.f, outs[u] = make_float4(0.f, 0.f, 0.f, 0.f);
      const float* const rows = u < count ? parts[u].rows : nullptr;
      if (!rows) continue;
      const float* const from = rows + row * part_row<kDim>;
      const float2 state = *reinterpret_cast<const float2*>(from + kDim);
      tops[u] = state.x, sums[u] = state.y;
      if (state.y != 0.f) outs[u] = *reinterpret_cast<const float4*>(from + col);  // else it may hold 0 * NaN
      best = fmaxf(best, tops[u]);
    }
    const float base = best == kNegInf ? 0.f : best;
#pragma unroll
    for (int u = 0; u < kMost; ++u) {
      const float w = L::exp(tops[u] - base);
      total += w * sums[u];  // an empty part is stored as zeros with a maximum of -inf
      accumulate(acc, w, outs[u]);
    }
    if (!slot) {
      write_out<T>(p, plan, run, row, col, acc, best, total);
    } else {
      float* const to = slot + row * part_row<kDim>;
      *reinterpret_cast<float4*>(to + col) = acc;
      if (col == 0) *reinterpret_cast<float2*>(to + kDim) = make_float2(best, total);
    }
  }
}

// Merges all the parts of an item, slot `part0` and then every `step`-th from `rest` on, into `out`. All threads call.
template <class T, int kDim>
__device__ __forceinline__ void merge_parts(const AttentionParams& p, const Plan& plan, const Run& run, int64_t part0,
                                            int64_t rest, int step, int parts) {
  using L = Logits<T>;
  constexpr int kCols = kDim / 4;
  constexpr int kFlight = 8;  // parts whose loads are in flight together
  const int64_t size = int64_t(plan.rows) * part_row<kDim>;
#pragma unroll 1
  for (int i = threadIdx.x; i < run.rows * kCols; i += blockDim.x) {
    const int row = i / kCols, col = (i - row * kCols) * 4;
    if (col >= p.head_dim) continue;
    float best = kNegInf, total = 0.f;
    float4 acc = make_float4(0.f, 0.f, 0.f, 0.f);
    const float* from = plan.partials + part0 * size + row * part_row<kDim>;
    int64_t next = (rest - part0) * size;
#pragma unroll 1
    for (int first = 0; first < parts; first += kFlight) {
      float2 states[kFlight];
      float4 outs[kFlight];
#pragma unroll
      for (int u = 0; u < kFlight; ++u) {
        states[u] = make_float2(kNegInf, 0.f), outs[u] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (first + u < parts) {
          states[u] = __ldcg(reinterpret_cast<const float2*>(from + kDim));
          outs[u] = __ldcg(reinterpret_cast<const float4*>(from + col));
        }
        from += next;
        next = step * size;
      }
      float now = best;
#pragma unroll
      for (int u = 0; u < kFlight; ++u) now = fmaxf(now, states[u].x);
      const float base = now == kNegInf ? 0.f : now, shrink = L::exp(best - base);
      best = now;
      total *= shrink;
      acc.x *= shrink, acc.y *= shrink, acc.z *= shrink, acc.w *= shrink;
#pragma unroll
      for (int u = 0; u < kFlight; ++u) {
        const float w = L::exp(states[u].x - base);
        total += w * states[u].y;
        accumulate(acc, w, outs[u]);
      }
    }
    write_out<T>(p, plan, run, row, col, acc, best, total);
  }
}

// Adds what this CTA has of an item to its counter, by one thread behind a barrier; whether the item is complete now.
__device__ __forceinline__ bool arrive(const Plan& plan, int counter, int blocks, int of) {
  wait_for_zero();
  int before;  // the barrier puts the CTA's stores before this, and it puts them before the count for all
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(plan.arrived + counter), "r"(blocks)
               : "memory");
  const bool complete = before + blocks == of;
  return complete;
}

// Ends a kernel: all threads call it when the CTA's parts are written. `pending`: planned mode, how many of the CTA's
// items are parts, shared.pending them.
template <class T, int kDim>
__device__ __forceinline__ void settle(const AttentionParams& p, const Plan& plan, PlanScratch& shared, int out_size,
                                       int pending) {
  if (plan.splits > 1) {
    __syncthreads();
    Stretch s{shared.at, shared.length};
#pragma unroll 1
    while (s.left > 0) {
      const Run run = next_run(p, plan, s, false);
      const int each = partition_blocks(plan, run.blocks, run.tokens);
      const int index = run.seq * plan.sequence_items + run.item;
      if (each >= run.blocks) continue;
      bool complete = run.whole();
      if (!complete) {
        if (threadIdx.x == 0) shared.done[0] = arrive(plan, index, run.end - run.begin, run.blocks);
        __syncthreads();
        complete = shared.done[0];
        __syncthreads();
      }
      const int64_t slot = int64_t(index) * plan.max_parts;
      if (complete) merge_parts<T, kDim>(p, plan, run, slot, slot + 1, 1, (run.blocks + each - 1) / each);
    }
  } else if (pending > 0) {
    __syncthreads();
    if (int(threadIdx.x) < pending) {
      const int mine = threadIdx.x;
      const Run& run = shared.pending[mine];
      const int begin = run.begin > 0 ? shared.begin : shared.last_begin, first = cta_of(shared, begin);
      shared.first[mine] = first, shared.parts[mine] = cta_of(shared, begin + run.blocks - 1) - first + 1;
      shared.done[mine] = arrive(plan, first, run.end - run.begin, run.blocks);
    }
    __syncthreads();
#pragma unroll 1
    for (int e = 0; e < pending; ++e) {
      if (!shared.done[e]) continue;
      const int64_t slot = 2 * int64_t(shared.first[e]);
      merge_parts<T, kDim>(p, plan, shared.pending[e], slot + 1, slot + 2, 2, shared.parts[e]);
    }
  }
  if (plan.fill && !shared.filled) {
    const int warps = blockDim.x / 32;
    fill_rows(p, out_size, int64_t(blockIdx.x) * warps + threadIdx.x / 32, int64_t(gridDim.x) * warps);
  }
  wait_for_zero();  // whatever follows this kernel follows the one in front of it, too
}

}  // namespace pagedkv
