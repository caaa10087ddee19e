// Attention on the CPU: checks, the plan of work items, and their threads. The kernels are in attention_kernel.inl.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

#include "simd.h"
#include "tensors.h"

namespace pagedkv {

const AttentionKernels& attention_kernels() {
  static const AttentionKernels* const table = [] {
    switch (cpu_isa()) {
#if defined(__x86_64__)
      case Isa::kAvx512Bf16:
        return attention_avx512bf16();
      case Isa::kAvx512:
        return attention_avx512();
      case Isa::kAvx2:
        return attention_avx2();
#endif
      default:
        return attention_generic();
    }
  }();
  return *table;
}

AttentionType attention_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return kF32;
    case ScalarType::Half:
      return kF16;
    case ScalarType::BFloat16:
      return kBF16;
    case ScalarType::Char:
      return kI8;
    default:
      return kF8E4M3;
  }
}

namespace {

// Scratch that grows and stays with its thread, so that a call allocates nothing once it is warm.
class Scratch {
 public:
  char* get(int64_t bytes) {
    if (bytes > size_) {
      size_ = 0;
      data_.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t size_ = 0;
};

// f(i) for each i < n, taken one by one by as many threads as are worth it: items differ in their cost, so that equal
// shares would leave threads idle. `work` is about the multiply-adds in all.
template <class F>
void for_each(int64_t n, double work, const F& f) {
  constexpr double kWorthIt = 3e5;  // some 10 us on one thread: a few times what waking the others takes
  const int64_t threads = n > 1 && work > kWorthIt ? std::min<int64_t>(n, torch::stable::get_num_threads()) : 1;
  if (threads == 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
  });
}

enum class Split { kNever, kForThreads, kByLength, kGiven };

struct Plan {
  std::vector<AttentionItem> items, combines;  // of `combines`, the splits are in `key_end`
  int64_t part_rows = 0, splits = 1;
  double work = 0, combine_work = 0;
};

constexpr int64_t kSplitKeys = 512;  // V2 without a given number: keys of a partition
constexpr int64_t kLeastKeys = 256;  // of a partition made for the sake of idle threads

// How many partitions make the units of work (KV heads of all sequences, or tiles) spread evenly over the threads.
int64_t splits_for_threads(int64_t units, int64_t keys, int64_t threads) {
  if (threads == 1 || units >= 4 * threads) return 1;
  int64_t best = 1;
  double best_load = 0;
  for (int64_t n = 1; n <= std::max<int64_t>(1, std::min<int64_t>(keys / kLeastKeys, 2 * threads)); ++n) {
    const int64_t rounds = (units * n + threads - 1) / threads;
    const double load = double(units * n) / double(rounds * threads);
    if (load > best_load + 0.05) best = n, best_load = load;
  }
  return best;
}

void make_plan(const AttentionArgs& a, int64_t sequences, Split split, int64_t given, Plan& plan) {
  plan.items.clear();
  plan.combines.clear();
  plan.part_rows = 0;
  plan.splits = 1;
  plan.work = plan.combine_work = 0;
  const int64_t threads = torch::stable::get_num_threads();
  int64_t units = 0, longest = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t rows = int64_t(a.query_len[s]) * a.group;
    if (rows == 0) continue;
    units += a.kv_heads * (rows <= kDirectRows ? 1 : (rows + kTiledRows - 1) / kTiledRows);
    longest = std::max<int64_t>(longest, a.key_len[s]);
    const int64_t keys = a.window > 0 ? std::min<int64_t>(a.key_len[s], a.window + a.query_len[s]) : a.key_len[s];
    plan.work += double(rows) * a.kv_heads * keys * a.head_dim;
  }
  int64_t even = 1;
  if (split == Split::kForThreads) even = splits_for_threads(units, longest, threads);
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t rows = int64_t(a.query_len[s]) * a.group, keys = a.key_len[s];
    if (rows == 0) continue;
    int64_t splits = 1;
    if (split == Split::kForThreads) splits = std::max<int64_t>(1, std::min(even, keys / kLeastKeys));
    if (split == Split::kByLength) splits = std::max<int64_t>(1, (keys + kSplitKeys - 1) / kSplitKeys);
    if (split == Split::kGiven) splits = given;
    const bool tiled = rows > kDirectRows, parted = splits > 1;
    // Keys that any row sees: partitions share those, not the ones a window hides.
    int64_t first = 0;
    if (a.window > 0) first = std::clamp<int64_t>(keys - a.query_len[s] - a.window + 1, 0, keys);
    const int64_t step = ((keys - first + splits - 1) / splits + 7) / 8 * 8;
    const int64_t row_step = tiled ? kTiledRows : rows;
    // Heads together read whole pages in order, as long as there is enough for all threads.
    int64_t head_step = 1;
    if (!tiled)
      head_step =
          std::max<int64_t>(1, std::min<int64_t>(a.kv_heads, units * splits / std::max<int64_t>(1, 4 * threads)));
    if (!tiled && threads == 1) head_step = a.kv_heads;
    for (int64_t h = 0; h < a.kv_heads; h += head_step) {
      // The last rows see the most keys: first, so that no thread begins the longest item at the end.
      for (int64_t r = (rows - 1) / row_step * row_step; r >= 0; r -= row_step) {
        AttentionItem it{};
        it.sequence = int32_t(s);
        it.head_begin = int32_t(h);
        it.head_end = int32_t(std::min<int64_t>(h + head_step, a.kv_heads));
        it.row_begin = int32_t(r);
        it.row_end = int32_t(std::min(r + row_step, rows));
        it.key_end = int32_t(splits);
        it.split = -1;
        it.part_base = int32_t(plan.part_rows);
        it.tiled = tiled;
        if (parted) plan.combines.push_back(it);
        for (int64_t p = 0; p < splits; ++p) {
          it.key_begin = int32_t(std::min(first + p * step, keys));
          it.key_end = int32_t(p + 1 == splits ? keys : std::min(first + (p + 1) * step, keys));
          it.split = parted ? int32_t(p) : -1;
          plan.items.push_back(it);
        }
      }
    }
    if (parted) {
      plan.part_rows += rows * a.kv_heads;
      plan.splits = std::max(plan.splits, splits);
      plan.combine_work += double(rows) * a.kv_heads * splits * a.head_dim;
    }
  }
}

