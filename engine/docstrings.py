"""What docstrings say of attributes: the one place where options and fields have their meaning."""

from __future__ import annotations


def attributes_of(doc: str) -> dict[str, str]:
    """``name: meaning`` entries below ``Attributes:``; a line that is indented deeper goes on."""
    found: dict[str, str] = {}
    lines = iter(doc.splitlines())
    indent = next((len(line) - len(line.lstrip()) for line in lines if line.strip() == "Attributes:"), None)
    if indent is None:
        return found
    name = ""
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if depth <= indent:
            break
        if depth == indent + 4:
            name, _, meaning = line.strip().partition(":")
            found[name] = meaning.strip().replace("``", "")
        else:
            found[name] += " " + line.strip().replace("``", "")
    return found
