"""Quantised layers of GGUF files in the file's own numbers, not rounded again.

A row is blocks of 32 neighbouring inputs: a float16 scale d, a float16 minimum m in some, then the numbers q.

    type   block                                     weight          held by
    Q4_0   d, 16 bytes of nibbles                    d (q - 8)       int4_linear
    Q4_1   d, m, 16 bytes of nibbles                 d q + m         int4_linear
    Q5_0   d, 4 bytes of fifth bits, 16 of nibbles   d (q - 16)      int8_linear
    Q8_0   d, 32 signed bytes                        d q             int8_linear
    Q4_K   see ops/q4k.py                            d s q - dmin m  q4k_linear

Byte i of nibbles has input i below and input i + 16 above; bit i of the fifth bits is input i's.

transformers reads the file into a float model, which says where each tensor belongs, and in which order its rows stand
(some writers interleave the two halves of query and key heads). A layer is replaced only if the file's numbers give its
weight to the bit; `patch(model, weights="gguf")`, where the model's weights are from elsewhere, wants them close.
Layers of other types (Q6_K, ...) stay float, and `report(model)` names them.

Source: ggml's block_q4_0, block_q4_1, block_q5_0, block_q8_0, block_q4_K.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .formats import Int4Weight
from .linear import Int4Linear
from .packed import Int8Linear, PackedWeight, Q4KLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..patches.log import PatchLog

logger = logging.getLogger("torch_pagedkv")

BLOCK = 32
#: how far a file's tensor may be from the layer that it replaces in a model whose weights are not of this file
#: (4 bits: some 0.1; another layer's weight, or rows in another order: 1.4)
NEAR = 0.5

Weight = Int4Weight | PackedWeight


def from_gguf(path: Any, gguf_file: str | None = None, quantize_head: bool = False, **kwargs: Any) -> PreTrainedModel:
    """Load a GGUF file as a causal language model. Its Q4_0, Q4_1, Q5_0, Q8_0 and Q4_K layers keep the file's numbers
    and run on `int4_linear`, `int8_linear` and `q4k_linear`, the others become float.

    Args:
        path: the file; or a folder or repository, with `gguf_file` the file in it.
        quantize_head: a language head that is tied to the embedding gets the file's numbers too: more memory, but fewer
            bytes to read for each token. (One that is not tied gets them always.)
        kwargs: of `from_pretrained`.

    Raises:
        ImportError: the `gguf` package is missing.
        ValueError: no linear layer of the file has a type that can be taken over, or the file is corrupt.
    """
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import cached_file

    if gguf_file is None:
        path, gguf_file = Path(path).parent, Path(path).name
    file = Path(path) / gguf_file
    source = str(file) if file.is_file() else cached_file(path, gguf_file)
    tensors = open_file(str(source))
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(path, gguf_file=gguf_file, quantization_config=config, **kwargs)
    convert(model, tensors, str(source), head=quantize_head)
    return model


def open_file(file: str) -> dict[str, Any]:
    """Name -> tensor of the file, and its architecture under "".

    Raises:
        ValueError: there is no such file, it is corrupt, or without a single tensor that can be taken over.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("GGUF files need the gguf package: pip install gguf") from error
    if not Path(file).is_file():
        raise ValueError(f"gguf_file: there is no file {file}")
    try:
        reader = GGUFReader(file)
        tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        tensors[""] = reader.fields["general.architecture"].contents()
    except Exception as error:
        raise ValueError(f"{file}: corrupt or truncated GGUF file: {error}") from error
    kinds = sorted({t.tensor_type.name for name, t in tensors.items() if name.startswith("blk.") and len(t.shape) == 2})
    if not set(kinds) & set(FORMS):
        raise ValueError(f"{file}: its layers are {', '.join(kinds) or 'missing'}; supported are {', '.join(FORMS)}")
    return tensors


# ------------------------------------------------------------------------------------------------ the types


@dataclass(frozen=True)
class _Form:
    """A type of tensors: bytes of a block, the float16 numbers among them (first and count of bytes), and the weight
    that the blocks make."""

    size: int
    numbers: int
    read: Callable[[Tensor, Tensor], Weight]


