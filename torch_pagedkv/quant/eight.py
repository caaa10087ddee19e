"""Linear layers whose product is of 8-bit numbers on both sides: W8A8 in int8, and float8.

A weight has a scale for each output, a row of activations one of its own (`ops.quantize_per_token`), so sums of
products are scaled behind the product (`ops.dequantize_sums`), which is torch's own; on a GPU, few rows take
`ops.scaled_linear`.

SmoothQuant: inputs that are larger than the others take the steps of their row. With calibration data, input j is
divided by s_j = max|x_j|^a / max|w_j|^(1 - a), and its column of the weight multiplied, which changes nothing but what
rounding loses. Each layer takes that a of ALPHAS with which it loses the least on some rows of its own inputs. Without
data s is 1.

In int8, where a row's largest number sets its steps, blocks of inputs (with random signs) are rotated by Hadamard's
matrix as well, and the weight's rows likewise, which needs no data. SmolLM2-135M's perplexity grows by 3.2 % without
either. The steps of float8 are relative (a sixteenth at most, on average a fortieth, on both sides), and nothing is to
be won there: neither by smoothing or rotating, nor by scales of blocks or other scales than the largest number's.

With calibration data, each layer's cost is therefore looked at as well (quant/sensitivity.py), and those that cost most
for their size keep their activations and have `Int8Linear`'s weights, of the same size and 20 times less error, until
all others together cost no more than BOUND. SmolLM2-135M in float8, perplexity: +2.7 % without, +0.8 % with it, for two
thirds of its weights; Gemma-3-270M: +3.0 and +0.4 %, for 62 %; stories15M: +1.2 and +0.2 %, for 47 %.

Source: Xiao et al., SmoothQuant, arXiv:2211.10438; Ashkboos et al., QuaRot, arXiv:2404.00456.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .. import ops
from .packed import Int8Linear, PackedLinear, PackedWeight

#: nats of a token that rounding may cost a calibrated model: half a per cent of its perplexity
BOUND = 0.005
#: SmoothQuant's a, how much of an input's range the weight takes over: those that are tried
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: inputs and outputs have to be multiples of this, for the products of a GPU
MULTIPLE = {torch.int8: 8, torch.float8_e4m3fn: 16}
#: rows up to which a GPU takes `ops.scaled_linear`
FEW_ROWS = 8


class EightLinear(PackedLinear):
    """y = x W^T + bias with x and W rounded to 8 bits. The base of the two below.

    Attributes:
        q: int8 or float8_e4m3fn [N, K]. scales: float32 [N].
        factor: float32 [K], multiplies x before it is rounded; or None.
        one: float32, 1: a scale for products that want one.
    """

    parts = ("q", "scales", "factor", "one")
    of_outputs: ClassVar = {"q": 0, "scales": 0}
    of_inputs: ClassVar = {"factor": "their inputs are smoothed differently", "one": "they are scaled differently"}
    dtype: ClassVar[torch.dtype]

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N] in the input's dtype (under autocast: in autocast's)."""
        if self.rounds:
            return super().forward(input)
        weight, bias = self.dequantize(input.dtype), self.bias
        return torch.nn.functional.linear(input, weight, None if bias is None else bias.to(input.dtype))

    @staticmethod
    def multiply(x: Tensor, w: Tensor, one: Tensor) -> Tensor:
        """[M, K] times [N, K]: sums [M, N] in int32 or float32."""
        raise NotImplementedError

    @classmethod
    def product(cls, x: Tensor, operands: Any, bias: Tensor | None, run: int, inputs: int) -> Tensor:
        q, scales, factor, one = operands
        rotation = cls.rotation(inputs)
        rounded, row_scale = ops.quantize_per_token(x, factor, rotation=rotation, dtype=q.dtype)
        if x.is_cuda and _known(rounded.numel() <= FEW_ROWS * inputs):
            return ops.scaled_linear(rounded, row_scale, q, scales, bias, dtype=x.dtype)
        rows = rounded.reshape(-1, inputs)
        if bias is None and cls.scales_itself(x, rows, q):
            y = torch._scaled_mm(rows, q.t(), row_scale.view(-1, 1), scales[None], out_dtype=x.dtype)
            return y.view(*x.shape[:-1], q.shape[0])
        sums = cls.multiply(rows, q, one).view(*x.shape[:-1], q.shape[0])
        return ops.dequantize_sums(sums, row_scale, scales, bias, dtype=x.dtype)

    @classmethod
    def numbers(cls, operands: Any, run: int, inputs: int, dtype: torch.dtype) -> Tensor:
        q, scales, factor, _ = operands
        w = ops.quantize.rotated(q.float() * scales[:, None], cls.rotation(inputs))
        return (w if factor is None else w * factor).to(dtype)

    @classmethod
    def rotation(cls, inputs: int) -> int:
        """Inputs of a block that are rotated together; 0: none are."""
        return 0

    @classmethod
    def scales_itself(cls, x: Tensor, rows: Tensor, q: Tensor) -> bool:
        """Whether torch's product with scales of rows and outputs is the faster one for rows [M, K] of x."""
        return False

    @classmethod
    def pack(cls, weight: Tensor, factor: Tensor | None = None) -> PackedWeight:
        """From a float weight [N, K] and what its inputs are multiplied by, [K]."""
        wide, inputs = weight.detach().float(), weight.shape[1]
        rotation = cls.rotation(inputs)
        if rotation:
            generator = torch.Generator().manual_seed(inputs)
            signs = torch.randint(0, 2, (inputs,), generator=generator).to(wide) * 2 - 1
            factor = signs if factor is None else factor * signs
        if factor is not None:
            wide = wide / factor
        q, scales = ops.quantize_per_token(wide, rotation=rotation, dtype=cls.dtype)
        parts: tuple[Any, ...] = (q, scales, factor, torch.ones((), dtype=torch.float32, device=weight.device))
        return PackedWeight(cls, parts, inputs, inputs, weight.shape[0])


