// torch's own product of many rows, for weights that were dequantised for the call.
#pragma once

#include <array>

#include "cuda_common.h"

namespace pagedkv {

// x W^T + bias, rounded once: a bias that is added to a product of 16 bits afterwards costs an error of its own, twice
// PyTorch's in unlucky outputs.
inline Tensor torch_linear(const Tensor& x, const Tensor& w, const OptTensor& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(w),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace pagedkv
