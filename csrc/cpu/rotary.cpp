// rotary_embedding, rotary_and_cache; see torch_pagedkv/ops/rotary.py.

#include "cache_write.h"

namespace pagedkv {
namespace {

// Rotates the tokens of a tensor [T, heads, d] by the tables cos and sin [T, half].
class Rotation {
 public:
  Rotation(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool in_place)
      : kernel_(rows().rotate[row_type(x)]), item_(kRowTypeSize[row_type(x)]) {
    data_ = static_cast<const char*>(in_place ? x.mutable_data_ptr() : x.const_data_ptr());
    token_stride_ = x.stride(0) * item_;
    head_stride_ = x.stride(1);
    heads_ = x.size(1);
    d_ = x.size(2);
    half_ = cos.size(1);
    cos_float32_ = cos.scalar_type() == ScalarType::Float;
    interleaved_ = interleaved;
    const int64_t item = cos_float32_ ? 4 : item_;
    cos_ = static_cast<const char*>(cos.const_data_ptr());
    sin_ = static_cast<const char*>(sin.const_data_ptr());
    cos_stride_ = cos.stride(0) * item;
    sin_stride_ = sin.stride(0) * item;
  }
  // Token t into out, `out_stride` elements from head to head.
  void apply(int64_t t, void* out, int64_t out_stride) const {
    kernel_({token(t), out, head_stride_, out_stride, heads_, d_, cos_ + t * cos_stride_, sin_ + t * sin_stride_,
             cos_float32_, interleaved_, half_});
  }
  void apply_in_place(int64_t t) const { apply(t, const_cast<char*>(token(t)), head_stride_); }
  int64_t cost() const { return heads_ * d_; }

 private:
  const char* token(int64_t t) const { return data_ + t * token_stride_; }

  void (*kernel_)(const RotateToken&);
  int64_t item_;
  const char *data_, *cos_, *sin_;
  int64_t token_stride_, cos_stride_, sin_stride_;  // in bytes
  int64_t head_stride_, heads_, d_, half_;
  bool cos_float32_, interleaved_;
};

void rotary_embedding(Tensor query, OptTensor key, Tensor cos, Tensor sin, bool interleaved) {
  check_rotary("rotary_embedding", query, key.has_value() ? &*key : nullptr, cos, sin);
  const Rotation q(query, cos, sin, interleaved, true);
  std::optional<Rotation> k;
  if (key.has_value()) k.emplace(*key, cos, sin, interleaved, true);
  split(query.size(0), q.cost() + (k ? k->cost() : 0), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      q.apply_in_place(t);
      if (k) k->apply_in_place(t);
    }
  });
}

void rotary_and_cache(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor key_cache,
                      Tensor value_cache, Tensor slot_mapping, bool interleaved, OptTensor k_scale, OptTensor v_scale) {
  const char* op = "rotary_and_cache";
  check_rotary(op, query, &key, cos, sin);
  check_cache_write(op, key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale);
  check_device(op, "query", query, "key_cache", key_cache);
  check_slots(op, slot_mapping, key_cache);
  const Rotation q(query, cos, sin, interleaved, true), k(key, cos, sin, interleaved, false);
  const int type = row_type(key);
  const int64_t item = kRowTypeSize[type], d = key.size(2);
  const CacheWriter k_out(key_cache, k_scale, type), v_out(value_cache, v_scale, type);
  const char* v = static_cast<const char*>(value.const_data_ptr());
  const int64_t v_token = value.stride(0) * item, v_head = value.stride(1) * item;
  const int64_t* slots = static_cast<const int64_t*>(slot_mapping.const_data_ptr());
  split(query.size(0), q.cost() + 2 * k.cost(), [&](int64_t begin, int64_t end) {
    std::vector<char> rotated(k_out.quantizes() ? k.cost() * item : 0);  // rounded to the key's dtype
    for (int64_t t = begin; t < end; ++t) {
      q.apply_in_place(t);
      if (slots[t] < 0) continue;
      if (k_out.quantizes()) {
        k.apply(t, rotated.data(), d);
        k_out.write(slots[t], rotated.data(), d * item);
      } else {
        k.apply(t, k_out.token(slots[t]), k_out.head_stride() / item);
      }
      v_out.write(slots[t], v + t * v_token, v_head);
    }
  });
}

}  // namespace
}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CPU, m) {
  PAGEDKV_IMPL(m, rotary_embedding, pagedkv::rotary_embedding);
  PAGEDKV_IMPL(m, rotary_and_cache, pagedkv::rotary_and_cache);
}