def _nibbles(octets: Tensor) -> Tensor:
    """uint8 [..., 16] -> [..., 32]."""
    return torch.cat((octets & 15, octets >> 4), -1)


def _q4_0(numbers: Tensor, octets: Tensor) -> Weight:
    return Int4Weight(_nibbles(octets).flatten(1), numbers[..., 0].T.contiguous(), None, None, BLOCK)


def _q4_1(numbers: Tensor, octets: Tensor) -> Weight:
    scales, offsets = (numbers[..., i].T.contiguous() for i in (0, 1))
    return Int4Weight(_nibbles(octets).flatten(1), scales, None, offsets, BLOCK)


def _q5_0(numbers: Tensor, octets: Tensor) -> Weight:
    fifth = octets[..., :4, None] >> torch.arange(8, dtype=torch.uint8, device=octets.device) & 1
    q = _nibbles(octets[..., 4:]) | fifth.flatten(-2) << 4
    return Int8Linear.pack((q.to(torch.int8) - 16).flatten(1), numbers[..., 0].T.contiguous(), BLOCK)


def _q8_0(numbers: Tensor, octets: Tensor) -> Weight:
    return Int8Linear.pack(octets.contiguous().view(torch.int8).flatten(1), numbers[..., 0].T.contiguous(), BLOCK)


def _q4_k(numbers: Tensor, octets: Tensor) -> Weight:
    return Q4KLinear.pack(torch.cat((numbers.contiguous().view(torch.uint8), octets), -1).flatten(1))


#: the types that are held exactly
FORMS = {
    "Q4_0": _Form(18, 2, _q4_0),
    "Q4_1": _Form(20, 4, _q4_1),
    "Q5_0": _Form(22, 2, _q5_0),
    "Q8_0": _Form(34, 2, _q8_0),
    "Q4_K": _Form(144, 4, _q4_k),
}


