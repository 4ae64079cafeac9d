"""What a field of a request may hold, by type: one checker a kind of value, for Python, rows and command lines.

Every checker takes the field's name and a value and gives the value in its plain form: a Python ``int``,
``float``, ``bool``, ``str`` or tuple of them. NumPy and torch scalars and arrays become Python's; ``2.0`` is the
whole number 2, as tables write it. A boolean is no number, and no number or text is a boolean.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from makeready.engine.errors import RequestError

Checker = Callable[[str, Any], Any]

MOST = 2**63 - 1  # of a whole number that has no other limit
SHOWN = 80  # characters of a value that an error repeats

# What other programs call fields of ours; of these every user of theirs writes one sooner or later.
MEANT = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_output_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
    "random_seed": "sampling_seed",
    "logprobs": "return_logprob",
    "top_logprobs": "top_logprobs_num",
    "prompt_logprobs": "logprob_start_len",
    "echo": "logprob_start_len",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
    "num_return_sequences": "n",
    "best_of": "n",
    "do_sample": "temperature",
    "include_stop_str_in_output": "no_stop_trim",
    "input_ids": "token_ids",
    "prompt_token_ids": "token_ids",
    "text": "prompt",
    "input": "prompt",
    "conversation": "messages",
    "conversations": "messages",
    "model": "checkpoint",
    "model_path": "checkpoint",
    "max_model_len": "plan.context_len",
    "context_length": "plan.context_len",
    "max_num_seqs": "plan.max_rows",
    "batch_size": "plan.max_rows",
    "max_num_batched_tokens": "plan.max_tokens",
    "dtype": "plan.weight_dtype",
    "kv_cache_dtype": "kv.dtype",
    "gpu_memory_utilization": "kv.memory_gib",
    "mamba_ssm_dtype": "kv.state_dtype",
    "mamba_ssm_cache_dtype": "kv.state_dtype",
    "max_mamba_cache_size": "kv.state_snapshots",
    "mamba_full_memory_ratio": "kv.state_snapshots",
    "quantization": "quant",
    "device": "target",
    "enable_prefix_caching": "scheduler.prefix_cache",
    "max_running_requests": "scheduler.max_running_requests",
}


def meant(name: str, known: Collection[str], cutoff: float = 0.75) -> str | None:
    """The field of ``known`` that somebody who wrote ``name`` was perhaps after.

    By another program's name for it, then as a whole, then by what follows the last dot; ``cutoff``, up to 1,
    says how alike two names have to be.
    """
    by_end = {field.rpartition(".")[2]: field for field in known}
    other = MEANT.get(name.rpartition(".")[2])
    if other is not None and (other in known or other in by_end):
        return other if other in known else by_end[other]
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    near = near or [by_end[end] for end in difflib.get_close_matches(name, list(by_end), n=1, cutoff=cutoff)]
    return near[0] if near else None


def shown(value: Any) -> str:
    """A value as an error repeats it: its beginning, and whatever it is, without fail."""
    try:
        text = repr(value)
    except Exception:  # such as a number of more digits than Python prints
        text = f"<{type(value).__name__}>"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def plain(value: Any) -> Any:
    """Scalars and arrays of NumPy and torch as Python's own; all others as they are."""
    convert = getattr(value, "tolist", None)
    return convert() if callable(convert) and hasattr(value, "dtype") else value


def boolean(name: str, value: Any) -> bool:
    """True or false, and nothing that merely counts as one of them."""
    value = plain(value)
    if not isinstance(value, bool):
        raise RequestError(f"{name}={shown(value)} must be true or false")
    return value


def number(low: float, high: float) -> Checker:
    """A number from ``low`` to ``high``."""

    def check(name: str, value: Any) -> float:
        return _ranged(name, _number(name, value), low, high)

    return check


def whole(low: int, high: int = MOST) -> Checker:
    """A whole number from ``low`` to ``high``; ``2.0`` is one."""

    def check(name: str, value: Any) -> int:
        found = _number(name, value)
        if isinstance(found, float) and not found.is_integer() and math.isfinite(found):
            raise RequestError(f"{name}={shown(value)} must be a whole number")
        return int(_ranged(name, found, low, high))

    return check


