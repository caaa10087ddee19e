// The emulated device of cuda_runtime.h and wgmma_ptx.cuh: fibers and their scheduler, shared memory, cp.async,
// ldmatrix, mma, wgmma, mbarriers, the copy engine.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>
#include <wgmma_ptx.cuh>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulate {
namespace {

constexpr size_t kPage = 4096, kStack = 256 << 10;
constexpr int kRegisters = 64 << 10;  // of a multiprocessor
constexpr uint8_t kPoison = 0xff;     // as floats of any width: NaN; as integers: -1

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// Memory between two pages that may not be touched; `bytes` of them end at the second one.
uint8_t* map_guarded(size_t bytes) {
  const size_t size = round_up(bytes, kPage);
  void* p = mmap(nullptr, size + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) fail("no memory for %zu bytes", bytes);
  uint8_t* const begin = static_cast<uint8_t*>(p) + kPage;
  if (mprotect(begin, size, PROT_READ | PROT_WRITE) != 0) fail("no memory for %zu bytes", bytes);
  return begin + size - bytes;
}

// ---- state of the block that runs
// -------------------------------------------------------------------------------------

struct Copy {
  uint32_t target;
  const void* source;
  int size, bytes;  // to write, to read; zeros fill the rest
};

// A box of a tensor on its way to shared memory.
struct BoxCopy {
  uint32_t target;
  CUtensorMap map;
  uint64_t* barrier;
  int at[4];

  uint32_t bytes() const { return 2 * map.box[0] * map.box[1] * map.box[2] * map.box[3]; }
};

struct Fiber {
  ucontext_t context;
  uint8_t* stack = nullptr;  // its lowest address
  void* stack_pointer = nullptr;
  uint3 index;
  bool done = false;
  const long* waits_for = nullptr;  // a counter that has to move on from `at`
  long at = 0;
  std::deque<std::vector<Copy>> groups;             // cp.async, committed
  std::vector<Copy> open;                           // not yet committed
  std::deque<std::vector<Product>> product_groups;  // wgmma, committed
  std::vector<Product> products;                    // not yet committed
  std::vector<BoxCopy> stores;                      // of boxes, whose `target` is what they read
  int registers;                                    // that setmaxnreg may move
  bool unfenced = false;                            // has copied, and the asynchronous proxy may not see it yet
  void* fake_stack = nullptr;                       // AddressSanitizer's
};

struct Warp {
  const char* operation = nullptr;
  int arrived = 0, live = 0;
  long generation = 0;
  void* lanes[kWarp];
};

std::string kernel_name;
const std::function<void()>* kernel_body;
bool running;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
int thread_count, thread;  // of the block; the one that runs
int barrier_arrived, barrier_live;
long barrier_generation, blocks_run, mbarrier_phases, register_moves;
int free_registers;  // that threads of the block have given
struct {
  int arrived;
  long generation;
} named_barriers[16];
cudaError_t pending_error;
std::map<const void*, int> max_shared;

uint8_t* shared_memory;
size_t shared_bytes;
std::vector<uint8_t> in_flight;  // for each shared byte: copies on their way to it
std::vector<BoxCopy> boxes;

std::mt19937& random_engine() {
  static std::mt19937 engine(settings().seed);
  return engine;
}

// ---- fibers
// -----------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
// Saves what a call must leave alone on the old stack, and takes it from the new one. (swapcontext would also ask the
// kernel for the signal mask, which costs more than all else here.)
extern "C" void emulate_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.type emulate_switch, @function
emulate_switch:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulate_switch, .-emulate_switch
)");
#endif

Fiber scheduler;
[[maybe_unused]] const void* scheduler_stack;
[[maybe_unused]] size_t scheduler_stack_bytes;

