"""The command ``torch-pagedkv``: env, generate, and the evaluations (`FORWARDED`)."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

import torch_pagedkv

from . import _native, build

OPTIONAL = {  # package -> what it is for and the extra that installs it
    "gguf": ("reading the demo's model when the hub cannot be reached", "demo"),
    "accelerate": ("reading the demo's model when the hub cannot be reached", "demo"),
    "jinja2": ("chat templates", "demo"),
    "lm_eval": ("accuracy on its tasks", "eval"),
    "matplotlib": ("the report of an evaluation", "eval"),
    "pytest": ("the tests", "test"),
    "hypothesis": ("the tests", "test"),
}

FORWARDED = {  # commands that parse their own options, so that `env` starts without what they import
    "demo": ("torch_pagedkv.evals.demo", "stock and patched generate() side by side"),
    "quantize": ("torch_pagedkv.quant.command", "quantise a model to 4 bits and save it as a checkpoint"),
    "bench": ("torch_pagedkv.evals.kernels", "time the operators"),
    "eval": ("torch_pagedkv.evals.harness", "lm-eval on stock and patched variants of a model"),
    "report": ("torch_pagedkv.evals.report", "a page and a picture of what eval measured"),
    "lm-eval": ("torch_pagedkv.evals.lm", "lm-eval's own command line, with --model pagedkv"),
    "coverage": ("torch_pagedkv.evals.coverage", "patch every causal language model of transformers, tiny and random"),
}


# ---- env -------------------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Collect what `env` prints; ``problems`` lists what is missing and how to get it."""
    problems = []

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def problem(what: str, fix: str) -> None:
        problems.append({"what": what, "fix": fix})

    tools: dict[str, str | None] = {"c++": None, "nvcc": build.find_nvcc(), "ninja": None}
    for name, find in (("c++", build.find_cxx), ("ninja", build.find_ninja)):
        try:
            tools[name] = find()
        except build.BuildError as error:
            problem(f"{name} is needed to compile the kernels", str(error))
    described = {name: f"{tool_version(tool)} ({tool})" if tool else None for name, tool in tools.items()}

    libraries = {}
    for kind in build.KINDS:
        library = _native.libraries.get(kind)
        if library is None:
            libraries[kind] = {"loaded": False, "why": why_no_cuda()}
            continue
        libraries[kind] = {
            "loaded": library.path is not None,
            "path": str(library.path) if library.path else None,
            "for": library.target,
            "why": library.reason,
        }
        if library.reason:
            problem(f"the {kind} library is not loaded", library.reason)
        if library.stale:
            problem(f"the {kind} library is older than its sources, which do not build", library.stale)
    if torch.version.cuda is None and build.gpus():
        problem("there is a GPU, but this torch is built for the CPU only", "install a CUDA build of torch")
    if "cuda" in _native.libraries and tools["nvcc"] is None and not libraries["cuda"]["loaded"]:
        problem("nvcc is needed to compile the CUDA kernels", "install the CUDA toolkit and set CUDA_HOME")

    packages = {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors", *OPTIONAL)}
    if packages["transformers"] is None:
        problem("transformers is not installed: only the operators can be used", "pip install 'transformers>=5.17'")
    for name, (purpose, extra) in OPTIONAL.items():
        if packages[name] is None:
            problem(f"{name} is not installed (for {purpose})", f"pip install 'torch-pagedkv[{extra}]'")
    return {
        "torch_pagedkv": torch_pagedkv.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "libraries": libraries,
        "operators": _native.operators(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "gpu_capabilities": [f"{major}.{minor}" for major, minor in build.gpus()],
        "torch_cuda": torch.version.cuda,
        "tools": described,
        "problems": problems,
    }


def why_no_cuda() -> str:
    """Why no CUDA library is wanted on this machine."""
    if torch.version.cuda is None:
        return "this torch is built for the CPU only"
    return "torch sees no GPU (none there, no driver, or CUDA_VISIBLE_DEVICES hides it)"


def tool_version(command: str) -> str:
    """The version that a compiler or ninja reports."""
    out = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True).stdout
    lines = [line for line in out.splitlines() if any(char.isdigit() for char in line)]
    return next((line.strip() for line in lines if "release" in line), lines[0].strip() if lines else "unknown version")


def env(args: argparse.Namespace) -> int:
    """Print what is installed and loaded; 1 if the operators cannot run here."""
    info = environment()
    if args.json:
        print(json.dumps(info, indent=1))
    else:
        rows = [("torch_pagedkv", info["torch_pagedkv"]), ("python", f"{info['python']}, {info['platform']}")]
        rows += [(name, value or "-") for name, value in info["packages"].items()]
        for kind, library in info["libraries"].items():
            state = f"{library['for']}, {library['path']}" if library["loaded"] else f"not loaded: {library['why']}"
            rows.append((f"{kind} library", state.splitlines()[0]))
        rows.append(("operators", str(len(info["operators"]))))
        rows.append(("GPUs", ", ".join(info["gpus"]) or "-"))
        rows += [(name, value or "-") for name, value in info["tools"].items()]
        for name, value in rows:
            print(f"{name:<14} {value}")
        for problem in info["problems"]:
            print(f"\nmissing: {problem['what']}\n         {problem['fix'].splitlines()[0]}")
    return 0 if all(library.path for library in _native.libraries.values()) else 1


# ---- generate --------------------------------------------------------------------------------------------------------


def generate(args: argparse.Namespace) -> int:
    """Stream the answer to one prompt."""
    from transformers import TextStreamer

    from torch_pagedkv.evals import models

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model, tokenizer = models.load(args.model, args.device, args.dtype)
    if args.raw:
        batch = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    else:
        batch = models.encode(tokenizer, [args.prompt], model.device, args.system)
    sampling: dict[str, Any] = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    options = {name: value for name in ("kv_cache_dtype", "block_size") if (value := getattr(args, name)) is not None}
    if not args.stock:
        models.patch(model, **options)
    streamer = TextStreamer(tokenizer, skip_prompt=not args.raw, skip_special_tokens=True)
    began = time.perf_counter()
    out = model.generate(**batch, max_new_tokens=args.max_new_tokens, streamer=streamer, **sampling)
    if args.stats:
        elapsed, count = time.perf_counter() - began, out.shape[1] - batch["input_ids"].shape[1]
        print(f"\n{count} tokens in {elapsed:.2f} s, {count / elapsed:.1f} tokens/s", file=sys.stderr)
        if not args.stock:
            print(json.dumps(model.paged_cache.stats()), file=sys.stderr)
            print(torch_pagedkv.report(model), file=sys.stderr)
    return 0


# ---- the command line ------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Build the parser."""
    top = argparse.ArgumentParser(prog="torch-pagedkv", description="Paged KV cache under plain generate().")
    top.add_argument("--version", action="version", version=torch_pagedkv.__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar=" | ".join(["env", "generate", *FORWARDED]))

    sub = commands.add_parser("env", help="what is installed, loaded and missing")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.set_defaults(run=env)

    sub = commands.add_parser("generate", help="stream the answer to a prompt")
    sub.add_argument("--model", default="SmolLM2-135M-Instruct", help="name, folder or hub id (default: %(default)s)")
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--system", help="system prompt")
    sub.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    sub.add_argument("--max-new-tokens", type=positive, default=200, metavar="N", help="default: %(default)s")
    sub.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    sub.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: fp32 on cpu, bf16 on cuda")
    sub.add_argument("--kv-cache-dtype", metavar="DTYPE", help="int8 or fp8 (default: the model's)")
    sub.add_argument("--block-size", type=positive, metavar="N", help="tokens in a cache block")
    sub.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    sub.add_argument("--top-k", type=int, default=50, metavar="K", help="default: %(default)s; 0 for all")
    sub.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: %(default)s")
    sub.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    sub.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    sub.add_argument("--stock", action="store_true", help="without patching, to compare")
    sub.add_argument("--stats", action="store_true", help="print speed, cache and the patch report to stderr")
    sub.set_defaults(run=generate)

    for name, (_, about) in FORWARDED.items():
        commands.add_parser(name, help=about, add_help=False)
    return top


def positive(text: str) -> int:
    """Parse a number above zero."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 2 with one line on stderr for what the user can mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and argv[0] in FORWARDED:
            module, _ = FORWARDED[argv[0]]
            return int(importlib.import_module(module).main(argv[1:]) or 0)
        args = parser().parse_args(argv)
        return int(args.run(args))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not is_users(error):
            raise
        module = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        fix = f": pip install 'torch-pagedkv[{OPTIONAL[module][1]}]'" if module in OPTIONAL else ""
        print(f"torch-pagedkv: error: {error}{fix}", file=sys.stderr)
        return 2


def is_users(error: Exception) -> bool:
    """Whether an error is one for the user to mend: no traceback then."""
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "").split(".")[0] != __package__
    models = sys.modules.get("torch_pagedkv.evals.models")
    return isinstance(error, OSError) or (models is not None and isinstance(error, models.UserError))


if __name__ == "__main__":
    sys.exit(main())