void run(const AttentionArgs& a, int64_t sequences, int64_t tokens, Split split, int64_t given) {
  thread_local Plan plan_of_thread;
  thread_local Scratch partials_of_thread;
  Plan& plan = plan_of_thread;
  make_plan(a, sequences, split, given, plan);

  // Rows that no sequence owns are 0. Sequences in order without gaps own all of them: the usual case.
  int64_t owned = 0;
  for (int64_t s = 0; s < sequences; ++s)
    if (a.query_len[s] > 0 && a.query_start[s] == owned) owned += a.query_len[s];
  if (owned != tokens) {
    std::memset(a.out, 0, tokens * a.heads * a.head_dim * (a.q_type == kF32 || a.states ? 4 : 2));
    if (a.lse) std::fill_n(a.lse, tokens * a.heads * (a.states ? 2 : 1), -std::numeric_limits<float>::infinity());
  }

  const AttentionKernels& table = attention_kernels();
  AttentionPartials parts{};
  if (plan.part_rows > 0) {
    const int64_t rows = plan.part_rows * plan.splits, stride = (a.head_dim + 31) / 32 * 32;
    parts.out = reinterpret_cast<float*>(partials_of_thread.get(rows * (stride + 2) * int64_t(sizeof(float))));
    parts.max = parts.out + rows * stride;
    parts.sum = parts.max + rows;
  }
  for_each(plan.items.size(), plan.work, [&](int64_t i) {
    thread_local Scratch scratch;
    const AttentionItem& it = plan.items[i];
    table.run(&a, &it, &parts, plan.part_rows, scratch.get(table.scratch(&a, &it)));
  });
  for_each(plan.combines.size(), plan.combine_work, [&](int64_t i) {
    const AttentionItem& it = plan.combines[i];
    table.combine(&a, &it, &parts, plan.part_rows, it.key_end);
  });
}

const float* floats(const OptTensor& t) { return t.has_value() ? t->const_data_ptr<float>() : nullptr; }

