// reshape_and_cache, copy_blocks, swap_blocks, gather_cache; see torch_pagedkv/ops/cache.py.

#include "cache_write.h"

namespace pagedkv {
namespace {

void reshape_and_cache(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slot_mapping,
                       OptTensor k_scale, OptTensor v_scale) {
  const char* op = "reshape_and_cache";
  check_cache_write(op, key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale);
  check_slots(op, slot_mapping, key_cache);
  const int type = row_type(key);
  const int64_t item = kRowTypeSize[type];
  const CacheWriter k(key_cache, k_scale, type), v(value_cache, v_scale, type);
  const char *kp = static_cast<const char*>(key.const_data_ptr()),
             *vp = static_cast<const char*>(value.const_data_ptr());
  const int64_t kt = key.stride(0) * item, kh = key.stride(1) * item, vt = value.stride(0) * item,
                vh = value.stride(1) * item;
  const int64_t* slots = static_cast<const int64_t*>(slot_mapping.const_data_ptr());
  split(key.size(0), 2 * key.size(1) * key.size(2), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (slots[t] < 0) continue;
      k.write(slots[t], kp + t * kt, kh);
      v.write(slots[t], vp + t * vt, vh);
    }
  });
}

void copy_blocks(std::vector<Tensor> caches, Tensor block_mapping) {
  const char* op = "copy_blocks";
  check_copy_blocks(caches, block_mapping);
  const int64_t* pairs = static_cast<const int64_t*>(block_mapping.const_data_ptr());
  const int64_t n = block_mapping.size(0);
  struct Cache {
    char* data;
    int64_t block_bytes;
  };
  std::vector<Cache> data;
  int64_t bytes = 0;
  for (const Tensor& c : caches) {
    const int64_t blocks = c.size(0);
    for (int64_t i = 0; i < 2 * n; ++i)
      PAGEDKV_CHECK(pairs[i] >= 0 && pairs[i] < blocks, op, "block_mapping",
                    (i % 2 ? "destination" : "source") << " block " << pairs[i], "0 <= block < ", blocks);
    data.push_back(
        {static_cast<char*>(c.mutable_data_ptr()), blocks ? c.numel() / blocks * int64_t(c.element_size()) : 0});
    bytes += data.back().block_bytes;
  }
  std::vector<int64_t> src, dst;
  for (int64_t i = 0; i < n; ++i) {
    dst.push_back(pairs[2 * i + 1]);
    if (pairs[2 * i] != pairs[2 * i + 1]) src.push_back(pairs[2 * i]);
  }
  std::sort(src.begin(), src.end());
  std::sort(dst.begin(), dst.end());
  for (size_t i = 0; i < dst.size(); ++i) {
    PAGEDKV_CHECK(i == 0 || dst[i] != dst[i - 1], op, "block_mapping", "destination block " << dst[i] << " twice",
                  "each destination once");
    PAGEDKV_CHECK(!std::binary_search(src.begin(), src.end(), dst[i]), op, "block_mapping",
                  "block " << dst[i] << " as a destination and as another's source", "one or the other");
  }
  split(n, bytes / 4, [&](int64_t begin, int64_t end) {
    for (const Cache& c : data)
      for (int64_t i = begin; i < end; ++i)
        std::memmove(c.data + pairs[2 * i + 1] * c.block_bytes, c.data + pairs[2 * i] * c.block_bytes, c.block_bytes);
  });
}

void swap_blocks(Tensor src, Tensor dst, Tensor block_mapping) {
  check_swap_blocks(src, dst, block_mapping);
  const int64_t n = block_mapping.size(0);
  if (n == 0) return;
  const int64_t* pairs = static_cast<const int64_t*>(block_mapping.const_data_ptr());
  const char* from = static_cast<const char*>(src.const_data_ptr());
  char* to = static_cast<char*>(dst.mutable_data_ptr());
  const int64_t bytes = src.numel() / src.size(0) * int64_t(src.element_size());
  for (int64_t i = 0; i < n; ++i) std::memmove(to + pairs[2 * i + 1] * bytes, from + pairs[2 * i] * bytes, bytes);
}

// Where each sequence's tokens go, checked: ids and lengths before anything is read, disjoint ranges of output rows.
struct Span {
  int64_t start, length, sequence;
};
std::vector<Span> gather_plan(const Tensor& cache, const Tensor& tables, const int* lens, const int* starts,
                              int64_t total) {
  const char* op = "gather_cache";
  const int* table = static_cast<const int*>(tables.const_data_ptr());
  const int64_t max_blocks = tables.size(1), stride = tables.stride(0), block_size = cache.size(1);
  const int64_t num_blocks = cache.size(0);
  std::vector<Span> spans;
  for (int64_t s = 0; s < tables.size(0); ++s) {
    PAGEDKV_CHECK(lens[s] >= 0 && lens[s] <= max_blocks * block_size, op, "seq_lens", lens[s] << " for sequence " << s,
                  "0 <= length <= max_blocks * block_size = ", max_blocks * block_size);
    if (lens[s] == 0) continue;
    PAGEDKV_CHECK(starts[s] >= 0 && int64_t(starts[s]) + lens[s] <= total, op, "out_start",
                  starts[s] << " for sequence " << s << " of " << lens[s] << " tokens",
                  "0 <= out_start and out_start + length <= total_tokens = ", total);
    for (int64_t b = 0; b * block_size < lens[s]; ++b)
      PAGEDKV_CHECK(table[s * stride + b] >= 0 && table[s * stride + b] < num_blocks, op, "block_tables",
                    "block " << table[s * stride + b] << " in sequence " << s,
                    "0 <= block < num_blocks = ", num_blocks);
    spans.push_back({starts[s], lens[s], s});
  }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.start < b.start; });
  for (size_t i = 1; i < spans.size(); ++i)
    PAGEDKV_CHECK(spans[i - 1].start + spans[i - 1].length <= spans[i].start, op, "out_start",
                  "sequences " << spans[i - 1].sequence << " and " << spans[i].sequence << " in the same output rows",
                  "disjoint rows");
  return spans;
}

