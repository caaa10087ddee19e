// linear; see torch_pagedkv/ops/linear.py, and linear_kernel.inl for the algorithm.

#include "linear_kernel.h"
#include "simd.h"
#include "tensors.h"

namespace pagedkv {
namespace {

const LinearKernels& kernels() {
  static const LinearKernels* const table = [] {
#if defined(__x86_64__)
    if (cpu_isa() >= Isa::kAvx512Bf16) return &linear_avx512bf16;
    if (cpu_isa() >= Isa::kAvx512) return &linear_avx512;
    if (cpu_isa() >= Isa::kAvx2) return &linear_avx2;
#endif
    return &linear_generic;
  }();
  return *table;
}

Tensor linear(Tensor x, Tensor weight, OptTensor bias) {
  check_linear(x, weight, bias);
  const int type = row_type(x);
  const auto x_sizes = x.sizes();
  std::vector<int64_t> sizes(x_sizes.begin(), x_sizes.end());
  sizes.back() = weight.size(0);
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  Tensor y = new_tensor(sizes.data(), int64_t(sizes.size()), dtype);

  const Rows in(x);
  LinearTask task{};
  task.weight = weight.const_data_ptr();
  task.weight_stride = weight.size(0) > 1 ? weight.stride(0) : in.n;
  task.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  task.y = y.mutable_data_ptr();
  task.rows = in.count, task.n = weight.size(0), task.k = in.n;
  if (task.rows == 0 || task.n == 0) return y;
  task.x_bytes = kernels().packed_bytes[type](task.k);
  thread_local std::vector<char> scratch;  // grows to the largest layer, then stays
  scratch.resize(size_t(task.rows * task.x_bytes + 64));
  char* packed = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
  for (int64_t r = 0; r < task.rows; ++r) kernels().pack[type](in[r], task.k, packed + r * task.x_bytes);
  task.x = packed;

  constexpr int64_t kColumns = 16;  // to a thread at a time: whole blocks of every kernel
  split((task.n + kColumns - 1) / kColumns, kColumns * task.k, [&](int64_t begin, int64_t end) {
    kernels().run[type](task, begin * kColumns, std::min(end * kColumns, task.n));
  });
  return y;
}

}  // namespace
}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CPU, m) { PAGEDKV_IMPL(m, linear, pagedkv::linear); }
