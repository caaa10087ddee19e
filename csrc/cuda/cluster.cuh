// Clusters of thread blocks (sm_90 and later), whose members read each other's shared memory. On older devices, and
// where a cluster is of one block, only what that block needs is left.
#pragma once

#include "tensor_core.cuh"

namespace pagedkv {

// All threads of all blocks of the cluster have come here, and see what the others wrote to shared memory.
__device__ __forceinline__ void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// Four floats at `p`, which is in this block's shared memory, from the same place in block `rank` of the cluster.
__device__ __forceinline__ float4 cluster_load(const float* p, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t address;
  float4 v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem_address(p)), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
#else
  return *reinterpret_cast<const float4*>(p);
#endif
}

}  // namespace pagedkv