Pair gather_cache(Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor seq_lens, Tensor out_start,
                  int64_t total_tokens, ScalarType dtype, OptTensor k_scale, OptTensor v_scale) {
  check_gather_cache(key_cache, value_cache, block_tables, seq_lens, out_start, total_tokens, dtype, k_scale, v_scale);
  const std::vector<Span> spans =
      gather_plan(key_cache, block_tables, static_cast<const int*>(seq_lens.const_data_ptr()),
                  static_cast<const int*>(out_start.const_data_ptr()), total_tokens);
  const int64_t block_size = key_cache.size(1), heads = key_cache.size(2), d = key_cache.size(3), row = heads * d;
  const int64_t sizes[] = {total_tokens, heads, d};
  const int32_t out_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  Pair out{new_tensor(sizes, 3, out_dtype), new_tensor(sizes, 3, out_dtype)};

  const int from = row_type(key_cache), to = row_type(dtype);
  const int64_t in_item = kRowTypeSize[from], out_item = kRowTypeSize[to];
  const auto convert = rows().convert[from][to];
  struct Side {
    const char* cache;
    int64_t block, token, head;  // strides in bytes
    const float* scale;
    char* out;
  };
  auto side = [&](const Tensor& c, const OptTensor& scale, const Tensor& o) {
    return Side{static_cast<const char*>(c.const_data_ptr()),
                c.stride(0) * in_item,
                c.stride(1) * in_item,
                c.stride(2) * in_item,
                scale.has_value() ? static_cast<const float*>(scale->const_data_ptr()) : nullptr,
                static_cast<char*>(o.mutable_data_ptr())};
  };
  const Side sides[] = {side(key_cache, k_scale, std::get<0>(out)), side(value_cache, v_scale, std::get<1>(out))};

  int64_t done = 0;  // rows that no sequence covers
  auto clear = [&](int64_t begin, int64_t end) {
    for (const Side& s : sides)
      if (begin < end) std::memset(s.out + begin * row * out_item, 0, (end - begin) * row * out_item);
  };
  std::vector<int64_t> first_block(spans.size() + 1, 0);  // of each span, counted over all of them
  for (size_t i = 0; i < spans.size(); ++i) {
    clear(done, spans[i].start);
    done = spans[i].start + spans[i].length;
    first_block[i + 1] = first_block[i] + (spans[i].length + block_size - 1) / block_size;
  }
  clear(done, total_tokens);

  const int* table = static_cast<const int*>(block_tables.const_data_ptr());
  const int64_t table_stride = block_tables.stride(0);
  auto copy_tokens = [&](const Side& s, int64_t block, int64_t start, int64_t tokens) {
    const char* x = s.cache + block * s.block;
    char* y = s.out + start * row * out_item;
    const bool dense = s.head == d * in_item || heads == 1;
    if (!s.scale && dense && (s.token == row * in_item || tokens == 1)) {
      if (from == to)
        std::memcpy(y, x, tokens * row * out_item);
      else
        convert(x, 1.f, y, tokens * row);
      return;
    }
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t h = 0; h < heads; ++h) {
        const char* in = x + t * s.token + h * s.head;
        char* o = y + (t * heads + h) * d * out_item;
        if (from == to)
          std::memcpy(o, in, d * out_item);
        else
          convert(in, s.scale ? s.scale[(block * block_size + t) * heads + h] : 1.f, o, d);
      }
  };
  split(first_block.back(), 2 * block_size * row, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first_block.begin(), first_block.end(), begin) - first_block.begin() - 1;
    for (int64_t b = begin; b < end; ++b) {
      while (b >= first_block[i + 1]) ++i;
      const int64_t in_sequence = b - first_block[i], token = in_sequence * block_size;
      const int64_t tokens = std::min(block_size, spans[i].length - token);
      const int64_t block = table[spans[i].sequence * table_stride + in_sequence];
      for (const Side& s : sides) copy_tokens(s, block, spans[i].start + token, tokens);
    }
  });
  return out;
}

}  // namespace
}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CPU, m) {
  PAGEDKV_IMPL(m, reshape_and_cache, pagedkv::reshape_and_cache);
  PAGEDKV_IMPL(m, copy_blocks, pagedkv::copy_blocks);
  PAGEDKV_IMPL(m, swap_blocks, pagedkv::swap_blocks);
  PAGEDKV_IMPL(m, gather_cache, pagedkv::gather_cache);
}
