// Argument checks shared by both backends, so that a bad call reads the same on either. Nothing here looks at tensor
// values: on a GPU that would be a sync. The CPU kernels check lengths and block ids as well; the CUDA kernels treat a
// negative length as 0 and a block id outside the cache as masked, and never read out of bounds.
#pragma once

#include "common.h"
#include "int4.h"

namespace pagedkv {

inline std::string dtype_of(const Tensor& t) { return name_of(t.scalar_type()); }
inline std::string device_of(const Tensor& t) {
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : std::string("cpu");
}

inline void check_shape(const char* op, const char* arg, const Tensor& t, std::initializer_list<int64_t> want,
                        const char* layout) {
  bool ok = t.dim() == int64_t(want.size());
  int64_t i = 0;
  for (int64_t w : want) {
    ok = ok && (w < 0 || t.size(i) == w);  // -1: any size
    ++i;
  }
  if (ok) return;
  Text s;
  s << layout << " (";
  const char* sep = "";
  for (int64_t w : want) {
    s << sep;
    if (w < 0)
      s << "any";
    else
      s << w;
    sep = ", ";
  }
  s << ")";
  fail(op, ": ", arg, ": got shape ", shape_of(t), ", needs ", s.str);
}
inline void check_float(const char* op, const char* arg, const Tensor& t) {
  PAGEDKV_CHECK(is_float(t.scalar_type()), op, arg, dtype_of(t), "float32, float16 or bfloat16");
}
inline void check_dtype(const char* op, const char* arg, const Tensor& t, ScalarType want) {
  PAGEDKV_CHECK(t.scalar_type() == want, op, arg, dtype_of(t), name_of(want));
}
inline void check_same_dtype(const char* op, const char* arg, const Tensor& t, const char* other, const Tensor& o) {
  PAGEDKV_CHECK(t.scalar_type() == o.scalar_type(), op, arg, dtype_of(t), other, "'s dtype, ", dtype_of(o));
}
inline void check_device(const char* op, const char* arg, const Tensor& t, const char* other, const Tensor& o) {
  const bool same = t.is_cuda() == o.is_cuda() && (!t.is_cuda() || t.get_device_index() == o.get_device_index());
  PAGEDKV_CHECK(same, op, arg, device_of(t), other, "'s device, ", device_of(o));  // naming them costs 0.1 us
}
inline void check_inner(const char* op, const char* arg, const Tensor& t) {
  PAGEDKV_CHECK(t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1, op, arg,
                "stride " << t.stride(t.dim() - 1) << " in the last dimension", "1");
}
inline void check_whole(const char* op, const char* arg, const Tensor& t) {
  PAGEDKV_CHECK(t.storage_offset() == 0, op, arg, "a view at storage offset " << t.storage_offset(),
                "a whole tensor (torch 2.11 compiles mutated views at an offset to wrong addresses)");
}
inline void check_vector(const char* op, const char* arg, const Tensor& t, int64_t n, ScalarType dtype,
                         const char* other, const Tensor& o) {
  check_shape(op, arg, t, {n}, "one entry each");
  check_dtype(op, arg, t, dtype);
  check_device(op, arg, t, other, o);
  PAGEDKV_CHECK(t.numel() <= 1 || t.stride(0) == 1, op, arg, "stride " << t.stride(0), "a contiguous vector");
}
inline void check_vector(const char* op, const char* arg, const OptTensor& t, int64_t n, ScalarType dtype,
                         const char* other, const Tensor& o) {
  if (t.has_value()) check_vector(op, arg, *t, n, dtype, other, o);
}
// Rows that the kernels read with vector loads: 8 elements at a time.
inline void check_row_strides(const char* op, const char* arg, const Tensor& t) {
  check_inner(op, arg, t);
  for (int64_t i = 0; i + 1 < t.dim(); ++i)
    PAGEDKV_CHECK(t.size(i) <= 1 || t.stride(i) % 8 == 0, op, arg, "stride " << t.stride(i) << " in dimension " << i,
                  "a multiple of 8 elements");
  const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  PAGEDKV_CHECK(t.numel() == 0 || address % (8 * t.element_size()) == 0, op, arg,
                "data at address " << t.const_data_ptr(), "an address aligned to 8 elements");
}

// cache --------------------------------------------------------------------------------------------------------------

inline void check_cache(const char* op, const Tensor& k, const Tensor& v, const OptTensor& k_scale,
                        const OptTensor& v_scale) {
  check_shape(op, "key_cache", k, {-1, -1, -1, -1}, "[num_blocks, block_size, Hkv, D]");
  check_shape(op, "value_cache", v, {k.size(0), k.size(1), k.size(2), k.size(3)}, "key_cache's shape");
  const int64_t bs = k.size(1), d = k.size(3);
  PAGEDKV_CHECK(bs >= 8 && bs <= 128 && (bs & (bs - 1)) == 0, op, "key_cache", "block_size " << bs,
                "8, 16, 32, 64 or 128");
  PAGEDKV_CHECK(d >= 8 && d <= 256 && d % 8 == 0, op, "key_cache", "head_dim " << d, "a multiple of 8 up to 256");
  PAGEDKV_CHECK(is_float(k.scalar_type()) || is_quantized(k.scalar_type()), op, "key_cache", dtype_of(k),
                "float32, float16, bfloat16, int8 or float8_e4m3fn");
  check_same_dtype(op, "value_cache", v, "key_cache", k);
  check_device(op, "value_cache", v, "key_cache", k);
  check_row_strides(op, "key_cache", k);
  check_row_strides(op, "value_cache", v);
  const bool quantized = is_quantized(k.scalar_type());
  auto scale = [&](const char* arg, const OptTensor& s) {
    PAGEDKV_CHECK(s.has_value() == quantized, op, arg, (s.has_value() ? "a tensor" : "None"),
                  (quantized ? "float32 [num_blocks, block_size, Hkv] with a cache of " : "None with a cache of "),
                  dtype_of(k));
    if (!s.has_value()) return;
    check_shape(op, arg, *s, {k.size(0), bs, k.size(2)}, "[num_blocks, block_size, Hkv]");
    check_dtype(op, arg, *s, ScalarType::Float);
    check_device(op, arg, *s, "key_cache", k);
    PAGEDKV_CHECK(s->is_contiguous(), op, arg, "a strided view", "a contiguous tensor");
  };
  scale("k_scale", k_scale);
  scale("v_scale", v_scale);
}

// The arguments of a cache write: key and value [T, Hkv, D] beside the caches.
inline void check_cache_write(const char* op, const Tensor& key, const Tensor& value, const Tensor& k, const Tensor& v,
                              const Tensor& slot_mapping, const OptTensor& k_scale, const OptTensor& v_scale) {
  check_cache(op, k, v, k_scale, v_scale);
  check_whole(op, "key_cache", k);
  check_whole(op, "value_cache", v);
  check_shape(op, "key", key, {-1, k.size(2), k.size(3)}, "[T, Hkv, D]");
  check_shape(op, "value", value, {key.size(0), k.size(2), k.size(3)}, "key's shape");
  check_float(op, "key", key);
  check_same_dtype(op, "value", value, "key", key);
  if (!is_quantized(k.scalar_type())) check_same_dtype(op, "key_cache", k, "key", key);
  check_device(op, "key", key, "key_cache", k);
  check_device(op, "value", value, "key_cache", k);
  check_inner(op, "key", key);
  check_inner(op, "value", value);
  check_vector(op, "slot_mapping", slot_mapping, key.size(0), ScalarType::Long, "key", key);
}

inline void check_copy_blocks(const std::vector<Tensor>& caches, const Tensor& mapping) {
  const char* op = "copy_blocks";
  check_shape(op, "block_mapping", mapping, {-1, 2}, "[N, 2]");
  check_dtype(op, "block_mapping", mapping, ScalarType::Long);
  PAGEDKV_CHECK(mapping.is_contiguous(), op, "block_mapping", "a strided view", "a contiguous tensor");
  for (const Tensor& c : caches) {
    PAGEDKV_CHECK(c.dim() >= 1, op, "caches", "a 0-dimensional tensor", "tensors whose dimension 0 is the block");
    PAGEDKV_CHECK(c.is_contiguous(), op, "caches", "a strided view", "contiguous tensors");
    check_whole(op, "caches", c);
    check_device(op, "caches", c, "block_mapping", mapping);
  }
}

inline void check_swap_blocks(const Tensor& src, const Tensor& dst, const Tensor& mapping) {
  const char* op = "swap_blocks";
  check_shape(op, "block_mapping", mapping, {-1, 2}, "[N, 2]");
  check_dtype(op, "block_mapping", mapping, ScalarType::Long);
  PAGEDKV_CHECK(mapping.is_cpu() && mapping.is_contiguous(), op, "block_mapping", device_of(mapping),
                "a contiguous tensor on the cpu");
  PAGEDKV_CHECK(src.dim() >= 1 && src.dim() == dst.dim(), op, "dst", "shape " << shape_of(dst),
                "as many dimensions as src, ", shape_of(src));
  for (int64_t i = 1; i < src.dim(); ++i)
    PAGEDKV_CHECK(src.size(i) == dst.size(i), op, "dst", "shape " << shape_of(dst), "the block shape of src, ",
                  shape_of(src));
  check_same_dtype(op, "dst", dst, "src", src);
  PAGEDKV_CHECK(src.is_contiguous(), op, "src", "a strided view", "a contiguous tensor");
  PAGEDKV_CHECK(dst.is_contiguous(), op, "dst", "a strided view", "a contiguous tensor");
  check_whole(op, "dst", dst);
  const int64_t* m = mapping.const_data_ptr<int64_t>();  // on the host: its values can be checked
  for (int64_t i = 0; i < mapping.size(0); ++i) {
    PAGEDKV_CHECK(m[2 * i] >= 0 && m[2 * i] < src.size(0), op, "block_mapping", "source block " << m[2 * i],
                  "0 <= block < ", src.size(0));
    PAGEDKV_CHECK(m[2 * i + 1] >= 0 && m[2 * i + 1] < dst.size(0), op, "block_mapping",
                  "destination block " << m[2 * i + 1], "0 <= block < ", dst.size(0));
  }
}

inline void check_block_tables(const char* op, const Tensor& tables, const Tensor& seq_lens, const Tensor& cache) {
  check_shape(op, "block_tables", tables, {-1, -1}, "[S, max_blocks]");
  check_dtype(op, "block_tables", tables, ScalarType::Int);
  check_device(op, "block_tables", tables, "key_cache", cache);
  check_inner(op, "block_tables", tables);
  check_vector(op, "seq_lens", seq_lens, tables.size(0), ScalarType::Int, "key_cache", cache);
}

inline void check_gather_cache(const Tensor& k, const Tensor& v, const Tensor& tables, const Tensor& seq_lens,
                               const Tensor& out_start, int64_t total, ScalarType dtype, const OptTensor& k_scale,
                               const OptTensor& v_scale) {
  const char* op = "gather_cache";
  check_cache(op, k, v, k_scale, v_scale);
  check_block_tables(op, tables, seq_lens, k);
  check_vector(op, "out_start", out_start, tables.size(0), ScalarType::Int, "key_cache", k);
  PAGEDKV_CHECK(total >= 0, op, "total_tokens", total, "0 or more");
  PAGEDKV_CHECK(is_float(dtype), op, "dtype", name_of(dtype), "float32, float16 or bfloat16");
}

// attention ----------------------------------------------------------------------------------------------------------

inline void check_query(const char* op, const Tensor& q, int64_t kv_heads, int64_t head_dim, const Tensor& start,
                        const Tensor& len, int64_t sequences, int64_t max_query_len, const OptTensor& alibi,
                        int64_t window, double softcap, const OptTensor& sinks) {
  check_shape(op, "query", q, {-1, -1, head_dim}, "[T, Hq, D]");
  check_float(op, "query", q);
  check_inner(op, "query", q);
  PAGEDKV_CHECK(kv_heads > 0 && q.size(1) > 0 && q.size(1) % kv_heads == 0, op, "query", q.size(1) << " heads",
                "a multiple of the ", kv_heads, " KV heads");
  check_vector(op, "query_start", start, sequences, ScalarType::Int, "query", q);
  check_vector(op, "query_len", len, sequences, ScalarType::Int, "query", q);
  PAGEDKV_CHECK(max_query_len >= 0, op, "max_query_len", max_query_len, "0 or more");
  check_vector(op, "alibi_slopes", alibi, q.size(1), ScalarType::Float, "query", q);
  check_vector(op, "sinks", sinks, q.size(1), ScalarType::Float, "query", q);
  PAGEDKV_CHECK(window >= 0, op, "sliding_window", window, "0 (off) or more");
  PAGEDKV_CHECK(softcap >= 0, op, "softcap", softcap, "0 (off) or more");
}

inline void check_paged_attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& tables, const Tensor& seq_lens, const Tensor& start, const Tensor& len,
                                  int64_t max_query_len, const OptTensor& alibi, int64_t window, double softcap,
                                  const OptTensor& sinks, const OptTensor& k_scale, const OptTensor& v_scale) {
  check_cache(op, k, v, k_scale, v_scale);
  check_block_tables(op, tables, seq_lens, k);
  check_query(op, q, k.size(2), k.size(3), start, len, tables.size(0), max_query_len, alibi, window, softcap, sinks);
  if (!is_quantized(k.scalar_type())) check_same_dtype(op, "key_cache", k, "query", q);
  check_device(op, "key_cache", k, "query", q);
}

