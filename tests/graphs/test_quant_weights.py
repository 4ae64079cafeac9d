"""8 bits: what is loaded, made of wide weights and as files store it; dummies; files that contradict their config."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from quant_configs import BLOCKS, WIDE
from safetensors.torch import save_file
from tiny_programs import LIMITS, dummy

from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.checkpoint.float8 import to_float8
from makeready.graphs.executable.cpu.weights import load_weights
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.planner.compile import compile_plan

FP8 = torch.float8_e4m3fn


def loaded(plan: Plan, checkpoint: Any) -> dict[str, torch.Tensor]:
    return load_weights(plan, checkpoint, lambda done, total: None)


def source(checkpoint: Any, name: str) -> torch.Tensor:
    """A weight of layer 0."""
    array = checkpoint.read(f"model.layers.0.{name}.weight")
    return (
        torch.from_numpy(array).view(torch.bfloat16).float()
        if array.dtype == np.uint16
        else torch.from_numpy(array)
    )


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", ["fp8", "fp8_block", "int8"])
def test_weights_are_quantized_as_by_hand(quant, weight_dtype):
    """Bytes of weights and scales, piece by piece of merged parameters, computed one block at a time."""
    checkpoint = dummy(WIDE | {"dtype": weight_dtype})
    plan = compile_plan(checkpoint, **(LIMITS | {"weight_dtype": weight_dtype}), quant=quant)
    plain = tuple(replace(w, param=replace(w.param, layout="rows")) for w in plan.weights)
    made = loaded(replace(plan, weights=plain), checkpoint)
    name = next(n for n in made if n.partition("@")[0] == "layers.0.mlp.gate+up.weight")
    q, scale = made[name], made["layers.0.mlp.gate+up.weight_scale"]
    rows = torch.cat([source(checkpoint, "mlp.gate_proj"), source(checkpoint, "mlp.up_proj")]).numpy()
    kind = torch.int8 if quant == "int8" else FP8
    assert (q.dtype, q.shape, scale.dtype) == (kind, rows.shape, torch.float32)
    tall, wide = (128, 128) if quant == "fp8_block" else (1, rows.shape[1])
    scale = scale.view(len(rows) // tall, rows.shape[1] // wide)
    for i, j in np.ndindex(*scale.shape):
        here = slice(i * tall, (i + 1) * tall), slice(j * wide, (j + 1) * wide)
        wanted = np.float32(np.abs(rows[here]).max()) / np.float32(127 if quant == "int8" else 448)
        assert scale[i, j] == wanted
        if quant == "int8":
            assert np.array_equal(q.numpy()[here], np.rint(rows[here] / wanted))
        else:
            assert np.array_equal(q.view(torch.uint8).numpy()[here], to_float8(rows[here] / wanted))


@pytest.mark.parametrize("config", [{"quant_method": "fp8", "activation_scheme": "static"}, BLOCKS], ids=str)
def test_dummies_of_quantized_configs_are_sensible(config):
    """8-bit weights that use their range, scales that bring them back to ordinary weights."""
    checkpoint = dummy(WIDE | {"quantization_config": config})
    plan = compile_plan(checkpoint, **LIMITS)
    made = loaded(plan, checkpoint)
    q = torch.from_numpy(checkpoint.read("model.layers.0.mlp.up_proj.weight")).view(FP8).float()
    assert 80 < q.std() < 120
    assert len(q.unique()) > 150
    for name, scale in made.items():
        if name.endswith("weight_scale"):
            assert scale.min() > 0
            assert 0.01 < (scale * 100).mean() < 0.04
        elif name.endswith("input_scale"):
            assert 0.005 < scale.item() < 0.05


def stored(folder, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(WIDE | {"quantization_config": quantization}))
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


def everything(quantization: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, random, in the shapes and dtypes of a dummy's."""
    checkpoint = dummy(WIDE | {"quantization_config": quantization})
    compile_plan(checkpoint, **LIMITS)
    tensors = {}
    for name, info in checkpoint.tensors.items():
        array = torch.from_numpy(checkpoint.read(name))
        tensors[name] = array.view(FP8) if info.dtype == "float8_e4m3fn" else array
    return tensors


def test_a_tensors_scale_is_repeated_for_each_of_its_rows(tmp_path):
    """Merged weights keep a scale for each piece, whatever shape it was stored in."""
    quantization = {"quant_method": "fp8"}
    tensors = everything(quantization)
    prefix = "model.layers.0.self_attn"
    for shape, (name, value) in zip([(), (1,), (1, 1)], {"q": 1.5, "k": 0.25, "v": 3.0}.items(), strict=True):
        tensors[f"{prefix}.{name}_proj.weight_scale"] = torch.full(shape, value)
    checkpoint = stored(tmp_path, tensors, quantization)
    made = loaded(compile_plan(checkpoint, **LIMITS), checkpoint)
    scale = made["layers.0.attention.q+k+v.weight_scale"]
    assert scale.tolist() == [1.5] * 128 + [0.25] * 32 + [3.0] * 32


def test_stored_blocks_that_divide_nothing_are_filled_up_with_zeros(tmp_path):
    """Rows of weights end within a block: behind them stand zeros, and scales are as they were stored."""
    quantization = {**BLOCKS, "weight_block_size": [100, 100]}
    tensors = everything(quantization)
    checkpoint = stored(tmp_path, tensors, quantization)
    plan = compile_plan(checkpoint, **LIMITS)
    made = loaded(plan, checkpoint)
    for module, width in (
        ("model.layers.0.self_attn.o_proj", 128),
        ("model.layers.1.mlp.down_proj", 256),
    ):
        theirs = tensors[f"{module}.weight"]
        named = {p.source: made[w.param.name] for w in plan.weights for p in w.param.pieces}
        ours = named[f"{module}.weight"]
        assert theirs.shape == (128, width)
        assert ours.shape == (128, -(-width // 100) * 100)
        assert torch.equal(ours[:, :width].view(torch.uint8), theirs.view(torch.uint8))
        assert (ours[:, width:].view(torch.uint8) == 0).all()
        scale = tensors[f"{module}.weight_scale_inv"]
        assert scale.shape == (2, -(-width // 100))
        assert torch.equal(named[f"{module}.weight_scale_inv"], scale)


def test_checkpoints_that_contradict_their_config_are_refused(tmp_path):
    quantization = {"quant_method": "fp8"}
    tensors = everything(quantization)
    name = "model.layers.1.mlp.up_proj"
    lacking = {k: v for k, v in tensors.items() if k != f"{name}.weight_scale"}
    with pytest.raises(PlanError, match=f"lacks the tensor {name}.weight_scale; is it complete"):
        compile_plan(stored(tmp_path / "a", lacking, quantization), **LIMITS)
    wide = tensors | {f"{name}.weight": tensors[f"{name}.weight"].float()}
    with pytest.raises(
        PlanError, match=rf"{name}.weight of .* is float32, its quantization_config implies float8"
    ):
        compile_plan(stored(tmp_path / "b", wide, quantization), **LIMITS)
    ignoring = {**quantization, "ignored_layers": ["up_proj"]}
    with pytest.raises(PlanError, match=r"is float8_e4m3fn, its quantization_config implies no float8"):
        compile_plan(stored(tmp_path / "c", tensors, ignoring), **LIMITS)
    vector = tensors | {f"{name}.weight_scale": torch.ones(256)}
    with pytest.raises(PlanError, match=rf"{name}.weight_scale of .* is \[256\], the config implies \[1\]"):
        compile_plan(stored(tmp_path / "d", vector, quantization), **LIMITS)
