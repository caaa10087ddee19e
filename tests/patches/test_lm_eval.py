"""lm-eval's model ``pagedkv``: the same numbers as lm-eval's own ``hf``, on tiny random models."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

import torch_pagedkv
from torch_pagedkv.evals import models, trace

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from torch_pagedkv.evals import lm

#: log-probabilities of tiny models are sums of a few numbers of the size 10
CLOSE: dict[str, Any] = {"rel": 2e-6, "abs": 2e-5}

FAMILIES = ("llama", "mistral", "gemma2", "qwen3", "gpt_neox", "gpt2", "bloom", "mpt", "falcon_alibi", "mixtral")


def characters() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the printable ASCII characters, 96 with the end of a sequence."""
    alphabet = ["\n", *map(chr, range(32, 127))]
    table = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(token_models.WordLevel(table, unk_token="\n"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="~", eos_token="~", pad_token="~")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return characters()


def stock(model: Any, tokenizer: Any, **options: Any) -> HFLM:
    return HFLM(model, tokenizer=tokenizer, **({"batch_size": 4, "max_length": 96} | options))


def paged(model: Any, tokenizer: Any, **options: Any) -> lm.PagedLM:
    return lm.PagedLM(model, tokenizer=tokenizer, **({"batch_size": 4, "max_length": 96} | options))


def requests(seed: int = 0) -> list[lm.Request]:
    """Contexts with one and with several continuations, of one token and of more, the same one twice, two that differ
    in their last token only, contexts of one token, with a common beginning, and too long ones."""
    draw = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [draw.randrange(2, tiny.VOCABULARY) for _ in range(count)]

    examples = ids(40)
    made: list[tuple[list[int], list[int]]] = []
    for length in (1, 5, 16, 17, 33):
        context = ids(length)
        made += [(context, ids(n)) for n in (1, 1, 3, 9)]
        made.append((context, made[-1][1]))
        made.append((context, [*made[-1][1][:-1], 7]))
        made.append((ids(length), ids(4)))
    made += [(examples + ids(n), ids(2)) for n in (3, 8)]
    made += [(context, ids(n)) for context in (ids(100), ids(95)) for n in (2, 30)]
    made.append((ids(1), ids(96)))
    draw.shuffle(made)
    return [(("", str(i)), context, continuation) for i, (context, continuation) in enumerate(made)]


def agree(ours: Sequence[tuple[float, bool]], theirs: Sequence[tuple[float, bool]]) -> None:
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], **CLOSE)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def nothing_held(model: Any) -> None:
    stats = model.paged_cache.stats()
    assert (stats["used"], stats["sequences"]) == (0, 0)


# ---- log-likelihoods -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [True, False], ids=["shared", "alone"])
def test_loglikelihoods_are_stocks(family: str, share: bool, tokenizer: Any) -> None:
    model = tiny.make(family)
    asked = requests()
    theirs = stock(model, tokenizer)._loglikelihood_tokens(asked, disable_tqdm=True)
    ours = paged(model, tokenizer, share_contexts=share)
    with trace.AttentionTrace() as calls:
        got = ours._loglikelihood_tokens(asked, disable_tqdm=True)
    agree(got, theirs)
    assert calls.paged and not calls.dense
    nothing_held(model)
    # and once more, now that prefixes of the same model could be found
    agree(ours._loglikelihood_tokens(asked, disable_tqdm=True), theirs)


def test_greedy_continuations_are_told(tokenizer: Any) -> None:
    """What greedy decoding gives is greedy, in one piece and token by token; another last token is not."""
    model = tiny.make("llama")
    prompt = tiny.batch((9,))
    tokens = tiny.generate(model, prompt, max_new_tokens=6)[0].tolist()
    context = prompt["input_ids"][0].tolist()
    wrong = [*tokens[:-1], (tokens[-1] + 1) % tiny.VOCABULARY]
    asked = [(("", ""), context, c) for c in (tokens, tokens[:1], wrong)] + [
        (("", ""), context + tokens[:3], wrong[3:])
    ]
    got = paged(model, tokenizer)._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [greedy for _, greedy in got] == [True, True, False, False]


