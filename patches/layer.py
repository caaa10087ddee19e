"""Decoder layers of the usual form as one function: norm, q+k+v, rotary and cache write, attention, output projection,
add and norm, gated MLP, add.

At a decoding step of a small model the modules' calls, attribute look-ups and views cost as much as the kernels. Where
the text of a layer's and of its attention's forward is of the form below, and every module in it does what its patch or
class says, a paged step runs the same ops straight behind each other. What is not of a known kind (a mixture of
experts, an adapter) is called as the module that it is.

Anything that could see the difference brings the modules' own calls back: a hook, another child or forward than at the
time of patching, training, autocast, a recorded pass, a compiled one (the compiler removes these costs itself).
"""

from __future__ import annotations

import ast
import functools
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.utils import output_capturing

from ..kv.cache import PagedCache
from ..quant.joint import Joint
from ..quant.linear import Int4Linear
from . import linear, match, mlp, norm, rotary
from .log import PatchLog

if TYPE_CHECKING:
    from ..config import PagedConfig


def _direct(op: Any) -> Callable[..., Any]:
    """An op's overload without the Python frame around it."""
    return getattr(op, "_op", op)


_ops = torch.ops.torch_pagedkv
_rms_norm = _direct(_ops.rms_norm.default)
_add_rms_norm = _direct(_ops.add_rms_norm.default)
_few_linear = _direct(_ops.linear.default)
_int4_linear = _direct(_ops.int4_linear.default)
_rotary_and_cache = _direct(_ops.rotary_and_cache.default)
_paged_attention = _direct(_ops.paged_attention.default)
_paged_attention_cascade = _direct(_ops.paged_attention_cascade.default)
_gelu_and_mul = _direct(_ops.gelu_and_mul.default)
#: activation of a gated MLP -> (gate, up) -> product
_GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": _direct(_ops.silu_and_mul.default),
    "gelu": lambda gate, up: _gelu_and_mul(gate, up, "none"),
    "gelu_tanh": lambda gate, up: _gelu_and_mul(gate, up, "tanh"),
}

#: the layer's forward, statement by statement; the bracketed ones may be missing
_LAYER = re.compile(
    r"""residual = hidden_states
hidden_states = self\.(?P<norm>\w+)\(hidden_states\)
hidden_states, _ = self\.(?P<attention>\w+)\((?P<given>((\w+)=\5, )+)\*\*kwargs\)
(?:hidden_states = self\.(?P<attention_norm>\w+)\(hidden_states\)
)?hidden_states = residual \+ hidden_states
residual = hidden_states
hidden_states = self\.(?P<mlp_norm>\w+)\(hidden_states\)
hidden_states = self\.(?P<mlp>\w+)\(hidden_states\)
(?:hidden_states = self\.(?P<out_norm>\w+)\(hidden_states\)
)?hidden_states = residual \+ hidden_states
return hidden_states"""
)
_HEADS = r"\.view\(hidden_shape\)"
#: the attention's
_ATTENTION = re.compile(
    rf"""input_shape = hidden_states\.shape\[:-1\]
hidden_shape = \(\*input_shape, -1, self\.head_dim\)
query_states = (?:self\.(?P<q_norm>\w+)\()?self\.(?P<q>\w+)\(hidden_states\){_HEADS}\)?\.transpose\(1, 2\)
key_states = (?:self\.(?P<k_norm>\w+)\()?self\.(?P<k>\w+)\(hidden_states\){_HEADS}\)?\.transpose\(1, 2\)
value_states = self\.(?P<v>\w+)\(hidden_states\){_HEADS}\.transpose\(1, 2\)
(?:query_states = self\.(?P<late_q_norm>\w+)\(query_states\)
key_states = self\.(?P<late_k_norm>\w+)\(key_states\)
)?cos, sin = position_embeddings
query_states, key_states = apply_rotary_pos_emb\(query_states, key_states, cos, sin\)
if past_key_values is not None:
    key_states, value_states = past_key_values\.update\(key_states, value_states, self\.layer_idx\)
attention_interface = ALL_ATTENTION_FUNCTIONS\.get_interface\(self\.config\._attn_implementation, \w+\)
attn_output, attn_weights = attention_interface\(self, query_states, key_states, value_states, attention_mask, """
    r"dropout=[^,]*self\.attention_dropout[^,]*, scaling=self\.scaling, "
    r"(?:sliding_window=(?P<window>self\.sliding_window|getattr\(self\.config, 'sliding_window', None\)), )?"
    r"""\*\*kwargs\)
attn_output = attn_output\.reshape\(\*input_shape, -1\)\.contiguous\(\)
attn_output = self\.(?P<o>\w+)\(attn_output\)
return \(attn_output, attn_weights\)"""
)
#: what our attention function would take from a layer's further arguments
_SEEN = {"sliding_window", "softcap", "s_aux", "dropout", "scaling"}


