// silu_and_mul, gelu_and_mul, bias_act; see torch_pagedkv/ops/activation.py.

#include "tensors.h"

namespace pagedkv {
namespace {

Tensor activate(Act act, const Tensor& x, const Tensor* bias, const Tensor* up) {
  const int type = row_type(x);
  const Rows in(x), factor(up ? *up : x);
  Tensor y = new_like(x);
  char* out = static_cast<char*>(y.mutable_data_ptr());
  const void* shift = bias ? bias->const_data_ptr() : nullptr;
  const int64_t bytes = in.n * kRowTypeSize[type];
  const auto kernel = rows().activate[type];
  split(in.count, in.n * (up ? 4 : 2), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) kernel(act, {in[r], shift, up ? factor[r] : nullptr, out + r * bytes, in.n});
  });
  return y;
}

Tensor silu_and_mul(Tensor gate, Tensor up) {
  check_gated("silu_and_mul", gate, up);
  return activate(Act::kSilu, gate, nullptr, &up);
}

Tensor gelu_and_mul(Tensor gate, Tensor up, std::string approximate) {
  check_gated("gelu_and_mul", gate, up);
  PAGEDKV_CHECK(approximate == "none" || approximate == "tanh", "gelu_and_mul", "approximate",
                "\"" << approximate << "\"", "\"none\" or \"tanh\"");
  return activate(approximate == "tanh" ? Act::kGeluTanh : Act::kGelu, gate, nullptr, &up);
}

Tensor bias_act(Tensor x, OptTensor bias, std::string activation) {
  check_bias_act(x, bias);
  static constexpr std::pair<const char*, Act> kActs[] = {
      {"none", Act::kNone}, {"relu", Act::kRelu},          {"relu2", Act::kRelu2},          {"silu", Act::kSilu},
      {"gelu", Act::kGelu}, {"gelu_tanh", Act::kGeluTanh}, {"quick_gelu", Act::kQuickGelu},
  };
  for (auto [name, act] : kActs)
    if (activation == name) return activate(act, x, bias.has_value() ? &*bias : nullptr, nullptr);
  fail("bias_act: activation: got \"", activation,
       "\", needs one of none, relu, relu2, silu, gelu, gelu_tanh, quick_gelu");
}

}  // namespace
}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CPU, m) {
  PAGEDKV_IMPL(m, silu_and_mul, pagedkv::silu_and_mul);
  PAGEDKV_IMPL(m, gelu_and_mul, pagedkv::gelu_and_mul);
  PAGEDKV_IMPL(m, bias_act, pagedkv::bias_act);
}
