"""The benchmark of the operators: what it reports, marks and draws, and that its checks can fail."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from torch_pagedkv import ops
from torch_pagedkv.evals import kernels, models, peers, problems, roofline, timing

TINY = problems.Model(heads=6, kv_heads=2, head_dim=32, hidden=64, ffn=96, vocab=100)


def bench(*arguments: str) -> int:
    """A short run."""
    return kernels.main(["--seconds", "0.001", *arguments])


def env(device: str = "cpu") -> problems.Env:
    return problems.Env(device, torch.float32)


def test_bench(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "result.json"
    only = "rms_norm decode SmolLM2,paged_attention prefill SmolLM2"
    dtype = "float32" if device == "cpu" else "bfloat16"
    assert bench("--device", device, "--only", only, "--json", str(file)) == 0
    result = json.loads(file.read_text())
    rows: dict[str, Any] = {}
    for row in result["rows"]:
        rows.setdefault(row["op"], row)  # a GPU has more of them
    assert list(rows) == ["paged_attention", "rms_norm", "add_rms_norm"]
    assert result["device"] == device and result["dtype"] == dtype and result["machine"]["versions"]["torch"]
    assert all(value > 0 for value in result["limits"].values()) and {"GB/s", "TFLOP/s"} <= result["limits"].keys()
    for row in rows.values():
        assert row["us"] > 0 and 0 <= row["error"] <= row["bound"] and not row["wrong"]
        assert row["of_limit"] == pytest.approx(row["rate"] / result["limits"][row["unit"]])
        assert all("us" in peer for peer in row["peers"].values()) and row["peers"]
    row = rows["paged_attention"]
    assert row["unit"] == "TFLOP/s" and row["flops"] == 4 * 9 * 64 * 512 * 513 / 2
    assert row["rate"] == pytest.approx(row["flops"] / row["us"] / 1e6)
    row = rows["rms_norm"]
    assert row["unit"] == "GB/s" and row["bytes"] == (2 * 8 + 1) * 576 * (4 if device == "cpu" else 2)
    told = capsys.readouterr()
    assert "F.rms_norm" in told.out and "limits: copy" in told.out and "WRONG" not in told.out + told.err


def test_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right: Callable[..., torch.Tensor] = ops.rms_norm

    def wrong(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return right(x, *rest) * (1 + 1e-4)

    monkeypatch.setattr(ops, "rms_norm", wrong)
    assert bench("--device", "cpu", "--only", "rms_norm decode SmolLM2", "--no-peers") == 1
    told = capsys.readouterr()
    assert re.search(r"^rms_norm .* WRONG \d", told.out, re.M) and "WRONG: rms_norm SmolLM2-135M, rows 8" in told.err
    assert not re.search(r"^add_rms_norm .* WRONG", told.out, re.M)


def test_an_op_that_raises_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setattr(ops, "layer_norm", broken)
    assert bench("--device", "cpu", "--only", "layer_norm decode SmolLM2", "--no-peers") == 1
    told = capsys.readouterr()
    assert "FAILED" in told.out and "WRONG: layer_norm SmolLM2-135M, rows 8: no such kernel" in told.err


def test_errors_are_told_in_a_line() -> None:
    assert kernels.brief(RuntimeError("a\nb")) == "a" and kernels.brief(AssertionError()) == "AssertionError"
    assert len(kernels.brief(RuntimeError("x" * 1000))) == 160


def test_no_such_row(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench("--device", "cpu", "--only", "rms_norms")
    assert "no row contains any of 'rms_norms'" in capsys.readouterr().err


def test_nan_and_shapes_are_no_pass() -> None:
    x, nan = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    assert kernels.difference([x], [x], False) == 0 and kernels.difference([x[:2]], [x], False) == float("inf")
    assert kernels.difference([nan], [x], False) == float("inf")
    assert kernels.difference([nan], [x], True) == pytest.approx(1 / 3)


# ---- the rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_rows_have_names_of_their_own(device: str) -> None:
    cases = kernels.cases(device, False, [])
    assert len({(case.op, case.shape) for case in cases}) == len(cases)
    assert {case.op for case in cases} == {op for family in kernels.FAMILIES.values() for op in family}
    quick = kernels.cases(device, True, [])
    assert [case.op for case in quick] == list(dict.fromkeys(case.op for case in cases))


def test_every_named_model_has_decode_and_prefill() -> None:
    cases = kernels.cases("cuda", False, [])
    for op in ("paged_attention", "reshape_and_cache", "rms_norm", "add_rms_norm", "rotary_and_cache", "silu_and_mul"):
        phases = {(case.model, case.phase) for case in cases if case.op == op}
        expected = set(kernels.NAMED) - ({"Mistral-7B"} if op != "paged_attention" else set())  # it is Llama-3-8B there
        assert phases >= {(model, phase) for model in expected for phase in ("decode", "prefill")}, op
    heads = {problems.MODELS[case.model].head_dim for case in cases if case.op == "paged_attention"}
    assert heads >= {64, 80, 96, 112, 120, 128, 192, 256}


def test_lengths_of_requests() -> None:
    lengths = problems.lognormal_lengths(64, 2048)
    assert (min(lengths), max(lengths), len(lengths)) == (279, 5960, 64)
    assert sum(lengths) / 64 == pytest.approx(2048, rel=1e-3)


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 3, "context": 70},
        {"batch": 2, "context": 70, "window": 20},
        {"batch": 1, "context": 90, "query": 90, "window": 33, "softcap": 5.0},
        {"batch": 2, "context": 75, "query": 10, "page": 8},
        {"batch": 5, "context": 60, "lognormal": True},
        {"batch": 5, "context": 60, "lognormal": True, "window": 40},
        {"batch": 2, "context": 64, "kv": "int8", "page": 64},
    ],
    ids=str,
)
def test_paged_problems(sizes: dict[str, Any]) -> None:
    """The kernel against the reference, peers against it too, and work as counted pair by pair."""
    problem = problems.paged(env(), TINY, **sizes)
    a = problem.make()
    exact = problem.truth(a)
    assert kernels.difference(problem.result(a, problem.call(a)), exact, False) <= problem.bound
    for name, peer in problem.peers.items():
        out = peer(a).transpose(1, 2).flatten(0, 1)  # [B, H, Q, D]
        assert kernels.difference(problem.result(a, out), exact, False) <= 1e-5, name
    assert bool(problem.peers) == ("softcap" not in sizes and "kv" not in sizes)
    query, window = sizes.get("query", 1), sizes.get("window", 1 << 30)
    pairs, seen = 0, 0
    for length in a.lens.tolist():
        rows = range(length - query, length)
        pairs += sum(1 for row in rows for key in range(length) if 0 <= row - key < window)
        seen += sum(1 for key in range(length) if any(0 <= row - key < window for row in rows))
    assert problem.flops == 4 * pairs * 6 * 32 and problem.computes == (query > 1)
    size = 2 * 2 * (32 + 4) if "kv" in sizes else 2 * 2 * 32 * 4
    assert problem.moved == seen * size + 2 * sizes["batch"] * query * 6 * 32 * 4


@pytest.mark.gpu
@pytest.mark.parametrize("computing", [False, True])
def test_swap_both_ways(computing: bool) -> None:
    problem = problems.swap_both_ways(env("cuda"), TINY, 64, computing)
    a = problem.make()
    exact = problem.truth(a)
    assert kernels.difference(problem.result(a, problem.call(a)), exact, True) == 0
    assert problem.graphed != computing


# ---- peers -----------------------------------------------------------------------------------------------------------


def shape(**changes: Any) -> peers.Attention:
    sizes: dict[str, Any] = {"heads": 8, "kv_heads": 2, "head_dim": 128, "page": 16, "lengths": [64], "query": 1}
    return peers.Attention(**sizes | {"dtype": torch.bfloat16, "window": 0, "softcap": 0.0} | changes)


def test_fa3_is_asked_only_for_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """For other head sizes it would end the process."""
    assert peers._fa3(shape()) == {}  # not loaded
    monkeypatch.setattr(peers, "has_op", lambda namespace, name: True)
    assert list(peers._fa3(shape())) == ["FA3, paged", "FA3, paged, planned"]
    assert list(peers._fa3(shape(query=8, head_dim=64))) == ["FA3, paged"]
    for changes in ({"head_dim": 256}, {"head_dim": 80}, {"dtype": torch.float16}):
        assert peers._fa3(shape(**changes)) == {}


def test_rows_of_older_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run that kernel, leave the environment as it was, and stand beside kernels of that kind."""
    seen = []
    attend = problems.ops.paged_attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(os.environ.get("PAGEDKV_PREFILL"))
        return attend(*args, **kwargs)

    monkeypatch.setattr(problems.ops, "paged_attention", spy)
    for before in (None, "other"):
        monkeypatch.delenv("PAGEDKV_PREFILL", raising=False)
        if before:
            monkeypatch.setenv("PAGEDKV_PREFILL", before)
        for older in (True, False):
            problem = problems.paged(env(), TINY, batch=1, context=40, query=40, mma_sync=older)
            problem.call(problem.make())
            assert seen.pop() == ("mma" if older else before) and os.environ.get("PAGEDKV_PREFILL") == before
    theirs = peers.attention(shape(query=64, mma_sync=True), lambda a: None, False)
    assert "sdpa, FlashAttention-2, dense KV" in theirs and "sdpa, cudnn, dense KV" not in theirs
    assert "sdpa, cudnn, dense KV" in peers.attention(shape(query=64), lambda a: None, False)
    assert any("mma sync" in case.shape for case in kernels.cases("cuda", False, []))