@functools.cache
def _text(function: Callable[..., Any]) -> str:
    """A function's statements in one spelling: no docstring, comments or annotations."""
    tree = match.function_tree(function)
    body = [] if tree is None else list(tree.body)
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        del body[0]
    plain = [
        ast.Assign([node.target], node.value, lineno=0) if isinstance(node, ast.AnnAssign) and node.value else node
        for node in body
    ]
    return "\n".join(ast.unparse(node) for node in plain)


def _forward_of(cls: Any) -> Callable[..., Any]:
    forward = cls.forward
    wrapped = getattr(forward, "__code__", None) and forward.__code__.co_name == "forward_with_checkpointing"
    return forward.__wrapped__ if wrapped else forward  # of transformers, for training


def _names(pattern: re.Pattern[str], cls: type) -> dict[str, Any] | None:
    """The pattern's names in the class's forward; None: it is of another form."""
    forward = _forward_of(cls)
    found = None if hasattr(forward, "__wrapped__") else pattern.fullmatch(_text(forward))
    return None if found is None else found.groupdict()


# ---- the parts -------------------------------------------------------------------------------------------------------

#: x, rows are few -> y
_Step = Callable[[Tensor, bool], Tensor]


def _norm(module: nn.Module) -> _Step:
    spec = norm.spec_of(module)
    if spec is None or not match.runs(module, norm.rms_forward):
        return lambda x, few: module(x)
    parameters, eps, offset, early = module._parameters, spec.eps, spec.weight_offset, spec.round_before_weight
    return lambda x, few: _rms_norm(x, parameters["weight"], eps, offset, early)


def _linear(module: nn.Module) -> Callable[..., Tensor]:
    """x, few, residual=None -> y"""
    if type(module) is Int4Linear and _is_packed(module):
        op = _int4_linear
        buffers, run, inputs = module._buffers, module.run, module.in_features
        tensors = itemgetter("packed", "scales", "zeros", "offsets", "perm", "bias")
        return lambda x, few, residual=None: op(x, *tensors(buffers), residual, run, inputs)
    step = _plain(module) if type(module) is nn.Linear else lambda x, few: module(x)

    def separate(x: Tensor, few: bool, residual: Tensor | None = None) -> Tensor:
        y = step(x, few)
        return y if residual is None else residual + y

    return separate


def _is_packed(module: Int4Linear) -> bool:
    """Whether its buffers are the op's arguments as they are."""
    stock = match.runs(module, None) or match.runs(module, linear.part_forward)
    bias = module.bias
    whole = all(t is None or t.is_contiguous() for t in (module.scales, module.zeros, module.offsets))
    return stock and whole and (bias is None or bias.dtype == module.like.dtype)


def _plain(module: nn.Linear) -> _Step:
    parameters: Any = module._parameters
    if match.runs(module, linear.few_rows_forward):
        return lambda x, few: (_few_linear if few else F.linear)(x, parameters["weight"], parameters["bias"])
    if match.runs(module, None):
        return lambda x, few: F.linear(x, parameters["weight"], parameters["bias"])
    return lambda x, few: module(x)


def _joint(fused: Any) -> Callable[[Tensor], Tensor] | None:
    """The product of packed projections in one, if they are that. (Whether it is current is asked before each call.)"""
    if not isinstance(fused, linear.FusedPacked) or not fused.is_current():
        return None
    joint: Joint = fused.joint
    bias = joint.buffers["bias"]
    if joint.kind is not Int4Linear or (bias is not None and bias.dtype != joint.parts[0].like.dtype):
        return joint
    return lambda x: _int4_linear(x, *joint.operands(), None, joint.run, joint.in_features)


