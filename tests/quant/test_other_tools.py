"""Checkpoints of ours read by other tools' own code, and theirs by ours: to the same weights, bit for bit.

The tools are optional, and a test is skipped where its one is missing. None of them needs to be installed whole:

    pip install --no-deps --target tools autoawq compressed-tensors loguru \
        gptqmodel logbar device-smi tokenicer pypcre threadpoolctl torchao defuser dill

and that folder in PYTHONPATH. (AutoAWQ's and GPTQModel's sources are enough: nothing of them is compiled here.)
"""

from __future__ import annotations

import string
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn

import torch_pagedkv
from torch_pagedkv.quant.loading import int4_layers

pytestmark = pytest.mark.slow

IDS = torch.arange(64 * 32).view(32, 64) * 7 % 89


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # GPTQModel writes its log where it is
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # with fewer it does not start


def _model() -> hf.PreTrainedModel:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny.make("llama", **sizes, head_dim=32, vocab_size=96, max_position_embeddings=64).half()


def _save(model: hf.PreTrainedModel, path: Path) -> Path:
    model.save_pretrained(path)
    tokens = ["<pad>", "<s>", *string.ascii_letters]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>")
    tokenizer.save_pretrained(path)
    return path


def _ours(method: str, path: Path, **options: Any) -> hf.PreTrainedModel:
    """A model quantised here, and saved."""
    model = _model()
    if method != "int4":
        options["calibration"] = IDS
    torch_pagedkv.quantize(model, method, group_size=32, **options)
    _save(model, path)
    return model


def _agree(ours: nn.Module, theirs: dict[str, Tensor]) -> None:
    layers = dict(int4_layers(ours))
    assert layers.keys() == theirs.keys() and len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.weight, theirs[name]), name


# ---- AutoAWQ ---------------------------------------------------------------------------------------------------------


def _autoawq() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pytest.importorskip("awq.utils.packing_utils")
        import awq.modules.linear.gemm
        import awq.utils.packing_utils
    return awq


def test_autoawq_reads_ours(tmp_path: Path) -> None:
    awq, ours = _autoawq(), _ours("awq", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    theirs = {}
    for name, layer in int4_layers(ours):
        module = awq.modules.linear.gemm.WQLinear_GEMM(4, 32, layer.in_features, layer.out_features, False, "cpu")
        leaves = ("qweight", "qzeros", "scales")
        module.load_state_dict({leaf: tensors[f"{name}.{leaf}"] for leaf in leaves})
        parts = (getattr(module, leaf) for leaf in ("qweight", "qzeros", "scales"))
        theirs[name] = awq.utils.packing_utils.dequantize_gemm(*parts, 4, 32).T
    _agree(ours, theirs)


def test_autoawq_is_read(tmp_path: Path) -> None:
    """Layers packed by AutoAWQ, as it calls its packer."""
    awq, model = _autoawq(), _model()
    _save(model, tmp_path / "float")
    theirs: dict[str, Tensor] = {}
    torch.manual_seed(0)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        n, k = module.weight.shape
        scales, zeros = torch.rand(n, k // 32).half() * 0.01 + 0.001, torch.randint(0, 16, (n, k // 32)).half()
        q = torch.randint(0, 16, (n, k))
        repeated = [t.repeat_interleave(32, 1) for t in (scales, zeros)]
        module.weight.data = ((q.half() - repeated[1]) * repeated[0]).half()
        packed = awq.modules.linear.gemm.WQLinear_GEMM.from_linear(
            module.float(), 4, 32, False, scales.T.contiguous().float(), zeros.T.contiguous().float()
        )
        theirs[name] = awq.utils.packing_utils.dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, 32).T
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], packed)
    model.half()
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    model.config.quantization_config = settings
    model.save_pretrained(tmp_path / "awq")
    _agree(torch_pagedkv.from_pretrained(tmp_path / "awq", dtype=torch.float16), theirs)


# ---- GPTQModel -------------------------------------------------------------------------------------------------------