def test_flashinfers_modules_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    built = {"batch_decode_x_dtype_q_bf16_head_dim_qk_128_use_swa_False_use_logits_cap_False", "xqa_input_bf16_y"}
    monkeypatch.setattr(peers, "modules_built", lambda: frozenset(built))
    assert peers.is_built("batch_decode", "head_dim_qk_128", "use_swa_False")
    assert not peers.is_built("batch_decode", "head_dim_qk_64") and not peers.is_built("batch_prefill")
    assert not peers.is_built("batch_decode", lacking="q_bf16")


def test_a_wrong_peer_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(4, 4)
    for factor, right in ((1.001, True), (1.1, False)):
        peer = peers.Peer(lambda a, factor=factor: a * factor, exact=lambda a: a)
        told = kernels.beside(peer, [x], lambda call, sets: (1.0, "wall"))
        assert ("us" in told) == right and ("wrong by" in told.get("failed", "")) != right
    in_place = peers.Peer(lambda a: None, exact=lambda a: a, result=lambda a: a.clone())
    assert "us" in kernels.beside(in_place, [x], lambda call, sets: (1.0, "wall"))


def test_no_peers_of_other_packages_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert not peers.norm("rms_norm", 1e-5, cpu) and not peers.gated("silu_and_mul", cpu) and not peers.swap(cpu)
    assert not peers.rotary(64, cpu) and not peers.write(cpu) and not peers.merge(cpu)


