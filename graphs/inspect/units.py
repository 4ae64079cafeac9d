"""Figures as people read them: three significant digits and a unit.

>>> nbytes(3 * 2**20), seconds(0.0021), count(134_515_008)
('3.00 MiB', '2.10 ms', '135 M')
"""

from __future__ import annotations

from collections.abc import Sequence

from makeready.kernels.spec import DTYPE_BYTES

_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u"}


def digits(value: float) -> str:
    """Three significant digits, never an exponent: 1.23, 12.3, 123, 12,345."""
    size = abs(value)
    if size >= 99.95 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"


def _scaled(value: float, base: float, units: Sequence[str]) -> str:
    at = 0
    while abs(value) >= base * 0.9995 and at < len(units) - 1:
        value, at = value / base, at + 1
    return f"{value:,.0f} {units[at]}".rstrip() if at == 0 else f"{digits(value)} {units[at]}"


def nbytes(value: float) -> str:
    """Bytes in binary units."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def count(value: float) -> str:
    """A number of things: 1,234 up to ten thousand, then k, M, G."""
    return f"{value:,.0f}" if abs(value) < 10_000 else _scaled(value, 1000, ("", "k", "M", "G", "T"))


def flops(value: float) -> str:
    """Floating-point operations."""
    return _scaled(value, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def rate(value: float, unit: str) -> str:
    """``unit`` a second, in decimal units: ``20.0 GB/s``."""
    return _scaled(value, 1000, tuple(f"{prefix}{unit}/s" for prefix in ("", "k", "M", "G", "T", "P")))


def seconds(value: float) -> str:
    """Seconds, down to nanoseconds."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 0.9995:
            return f"{digits(value * factor)} {unit}"
    return f"{digits(value * 1e9)} ns"


def percent(share: float | None) -> str:
    """A share of one as a percentage; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.1f} %"


def dtype(name: str) -> str:
    """``float32`` as ``f32``, ``bfloat16`` as ``bf16``."""
    if name not in DTYPE_BYTES:
        return name
    stem = name[: next(at for at, letter in enumerate(name) if letter.isdigit())]
    return _SHORT[stem] + name[len(stem) :] if stem in _SHORT else name


def ranges(numbers: Sequence[int]) -> str:
    """Ascending whole numbers, runs shortened: ``0, 2–5, 9``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in runs)


def span(low: int, high: int) -> str:
    """``3`` or ``3–8``."""
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"
