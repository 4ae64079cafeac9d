"""Random valid inputs of the ops on logits; see inputs.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from case import Case, Random


def sample(op: str) -> Iterator[Case]:
    for rows, vocabulary, context in ((3, 17, 9), (1, 1, 2), (4, 1031, 12)):
        for sampled in (False, True):
            random = Random(rows)
            slots = rows + 2
            full = torch.ones(slots)
            operands = {
                "logits": random.normal(rows, vocabulary, scale=3),
                "row_slot": random.permutation(slots - 1)[:rows].int(),
                "context_len": random.integers(context, rows).clamp_min(1),
                "history": random.integers(vocabulary, slots, context),
                "prompt_len": torch.ones(slots, dtype=torch.int32),
                "temperature": full * (0.8 if sampled else 0.0),
                "top_k": random.integers(6, slots),
                "top_p": full * 0.9,
                "min_p": full * 0.02,
                "presence_penalty": full * 0.3,
                "frequency_penalty": full * 0.2,
                "repetition_penalty": full * 1.2,
                "seed": torch.arange(slots, dtype=torch.int64),
                "min_new_tokens": random.integers(3, slots),
                "stop_ids": random.integers(vocabulary + 1, slots, 2) - 1,
                "bias_ids": torch.full((slots, 3), -1, dtype=torch.int32),
                "bias_values": random.normal(slots, 3),
                "masked": random.integers(2, slots),
                "allowed": random.integers(2**31 - 1, slots, -(-vocabulary // 32)),
            }
            operands["allowed"][:, 0] |= 1  # a token is left
            operands["bias_ids"][:, 0] = random.integers(vocabulary, slots)
            if rows > 2:
                operands["row_slot"][-1] = slots - 1  # a padding row
            yield Case(op, f"{rows}x{vocabulary}-{sampled}", operands)
            branches = {"path": random.integers(vocabulary, rows, 5)}
            branches["path_len"] = torch.minimum(random.integers(6, rows), operands["context_len"] - 1)
            yield Case(op, f"{rows}x{vocabulary}-{sampled}-branches", operands | branches)


def token_logprobs(op: str) -> Iterator[Case]:
    for rows, vocabulary, most in ((3, 17, 4), (1, 1, 2), (4, 1031, 20), (2, 3, 8)):
        random = Random(rows)
        operands = {
            "logits": random.normal(rows, vocabulary, scale=4),
            "tokens": random.integers(vocabulary, rows),
            "row_slot": random.permutation(rows).int(),
            "top_logprobs": random.integers(most + 3, rows + 1) - 1,
        }
        operands["top_logprobs"][-1] = -1
        yield Case(op, f"{rows}x{vocabulary}-{most}", operands, {"max_top": most})
