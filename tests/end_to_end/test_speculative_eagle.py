"""EAGLE-1 and 2 heads: drafts are those of the head over the whole sequence, in torch; tokens stay as they are."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from drafted import gated, known, norm, packed, paired, write_head
from safetensors.torch import load_file
from small_configs import QWEN3, VOCABULARY
from speculative_requests import LIMITS, assert_alike, requests, together
from transformers import LlamaConfig, LlamaForCausalLM

from makeready.engine.llm import LLM, SamplingParams, SchedulerOptions
from makeready.graphs.checkpoint.base import CheckpointWarning, open_checkpoint
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.checkpoint.paired import PairedCheckpoint
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.planner.compile import compile_plan
from makeready.kernels.sample import sample as sampling

HIDDEN, HEADS, KV_HEADS, WIDE = 48, 4, 2, 72
TARGET = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
HEAD: dict[str, Any] = {
    **{
        name: value for name, value in TARGET.items() if name != "rope_theta"
    },  # published ones may not say it
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "intermediate_size": WIDE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 48,  # shorter than the plan's: published heads say 2,048
    "torch_dtype": "float32",
}
ASKED = {"method": "eagle", "num_draft_tokens": 3}
Model = tuple[Path, LlamaForCausalLM]


def head_tensors(
    model: LlamaForCausalLM, *, bias: bool = True, qkv_bias: bool = False
) -> dict[str, torch.Tensor]:
    """Random tensors under the names that published checkpoints have, beside a copy of the model's embedding."""
    random = torch.Generator().manual_seed(3)
    rows = {"q": HIDDEN, "k": KV_HEADS * HIDDEN // HEADS, "v": KV_HEADS * HIDDEN // HEADS}
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (HIDDEN, 2 * HIDDEN),
        **{f"layers.0.self_attn.{n}_proj.weight": (count, HIDDEN) for n, count in rows.items()},
        "layers.0.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        **{f"layers.0.mlp.{n}_proj.weight": (WIDE, HIDDEN) for n in ("gate", "up")},
        "layers.0.mlp.down_proj.weight": (HIDDEN, WIDE),
    }
    shapes |= {"fc.bias": (HIDDEN,)} if bias else {}
    shapes |= {f"layers.0.self_attn.{n}_proj.bias": (count,) for n, count in rows.items()} if qkv_bias else {}
    made = {name: torch.randn(shape, generator=random) * 0.25 for name, shape in shapes.items()}
    made["layers.0.post_attention_layernorm.weight"] = 1 + 0.2 * torch.randn(HIDDEN, generator=random)
    return made | {"embed_tokens.weight": model.get_input_embeddings().weight.detach().clone()}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Model:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**TARGET, initializer_range=0.25)).eval()
    folder = tmp_path_factory.mktemp("target")
    model.save_pretrained(folder)
    return folder, model