def _known(module: nn.Module) -> nn.Module:
    """A norm that takes rows in any arrangement.

    Raises:
        ValueError: nothing is known of it.
    """
    if norm.spec_of(module) is None:
        raise ValueError(module)
    return module


class _Heads:
    """x [B, Q, C] -> query, key, value [B * Q, H, D] before the rotary embedding."""

    def __init__(self, module: nn.Module, names: dict[str, Any]) -> None:
        parts = [module.get_submodule(names[n]) for n in "qkv"]
        shared, _ = vars(parts[0]).get("_pagedkv_part", (None, 0))
        self.size = int(module.head_dim)  # type: ignore[arg-type]
        self.fused = shared.fused if shared is not None and shared.fused.parts == tuple(parts) else None
        self.joint = _joint(self.fused)
        self.steps = [_linear(part) for part in parts]
        self.counts = [int(part.out_features) // self.size for part in parts]  # type: ignore[arg-type]
        self.total = sum(self.counts)
        norms = [names["q_norm"] or names["late_q_norm"], names["k_norm"] or names["late_k_norm"]]
        self.norms = [None if n is None else _norm(_known(module.get_submodule(n))) for n in norms]

    def __call__(self, x: Tensor, few: bool) -> tuple[Tensor, Tensor, Tensor]:
        fused, size = self.fused, self.size
        if fused is not None and fused.is_current():
            if self.joint is not None:
                q, k, v = self.joint(x).view(-1, self.total, size).split_with_sizes(self.counts, 1)
            else:
                q, k, v = (y.view(-1, n, size) for y, n in zip(fused(x), self.counts))
        else:
            q, k, v = (step(x, few).view(-1, n, size) for step, n in zip(self.steps, self.counts))
        q_norm, k_norm = self.norms
        if q_norm is not None:
            q = q_norm(q, few)
        if k_norm is not None:
            k = k_norm(k, few)
        return q, k, v


class _Attention:
    """Attention on pages, from the normed input to the projected output."""

    def __init__(self, module: Any, names: dict[str, Any], binding: rotary.RotaryBinding) -> None:
        self.module = module
        self.binding = binding
        self.index: int = module.layer_idx
        self.heads = _Heads(module, names)
        self.out = _linear(module.get_submodule(names["o"]))
        window = names["window"]
        self.window: Callable[[Any], int | None] = (
            (lambda module: None)
            if window is None
            else (lambda module: module.sliding_window)
            if window == "self.sliding_window"
            else (lambda module: getattr(module.config, "sliding_window", None))
        )

    def __call__(self, x: Tensor, few: bool, position: tuple[Tensor, Tensor], cache: PagedCache) -> Tensor:
        module, binding = self.module, self.binding
        batch, queries, _ = x.shape
        convention = binding.convention
        assert convention is not None
        cos, sin = binding.angles(*position, batch, convention, cache.rotary_angles)
        key_cache, value_cache, k_scale, v_scale, step, _, shared, batch_invariant = cache.layer(self.index)
        q, k, v = self.heads(x, few)
        _rotary_and_cache(
            q, k, v, cos, sin, key_cache, value_cache, step.slot_mapping, convention.interleaved, k_scale, v_scale
        )
        window = self.window(module)
        paged = q, key_cache, value_cache, step.block_tables, step.seq_lens
        features = None, window or 0, 0.0, None, k_scale, v_scale, False
        if shared is not None and shared.serves(window):
            groups = shared.group_start, shared.group_len, shared.prefix_lens, shared.max_group_len
            y, _ = _paged_attention_cascade(*paged, *groups, module.scaling, *features)
        else:
            rows = step.query_start, step.query_len, queries
            y, _ = _paged_attention(*paged, *rows, module.scaling, True, *features, batch_invariant)
        return self.out(y.view(batch, queries, -1), few)


class _GatedMLP:
    """x, residual -> down(act(gate(x)) * up(x)) + residual"""

    def __init__(self, module: nn.Module, spec: mlp.GatedMLPSpec) -> None:
        gate, up = module.get_submodule(spec.gate), module.get_submodule(spec.up)
        fused = vars(module).get("_pagedkv_gate_up")
        self.fused = fused if fused is not None and fused.parts == (gate, up) else None
        self.joint = _joint(self.fused)
        self.steps = [_linear(gate)] if gate is up else [_linear(gate), _linear(up)]
        self.act = _GATED[spec.activation]
        self.down = _linear(module.get_submodule(spec.down))

    def __call__(self, x: Tensor, few: bool, residual: Tensor | None) -> Tensor:
        fused, steps = self.fused, self.steps
        if fused is not None and fused.is_current():
            gate, up = fused(x) if self.joint is None else self.joint(x).split_with_sizes(fused.sizes, -1)
        elif len(steps) == 1:
            gate, up = steps[0](x, few).chunk(2, -1)
        else:
            gate, up = steps[0](x, few), steps[1](x, few)
        return self.down(self.act(gate, up), few, residual)


# ---- the layer -------------------------------------------------------------------------------------------------------

#: hooks on all modules of the process
EVERYWHERE = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)