inline void check_paged_attention_cascade(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& tables,
                                          const Tensor& seq_lens, const Tensor& group_start, const Tensor& group_len,
                                          const Tensor& prefix_lens, int64_t max_group_len, const OptTensor& alibi,
                                          int64_t window, double softcap, const OptTensor& sinks,
                                          const OptTensor& k_scale, const OptTensor& v_scale) {
  const char* op = "paged_attention_cascade";
  check_paged_attention(op, q, k, v, tables, seq_lens, seq_lens, seq_lens, 1, alibi, window, softcap, sinks, k_scale,
                        v_scale);
  PAGEDKV_CHECK(q.size(0) == tables.size(0), op, "query", q.size(0) << " rows", "one for each sequence, ",
                tables.size(0));
  check_vector(op, "group_start", group_start, -1, ScalarType::Int, "query", q);
  check_vector(op, "group_len", group_len, group_start.size(0), ScalarType::Int, "query", q);
  check_vector(op, "prefix_lens", prefix_lens, group_start.size(0), ScalarType::Int, "query", q);
  PAGEDKV_CHECK(max_group_len >= 0, op, "max_group_len", max_group_len, "0 or more");
}

inline void check_flash_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_start,
                                  const Tensor& q_len, const Tensor& k_start, const Tensor& k_len,
                                  int64_t max_query_len, int64_t max_key_len, const OptTensor& alibi, int64_t window,
                                  double softcap, const OptTensor& sinks) {
  const char* op = "flash_attention";
  check_shape(op, "key", k, {-1, -1, -1}, "[K, Hkv, D]");
  check_shape(op, "value", v, {k.size(0), k.size(1), k.size(2)}, "key's shape");
  const int64_t d = k.size(2);
  PAGEDKV_CHECK(d >= 8 && d <= 256 && d % 8 == 0, op, "key", "head_dim " << d, "a multiple of 8 up to 256");
  check_query(op, q, k.size(1), d, q_start, q_len, q_start.size(0), max_query_len, alibi, window, softcap, sinks);
  for (auto [arg, t] : {std::pair<const char*, const Tensor*>{"key", &k}, {"value", &v}}) {
    check_same_dtype(op, arg, *t, "query", q);
    check_device(op, arg, *t, "query", q);
    check_row_strides(op, arg, *t);
  }
  check_vector(op, "key_start", k_start, q_start.size(0), ScalarType::Int, "query", q);
  check_vector(op, "key_len", k_len, q_start.size(0), ScalarType::Int, "query", q);
  PAGEDKV_CHECK(max_key_len >= 0, op, "max_key_len", max_key_len, "0 or more");
}

