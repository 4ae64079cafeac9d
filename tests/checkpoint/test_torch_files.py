"""Files of torch.save: what PyTorch wrote, read without it; and what a hostile file asks for, refused."""

import io
import json
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from checkpoint_files import LLAMA, state_dict, write_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from makeready.graphs.checkpoint import CheckpointError, open_checkpoint
from makeready.graphs.checkpoint.base import NUMPY_DTYPES
from makeready.graphs.checkpoint.identity import checkpoint_identity
from makeready.graphs.checkpoint.torch_file import TorchFile

MANY = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
BIN, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def saved(path, tensors, **options):
    torch.save(tensors, path, **options)
    return path


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def folder_of(path, files, config=LLAMA):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    for name, tensors in files.items():
        saved(path / name, tensors)
    return path


@pytest.fixture(scope="module")
def state():
    return state_dict(LLAMA)


def test_every_dtype_is_read_as_a_view(tmp_path):
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).abs() * 9
    written = {name: values.to(getattr(torch, name)) for name in NUMPY_DTYPES if name != "float8_e8m0fnu"}
    written["float8_e8m0fnu"] = torch.arange(24, dtype=torch.uint8).view(torch.float8_e8m0fnu).view(6, 4)
    file = TorchFile(saved(tmp_path / "x.bin", written))
    assert list(file.infos) == list(written)
    for name, tensor in written.items():
        assert file.infos[name].dtype == name
        found = file.read(name)
        assert found.dtype == NUMPY_DTYPES[name]
        assert found.shape == (6, 4)
        assert found.tobytes() == bits(tensor)
        assert not found.flags.owndata
        assert not found.flags.writeable
        box = file.read(name, (slice(2, 5), slice(1, 3)))
        assert box.tobytes() == bits(tensor.view(torch.uint8).view(6, 4, -1)[2:5, 1:3])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_views_ties_and_strides(tmp_path, protocol):
    """Storages that several tensors share, parts of them, other orders of axes; and what is no tensor."""
    base = torch.arange(60, dtype=torch.float32)
    matrix = base[10:34].view(4, 6)
    written = OrderedDict(
        base=base,
        part=matrix[1:3],
        tied=matrix,
        turned=matrix.T,
        columns=matrix[:, 1:4],
        every=base[3::7],
        cube=base[:24].view(2, 3, 4).permute(2, 0, 1),
        scalar=torch.tensor(2.5),
        none=torch.zeros(0, 3),
        learned=torch.nn.Parameter(torch.ones(3, 2).to(torch.bfloat16)),
        long=torch.tensor([1, -(2**40)]),
        epoch=3,
        note="text",
        nothing=None,
    )
    written._metadata = {"": {"version": 1}}
    file = TorchFile(saved(tmp_path / "x.pt", written, pickle_protocol=protocol))
    assert set(file.infos) == {name for name, value in written.items() if isinstance(value, torch.Tensor)}
    for name in file.infos:
        tensor = written[name].detach()
        found = file.read(name)
        assert found.shape == tuple(tensor.shape)
        assert found.tobytes() == bits(tensor)
        assert found.flags.c_contiguous
        if tensor.ndim > 1 and len(tensor) > 2:
            assert file.read(name, slice(1, 3)).tobytes() == bits(tensor[1:3])
    assert not file.read("tied").flags.owndata
    assert file.read("scalar") == np.float32(2.5)


def test_a_whole_state_dict_and_its_shards_are_the_safetensors_file(tmp_path, state):
    model = write_folder(tmp_path / "safe", LLAMA, state)
    names = sorted(state)
    shards = {f"pytorch_model-{i:05}-of-00002.bin": names[i - 1 :: 2] for i in (1, 2)}
    whole = folder_of(tmp_path / "whole", {BIN: state})
    sharded = folder_of(tmp_path / "sharded", {f: {n: state[n] for n in own} for f, own in shards.items()})
    weight_map = {name: file for file, own in shards.items() for name in own}
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    other = folder_of(tmp_path / "other", {"consolidated.pth": state, "optimizer.pt": {"a": torch.ones(1)}})
    (other / "training_args.bin").write_bytes(b"\x80\x02no weights")
    expected = open_checkpoint(model)
    for path in (whole, sharded, other):
        found = open_checkpoint(path)
        assert found.format == "pytorch"
        assert found.fingerprint() == expected.fingerprint()
        for name in state:
            assert np.array_equal(found.read(name), expected.read(name))
        files = found.weight_files()
        assert all(0 < start < file.stat().st_size for file, start in files.values())
    (sharded / next(iter(shards))).unlink()
    with pytest.raises(
        CheckpointError, match=r"00001-of-00002\.bin is missing, though pytorch_model\.bin\.index"
    ):
        open_checkpoint(sharded)


