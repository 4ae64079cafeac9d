"""The device that a plan is chosen for steers choices and floors, and never where the plan runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.inspect.analysis import launch_costs
from makeready.graphs.plan import artifact
from makeready.graphs.plan.devices import DEVICES, chosen_for_another, device_named, devices_of
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.plan.spec import Bucket
from makeready.graphs.plan.targets import TARGETS, find_target, target_of
from makeready.graphs.planner.compile import compile_plan
from makeready.graphs.planner.cost import op_cost
from makeready.kernels.gemm import linear_cost, linear_fp8_tiling
from makeready.kernels.gemm.linear import linear
from makeready.kernels.gemm.linear_tiling import Product
from makeready.kernels.spec import TensorSpec

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


@pytest.mark.parametrize(
    ("gpu", "device"),  # as nvidia-smi lists them
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H100 NVL", "h100_nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA H20-3e", "h20_3e"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100_40gb"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx_pro_6000"),
        ("NVIDIA GeForce RTX 5090", "rtx_5090"),
        ("NVIDIA L40S", None),
    ],
)
def test_names_of_the_driver(gpu, device):
    found = device_named(gpu)
    assert (found.name if found else None) == device


def test_every_target_has_a_device_with_a_rate_for_what_it_multiplies():
    assert devices_of("sm_90a")[0].name == "h200"
    for target in TARGETS.values():
        assert target.device == devices_of(target.name)[0]
        for device in devices_of(target.name):
            known = {"float32", "bfloat16", "float16", "float8_e4m3fn", "int8"}
            assert set(device.flops) == (known if target.is_cuda else known | {"uint8"})  # GGUF's blocks
            assert device.bandwidth > 0
            assert (device.multiprocessors > 0) == (device.memory > 0) == target.is_cuda
    assert set(DEVICES) == {d.name for target in TARGETS for d in devices_of(target)}


def test_a_device_of_another_target_is_refused_by_name():
    with pytest.raises(PlanError, match=r"device=h100 is not known for target cpu.*device of target=sm_90a"):
        compile_plan(DummyCheckpoint(dict(CONFIG), None, 0), target="cpu", device="h100")
    with pytest.raises(PlanError, match="its devices are h200, h100,"):
        find_target("sm_90a", "h300")


def test_costs_by_hand():
    operands = {"x": TensorSpec((1, 4096), "bfloat16"), "weight": TensorSpec((4096, 4096), "bfloat16")}
    result = [TensorSpec((1, 4096), "bfloat16")]
    nbytes = 2 * (4096 * 4096 + 2 * 4096)
    for name, bandwidth in (("h200", 4.5e12), ("h100", 3.0e12)):
        target = find_target("sm_90a", name)
        cost = op_cost(linear, operands, result, {}, Bucket("decode", 1, 1), 0, target)
        assert cost.seconds == pytest.approx(nbytes / bandwidth + target.launch_seconds)


def test_cost_models_of_kernels_go_by_the_device():
    """A product that waits for memory alone takes as much longer as the bandwidth is lower; one that computes
    alone, as the rate is."""
    for model, product in (
        (linear_cost, Product(1, 65536, 8192, 2, True, True, True, True, 132, 232448)),
        (linear_fp8_tiling, linear_fp8_tiling.Product(1, 65536, 8192, 2, False, True, True, 132, 232448)),
    ):
        fast, slow = (replace(product, bandwidth=b) for b in (4.5e11, 3.0e11))
        way = model.tilings(fast)[0]
        assert model.seconds(slow, way) / model.seconds(fast, way) == pytest.approx(1.5, rel=0.01)
        large = replace(product, T=8192, N=8192)
        fast, slow = (replace(large, rate=r) for r in (4e13, 2e13))
        way = model.tilings(fast)[0]
        assert model.seconds(slow, way) / model.seconds(fast, way) == pytest.approx(2.0, rel=0.05)


def test_plans_name_their_device_and_are_read_without(tmp_path):
    plan = compile_plan(DummyCheckpoint(dict(CONFIG), None, 0), target="cpu", max_rows=2)
    assert plan.device == "cpu"
    assert artifact.load(plan.save(tmp_path / "plan")).device == "cpu"
    for device in ("", "one of a later version"):
        other = artifact.load(replace(plan, device=device).save(tmp_path / "other"))
        assert target_of(other) == find_target("cpu")
        assert launch_costs(other, other.buckets[0], 16)
        assert "target" in other.as_text()


def test_what_is_said_of_another_device():
    plan: Plan = compile_plan(DummyCheckpoint(dict(CONFIG), None, 0), target="cpu", max_rows=2)
    plan = replace(plan, target="sm_90a", device="h100")
    assert target_of(plan).bandwidth == 3.0e12
    assert chosen_for_another(plan, "NVIDIA H100 80GB HBM3") is None
    assert "device=h200" in str(chosen_for_another(plan, "NVIDIA H200"))
    assert "not known here" in str(chosen_for_another(plan, "NVIDIA L40S"))