inline void check_merge(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b) {
  const char* op = "merge_attention_states";
  check_shape(op, "out_a", out_a, {-1, -1, -1}, "[T, H, D]");
  check_float(op, "out_a", out_a);
  check_shape(op, "out_b", out_b, {out_a.size(0), out_a.size(1), out_a.size(2)}, "out_a's shape");
  check_same_dtype(op, "out_b", out_b, "out_a", out_a);
  for (auto [arg, t] : {std::pair<const char*, const Tensor*>{"lse_a", &lse_a}, {"lse_b", &lse_b}}) {
    check_shape(op, arg, *t, {out_a.size(0), out_a.size(1)}, "[T, H]");
    check_dtype(op, arg, *t, ScalarType::Float);
    check_device(op, arg, *t, "out_a", out_a);
  }
  check_device(op, "out_b", out_b, "out_a", out_a);
}

// norm, rotary, activation, sampling ---------------------------------------------------------------------------------

inline void check_norm(const char* op, const Tensor& x, const OptTensor& weight, const OptTensor& bias, double eps) {
  check_float(op, "x", x);
  PAGEDKV_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) > 0, op, "x", "shape " << shape_of(x), "[..., N] with N > 0");
  for (auto [arg, t] : {std::pair<const char*, const OptTensor*>{"weight", &weight}, {"bias", &bias}}) {
    if (!t->has_value()) continue;
    const Tensor& w = **t;
    check_shape(op, arg, w, {x.size(x.dim() - 1)}, "[N]");
    PAGEDKV_CHECK(w.scalar_type() == x.scalar_type() || w.scalar_type() == ScalarType::Float, op, arg, dtype_of(w),
                  "x's dtype, ", dtype_of(x), ", or float32");
    check_device(op, arg, w, "x", x);
    check_inner(op, arg, w);
  }
  PAGEDKV_CHECK(eps >= 0, op, "eps", eps, "0 or more");
}

