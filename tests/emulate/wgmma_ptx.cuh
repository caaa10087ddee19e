// Hopper's instructions on the emulated device, in place of csrc/cuda/wgmma_ptx.cuh: the same functions.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

namespace emulate {

// wgmma of one lane, run at some time between its commit and its wait; until then it holds pointers to registers.
struct Product {
  float* d;  // [n / 2]
  int n;
  bool half, add;
  const uint32_t* a;  // [4], or null: a_descriptor
  uint64_t a_descriptor, b_descriptor;
  bool b_transposed;
};
void wgmma_issue(const Product& product);
void wgmma_commit();
void wgmma_wait(int pending);

void set_registers(int count);  // of this thread; waits for others to give theirs

void mbarrier_init(uint64_t& barrier, int arrivals);
void mbarrier_arrive(uint64_t& barrier);
void mbarrier_expect(uint64_t& barrier, int bytes);
void mbarrier_wait(uint64_t& barrier, uint32_t parity);
void copy_box(uint32_t target, const CUtensorMap& map, uint64_t& barrier, int x, int y, int z, int w);
void store_box(const CUtensorMap& map, uint32_t source, int x, int y, int z, int w);
void wait_stores();
void fence_async_proxy();
void named_barrier(int id, int threads, bool stay);

}  // namespace emulate

namespace pagedkv::wgmma {

inline void fence() {}
inline void commit() { emulate::wgmma_commit(); }
template <int kPending>
void wait() {
  emulate::wgmma_wait(kPending);
}
template <int N>
void pin(float (&)[N]) {}
inline void hold(float x) {
  if (x < 0) emulate::fail("hold of %g", x);
}

inline void hold(uint32_t x) {
  if (x == 0xffffffff) emulate::fail("hold of all ones");
}

template <class T, int N>
void multiply(float (&d)[N / 2], uint64_t a_descriptor, uint64_t b_descriptor, bool add) {
  emulate::wgmma_issue({d, N, std::is_same_v<T, __half>, add, nullptr, a_descriptor, b_descriptor, false});
}
template <class T, int N, bool kTransposed = true>
void multiply_add(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b_descriptor, bool add = true) {
  emulate::wgmma_issue({d, N, std::is_same_v<T, __half>, add, a, 0, b_descriptor, kTransposed});
}

template <int kRegisters>
void take_registers() {
  emulate::set_registers(kRegisters);
}
template <int kRegisters>
void give_registers() {
  emulate::set_registers(kRegisters);
}

inline unsigned char* keep(unsigned char* p) { return p; }
inline int load_shared(const int& from) { return from; }

inline void barrier_init(uint64_t& barrier, int arrivals) { emulate::mbarrier_init(barrier, arrivals); }
inline void barrier_arrive(uint64_t& barrier) { emulate::mbarrier_arrive(barrier); }
inline void barrier_arrive_expecting(uint64_t& barrier, int bytes) {
  emulate::mbarrier_expect(barrier, bytes);
  emulate::mbarrier_arrive(barrier);
}
inline void barrier_wait(uint64_t& barrier, uint32_t parity) { emulate::mbarrier_wait(barrier, parity); }
inline void barrier_arrive_copies(uint64_t& barrier) {
  emulate::ptx::cp_async_commit_group();
  emulate::ptx::cp_async_wait_group(0);
  emulate::fence_async_proxy();
  emulate::mbarrier_arrive(barrier);
}
inline void fence_async_proxy() { emulate::fence_async_proxy(); }
inline void named_sync(int id, int threads) { emulate::named_barrier(id, threads, true); }
inline void named_arrive(int id, int threads) { emulate::named_barrier(id, threads, false); }

inline bool elect() { return emulate::lane() == 7; }  // whichever it is
inline void prefetch_map(const CUtensorMap&) {}
inline void copy_box(uint32_t target, const CUtensorMap& map, uint64_t& barrier, int x, int y, int z, int w) {
  emulate::copy_box(target, map, barrier, x, y, z, w);
}

inline void store_box(const CUtensorMap& map, uint32_t source, int x, int y) {
  emulate::store_box(map, source, x, y, 0, 0);
}
template <bool kRead>
void wait_stores() {
  emulate::wait_stores();
}

// Clusters are of one CTA here.
inline int cluster_rank() { return 0; }
inline int cluster_size() { return 1; }
inline void cluster_sync() { emulate::block_barrier(); }
inline void fence_barriers() {}
inline void barrier_arrive_at(uint64_t& barrier, int rank) {
  if (rank != 0) emulate::fail("arrival at CTA %d of a cluster of one", rank);
  emulate::mbarrier_arrive(barrier);
}
inline void barrier_release_at(uint64_t& barrier, int rank) { barrier_arrive_at(barrier, rank); }
inline void barrier_wait_cluster(uint64_t& barrier, uint32_t parity) { emulate::mbarrier_wait(barrier, parity); }
inline void store_at(float4* to, int rank, const float4& v) {
  if (rank != 0) emulate::fail("a store to CTA %d of a cluster of one", rank);
  *to = v;
}
inline void copy_box_to_all(uint32_t target, const CUtensorMap& map, uint64_t& barrier, int x, int y, int size) {
  if (size != 1) emulate::fail("a copy to %d CTAs of a cluster of one", size);
  emulate::copy_box(target, map, barrier, x, y, 0, 0);
}

}  // namespace pagedkv::wgmma
