"""The one native builder: ``pip install``, ``make build``, CI and the build on first import all come here.

It needs torch's headers and ``libtorch.so`` but never imports torch, so that it also works inside pip's isolated build
environment and finishes a no-op in milliseconds. Sources are found by name:

- ``csrc/cpu/*.cpp`` go into one library. A file named ``*_avx2.cpp``, ``*_avx512.cpp`` or ``*_avx512bf16.cpp`` is
  compiled with that instruction set and left out on other machines than x86-64; the rest runs on any CPU, and picks
  the best of those units when it is loaded.
- ``csrc/cuda/*.cu`` go into a second library, one object each. A file with a line ``// units: T=float,half D=64,128``
  near its top is compiled once per combination, with ``-DT=float -DD=64`` and so on, so that heavy templates spread
  over compile jobs. Several such lines add up.

Run ``python torch_pagedkv/build.py --help`` for the options. Environment:

==============================  ========================================================================================
TORCH_PAGEDKV_CUDA              ``auto`` (default: torch has CUDA and nvcc is there), ``1``, ``0``
TORCH_PAGEDKV_CUDA_ARCHS        for example ``90a``, ``80;90a;100+PTX`` or ``native`` (the GPUs of this machine)
TORCH_PAGEDKV_CACHE             folder for what is built on first import (default ``~/.cache/torch_pagedkv``)
CXX, NVCC, CUDA_HOME, MAX_JOBS  as everywhere
VERBOSE                         ``1`` prints the compile commands
==============================  ========================================================================================
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import fnmatch
import hashlib
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent if (HERE.parent / "csrc").is_dir() and (HERE.parent / "pyproject.toml").is_file() else None
CSRC = CHECKOUT / "csrc" if CHECKOUT else HERE / "csrc"
KINDS = ("cpu", "cuda")
SUFFIX = {"cpu": ".cpp", "cuda": ".cu"}

TORCH_TARGET = "0x020b000000000000"  # the oldest torch that a built library loads in: 2.11
DEFAULT_ARCHS = "80;86;89;90a;100+PTX"  # PTX of the last one serves every later GPU

# GCC's own AVX-512 intrinsics read variables that they leave uninitialised on purpose, and it warns about each use.
AVX512 = (
    "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c "
    "-Wno-unknown-warning-option -Wno-uninitialized -Wno-maybe-uninitialized"
)
ISA_FLAGS = {"avx2": "-mavx2 -mfma -mf16c", "avx512": AVX512, "avx512bf16": f"{AVX512} -mavx512bf16"}
# Vectorised loops without -ffast-math: NaN, infinities and signed zeros keep their meaning in every kernel, and nothing
# may be on the link line that flushes denormals for the whole process.
CXX_FLAGS = "-O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd -fPIC -fvisibility=hidden -Wall"
# Line numbers are for the profiler's and the checkers' reports; they double the machine code, compression quarters it.
NVCC_FLAGS = (
    "-O3 -DUSE_CUDA --expt-relaxed-constexpr -lineinfo -Xfatbin=-compress-all "
    "-Xcompiler -fPIC,-fvisibility=hidden,-Wall"
)
# ptxas only advises when it serialises wgmma (C7510 ...), which costs half the speed: that is an error here.
SERIALISED = r"\(C751[0-9]\)"

UNITS_LINE = re.compile(r"^//\s*units:\s*(\S.*)$")
UNITS_PAIR = re.compile(r"^([A-Za-z_]\w*)=([^,\s]+(?:,[^,\s]+)*)$")


class BuildError(RuntimeError):
    """A native library could not be built; the message says why and what to do."""


class TorchMissing(BuildError):
    """There is no torch in this environment to build against (yet)."""


class Unit(NamedTuple):
    """One object file: ``source`` compiled with the macros ``defines`` and ``flags``."""

    source: Path
    name: str
    defines: tuple[tuple[str, str], ...] = ()
    flags: str = ""


# ---- what is on this machine -----------------------------------------------------------------------------------------


def find_torch() -> Path:
    """Return torch's folder, also from inside pip's isolated build, whose ``sys.path`` hides it."""
    folders = [Path(p) for p in sys.path if p] + [Path(sysconfig.get_path(k)) for k in ("platlib", "purelib")]
    if os.environ.get("VIRTUAL_ENV"):
        folders += Path(os.environ["VIRTUAL_ENV"]).glob("lib/python*/site-packages")
    found = None
    for torch in (folder / "torch" for folder in folders):
        if (torch / "lib" / "libtorch.so").is_file():
            found = torch.resolve()
            if (torch / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
                return found
    if found:
        raise TorchMissing(f"the torch in {found} is too old or has no headers: pip install 'torch>=2.11'")
    raise TorchMissing("torch is not installed in this environment: pip install 'torch>=2.11'")


def torch_cuda(torch: Path) -> str | None:
    """Return the CUDA version torch was built with, read from its ``version.py``, or None."""
    match = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", (torch / "version.py").read_text(), re.M)
    return match.group(1) if match else None


def find_cxx() -> str:
    """Return the C++ compiler: ``$CXX``, else the first of c++, g++, clang++."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    raise BuildError(
        f"no C++ compiler ({wanted or 'c++, g++ or clang++'} not found): install one with C++20, for example with "
        "`apt install g++`, `dnf install gcc-c++` or `conda install -c conda-forge gxx`"
    )


