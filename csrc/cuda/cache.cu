// The blocks of a paged KV cache: write, copy, swap, gather (contract: torch_pagedkv/ops/cache.py).
//
// reshape_and_cache  a group of lanes a (token, head), eight elements a lane, K and V in the same thread so that both
//                    loads are in flight; the scale of a quantised row is reduced over the group.
// copy_blocks        one grid of (pair, 4 KiB piece) x cache; the caches' pointers travel in the kernel's parameters.
// swap_blocks        on one GPU, and between a GPU and pinned (mapped) host memory, one kernel with the pairs in its
//                    parameters (200, or 2000 where the driver takes as many): nothing has to outlive the call, and
//                    small blocks do not pay a copy command each. Runs of adjacent blocks that are long go to the copy
//                    engine instead, and so does everything whose host side is pageable (which is synchronous with the
//                    host, as CUDA defines it) or on another GPU.
// gather_cache       a block owns 8 output tokens, finds their sequences in the (out_start, seq_lens) list, and copies;
//                    rows of no sequence become 0 in the same pass.
//
// Floor: bytes read and written / 4.28 TB/s; host transfers 55 GB/s each way (PCIe 5 x16). Measured, 8 heads of 128:
// 16384 tokens to an int8 cache 26.9 us (102 MB, 23.9; one chunk a lane: 29.8), as they are 34.9 (134 MB, 31.4);
// gathered, 8 x 4096 from int8 55.9 (203 MB, 47.5; with single-byte conversions, a branch around each load,
// divisions: 63.2); 64 blocks copied in 64 caches 68.9 (268 MB, 62.7).
//
// Both ways at once, H200, 1024 scattered blocks of 32 KiB each way (GB/s, both together; beside products that fill the
// GPU): one long copy each way, by the copy engines, 101 (101). These kernels, blocks of one warp with 32 registers,
// which fit beside a matrix product: 81 (79), each way alone 52 (45 out of the GPU, 49 into it). Posted writes that
// wait for the bus hold up the requests of reads, so those that write keep below its rate while others read: at 40 GB/s
// 79, 43 81, 45 76, 47 70, 49 69, as fast as they can 66. A write of 128 bytes and the request of such a read have 24
// more each, which leaves little above 41 GB/s each way. Tried: fewer warps that write instead (12 to 16: 80, but 40 to
// 45 beside products; 32: 70, 72), their sources prefetched into L2 (no better), 200 or 264 warps that read (80, but 38
// to 78 beside products), a stream of high priority (no better), a cudaMemcpyBatchAsync each way (46 (44), 59 (55) in
// four streams each way: 1 us of the engine a block, 0.4 of the host; it takes neither the legacy default stream nor a
// capture), one way by it and one by these kernels (52 to 62), a cudaMemcpyAsync a block (13), bulk copies through
// shared memory (79, but 22 to 38 beside products, where they find no room), a launch for each 200 pairs (34 beside
// products: each waits for its SMs).
#include "quantize.cuh"