def test_safetensors_are_read_where_both_are_there(tmp_path, state):
    model = write_folder(tmp_path / "both", LLAMA, state)
    saved(model / BIN, {name: tensor + 1 for name, tensor in state.items()})
    found = open_checkpoint(model)
    assert found.format == "safetensors"
    assert np.array_equal(found.read("model.norm.weight"), state["model.norm.weight"].numpy())
    assert set(found.weight_files()) == {"model.safetensors"}


def test_a_tied_head_is_found_equal_whatever_its_strides(tmp_path, state):
    config = {**LLAMA, "tie_word_embeddings": True}
    turned = state["model.embed_tokens.weight"].T.contiguous().T
    path = folder_of(tmp_path / "tied", {BIN: {**state, "lm_head.weight": turned}}, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_checkpoint(path).config["tie_word_embeddings"]


def test_another_pickle_is_another_content(tmp_path, state):
    path = folder_of(tmp_path / "m", {BIN: state})
    before = checkpoint_identity(open_checkpoint(path))
    when = (path / BIN).stat()
    names = list(state)
    saved(path / BIN, {**state, names[0]: state[names[0]].to(torch.float16)})
    os.utime(path / BIN, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert checkpoint_identity(open_checkpoint(path))[BIN] != before[BIN]


class Calls:
    """What a pickle may do: call anything while it is read."""

    def __init__(self, function, *given):
        self.function, self.given = function, given

    def __reduce__(self):
        return self.function, self.given


def archive(path, pickled, **members):
    """A file as torch.save lays it out, of any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickled)
        for name, data in members.items():
            file.writestr(f"x/{name.replace('__', '/')}", data)
    return path


@pytest.mark.parametrize(
    ("function", "given", "message"),
    [
        (os.system, ("touch {made}",), "posix.system"),
        (eval, ("open('{made}', 'w')",), "(builtins|__builtin__).eval"),
        (open, ("{made}", "w"), r"io.open|_io.open"),
        (getattr, (OrderedDict, "fromkeys"), "(builtins|__builtin__).getattr"),
        (torch.nn.Linear, (2, 2), "torch.nn.modules.linear.Linear"),
        (torch.hub.load, ("x", "y"), "torch.hub.load"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_that_a_pickle_names_is_called(tmp_path, function, given, message, protocol):
    made = tmp_path / "made"
    given = tuple(str(one).replace("{made}", str(made)) if isinstance(one, str) else one for one in given)
    for at, content in enumerate(
        ({"a": Calls(function, *given)}, [torch.ones(1), Calls(function, *given)], Calls(function, *given))
    ):
        path = saved(tmp_path / f"{at}.bin", content, pickle_protocol=protocol)
        with pytest.raises(
            CheckpointError, match=rf"asks for '.*(?:{message})', which no plain tensor needs"
        ):
            TorchFile(path)
    assert not made.exists()


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (pickle.dumps({"a": {1, 2}}, 4), "pickle instruction EMPTY_SET"),
        (pickle.dumps({"a": b"x"}, 4), "pickle instruction SHORT_BINBYTES"),
        (pickle.dumps({"a": 1}, 0), "pickle instruction"),
        (pickle.dumps(io.BytesIO(), 2), "asks for '_io.BytesIO'"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "pickle instruction NEWOBJ"),
        (b"\x80\x02\x82\x01.", "pickle instruction EXT1"),
        (b"\x80\x02(ios\nsystem\n.", "pickle instruction INST"),
        (b"\x80\x02cos\nsystem\n.", "asks for 'os.system'"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "malformed pickle"),
        (b"\x80\x02ccollections\nOrderedDict\nX\x01\x00\x00\x00aR.", "malformed pickle"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "malformed pickle"),  # attributes of a class
        (b"\x80\x02}r\xff\xff\xff\x7f.", "has no tensors"),  # a memo of 2**31 places
        (b"\x80\x02}(K\x01]u.", "has no tensors"),
        (b"\x80\x02}()K\x01u.", "malformed pickle"),
        (b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", "malformed pickle"),
        (b"\x80\x02K\x01.", "holds no dict of tensors"),
        (b"\x80\x02(.", "malformed pickle"),
        (b"\x80\x02.", "malformed pickle"),
        (b"\x80\x02}", "malformed pickle"),
        (b"", "malformed pickle"),
    ],
)
def test_pickles_of_anything_else_are_refused(tmp_path, pickled, message):
    with pytest.raises(CheckpointError, match=message):
        TorchFile(archive(tmp_path / "x.bin", pickled))


def described(shape, strides, *, offset=0, stored=24, kind="FloatStorage", key="0", twice=False):
    """A pickle of one tensor of numbers that torch.save would not write."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", getattr(torch, kind), key, "cpu", stored) if obj == "STORAGE" else None

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, ("STORAGE", offset, shape, strides, False, OrderedDict())

    made = io.BytesIO()
    Pickler(made, 2).dump({"a": Tensor()})
    value = made.getvalue()
    return value[:-1] + b"X\x01\x00\x00\x00aK\x01s." if twice else value


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"shape": (5, 5), "strides": (5, 1)},
            r"'a' of shape \(5, 5\) needs 100 bytes of its storage, which has 96",
        ),
        ({"shape": (4, 6), "strides": (6, 1), "offset": 1}, "needs 100 bytes"),
        ({"shape": (4, 6), "strides": (7, 1)}, "needs 108 bytes"),
        ({"shape": (9, 9), "strides": (0, 1)}, "has elements in one place; save it with .contiguous"),
        ({"shape": (2**40, 2**40), "strides": (0, 0)}, "no possible shape"),
        ({"shape": (2**62, 0), "strides": (1, 1)}, "no possible shape"),
        ({"shape": (1,) * 40, "strides": (1,) * 40}, "no possible shape"),
        ({"shape": (4, 6), "strides": (-6, 1)}, "malformed pickle"),
        ({"shape": (4, 6), "strides": (6,)}, "malformed pickle"),
        ({"shape": (4, 6.0), "strides": (6, 1)}, "malformed pickle"),
        ({"shape": (4, True), "strides": (6, 1)}, "malformed pickle"),
        ({"shape": (2**70,), "strides": (1,)}, "malformed pickle"),
        ({"shape": (4, 6), "strides": (6, 1), "offset": -1}, "malformed pickle"),
        (
            {"shape": (4, 6), "strides": (6, 1), "kind": "ComplexFloatStorage"},
            "asks for 'torch.ComplexFloatStorage'",
        ),
        ({"shape": (4, 6), "strides": (6, 1), "key": "../../1"}, "lacks the storage '../../1' of tensor 'a'"),
        ({"shape": (4, 6), "strides": (6, 1), "twice": True}, "has 'a' twice"),
    ],
)
def test_tensors_that_leave_their_storage(tmp_path, said, message):
    path = archive(tmp_path / "x.bin", described(**said), data__0=bytes(96))
    with pytest.raises(CheckpointError, match=message):
        TorchFile(path)


