// Kernels with one mistake each, by name: what the emulated device must notice (tests/test_emulated_cuda.py).
#include <cuda.h>
#include <cuda_runtime.h>
#include <stdio.h>

#include <stdexcept>
#include <string>
#include <wgmma_ptx.cuh>

namespace {

constexpr int kThreads = 64;

__global__ void right(float* out) {
  __shared__ float values[kThreads], total;
  const int i = threadIdx.x;
  values[i] = float(i);
  __syncthreads();
  float sum = values[kThreads - 1 - i] + __shfl_xor_sync(~0u, float(i), 1);
  if (i == 0) total = 1.f;
  __syncthreads();
  out[i] = sum * total;
}

__global__ void divergent_barrier(float* out) {
  if (threadIdx.x == 0)
    __syncwarp();
  else
    __syncthreads();
  out[threadIdx.x] = 0.f;
}

__global__ void divergent_collective(float* out) {
  const int i = threadIdx.x;
  out[i] = i == 3 ? float(__any_sync(~0u, true)) : __shfl_xor_sync(~0u, float(i), 1);
}

__global__ void missing_lanes(float* out) {
  if (threadIdx.x == 40) return;
  out[threadIdx.x] = __shfl_xor_sync(~0u, 1.f, 1);
}

__global__ void missing_barrier(float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = 1.f;
  out[threadIdx.x] = values[(threadIdx.x + 32) % kThreads];
}

__global__ void past_the_end(float* out) {
  extern __shared__ __align__(128) float shared[];
  shared[threadIdx.x] = 1.f;
  out[threadIdx.x] = shared[threadIdx.x + kThreads];
}

__global__ void in_front(float* out) {
  extern __shared__ __align__(128) float shared[];
  shared[int(threadIdx.x) - 1] = 1.f;
  out[threadIdx.x] = 1.f;
}

__global__ void misaligned(float* out) {
  *reinterpret_cast<float4*>(out + (threadIdx.x == 5 ? 1 : 0)) = make_float4(0.f, 0.f, 0.f, 0.f);
}

__global__ void too_early(float* out) {
  extern __shared__ __align__(128) float shared[];
  const uint32_t at = uint32_t(__cvta_generic_to_shared(shared)) + threadIdx.x % 32 * 16;
  if (threadIdx.x >= 32) return;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(out), "r"(16) : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
  uint32_t r[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
  out[threadIdx.x] = float(r[0]);
}

// 384 threads start with 168 registers each: 8 too few are given
__global__ void more_registers(float* out) {
  if (threadIdx.x < 128)
    pagedkv::wgmma::give_registers<32>();
  else
    pagedkv::wgmma::take_registers<240>();
  if (threadIdx.x < kThreads) out[threadIdx.x] = 1.f;
}

// 16 columns of two rows, of which nobody waits for the second
__global__ void copies(float* out, const CUtensorMap map, int expected) {
  __shared__ uint64_t barrier;
  if (threadIdx.x > 0) return;
  pagedkv::wgmma::barrier_init(barrier, 1);
  pagedkv::wgmma::barrier_arrive_expecting(barrier, expected);
  pagedkv::wgmma::copy_box(0, map, barrier, 0, 0, 0, 0);
  pagedkv::wgmma::barrier_wait(barrier, 0);
  pagedkv::wgmma::barrier_arrive_expecting(barrier, expected);
  pagedkv::wgmma::copy_box(0, map, barrier, 0, 1, 0, 0);
  out[threadIdx.x] = 1.f;
}
void launch_copies(float* out, int expected) {
  const cuuint64_t sizes[] = {16, 2, 1, 1}, strides[] = {32, 64, 64};
  const cuuint32_t box[] = {16, 1, 1, 1}, steps[] = {1, 1, 1, 1};
  CUtensorMap map;
  if (cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, out, sizes, strides, box, steps,
                             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
    throw std::runtime_error("not a map");
  copies<<<1, kThreads, 512, nullptr>>>(out, map, expected);
}

struct Kernel {
  const char* name;
  void (*launch)(float* out);
};
constexpr int kBytes = kThreads * sizeof(float);
const Kernel kKernels[] = {
    {"right", [](float* out) { right<<<1, kThreads, kBytes, nullptr>>>(out); }},
    {"divergent_barrier", [](float* out) { divergent_barrier<<<1, kThreads, kBytes, nullptr>>>(out); }},
    {"divergent_collective", [](float* out) { divergent_collective<<<1, kThreads, kBytes, nullptr>>>(out); }},
    {"missing_lanes", [](float* out) { missing_lanes<<<1, kThreads, kBytes, nullptr>>>(out); }},
    {"missing_barrier", [](float* out) { missing_barrier<<<1, kThreads, kBytes, nullptr>>>(out); }},
    {"past_the_end", [](float* out) { past_the_end<<<1, kThreads, kBytes, nullptr>>>(out); }},
    {"in_front", [](float* out) { in_front<<<1, kThreads, kBytes, nullptr>>>(out); }},
    {"misaligned", [](float* out) { misaligned<<<1, kThreads, kBytes, nullptr>>>(out); }},
    {"too_early", [](float* out) { too_early<<<1, kThreads, 512, nullptr>>>(out); }},
    {"more_registers", [](float* out) { more_registers<<<1, 384, kBytes, nullptr>>>(out); }},
    {"copy_without_end", [](float* out) { launch_copies(out, 32); }},
    {"unexpected_copy", [](float* out) { launch_copies(out, 16); }},
    {"too_much_shared", [](float* out) { right<<<1, kThreads, 64 << 10, nullptr>>>(out); }},
};

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  alignas(16) float out[kThreads] = {};
  try {
    for (const Kernel& k : kKernels)
      if (name == k.name) k.launch(out);
    STD_CUDA_CHECK(cudaGetLastError());
  } catch (const std::runtime_error& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  for (int i = 0; i < kThreads; ++i) {
    const float want = name == "right" ? float(kThreads - 1 - i + (i ^ 1)) : 1.f;
    if (out[i] != want) {
      fprintf(stderr, "out[%d] is %f\n", i, out[i]);
      return 1;
    }
  }
  return 0;
}
