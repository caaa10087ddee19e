// The split-KV plan, shared by the tensor-core (paged_decode) and the float32 (paged_simt) kernels.
//
// An item is (sequence, KV head, tile of kRowTile query rows), where the rows of a KV head are its (token, head in the
// GQA group) pairs, token-major. Its keys are counted in blocks of 16 (or 16 << n, where 28 bits would not hold all).
// All blocks of the batch form one line, ordered by sequence, head, row tile, key. The line is cut into one even
// stretch for each team, which goes through it in runs, each within one item. A run that is a whole item gives the
// item's result; the others are parts and go to the workspace.
//
// A team is a cluster of CTAs (sm_90 and later, planned mode), otherwise one CTA. Its warps take the blocks of a run in
// turn. What they have of it is merged in each CTA and then through distributed shared memory, each CTA merging its
// share of the rows. The host makes teams for a sequence alone, larger ones the shorter it can be.
//   - planned (num_splits 0): items of at most kWholeBlocks are moved to one side of a cut whole. Where all items are
//     equally long, some teams stay idle if every item is a whole number of stretches then, or every stretch of items,
//     and stretches are not much longer. Where they are not, each has kHead units more on the line, which stand for
//     the time that starting with it takes. At most two runs of a team's stretch are parts, so the workspace has two
//     slots a team. Many equal items of one row tile, if they are nearly even among the warps, are shared out whole, to
//     each warp its own: no warp waits for another (solo).
//   - one pass (num_splits 1): every item is moved to one side of a cut whole.
//   - fixed (num_splits n): every item is cut into n even partitions at most, each a run of its own with a slot of its
//     own, so that the bits of a sequence do not depend on the rest of the batch; the line is cut between partitions
//     only. Batch-invariant mode (kInvariant) is this with partitions by the sequence's own length.
// Every CTA computes its own stretch when it starts, from seq_lens and query_len (a block-wide prefix sum, one round
// trip to memory; a plan kernel in front would cost a launch and a chain of them), so a CUDA graph can be replayed with
// other lengths. This code runs once and cold, so the number of its instructions counts: by clock64 at 1 x 1024 the
// lengths are there after 1200 cycles, the stretch after 2200, its first run after 3350; the first keys after 7700.
//
// The team that completes an item (a counter of blocks that have arrived, which it sets back to 0: see Counters in
// attention_plan.cu) merges its partial results, always in key order: the outcome does not depend on which came last.
// That costs 2 us at 16 parts and grew to 9 us at 33 of 7 rows (28 heads, 4 KV heads, 1 x 8192), which teams avoid. Its
// arithmetic is a chain of latencies for the few warps of one CTA, so that these take four columns of a thread at a
// time where there are many: 32 x 2048 with 16 rows (32 heads, 2 KV heads) 26.4 -> 24.4 us, with 48 (1 KV head) 28.9
// -> 26.9. Split-KV with a combine is Flash-Decoding (Dao et al., 2023); an even cut of one line of work is stream-K
// (Osama et al., 2023, arXiv:2301.03598), which FlashInfer (Ye et al., 2025, arXiv:2501.01005) uses for ragged
// attention.
//
// On an H200 (us; Llama-3-8B's 32 and 8 heads where nothing else is said), before, and with CTAs on their own, in teams
// of 4 and of 16: 1 x 1024 10.2, 9.4, 10.4, 8.3; 1 x 8192 18.9, 17.6, 18.0, 18.0; 1 x 32768 50.7, 43.6, 43.8, 44.4;
// 1 x 131072 139, 134, 139, 149; 28 and 4 heads, 1 x 8192: 27, 17.8, 14.7, 15.8. Empty kernels in which teams of 4, 8
// and 16 meet twice take 0.7, 0.8 and 1.4 us longer. Warps on their own: 21.5 us for 32 x 32 heads x 128 keys instead
// of 27.1, 129 for 136 at 128 x 1024. Stretches that did not end with their equal items had cost 6 us at 1 x 32768.
// With 0, 4, 8 and 16 units for its start, 64 sequences of 279 to 5960 keys (mean 2047) take 144, 140, 134 and 133 us,
// 8 of 50 to 4000 keys 33.9, 23.8, 21.9 and 20.8. Keys and values that are evicted first leave L2 to instructions,
// tables and partial results: 0.4 to 3 us a call.
//
// The kernel of 16-bit caches makes its plan before the kernel in front is complete, from lengths that it looks at
// again afterwards (Snapshot), and brings the first block of each warp to L2. By globaltimer at 1 x 8192 in a graph,
// from the end of that kernel: the first blocks are asked for after 2.3 us instead of 3.9, and in the loop's end 9.7 us
// have passed instead of 11. With neither, the plan alone, and both (teams of 4): 1 x 1024 8.7, 7.9, 8.2 us; 1 x
// 8192 17.7, 16.5, 15.9; 32 x 2048 67.5, 66.0, 65.0; 28 and 4 heads 1 x 8192 16.0, 14.5, 14.3; 8 x 512 with 9 and 3
// heads of 64 9.7, 8.1, 8.1. Two blocks instead of one are slower there (1 x 8192: 16.6), and so is one where a warp
// has no more than its slots hold (1 x 1024) or a batch-invariant sequence is alone: late CTAs wait for the page.
// Filling the slots from guessed pages, to be checked once they are under way, gains nothing: the check waits behind
// them (1 x 1024: 8.2 -> 8.7 us). Teams of 1, 2 and 4, with the plan ahead: 1 x 8192 15.1, 15.9, 16.1 us; 1 x 32768
// 39.6, 37.6, 39.4; 28 and 4 heads 1 x 8192 16.4, 12.7, 14.5; 1 x 131072 126.7, 126.7, 133.8.
//
// Tried: the first keys of the next run to L2 while one begins (134 -> 137 us, batch-invariant 265 -> 284 at 32 x
// 8192); teams for few sequences (24 items of 512 keys: 9.0 -> 7.4 us if equally long, 12.5 -> 15.3 if not); a stretch
// for each warp, with one pipeline from item to item. It served short items (32 x 32 heads x 128 keys: 26 us for 32),
// but cost instructions in the loop, which 8-bit caches have none to spare of (32 x 8192: 176 us for 150); tiles of 48
// query rows, whose warps share the keys of all (48 heads, 1 KV head, 32 x 2048: 30 to 33 us for 27: it reads keys
// once, in 8 us of loop for 17, but one CTA's merge of 48 rows of 8 parts takes 12); teams of 2 for 128 items, each a
// whole number of them (38.2 -> 35.9 us if equally long; 24 items that are not 12.5 -> 16.1).
#pragma once