inline void check_same(const char* op, const char* arg, const Tensor& t, const char* other, const Tensor& o) {
  bool ok = t.dim() == o.dim();
  for (int64_t i = 0; ok && i < t.dim(); ++i) ok = t.size(i) == o.size(i);
  PAGEDKV_CHECK(ok, op, arg, "shape " << shape_of(t), other, "'s shape, ", shape_of(o));
  check_same_dtype(op, arg, t, other, o);
  check_device(op, arg, t, other, o);
}

inline void check_rotary(const char* op, const Tensor& q, const Tensor* k, const Tensor& cos, const Tensor& sin) {
  check_shape(op, "query", q, {-1, -1, -1}, "[T, H, D]");
  check_float(op, "query", q);
  check_inner(op, "query", q);
  if (k) {
    check_shape(op, "key", *k, {q.size(0), -1, q.size(2)}, "[T, Hkv, D]");
    check_same_dtype(op, "key", *k, "query", q);
    check_device(op, "key", *k, "query", q);
    check_inner(op, "key", *k);
  }
  check_shape(op, "cos", cos, {q.size(0), -1}, "[T, R / 2]");
  check_shape(op, "sin", sin, {q.size(0), cos.size(1)}, "cos's shape");
  PAGEDKV_CHECK(2 * cos.size(1) <= q.size(2), op, "cos", "shape " << shape_of(cos), "R / 2 <= D / 2 = ", q.size(2) / 2);
  for (auto [arg, t] : {std::pair<const char*, const Tensor*>{"cos", &cos}, {"sin", &sin}}) {
    PAGEDKV_CHECK(t->scalar_type() == q.scalar_type() || t->scalar_type() == ScalarType::Float, op, arg, dtype_of(*t),
                  "query's dtype, ", dtype_of(q), ", or float32");
    check_device(op, arg, *t, "query", q);
    check_inner(op, arg, *t);
  }
  check_same_dtype(op, "sin", sin, "cos", cos);
}

