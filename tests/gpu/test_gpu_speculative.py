"""Second models that draft, on the GPU: tokens stay as they are, and a drafter that is the model is always right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from attention_inputs import Heads
from benchmarks.gpu.launcher import check
from inputs import BUILDERS
from test_gpu_deterministic import target
from tree_inputs import nodes_of_rows

from makeready.engine.llm import LLM, Output, SamplingParams, SchedulerOptions
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.checkpoint.paired import PairedCheckpoint
from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS

MODEL: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
HEAD = {
    **MODEL,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLMEagle3"],
    "num_hidden_layers": 1,
    "draft_vocab_size": 500,
}
EAGLE = {
    **{k: v for k, v in HEAD.items() if k != "draft_vocab_size"},
    "architectures": ["LlamaForCausalLMEagle"],
}
LATENT = {
    **{k: v for k, v in MODEL.items() if k not in ("head_dim", "num_key_value_heads")},
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": 2,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LIMITS: dict[str, Any] = {"max_rows": 16, "max_tokens": 256, "context_len": 256, "page_size": 64}
OPS = (
    "count_drafts",
    "next_draft",
    "pack_drafts",
    "place_before",
    "hidden_write",
    "hidden_read",
    "force_drafts",
    "plant_tree",
    "place_level",
    "grow_tree",
    "exclude",
    "take_parents",
    "pack_tree",
    "accept_tree",
    "order_results",
    "place_moves",
    "move_entries",
    "move_states",
)


@pytest.mark.parametrize("op", [*OPS, "spread_logits", "concatenate"])
def test_ops(op: str) -> None:
    registry.discover(target())
    for case in BUILDERS[op](op):
        on_gpu = {name: x.cuda() for name, x in case.operands.items() if x is not None}
        for kernel in registry.cuda_kernels(op):
            check(CONTRACTS[op], kernel.candidates, on_gpu, case.attrs)


def answers(llm: LLM) -> list[Output]:
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1024, (n,), generator=random).tolist() for n in (1, 5, 64, 65, 130, 150, 17)]
    sampling = [
        SamplingParams(
            temperature=float(i % 2), max_new_tokens=60, sampling_seed=i, ignore_eos=True, return_logprob=True
        )
        for i in range(len(prompts))
    ]
    return llm.generate(token_ids=prompts * 2, sampling=sampling * 2)


@pytest.mark.parametrize(
    ("method", "model", "second"),
    [
        ("draft", MODEL, MODEL),
        ("eagle", MODEL, EAGLE),
        ("eagle3", MODEL, HEAD),
        ("mtp", LATENT, None),
        ("draft", LATENT, MODEL),
    ],
    ids=["itself", "eagle", "eagle3", "mtp", "beside-latents"],
)
def test_tokens_are_those_without_drafts(method: str, model: Any, second: Any) -> None:
    checkpoint: Any = DummyCheckpoint(dict(model))
    options = {"target": target(), "deterministic": True, "kv_memory_gib": 1.0, **LIMITS}
    with LLM(checkpoint, **options) as llm:
        plain = answers(llm)
    if second is not None:
        checkpoint = PairedCheckpoint(checkpoint, DummyCheckpoint(dict(second)))
    asked = {"method": method, "num_draft_tokens": 3}
    always = SchedulerOptions(speculation="always")
    with LLM(checkpoint, speculative=asked, scheduler=always, **options) as llm:
        made = answers(llm)
    assert [o.token_ids for o in made] == [o.token_ids for o in plain]
    assert [o.logprobs for o in made] == [o.logprobs for o in plain]
    assert any("spec_verify_ct" in o.meta_info for o in made)
    if second is model:
        assert all(o.meta_info.get("spec_accept_rate", 1.0) == 1.0 for o in made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "most", "rows", "window"),
    [
        (Heads(32, 8, 128, 64), 13, ((13, 1000), (1, 64), (0, 0), (7, 3)), 0),
        (Heads(32, 8, 128, 16), 26, ((26, 3000),), 0),
        (Heads(64, 8, 64, 64), 20, ((20, 70), (3, 500)), 40),
        (Heads(8, 1, 128, 7), 40, ((40, 90), (17, 3)), 0),  # three launches
    ],
)
def test_attention_of_trees(
    heads: Heads, most: int, rows: tuple[tuple[int, int], ...], window: int, dtype: torch.dtype
) -> None:
    registry.discover(target())
    name = str(dtype).removeprefix("torch.")
    made = nodes_of_rows(0, heads, rows, most, name, name, window)
    attrs = {"heads": heads.heads, "kv_heads": heads.kv_heads, "head_dim": heads.size}
    attrs |= {"scale": heads.size**-0.5, "window": window}
    on_gpu = {key: x.cuda() for key, x in made.items()}
    for kernel in registry.cuda_kernels("tree_attention"):
        check(CONTRACTS["tree_attention"], kernel.candidates, on_gpu, attrs)


def agree(made: list[Output], plain: list[Output]) -> int:
    """How many answers are alike, of rows whose numbers may differ in their last bits: drafts come within others."""
    return sum(one.token_ids == other.token_ids for one, other in zip(made, plain, strict=True))


@pytest.mark.parametrize(
    ("method", "second"),
    [("draft", MODEL), ("eagle", EAGLE), ("eagle3", HEAD)],
    ids=["itself", "eagle", "eagle3"],
)
def test_trees(method: str, second: Any) -> None:
    """Steps of many tokens round otherwise than those of one, so that near ties of random weights may part."""
    options = {"target": target(), "kv_memory_gib": 1.0, **LIMITS}
    with LLM(DummyCheckpoint(dict(MODEL)), **options) as llm:
        plain = answers(llm)
    checkpoint: Any = PairedCheckpoint(DummyCheckpoint(dict(MODEL)), DummyCheckpoint(dict(second)))
    asked = {"method": method, "tree": [3, 2, 1]}
    with LLM(
        checkpoint, speculative=asked, scheduler=SchedulerOptions(speculation="always"), **options
    ) as llm:
        made = answers(llm)
        llm.engine.pools.check()
    assert all(o.error is None for o in made)
    assert agree(made, plain) >= len(made) * 3 // 4
    if second is MODEL:
        assert sum(o.meta_info["spec_accept_length"] for o in made) > 3.5 * len(made)