#include "attention_math.cuh"

namespace pagedkv {

constexpr int kRowTile = 16;
constexpr int kBlockKeys = 16;
constexpr int kFullShift = 4;    // a second CTA on a multiprocessor is worth its part of a merge from 16 blocks each
constexpr int kFewBlocks = 128;  // a sequence alone, which can be so long: teams of 16; up to kManyBlocks, of 2
constexpr int kManyBlocks = 4096;
constexpr int kWholeBlocks = 16;  // items of at most this many blocks are never split by the planned mode
constexpr int kRestart = 32;      // blocks that a CTA would do while it starts another run
constexpr int kHead = 16;         // 16-bit blocks' worth of starting with an item, where they differ in length
constexpr int kSoloSlack = 17;    // sixteenths: the longest of even shares of whole items, to their mean
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
  int* arrived;  // [teams] blocks of a split item whose partial results are written; 0 before the kernel and after it
  float* partials;  // [slots, rows, part_row]: a row unnormalised, its maximum, the sum of its exponentials
  int rows;         // rows of a slot: those a row tile can have
  int group;        // query heads of a KV head
  Divisor by_group;
  int key_shift;       // log2 of a block's keys
  int window_blocks;   // the most blocks that a tile of rows can see through the window
  int sequence_items;  // a bound on the items of a sequence; where fixed mode's slots of a sequence begin
  int max_parts;       // fixed mode: slots of an item
  int table_lines;     // 128-byte lines of the block tables, where they are few
  int teams;
  int team_shift;   // log2 of a team's CTAs, which are a cluster
  int least_teams;  // planned mode: as many that the device is full; more of them only for 1 << full_shift blocks each
  int full_shift;
  int head = kHead;  // kHead in blocks of this cache
  int splits;        // 0: planned
  bool invariant;    // fixed mode, partitions by the length of a sequence alone
  bool solo;         // planned mode: warps may have stretches of their own
  bool fill;         // rows that see no key are this kernel's to fill
  bool ahead;        // the first keys and values come to L2 while the kernel in front still runs
};

// How many teams of 1 << i CTAs of a kernel the device runs at once; 0: none of that size.
using Teams = std::array<int, 5>;

// Integers that are 0 when a kernel in this stream starts, and that it has to leave so.
int* take_counters(cudaStream_t stream);

// Allocates the workspace in `like`'s caching allocator; `dim` is the row length of a partial result. The returned
// tensor keeps it alive: the caller may drop it once the kernel is enqueued, since the allocator is stream-ordered.
Tensor make_plan(const AttentionParams& p, int dim, int num_splits, const Teams& most, const Tensor& like, Plan& plan);

// Rows of `out` that no sequence owns or that see no key become 0, their lse -inf; `out_size` is the size of an element
// of `out`. For kernels that do not do so themselves.
void launch_fill(const AttentionParams& p, int out_size, cudaStream_t stream);

