// rms_norm, add_rms_norm, layer_norm; see torch_pagedkv/ops/norm.py.

#include "tensors.h"

namespace pagedkv {
namespace {

// A weight or bias [N].
struct Vector {
  const void* data = nullptr;
  bool float32 = false;
  explicit Vector(const OptTensor& t) {
    if (!t.has_value()) return;
    data = t->const_data_ptr();
    float32 = t->scalar_type() == ScalarType::Float;
  }
};

// Runs one of the norm kernels over all rows; row holds what the rows share.
void run(void (*const kernel[3])(const NormRow&), const Tensor& x, const Tensor* residual, const Tensor* h,
         const Tensor& y, NormRow row) {
  const int type = row_type(x);
  const Rows in(x), add(residual ? *residual : x);
  const int64_t bytes = in.n * kRowTypeSize[type];
  char* out = static_cast<char*>(y.mutable_data_ptr());
  char* sum = h ? static_cast<char*>(h->mutable_data_ptr()) : nullptr;
  row.n = in.n;
  split(in.count, in.n, [&](int64_t begin, int64_t end) {
    NormRow r = row;
    for (int64_t i = begin; i < end; ++i) {
      r.x = in[i];
      r.residual = residual ? add[i] : nullptr;
      r.h = sum ? sum + i * bytes : nullptr;
      r.y = out + i * bytes;
      kernel[type](r);
    }
  });
}

NormRow shared(const Vector& weight, const Vector& bias, double eps, double weight_offset, bool round_before_weight) {
  NormRow row{};
  row.weight = weight.data;
  row.weight_float32 = weight.float32;
  row.bias = bias.data;
  row.bias_float32 = bias.float32;
  row.eps = float(eps);
  row.weight_offset = float(weight_offset);
  row.round_before_weight = round_before_weight;
  return row;
}

Tensor rms_norm(Tensor x, OptTensor weight, double eps, double weight_offset, bool round_before_weight) {
  check_norm("rms_norm", x, weight, {}, eps);
  Tensor y = new_like(x);
  const NormRow row = shared(Vector(weight), Vector({}), eps, weight_offset, round_before_weight);
  run(rows().rms_norm, x, nullptr, nullptr, y, row);
  return y;
}

Pair add_rms_norm(Tensor x, Tensor residual, OptTensor weight, double eps, double weight_offset,
                  bool round_before_weight) {
  check_norm("add_rms_norm", x, weight, {}, eps);
  check_same("add_rms_norm", "residual", residual, "x", x);
  Pair out{new_like(x), new_like(x)};
  const NormRow row = shared(Vector(weight), Vector({}), eps, weight_offset, round_before_weight);
  run(rows().rms_norm, x, &residual, &std::get<1>(out), std::get<0>(out), row);
  return out;
}

Tensor layer_norm(Tensor x, OptTensor weight, OptTensor bias, double eps) {
  check_norm("layer_norm", x, weight, bias, eps);
  Tensor y = new_like(x);
  run(rows().layer_norm, x, nullptr, nullptr, y, shared(Vector(weight), Vector(bias), eps, 0, false));
  return y;
}

}  // namespace
}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CPU, m) {
  PAGEDKV_IMPL(m, rms_norm, pagedkv::rms_norm);
  PAGEDKV_IMPL(m, add_rms_norm, pagedkv::add_rms_norm);
  PAGEDKV_IMPL(m, layer_norm, pagedkv::layer_norm);
}
