// int8_repack, int8_dequantize, int8_linear; see torch_pagedkv/ops/int8.py, and int4_kernel.inl for the algorithm.

#include "packed_linear.h"
#include "tensors.h"

namespace pagedkv {
namespace {

Tensor int8_repack(Tensor q) {
  check_int8_repack(q);
  const int64_t n = q.size(0), k = q.size(1), words = ceil_div(k, kInt4Block) * (kInt4Block / kInt8Word);
  const int64_t sizes[] = {ceil_div(n, kInt4Block), words, kInt4Block};
  Tensor packed = new_tensor(sizes, 3, aoti_torch_dtype_int32());
  uint32_t* out = reinterpret_cast<uint32_t*>(packed.mutable_data_ptr<int32_t>());
  const Tensor dense = torch::stable::contiguous(q);
  const int8_t* in = dense.const_data_ptr<int8_t>();
  split(sizes[0], kInt4Block * k, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      for (int64_t j = 0; j < words; ++j)
        for (int64_t c = 0; c < kInt4Block; ++c) {
          const int64_t row = b * kInt4Block + c;
          uint32_t word = 0;
          for (int64_t i = 0, at = j * kInt8Word; i < kInt8Word && row < n && at + i < k; ++i)
            word |= uint32_t(uint8_t(in[row * k + at + i])) << int8_shift(int(i));
          out[(b * words + j) * kInt4Block + c] = word;
        }
  });
  return packed;
}

template <class T, class S>
void dequantize(const Tensor& packed, const Tensor& scales, int64_t group, int64_t k, Tensor& w) {
  const int64_t n = scales.size(1), words = packed.size(1);
  const uint32_t* in = static_cast<const uint32_t*>(packed.const_data_ptr());
  const S* scale = static_cast<const S*>(scales.const_data_ptr());
  T* out = static_cast<T*>(w.mutable_data_ptr());
  split(n, k, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = 0; i < k; ++i) {
        const uint32_t word = in[(row / kInt4Block * words + i / kInt8Word) * kInt4Block + row % kInt4Block];
        const int8_t q = int8_t(uint8_t(word >> int8_shift(int(i % kInt8Word))));
        out[row * k + i] = T(float(scale[i / group * n + row]) * float(q));
      }
  });
}

Tensor int8_dequantize(Tensor packed, Tensor scales, int64_t group_size, int64_t in_features, ScalarType dtype) {
  check_int8_dequantize(packed, scales, group_size, in_features, dtype);
  const int64_t sizes[] = {scales.size(1), in_features};
  Tensor w = torch::stable::new_empty(scales, {sizes, 2}, dtype);
  dispatch_float(dtype, "int8_dequantize", [&](auto to) {
    dispatch_float(scales.scalar_type(), "int8_dequantize", [&](auto from) {
      dequantize<decltype(to), decltype(from)>(packed, scales, group_size, in_features, w);
    });
  });
  return w;
}

Tensor int8_linear(Tensor x, Tensor packed, Tensor scales, OptTensor bias, OptTensor residual, int64_t group_size,
                   int64_t in_features, std::string activation) {
  const int act =
      check_int8_linear(x, packed, scales, bias, residual, group_size, in_features, activation, kPackedActivations);
  Int4Scales s{};
  s.scales = scales.const_data_ptr(), s.dtype = row_type(scales);
  s.n = scales.size(1), s.group = group_size;
  return packed_linear(x, packed, kEightBits, s, nullptr, in_features, bias, residual, kPackedActs[act]);
}

}  // namespace
}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CPU, m) {
  PAGEDKV_IMPL(m, int8_repack, pagedkv::int8_repack);
  PAGEDKV_IMPL(m, int8_dequantize, pagedkv::int8_dequantize);
  PAGEDKV_IMPL(m, int8_linear, pagedkv::int8_linear);
}