inline void check_gated(const char* op, const Tensor& gate, const Tensor& up) {
  check_float(op, "gate", gate);
  PAGEDKV_CHECK(gate.dim() >= 1, op, "gate", "a 0-dimensional tensor", "[..., N]");
  check_same(op, "up", up, "gate", gate);
}

inline void check_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias) {
  const char* op = "linear";
  check_float(op, "x", x);
  PAGEDKV_CHECK(x.dim() >= 1, op, "x", "a 0-dimensional tensor", "[..., K]");
  check_shape(op, "weight", weight, {-1, x.size(x.dim() - 1)}, "[N, K]");
  check_same_dtype(op, "weight", weight, "x", x);
  check_device(op, "weight", weight, "x", x);
  check_inner(op, "weight", weight);
  if (bias.has_value()) check_vector(op, "bias", *bias, weight.size(0), x.scalar_type(), "x", x);
}

// What follows the product of a layer over packed weights. Returns the activation's place in `activations`.
template <size_t count>
inline int check_epilogue(const char* op, const Tensor& x, int64_t outputs, const OptTensor& bias,
                          const OptTensor& residual, const std::string& activation,
                          const char* const (&activations)[count]) {
  if (bias.has_value()) check_vector(op, "bias", *bias, outputs, x.scalar_type(), "x", x);
  if (residual.has_value()) {
    bool ok = residual->dim() == x.dim() && residual->size(x.dim() - 1) == outputs;
    for (int64_t i = 0; ok && i + 1 < x.dim(); ++i) ok = residual->size(i) == x.size(i);
    PAGEDKV_CHECK(ok, op, "residual", "shape " << shape_of(*residual), "the result's shape: x's with N = ", outputs,
                  " as its last size");
    check_same_dtype(op, "residual", *residual, "x", x);
    check_device(op, "residual", *residual, "x", x);
  }
  std::string known;
  for (size_t i = 0; i < count; ++i) {
    if (activation == activations[i]) return int(i);
    known += (i ? ", " : "") + std::string(activations[i]);
  }
  fail(op, ": activation: got \"", activation, "\", needs one of ", known);
}

// The arguments that every use of a packed weight has; `inputs` is K, what the groups divide.
inline void check_int4(const char* op, const Tensor& packed, const Tensor& scales, const OptTensor& zeros,
                       const OptTensor& offsets, const OptTensor& perm, int64_t group_size, int64_t inputs) {
  check_float(op, "scales", scales);
  PAGEDKV_CHECK(group_size > 0 && (group_size % kInt4Block == 0 || group_size >= inputs), op, "group_size", group_size,
                "a multiple of ", kInt4Block, ", or K = ", inputs, " for one group");
  const int64_t groups = (inputs + group_size - 1) / group_size;
  check_shape(op, "scales", scales, {groups, -1}, "[ceil(K / group_size), N]");
  const int64_t outputs = scales.size(1);
  PAGEDKV_CHECK(scales.is_contiguous(), op, "scales", "a strided view", "a contiguous tensor");
  check_dtype(op, "packed", packed, ScalarType::Int);
  check_shape(op, "packed", packed,
              {(outputs + kInt4Block - 1) / kInt4Block, (inputs + kInt4Block - 1) / kInt4Block * 4, kInt4Block},
              "int4_repack's [ceil(N / 32), 4 ceil(K / 32), 32]");
  PAGEDKV_CHECK(packed.is_contiguous(), op, "packed", "a strided view", "a contiguous tensor");
  check_device(op, "packed", packed, "scales", scales);
  PAGEDKV_CHECK(!zeros.has_value() || !offsets.has_value(), op, "offsets", "a tensor", "None with zeros");
  for (auto [arg, t] : {std::pair<const char*, const OptTensor*>{"zeros", &zeros}, {"offsets", &offsets}}) {
    if (!t->has_value()) continue;
    check_shape(op, arg, **t, {groups, outputs}, "scales' shape");
    check_device(op, arg, **t, "scales", scales);
    PAGEDKV_CHECK((*t)->is_contiguous(), op, arg, "a strided view", "a contiguous tensor");
  }
  if (zeros.has_value()) check_dtype(op, "zeros", *zeros, ScalarType::Byte);
  if (offsets.has_value()) check_same_dtype(op, "offsets", *offsets, "scales", scales);
  if (perm.has_value()) check_vector(op, "perm", *perm, inputs, ScalarType::Int, "scales", scales);
}