def optional(check: Checker) -> Checker:
    """None, or what ``check`` takes."""
    return lambda name, value: None if value is None else check(name, value)


def text(name: str, value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise RequestError(f"{name}={shown(value)} must be a string")
    return value


def filled(name: str, value: Any) -> str:
    """A string that is not empty."""
    if not text(name, value):
        raise RequestError(f"{name} is empty; leave it out")
    return value


def schema(name: str, value: Any) -> Mapping[str, Any]:
    """A JSON schema: an object, or its text; true is the schema of all values, ``{}``."""
    value = _read(name, value)
    return _object(name, {} if value is True else value, "a JSON schema: an object, or its text")


def json_object(name: str, value: Any) -> Mapping[str, Any]:
    """An object of JSON, or its text."""
    return _object(name, _read(name, value), "an object, or its text")


def _read(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name}={shown(value)} is no JSON: {error}; correct it") from None


def _object(name: str, value: Any, kind: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RequestError(f"{name}={shown(value)} must be {kind}")
    try:
        return json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name}={shown(value)} is no JSON: {error}; correct it") from None


def texts(most: int, longest: int) -> Checker:
    """A non-empty string or up to ``most`` of them, of up to ``longest`` characters each; None for none."""

    def check(name: str, value: Any) -> tuple[str, ...]:
        value = plain(value)
        values = (value,) if isinstance(value, str) else () if value is None else value
        if not isinstance(values, Sequence) or isinstance(values, bytes | bytearray):
            raise RequestError(f"{name}={shown(value)} must be a non-empty string or a list of them")
        if len(values) > most:
            raise RequestError(f"{name} has {len(values)} entries, at most {most} are looked for; give fewer")
        for item in values:
            if not isinstance(item, str) or not item:
                raise RequestError(
                    f"{name} has {shown(item)}; it must be a non-empty string or a list of them"
                )
            if len(item) > longest:
                raise RequestError(
                    f"{name} has a text of {len(item)} characters; at most {longest} are looked for"
                )
        return tuple(values)

    return check


def token_id(name: str, value: Any) -> int:
    """A token id; JSON objects have theirs as text, in plain decimal digits."""
    value = plain(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and re.fullmatch(r"0|-?[1-9]\d{0,9}", value, re.ASCII):
        # In this form alone: "299" and "0299" would be two entries for one token.
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} has {shown(value)}, which is no token id")
    return value


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """A list of token ids; None for none."""
    values = () if value is None else plain(value)
    if isinstance(values, str | bytes | bytearray) or not isinstance(values, Sequence):
        raise RequestError(f"{name}={shown(value)} must be a list of token ids")
    return tuple(token_id(name, item) for item in values)


def biases(most: float) -> Checker:
    """Token id → number from ``-most`` to ``most``; None for none."""

    def check(name: str, value: Any) -> dict[int, float]:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise RequestError(f"{name}={shown(value)} must be an object of token ids and numbers")
        made: dict[int, float] = {}
        for key, entry in value.items():
            token, bias = token_id(name, key), plain(entry)
            if token in made:
                raise RequestError(f"{name} names token id {token} twice; give it once")
            if isinstance(bias, bool) or not isinstance(bias, int | float) or not abs(bias) <= most:
                raise RequestError(f"{name}={shown(entry)} must be a number from {-most:g} to {most:g}")
            made[token] = bias
        return made

    return check


def _number(name: str, value: Any) -> int | float:
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:  # NaN
        raise RequestError(f"{name}={shown(value)} must be a number")
    return value


def _ranged(name: str, value: int | float, low: float, high: float) -> int | float:
    if not low <= value <= high:
        bounds = [f"{bound}" if isinstance(bound, int) else f"{bound:g}" for bound in (low, high)]
        wanted = f"at least {bounds[0]}" if high == MOST else f"from {bounds[0]} to {bounds[1]}"
        raise RequestError(f"{name}={shown(value)} is out of range; it must be {wanted}")
    return value