// What paged and dense attention have in common.
AttentionArgs common_args(const Tensor& query, const Tensor& k, const Tensor& v, const Tensor& query_start,
                          const Tensor& query_len, double scale, bool causal, const OptTensor& alibi_slopes,
                          int64_t window, double softcap, const OptTensor& sinks, const Pair& out) {
  AttentionArgs a{};
  a.q = query.const_data_ptr();
  a.k = k.const_data_ptr();
  a.v = v.const_data_ptr();
  a.out = std::get<0>(out).mutable_data_ptr();
  const Tensor& lse = std::get<1>(out);
  a.lse = lse.size(0) == query.size(0) ? lse.mutable_data_ptr<float>() : nullptr;
  a.alibi_slopes = floats(alibi_slopes);
  a.sinks = floats(sinks);
  a.q_stride_t = query.stride(0);
  a.q_stride_h = query.stride(1);
  a.query_start = query_start.const_data_ptr<int32_t>();
  a.query_len = query_len.const_data_ptr<int32_t>();
  a.heads = int(query.size(1));
  a.head_dim = int(query.size(2));
  a.scale = float(scale);
  a.softcap = float(softcap);
  a.window = window;
  a.causal = causal;
  a.q_type = attention_type(query);
  a.kv_type = attention_type(k);
  return a;
}

Pair make_outputs(const Tensor& query, bool return_lse, bool states = false) {
  const int64_t tokens = query.size(0), heads = query.size(1);
  const int64_t sizes[] = {tokens, heads, query.size(2)}, lse_sizes[] = {return_lse ? tokens : 0, heads, 2};
  int32_t dtype = aoti_torch_dtype_float32();
  if (!states) TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(query.get(), &dtype));
  return {new_tensor(sizes, 3, dtype), new_tensor(lse_sizes, states ? 3 : 2, aoti_torch_dtype_float32())};
}

// The lengths are on the host: what the schema cannot say is checked before anything is computed.
void check_rows(const char* op, const char* start_arg, const char* len_arg, const int32_t* start, const int32_t* len,
                int64_t sequences, int64_t rows, const char* tensor, int64_t max_len, const char* max_arg) {
  for (int64_t s = 0; s < sequences; ++s) {
    PAGEDKV_CHECK(len[s] >= 0, op, len_arg, len[s] << " for sequence " << s, "0 or more");
    PAGEDKV_CHECK(len[s] <= max_len, op, len_arg, len[s] << " for sequence " << s, "at most ", max_arg, " = ", max_len);
    PAGEDKV_CHECK(len[s] == 0 || (start[s] >= 0 && start[s] <= rows - len[s]), op, start_arg,
                  "rows " << start[s] << " to " << int64_t(start[s]) + len[s] << " for sequence " << s, "rows of ",
                  tensor, ", 0 to ", rows);
  }
}

