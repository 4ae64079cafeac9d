"""Which fields of a config tell plans apart: held to the config.json of ten published models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from makeready.graphs.checkpoint.base import FINGERPRINT_EXEMPT, counted
from makeready.graphs.checkpoint.config import normalise_config
from makeready.graphs.checkpoint.dummy import DummyCheckpoint

CONFIGS = {
    path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "configs").glob("*.json")
}
PRESETS = {
    "SmolLM2-135M-Instruct": "smollm2_135m",
    "Llama-3.1-8B-Instruct": "llama3_1_8b",
    "Mistral-7B-Instruct-v0.3": "mistral_7b",
    "Qwen2.5-0.5B-Instruct": "qwen2_5_0_5b",
    "Qwen3-0.6B": "qwen3_0_6b",
    "Qwen3-8B": "qwen3_8b",
}
# What the modelling code of these families reads while it computes logits (transformers' modeling_llama.py,
# modeling_mistral.py, modeling_qwen2.py, modeling_qwen3.py and modeling_rope_utils.py), in the normal form.
COUNTED = {
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    *("hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings", "rope_parameters", "layer_types"),
    *("sliding_window", "rope_interleaved", "use_mrope"),
}


def identity(config: dict[str, Any]) -> str:
    return DummyCheckpoint(config).fingerprint()


def test_there_are_ten():
    assert len(CONFIGS) == 10


@pytest.mark.parametrize("name", CONFIGS)
def test_only_what_changes_numbers_counts(name):
    assert counted(normalise_config(CONFIGS[name])).keys() == COUNTED


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_published_model(name):
    preset = Path(__file__).parents[2] / "conf" / "model" / f"{PRESETS[name]}.yaml"
    assert identity(yaml.safe_load(preset.read_text())) == identity(CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fine_tune_by_other_means_is_the_same_and_another_model_is_not(name):
    config = CONFIGS[name]
    again = config | {
        "_name_or_path": "me/mine", "attention_dropout": 0.1, "initializer_range": 1e-2, "use_cache": False,
        "torch_dtype": "float32", "transformers_version": "5.17.0", "eos_token_id": 7, "pad_token_id": 0,
    }  # fmt: skip
    assert identity(again) == identity(config)
    changes: list[dict[str, Any]] = [
        {"rms_norm_eps": 1e-4}, {"rope_theta": 7e5}, {"vocab_size": 77}, {"max_position_embeddings": 100},
        {"tie_word_embeddings": not config["tie_word_embeddings"]}, {"hidden_act": "gelu"}, {"use_mrope": True},
        {"num_hidden_layers": 5}, {"rope_interleaved": True}, {"brand_new_field": 0},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ]  # fmt: skip
    others = {identity(config | change) for change in changes}
    assert len(others | {identity(config)}) == len(changes) + 1


@pytest.mark.parametrize("name", CONFIGS)
def test_exempt_fields_change_no_logit_of_transformers(name):
    """The published config, shrunk, against the same with every exempt field taken away or set to nonsense."""
    small = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50, "torch_dtype": "float32",
    }  # fmt: skip
    named = {"bos_token_id", "eos_token_id", "pad_token_id", "max_window_layers", "use_sliding_window"}
    # A copy: transformers writes into what is within a config.
    config = {k: v for k, v in copy.deepcopy(CONFIGS[name]).items() if k not in named} | small
    changed = {k: v for k, v in config.items() if k not in FINGERPRINT_EXEMPT} | {
        "attention_dropout": 0.5, "initializer_range": 0.9, "use_cache": False, "pretraining_tp": 2,
        "_name_or_path": "x", "is_llama_config": False, "bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 5,
        "max_length": 3, "temperature": 9.0,
    }  # fmt: skip
    torch.manual_seed(0)
    models = [AutoModelForCausalLM.from_config(AutoConfig.for_model(**c)).eval() for c in (config, changed)]
    weights = {k: torch.randn_like(v) * 0.3 for k, v in models[0].state_dict().items()}
    if config["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    logits = []
    for model in models:
        model.load_state_dict(weights)
        with torch.no_grad():
            logits.append(model(torch.arange(1, 40)[None]).logits)
    assert torch.equal(*logits)