namespace pagedkv {
namespace {

constexpr int kBlock = 256;

// reshape_and_cache --------------------------------------------------------------------------------------------------

constexpr int64_t kManyChunks = 1 << 18;  // twice the threads that are on the device at once

struct WriteParams {
  const void* key;  // [T, Hkv, D], unit stride in D
  const void* value;
  int64_t key_stride_token, key_stride_head, value_stride_token, value_stride_head;
  CacheView key_cache, value_cache;
  CacheShape shape;
  const int64_t* slots;  // [T]
  int64_t rows;          // T * Hkv
  Divisor heads;         // Hkv
  int chunks;            // of 8 elements in one of the N parts of a row
};

// block (lanes of a row, rows), N chunks of the row of K and of V a lane, one in each N-th of it. One row a thread: two
// cost the smallest batches 0.8 us and gave nothing.
template <class T, class C, bool Aligned, int N>
__global__ void __launch_bounds__(kBlock) write_kernel(const __grid_constant__ WriteParams p) {
  release_next();
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int lane = threadIdx.x;
  const Quotient token = divide(row, p.heads);
  const bool live = row < p.rows && lane < p.chunks;
  wait_for_previous();
  const int apart = p.chunks * kChunk;
  // Whatever the slot, so that its load and these are in flight together.
  const int64_t slot = live ? p.slots[token.q] : -1;
  Vec<T, kChunk> x[2][N];
  const auto load = [&](Vec<T, kChunk>(&to)[N], const void* tensor, int64_t stride_token, int64_t stride_head) {
    const T* const from =
        static_cast<const T*>(tensor) + token.q * stride_token + token.r * stride_head + lane * kChunk;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if constexpr (Aligned) {
        to[n] = load_or_zero<T, kChunk>(from + n * apart, live);
      } else {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) to[n].v[i] = live ? from[n * apart + i] : from_float<T>(0.f);
      }
    }
  };
  load(x[0], p.key, p.key_stride_token, p.key_stride_head);
  load(x[1], p.value, p.value_stride_token, p.value_stride_head);
  RowScale scales[2];
  row_scales<C>(x, blockDim.x, scales);
  if (slot < 0 || slot >= p.shape.slots) return;
  const int head = int(token.r);
  write_row<C>(p.key_cache, p.shape, slot, head, lane, x[0], apart, scales[0]);
  write_row<C>(p.value_cache, p.shape, slot, head, lane, x[1], apart, scales[1]);
}

// gather_cache -------------------------------------------------------------------------------------------------------

struct GatherParams {
  CacheView key_cache, value_cache;
  CacheShape shape;
  int64_t num_blocks;
  const int* tables;  // [S, max_blocks]
  int64_t table_stride;
  int max_blocks;
  const int* seq_lens;   // [S]
  const int* out_start;  // [S]
  int sequences;
  void* key;  // [total, Hkv, D]
  void* value;
  int64_t total;
  Divisor chunks, row;  // chunks of 8 elements: of a head, of a token
};

constexpr int kGatherTokens = 8;

// A chunk as it lies in the cache, and its scale; zeros where `slot` is negative. Loads under no branch: those of
// several chunks are in flight together.
template <class C>
struct Stored {
  Vec<C, kChunk> x;
  float scale;
};
template <class C>
__device__ __forceinline__ Stored<C> read_chunk(const CacheView& c, const CacheShape& s, int64_t slot, int head,
                                                int chunk) {
  const bool valid = slot >= 0;
  const int64_t at = valid ? slot : 0;
  Stored<C> y;
  y.x = load_or_zero<C, kChunk>(static_cast<const C*>(c.data) + cache_offset(c, s, at, head) + chunk * kChunk, valid);
  if constexpr (kQuantized<C>) y.scale = valid ? c.scale[at * s.heads + head] : 0.f;
  return y;
}
template <class C, class T>
__device__ __forceinline__ Vec<T, kChunk> restore(const Stored<C>& y) {
  if constexpr (std::is_same_v<C, T>) {
    return y.x;
  } else {
    float v[kChunk];
    to_floats(y.x, v);
    if constexpr (kQuantized<C>) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) v[i] *= y.scale;
    }
    return from_floats<T, kChunk>(v);
  }
}