void swap(Fiber& from, Fiber& to, [[maybe_unused]] bool forever = false) {
#ifdef __SANITIZE_ADDRESS__
  const bool back = &to == &scheduler;
  __sanitizer_start_switch_fiber(forever ? nullptr : &from.fake_stack, back ? scheduler_stack : to.stack,
                                 back ? scheduler_stack_bytes : kStack);
#endif
#if defined(__x86_64__)
  emulate_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void complete(std::vector<Copy>& group) {
  for (const Copy& c : group) {
    uint8_t* const to = shared_memory + c.target;
    memcpy(to, c.source, c.bytes);
    memset(to + c.bytes, 0, c.size - c.bytes);
    for (int i = 0; i < c.size; ++i) --in_flight[c.target + i];
  }
  group.clear();
}

__attribute__((noinline)) void run_thread() {
  (*kernel_body)();
  Fiber& self = fibers[thread];
  if (!self.product_groups.empty() || !self.products.empty()) fail("thread ends before its products");
  if (!self.stores.empty()) fail("thread ends before its stores");
  for (auto& group : self.groups) complete(group);
  complete(self.open);
  self.done = true;
  Warp& warp = warps[thread / kWarp];
  if (warp.arrived > 0) fail("thread ends while others of its warp are in %s", warp.operation);
  --warp.live;
  if (--barrier_live > 0 && barrier_arrived == barrier_live) barrier_arrived = 0, ++barrier_generation;
}

// Never returns, so that it must not have variables that AddressSanitizer would watch on this stack ever after.
void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  run_thread();
  swap(fibers[thread], scheduler, true);
}

void prepare(Fiber& f) {
  if (!f.stack) f.stack = map_guarded(kStack);
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(f.stack + kStack) - 8;
  *--top = nullptr;  // a return address, so that the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.stack_pointer = top;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, fiber_main, 0);
#endif
  f.done = false;
  f.waits_for = nullptr;
  f.groups.clear();
  f.open.clear();
  f.unfenced = false;
  f.registers = std::min(255, kRegisters / thread_count / 8 * 8);
}

void resume(int t) {
  thread = t;
  threadIdx = fibers[t].index;
  swap(scheduler, fibers[t]);
}

// Yields until `counter` has moved on.
void wait(const long& counter) {
  Fiber& self = fibers[thread];
  self.waits_for = &counter, self.at = counter;
  swap(self, scheduler);
}

void land_box(size_t index);

// Runs the block's fibers to their end, and its boxes to their targets, in any order. Warps take turns in a random
// order and of random length, and drift apart as far as the barriers let them; a warp's lanes come in a random order
// too.
void run_fibers() {
  auto& engine = random_engine();
  std::vector<int> order(warps.size()), lanes(kWarp);
  std::iota(order.begin(), order.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  std::shuffle(lanes.begin(), lanes.end(), engine);
  for (bool moved = true; barrier_live > 0;) {
    if (!boxes.empty() && (!moved || engine() % 2)) land_box(engine() % boxes.size()), moved = true;
    if (!moved) {
      std::string states;
      for (int t = 0; t < thread_count; t += kWarp) {
        const Warp& w = warps[t / kWarp];
        states += "\n  warp " + std::to_string(t / kWarp) + ": " + std::to_string(w.live) + " threads live, " +
                  std::to_string(w.arrived) + " in " + (w.arrived ? w.operation : "a warp operation");
      }
      fail("deadlock: %d of %d threads are at __syncthreads()%s", barrier_arrived, barrier_live, states.c_str());
    }
    moved = false;
    std::shuffle(order.begin(), order.end(), engine);
    for (const int w : order) {
      for (unsigned turns = 1 + engine() % 16; turns > 0; --turns) {
        bool any = false;
        for (const int lane : lanes) {
          const int t = w * kWarp + lane;
          if (t >= thread_count) continue;
          Fiber& f = fibers[t];
          if (f.done || (f.waits_for && *f.waits_for == f.at)) continue;
          f.waits_for = nullptr;
          any = moved = true;
          resume(t);
        }
        if (!any) break;
      }
    }
  }
}

// ---- launches
// ---------------------------------------------------------------------------------------------------------

// A fault in a kernel: name it. (The default would be to die without a word.)
void on_signal(int signal, siginfo_t* info, void*) {
  if (!running) _exit(128 + signal);
  if (signal == SIGSEGV || signal == SIGBUS) {
    const ptrdiff_t offset = static_cast<uint8_t*>(info->si_addr) - shared_memory;
    fail("fault at %p, byte %td of the block's %zu of shared memory", info->si_addr, offset, shared_bytes);
  }
  fail("undefined behaviour (misaligned access, index, shift or overflow) at %p", info->si_addr);
}

void install_handlers() {
  static const bool once = [] {
#ifndef __SANITIZE_ADDRESS__  // which explains faults better
    static uint8_t stack[64 << 10];
    stack_t alternate{stack, 0, sizeof stack};
    sigaltstack(&alternate, nullptr);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int s : {SIGSEGV, SIGBUS, SIGILL, SIGTRAP}) sigaction(s, &action, nullptr);
#endif
    return true;
  }();
  (void)once;
}

