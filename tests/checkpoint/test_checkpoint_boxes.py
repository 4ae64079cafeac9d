"""Boxes of tensors are numpy's slices of the whole, and no more of a file is touched than they need."""

from __future__ import annotations

import mmap

import gguf
import numpy as np
import pytest
import torch
from checkpoint_files import LLAMA, add_tensors, finish_gguf, start_gguf, state_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from makeready.graphs.checkpoint import gguf_checkpoint
from makeready.graphs.checkpoint.base import CheckpointError, open_checkpoint
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.checkpoint.safetensors_file import SafetensorsFile

BOXES = [
    (slice(0, 4),),
    (slice(1, 3), slice(2, 5)),
    (slice(0, 4), slice(0, 5), slice(3, 4)),
    (slice(None), slice(4, 5), slice(None)),
    (slice(2, 2), slice(0, 1)),
    (),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> tuple[SafetensorsFile, np.ndarray]:
    whole = torch.arange(4 * 5 * 6, dtype=torch.float32).reshape(4, 5, 6)
    path = tmp_path_factory.mktemp("boxes") / "x.safetensors"
    save_file({"a": whole, "scalar": torch.tensor(2.0)}, path)
    return SafetensorsFile(path), whole.numpy()


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_boxes_of_safetensors_are_views_of_the_mapped_file(file, box):
    opened, whole = file
    found = opened.read("a", box)
    assert np.array_equal(found, whole[box])
    assert found.strides == whole.strides
    base = found
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, mmap.mmap)


@given(st.data())
@settings(max_examples=40)
def test_boxes_of_dummies_are_slices(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    checkpoint = DummyCheckpoint(dict(LLAMA), {"w": shape})
    axes = data.draw(st.integers(0, len(shape)))
    box = []
    for n in shape[:axes]:
        start = data.draw(st.integers(0, n))
        box.append(slice(start, data.draw(st.integers(start, n))))
    assert np.array_equal(checkpoint.read("w", tuple(box)), checkpoint.read("w")[tuple(box)])


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((slice(0, 4), slice(0, 6)), r"range slice\(0, 6, None\) of axis 1 .* 0 <= start <= stop <= 5"),
        ((slice(0, 4), slice(3, 2)), r"range slice\(3, 2, None\) of axis 1"),
        ((slice(0, 4, 2),), r"range slice\(0, 4, 2\) of axis 0"),
        ((slice(-1, 4),), "of axis 0"),
        ((slice(None),) * 4, "4 ranges do not fit tensor 'a' of shape .*; ask for at most 3"),
    ],
)
def test_boxes_that_leave_a_tensor_are_refused(file, box, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        file[0].read("a", box)
    assert "\n" not in str(caught.value)


def test_a_scalar_has_no_ranges(file):
    assert file[0].read("scalar", ()) == 2.0
    with pytest.raises(CheckpointError, match="1 ranges do not fit tensor 'scalar'"):
        file[0].read("scalar", slice(0, 1))


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """A GGUF file with a matrix of 32-element blocks and one of row-reordered blocks, and what they hold."""
    state = state_dict(LLAMA)
    kind = gguf.GGMLQuantizationType.Q8_0
    names = {
        "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
        "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    }
    writer = start_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", "llama", LLAMA)
    taken = {name: state.pop(name).numpy() for name in names}
    add_tensors(writer, "llama", LLAMA, state)
    plain = {}
    for name, stored in names.items():
        rows = taken[name]
        # llama.cpp keeps the two halves of a head's rotary rows side by side.
        order = (
            np.arange(len(rows)).reshape(6, 2, -1).swapaxes(1, 2).reshape(-1)
            if "q_proj" in name
            else np.arange(len(rows))
        )
        quantized = gguf.quants.quantize(rows[order], kind)
        writer.add_tensor(stored, quantized, raw_dtype=kind)
        plain[name] = np.empty_like(rows)
        plain[name][order] = gguf.quants.dequantize(quantized, kind)
    return open_checkpoint(finish_gguf(writer)), plain


@pytest.mark.parametrize("columns", [(0, 96), (0, 32), (32, 64), (5, 6), (31, 33), (40, 96), (10, 10)])
@pytest.mark.parametrize("rows", [(0, 64), (3, 20), (7, 7)])
def test_columns_of_blocks_are_slices_of_the_whole(blocks, rows, columns):
    checkpoint, plain = blocks
    for name, whole in plain.items():
        box = (slice(*rows), slice(*columns))
        assert np.array_equal(checkpoint.read(name, box), whole[box])


def test_only_blocks_that_hold_the_columns_are_dequantized(blocks, monkeypatch):
    checkpoint, plain = blocks
    seen = []
    dequantize = gguf_checkpoint.dequantize
    monkeypatch.setattr(
        gguf_checkpoint, "dequantize", lambda *args: (seen.append(args[1].nbytes), dequantize(*args))
    )
    (name, *_) = plain
    checkpoint.read(name, (slice(4, 14), slice(40, 50)))
    assert seen == [10 * 34]  # a block of Q8_0 is 32 bytes and a scale of 2


def test_columns_of_plain_gguf_tensors_are_slices(blocks):
    checkpoint, _ = blocks
    name = "model.layers.1.self_attn.k_proj.weight"
    whole = checkpoint.read(name)
    assert np.array_equal(checkpoint.read(name, (slice(1, 9), slice(3, 7))), whole[1:9, 3:7])