inline void check_int4_repack(const Tensor& q) {
  check_shape("int4_repack", "q", q, {-1, -1}, "[N, K]");
  check_dtype("int4_repack", "q", q, ScalarType::Byte);
}

inline void check_int4_dequantize(const Tensor& packed, const Tensor& scales, const OptTensor& zeros,
                                  const OptTensor& offsets, const OptTensor& perm, int64_t group_size,
                                  int64_t in_features, ScalarType dtype) {
  const char* op = "int4_dequantize";
  PAGEDKV_CHECK(in_features >= 0, op, "in_features", in_features, "0 or more");
  PAGEDKV_CHECK(is_float(dtype), op, "dtype", name_of(dtype), "float32, float16 or bfloat16");
  if (perm.has_value()) check_shape(op, "perm", *perm, {-1}, "[K]");
  check_int4(op, packed, scales, zeros, offsets, perm, group_size, perm.has_value() ? perm->size(0) : in_features);
}

// Returns the activation's place in `activations`.
template <size_t count>
inline int check_int4_linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const OptTensor& zeros,
                             const OptTensor& offsets, const OptTensor& perm, const OptTensor& bias,
                             const OptTensor& residual, int64_t group_size, int64_t in_features,
                             const std::string& activation, const char* const (&activations)[count]) {
  const char* op = "int4_linear";
  check_float(op, "x", x);
  PAGEDKV_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == in_features, op, "x", "shape " << shape_of(x),
                "[..., in_features] with in_features = ", in_features);
  if (perm.has_value()) check_shape(op, "perm", *perm, {-1}, "[K]");
  check_int4(op, packed, scales, zeros, offsets, perm, group_size, perm.has_value() ? perm->size(0) : in_features);
  check_device(op, "scales", scales, "x", x);
  return check_epilogue(op, x, scales.size(1), bias, residual, activation, activations);
}

// q4k ----------------------------------------------------------------------------------------------------------------

inline void check_q4k(const char* op, const Tensor& packed, const Tensor& scales, const Tensor& mins, const Tensor& d,
                      const Tensor& dmin) {
  check_shape(op, "d", d, {-1, -1}, "[K / 256, N]");
  const int64_t supers = d.size(0), outputs = d.size(1), groups = supers * kQ4KGroups;
  check_shape(op, "dmin", dmin, {supers, outputs}, "d's shape");
  check_shape(op, "scales", scales, {groups, outputs}, "[K / 32, N]");
  check_shape(op, "mins", mins, {groups, outputs}, "[K / 32, N]");
  check_shape(op, "packed", packed, {(outputs + kInt4Block - 1) / kInt4Block, groups * 4, kInt4Block},
              "q4k_repack's [ceil(N / 32), K / 8, 32]");
  check_dtype(op, "packed", packed, ScalarType::Int);
  check_dtype(op, "scales", scales, ScalarType::Byte);
  check_dtype(op, "mins", mins, ScalarType::Byte);
  check_dtype(op, "d", d, ScalarType::Half);
  check_dtype(op, "dmin", dmin, ScalarType::Half);
  for (auto [arg, t] : {std::pair<const char*, const Tensor*>{"packed", &packed},
                        {"scales", &scales},
                        {"mins", &mins},
                        {"d", &d},
                        {"dmin", &dmin}}) {
    PAGEDKV_CHECK(t->is_contiguous(), op, arg, "a strided view", "a contiguous tensor");
    check_device(op, arg, *t, "scales", scales);
  }
}

inline void check_q4k_repack(const Tensor& blocks) {
  const char* op = "q4k_repack";
  check_shape(op, "blocks", blocks, {-1, -1}, "[N, bytes of a row]");
  check_dtype(op, "blocks", blocks, ScalarType::Byte);
  PAGEDKV_CHECK(blocks.size(1) % kQ4KBytes == 0, op, "blocks", blocks.size(1) << " bytes in a row", "a multiple of ",
                kQ4KBytes, ": super-blocks of ", kQ4KInputs, " inputs");
}

