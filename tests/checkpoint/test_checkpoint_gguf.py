"""Whole GGUF files: written with the gguf package from transformers' weights, read back in its terms."""

import gguf
import numpy as np
import pytest
import torch
from checkpoint_files import (
    LLAMA,
    add_tensors,
    finish_gguf,
    interleave,
    smollm2,
    smollm2_reader,
    start_gguf,
    state_dict,
    write_gguf,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from makeready.graphs.checkpoint import CheckpointError, open_checkpoint

QWEN2 = {**LLAMA, "model_type": "qwen2", "head_dim": 24, "num_attention_heads": 4}
QWEN3 = {**LLAMA, "model_type": "qwen3"}
MANY = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    writer = start_gguf(path, "llama", LLAMA)
    writer.add_token_list(["a", "é", "▁the"])
    writer.add_eos_token_id(2)
    add_tensors(writer, "llama", LLAMA, state_dict(LLAMA))
    return finish_gguf(writer)


@pytest.mark.parametrize(
    ("arch", "config"),
    [
        ("llama", LLAMA),
        ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("qwen2", QWEN2),
        ("qwen2", {**QWEN2, "tie_word_embeddings": True}),
        ("qwen3", QWEN3),
    ],
)
def test_weights_and_config_come_back(tmp_path, arch, config):
    state = state_dict(config)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", arch, config, state))
    assert set(checkpoint.tensors) == set(state)
    for name, tensor in state.items():
        info = checkpoint.tensors[name]
        assert (info.name, info.dtype, info.shape) == (name, "float32", tuple(tensor.shape))
        assert np.array_equal(checkpoint.read(name), tensor.numpy()), name
        part = slice(1, max(2, len(tensor) - 3))
        assert np.array_equal(checkpoint.read(name, part), tensor[part].numpy()), name
    truth = AutoConfig.for_model(**config)
    for field in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *(
            "num_key_value_heads",
            "rms_norm_eps",
            "max_position_embeddings",
            "tie_word_embeddings",
            "hidden_act",
        ),
        *("rope_parameters", "model_type"),
    ):
        assert checkpoint.config[field] == getattr(truth, field), field
    assert checkpoint.config["head_dim"] == config["head_dim"]
    if arch == "llama":
        assert checkpoint.config["attention_bias"] == truth.attention_bias
        assert checkpoint.config["mlp_bias"] == truth.mlp_bias


def test_half_precision_and_blocks_with_row_order(tmp_path):
    """bfloat16 comes as bits, float16 as is, and quantized q rows are put back in order."""
    state = state_dict(LLAMA)
    writer = start_gguf(tmp_path / "m.gguf", "llama", LLAMA)
    kinds = {"q_proj": gguf.GGMLQuantizationType.Q8_0, "gate": gguf.GGMLQuantizationType.BF16}
    q_name, gate = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    k_name = "model.layers.0.self_attn.k_proj.weight"
    special = {name: state.pop(name) for name in (q_name, gate, k_name)}
    add_tensors(writer, "llama", LLAMA, state)
    quantized = gguf.quants.quantize(interleave(special[q_name].numpy(), 6), kinds["q_proj"])
    writer.add_tensor("blk.0.attn_q.weight", quantized, raw_dtype=kinds["q_proj"])
    bits = special[gate].bfloat16().view(torch.uint16).numpy()
    writer.add_tensor("blk.0.ffn_gate.weight", bits.view(np.uint8), raw_dtype=kinds["gate"])
    writer.add_tensor("blk.0.attn_k.weight", interleave(special[k_name].half().numpy(), 2))
    checkpoint = open_checkpoint(finish_gguf(writer))
    assert [checkpoint.tensors[n].dtype for n in (q_name, gate, k_name)] == ["q8_0", "bfloat16", "float16"]
    assert np.array_equal(checkpoint.read(gate), bits)
    assert np.array_equal(checkpoint.read(k_name), special[k_name].half().numpy())
    plain = gguf.quants.dequantize(
        gguf.quants.quantize(special[q_name].numpy(), kinds["q_proj"]), kinds["q_proj"]
    )
    assert np.array_equal(checkpoint.read(q_name), plain)
    out = np.empty((10, 96), np.float32)
    checkpoint.read_into(q_name, out, slice(11, 21))
    assert np.array_equal(out, plain[11:21])
    with pytest.raises(CheckpointError, match="contiguous float32"):
        checkpoint.read_into(q_name, out[:, ::2], slice(11, 21))


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize(
    ("head_dim", "factor", "high", "length"),
    [
        (64, 32.0, 4.0, 8192),
        (128, 8.0, 4.0, 8192),
        (128, 4.0, 2.0, 4096),
        (80, 2.5, 8.0, 2048),
        (16, 8.0, 4.0, 8192),
    ],
)
def test_llama3_scaling_is_recovered_from_rope_freqs(tmp_path, theta, head_dim, factor, high, length):
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high}
    rope |= {"rope_theta": theta, "original_max_position_embeddings": length}
    config = {**LLAMA, "head_dim": head_dim, "max_position_embeddings": 131072}
    scaled = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**config, rope_parameters=dict(rope)), "cpu")[0]
    plain = 1 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    writer = start_gguf(tmp_path / "m.gguf", "llama", config)
    writer.add_rope_freq_base(theta)
    add_tensors(writer, "llama", config, state_dict(config))
    writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
    checkpoint = open_checkpoint(finish_gguf(writer))
    found = checkpoint.config["rope_parameters"]
    again = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**config, rope_parameters=dict(found)), "cpu")[0]
    torch.testing.assert_close(again, scaled, rtol=2e-4, atol=0)
    if high == 4.0:
        assert found == rope
    assert "rope_freqs.weight" not in checkpoint.tensors


