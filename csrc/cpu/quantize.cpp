// quantize_per_token, dequantize_sums, scaled_linear; see torch_pagedkv/ops/quantize.py.

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

// Whole numbers are summed exactly, float8 as float32.
template <class E, class S>
void sum_products(const E* x, const E* w, int64_t count, int64_t n, int64_t k, S* sums) {
  for (int64_t r = 0; r < count; ++r) {
    S sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < k; ++i) sum += S(x[r * k + i]) * S(w[i]);
    sums[r * n] = sum;
  }
}

Tensor scaled_linear(Tensor x, Tensor row_scale, Tensor weight, Tensor column_scale, OptTensor bias, ScalarType dtype) {
  check_scaled_linear(x, row_scale, weight, column_scale, bias, dtype);
  const bool whole = x.scalar_type() == ScalarType::Char;
  const int64_t n = weight.size(0), k = weight.size(1), w_stride = n > 1 ? weight.stride(0) : k;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  Tensor sums = torch::stable::new_empty(x, sizes, whole ? ScalarType::Int : ScalarType::Float);
  const int64_t count = n ? sums.numel() / n : 0;
  const char *const in = static_cast<const char*>(x.const_data_ptr()), *const w = static_cast<const char*>(
                                                                           weight.const_data_ptr());
  const auto widen = rows().convert[kFloat8][kFloat32];
  std::vector<float> inputs(whole ? 0 : size_t(count * k));
  if (!whole && count * k > 0) widen(in, 1.f, inputs.data(), count * k);
  char* const out = static_cast<char*>(sums.mutable_data_ptr());
  split(n, count * k, [&](int64_t begin, int64_t end) {
    std::vector<float> row(whole ? 0 : size_t(k));
    for (int64_t j = begin; j < end; ++j) {
      if (whole) {
        sum_products(reinterpret_cast<const int8_t*>(in), reinterpret_cast<const int8_t*>(w + j * w_stride), count, n,
                     k, reinterpret_cast<int32_t*>(out) + j);
      } else {
        if (k > 0) widen(w + j * w_stride, 1.f, row.data(), k);
        sum_products(inputs.data(), row.data(), count, n, k, reinterpret_cast<float*>(out) + j);
      }
    }
  });
  return dequantize_sums(sums, row_scale, column_scale, bias, dtype);
}

}  // namespace
}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CPU, m) {
  PAGEDKV_IMPL(m, quantize_per_token, pagedkv::quantize_per_token);
  PAGEDKV_IMPL(m, dequantize_sums, pagedkv::dequantize_sums);
  PAGEDKV_IMPL(m, scaled_linear, pagedkv::scaled_linear);
}
