"""What state a model is in: prefixes in the cache are of the weights, hooks and adapters that computed them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..kv.blocks import Salt

_SCALARS = (bool, int, float, str)
_SAMPLES = 8  # elements of each tensor that are looked at


def fingerprint(model: PreTrainedModel) -> int:
    """A number that is another one when the model was trained, loaded, merged, hooked or rewired since."""
    config = vars(model.config.get_text_config(decoder=True))  # the number of layers to run, for example
    parts: list[Any] = [(name, value) for name, value in config.items() if type(value) in _SCALARS]
    samples: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for module in model.modules():
        state = vars(module)
        parts += [id(type(module)), id(state.get("forward")), *module._forward_hooks, *module._forward_pre_hooks]
        # switches and scales of adapters that nobody registered with us
        parts += [value for value in state.values() if type(value) in _SCALARS]
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                parts += [tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version]
                samples.setdefault((tensor.device, tensor.dtype), []).append(_sample(tensor))
    # `tensor.data` and inference mode change numbers without a new version
    parts += [bytes(torch.cat(some).view(torch.uint8).tolist()) for some in samples.values()]
    return hash(tuple(parts))


def _sample(tensor: Tensor) -> Tensor:
    """Some elements of a tensor, spread over it, without a copy; none if it is more than a plain tensor, or neither
    dense in memory nor a part of a matrix."""
    count = tensor.numel()
    if type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and count:
        if tensor.is_contiguous() or (tensor.dim() > 1 and tensor.mT.is_contiguous()):
            taken = min(count, _SAMPLES)
            return tensor.detach().as_strided((taken,), (max(1, (count - 1) // max(1, taken - 1)),))
        if tensor.dim() == 2 and tensor.stride(1) == 1:  # down its diagonal
            rows, columns = tensor.shape
            taken = min(rows, _SAMPLES)
            down, right = (n // max(1, taken - 1) for n in (rows - 1, columns - 1))
            return tensor.detach().as_strided((taken,), (down * tensor.stride(0) + right,))
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def salted(model: PreTrainedModel, salt: Salt) -> Salt:
    """The user's salt and the adapters that are active (PEFT's layers know them)."""
    adapters = [
        (name, repr(active), *(repr(getattr(module, what, None)) for what in ("disable_adapters", "merged", "scaling")))
        for name, module in model.named_modules()
        if not isinstance(module, PreTrainedModel) and (active := getattr(module, "active_adapters", None)) is not None
    ]
    return repr((salt, adapters)) if adapters else salt
