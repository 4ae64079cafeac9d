"""Rehearses tests of kernels without a GPU: as a plugin, ``PYTHONPATH=tests/gpu pytest -p rehearsal tests/gpu/FILE``.

Whatever goes through ``benchmarks.gpu.launcher`` gets the results of the references, so that a test which fails here
would fail on a GPU whatever the kernel does. With ``REHEARSE=compile`` the kernels that it would launch are compiled
for sm_90a into the cache of plans, too: carry ``$MAKEREADY_CACHE`` to the GPU, and they are there. What runs a plan
ends with the driver's error, behind its compilation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

ARCH = 90
_COMPILES = os.environ.get("REHEARSE") == "compile"


class OnTheHost(TorchFunctionMode):
    """What is asked to lie on the GPU lies on the host."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        given = dict(kwargs or {})
        if str(given.get("device", "")).startswith("cuda"):
            given["device"] = "cpu"
        if func is torch.Tensor.to:
            args = tuple("cpu" if _is_gpu(a) else a for a in args)
        return func(*args, **given)


def _is_gpu(argument: Any) -> bool:
    return isinstance(argument, (str, torch.device)) and str(argument).startswith("cuda")


def _pretend() -> None:
    """A GPU that is asked for, but never for work."""
    for name, answer in {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": divmod(ARCH, 10),
        "get_device_name": "NVIDIA H200",
        "synchronize": None,
        "init": None,
        "empty_cache": None,
        "current_stream": None,
    }.items():
        setattr(torch.cuda, name, lambda *_args, _answer=answer, **_given: _answer)
    made = torch.Generator

    class Generator:
        """A class, since type annotations of libraries name it."""

        def __new__(cls, device: object = "cpu") -> torch.Generator:  # type: ignore[misc]
            return made("cpu")

    torch.Generator = Generator  # type: ignore[assignment,misc]
    OnTheHost().__enter__()


_pretend()


def _results(
    candidate: Any, call: Any, tensors: Mapping[str, torch.Tensor], **_: Any
) -> dict[str, torch.Tensor]:
    """In place of :func:`benchmarks.gpu.launcher.run`."""
    from benchmarks.gpu import launcher

    from makeready.kernels.contract import CONTRACTS

    if _COMPILES:
        assert launcher.fits(candidate, call), f"{candidate.name} does not compile, spills or finds no room"
    contract = CONTRACTS[call.op]
    full = {**launcher.results(call, tensors), **tensors}
    wide = {o.name: None if o.name not in tensors else _wide(tensors[o.name]) for o in contract.inputs}
    made = contract.reference(*wide.values(), **call.attrs)
    outputs = (made,) if len(contract.outputs) == 1 else (made or ())
    for output, value in zip(contract.outputs, outputs, strict=True):
        full[output.name].copy_(value)
    for name in contract.writes:
        if name in tensors:
            tensors[name].copy_(wide[name])
    return full


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.dtype.is_floating_point else tensor.clone()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Behind the imports of tests, which may hold functions of their own."""
    from benchmarks.gpu import launcher

    launcher.run = _results
    launcher._arch = lambda: ARCH
    if not _COMPILES:
        launcher.fits = lambda candidate, call: True
        for module in {getattr(item, "module", None) for item in items} - {None}:
            if hasattr(module, "prepare"):
                module.prepare = list
