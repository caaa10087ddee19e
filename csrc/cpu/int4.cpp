// int4_repack, int4_dequantize, int4_linear; see torch_pagedkv/ops/int4.py, and int4_kernel.inl for the algorithm.

#include <cstring>

#include "packed_linear.h"
#include "simd.h"
#include "tensors.h"

namespace pagedkv {
namespace {

const Int4Kernels& kernels() {
  static const Int4Kernels* const table = [] {
#if defined(__x86_64__)
    if (cpu_isa() >= Isa::kAvx512Bf16) return &int4_avx512bf16;
    if (cpu_isa() >= Isa::kAvx512) return &int4_avx512;
    if (cpu_isa() >= Isa::kAvx2) return &int4_avx2;
#endif
    return &int4_generic;
  }();
  return *table;
}

Tensor int4_repack(Tensor q) {
  check_int4_repack(q);
  const int64_t n = q.size(0), k = q.size(1), words = ceil_div(k, kInt4Block) * (kInt4Block / kInt4Word);
  const int64_t sizes[] = {ceil_div(n, kInt4Block), words, kInt4Block};
  Tensor packed = new_tensor(sizes, 3, aoti_torch_dtype_int32());
  uint32_t* out = reinterpret_cast<uint32_t*>(packed.mutable_data_ptr<int32_t>());
  const Tensor dense = torch::stable::contiguous(q);
  const uint8_t* in = dense.const_data_ptr<uint8_t>();
  split(sizes[0], kInt4Block * k, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      for (int64_t j = 0; j < words; ++j)
        for (int64_t c = 0; c < kInt4Block; ++c) {
          const int64_t row = b * kInt4Block + c;
          uint32_t word = 0;
          for (int64_t i = 0, at = j * kInt4Word; i < kInt4Word && row < n && at + i < k; ++i)
            word |= uint32_t((in[row * k + at + i] ^ 8) & 15) << int4_shift(int(i));
          out[(b * words + j) * kInt4Block + c] = word;
        }
  });
  return packed;
}

// perm's entries have to be -1 or inputs of x.
const int32_t* check_perm(const char* op, const OptTensor& perm, int64_t inputs) {
  if (!perm.has_value()) return nullptr;
  const int32_t* p = perm->const_data_ptr<int32_t>();
  const int64_t count = perm->size(0);
  bool ok = true;
  for (int64_t i = 0; i < count; ++i) ok &= p[i] >= -1 && p[i] < inputs;
  for (int64_t i = 0; !ok && i < count; ++i)
    PAGEDKV_CHECK(p[i] >= -1 && p[i] < inputs, op, "perm", "index " << p[i] << " at " << i, "-1 (padding) <= index < ",
                  inputs);
  return p;
}

template <class T, class S>
void dequantize(const Tensor& packed, const Tensor& scales, const OptTensor& zeros, const OptTensor& offsets,
                const int32_t* perm, int64_t group, int64_t k, int64_t in_features, Tensor& w) {
  const int64_t n = scales.size(1), words = packed.size(1);
  const uint32_t* in = static_cast<const uint32_t*>(packed.const_data_ptr());
  const S* scale = static_cast<const S*>(scales.const_data_ptr());
  const uint8_t* zero = zeros.has_value() ? zeros->const_data_ptr<uint8_t>() : nullptr;
  const S* offset = offsets.has_value() ? static_cast<const S*>(offsets->const_data_ptr()) : nullptr;
  T* out = static_cast<T*>(w.mutable_data_ptr());
  split(n, k, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (perm) std::fill_n(out + row * in_features, in_features, T(0.f));
      for (int64_t i = 0; i < k; ++i) {
        const uint32_t word = in[(row / kInt4Block * words + i / kInt4Word) * kInt4Block + row % kInt4Block];
        const int q = int((word >> int4_shift(int(i % kInt4Word)) & 15) ^ 8);
        const int64_t at = i / group * n + row, to = perm ? perm[i] : i;
        if (to < 0) continue;
        const float s = float(scale[at]);
        const float value = offset ? float(double(s) * q + double(float(offset[at])))  // the product is exact
                                   : s * float(q - (zero ? zero[at] : 8));
        out[row * in_features + to] = T(value);
      }
    }
  });
}

Tensor int4_dequantize(Tensor packed, Tensor scales, OptTensor zeros, OptTensor offsets, OptTensor perm,
                       int64_t group_size, int64_t in_features, ScalarType dtype) {
  check_int4_dequantize(packed, scales, zeros, offsets, perm, group_size, in_features, dtype);
  const int32_t* order = check_perm("int4_dequantize", perm, in_features);
  const int64_t sizes[] = {scales.size(1), in_features}, k = order ? perm->size(0) : in_features;
  Tensor w = torch::stable::new_empty(scales, {sizes, 2}, dtype);
  dispatch_float(dtype, "int4_dequantize", [&](auto to) {
    dispatch_float(scales.scalar_type(), "int4_dequantize", [&](auto from) {
      dequantize<decltype(to), decltype(from)>(packed, scales, zeros, offsets, order, group_size, k, in_features, w);
    });
  });
  return w;
}

