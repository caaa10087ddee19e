"""Q4_0 and Q4_1 of GGUF files, whose grids `int4_linear` holds exactly: the file's numbers, not rounded again.

A block is 32 inputs of one output: a float16 scale d, with Q4_1 a float16 minimum m, and 16 bytes; byte i has input i
in its low and input i + 16 in its high nibble. w = d (q - 8) for Q4_0, d q + m for Q4_1.

transformers reads the file into a float model, which says where each tensor belongs, and in which order its rows stand
(some writers interleave the two halves of query and key heads). A layer is replaced only if the file's numbers give its
weight to the bit.

Source: ggml's block_q4_0 and block_q4_1.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .formats import Int4Weight
from .linear import Int4Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("torch_pagedkv")

BLOCK = 32
#: type -> bytes before the nibbles
_HEADS = {"Q4_0": 2, "Q4_1": 4}


def from_gguf(path: Any, gguf_file: str | None = None, **kwargs: Any) -> PreTrainedModel:
    """Load a GGUF file as a causal language model with its Q4_0 and Q4_1 layers on `int4_linear`, the others float.

    Args:
        path: the file; or a folder or repository, with `gguf_file` the file in it.
        kwargs: of `from_pretrained`.

    Raises:
        ImportError: the `gguf` package is missing.
        ValueError: no linear layer of the file is Q4_0 or Q4_1 (Q8_0 and the K formats are not supported), or the file
            is corrupt.
    """
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import cached_file

    if gguf_file is None:
        path, gguf_file = Path(path).parent, Path(path).name
    file = Path(path) / gguf_file
    source = str(file) if file.is_file() else cached_file(path, gguf_file)
    tensors = _open(str(source))
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(path, gguf_file=gguf_file, quantization_config=config, **kwargs)
    convert(model, tensors, str(source))
    return model


def _open(file: str) -> dict[str, Any]:
    """Name -> tensor of the file, and its architecture under "".

    Raises:
        ValueError: corrupt, or without a single tensor that can be taken over.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("GGUF files need the gguf package: pip install gguf") from error
    try:
        reader = GGUFReader(file)
        tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        tensors[""] = reader.fields["general.architecture"].contents()
    except Exception as error:
        raise ValueError(f"{file}: corrupt or truncated GGUF file: {error}") from error
    kinds = sorted({t.tensor_type.name for name, t in tensors.items() if name.startswith("blk.") and len(t.shape) == 2})
    if not set(kinds) & set(_HEADS):
        raise ValueError(f"{file}: its layers are {', '.join(kinds) or 'missing'}; supported are {', '.join(_HEADS)}")
    return tensors


def weight_of(kind: str, blocks: Tensor) -> Int4Weight:
    """A tensor of a GGUF file.

    Args:
        kind: "Q4_0" or "Q4_1".
        blocks: uint8 [N, bytes of a row].

    Raises:
        ValueError: another kind, or a scale or minimum is NaN or infinite.
    """
    if kind not in _HEADS:
        raise ValueError(f"kind: got {kind!r}, needs one of {', '.join(_HEADS)}")
    head = _HEADS[kind]
    parts = blocks.unflatten(1, (-1, head + BLOCK // 2))  # [N, groups, bytes of a block]
    nibbles = parts[..., head:]
    q = torch.cat((nibbles & 15, nibbles >> 4), -1).flatten(1)
    numbers = parts[..., :head].contiguous().view(torch.float16)  # [N, groups, 1 or 2]
    if not bool(torch.isfinite(numbers).all()):
        raise ValueError(f"{kind}: a scale or minimum is NaN or infinite")
    scales = numbers[..., 0].T.contiguous()
    offsets = numbers[..., 1].T.contiguous() if kind == "Q4_1" else None
    return Int4Weight(q, scales, None, offsets, BLOCK)


@torch.no_grad()
def convert(model: PreTrainedModel, tensors: dict[str, Any], file: str) -> int:
    """Replace the layers of a float model that came of the file by its Q4_0 and Q4_1 tensors; how many.

    Raises:
        ValueError: none could be.
    """
    from .loading import Rounded

    tied = set(model.all_tied_weights_keys)
    done, left = 0, []
    names = _names(model, tensors[""])
    for name, module in list(model.named_modules()):
        tensor = tensors.get(f"{names.get(name)}.weight")
        if type(module) is not nn.Linear or tensor is None or f"{name}.weight" in tied:
            continue
        kind = tensor.tensor_type.name
        found = _matching(module, kind, torch.from_numpy(tensor.data.copy()), model) if kind in _HEADS else None
        if found is None:
            left.append(f"{name} ({kind})")
        else:
            Int4Linear.adopt(module, found, module.weight.dtype, f"GGUF {kind}")
            done += 1
    if not done:
        raise ValueError(
            f"{file}: no layer of {type(model).__name__} has the file's numbers ({', '.join(left[:3])}, ...)"
        )
    if left:
        logger.info("torch_pagedkv: %d layers of %s stay float: %s", len(left), file, ", ".join(left))
    model.hf_quantizer = Rounded.of(BLOCK)
    model.config.quantization_config = model.hf_quantizer.quantization_config
    return done


def _names(model: PreTrainedModel, architecture: str) -> dict[str, str]:
    """Module -> its name in GGUF files."""
    import gguf

    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}.get(architecture)
    if arch is None:
        raise ValueError(f"architecture: got {architecture!r}, which the gguf package does not know")
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    table = gguf.get_tensor_name_map(arch, layers)
    found = {name: table.get_name(name) for name, _ in model.named_modules()}
    return {name: there for name, there in found.items() if there is not None}


def _matching(module: nn.Linear, kind: str, blocks: Tensor, model: PreTrainedModel) -> Int4Weight | None:
    """The tensor with its rows in the order of the module's, or None if it is none of the known orders."""
    for order in _orders(blocks.shape[0], model):
        weight = weight_of(kind, (blocks if order is None else blocks[order]).to(module.weight.device))
        if weight.q.shape == module.weight.shape:
            seen = Int4Linear(weight, dtype=module.weight.dtype).weight
            if torch.equal(seen, module.weight):
                return weight
    return None


def _orders(rows: int, model: PreTrainedModel) -> Iterator[Tensor | None]:
    """As they are; and with the interleaved halves of each head apart."""
    yield None
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    for count in dict.fromkeys((heads, getattr(config, "num_key_value_heads", None) or heads)):
        if rows % (2 * count) == 0:
            yield torch.arange(rows).view(count, -1, 2).transpose(1, 2).flatten()
