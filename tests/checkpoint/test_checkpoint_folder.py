"""Hugging Face folders and safetensors files: written by the safetensors package, good and damaged."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from checkpoint_files import LLAMA, state_dict, write_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from makeready.graphs.checkpoint import CheckpointError, open_checkpoint
from makeready.graphs.checkpoint.base import CheckpointWarning
from makeready.graphs.checkpoint.safetensors_file import SafetensorsFile

MANY = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def state():
    return state_dict(LLAMA)


@pytest.fixture
def folder(tmp_path, state):
    return write_folder(tmp_path / "model", LLAMA, state)


@pytest.fixture
def sharded(tmp_path, state):
    names = sorted(state)
    path = tmp_path / "sharded"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA))
    weight_map = {}
    for shard in range(3):
        file = f"model-{shard + 1:05}-of-00003.safetensors"
        save_file({name: state[name] for name in names[shard::3]}, path / file)
        weight_map |= dict.fromkeys(names[shard::3], file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_single_and_sharded_read_alike(folder, sharded, state):
    one, many = open_checkpoint(folder), open_checkpoint(sharded)
    assert one.format == "safetensors"
    assert one.config == many.config
    for name, tensor in state.items():
        for checkpoint in (one, many):
            assert checkpoint.tensors[name].shape == tuple(tensor.shape)
            assert np.array_equal(checkpoint.read(name), tensor.numpy())
        assert np.array_equal(one.read(name, slice(1, len(tensor))), tensor[1:].numpy())
    assert set(one.tensors) == set(many.tensors) == set(state)


def test_every_dtype_is_read_as_a_view(tmp_path):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 4, generator=generator)
    dtypes = {
        "float64": torch.float64,
        "float32": torch.float32,
        "float16": torch.float16,
        "int64": torch.int64,
        "bfloat16": torch.bfloat16,
        "float8_e4m3fn": torch.float8_e4m3fn,
        "float8_e5m2": torch.float8_e5m2,
        "int32": torch.int32,
        "int16": torch.int16,
        "int8": torch.int8,
        "uint8": torch.uint8,
        "bool": torch.bool,
        "uint16": torch.uint16,
        "uint32": torch.uint32,
        "uint64": torch.uint64,
    }
    tensors = {name: (values.abs() * 9).to(dtype) for name, dtype in dtypes.items()}
    save_file({**tensors, "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3)}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        found = file.read(name)
        assert file.infos[name].dtype == name
        assert found.tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert found.shape == (6, 4)
        assert not found.flags.owndata
        assert not found.flags.writeable
        assert (
            file.read(name, slice(2, 5)).tobytes()
            == tensor[2:5].contiguous().view(torch.uint8).numpy().tobytes()
        )
    assert file.read("bfloat16").dtype == np.uint16
    assert file.read("float8_e4m3fn").dtype == np.uint8
    assert file.read("scalar") == np.float32(2.5)
    assert file.read("none").shape == (0, 3)


def test_fingerprint_is_the_same_elsewhere_and_differs_by_content(folder, tmp_path, state):
    first = open_checkpoint(folder).fingerprint()
    shutil.copytree(folder, tmp_path / "copy")
    assert open_checkpoint(tmp_path / "copy").fingerprint() == first
    others = {name: tensor + 1 for name, tensor in state.items()}
    renamed = {**LLAMA, "_name_or_path": "/home/me", "transformers_version": "5.0"}
    renamed["dtype"] = renamed.pop("torch_dtype")
    assert open_checkpoint(write_folder(tmp_path / "same", renamed, others)).fingerprint() == first

    changes = [
        ({**LLAMA, "rope_theta": 5e5}, state),
        (
            {**LLAMA, "tie_word_embeddings": True},
            {name: tensor for name, tensor in state.items() if name != "lm_head.weight"},
        ),
        ({**LLAMA, "brand_new_field": 1}, state),
        (LLAMA, {**state, "extra": torch.zeros(2)}),
        (LLAMA, {**state, "model.norm.weight": torch.zeros(97)}),
        (LLAMA, {**state, "model.norm.weight": torch.zeros(96).to(torch.float8_e4m3fn)}),
    ]
    found = [
        open_checkpoint(write_folder(tmp_path / str(i), *c)).fingerprint() for i, c in enumerate(changes)
    ]
    assert len({first, *found}) == len(changes) + 1


def test_a_tied_head_is_what_transformers_makes_of_it(tmp_path, state):
    """Equal or not there: tied. Stored and different: used, with a warning. Stored alone: the embeddings."""
    config = {**LLAMA, "tie_word_embeddings": True}
    embedding = state["model.embed_tokens.weight"]
    rest = {k: v for k, v in state.items() if k not in ("model.embed_tokens.weight", "lm_head.weight")}
    last = embedding.clone()
    last[-1, -1] += 1
    for at, (stored, tied) in enumerate(
        (
            ({"model.embed_tokens.weight": embedding}, True),
            ({"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}, True),
            ({"model.embed_tokens.weight": embedding, "lm_head.weight": last}, False),
            ({"lm_head.weight": last}, True),
        )
    ):
        folder = write_folder(tmp_path / str(at), config, {**rest, **stored})
        with nullcontext() if tied else pytest.warns(CheckpointWarning, match="lm_head.weight that differs"):
            checkpoint = open_checkpoint(folder)
        assert checkpoint.config["tie_word_embeddings"] is tied
        theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for name in ("model.embed_tokens.weight", *(() if tied else ("lm_head.weight",))):
            assert np.array_equal(checkpoint.read(name), theirs[name].numpy())
            assert np.array_equal(checkpoint.read(name, slice(3, 5)), theirs[name][3:5].numpy())


def test_a_head_is_compared_to_its_end_and_read_no_further(tmp_path, state, monkeypatch):
    monkeypatch.setattr("makeready.graphs.checkpoint.huggingface.COMPARED", 5 * 96)
    read = []
    original = SafetensorsFile.read
    monkeypatch.setattr(
        SafetensorsFile,
        "read",
        lambda self, name, rows=None: (read.append(rows), original(self, name, rows))[1],
    )
    config = {**LLAMA, "tie_word_embeddings": True}
    embedding = state["model.embed_tokens.weight"]
    for row, reads in ((7, 2), (96, 20), (None, 20)):
        head = embedding.clone()
        if row is not None:
            head[row, 0] += 1
        folder = write_folder(tmp_path / str(row), config, {**state, "lm_head.weight": head})
        read.clear()
        with pytest.warns(CheckpointWarning) if row is not None else nullcontext():
            assert open_checkpoint(folder).config["tie_word_embeddings"] is (row is None)
        assert len(read) == 2 * reads


def test_dtype_of_the_weights_where_the_config_has_none(tmp_path, state):
    config = {key: value for key, value in LLAMA.items() if key != "torch_dtype"}
    halves = {name: tensor.bfloat16() for name, tensor in state.items()}
    assert open_checkpoint(write_folder(tmp_path / "m", config, halves)).config["dtype"] == "bfloat16"
    others = {f"visual.{i}.weight": torch.zeros(2) for i in range(99)}  # read by nobody
    folder = write_folder(tmp_path / "n", config, {**halves, **others})
    assert open_checkpoint(folder).config["dtype"] == "bfloat16"


def test_tokenizer_and_generation_files(folder):
    assert open_checkpoint(folder).tokenizer_files() == {}
    assert open_checkpoint(folder).generation_config == {}
    for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
        (folder / name).write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.tokenizer_files()) == {
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    assert checkpoint.tokenizer_files()["tokenizer.json"] == folder / "tokenizer.json"
    assert checkpoint.generation_config == {"eos_token_id": [1, 2]}
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json must hold a JSON object"):
        open_checkpoint(folder)


def test_missing_things(tmp_path, folder, sharded):
    with pytest.raises(CheckpointError, match="does not exist; pass a folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="does not exist; pass a folder"):
        open_checkpoint("a" * 5000)
    with pytest.raises(CheckpointError, match="drop one of them"):
        open_checkpoint(folder, config=LLAMA)
    with pytest.raises(CheckpointError, match=r"not a GGUF file; pass a \.gguf file or a folder"):
        open_checkpoint(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.norm\.bias'"):
        open_checkpoint(folder).read("model.norm.bias")
    with pytest.raises(CheckpointError, match="0 <= start <= stop <= 97"):
        open_checkpoint(folder).read("lm_head.weight", slice(0, 98))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        open_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is empty"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(folder)
    (folder / "x.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pass the file itself, e\.g\. .*x\.gguf"):
        open_checkpoint(folder)


def test_damaged_shards(sharded, state):
    index = json.loads((sharded / INDEX).read_text())
    second = sharded / "model-00002-of-00003.safetensors"
    bad = {**index["weight_map"], "model.ghost.weight": second.name}
    (sharded / INDEX).write_text(json.dumps({"weight_map": bad}))
    with pytest.raises(CheckpointError, match=r"00002.*lacks tensor 'model\.ghost\.weight'"):
        open_checkpoint(sharded)
    for target in ("../secret.safetensors", 3, ""):
        (sharded / INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], "a": target}}))
        with pytest.raises(CheckpointError, match="not a file name"):
            open_checkpoint(sharded)
    (sharded / INDEX).write_text(json.dumps(index))
    second.unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.safetensors is missing"):
        open_checkpoint(sharded)
    (sharded / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        open_checkpoint(sharded)


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' starts at byte 4 of the data where 8 was expected"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "'b' starts at byte 12 of the data where 8"),
        ({"a": entry(0, 8)}, 7, "7 bytes of data where its header says 8"),
        ({"a": entry(0, 8)}, 9, "9 bytes of data where its header says 8"),
        ({"a": entry(0, 8, (3,))}, 8, r"'a' of shape \(3,\) and dtype F32 needs 12 bytes"),
        ({"a": entry(0, 8, dtype="F16")}, 8, "needs 4 bytes"),
        ({"a": entry(0, 8, dtype="F4")}, 8, "unsupported dtype 'F4'; use one of F64, F32"),
        ({"a": entry(8, 0)}, 8, "malformed shape or data_offsets"),
        ({"a": entry(0, 8, (-2,))}, 8, "malformed shape or data_offsets"),
        ({"a": {"dtype": "F32"}}, 8, "malformed shape or data_offsets"),
        ({"a": [1]}, 8, "entry of tensor 'a' is malformed"),
        (b"[]", 0, "no valid safetensors header"),
        (b"{", 0, "no valid safetensors header"),
        (b"\xff\xfe", 0, "no valid safetensors header"),
        (b"[" * 100000, 0, "no valid safetensors header"),
        (b'{"a": 1, "a": 2}', 0, "no valid safetensors header"),
    ],
)
def test_headers_that_lie(tmp_path, header, data, message):
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(raw_file(tmp_path / "x.safetensors", header, bytes(data)))


def test_misaligned_data_is_copied_into_place(tmp_path):
    header = json.dumps({"a": entry(0, 1, (1,), "U8"), "b": entry(1, 9)}).encode()
    path = raw_file(tmp_path / "x.safetensors", header, b"\0" + np.array([1.5, -2.5], "<f4").tobytes())
    values = SafetensorsFile(path).read("b")
    assert values.flags.aligned
    assert values.tolist() == [1.5, -2.5]


@MANY
@given(data=st.data())
def test_truncation_anywhere_is_a_checkpoint_error(folder, data):
    path = folder / "cut.safetensors"
    whole = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    path.write_bytes(whole[: data.draw(st.one_of(st.integers(0, header), st.integers(0, len(whole) - 1)))])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        SafetensorsFile(path)


@MANY
@given(data=st.data())
def test_corruption_anywhere_reads_or_is_a_checkpoint_error(folder, data):
    whole = bytearray((folder / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header - 1))
        whole[at] = data.draw(st.sampled_from([*b'0:,"}]{-.', 0, 0xFF, whole[at] ^ 1]))
    path = folder / "flip.safetensors"
    path.write_bytes(whole)
    try:
        file = SafetensorsFile(path)
        for name, info in file.infos.items():
            assert file.read(name).shape == info.shape
    except CheckpointError as error:
        message = str(error)
    else:
        message = str(path)
    assert str(path) in message


@pytest.mark.parametrize("name", ["config.json", INDEX])
@MANY
@given(data=st.data())
def test_damaged_json_is_a_checkpoint_error_or_reads(sharded, name, data):
    original = (sharded / name).read_text()
    text = bytearray(original.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at] = data.draw(st.sampled_from([*b'0:,"}]{-.n', 0, 0xFF]))
    cut = data.draw(st.one_of(st.just(len(text)), st.integers(0, len(text))))
    try:
        (sharded / name).write_bytes(text[:cut])
        open_checkpoint(sharded)
    except CheckpointError as error:
        message = str(error)
    else:
        message = str(sharded)
    finally:
        (sharded / name).write_text(original)
    assert str(sharded) in message


def test_reading_needs_numpy_only():
    """The CUDA runtime reads checkpoints on machines without torch."""
    code = (
        "import sys\n"
        "from makeready.graphs.checkpoint import base, dummy, gguf_checkpoint, huggingface\n"
        "print(sorted({'torch', 'triton', 'transformers', 'safetensors', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