# ---- comparing and drawing -------------------------------------------------------------------------------------------


def row(op: str, us: float, **changes: Any) -> dict[str, Any]:
    """A row of a result."""
    made = {"op": op, "shape": "Tiny", "us": us, "timed": "graph", "rate": 1e3 / us, "unit": "GB/s", "sets": 1}
    made |= {"bytes": 1e6, "flops": 0.0, "of_limit": 0.5, "error": 0.0, "bound": 0.0, "wrong": False}
    peers = {"none": {"failed": "why"}, "slow": {"us": 3 * us, "timed": "eager"}, "theirs": {"us": 2 * us}}
    return made | {"peers": peers} | changes


@pytest.fixture
def result() -> dict[str, Any]:
    """A result with three rows, one of which failed."""
    machine = {"gpu": None, "cpu": "a processor", "cores": 2, "native": {"cpu": "avx2"}, "commit": None}
    machine |= {"versions": {"torch": "2"}, "date": "2026-01-01", "command": "torch-pagedkv bench <here>"}
    rows = [
        row("paged_attention", 100.0, flops=1e8),
        row("rms_norm", 10.0),
        {"op": "argmax", "shape": "Tiny", "failed": "no such kernel", "wrong": True},
    ]
    limits = {"GB/s": 100.0, "TFLOP/s": 10.0}
    made = {"eval": "kernels", "model": "operators, float32", "device": "cpu", "machine": machine, "limits": limits}
    return made | {"rows": rows}


