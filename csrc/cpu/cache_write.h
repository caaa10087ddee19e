// Writing tokens into a paged cache: bit copies, or quantised rows with their scales.
#pragma once

#include <cstring>

#include "tensors.h"

namespace pagedkv {

// Slots come from outside: all are looked at before the first write. A negative one skips its token.
inline void check_slots(const char* op, const Tensor& slot_mapping, const Tensor& cache) {
  const int64_t* slots = static_cast<const int64_t*>(slot_mapping.const_data_ptr());
  const int64_t limit = cache.size(0) * cache.size(1);
  for (int64_t t = 0, n = slot_mapping.size(0); t < n; ++t)
    PAGEDKV_CHECK(slots[t] < limit, op, "slot_mapping", "slot " << slots[t] << " for token " << t,
                  "slot < num_blocks * block_size = ", limit);
}

// One of the two caches.
class CacheWriter {
 public:
  CacheWriter(const Tensor& cache, const OptTensor& scale, int source_type)
      : data_(static_cast<char*>(cache.mutable_data_ptr())),
        scale_(scale.has_value() ? static_cast<float*>(scale->mutable_data_ptr()) : nullptr),
        heads_(cache.size(2)),
        d_(cache.size(3)),
        source_size_(kRowTypeSize[source_type]) {
    const int type = row_type(cache);
    const int64_t item = kRowTypeSize[type];
    if (scale_) quantize_ = rows().quantize[source_type][type - kInt8];
    shift_ = __builtin_ctzll(cache.size(1));
    block_stride_ = cache.stride(0) * item;
    token_stride_ = cache.stride(1) * item;
    head_stride_ = cache.stride(2) * item;
  }
  char* token(int64_t slot) const {
    return data_ + (slot >> shift_) * block_stride_ + (slot & ((int64_t(1) << shift_) - 1)) * token_stride_;
  }
  int64_t head_stride() const { return head_stride_; }  // in bytes
  bool quantizes() const { return quantize_ != nullptr; }

  // x [heads, d], `stride` bytes from head to head.
  void write(int64_t slot, const char* x, int64_t stride) const {
    char* out = token(slot);
    const int64_t bytes = d_ * source_size_;
    if (quantize_) {
      for (int64_t h = 0; h < heads_; ++h)
        scale_[slot * heads_ + h] = quantize_(x + h * stride, out + h * head_stride_, d_);
    } else if (stride == bytes && head_stride_ == bytes) {
      std::memcpy(out, x, heads_ * bytes);
    } else {
      for (int64_t h = 0; h < heads_; ++h) std::memcpy(out + h * head_stride_, x + h * stride, bytes);
    }
  }

 private:
  char* data_;
  float* scale_;  // [num_blocks * block_size, heads]
  int64_t heads_, d_, source_size_;
  float (*quantize_)(const void*, void*, int64_t) = nullptr;
  int shift_;
  int64_t block_stride_, token_stride_, head_stride_;
};

}  // namespace pagedkv