bool in_range(int64_t n, int64_t largest) { return n >= 1 && n <= largest; }

}  // namespace

[[noreturn]] void fail(const char* format, ...) {
  fprintf(stderr, "emulated CUDA: ");
  if (running)
    fprintf(stderr, "%s, block (%u, %u, %u), thread (%u, %u, %u): ", kernel_name.c_str(), blockIdx.x, blockIdx.y,
            blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fprintf(stderr, "\n");
  fflush(stderr);
  abort();
}

const Settings& settings() {
  auto number = [](const char* name, int otherwise) {
    const char* text = getenv(name);
    return text && *text ? atoi(text) : otherwise;
  };
  static const Settings s{unsigned(number("EMULATE_SEED", 0)), number("EMULATE_SMS", 7),
                          number("EMULATE_SHARED", 227 << 10), number("EMULATE_HOPPER", 0)};
  return s;
}

cudaError_t set_max_shared(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > settings().shared) return cudaErrorInvalidValue;
  max_shared[kernel] = bytes;
  return cudaSuccess;
}
cudaError_t last_error() { return std::exchange(pending_error, cudaSuccess); }
const char* error_name(cudaError_t error) {
  return error == cudaSuccess             ? "cudaSuccess"
         : error == cudaErrorInvalidValue ? "cudaErrorInvalidValue"
                                          : "cudaErrorInvalidConfiguration";
}

long block_number() { return blocks_run; }

uint8_t* allocate_guarded(size_t bytes, size_t alignment) { return map_guarded(round_up(bytes, alignment)); }
uint8_t* dynamic_shared_bytes() { return shared_memory; }

uint32_t shared_address(const void* p) {
  const ptrdiff_t offset = static_cast<const uint8_t*>(p) - shared_memory;
  if (offset < 0 || size_t(offset) > shared_bytes) fail("the address of something that is not in shared memory");
  return uint32_t(offset);
}