def test_other_rope_factors_are_refused(tmp_path):
    writer = start_gguf(tmp_path / "m.gguf", "llama", LLAMA)
    add_tensors(writer, "llama", LLAMA, state_dict(LLAMA))
    writer.add_tensor("rope_freqs.weight", np.array([1, 3, 2, 5, 4, 7, 6, 8] * 2, np.float32))
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight.*not Llama 3"):
        open_checkpoint(finish_gguf(writer))


def test_yarn_linear_window_and_end_tokens(tmp_path):
    def written(name, **extra):
        writer = start_gguf(tmp_path / name, "llama", LLAMA)
        for method, value in extra.items():
            getattr(writer, f"add_{method}")(value)
        writer.add_tensor("token_embd.weight", np.zeros((97, 96), np.float32))
        return open_checkpoint(finish_gguf(writer))

    yarn = written(
        "yarn.gguf",
        rope_scaling_type=gguf.RopeScalingType.YARN,
        rope_scaling_factor=4.0,
        rope_scaling_orig_ctx_len=64,
        eos_token_id=2,
        eot_token_id=32,
        bos_token_id=1,
        pad_token_id=0,
    )
    assert yarn.config["rope_parameters"] == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    assert yarn.generation_config == {"bos_token_id": 1, "eos_token_id": [2, 32], "pad_token_id": 0}
    assert yarn.config["eos_token_id"] == [2, 32]
    linear = written("linear.gguf", rope_scaling_type=gguf.RopeScalingType.LINEAR, rope_scaling_factor=2.0)
    assert linear.config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    assert linear.config["tie_word_embeddings"] is True
    window = written("window.gguf", sliding_window=128)
    assert (window.config["model_type"], window.config["sliding_window"]) == ("mistral", 128)
    with pytest.raises(CheckpointError, match=r"rope\.scaling\.type 'longrope'"):
        written("long.gguf", rope_scaling_type=gguf.RopeScalingType.LONGROPE)
    with pytest.raises(CheckpointError, match=r"lacks llama\.expert_used_count"):
        written("moe.gguf", expert_count=8)
    with pytest.raises(CheckpointError, match=r"dimension_count=8 differs from the head size 32"):
        written("partial.gguf", rope_dimension_count=8)


def test_metadata_of_every_type(tmp_path):
    writer = start_gguf(tmp_path / "m.gguf", "llama", LLAMA)
    scalars = {"uint8": 7, "int8": -7, "uint16": 65535, "int16": -3, "int32": -(2**31), "uint64": 2**63}
    scalars |= {"int64": -(2**40), "float32": 0.5, "float64": 0.1, "bool": True, "string": "é\n"}
    for kind, value in scalars.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    arrays = {"ints": [1, -2, 3], "floats": [0.5, 1.5], "strings": ["", "a", "日本"], "bools": [True, False]}
    arrays["nested"] = [["a", "b"], ["c"]]
    for name, value in arrays.items():
        writer.add_array(f"x.{name}", value)
    writer.add_tensor("token_embd.weight", np.zeros((97, 96), np.float32))
    metadata = open_checkpoint(finish_gguf(writer)).metadata
    for name, value in (scalars | arrays).items():
        assert metadata[f"x.{name}"] == value, name
    assert metadata.get("missing") is None
    assert set(dict(metadata)) == set(metadata)
    assert dict(metadata)["general.architecture"] == "llama"


