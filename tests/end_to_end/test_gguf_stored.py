"""GGUF files multiplied as they are stored, against transformers' model of the numbers that their blocks stand for.

Activations are rounded to 8 bits in both; what is near the middle of two steps may become either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoint_files import LLAMA, state_dict, write_quantized
from gguf import GGMLQuantizationType as Types
from gguf import quants
from reference import Generation, Recorder, poison_every_step, prompt_of

from makeready.engine.llm import LLM

PLAN: dict[str, Any] = {"max_rows": 4, "max_tokens": 24, "page_size": 8, "quant": "stored"}
CONFIG = LLAMA | {"tie_word_embeddings": False}
KINDS = {
    "attn_q": Types.Q4_0,
    "attn_k": Types.Q4_0,
    "attn_v": Types.Q8_0,
    "attn_output": Types.Q4_1,
    "ffn_gate": Types.Q5_1,
    "ffn_up": Types.Q5_1,
    "ffn_down": Types.Q5_0,
    "token_embd": Types.Q5_0,
    "output": Types.Q8_0,
}
MODULES = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "output": "lm_head",
}
MODULES |= {
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
    "token_embd": "embed_tokens",
}


def weights() -> dict[str, torch.Tensor]:
    """Of a size that keeps activations in order through the layers."""
    return {
        name: x / 8 if x.dim() > 1 else 1 + x / 8
        for name, x in state_dict(CONFIG).items()
        if "inv" not in name
    }


def rounding(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    groups = inputs[0].unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return (((groups / scale).round().nan_to_num() * scale).flatten(-2),)


def oracle() -> Any:
    """transformers' model over dequantized weights, with the inputs of its projections rounded."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()
    made = weights()
    for end, kind in KINDS.items():
        for name in (n for n in made if n.endswith(f"{MODULES[end]}.weight")):
            made[name] = torch.from_numpy(quants.dequantize(quants.quantize(made[name].numpy(), kind), kind))
    model.load_state_dict(made)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounding)
    return model


def agree(model: Any, prompt: list[int], ours: Generation, tolerance: float) -> None:
    """Logits behind every token, after the tokens that were generated before it."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *ours.tokens]])).logits[0, len(prompt) - 1 : -1].numpy()
    for at, (mine, other) in enumerate(zip(ours.logits, logits, strict=True)):
        error = np.abs(mine - other).max() / np.abs(other).max()
        assert error <= tolerance, f"token {at}: logits differ by {error:.2e} of the largest"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quantized(tmp_path_factory.mktemp("stored") / "m.gguf", CONFIG, weights(), KINDS)


def test_logits_are_those_of_the_stored_numbers(path: Path) -> None:
    """Prompts alone, in chunks and beside others, with NaN in all that a step has not written itself."""
    model, llm = oracle(), LLM(path, **PLAN)
    assert any(launch.op == "linear_gguf" for launch in llm.plan.programs["decode"].launches)
    poison_every_step(llm)
    prompts = [prompt_of(n, 97) for n in (60, 1, 9, 24, 3)]
    for prompt, ours in zip(prompts, Recorder(llm).generate(prompts, 6), strict=True):
        agree(model, prompt, ours, tolerance=1e-2)


def test_in_a_deterministic_plan_batches_change_no_bit(path: Path) -> None:
    llm = LLM(path, **PLAN, deterministic=True)
    recorder = Recorder(llm)
    prompts = [prompt_of(n, 97) for n in (60, 1, 9, 24, 3, 17)]
    together = recorder.generate(prompts, 5)
    for prompt, beside in zip(prompts, together, strict=True):
        (alone,) = recorder.generate([prompt], 5)
        assert alone.tokens == beside.tokens
        np.testing.assert_array_equal(np.array(alone.logits), np.array(beside.logits))
