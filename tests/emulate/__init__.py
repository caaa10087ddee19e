"""csrc/cuda on a machine without a GPU: the CUDA sources, compiled as plain C++ for an emulated device.

`transform.py` rewrites what is not C++ (launches, shared memory, inline PTX), `cuda_runtime.h` and its neighbours stand
in for the headers of the CUDA toolkit, `runtime.cpp` is the device, `build.py` makes of it a library whose operators
register as the CPU kernels of torch_pagedkv, and `fuzz.py` runs random problems on it. Needs g++ (or clang) and torch's
headers, no toolkit and no nvcc.

What it shows
    Wrong results, compared with the references: indices, masks, layouts of fragments, swizzles, reductions, the plan of
    split-KV, host code around the launches. A thread block's threads are fibers that meet at barriers and warp
    collectives; blocks, warps and lanes take turns in an order that depends on EMULATE_SEED, so that a missing barrier
    shows sooner or later. And these end the process, with the kernel, block and thread:

    - a barrier or collective that not all of its threads reach, or where they meet in different ones
    - shared memory: access past its end, which is a page that cannot be touched; a write in front of it; a launch with
      more than was asked for. It holds NaN when a block starts
    - cp.async: misaligned, out of bounds, two at once to one place. The bytes arrive when the thread waits for them and
      not before, and what was there is lost at once: reading too early or too late gives NaN, and ldmatrix refuses
    - Hopper (EMULATE_HOPPER=1): wgmma runs at any time between its commit and the wait, boxes of the copy engine arrive
      in any order between their issue and the wait for their bytes; whoever reads too early is refused, and so are
      copies that nobody expects or waits for and registers that nobody gives
    - misaligned vectors, indices outside of local arrays, shifts by too much, integer overflow (traps of
      UndefinedBehaviorSanitizer)
    - with AddressSanitizer (``build.py --address``): access outside of any tensor

What it cannot show
    Time, registers, bank conflicts and occupancy. The hardware's arithmetic: mma sums in float32 in another order and
    with another rounding, approximate functions are off by chance within their documented bounds, libm differs by an
    ulp. Races of plain reads and writes that the fibers' orders do not hit, and warps whose lanes diverge between
    collectives. Anything between blocks, which run one after the other: memory order, spinning on another block. What
    nvcc and ptxas make of the sources. Streams, graphs, more than one device, and instructions that `cuda_runtime.h`
    and `wgmma_ptx.cuh` do not define: a kernel that uses one does not compile here.
"""
