"""8-bit models on the GPU: weights as the CPU quantizes them, steps as the CPU interprets the same plan.

python -m pytest tests/gpu/test_gpu_quantized.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from checkpoint_files import add_tensors, finish_gguf, start_gguf
from safetensors.torch import load_file
from scripted_steps import SMALL, Played, play, write_checkpoint
from smoothed import Smoothed
from stored_gguf import IQ4, MIXED, Types, Writer

from makeready.graphs.checkpoint.base import Checkpoint, open_checkpoint
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.executable.cpu.executable import CpuExecutable
from makeready.graphs.executable.cpu.weights import load_weights
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.executable.load import load_executable
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.targets import TARGETS
from makeready.graphs.planner.compile import compile_plan
from makeready.graphs.quant import loading
from makeready.graphs.quant.scheme import ON_LOAD

REQUEST = {
    "max_rows": 8,
    "max_tokens": 256,
    "context_len": 256,
    "page_size": 64,
    "max_decode_buckets": 2,
    "max_extend_buckets": 3,
}
# Largest ‖a - b‖ / ‖b‖ of a row's logits, by layers. Two ways of rounding bf16 move some activations to the
# next 8-bit number, a sixteenth away, and what follows moves more: interpreting these plans with bf16 and
# with float32 between kernels differs by 0.04 after one layer and by 0.08 after three, as much as 8-bit
# numbers differ from wide ones. A scale in a wrong place gives 0.3 and more.
TOLERANCE = {1: 0.06, 3: 0.12}

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128, "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 8, "group_size": 128, "sym": False, "desc_act": False}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"},
        }
    },
}
INTEGERS = {"num_bits": 8, "type": "int", "symmetric": True}
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**INTEGERS, "strategy": "channel"},
            "input_activations": {**INTEGERS, "strategy": "token", "dynamic": True},
        }
    },
}
MXFP4 = {
    "quant_method": "compressed-tensors",
    "format": "mxfp4-pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "float",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
            },
        }
    },
}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "ignore": ["lm_head"]}
SEVERAL = {
    "quant_method": "modelopt",
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {
        "model.layers.0.self_attn": {"quant_algo": "FP8"},
        "model.layers.1.self_attn": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        **{
            f"model.layers.{layer}.mlp": {"quant_algo": "W4A16_NVFP4", "group_size": 16} for layer in range(3)
        },
    },
}
OF_MODELOPT = {"quant_method": "modelopt", "ignore": ["lm_head"], "group_size": 32}
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp8": ({}, {"quant": "fp8"}),
    "fp8-one-layer": ({"num_hidden_layers": 1}, {"quant": "fp8"}),
    "fp8_block": ({}, {"quant": "fp8_block"}),
    "fp8_block-one-layer": ({"num_hidden_layers": 1}, {"quant": "fp8_block"}),
    "fp8-cache": ({}, {"quant": "fp8", "kv_dtype": "fp8_e4m3"}),
    "stored-blocks": ({"quantization_config": BLOCKS}, {}),
    "stored-blocks-beyond": (
        {"quantization_config": BLOCKS, "intermediate_size": 456, "hidden_size": 288},
        {},
    ),
    "stored-static": ({"quantization_config": STATIC}, {}),
    "int8": ({}, {"quant": "int8"}),
    "int8-one-layer": ({"num_hidden_layers": 1}, {"quant": "int8"}),
    "stored-int8": ({"quantization_config": INT8}, {}),
    "int4": ({}, {"quant": "int4"}),
    "mxfp4": ({}, {"quant": "mxfp4"}),
    "nvfp4": ({}, {"quant": "nvfp4"}),
    "stored-nvfp4": ({"quantization_config": NVFP4, "intermediate_size": 464}, {}),
    "stored-mxfp4": ({"quantization_config": MXFP4, "intermediate_size": 480}, {}),
    "awq": ({"quantization_config": AWQ}, {}),
    "awq-beyond": ({"quantization_config": {**AWQ, "group_size": 32}, "intermediate_size": 480}, {}),
    "gptq-8": ({"quantization_config": GPTQ}, {}),
    "packed": ({"quantization_config": PACKED}, {}),
    "stored-gguf": ({}, {"quant": "stored"}),
    "stored-gguf-fp16": ({}, {"quant": "stored", "activation_dtype": "float16"}),
    "stored-gguf-iq4": ({}, {"quant": "stored"}),
    "stored-gguf-one-layer": ({"num_hidden_layers": 1}, {"quant": "stored"}),
    "several-of-modelopt": ({"quantization_config": SEVERAL}, {}),
    "awq-of-modelopt": ({"quantization_config": OF_MODELOPT | {"quant_algo": "W4A16_AWQ"}}, {}),
    "smoothquant": ({"quantization_config": OF_MODELOPT | {"quant_algo": "W8A8_SQ_PER_CHANNEL"}}, {}),
}


def target() -> str:
    major, minor = torch.cuda.get_device_capability()
    found = next((t for t in TARGETS.values() if t.arch == 10 * major + minor), None)
    if found is None or "fp8" not in found.features:
        pytest.skip(f"no target with 8-bit floats for compute capability {major}.{minor}")
    return found.name


def checkpoint_of(name: str, folder: Path) -> Checkpoint:
    """Files where loading quantizes, a dummy of what a checkpoint stores quantized."""
    config, asked = CASES[name]
    if "quantization_config" in config:
        return DummyCheckpoint(SMALL | config, None, 0)
    written = write_checkpoint(folder, SMALL | config)
    if asked.get("quant") != "stored":
        return written
    return in_blocks(folder, SMALL | config, IQ4 if name.endswith("iq4") else MIXED)


def in_blocks(folder: Path, config: dict[str, Any], kinds: dict[str, Types]) -> Checkpoint:
    """The checkpoint in ``folder`` as a GGUF file of several block types."""
    writer = Writer(start_gguf(folder / "m.gguf", "qwen3", config), kinds)
    writer.writer.add_rope_freq_base(config["rope_theta"])
    add_tensors(writer, "qwen3", config, load_file(folder / "model.safetensors"))  # pyright: ignore[reportArgumentType]
    return open_checkpoint(finish_gguf(writer.writer))


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> tuple[Plan, Checkpoint]:
    checkpoint = checkpoint_of(request.param, tmp_path_factory.mktemp(request.param))
    return compile_plan(checkpoint, target=target(), **REQUEST, **CASES[request.param][1]), checkpoint


@pytest.fixture
def executable(case):
    loaded = load_executable(*case, kv_bytes=2**30)
    assert isinstance(loaded, CudaExecutable)
    yield loaded
    loaded.close()


def on_device(executable: CudaExecutable) -> np.ndarray:
    """The weights region."""
    region = np.empty(executable.plan.memory.weights, np.uint8)
    driver, stream = executable._driver, executable._stream
    driver.to_host(region.ctypes.data, executable._regions.weights, region.nbytes, stream)
    driver.synchronize(stream)
    return region


def check_weights(executable: CudaExecutable, checkpoint: Checkpoint) -> None:
    region = on_device(executable)
    expected = load_weights(executable.plan, checkpoint, lambda done, total: None)
    for weight in executable.plan.weights:
        made = region[weight.offset : weight.offset + weight.nbytes]
        wanted = expected[weight.param.name].contiguous().view(torch.uint8).numpy().reshape(-1)
        wrong = int((made != wanted).sum())
        assert wrong == 0, f"{weight.param.name}: {wrong} of {made.size} bytes differ"


def same(first: list[Played], second: list[Played]) -> None:
    for at, (one, other) in enumerate(zip(first, second, strict=True)):
        assert np.isfinite(one.logits).all(), f"step {at}"
        assert np.array_equal(one.logits, other.logits), f"step {at}: logits differ"
        assert np.array_equal(one.tokens, other.tokens), f"step {at}: tokens differ"


def test_weights_are_the_cpus(executable, case):
    check_weights(executable, case[1])


def test_steps_are_the_cpus(executable, case):
    plan, checkpoint = case
    interpreted = play(CpuExecutable(plan, checkpoint, pages=executable.pages, interpret=True))
    tolerance = TOLERANCE[plan.config["num_hidden_layers"]]
    worst = 0.0
    for at, (ours, theirs) in enumerate(zip(play(executable), interpreted, strict=True)):
        for row, (mine, want) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
            error = float(np.linalg.norm(mine - want) / np.linalg.norm(want))
            worst = max(worst, error)
            assert error <= tolerance, f"step {at}, row {row}: logits are off by {error:.2e}"
            assert ours.tokens[row] == mine.argmax()
    print(f"\nlogits are off by at most {worst:.3f}")


def test_poisoned_and_repeated_steps_are_identical(executable):
    first = play(executable)
    same(play(executable, poison=True), first)
    same(play(executable), first)


def test_derivations_of_two_operands_and_two_kernels_give_the_cpus_bytes(monkeypatch):
    """One operand transposed on the host, a value between the kernels in the arena, runs of a few rows."""
    monkeypatch.setitem(ON_LOAD, "smoothed", Smoothed())
    monkeypatch.setattr(loading, "CHUNK_BYTES", 300_000)
    checkpoint = DummyCheckpoint(SMALL | {"num_hidden_layers": 2}, None, 0)
    plan = compile_plan(checkpoint, target=target(), quant="smoothed", **REQUEST)
    executable = CudaExecutable(plan, checkpoint)
    check_weights(executable, checkpoint)
    executable.close()


@pytest.mark.parametrize("quant", ["fp8", "fp8_block", "int8"])
def test_many_chunks_at_once_give_the_cpus_bytes(quant, tmp_path, monkeypatch):
    """Small chunks of matrices that are no multiple of them, from threads that share few slots."""
    monkeypatch.setattr(loading, "CHUNK_BYTES", 300_000)
    monkeypatch.setattr(loading, "LOADERS", 3)
    config = SMALL | {
        "num_hidden_layers": 2,
        "hidden_size": 1024,
        "intermediate_size": 1408,
        "vocab_size": 64,
    }
    checkpoint = write_checkpoint(tmp_path, config)
    plan = compile_plan(checkpoint, target=target(), quant=quant, **REQUEST)
    assert plan.loading is not None
    assert sum(len(c.runs) for c in plan.loading.conversions) > 50
    for _ in range(3):
        executable = CudaExecutable(plan, checkpoint, kv_bytes=2**30)
        check_weights(executable, checkpoint)
        executable.close()
