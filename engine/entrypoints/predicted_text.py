"""Predictions as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from makeready.graphs.inspect.units import nbytes


def memory_lines(memory: Mapping[str, Any]) -> list[str]:
    """Of :meth:`makeready.engine.forecast.Forecast.memory`."""
    others = memory["other"] + memory["reserved"]
    of = f" of {nbytes(memory['device_bytes'])}" if memory["device_bytes"] else ""
    beside = f", {memory['kv_beside_pages']}" if memory["kv_beside_pages"] else ""
    return [
        f"memory: {nbytes(memory['total'])}{of}: weights {nbytes(memory['weights'])}, arena "
        f"{nbytes(memory['arena'])}, others {nbytes(others)}, KV {nbytes(memory['kv'])} for "
        f"{memory['kv_tokens']:,} tokens of pages{beside}"
    ]


def outcome_lines(load: Mapping[str, Any], name: str) -> list[str]:
    """Of :meth:`makeready.engine.forecast.Outcome.record`."""
    refused = f", {load['refused']:,} refused" if load["refused"] else ""
    first = load["ttft_milliseconds"]
    return [
        f"{name}: {load['requests']:,} requests{refused} in {load['seconds']:,.2f} s and {load['steps']:,} steps, "
        f"{load['output_throughput']:,.0f} output tokens/s, {load['total_throughput']:,.0f} together",
        f"  {load['prompt_tokens']:,} prompt tokens ({load['cached_tokens']:,} cached), "
        f"{load['output_tokens']:,} output tokens; first token p50 {first['p50']:,.1f} ms, p99 {first['p99']:,.1f}",
    ]
