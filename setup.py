"""What pyproject.toml cannot say: the package list, the native build, and a wheel tag for every Python 3."""

import importlib.util
import os
import sys

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = os.path.dirname(os.path.abspath(__file__))
spec = importlib.util.spec_from_file_location("_pagedkv_build", os.path.join(HERE, "torch_pagedkv", "build.py"))
native = sys.modules["_pagedkv_build"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)

# patches/, evals/ and csrc/ lie at the top of the checkout and inside the package once installed.
MOVED = [name for top in ("patches", "evals", "csrc") for name in (top, *(f"{top}.{p}" for p in find_packages(top)))]
MOVED += ["csrc.cpu", "csrc.cuda"]


class BuildNative(build_ext):
    """Runs torch_pagedkv/build.py in place of setuptools' own compiler calls."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        dest = os.path.join(HERE if in_place else os.path.abspath(self.build_lib), "torch_pagedkv", "lib")
        self.built = []
        if os.environ.get("TORCH_PAGEDKV_BUILD", "1") == "0":
            return
        try:
            archs = native.pick_archs(native=in_place) if native.wants_cuda(native.find_torch()) else None
            libraries = native.build(dest, os.path.join(HERE, "build", "native"), archs=archs)
            self.built = [str(p) for lib in libraries for p in (lib, lib.with_suffix(".json"))]
        except native.TorchMissing as reason:
            self.announce(f"{reason}; the kernels will be compiled on first import", level=4)
        except native.BuildError as error:
            raise SystemExit(f"{error}\nTORCH_PAGEDKV_BUILD=0 installs without compiling.") from None

    def get_outputs(self) -> list:
        return self.built

    def get_output_mapping(self) -> dict:
        return {}

    def get_source_files(self) -> list:
        return []


class PlatformWheel(bdist_wheel):
    """The libraries use torch's stable ABI and no Python API: one wheel per platform."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=find_packages(include=["torch_pagedkv*"]) + [f"torch_pagedkv.{name}" for name in MOVED],
    package_dir={f"torch_pagedkv.{name}": name.replace(".", "/") for name in MOVED},
    ext_modules=[Extension("torch_pagedkv._libraries", sources=[])],  # marks the wheel as platform-specific
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