template <class C, class T>
__global__ void __launch_bounds__(kBlock) gather_kernel(const __grid_constant__ GatherParams p) {
  begin_kernel();
  __shared__ int owner[kGatherTokens];      // the sequence of each output token, -1: none
  __shared__ int64_t slots[kGatherTokens];  // where it lies in the cache, -1: nowhere
  const int64_t first = int64_t(blockIdx.x) * kGatherTokens;
  const int tid = threadIdx.x;
  const int64_t capacity = int64_t(p.max_blocks) << p.shape.block_shift;
  if (tid < kGatherTokens) owner[tid] = -1;
  __syncthreads();
  for (int s = tid; s < p.sequences; s += kBlock) {
    const int64_t start = p.out_start[s], end = start + min(int64_t(p.seq_lens[s]), capacity);
    for (int64_t t = max(start, first); t < min(end, first + kGatherTokens); ++t) atomicMax(&owner[t - first], s);
  }
  __syncthreads();
  if (tid < kGatherTokens) {
    const int s = owner[tid];
    int64_t slot = -1;
    if (s >= 0) {
      const int64_t position = first + tid - p.out_start[s];
      const int64_t block = p.tables[s * p.table_stride + (position >> p.shape.block_shift)];
      if (block >= 0 && block < p.num_blocks) slot = (block << p.shape.block_shift) + (position & p.shape.block_mask);
    }
    slots[tid] = slot;
  }
  __syncthreads();
  const int row = int(p.row.d);
  const int tokens = int(min(int64_t(kGatherTokens), p.total - first));
  T* const key = static_cast<T*>(p.key) + first * row * kChunk;
  T* const value = static_cast<T*>(p.value) + first * row * kChunk;
#pragma unroll 2
  for (int i = tid; i < tokens * row; i += kBlock) {
    const Quotient token = divide(i, p.row), head = divide(token.r, p.chunks);
    const int64_t slot = slots[token.q];
    const Stored<C> k = read_chunk<C>(p.key_cache, p.shape, slot, int(head.q), int(head.r));
    const Stored<C> v = read_chunk<C>(p.value_cache, p.shape, slot, int(head.q), int(head.r));
    store_vec<T, kChunk>(key + int64_t(i) * kChunk, restore<C, T>(k));
    store_vec<T, kChunk>(value + int64_t(i) * kChunk, restore<C, T>(v));
  }
}

// whole blocks -------------------------------------------------------------------------------------------------------

constexpr int kUnroll = 4;
template <int kThreads>
constexpr int64_t kPiece = kThreads * kUnroll * kVectorBytes;  // bytes that so many threads move at once

