"""Weights of few bits in every format, loaded through the fake driver in runs of some rows, have the CPU's bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_driver import FakeBindings
from plans import CONFIG, Loader
from test_cuda_recipes import File, load_both, small  # noqa: F401  # a fixture
from test_cuda_weights import check_loaded

from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.plan.recipe import Derived, Each, Operand, Param, Piece, concatenate, whole
from makeready.graphs.quant import mxfp4, nvfp4
from makeready.graphs.quant.awq import Awq
from makeready.graphs.quant.gptq import Gptq
from makeready.graphs.quant.int4 import Rounded
from makeready.graphs.quant.mxfp4 import Blocks
from makeready.graphs.quant.nvfp4 import Halves
from makeready.graphs.quant.packed import Packed
from makeready.graphs.quant.weight_only import Form, Layout
from makeready.kernels.spec import TensorSpec

N, K = 200, 320  # the last tile has 8 outputs, the last span half


def packed(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).int()


def tensors(name: str, form: Form, seed: int) -> dict[str, torch.Tensor]:
    """What files of all formats hold for one linear."""
    per, groups = 32 // form.bits, -(-K // (form.group or K))
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(N, groups, generator=generator).half()
    index = (torch.randperm(K, generator=generator) // (form.group or K)).int()
    return {
        f"{name}.weight": torch.randn(N, K, generator=generator).bfloat16(),
        f"{name}.weight_packed": packed(N, K // per, seed=seed),
        f"{name}.weight_scale": scales.float(),
        f"{name}.weight_zero_point": packed(-(-N // per), groups, seed=seed + 1),
        f"{name}.qweight": packed(K // per, N, seed=seed + 2) if per == 8 else packed(K // per, N, seed=seed),
        f"{name}.scales": scales.T.contiguous(),
        f"{name}.qzeros": packed(groups, N // per, seed=seed + 3),
        f"{name}.g_idx": index,
        f"{name}.weight_g_idx": index.clone(),
        f"{name}.weight_blocks": packed(N, K // 8, seed=seed + 4).view(torch.uint8),
        f"{name}.weight_scales": packed(N, K // 128 + 1, seed=seed + 5)
        .view(torch.uint8)[:, : K // 32]
        .contiguous(),
        f"{name}.weight_halves": packed(N, K // 64, seed=seed + 6).view(torch.float8_e4m3fn),
        f"{name}.weight_scale_2": torch.tensor(0.3 + seed),
    }


def made_of(layout: Layout, matrix: Operand, form: Form, name: str) -> list[Param]:
    """All that a linear becomes."""
    rows, groups = int(matrix.spec.shape[0]), -(-K // (form.group or K))
    by = layout.derivation(matrix, form)
    tiled = (-(-rows // 64), groups, 64)
    words = TensorSpec((rows, -(-K // 128) * 8 * form.bits), "int16")
    if isinstance(layout, Halves | nvfp4.Rounded):
        pairs, whole = TensorSpec((tiled[0], K // 32, 64), "int16"), TensorSpec((rows,), "float32")
        specs = {"weight": words, "scale": pairs, "global_scale": whole}
    else:
        kind = "uint8" if isinstance(layout, Blocks | mxfp4.Rounded) else "float16"
        specs = {"weight": words, "scale": TensorSpec(tiled, kind)}
        specs |= {"zero": TensorSpec(tiled, "uint8")} if form.zeros else {}
    results = [*specs]
    return [Param(f"{name}.{result}", specs[result], derived=Derived(by, result)) for result in results]


@pytest.mark.parametrize(
    ("layout", "form"),
    [
        (Rounded(), Form(4, 128)),
        (Gptq(0), Form(4, 64, zeros=True)),
        (Gptq(1), Form(8, 32, zeros=True)),
        (Gptq(), Form(4, 0)),
        (Gptq(), Form(4, 64, zeros=True, ordered=True)),
        (Packed(), Form(4, 32, zeros=True)),
        (Packed(), Form(8, 64, ordered=True)),
        (Blocks(), Form(4, 32)),
        (mxfp4.Rounded(), Form(4, 32)),
        (Halves("weight_blocks", "weight_halves", "weight_scale_2", divides=True), Form(4, 16)),
        (Halves("weight_blocks", "weight_halves", "weight_scale_2", divides=False), Form(4, 16)),
        (nvfp4.Rounded(), Form(4, 16)),
    ],
    ids=str,
)
def test_every_format(layout: Layout, form: Form, small: None, tmp_path: Path) -> None:  # noqa: F811
    matrix = Operand(TensorSpec((N, K), "bfloat16"), (whole("m.weight", (N, K)),))
    _, loader, plan = load_both(
        made_of(layout, matrix, form, "p"), File(tmp_path / "f", tensors("m", form, 1))
    )
    assert plan.loading is not None
    assert len(plan.loading.conversions[0].runs) == 4
    assert loader.launched


def test_awq_is_transposed_and_experts_lie_below_each_other(small: None, tmp_path: Path) -> None:  # noqa: F811
    """Three experts of a gate and a factor of 96 rows each, in whole tiles together."""
    form, rows = Form(4, 64, zeros=True), 96
    each = (Each("e", 3, place=(2 * rows, 0)),)
    box = ((0, rows), (0, K))
    pieces = (
        Piece("m.{e}.gate.weight", box, (0, 0), each=each),
        Piece("m.{e}.up.weight", box, (rows, 0), each=each),
    )
    files: dict[str, torch.Tensor] = {}
    for i, name in enumerate(f"m.{e}.{part}" for e in range(3) for part in ("gate", "up")):
        generator = torch.Generator().manual_seed(i)
        files |= {
            f"{name}.qweight": packed(K, rows // 8, seed=i),
            f"{name}.qzeros": packed(5, rows // 8, seed=i + 10),
            f"{name}.scales": torch.rand(5, rows, generator=generator).half(),
        }
    matrix = Operand(TensorSpec((6 * rows, K), "bfloat16"), pieces)
    load_both(made_of(Awq(), matrix, form, "p"), File(tmp_path / "f", files))


def test_experts_have_global_scales_of_their_own(small: None, tmp_path: Path) -> None:  # noqa: F811
    """Three experts of a gate and a factor of 96 rows each; one number of a file is that of all its rows."""
    form, rows = Form(4, 16), 96
    each, box = (Each("e", 3, place=(2 * rows, 0)),), ((0, rows), (0, K))
    files: dict[str, torch.Tensor] = {}
    for i, name in enumerate(f"m.{e}.{part}" for e in range(3) for part in ("gate", "up")):
        own = tensors(name, form, i)
        files |= {key: own[key][:rows] for key in (f"{name}.weight_blocks", f"{name}.weight_halves")}
        scales = files[f"{name}.weight_halves"].view(torch.uint8)
        scales.bitwise_and_(0x3F)  # sound ones
        files[f"{name}.weight_scale_2"] = torch.tensor(i + 0.5)
    pieces = (
        Piece("m.{e}.gate.weight", box, (0, 0), each=each),
        Piece("m.{e}.up.weight", box, (rows, 0), each=each),
    )
    matrix = Operand(TensorSpec((6 * rows, K), "bfloat16"), pieces)
    layout = Halves("weight_blocks", "weight_halves", "weight_scale_2", divides=False)
    made, *_ = load_both(made_of(layout, matrix, form, "p"), File(tmp_path / "f", files))
    assert made["p.global_scale"].tolist() == [i + 0.5 for i in range(6) for _ in range(rows)]


def test_merged_projections_are_one_run(small: None, tmp_path: Path) -> None:  # noqa: F811
    """Two projections with whole tiles are those of one with the outputs of both."""
    form, rows, files, params = Form(4, 64, zeros=True), 128, {}, []
    for i, name in enumerate(("q", "k")):
        own = tensors(name, form, i)
        files |= {k: (v[:rows] if v.shape[:1] == (N,) else v).contiguous() for k, v in own.items()}
        files[f"{name}.weight_zero_point"] = own[f"{name}.weight_zero_point"][: rows // 8].contiguous()
        matrix = Operand(TensorSpec((rows, K), "bfloat16"), (whole(f"{name}.weight", (rows, K)),))
        params.append(made_of(Packed(), matrix, form, name))
    merged = [concatenate(pair) for pair in zip(*params, strict=True)]
    made, _, plan = load_both([*merged, *params[0], *params[1]], File(tmp_path / "f", files))
    assert plan.loading is not None
    assert len(plan.loading.conversions) == 3
    for result in ("weight", "scale", "zero"):
        apart = torch.cat([made[f"{name}.{result}"] for name in ("q", "k")])
        assert torch.equal(made[f"q+k.{result}"], apart)


@pytest.mark.parametrize(
    "said",
    [
        None,
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"},
        {"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": False},
    ],
    ids=str,
)
def test_models_are_loaded(said: dict | None, small: None) -> None:  # noqa: F811
    config = CONFIG | {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    config |= {"quantization_config": said} if said else {}
    loader = Loader()
    plan = check_loaded(
        DummyCheckpoint(config, None, 0), FakeBindings(on_kernel=loader), quant=None if said else "int4"
    )
    kinds = {weight.param.spec.dtype for weight in plan.weights}
    assert kinds >= {"int16", "float16"}
    assert ("uint8" in kinds) == bool(said)


@pytest.mark.parametrize("said", [None, {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}], ids=str)
def test_models_in_nvfp4_are_loaded(said: dict | None, small: None) -> None:  # noqa: F811
    config = CONFIG | {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    config |= {"quantization_config": said} if said else {}
    loader = Loader()
    plan = check_loaded(
        DummyCheckpoint(config, None, 0), FakeBindings(on_kernel=loader), quant=None if said else "nvfp4"
    )
    assert {w.param.spec.dtype for w in plan.weights if "mlp." in w.param.name} == {"int16", "float32"}


@pytest.mark.parametrize("algorithm", ["W4A16_AWQ", "W8A8_SQ_PER_CHANNEL"])
def test_models_in_integers_of_modelopt_are_loaded(algorithm: str, small: None) -> None:  # noqa: F811
    said = {"quant_method": "modelopt", "quant_algo": algorithm, "group_size": 32}
    config = CONFIG | {
        "hidden_size": 128,
        "intermediate_size": 192,
        "head_dim": 32,
        "quantization_config": said,
    }
    plan = check_loaded(DummyCheckpoint(config, None, 0), FakeBindings(on_kernel=Loader()))
    found = {w.param.spec.dtype for w in plan.weights if "mlp." in w.param.name}
    assert found == ({"int16", "float16"} if algorithm == "W4A16_AWQ" else {"int8", "float32"})
