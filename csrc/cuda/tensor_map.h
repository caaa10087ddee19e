// Descriptions of tensors for the copy engine (cp.async.bulk.tensor, sm_90).
#pragma once

#include <cuda.h>

#include "cuda_common.h"

namespace pagedkv {

// cuTensorMapEncodeTiled, which lives in the driver; null where that is too old.
inline auto find_tensor_map_encode() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
  return error == cudaSuccess && status == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
}

struct TensorAxis {
  int64_t size, bytes;  // from one to the next
  int box;
};

// Describes a tensor of 16-bit elements whose rows are `columns` long, in boxes of 64 columns and the axes' boxes, with
// the swizzle of wgmma.cuh, or of whole rows of up to 256 without; false where the copy engine cannot take it.
inline bool describe_tensor(CUtensorMap& map, const void* data, int64_t columns, const TensorAxis (&axes)[3],
                            bool swizzled = true) {
  static const auto encode = find_tensor_map_encode();
  cuuint64_t sizes[4] = {cuuint64_t(columns)}, strides[3];
  cuuint32_t box[4] = {cuuint32_t(swizzled ? 64 : columns)}, steps[4] = {1, 1, 1, 1};
  for (int i = 0; i < 3; ++i) {
    sizes[i + 1] = cuuint64_t(axes[i].size), box[i + 1] = cuuint32_t(axes[i].box);
    strides[i] = axes[i].size > 1 ? cuuint64_t(axes[i].bytes) : 16;
  }
  return encode &&
         encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace pagedkv
