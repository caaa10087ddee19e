"""Quantised layers of GGUF files: the file's numbers, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from torch import Tensor, nn

import torch_pagedkv
from torch_pagedkv.quant import gguf as ours
from torch_pagedkv.quant.fixed import fixed_layers
from torch_pagedkv.quant.linear import Int4Linear
from torch_pagedkv.quant.packed import Int8Linear, PackedWeight

gguf = pytest.importorskip("gguf")


KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K")


def _blocks(kind: str, rows: int, inputs: int, seed: int) -> np.ndarray:
    """uint8 [rows, bytes]: random numbers of the format."""
    rng = np.random.default_rng(seed)
    if kind.endswith("_K"):  # which the package cannot write: random bytes, and scales of a float16
        size, scales = {"Q4_K": (144, (0, 2)), "Q6_K": (210, (208,))}[kind]
        blocks = rng.integers(0, 256, (rows, inputs // 256, size), dtype=np.uint8)
        for at in scales:
            numbers = rng.uniform(0.001, 0.004, blocks.shape[:2]).astype(np.float16)
            blocks[..., at : at + 2] = numbers[..., None].view(np.uint8)
        return blocks.reshape(rows, -1)
    weights = rng.normal(size=(rows, inputs)).astype(np.float32) * 0.3
    return gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind])


def _by_hand(kind: str, row: bytes) -> list[float]:
    """The numbers of a row, one at a time, from the description of the formats; float32 as ggml computes them."""
    half = lambda at: np.float32(np.frombuffer(row[at : at + 2], np.float16)[0])  # noqa: E731
    out: list[float] = []
    size = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q8_0": 34, "Q4_K": 144}[kind]
    for start in range(0, len(row), size):
        d = half(start)
        if kind == "Q4_K":
            dmin, packed, q = half(start + 2), row[start + 4 : start + 16], row[start + 16 : start + 144]
            for j in range(8):
                if j < 4:
                    scale, least = packed[j] & 63, packed[j + 4] & 63
                else:
                    scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
                    least = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)
                for i in range(32):
                    octet = q[j // 2 * 32 + i]
                    number = octet >> 4 if j % 2 else octet & 15
                    out.append(d * np.float32(scale) * np.float32(number) - dmin * np.float32(least))
            continue
        for i in range(32):
            if kind == "Q8_0":
                octet = row[start + 2 + i]
                out.append(d * np.float32(octet - 256 if octet > 127 else octet))
                continue
            octet = row[start + size - 16 + i % 16]
            number = octet >> 4 if i >= 16 else octet & 15
            if kind == "Q5_0":
                fifth = int.from_bytes(row[start + 2 : start + 6], "little") >> i & 1
                out.append(d * np.float32((number | fifth << 4) - 16))
            elif kind == "Q4_0":
                out.append(d * np.float32(number - 8))
            else:
                out.append(d * np.float32(number) + half(start + 2))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_bits(kind: str) -> None:
    """Against the formats' description and against the gguf package."""
    blocks = _blocks(kind, 24, 512, 1)
    want = np.array([_by_hand(kind, row.tobytes()) for row in blocks], np.float32)
    assert np.array_equal(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]), want)
    weight = ours.weight_of(kind, torch.from_numpy(blocks))
    assert np.array_equal(ours.dequantize(weight, torch.float32).numpy(), want)
    layer: nn.Linear
    if isinstance(weight, PackedWeight):
        layer = weight.layer(weight, dtype=torch.float32)
    else:
        layer = Int4Linear(weight, dtype=torch.float32)
    assert np.array_equal(layer.weight.numpy(), want)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(ours.dequantize(weight, dtype), torch.from_numpy(want).to(dtype))
    x = torch.randn(3, 512)
    torch.testing.assert_close(layer(x), x @ torch.from_numpy(want).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_blocks(kind: str) -> None:
    blocks = torch.from_numpy(_blocks(kind, 4, 512, 1))
    with pytest.raises(ValueError, match=f"{kind}: got rows of .*, needs blocks of"):
        ours.weight_of(kind, blocks[:, :-1])
    blocks[1, :2] = 255
    with pytest.raises(ValueError, match=f"{kind}: .* NaN or infinite"):
        ours.weight_of(kind, blocks)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kind: got 'Q6_K', needs one of Q4_0, Q4_1, Q5_0, Q8_0, Q4_K"):
        ours.weight_of("Q6_K", torch.zeros(4, 210, dtype=torch.uint8))


HEADS, KV_HEADS, WIDTH, INNER, LAYERS, VOCABULARY = 4, 2, 256, 512, 2, 64


def _write(path: Path, kind: str, head: str = "F32", seed: int = 0, **other: str) -> None:
    """A Llama, its layers of one kind, but for `other`, written by the gguf package."""
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
    rng = np.random.default_rng(seed)

    def add(name: str, rows: int, inputs: int, stored: str) -> None:
        if stored == "F32":
            writer.add_tensor(name, rng.normal(size=(rows, inputs)).astype(np.float32) * 0.3)
        else:
            kind = gguf.GGMLQuantizationType[stored]
            writer.add_tensor(name, _blocks(stored, rows, inputs, len(name) + rows + seed), raw_dtype=kind)

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(WIDTH, dtype=np.float32))

    add("token_embd.weight", VOCABULARY, WIDTH, "Q8_0" if head == "tied" else "F32")
    if head != "tied":
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
            add(f"blk.{i}.{name}.weight", rows, inputs, other.get(name, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def _logits(model: hf.PreTrainedModel) -> Tensor:
    return model(input_ids=torch.arange(2, 26).view(2, 12), use_cache=False).logits


OPS = {"Q4_0": "int4_linear", "Q4_1": "int4_linear", "Q5_0": "int8_linear", "Q8_0": "int8_linear", "Q4_K": "q4k_linear"}


def _stock(path: Path, dtype: torch.dtype) -> hf.PreTrainedModel:
    config = hf.GgufConfig(dequantize=True)
    return hf.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=config, dtype=dtype
    )


def _error(logits: Tensor, exact: Tensor) -> float:
    return float((logits.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _write(tmp_path / "m.gguf", kind)
    dense = _stock(tmp_path / "m.gguf", dtype)
    model = torch_pagedkv.from_gguf(tmp_path / "m.gguf", dtype=dtype)
    layers = dict(fixed_layers(model))
    assert len(layers) == 7 * LAYERS  # query and key, whose rows the file interleaves, too
    for name, layer in layers.items():
        assert torch.equal(layer.weight, dense.get_submodule(name).weight)
    stock, exact = _logits(dense), _logits(_stock(tmp_path / "m.gguf", torch.float32).double())
    limit = max(2 * _error(stock, exact), 1e-5)
    assert _error(_logits(model), exact) < limit
    torch_pagedkv.patch(model)
    assert torch_pagedkv.report(model).replaced[OPS[kind]] == 7 * LAYERS
    assert _error(_logits(model), exact) < limit
    # a stock model of the same numbers comes to the same, and back
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    torch_pagedkv.patch(dense, weights="gguf", gguf_file=tmp_path / "m.gguf", keep_original=True)
    assert torch_pagedkv.report(dense).replaced[OPS[kind]] == 7 * LAYERS
    assert torch.equal(_logits(dense), _logits(model))
    torch_pagedkv.unpatch(dense)
    after = dense.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert getattr(dense, "hf_quantizer", None) is None and not fixed_layers(dense)


def test_mixed(tmp_path: Path) -> None:
    """Layers of a type without a kernel stay float, and the report says so."""
    _write(tmp_path / "m.gguf", "Q4_K", head="Q8_0", attn_q="Q5_0", attn_v="Q8_0", ffn_down="Q6_K", ffn_up="F32")
    model = torch_pagedkv.from_gguf(tmp_path / "m.gguf", dtype=torch.float32)
    dense = _stock(tmp_path / "m.gguf", torch.float32)
    exact = _logits(_stock(tmp_path / "m.gguf", torch.float32).double())
    assert _error(_logits(model), exact) < 2 * _error(_logits(dense), exact)
    torch_pagedkv.patch(model)
    report = torch_pagedkv.report(model)
    assert report.replaced["q4k_linear"] == 3 * LAYERS and report.replaced["int8_linear"] == 2 * LAYERS + 1
    reasons = {row.module: row.reason for row in report.left_alone if row.kind == "weights"}
    assert reasons["model.layers.1.mlp.down_proj"].startswith("Q6_K in the file")
    assert reasons["model.layers.0.mlp.up_proj"].startswith("F32 in the file")
    assert len(reasons) == 2 * LAYERS and "Q6_K in the file" in str(report)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    # dequantised it is the stock model, to the bit
    torch_pagedkv.unpatch(model)
    model.dequantize()
    assert torch.equal(_logits(model), _logits(dense))
    model.save_pretrained(tmp_path / "out")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(_logits(again), _logits(dense))


@torch.no_grad()
def test_patch_of_a_model_that_is_not_the_files(tmp_path: Path) -> None:
    """The float original of a file: its layers are near the file's. One of other weights is refused, unchanged."""
    _write(tmp_path / "m.gguf", "Q4_K", attn_k="Q4_1", ffn_down="Q6_K")
    dense = _stock(tmp_path / "m.gguf", torch.float32)
    torch.manual_seed(0)
    for parameter in dense.parameters():
        if parameter.dim() == 2:
            parameter.add_(torch.randn_like(parameter) * 0.1 * parameter.std())
    down = dense.model.layers[0].mlp.down_proj.weight.clone()
    torch_pagedkv.patch(dense, weights="gguf", gguf_file=str(tmp_path / "m.gguf"))
    want = _stock(tmp_path / "m.gguf", torch.float32)
    for name, layer in fixed_layers(dense):
        assert torch.equal(layer.weight, want.get_submodule(name).weight), name
    assert len(fixed_layers(dense)) == 6 * LAYERS
    assert torch.equal(dense.model.layers[0].mlp.down_proj.weight, down)
    torch_pagedkv.unpatch(dense)  # says that they stay
    torch_pagedkv.patch(dense, weights="gguf", gguf_file=str(tmp_path / "m.gguf"))
    assert torch_pagedkv.report(dense).replaced["q4k_linear"] == 5 * LAYERS
    torch_pagedkv.unpatch(dense)
    with pytest.raises(ValueError, match=r"weights: got 'int4', but the model is quantised already \(gguf\)"):
        torch_pagedkv.patch(dense, weights="int4")

    other = _stock(tmp_path / "m.gguf", torch.float32)
    _write(tmp_path / "other.gguf", "Q4_K", seed=100)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"gguf_file: blk\.0\.attn_q\.weight of .*other.gguf is not .*another model"):
        torch_pagedkv.patch(other, weights="gguf", gguf_file=tmp_path / "other.gguf")
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_tied_head(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    _write(path, "Q4_K", head="tied")
    dense = _stock(path, torch.float32)
    assert dense.config.tie_word_embeddings
    exact = _logits(_stock(path, torch.float32).double())
    model = torch_pagedkv.from_gguf(path, dtype=torch.float32)
    torch_pagedkv.patch(model)
    reasons = {row.module: row.reason for row in torch_pagedkv.report(model).left_alone}
    assert reasons["lm_head"] == "it shares the embedding's weight, Q8_0 in the file (quantize_head)"
    model = torch_pagedkv.from_gguf(path, quantize_head=True, dtype=torch.float32)
    assert isinstance(model.lm_head, Int8Linear) and not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert _error(_logits(model), exact) < max(2 * _error(_logits(dense), exact), 1e-6)
    options = {"weights": "gguf", "gguf_file": path, "quantize_head": True, "keep_original": True}
    torch_pagedkv.patch(model)
    torch_pagedkv.patch(dense, **options)
    assert torch.equal(_logits(dense), _logits(model))
    torch_pagedkv.unpatch(dense)
    assert dense.lm_head.weight is dense.model.embed_tokens.weight and dense.config.tie_word_embeddings


def test_saving(tmp_path: Path) -> None:
    for kind in KINDS:
        _write(tmp_path / f"{kind}.gguf", kind)
        model = torch_pagedkv.from_gguf(tmp_path / f"{kind}.gguf", dtype=torch.float32)
        if kind == "Q4_0":
            model.save_pretrained(tmp_path / "out")
            again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
            assert torch.equal(_logits(again), _logits(model))
            continue
        why = r"q_proj: .*offsets.*dequantize" if kind == "Q4_1" else rf"q_proj: .*GGUF {kind}.*dequantize"
        with pytest.raises(ValueError, match=why):
            model.save_pretrained(tmp_path / "out")


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    _write(path, "Q6_K")
    with pytest.raises(ValueError, match="its layers are Q6_K; supported are Q4_0, Q4_1, Q5_0, Q8_0, Q4_K"):
        torch_pagedkv.from_gguf(path)
    _write(path, "Q4_K")
    whole = path.read_bytes()
    for size in (0, 3, 3000, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="corrupt or truncated GGUF"):
            torch_pagedkv.from_gguf(path)
    # one scale is NaN: by the tensor's name
    reader = gguf.GGUFReader(_written(path, whole))
    tensor = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
    damaged = bytearray(whole)
    damaged[tensor.data_offset + 1] |= 0x7F
    damaged[tensor.data_offset] |= 0x01
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight: Q4_K: a scale or minimum is NaN or infinite"):
        torch_pagedkv.from_gguf(path)


def _written(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def test_options(tmp_path: Path) -> None:
    for options, message in (
        ({"weights": "gguf"}, "gguf_file: got None, needs a path with weights='gguf'"),
        ({"gguf_file": "x"}, "gguf_file: got 'x', needs None unless weights='gguf'"),
        ({"weights": "gguf", "gguf_file": str(tmp_path / "no.gguf")}, "gguf_file: there is no file .*no.gguf"),
    ):
        model = tiny.make("llama")
        with pytest.raises(ValueError, match=message):
            torch_pagedkv.patch(model, **options)
        assert not fixed_layers(model)
    with pytest.raises(TypeError, match="gguf_file: got int"):
        torch_pagedkv.PagedConfig(weights="gguf", gguf_file=3)
