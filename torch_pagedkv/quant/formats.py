"""Checkpoint formats of 4-bit linear layers (and symmetric 8-bit ones), each to and from one logical form, exactly.

    AWQ (GEMM)        qweight [K, N/8], qzeros [G, N/8], scales [G, N]           word j of a row: columns 8 j + ORDER
    GPTQ, GPTQ v2     qweight [K/8, N], qzeros [G, N/8], scales [G, N], g_idx [K]  words run along the inputs
    pack-quantized    weight_packed [N, K/8], weight_scale [N, G], weight_zero_point [N/8, G], weight_g_idx [K]

N outputs, K inputs, G groups of inputs; a word is an int32 of eight nibbles, lowest first. Sizes that 8 does not divide
are rounded up. GPTQ's first version stores zeros less one (modulo 16). compressed-tensors stores its signed numbers
plus 8; without zero points they are symmetric around it.

With 8 bits a word is four octets, and the middle is 128. Only such weights are read that are symmetric around it, in
order of their groups: those that `ops.int8_linear` has a place for.

Sources: the writers, AutoAWQ, AutoGPTQ, GPTQModel (`gptq_v2`) and compressed-tensors (`pack-quantized`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops

Tensors = Mapping[str, Tensor]

#: nibble j of an AWQ word holds column AWQ_ORDER[j] of its eight
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_INVERSE = tuple(AWQ_ORDER.index(column) for column in range(8))
#: group sizes that the kernels take are multiples of this
RUN = 32


class FormatError(ValueError):
    """A layer's tensors do not make a 4-bit weight; the message names the tensor, what it is and what it has to be."""