struct Device {
  int index, sms, smem_per_block;
  bool overlap;  // kernels compiled for this device understand programmatic dependent launch
};
const Device& current_device();

// Finds how many teams of more than one CTA of a kernel the device runs at once.
template <class... P>
void count_teams(void (*kernel)(P...), int threads, size_t shared, Teams& teams) {
  if (!current_device().overlap) return;  // of the same devices and code
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  for (int i = 1; i < int(teams.size()); ++i) {
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {1u << i, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1u << i), config.blockDim = dim3(unsigned(threads)), config.dynamicSmemBytes = shared;
    config.attrs = &cluster, config.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&teams[i], kernel, &config) == cudaSuccess) continue;
    cudaGetLastError();  // larger than this device has them
    teams[i] = 0;
  }
}

// Launches a kernel that begins with begin_planned and plan_stretch and ends with settle.
template <class... P, class... A>
void launch_planned(void (*kernel)(P...), const Plan& plan, int threads, size_t shared, cudaStream_t stream,
                    A&&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(plan.teams << plan.team_shift)), config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared, config.stream = stream, config.attrs = attributes;
  if (current_device().overlap) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (plan.team_shift > 0) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {1u << plan.team_shift, 1, 1};
  }
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...));
}

// teams -------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int my_team(const Plan& plan) { return int(blockIdx.x) >> plan.team_shift; }
__device__ __forceinline__ int my_rank(const Plan& plan) { return int(blockIdx.x) & ((1 << plan.team_shift) - 1); }

// All threads of the team meet; what they wrote before is visible to all behind it.
__device__ __forceinline__ void meet(const Plan& plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (plan.team_shift > 0) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

// The threads that work on a run together meet.
__device__ __forceinline__ void meet_crew(bool solo) {
  if (solo)
    __syncwarp();
  else
    __syncthreads();
}

// The same variable of the CTA of that rank.
template <class T>
__device__ __forceinline__ T* of_rank(T* mine, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint64_t theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
  return reinterpret_cast<T*>(theirs);
#else
  return mine;
#endif
}

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

// The batch's sequences: where their lengths and query rows are read from.
struct Sequences {
  const int *seq_lens, *query_len, *query_start;

  __device__ __forceinline__ explicit Sequences(const AttentionParams& p)
      : seq_lens(p.seq_lens), query_len(p.query_len), query_start(p.query_start) {}
};

__device__ __forceinline__ SeqSize seq_size(const AttentionParams& p, const Sequences& from, int seq) {
  const int len = max(0, from.seq_lens[seq]);
  return {len, readable_keys(p, len), max(0, min(from.query_len[seq], p.max_query_len))};
}
__device__ __forceinline__ SeqSize seq_size(const AttentionParams& p, int seq) {
  return seq_size(p, Sequences(p), seq);
}
// Rows of `out` that are known to see a key; none is counted twice: sequences own disjoint rows.
__device__ __forceinline__ int seeing_rows(const AttentionParams& p, const SeqSize& w, int start) {
  const bool all_see = w.tokens <= w.keys && w.keys == w.len && (p.causal || p.window == 0);
  return all_see && start >= 0 && start <= p.num_tokens - w.tokens ? w.tokens : 0;
}
__device__ __forceinline__ SeqWork seq_work(const AttentionParams& p, const Plan& plan, const Sequences& from,
                                            int seq) {
  SeqWork w{seq_size(p, from, seq)};
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

// A team's stretch of the line, or a warp's, what is left of it.
struct Stretch {
  Place at;
  int left;
  int head;     // units of the line in front of each item's blocks: what it costs to start with it
  bool solo;    // each warp has a stretch of its own, of whole items
  bool filled;  // no row of `out` is left to fill
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
  int rows;     // of `out`, that are known to see a key
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
  int used, even, rest;             // stretches, the units of each, those left over
  int head;                         // Stretch::head
  int done[2], first[2], parts[2];  // of the CTA's pending parts: whether it completes the item, the item's CTAs
  Run pending[2];
};

// Where a team's even stretch begins: all * team / used. Where the stretches are a multiple of the items, which are
// equally long, those of each item end with it.
__device__ __forceinline__ int even_cut(int even, int rest, int used, int team) {
  return team * even + int(uint32_t(team * rest) / uint32_t(used));
}
// The team whose even stretch holds `unit` of the line.
__device__ __forceinline__ int team_of(const PlanScratch& s, int unit) {
  int team = min(s.used - 1, int(float(unit) * float(s.used) / float(s.even * s.used + s.rest)));  // or one beside it
  while (even_cut(s.even, s.rest, s.used, team) > unit) --team;
  while (team + 1 < s.used && even_cut(s.even, s.rest, s.used, team + 1) <= unit) ++team;
  return team;
}

// Into L2 while the kernel in front still runs: the lengths, the pages if few. All threads call it first.
__device__ __forceinline__ void prefetch_planned(const AttentionParams& p, const Plan& plan) {
  auto prefetch = [](const int* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at) : "memory"); };
  release_next();
  const int line = int(blockIdx.x) + int(threadIdx.x) * int(gridDim.x);
  if (line < plan.table_lines) prefetch(p.block_tables + int64_t(line) * 32);
  if (p.num_seqs > 0 && threadIdx.x < 3)
    prefetch(threadIdx.x == 0 ? p.seq_lens : threadIdx.x == 1 ? p.query_len : p.query_start);
}
// Begins a kernel: all threads call it.
__device__ __forceinline__ void begin_planned(const AttentionParams& p, const Plan& plan) {
  prefetch_planned(p, plan);
  wait_for_previous();
}

