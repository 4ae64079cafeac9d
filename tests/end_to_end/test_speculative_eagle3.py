"""EAGLE-3 heads: drafts are those of the head over the whole sequence, in plain torch; tokens stay as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from drafted import causal, gated, known, norm, packed, paired, write_head
from safetensors.torch import load_file
from small_configs import QWEN3, VOCABULARY
from speculative_requests import LIMITS, assert_alike, requests, together
from transformers import LlamaConfig, LlamaForCausalLM

from makeready.engine.llm import LLM, SamplingParams, SchedulerOptions
from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.checkpoint.paired import PairedCheckpoint
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.planner.compile import compile_plan

HIDDEN, DRAFTED = 48, 40
TARGET = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
HEAD: dict[str, Any] = {
    **TARGET,
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "intermediate_size": 72,
    "num_key_value_heads": 4,
    "max_position_embeddings": 48,  # shorter than the plan's: published heads say 2,048
    "draft_vocab_size": DRAFTED,
    "torch_dtype": "float32",
}


def head_tensors(config: Mapping[str, Any], *, embedding: bool = False) -> dict[str, torch.Tensor]:
    """Random tensors under the names that checkpoints have."""
    random = torch.Generator().manual_seed(3)
    drafted, wide = config["draft_vocab_size"], config["intermediate_size"]
    shapes = {
        "fc.weight": (HIDDEN, 3 * HIDDEN),
        **{f"midlayer.self_attn.{n}_proj.weight": (HIDDEN, 2 * HIDDEN) for n in "qkv"},
        "midlayer.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        **{f"midlayer.mlp.{n}_proj.weight": (wide, HIDDEN) for n in ("gate", "up")},
        "midlayer.mlp.down_proj.weight": (HIDDEN, wide),
        "lm_head.weight": (drafted, HIDDEN),
    }
    shapes |= {"embed_tokens.weight": (VOCABULARY, HIDDEN)} if embedding else {}
    made = {name: torch.randn(shape, generator=random) * 0.25 for name, shape in shapes.items()}
    for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        made[f"midlayer.{name}.weight"] = 1 + 0.2 * torch.randn(HIDDEN, generator=random)
    made["norm.weight"] = 1 + 0.2 * torch.randn(HIDDEN, generator=random)
    likely = torch.tensor([3, 8, 21])  # those of the requests are among them
    others = [t for t in torch.randperm(VOCABULARY, generator=random).tolist() if t not in likely]
    tokens = torch.cat((likely, torch.tensor(others[: drafted - len(likely)]))).sort().values
    made["d2t"] = tokens - torch.arange(drafted)
    made["t2d"] = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, tokens, True)
    return made


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**TARGET, initializer_range=0.25)).eval()
    folder = tmp_path_factory.mktemp("target")
    model.save_pretrained(folder)
    return folder, model


@torch.no_grad()
def chain(
    model: LlamaForCausalLM, head: Mapping[str, torch.Tensor], ids: list[int], drafts: int, places: list[int]
) -> list[int]:
    """What the head guesses behind ``ids``: its layer over the whole sequence for every draft, without a cache."""
    states = model(torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states
    h = torch.cat([states[place][0] for place in places], -1) @ head["fc.weight"].T
    table = head.get("embed_tokens.weight", model.get_input_embeddings().weight)
    tokens, made = ids[1:], []
    for _ in range(drafts):
        e = norm(table[tokens], head["midlayer.input_layernorm.weight"])
        both = torch.cat((e, norm(h, head["midlayer.hidden_norm.weight"])), -1)
        y = h + causal(both, lambda n: head[f"midlayer.self_attn.{n}.weight"], heads=4, kv_heads=4, theta=1e4)
        z = norm(y, head["midlayer.post_attention_layernorm.weight"])
        y = y + gated(z, lambda n: head[f"midlayer.mlp.{n}.weight"])
        logits = norm(y[-1], head["norm.weight"]) @ head["lm_head.weight"].T
        best = int(logits.argmax())
        made.append(best + int(head["d2t"][best]))
        h, tokens = torch.cat((h, y[-1:])), [*tokens, made[-1]]
    return made


@pytest.mark.parametrize(
    ("said", "places", "embedding"),
    [
        ({}, [2, 3, 4], False),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 3, 5]}}, [1, 4, 6], True),
        ({"eagle_aux_hidden_state_layer_ids": [0, 3, 6]}, [0, 3, 6], False),
    ],
    ids=["paper", "sglang", "vllm"],
)
def test_drafts_are_those_of_the_head_over_the_whole_sequence(
    target: tuple[Path, LlamaForCausalLM], tmp_path: Path, said: Any, places: list[int], embedding: bool
) -> None:
    folder, model = target
    head = write_head(tmp_path / "head", HEAD | said, head_tensors(HEAD, embedding=embedding))
    both, weights = paired(folder, head), load_file(head / "model.safetensors")
    plan = compile_plan(both, **LIMITS, page_size=4, speculative={"method": "eagle3", "num_draft_tokens": 3})
    options = SchedulerOptions(speculation="always", chunked_prefill_size=7)
    prompts = [[3], [5, 7, 9, 11], [(i * i) % VOCABULARY for i in range(29)]]
    with packed() as seen:
        llm = LLM(both, plan, scheduler=options)
        for prompt in (*prompts, prompts[-1]):  # the last finds its prefix
            seen.clear()
            params = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)
            (output,) = llm.generate(token_ids=[prompt], sampling=params)
            sequence = [*prompt, *output.token_ids]
            assert len(seen) > 5
            for place, drafts in seen:
                assert drafts == chain(model, weights, known(sequence, place), len(drafts), places)
    assert output.meta_info["cached_tokens"] == 28
    wanted = model.generate(
        torch.tensor([prompts[-1]]), max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    assert sequence == wanted[0].tolist()


@pytest.mark.parametrize("options", [{}, {"deterministic": True, "kv_dtype": "int8_per_token_head"}])
def test_tokens_are_those_without_drafts(
    target: tuple[Path, LlamaForCausalLM], tmp_path: Path, options: dict[str, Any]
) -> None:
    folder, _ = target
    head = write_head(tmp_path / "head", HEAD, head_tensors(HEAD))
    alone = LLM(open_checkpoint(folder), compile_plan(folder, **LIMITS, page_size=4, **options))
    expected = [alone.generate(token_ids=[p], sampling=s)[0] for p, s in requests()]
    both = paired(folder, head)
    asked = {"method": "eagle3", "num_draft_tokens": 3}
    llm = LLM(both, compile_plan(both, **LIMITS, page_size=4, speculative=asked, **options))
    found = Counter[tuple[int, int]]()
    for pages in (None, 49):
        made, accepted = together(
            llm, pages, chunked_prefill_size=9, new_token_ratio=0.0, min_new_token_ratio=0.0
        )
        assert_alike(made, expected, exact="deterministic" in options)
        found += accepted
    assert {right for right, _ in found} == {0, 1, 2, 3}


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"architectures": ["LlamaForCausalLM"]},
        "has LlamaForCausalLM; choose such a head, or spec",
    ),
    ({"num_hidden_layers": 2}, r"says num_hidden_layers=2; choose another head"),
    ({"norm_before_residual": True}, r"says norm_before_residual=True; choose another head"),
    ({"vocab_size": 7}, r"same vocabulary: it has 7 tokens, the model 96"),
    (
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 9]}},
        r"before the layers \[1, 2, 10\], and the model has 2",
    ),
    ({"hidden_size": 64}, "64 wide and has no embed_tokens, and those of the model are 40 wide"),
]


@pytest.mark.parametrize(("said", "message"), REFUSED)
def test_what_cannot_be_is_refused(said: dict[str, Any], message: str) -> None:
    ids = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
    head = DummyCheckpoint({**HEAD, "hidden_size": 40, "num_attention_heads": 4, **ids, **said})
    with pytest.raises(PlanError, match=message):
        compile_plan(
            PairedCheckpoint(DummyCheckpoint(dict(QWEN3)), head), **LIMITS, speculative={"method": "eagle3"}
        )