@pytest.mark.parametrize("most", [1, 500, 2000])
def test_logits_come_in_pieces(most: int, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few may be made at once; 2000 are five columns of four rows."""
    model = tiny.make("llama")
    asked = requests()
    theirs = stock(model, tokenizer)._loglikelihood_tokens(asked, disable_tqdm=True)
    ours = paged(model, tokenizer)
    largest = 0

    def look(module: Any, args: Any, out: Any) -> None:
        nonlocal largest
        largest = max(largest, out.logits.numel())

    model.register_forward_hook(look)
    monkeypatch.setattr(lm, "MAX_LOGITS", most)
    agree(ours._loglikelihood_tokens(asked, disable_tqdm=True), theirs)
    assert largest <= max(most, 4 * tiny.VOCABULARY)


def test_a_model_without_logits_to_keep(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make("llama")
    asked = requests()
    theirs = stock(model, tokenizer)._loglikelihood_tokens(asked, disable_tqdm=True)
    ours = paged(model, tokenizer)
    ours._takes_kept = False
    agree(ours._loglikelihood_tokens(asked, disable_tqdm=True), theirs)
    monkeypatch.setattr(lm, "MAX_LOGITS", 2000)
    agree(ours._loglikelihood_tokens(asked, disable_tqdm=True), theirs)


def test_keys_that_depend_on_the_length(tokenizer: Any) -> None:
    """Dynamic rotary embeddings: nothing is shared, each request is fed whole."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = tiny.make("llama", rope_parameters=rope, max_position_embeddings=24)
    asked = requests()
    theirs = stock(model, tokenizer, batch_size=1)._loglikelihood_tokens(asked, disable_tqdm=True)
    ours = paged(model, tokenizer, batch_size=1, long_prompts="allow")
    assert not ours._has_prefixes
    agree(ours._loglikelihood_tokens(asked, disable_tqdm=True), theirs)


def test_contexts_are_computed_once(tokenizer: Any) -> None:
    """Four continuations of a long context: its tokens are fed once; examples in front of the next are found."""
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(2, tiny.VOCABULARY, (count,), generator=draw).tolist()

    examples = ids(64)
    asked = [(("", ""), context, ids(3)) for context in (examples + ids(8), examples + ids(8)) for _ in range(4)]
    fed = {}
    for share in (True, False):
        model = tiny.make("llama")
        ours = paged(model, tokenizer, share_contexts=share, batch_size=1)
        tokens: list[int] = []
        hook = model.register_forward_pre_hook(lambda module, args, tokens=tokens: tokens.append(args[0].numel()))
        ours._loglikelihood_tokens(asked, disable_tqdm=True)
        hook.remove()
        fed[share] = sum(tokens)
        assert model.paged_cache.stats()["hit_tokens"] >= 64
    assert fed[True] == 72 + 8 + 8 * 2
    assert fed[False] == 74 + 7 * 10


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_what_is_found_is_scored_all_the_same(dtype: str | None, tokenizer: Any) -> None:
    """Blocks found that reach into a continuation: its logits are asked for, so it is fed again."""
    context, continuation = [5, 6, 7], torch.arange(2, 72).tolist()
    asked: list[lm.Request] = [(("", ""), context, c) for c in (continuation, continuation, continuation[:40] + [9, 9])]
    model = tiny.make("llama")
    theirs = paged(model, tokenizer, prefix_caching=False, kv_cache_dtype=dtype)._loglikelihood_tokens(asked)
    torch_pagedkv.unpatch(model)
    ours = paged(model, tokenizer, share_contexts=False, batch_size=1, kv_cache_dtype=dtype)
    agree(ours._loglikelihood_tokens(asked), theirs)
    assert model.paged_cache.stats()["hit_tokens"] >= 64 + 32


def test_other_weights_are_noticed(tokenizer: Any) -> None:
    model = tiny.make("llama")
    ours = paged(model, tokenizer)
    asked = requests()
    before = ours._loglikelihood_tokens(asked, disable_tqdm=True)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(0.5)
    after = ours._loglikelihood_tokens(asked, disable_tqdm=True)
    torch_pagedkv.unpatch(model)
    agree(after, stock(model, tokenizer)._loglikelihood_tokens(asked, disable_tqdm=True))
    assert after != before


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_quantised_cache_is_what_is_measured(dtype: str, tokenizer: Any) -> None:
    """Its error shows, shared or not, and is small."""
    model = tiny.make("llama")
    asked = requests()
    exact = paged(model, tokenizer)._loglikelihood_tokens(asked, disable_tqdm=True)
    torch_pagedkv.unpatch(model)
    ours = paged(model, tokenizer, kv_cache_dtype=dtype)
    for share in (True, False):
        ours.share_contexts = share
        got = ours._loglikelihood_tokens(asked, disable_tqdm=True)
        errors = [abs(a - b) / max(1.0, abs(b)) for (a, _), (b, _) in zip(got, exact)]
        assert 1e-3 < max(errors) < 0.5
    assert model.paged_cache.stats()["dtype"] == dtype


def test_batches_that_do_not_fit_are_halved(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.make("llama")
    asked = requests()
    theirs = stock(model, tokenizer)._loglikelihood_tokens(asked, disable_tqdm=True)
    ours = paged(model, tokenizer, batch_size=8, num_blocks=14, block_size=8)
    agree(ours._loglikelihood_tokens(asked, disable_tqdm=True), theirs)
    assert "halved" in caplog.text
    nothing_held(model)
    torch_pagedkv.unpatch(model)
    ours = paged(model, tokenizer, num_blocks=4, block_size=8)
    with pytest.raises(torch_pagedkv.kv.manager.CacheFullError, match="num_blocks"):
        ours._loglikelihood_tokens(asked, disable_tqdm=True)
    nothing_held(model)


def test_an_exception_leaves_nothing_behind(tokenizer: Any) -> None:
    model = tiny.make("llama")
    ours = paged(model, tokenizer)
    asked = requests()
    theirs = ours._loglikelihood_tokens(asked, disable_tqdm=True)
    counter = itertools.count()

    def fail(module: Any, args: Any, out: Any) -> None:
        if next(counter) == 3:
            raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        ours._loglikelihood_tokens(asked, disable_tqdm=True)
    hook.remove()
    nothing_held(model)
    agree(ours._loglikelihood_tokens(asked, disable_tqdm=True), theirs)


@pytest.mark.parametrize(("context", "continuation"), [([], [3]), ([3], []), ([3], [4] * 97)])
def test_requests_that_cannot_be_answered(context: list[int], continuation: list[int], tokenizer: Any) -> None:
    ours = paged(tiny.make("llama"), tokenizer)
    with pytest.raises(models.UserError, match=r"request 1: .*max_length"):
        ours._loglikelihood_tokens([(("", ""), [3], [4]), (("", ""), context, continuation)], disable_tqdm=True)


# ---- what lm-eval calls ----------------------------------------------------------------------------------------------

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 4


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]


def test_every_kind_of_request(tokenizer: Any) -> None:
    """Text to text: log-likelihoods (an empty context too), rolling ones longer than the window, generation."""
    model = tiny.make("llama", eos_token_id=tokenizer.eos_token_id)
    pairs = instances("loglikelihood", ("a cat ", "sat"), ("a cat", " ate it"), ("", "begin"), ("a cat", " sat"))
    rolling = instances("loglikelihood_rolling", (TEXT,), ("short",))
    options: dict[str, Any] = {"until": ["e", "\n\n"], "max_gen_toks": 20}
    until = instances("generate_until", (TEXT[:70], options), (TEXT[:50], options), (TEXT[:69], options))
    answers = []
    for make in (stock, paged):
        made = make(model, tokenizer, batch_size=2)
        answers.append(
            (
                made.loglikelihood(pairs, disable_tqdm=True),
                made.loglikelihood_rolling(rolling, disable_tqdm=True),
                made.generate_until(until, disable_tqdm=True),
            )
        )
    (pairs_stock, rolling_stock, until_stock), (pairs_paged, rolling_paged, until_paged) = answers
    agree(pairs_paged, pairs_stock)
    assert rolling_paged == pytest.approx(rolling_stock, **CLOSE)
    assert until_paged == until_stock and any(until_paged)
    assert model.paged_cache.stats()["hit_tokens"] >= 48  # the shortest prompt of generate_until, in a batch of its own
    nothing_held(model)


def test_auto_batches_need_no_trial(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make("llama")
    asked = requests()
    theirs = stock(model, tokenizer)._loglikelihood_tokens(asked, disable_tqdm=True)
    ours = paged(model, tokenizer, batch_size="auto")
    monkeypatch.setattr(ours, "_model_call", None)  # what lm-eval tries with
    agree(ours._loglikelihood_tokens(asked, disable_tqdm=True), theirs)
    assert ours.loglikelihood_rolling(instances("loglikelihood_rolling", (TEXT,)), disable_tqdm=True)
    assert ours._detect_batch_size() == lm.CPU_ROWS
    assert ours._detect_batch_size(asked, 0) == lm.CPU_ROWS


def test_model_arguments(tokenizer: Any, tmp_path: Path) -> None:
    """Loaded by name, with all of PagedConfig's fields; wrong ones are named before anything is loaded."""
    tiny.make("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    made = get_model("pagedkv").create_from_arg_string(
        f"pretrained={tmp_path},kv_cache_dtype=int8,block_size=8,fuse_mlp=False,max_length=64", {"batch_size": 2}
    )
    assert isinstance(made, lm.PagedLM) and made.batch_size == 2 and made.max_length == 64
    config = made.model.paged_cache.config
    assert (config.kv_cache_dtype, config.block_size, config.fuse_mlp) == ("int8", 8, False)
    for wrong in ("kv_cache_dtype=int7", "block_size=12"):
        with pytest.raises(models.UserError, match=wrong.split("=")[0]):
            get_model("pagedkv").create_from_arg_string(f"pretrained=/no/such/model,{wrong}")


def test_a_patched_model_keeps_its_options(tokenizer: Any) -> None:
    model = torch_pagedkv.patch(tiny.make("llama"), block_size=32)
    assert paged(model, tokenizer).model.paged_cache.block_size == 32
    with pytest.raises(models.UserError, match="block_size: the model is patched already"):
        paged(model, tokenizer, block_size=8)


def test_without_paged_attention(tokenizer: Any) -> None:
    """Only the fusions: lm-eval's own forward pass runs on them."""
    model = tiny.make("llama")
    asked = requests()
    theirs = stock(model, tokenizer)._loglikelihood_tokens(asked, disable_tqdm=True)
    ours = paged(model, tokenizer, attention=False, batch_size=4)
    agree(ours._loglikelihood_tokens(asked, disable_tqdm=True), theirs)


def test_registering_twice_is_harmless() -> None:
    lm.register()
    assert get_model("pagedkv") is lm.PagedLM


def test_copies_share_nothing(tokenizer: Any) -> None:
    """A copied model answers for itself."""
    model = torch_pagedkv.patch(tiny.make("llama"))
    twin = copy.deepcopy(model)
    asked = requests()
    agree(
        paged(twin, tokenizer)._loglikelihood_tokens(asked, disable_tqdm=True),
        paged(model, tokenizer)._loglikelihood_tokens(asked, disable_tqdm=True),
    )


def test_calibrated_weights_take_its_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "".join(random.Random(0).choices("abcdefgh ", k=1500))
    model = paged(tiny.make("llama"), tokenizer, weights="gptq", group_size=32, calibration=[text])
    assert torch_pagedkv.report(model.model).replaced["int4_linear"] == 14
    assert len(model._loglikelihood_tokens(requests())) == len(requests())