def find_nvcc() -> str | None:
    """Return nvcc: ``$NVCC``, ``$CUDA_HOME``, the PATH, /usr/local/cuda or the nvidia-cuda-nvcc package; else None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.environ.get("NVCC"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    candidates += map(str, Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvcc"))
    return next((exe for name in candidates if name and (exe := shutil.which(name))), None)


def find_ninja() -> str:
    """Return ninja: the one of the Python package, else the one on the PATH."""
    with contextlib.suppress(ImportError):
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    if exe := shutil.which("ninja"):
        return exe
    raise BuildError("ninja is not installed: pip install ninja")


def wants_cuda(torch: Path) -> bool:
    """Whether the CUDA library is to be built too (see TORCH_PAGEDKV_CUDA)."""
    choice = os.environ.get("TORCH_PAGEDKV_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise BuildError(f"TORCH_PAGEDKV_CUDA must be auto, 0 or 1, not {choice!r}")
    return choice == "1" or (choice == "auto" and find_nvcc() is not None and torch_cuda(torch) is not None)


GPU_QUERY = """
import ctypes
cu, n, v = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_int()
if cu.cuInit(0) == 0 and cu.cuDeviceGetCount(ctypes.byref(n)) == 0:
    for i in range(n.value):
        print(*[cu.cuDeviceGetAttribute(ctypes.byref(v), a, i) or v.value for a in (75, 76)])
"""


def gpus() -> list[tuple[int, int]]:
    """Return the compute capabilities of this machine's GPUs, sorted, without repeats; empty without a driver.

    Asked of NVML, which creates no CUDA context in this process; without NVML, of the driver in a child process.
    """
    found = set()
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        ok = nvml.nvmlInit_v2() == 0
    except OSError:
        ok = False
    if ok:
        count, major, minor, handle = ctypes.c_uint(), ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0:
            for i in range(count.value):
                if nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(handle)) == 0:
                    nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
                    found.add((major.value, minor.value))
        nvml.nvmlShutdown()
    elif os.path.exists("/dev/nvidiactl"):
        out = subprocess.run([sys.executable, "-c", GPU_QUERY], capture_output=True, text=True).stdout
        found = {(int(major), int(minor)) for major, minor in (line.split() for line in out.splitlines())}
    return sorted(found)


# ---- architectures ---------------------------------------------------------------------------------------------------


def parse_archs(archs: str) -> list[tuple[str, bool]]:
    """Split ``"80;90a;100+PTX"`` into ``[("80", False), ("90a", False), ("100", True)]``."""
    parsed = []
    for arch in filter(None, re.split(r"[;,\s]+", archs)):
        match = re.fullmatch(r"(?:sm_)?(\d{2,3}[af]?|\d{1,2}\.\d[af]?)(\+PTX)?", arch)
        if not match:
            raise BuildError(f"CUDA architecture {arch!r} is not like 80, 9.0a or 100+PTX")
        parsed.append((match.group(1).replace(".", ""), match.group(2) is not None))
    if not parsed:
        raise BuildError("the list of CUDA architectures is empty")
    return parsed


def format_archs(archs: Sequence[tuple[str, bool]]) -> str:
    """The inverse of `parse_archs`."""
    return ";".join(arch + "+PTX" * ptx for arch, ptx in archs)


def native_archs() -> str | None:
    """Return the architectures of this machine's GPUs (9.0 as ``90a``: its kernels may use wgmma), or None."""
    names = [f"{major}{minor}" + "a" * ((major, minor) == (9, 0)) for major, minor in gpus()]
    return ";".join(names) or None