void run(const std::string& name, const void* kernel, const Config& config, const std::function<void()>& body) {
  const auto [grid, block, shared] = config;
  const int64_t threads = int64_t(block.x) * block.y * block.z;
  const auto allowed = max_shared.find(kernel);
  if (!in_range(grid.x, 0x7fffffff) || !in_range(grid.y, 65535) || !in_range(grid.z, 65535) ||
      !in_range(threads, 1024) || block.z > 64) {
    pending_error = cudaErrorInvalidConfiguration;
    return;
  }
  if (shared > size_t(allowed == max_shared.end() ? 48 << 10 : std::max(48 << 10, allowed->second))) {
    pending_error = cudaErrorInvalidValue;
    return;
  }
  install_handlers();
  kernel_name = name;
  kernel_body = &body;
  gridDim = grid, blockDim = block;
  thread_count = int(threads);
  const size_t warp_count = (threads + kWarp - 1) / kWarp;
  if (fibers.size() < size_t(threads)) fibers.resize(threads);
  // Dynamic shared memory: one arena, of which each size of block uses the end
  static uint8_t* const arena_end = map_guarded(settings().shared) + settings().shared;
  shared_bytes = shared;
  shared_memory = arena_end - round_up(shared, 128);
  in_flight.assign(shared, 0);

  std::vector<int64_t> order(int64_t(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_engine());
  for (const int64_t b : order) {
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    ++blocks_run;
    const uint8_t* const arena = arena_end - settings().shared;
    uint8_t* const before = std::max(const_cast<uint8_t*>(arena), shared_memory - kPage);
    memset(before, kPoison, arena_end - before);
    warps.assign(warp_count, Warp{});
    barrier_arrived = 0, barrier_live = thread_count, free_registers = 0;
    for (auto& b : named_barriers) b.arrived = 0;
    for (int t = 0; t < thread_count; ++t) {
      prepare(fibers[t]);
      fibers[t].index = {t % block.x, t / block.x % block.y, t / (block.x * block.y)};
      ++warps[t / kWarp].live;
    }
    running = true;
    run_fibers();
    if (!boxes.empty()) fail("ends before its copies have arrived");
    for (const uint8_t* p = before; p < arena_end; ++p)
      if (*p != kPoison && (p < shared_memory || p >= shared_memory + shared_bytes))
        fail("wrote byte %td of its %zu of shared memory", p - shared_memory, shared_bytes);
    running = false;
  }
}

// ---- threads
// ----------------------------------------------------------------------------------------------------------

void block_barrier() {
  if (++barrier_arrived == barrier_live) {
    barrier_arrived = 0, ++barrier_generation;
  } else {
    wait(barrier_generation);
  }
}

void collective(const char* name, void* mine, void (*all)(void* const (&lanes)[kWarp])) {
  Warp& w = warps[thread / kWarp];
  if (w.live != kWarp) fail("%s in a warp of which only %d threads are there", name, w.live);
  if (w.arrived > 0 && strcmp(w.operation, name) != 0) fail("%s meets %s of the same warp", name, w.operation);
  w.operation = name;
  w.lanes[thread % kWarp] = mine;
  if (++w.arrived == kWarp) {
    all(w.lanes);
    w.arrived = 0, ++w.generation;
  } else {
    wait(w.generation);
  }
}

// ---- PTX
// --------------------------------------------------------------------------------------------------------------

namespace ptx {

void cp_async(uint32_t target, const void* source, int size, int bytes) {
  if (target % size || uintptr_t(source) % size)
    fail("cp.async of %d bytes, %p -> %u: misaligned", size, source, target);
  if (target + uint64_t(size) > shared_bytes) fail("cp.async to byte %u of %zu of shared memory", target, shared_bytes);
  if (bytes < 0 || bytes > size) fail("cp.async reads %d of %d bytes", bytes, size);
  for (int i = 0; i < size; ++i)
    if (in_flight[target + i]++) fail("two cp.async at once to byte %u of shared memory", target + i);
  memset(shared_memory + target, kPoison, size);  // the bytes may arrive at any time from now on
  fibers[thread].open.push_back({target, source, size, bytes});
}
void cp_async_commit_group() {
  Fiber& f = fibers[thread];
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}
void cp_async_wait_group(int pending) {
  auto& groups = fibers[thread].groups;
  while (int(groups.size()) > pending) {
    complete(groups.front());
    groups.pop_front();
    fibers[thread].unfenced = true;
  }
}

namespace {

struct LoadMatrix {
  uint32_t address;
  uint32_t* const* r;
  bool transposed;
};

void load_matrices(void* const (&lanes)[kWarp]) {
  const auto at = [&](int lane) -> const LoadMatrix& { return *static_cast<const LoadMatrix*>(lanes[lane]); };
  for (int m = 0; m < 4; ++m)
    for (int lane = 0; lane < kWarp; ++lane) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int row = at(0).transposed ? lane % 4 * 2 + i : lane / 4;
        const int column = at(0).transposed ? lane / 4 : lane % 4 * 2 + i;
        memcpy(&pair[i], shared_memory + at(8 * m + row).address + 2 * column, 2);
      }
      *at(lane).r[m] = pair[0] | uint32_t(pair[1]) << 16;
    }
}

template <class T>
float element(uint32_t pair, int i) {
  return float(T(uint16_t(pair >> 16 * i), T::from_bits()));
}

// Lane l, with g = l / 4 and t = l % 4, holds two neighbours along k or n in each register:
//     a[i]: row g + 8 (i % 2), k = 2 t + 8 (i / 2)      b[i]: column g, k = 2 t + 8 i
//     c, d: [2 h + i]: row g + 8 h, column 2 t + i
template <class T>
void multiply(void* const (&lanes)[kWarp]) {
  float a[16][16], b[16][8], c[16][8];
  for (int l = 0; l < kWarp; ++l) {
    const Mma& x = *static_cast<const Mma*>(lanes[l]);
    const int g = l / 4, t = l % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][t + r / 2 * 8 + i] = element<T>(x.a[r], i);
      for (int r = 0; r < 2; ++r) b[t + 8 * r + i][g] = element<T>(x.b[r], i);
      for (int h = 0; h < 2; ++h) c[g + 8 * h][t + i] = x.c[2 * h + i];
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
  for (int l = 0; l < kWarp; ++l)
    for (int e = 0; e < 4; ++e) static_cast<Mma*>(lanes[l])->d[e] = c[l / 4 + e / 2 * 8][l % 4 * 2 + e % 2];
}

// As above, with four neighbours along k in a register: a[i]: row g + 8 (i % 2), k = 4 t + 16 (i / 2); b[i]: column g,
// k = 4 t + 16 i.
void multiply_int8(void* const (&lanes)[kWarp]) {
  const auto number = [](uint32_t four, int i) { return int(int8_t(four >> 8 * i)); };
  int a[16][32], b[32][8];
  for (int l = 0; l < kWarp; ++l) {
    const MmaInt8& x = *static_cast<const MmaInt8*>(lanes[l]);
    const int g = l / 4, t = l % 4 * 4;
    for (int i = 0; i < 4; ++i) {
      for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][t + r / 2 * 16 + i] = number(x.a[r], i);
      for (int r = 0; r < 2; ++r) b[t + 16 * r + i][g] = number(x.b[r], i);
    }
  }
  for (int l = 0; l < kWarp; ++l)
    for (int e = 0; e < 4; ++e)
      for (int k = 0; k < 32; ++k)
        static_cast<MmaInt8*>(lanes[l])->d[e] += a[l / 4 + e / 2 * 8][k] * b[k][l % 4 * 2 + e % 2];
}

}  // namespace

