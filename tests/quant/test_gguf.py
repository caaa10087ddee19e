"""Q4_0 and Q4_1 of GGUF files: the file's numbers, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor

import torch_pagedkv
from torch_pagedkv.quant import gguf as ours
from torch_pagedkv.quant.linear import Int4Linear
from torch_pagedkv.quant.loading import int4_layers

gguf = pytest.importorskip("gguf")


def _blocks(kind: str, rows: int, inputs: int, seed: int) -> np.ndarray:
    """uint8 [rows, bytes]: random numbers of the format."""
    weights = np.random.default_rng(seed).normal(size=(rows, inputs)).astype(np.float32) * 0.3
    return gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_bits(kind: str) -> None:
    blocks = _blocks(kind, 24, 160, 1)
    want = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    layer = Int4Linear(ours.weight_of(kind, torch.from_numpy(blocks)), dtype=torch.float32)
    assert np.array_equal(layer.weight.numpy(), want)
    x = torch.randn(3, 160)
    torch.testing.assert_close(layer(x), x @ torch.from_numpy(want).T, rtol=1e-5, atol=1e-5)


def test_bad_blocks() -> None:
    blocks = torch.from_numpy(_blocks("Q4_1", 4, 64, 1))
    blocks[1, :2] = 255
    with pytest.raises(ValueError, match="NaN"):
        ours.weight_of("Q4_1", blocks)
    with pytest.raises(ValueError, match="Q8_0"):
        ours.weight_of("Q8_0", blocks)


HEADS, KV_HEADS, WIDTH, INNER, LAYERS, VOCABULARY = 4, 2, 128, 160, 2, 64


def _write(path: Path, kind: str, head: str = "F32") -> None:
    """A Llama, its layers of one kind, written by the gguf package."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
    rng = np.random.default_rng(0)

    def add(name: str, rows: int, inputs: int, stored: str) -> None:
        if stored == "F32":
            writer.add_tensor(name, rng.normal(size=(rows, inputs)).astype(np.float32) * 0.3)
        else:
            kind = gguf.GGMLQuantizationType[stored]
            writer.add_tensor(name, _blocks(stored, rows, inputs, len(name) + rows), raw_dtype=kind)

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(WIDTH, dtype=np.float32))

    add("token_embd.weight", VOCABULARY, WIDTH, "F32")
    add("output.weight", VOCABULARY, WIDTH, head)
    ones("output_norm.weight")
    for i in range(LAYERS):
        ones(f"blk.{i}.attn_norm.weight")
        ones(f"blk.{i}.ffn_norm.weight")
        for name, rows, inputs in (
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", WIDTH // HEADS * KV_HEADS, WIDTH),
            ("attn_v", WIDTH // HEADS * KV_HEADS, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_gate", INNER, WIDTH),
            ("ffn_up", INNER, WIDTH),
            ("ffn_down", WIDTH, INNER),
        ):
            add(f"blk.{i}.{name}.weight", rows, inputs, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def _logits(model: hf.PreTrainedModel) -> Tensor:
    return model(input_ids=torch.arange(2, 26).view(2, 12), use_cache=False).logits


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _write(tmp_path / "m.gguf", kind)
    config = hf.GgufConfig(dequantize=True)
    dense = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", quantization_config=config, dtype=dtype
    )
    model = torch_pagedkv.from_gguf(tmp_path / "m.gguf", dtype=dtype)
    layers = dict(int4_layers(model))
    assert len(layers) == 7 * LAYERS  # query and key, whose rows the file interleaves, too
    for name, layer in layers.items():
        assert torch.equal(layer.weight, dense.get_submodule(name).weight)
    stock, exact = _logits(dense), _logits(dense.float())

    def error(logits: Tensor) -> float:
        return float((logits.float() - exact).norm() / exact.norm())

    limit = max(2 * error(stock), 1e-5)
    assert error(_logits(model)) < limit
    torch_pagedkv.patch(model)
    assert torch_pagedkv.report(model).replaced["int4_linear"] == 7 * LAYERS
    assert error(_logits(model)) < limit


def test_saving(tmp_path: Path) -> None:
    for kind in ("Q4_0", "Q4_1"):
        _write(tmp_path / f"{kind}.gguf", kind)
        model = torch_pagedkv.from_gguf(tmp_path / f"{kind}.gguf", dtype=torch.float32)
        if kind == "Q4_0":
            model.save_pretrained(tmp_path / "out")
            again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
            assert torch.equal(_logits(again), _logits(model))
        else:
            with pytest.raises(ValueError, match=r"q_proj: .*offsets.*dequantize"):
                model.save_pretrained(tmp_path / "out")


def test_refusals(tmp_path: Path) -> None:
    _write(tmp_path / "m.gguf", "Q8_0")
    with pytest.raises(ValueError, match="its layers are Q8_0; supported are Q4_0, Q4_1"):
        torch_pagedkv.from_gguf(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:3000])
    with pytest.raises(ValueError, match="corrupt or truncated GGUF"):
        torch_pagedkv.from_gguf(tmp_path / "m.gguf")