def attention(x_TC: torch.Tensor, positions: torch.Tensor, w: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What published code computes: grouped heads, a bias where there is one, positions that are told."""
    at, tokens = "layers.0.self_attn.", len(x_TC)
    q, k, v = (
        torch.nn.functional.linear(x_TC, w[f"{at}{n}_proj.weight"], w.get(f"{at}{n}_proj.bias")).view(
            tokens, count, -1
        )
        for n, count in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
    )
    half = HIDDEN // HEADS // 2
    angle = positions[:, None] * 1e4 ** (-torch.arange(half) / half)
    cos, sin = (torch.cat((f(angle), f(angle)), -1)[:, None] for f in (torch.cos, torch.sin))
    q, k = (x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin for x in (q, k))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y[0].transpose(0, 1).reshape(tokens, -1) @ w[f"{at}o_proj.weight"].T


def layer(x_TC: torch.Tensor, positions: torch.Tensor, w: Mapping[str, torch.Tensor]) -> torch.Tensor:
    x_TC = x_TC + attention(x_TC, positions, w)  # without a norm before
    z_TC = norm(x_TC, w["layers.0.post_attention_layernorm.weight"])
    return x_TC + gated(z_TC, lambda n: w[f"layers.0.mlp.{n}.weight"])


@torch.no_grad()
def chain(
    model: LlamaForCausalLM, head: Mapping[str, torch.Tensor], ids: list[int], drafts: int
) -> tuple[list[int], torch.Tensor]:
    """What the head guesses behind ``ids``, and logits of each guess: its layer over the whole sequence for every
    draft, without a cache. As in ``topK_generate`` the first token is left out and positions begin at 0.
    """
    h = model.model(torch.tensor([ids[:-1]])).last_hidden_state[0]  # behind the last norm
    tokens, made, logits = ids[1:], [], []
    for _ in range(drafts):
        both = torch.cat((head["embed_tokens.weight"][tokens], h), -1)  # the embedding first
        x = torch.nn.functional.linear(both, head["fc.weight"], head.get("fc.bias"))
        y = layer(x, torch.arange(len(tokens)), head)
        logits.append(model.lm_head(y[-1]))
        made.append(int(logits[-1].argmax()))
        h, tokens = torch.cat((h, y[-1:])), [*tokens, made[-1]]
    return made, torch.stack(logits)


@contextmanager
def drawn() -> Iterator[list[torch.Tensor]]:
    """Logits of the first row of all that is sampled by executables that are loaded within."""
    op: Any = sampling.sample
    reference, seen = op.reference, list[torch.Tensor]()

    def heard(logits: torch.Tensor, *operands: Any, **attrs: Any) -> torch.Tensor:
        seen.append(logits[0].clone())
        return reference(logits, *operands, **attrs)

    object.__setattr__(op, "reference", heard)
    try:
        yield seen
    finally:
        object.__setattr__(op, "reference", reference)


@pytest.mark.parametrize(
    ("said", "stored", "prefix"),
    [
        ({}, {"bias": True}, ""),
        ({"bias": False}, {"bias": False}, ""),
        ({"qkv_bias": True}, {"bias": True, "qkv_bias": True}, ""),
        (
            {"architectures": ["LlamaForCausalLMEagle"], "bias": False},
            {"bias": True},
            "",
        ),  # the file is right
        ({"architectures": ["EagleLlamaForCausalLM"]}, {"bias": False}, "model."),
    ],
    ids=["llama2", "llama3", "qwen2", "sglang", "vllm"],
)
def test_drafts_are_those_of_the_head_over_the_whole_sequence(
    target: Model, tmp_path: Path, said: Any, stored: Any, prefix: str
) -> None:
    folder, model = target
    weights = head_tensors(model, **stored)
    written = {prefix + name: tensor for name, tensor in weights.items()}
    head = write_head(
        tmp_path / "head", HEAD | said, written | {"lm_head.weight": model.lm_head.weight.detach().clone()}
    )
    assert load_file(head / "model.safetensors").keys() > written.keys()
    both = paired(folder, head)
    options = SchedulerOptions(speculation="always", chunked_prefill_size=7)
    prompts = [[3], [5, 7, 9, 11], [(i * i) % VOCABULARY for i in range(29)]]
    with packed() as seen, warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)  # copies of what is the model's are no news
        plan = compile_plan(both, **LIMITS, page_size=4, speculative=ASKED)
        llm = LLM(both, plan, scheduler=options)
        for prompt in (*prompts, prompts[-1]):  # the last finds its prefix
            seen.clear()
            params = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)
            (output,) = llm.generate(token_ids=[prompt], sampling=params)
            sequence = [*prompt, *output.token_ids]
            assert len(seen) > 5
            for place, drafts in seen:
                assert drafts == chain(model, weights, known(sequence, place), len(drafts))[0]
    assert output.meta_info["cached_tokens"] == 28
    wanted = model.generate(
        torch.tensor([prompts[-1]]), max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    assert sequence == wanted[0].tolist()


def test_logits_of_drafts_are_those_of_the_head(target: Model, tmp_path: Path) -> None:
    folder, model = target
    weights = head_tensors(model, qkv_bias=True)
    both = paired(folder, write_head(tmp_path / "head", HEAD, weights))
    plan = compile_plan(both, **LIMITS, page_size=4, speculative=ASKED)
    prompt = [(i * i) % VOCABULARY for i in range(29)]
    with packed() as seen, drawn() as logits:
        llm = LLM(both, plan, scheduler=SchedulerOptions(speculation="always", chunked_prefill_size=7))
        params = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)
        (output,) = llm.generate(token_ids=[prompt], sampling=params)
    steps = [(place, drafts) for place, drafts in seen if len(drafts) == 3]
    assert len(steps) > 5
    for place, drafts in steps:
        guessed, wanted = chain(model, weights, known([*prompt, *output.token_ids], place), 3)
        assert guessed == drafts
        runs = (torch.stack(logits[i : i + 3]) for i in range(len(logits) - 2))
        off = [float((run - wanted).abs().max() / wanted.abs().max()) for run in runs]
        assert sum(error < 1e-4 for error in off) == 1  # of one step


def test_files_of_torch_save_answer_as_safetensors(target: Model, tmp_path: Path) -> None:
    """Model and head as most heads are published: one plan, the same drafts, the same tokens."""
    folder, model = target
    weights = head_tensors(model, qkv_bias=True)
    head = write_head(tmp_path / "head", HEAD, weights, pickled=True)
    config = json.loads((folder / "config.json").read_text())
    pickled = write_head(tmp_path / "model", config, dict(model.state_dict()), pickled=True)
    stored = paired(folder, write_head(tmp_path / "stored", HEAD, weights))
    plan = compile_plan(stored, **LIMITS, page_size=4, speculative=ASKED)
    prompt, made = [(i * i) % VOCABULARY for i in range(29)], []
    for both in (stored, paired(pickled, head)):
        with packed() as seen:
            llm = LLM(both, plan, scheduler=SchedulerOptions(speculation="always"))
            params = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)
            (output,) = llm.generate(token_ids=[prompt], sampling=params)
        made.append((output.token_ids, list(seen)))
    assert made[0] == made[1]
    assert len(made[0][1]) > 5


@pytest.mark.parametrize(
    "options",
    [{}, {"deterministic": True, "kv_dtype": "int8_per_token_head"}, {"deterministic": True, "quant": "fp8"}],
    ids=["plain", "int8-cache", "fp8"],
)
def test_tokens_are_those_without_drafts(target: Model, tmp_path: Path, options: dict[str, Any]) -> None:
    folder, model = target
    alone = LLM(open_checkpoint(folder), compile_plan(folder, **LIMITS, page_size=4, **options))
    expected = [alone.generate(token_ids=[p], sampling=s)[0] for p, s in requests()]
    both = paired(folder, write_head(tmp_path / "head", HEAD, head_tensors(model)))
    llm = LLM(both, compile_plan(both, **LIMITS, page_size=4, speculative=ASKED, **options))
    found = Counter[tuple[int, int]]()
    for pages in (None, 49):
        made, accepted = together(
            llm, pages, chunked_prefill_size=9, new_token_ratio=0.0, min_new_token_ratio=0.0
        )
        assert_alike(made, expected, exact="deterministic" in options)
        found += accepted
    assert {right for right, _ in found} == {0, 1, 2, 3}


def test_a_head_without_weights_drafts() -> None:
    """``dummy`` lists no tensors: its config says what there is."""
    dummy = DummyCheckpoint({**HEAD, **WIDTH, "architectures": ["LlamaForCausalLMEagle"], "qkv_bias": True})
    both = PairedCheckpoint(DummyCheckpoint(dict(QWEN3)), dummy)
    plan = compile_plan(both, **LIMITS, page_size=4, speculative=ASKED)
    llm = LLM(both, plan, scheduler=SchedulerOptions(speculation="always"))
    params = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
    (output,) = llm.generate(token_ids=[[1, 2, 3]], sampling=params)
    assert len(output.token_ids) == 12
    assert output.meta_info["spec_draft_token_num"] > 0
    assert {"fc.bias", "layers.0.self_attn.k_proj.bias"} < dummy.tensors.keys()
    assert dummy.tensors.keys().isdisjoint({"embed_tokens.weight", "lm_head.weight"})
    assert not any("input_layernorm" in name for name in dummy.tensors)


WIDTH = {"hidden_size": 40, "num_attention_heads": 4}  # of QWEN3
EXPORTED = ["LlamaForCausalLMEagle"]
REFUSED: list[tuple[dict[str, Any], dict[str, tuple[int, ...]], str]] = [
    (
        {},
        {},
        r"LlamaForCausalLM with fc.weight\), speculative.checkpoint has LlamaForCausalLM; choose such a head, or",
    ),
    (
        {"architectures": ["LlamaForCausalLMEagle3"]},
        {"fc.weight": (40, 120)},
        "has LlamaForCausalLMEagle3; choose such",
    ),
    ({"num_hidden_layers": 2}, {"fc.weight": (40, 80)}, "says num_hidden_layers=2; choose another head"),
    (
        {"architectures": EXPORTED, "draft_vocab_size": 50},
        {},
        "says draft_vocab_size=50; choose another head",
    ),
    ({"architectures": EXPORTED, "vocab_size": 7}, {}, "same vocabulary: it has 7 tokens, the model 96"),
    (
        {"architectures": EXPORTED, "hidden_size": 64},
        {},
        "head .* is 64 wide, and the hidden states .* are 40 wide",
    ),
    (
        {"architectures": EXPORTED},
        {"fc.weight": (40, 80), "layers.0.input_layernorm.weight": (40,)},
        "has layers.0.input_layernorm.weight; choose another head",
    ),
    (
        {"architectures": EXPORTED},
        {"fc.weight": (40, 80), "norm.weight": (40,)},
        "has norm.weight; choose another",
    ),
]


@pytest.mark.parametrize(("said", "shapes", "message"), REFUSED)
def test_what_cannot_be_is_refused(said: dict[str, Any], shapes: Any, message: str) -> None:
    head = DummyCheckpoint({**HEAD, **WIDTH, **said}, shapes)
    with pytest.raises(PlanError, match=message):
        compile_plan(PairedCheckpoint(DummyCheckpoint(dict(QWEN3)), head), **LIMITS, speculative=ASKED)
