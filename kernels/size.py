"""Sizes of axes, computed from the axes that a step declares. Imports no tensor library.

A dimension (:data:`Dim`) is an ``int``, the name of an axis, or a :class:`Size` over one axis:

>>> rows = parse("T*8+3")  # the rows of a table with 8 entries a token and 3 of its own
>>> str(cdiv(rows, 64)), value(cdiv(rows, 64), {"T": 16})
('cdiv(T*8+3,64)', 3)

A size never falls while its axis grows: it can be multiplied by what is positive, shifted, divided by what is
positive and rounded up or down, and nothing else. So what holds a buffer in the largest bucket holds it in all,
and one arena offset serves them.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np


class SizeError(ValueError):
    """An expression that no size can be, or an axis that nobody gave a size."""


@dataclass(frozen=True)
class Size:
    """``ceil((axis * times + plus) / over)``.

    Attributes:
        axis: name of the axis, or a size in its place (``cdiv(T,64)*64``).
        times, over: at least 1, so that a longer axis never gives a smaller size.

    Brought to lowest terms when it is made, so that sizes that are always equal compare equal.

    Raises:
        SizeError: ``times`` or ``over`` is not positive.
    """

    axis: str | Size
    times: int = 1
    plus: int = 0
    over: int = 1

    def __post_init__(self) -> None:
        axis, times, plus, over = self.axis, self.times, self.plus, self.over
        if isinstance(axis, str) and not axis.isidentifier():
            raise SizeError(f"{axis!r} is no name of an axis")
        if times < 1 or over < 1:
            raise SizeError(f"({axis}*{times}+{plus})/{over} does not grow with its axis")
        while True:
            # Multiples of `common` stay multiples of it when the rest is rounded up to one.
            common = math.gcd(times, over)
            times, plus, over = times // common, -(-plus // common), over // common
            if not isinstance(axis, Size) or (axis.over > 1 and times > 1):
                break
            if axis.over == 1:
                times, plus = times * axis.times, times * axis.plus + plus
            else:  # ceil((ceil(a / b) + c) / d) = ceil((a + b*c) / (b*d))
                times, plus, over = axis.times, axis.plus + plus * axis.over, axis.over * over
            axis = axis.axis
        if isinstance(axis, Size):  # whole steps that the inner shift makes belong to the outer one
            steps = -(-axis.plus // axis.over)
            plus += times * steps
            axis = Size(axis.axis, axis.times, axis.plus - steps * axis.over, axis.over) if steps else axis
        for name, part in (("axis", axis), ("times", times), ("plus", plus), ("over", over)):
            object.__setattr__(self, name, part)

    @property
    def root(self) -> str:
        """The axis that the size depends on."""
        return self.axis if isinstance(self.axis, str) else self.axis.root

    @property
    def simple(self) -> Dim:
        """The axis itself where the size is no more than that."""
        return self.axis if (self.times, self.plus, self.over) == (1, 0, 1) else self

    def renamed(self, axes: Mapping[str, str]) -> Size:
        """The same size of other axes."""
        axis = axes.get(self.axis, self.axis) if isinstance(self.axis, str) else self.axis.renamed(axes)
        return Size(axis, self.times, self.plus, self.over)

    def of(self, axis: Any) -> Any:
        """The size where the axis has the length ``axis``, a whole number or an array of them."""
        inner = axis if isinstance(self.axis, str) else self.axis.of(axis)
        return -(-(inner * self.times + self.plus) // self.over)

    def __int__(self) -> int:
        raise SizeError(f"{self} is not the same in all buckets, and a number is needed")

    def __add__(self, other: Size | int) -> Size:
        if isinstance(other, int):
            return Size(self, 1, other)
        if self.axis == other.axis and self.over == other.over == 1:
            return Size(self.axis, self.times + other.times, self.plus + other.plus)
        raise SizeError(f"{self} + {other}: only multiples of one axis can be added")

    __radd__ = __add__

    def __sub__(self, other: Size | int) -> Size | int:
        if isinstance(other, int):
            return Size(self, 1, -other)
        if self.axis == other.axis and self.over == other.over == 1 and self.times >= other.times:
            times, plus = self.times - other.times, self.plus - other.plus
            return Size(self.axis, times, plus) if times else plus
        raise SizeError(f"{self} - {other} would fall while an axis grows")

    def __mul__(self, other: int) -> Size | int:
        if not isinstance(other, int) or other < 0:
            raise SizeError(f"{self} * {other}: sizes are multiplied by whole numbers that are not negative")
        return Size(self, other) if other else 0

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> Size:
        return Size(self, 1, 1 - _divisor(self, other), other)

    def ceil(self, other: int) -> Size:
        """``ceil(self / other)``."""
        return Size(self, 1, 0, _divisor(self, other))

    def __str__(self) -> str:
        product = f"{self.axis}*{self.times}" if self.times > 1 else str(self.axis)
        total = f"{product}{self.plus:+d}" if self.plus else product
        return f"cdiv({total},{self.over})" if self.over > 1 else total


Dim: TypeAlias = int | str | Size


def _divisor(size: Size, other: Any) -> int:
    if not isinstance(other, int) or other < 1:
        raise SizeError(f"{size} / {other}: sizes are divided by whole numbers above 0")
    return other


def axis_of(dim: Dim) -> str | None:
    """The axis that ``dim`` depends on; None where it is a number."""
    return None if isinstance(dim, int) else dim if isinstance(dim, str) else dim.root


def value(dim: Dim, sizes: Mapping[str, Any]) -> Any:
    """``dim`` where axes have the lengths ``sizes``.

    Raises:
        SizeError: its axis has none.
    """
    axis = axis_of(dim)
    if axis is None:
        return dim
    if axis not in sizes:
        raise SizeError(f"the size {dim} depends on axis {axis}, which has no length here")
    return dim.of(sizes[axis]) if isinstance(dim, Size) else sizes[axis]


def renamed(dim: Dim, axes: Mapping[str, str]) -> Dim:
    """``dim`` with other axes."""
    if isinstance(dim, Size):
        return dim.renamed(axes)
    return axes.get(dim, dim) if isinstance(dim, str) else dim


def cdiv(a: Any, b: Any) -> Any:
    """``ceil(a / b)``; of a size, a size."""
    return a.ceil(b) if isinstance(a, Size) else -(-a // b)


@lru_cache(maxsize=4096)
def parse(text: str) -> Dim:
    """The dimension that ``str`` made the text of: ``T``, ``T*8+3``, ``cdiv(T,64)*64``.

    Raises:
        SizeError: it is none.
    """
    try:
        made = evaluate(text, _Axes())
    except (SyntaxError, TypeError, ZeroDivisionError, RecursionError, ValueError) as error:
        raise SizeError(f"dimension {text!r} is no size: {error}") from None
    if isinstance(made, bool) or not isinstance(made, int | str | Size):
        raise SizeError(f"dimension {text!r} is no size")
    return made


class _Axes(dict[str, str]):
    """Any name is an axis."""

    def __missing__(self, name: str) -> str:
        return name


def evaluate(expression: str, names: Mapping[str, Any]) -> Any:
    """Value of an arithmetic expression: ``+ - * // / %``, ``min``, ``max``, ``cdiv`` and ``distinct`` over names and
    numbers.

    Names stand for numbers, arrays of numbers (for which ``min`` and ``max`` go by element), or dimensions; of a
    dimension the value is one.

    Raises:
        SizeError: it computes with something else, names what ``names`` has not, or is no size.
    """
    made = _walk(_parsed(expression), names)
    return made.simple if isinstance(made, Size) else made


@lru_cache(maxsize=4096)  # the contracts' few hundred are evaluated for every call, behind every pass
def _parsed(expression: str) -> ast.expr:
    return ast.parse(expression, mode="eval").body


_BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Div: lambda a, b: a / b,
    ast.Mod: lambda a, b: a % b,
}


def _least(a: Any, b: Any) -> Any:
    return min(a, b) if _is_number(a) and _is_number(b) else np.minimum(a, b)


def _most(a: Any, b: Any) -> Any:
    return max(a, b) if _is_number(a) and _is_number(b) else np.maximum(a, b)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float)


def distinct(many: Any, draws: Any) -> Any:
    """How many different ones of ``many`` are expected among so many ``draws``, each of any with the same chance."""
    return many * (1 - (1 - 1 / many) ** draws)


_FUNCTIONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "min": _least,
    "max": _most,
    "cdiv": cdiv,
    "distinct": distinct,
}


def _walk(node: ast.expr, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.Name):
        try:
            named = names[node.id]
        except KeyError:
            raise SizeError(f"{node.id} stands for nothing here") from None
        return Size(named) if isinstance(named, str) else named
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        a, b = _walk(node.left, names), _walk(node.right, names)
        try:
            return _BINARY[type(node.op)](a, b)
        except TypeError:
            raise SizeError(f"{ast.unparse(node)} is no size") from None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        function = _FUNCTIONS.get(node.func.id)
        if function is not None and len(node.args) == 2:
            a, b = (_walk(argument, names) for argument in node.args)
            try:
                return function(a, b)
            except TypeError:
                raise SizeError(f"{ast.unparse(node)} is no size") from None
    raise SizeError(
        f"contracts compute with + - * // / %, min, max, cdiv and distinct only, not {ast.unparse(node)}"
    )
