"""The native builder and loader. Most tests build a scratch library; the CUDA test needs nvcc but no GPU."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import torch_pagedkv
from torch_pagedkv import _native, build

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def clean_env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("CXX", "NVCC", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS", "VERBOSE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TORCH_PAGEDKV_CUDA", "TORCH_PAGEDKV_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def csrc(tmp_path: Path, clean_env: pytest.MonkeyPatch) -> Path:
    """A small source tree: two units of one file, one plain file, one per instruction set."""
    folder = tmp_path / "with space" / "csrc"
    (folder / "cpu").mkdir(parents=True)
    (folder / "cuda").mkdir()
    (folder / "common.h").write_text(
        "#define CAT_(a, b) a##b\n#define CAT(a, b) CAT_(a, b)\n"
        '#define EXPORT extern "C" __attribute__((visibility("default"))) int\n'
    )
    (folder / "cpu" / "sum.cpp").write_text(
        "// units: T=float,double N=1,2\n"
        '#include "../common.h"\n'
        "EXPORT CAT(CAT(size_, T), N)() { return sizeof(T) * N; }\n"
    )
    (folder / "cpu" / "plain.cpp").write_text('#include "../common.h"\nEXPORT answer() { return 41; }\n')
    for isa, macro in (("avx2", "__AVX2__"), ("avx512", "__AVX512BW__"), ("avx512bf16", "__AVX512BF16__")):
        (folder / "cpu" / f"fast_{isa}.cpp").write_text(f"#ifndef {macro}\n#error flags\n#endif\nint fast_{isa};\n")
    (folder / "cuda" / "a.cu").write_text("int a;\n")
    return folder


def make(csrc: Path, tmp_path: Path, **options: object) -> Path:
    return build.build(tmp_path / "dest", tmp_path / "work dir", ["cpu"], quiet=True, csrc=csrc, **options)[0]  # type: ignore[arg-type]


def call(library: Path, function: str) -> int:
    """In a child, as a library once loaded stays."""
    code = f"import ctypes, sys, torch; print(ctypes.CDLL(sys.argv[1]).{function}())"
    return int(subprocess.run([sys.executable, "-c", code, library], check=True, capture_output=True, text=True).stdout)


# ---- units -----------------------------------------------------------------------------------------------------------


def test_units_line_gives_one_unit_per_combination(tmp_path: Path) -> None:
    source = tmp_path / "x.cu"
    source.write_text("// About.\n// units: T=float,__half D=64,128\n// units: T=double D=32\nint x;\n")
    combinations = [dict(c) for c in build.read_units(source)]
    assert combinations == [
        {"T": "float", "D": "64"},
        {"T": "float", "D": "128"},
        {"T": "__half", "D": "64"},
        {"T": "__half", "D": "128"},
        {"T": "double", "D": "32"},
    ]
    source.write_text("// the units: T=1 are not declared here\nint x;\n")
    assert build.read_units(source) == [()]


@pytest.mark.parametrize("line", ["T", "T=", "T=a, b", "=a", "T=a,,b"])
def test_units_line_malformed(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.cu").write_text(f"// units: {line}\n")
    with pytest.raises(build.BuildError, match=r"x\.cu: not of the form"):
        build.read_units(tmp_path / "x.cu")


def test_units_line_repeated_combination(tmp_path: Path) -> None:
    (tmp_path / "x.cu").write_text("// units: T=a,b\n// units: T=b\n")
    with pytest.raises(build.BuildError, match="twice"):
        build.read_units(tmp_path / "x.cu")


def test_list_units(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = ["cpu/sum.float.1", "cpu/sum.float.2", "cpu/sum.double.1", "cpu/sum.double.2"]
    fast = ["cpu/fast_avx2", "cpu/fast_avx512", "cpu/fast_avx512bf16"]
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert [unit.name for unit in build.list_units("cpu", csrc)] == [*fast, "cpu/plain", *sums]
    assert [unit.name for unit in build.list_units("cpu", csrc, ["cpu/[ps]*"])] == ["cpu/plain", *sums]
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert [unit.name for unit in build.list_units("cpu", csrc)] == ["cpu/plain", *sums]


# ---- architectures ---------------------------------------------------------------------------------------------------


def test_archs_parse() -> None:
    assert build.parse_archs("80;9.0a, sm_100+PTX") == [("80", False), ("90a", False), ("100", True)]
    assert build.format_archs(build.parse_archs(build.DEFAULT_ARCHS)) == build.DEFAULT_ARCHS
    for bad in ("", "hopper", "90b", "8"):
        with pytest.raises(build.BuildError):
            build.parse_archs(bad)


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        ("80", (8, 0), True),
        ("80", (8, 6), True),
        ("86", (8, 0), False),
        ("80", (9, 0), False),
        ("80+PTX", (9, 0), True),
        ("90a", (9, 0), True),
        ("90a+PTX", (10, 0), False),
        ("100+PTX", (12, 0), True),
        ("100", (12, 0), False),
        (build.DEFAULT_ARCHS, (8, 9), True),
        (build.DEFAULT_ARCHS, (10, 3), True),
        (build.DEFAULT_ARCHS, (12, 1), True),
        (build.DEFAULT_ARCHS, (7, 5), False),
    ],
)
def test_archs_cover(archs: str, capability: tuple[int, int], expected: bool) -> None:
    assert build.covers(archs, capability) is expected


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + textwrap.dedent(text))
    path.chmod(0o755)
    return str(path)


def test_default_archs_are_what_nvcc_knows(tmp_path: Path, clean_env: pytest.MonkeyPatch) -> None:
    clean_env.setenv("NVCC", script(tmp_path / "nvcc", "for a in 75 80 86 89 90; do echo compute_$a; done\n"))
    assert build.pick_archs() == "80;86;89+PTX;90a"
    assert build.pick_archs("120") == "120"  # asked for by name: nvcc shall say that it does not know it
    clean_env.setenv("TORCH_PAGEDKV_CUDA_ARCHS", "8.0 90a")
    assert build.pick_archs() == "80;90a"
    clean_env.setattr(build, "gpus", lambda: [(8, 9), (9, 0)])
    clean_env.setenv("TORCH_PAGEDKV_CUDA_ARCHS", "native")
    assert build.pick_archs() == "89;90a"
    clean_env.setattr(build, "gpus", list)
    with pytest.raises(build.BuildError, match="no GPU"):
        build.pick_archs()


# ---- building --------------------------------------------------------------------------------------------------------


def test_build_is_incremental(csrc: Path, tmp_path: Path) -> None:
    library = make(csrc, tmp_path)
    assert call(library, "answer") == 41
    assert [call(library, f"size_{t}{n}") for t in ("float", "double") for n in (1, 2)] == [4, 8, 8, 16]
    before = library.stat()
    assert build.stamp(library.parent, "cpu")["source"] == build.source_hash("cpu", csrc)
    began = time.monotonic()
    make(csrc, tmp_path)
    assert time.monotonic() - began < 5  # nothing is compiled
    assert (library.stat().st_ino, library.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    objects = {p: p.stat().st_mtime_ns for p in (tmp_path / "work dir").rglob("*.o")}
    plain = csrc / "cpu" / "plain.cpp"
    plain.write_text(plain.read_text().replace("41", "42"))
    make(csrc, tmp_path)
    assert call(library, "answer") == 42
    assert [p.name for p, t in objects.items() if p.stat().st_mtime_ns != t] == ["plain.o"]
    assert build.stamp(library.parent, "cpu")["source"] == build.source_hash("cpu", csrc)


def test_header_change_rebuilds(csrc: Path, tmp_path: Path) -> None:
    library = make(csrc, tmp_path)
    old = build.source_hash("cpu", csrc)
    (csrc / "common.h").write_text((csrc / "common.h").read_text() + "#define answer reply\n")
    assert build.source_hash("cpu", csrc) != old
    make(csrc, tmp_path)
    assert call(library, "reply") == 41


def test_partial_build_is_not_taken_for_a_whole_one(csrc: Path, tmp_path: Path) -> None:
    library = make(csrc, tmp_path, only=["cpu/plain*"])
    assert call(library, "answer") == 41
    assert build.stamp(library.parent, "cpu")["source"] == "partial"


def test_compile_error_is_shown_and_keeps_the_old_library(csrc: Path, tmp_path: Path) -> None:
    library = make(csrc, tmp_path)
    (csrc / "cpu" / "plain.cpp").write_text("int answer( { }\n")
    with pytest.raises(build.BuildError, match=r"plain\.cpp:1.*error"):
        make(csrc, tmp_path)
    assert call(library, "answer") == 41
    assert build.stamp(library.parent, "cpu")["source"] != build.source_hash("cpu", csrc)


def slow_compiler(tmp_path: Path, env: pytest.MonkeyPatch, before_plain: str) -> None:
    """A C++ compiler that runs a command before it compiles plain.cpp."""
    env.setenv("CXX", script(tmp_path / "cxx", f'case "$*" in *plain.cpp*) {before_plain};; esac\nexec c++ "$@"\n'))


def test_processes_build_once(csrc: Path, tmp_path: Path, clean_env: pytest.MonkeyPatch) -> None:
    log = tmp_path / "calls"
    slow_compiler(tmp_path, clean_env, f"echo x >> {log}; sleep 1")
    code = (
        "import importlib.util, sys; s = importlib.util.spec_from_file_location('b', sys.argv[1]);"
        "b = sys.modules['b'] = importlib.util.module_from_spec(s); s.loader.exec_module(b);"
        "b.build(sys.argv[2], sys.argv[3], ['cpu'], csrc=b.Path(sys.argv[4]))"
    )
    command = [sys.executable, "-c", code, build.__file__, tmp_path / "dest", tmp_path / "work", csrc]
    children = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], outputs
    assert log.read_text() == "x\n"
    assert sum("waiting for another process" in out for out in outputs) == 2
    assert sum("compiling the native kernels" in out for out in outputs) == 1


def test_progress_lines(
    csrc: Path, tmp_path: Path, clean_env: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    slow_compiler(tmp_path, clean_env, "sleep 4")
    build.build(tmp_path / "dest", tmp_path / "work", ["cpu"], csrc=csrc, only=["cpu/plain*", "cpu/sum*"])
    lines = capfd.readouterr().err.splitlines()
    assert "5 units" in lines[0]
    progress = r"(\[\d/\d\] cpu/sum.*|starting), \d+ s$"  # on one core nothing is finished yet
    assert any(re.search(progress, line) for line in lines[1:-1]), lines
    assert re.search(r"compiled in \d+ s", lines[-1])


def test_wgmma_warning_fails_the_build(csrc: Path, tmp_path: Path, clean_env: pytest.MonkeyPatch) -> None:
    advice = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    nvcc = script(
        tmp_path / "nvcc",
        f"""
        case "$*" in *-shared*) ;; *) echo "{advice}" ;; esac
        while [ $# -gt 0 ]; do case $1 in -o|-MF) shift; echo 'x:' > "$1" ;; esac; shift; done
        """,
    )
    clean_env.setenv("NVCC", nvcc)
    for _ in range(2):  # the object must not count as built the second time
        with pytest.raises(build.BuildError, match="serialised wgmma"):
            build.build(tmp_path / "dest", tmp_path / "work", ["cuda"], "90a", quiet=True, csrc=csrc)
    assert not build.library(tmp_path / "dest", "cuda").exists()
    (tmp_path / "nvcc").write_text((tmp_path / "nvcc").read_text().replace("C7510", "C7000"))
    build.build(tmp_path / "dest", tmp_path / "work", ["cuda"], "90a", quiet=True, csrc=csrc)
    assert build.stamp(tmp_path / "dest", "cuda")["archs"] == "90a"


def test_missing_tools_are_named(csrc: Path, tmp_path: Path, clean_env: pytest.MonkeyPatch) -> None:
    with clean_env.context() as m:
        m.setenv("CXX", "no-such-compiler")
        with pytest.raises(build.BuildError, match=r"no C\+\+ compiler \(no-such-compiler.*apt install"):
            make(csrc, tmp_path)
    with clean_env.context() as m:
        m.setitem(sys.modules, "ninja", None)
        m.setenv("PATH", str(tmp_path))
        with pytest.raises(build.BuildError, match="pip install ninja"):
            build.find_ninja()
    with clean_env.context() as m:
        m.setattr(build, "find_nvcc", lambda: None)
        with pytest.raises(build.BuildError, match=r"nvcc not found.*CUDA_HOME"):
            build.build(tmp_path / "dest", tmp_path / "work", ["cuda"], csrc=csrc)
    with clean_env.context() as m:
        m.setattr(sys, "path", [])
        m.setattr("sysconfig.get_path", lambda name: str(tmp_path))
        m.delenv("VIRTUAL_ENV", raising=False)
        with pytest.raises(build.TorchMissing, match="torch is not installed"):
            build.find_torch()
        (tmp_path / "torch" / "lib").mkdir(parents=True)
        (tmp_path / "torch" / "lib" / "libtorch.so").touch()
        with pytest.raises(build.TorchMissing, match="too old or has no headers"):
            build.find_torch()
    clean_env.setenv("TORCH_PAGEDKV_CUDA", "yes")
    with pytest.raises(build.BuildError, match="must be auto, 0 or 1"):
        build.wants_cuda(build.find_torch())


# ---- what is loaded --------------------------------------------------------------------------------------------------


def loaded() -> Path:
    path = _native.libraries["cpu"].path
    assert path is not None, _native.libraries["cpu"].reason
    return path


def test_every_operator_has_a_cpu_kernel() -> None:
    loaded()
    assert len(_native.operators()) > 0
    missing = [name for name in _native.operators() if not has_kernel(name, "CPU")]
    assert missing == []


def has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"{_native.NAMESPACE}::{name}", key)


def test_library_needs_only_the_stable_abi() -> None:
    """A C++ symbol of libtorch would tie the binary to one version of torch."""
    names = [name for _, name in symbols(loaded(), "-D", "--undefined-only")]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert [name for name in names if re.match(r"_Z\w*?(2at|3c10|5torch)", name)] == []


def test_isa_units_share_no_code() -> None:
    """An inline function compiled with AVX-512 could be the copy that the linker keeps for every CPU."""
    objects = sorted((ROOT / "build" / "native" / "cpu").glob("*_avx*.o"))
    if not objects:
        pytest.skip("the library was not built in this checkout")
    weak = [(path.name, name) for path in objects for kind, name in symbols(path, "--defined-only") if kind in "WVu"]
    assert weak == []


def test_kernels_that_wait_read_nothing_ahead() -> None:
    """A load that the compiler may take for one of constants moves up across the wait for the kernel in front."""
    sources = {path.name: path.read_text() for path in (ROOT / "csrc" / "cuda").iterdir()}
    waiting = [name for name, text in sources.items() if re.search(r"\b(begin_kernel|wait_for_previous)\(\);", text)]
    waiting += [name for name, text in sources.items() if re.search(r"\bbegin_planned\(p, plan\);", text)]
    assert {"norm.cu", "linear.cu", "int4_mma.cu", "attention_plan.cuh", "paged_decode.cuh", "paged_simt.cuh"} <= {
        *waiting
    }
    waiting.append("attention_math.cuh")
    assert [name for name in waiting if re.search(r"__ldg\(|__restrict__|ld\.global\.nc", sources[name])] == []


def run_python(code: str, *args: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)


def symbols(path: Path, *which: str) -> list[tuple[str, str]]:
    """``(type, name)`` of an object's or library's symbols."""
    out = subprocess.run(["nm", *which, path], check=True, capture_output=True, text=True).stdout
    return [(line.split()[-2], line.split()[-1]) for line in out.splitlines()]


def test_denormals_survive_the_import() -> None:
    child = run_python("import torch, torch_pagedkv; assert torch.tensor([1e-40]).mul(1).item() > 0")
    assert child.returncode == 0, child.stderr


def test_simd_override() -> None:
    code = "import torch_pagedkv._native as n; print(n.libraries['cpu'].target)"
    child = run_python(code, PAGEDKV_SIMD="generic")
    assert child.stdout.strip() == "generic", child.stderr
    best = run_python(code, PAGEDKV_SIMD="").stdout.strip()
    assert best == _native.libraries["cpu"].target or os.environ.get("PAGEDKV_SIMD")


def test_without_a_library_ops_say_why(tmp_path: Path) -> None:
    child = run_python(
        """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import torch, torch_pagedkv
        assert any("CPU kernels are not available" in str(w.message) for w in caught), caught
        from torch_pagedkv import _native
        assert _native.libraries["cpu"].path is None
        x = torch.ones(2, 16)
        try:
            torch.ops.torch_pagedkv.rms_norm(x, x[0], 1e-5)
        except RuntimeError as error:
            print(error)
        """,
        TORCH_PAGEDKV_LIB=str(tmp_path),
    )
    assert child.returncode == 0, child.stderr
    reason = r"torch_pagedkv::rms_norm has no CPU kernel.*TORCH_PAGEDKV_LIB=.*has no libpagedkv_cpu\.so"
    assert re.search(reason, child.stdout), child.stdout


def test_import_needs_no_transformers() -> None:
    child = run_python(
        "import sys; sys.modules['transformers'] = None; import torch_pagedkv as t; t.ops; print(dir(t))"
    )
    assert child.returncode == 0, child.stderr
    assert "patch" in child.stdout


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        torch_pagedkv.nonsense  # noqa: B018


# ---- CUDA ------------------------------------------------------------------------------------------------------------

LOAD_CUDA = """
import ctypes, sys, torch, torch_pagedkv
from torch_pagedkv import _native
assert _native.libraries["cpu"].path and "cuda" not in _native.libraries, _native.libraries
if torch.version.cuda is None:
    ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[1])
