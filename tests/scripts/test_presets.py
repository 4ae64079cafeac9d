"""The models of conf/model: complete enough to plan for, and as large as their makers say."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import save_file
from scripts_in_process import CONF, script

from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.planner.compile import Traced, compile_plan, trace_checkpoint
from makeready.graphs.planner.request import Request

# Parameters as the model cards and their safetensors metadata count them (tied embeddings once).
PARAMETERS = {
    "smollm2_135m": 134_515_008,
    "qwen2_5_0_5b": 494_032_768,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "llama3_1_8b": 8_030_261_248,
    "mistral_7b": 7_248_023_552,
    "gemma3_270m": 268_098_176,
    "qwen_7b": 7_721_324_544,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen2_57b_a14b": 57_408_658_944,
    "deepseek_moe_16b": 16_375_728_128,
    "mixtral_8x7b": 46_702_792_704,
    "deepseek_v2_lite": 15_706_484_224,
    "deepseek_v2": 235_741_434_880,
    "gpt_oss_20b": 20_914_757_184,
    "gpt_oss_120b": 116_829_156_672,
    "deepseek_v3": 671_026_419_200,  # without the layer that predicts further tokens
    "qwen3_next_80b_a3b": 79_674_391_296,  # and so; 81,324,862,720 with it
    "qwen3_5_9b": 8_953_803_264,  # without what sees
    "qwen3_5_35b_a3b": 34_660_610_688,
}
CONTEXT = {
    "smollm2_135m": 8192,
    "qwen2_5_0_5b": 32768,
    "qwen3_0_6b": 40960,
    "qwen3_8b": 40960,
    "llama3_1_8b": 131072,
    "mistral_7b": 32768,
    "gemma3_270m": 32768,
    "qwen_7b": 32768,
    "qwen3_30b_a3b": 40960,
    "qwen2_57b_a14b": 32768,
    "deepseek_moe_16b": 4096,
    "mixtral_8x7b": 32768,
    "deepseek_v2_lite": 163840,
    "deepseek_v2": 163840,
    "gpt_oss_20b": 131072,
    "gpt_oss_120b": 131072,
    "deepseek_v3": 163840,
    "qwen3_next_80b_a3b": 262144,
    "qwen3_5_9b": 262144,
    "qwen3_5_35b_a3b": 262144,
}


def parameters(traced: Traced) -> int:
    """Numbers of every checkpoint tensor that the model reads, but for scales of weights of few bits."""
    elements: dict[str, int] = {}
    for param in traced.programs["decode"].params.values():
        for piece in (piece for operand in param.operands for piece in operand.pieces):
            size = math.prod(stop for _, stop in piece.box) * math.prod(each.count for each in piece.each)
            elements[piece.source] = max(size, elements.get(piece.source, 0))
    in_each = {"weight_blocks": 2}  # numbers of 4 bits in a byte
    return sum(
        n * in_each.get(source.rpartition(".")[2], 1)
        for source, n in elements.items()
        if "_scale" not in source
    )


LARGE = {"deepseek_v2", "deepseek_v3", "gpt_oss_120b", "qwen3_next_80b_a3b"}  # seconds each


def test_every_preset_is_checked_here():
    found = {path.stem for path in (CONF / "model").glob("*.yaml")}
    assert {name for name in found if not name.endswith(("_eagle", "_eagle3"))} == set(PARAMETERS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in PARAMETERS]
)
def test_presets_have_the_size_that_their_makers_give(name):
    config = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
    traced = trace_checkpoint(open_checkpoint("dummy", config=config), Request(max_rows=2))
    assert parameters(traced) == PARAMETERS[name]
    assert traced.limits.context_len == CONTEXT[name]
    assert traced.options.weight_dtype == "bfloat16"


def test_a_preset_can_be_changed_on_the_command_line(capsys):
    options = ("checkpoint=dummy", "model=qwen3_8b", "plan.max_rows=1", "plan.max_tokens=16")
    assert script("compile")(*options, "model.num_hidden_layers=2", "plan.traffic.decode_rows={1: 2}") == 0
    printed = capsys.readouterr()
    assert "Qwen3ForCausalLM" in printed.out
    assert "decode     1 buckets: 1\n" in printed.out
    assert all(f" s  {stage}\n" in printed.err for stage in ("trace", "lower", "compile"))
    assert script("compile")(*options, "model.num_hidden_layers=2", "plan.traffic.decode_rows={1: 2}") == 0
    assert "from the local cache" in capsys.readouterr().out


def test_a_script_warns_in_a_sentence(tmp_path):
    """Once, though the plan is compiled and loaded, and without the place in the code."""
    preset = yaml.safe_load((CONF / "model" / "smollm2_135m.yaml").read_text())
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = preset | small | {"num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 64}
    dummy = open_checkpoint("dummy", config=config)
    compile_plan(dummy, max_rows=1)
    tensors = {name: torch.zeros(info.shape) for name, info in dummy.tensors.items()}
    save_file({**tensors, "visual.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, CONF.parent / "scripts" / "compile.py", f"checkpoint={tmp_path}"]
    done = subprocess.run(
        [*command, "plan.max_rows=1", f"output={tmp_path / 'plan'}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "visual.weight" in line]
    assert lines == [
        f"warning: {tmp_path} has 1 tensor that the model does not read: visual.weight; if they belong to it, "
        "config.json is another checkpoint's"
    ]
