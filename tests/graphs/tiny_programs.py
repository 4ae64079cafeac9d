"""Tiny decoders as programs, and an interpreter of programs that knows nothing but the contracts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from makeready.graphs.checkpoint.base import Checkpoint, open_checkpoint
from makeready.graphs.plan.constants import GENERATORS
from makeready.graphs.plan.recipe import Operand, Param, whole
from makeready.graphs.plan.spec import DECODE, EXTEND, Bucket
from makeready.graphs.planner.compile import Request, Traced, trace_checkpoint
from makeready.graphs.planner.ir import KV, STEP, Call, Program, Value
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.spec import TensorSpec

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "dtype": "float32",
}
QWEN2 = LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
QWEN3 = LLAMA | {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 1,
    "num_key_value_heads": 3,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
}
CONFIGS = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}
LIMITS: dict[str, Any] = {"max_rows": 4, "max_tokens": 16, "page_size": 4, "weight_dtype": "float32"}


def dummy(config: Mapping[str, Any] = LLAMA) -> Checkpoint:
    return open_checkpoint("dummy", config=dict(config))


def traced(config: Mapping[str, Any] = LLAMA, **request: Any) -> Traced:
    return trace_checkpoint(dummy(config), Request(**(LIMITS | request)))


def ops(program: Program) -> list[str]:
    """Names of the program's ops in order."""
    return [call.op for call in program.calls]


class Weights:
    """Random checkpoint tensors by name, made when first asked for, and parameters put together of them."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.sources: dict[str, torch.Tensor] = {}

    def source(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in self.sources:
            generator = np.random.default_rng([self.seed, *name.encode()])
            mean = 1.0 if "norm" in name else 0.0
            self.sources[name] = torch.from_numpy(generator.normal(mean, 0.3, shape).astype(np.float32))
        return self.sources[name]

    def param(self, param: Param) -> torch.Tensor:
        """The parameter, by its recipe."""
        if param.generated:
            return torch.from_numpy(GENERATORS[param.generated.function](**param.generated.arguments))
        if param.derived is None:
            return self._assembled(Operand(param.spec, param.pieces))
        ((name, operand),) = param.derived.by.operands.items()
        (call,) = param.derived.by.calls
        op = CONTRACTS[call.op]
        made = op.reference(self._assembled(operand), **call.attrs)
        assert (call.operands, name) == ({"x": "x"}, "x")
        return made[[o.name for o in op.outputs].index(param.derived.result)].view(param.spec.at({}))

    def _assembled(self, operand: Operand) -> torch.Tensor:
        """Whole rows, which is all that these models have."""
        made = torch.full(operand.spec.at({}), float("nan"))
        for piece in operand.pieces:
            (start, stop), at = piece.box[0], piece.at[0]
            made[at : at + stop - start] = self.source(piece.source, (stop, *made.shape[1:]))[start:stop]
        return made


@dataclass
class Machine:
    """Slots, caches and weights; runs programs step by step through the contracts' references."""

    traced: Traced
    weights: Weights
    pages: int = 24

    def __post_init__(self) -> None:
        limits = self.traced.limits
        assert limits.pages_per_row >= 5
        self.memory = {
            f.name: torch.full(f.spec.at({}), f.default, dtype=getattr(torch, f.spec.dtype))
            for f in self.traced.slots
        }
        self.memory["top_logprobs"][:-1] = 2
        for slot in range(limits.max_rows):  # a slot owns five pages, over and over
            pages = torch.arange(limits.pages_per_row, dtype=torch.int32).remainder(5) + 1 + 5 * slot
            self.memory["pages"][slot] = pages
        for part in self.traced.kv.parts:
            self.memory[part.name] = torch.full(part.spec.at({"P": self.pages}), float("nan"))

    def run(self, program: Program, step: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Results of one step by name, and ``logits``."""
        values: dict[str, Any] = {**self.memory, **step}
        values |= {name: self.weights.param(param) for name, param in program.params.items()}
        for call in program.calls:
            arguments = [values[call.operands[o.name]] if o.name in call.operands else None
                         for o in call.contract.inputs]  # fmt: skip
            made = call.contract.reference(*arguments, **call.attrs)
            made = made if isinstance(made, tuple) else (made,)
            for output, value in zip(call.contract.outputs, made, strict=False):
                values[call.results[output.name]] = value
        (sampler,) = (c for c in program.calls if c.op == "sample")
        made = {name: values[value] for name, value in program.results.items()}
        return made | {"logits": values[sampler.operands["logits"]]}


def steps(traced: Traced) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """An extend step, one that goes on with a chunk of row 0 and starts a row, then two decode steps.

    Every bucket has a padding row and padding tokens. The decode steps take the tokens just sampled.
    """
    limits = traced.limits
    tokens = np.random.default_rng(0).integers(0, 61, (limits.slots, limits.context_len))
    return [
        (EXTEND, _step(traced, Bucket(EXTEND, 4, 14), tokens, [(0, 0, 5), (2, 0, 1), (1, 0, 4)])),
        (EXTEND, _step(traced, Bucket(EXTEND, 4, 8), tokens, [(0, 5, 4), (3, 0, 3)])),
        (DECODE, _step(traced, Bucket(DECODE, 4, 4), None, [(3, 3, 1), (0, 9, 1), (1, 4, 1)])),
        (DECODE, _step(traced, Bucket(DECODE, 4, 4), None, [(0, 10, 1), (3, 4, 1)])),
    ]


def _step(
    traced: Traced, bucket: Bucket, tokens: np.ndarray | None, rows: list[tuple[int, int, int]]
) -> dict[str, torch.Tensor]:
    """Staged fields of a batch of (slot, tokens computed before, new tokens).

    Without ``tokens`` rows run what was sampled, behind as many tokens as their slots have.
    """
    step = {
        f.name: torch.full(f.spec.at(bucket.sizes), f.default, dtype=getattr(torch, f.spec.dtype))
        for f in traced.steps[bucket.phase].staged
    }
    at = 0
    for row, (slot, done, count) in enumerate(rows):
        span = slice(at, at + count)
        step["token_ids"][span] = (
            torch.from_numpy(tokens[slot, done : done + count]) if tokens is not None else -1
        )
        step["row_start"][row] = done if tokens is not None else -1
        step["query_start"][row], step["query_len"][row] = at, count
        step["row_slot"][row] = step["sample_slot"][row] = slot
        at += count
    return step


def handmade(
    calls: list[Call], *, step: Mapping[str, TensorSpec], params: Mapping[str, TensorSpec], results: list[str]
) -> Program:
    """A program of the given calls; its parameters read whole tensors of their own names."""
    recipes = {
        name: Param(name, spec, pieces=(whole(f"source.{name}", spec.at({})),))
        for name, spec in params.items()
    }
    values = {name: Value(name, spec, KV if name.endswith("_cache") else STEP) for name, spec in step.items()}
    return Program(EXTEND, values, recipes, (), {name: name for name in results}).with_calls(calls)
