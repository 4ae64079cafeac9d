"""Drafts as a plan's steps packed them, beside the sequence that they were guessed for; heads beside a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.checkpoint.paired import Beside, PairedCheckpoint
from makeready.kernels.step import draft_chain

Packed = list[tuple[int, list[int]]]  # place of a row's own token, and its drafts


@contextmanager
def packed() -> Iterator[Packed]:
    """All drafts of the steps of executables that are loaded within; of plans whose rows are not told apart."""
    op: Any = draft_chain.pack_drafts
    reference, seen = op.reference, Packed()

    def heard(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = reference(*operands)
        ids, starts, counts, _, context = (x.tolist() for x in made)
        seen.extend(
            (context[first] - 1, ids[first + 1 : first + count])
            for first, count in zip(starts, counts, strict=True)
            if count > 1
        )
        return made

    object.__setattr__(op, "reference", heard)
    try:
        yield seen
    finally:
        object.__setattr__(op, "reference", reference)


def causal(x_TC: torch.Tensor, w: Any, *, heads: int, kv_heads: int, theta: float) -> torch.Tensor:
    """Grouped-query attention with rotary positions over a whole sequence; ``w`` gives projections by name."""
    tokens = len(x_TC)
    q, k, v = (x_TC @ w(f"{name}_proj").T for name in "qkv")
    q, k, v = (x.view(tokens, n, -1).transpose(0, 1) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    half = q.shape[-1] // 2
    angle = torch.arange(tokens)[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    turn = lambda x: x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin  # noqa: E731
    q, k = turn(q), turn(k)
    k, v = (x.repeat_interleave(heads // kv_heads, 0) for x in (k, v))
    score = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    score = score.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
    return (score.softmax(-1) @ v).transpose(0, 1).reshape(tokens, -1) @ w("o_proj").T


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def gated(x: torch.Tensor, w: Any) -> torch.Tensor:
    return (torch.nn.functional.silu(x @ w("gate_proj").T) * (x @ w("up_proj").T)) @ w("down_proj").T


def known(sequence: Sequence[int], place: int) -> list[int]:
    """The tokens up to the one at ``place``, which drafts follow."""
    return list(sequence[: place + 1])


def write_head(
    folder: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor], *, pickled: bool = False
) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def paired(target: Path, head: Path) -> PairedCheckpoint:
    made = Beside(str(head)).open(open_checkpoint(target))
    assert isinstance(made, PairedCheckpoint)
    return made
