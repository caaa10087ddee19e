// What the files of the layers over packed weights (int4, q4k, int8) share: parameters, launches, rows of x.
#pragma once

#include "activation.cuh"
#include "cuda_common.h"

namespace pagedkv {

struct Int4Params {
  const uint32_t* packed;  // [blocks][k_padded / 8][32], see int4.h
  const void* scales;      // [groups, n] of scale_type
  const uint8_t* zeros;    // [groups, n] or null: 8
  const void* offsets;     // [groups, n] of scale_type or null
  // Of Q4_K, else null: 6-bit scales and minima [groups, n]. scales and offsets are then d and dmin, half [groups / 8,
  // n]: w = scale * sub_scale * q - offset * sub_min.
  const uint8_t *sub_scales, *sub_mins;
  ScalarType scale_type;
  const void* x;  // [m, k], rows x_stride elements apart
  int64_t x_stride;
  const void* bias;      // [n] or null
  const void* residual;  // [m, n] or null
  void* y;               // [m, n]
  int64_t m, n, k, k_padded, group;
  Act act;
};

// y = activation(sum + bias) + residual
template <class T>
__device__ __forceinline__ T int4_finish(const Int4Params& p, int64_t row, int64_t n, float sum) {
  if (p.bias) sum += to_float(static_cast<const T*>(p.bias)[n]);
  apply<1>(p.act, &sum);
  if (p.residual) sum += to_float(static_cast<const T*>(p.residual)[row * p.n + n]);
  return from_float<T>(sum);
}

__device__ __forceinline__ float load_scale(const void* p, ScalarType type, int64_t i) {
  switch (type) {
    case ScalarType::Half:
      return to_float(static_cast<const __half*>(p)[i]);
    case ScalarType::BFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}

// The scale and the offset of output n in a group, of weights with offsets. Q4_K's products are exact.
struct ScaleOffset {
  float scale, offset;
};
template <class Params>  // Int4Params, or what has those fields of it
__device__ __forceinline__ ScaleOffset load_scale_offset(const Params& p, int64_t group, int64_t n) {
  const int64_t at = group * p.n + n;
  if (!p.sub_scales) return {load_scale(p.scales, p.scale_type, at), load_scale(p.offsets, p.scale_type, at)};
  const int64_t super = group / kQ4KGroups * p.n + n;
  return {to_float(static_cast<const __half*>(p.scales)[super]) * float(p.sub_scales[at]),
          -(to_float(static_cast<const __half*>(p.offsets)[super]) * float(p.sub_mins[at]))};
}

// Eight neighbours in stores of 16 bytes; into L2, where the product reads them. (Of assignments the compiler makes
// stores of 4 bytes.)
template <class T>
__device__ __forceinline__ void store_floats(T* to, const float (&v)[8]) {
  uint4* const out = reinterpret_cast<uint4*>(to);
  if constexpr (std::is_same_v<T, float>) {
    const auto bits = [&](int i) { return __float_as_uint(v[i]); };
    __stcg(out, make_uint4(bits(0), bits(1), bits(2), bits(3)));
    __stcg(out + 1, make_uint4(bits(4), bits(5), bits(6), bits(7)));
  } else {
    const auto pair = [&](int i) {
      if constexpr (std::is_same_v<T, __half>) {
        const __half2 h = __floats2half2_rn(v[i], v[i + 1]);
        return *reinterpret_cast<const uint32_t*>(&h);
      } else {
        const __nv_bfloat162 h = __floats2bfloat162_rn(v[i], v[i + 1]);
        return *reinterpret_cast<const uint32_t*>(&h);
      }
    };
    __stcg(out, make_uint4(pair(0), pair(2), pair(4), pair(6)));
  }
}

constexpr const char* kPackedActivations[] = {"none", "silu", "gelu", "gelu_tanh"};
constexpr Act kPackedActs[] = {Act::kNone, Act::kSilu, Act::kGelu, Act::kGeluTanh};

// Rows of x one stride apart; other views are copied.
struct EvenRows {
  Tensor tensor;
  int64_t count = 1, stride;
  explicit EvenRows(const Tensor& x) : tensor(x), stride(x.size(x.dim() - 1)) {
    const int64_t last = x.dim() - 1, k = x.size(last);
    bool even = k <= 1 || x.stride(last) == 1;
    int64_t step = k, reach = 0;  // of a row; of the dimensions seen so far
    for (int64_t i = last - 1; i >= 0; --i) {
      count *= x.size(i);
      if (x.size(i) == 1) continue;
      if (reach == 0)
        step = x.stride(i);
      else
        even = even && x.stride(i) == reach;
      reach = x.stride(i) * x.size(i);
    }
    if (even)
      stride = step;
    else
      tensor = torch::stable::contiguous(x);
  }
};

// activation(x W^T + bias) + residual, for checked arguments; `p` has what belongs to the weight, and the activation.
// Defined in int4.cu.
Tensor int4_product(const char* op, const Tensor& x, Int4Params& p, const OptTensor& perm, const OptTensor& bias,
                    const OptTensor& residual);

struct Int4Device {
  int sms = 1;
  bool has_wgmma = false, has_clusters = false;
};
const Int4Device& int4_device();  // the current one

// From so many rows on, Hopper's products, where they can be and pay.
constexpr int kInt4Few = 9;
// From so many rows on, weights in 16 bits and cuBLAS.
constexpr int kInt4Expand = 128, kInt4ExpandOffsets = 65;

// Whether int4_mma.cu, 32 outputs and rows a warp, has a warp or less for each SM, and little to do in each: there it
// is the fastest. 512 rows of 192 x 576 on an H200: 4.0 us, int4_many.cu 6.2; 192 of 576 x 1536: 5.9 for 8.4.
inline bool int4_is_small(const Int4Params& p, int sms) {
  const int64_t blocks = (p.n + kInt4Block - 1) / kInt4Block;
  return !p.offsets && p.k <= 2048 && blocks * ((p.m + 31) / 32) <= sms;
}

// Tensor cores, for __half and __nv_bfloat16; one unit of int4_mma.cu each.
template <class T>
void launch_int4_mma(const Int4Params& p, cudaStream_t stream);
template <class T>
void launch_int8_mma(const Int4Params& p, cudaStream_t stream);  // of 8 bits; int8_mma.cu
// Hopper's, for up to 64 rows: false where it cannot, or does not pay. Units of int4_few.cu.
template <class T>
bool launch_int4_few(const Int4Params& p, cudaStream_t stream);
// The same for more rows, kInt4Many and up. `like`: a tensor on the device. Units of int4_many.cu.
template <class T>
bool launch_int4_many(const Int4Params& p, const Tensor& like, cudaStream_t stream);
constexpr int kInt4Many = 65;
// Hopper's for weights of 8 bits (bytes), and those of 4 with offsets; false where it cannot. Units of packed_wgmma.cu.
template <class T>
bool launch_packed_wgmma(const Int4Params& p, bool bytes, const Tensor& like, cudaStream_t stream);
constexpr int kPackedWgmma = 17, kPackedExpand = 1536;  // from so many rows on, and up to those
// Whether they can read x as it is: rows of whole slices, in 16-byte vectors.
inline bool int4_reads(const void* x, int64_t x_stride, int64_t k) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0 && x_stride % 8 == 0 && k % kInt4Block == 0;
}

}  // namespace pagedkv
