"""Reading slices of tensors from a directory of safetensors files: header first, then exactly the bytes asked for.

Plain `pread`, no memory map: mapped pages of a checkpoint would count as memory of this process.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload.errors import WeightsError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; `offset` (from the file's start) and `nbytes` are in bytes."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class TensorFiles:
    """All tensors of a checkpoint directory by name. Reads may come from several threads."""

    def __init__(self, directory: str | Path, single_file: str | None = None, how_to_convert: str = "") -> None:
        """Open the shards and check their headers.

        Args:
            directory: holds `model.safetensors`, or shards and their index.
            single_file: another name for the single file, where the model's configuration gives one.
            how_to_convert: what to do about pickled weights; ends the message that refuses them.
        Raises WeightsError for missing, damaged, truncated and pickled files, naming the file.
        """
        self.directory = Path(directory)
        self.tensors: dict[str, StoredTensor] = {}
        self._descriptors: dict[Path, int] = {}
        try:
            for file in self._files(single_file or SINGLE_FILE, how_to_convert):
                self._open(file)
            self._check_index(single_file or SINGLE_FILE)
        except BaseException:
            self.close()
            raise

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of a tensor: 1-D, on the CPU, in the file's dtype."""
        stored = self.tensors[name]
        values = torch.empty(count, dtype=stored.dtype)
        left = memoryview(values.view(torch.uint8).numpy().data)
        offset = stored.offset + start * stored.dtype.itemsize
        while left:
            got = os.preadv(self._descriptors[stored.file], [left], offset)
            if got == 0:
                raise WeightsError(
                    f"{stored.file} ends at byte {offset}, inside tensor {name}: it became shorter while being read"
                )
            left, offset = left[got:], offset + got
        return values

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _files(self, single_file: str, how_to_convert: str) -> list[Path]:
        # The same precedence as transformers': the single file wins over an index.
        if (self.directory / single_file).is_file():
            return [self.directory / single_file]
        if (self.directory / INDEX_FILE).is_file():
            names = sorted(set(self._weight_map().values()))
            missing = [name for name in names if not (self.directory / name).is_file()]
            if missing:
                raise WeightsError(
                    f"{self.directory / INDEX_FILE} names {_some(missing)}, which {_is_or_are(missing)} not there: the "
                    "download or copy is incomplete; fetch the missing files"
                )
            return [self.directory / name for name in names]
        pickled = sorted(path.name for path in self.directory.glob("*") if path.suffix in _PICKLED)
        if pickled:
            raise WeightsError(
                f"{self.directory} has only pickled weights ({_some(pickled)}), which can run code when opened and are "
                f"not read. {how_to_convert}"
            )
        if (self.directory / "adapter_model.safetensors").is_file():
            raise WeightsError(f"{self.directory} holds only a peft adapter; give the directory of its base model")
        raise WeightsError(f"{self.directory} has neither {single_file} nor {INDEX_FILE}: no weights to load")

    def _weight_map(self) -> dict[str, str]:
        path = self.directory / INDEX_FILE
        try:
            weight_map = json.loads(path.read_bytes())["weight_map"]
            if not all(isinstance(file, str) for file in weight_map.values()):
                raise TypeError("weight_map")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{path} is damaged: no JSON object with a weight_map; fetch it again") from error
        return dict(weight_map)

    def _check_index(self, single_file: str) -> None:
        if (self.directory / single_file).is_file():
            return
        for name, file in self._weight_map().items():
            if name not in self.tensors:
                raise WeightsError(
                    f"{self.directory / INDEX_FILE} says that tensor {name} is in {file}, but it is not: the files are "
                    "of different versions; fetch the checkpoint again"
                )

    def _open(self, file: Path) -> None:
        descriptor = self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        size = os.fstat(descriptor).st_size
        start = os.pread(descriptor, 8, 0)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(_MAX_HEADER, size - 8):
            raise WeightsError(
                f"{file} is no complete safetensors file: its header should take {length} bytes, the file has {size}; "
                "fetch it again"
            )
        try:
            header: dict[str, Any] = json.loads(os.pread(descriptor, length, 8))
            header.pop("__metadata__", None)
            found = [_stored(file, name, entry, 8 + length) for name, entry in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{file} is damaged: its header cannot be read ({error}); fetch it again") from error
        end = max((t.offset + t.nbytes for t in found), default=8 + length)
        if end != size:
            last = max(found, key=lambda t: t.offset + t.nbytes, default=None)
            what = "truncated" if size < end else "damaged"
            raise WeightsError(
                f"{file} is {what}: it has {size} bytes where its header needs {end}"
                + (f" (up to the end of tensor {last.name})" if last else "")
                + "; fetch it again"
            )
        for tensor in found:
            other = self.tensors.get(tensor.name)
            if other is not None:
                raise WeightsError(f"tensor {tensor.name} is in both {other.file} and {file}; remove the stale file")
            self.tensors[tensor.name] = tensor


def _stored(file: Path, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name} has dtype {entry['dtype']}, which is not supported")
    dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
    begin, end = (int(n) for n in entry["data_offsets"])
    if begin < 0 or min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name} of shape {list(shape)} cannot take bytes {begin} to {end}")
    return StoredTensor(name, file, dtype, shape, data_start + begin, end - begin)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_or_are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
