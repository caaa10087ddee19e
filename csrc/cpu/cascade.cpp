// Decode attention of sequences that share a prefix (ops/cascade.py): the prefix of each group by the kernels of
// attention.cpp, all of the group's rows at once so that a tile of keys in the cache serves them all; then the rest of
// each row; then the two merged by their LSE.
#include <algorithm>
#include <vector>

#include "attention.h"
#include "tensors.h"

namespace pagedkv {
namespace {

Tensor int_tensor(const std::vector<int32_t>& values, std::initializer_list<int64_t> sizes) {
  Tensor t = new_tensor(sizes.begin(), int64_t(sizes.size()), aoti_torch_dtype_int32());
  std::copy(values.begin(), values.end(), t.mutable_data_ptr<int32_t>());
  return t;
}

Pair paged_attention_cascade(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor seq_lens,
                             Tensor group_start, Tensor group_len, Tensor prefix_lens, int64_t max_group_len,
                             double scale, OptTensor alibi_slopes, int64_t sliding_window, double softcap,
                             OptTensor sinks, OptTensor k_scale, OptTensor v_scale, bool return_lse) {
  const char* op = "paged_attention_cascade";
  check_paged_attention_cascade(query, key_cache, value_cache, block_tables, seq_lens, group_start, group_len,
                                prefix_lens, max_group_len, alibi_slopes, sliding_window, softcap, sinks, k_scale,
                                v_scale);
  const int64_t rows = block_tables.size(0), width = block_tables.size(1), stride = block_tables.stride(0);
  const int64_t size = key_cache.size(1), groups = group_start.size(0);
  const int32_t *tables = block_tables.const_data_ptr<int32_t>(), *lens = seq_lens.const_data_ptr<int32_t>();
  const int32_t* starts = group_start.const_data_ptr<int32_t>();
  const int32_t* counts = group_len.const_data_ptr<int32_t>();
  const int32_t* shared = prefix_lens.const_data_ptr<int32_t>();
  for (int64_t s = 0; s < rows; ++s)
    PAGEDKV_CHECK(lens[s] >= 0 && lens[s] <= width * size, op, "seq_lens", lens[s] << " for sequence " << s,
                  "0 to the table's ", width, " blocks of ", size);

  // The prefix of each row in whole blocks (0: none), and of each group that has one.
  std::vector<int32_t> prefix(rows, 0), member(rows, -1), first, many, keys, prefix_tables;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t start = starts[g], count = counts[g];
    PAGEDKV_CHECK(count >= 0 && count <= max_group_len, op, "group_len", count << " for group " << g,
                  "0 to max_group_len = ", max_group_len);
    PAGEDKV_CHECK(count == 0 || (start >= 0 && start <= rows - count), op, "group_start",
                  "rows " << start << " to " << start + count << " for group " << g, "rows of query, 0 to ", rows);
    if (count == 0) continue;
    int64_t shortest = shared[g], longest = 0;
    for (int64_t s = start; s < start + count; ++s) {
      PAGEDKV_CHECK(member[s] < 0, op, "group_start", "row " << s << " in groups " << member[s] << " and " << g,
                    "each row in one group");
      member[s] = int32_t(g);
      shortest = std::min<int64_t>(shortest, lens[s] - 1);
      longest = std::max<int64_t>(longest, lens[s]);
    }
    const bool hidden = sliding_window > 0 && longest > sliding_window;
    const int64_t blocks = hidden ? 0 : std::max<int64_t>(0, shortest) / size;
    if (blocks == 0) continue;
    const int32_t* table = tables + start * stride;
    for (int64_t s = start + 1; s < start + count; ++s)
      PAGEDKV_CHECK(std::equal(table, table + blocks, tables + s * stride), op, "prefix_lens",
                    shared[g] << " for group " << g << ", but rows " << start << " and " << s << " differ in it",
                    "the tokens in blocks that all rows of a group begin with");
    std::fill_n(prefix.begin() + start, count, int32_t(blocks * size));
    first.push_back(int32_t(start));
    many.push_back(int32_t(count));
    keys.push_back(int32_t(blocks * size));
    prefix_tables.insert(prefix_tables.end(), table, table + blocks);
    prefix_tables.resize(first.size() * width);
  }

  std::vector<int32_t> numbers(rows), ones(rows, 1);
  for (int64_t s = 0; s < rows; ++s) numbers[s] = int32_t(s);
  const Tensor row_start = int_tensor(numbers, {rows}), row_len = int_tensor(ones, {rows});
  if (first.empty())
    return attend_pages(op, query, key_cache, value_cache, block_tables, seq_lens, row_start, row_len, 1, scale, true,
                        alibi_slopes, sliding_window, softcap, sinks, k_scale, v_scale, return_lse);

  std::vector<int32_t> rest(rows), rest_tables(rows * width);
  for (int64_t s = 0; s < rows; ++s) {
    rest[s] = lens[s] - prefix[s];
    const int32_t* from = tables + s * stride;
    std::copy(from + prefix[s] / size, from + width, rest_tables.begin() + s * width);
  }
  const int64_t sharing = int64_t(first.size()), heads = query.size(1), dim = query.size(2);
  const Pair before =
      attend_pages(op, query, key_cache, value_cache, int_tensor(prefix_tables, {sharing, width}),
                   int_tensor(keys, {sharing}), int_tensor(first, {sharing}), int_tensor(many, {sharing}),
                   max_group_len, scale, false, alibi_slopes, 0, softcap, OptTensor(), k_scale, v_scale, true, true);
  const Pair after = attend_pages(op, query, key_cache, value_cache, int_tensor(rest_tables, {rows, width}),
                                  int_tensor(rest, {rows}), row_start, row_len, 1, scale, true, alibi_slopes,
                                  sliding_window, softcap, sinks, k_scale, v_scale, true, true);

  const AttentionKernels& table = attention_kernels();
  const AttentionType type = attention_type(query);
  Tensor out = new_like(query);
  const int64_t sizes[] = {return_lse ? rows : 0, heads};
  Tensor lse = new_tensor(sizes, 2, aoti_torch_dtype_float32());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  float* to_lse = return_lse ? lse.mutable_data_ptr<float>() : nullptr;
  const float *from_a = std::get<0>(before).const_data_ptr<float>(),
              *from_b = std::get<0>(after).const_data_ptr<float>();
  const float* slopes = alibi_slopes.has_value() ? alibi_slopes->const_data_ptr<float>() : nullptr;
  auto state_of = [](const Pair& part, int64_t i) {
    const float* state = std::get<1>(part).const_data_ptr<float>() + 2 * i;
    return AttentionState{state[0], state[1]};
  };
  for (int64_t s = 0; s < rows; ++s) {
    // Over the prefix the group's last row was taken to sit on its last key.
    const int64_t g = member[s];
    const float moved = g < 0 ? 0.f : float(int64_t(prefix[s]) - counts[g] + (s - starts[g]) - (lens[s] - 1));
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t i = s * heads + h;
      AttentionState a{-std::numeric_limits<float>::infinity(), 0.f};
      if (prefix[s] > 0) a = state_of(before, i);
      if (slopes) a.top += slopes[h] * moved;
      const MergedStates merged(a, state_of(after, i));
      table.merge(kF32, type, dim, from_a + i * dim, merged.weight_a, from_b + i * dim, merged.weight_b,
                  to + i * dim * query.element_size());
      if (to_lse) to_lse[i] = merged.lse;
    }
  }
  return {std::move(out), std::move(lse)};
}

}  // namespace
}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CPU, m) {
  PAGEDKV_IMPL(m, paged_attention_cascade, pagedkv::paged_attention_cascade);
}