// Bytes [piece * kPiece, ...) of a block, in words of W.
template <int kThreads, class W>
__device__ __forceinline__ void copy_piece(const char* src, char* dst, int64_t bytes, int64_t piece) {
  constexpr int64_t size = kPiece<kThreads>;
  const int64_t first = piece * size / int64_t(sizeof(W));
  const W* const from = reinterpret_cast<const W*>(src) + first;
  W* const to = reinterpret_cast<W*>(dst) + first;
  const int count = int(min(bytes - piece * size, size) / int64_t(sizeof(W)));
  constexpr int step = kThreads * kUnroll;
  for (int i = threadIdx.x; i < count; i += step) {
    W part[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (i + u * kThreads < count) {
        part[u] = from[i + u * kThreads];
      }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (i + u * kThreads < count) {
        to[i + u * kThreads] = part[u];
      }
  }
}
// f is called with a word of so many bytes.
template <class F>
__device__ __forceinline__ void with_word(int width, F&& f) {
  switch (width) {
    case 16:
      return f(uint4{});
    case 8:
      return f(uint2{});
    case 4:
      return f(uint32_t{});
    case 2:
      return f(uint16_t{});
    default:
      return f(uint8_t{});
  }
}
template <int kThreads>
__device__ __forceinline__ void copy_piece(const char* src, char* dst, int64_t bytes, int64_t piece, int width) {
  with_word(width, [&](auto word) { copy_piece<kThreads, decltype(word)>(src, dst, bytes, piece); });
}
// The widest word that divides all of these: addresses and sizes.
int word_width(std::initializer_list<uint64_t> values) {
  uint64_t all = kVectorBytes;
  for (uint64_t v : values) all |= v;
  return int(all & -all);  // the lowest set bit
}
int word_width(const void* a, const void* b, int64_t bytes) {
  return word_width({reinterpret_cast<uintptr_t>(a), reinterpret_cast<uintptr_t>(b), uint64_t(bytes)});
}
int64_t block_bytes(const Tensor& cache) {
  int64_t n = int64_t(cache.element_size());
  for (int64_t i = 1; i < cache.dim(); ++i) n *= cache.size(i);
  return n;
}

// copy_blocks: 128 caches a launch keep the parameters below the 4 KiB that every GPU and driver takes
struct CopyCache {
  char* data;
  int64_t bytes;  // of a block
  int64_t blocks;
  int width;
};
struct CopyParams {
  static constexpr int kCaches = 120;
  const int64_t* pairs;  // [N, 2] on the device
  Divisor pieces;        // of the largest block
  CopyCache caches[kCaches];
};
static_assert(sizeof(CopyParams) <= 4096);

// Bytes [piece * kCopyPiece, ...) of a block: 16 of them a thread, which neither the next block nor anyone else reads
// soon (64 pairs: 67.9 us, for 69.5 with pieces of 16 KiB; a single one 2.8 for 3.2).
constexpr int64_t kCopyPiece = kBlock * kVectorBytes;
template <class W>
__device__ __forceinline__ void copy_words(const char* src, char* dst, int64_t bytes, int64_t piece) {
  const int64_t first = piece * kCopyPiece;
  const W* const from = reinterpret_cast<const W*>(src + first);
  W* const to = reinterpret_cast<W*>(dst + first);
  const int count = int(min(bytes - first, kCopyPiece) / int64_t(sizeof(W)));
  for (int i = threadIdx.x; i < count; i += kBlock) {
    if constexpr (sizeof(W) == kVectorBytes)
      __stcs(to + i, __ldcs(from + i));
    else
      to[i] = from[i];
  }
}

__global__ void __launch_bounds__(kBlock) copy_kernel(const __grid_constant__ CopyParams p) {
  begin_kernel();
  const CopyCache& c = p.caches[blockIdx.y];
  const Quotient at = divide(int64_t(blockIdx.x), p.pieces);  // pair, piece
  if (at.r * kCopyPiece >= c.bytes) return;
  const int64_t from = p.pairs[2 * at.q], to = p.pairs[2 * at.q + 1];
  if (from < 0 || from >= c.blocks || to < 0 || to >= c.blocks || from == to) return;
  with_word(c.width, [&](auto word) {
    copy_words<decltype(word)>(c.data + from * c.bytes, c.data + to * c.bytes, c.bytes, at.r);
  });
}

// swap_blocks
struct SwapPair {
  int64_t from, to;
};
struct SwapCall {
  const char* src;
  char* dst;
  int64_t bytes;   // of a block
  Divisor pieces;  // of a block
  int count;       // of pairs
  int interval;    // ns from a piece of a warp to its next, see host_swap_kernel
};
template <int kPairs>
struct SwapParams : SwapCall {
  SwapPair pairs[kPairs];
};
// Parameters of any GPU and driver, and of drivers since CUDA 12.1.
constexpr int kPairs = 200, kMostPairs = 2000;
static_assert(sizeof(SwapParams<kPairs>) <= 4096 && sizeof(SwapParams<kMostPairs>) <= 32764);

__global__ void __launch_bounds__(kBlock)
    swap_kernel(const __grid_constant__ SwapParams<kPairs> p, const __grid_constant__ int width) {
  begin_kernel();
  const Quotient at = divide(int64_t(blockIdx.x), p.pieces);
  const SwapPair pair = p.pairs[at.q];
  copy_piece<kBlock>(p.src + pair.from * p.bytes, p.dst + pair.to * p.bytes, p.bytes, at.r, width);
}

__device__ int host_readers;  // warps that read the host's memory just now

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// Over the bus: blocks of one warp, with few registers. While others read, those that write keep below the bus's rate:
// posted writes that wait for it hold up the requests of reads.
template <class W, int kPairs, bool kOut>
__global__ void __maxnreg__(32) host_swap_kernel(const __grid_constant__ SwapParams<kPairs> p) {
  begin_kernel();
  const int pieces = int(p.pieces.d);
  if (!kOut && threadIdx.x == 0) atomicAdd(&host_readers, 1);
  uint64_t next = nanoseconds() + uint64_t(p.interval) * blockIdx.x / gridDim.x;
  int pair = 0;
  for (int piece = blockIdx.x;; piece += gridDim.x) {
    for (; piece >= pieces; piece -= pieces) ++pair;
    if (pair >= p.count) break;
    if (kOut) {
      while (*const_cast<volatile int*>(&host_readers) > 0 && int64_t(nanoseconds() - next) < 0) {
      }
      next = max(next, nanoseconds() - p.interval) + p.interval;
    }
    copy_piece<32, W>(p.src + p.pairs[pair].from * p.bytes, p.dst + p.pairs[pair].to * p.bytes, p.bytes, piece);
  }
  if (!kOut && threadIdx.x == 0) atomicAdd(&host_readers, -1);
}

template <int kPairs, bool kOut>
auto host_swap(int width) -> void (*)(SwapParams<kPairs>) {
  switch (width) {
    case 16:
      return host_swap_kernel<uint4, kPairs, kOut>;
    case 8:
      return host_swap_kernel<uint2, kPairs, kOut>;
    case 4:
      return host_swap_kernel<uint32_t, kPairs, kOut>;
    case 2:
      return host_swap_kernel<uint16_t, kPairs, kOut>;
    default:
      return host_swap_kernel<uint8_t, kPairs, kOut>;
  }
}

// All pairs, as many as parameters hold at a time: launch(parameters).
template <int kPairs, class F>
void each_pairs(const SwapCall& call, const SwapPair* map, int64_t pairs, F&& launch) {
  SwapParams<kPairs> p{call};
  for (int64_t first = 0; first < pairs; first += kPairs) {
    p.count = int(std::min(pairs - first, int64_t(kPairs)));
    std::copy(map + first, map + first + p.count, p.pairs);
    launch(p);
  }
}

// The address under which a kernel on the current device reaches all of the tensor, or null: pageable host memory.
char* mapped_address(const Tensor& x, int64_t bytes) {
  char* host = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
  char* mapped[2];
  for (int i = 0; i < 2; ++i) {
    cudaPointerAttributes a{};
    if (cudaPointerGetAttributes(&a, host + (i ? bytes - 1 : 0)) != cudaSuccess) {
      (void)cudaGetLastError();  // not an address that CUDA knows: no error of ours
      return nullptr;
    }
    if (a.type == cudaMemoryTypeUnregistered || a.devicePointer == nullptr) return nullptr;
    mapped[i] = static_cast<char*>(a.devicePointer);
  }
  return mapped[1] - mapped[0] == bytes - 1 ? mapped[0] : nullptr;
}

}  // namespace

