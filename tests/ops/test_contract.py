"""What holds for every op: fake, reference and sample; opcheck; torch.compile; mutations; instruction sets."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.accuracy import FLOATS, bits, same_bits
from ops.samples_small import Sample
from ops.samples_small import samples as small_samples
from torch import Tensor
from torch.utils import _pytree as pytree

import torch_pagedkv  # noqa: F401  (loads the kernels)
from torch_pagedkv.ops import REFERENCES, SCHEMAS

ops = torch.ops.torch_pagedkv


def samples(device: str) -> Iterator[Sample]:
    """The samples of all families."""
    yield from small_samples(device)
    if importlib.util.find_spec("ops.samples"):
        from ops.samples import samples as attention_samples

        yield from attention_samples(device)


NAMES = [name for name, _, _ in samples("cpu")]
CASES = [pytest.param(i, id=f"{name}-{NAMES[:i].count(name)}") for i, name in enumerate(NAMES)]
FIRST = [pytest.param(NAMES.index(name), id=name) for name in dict.fromkeys(NAMES)]


def get(device: str, i: int) -> Sample:
    """Sample i."""
    return list(samples(device))[i]


def clone(args: Any) -> Any:
    """Copies of all tensors."""
    return pytree.tree_map_only(Tensor, torch.clone, args)


def flat_bits(args: Any) -> list[Tensor]:
    """The bytes of all tensors."""
    return [bits(x) for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]


def test_every_op_has_a_reference_and_a_sample() -> None:
    assert set(SCHEMAS) == set(REFERENCES)
    assert set(SCHEMAS) == set(NAMES)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_declares_its_mutations(name: str) -> None:
    """The string in SCHEMAS is what torch parsed, with the tag that torch.compile needs."""
    op = getattr(ops, name).default
    assert [a.name for a in op._schema.arguments if a.alias_info] == re.findall(r"\(\w!\)\S* (\w+)", SCHEMAS[name])
    assert torch.Tag.pt2_compliant_tag in op.tags


@pytest.mark.parametrize("i", CASES)
def test_opcheck(i: int, device: str) -> None:
    name, args, kwargs = get(device, i)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if any(x.dtype == torch.float8_e4m3fn for x in args if isinstance(x, Tensor)):
        tests = tests[1:]  # torch has no float8 comparison; test_mutates_what_its_schema_says covers it
    torch.library.opcheck(getattr(ops, name).default, args, kwargs, test_utils=tests)


@pytest.mark.parametrize("i", CASES)
def test_mutates_what_its_schema_says(i: int, device: str) -> None:
    """Arguments not declared as written keep every bit."""
    name, args, kwargs = get(device, i)
    before = clone(args), clone(kwargs)
    getattr(ops, name)(*args, **kwargs)
    schema = getattr(ops, name).default._schema.arguments
    values = {a.name: x for a, x in zip(schema, args)} | kwargs
    old = {a.name: x for a, x in zip(schema, before[0])} | before[1]
    written = {a.name for a in schema if a.alias_info is not None and a.alias_info.is_write}
    changed = {key for key, x in values.items() if not all(map(torch.equal, flat_bits(x), flat_bits(old[key])))}
    assert changed <= written
    # Samples are such that all that may be written is written.
    assert changed == {key for key in written if isinstance(values.get(key), (Tensor, list))}


@pytest.mark.parametrize("i", CASES)
def test_fake_agrees_with_kernel(i: int, device: str) -> None:
    """Shapes, dtypes and strides of the outputs."""
    name, args, kwargs = get(device, i)
    real = getattr(ops, name)(*args, **kwargs)
    with torch._subclasses.FakeTensorMode() as mode:
        fake_args, fake_kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        fake = getattr(ops, name)(*fake_args, **fake_kwargs)
    for a, b in zip(pytree.tree_leaves(real), pytree.tree_leaves(fake), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


@pytest.mark.parametrize("i", FIRST)
def test_compiles_whole(i: int, device: str) -> None:
    """Compile without a graph break; outputs and mutated arguments have the bits of the eager call."""
    name, args, kwargs = get(device, i)
    op = getattr(ops, name)

    def call(args: Any, kwargs: Any) -> Any:
        return op(*args, **kwargs)

    eager_args = clone((args, kwargs))
    eager = call(*eager_args)
    with torch.no_grad():
        compiled = torch.compile(call, fullgraph=True)(args, kwargs)
    wanted, got = (
        [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]
        for tree in ((eager, eager_args), (compiled, args, kwargs))
    )
    assert len(wanted) == len(got) > 0
    assert all(map(same_bits, wanted, got))


RUN_SAMPLES = """
import sys
import torch
from ops.test_contract import ops, samples
from torch_pagedkv._native import libraries
results = []
for name, args, kwargs in samples("cpu"):
    results.append((name, getattr(ops, name)(*args, **kwargs), args))
torch.save((libraries["cpu"].target, results), sys.argv[1])
"""
ARITHMETIC_FREE = {"reshape_and_cache", "copy_blocks", "swap_blocks", "gather_cache", "argmax", "sample"} | {
    f"{family}_{op}" for family in ("int4", "q4k", "int8") for op in ("repack", "dequantize")
}
PRODUCTS = ("linear", "int4_linear", "q4k_linear", "int8_linear")


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set_agrees(isa: str, tmp_path: Path) -> None:
    """The units that this CPU would not pick compute the same: bits where nothing is rounded, else to a few steps."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PAGEDKV_SIMD": isa, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", RUN_SAMPLES, str(tmp_path / "out.pt")], check=True, env=env, cwd=tests)
    target, results = torch.load(tmp_path / "out.pt")
    if target != isa:
        pytest.skip(f"this CPU has no {isa}")
    for (name, other, other_args), (_, args, kwargs) in zip(results, samples("cpu"), strict=True):
        own = getattr(ops, name)(*args, **kwargs)
        for a, b in zip(pytree.tree_leaves((own, args)), pytree.tree_leaves((other, other_args)), strict=True):
            if not isinstance(a, Tensor):
                continue
            if name in ARITHMETIC_FREE or a.dtype not in FLOATS:
                assert same_bits(a, b), name
            else:
                # 16 bits are rounded from float32 sums that differ by less: to neighbours at most
                steps = (8 if a.dtype == torch.float32 else 1) * torch.finfo(a.dtype).eps
                # a dot product is summed in another order: where it cancels, a rounding of its terms is left
                largest = float(a.float().abs().amax()) if name in PRODUCTS and a.numel() else 1.0
                torch.testing.assert_close(a, b, rtol=steps, atol=steps * max(1.0, largest), equal_nan=True)
