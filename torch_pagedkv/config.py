"""`PagedConfig`: every option of `torch_pagedkv.patch`, with its meaning, default and error."""

from __future__ import annotations

import dataclasses
import difflib
import os
from dataclasses import dataclass
from typing import Any, Literal

from .kv.blocks import Salt
from .kv.pool import BLOCK_SIZES, CACHE_DTYPES

Fuse = Literal["auto"] | bool

_FUSE = ("auto", True, False)


@dataclass(frozen=True)
class PagedConfig:
    """Options of a patched model. Invalid values raise `ValueError` (a wrong type: `TypeError`) when it is made.

    Attributes:
        block_size: tokens in a block of the cache: 8, 16, 32, 64 or 128. Only whole blocks are shared as prefixes, so a
            small block finds more, a large one makes shorter block tables.
        kv_cache_dtype: None stores keys and values in the model's dtype; "int8" or "fp8" (e4m3) store them quantised
            with a float32 scale for each token and head. An error at patch() if the device has no kernels for it.
        num_blocks: size of the cache in blocks. None: on CUDA from `memory_fraction`, on the CPU grown when needed.
            A prompt that cannot fit is an error before `generate()` starts.
        memory_fraction: on CUDA without `num_blocks`, the share in (0, 1] of the memory free at first use.
        max_blocks: up to how many blocks the cache may grow. None: the size that `num_blocks` or `memory_fraction`
            gives; without either, what memory allows.
        prefix_caching: keep the blocks of finished sequences and reuse them for prompts with the same beginning.
        cascade: rows of a batch that begin with the same blocks (beams, several returns, a common prompt) are decoded
            with one pass over those for all of them and one over the rest of each. "auto": where as many bytes are
            saved as made it pay in measurements; True: wherever a block is shared; False: never. Compiled steps do
            without.
        batch_invariant: attention gives a sequence the same bits whatever else is in its batch, for a few per cent of
            its speed; without `cascade`. (Matrix products may still choose their kernels by the batch's size.)
        salt: prefixes are shared only between models' calls under the same salt: set one to keep tenants apart.
        long_prompts: "error": a prompt longer than the model's positions (learned, or rotary without scaling) is a
            `ValueError` before any work. "allow": let the model run over its limit where it can, as stock
            transformers does with rotary positions.
        attention: False keeps the stock attention and cache, and only the fusions below are applied.
        fuse_norm: RMSNorm and LayerNorm, with the residual add in front of them, in one kernel. Here and below "auto"
            fuses where the module is recognised and probed to be equal, True demands it (`UnsupportedModelError` if
            no module of the model can be fused), False leaves it.
        fuse_mlp: the activation of a (gated) MLP and its product in one kernel.
        fuse_rotary: the rotary embedding and the cache write in one kernel.
        fuse_linear: on the CPU, linear layers on few rows by a kernel of our own; on CUDA and of 4-bit layers (True:
            everywhere), projections of the same input (q, k, v; gate, up) in one matrix product.
        fuse_layers: decoder layers of the usual form as one function that calls the kernels behind each other, without
            the modules in between, unless somebody hooked them.
        cuda_graphs: record decoding steps as CUDA graphs and replay them, where nothing in Python can make a difference
            and the replayed numbers are the very same. Each batch size keeps the memory of one step's activations.
        weights: "int4" rounds the linear layers, but for the language head, to 4 bits with a scale and a zero for each
            output and group of inputs (round-to-nearest: no data needed). "awq", "gptq" and "awq+gptq" do it with
            calibration data: slower to make, as fast to run, much less is lost. "gguf" replaces them by those of
            `gguf_file`, in the file's own numbers. "int8" (W8A8) and "fp8" (e4m3; a GPU of compute capability 8.9 or
            later) round weights, a scale for each output, and on the fly activations, a scale for each token. None
            leaves them as they were loaded, also if that is in 4 bits.
        calibration: a list of texts, a path to a file of text, token ids (a tensor [S, T] or a list of lists), or None:
            for "awq" and "gptq" passages of Wikipedia, downloaded in a Python package. "int8" and "fp8" search
            SmoothQuant's scales in it and spare the layers that would lose most; with None neither. Never the text of
            an evaluation. (`torch_pagedkv.quantize` has more options.)
        tokenizer: for calibration text; None: the one that lies where the model came from.
        gguf_file: for weights="gguf", the path of a GGUF file of this model. Its Q4_0, Q4_1, Q5_0, Q8_0 and Q4_K layers
            are taken over; layers of other types, norms and embeddings stay the model's own. A file of another model is
            an error. (`torch_pagedkv.from_gguf` loads a whole model from a file.)
        group_size: inputs in such a group, a multiple of 32; -1: all. The last group of a layer may be short.
        quantize_head: round the language head with them. One that is tied to the embedding gets 4-bit numbers of its
            own: more memory, but fewer bytes to read for each token.
        keep_original: keep the weights that `weights` replaces, so that `unpatch` brings them back. False frees them,
            layer by layer; the unpatched model then runs on its 4-bit layers.
    """

    block_size: int = 16
    kv_cache_dtype: str | None = None
    num_blocks: int | None = None
    memory_fraction: float = 0.9
    max_blocks: int | None = None
    prefix_caching: bool = True
    cascade: Fuse = "auto"
    batch_invariant: bool = False
    salt: Salt = None
    long_prompts: Literal["error", "allow"] = "error"
    attention: bool = True
    fuse_norm: Fuse = "auto"
    fuse_mlp: Fuse = "auto"
    fuse_rotary: Fuse = "auto"
    fuse_linear: Fuse = "auto"
    fuse_layers: Fuse = "auto"
    cuda_graphs: bool = True
    weights: Literal["int4", "awq", "gptq", "awq+gptq", "gguf", "int8", "fp8"] | None = None
    calibration: Any = None
    tokenizer: Any = None
    gguf_file: str | os.PathLike[str] | None = None
    group_size: int = 128
    quantize_head: bool = False
    keep_original: bool = False

    def __post_init__(self) -> None:
        _one_of("block_size", self.block_size, BLOCK_SIZES, "a power of two")
        _one_of("kv_cache_dtype", self.kv_cache_dtype, (None, *CACHE_DTYPES), "None is the model's dtype")
        _one_of("long_prompts", self.long_prompts, ("error", "allow"))
        for name in ("num_blocks", "max_blocks"):
            _positive(name, getattr(self, name))
        if self.num_blocks is not None and self.max_blocks is not None and self.max_blocks < self.num_blocks:
            raise ValueError(f"max_blocks: got {self.max_blocks}, less than num_blocks={self.num_blocks}")
        if not isinstance(self.memory_fraction, (int, float)) or not 0 < self.memory_fraction <= 1:
            raise ValueError(f"memory_fraction: got {self.memory_fraction!r}, needs a number in (0, 1]")
        if not isinstance(self.salt, (str, bytes, int, type(None))):
            raise TypeError(f"salt: got {type(self.salt).__name__}, needs str, bytes, int or None")
        _one_of("weights", self.weights, (None, "int4", "awq", "gptq", "awq+gptq", "gguf", "int8", "fp8"))
        if self.calibration is not None and self.weights in (None, "int4", "gguf"):
            raise ValueError(f"calibration: got one, but weights={self.weights!r} needs no calibration data")
        if not isinstance(self.gguf_file, (str, os.PathLike, type(None))):
            raise TypeError(f"gguf_file: got {type(self.gguf_file).__name__}, needs a path or None")
        if (self.weights == "gguf") != (self.gguf_file is not None):
            needs = "a path with weights='gguf'" if self.gguf_file is None else "None unless weights='gguf'"
            raise ValueError(f"gguf_file: got {self.gguf_file!r}, needs {needs}")
        size = self.group_size
        if not isinstance(size, int) or isinstance(size, bool) or (size != -1 and (size < 1 or size % 32)):
            raise ValueError(f"group_size: got {size!r}, needs -1 or a multiple of 32")
        for name in ("prefix_caching", "batch_invariant", "attention", "cuda_graphs", "quantize_head", "keep_original"):
            _one_of(name, getattr(self, name), (True, False))
        for name in ("cascade", "fuse_norm", "fuse_mlp", "fuse_rotary", "fuse_linear", "fuse_layers"):
            _one_of(name, getattr(self, name), _FUSE)
        if self.batch_invariant and self.cascade is True:
            raise ValueError("cascade: got True, but batch_invariant=True rules out that rows share their reads")

    @classmethod
    def merge(cls, config: PagedConfig | None, options: dict[str, Any]) -> PagedConfig:
        """`config` (default: all defaults) with `options` in place of its fields.

        Raises:
            TypeError: `config` is something else, or an option does not exist; the nearest one is named.
            ValueError: a value is out of range.
        """
        if config is not None and not isinstance(config, cls):
            raise TypeError(f"config: got {type(config).__name__}, needs a PagedConfig (or give options by keyword)")
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
                raise TypeError(f"unknown option {name!r}: {hint}")
        return dataclasses.replace(config or cls(), **options)


def _one_of(name: str, value: object, choices: tuple[object, ...], note: str = "") -> None:
    # 1 == True and 16.0 == 16, but they are not what was meant
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name}: got {value!r}, needs one of {listed}" + (f" ({note})" if note else ""))


def _positive(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: got {value!r}, needs None or an integer >= 1")
