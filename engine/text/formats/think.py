"""Reasoning between markers: ``<think>`` of Qwen3, DeepSeek R1 and most others, ``[THINK]`` of Mistral's models."""

from __future__ import annotations

from makeready.engine.text.formats.base import reasoning_format

reasoning_format("think", "<think>", "</think>", (("<think>",), ("</think>",)))
reasoning_format("mistral", "[THINK]", "[/THINK]", (("[THINK]",),))