class W8A8Linear(EightLinear):
    """int8 activations times int8 weights, by `torch._int_mm`."""

    op = "int8_mm"
    bits = "8-bit"
    dtype = torch.int8
    #: False on a CPU whose `_int_mm` is slow or missing: whole numbers are multiplied in float32 there, exactly as long
    #: as sums are below 2^24
    whole: ClassVar[bool] = True

    @classmethod
    def rotation(cls, inputs: int) -> int:
        """The largest of 64, 32, 16 and 8 that divides the inputs."""
        return next((block for block in (64, 32, 16, 8) if inputs % block == 0), 0)

    @staticmethod
    def multiply(x: Tensor, w: Tensor, one: Tensor) -> Tensor:
        if not x.is_cuda:
            return torch._int_mm(x, w.t()) if W8A8Linear.whole else x.float() @ w.float().t()
        rows = x.shape[0]
        if rows > _LEAST_ROWS:
            return torch._int_mm(x, w.t())
        return torch._int_mm(torch.nn.functional.pad(x, (0, 0, 0, _LEAST_ROWS + 1 - rows)), w.t())[:rows]


def _known(condition: Any) -> bool:
    """The condition; in a graph for any number of rows False, so that it is not split in two."""
    return statically_known_true(condition) if torch.compiler.is_compiling() else bool(condition)


#: cuBLAS wants more rows than this
_LEAST_ROWS = 16


class Fp8Linear(EightLinear):
    """float8_e4m3fn activations times float8_e4m3fn weights, by `torch._scaled_mm`."""

    op = "fp8_mm"
    bits = "float8"
    dtype = torch.float8_e4m3fn

    @classmethod
    def scales_itself(cls, x: Tensor, rows: Tensor, q: Tensor) -> bool:
        # 2048 rows on an H200, us: 63 for 79 at 4096 x 4096, 396 for 510 at 28672 x 4096, but 225 for 212 at 4096 x
        # 14336; at 256 rows 16.4 for 15.6, at 64 15.8 for 11.0
        outputs, inputs = q.shape
        ours = x.is_cuda and x.dtype == torch.bfloat16 and outputs >= inputs and _known(rows.shape[0] >= 512)
        return ours and torch.cuda.get_device_capability(x.device) == (9, 0)

    @staticmethod
    def multiply(x: Tensor, w: Tensor, one: Tensor) -> Tensor:
        return torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)