void ldmatrix(uint32_t* const (&r)[4], uint32_t address, bool transposed) {
  if (address % 16 || address + uint64_t(16) > shared_bytes)
    fail("ldmatrix of byte %u of %zu of shared memory", address, shared_bytes);
  for (int i = 0; i < 16; ++i)
    if (in_flight[address + i]) fail("ldmatrix of byte %u, which a cp.async is still to write", address + i);
  LoadMatrix lane{address, r, transposed};
  collective(transposed ? "ldmatrix.trans" : "ldmatrix", &lane, load_matrices);
}

void mma_half(Mma& lane) { collective("mma of halves", &lane, multiply<__half>); }
void mma_int8(MmaInt8& lane) { collective("mma of int8s", &lane, multiply_int8); }
void mma_bfloat16(Mma& lane) { collective("mma of bfloat16s", &lane, multiply<__nv_bfloat16>); }

}  // namespace ptx

// ---- Hopper
// -----------------------------------------------------------------------------------------------------------

namespace {

struct Mbarrier {
  uint8_t expected, pending;  // arrivals
  uint16_t phase;
  int bytes;  // that are expected and have not arrived
};
static_assert(sizeof(Mbarrier) == 8);

Mbarrier& as_mbarrier(uint64_t& barrier) { return reinterpret_cast<Mbarrier&>(barrier); }
void complete_phase(Mbarrier& b) {
  if (b.pending == 0 && b.bytes == 0) b.pending = b.expected, ++b.phase, ++mbarrier_phases;
}

uint32_t swizzle128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Calls f(shared address, source or null) for each element of a box, null outside of the tensor.
template <class F>
void for_each_element(const BoxCopy& c, F f) {
  uint32_t i[4], n = 0;
  for (i[3] = 0; i[3] < c.map.box[3]; ++i[3])
    for (i[2] = 0; i[2] < c.map.box[2]; ++i[2])
      for (i[1] = 0; i[1] < c.map.box[1]; ++i[1])
        for (i[0] = 0; i[0] < c.map.box[0]; ++i[0], ++n) {
          const char* source = c.map.data;
          for (int d = 0; d < 4 && source; ++d) {
            const int64_t at = int64_t(c.at[d]) + i[d];
            source = at < 0 || uint64_t(at) >= c.map.sizes[d] ? nullptr : source + at * int64_t(c.map.strides[d]);
          }
          f(c.map.swizzled ? swizzle128(c.target + 2 * n) : c.target + 2 * n, source);
        }
}

void land_box(size_t index) {
  const BoxCopy c = boxes[index];
  boxes.erase(boxes.begin() + index);
  for_each_element(c, [](uint32_t to, const char* from) {
    if (from)
      memcpy(shared_memory + to, from, 2);
    else
      memset(shared_memory + to, 0, 2);
    --in_flight[to], --in_flight[to + 1];
  });
  Mbarrier& b = as_mbarrier(*c.barrier);
  b.bytes -= int(c.bytes());
  complete_phase(b);
}

// A 16-bit element of a tile in shared memory with the 128-byte swizzle.
//     K-major: row = m or n, 8 of them 128 bytes apart, then the stride offset
//     MN-major: row = k, 8 of them 128 bytes apart, then the stride offset; 64 columns, then the leading offset
uint16_t tile_element(uint64_t descriptor, bool transposed, int mn, int k) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, leading = uint32_t(descriptor >> 16 & 0x3fff) << 4,
                 stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0)
    fail("wgmma of descriptor %016lx: not emulated", descriptor);
  uint32_t at = transposed ? start + mn / 64 * leading + mn % 64 * 2 + k % 8 * 128 + k / 8 * stride
                           : start + mn % 8 * 128 + mn / 8 * stride + k * 2;
  at = swizzle128(at);
  if (at + uint64_t(2) > shared_bytes) fail("wgmma of byte %u of %zu of shared memory", at, shared_bytes);
  if (in_flight[at]) fail("wgmma of byte %u, which a copy is still to write", at);
  uint16_t bits;
  memcpy(&bits, shared_memory + at, 2);
  return bits;
}