def test_smollm2_tokenizer_metadata():
    checkpoint = open_checkpoint(smollm2())
    fields = smollm2_reader().fields
    for key in ("tokenizer.ggml.token_type", "tokenizer.chat_template", "tokenizer.ggml.add_bos_token"):
        assert checkpoint.metadata[key] == fields[key].contents()
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        found, field = checkpoint.metadata[key], fields[key]
        assert len(found) == len(field.data)
        for place in (0, 1, 777, len(found) - 1):
            assert found[place].encode() == field.parts[field.data[place]].tobytes()
    assert checkpoint.generation_config["eos_token_id"] == 2
    assert checkpoint.tokenizer_files() == {"gguf": smollm2()}


def patched(source, target, at, new):
    data = bytearray(source.read_bytes())
    data[at : at + len(new)] = new
    target.write_bytes(data)
    return target


def test_versions(tmp_path, llama_file):
    name = "model.norm.weight"
    two = open_checkpoint(patched(llama_file, tmp_path / "2.gguf", 4, (2).to_bytes(4, "little")))
    assert np.array_equal(two.read(name), open_checkpoint(llama_file).read(name))
    for number, message in (
        (b"\1\0\0\0", "version 1"),
        (b"\0\0\0\3", "big-endian"),
        (b"\7\0\0\0", "version 7"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(patched(llama_file, tmp_path / "v.gguf", 4, number))


def test_unsupported_files_name_what_is_supported(tmp_path):
    with pytest.raises(
        CheckpointError,
        match=r"'gemma2' is not supported; use one of deepseek, deepseek2, gemma3, llama, qwen2, qwen2moe, qwen3, qw",
    ):
        open_checkpoint(finish_gguf(start_gguf(tmp_path / "a.gguf", "gemma2", LLAMA)))
    writer = start_gguf(tmp_path / "b.gguf", "llama", LLAMA)
    raw = np.zeros((4, 292), np.uint8)
    writer.add_tensor("token_embd.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q8_K)
    with pytest.raises(CheckpointError, match=r"type q8_k; use one of f32.*q4_k"):
        open_checkpoint(finish_gguf(writer))
    writer = start_gguf(tmp_path / "c.gguf", "llama", LLAMA)
    writer.add_tensor("blk.0.ffn_gate_inp.weight", np.zeros((4, 4), np.float32))
    with pytest.raises(CheckpointError, match="ffn_gate_inp"):
        open_checkpoint(finish_gguf(writer))
    (tmp_path / "d.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is empty"):
        open_checkpoint(tmp_path / "d.gguf")
    (tmp_path / "e.gguf").write_bytes(b"not a gguf file at all")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        open_checkpoint(tmp_path / "e.gguf")


@MANY
@given(data=st.data())
def test_truncation_anywhere_is_a_checkpoint_error(tmp_path, llama_file, data):
    whole = llama_file.read_bytes()
    # The writer pads the last tensor; cutting padding off loses nothing.
    tensors = gguf.GGUFReader(llama_file).tensors
    header, end = min(t.data_offset for t in tensors), max(t.data_offset + t.n_bytes for t in tensors)
    cut = data.draw(st.one_of(st.integers(0, int(header)), st.integers(0, int(end) - 1)))
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:cut])
    with pytest.raises(CheckpointError, match=r"cut\.gguf"):
        open_checkpoint(path)


@MANY
@given(data=st.data())
def test_corruption_anywhere_reads_or_is_a_checkpoint_error(tmp_path, llama_file, data):
    whole = bytearray(llama_file.read_bytes())
    header = int(min(t.data_offset for t in gguf.GGUFReader(llama_file).tensors))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header - 1))
        whole[at] = data.draw(st.sampled_from([0, 1, 9, 0x7F, 0x80, 0xFF, whole[at] ^ 1]))
    path = tmp_path / "flip.gguf"
    path.write_bytes(whole)
    try:
        checkpoint = open_checkpoint(path)
        for name, info in checkpoint.tensors.items():
            assert checkpoint.read(name).shape == info.shape
        assert dict(checkpoint.metadata)
    except CheckpointError as error:
        message = str(error)
    else:
        message = str(path)
    assert str(path) in message