def pick_archs(archs: str | None = None, native: bool = False) -> str:
    """Resolve what to compile for: the argument, the environment, this machine's GPUs if ``native``, else the default.

    Of the default list, architectures that this nvcc does not know are left out; one asked for by name is an error
    from nvcc itself.
    """
    archs = archs or os.environ.get("TORCH_PAGEDKV_CUDA_ARCHS")
    if archs == "native":
        archs = native_archs()
        if not archs:
            raise BuildError("the CUDA architectures were to be this machine's, but it has no GPU or no driver")
    if archs or (native and (archs := native_archs())):
        return format_archs(parse_archs(archs))
    listed = subprocess.run([find_nvcc() or "nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    kept = [(arch, ptx) for arch, ptx in parse_archs(DEFAULT_ARCHS) if not known or arch.rstrip("af") in known]
    if not kept:
        raise BuildError(f"nvcc ({find_nvcc()}) is too old: it knows none of {DEFAULT_ARCHS}")
    if not any(ptx for _, ptx in kept):  # of the newest plain one: PTX of 90a runs on nothing newer
        newest = max(i for i, (arch, _) in enumerate(kept) if arch.isdigit())
        kept[newest] = (kept[newest][0], True)
    return format_archs(kept)


def covers(archs: str, capability: tuple[int, int]) -> bool:
    """Whether a library built for ``archs`` runs on a GPU of this compute capability."""
    for arch, ptx in parse_archs(archs):
        number = arch.rstrip("af")
        major, minor = int(number[:-1]), int(number[-1])
        if arch.endswith("a"):
            ok = (major, minor) == capability
        else:
            ok = major == capability[0] and minor <= capability[1]
        if ok or (ptx and not arch.endswith("a") and (major, minor) <= capability):
            return True
    return False


# ---- sources ---------------------------------------------------------------------------------------------------------


def source_hash(kind: str, csrc: Path | None = None) -> str:
    """Hash all that the library of this kind is made from, this builder included."""
    csrc = csrc or CSRC
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted([*csrc.glob("*.h"), *(csrc / kind).rglob("*")]):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh", ".inl"):
            digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def read_units(source: Path) -> list[tuple[tuple[str, str], ...]]:
    """Return the macro combinations that a source asks for in its ``// units:`` lines; one empty one without any."""
    combinations: list[tuple[tuple[str, str], ...]] = []
    with source.open() as f:
        for line in itertools.islice(f, 40):
            if not (match := UNITS_LINE.match(line.rstrip())):
                continue
            pairs = [UNITS_PAIR.match(word) for word in match.group(1).split()]
            if not all(pairs):
                raise BuildError(f"{source.name}: not of the form `// units: NAME=a,b NAME2=c,d`: {line.strip()}")
            axes = [[(pair.group(1), value) for value in pair.group(2).split(",")] for pair in pairs if pair]
            combinations += itertools.product(*axes)
    if len(set(combinations)) < len(combinations):
        raise BuildError(f"{source.name}: its `// units:` lines name a combination twice")
    return combinations or [()]


def list_units(kind: str, csrc: Path | None = None, only: Sequence[str] = ()) -> list[Unit]:
    """Return the objects that make up a library. ``only``: patterns such as ``cpu/norm*``; empty takes all."""
    csrc = csrc or CSRC
    x86 = platform.machine() in ("x86_64", "AMD64")
    out = []
    for source in sorted((csrc / kind).glob("*" + SUFFIX[kind])):
        if only and not any(fnmatch.fnmatch(f"{kind}/{source.name}", pattern) for pattern in only):
            continue
        isa = source.stem.rsplit("_", 1)[-1] if kind == "cpu" else ""
        if isa in ISA_FLAGS and not x86:
            continue
        for defines in read_units(source):
            name = ".".join([source.stem, *(re.sub(r"\W+", "_", value) for _, value in defines)])
            out.append(Unit(source, f"{kind}/{name}", defines, ISA_FLAGS.get(isa, "")))
    names = [unit.name for unit in out]
    if len(set(names)) < len(names):
        raise BuildError(f"{kind}: two units have the same name: {sorted({n for n in names if names.count(n) > 1})}")
    return out


# ---- building --------------------------------------------------------------------------------------------------------


def build(
    dest: str | Path,
    work: str | Path,
    kinds: Sequence[str] | None = None,
    archs: str | None = None,
    only: Sequence[str] = (),
    quiet: bool = False,
    csrc: Path | None = None,
) -> list[Path]:
    """Build ``libpagedkv_cpu.so`` and, where there is CUDA, ``libpagedkv_cuda.so`` into ``dest``; return their paths.

    Incremental (ninja) in ``work``, one process at a time; libraries are replaced atomically, each beside a JSON file
    that says what it was built from. ``kinds``: which libraries, by default what `wants_cuda` says.
    Raises BuildError with the compiler's output; TorchMissing if there is nothing to build against.
    """
    csrc = csrc or CSRC
    dest, work = Path(dest).absolute(), Path(work).absolute()
    torch = find_torch()
    kinds = kinds or (KINDS if wants_cuda(torch) else KINDS[:1])
    if "cuda" in kinds:
        if find_nvcc() is None:
            raise BuildError(
                "nvcc not found: install the CUDA toolkit that fits torch (or `pip install nvidia-cuda-nvcc "
                "nvidia-cuda-runtime nvidia-cuda-cccl`) and set CUDA_HOME; TORCH_PAGEDKV_CUDA=0 builds for the CPU only"
            )
        archs = pick_archs(archs)
    with locked(work):
        if not csrc.is_dir():
            raise BuildError(f"the kernel sources are missing: {csrc}")
        hashes = {kind: source_hash(kind, csrc) for kind in kinds}  # before compiling: a later edit must not hide
        units = {kind: list_units(kind, csrc, only) for kind in kinds}
        for kind in kinds:
            if not units[kind]:
                raise BuildError(f"no {kind} sources to build in {csrc / kind}")
        rules = ninja_file(units, torch, work, archs or "")
        path = work / "build.ninja"
        if not path.exists() or path.read_text() != rules:
            path.write_text(rules)
        run_ninja(work, sum(map(len, units.values())), quiet)
        dest.mkdir(parents=True, exist_ok=True)
        return [install(work, dest, kind, hashes[kind], archs, only) for kind in kinds]


def library(folder: Path, kind: str) -> Path:
    """The path of a library in a folder."""
    return folder / f"libpagedkv_{kind}.so"


def stamp(folder: Path, kind: str) -> dict[str, str]:
    """What the library in this folder was built from (keys ``source``, ``archs``); empty if there is none."""
    try:
        record = json.loads(library(folder, kind).with_suffix(".json").read_text())
        return record if library(folder, kind).is_file() else {}
    except (OSError, ValueError):
        return {}


def install(work: Path, dest: Path, kind: str, source: str, archs: str | None, only: Sequence[str]) -> Path:
    """Copy a library into place, readers seeing either the old or the new one, and write its stamp."""
    built, target = library(work, kind), library(dest, kind)
    if not target.exists() or target.stat().st_mtime_ns != built.stat().st_mtime_ns:
        shutil.copy2(built, target.with_suffix(".tmp"))
        os.replace(target.with_suffix(".tmp"), target)
    record = {"source": source if not only else "partial"} | ({"archs": archs} if kind == "cuda" and archs else {})
    if stamp(dest, kind) != record:
        target.with_suffix(".json.tmp").write_text(json.dumps(record) + "\n")
        os.replace(target.with_suffix(".json.tmp"), target.with_suffix(".json"))
    return target


@contextlib.contextmanager
def locked(folder: Path, purpose: str = "builds the native kernels") -> Iterator[None]:
    """Hold a folder's lock (created if missing), telling the user when another process makes us wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that {purpose}")
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    """Print a line about the build to stderr."""
    print(f"torch_pagedkv: {text}", file=sys.stderr, flush=True)


def ninja_file(units: dict[str, list[Unit]], torch: Path, work: Path, archs: str) -> str:
    """Write the ninja rules for the given units."""
    cache = next((exe + " " for name in ("ccache", "sccache") if (exe := shutil.which(name))), "")
    link_torch = f"-L{torch}/lib -Wl,--no-as-needed -ltorch -Wl,--as-needed"
    include = f"-std=c++20 -DTORCH_TARGET_VERSION={TORCH_TARGET} -isystem {shlex.quote(str(torch / 'include'))}"
    lines = [
        f"cxx = {escape(find_cxx())}",
        f"cxxflags = {escape(include)} {CXX_FLAGS}",
        "rule cxx",
        f"  command = {escape(cache)}$cxx $cxxflags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $unit",
        "rule link_cpu",
        "  command = $cxx -shared -o $out $in $libs",
        "  description = link $unit",
    ]
    if "cuda" in units:
        gencode = " ".join(
            f"-gencode=arch=compute_{arch},code=" + (f"[sm_{arch},compute_{arch}]" if ptx else f"sm_{arch}")
            for arch, ptx in parse_archs(archs)
        )
        host = f"-ccbin {shlex.quote(os.environ['CXX'])} " if os.environ.get("CXX") else ""
        # One -Xlinker list: nvcc moves separate -l flags behind --as-needed, and libtorch would be dropped.
        nvcc_torch = f"-Xlinker {shlex.quote(f'-L{torch}/lib,--no-as-needed,-ltorch,--as-needed')}"
        lines += [
            f"nvcc = {escape(shlex.quote(find_nvcc() or 'nvcc'))} {escape(host)}",
            f"nvccflags = {escape(include)} {NVCC_FLAGS} {gencode}",
            "rule nvcc",
            f"  command = {escape(cache)}$nvcc $nvccflags $extra -MD -MF $out.d -c $in -o $out > $out.log 2>&1; "
            f"rc=$$?; cat $out.log; if grep -qE '{SERIALISED}' $out.log; then "
            "echo 'error: ptxas serialised wgmma instructions (above)'; exit 1; fi; exit $$rc",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $unit",
            "rule link_cuda",
            # cudart is linked statically: the library then loads beside any CUDA version that torch brings along.
            "  command = $nvcc -shared -cudart static -o $out $in $libs",
            "  description = link $unit",
        ]
    for kind, members in units.items():
        rule = {"cpu": "cxx", "cuda": "nvcc"}[kind]
        for unit in members:
            extra = [unit.flags, *(f"-D{shlex.quote(f'{name}={value}')}" for name, value in unit.defines)]
            if unit.name == "cuda/version":
                extra.append(shlex.quote(f'-DPAGEDKV_CUDA_ARCHS="{archs}"'))
            lines += [
                f"build {escape(unit.name, path=True)}.o: {rule} {escape(str(unit.source), path=True)}",
                f"  extra = {escape(' '.join(filter(None, extra)))}",
                f"  unit = {escape(unit.name)}",
            ]
        objects = " ".join(f"{escape(unit.name, path=True)}.o" for unit in members)
        lines += [
            f"build {library(Path(), kind)}: link_{kind} {objects}",
            f"  libs = {escape(link_torch if kind == 'cpu' else nvcc_torch)}",
            f"  unit = {library(Path(), kind)}",
        ]
    return "\n".join(lines) + "\n"


def escape(text: str, path: bool = False) -> str:
    """Quote for ninja's own syntax."""
    text = text.replace("$", "$$")
    return text.replace(" ", "$ ").replace(":", "$:") if path else text


def jobs() -> int:
    """Compile jobs at once: ``$MAX_JOBS``, else as many as there are cores and 2 GiB of free memory for each."""
    if wanted := os.environ.get("MAX_JOBS"):
        if not wanted.isdigit() or int(wanted) < 1:
            raise BuildError(f"MAX_JOBS must be a positive number, not {wanted!r}")
        return int(wanted)
    count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):
        available = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
        count = min(count, int(available.group(1)) >> 21) if available else count
    return max(1, count)


def run_ninja(work: Path, total: int, quiet: bool) -> None:
    """Run ninja in ``work``. On a terminal it draws its own status line, else we print one every few seconds."""
    verbose = os.environ.get("VERBOSE", "") not in ("", "0")
    command = [find_ninja(), "-C", str(work), "-j", str(jobs())] + ["-v"] * verbose
    dry = subprocess.run([*command, "-n"], capture_output=True, text=True)
    if "no work to do" in dry.stdout:
        return
    began = time.monotonic()
    if not quiet:
        say(f"compiling the native kernels ({total} units, {jobs()} at a time) in {work}")
    messages: list[str] = []
    if not quiet and sys.stderr is sys.__stderr__ and sys.stderr is not None and sys.stderr.isatty():
        env = {"NINJA_STATUS": "  [%f/%t, %es] ", **os.environ}
        code = subprocess.run(command, stdout=sys.stderr.fileno(), env=env).returncode
    else:
        code, messages = watch(command, quiet)
    if code:
        first = next((line for line in messages if re.search(r"\berror\b", line)), "")
        details = "\n".join(messages) if quiet else "the compiler's messages are above"
        raise BuildError(f"the native build failed: {first or shlex.join(command)}\n{details}")
    if not quiet:
        say(f"compiled in {time.monotonic() - began:.0f} s")


def watch(command: list[str], quiet: bool) -> tuple[int, list[str]]:
    """Run ninja, turning its output into a progress line at most every 3 s; return its status and its messages."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "NINJA_STATUS": "[%f/%t] "},
    )
    assert process.stdout is not None
    messages: list[str] = []
    latest = ["starting"]
    done = threading.Event()

    def heartbeat() -> None:
        began, shown, waited = time.monotonic(), "", 0
        while not done.wait(3):
            waited += 1
            if latest[0] != shown or waited % 5 == 0:  # a line when something finished, else one every 15 s
                shown = latest[0]
                say(f"{shown}, {time.monotonic() - began:.0f} s")

    ticker = threading.Thread(target=heartbeat, daemon=True)
    if not quiet:
        ticker.start()
    try:
        read_progress(process.stdout, latest, messages, quiet)
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        done.set()
    return code, messages


def read_progress(stream: IO[str], latest: list[str], messages: list[str], quiet: bool) -> None:
    """Sort ninja's lines into progress (kept in ``latest``) and messages (printed and kept)."""
    for line in map(str.rstrip, stream):
        if re.match(r"\[\d+/\d+\] ", line) and not os.environ.get("VERBOSE"):
            latest[0] = line
        elif line and not line.startswith("ninja: Entering directory"):
            messages.append(line)
            if not quiet:
                print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="torch_pagedkv/build.py", description="Build the native libraries of torch_pagedkv (a no-op is quick)."
    )
    parser.add_argument("--dest", type=Path, default=HERE / "lib", help="where the libraries go (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for objects, kept between runs (default: build/native)")
    parser.add_argument("--cuda", action=argparse.BooleanOptionalAction, help="build the CUDA library (default: auto)")
    parser.add_argument("--archs", help=f"CUDA architectures, or native (default: {DEFAULT_ARCHS})")
    parser.add_argument(
        "--only", action="append", default=[], metavar="GLOB", help="only these sources, e.g. 'cpu/norm*' (repeats)"
    )
    parser.add_argument("--list", action="store_true", help="list the units and stop")
    args = parser.parse_args(argv)
    work = args.work or (CHECKOUT or HERE) / "build" / "native"
    kinds: Sequence[str] | None = None if args.cuda is None else KINDS[: 1 + args.cuda]
    if args.only:
        kinds = [kind for kind in KINDS if list_units(kind, only=args.only) and (kind in (kinds or KINDS))]
        work = args.work or (args.dest / "work" if args.dest != HERE / "lib" else work)
    if args.list:
        for kind in kinds or KINDS:
            print(*(unit.name for unit in list_units(kind, only=args.only)), sep="\n")
        return 0
    try:
        archs = args.archs
        if archs is None and CHECKOUT and "cuda" in (kinds or KINDS) and find_nvcc():
            archs = pick_archs(native=True)
        for path in build(args.dest, work, kinds, archs, args.only):
            print(path)
    except BuildError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