Pair paged(const char* op, Split split, int64_t given, const Tensor& query, const Tensor& key_cache,
           const Tensor& value_cache, const Tensor& block_tables, const Tensor& seq_lens, const Tensor& query_start,
           const Tensor& query_len, int64_t max_query_len, double scale, bool causal, const OptTensor& alibi_slopes,
           int64_t sliding_window, double softcap, const OptTensor& sinks, const OptTensor& k_scale,
           const OptTensor& v_scale, bool return_lse, bool states = false) {
  check_paged_attention(op, query, key_cache, value_cache, block_tables, seq_lens, query_start, query_len,
                        max_query_len, alibi_slopes, sliding_window, softcap, sinks, k_scale, v_scale);
  const int64_t sequences = block_tables.size(0), tokens = query.size(0), blocks = key_cache.size(0);
  const int64_t block_size = key_cache.size(1), table_stride = block_tables.stride(0);
  const int32_t *lens = seq_lens.const_data_ptr<int32_t>(), *tables = block_tables.const_data_ptr<int32_t>();
  const int64_t capacity = block_tables.size(1) * block_size;
  check_rows(op, "query_start", "query_len", query_start.const_data_ptr<int32_t>(), query_len.const_data_ptr<int32_t>(),
             sequences, tokens, "query", max_query_len, "max_query_len");
  for (int64_t s = 0; s < sequences; ++s) {
    PAGEDKV_CHECK(lens[s] >= 0, op, "seq_lens", lens[s] << " for sequence " << s, "0 or more");
    PAGEDKV_CHECK(lens[s] <= capacity, op, "seq_lens", lens[s] << " for sequence " << s, "at most the table's ",
                  block_tables.size(1), " blocks of ", block_size);
    for (int64_t i = 0; i * block_size < lens[s]; ++i) {
      const int32_t block = tables[s * table_stride + i];
      PAGEDKV_CHECK(block >= 0 && block < blocks, op, "block_tables",
                    "block " << block << " at [" << s << ", " << i << "]", "0 <= block < ", blocks);
    }
  }
  Pair out = make_outputs(query, return_lse, states);
  AttentionArgs a = common_args(query, key_cache, value_cache, query_start, query_len, scale, causal, alibi_slopes,
                                sliding_window, softcap, sinks, out);
  a.states = states;
  a.k_scale = floats(k_scale);
  a.v_scale = floats(v_scale);
  a.k_stride_block = key_cache.stride(0);
  a.k_stride_t = key_cache.stride(1);
  a.k_stride_h = key_cache.stride(2);
  a.v_stride_block = value_cache.stride(0);
  a.v_stride_t = value_cache.stride(1);
  a.v_stride_h = value_cache.stride(2);
  a.block_tables = tables;
  a.table_stride = table_stride;
  a.block_shift = __builtin_ctzll(block_size);
  a.key_len = lens;
  a.kv_heads = int(key_cache.size(2));
  a.group = a.heads / a.kv_heads;
  run(a, sequences, tokens, split, given);
  return out;
}

}  // namespace

Pair attend_pages(const char* op, const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                  const Tensor& block_tables, const Tensor& seq_lens, const Tensor& query_start,
                  const Tensor& query_len, int64_t max_query_len, double scale, bool causal,
                  const OptTensor& alibi_slopes, int64_t sliding_window, double softcap, const OptTensor& sinks,
                  const OptTensor& k_scale, const OptTensor& v_scale, bool return_lse, bool states) {
  return paged(op, Split::kForThreads, 0, query, key_cache, value_cache, block_tables, seq_lens, query_start, query_len,
               max_query_len, scale, causal, alibi_slopes, sliding_window, softcap, sinks, k_scale, v_scale, return_lse,
               states);
}

namespace {

Pair paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor seq_lens,
                     Tensor query_start, Tensor query_len, int64_t max_query_len, double scale, bool causal,
                     OptTensor alibi_slopes, int64_t sliding_window, double softcap, OptTensor sinks, OptTensor k_scale,
                     OptTensor v_scale, bool return_lse, bool batch_invariant) {
  return paged("paged_attention", batch_invariant ? Split::kByLength : Split::kForThreads, 0, query, key_cache,
               value_cache, block_tables, seq_lens, query_start, query_len, max_query_len, scale, causal, alibi_slopes,
               sliding_window, softcap, sinks, k_scale, v_scale, return_lse);
}

Pair paged_attention_v1(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor seq_lens,
                        Tensor query_start, Tensor query_len, int64_t max_query_len, double scale, bool causal,
                        OptTensor alibi_slopes, int64_t sliding_window, double softcap, OptTensor sinks,
                        OptTensor k_scale, OptTensor v_scale, bool return_lse) {
  return paged("paged_attention_v1", Split::kNever, 0, query, key_cache, value_cache, block_tables, seq_lens,
               query_start, query_len, max_query_len, scale, causal, alibi_slopes, sliding_window, softcap, sinks,
               k_scale, v_scale, return_lse);
}