def test_slower_rows_are_marked(result: dict[str, Any]) -> None:
    factor, us = kernels.SLACK["cpu"]
    old = [row("paged_attention", (99.0 - us) / factor), row("rms_norm", (10.1 - us) / factor), row("argmax", 1.0)]
    compared = {**result, "before": {"rows": old}}
    assert {op: worse for (op, _), (_, worse) in kernels.changes(compared).items()} == {
        "paged_attention": True,
        "rms_norm": False,
    }
    tables = kernels.tables(compared)
    column = tables["attention"][0].index("faster than before")
    assert tables["attention"][1][column] == f"{(99.0 - us) / factor / 100:.2f}x SLOWER"
    assert tables["norm"][1][column] == f"{(10.1 - us) / factor / 10:.2f}x"
    assert tables["sampling"][1][column] == "-" and tables["sampling"][1][2] == "FAILED"
    assert {len(line) for rows in tables.values() for line in rows} == {8}
    tables = kernels.tables(result)
    assert {len(line) for rows in tables.values() for line in rows} == {7}
    assert tables["norm"][1][-1] == "theirs 20.0 (2.0x); slow 30.0* (3.0x); none failed"


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, once = tmp_path / "old.json", ("--device", "cpu", "--only", "rms_norm decode SmolLM2", "--no-peers")
    assert bench(*once, "--json", str(file)) == 0
    old = json.loads(file.read_text())
    for one, factor in zip(old["rows"], (1e-3, 1e3), strict=True):
        one["us"] *= factor
    file.write_text(json.dumps(old))
    capsys.readouterr()
    assert bench(*once, "--compare", str(file)) == 0
    told = capsys.readouterr()
    assert re.search(r"^rms_norm .* 0\.00x SLOWER", told.out, re.M) and told.out.count("SLOWER") == 1
    assert "SLOWER: rms_norm SmolLM2-135M, rows 8: 0.00x of old.json's speed" in told.err
    with pytest.raises(SystemExit):
        bench(*once, "--dtype", "bfloat16", "--compare", str(file))
    assert "old.json is of cpu, float32, not cpu, bfloat16" in capsys.readouterr().err


def test_plot(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page, picture = tmp_path / "made" / "plot.html", tmp_path / "made" / "plot.png"
    assert roofline.write(result, page) == [str(page), str(picture)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(http|//)", text)  # nothing from elsewhere
    assert text.count("<svg") == 2 and text.count("<circle") == 4  # ours and a peer's, in two panels
    assert "paged_attention Tiny: 100.0 us" in text and "theirs 200.0 us" in text
    assert "bench &lt;here&gt;" in text and "no such kernel" in text


def test_points(result: dict[str, Any]) -> None:
    calculating, moving = roofline.panels(result)
    (point,) = calculating.points
    assert point.x == pytest.approx(100) and point.y == pytest.approx(1.0) and point.peer == pytest.approx(0.5)
    # the roof's corner: 10 TFLOP/s at 100 GB/s
    assert calculating.roof[1] == pytest.approx((100.0, 10.0)) and calculating.roof[0][1] == pytest.approx(1e-5)
    (point,) = moving.points
    assert point.x == 1e6 and point.y == pytest.approx(100.0) and moving.roof[0][1] == 100.0
    left, right, bottom, top = moving.ranges()
    assert left <= 1e6 <= right and bottom <= 50 and top >= 100
    assert [roofline.power(10.0**n) for n in (-2, 0, 2, 4, 9)] == ["0.01", "1", "100", "10 K", "1 G"]


def test_plot_without_matplotlib(result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "is_missing", lambda module: module == "matplotlib")
    page = tmp_path / "plot.html"
    lines = roofline.write(result, page)
    assert lines[0] == str(page) and "no plot.png: matplotlib not installed: pip install" in lines[1]
    assert page.exists() and not (tmp_path / "plot.png").exists()


def test_plot_of_a_file(result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result))
    assert roofline.main([str(file)]) == 0 and (tmp_path / "result.html").exists()
    file.write_text(json.dumps({"eval": "speed", "rows": []}))
    assert roofline.main([str(file)]) == 2 and "not a result of `torch-pagedkv bench`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench("--plot", "plot.pdf")
    assert "needs a name that ends in .html" in capsys.readouterr().err


def test_timer() -> None:
    calls: list[int] = []
    us, how = timing.cpu(calls.append, [1, 2, 3], 0.0)
    assert us > 0 and how == "wall" and calls == [1, 2, 1, 2, 3, 1, 2]


@pytest.mark.gpu
def test_timer_on_a_gpu() -> None:
    x = [torch.zeros(1 << 20, device="cuda") for _ in range(3)]
    us, how = timing.cuda(lambda a: a.add_(1), x, 0.01)
    assert how == "graph" and 1 < us < 1000
    assert len({float(a[0]) for a in x[1:]}) == 1  # each in turn
    stream = torch.cuda.current_stream()
    us, how = timing.cuda(lambda a: a.sum().item(), x, 0.001)  # cannot be captured
    assert how == "eager"
    assert torch.cuda.current_stream() == stream and torch.rand(3, device="cuda").max() < 1  # nothing is left of it
    assert timing.cuda(lambda a: a.normal_(), x, 0.001)[1] == "graph"