@contextlib.contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Activations are not rounded for a while. Rounding makes steps of differences in the last place: two ways to
    compute the same can be compared without it only."""
    layers = [module for module in model.modules() if isinstance(module, EightLinear)]
    for layer in layers:
        layer.rounds = False
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("rounds", None)


#: weights= of `patch` -> the layer
LAYERS: dict[str, type[EightLinear]] = {"int8": W8A8Linear, "fp8": Fp8Linear}


def smoothing(weight: Tensor, largest: Tensor, alpha: float) -> Tensor:
    """What a layer's inputs are to be multiplied by (1 / s).

    Args:
        weight: [N, K]. largest: [K], the largest magnitude that each input was seen with.

    Returns:
        float32 [K]; 1 for inputs that were never seen but at 0, or have a column of zeros.
    """
    x, w = largest.float(), weight.detach().abs().amax(0).float()
    s = x**alpha / w ** (1 - alpha)
    return torch.where((x > 0) & (w > 0) & s.isfinite() & (s > 0), 1 / s, 1.0)


@torch.no_grad()
def search(layer: type[EightLinear], weight: Tensor, largest: Tensor, rows: Tensor) -> Tensor | None:
    """The factor with which a layer loses the least.

    Args:
        layer: what the weight [N, K] is to become.
        largest: [K], the largest magnitude of each input. rows: [R, K], some of its inputs.

    Returns:
        float32 [K]; None if smoothing does not help. Errors are those of rows relative to their results, so that the
        few huge rows that many models have do not decide alone.
    """
    x, w = rows.float(), weight.detach().float()
    want = x @ w.t()
    size = want.norm(dim=1).clamp_min(1e-20)

    def loss(factor: Tensor | None) -> float:
        packed = layer.pack(w, factor)
        got = layer.product(x, packed.tensors, None, packed.group_size, packed.in_features)
        return float(((got - want).norm(dim=1) / size).square().mean())

    factors = [None, *(smoothing(w, largest, alpha) for alpha in ALPHAS)]
    return min(factors, key=loss)


@torch.no_grad()
def change(layer: type[EightLinear], weight: Tensor, factor: Tensor | None, x: Tensor) -> Tensor:
    """What rounding adds to a layer's outputs, float32 [T, N], for inputs x [T, K]."""
    packed = layer.pack(weight, factor)
    got = layer.product(x.float(), packed.tensors, None, packed.group_size, packed.in_features)
    return got - x.float() @ weight.detach().float().t()


def spared(weight: Tensor) -> PackedWeight:
    """A weight [N, K] as whole numbers of 8 bits, with a scale for each 32 inputs: for `Int8Linear`, whose activations
    are not rounded."""
    k = weight.shape[1]
    groups = torch.nn.functional.pad(weight.detach().float(), (0, -k % _GROUP)).unflatten(1, (-1, _GROUP))
    scales = groups.abs().amax(-1) / 127
    limits = torch.finfo(torch.float16)
    if bool(((scales == 0) | ((scales >= limits.tiny) & (scales <= limits.max))).all()):
        scales = scales.half()
    steps = torch.where(scales == 0, torch.ones_like(scales), scales).float()
    q = (groups / steps[..., None]).round().clamp(-127, 127).flatten(1)[:, :k].to(torch.int8)
    return Int8Linear.pack(q.contiguous(), scales.T.contiguous(), _GROUP)


#: inputs that share a scale there
_GROUP = 32


# ------------------------------------------------------------------------------------------------ what there is


@functools.cache
def whole_products() -> bool:
    """True if this CPU's `torch._int_mm` is right, and not many times slower than a product of floats. (Where there is
    no kernel of oneDNN's for it, it is a plain loop.)"""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, (64, 512), generator=generator, dtype=torch.int8) for _ in range(2))
    a[0], b[0] = 127, -127  # products whose sums of two do not fit in 16 bits
    wide = a.float(), b.float().t()

    def seconds(run: Callable[[], Tensor]) -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return min(times)

    try:
        right = torch.equal(torch._int_mm(a, b.t()), (wide[0].double() @ wide[1].double()).int())
    except RuntimeError:
        return False
    return right and seconds(lambda: torch._int_mm(a, b.t())) < 5 * seconds(lambda: wide[0] @ wide[1])


@functools.cache
def _float8_on_cpu() -> bool:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3 + 13 * i, 64, generator=generator).to(torch.float8_e4m3fn) for i in range(2))
    try:
        got = Fp8Linear.multiply(a, b, torch.ones(()))
    except (RuntimeError, NotImplementedError):
        return False
    return bool(torch.allclose(got.double(), a.double() @ b.double().t(), rtol=1e-5, atol=1e-5))


def refuse_float8(device: torch.device) -> None:
    """Raises ValueError unless the device multiplies float8 numbers."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            raise ValueError(
                f"weights: got 'fp8', which needs a GPU of compute capability 8.9 or later; {device} "
                f"({torch.cuda.get_device_name(device)}) has {capability[0]}.{capability[1]}"
            )
    elif not _float8_on_cpu():
        raise ValueError("weights: got 'fp8', but torch._scaled_mm of this torch has no float8 product for the CPU")