inline void check_q4k_dequantize(const Tensor& packed, const Tensor& scales, const Tensor& mins, const Tensor& d,
                                 const Tensor& dmin, ScalarType dtype) {
  const char* op = "q4k_dequantize";
  PAGEDKV_CHECK(is_float(dtype), op, "dtype", name_of(dtype), "float32, float16 or bfloat16");
  check_q4k(op, packed, scales, mins, d, dmin);
}

template <size_t count>
inline int check_q4k_linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& mins,
                            const Tensor& d, const Tensor& dmin, const OptTensor& bias, const OptTensor& residual,
                            const std::string& activation, const char* const (&activations)[count]) {
  const char* op = "q4k_linear";
  check_float(op, "x", x);
  check_q4k(op, packed, scales, mins, d, dmin);
  PAGEDKV_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == d.size(0) * kQ4KInputs, op, "x", "shape " << shape_of(x),
                "[..., K] with K = ", d.size(0) * kQ4KInputs);
  check_device(op, "scales", scales, "x", x);
  return check_epilogue(op, x, scales.size(1), bias, residual, activation, activations);
}

// int8 ---------------------------------------------------------------------------------------------------------------

inline void check_int8(const char* op, const Tensor& packed, const Tensor& scales, int64_t group_size, int64_t inputs) {
  check_float(op, "scales", scales);
  PAGEDKV_CHECK(inputs >= 0, op, "in_features", inputs, "0 or more");
  PAGEDKV_CHECK(group_size > 0 && (group_size % kInt4Block == 0 || group_size >= inputs), op, "group_size", group_size,
                "a multiple of ", kInt4Block, ", or K = ", inputs, " for one group");
  check_shape(op, "scales", scales, {(inputs + group_size - 1) / group_size, -1}, "[ceil(K / group_size), N]");
  PAGEDKV_CHECK(scales.is_contiguous(), op, "scales", "a strided view", "a contiguous tensor");
  check_dtype(op, "packed", packed, ScalarType::Int);
  check_shape(op, "packed", packed,
              {(scales.size(1) + kInt4Block - 1) / kInt4Block, (inputs + kInt4Block - 1) / kInt4Block * 8, kInt4Block},
              "int8_repack's [ceil(N / 32), 8 ceil(K / 32), 32]");
  PAGEDKV_CHECK(packed.is_contiguous(), op, "packed", "a strided view", "a contiguous tensor");
  check_device(op, "packed", packed, "scales", scales);
}

inline void check_int8_repack(const Tensor& q) {
  check_shape("int8_repack", "q", q, {-1, -1}, "[N, K]");
  check_dtype("int8_repack", "q", q, ScalarType::Char);
}

inline void check_int8_dequantize(const Tensor& packed, const Tensor& scales, int64_t group_size, int64_t in_features,
                                  ScalarType dtype) {
  const char* op = "int8_dequantize";
  PAGEDKV_CHECK(is_float(dtype), op, "dtype", name_of(dtype), "float32, float16 or bfloat16");
  check_int8(op, packed, scales, group_size, in_features);
}

template <size_t count>
inline int check_int8_linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const OptTensor& bias,
                             const OptTensor& residual, int64_t group_size, int64_t in_features,
                             const std::string& activation, const char* const (&activations)[count]) {
  const char* op = "int8_linear";
  check_float(op, "x", x);
  PAGEDKV_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == in_features, op, "x", "shape " << shape_of(x),
                "[..., in_features] with in_features = ", in_features);
  check_int8(op, packed, scales, group_size, in_features);
  check_device(op, "scales", scales, "x", x);
  return check_epilogue(op, x, scales.size(1), bias, residual, activation, activations);
}

// quantize -----------------------------------------------------------------------------------------------------------

inline void check_quantize_per_token(const Tensor& x, const OptTensor& factor, int64_t rotation, ScalarType dtype) {
  const char* op = "quantize_per_token";
  check_float(op, "x", x);
  PAGEDKV_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, op, "x", "shape " << shape_of(x), "[..., K] with K >= 1");
  PAGEDKV_CHECK(is_quantized(dtype), op, "dtype", name_of(dtype), "int8 or float8_e4m3fn");
  check_vector(op, "factor", factor, x.size(x.dim() - 1), ScalarType::Float, "x", x);
  const bool block = rotation == 8 || rotation == 16 || rotation == 32 || rotation == 64;
  PAGEDKV_CHECK(rotation == 0 || (block && x.size(x.dim() - 1) % rotation == 0), op, "rotation", rotation,
                "0, 8, 16, 32 or 64 that divides K = ", x.size(x.dim() - 1));
}

