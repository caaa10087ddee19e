"""Compile csrc/cuda for the emulated device, as the library that torch_pagedkv loads in place of its CPU kernels.

    TORCH_PAGEDKV_LIB=$(python tests/emulate/build.py) python tests/gpu/sanitize.py --device cpu

Objects are kept in build/emulate, so that a second call compiles only what has changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path += [str(path) for path in (ROOT, ROOT / "tests") if str(path) not in sys.path]

from emulate.transform import transform  # noqa: E402
from torch_pagedkv import build as native  # noqa: E402

HEAD_DIMS = (64, 96, 256)  # each shape of the attention kernels: one k-step of swizzling, an odd number of them, wide
BUCKETS = (32, 64, 96, 128, 192, 256)  # that csrc/cuda chooses from

# Multiplications and additions fuse, as nvcc has it. The sanitizers trap on misaligned vectors, indices outside of
# local arrays, shifts by too much and integer overflow.
FLAGS = (
    "-x c++ -std=c++20 -O1 -g1 -fPIC -fvisibility=hidden -fno-strict-aliasing -march=native -ffp-contract=fast -w "
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero "
    "-fsanitize-undefined-trap-on-error -DUSE_CUDA "
    "-DPAGEDKV_WGMMA -DPAGEDKV_OVERLAP"
)

SM90_BUCKETS = (64, 128, 256)  # likewise, on Hopper
REPLACED = ("wgmma_ptx.cuh",)  # files of csrc/cuda that this folder has an emulation of

# A bucket that is not compiled is served by the next larger one: the kernels take any head_dim up to their own.
SMALLER_BUCKET = """
template <> void launch_decode_dim<{type}, {small}>(const AttentionParams& p, KVType kv, int splits, const Tensor& like,
                                                   cudaStream_t stream) {{
  launch_decode_dim<{type}, {large}>(p, kv, splits, like, stream);
}}
template <> void prefill::launch_bucket<{type}, {small}>(const prefill::Params& p, bool quantized, unsigned grid,
                                                        cudaStream_t stream) {{
  prefill::launch_bucket<{type}, {large}>(p, quantized, grid, stream);
}}
"""
SMALLER_SM90_BUCKET = """
template <> void prefill::sm90::launch_bucket<{type}, {small}>(const prefill::sm90::Call& call, int sms,
                                                              cudaStream_t stream) {{
  prefill::sm90::launch_bucket<{type}, {large}>(call, sms, stream);
}}
"""


def write(path: Path, text: str) -> None:
    """Write a file unless it holds that text already."""
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def build(head_dims: Sequence[int] = HEAD_DIMS, address: bool = False, quiet: bool = False) -> Path:
    """Build the library; return its folder, which is what TORCH_PAGEDKV_LIB wants.

    Args:
        head_dims: buckets of the tensor-core attention kernels to compile, the largest one with all it stands for.
        address: with AddressSanitizer, which also sees reads and writes outside of tensors.
        quiet: no progress lines.

    Raises:
        BuildError: no compiler, no torch headers, or the compiler's message.
    """
    torch, cxx = native.find_torch(), native.find_cxx()
    name = "-".join(["address"] * address + [str(d) for d in head_dims])
    work = ROOT / "build" / "emulate" / name
    source = work / "csrc"
    with native.locked(work, "builds the emulated kernels"):
        for path in native.CSRC.glob("*.h"):
            write(source / path.name, f'#line 1 "{path}"\n{path.read_text()}')
        for path in (native.CSRC / "cuda").iterdir():
            if path.suffix in (".cu", ".cuh", ".h") and path.name not in REPLACED:
                write(source / "cuda" / path.name, transform(path.read_text(), path))
        body = "".join(
            template.format(type=kind, small=small, large=min(d for d in compiled if d > small))
            for template, buckets in ((SMALLER_BUCKET, BUCKETS), (SMALLER_SM90_BUCKET, SM90_BUCKETS))
            for compiled in [set(head_dims) & set(buckets)]
            for small in buckets
            if small not in compiled and small < max(compiled, default=0)
            for kind in ("__half", "__nv_bfloat16")
        )
        includes = '#include "paged_decode.cuh"\n#include "paged_prefill.cuh"\n#include "paged_prefill_sm90.cuh"\n'
        write(source / "cuda" / "buckets.cpp", f"{includes}namespace pagedkv {{\n{body}}}\n")

        wanted = [str(d) for d in head_dims]
        units = [(source / "cuda" / "buckets.cpp", "buckets", ""), (HERE / "runtime.cpp", "runtime", "-O3")]
        for unit in native.list_units("cuda"):
            defines = dict(unit.defines)
            if unit.source.stem != "version" and defines.get("PAGEDKV_HEAD_DIM", wanted[0]) in wanted:
                flags = " ".join(f"-D{k}={v}" for k, v in defines.items())
                units.append((source / "cuda" / unit.source.name, unit.name.replace("/", "."), flags))
        sanitize = "-fsanitize=address" if address else ""
        include = f"-I{HERE} -isystem {torch / 'include'} -DTORCH_TARGET_VERSION={native.TORCH_TARGET}"
        link = f"{sanitize} -L{torch}/lib -Wl,-Bsymbolic -Wl,--no-as-needed -ltorch -Wl,--as-needed"
        rules = [
            f"cxx = {native.escape(cxx)}",
            "rule cxx",
            f"  command = $cxx {native.escape(f'{FLAGS} {include} {sanitize}')} $extra -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $out",
            "rule link",
            f"  command = $cxx -shared -o $out $in {native.escape(link)}",
            "  description = link $out",
        ]
        for path, unit_name, extra in units:
            rules += [f"build {unit_name}.o: cxx {native.escape(str(path), path=True)}", f"  extra = {extra}"]
        library = native.library(Path(), "cpu")
        rules += [f"build {library}: link " + " ".join(f"{unit_name}.o" for _, unit_name, _ in units)]
        write(work / "build.ninja", "\n".join(rules) + "\n")
        native.run_ninja(work, len(units), quiet)
    return work


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build csrc/cuda for the emulated device; print the folder.")
    parser.add_argument("--head-dims", type=int, nargs="+", choices=BUCKETS, default=HEAD_DIMS)
    parser.add_argument("--address", action="store_true", help="with AddressSanitizer (LD_PRELOAD its library)")
    options = parser.parse_args()
    try:
        print(build(sorted(options.head_dims), options.address))
    except native.BuildError as error:
        native.say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
