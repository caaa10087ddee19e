// Decode attention of sequences that share a prefix: the prefix's keys are attended to once for a group of them.
//
// The attention itself is done by the kernels that are there, on sequences made up for them, and the states are merged
// by their LSE (FlashInfer's cascade, Ye et al., 2024, flashinfer.ai/2024/02/02/cascade-inference.html; Hydragen,
// Juravsky et al., 2024, arXiv:2402.05099):
//   plan_kernel   from the groups and the lengths of this moment: for each group `pieces` sequences, an even share of
//                 the prefix each, whose queries are the group's; for each row the rest of its keys. Copies of the
//                 queries, since each piece needs result rows of its own. Nothing is known on the host but upper
//                 bounds, so a CUDA graph can be replayed with other lengths and prefixes, 0 (plain attention)
//                 included.
//   the prefix    by one of two kernels. Many rows a KV head: the prefill kernel, tiles of 128 rows, which reads the
//                 prefix once for each tile and does not split keys, hence the pieces, about one for each
//                 multiprocessor. Few rows: the decode kernel, which splits keys itself but reads them once for 16
//                 rows.
//   the rest      by the decode kernel; together with the prefix in one launch if that is done by it, too.
//   merge_kernel  the states of a row -> its result.
// States are float32, written so by the epilogues of both kernels: a result is rounded once. (Kept in the query's dtype
// they cost 1.2 times the root mean square error of PyTorch's attention and up to 2.2 times its largest.)
//
// ALiBi's distances are relative, so a row's true position moves all logits over a piece by one number, which is added
// to the piece's LSE. A sliding window that hides part of the prefix from some row of a group cannot be expressed so:
// such a group's prefix counts as 0 and its rows are attended to plainly. Sinks take part in the rest, which is never
// empty beside a prefix.
//
// Measured with 16-bit states:
// H200, 64 x (8192 + 256), Llama-3-8B, bf16, in one run: 69.4 us (plan 4.1, prefix 30.8, rests 28.7, merge 5.0), 508
// for sequences that share nothing, 264 for plain attention on the shared blocks (the L2 cache has them: it is faster
// while less than some 256 MiB are saved), 225 for FlashInfer's cascade. The prefix by the decode kernel, 16 times
// through L2 at 4.2 TB/s: 137 us in all; by mma.sync in 16 pieces 81; on a stream of its own beside the rests, with
// pieces for half of the multiprocessors, 67: not worth the events. 12 or 16 pieces, more than one for each
// multiprocessor: 79 and 85.
//
// Floor: bytes of each prefix once and of the rests / memory bandwidth, or 4 * rows * prefix * head_dim flops / the
// tensor cores' rate. 64 rows of 8192 + 256 tokens, Llama-3-8B: 34 + 67 MB, 24 us, and 8.6 GFLOP, 11 us, one after the
// other.
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "attention_plan.cuh"

namespace pagedkv {
namespace {

constexpr int kPieceKeys = 128;  // a piece's keys are a multiple: of the prefill kernels' tiles, and of any block
constexpr int kMaxPieces = 16;
// Of a group and KV head, up to which the decode kernel does the prefix: one tile of it. (With two it took 60 us and
// the prefill kernel 45 for 16 x (8192 + 128); with one, 49 and 52 for 4 x 16384.)
constexpr int kJoinedRows = kRowTile;
constexpr int kThreads = 128;

// A row's group.
struct alignas(16) RowGroup {
  int prefix;  // keys that it shares
  int len;     // rows of the group
  int number;  // of the row among them
};

// What the host knows, and where plan_kernel writes.
struct Groups {
  const int* start;       // [G] first row
  const int* len;         // [G] rows; they follow each other
  const int* prefix_len;  // [G] keys that they share
  int count, max_len, pieces;
  int rest_row;  // of the query copies, the first row of the rests; 0: they use the query itself
  int copies;    // of the query

  // Sequences piece + pieces * group, then one for each row.
  int* tables;    // [sequences, max_blocks]
  int* seq_lens;  // [sequences]
  int* query_start;
  int* query_len;
  RowGroup* rows;  // [S]