template <class T>
void run_products(Fiber* lanes, int first_row, const Product& p, size_t group, size_t index) {
  static float a[16][16], b[16][256], c[16][256];
  for (int n = 0; n < p.n; ++n)
    for (int k = 0; k < 16; ++k) b[k][n] = float(T(tile_element(p.b_descriptor, p.b_transposed, n, k), T::from_bits()));
  if (!p.a)
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < 16; ++k)
        a[m][k] = float(T(tile_element(p.a_descriptor, false, first_row + m, k), T::from_bits()));
  for (int l = 0; l < kWarp; ++l) {
    const Product& mine = lanes[l].product_groups[group][index];
    if (mine.b_descriptor != p.b_descriptor || mine.a_descriptor != p.a_descriptor || mine.n != p.n)
      fail("wgmma of different descriptors in a warp");
    for (int r = 0; p.a && r < 4; ++r)
      for (int i = 0; i < 2; ++i) a[l / 4 + r % 2 * 8][l % 4 * 2 + r / 2 * 8 + i] = ptx::element<T>(mine.a[r], i);
    for (int e = 0; e < p.n / 2; ++e)
      c[l / 4 + e / 2 % 2 * 8][e / 4 * 8 + l % 4 * 2 + e % 2] = mine.add ? mine.d[e] : 0;
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < p.n; ++n) c[m][n] += a[m][k] * b[k][n];
  for (int l = 0; l < kWarp; ++l)
    for (int e = 0; e < p.n / 2; ++e)
      lanes[l].product_groups[group][index].d[e] = c[l / 4 + e / 2 % 2 * 8][e / 4 * 8 + l % 4 * 2 + e % 2];
}

// All but the last `pending` groups of this thread's warp.
void run_groups(int pending) {
  Fiber* const lanes = &fibers[thread / kWarp * kWarp];
  for (int l = 0; l < kWarp; ++l)
    if (lanes[l].product_groups.size() != lanes[0].product_groups.size()) fail("wgmma groups differ in a warp");
  while (int(lanes[0].product_groups.size()) > pending) {
    const std::vector<Product> group = lanes[0].product_groups[0];
    for (size_t i = 0; i < group.size(); ++i)
      (group[i].half ? run_products<__half> : run_products<__nv_bfloat16>)(lanes, thread / kWarp % 4 * 16, group[i], 0,
                                                                           i);
    for (int l = 0; l < kWarp; ++l) lanes[l].product_groups.pop_front();
  }
}

}  // namespace

void wgmma_issue(const Product& product) { fibers[thread].products.push_back(product); }
// As early as now or as late as the wait, by chance: the registers and the shared memory must do for both.
void wgmma_commit() {
  Fiber& f = fibers[thread];
  f.product_groups.push_back(std::move(f.products));
  f.products.clear();
  collective("wgmma.commit_group", nullptr, [](void* const(&)[kWarp]) {
    if (random_engine()() % 2) run_groups(0);
  });
}
void wgmma_wait(int pending) {
  int groups = pending;
  collective("wgmma.wait_group", &groups, [](void* const(&lanes)[kWarp]) { run_groups(*static_cast<int*>(lanes[0])); });
}

