"""One file of ``torch.save``: a zip archive of a pickle and of storages, which are mapped and never unpickled.

Format: PyTorch's ``caffe2/serialize`` and ``torch/serialization.py`` since 1.6. All members lie in one folder:
``data.pkl`` says which tensors there are (:mod:`makeready.graphs.checkpoint.pickled`), ``data/KEY`` is a storage,
``byteorder`` is ``little`` or ``big``. Members are stored as they are; a member that were compressed could become
any size, so it is refused, as is all that leaves its storage.
"""

from __future__ import annotations

import math
import struct
import zipfile
from pathlib import Path

import numpy as np

from makeready.graphs.checkpoint.base import (
    NUMPY_DTYPES,
    CheckpointError,
    Ranges,
    TensorInfo,
    map_file,
    ranges,
)
from makeready.graphs.checkpoint.pickled import MOST, PickledTensor, pickled_tensors

PICKLE = "data.pkl"
AXES = 16  # of a tensor; numpy has 32
_HEADER = struct.Struct("<4s22xHH")  # of a member: its mark, and bytes of its name and further fields
_ENCRYPTED = 1
_AGAIN = 'torch.save(torch.load("{0}", weights_only=True, map_location="cpu"), "{0}")'


class TorchFile:
    """The tensors of one file of ``torch.save``, mapped into memory.

    Args:
        path: the file.

    Attributes:
        format: what such files are called.
        infos: tensor table by name.
        data_start: bytes before the first storage's.

    Raises:
        CheckpointError: no such file, truncated or compressed, of before PyTorch 1.6, a tensor that leaves its
            storage, or a pickle that asks for more than tensors.
    """

    format = "pytorch"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = map_file(path)
        members = _members(path, self._bytes)
        top = next((name for name in members if name.endswith(f"/{PICKLE}") and name.count("/") == 1), None)
        if top is None:
            raise CheckpointError(f"{path} has no {PICKLE}, which torch.save writes first; download it again")
        folder = top.removesuffix(PICKLE)
        if f"{folder}constants.pkl" in members:
            raise CheckpointError(f"{path} is a TorchScript program; use the model's weights instead")
        order = members.get(f"{folder}byteorder", (0, 0))
        if self._bytes[slice(*order)].tobytes() not in (b"", b"little"):
            raise CheckpointError(
                f"{path} was not written in little-endian order; save it on another machine"
            )
        self._tensors = pickled_tensors(self._bytes[slice(*members[top])].tobytes(), path)
        self._begins: dict[str, int] = {}
        self.infos: dict[str, TensorInfo] = {}
        for name, tensor in self._tensors.items():
            begin, end = members.get(f"{folder}data/{tensor.storage}", (-1, -1))
            if begin < 0:
                raise CheckpointError(
                    f"{path} lacks the storage {tensor.storage!r:.80} of tensor {name!r}; download it again"
                )
            _check_bounds(path, name, tensor, end - begin)
            self._begins[name] = begin
            self.infos[name] = TensorInfo(name, tensor.dtype, tensor.shape)
        self.data_start = min(self._begins.values(), default=0)

    def read(self, name: str, box: Ranges | None = None) -> np.ndarray:
        """Return a box of a tensor: a read-only view where the file has it in row-major order, else a copy."""
        info, tensor = self.infos[name], self._tensors[name]
        dtype = NUMPY_DTYPES[info.dtype]
        whole = np.ndarray(
            info.shape,
            dtype,
            self._bytes,
            self._begins[name] + tensor.offset * dtype.itemsize if math.prod(info.shape) else 0,
            tuple(step * dtype.itemsize for step in tensor.strides),
        )
        array = whole[(*(slice(*part) for part in ranges(info, box)), ...)]
        return array if whole.flags.c_contiguous and whole.flags.aligned else array.copy()


def _members(path: Path, data: np.ndarray) -> dict[str, tuple[int, int]]:
    """First byte and end of what each member of the archive holds, by name."""
    if data[:1].tobytes() == b"\x80":
        raise CheckpointError(
            f"{path} is of the format before PyTorch 1.6, which is not read; write it anew with "
            f"{_AGAIN.format(path.name)}"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, OSError):
        raise CheckpointError(f"{path} is truncated or not a file of torch.save; download it again") from None
    found: dict[str, tuple[int, int]] = {}
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
            raise CheckpointError(
                f"{path} has the compressed or encrypted member {entry.filename!r:.80}, as torch.save writes none; "
                f"write it anew with {_AGAIN.format(path.name)}"
            )
        begin = entry.header_offset + _HEADER.size
        header = data[entry.header_offset : begin].tobytes() if entry.header_offset >= 0 else b""
        mark, *lengths = _HEADER.unpack(header) if len(header) == _HEADER.size else (b"",)
        begin += sum(lengths)
        end = begin + entry.file_size
        if mark != b"PK\x03\x04" or entry.file_size != entry.compress_size or end > len(data):
            raise CheckpointError(f"{path}: member {entry.filename!r:.80} is damaged; download it again")
        if entry.filename in found:
            raise CheckpointError(f"{path} has the member {entry.filename!r:.80} twice; download it again")
        found[entry.filename] = (begin, end)
    return found


def _check_bounds(path: Path, name: str, tensor: PickledTensor, held: int) -> None:
    """Refuse a tensor that leaves its storage, or has more elements than that."""
    size = NUMPY_DTYPES[tensor.dtype].itemsize
    count = math.prod(tensor.shape)
    if len(tensor.shape) > AXES or math.prod(n for n in tensor.shape if n) * size >= MOST:
        raise CheckpointError(f"{path}: tensor {name!r} has no possible shape; download the file again")
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    if count and (last + 1) * size > held:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {tensor.shape} needs {(last + 1) * size} bytes of its storage, which "
            f"has {held}; download the file again"
        )
    if count * size > held:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {tensor.shape} has elements in one place; save it with .contiguous()"
        )