  __host__ __device__ int piece_sequences() const { return count * pieces; }
};

struct Keys {
  int begin, end;
};
__device__ __forceinline__ Keys piece_keys(int prefix, int pieces, int piece) {
  const int step = (prefix + pieces * kPieceKeys - 1) / (pieces * kPieceKeys) * kPieceKeys;
  return {min(piece * step, prefix), min((piece + 1) * step, prefix)};
}

// A group as it was given.
struct Group {
  int start, len, prefix;
};
// Group `index`, or the one that holds row `row` (len 0: none does). All lanes of a warp call. One round trip to memory
// where there are up to 32 groups.
__device__ __forceinline__ Group find_group(const Groups& groups, int index, int row) {
  const int lane = threadIdx.x % 32;
  Group found{0, 0, 0};
#pragma unroll 1
  for (int first = 0; first < groups.count; first += 32) {
    const int g = first + lane, at = min(g, groups.count - 1);
    const Group mine{__ldg(groups.start + at), __ldg(groups.len + at), __ldg(groups.prefix_len + at)};
    const bool hit = g < groups.count && (index >= 0 ? g == index : row >= mine.start && row - mine.start < mine.len);
    const uint32_t hits = __ballot_sync(~0u, hit);
    if (hits == 0) continue;
    const int owner = __ffs(hits) - 1;
    found = {__shfl_sync(~0u, mine.start, owner), __shfl_sync(~0u, mine.len, owner),
             __shfl_sync(~0u, mine.prefix, owner)};
    if (index >= 0) break;
  }
  return found;
}

// Keys, in whole blocks, that all rows of a group share and may be attended to together. All lanes of a warp call.
__device__ __forceinline__ int usable_prefix(const AttentionParams& p, const Groups& groups, const Group& g) {
  if (g.start < 0 || g.len < 1 || g.len > groups.max_len || g.start > p.num_seqs - g.len) return 0;
  int shortest = p.max_key_len, longest = 0;
  for (int i = threadIdx.x % 32; i < g.len; i += 32) {
    const int n = __ldg(p.seq_lens + g.start + i);
    shortest = min(shortest, n), longest = max(longest, n);
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {
    shortest = min(shortest, __shfl_xor_sync(~0u, shortest, d));
    longest = max(longest, __shfl_xor_sync(~0u, longest, d));
  }
  if (p.window > 0 && longest > p.window) return 0;
  const int keys = min(g.prefix, shortest - 1);  // one at least is left to the rest
  return keys <= 0 ? 0 : keys >> p.block_shift << p.block_shift;
}

// `p` is the call as it would be without groups. A CTA a sequence, and all of them for the copies of the query, which
// are contiguous; `Unit`: what is moved at once, `element`: bytes of an element.
template <class Unit>
__global__ void __launch_bounds__(kThreads)
    plan_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Groups groups, Unit* copies,
                int row_units, int head_units, int element) {
  const int sequence = blockIdx.x, row = sequence - groups.piece_sequences();
  if (row < p.num_seqs) {
    int source, first, keys, query_start, query_len;  // a row of the table, its keys, the queries
    if (row < 0) {
      const int index = sequence / groups.pieces, piece = sequence - index * groups.pieces;
      const Group group = find_group(groups, index, 0);
      const int prefix = usable_prefix(p, groups, group);
      const Keys k = piece_keys(prefix, groups.pieces, piece);
      source = prefix > 0 ? group.start : 0;
      first = k.begin, keys = k.end - k.begin;
      query_start = piece * p.num_seqs + source;
      query_len = keys > 0 ? group.len : 0;
    } else {
      const int len = max(0, __ldg(p.seq_lens + row));
      const Group group = find_group(groups, -1, row);
      const int prefix = usable_prefix(p, groups, group);
      source = row, first = prefix, keys = len - prefix;
      query_start = groups.rest_row + row, query_len = 1;
      if (threadIdx.x == 0) groups.rows[row] = {prefix, group.len, row - group.start};
    }
    if (threadIdx.x == 0) {
      groups.seq_lens[sequence] = keys;
      groups.query_start[sequence] = query_start;
      groups.query_len[sequence] = query_len;
    }
    const int begin = first >> p.block_shift;
    const int end = (min(first + keys, p.max_key_len) + p.block_size - 1) >> p.block_shift;
    const int* const from = p.block_tables + source * p.table_stride;
    int* const to = groups.tables + int64_t(sequence) * p.max_blocks - begin;
#pragma unroll 4
    for (int i = begin + int(threadIdx.x); i < end; i += kThreads) to[i] = __ldg(from + i);
  }
  if (groups.copies == 0) return;
  const int64_t units = int64_t(p.num_seqs) * row_units;
  for (int64_t i = int64_t(gridDim.x - 1 - blockIdx.x) * kThreads + threadIdx.x; i < units;
       i += int64_t(gridDim.x) * kThreads) {
    const int row = int(i / row_units), at = int(i - int64_t(row) * row_units), head = at / head_units;
    const int64_t from = (row * p.q_stride_t + head * p.q_stride_h) * element;
    const Unit x = reinterpret_cast<const Unit*>(static_cast<const uint8_t*>(p.q) + from)[at - head * head_units];
#pragma unroll 1
    for (int c = 0; c < groups.copies; ++c) copies[c * units + i] = x;
  }
}

// States: results [pieces + 1, S, Hq, D] and lse [pieces + 1, S, Hq], the last for the rests. A warp a row and
// head; lane i knows the share of the i-th that is there.
template <class T>
__global__ void __launch_bounds__(256)
    merge_kernel(const __grid_constant__ AttentionParams p, const RowGroup* rows, int pieces,
                 const float* __restrict__ states, const float* __restrict__ lses) {
  using State = Vec<float, 4>;
  constexpr int kFlight = 12;  // states whose loads are in flight together
  const int lane = threadIdx.x % 32;
  const int64_t per_state = int64_t(p.num_seqs) * p.num_heads, warps = int64_t(gridDim.x) * blockDim.x / 32;
#pragma unroll 1
  for (int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32; row < per_state; row += warps) {
    const int s = int(row / p.num_heads), head = int(row - int64_t(s) * p.num_heads);
    const RowGroup group = rows[s];
    const int step = piece_keys(group.prefix, pieces, 0).end;
    const int used = step == 0 ? 0 : (group.prefix + step - 1) / step;  // pieces that hold keys; the rest follows them
    auto state_of = [&](int n) { return (n < used ? n : pieces) * per_state + row; };
    State v[kFlight];
    auto load = [&](int first, int i) {
#pragma unroll
      for (int u = 0; u < kFlight; ++u)
        if (first + u <= used && i < p.head_dim)
          v[u] = *reinterpret_cast<const State*>(states + state_of(first + u) * p.head_dim + i);
    };
    load(0, lane * 4);  // in flight while the shares are worked out
    float lse = lane <= used ? lses[state_of(lane)] : kNegInf;
    if (lane < used && p.alibi_slopes) {  // the kernel took the last of the group's rows to sit on the piece's last key
      const int last = piece_keys(group.prefix, pieces, lane).end - group.len + group.number;
      lse += p.alibi_slopes[head] * float(last - (p.seq_lens[s] - 1));
    }
    float top = lse;
    for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    const float base = top == kNegInf ? 0.f : top;
    float share = expf(lse - base), total = share;
    for (int d = 16; d > 0; d /= 2) total += __shfl_xor_sync(~0u, total, d);
    share = total == 0.f ? 0.f : share / total;

#pragma unroll 1
    for (int first_column = 0; first_column < p.head_dim; first_column += 128) {
      const int i = first_column + lane * 4;
      float x[4] = {};
#pragma unroll 1
      for (int first = 0; first <= used; first += kFlight) {
        if (first + first_column > 0) load(first, i);
#pragma unroll
        for (int u = 0; u < kFlight; ++u) {
          const float w = __shfl_sync(~0u, share, (first + u) & 31);
          if (first + u > used || w == 0.f) continue;  // what has no share may hold anything
#pragma unroll
          for (int j = 0; j < 4; ++j) x[j] += w * v[u].v[j];
        }
      }
      if (i >= p.head_dim) continue;
      Vec<T, 4> out;
#pragma unroll
      for (int j = 0; j < 4; ++j) out.v[j] = from_float<T>(x[j]);
      *reinterpret_cast<Vec<T, 4>*>(static_cast<T*>(p.out) + row * p.head_dim + i) = out;
    }
    if (p.lse && lane == 0) p.lse[row] = total == 0.f ? kNegInf : base + logf(total);
  }
}

// Bytes of one allocation, handed out in order.
struct Arena {
  int64_t bytes = 0;
  int64_t take(int64_t n) { return std::exchange(bytes, bytes + (n + 255) / 256 * 256); }
};

void launch_plan(const AttentionParams& p, const Groups& groups, void* copies, int64_t element, cudaStream_t stream) {
  auto launch = [&](auto unit) {
    using Unit = decltype(unit);
    const int head_units = int(p.head_dim * element / int64_t(sizeof(Unit))), row_units = p.num_heads * head_units;
    const int64_t wanted = int64_t(p.num_seqs) * row_units / kThreads;
    const int64_t grid = std::max<int64_t>(groups.piece_sequences() + p.num_seqs,
                                           std::min<int64_t>(wanted, 8 * int64_t(current_device().sms)));
    const auto kernel = plan_kernel<Unit>;
    kernel<<<unsigned(grid), kThreads, 0, stream>>>(p, groups, static_cast<Unit*>(copies), row_units, head_units,
                                                    int(element));
  };
  const uint64_t placed =
      reinterpret_cast<uintptr_t>(p.q) | uint64_t(p.q_stride_t * element) | uint64_t(p.q_stride_h * element);
  if (placed % 16 == 0)
    launch(uint4{});
  else if (placed % 4 == 0)
    launch(uint32_t{});
  else
    launch(uint16_t{});
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Pair paged_attention_cascade_cuda(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables,
                                  Tensor seq_lens, Tensor group_start, Tensor group_len, Tensor prefix_lens,
                                  int64_t max_group_len, double scale, OptTensor alibi_slopes, int64_t sliding_window,
                                  double softcap, OptTensor sinks, OptTensor k_scale, OptTensor v_scale,
                                  bool return_lse) {
  const char* op = "paged_attention_cascade";
  check_paged_attention_cascade(query, key_cache, value_cache, block_tables, seq_lens, group_start, group_len,
                                prefix_lens, max_group_len, alibi_slopes, sliding_window, softcap, sinks, k_scale,
                                v_scale);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  AttentionParams p{};
  set_cache(p, key_cache, value_cache, block_tables, seq_lens, k_scale, v_scale);
  // (plan_kernel writes the true query_start and query_len)
  Pair result = begin_call(op, p, query, seq_lens, seq_lens, 1, scale, true, alibi_slopes, sliding_window, softcap,
                           sinks, return_lse);
  if (query.numel() == 0) return result;
  const cudaStream_t stream = current_stream(query);
  const KVType kv = kv_type(key_cache);
  const ScalarType dtype = query.scalar_type();
  const int64_t element = query.element_size(), group = p.num_heads / std::max(1, p.num_kv_heads);

  Groups groups{};
  groups.start = group_start.const_data_ptr<int>();
  groups.len = group_len.const_data_ptr<int>();
  groups.prefix_len = prefix_lens.const_data_ptr<int>();
  // Float32 would show the rounding of an LSE: such queries are attended to plainly.
  groups.count = dtype == ScalarType::Float ? 0 : int(group_start.size(0));
  groups.max_len = int(std::clamp<int64_t>(max_group_len, 1, p.num_seqs));
  const int64_t rows = groups.max_len * group;
  const bool decodes = rows <= kJoinedRows;
  // The two passes in one launch, where they differ in nothing but their keys.
  const bool joined = decodes && p.window == 0 && !p.sinks && groups.count > 0;
  groups.pieces = 1;
  if (!decodes) {
    const int64_t tiles =
        std::min(p.num_seqs * group / kPieceKeys + groups.count, groups.count * ((rows + kPieceKeys - 1) / kPieceKeys));
    groups.pieces =
        int(std::clamp<int64_t>(current_device().sms / std::max<int64_t>(1, tiles * p.num_kv_heads), 1, kMaxPieces));
  }
  groups.rest_row = joined ? p.num_seqs : 0;
  groups.copies = groups.count == 0 ? 0 : joined ? 2 : groups.pieces;

  const int64_t states = groups.pieces + 1, sequences = groups.piece_sequences() + p.num_seqs;
  const int64_t state_rows = int64_t(p.num_seqs) * p.num_heads;
  const int64_t copy_bytes = state_rows * p.head_dim * element;
  const int64_t state_bytes = state_rows * p.head_dim * int64_t(sizeof(float));
  Arena arena;
  const int64_t at_states = arena.take(states * state_bytes), at_copies = arena.take(groups.copies * copy_bytes);
  const int64_t at_lses = arena.take(states * state_rows * int64_t(sizeof(float)));
  const int64_t at_rows = arena.take(p.num_seqs * int64_t(sizeof(RowGroup)));
  const int64_t at_ints = arena.take(3 * sequences * int64_t(sizeof(int)));
  const int64_t at_tables = arena.take(sequences * p.max_blocks * int64_t(sizeof(int)));
  Tensor workspace = torch::stable::new_empty(query, {arena.bytes}, ScalarType::Byte);
  uint8_t* const base = static_cast<uint8_t*>(workspace.mutable_data_ptr());
  groups.rows = reinterpret_cast<RowGroup*>(base + at_rows);
  groups.seq_lens = reinterpret_cast<int*>(base + at_ints);
  groups.query_start = groups.seq_lens + sequences;
  groups.query_len = groups.query_start + sequences;
  groups.tables = reinterpret_cast<int*>(base + at_tables);
  launch_plan(p, groups, base + at_copies, element, stream);

  const int64_t prefixes = groups.piece_sequences();
  AttentionParams rest = p;  // the rests as a call of their own
  rest.query_start = groups.query_start + prefixes, rest.query_len = groups.query_len + prefixes;
  rest.seq_lens = groups.seq_lens + prefixes;
  rest.block_tables = groups.tables + prefixes * p.max_blocks, rest.table_stride = p.max_blocks;
  auto decode = [&](const AttentionParams& part) {
    if (dtype == ScalarType::Float)
      launch_simt(part, kv, 0, query, stream);
    else
      launch_decode(part, dtype, kv, 0, query, stream);
  };
  if (prefixes == 0) {
    decode(rest);
    return result;
  }
  rest.states = true;
  rest.out = base + at_states + groups.pieces * state_bytes;
  rest.lse = reinterpret_cast<float*>(base + at_lses) + groups.pieces * state_rows;

  AttentionParams prefix = p;
  prefix.states = true;
  prefix.query_start = groups.query_start, prefix.query_len = groups.query_len, prefix.seq_lens = groups.seq_lens;
  prefix.block_tables = groups.tables, prefix.table_stride = p.max_blocks;
  prefix.num_seqs = int(joined ? sequences : prefixes), prefix.num_tokens = groups.copies * p.num_seqs;
  prefix.max_query_len = groups.max_len;
  prefix.q = base + at_copies;
  prefix.q_stride_t = int64_t(p.num_heads) * p.head_dim, prefix.q_stride_h = p.head_dim;
  prefix.out = base + at_states, prefix.lse = reinterpret_cast<float*>(base + at_lses);
  // All rows see all of it.
  prefix.causal = false, prefix.sinks = nullptr;
  prefix.window = 0;
  if (decodes) {
    decode(prefix);
  } else {
    prefix.filled = true;  // rows without a group are not merged
    launch_prefill(prefix, dtype, kv, stream);
  }
  if (!joined) decode(rest);
  const int64_t blocks = std::min<int64_t>((state_rows + 7) / 8, 16 * int64_t(current_device().sms));
  dispatch_cuda(dtype, op, [&](auto tag) {
    using T = decltype(tag);
    const auto kernel = merge_kernel<T>;
    kernel<<<unsigned(blocks), 256, 0, stream>>>(p, groups.rows, groups.pieces,
                                                 reinterpret_cast<const float*>(base + at_states),
                                                 reinterpret_cast<const float*>(base + at_lses));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

}  // namespace
}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CUDA, m) {
  PAGEDKV_IMPL(m, paged_attention_cascade, pagedkv::paged_attention_cascade_cuda);
}
