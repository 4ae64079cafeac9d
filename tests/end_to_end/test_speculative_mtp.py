"""DeepSeek-V3's further layer: drafts are those of the layer over the whole sequence; tokens stay as they are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from drafted import known, norm, packed
from safetensors.torch import load_file, save_file
from small_configs import QWEN3, VOCABULARY
from speculative_requests import LIMITS, assert_alike, requests, together
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from makeready.engine.llm import LLM, SamplingParams, SchedulerOptions
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.planner.compile import compile_plan

HIDDEN = 40
CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 60,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 28,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "pad_token_id": None,
}
Models = tuple[Path, DeepseekV3ForCausalLM, DeepseekV3ForCausalLM, dict[str, torch.Tensor]]


def tensors_of(model: DeepseekV3ForCausalLM, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A folder; the model; a model of one layer that is the further one; and what only that layer has."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("model")
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(**CONFIG, num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=1)
    ).eval()
    further = DeepseekV3ForCausalLM(
        DeepseekV3Config(**CONFIG, num_hidden_layers=1, first_k_dense_replace=0)
    ).eval()
    tensors = tensors_of(model, folder)
    layer = tensors_of(further, tmp_path_factory.mktemp("layer"))
    own = {
        "enorm.weight": 1 + 0.2 * torch.randn(HIDDEN),
        "hnorm.weight": 1 + 0.2 * torch.randn(HIDDEN),
        "eh_proj.weight": 0.2 * torch.randn(HIDDEN, 2 * HIDDEN),
    }
    at = "model.layers.2."
    tensors |= {n.replace("model.layers.0.", at): t for n, t in layer.items() if "layers.0." in n}
    tensors |= {at + name: t for name, t in own.items()}
    tensors[f"{at}shared_head.norm.weight"] = layer["model.norm.weight"]
    tensors[f"{at}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    tensors[f"{at}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    return folder, model, further, own


@torch.no_grad()
def chain(models: Models, ids: list[int], drafts: int) -> list[int]:
    """What the layer guesses behind ``ids``, over the whole sequence for every draft, without a cache."""
    _, model, further, own = models
    h = model.model(torch.tensor([ids[:-1]])).last_hidden_state[0]  # behind the last norm
    table, tokens, made = model.get_input_embeddings().weight, ids[1:], []
    for _ in range(drafts):
        both = torch.cat((norm(table[tokens], own["enorm.weight"]), norm(h, own["hnorm.weight"])), -1)
        y = further.model(inputs_embeds=(both @ own["eh_proj.weight"].T)[None]).last_hidden_state[0]
        made.append(int((y[-1] @ model.lm_head.weight.T).argmax()))
        h, tokens = torch.cat((h, y[-1:])), [*tokens, made[-1]]
    return made


def test_drafts_are_those_of_the_layer_over_the_whole_sequence(models: Models) -> None:
    folder, model, *_ = models
    plan = compile_plan(folder, **LIMITS, page_size=4, speculative={"method": "mtp", "num_draft_tokens": 3})
    options = SchedulerOptions(speculation="always", chunked_prefill_size=7)
    prompts = [[3], [5, 7, 9, 11], [(i * i) % VOCABULARY for i in range(29)]]
    with packed() as seen:
        llm = LLM(folder, plan, scheduler=options)
        for prompt in (*prompts, prompts[-1]):  # the last finds its prefix
            seen.clear()
            params = SamplingParams(temperature=0, max_new_tokens=20, ignore_eos=True)
            (output,) = llm.generate(token_ids=[prompt], sampling=params)
            sequence = [*prompt, *output.token_ids]
            assert len(seen) > 5
            for place, drafts in seen:
                assert drafts == chain(models, known(sequence, place), len(drafts))
    assert output.meta_info["cached_tokens"] == 28
    wanted = model.generate(
        torch.tensor([prompts[-1]]), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert sequence == wanted[0].tolist()


@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"quant": "fp8"}], ids=str)
def test_tokens_are_those_without_drafts(models: Models, options: dict[str, Any]) -> None:
    folder = models[0]
    alone = LLM(folder, compile_plan(folder, **LIMITS, page_size=4, **options))
    expected = [alone.generate(token_ids=[p], sampling=s)[0] for p, s in requests()]
    asked = {"method": "mtp", "num_draft_tokens": 2}
    llm = LLM(folder, compile_plan(folder, **LIMITS, page_size=4, speculative=asked, **options))
    found = Counter[tuple[int, int]]()
    for pages in (None, 49):
        made, accepted = together(
            llm, pages, chunked_prefill_size=9, new_token_ratio=0.0, min_new_token_ratio=0.0
        )
        assert_alike(made, expected, exact="deterministic" in options)
        found += accepted
    assert {right for right, _ in found} == {0, 1, 2}


def test_other_models_have_no_such_layer() -> None:
    with pytest.raises(
        PlanError, match="num_nextn_predict_layers, and the model is Qwen3ForCausalLM with none"
    ):
        compile_plan(DummyCheckpoint(dict(QWEN3)), **LIMITS, speculative={"method": "mtp"})