inline void check_dequantize_sums(const Tensor& sums, const Tensor& row_scale, const Tensor& column_scale,
                                  const OptTensor& bias, ScalarType dtype) {
  const char* op = "dequantize_sums";
  PAGEDKV_CHECK(sums.scalar_type() == ScalarType::Int || sums.scalar_type() == ScalarType::Float, op, "sums",
                dtype_of(sums), "int32 or float32");
  PAGEDKV_CHECK(sums.dim() >= 1, op, "sums", "a 0-dimensional tensor", "[..., N]");
  PAGEDKV_CHECK(sums.is_contiguous(), op, "sums", "a strided view", "a contiguous tensor");
  PAGEDKV_CHECK(is_float(dtype), op, "dtype", name_of(dtype), "float32, float16 or bfloat16");
  bool ok = row_scale.dim() == sums.dim() - 1;
  for (int64_t i = 0; ok && i < row_scale.dim(); ++i) ok = row_scale.size(i) == sums.size(i);
  PAGEDKV_CHECK(ok, op, "row_scale", "shape " << shape_of(row_scale), "sums' shape without N");
  check_dtype(op, "row_scale", row_scale, ScalarType::Float);
  PAGEDKV_CHECK(row_scale.is_contiguous(), op, "row_scale", "a strided view", "a contiguous tensor");
  check_device(op, "row_scale", row_scale, "sums", sums);
  check_vector(op, "column_scale", column_scale, sums.size(sums.dim() - 1), ScalarType::Float, "sums", sums);
  check_vector(op, "bias", bias, sums.size(sums.dim() - 1), dtype, "sums", sums);
}

inline void check_scaled_linear(const Tensor& x, const Tensor& row_scale, const Tensor& weight,
                                const Tensor& column_scale, const OptTensor& bias, ScalarType dtype) {
  const char* op = "scaled_linear";
  PAGEDKV_CHECK(is_quantized(x.scalar_type()), op, "x", dtype_of(x), "int8 or float8_e4m3fn");
  PAGEDKV_CHECK(x.dim() >= 1, op, "x", "a 0-dimensional tensor", "[..., K]");
  PAGEDKV_CHECK(x.is_contiguous(), op, "x", "a strided view", "a contiguous tensor");
  check_shape(op, "weight", weight, {-1, x.size(x.dim() - 1)}, "[N, K]");
  check_same_dtype(op, "weight", weight, "x", x);
  check_device(op, "weight", weight, "x", x);
  check_inner(op, "weight", weight);
  PAGEDKV_CHECK(is_float(dtype), op, "dtype", name_of(dtype), "float32, float16 or bfloat16");
  bool ok = row_scale.dim() == x.dim() - 1;
  for (int64_t i = 0; ok && i < row_scale.dim(); ++i) ok = row_scale.size(i) == x.size(i);
  PAGEDKV_CHECK(ok, op, "row_scale", "shape " << shape_of(row_scale), "x's shape without K");
  check_dtype(op, "row_scale", row_scale, ScalarType::Float);
  PAGEDKV_CHECK(row_scale.is_contiguous(), op, "row_scale", "a strided view", "a contiguous tensor");
  check_device(op, "row_scale", row_scale, "x", x);
  check_vector(op, "column_scale", column_scale, weight.size(0), ScalarType::Float, "x", x);
  check_vector(op, "bias", bias, weight.size(0), dtype, "x", x);
}

inline void check_bias_act(const Tensor& x, const OptTensor& bias) {
  const char* op = "bias_act";
  check_float(op, "x", x);
  PAGEDKV_CHECK(x.dim() >= 1, op, "x", "a 0-dimensional tensor", "[..., N]");
  if (bias.has_value()) check_vector(op, "bias", *bias, x.size(x.dim() - 1), x.scalar_type(), "x", x);
}

inline void check_logits(const char* op, const Tensor& logits) {
  check_shape(op, "logits", logits, {-1, -1}, "[B, V]");
  check_float(op, "logits", logits);
  check_inner(op, "logits", logits);
  PAGEDKV_CHECK(logits.size(1) > 0 && logits.size(1) < (int64_t(1) << 31), op, "logits", "shape " << shape_of(logits),
                "0 < V < 2^31");
}

inline void check_sample(const Tensor& logits, const Tensor& seeds, const Tensor& offsets, const OptTensor& temperature,
                         const OptTensor& top_k, const OptTensor& top_p, const OptTensor& min_p) {
  const char* op = "sample";
  check_logits(op, logits);
  const int64_t b = logits.size(0);
  check_vector(op, "seeds", seeds, b, ScalarType::Long, "logits", logits);
  check_vector(op, "offsets", offsets, b, ScalarType::Long, "logits", logits);
  check_vector(op, "temperature", temperature, b, ScalarType::Float, "logits", logits);
  check_vector(op, "top_k", top_k, b, ScalarType::Int, "logits", logits);
  check_vector(op, "top_p", top_p, b, ScalarType::Float, "logits", logits);
  check_vector(op, "min_p", min_p, b, ScalarType::Float, "logits", logits);
}

}  // namespace pagedkv
