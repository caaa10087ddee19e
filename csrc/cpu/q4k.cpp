// q4k_repack, q4k_dequantize, q4k_linear; see torch_pagedkv/ops/q4k.py, and int4_kernel.inl for the algorithm.

#include <cstring>

#include "packed_linear.h"
#include "tensors.h"

namespace pagedkv {
namespace {

Q4KTensors q4k_repack(Tensor blocks) {
  check_q4k_repack(blocks);
  const int64_t n = blocks.size(0), supers = blocks.size(1) / kQ4KBytes, groups = supers * kQ4KGroups;
  const int64_t words = groups * (kInt4Block / kInt4Word);
  const int64_t packed_sizes[] = {ceil_div(n, kInt4Block), words, kInt4Block};
  const int64_t sub_sizes[] = {groups, n}, super_sizes[] = {supers, n};
  Tensor packed = new_tensor(packed_sizes, 3, aoti_torch_dtype_int32());
  Tensor scales = new_tensor(sub_sizes, 2, aoti_torch_dtype_uint8());
  Tensor mins = new_tensor(sub_sizes, 2, aoti_torch_dtype_uint8());
  Tensor d = new_tensor(super_sizes, 2, aoti_torch_dtype_float16());
  Tensor dmin = new_tensor(super_sizes, 2, aoti_torch_dtype_float16());
  uint32_t* const out = reinterpret_cast<uint32_t*>(packed.mutable_data_ptr<int32_t>());
  uint8_t *const scale = scales.mutable_data_ptr<uint8_t>(), *const min = mins.mutable_data_ptr<uint8_t>();
  char *const d_out = static_cast<char*>(d.mutable_data_ptr()), *const dmin_out =
                                                                    static_cast<char*>(dmin.mutable_data_ptr());
  const Tensor dense = torch::stable::contiguous(blocks);
  const uint8_t* const in = dense.const_data_ptr<uint8_t>();
  split(packed_sizes[0], kInt4Block * supers * kQ4KInputs, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      for (int64_t c = 0; c < kInt4Block; ++c) {
        const int64_t row = b * kInt4Block + c;
        uint32_t* const to = out + b * words * kInt4Block + c;
        if (row >= n) {
          for (int64_t j = 0; j < words; ++j) to[j * kInt4Block] = 0;
          continue;
        }
        for (int64_t s = 0; s < supers; ++s) {
          const uint8_t* const block = in + (row * supers + s) * kQ4KBytes;
          std::memcpy(d_out + 2 * (s * n + row), block, 2);
          std::memcpy(dmin_out + 2 * (s * n + row), block + 2, 2);
          for (int j = 0; j < kQ4KGroups; ++j) {
            const int64_t at = (s * kQ4KGroups + j) * n + row;
            q4k_scale(block + 4, j, scale + at, min + at);
          }
          for (int j = 0; j < kQ4KInputs / kInt4Word; ++j) {
            uint32_t word = 0;
            for (int i = 0; i < kInt4Word; ++i)
              word |= uint32_t(q4k_number(block + 16, j * kInt4Word + i) ^ 8) << int4_shift(i);
            to[(s * (kQ4KInputs / kInt4Word) + j) * kInt4Block] = word;
          }
        }
      }
  });
  return {packed, scales, mins, d, dmin};
}

template <class T>
void dequantize(const Tensor& packed, const Tensor& scales, const Tensor& mins, const Tensor& d, const Tensor& dmin,
                int64_t k, Tensor& w) {
  const int64_t n = scales.size(1), words = packed.size(1);
  const uint32_t* in = static_cast<const uint32_t*>(packed.const_data_ptr());
  const uint8_t *scale = scales.const_data_ptr<uint8_t>(), *min = mins.const_data_ptr<uint8_t>();
  const Half *d_in = static_cast<const Half*>(d.const_data_ptr()),
             *dmin_in = static_cast<const Half*>(dmin.const_data_ptr());
  T* out = static_cast<T*>(w.mutable_data_ptr());
  split(n, k, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = 0; i < k; ++i) {
        const uint32_t word = in[(row / kInt4Block * words + i / kInt4Word) * kInt4Block + row % kInt4Block];
        const int q = int((word >> int4_shift(int(i % kInt4Word)) & 15) ^ 8);
        const int64_t at = i / kInt4Block * n + row, super = i / kQ4KInputs * n + row;
        // exact but for the difference
        const double high = double(float(d_in[super])) * scale[at] * q, low = double(float(dmin_in[super])) * min[at];
        out[row * k + i] = T(float(high - low));
      }
  });
}

Tensor q4k_dequantize(Tensor packed, Tensor scales, Tensor mins, Tensor d, Tensor dmin, ScalarType dtype) {
  check_q4k_dequantize(packed, scales, mins, d, dmin, dtype);
  const int64_t sizes[] = {scales.size(1), d.size(0) * kQ4KInputs};
  Tensor w = torch::stable::new_empty(scales, {sizes, 2}, dtype);
  dispatch_float(dtype, "q4k_dequantize",
                 [&](auto to) { dequantize<decltype(to)>(packed, scales, mins, d, dmin, sizes[1], w); });
  return w;
}

Tensor q4k_linear(Tensor x, Tensor packed, Tensor scales, Tensor mins, Tensor d, Tensor dmin, OptTensor bias,
                  OptTensor residual, std::string activation) {
  const int act = check_q4k_linear(x, packed, scales, mins, d, dmin, bias, residual, activation, kPackedActivations);
  Int4Scales s{};
  s.scales = d.const_data_ptr(), s.offsets = dmin.const_data_ptr(), s.dtype = kFloat16;
  s.sub_scales = scales.const_data_ptr<uint8_t>(), s.sub_mins = mins.const_data_ptr<uint8_t>();
  s.n = scales.size(1), s.group = kInt4Block;
  return packed_linear(x, packed, kFourBits, s, nullptr, d.size(0) * kQ4KInputs, bias, residual, kPackedActs[act]);
}

}  // namespace
}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CPU, m) {
  PAGEDKV_IMPL(m, q4k_repack, pagedkv::q4k_repack);
  PAGEDKV_IMPL(m, q4k_dequantize, pagedkv::q4k_dequantize);
  PAGEDKV_IMPL(m, q4k_linear, pagedkv::q4k_linear);
}
