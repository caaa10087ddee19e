// q4k_repack, q4k_dequantize, q4k_linear (contract: torch_pagedkv/ops/q4k.py; layouts: int4.h).
//
// The product is int4_linear's, whose kernels take a scale and an offset of each group: here the exact products of a
// float16 and a 6-bit number, made when a group begins. Repacking and dequantising are one thread an output word or
// weight.
#include "int4.h"
#include "reduce.cuh"

namespace pagedkv {
namespace {

constexpr int kThreads = 256;

struct Q4K {
  uint32_t* packed;  // [blocks][k / 8][32]
  uint8_t *scales, *mins;
  __half *d, *dmin;
  int64_t n, supers;
};

// One thread a word; the first of a group writes its scale, the first of a super-block d and dmin.
__global__ void __launch_bounds__(kThreads) repack_kernel(const uint8_t* blocks, int64_t count, const Q4K p) {
  constexpr int kWords = kQ4KInputs / kInt4Word;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t words = p.supers * kWords, c = i % kInt4Block, j = i / kInt4Block % words;
  const int64_t row = i / kInt4Block / words * kInt4Block + c, super = j / kWords;
  uint32_t word = 0;
  if (row < p.n) {
    const uint8_t* const block = blocks + (row * p.supers + super) * kQ4KBytes;
    const int first = int(j % kWords) * kInt4Word, group = first / kInt4Block;
#pragma unroll
    for (int e = 0; e < kInt4Word; ++e) word |= (uint32_t(q4k_number(block + 16, first + e)) ^ 8u) << int4_shift(e);
    if (first % kInt4Block == 0) {
      const int64_t at = (super * kQ4KGroups + group) * p.n + row;
      q4k_scale(block + 4, group, p.scales + at, p.mins + at);
    }
    if (first == 0) {
      p.d[super * p.n + row] = __ushort_as_half(uint16_t(block[0] | block[1] << 8));
      p.dmin[super * p.n + row] = __ushort_as_half(uint16_t(block[2] | block[3] << 8));
    }
  }
  p.packed[i] = word;
}

template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const Q4K p, T* w) {
  const int64_t k = p.supers * kQ4KInputs, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.n * k) return;
  const int64_t row = i / k, in = i % k;
  const uint32_t word = p.packed[(row / kInt4Block * (k / kInt4Word) + in / kInt4Word) * kInt4Block + row % kInt4Block];
  const int q = int((word >> int4_shift(int(in % kInt4Word))) & 15u) ^ 8;
  const int64_t at = in / kInt4Block * p.n + row, super = in / kQ4KInputs * p.n + row;
  const double high = double(to_float(p.d[super])) * p.scales[at] * q;  // exact, as low is
  const double low = double(to_float(p.dmin[super])) * p.mins[at];
  w[i] = from_float<T>(float(high - low));
}

}  // namespace

Q4KTensors q4k_repack_cuda(Tensor blocks) {
  check_q4k_repack(blocks);
  const torch::stable::accelerator::DeviceGuard guard(blocks.get_device_index());
  const int64_t n = blocks.size(0), supers = blocks.size(1) / kQ4KBytes, groups = supers * kQ4KGroups;
  Tensor packed = torch::stable::new_empty(blocks, {int64_t(ceil_div(n, kInt4Block)), 4 * groups, int64_t(kInt4Block)},
                                           ScalarType::Int);
  Tensor scales = torch::stable::new_empty(blocks, {groups, n}), mins = torch::stable::new_empty(blocks, {groups, n});
  Tensor d = torch::stable::new_empty(blocks, {supers, n}, ScalarType::Half);
  Tensor dmin = torch::stable::new_empty(blocks, {supers, n}, ScalarType::Half);
  const Q4K p{static_cast<uint32_t*>(packed.mutable_data_ptr()),
              scales.mutable_data_ptr<uint8_t>(),
              mins.mutable_data_ptr<uint8_t>(),
              static_cast<__half*>(d.mutable_data_ptr()),
              static_cast<__half*>(dmin.mutable_data_ptr()),
              n,
              supers};
  const Tensor dense = torch::stable::contiguous(blocks);
  const int64_t count = packed.numel();
  if (count > 0) {
    repack_kernel<<<ceil_div(count, kThreads), kThreads, 0, current_stream(blocks)>>>(dense.const_data_ptr<uint8_t>(),
                                                                                      count, p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {packed, scales, mins, d, dmin};
}

Tensor q4k_dequantize_cuda(Tensor packed, Tensor scales, Tensor mins, Tensor d, Tensor dmin, ScalarType dtype) {
  check_q4k_dequantize(packed, scales, mins, d, dmin, dtype);
  const torch::stable::accelerator::DeviceGuard guard(scales.get_device_index());
  const Q4K p{static_cast<uint32_t*>(packed.mutable_data_ptr()),
              scales.mutable_data_ptr<uint8_t>(),
              mins.mutable_data_ptr<uint8_t>(),
              static_cast<__half*>(d.mutable_data_ptr()),
              static_cast<__half*>(dmin.mutable_data_ptr()),
              d.size(1),
              d.size(0)};
  Tensor w = torch::stable::new_empty(scales, {p.n, p.supers * kQ4KInputs}, dtype);
  if (w.numel() == 0) return w;
  dispatch_cuda(dtype, "q4k_dequantize", [&](auto tag) {
    using T = decltype(tag);
    const auto kernel = dequantize_kernel<T>;
    kernel<<<ceil_div(w.numel(), kThreads), kThreads, 0, current_stream(scales)>>>(
        p, static_cast<T*>(w.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return w;
}

Tensor q4k_linear_cuda(Tensor x, Tensor packed, Tensor scales, Tensor mins, Tensor d, Tensor dmin, OptTensor bias,
                       OptTensor residual, std::string activation) {
  Int4Params p{};
  p.act =
      kPackedActs[check_q4k_linear(x, packed, scales, mins, d, dmin, bias, residual, activation, kPackedActivations)];
  p.packed = static_cast<const uint32_t*>(packed.const_data_ptr());
  p.scales = d.const_data_ptr(), p.offsets = dmin.const_data_ptr(), p.scale_type = ScalarType::Half;
  p.sub_scales = scales.const_data_ptr<uint8_t>(), p.sub_mins = mins.const_data_ptr<uint8_t>();
  p.n = d.size(1), p.k = d.size(0) * kQ4KInputs, p.group = kInt4Block;
  return int4_product("q4k_linear", x, p, std::nullopt, bias, residual);
}

}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CUDA, m) {
  PAGEDKV_IMPL(m, q4k_repack, pagedkv::q4k_repack_cuda);
  PAGEDKV_IMPL(m, q4k_dequantize, pagedkv::q4k_dequantize_cuda);
  PAGEDKV_IMPL(m, q4k_linear, pagedkv::q4k_linear_cuda);
}