// The lengths and query rows of a few sequences in shared memory: all threads of a CTA see the same ones, whatever
// other kernels write.
struct Snapshot {
  static constexpr int kMost = 128;
  int values[3][kMost];

  // All threads call both.
  __device__ __forceinline__ Sequences take(const AttentionParams& p) {
    for_each(p, [](int& value, const int* at) { value = guess(at); });
    __syncthreads();
    Sequences s(p);
    s.seq_lens = values[0], s.query_len = values[1], s.query_start = values[2];
    return s;
  }
  __device__ __forceinline__ bool outdated(const AttentionParams& p) {
    bool differs = false;
    for_each(p, [&](int& value, const int* at) { differs |= value != guess(at); });
    return __syncthreads_or(differs);
  }

 private:
  template <class F>
  __device__ __forceinline__ void for_each(const AttentionParams& p, F&& f) {
#pragma unroll 1
    for (int i = threadIdx.x; i < p.num_seqs; i += blockDim.x) {
      f(values[0][i], p.seq_lens + i);
      f(values[1][i], p.query_len + i);
      f(values[2][i], p.query_start + i);
    }
  }
};

// Planned mode: a cut that would leave fewer blocks of an item on one side is moved to its end.
__device__ __forceinline__ int least_part(int head) { return (head + 1) / 2; }

// This team's stretch, or this warp's where kSolo allows it: all threads call, 128 at most.
template <bool kSolo>
__device__ __forceinline__ Stretch plan_stretch(const AttentionParams& p, const Plan& plan, PlanScratch& shared,
                                                const Sequences& from) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, threads = blockDim.x;
  // Sequences a thread, in a row; a single one is everyone's.
  const int share = (p.num_seqs + threads - 1) / threads;
  const int first = p.num_seqs > 1 ? min(p.num_seqs, int(threadIdx.x) * share) : 0;
  const int last = min(p.num_seqs, first + share);
  Totals mine{0, 0, 0, 0};