@dataclass(frozen=True)
class Int4Weight:
    """A 4-bit weight [N, K] as numbers: w = scale * (q - zero), or scale * q + offset. (Or one of 8 bits, on its way
    between a file and `Int8Linear`: q 0..255, zeros None for 128.)

    Attributes:
        q: uint8 [N, K], 0..15, inputs in the layer's order.
        scales: [G, N], floating.
        zeros: uint8 [G, N], 0..15; None: 8 everywhere.
        offsets: [G, N] in scales' dtype, in place of zeros; None: there are none.
        group_size: inputs in a group. The last group may be short.
        g_idx: int32 [K], the group of each input; None: input k is in group k // group_size.
        bits: 4 or 8.
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor | None
    offsets: Tensor | None
    group_size: int
    g_idx: Tensor | None = None
    bits: int = 4

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.q.shape[0], self.q.shape[1]

    @property
    def groups(self) -> Tensor:
        """int64 [K], the group of each input."""
        if self.g_idx is not None:
            return self.g_idx.long()
        return torch.arange(self.q.shape[1], device=self.q.device) // self.group_size

    def packed(self) -> PackedInt4:
        """In the layout of the kernels (`ops.int4_repack`): groups as runs of inputs.

        Groups that are runs of a multiple of 32 inputs stay as they are. Others become runs by a permutation; a run is
        padded to the kernels' group size, and a group longer than that is several runs with the same scales.
        """
        n, k = self.q.shape
        if self.g_idx is None and (self.group_size % RUN == 0 or self.group_size >= k):
            return PackedInt4(
                ops.int4_repack(self.q), self.scales, self.zeros, self.offsets, None, None, self.group_size
            )
        groups = self.groups
        order = torch.argsort(groups, stable=True)
        counts = torch.bincount(groups, minlength=self.scales.shape[0])
        run = _run_size(counts, n)
        runs = (counts + run - 1) // run
        owner = torch.repeat_interleave(torch.arange(len(counts), device=order.device), runs)
        # where each group's inputs begin: in `order`, and in the padded order
        start, first = counts.cumsum(0) - counts, (runs.cumsum(0) - runs) * run
        sorted_groups = groups[order]
        place = first[sorted_groups] + torch.arange(k, device=order.device) - start[sorted_groups]
        perm = torch.full((int(runs.sum()) * run,), -1, dtype=torch.int32, device=order.device)
        perm[place] = order.int()
        q = self.q.new_full((n, perm.shape[0]), 8)
        q[:, place] = self.q[:, order]
        zeros, offsets = (None if t is None else t[owner] for t in (self.zeros, self.offsets))
        return PackedInt4(ops.int4_repack(q), self.scales[owner], zeros, offsets, perm, groups.to(torch.int32), run)


def _run_size(counts: Tensor, n: int) -> int:
    """The kernels' group size under which a weight of groups with `counts` inputs takes the fewest bytes."""
    longest = max(RUN, (int(counts.max()) + RUN - 1) // RUN * RUN)

    def size(run: int) -> int:
        runs = int(((counts + run - 1) // run).sum())
        return runs * n * run // 2 + runs * n * 3  # nibbles, and a scale and a zero for each run

    return min({RUN, 2 * RUN, 4 * RUN, longest}, key=size)


@dataclass(frozen=True)
class PackedInt4:
    """The arguments of `ops.int4_linear`, and what is needed to get the logical form back (`unpacked`).

    Attributes:
        packed, scales, zeros, offsets, perm: of `ops.int4_linear`; `run`: its group_size.
        g_idx: int32 [K], the group of each input where there is a perm.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    offsets: Tensor | None
    perm: Tensor | None
    g_idx: Tensor | None
    run: int


def unpacked(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    offsets: Tensor | None,
    perm: Tensor | None,
    g_idx: Tensor | None,
    *,
    run: int,
    group_size: int,
    in_features: int,
) -> Int4Weight:
    """The logical form of a packed weight: the inverse of `Int4Weight.packed`. A group without inputs has scale 0."""
    ones = torch.ones(scales.shape, dtype=torch.float32, device=scales.device)
    none = torch.zeros(scales.shape, dtype=torch.uint8, device=scales.device)
    numbers = ops.int4_dequantize(
        packed, ones, none, None, perm, group_size=run, in_features=in_features, dtype=torch.float32
    )
    q = numbers.to(torch.uint8)
    if perm is None or g_idx is None:
        return Int4Weight(q, scales, zeros, offsets, group_size)
    owner = g_idx[perm[::run].long()].long()  # a run's first entry is never padding
    count = max(int(g_idx.max()) + 1, -(-in_features // group_size))

    def once(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.new_zeros(count, t.shape[1]).index_copy_(0, owner, t)

    whole = once(scales)
    assert whole is not None
    sequential = torch.equal(g_idx.long(), torch.arange(in_features, device=g_idx.device) // group_size)
    return Int4Weight(q, whole, once(zeros), once(offsets), group_size, None if sequential else g_idx)


# ------------------------------------------------------------------------------------------------ nibbles


def _nibbles(words: Tensor, count: int, bits: int = 4) -> Tensor:
    """int32 [rows, words] -> uint8 [rows, count], lowest number first."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets[:, :count]
    return torch.stack((octets & 15, octets >> 4), -1).flatten(-2)[:, :count]


def _words(numbers: Tensor, bits: int = 4) -> Tensor:
    """uint8 [rows, count] -> int32 [rows, ceil(count bits / 32)], lowest number first, zeros behind."""
    short = -numbers.shape[1] % (32 // bits)
    padded = torch.nn.functional.pad(numbers, (0, short)) if short else numbers
    octets = padded if bits == 8 else padded[:, 0::2] | padded[:, 1::2] << 4
    return octets.contiguous().view(torch.int32)


def _by_eights(numbers: Tensor, order: tuple[int, ...]) -> Tensor:
    """Reorders each eight columns of uint8 [rows, 8 x]."""
    return numbers.reshape(numbers.shape[0], -1, 8)[..., list(order)].flatten(-2)


def _awq_nibbles(words: Tensor, count: int) -> Tensor:
    return _by_eights(_nibbles(words, 8 * words.shape[1]), _AWQ_INVERSE)[:, :count]


def _awq_words(numbers: Tensor) -> Tensor:
    short = -numbers.shape[1] % 8
    padded = torch.nn.functional.pad(numbers, (0, short)) if short else numbers
    return _words(_by_eights(padded, AWQ_ORDER))


# ------------------------------------------------------------------------------------------------ the formats


@dataclass(frozen=True)
class Format:
    """How a checkpoint stores a 4-bit linear layer.

    Attributes:
        name: of the format.
        weight: the tensor by which a quantised layer is known.
        scales: the tensor of scales.
        zeros: the tensor of zero points.
        g_idx: the tensor that assigns inputs to groups, None: the format has no such thing.
        shapes: (n, k, groups, bits) -> tensor -> shape, of all tensors that a layer may have.
        transposed: scales are [N, G].
    """

    name: str
    weight: str
    scales: str
    zeros: str
    g_idx: str | None
    shapes: Callable[[int, int, int, int], dict[str, tuple[int, ...]]]
    unpack: Callable[[Tensors, int, int, int], tuple[Tensor, Tensor | None]]
    pack: Callable[[Int4Weight], dict[str, Tensor]]
    transposed: bool = False

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of all tensors that a layer may have, without its bias."""
        return tuple(self.shapes(8, 8, 1, 4))

    def __reduce__(self) -> tuple[Any, ...]:
        return format_of, (self.name,)


def _count(n: int, bits: int) -> int:
    """Words of n numbers."""
    return -(-n * bits // 32)


def _awq_unpack(t: Tensors, n: int, k: int, bits: int) -> tuple[Tensor, Tensor | None]:
    zeros = t.get("qzeros")
    return _awq_nibbles(t["qweight"], n).T.contiguous(), None if zeros is None else _awq_nibbles(zeros, n)


def _awq_pack(w: Int4Weight) -> dict[str, Tensor]:
    return {"qweight": _awq_words(w.q.T), "qzeros": _awq_words(_zeros_of(w)), "scales": w.scales}


def _gptq_unpack(t: Tensors, n: int, k: int, bits: int, less: int) -> tuple[Tensor, Tensor | None]:
    zeros = t.get("qzeros")
    most = (1 << bits) - 1
    return _nibbles(t["qweight"].T, k, bits), None if zeros is None else (_nibbles(zeros, n, bits) + less) & most


def _gptq_pack(w: Int4Weight, less: int) -> dict[str, Tensor]:
    return {
        "qweight": _words(w.q, w.bits).T,
        "qzeros": _words((_zeros_of(w) - less) & ((1 << w.bits) - 1), w.bits),
        "scales": w.scales,
        "g_idx": w.groups.to(torch.int32),
    }


def _compressed_unpack(t: Tensors, n: int, k: int, bits: int) -> tuple[Tensor, Tensor | None]:
    zeros = t.get("weight_zero_point")
    if zeros is not None:
        # packed along the outputs; an early writer left them as they were, signed
        middle = 1 << (bits - 1)
        packed = zeros.dtype == torch.int32
        zeros = _nibbles(zeros.T, n, bits) if packed else (zeros.T.short() + middle).to(torch.uint8)
    return _nibbles(t["weight_packed"], k, bits), zeros


def _compressed_pack(w: Int4Weight) -> dict[str, Tensor]:
    tensors = {"weight_packed": _words(w.q, w.bits), "weight_scale": w.scales.T}
    tensors["weight_shape"] = torch.tensor(w.q.shape)
    if w.zeros is not None:
        tensors["weight_zero_point"] = _words(w.zeros, w.bits).T
    if w.g_idx is not None:
        tensors["weight_g_idx"] = w.g_idx
    return tensors


def _zeros_of(w: Int4Weight) -> Tensor:
    return torch.full_like(w.scales, 1 << (w.bits - 1), dtype=torch.uint8) if w.zeros is None else w.zeros


def _gptq_shapes(n: int, k: int, groups: int, bits: int) -> dict[str, tuple[int, ...]]:
    return {
        "qweight": (_count(k, bits), n),
        "qzeros": (groups, _count(n, bits)),
        "scales": (groups, n),
        "g_idx": (k,),
    }


def _awq_shapes(n: int, k: int, groups: int, bits: int) -> dict[str, tuple[int, ...]]:
    words = _count(n, bits)
    return {"qweight": (k, words), "qzeros": (groups, words), "scales": (groups, n)}


def _compressed_shapes(n: int, k: int, groups: int, bits: int) -> dict[str, tuple[int, ...]]:
    return {
        "weight_packed": (n, _count(k, bits)),
        "weight_scale": (n, groups),
        "weight_zero_point": (_count(n, bits), groups),
        "weight_shape": (2,),
        "weight_g_idx": (k,),
    }


def _gptq(name: str, less: int) -> Format:
    return Format(
        name,
        "qweight",
        "scales",
        "qzeros",
        "g_idx",
        _gptq_shapes,
        lambda t, n, k, bits: _gptq_unpack(t, n, k, bits, less),
        lambda w: _gptq_pack(w, less),
    )


#: every format by name
FORMATS = {
    "awq": Format("awq", "qweight", "scales", "qzeros", None, _awq_shapes, _awq_unpack, _awq_pack),
    "gptq": _gptq("gptq", 1),
    "gptq_v2": _gptq("gptq_v2", 0),
    "pack-quantized": Format(
        "pack-quantized",
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_g_idx",
        _compressed_shapes,
        _compressed_unpack,
        _compressed_pack,
        transposed=True,
    ),
}


def format_of(name: str) -> Format:
    """The format of a name of FORMATS."""
    return FORMATS[name]


_WHOLE = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Scheme:
    """What a checkpoint's configuration says of a layer.

    Attributes:
        group_size: inputs in a group, -1: all of them.
        symmetric: True: zeros are 8 where none are stored. False: they have to be stored.
        act_order: True: the assignment of inputs to groups has to be stored.
        bits: 4 or 8.
    """

    group_size: int
    symmetric: bool
    act_order: bool = False
    bits: int = 4


def check(form: Format, tensors: Tensors, n: int, k: int, scheme: Scheme) -> None:
    """Refuses tensors (also on the meta device) that are no [n, k] layer of the format.

    Raises:
        FormatError: by the tensor's name.
    """
    group_size = k if scheme.group_size == -1 else scheme.group_size
    if group_size < 1:
        raise FormatError(f"group_size: got {scheme.group_size}, needs -1 or an integer >= 1")
    groups = -(-k // group_size)
    shapes = form.shapes(n, k, groups, scheme.bits)
    if scheme.bits == 8 and group_size % RUN and group_size < k:
        raise FormatError(f"group_size: got {group_size}, with 8 bits it needs a multiple of {RUN}")
    needed = [form.weight, form.scales]
    if not scheme.symmetric:
        needed.append(form.zeros)
    if scheme.act_order and form.g_idx is not None and groups > 1:
        needed.append(form.g_idx)
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise FormatError(f"{', '.join(missing)}: missing (there are {', '.join(sorted(tensors)) or 'no tensors'})")
    for name, tensor in tensors.items():
        got, want = tuple(tensor.shape), shapes[name]
        if name == form.scales:
            if not tensor.is_floating_point():
                raise FormatError(f"{name}: got {tensor.dtype}, needs a floating dtype")
        elif name == "weight_shape" or name == form.g_idx:
            if tensor.dtype not in _WHOLE:
                raise FormatError(f"{name}: got {tensor.dtype}, needs int32 or int64")
        elif name == "weight_zero_point" and tensor.dtype == torch.int8:
            want = (n, groups)
        elif tensor.dtype != torch.int32:
            raise FormatError(f"{name}: got {tensor.dtype}, needs int32 words of {scheme.bits}-bit numbers")
        if got == want or (name == form.scales and len(got) == 1 and form.transposed and groups == 1 and got[0] == 1):
            continue
        layer = f"{n} outputs, {k} inputs, {scheme.bits} bits and group_size {group_size}"
        raise FormatError(f"{name}: got {list(got)}, needs {list(want)} for {layer}")


def read(form: Format, tensors: Tensors, n: int, k: int, scheme: Scheme) -> Int4Weight:
    """A layer's tensors of a checkpoint -> the logical form, exactly.

    Args:
        form: one of FORMATS.
        tensors: by the format's names (`Format.leaves`); those that it can do without may be absent.
        n, k: outputs and inputs of the layer.
        scheme: what the configuration says.

    Raises:
        FormatError: a tensor is missing, or its shape, dtype or values cannot be right.
    """
    check(form, tensors, n, k, scheme)
    group_size = k if scheme.group_size == -1 else min(scheme.group_size, max(k, 1))
    shape = tensors.get("weight_shape")
    if shape is not None and shape.tolist() != [n, k]:
        raise FormatError(f"weight_shape: got {shape.tolist()}, needs {[n, k]}")
    scales = tensors[form.scales]
    if form.transposed:
        scales = scales.reshape(1, 1).expand(n, 1) if scales.dim() == 1 else scales
        scales = scales.T
    if not bool(torch.isfinite(scales).all()):
        raise FormatError(f"{form.scales}: {int((~torch.isfinite(scales)).sum())} entries are NaN or infinite")
    q, zeros = form.unpack(tensors, n, k, scheme.bits)
    if zeros is not None and scheme.bits == 4 and bool((zeros > 15).any()):
        raise FormatError(f"{form.zeros}: an entry is out of a 4-bit number's range")
    if zeros is not None and bool((zeros == 1 << (scheme.bits - 1)).all()):
        zeros = None  # symmetric: the kernels have less to do
    order = _assignment(form, tensors, k, group_size, scheme)
    if scheme.bits == 8 and zeros is not None:
        raise FormatError(f"{form.zeros}: some are not 128, which 8-bit weights are loaded with only (symmetric ones)")
    if scheme.bits == 8 and order is not None:
        raise FormatError(f"{form.g_idx}: inputs are not in order of their groups, which only 4-bit weights may be")
    return Int4Weight(
        q.contiguous(),
        scales.contiguous(),
        None if zeros is None else zeros.contiguous(),
        None,
        group_size,
        order,
        scheme.bits,
    )


def _assignment(form: Format, tensors: Tensors, k: int, group_size: int, scheme: Scheme) -> Tensor | None:
    """The group of each input, None where inputs are in order."""
    g_idx = None if form.g_idx is None else tensors.get(form.g_idx)
    if g_idx is None:
        return None
    groups = -(-k // group_size)
    if k and (int(g_idx.min()) < 0 or int(g_idx.max()) >= groups):
        found = f"{int(g_idx.min())} .. {int(g_idx.max())}"
        raise FormatError(f"{form.g_idx}: got {found}, needs 0 .. {groups - 1} (groups of {group_size})")
    if torch.equal(g_idx.long(), torch.arange(k, device=g_idx.device) // group_size):
        return None
    if not scheme.act_order and not bool(g_idx.any()):
        return None  # some writers leave it at zero where inputs are in order
    return g_idx.to(torch.int32)


def write(form: Format, weight: Int4Weight, scheme: Scheme | None = None) -> dict[str, Tensor]:
    """The inverse of `read`: contiguous tensors by the format's names.

    Args:
        scheme: if it says that zeros are stored, they are, also where all are 8.

    Raises:
        FormatError: the format cannot hold this weight exactly.
    """
    if weight.offsets is not None:
        raise FormatError(
            f"a weight with offsets (from GGUF) has no exact {form.name} form, whose zeros are whole; "
            "model.dequantize() gives float weights, which can be saved"
        )
    if weight.g_idx is not None and form.g_idx is None:
        raise FormatError(
            f"a weight whose inputs are not in order of their groups (act-order) has no form as {form.name}"
        )
    if scheme is not None and not scheme.symmetric:
        weight = replace(weight, zeros=_zeros_of(weight))
    return {name: tensor.contiguous() for name, tensor in form.pack(weight).items()}
