"""Dummy weights: seeded, never degenerate, row ranges equal the whole."""

import numpy as np
import pytest
import torch
from checkpoint_files import LLAMA, state_dict, write_folder

from makeready.graphs.checkpoint import CheckpointError, open_checkpoint
from makeready.graphs.checkpoint.dummy import PERIOD, DummyCheckpoint, bfloat16_bits

W = "model.layers.0.mlp.up_proj.weight"
NORM, BIAS = "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"


def test_values_depend_on_seed_and_name_only():
    first = DummyCheckpoint(LLAMA, {W: (8, 4)}, seed=1)
    again = DummyCheckpoint({**LLAMA, "vocab_size": 5}, {NORM: (3,), W: (8, 4)}, seed=1)
    assert np.array_equal(first.read(W), again.read(W))
    assert not np.array_equal(first.read(W), DummyCheckpoint(LLAMA, {W: (8, 4)}, seed=2).read(W))
    again.declare({"other.weight": (8, 4)})
    assert not np.array_equal(again.read(W), again.read("other.weight"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_scales_and_dtypes(dtype):
    checkpoint = DummyCheckpoint({**LLAMA, "torch_dtype": dtype}, {W: (256, 64), NORM: (512,), BIAS: (512,)})
    values = {}
    for name in (W, NORM, BIAS):
        raw = checkpoint.read(name)
        assert raw.dtype == (np.uint16 if dtype == "bfloat16" else dtype)
        assert checkpoint.tensors[name].dtype == dtype
        values[name] = torch.from_numpy(raw)
        values[name] = (values[name].view(torch.bfloat16) if dtype == "bfloat16" else values[name]).float()
        assert (values[name] != 0).all()
    assert abs(values[W].std() - 0.02) < 0.001
    assert abs(values[NORM].mean() - 1) < 0.01
    assert values[NORM].std() > 0.005
    assert 0 < values[BIAS].abs().max() < 0.15


def test_big_tensors_are_not_degenerate_and_slice():
    shape = (3000, 4096)
    assert shape[0] * shape[1] > 2 * PERIOD
    checkpoint = DummyCheckpoint({**LLAMA, "torch_dtype": "bfloat16"}, {W: shape})
    whole = checkpoint.read(W)
    assert len(np.unique(whole[:, :8], axis=0)) == shape[0]
    other = DummyCheckpoint(checkpoint.config, {"other.weight": shape}).read("other.weight")
    assert not (whole == other).all(1).any()
    for rows in (slice(0, 3), slice(1020, 1030), slice(2999, 3000), slice(5, 5)):
        assert np.array_equal(checkpoint.read(W, rows), whole[rows])


def test_bfloat16_rounding_is_torchs():
    values = np.random.default_rng(0).standard_normal(10000).astype(np.float32)
    values[:2] = np.array([0x3F808000, 0x3F818000], np.uint32).view(np.float32)  # ties
    expected = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(bfloat16_bits(values), expected)


def test_a_dummy_stands_for_the_real_checkpoint(tmp_path):
    """Same config and tensor table, same fingerprint: a plan made with dummy weights loads the real ones."""
    state = state_dict(LLAMA)
    real = open_checkpoint(write_folder(tmp_path / "real", LLAMA, state))
    dummy = open_checkpoint("dummy", config=LLAMA, seed=3)
    assert isinstance(dummy, DummyCheckpoint)
    dummy.declare({name: tuple(tensor.shape) for name, tensor in state.items()})
    assert dummy.fingerprint() == real.fingerprint()
    assert dummy.tokenizer_files() == {}


def test_errors():
    dummy = DummyCheckpoint(LLAMA, {W: (8, 4)})
    with pytest.raises(CheckpointError, match=r"declared with shape \(8, 4\) and again with \(4, 8\)"):
        dummy.declare({W: (4, 8)})
    with pytest.raises(CheckpointError, match="every size must be at least 1"):
        dummy.declare({"x": (0, 4)})
    with pytest.raises(CheckpointError, match="no tensor 'y'"):
        dummy.read("y")
    for rows in (slice(0, 9), slice(-1, 4), slice(5, 4), slice(0, 8, 2)):
        with pytest.raises(CheckpointError, match="0 <= start <= stop <= 8"):
            dummy.read(W, rows)
    with pytest.raises(CheckpointError, match="needs a config"):
        open_checkpoint("dummy")
    with pytest.raises(CheckpointError, match="float32, float16, bfloat16"):
        DummyCheckpoint(LLAMA, dtype="int8")