void set_registers(int count) {
  Fiber& f = fibers[thread];
  while (free_registers < count - f.registers) wait(register_moves);
  free_registers -= count - f.registers, ++register_moves;
  f.registers = count;
}

void mbarrier_init(uint64_t& barrier, int arrivals) {
  if (arrivals < 1 || arrivals > 255) fail("an mbarrier of %d arrivals", arrivals);
  as_mbarrier(barrier) = {uint8_t(arrivals), uint8_t(arrivals), 0, 0};
}
void mbarrier_arrive(uint64_t& barrier) {
  Mbarrier& b = as_mbarrier(barrier);
  if (fibers[thread].unfenced) fail("mbarrier.arrive without fence.proxy.async since a copy has landed");
  if (b.pending == 0 || b.pending > b.expected) fail("arrival at an mbarrier that expects none");
  --b.pending;
  complete_phase(b);
}
void mbarrier_expect(uint64_t& barrier, int bytes) { as_mbarrier(barrier).bytes += bytes; }
void mbarrier_wait(uint64_t& barrier, uint32_t parity) {
  while ((as_mbarrier(barrier).phase & 1) == parity) wait(mbarrier_phases);
}
void fence_async_proxy() { fibers[thread].unfenced = false; }

// Arrives at some later time. A phase must expect it: the model knows no bytes that come before.
void copy_box(uint32_t target, const CUtensorMap& map, uint64_t& barrier, int x, int y, int z, int w) {
  const BoxCopy c{target, map, &barrier, {x, y, z, w}};
  if (target % 128) fail("a copy to byte %u of shared memory: misaligned", target);
  if (target + uint64_t(c.bytes()) > shared_bytes)
    fail("a copy to byte %u of %zu of shared memory", target, shared_bytes);
  if (as_mbarrier(barrier).bytes < int(c.bytes())) fail("a copy of bytes that no barrier expects");
  for_each_element(c, [](uint32_t to, const char*) {
    for (int i = 0; i < 2; ++i)
      if (in_flight[to + i]++) fail("two copies at once to byte %u of shared memory", to + i);
    memset(shared_memory + to, kPoison, 2);
  });
  boxes.push_back(c);
}

// As late as it may be: what is written over it by then is wrong.
void store_box(const CUtensorMap& map, uint32_t source, int x, int y, int z, int w) {
  const BoxCopy c{source, map, nullptr, {x, y, z, w}};
  if (source % 128) fail("a store of byte %u of shared memory: misaligned", source);
  if (source + uint64_t(c.bytes()) > shared_bytes)
    fail("a store of byte %u of %zu of shared memory", source, shared_bytes);
  fibers[thread].stores.push_back(c);
}
void wait_stores() {
  for (const BoxCopy& c : fibers[thread].stores)
    for_each_element(c, [](uint32_t from, const char* to) {
      if (to) memcpy(const_cast<char*>(to), shared_memory + from, 2);
    });
  fibers[thread].stores.clear();
}

void named_barrier(int id, int threads, bool stay) {
  if (id < 1 || id > 15 || threads % kWarp) fail("bar %d, %d", id, threads);
  auto& b = named_barriers[id];
  if (++b.arrived == threads) {
    b.arrived = 0, ++b.generation;
  } else if (stay) {
    wait(b.generation);
  }
}

}  // namespace emulate

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  bool right = rank == 4 && uintptr_t(map) % 64 == 0 && uintptr_t(data) % 16 == 0 && (!swizzled || 2 * box[0] <= 128);
  *map = {static_cast<const char*>(data), {}, {2}, {}, swizzled};
  for (int d = 0; right && d < 4; ++d) {
    right = sizes[d] >= 1 && sizes[d] <= 1ull << 32 && box[d] >= 1 && box[d] <= 256 && steps[d] == 1;
    if (d > 0) map->strides[d] = strides[d - 1], right &= strides[d - 1] % 16 == 0 && strides[d - 1] < 1ull << 40;
    map->sizes[d] = sizes[d], map->box[d] = box[d];
  }
  return right ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  const bool known = strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(cuTensorMapEncodeTiled) : nullptr;
  *status = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// What torch would ask of a real device.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }

// Tells torch_pagedkv what this library is (torch_pagedkv/_native.py).
extern "C" __attribute__((visibility("default"))) const char* pagedkv_cpu_isa() { return "emulated CUDA"; }