for name in _native.operators():
    for key in ("CPU", "CUDA"):
        if not torch._C._dispatch_has_computed_kernel_for_dispatch_key("torch_pagedkv::" + name, key):
            print(name, "has no", key, "kernel")
print("for", _native._target("cuda", sys.argv[1]))
"""


def stub_library(library: Path, folder: Path) -> Path:
    """Define what the CUDA library takes from a CUDA torch, so that it loads beside a CPU one."""
    torch_dir = build.find_torch()
    wanted = {name for _, name in symbols(library, "-D", "--undefined-only") if re.match("aoti_|torch_", name)}
    missing = wanted - {name for _, name in symbols(torch_dir / "lib" / "libtorch_cpu.so", "-D", "--defined-only")}
    headers = "".join(p.read_text() for p in (torch_dir / "include" / "torch" / "csrc").rglob("*shim*.h"))
    assert [n for n in missing if not re.search(rf"\b{n}\b", headers)] == []  # names that no torch has
    assert all("cuda" in n for n in missing), missing
    (folder / "stub.c").write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in sorted(missing)))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "stub.so", folder / "stub.c"], check=True)
    return folder / "stub.so"


@pytest.mark.slow
@pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc")
def test_cuda_sources_compile_and_cover_every_operator(tmp_path: Path) -> None:
    """Without a GPU: the sources compile, link, load, and register a kernel for each operator."""
    archs = os.environ.get("PAGEDKV_CI_ARCHS", "90a")
    work = ROOT / "build" / "ci-cuda"  # kept between runs: only what changed is compiled
    (library,) = build.build(tmp_path, work, ["cuda"], archs, quiet=True)
    stub = stub_library(library, tmp_path)
    child = run_python(LOAD_CUDA, library, stub, CUDA_VISIBLE_DEVICES="")  # not the one that a GPU would make us load
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines() == [f"for {build.format_archs(build.parse_archs(archs))}"]


# ---- packaging -------------------------------------------------------------------------------------------------------


@pytest.fixture
def source_tree(tmp_path: Path) -> Iterator[Path]:
    tree = tmp_path / "tree"
    skip = shutil.ignore_patterns(".*", "build", "dist", "lib", "__pycache__", "*.egg-info", "results")
    shutil.copytree(ROOT, tree, ignore=skip)
    yield tree


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="no setuptools")
def test_wheel_from_sdist_is_complete(source_tree: Path, tmp_path: Path) -> None:
    """checkout -> sdist -> wheel -> import, without compiling again."""
    hook = "from setuptools import build_meta as b; import sys; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"

    def run(kind: str, cwd: Path) -> Path:
        child = run_python(hook, kind, tmp_path, cwd=cwd, TORCH_PAGEDKV_BUILD="0")
        assert child.returncode == 0, child.stdout + child.stderr
        return tmp_path / child.stdout.splitlines()[-1]

    shutil.unpack_archive(run("sdist", source_tree), tmp_path / "sdist")
    wheel = run("wheel", next((tmp_path / "sdist").iterdir()))
    assert "-py3-none-linux" in wheel.name
    target = tmp_path / "target"
    zipfile.ZipFile(wheel).extractall(target)

    def sources(root: Path) -> set[str]:
        kinds = (".py", ".h", ".cuh", ".cpp", ".cu", ".inl", ".json", ".yaml")
        return {
            p.relative_to(root).as_posix()
            for p in root.rglob("*")
            if p.suffix in kinds and not {"lib", "results"} & set(p.parts)
        }

    for folder, packed in (("torch_pagedkv", "."), ("csrc", "csrc"), ("patches", "patches"), ("evals", "evals")):
        missing = sources(source_tree / folder) - sources(target / "torch_pagedkv" / packed)
        assert missing == set(), folder
    code = "import torch_pagedkv, torch_pagedkv.patches, torch_pagedkv.evals; print(torch_pagedkv.__file__)"
    child = run_python(code, cwd=tmp_path, PYTHONPATH=str(target), TORCH_PAGEDKV_LIB=str(loaded().parent))
    assert child.stdout.strip() == str(target / "torch_pagedkv" / "__init__.py"), child.stderr