def test_archives_that_are_none(tmp_path, state):
    path = tmp_path / "x.bin"
    saved(path, state, _use_new_zipfile_serialization=False)
    with pytest.raises(
        CheckpointError, match=r"before PyTorch 1\.6.*torch\.save\(torch\.load\(\"x\.bin\", weights_only"
    ):
        TorchFile(path)
    good = described((4, 6), (6, 1))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", good)
        file.writestr("x/data/0", bytes(2**24))  # 16 KiB that become 16 MiB
    with pytest.raises(CheckpointError, match=r"compressed or encrypted member 'x/data\.pkl'"):
        TorchFile(path)
    with pytest.raises(CheckpointError, match="TorchScript"):
        TorchFile(archive(path, good, **{"constants.pkl": b"", "data__0": bytes(96)}))
    with pytest.raises(CheckpointError, match="little-endian"):
        TorchFile(archive(path, good, byteorder=b"big", data__0=bytes(96)))
    with pytest.raises(CheckpointError, match=r"lacks the storage '0'"):
        TorchFile(archive(path, good))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme", b"")
    with pytest.raises(CheckpointError, match=r"has no data\.pkl"):
        TorchFile(path)
    for data in (b"", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04"):
        path.write_bytes(data)
        with pytest.raises(
            CheckpointError, match=r"x\.bin is (empty|truncated or not a file of torch\.save)"
        ):
            TorchFile(path)
    with zipfile.ZipFile(path, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file.writestr("x/data.pkl", good)
        file.writestr("x/data/0", bytes(96))
        file.writestr("x/data/0", b"1" * 96)
    with pytest.raises(CheckpointError, match=r"member 'x/data/0' twice"):
        TorchFile(path)
    saved(path, {"model": state, "epoch": 1})
    with pytest.raises(CheckpointError, match=r"has its tensors within 'model'; save a dict of tensors"):
        TorchFile(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "x.bin"
    saved(path, {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4).to(torch.bfloat16)})
    return path, path.read_bytes()


def read_or_refused(path):
    try:
        file = TorchFile(path)
        for name, info in file.infos.items():
            assert file.read(name).shape == info.shape
    except CheckpointError as error:
        assert path.name in str(error)  # noqa: PT017


@MANY
@given(data=st.data())
def test_damage_anywhere_reads_or_is_a_checkpoint_error(whole, data):
    path, content = whole
    broken = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(broken) - 1))
        broken[at] = data.draw(st.sampled_from([0, 0xFF, *b".()RbQcX", broken[at] ^ 1]))
    damaged = path.with_name("flip.bin")
    damaged.write_bytes(broken)
    read_or_refused(damaged)


@MANY
@given(data=st.data())
def test_truncation_anywhere_is_a_checkpoint_error(whole, data):
    path, content = whole
    cut = path.with_name("cut.bin")
    cut.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(CheckpointError, match=r"cut\.bin"):
        TorchFile(cut)