def weight_of(kind: str, blocks: Tensor) -> Weight:
    """A tensor of a GGUF file.

    Args:
        kind: its type, one of FORMS.
        blocks: uint8 [N, bytes of a row].

    Raises:
        ValueError: another kind, rows that are not whole blocks, or a scale or minimum that is NaN or infinite.
    """
    form = FORMS.get(kind)
    if form is None:
        raise ValueError(f"kind: got {kind!r}, needs one of {', '.join(FORMS)}")
    if blocks.dim() != 2 or blocks.shape[1] % form.size:
        raise ValueError(f"{kind}: got rows of {list(blocks.shape)} bytes, needs blocks of {form.size}")
    parts = blocks.unflatten(1, (-1, form.size))  # [N, blocks, bytes of a block]
    numbers = parts[..., : form.numbers].contiguous().view(torch.float16)  # [N, blocks, 1 or 2]
    if not bool(torch.isfinite(numbers).all()):
        raise ValueError(f"{kind}: a scale or minimum is NaN or infinite")
    return form.read(numbers, parts[..., form.numbers :])


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The numbers that a weight stands for, [N, K]."""
    if isinstance(weight, PackedWeight):
        return weight.dequantize(dtype)
    return Int4Linear(weight).dequantize(dtype)


# ------------------------------------------------------------------------------------------------ into a model


@torch.no_grad()
def convert(
    model: PreTrainedModel,
    tensors: dict[str, Any],
    file: str,
    exact: bool = True,
    head: bool = False,
    before: Callable[[nn.Module], None] = lambda module: None,
    marks: PatchLog | None = None,
) -> int:
    """Replace the layers of a float model by the tensors of a GGUF file, one after the other; how many.

    Args:
        model: loaded from that file (`exact`), or of the same architecture.
        tensors: of `open_file`. file: its name, for people.
        exact: only a tensor that gives the layer's weight to the bit; False: one that is NEAR it.
        head: replace a language head that is tied to the embedding, too.
        before: called with each layer before it is replaced.
        marks: where the change of `model.hf_quantizer` is noted to be undone.

    Raises:
        ValueError: no layer could be, or a tensor is corrupt, or (not `exact`) not near the layer's weight; nothing has
            changed.
    """
    from ..patches.log import PatchLog
    from .held import Held, untie
    from .loading import Rounded

    tied = set(model.all_tied_weights_keys)
    plan: list[tuple[nn.Linear, str, Any, Tensor | None]] = []
    kept: dict[str, str] = {}
    names = _names(model, tensors[""])
    for name, module in model.named_modules():
        there = f"{names.get(name)}.weight"
        if f"{name}.weight" in tied and there not in tensors:
            there = "token_embd.weight"
        tensor = tensors.get(there)
        if type(module) is not nn.Linear or tensor is None:
            continue
        kind = tensor.tensor_type.name
        if f"{name}.weight" in tied and not head:
            kept[name] = f"it shares the embedding's weight, {kind} in the file (quantize_head)"
        elif kind not in FORMS:
            kept[name] = f"{kind} in the file, which has no kernel here: it stays float"
        else:
            error, order = _nearest(module, kind, tensor, model, f"{file}: {there}")
            if error <= (0.0 if exact else NEAR):
                plan.append((module, kind, tensor, order))
            elif not exact:
                raise ValueError(
                    f"gguf_file: {there} of {file} is not {name}.weight of this model (the difference is "
                    f"{error:.2f} of its size): the file is of another model"
                )
            else:
                kept[name] = f"{kind} in the file, but its numbers are not the layer's"
    if not plan:
        listed = ", ".join(f"{name}: {why}" for name, why in list(kept.items())[:3])
        raise ValueError(f"{file}: no layer of {type(model).__name__} has the file's numbers ({listed}, ...)")
    for module, kind, tensor, order in plan:
        weight = _read(tensor, kind, order, module.weight.device)
        before(module)
        source, dtype = f"GGUF {kind}", module.weight.dtype
        if isinstance(weight, PackedWeight):
            weight.layer.adopt(module, weight, dtype, source)
        else:
            Int4Linear.adopt(module, weight, dtype, source)
    if kept:
        text = ", ".join(f"{name} ({why})" for name, why in kept.items())
        logger.info("torch_pagedkv: %d layers of %s stay float: %s", len(kept), file, text)
    only_int4 = all(kind in ("Q4_0", "Q4_1") for _, kind, _, _ in plan)
    quantizer: Any = Rounded.of(BLOCK) if only_int4 else Held.of("gguf")
    quantizer.kept = kept
    quantizer.form = "gguf"
    marks = marks or PatchLog()
    untie(model, marks)
    marks.set_attribute(model, "hf_quantizer", quantizer)
    marks.set_attribute(model.config, "quantization_config", quantizer.quantization_config)
    return len(plan)


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


def _read(tensor: Any, kind: str, order: Tensor | None, device: torch.device) -> Weight:
    blocks = torch.from_numpy(tensor.data.copy())
    return weight_of(kind, (blocks if order is None else blocks[order]).to(device))


def _nearest(
    module: nn.Linear, kind: str, tensor: Any, model: PreTrainedModel, name: str
) -> tuple[float, Tensor | None]:
    """The order of the tensor's rows in which it is nearest to the module's weight, and how far that is: 0 if it is the
    same to the bit, infinite if the shape is another."""
    weight = module.weight.detach()
    best: tuple[float, Tensor | None] = (float("inf"), None)
    for order in _orders(tensor.data.shape[0], model):
        try:
            seen = dequantize(_read(tensor, kind, order, weight.device), weight.dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if seen.shape != weight.shape:
            break
        if torch.equal(seen, weight):
            return 0.0, order
        distance = float((seen.float() - weight.float()).norm() / weight.float().norm().clamp_min(1e-30))
        if distance < best[0]:
            best = (distance, order)
    return best


def _orders(rows: int, model: PreTrainedModel) -> Iterator[Tensor | None]:
    """As they are; and with the interleaved halves of each head apart."""
    yield None
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    for count in dict.fromkeys((heads, getattr(config, "num_key_value_heads", None) or heads)):
        if rows % (2 * count) == 0:
            yield torch.arange(rows).view(count, -1, 2).transpose(1, 2).flatten()