void reshape_and_cache_cuda(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slot_mapping,
                            OptTensor k_scale, OptTensor v_scale) {
  const char* op = "reshape_and_cache";
  check_cache_write(op, key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale);
  const torch::stable::accelerator::DeviceGuard guard(key.get_device_index());
  if (key.numel() == 0 || key_cache.numel() == 0) return;
  WriteParams p{};
  p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();
  p.key_stride_token = key.stride(0);
  p.key_stride_head = key.stride(1);
  p.value_stride_token = value.stride(0);
  p.value_stride_head = value.stride(1);
  p.key_cache = cache_view(key_cache, k_scale);
  p.value_cache = cache_view(value_cache, v_scale);
  p.shape = cache_shape(key_cache);
  p.slots = slot_mapping.const_data_ptr<int64_t>();
  p.rows = key.size(0) * key.size(1);
  p.heads = key.size(1);
  const int chunks = int(key.size(2) / kChunk);
  const bool aligned = is_aligned(key, {0, 1}) && is_aligned(value, {0, 1});
  // What is quantised takes as long to work out as to move: two chunks a lane have 0.6 of the instructions of one.
  const bool pairs = aligned && chunks % 2 == 0 && p.rows * chunks >= kManyChunks;
  const cudaStream_t stream = current_stream(key);
  dispatch_cuda(key.scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    dispatch_cache<T>(key_cache.scalar_type(), [&](auto stored) {
      using C = decltype(stored);
      const auto run = [&](auto kernel, int parts) {
        p.chunks = chunks / parts;
        const unsigned lanes = row_lanes(p.chunks * kChunk);
        const dim3 block(lanes, kBlock / lanes);
        launch_kernel(kernel, ceil_div(p.rows, block.y), block, 0, stream, p);
      };
      if constexpr (kQuantized<C>) {
        if (pairs) return run(write_kernel<T, C, true, 2>, 2);
      }
      run(aligned ? write_kernel<T, C, true, 1> : write_kernel<T, C, false, 1>, 1);
    });
  });
}

