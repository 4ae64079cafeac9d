"""The normal form of config.json against transformers' parsed configs, as releases 4 and 5 spell them."""

import json

import pytest
from checkpoint_files import LLAMA
from transformers import AutoConfig

from makeready.graphs.checkpoint import CheckpointError
from makeready.graphs.checkpoint.config import _TIED, normalise_config
from makeready.graphs.models.family import families

YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPES = {
    "default": None,
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 3.0},
    "llama3": LLAMA3,
    "yarn": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.25, "truncate": False},
}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
}
FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "hidden_act"),
)


def spelled_as_4(family, kind, key="rope_type"):
    scaling = ROPES[kind] and {key: kind, **ROPES[kind]}
    config = {**LLAMA, "model_type": family, **FAMILIES[family], "rope_theta": 5e5, "rope_scaling": scaling}
    config["transformers_version"] = "4.57.0"
    del config["architectures"]
    return config


def normal(config):
    return normalise_config(json.loads(json.dumps(config)))


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_equal_transformers(tmp_path, family, kind):
    old = spelled_as_4(family, kind)
    truth = AutoConfig.for_model(**json.loads(json.dumps(old)))
    truth.save_pretrained(tmp_path)  # the spelling of release 5
    new = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in new
    assert "rope_theta" not in new
    for found in (normal(old), normal(new), normal(spelled_as_4(family, kind, key="type"))):
        for field in FIELDS:
            assert found[field] == getattr(truth, field), field
        assert found["rope_parameters"] == truth.rope_parameters
        assert found["dtype"] == "float32"
        assert found["head_dim"] == (truth.head_dim if hasattr(truth, "head_dim") else 96 // 6)
        assert not {"torch_dtype", "rope_theta", "rope_scaling"} & set(found)
        if hasattr(truth, "layer_types"):
            assert found["layer_types"] == truth.layer_types
        assert normal(found) == found


# What is no field of transformers' config class: a bias that is part of the architecture, how norms store weights.
OWN = {
    ("qwen2", "attention_bias"),
    ("qwen2_moe", "attention_bias"),
    ("qwen3_moe", "max_window_layers"),
    ("gemma3_text", "norm_offset"),
    # Of DeepSeek's own modeling files, but for the last, which is of GGUF files.
    *((f"deepseek_{v}", field) for v in ("v2", "v3") for field in ("moe_layer_freq", "scoring_func")),
    ("deepseek_v2", "rope_interleave"),
    ("deepseek_v3", "topk_method"),
    *((f"deepseek_{v}", "kv_b_split") for v in ("v2", "v3")),
    ("gpt_oss", "swiglu_limit"),  # of the released files; transformers' experts have it fixed
}
ELSEWHERE = ("qwen", "deepseek")  # not in transformers
DEFAULTS = {f.model_type: f.defaults for f in families().values() if f.model_type not in ELSEWHERE}


@pytest.mark.parametrize("family", DEFAULTS)
def test_defaults_are_those_of_transformers(family):
    truth = AutoConfig.for_model(family)
    for field, value in DEFAULTS[family].items():
        if (family, field) in OWN:
            continue
        if field == "sliding_window" and family.startswith("qwen"):
            truth = AutoConfig.for_model(family, use_sliding_window=True)
        assert getattr(truth, field) == value, field


@pytest.mark.parametrize("family", _TIED)
def test_heads_are_tied_where_transformers_ties_them(family):
    bare = {"model_type": family, "vocab_size": 10, "hidden_size": 64, "intermediate_size": 96}
    bare |= {"num_hidden_layers": 3, "num_attention_heads": 32, "max_position_embeddings": 64}
    found = normal(bare)
    assert found["tie_word_embeddings"] is AutoConfig.for_model(family).tie_word_embeddings is True


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_config_takes_transformers_defaults(family):
    bare = {"model_type": family, "vocab_size": 10, "hidden_size": 64, "intermediate_size": 96}
    bare |= {"num_hidden_layers": 3, "num_attention_heads": 32}
    found, truth = normal(bare), AutoConfig.for_model(**bare)
    for field in FIELDS:
        assert found[field] == getattr(truth, field), field
    assert found["head_dim"] == getattr(truth, "head_dim", 2)
    assert found["rope_parameters"] == truth.rope_parameters
    if family != "llama":
        assert found["sliding_window"] == truth.sliding_window
    if family == "mistral":
        assert found["layer_types"] == ["sliding_attention"] * 3


GEMMA = {**LLAMA, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 7}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"sliding_window": 9, "sliding_window_pattern": 3, "rope_theta": 5e5, "rope_local_base_freq": 2e4},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "query_pre_attn_scalar": 168},
        {"layer_types": ["full_attention"] * 6 + ["sliding_attention"], "tie_word_embeddings": False},
    ],
)
def test_gemma3_as_both_releases_spell_it(tmp_path, extra):
    truth = AutoConfig.for_model(**json.loads(json.dumps(GEMMA | extra)))
    truth.save_pretrained(tmp_path)  # the spelling of release 5
    new = json.loads((tmp_path / "config.json").read_text())
    for found in (normal(GEMMA | extra), normal(new)):
        for field in (*FIELDS[:-1], "layer_types", "sliding_window", "query_pre_attn_scalar", "head_dim"):
            assert found[field] == getattr(truth, field), field
        assert found["hidden_act"] == truth.hidden_activation
        assert found["rope_parameters"] == truth.rope_parameters
        assert normal(found) == found


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"sliding_window_pattern": 0}, "sliding_window_pattern must be a positive integer"),
        ({"rope_parameters": {"chunked_attention": {}}}, "those of full_attention and sliding_attention"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({"sliding_window": None}, "no sliding_window is in use"),
    ],
)
def test_bad_gemma3_configs_name_the_field(extra, message):
    with pytest.raises(CheckpointError, match=message):
        normal(GEMMA | extra)