Pair paged_attention_v2(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor seq_lens,
                        Tensor query_start, Tensor query_len, int64_t max_query_len, double scale, bool causal,
                        OptTensor alibi_slopes, int64_t sliding_window, double softcap, OptTensor sinks,
                        OptTensor k_scale, OptTensor v_scale, bool return_lse, int64_t num_splits) {
  const char* op = "paged_attention_v2";
  PAGEDKV_CHECK(num_splits >= 0 && num_splits <= 1024, op, "num_splits", num_splits, "0 (planned) to 1024");
  return paged(op, num_splits ? Split::kGiven : Split::kByLength, num_splits, query, key_cache, value_cache,
               block_tables, seq_lens, query_start, query_len, max_query_len, scale, causal, alibi_slopes,
               sliding_window, softcap, sinks, k_scale, v_scale, return_lse);
}

Pair flash_attention(Tensor query, Tensor key, Tensor value, Tensor query_start, Tensor query_len, Tensor key_start,
                     Tensor key_len, int64_t max_query_len, int64_t max_key_len, double scale, bool causal,
                     OptTensor alibi_slopes, int64_t sliding_window, double softcap, OptTensor sinks, bool return_lse) {
  const char* op = "flash_attention";
  check_flash_attention(query, key, value, query_start, query_len, key_start, key_len, max_query_len, max_key_len,
                        alibi_slopes, sliding_window, softcap, sinks);
  const int64_t sequences = query_start.size(0), tokens = query.size(0);
  check_rows(op, "query_start", "query_len", query_start.const_data_ptr<int32_t>(), query_len.const_data_ptr<int32_t>(),
             sequences, tokens, "query", max_query_len, "max_query_len");
  check_rows(op, "key_start", "key_len", key_start.const_data_ptr<int32_t>(), key_len.const_data_ptr<int32_t>(),
             sequences, key.size(0), "key", max_key_len, "max_key_len");
  Pair out = make_outputs(query, return_lse);
  AttentionArgs a = common_args(query, key, value, query_start, query_len, scale, causal, alibi_slopes, sliding_window,
                                softcap, sinks, out);
  a.k_stride_t = key.stride(0);
  a.k_stride_h = key.stride(1);
  a.v_stride_t = value.stride(0);
  a.v_stride_h = value.stride(1);
  a.key_start = key_start.const_data_ptr<int32_t>();
  a.key_len = key_len.const_data_ptr<int32_t>();
  a.kv_heads = int(key.size(1));
  a.group = a.heads / a.kv_heads;
  run(a, sequences, tokens, Split::kForThreads, 0);
  return out;
}

Pair merge_attention_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) {
  check_merge(out_a, lse_a, out_b, lse_b);
  const Tensor a = torch::stable::contiguous(out_a), b = torch::stable::contiguous(out_b);
  const Tensor la = torch::stable::contiguous(lse_a), lb = torch::stable::contiguous(lse_b);
  const int64_t rows = a.size(0) * a.size(1), d = a.size(2), bytes = d * a.element_size();
  Pair out{torch::stable::new_empty(a, {a.size(0), a.size(1), d}),
           torch::stable::new_empty(la, {a.size(0), a.size(1)})};
  const AttentionType type = attention_type(a);
  const auto* pa = static_cast<const char*>(a.const_data_ptr());
  const auto* pb = static_cast<const char*>(b.const_data_ptr());
  auto* po = static_cast<char*>(std::get<0>(out).mutable_data_ptr());
  const float *pla = la.const_data_ptr<float>(), *plb = lb.const_data_ptr<float>();
  float* plo = std::get<1>(out).mutable_data_ptr<float>();
  const AttentionKernels& table = attention_kernels();
  torch::stable::parallel_for(
      0, rows, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, d)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const MergedStates merged({pla[i], 1.f}, {plb[i], 1.f});
          table.merge(type, type, d, pa + i * bytes, merged.weight_a, pb + i * bytes, merged.weight_b, po + i * bytes);
          plo[i] = merged.lse;
        }
      });
  return out;
}

}  // namespace
}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CPU, m) {
  PAGEDKV_IMPL(m, paged_attention, pagedkv::paged_attention);
  PAGEDKV_IMPL(m, paged_attention_v1, pagedkv::paged_attention_v1);
  PAGEDKV_IMPL(m, paged_attention_v2, pagedkv::paged_attention_v2);
  PAGEDKV_IMPL(m, flash_attention, pagedkv::flash_attention);
  PAGEDKV_IMPL(m, merge_attention_states, pagedkv::merge_attention_states);
}