def _gptqmodel() -> Any:
    pytest.importorskip("gptqmodel")
    import gptqmodel

    return gptqmodel


def _dequantised(loaded: Any) -> dict[str, Tensor]:
    """Of a model of GPTQModel's, by its own code."""
    found = {}
    for name, module in loaded.model.named_modules():
        if hasattr(module, "qweight"):
            found[name] = module.dequantize_weight().T
    return found


FORMS = {
    "int4": ({}, "GPTQ_TORCH"),  # some of its zeros are 0: the second format
    "gptq": ({}, "GPTQ_TORCH"),
    "awq+gptq": ({"order": "dynamic"}, "GPTQ_TORCH"),  # act-order
    "awq": ({}, "AWQ_TORCH"),
}


@pytest.mark.parametrize("method", FORMS)
def test_gptqmodel_reads_ours(method: str, tmp_path: Path, offline: None) -> None:
    gptqmodel, (options, backend) = _gptqmodel(), FORMS[method]
    ours = _ours(method, tmp_path, **options)
    kind = gptqmodel.BACKEND[backend]
    loaded = gptqmodel.GPTQModel.load(str(tmp_path), backend=kind, device="cpu", dtype=torch.float16)
    if method == "awq":
        from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

        theirs = {
            name: dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, 32).T
            for name, module in loaded.model.named_modules()
            if hasattr(module, "qweight")
        }
    else:
        theirs = _dequantised(loaded)
    _agree(ours, theirs)
    with torch.no_grad():
        got, want = (m(input_ids=IDS[:2], use_cache=False).logits.float() for m in (loaded.model, ours))
    assert float((got - want).norm() / want.norm()) < 5e-3


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_gptqmodel_is_read(symmetric: bool, order: bool, form: str, tmp_path: Path, offline: None) -> None:
    gptqmodel = _gptqmodel()
    _save(_model(), tmp_path / "float")
    settings = gptqmodel.QuantizeConfig(bits=4, group_size=32, sym=symmetric, desc_act=order, format=form)
    made = gptqmodel.GPTQModel.load(str(tmp_path / "float"), settings, device="cpu", dtype=torch.float16)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in IDS]
    made.quantize(rows, batch_size=1)
    made.save(str(tmp_path / "made"))
    again = gptqmodel.GPTQModel.load(
        str(tmp_path / "made"), backend=gptqmodel.BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16
    )
    _agree(torch_pagedkv.from_pretrained(tmp_path / "made", dtype=torch.float16), _dequantised(again))


# ---- compressed-tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_compressed_tensors_both_ways(symmetric: bool, strategy: str, tmp_path: Path) -> None:
    """Packed by theirs, read and written again by ours, unpacked by theirs: the weights that theirs were of."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor as Packer
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    kind = {"group_size": 32, "actorder": "weight"} if strategy == "group" else {}
    args = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy=strategy, **kind)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    model = _model()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    torch.manual_seed(0)
    theirs, packed = {}, {}
    for name, module in linears.items():
        n, k = module.weight.shape
        groups = k // 32 if strategy == "group" else 1
        zeros = torch.zeros(n, groups) if symmetric else torch.randint(-8, 8, (n, groups))
        state = {
            "weight": module.weight.detach() * 0.3,
            "weight_scale": (torch.rand(n, groups) * 0.01 + 0.001).half(),
            "weight_zero_point": zeros.to(torch.int8),
        }
        tensors = Packer.compress(state, scheme)
        theirs[name] = Packer.decompress(dict(tensors), scheme)["weight"]
        packed |= {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items() if leaf != "weight"}
    config = {"targets": ["Linear"], "weights": args.model_dump(mode="json"), "format": "pack-quantized"}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": config}}
    _save(model, tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in linears}
    save_file(tensors | packed, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    model.config.quantization_config = settings | {"ignore": ["lm_head"]}
    model.config.save_pretrained(tmp_path / "packed")
    ours = torch_pagedkv.from_pretrained(tmp_path / "packed", dtype=torch.float16)
    _agree(ours, theirs)
    ours.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in packed.items())
