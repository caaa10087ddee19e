// The layout of packed 4-bit weights: one for every CPU and GPU, so that `.to()` and files move it as it is.
//
// Weights q [N, K] of 0..15, N outputs and K inputs, are padded to multiples of 32 with q = 8 and stored as 32-bit
// words
//
//     packed int32 [ceil(N / 32), 4 ceil(K / 32), 32]
//
// Word (b, j, c) holds output n = 32 b + c and the eight inputs k = 8 j .. 8 j + 7, each as the 4-bit two's complement
// of q - 8 (which is q ^ 8). Input 8 j + i is in bits 4 nibble(i) and the three above:
//
//     bits    28  24  20  16 | 12   8   4   0
//     input    7   5   3   1 |  6   4   2   0
//
// Shifted right by 4 i, the low nibbles of the two halves are so the neighbours 2 i and 2 i + 1: a pair of 16-bit
// numbers, as the products of a CPU (vdpbf16ps) and of a tensor core take them.
//
// A CPU's vector holds 16 (8, 4) outputs for the same eight inputs, so it walks along K without a sum over lanes, and
// scales [G, N] are vectors as they stand. On a GPU lane 4 g + t of a warp reads the 16 bytes of words c = 4 g .. 4 g +
// 3 in row j = 4 i + t: eight inputs of four outputs, which are the weight fragments of mma.m16n8k16 for 32 outputs and
// 32 inputs, if inputs are renamed (lane t's are 8 t .. 8 t + 7 of the 32) and outputs too (4 g + c is row g of part
// c). The activations of lane (g, t) are then 16 consecutive bytes as well, and so are the outputs.
//
// Weights of 8 bits lie in the same blocks, four inputs to a word:
//
//     packed int32 [ceil(N / 32), 8 ceil(K / 32), 32]
//
// Word (b, j, c) holds output n = 32 b + c and inputs k = 4 j .. 4 j + 3 in its bytes, lowest first, two's complement,
// 0 where padded.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define PAGEDKV_BOTH __host__ __device__
#else
#define PAGEDKV_BOTH
#endif

namespace pagedkv {

constexpr int kInt4Block = 32;  // outputs of a block, inputs that K is padded to
constexpr int kInt4Word = 8;    // inputs of a word
constexpr int kInt8Word = 4;

// GGUF's Q4_K: a super-block of a row is 8 groups of 32 inputs in 144 bytes, see torch_pagedkv/ops/q4k.py.
constexpr int kQ4KGroups = 8, kQ4KInputs = 256, kQ4KBytes = 144;

// The first bit of input 8 j + i in its word.
PAGEDKV_BOTH constexpr int int4_shift(int i) { return 4 * (i / 2 + i % 2 * 4); }
// The same of 8 bits: of input 4 j + i.
PAGEDKV_BOTH constexpr int int8_shift(int i) { return 8 * i; }

// The 6-bit scale and minimum of group j in the 12 bytes of a super-block: groups 0 .. 3 have bytes j and j + 4, whose
// two upper bits are those of groups 4 .. 7, which have their lower four in the nibbles of byte j + 4.
PAGEDKV_BOTH inline void q4k_scale(const uint8_t* bytes, int j, uint8_t* scale, uint8_t* min) {
  if (j < 4) {
    *scale = bytes[j] & 63, *min = bytes[j + 4] & 63;
  } else {
    *scale = uint8_t((bytes[j + 4] & 15) | (bytes[j - 4] >> 6 << 4));
    *min = uint8_t((bytes[j + 4] >> 4) | (bytes[j] >> 6 << 4));
  }
}
// Number i of 0 .. 255 in the 128 bytes behind them: 32 bytes have group 2 j in their lower nibbles, 2 j + 1 above.
PAGEDKV_BOTH inline int q4k_number(const uint8_t* bytes, int i) {
  return bytes[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
}

}  // namespace pagedkv
