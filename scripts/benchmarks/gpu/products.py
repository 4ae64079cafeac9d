"""One projection alone on the GPU, compiled as the planner does and launched as plans are: without PyTorch.

Compiling imports Triton; nothing else here does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from makeready.graphs.executable.cuda.driver import Driver
from makeready.graphs.executable.cuda.graph import GraphBuilder
from makeready.graphs.executable.cuda.memory import random_numbers
from makeready.graphs.plan.memory import align
from makeready.graphs.plan.program import Binary, Buffer, Launch, LoweredProgram, PlanCandidate
from makeready.graphs.plan.spec import EXTEND, Bucket
from makeready.graphs.plan.targets import Target
from makeready.kernels.spec import TensorSpec

FP8, INT8 = "float8_e4m3fn", "int8"
EIGHT_BITS = {FP8: "linear_fp8", INT8: "linear_int8"}  # and what multiplies them


@dataclass(frozen=True)
class Product:
    """``T`` rows of ``K`` inputs times ``N`` rows of weights, in bf16, or in 8 bits with a scale a row."""

    T: int
    N: int
    K: int
    dtype: str = "bfloat16"

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.T * self.N * self.K

    @property
    def operands(self) -> dict[str, TensorSpec]:
        """By their names in the contract."""
        made = {
            "x": TensorSpec((self.T, self.K), self.dtype),
            "weight": TensorSpec((self.N, self.K), self.dtype),
        }
        if self.dtype in EIGHT_BITS:
            made["x_scale"] = TensorSpec((self.T, 1), "float32")
            made["weight_scale"] = TensorSpec((self.N,), "float32")
        return made

    @property
    def weight_bytes(self) -> int:
        """Of the weights."""
        return self.operands["weight"].nbytes({})


@dataclass(frozen=True)
class Built:
    """The planner's choices for a product, the best first, and what they take.

    Attributes:
        arena: bytes of activations and result; ``offsets`` says where each begins.
    """

    choices: tuple[PlanCandidate, ...]
    binaries: Mapping[str, Binary]
    cubins: Mapping[str, bytes]
    scratch: int
    arena: int
    offsets: Mapping[str, int]


def build(product: Product, target: Target, *, keep: int) -> Built:
    """Compile the best ``keep`` ways of a product.

    Raises:
        PlanError: the target has none.
        ModuleNotFoundError: Triton is not installed.
    """
    from makeready.graphs.planner.cuda.emit import emit
    from makeready.kernels import registry

    registry.discover(target.name)
    activations = {k: v for k, v in product.operands.items() if k.startswith("x")}
    activations["y"] = TensorSpec((product.T, product.N), "bfloat16")
    buffers, end = {}, 0
    for name in ("x_scale", "y", "x"):  # maps may reach beyond the last row of x
        if name in activations:
            spec = activations[name]
            buffers[name] = Buffer(TensorSpec(("T", *spec.shape[1:]), spec.dtype), end, None, 0, 1)
            end += align(spec.nbytes({}))
    launch = Launch(
        EIGHT_BITS.get(product.dtype, "linear"),
        "reference",
        {name: name for name in product.operands},
        {"y": "y"},
        {},
    )
    bucket = Bucket(EXTEND, 1, product.T)
    weights = {k: v for k, v in product.operands.items() if k not in activations}
    with tempfile.TemporaryDirectory() as cache:
        made = emit(
            {EXTEND: LoweredProgram(EXTEND, (launch,), buffers)},
            {EXTEND: weights},
            (bucket,),
            target,
            context=1024,
            keep=keep,
            cache=Path(cache),
        )
    (one,) = made.programs[EXTEND].classes
    offsets = {name: buffer.offset for name, buffer in buffers.items()}
    choices = one.candidates[str(bucket)]
    return Built(choices, made.binaries, made.cubins, made.scratch, max(end, made.arena), offsets)


@contextmanager
def loaded(driver: Driver, product: Product, built: Built, stream: Any) -> Iterator[list[Callable[[], None]]]:
    """What launches each choice once, on operands of random numbers; frees everything behind it."""
    with ExitStack() as undo:

        def allocate(nbytes: int) -> int:
            address = driver.allocate(nbytes)
            undo.callback(driver.free, address)
            return address

        arena, scratch = allocate(built.arena), allocate(built.scratch)
        undo.callback(driver.synchronize, stream)
        driver.fill(scratch, 0, built.scratch, stream)
        driver.fill(arena, 0, built.arena, stream)
        addresses = {name: arena + offset for name, offset in built.offsets.items()}
        for name, spec in product.operands.items():
            if name not in addresses:
                addresses[name] = allocate(spec.nbytes({}))
            # Numbers, since power and so the clock depend on them: products of zeros are faster.
            random_numbers(driver, addresses[name], spec.nbytes({}), spec.dtype, stream)
        functions = {}
        for key, binary in built.binaries.items():
            library = driver.load(built.cubins[key])
            undo.callback(driver.unload, library)
            functions[key] = driver.function(library, binary.function, 32 * binary.warps, binary.shared)
        nothing: Any = SimpleNamespace(tuned={}, programs={}, binaries=built.binaries)
        builder = GraphBuilder(driver, nothing, functions, scratch=scratch, pages=0, device="")
        names = {name: name for name in (*product.operands, "y")}

        def run(nodes: list[Any]) -> None:
            for node in nodes:
                driver.launch_kernel(node.function, node.grid, node.bind(names, addresses), stream)

        yield [partial(run, [builder.prepare(node) for node in choice.nodes]) for choice in built.choices]
