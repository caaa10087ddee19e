// quantize_per_token, dequantize_sums; see torch_pagedkv/ops/quantize.py.

#include <cmath>

#include "tensors.h"

namespace pagedkv {
namespace {

// A block times Hadamard's matrix: at each step pairs h apart become their sum and difference.
template <int kBlock>
void rotate_block(float* v, float scale) {
#pragma GCC unroll 8
  for (int h = 1; h < kBlock; h *= 2) {
    for (int i = 0; i < kBlock; i += 2 * h)
#pragma GCC ivdep
      for (int j = i; j < i + h; ++j) {
        const float a = v[j], b = v[j + h];
        v[j] = a + b, v[j + h] = a - b;
      }
  }
  for (int i = 0; i < kBlock; ++i) v[i] *= scale;
}

void rotate(float* v, int64_t n, int64_t block) {
  const float scale = float(1 / std::sqrt(double(block)));
  for (float* const end = v + n; v < end; v += block) switch (block) {
      case 8:
        rotate_block<8>(v, scale);
        break;
      case 16:
        rotate_block<16>(v, scale);
        break;
      case 32:
        rotate_block<32>(v, scale);
        break;
      default:
        rotate_block<64>(v, scale);
    }
}

Pair quantize_per_token(Tensor x, OptTensor factor, int64_t rotation, ScalarType dtype) {
  check_quantize_per_token(x, factor, rotation, dtype);
  const Rows in(x);
  const int type = row_type(x);
  Tensor q = torch::stable::new_empty(x, x.sizes(), dtype);
  Tensor scale = new_tensor(x.sizes().data(), x.dim() - 1, aoti_torch_dtype_float32());
  const float* const factors = factor.has_value() ? factor->const_data_ptr<float>() : nullptr;
  const bool change = factors || rotation;
  const auto quantize = rows().quantize[change ? int(kFloat32) : type][row_type(dtype) - kInt8];
  char* const out = static_cast<char*>(q.mutable_data_ptr());
  float* const scales = scale.mutable_data_ptr<float>();
  split(in.count, in.n, [&](int64_t begin, int64_t end) {
    std::vector<float> row(change ? size_t(in.n) : 0);
    for (int64_t r = begin; r < end; ++r) {
      const void* from = in[r];
      if (change) {
        rows().convert[type][kFloat32](from, 1.f, row.data(), in.n);
        for (int64_t i = 0; factors && i < in.n; ++i) row[i] *= factors[i];
        if (rotation) rotate(row.data(), in.n, rotation);
        from = row.data();
      }
      scales[r] = quantize(from, out + r * in.n, in.n);
    }
  });
  return {q, scale};
}

template <class S>
void dequantize(const Tensor& sums, const float* row_scale, const float* column_scale, const OptTensor& bias, int type,
                Tensor& y) {
  const int64_t n = sums.size(sums.dim() - 1), count = n ? sums.numel() / n : 0, item = kRowTypeSize[type];
  const S* const in = static_cast<const S*>(sums.const_data_ptr());
  std::vector<float> shift(size_t(n), 0.f);
  if (bias.has_value()) rows().convert[type][kFloat32](bias->const_data_ptr(), 1.f, shift.data(), n);
  char* const out = static_cast<char*>(y.mutable_data_ptr());
  split(count, n, [&](int64_t begin, int64_t end) {
    std::vector<float> row(size_t(n), 0.f);
    for (int64_t r = begin; r < end; ++r) {
      const float scale = row_scale[r];
      for (int64_t i = 0; i < n; ++i) row[i] = float(in[r * n + i]) * scale * column_scale[i] + shift[i];
      rows().convert[kFloat32][type](row.data(), 1.f, out + r * n * item, n);
    }
  });
}

Tensor dequantize_sums(Tensor sums, Tensor row_scale, Tensor column_scale, OptTensor bias, ScalarType dtype) {
  check_dequantize_sums(sums, row_scale, column_scale, bias, dtype);
  Tensor y = torch::stable::new_empty(sums, sums.sizes(), dtype);
  const auto run = sums.scalar_type() == ScalarType::Int ? dequantize<int32_t> : dequantize<float>;
  run(sums, row_scale.const_data_ptr<float>(), column_scale.const_data_ptr<float>(), bias, row_type(dtype), y);
  return y;
}

}  // namespace
}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CPU, m) {
  PAGEDKV_IMPL(m, quantize_per_token, pagedkv::quantize_per_token);
  PAGEDKV_IMPL(m, dequantize_sums, pagedkv::dequantize_sums);
}
