"""Recipes of every form, loaded on the CPU and through the fake driver, against numbers computed by hand."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_driver import FakeBindings
from plans import CONFIG, Loader, make_plan, with_kernels
from safetensors.torch import save_file
from test_cuda_weights import check_loaded
from toy_load_ops import FP8, Toy, registered

from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.checkpoint.safetensors_file import SafetensorsFile
from makeready.graphs.executable.cpu.weights import load_weights
from makeready.graphs.executable.cuda import weights as cuda_weights
from makeready.graphs.executable.cuda.conversions import Converter
from makeready.graphs.executable.cuda.driver import Driver, host_bytes
from makeready.graphs.executable.cuda.weights import Upload
from makeready.graphs.layers import dense
from makeready.graphs.layers.parameter import parameter
from makeready.graphs.plan import artifact
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.recipe import Derivation, Derived, Each, LoadCall, Operand, Param, Piece, whole
from makeready.graphs.plan.targets import find_target
from makeready.graphs.planner.derivation import complaints
from makeready.graphs.planner.lower import place_weights
from makeready.graphs.quant import loading
from makeready.graphs.quant.loading import loading_of
from makeready.graphs.quant.scheme import ON_LOAD
from makeready.kernels.spec import TensorSpec


@pytest.fixture(autouse=True)
def _toy_ops():
    with registered():
        yield


@pytest.fixture
def small(monkeypatch):
    """Runs of a few rows, through pinned buffers that are smaller still."""
    monkeypatch.setattr(loading, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(loading, "ROWS", 4)
    monkeypatch.setattr(cuda_weights, "CHUNK", 500)
    monkeypatch.setattr(cuda_weights, "READ", 700)


class File(Checkpoint):
    """One safetensors file, without a config."""

    format = "safetensors"

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        save_file(dict(tensors), path)
        self.path = path
        self._file = SafetensorsFile(path)

    @property
    def tensors(self) -> Any:
        return self._file.infos

    def read(self, name: str, box: Any = None) -> np.ndarray:
        return self._file.read(name, box)


def load_both(params: list[Param], checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], Loader, Plan]:
    """Parameters as the CPU loads them, of which the fake GPU's must have the bytes; what ran there; the plan."""
    assert [reason for param in params for reason in complaints(param)] == []
    weights, nbytes = place_weights(params)
    made = loading_of(weights, find_target("sm_90a"))
    plan = make_plan(kernels=False)
    plan = with_kernels(replace(plan, weights=weights, programs={}, loading=made))
    plan = replace(plan, memory=replace(plan.memory, weights=nbytes))
    expected = load_weights(plan, checkpoint, lambda done, total: None)
    loader = Loader()
    loader.plan = plan
    driver = Driver(FakeBindings(on_kernel=loader))
    driver.initialise()
    device = driver.open(0)
    driver.use(device)
    functions = {
        key: driver.function(driver.load(plan.cubins[key]), binary.function, 32, binary.shared)
        for key, binary in plan.binaries.items()
    }
    base = driver.allocate(nbytes)
    converter = None
    if plan.loading is not None:
        arena = driver.allocate(plan.loading.places * plan.loading.place_bytes)
        converter = Converter(driver, plan, plan.loading, functions, arena, base)
    upload = Upload(plan, checkpoint, lambda done, total: None, threads=2)
    upload.start(driver, device, base, converter)
    upload.wait()
    upload.close()
    region = host_bytes(base, nbytes)
    for weight in weights:
        raw = region[weight.offset : weight.offset + weight.nbytes]
        wanted = expected[weight.param.name].contiguous().view(torch.uint8).numpy().reshape(-1)
        assert np.array_equal(raw, wanted), weight.param.name
    return expected, loader, plan