#pragma unroll 1
  for (int s = first; s < last; ++s) {
    const int start = from.query_start[s];
    const SeqWork w = seq_work(p, plan, from, s);
    if (w.blocks > 0) {
      const int items = w.row_tiles * p.num_kv_heads;
      mine.units += items * w.blocks, mine.items += items, mine.longest = max(mine.longest, w.blocks);
    }
    mine.rows += seeing_rows(p, w, start);
  }
  int upto = mine.units, items_upto = mine.items;  // inclusive prefix sums
  Totals total = mine;
  if (p.num_seqs > 1) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int t = __shfl_up_sync(0xffffffffu, upto, d), i = __shfl_up_sync(0xffffffffu, items_upto, d);
      if (lane >= d) upto += t, items_upto += i;
    }
    const int rows = __reduce_add_sync(0xffffffffu, mine.rows);
    const int longest = __reduce_max_sync(0xffffffffu, mine.longest);
    if (lane == 31) shared.warps[warp] = {upto, items_upto, rows, longest};
    __syncthreads();
    total = {0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (w * 32 >= threads) continue;
      const Totals t = shared.warps[w];
      if (w < warp) upto += t.units, items_upto += t.items;
      total.units += t.units, total.items += t.items, total.rows += t.rows,
          total.longest = max(total.longest, t.longest);
    }
  }
  int all = total.units, head = 0;
  const bool filled = total.rows == p.num_tokens;
  int used = max(1, min(plan.teams, all));
  if (plan.splits == 0 && all > 0) {
    used = min(used, max(plan.least_teams, all >> plan.full_shift));
    if (total.longest * total.items == all) {
      int even = used - used % total.items;  // whole stretches in each item, or whole items in each stretch
      if (even == 0) {
        const int each = (total.items - 1) / used + 1;
        even = total.items % each == 0 ? total.items / each : 0;
      }
      if (even > 0 && all / even - all / used <= kRestart << plan.team_shift) used = even;
    } else if (total.items < 1 << 26) {  // 32 bits hold what they cost, too
      head = min(plan.head, all / used / 2);
      all += head * total.items, upto += head * items_upto, mine.units += head * mine.items;
    }
  }
  if constexpr (kSolo) {
    // Equal items, one row tile each, so many that they are nearly even among the warps.
    const int crews = plan.teams * (threads / 32), rounds = (total.items + crews - 1) / crews;
    if (plan.solo && total.items > plan.teams && total.items == p.num_seqs * p.num_kv_heads &&
        total.longest * total.items == all && 16 * rounds * crews <= kSoloSlack * total.items) {
      const int index = warp * plan.teams + int(blockIdx.x);
      const int each = total.items / crews, over = total.items - each * crews;
      const int begin = even_cut(each, over, crews, index), end = even_cut(each, over, crews, index + 1);
      const int seq = begin / p.num_kv_heads;
      return {{seq, begin - seq * p.num_kv_heads, 0}, (end - begin) * total.longest, 0, true, filled};
    }
  }
  const int even = all / used, rest = all - even * used, team = my_team(plan);
  const int cuts[2] = {team < used ? even_cut(even, rest, used, team) : all,
                       team + 1 < used ? even_cut(even, rest, used, team + 1) : all};
  if (threadIdx.x == 0) {
    shared.used = used, shared.even = even, shared.rest = rest, shared.head = head;
  }
  if (p.num_seqs > 1) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (cuts[e] < upto && cuts[e] >= upto - mine.units) shared.cuts[e] = {first, upto - mine.units};
    }
    __syncthreads();
  }

  // even lanes: the first cut; odd ones: the second
  const int odd = lane & 1;
  int unit = odd ? cuts[1] : cuts[0];
  Place at{p.num_seqs, 0, 0};
  if (unit < all) {
    const Found found = p.num_seqs > 1 ? shared.cuts[odd] : Found{0, 0};
    SeqWork w;
    int begin = found.begin, seq_items;
#pragma unroll 1
    for (at.seq = found.seq;; ++at.seq) {
      w = seq_work(p, plan, from, at.seq);
      seq_items = w.row_tiles * p.num_kv_heads;
      const int units = w.blocks > 0 ? seq_items * (w.blocks + head) : 0;
      if (unit < begin + units) break;
      begin += units;
    }
    const int size = w.blocks + head, trifle = least_part(head);
    at.item = (unit - begin) / size;
    const int within = unit - begin - at.item * size;
    int moved = within;
    if (plan.splits > 1) {
      moved -= moved % partition_blocks(plan, w.blocks, w.tokens);
    } else if (plan.splits == 1 || w.blocks <= kWholeBlocks) {
      moved = 2 * within < size ? 0 : size;
    } else if (within < head + trifle) {
      moved = 0;
    } else if (within > size - trifle) {
      moved = size;
    }
    unit += moved - within;
    if (moved == size) {  // the next item, perhaps of another sequence
      if (++at.item == seq_items) ++at.seq, at.item = 0;
    } else if (moved > 0) {
      at.block = moved - head;
    }
  }
  const int item_begin = at.block > 0 ? unit - at.block - head : unit;
  const int begin = __shfl_sync(0xffffffffu, unit, 0), length = __shfl_sync(0xffffffffu, unit, 1) - begin;
  if (threadIdx.x == 0) shared.at = at, shared.length = length, shared.begin = item_begin;
  if (threadIdx.x == 1) shared.last_begin = item_begin;
  Stretch s{{__shfl_sync(0xffffffffu, at.seq, 0), __shfl_sync(0xffffffffu, at.item, 0),
             __shfl_sync(0xffffffffu, at.block, 0)},
            length,
            head,
            false,
            filled};
  return s;
}

// The next run of a stretch that has some left; `parts`: fixed mode's runs end where their partition does.
__device__ __forceinline__ Run next_run(const AttentionParams& p, const Plan& plan, const Sequences& from, Stretch& s,
                                        bool parts = true) {
  SeqWork w = seq_work(p, plan, from, s.at.seq);
#pragma unroll 1
  while (w.blocks == 0 || s.at.item == w.row_tiles * p.num_kv_heads) {
    ++s.at.seq, s.at.item = 0;
    w = seq_work(p, plan, from, s.at.seq);
  }
  Run r;
  r.seq = s.at.seq, r.item = s.at.item, r.begin = s.at.block, r.blocks = w.blocks;
  r.query_start = from.query_start[r.seq];
  r.len = w.len, r.keys = w.keys, r.tokens = w.tokens;
  r.kv_head = w.row_tiles == 1 ? r.item : r.item / w.row_tiles;
  r.row_begin = (r.item - r.kv_head * w.row_tiles) * kRowTile;
  r.rows = min(kRowTile, w.tokens * plan.group - r.row_begin);
  r.seen = visible_keys(p, r.position(plan, 0), r.position(plan, r.rows - 1), w.keys);
  int edge = w.blocks;
  if (parts && plan.splits > 1) {
    edge = min(edge, r.begin + partition_blocks(plan, w.blocks, w.tokens));
  }
  const int head = r.begin == 0 ? s.head : 0;
  r.end = min(edge, r.begin + s.left - head);
  const int base = r.seen.lo & ~(kBlockKeys - 1);
  r.key_begin = base + (r.begin << plan.key_shift);
  // the last block of a long item may reach beyond 31 bits
  r.key_end = int(min(base + (int64_t(r.end) << plan.key_shift), int64_t(max(0, r.seen.hi))));
  s.left -= r.end - r.begin + head;
  s.at.block = r.end;
  if (r.end == w.blocks) s.at.block = 0, ++s.at.item;
  return r;
}

