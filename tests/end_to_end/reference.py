"""Tiny transformers models on disk, their greedy generations, and the logits that ours gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from makeready.engine.llm import LLM
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import TokenSequence
from makeready.graphs.executable.cpu.executable import CpuExecutable
from makeready.graphs.plan.spec import Bucket

FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen2_moe": (transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "deepseek_v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM),
    "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
    "qwen3_next": (transformers.Qwen3NextConfig, transformers.Qwen3NextForCausalLM),
    "qwen3_5": (transformers.Qwen3_5TextConfig, transformers.Qwen3_5ForCausalLM),
    "qwen3_5_moe": (transformers.Qwen3_5MoeTextConfig, transformers.Qwen3_5MoeForCausalLM),
    "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
}


def make_model(folder: Path, family: str, *, seed: int = 0, **config: Any) -> Any:
    """A random fp32 model, saved to ``folder``; weights large enough that greedy tokens vary."""
    make_config, make = FAMILIES[family]
    torch.manual_seed(seed)
    defaults = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 131,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    model = make(make_config(**(defaults | config))).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # biases start at 0 and norms at 1, which would hide mistakes
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
        elif name.endswith("_proj_bias"):  # of stacked experts; far enough that gates are clamped
            torch.nn.init.normal_(parameter, std=3.0 if "gate_up" in name else 0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.1)
    model.save_pretrained(folder)
    return model


@dataclass
class Generation:
    """Greedy tokens of one prompt and the logits ``[token, vocabulary]`` that each was chosen from."""

    tokens: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)


def expected(model: Any, prompt: Sequence[int], count: int) -> Generation:
    """What transformers generates from ``prompt`` alone."""
    with torch.inference_mode():
        made = model.generate(
            torch.tensor([list(prompt)]),
            max_new_tokens=count,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = [step[0].float().numpy() for step in made.logits]
    return Generation(made.sequences[0, len(prompt) :].tolist(), logits)


class Recorder:
    """Runs sequences on an LLM and keeps the logits behind every sampled token."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.made: dict[int, Generation] = {}
        executable = llm.engine.executable
        assert isinstance(executable, CpuExecutable)
        self._executable = executable
        self._launch = executable.launch
        executable.launch = self._record  # type: ignore[method-assign]

    def generate(self, prompts: Sequence[Sequence[int]], count: int, **sampling: Any) -> list[Generation]:
        """Greedy generations of all prompts, submitted together."""
        params = SamplingParams(temperature=0, max_new_tokens=count, ignore_eos=True, **sampling)
        sequences = [self.llm.replies(list(p), params)[0].sequence for p in prompts]
        for sequence in sequences:
            self.made[id(sequence)] = Generation()
            self.llm.engine.submit(sequence)
        while self.llm.engine.busy:
            self.llm.engine.step()
        for sequence in sequences:
            self.made[id(sequence)].tokens = list(sequence.output)
        return [self.made[id(sequence)] for sequence in sequences]

    def _record(self, bucket: Bucket, step: Mapping[str, np.ndarray], **cut: Any) -> Any:
        done = self._launch(bucket, step, **cut)
        logits = self._executable.operand(bucket, "sample", "logits")
        by_slot: dict[int, TokenSequence] = {s.slot: s for s in self.llm.engine.scheduler.running}
        for row, count in enumerate(step["query_len"].tolist()):
            sequence = by_slot.get(int(step["row_slot"][row]))
            if count and sequence is not None and step["sample_slot"][row] == sequence.slot:
                self.made[id(sequence)].logits.append(logits[row])
        return done


def compare(ours: Generation, theirs: Generation, tolerance: float = 2e-4) -> None:
    """Assert equal tokens, and logits within ``tolerance`` of the largest."""
    assert len(ours.logits) == len(theirs.logits) == len(theirs.tokens)
    for at, (mine, other) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        error = np.abs(mine - other).max() / np.abs(other).max()
        assert error <= tolerance, f"token {at}: logits differ by {error:.2e} of the largest"
    assert ours.tokens == theirs.tokens


def prompt_of(length: int, vocabulary: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return np.random.default_rng([seed, length]).integers(0, vocabulary, length).tolist()


def poison_every_step(llm: LLM) -> None:
    """Before each step, NaN in every byte that the step has not written itself."""
    executable: Any = llm.engine.executable
    launch = executable.launch

    def poisoned(bucket: Bucket, step: Mapping[str, np.ndarray], **cut: Any) -> Any:
        executable.poison()
        return launch(bucket, step, **cut)

    executable.launch = poisoned
