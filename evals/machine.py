"""What a measurement ran on: written into every result, so that a number can be judged and repeated."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import torch_pagedkv
from torch_pagedkv import _native

PACKAGES = ("transformers", "tokenizers", "numpy", "triton", "lm_eval")

GPU_FIELDS = {  # nvidia-smi's name of a field -> ours, with the unit
    "driver_version": "driver",
    "clocks.sm": "sm_clock_mhz",
    "clocks.max.sm": "max_sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "clocks.max.mem": "max_memory_clock_mhz",
    "power.limit": "power_limit_w",
}


def describe(device: torch.device | str = "cpu", argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Describe this machine, the software and the command.

    Args:
        device: what the measurement runs on; a CUDA device adds ``gpu``, else that is None.
        argv: the command line, the program's name first (default: that of this process). Of absolute paths only the
            last part is kept: they say nothing elsewhere.

    Returns:
        JSON types only: date (UTC), command, commit (with ``+`` if files were changed since; None outside a git
        checkout), cpu, cores, threads, gpu, native (what the loaded kernels are for) and versions.
    """
    device = torch.device(device)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command(argv),
        "commit": commit(),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu(device) if device.type == "cuda" else None,
        "native": {kind: library.target for kind, library in _native.libraries.items()},
        "versions": versions(),
    }


def summary(machine: dict[str, Any]) -> str:
    """The description in one line, for the caption of a table."""
    gpu, versions = machine["gpu"], machine["versions"]
    if gpu:
        where = f"{gpu['name']}, driver {gpu['driver']}, CUDA {versions['cuda']}"
    else:
        where = f"{machine['cpu']}, {machine['cores']} cores, kernels for {machine['native'].get('cpu')}"
    commit = f", commit {machine['commit']}" if machine["commit"] else ""
    software = f"torch {versions['torch']}, transformers {versions.get('transformers', '-')}"
    return f"{where}; {software}; {machine['date'][:10]}{commit}"


def command(argv: Sequence[str] | None = None) -> str:
    """A command line as one would type it, without this machine's folders."""
    if argv is None:
        spec = getattr(sys.modules["__main__"], "__spec__", None)  # there if run as `python -m`
        program = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]
        argv = [*program, *sys.argv[1:]]
    return shlex.join(Path(part).name if os.path.isabs(part) else part for part in argv)


def commit() -> str | None:
    """The checkout's commit, with ``+`` behind it if tracked files differ from it; None without git."""

    def git(*arguments: str) -> str:
        root = Path(__file__).resolve().parent.parent
        call = ["git", "-C", str(root), *arguments]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpu(device: torch.device) -> dict[str, Any]:
    """Name, memory, driver, clocks now and at most, power limit; what nvidia-smi does not tell is None."""
    properties = torch.cuda.get_device_properties(device)
    told: dict[str, Any] = dict.fromkeys(GPU_FIELDS.values())
    query = f"--query-gpu={','.join(GPU_FIELDS)}"
    # by uuid: nvidia-smi's numbers do not follow CUDA_VISIBLE_DEVICES
    call = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-i", f"GPU-{properties.uuid}"]
    try:
        line = subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
        told = dict(zip(GPU_FIELDS.values(), line.split(", ")))
    except (OSError, subprocess.CalledProcessError):
        pass
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        **told,
    }


def versions() -> dict[str, str | None]:
    """Versions of what takes part."""
    found: dict[str, str | None] = {
        "torch_pagedkv": torch_pagedkv.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
