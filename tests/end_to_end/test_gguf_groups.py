"""GGUF's blocks as a GPU's plan has them, on the CPU: against transformers' model of the numbers they hold.

The scheme of GPUs is put in the place of the CPU's and computed in fp32; a plan for sm_90a is interpreted, too, with
fp16 between its launches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from checkpoint_files import LLAMA, add_tensors, finish_gguf, start_gguf, state_dict
from latent_gguf import latent_gguf
from moe_models import gguf_file
from reference import Recorder, compare, expected, make_model, poison_every_step, prompt_of
from stored_gguf import IQ4, MIXED, Writer
from test_gguf_stored import rounding

from makeready.engine import llm as offline
from makeready.engine.llm import LLM
from makeready.graphs.executable.cpu.executable import CpuExecutable
from makeready.graphs.executable.load import kv_pages
from makeready.graphs.planner import compile as compiler
from makeready.graphs.quant import gguf as stored

Types = gguf.GGMLQuantizationType
PLAN: dict[str, Any] = {"max_rows": 4, "max_tokens": 24, "page_size": 8, "quant": "stored"}
CONFIG = LLAMA | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "vocab_size": 131,
    "tie_word_embeddings": False,
}
ROUNDED = 2e-3  # of logits: fp16 scales and offsets


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """``quant=stored`` on the CPU as on a GPU."""
    found = stored.stored_blocks
    monkeypatch.setattr(stored, "stored_blocks", lambda checkpoint, packed: found(checkpoint, packed=True))


@pytest.fixture
def interpreted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a plan for a GPU, which is interpreted in the place of being run, and has no kernels."""

    def load(plan: Any, checkpoint: Any, **_: Any) -> CpuExecutable:
        return CpuExecutable(plan, checkpoint, pages=kv_pages(plan, None), interpret=True)

    monkeypatch.setattr(offline, "load_executable", load)
    monkeypatch.setenv("MAKEREADY_CACHE", str(tmp_path / "plans"))  # not among whole ones
    monkeypatch.setattr(compiler, "_with_kernels", lambda plan, *rest: plan)
    return {"target": "sm_90a", "page_size": 64, "activation_dtype": "float16", "max_decode_buckets": 1}


def llama(path: Path, kinds: dict[str, Types], **config: Any) -> tuple[Any, Path]:
    """A file, and transformers' model with its numbers."""
    said = CONFIG | config
    tensors = {
        name: x / 8 if x.dim() > 1 else 1 + x / 8
        for name, x in state_dict(said).items()
        if "inv" not in name and not (said["tie_word_embeddings"] and "lm_head" in name)
    }
    writer = Writer(start_gguf(path, "llama", said), kinds)
    # Rows of q and k as transformers has them: heads of two numbers lie alike in both orders.
    add_tensors(writer, "llama", said, tensors)  # pyright: ignore[reportArgumentType]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**said, eos_token_id=None)).eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, said["num_hidden_layers"])
    for name in tensors:
        values = writer.read.get(names.get_name(name, (".weight", ".bias")) or "")
        if values is not None:
            heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
            part = next((field for end, field in heads.items() if end in name), None)
            tensors[name] = torch.from_numpy(values if part is None else straight(values, said[part]))
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    return model, finish_gguf(writer.writer)


