"""The CUDA kernels without a GPU: csrc/cuda on the emulated device of tests/emulate, against the references.

`tests.emulate` says what that shows and what it cannot. By default two sizes of the attention kernels stand for the
others; ``-m slow`` compiles all of them, and some with AddressSanitizer.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from emulate import build, transform

from torch_pagedkv import build as native

ROOT = Path(__file__).resolve().parents[1]
FEW, ALL = (64, 256), build.BUCKETS

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"), reason="written for Linux and g++"
)


def run(library: Path, script: str, *arguments: str, **environment: str) -> str:
    """Run a script on the emulated device in a process of its own; return what it printed."""
    env = {**os.environ, "TORCH_PAGEDKV_LIB": str(library), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(ROOT / script), *arguments]
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, f"{script}: exit status {result.returncode}\n{result.stdout}{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="session")
def few() -> Path:
    """The library with a small and the largest size of the attention kernels."""
    return build.build(FEW, quiet=True)


@pytest.fixture(scope="session")
def everything() -> Path:
    """The library with all sizes."""
    return build.build(ALL, quiet=True)


def test_every_op(few: Path) -> None:
    assert "all right" in run(few, "tests/gpu/sanitize.py", "--device", "cpu")


@pytest.mark.parametrize("hopper", [0, 1])
def test_random_attention(few: Path, hopper: int) -> None:
    assert "all right" in run(few, "tests/emulate/fuzz.py", "--cases", "100", EMULATE_HOPPER=str(hopper))


@pytest.mark.slow
@pytest.mark.parametrize("hopper", [0, 1])
def test_prefill(everything: Path, hopper: int) -> None:
    assert "all right" in run(everything, "tests/gpu/prefill_check.py", "--device", "cpu", EMULATE_HOPPER=str(hopper))


@pytest.mark.parametrize("hopper", [0, 1])
def test_random_int4(few: Path, hopper: int) -> None:
    """Few SMs: enough weights for each that Hopper's products pay."""
    environment = {"EMULATE_HOPPER": str(hopper), "EMULATE_SMS": "2" if hopper else "132"}
    output = run(few, "tests/ops/int4_problems.py", "--cases", "40", **environment)
    assert "on emulated CUDA: all right" in output


@pytest.mark.slow
@pytest.mark.parametrize("sms, hopper", [(1, 0), (1, 1), (2, 1), (132, 0)])
def test_more_random_int4(few: Path, sms: int, hopper: int) -> None:
    """Few SMs: K is not split over CTAs, and Hopper's products pay; many: as often as it can be."""
    arguments = ("--cases", "150", "--seed", str(1000 * sms + hopper))
    environment = {"EMULATE_SEED": str(sms), "EMULATE_SMS": str(sms), "EMULATE_HOPPER": str(hopper)}
    run(few, "tests/ops/int4_problems.py", *arguments, **environment)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_every_size(everything: Path, seed: int) -> None:
    run(everything, "tests/gpu/sanitize.py", "--device", "cpu", EMULATE_SEED=str(seed), EMULATE_SMS=str(40 * seed))


@pytest.mark.slow
@pytest.mark.parametrize("hopper", [0, 1])
@pytest.mark.parametrize("sms", [1, 7, 132])
def test_random_attention_in_every_size(everything: Path, sms: int, hopper: int) -> None:
    arguments = ("--cases", "300", "--seed", str(1000 * sms))
    environment = {"EMULATE_SEED": str(sms), "EMULATE_SMS": str(sms), "EMULATE_HOPPER": str(hopper)}
    run(everything, "tests/emulate/fuzz.py", *arguments, **environment)


@pytest.mark.slow
def test_less_shared_memory(everything: Path) -> None:
    """As on sm_86: launches that do not fit are refused, so the kernels must choose smaller ones."""
    run(everything, "tests/emulate/fuzz.py", "--cases", "200", "--seed", "5000", EMULATE_SHARED=str(99 << 10))


@pytest.mark.slow
def test_no_access_outside_of_tensors() -> None:
    """Under AddressSanitizer, which the interpreter has to load first."""
    name = "libclang_rt.asan.so" if "clang" in native.find_cxx() else "libasan.so"
    runtime = subprocess.run(
        [*shlex.split(native.find_cxx()), f"-print-file-name={name}"], capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip(f"{native.find_cxx()} has no {name}")
    library = build.build(address=True, quiet=True)
    env = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    run(library, "tests/gpu/sanitize.py", "--device", "cpu", **env)
    run(library, "tests/emulate/fuzz.py", "--cases", "200", "--seed", "9000", **env)
    run(library, "tests/ops/int4_problems.py", "--cases", "100", "--seed", "9000", **env)


# ---- the device itself -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wrong(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program whose kernels are wrong, each in its way."""
    folder = tmp_path_factory.mktemp("wrong")
    path = build.HERE / "wrong.cu"
    (folder / "wrong.cpp").write_text(transform.transform(path.read_text(), path))
    flags = [*shlex.split(build.FLAGS), f"-I{build.HERE}", "-isystem", str(native.find_torch() / "include")]
    cxx = shlex.split(native.find_cxx())
    macro = f"-DTORCH_TARGET_VERSION={native.TORCH_TARGET}"
    subprocess.run([*cxx, *flags, macro, "-c", str(folder / "wrong.cpp"), "-o", str(folder / "wrong.o")], check=True)
    subprocess.run([*cxx, "-o", str(folder / "wrong"), str(folder / "wrong.o"), str(few / "runtime.o")], check=True)
    return folder / "wrong"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent_barrier", "deadlock"),
        ("divergent_collective", "meets"),
        ("missing_lanes", r"only 31 threads|thread ends while others"),
        ("missing_barrier", r"out\[\d+\] is -?nan"),
        ("past_the_end", r"past_the_end.*fault at .* byte \d+ of the block's 256"),
        ("in_front", "wrote byte -4 of its 256"),
        ("misaligned", r"thread \(5, 0, 0\): undefined behaviour"),
        ("too_early", "which a cp.async is still to write"),
        ("more_registers", "deadlock"),
        ("copy_without_end", "ends before its copies have arrived"),
        ("unexpected_copy", "bytes that no barrier expects"),
        ("too_much_shared", "cudaErrorInvalidValue"),
    ],
)
def test_the_device_sees(wrong: Path, name: str, message: str) -> None:
    result = subprocess.run([str(wrong), name], capture_output=True, text=True)
    assert result.returncode != 0
    assert re.search(message, result.stderr), result.stderr


def test_the_device_is_content(wrong: Path) -> None:
    for seed in range(20):
        subprocess.run([str(wrong), "right"], check=True, env={**os.environ, "EMULATE_SEED": str(seed)})


@pytest.mark.parametrize(
    "text",
    ['asm("mov.u32 %0, 1; mov.u32 %1, 2;" : "=r"(a), "=r"(b));', "__shared__ Pair<int, int> x;", "f<<<1, 2>>>(3) + 4;"],
)
def test_what_cannot_be_understood_is_refused(text: str) -> None:
    with pytest.raises(transform.TransformError):
        transform.transform(text, Path("x.cu"))


def test_lines_stay_where_they_are() -> None:
    for path in sorted((native.CSRC / "cuda").glob("*.cu*")):
        if path.name in build.REPLACED:
            continue
        text = path.read_text()
        changed = transform.transform(text, path).split("\n", 1)[1]
        assert changed.count("\n") == text.count("\n"), path