Pair gather_cache_cuda(Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor seq_lens, Tensor out_start,
                       int64_t total_tokens, ScalarType dtype, OptTensor k_scale, OptTensor v_scale) {
  const char* op = "gather_cache";
  check_gather_cache(key_cache, value_cache, block_tables, seq_lens, out_start, total_tokens, dtype, k_scale, v_scale);
  const torch::stable::accelerator::DeviceGuard guard(key_cache.get_device_index());
  const int64_t heads = key_cache.size(2), head_dim = key_cache.size(3);
  Tensor key = torch::stable::new_empty(key_cache, {total_tokens, heads, head_dim}, dtype);
  Tensor value = torch::stable::new_empty(key_cache, {total_tokens, heads, head_dim}, dtype);
  if (key.numel() == 0) return {key, value};
  GatherParams p{};
  auto read_only = [](const Tensor& cache, const OptTensor& scale) {
    return CacheView{const_cast<void*>(cache.const_data_ptr()),
                     scale.has_value() ? const_cast<float*>(scale->const_data_ptr<float>()) : nullptr, cache.stride(0),
                     cache.stride(1), cache.stride(2)};
  };
  p.key_cache = read_only(key_cache, k_scale);
  p.value_cache = read_only(value_cache, v_scale);
  p.shape = cache_shape(key_cache);
  p.num_blocks = key_cache.size(0);
  p.tables = block_tables.const_data_ptr<int>();
  p.table_stride = block_tables.stride(0);
  p.max_blocks = int(block_tables.size(1));
  p.seq_lens = seq_lens.const_data_ptr<int>();
  p.out_start = out_start.const_data_ptr<int>();
  p.sequences = int(block_tables.size(0));
  p.key = key.mutable_data_ptr();
  p.value = value.mutable_data_ptr();
  p.total = total_tokens;
  p.chunks = head_dim / kChunk;
  p.row = heads * p.chunks.d;
  const cudaStream_t stream = current_stream(key_cache);
  dispatch_cuda(dtype, op, [&](auto tag) {
    using T = decltype(tag);
    auto run = [&](auto stored) {
      launch_kernel(gather_kernel<decltype(stored), T>, ceil_div(total_tokens, kGatherTokens), kBlock, 0, stream, p);
    };
    if (is_quantized(key_cache.scalar_type()))
      dispatch_cache<T>(key_cache.scalar_type(), run);
    else
      dispatch_cuda(key_cache.scalar_type(), op, run);
  });
  return {key, value};
}

void copy_blocks_cuda(std::vector<Tensor> caches, Tensor block_mapping) {
  check_copy_blocks(caches, block_mapping);
  const torch::stable::accelerator::DeviceGuard guard(block_mapping.get_device_index());
  const int64_t pairs = block_mapping.size(0);
  std::erase_if(caches, [](const Tensor& c) { return c.numel() == 0; });
  if (pairs == 0) return;
  const cudaStream_t stream = current_stream(block_mapping);
  for (size_t first = 0; first < caches.size(); first += CopyParams::kCaches) {
    CopyParams p{};
    int64_t pieces = 1;
    p.pairs = block_mapping.const_data_ptr<int64_t>();
    const size_t count = std::min(caches.size() - first, size_t(CopyParams::kCaches));
    for (size_t i = 0; i < count; ++i) {
      const Tensor& c = caches[first + i];
      const int64_t bytes = block_bytes(c);
      char* data = static_cast<char*>(c.mutable_data_ptr());
      p.caches[i] = {data, bytes, c.size(0), word_width(data, data, bytes)};
      pieces = std::max<int64_t>(pieces, ceil_div(bytes, kCopyPiece));
    }
    p.pieces = pieces;
    launch_kernel(copy_kernel, dim3(unsigned(pairs * pieces), unsigned(count)), kBlock, 0, stream, p);
  }
}

