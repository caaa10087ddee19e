// What the CPU ops share: dtypes as table indices, the rows of a strided tensor, outputs, and the split over threads.
#pragma once

#include <algorithm>

#include "../ops.h"
#include "rows.h"

namespace pagedkv {

// Index in the tables of RowKernels; the dtype has been checked.
inline int row_type(ScalarType t) {
  switch (t) {
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Char:
      return kInt8;
    case ScalarType::Float8_e4m3fn:
      return kFloat8;
    default:
      return kFloat32;
  }
}
inline int row_type(const Tensor& t) { return row_type(t.scalar_type()); }
constexpr int64_t kRowTypeSize[] = {4, 2, 2, 1, 1};

// A new contiguous CPU tensor. Called through the C shim: torch::stable::new_empty looks the op up by name each time.
inline Tensor new_tensor(const int64_t* sizes, int64_t dim, int32_t dtype) {
  std::vector<int64_t> strides(dim, 1);
  for (int64_t i = dim - 2; i >= 0; --i) strides[i] = strides[i + 1] * std::max<int64_t>(sizes[i + 1], 1);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
inline Tensor new_like(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return new_tensor(t.sizes().data(), t.dim(), dtype);
}

// The rows of a tensor [..., N] in order, whatever its strides; copied only if the last dimension is not dense.
class Rows {
 public:
  explicit Rows(const Tensor& t) : tensor_(t) {
    const int64_t dim = t.dim();
    n = t.size(dim - 1);
    if (n > 1 && t.stride(dim - 1) != 1) tensor_ = torch::stable::contiguous(t);
    base_ = static_cast<const char*>(tensor_.const_data_ptr());
    const auto sizes = tensor_.sizes(), strides = tensor_.strides();
    const int64_t item = tensor_.element_size();
    for (int64_t i = 0; i + 1 < dim; ++i) {  // neighbours that step evenly become one dimension
      count *= sizes[i];
      if (sizes[i] == 1) continue;
      const Dim d{sizes[i], strides[i] * item};
      if (!outer_.empty() && outer_.back().stride == d.size * d.stride)
        outer_.back() = {outer_.back().size * d.size, d.stride};
      else
        outer_.push_back(d);
    }
  }
  const char* operator[](int64_t r) const {
    if (outer_.size() == 1) return base_ + r * outer_[0].stride;
    const char* p = base_;
    for (size_t i = outer_.size(); i-- > 0; r /= outer_[i].size) p += r % outer_[i].size * outer_[i].stride;
    return p;
  }

  int64_t count = 1, n;

 private:
  struct Dim {
    int64_t size, stride;  // in bytes
  };
  Tensor tensor_;
  const char* base_;
  std::vector<Dim> outer_;
};

// Calls f(begin, end) over [0, count), on one thread where the work (`cost` elements each) does not pay for more.
template <class F>
inline void split(int64_t count, int64_t cost, const F& f) {
  constexpr int64_t kWorthAThread = 1 << 15;
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, cost));
  if (count > grain)
    torch::stable::parallel_for(0, count, grain, f);
  else if (count > 0)
    f(0, count);
}

}  // namespace pagedkv