def straight(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order before llama.cpp's converter puts the halves of a head between each other."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def ops(llm: LLM) -> Counter[str]:
    return Counter(launch.op for launch in llm.plan.programs["decode"].launches)


def agree(llm: LLM, model: Any, tolerance: float, lengths: Sequence[int] = (30, 1, 9)) -> None:
    """Prompts alone, in chunks and beside others, with NaN in all that a step has not written itself."""
    poison_every_step(llm)
    prompts = [prompt_of(length, 131) for length in lengths]
    for prompt, ours in zip(prompts, Recorder(llm).generate(prompts, 4), strict=True):
        compare(ours, expected(model, prompt, 4), tolerance)


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("deterministic", [False, True])
def test_mixed_files(deterministic: bool, tmp_path: Path) -> None:
    model, path = llama(tmp_path / "m.gguf", MIXED)
    llm = LLM(path, **PLAN, deterministic=deterministic)
    agree(llm, model, ROUNDED)
    # q, k and v of the first layer are one product, q and k of the second; gate and up differ.
    assert ops(llm)["linear_int"] == 5 + 6 + 1
    assert (ops(llm)["embedding_int"], ops(llm)["linear"], ops(llm)["embedding"]) == (1, 0, 0)


@pytest.mark.usefixtures("packed")
def test_types_whose_scales_are_the_files(tmp_path: Path) -> None:
    """Nothing is rounded, and a head that is the embedding is stored once."""
    kinds = {
        "attn_q": Types.Q8_0,
        "attn_output": Types.Q5_0,
        "ffn_gate": Types.Q4_0,
        "token_embd": Types.Q8_0,
    }
    model, path = llama(tmp_path / "m.gguf", kinds, tie_word_embeddings=True)
    llm = LLM(path, **PLAN, weight_dtype="float32")
    agree(llm, model, 2e-4)
    names = [w.param.name for w in llm.plan.weights if w.param.spec.shape[0] == 131]
    assert len(names) == 1


@pytest.mark.usefixtures("packed")
def test_numbers_out_of_a_table(tmp_path: Path) -> None:
    model, path = llama(tmp_path / "m.gguf", IQ4)
    llm = LLM(path, **PLAN)
    agree(llm, model, 5e-3)
    assert (ops(llm)["linear_int"], ops(llm)["linear"], ops(llm)["embedding_int"]) == (2 * 5 + 1, 0, 1)


def test_numbers_out_of_a_table_on_the_cpu(tmp_path: Path) -> None:
    """As they are stored, activations rounded to 8 bits; of long prompts some are rounded the other way."""
    model, path = llama(tmp_path / "m.gguf", dict.fromkeys(IQ4, Types.IQ4_NL) | {"attn_v": Types.IQ4_XS})
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounding)
    llm = LLM(path, **PLAN)
    agree(llm, model, 1e-2, (1, 3, 2))
    assert (ops(llm)["linear_gguf"], ops(llm)["linear"], ops(llm)["embedding_gguf"]) == (2 * 4 + 1, 0, 1)


@pytest.mark.usefixtures("packed")
def test_experts(tmp_path: Path) -> None:
    config = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    model = make_model(tmp_path, "qwen3_moe", **config)
    path = gguf_file(tmp_path, "qwen3moe", Types.Q4_1)
    for layer in model.model.layers:
        for parameter in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            values = gguf.quants.dequantize(
                gguf.quants.quantize(parameter.detach().numpy(), Types.Q4_1), Types.Q4_1
            )
            parameter.data.copy_(parameter.new_tensor(values))
    llm = LLM(path, **PLAN, weight_dtype="float32")
    agree(llm, model, ROUNDED)
    assert (ops(llm)["grouped_silu_mul_int"], ops(llm)["grouped_linear_int"]) == (2, 2)


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("split", [False, True], ids=["one", "split"])
def test_latent_attention(split: bool, tmp_path: Path) -> None:
    """What makes keys and values of latents is widened by the reader, in one tensor or in two."""
    sizes = {
        "qk_nope_head_dim": 32,
        "kv_lora_rank": 64,
        "q_lora_rank": 32,
        "v_head_dim": 32,
        "hidden_size": 64,
    }
    sizes |= {
        "qk_rope_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    }
    sizes |= {"moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4}
    model = make_model(tmp_path, "deepseek_v3", num_attention_heads=4, **sizes)
    path = latent_gguf(tmp_path, split=split, quantized=Types.Q8_0)

    def rounded(values: np.ndarray) -> np.ndarray:
        return gguf.quants.dequantize(
            gguf.quants.quantize(np.ascontiguousarray(values), Types.Q8_0), Types.Q8_0
        )

    for layer in model.model.layers:
        for name, weight in layer.self_attn.named_parameters():
            if weight.dim() == 1:
                continue
            values = weight.detach().numpy()
            if name == "kv_b_proj.weight" and split:
                of_head = values.reshape(4, 64, 64)
                keys = rounded(of_head[:, :32].transpose(0, 2, 1)).transpose(0, 2, 1)
                values = np.concatenate((keys, rounded(of_head[:, 32:])), 1).reshape(values.shape)
            else:
                values = rounded(values)
            weight.data.copy_(weight.new_tensor(values))
    llm = LLM(path, **PLAN, weight_dtype="float32")
    agree(llm, model, 2e-4)
    assert ops(llm)["linear_int"] >= 2 * 3


def test_a_gpus_plan_interpreted(interpreted: dict[str, Any], tmp_path: Path) -> None:
    model, path = llama(tmp_path / "m.gguf", MIXED)
    llm = LLM(path, **{**PLAN, **interpreted})
    assert llm.plan.target == "sm_90a"
    recorder = Recorder(llm)
    for length in (30, 1):
        prompt = prompt_of(length, 131)
        (ours,) = recorder.generate([prompt], 4)
        compare(ours, expected(model, prompt, 4), 1e-2)