// The longest chunk that divides the groups. Of bytes a block: sums of 128 products in a row had up to 2.9 times the
// largest error of PyTorch's in float32.
int64_t chunk_of(int64_t group, int64_t k, WeightBits bits) {
  int64_t chunk = bits == kEightBits ? kInt4Block : kInt4Chunk;
  if (group >= k) return chunk;
  while (group % chunk) chunk -= kInt4Block;
  return chunk;
}

Tensor int4_linear(Tensor x, Tensor packed, Tensor scales, OptTensor zeros, OptTensor offsets, OptTensor perm,
                   OptTensor bias, OptTensor residual, int64_t group_size, int64_t in_features,
                   std::string activation) {
  const int act = check_int4_linear(x, packed, scales, zeros, offsets, perm, bias, residual, group_size, in_features,
                                    activation, kPackedActivations);
  const int32_t* order = check_perm("int4_linear", perm, in_features);
  Int4Scales s{};
  s.scales = scales.const_data_ptr();
  s.zeros = zeros.has_value() ? zeros->const_data_ptr<uint8_t>() : nullptr;
  s.offsets = offsets.has_value() ? offsets->const_data_ptr() : nullptr;
  s.dtype = row_type(scales);
  s.n = scales.size(1), s.group = group_size;
  return packed_linear(x, packed, kFourBits, s, order, order ? perm->size(0) : in_features, bias, residual,
                       kPackedActs[act]);
}

}  // namespace

Tensor packed_linear(const Tensor& x, const Tensor& packed, WeightBits bits, const Int4Scales& s, const int32_t* order,
                     int64_t k, const OptTensor& bias, const OptTensor& residual, Act act) {
  const int type = row_type(x);
  const auto x_sizes = x.sizes();
  std::vector<int64_t> sizes(x_sizes.begin(), x_sizes.end());
  sizes.back() = s.n;
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  Tensor y = new_tensor(sizes.data(), int64_t(sizes.size()), dtype);

  const Rows in(x);
  const int64_t item = kRowTypeSize[type];
  OptTensor added = residual;
  if (added.has_value() && !added->is_contiguous()) added = torch::stable::contiguous(*added);
  Int4Task task{};
  task.packed = static_cast<const uint32_t*>(packed.const_data_ptr());
  task.s = s;
  task.k_padded = ceil_div(k, kInt4Block) * kInt4Block, task.chunk = chunk_of(s.group, k, bits);
  task.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  task.activate = rows().activate[kFloat32], task.act = act;
  const char* const residuals = added.has_value() ? static_cast<const char*>(added->const_data_ptr()) : nullptr;
  char* const out = static_cast<char*>(y.mutable_data_ptr());
  if (in.count == 0 || s.n == 0) return y;

  const bool sums = s.zeros || s.offsets;
  const int64_t most = std::min(in.count, kInt4Rows), chunks = ceil_div(task.k_padded, task.chunk);
  const int64_t x_bytes = ceil_div(most * task.k_padded * kernels().x_bytes[type], 64) * 64;
  thread_local std::vector<char> memory;  // grows to the largest layer, then stays
  memory.resize(size_t(x_bytes + (sums ? most * chunks * int64_t(sizeof(float)) : 0) + 64));
  char* const scratch = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  float* const scratch_sums = sums ? reinterpret_cast<float*>(scratch + x_bytes) : nullptr;
  task.x = scratch, task.sums = scratch_sums;

  for (int64_t first = 0; first < in.count; first += kInt4Rows) {
    task.rows = std::min(kInt4Rows, in.count - first);
    task.y = out + first * task.s.n * item;
    task.residual = residuals ? residuals + first * task.s.n * item : nullptr;
    split(task.rows, k, [&](int64_t begin, int64_t end) {
      std::vector<char> gathered(order ? size_t(k * item) : 0);
      for (int64_t r = begin; r < end; ++r) {
        const char* row = in[first + r];
        if (order) {
          for (int64_t i = 0; i < k; ++i) {
            char* to = gathered.data() + i * item;
            if (order[i] < 0)
              std::memset(to, 0, size_t(item));
            else
              std::memcpy(to, row + order[i] * item, size_t(item));
          }
          row = gathered.data();
        }
        kernels().pack[type](task, row, k, r, scratch, scratch_sums);
      }
    });
    constexpr int64_t kBlocks = 2;  // of outputs, to a thread at a time: what the widest kernel takes at once
    const int64_t blocks = packed.size(0);
    split(ceil_div(blocks, kBlocks), kBlocks * kInt4Block * k * task.rows,
          [&](int64_t b, int64_t e) { kernels().run[bits][type](task, b * kBlocks, std::min(e * kBlocks, blocks)); });
  }
  return y;
}

}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CPU, m) {
  PAGEDKV_IMPL(m, int4_repack, pagedkv::int4_repack);
  PAGEDKV_IMPL(m, int4_dequantize, pagedkv::int4_dequantize);
  PAGEDKV_IMPL(m, int4_linear, pagedkv::int4_linear);
}