void swap_blocks_cuda(Tensor src, Tensor dst, Tensor block_mapping) {
  check_swap_blocks(src, dst, block_mapping);
  const int64_t pairs = block_mapping.size(0), bytes = block_bytes(src);
  if (pairs == 0 || bytes == 0) return;
  const Tensor& device = dst.is_cuda() ? dst : src;
  const torch::stable::accelerator::DeviceGuard guard(device.get_device_index());
  const cudaStream_t stream = current_stream(device);
  const SwapPair* map = reinterpret_cast<const SwapPair*>(block_mapping.const_data_ptr<int64_t>());
  const char* from = static_cast<const char*>(src.const_data_ptr());
  char* to = static_cast<char*>(dst.mutable_data_ptr());

  // Runs of adjacent blocks on both sides.
  struct Run {
    int64_t from, to, blocks;
  };
  std::vector<Run> runs;
  for (int64_t i = 0; i < pairs; ++i) {
    if (!runs.empty() && map[i].from == runs.back().from + runs.back().blocks &&
        map[i].to == runs.back().to + runs.back().blocks)
      ++runs.back().blocks;
    else
      runs.push_back({map[i].from, map[i].to, 1});
  }

  const bool both = src.is_cuda() && dst.is_cuda();
  const char* kernel_from = from;
  char* kernel_to = to;
  if (both) {
    if (src.get_device_index() != dst.get_device_index()) kernel_from = nullptr;
  } else if (src.is_cuda()) {
    kernel_to = mapped_address(dst, dst.size(0) * bytes);
  } else {
    kernel_from = mapped_address(src, src.size(0) * bytes);
  }
  // From here on (5 us at 55 GB/s) a copy command's own cost is small, and the copy engine leaves the SMs alone.
  constexpr int64_t kLongRun = 256 << 10;
  const bool long_runs = !both && pairs * bytes >= kLongRun * int64_t(runs.size());
  if (kernel_from == nullptr || kernel_to == nullptr || long_runs) {
    for (const Run& r : runs)
      STD_CUDA_CHECK(
          cudaMemcpyAsync(to + r.to * bytes, from + r.from * bytes, r.blocks * bytes, cudaMemcpyDefault, stream));
    return;
  }
  SwapCall call{kernel_from, kernel_to, bytes, int64_t(ceil_div(bytes, both ? kPiece<kBlock> : kPiece<32>))};
  const int width = word_width(kernel_from, kernel_to, bytes);
  if (both)
    return each_pairs<kPairs>(call, map, pairs, [&](const SwapParams<kPairs>& p) {
      launch_kernel(swap_kernel, unsigned(p.count * p.pieces.d), kBlock, 0, stream, p, width);
    });
  // Warps that saturate the bus, also beside a matrix product. Beside reads, so many GB/s: of a bus's 55 each way, 43
  // leave reads 41, 47 leave them 36.
  constexpr double kPace = 42;
  int warps = 0, driver = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&warps, cudaDevAttrMultiProcessorCount, device.get_device_index()));
  STD_CUDA_CHECK(cudaDriverGetVersion(&driver));
  const bool out = src.is_cuda();
  if (out) warps = std::max(1, warps / 2);
  const auto go = [&]<int kPairs>(std::integral_constant<int, kPairs>) {
    each_pairs<kPairs>(call, map, pairs, [&](SwapParams<kPairs>& p) {
      const int grid = int(std::min<int64_t>(p.count * p.pieces.d, warps));
      p.interval = int(double(kPiece<32>) * grid / kPace);
      launch_kernel((out ? host_swap<kPairs, true> : host_swap<kPairs, false>)(width), unsigned(grid), 32, 0, stream,
                    p);
    });
  };
  // One launch, where it can be: each waits for its SMs beside a product that fills the GPU.
  if (pairs > kPairs && driver >= 12010)
    go(std::integral_constant<int, kMostPairs>());
  else
    go(std::integral_constant<int, kPairs>());
}

}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CUDA, m) {
  PAGEDKV_IMPL(m, reshape_and_cache, pagedkv::reshape_and_cache_cuda);
  PAGEDKV_IMPL(m, copy_blocks, pagedkv::copy_blocks_cuda);
  PAGEDKV_IMPL(m, swap_blocks, pagedkv::swap_blocks_cuda);
  PAGEDKV_IMPL(m, gather_cache, pagedkv::gather_cache_cuda);
}