def bf16(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_boxes_transposes_and_patterns(tmp_path, small):
    """What lies in the file as it is wanted goes straight from there; the rest is put together on the host."""
    experts = {
        f"m.{e}.{n}": bf16(6, 8, seed=2 * e + i) for e in range(16) for i, n in enumerate(("gate", "up"))
    }
    fused, stacked = bf16(24, 64, seed=99), bf16(5, 16, 32, seed=98)
    spec = TensorSpec((16, 12, 8), "bfloat16")
    each = (Each("e", 16, place=(1, 0, 0)),)
    pieces = (
        Piece("m.{e}.gate", ((0, 6), (0, 8)), (0, 0, 0), each=each),
        Piece("m.{e}.up", ((0, 6), (0, 8)), (0, 6, 0), each=each),
    )
    box = (Piece("fused", ((4, 20), (10, 50)), (0, 0)),)
    turned = (Piece("stacked", ((0, 5), (0, 16), (0, 32)), (0, 0, 0), axes=(0, 2, 1)),)
    params = [
        Param("experts", spec, pieces),
        Param("experts.f32", replace(spec, dtype="float32"), pieces),
        Param("columns", TensorSpec((16, 40), "bfloat16"), box),
        Param("rows", TensorSpec((16, 64), "bfloat16"), (Piece("fused", ((4, 20), (0, 64)), (0, 0)),)),
        Param("turned", TensorSpec((5, 32, 16), "bfloat16"), turned),
    ]
    checkpoint = File(tmp_path / "x.safetensors", {**experts, "fused": fused, "stacked": stacked})
    made, _, _ = load_both(params, checkpoint)
    wanted = torch.stack([torch.cat([experts[f"m.{e}.gate"], experts[f"m.{e}.up"]]) for e in range(16)])
    assert torch.equal(made["experts"], wanted)
    assert torch.equal(made["experts.f32"], wanted.float())
    assert torch.equal(made["columns"], fused[4:20, 10:50])
    assert torch.equal(made["rows"], fused[4:20])
    assert torch.equal(made["turned"], stacked.transpose(1, 2))


def float8(*shape: int, seed: int = 0) -> torch.Tensor:
    return (100 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("rows", [96, 80])
def test_blocks_are_dequantized_as_in_float64(tmp_path, small, rows):
    """A weight and its scales, cut into the same blocks of 32 rows; the last may be shorter."""
    q, scale = float8(rows, 64), torch.rand(-(-rows // 32), 2, generator=torch.Generator().manual_seed(1))
    by = Derivation(
        {
            "q": Operand(TensorSpec((rows, 64), FP8), (whole("q", (rows, 64)),), unit=32),
            "scale": Operand(TensorSpec((-(-rows // 32), 2), "float32"), (whole("s", scale.shape),), unit=1),
        },
        (
            LoadCall(
                "toy_dequantize",
                {"q": "q", "scale": "scale"},
                {"y": "y"},
                {"block": 32, "out_dtype": "bfloat16"},
            ),
        ),
    )
    params = [Param("w", TensorSpec((rows, 64), "bfloat16"), derived=Derived(by, "y"))]
    checkpoint = File(tmp_path / "x.safetensors", {"q": q, "s": scale})
    made, loader, plan = load_both(params, checkpoint)
    wide = np.kron(scale.numpy().astype(np.float64), np.ones((32, 32)))[:rows]
    wanted = q.float().numpy().astype(np.float64) * wide
    assert np.abs(made["w"].double().numpy() - wanted).max() <= 2**-8 * np.abs(wanted).max()
    assert (np.abs(made["w"].double().numpy() - wanted) <= 2**-8 * np.abs(wanted)).all()
    assert plan.loading is not None
    assert [stop for stop, _ in plan.loading.conversions[0].runs] == [1, 2, 3]
    assert sum(loader.launched.values()) == 3


def absorbed(heads: int, key: int, value: int, latent: int, *, unit: int = 1) -> list[Param]:
    """Multi-head latent attention's two halves of ``kv_b_proj``, of 8-bit blocks: dequantized, then split.

    Each block of scales is as high as a head, of which ``unit`` belong together; 0 for all.
    """
    rows = key + value
    q, scale = (heads * rows, latent), (heads, latent // rows)
    by = Derivation(
        {
            "q": Operand(TensorSpec(q, FP8), (whole("q", q),), unit=unit * rows),
            "scale": Operand(TensorSpec(scale, "float32"), (whole("s", scale),), unit=unit),
        },
        (
            LoadCall("toy_dequantize", {"q": "q", "scale": "scale"}, {"y": "w"}, {"block": rows}),
            LoadCall("toy_split_heads", {"w": "w"}, {"k": "k", "v": "v"}, {"rows": rows, "key": key}),
        ),
    )
    return [
        Param("k", TensorSpec((heads, key, latent), "float32"), derived=Derived(by, "k")),
        Param("v", TensorSpec((heads, latent, value), "float32"), derived=Derived(by, "v")),
    ]


@pytest.mark.parametrize("unit", [0, 1, 2])
def test_absorbed_weights_are_dequantized_and_split_by_head(tmp_path, small, unit):
    q, scale = float8(6 * 16, 32), torch.rand(6, 2, generator=torch.Generator().manual_seed(1))
    checkpoint = File(tmp_path / "x.safetensors", {"q": q, "s": scale})
    made, loader, plan = load_both(absorbed(6, 10, 6, 32, unit=unit), checkpoint)
    wide = np.kron(scale.numpy().astype(np.float64), np.ones((16, 16)))
    by_head = (q.float().numpy().astype(np.float64) * wide).reshape(6, 16, 32)
    assert np.allclose(made["k"], by_head[:, :10], rtol=1e-6)
    assert np.allclose(made["v"], by_head[:, 10:].transpose(0, 2, 1), rtol=1e-6)
    runs = {0: 1, 1: 2, 2: 3}[unit]  # of 520 bytes a head: 3 at once, 2 where they come in pairs
    assert sum(loader.launched.values()) == 2 * runs
    assert plan.loading is not None
    for load in plan.loading.programs:
        # Both operands and what lies between the two calls are in the place at once.
        spans = sorted((b.offset, b.offset + b.spec.nbytes({})) for b in load.program.buffers.values())
        assert len(spans) == 3
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))
        assert spans[-1][1] <= plan.loading.place_bytes


def test_what_differs_in_parts_is_refused():
    """Single rows have a scale each, blocks of four do not."""
    operand = Operand(TensorSpec((8, 4), "float32"), (whole("x", (8, 4)),), unit=1)
    call = LoadCall("quantize_fp8_block", {"x": "x"}, {"q": "q", "scale": "s"}, {"block": 4})
    by = Derivation({"x": operand}, (call,))
    param = Param("scale", TensorSpec((2, 1), "float32"), derived=Derived(by, "s"))
    (found,) = complaints(param)
    assert found.startswith("scale is another tensor made in parts than made as a whole; give the operands")
    sound = replace(by, operands={"x": replace(operand, unit=4)})
    assert list(complaints(replace(param, derived=Derived(sound, "s")))) == []


def test_large_units_are_runs_of_their_own(monkeypatch):
    """Stacked experts: a unit is an expert, and 128 of them would be far too much at once."""
    spec = TensorSpec((8, 64, 32), "float32")
    by = Derivation(
        {"x": Operand(spec, (whole("x", spec.at({})),), unit=1)},
        (LoadCall("silu", {"x": "x"}, {"y": "y"}),),
    )
    flat = replace(by.operands["x"], spec=TensorSpec((8, 2048), "float32"), pieces=(whole("x", (8, 2048)),))
    by = replace(by, operands={"x": flat})
    weights, _ = place_weights([Param("y", spec, derived=Derived(by, "y"))])
    monkeypatch.setattr(loading, "CHUNK_BYTES", 3 * 8192)
    made = loading_of(weights, find_target("sm_90a"))
    assert made is not None
    assert [stop for stop, _ in made.conversions[0].runs] == [3, 6, 8]
    assert made.place_bytes == 3 * 8192
    assert made.places == 3  # one for each run


def test_places_that_must_be_large_are_few(monkeypatch):
    """Four derivations that see 64 KiB each as a whole, where threads have a share of 16 KiB."""
    monkeypatch.setattr(loading, "CHUNK_BYTES", 4096)
    params = []
    for i in range(4):
        operand = Operand(TensorSpec((128, 128), "float32"), (whole(f"x{i}", (128, 128)),))
        by = Derivation({"x": operand}, (LoadCall("silu", {"x": "x"}, {"y": "y"}),))
        params.append(Param(f"y{i}", operand.spec, derived=Derived(by, "y")))
    made = loading_of(place_weights(params)[0], find_target("sm_90a"))
    assert made is not None
    assert made.place_bytes == 65536
    assert made.places == 2  # 8 threads' shares are 128 KiB


def by_hand(checkpoint: DummyCheckpoint, module: str) -> np.ndarray:
    """The weight times its gains in float64."""
    weight = checkpoint.read(f"{module}.weight").astype(np.uint32) << 16
    gain = checkpoint.read(f"{module}.gain").astype(np.uint32) << 16
    return weight.view(np.float32).astype(np.float64) * gain.view(np.float32).astype(np.float64)[:, None]


def test_a_quantization_from_outside_loads_everywhere(small, monkeypatch, tmp_path):
    """Registered by name alone; merged, lowered and placed as the packages' own are."""
    monkeypatch.setitem(ON_LOAD, "toy", Toy())
    checkpoint, loader = DummyCheckpoint(dict(CONFIG), None, 0), Loader()
    plan = check_loaded(checkpoint, FakeBindings(on_kernel=loader), quant="toy")
    assert {name.split("-")[1] for name in loader.launched} == {"toy_rescale", "quantize_fp8"}
    made = load_weights(plan, checkpoint, lambda done, total: None)
    for layer in range(CONFIG["num_hidden_layers"]):
        for name, modules in {
            "attention.q+k+v": [f"self_attn.{n}_proj" for n in "qkv"],
            "attention.o": ["self_attn.o_proj"],
            "mlp.gate+up": ["mlp.gate_proj", "mlp.up_proj"],
            "mlp.down": ["mlp.down_proj"],
        }.items():
            wanted = np.vstack([by_hand(checkpoint, f"model.layers.{layer}.{module}") for module in modules])
            q = made[f"layers.{layer}.{name}.weight"].double().numpy()
            scale = made[f"layers.{layer}.{name}.weight_scale"].double().numpy()
            assert np.allclose(scale, np.abs(wanted).max(1) / 448, rtol=2**-8)
            error = np.abs(q * scale[:, None] - wanted)
            assert (error <= 0.067 * np.abs(wanted) + scale[:, None] * 2**-9).all()
    artifact.save(plan, tmp_path / "plan")
    assert artifact.load(tmp_path / "plan") == plan


class FromBlocks(dense.Linear):
    """A linear whose wide weight is made of 8-bit blocks when it is loaded."""

    def __init__(self, source: str, outputs: int, inputs: int, *, bias: bool, shard: Any) -> None:
        super().__init__(source, outputs, inputs, bias=bias, shard=shard)

        def derived(dtype: str) -> Derived:
            scales = (outputs // 16, inputs // 16)
            by = Derivation(
                {
                    "q": Operand(
                        TensorSpec((outputs, inputs), FP8),
                        (whole(f"{source}.weight", (outputs, inputs)),),
                        unit=16,
                    ),
                    "scale": Operand(
                        TensorSpec(scales, "float32"), (whole(f"{source}.weight_scale", scales),), unit=1
                    ),
                },
                (
                    LoadCall(
                        "toy_dequantize",
                        {"q": "q", "scale": "scale"},
                        {"y": "y"},
                        {"block": 16, "out_dtype": dtype},
                    ),
                ),
            )
            return Derived(by, "y")

        self.weight = parameter((outputs, inputs), derived, shard=shard)


def test_a_layer_may_declare_a_derivation(small, monkeypatch):
    """Gate and up are merged though they are derived; their numbers are those of float64."""
    monkeypatch.setattr(dense, "Linear", FromBlocks)
    checkpoint, loader = DummyCheckpoint(dict(CONFIG), None, 0), Loader()
    plan = check_loaded(checkpoint, FakeBindings(on_kernel=loader))
    assert {name.split("-")[1] for name in loader.launched} == {"toy_dequantize"}
    made = load_weights(plan, checkpoint, lambda done, total: None)
    wanted = []
    for name in ("gate", "up"):
        module = f"model.layers.1.mlp.{name}_proj"
        q = torch.from_numpy(checkpoint.read(f"{module}.weight")).view(torch.float8_e4m3fn).float().numpy()
        scale = checkpoint.read(f"{module}.weight_scale").astype(np.float64)
        wanted.append(q.astype(np.float64) * np.kron(scale, np.ones((16, 16))))
    found = made["layers.1.mlp.gate+up.weight"].double().numpy()
    assert (np.abs(found - np.vstack(wanted)) <= 2**-8 * np.abs(np.vstack(wanted))).all()
    param = next(w.param for w in plan.weights if w.param.name == "layers.1.mlp.gate+up.weight")
    assert param.shard == ("tp", None)