__device__ __forceinline__ Run next_run(const AttentionParams& p, const Plan& plan, Stretch& s, bool parts = true) {
  return next_run(p, plan, Sequences(p), s, parts);
}
template <bool kSolo>
__device__ __forceinline__ Stretch plan_stretch(const AttentionParams& p, const Plan& plan, PlanScratch& shared) {
  return plan_stretch<kSolo>(p, plan, shared, Sequences(p));
}

// Whether all rows are known to see a key. All lanes of a warp call.
__device__ __forceinline__ bool all_rows_see(const AttentionParams& p) {
  int rows = 0;
#pragma unroll 4
  for (int s = threadIdx.x % 32; s < p.num_seqs; s += 32) rows += seeing_rows(p, seq_size(p, s), p.query_start[s]);
  return int(__reduce_add_sync(0xffffffffu, rows)) == p.num_tokens;
}

// Rows `step` apart from `first`, those that see no key: 0, and -inf in lse. All lanes of a warp call.
__device__ __forceinline__ void fill_rows(const AttentionParams& p, int out_size, int64_t first, int64_t step) {
  auto sees_a_key = [&](int seq, int64_t row) {
    const SeqSize w = seq_size(p, seq);
    const int64_t token = row - p.query_start[seq];
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
    const float sink = L::from_natural(p.sinks[head]), base = fmaxf(top, sink);
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

// Where a team's part of an item goes. Fixed mode: the run's own slot. Otherwise two slots a team, the second for an
// item that begins in it.
template <int kDim>
__device__ __forceinline__ float* part_slot(const Plan& plan, const Run& run) {
  int64_t slot = 2 * int64_t(my_team(plan)) + (run.begin == 0);
  if (plan.splits > 1) {
    slot = (int64_t(run.seq) * plan.sequence_items + run.item) * plan.max_parts;
    slot += run.begin / partition_blocks(plan, run.blocks, run.tokens);
  }
  return plan.partials + slot * plan.rows * part_row<kDim>;
}

// Four columns of a row, merged from parts in their order.
template <class T>
struct Merged {
  float4 acc = make_float4(0.f, 0.f, 0.f, 0.f);
  float top = kNegInf, sum = 0.f;

  // kMost parts whose loads are in flight together; at(u) points at part u's row, or nowhere. `state`: where in a row
  // its maximum and sum are. Parts that this kernel wrote to global memory are read from L2.
  template <int kMost>
  struct Flight {
    float2 states[kMost];
    float4 outs[kMost];

    template <bool kGlobal, class At>
    __device__ __forceinline__ void load(int col, int state, At&& at) {
#pragma unroll
      for (int u = 0; u < kMost; ++u) {
        states[u] = make_float2(kNegInf, 0.f), outs[u] = make_float4(0.f, 0.f, 0.f, 0.f);
        const float* const from = at(u);
        if (!from) continue;
        const float2* const state_at = reinterpret_cast<const float2*>(from + state);
        const float4* const out_at = reinterpret_cast<const float4*>(from + col);
        states[u] = kGlobal ? __ldcg(state_at) : *state_at;
        outs[u] = kGlobal ? __ldcg(out_at) : *out_at;
      }
    }
  };
  template <int kMost>
  __device__ __forceinline__ void add(const Flight<kMost>& flight) {
    using L = Logits<T>;
    const auto& states = flight.states;
    const auto& outs = flight.outs;
    float now = top;
#pragma unroll
    for (int u = 0; u < kMost; ++u) now = fmaxf(now, states[u].x);
    const float base = now == kNegInf ? 0.f : now, shrink = L::exp(top - base);
    top = now;
    sum *= shrink;
    acc.x *= shrink, acc.y *= shrink, acc.z *= shrink, acc.w *= shrink;
#pragma unroll
    for (int u = 0; u < kMost; ++u) {
      const float w = L::exp(states[u].x - base);  // an empty part: zeros with a maximum of -inf
      sum += w * states[u].y;
      if (states[u].y != 0.f) accumulate(acc, w, outs[u]);  // else it may hold 0 * NaN
    }
  }
};

// Merges every fourth column of a run's rows, the 1 << sharers_shift of this rank's threads taking their share each:
// `parts` parts, at(part, row) is where that part of the row is, or nowhere, and store(row, column, merged) is called
// at the end. A thread has kColumns columns at a time, so that its loads and arithmetic overlap, of kFlight parts each.
template <class T, int kDim, int kColumns, int kFlight, bool kGlobal, class At, class Store>
__device__ __forceinline__ void merge_columns(const AttentionParams& p, const Run& run, int rank, int sharers_shift,
                                              int thread, int threads, int parts, int state, At&& at, Store&& store) {
  constexpr int kCols = kDim / 4;
  const int all = run.rows * kCols, each = (all + (1 << sharers_shift) - 1) >> sharers_shift;
  const int end = min(all, (rank + 1) * each);
#pragma unroll 1
  for (int i = rank * each + thread; i < end; i += kColumns * threads) {
    Merged<T> m[kColumns];
    auto row = [&](int c) { return (i + c * threads) / kCols; };
    auto col = [&](int c) { return (i + c * threads - row(c) * kCols) * 4; };
#pragma unroll 1
    for (int first = 0; first < parts; first += kFlight) {
      typename Merged<T>::template Flight<kFlight> flights[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        flights[c].template load<kGlobal>(col(c), state, [&](int u) -> const float* {
          return first + u < parts && i + c * threads < end ? at(first + u, row(c)) : nullptr;
        });
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) m[c].add(flights[c]);
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (i + c * threads < end && col(c) < p.head_dim) store(row(c), col(c), m[c]);
    }
  }
}
// Whether a thread's share are many columns.
template <int kDim>
__device__ __forceinline__ bool many_columns(const Run& run, int sharers_shift, int threads) {
  return run.rows * (kDim / 4) > 2 * threads << sharers_shift;
}

// Stores what is merged of a run: its result where it is a whole item, else into its slot.
template <class T, int kDim>
__device__ __forceinline__ void store_merged(const AttentionParams& p, const Plan& plan, const Run& run, float* slot,
                                             int row, int col, const Merged<T>& m) {
  if (!slot) return write_out<T>(p, plan, run, row, col, m.acc, m.top, m.sum);
  float* const to = slot + row * part_row<kDim>;
  *reinterpret_cast<float4*>(to + col) = m.acc;
  if (col == 0) *reinterpret_cast<float2*>(to + kDim) = make_float2(m.top, m.sum);
}

// Merges the parts of `run`, `count` of kMost at most (those without rows do not count), and then what the CTAs of the
// team have of it. All threads call it (`solo`: of a warp); the next use of the parts' memory is behind a meet().
template <class T, int kDim, int kMost, bool kBatches = false>
__device__ __forceinline__ void combine(const AttentionParams& p, const Plan& plan, const Run& run, const Part* parts,
                                        int count, bool solo) {
  const int thread = solo ? threadIdx.x % 32 : threadIdx.x, threads = solo ? 32 : blockDim.x;
  float* const slot = run.whole() ? nullptr : part_slot<kDim>(plan, run);
  const auto part = [&](int u, int row) { return parts[u].rows ? parts[u].rows + row * part_row<kDim> : nullptr; };
  const auto merge = [&](auto&& store) {
    if (kBatches && many_columns<kDim>(run, 0, threads))
      merge_columns<T, kDim, 4, kMost, false>(p, run, 0, 0, thread, threads, count, kDim, part, store);
    else
      merge_columns<T, kDim, 1, kMost, false>(p, run, 0, 0, thread, threads, count, kDim, part, store);
  };
  if (plan.team_shift == 0) {
    merge([&](int row, int col, const Merged<T>& m) { store_merged<T, kDim>(p, plan, run, slot, row, col, m); });
    return;
  }
  // This CTA's rows in place of its first part's, the maximum and the sum beside theirs, which others still read.
  float* const mine = const_cast<float*>(parts[0].rows);
  constexpr int kState = kDim + 4;
  merge([&](int row, int col, const Merged<T>& m) {
    float* const to = mine + row * part_row<kDim>;
    *reinterpret_cast<float4*>(to + col) = m.acc;
    if (col == 0) *reinterpret_cast<float2*>(to + kState) = make_float2(m.top, m.sum);
  });
  meet(plan);
  const auto of_team = [&](int rank, int row) -> const float* { return of_rank(mine, rank) + row * part_row<kDim>; };
  const auto store = [&](int row, int col, const Merged<T>& m) {
    store_merged<T, kDim>(p, plan, run, slot, row, col, m);
  };
  const int team = 1 << plan.team_shift;
  if (kBatches && team <= 4 && many_columns<kDim>(run, plan.team_shift, threads))
    merge_columns<T, kDim, 4, 4, false>(p, run, my_rank(plan), plan.team_shift, thread, threads, team, kState, of_team,
                                        store);
  else
    merge_columns<T, kDim, 1, 8, false>(p, run, my_rank(plan), plan.team_shift, thread, threads, team, kState, of_team,
                                        store);
}

// Merges all the parts of an item, slot `part0` and then every `step`-th from `rest` on, into `out`. All threads call.
template <class T, int kDim, bool kBatches>
__device__ __forceinline__ void merge_parts(const AttentionParams& p, const Plan& plan, const Run& run, int64_t part0,
                                            int64_t rest, int step, int parts) {
  const int64_t size = int64_t(plan.rows) * part_row<kDim>;
  const auto at = [&](int part, int row) -> const float* {
    return plan.partials + row * part_row<kDim> + (part == 0 ? part0 : rest + int64_t(part - 1) * step) * size;
  };
  const auto store = [&](int row, int col, const Merged<T>& m) {
    write_out<T>(p, plan, run, row, col, m.acc, m.top, m.sum);
  };
  if (kBatches && parts <= 8 && many_columns<kDim>(run, plan.team_shift, blockDim.x))
    merge_columns<T, kDim, 4, 4, true>(p, run, my_rank(plan), plan.team_shift, threadIdx.x, blockDim.x, parts, kDim, at,
                                       store);
  else
    merge_columns<T, kDim, 1, 16, true>(p, run, my_rank(plan), plan.team_shift, threadIdx.x, blockDim.x, parts, kDim,
                                        at, store);
}

// Adds what this team has of an item to its counter, by one thread behind a meeting; whether the item is complete now.
__device__ __forceinline__ bool arrive(const Plan& plan, int counter, int blocks, int of) {
  int before;  // the meeting puts the team's stores before this, and it puts them before the count for all
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(plan.arrived + counter), "r"(blocks)
               : "memory");
  const bool complete = before + blocks == of;
  if (complete) plan.arrived[counter] = 0;  // for the next kernel
  return complete;
}

// Ends a kernel: all threads call it when the team's parts are written and it has met. `pending`: planned mode, how
// many of the team's items are parts, shared.pending them.
template <class T, int kDim, bool kBatches = false>
__device__ __forceinline__ void settle(const AttentionParams& p, const Plan& plan, PlanScratch& shared, int out_size,
                                       int pending, bool filled) {
  if (plan.splits > 1) {
    __syncthreads();
    Stretch s{shared.at, shared.length, 0, false, filled};
    int unit = shared.begin;  // where the item begins on the line
#pragma unroll 1
    while (s.left > 0) {
      const Run run = next_run(p, plan, s, false);
      const int each = partition_blocks(plan, run.blocks, run.tokens);
      const int begin = unit;
      if (run.end == run.blocks) unit += run.blocks;
      if (each >= run.blocks) continue;
      bool complete = run.whole();
      if (!complete) {
        if (threadIdx.x == 0) shared.done[0] = arrive(plan, team_of(shared, begin), run.end - run.begin, run.blocks);
        __syncthreads();
        complete = shared.done[0];
        __syncthreads();
      }
      const int64_t slot = (int64_t(run.seq) * plan.sequence_items + run.item) * plan.max_parts;
      if (complete) merge_parts<T, kDim, kBatches>(p, plan, run, slot, slot + 1, 1, (run.blocks + each - 1) / each);
    }
  } else if (pending > 0) {
    if (int(threadIdx.x) < pending) {
      const int mine = threadIdx.x;
      const Run& run = shared.pending[mine];
      // from the last cut that is moved to the item's begin to the last one that is not moved to its end
      const int begin = (run.begin > 0 ? shared.begin : shared.last_begin) + shared.head;
      const int trifle = least_part(shared.head);
      const int first = team_of(shared, begin + max(0, trifle - 1));
      shared.first[mine] = first, shared.parts[mine] = team_of(shared, begin + run.blocks - max(1, trifle)) - first + 1;
      if (my_rank(plan) == 0) {
        const bool done = arrive(plan, first, run.end - run.begin, run.blocks);
        for (int rank = 0; rank < 1 << plan.team_shift; ++rank) *of_rank(shared.done + mine, rank) = done;
      }
    }
    meet(plan);
#pragma unroll 1
    for (int e = 0; e < pending; ++e) {
      if (!shared.done[e]) continue;
      const int64_t slot = 2 * int64_t(shared.first[e]);
      merge_parts<T, kDim, kBatches>(p, plan, shared.pending[e], slot + 1, slot + 2, 2, shared.parts[e]);
    }
  }
  if (plan.fill && !filled) {
    const int warps = blockDim.x / 32;
    fill_rows(p, out_size, int64_t(blockIdx.x) * warps + threadIdx.x / 32, int64_t(gridDim.x) * warps);
  }
}

}  // namespace pagedkv