class Straight:
    """One layer as it is now, and whether it still is."""

    def __init__(self, layer: nn.Module, names: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: its attention is not of the form.
        """
        attn = layer.get_submodule(names["attention"])
        ours = _attention_names(attn)
        if ours is None or not match.runs(attn, rotary.attention_forward):
            raise ValueError(attn)
        self.attention = _Attention(attn, ours, vars(attn)["_pagedkv_rotary"])
        self.norm = _norm(layer.get_submodule(names["norm"]))
        self.attention_norm, self.out_norm = (
            None if names[n] is None else _norm(layer.get_submodule(names[n])) for n in ("attention_norm", "out_norm")
        )
        self.mlp_norm = layer.get_submodule(names["mlp_norm"])
        self.spec = norm.spec_of(self.mlp_norm) if match.runs(self.mlp_norm, norm.rms_forward) else None
        inner = layer.get_submodule(names["mlp"])
        spec = vars(inner).get("_pagedkv_mlp") if match.runs(inner, mlp.gated_forward) else None
        self.mlp: Callable[..., Tensor] = inner if spec is None else _GatedMLP(inner, spec)
        self.is_gated = spec is not None
        self.dtype = layer.get_submodule(names["norm"])._parameters["weight"].dtype  # type: ignore[union-attr]

        # what is not called as a module here; of the others only their being there counts
        own = [attn, *([inner] if spec is not None else [])]
        self.children = [owner._modules for owner in (layer, *own)]
        self.children_before = [dict(each) for each in self.children]
        inlined = {id(m): m for m in (*own, *(child for owner in (layer, *own) for child in owner.children()))}
        if spec is None:
            del inlined[id(inner)]
        self.inlined = list(inlined.values())
        self.classes = [m.__class__ for m in self.inlined]
        self.namespaces = [vars(m) for m in self.inlined]
        self.forwards = [names.get("forward") for names in self.namespaces]
        self.hooks = [
            hooks
            for m in self.inlined
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        self.hooks += EVERYWHERE

    def is_intact(self) -> bool:
        """Whether the layer still consists of the modules that it was made from."""
        return (
            all(map(operator.eq, self.children, self.children_before))
            and [m.__class__ for m in self.inlined] == self.classes
            and [names.get("forward") for names in self.namespaces] == self.forwards
        )

    def is_hooked(self) -> bool:
        """Whether somebody would see the calls that are left out."""
        return any(self.hooks) and any(watches(hook) for hooks in self.hooks for hook in hooks.values())

    def __call__(self, x: Tensor, position: tuple[Tensor, Tensor], cache: PagedCache) -> Tensor:
        few = linear.has_few_rows(x)
        y = self.attention(self.norm(x, few), few, position, cache)
        if self.attention_norm is not None:
            y = self.attention_norm(y, few)
        spec = self.spec
        if spec is None:
            x = x + y
            y = self.mlp_norm(x)
        else:
            weight = self.mlp_norm._parameters["weight"]
            y, x = _add_rms_norm(y, x, weight, spec.eps, spec.weight_offset, spec.round_before_weight)
        if not self.is_gated:
            y = self.mlp(y)
        elif self.out_norm is None:
            return self.mlp(y, few, x)
        else:
            y = self.mlp(y, few, None)
        if self.out_norm is not None:
            y = self.out_norm(y, few)
        return x + y


def watches(hook: Any) -> bool:
    """False for the hooks that transformers leaves behind when it once recorded outputs, while it does not."""
    idle = getattr(hook, "__qualname__", "").startswith("install_output_capuring_hook")
    return not idle or bool(output_capturing._active_collector.get())


def _attention_names(module: nn.Module) -> dict[str, Any] | None:
    """The names in an attention module's forward, if it is of the form and its rotary embedding is known."""
    names = _names(_ATTENTION, type(module))
    binding: rotary.RotaryBinding | None = vars(module).get("_pagedkv_rotary")
    if names is None or binding is None or binding.convention is None or binding.failed or not binding.hands_on:
        return None
    return names


@dataclass
class Plan:
    """What a layer needs to run as one function; copies and pickles make their own.

    Attributes:
        names: in its forward.
        now: made at the first step, and again after a change.
        refused: the cache for which that failed: the modules are called until there is another.
    """

    names: dict[str, Any]
    now: Straight | None = None
    refused: int = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan, (self.names,)

    def straight(self, layer: nn.Module, cache: PagedCache, dtype: torch.dtype) -> Straight | None:
        """The function for this layer and hidden states of this dtype, if there is one."""
        now = self.now
        if now is not None and now.dtype == dtype and now.is_intact():
            return now
        if self.refused == id(cache):
            return None
        try:
            now = Straight(layer, self.names)
            if now.dtype == dtype == cache.manager.dtype:
                self.now = now
                return now
        except (ValueError, AttributeError, KeyError):  # it is of another form by now
            pass
        self.now, self.refused = None, id(cache)
        return None


def _forward(
    self: Any,
    hidden_states: Tensor,
    *args: Any,
    past_key_values: Any = None,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> Any:
    plan: Plan = self._pagedkv_straight
    if (
        not torch.compiler.is_compiling()
        and type(past_key_values) is PagedCache
        and not args
        and position_embeddings is not None
        and past_key_values.takes_rotary
        and not self.training
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(hidden_states.device.type)
        and _SEEN.isdisjoint(kwargs)
        and past_key_values.manager.specs[0].value_dim is None
    ):
        straight = plan.straight(self, past_key_values, hidden_states.dtype)
        if straight is not None and not straight.is_hooked():
            return straight(hidden_states, position_embeddings, past_key_values)
    if past_key_values is not None:
        kwargs["past_key_values"] = past_key_values
    if position_embeddings is not None:
        kwargs["position_embeddings"] = position_embeddings
    before = self._pagedkv_layer_forward
    if before is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return before(hidden_states, *args, **kwargs)


def apply(model: nn.Module, config: PagedConfig, log: PatchLog) -> None:
    """Bind the straight forward to every decoder layer of the form. Norms, MLPs, projections and rotary embeddings have
    to be patched, and the rotary embeddings' conventions learned."""
    if not config.fuse_layers:
        return
    for name, module in match.modules_of(model):
        names = _names(_LAYER, type(module)) if hasattr(type(module), "forward") else None
        if names is None or not {"past_key_values", "position_embeddings"} <= _given(names):
            continue
        attn = getattr(module, names["attention"], None)
        if not isinstance(attn, nn.Module) or _attention_names(attn) is None:
            continue
        before = vars(module).get("forward")
        if before is not None and "_pagedkv_layer" not in vars(module):
            log.kept(name, "layer", "something else is bound to its forward")
            continue
        log.set_attribute(module, "_pagedkv_straight", Plan(names))
        log.set_attribute(module, "_pagedkv_layer_forward", before)
        log.bind(module, "forward", _forward)
        log.runs(name, "layer", "one function")


def _given(names: dict[str, Any]) -> set[str]:
    """What the layer hands its attention by name."""
    return {each.partition("=")[0] for each in names["given"].split(", ") if each}