@pytest.mark.parametrize("extra", [{}, {"max_window_layers": 1}, {"max_window_layers": 9}])
def test_qwen_windows(extra):
    config = {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, **extra}
    found, truth = normal(config), AutoConfig.for_model(**config)
    assert found["layer_types"] == truth.layer_types
    assert found["sliding_window"] == (8 if "sliding_attention" in truth.layer_types else None)


def test_spellings_of_dtype():
    for stated in (
        {"torch_dtype": "bfloat16"},
        {"dtype": "bfloat16"},
        {"dtype": "torch.bfloat16", "torch_dtype": None},
    ):
        assert normal({**LLAMA, "torch_dtype": None, **stated})["dtype"] == "bfloat16"
    assert normalise_config({**LLAMA, "torch_dtype": "auto"}, default_dtype="float16")["dtype"] == "float16"


def test_rope_nested_by_layer_type():
    same = {"rope_type": "default", "rope_theta": 7.0}
    nested = {**LLAMA, "rope_parameters": {"full_attention": same, "sliding_attention": dict(same)}}
    assert normal(nested)["rope_parameters"] == same
    nested["rope_parameters"]["sliding_attention"]["rope_theta"] = 8.0
    with pytest.raises(CheckpointError, match="differs between layer types"):
        normal(nested)


def test_rope_left_out_values_come_from_the_config():
    base = {**LLAMA, "max_position_embeddings": 256}
    found = normal({**base, "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 64}})
    assert found["rope_parameters"]["factor"] == 4.0
    found = normal({**base, "rope_scaling": {"type": "yarn", "factor": 2.0}})
    assert found["rope_parameters"]["original_max_position_embeddings"] == 256
    assert normal(base)["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_unknown_fields_and_quantization_are_kept_and_the_input_is_not_changed():
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {**LLAMA, "quantization_config": quantization, "my_field": [1, {"a": None}]}
    copy = json.loads(json.dumps(config))
    found = normalise_config(config)
    assert config == copy
    assert found["quantization_config"] == quantization
    assert found["my_field"] == [1, {"a": None}]


def rope(**values):
    return {"rope_scaling": values}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, not 0"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers must be a positive integer, not 2.0"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers 1099511627776 exceeds the limit of 10000"),
        ({"intermediate_size": True}, "intermediate_size must be a positive integer"),
        (
            {"num_key_value_heads": 4},
            r"num_attention_heads \(6\) is not a multiple of num_key_value_heads \(4\)",
        ),
        ({"num_key_value_heads": -2}, "num_key_value_heads must be a positive"),
        ({"head_dim": None, "hidden_size": 100}, "hidden_size 100 is not a multiple of 6"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id must be an integer, a list"),
        ({"torch_dtype": "int4"}, "dtype 'int4' is not supported; use one of float32, float16, bfloat16"),
        ({"dtype": "bfloat16"}, "dtype and torch_dtype differ"),
        ({"model_type": None, "architectures": None}, "lacks model_type"),
        ({"text_config": {}}, "multimodal"),
        ({"max_position_embeddings": -1}, "max_position_embeddings must be a positive"),
        ({"layer_types": ["full_attention"]}, "layer_types must name one of"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "no sliding_window is in use"),
        (
            rope(type="longrope", factor=2.0),
            "'longrope' is not supported; use a model with one of default, linear",
        ),
        (rope(type="linear"), "'linear' needs factor"),
        (rope(type="linear", factor=0.5), "factor must be at least 1"),
        (rope(type="linear", factor="2"), "factor must be a positive number"),
        (rope(type="dynamic", factor=2.0, alpha=3), "does not take alpha"),
        (rope(type="default", partial_rotary_factor=0.5), "partial_rotary_factor 0.5 is not supported"),
        (rope(rope_type="llama3", **{**LLAMA3, "high_freq_factor": 1.0}), "low_freq_factor must be below"),
        (rope(rope_type="yarn", **YARN, beta_slow=64), "beta_slow must not exceed"),
        (rope(rope_type="yarn", **YARN, truncate=3), "truncate must be true or false"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ({"rope_theta": 0}, "rope_theta must be a positive number"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta is stated twice"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {}}, "contradict"),
    ],
)
def test_bad_configs_name_the_field(change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        normalise_config({**LLAMA, **change}, source="here/config.json")
    assert str(caught.value).startswith("here/config.json")
