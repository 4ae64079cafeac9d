"""The language of contracts' signature lines: operands, their axes and dtypes, and expressions over them."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from makeready.kernels import size
from makeready.kernels.size import SizeError
from makeready.kernels.spec import DTYPE_BYTES

_OPERAND = re.compile(r"(?P<name>\w+)(?P<mark>[?!]?)\[(?P<axes>[^\]]*)\]:(?P<dtype>[\w|]+)")


class ContractError(TypeError):
    """A call does not satisfy its op's contract."""


@dataclass(frozen=True)
class Operand:
    """One tensor of a contract: axes and dtype as written in the signature line."""

    name: str
    axes: tuple[str, ...]
    dtype: str
    optional: bool = False
    written: bool = False


def names_in(expression: str) -> set[str]:
    """The axes and attributes that an expression names."""
    nodes = list(ast.walk(ast.parse(expression, mode="eval")))
    functions = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    return {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in functions}


def operand_of(text: str) -> Operand:
    """The operand that ``name[axes]:dtype`` says.

    Raises:
        TypeError: it says none.
    """
    match = _OPERAND.fullmatch(text)
    if match is None:
        raise TypeError(f"cannot read operand {text!r}; write name[axes]:dtype")
    return Operand(
        match["name"], _axes(match["axes"]), match["dtype"], match["mark"] == "?", match["mark"] == "!"
    )


def _axes(text: str) -> tuple[str, ...]:
    """Axes separated by commas, those within parentheses aside."""
    depths = itertools.accumulate((c == "(") - (c == ")") for c in text)
    parts = "".join("\n" if c == "," and depth == 0 else c for c, depth in zip(text, depths, strict=True))
    return tuple(axis for axis in parts.split("\n") if axis)


def dtype_of(rule: str, bound: Mapping[str, str], attrs: Mapping[str, Any]) -> str:
    """A result's dtype by ``rule``: an attribute where it is set, a name, or what a variable is ``bound`` to."""
    attribute, _, variable = rule.rpartition("|")
    if attribute and attrs[attribute]:
        return attrs[attribute]
    return variable if variable in DTYPE_BYTES else bound[variable]


def evaluate(expression: str, names: Mapping[str, Any]) -> Any:
    """Value of an expression of a contract, see :func:`makeready.kernels.size.evaluate`.

    Raises:
        ContractError: it has none.
    """
    try:
        return size.evaluate(expression, names)
    except SizeError as error:
        raise ContractError(str(error)) from None
