"""What values a config key can have: sizes, paths, numbers or `auto`, and the section that keys stand in.

Sizes are text such as `48GiB` (binary) or `500GB` (decimal), or a number of bytes; they are plain `int` bytes once
loaded. Paths are relative to the current directory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer
from pydantic_core import PydanticCustomError

_UNITS = {"b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgtp", start=1)
    for suffix, base in (("ib", 1024), ("b", 1000))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)
_SIZE_ACCEPTED = "a size such as 48GiB (binary) or 500GB (decimal), or a number of bytes, above 0"


def parse_size(value: object) -> int:
    """Bytes of `48GiB`, `1.5 GB`, `4096` or 4096. Raises ValueError for anything else, zero and negative included."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        unit = _UNITS.get(match[2].lower()) if match[2] else 1
        size = int(float(match[1]) * unit) if unit else 0
    elif isinstance(value, int | float) and not isinstance(value, bool) and value == int(value):
        size = int(value)
    else:
        size = 0
    if size <= 0:
        raise ValueError(_SIZE_ACCEPTED)
    return size


def format_size(nbytes: int) -> str | int:
    """The exact inverse of `parse_size`: the largest unit that divides `nbytes`, binary first, else the number."""
    for unit in ("TiB", "GiB", "MiB", "TB", "GB", "MB", "KiB"):
        scale = _UNITS[unit.lower()]
        if nbytes >= scale and nbytes % scale == 0:
            return f"{nbytes // scale}{unit}"
    return nbytes


def _not_bool(value: object) -> object:
    if isinstance(value, bool):  # bool is an int in Python; `steps: true` is a mistake, not 1
        raise PydanticCustomError("number", "accepted: a number")
    return value


def _size_or_auto(value: object) -> int | str:
    if value == "auto":
        return "auto"
    try:
        return parse_size(value)
    except ValueError as error:
        raise PydanticCustomError("size", 'accepted: "auto" or {size}', {"size": str(error)}) from None


def _size(value: object) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise PydanticCustomError("size", "accepted: {size}", {"size": str(error)}) from None


def _auto_or(least: int, what: str) -> Callable[[object], object]:
    def check(value: object) -> object:
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= least):
            return value
        raise PydanticCustomError(
            "count", 'accepted: "auto" or a number of {what}, {least} or more', {"what": what, "least": least}
        )

    return check


def _path(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _size_text(value: int | str) -> str | int:
    return value if isinstance(value, str) else format_size(value)


@dataclass(frozen=True)
class Accepted:
    """In the type of a key: what the config reference says that it takes, where the bare type says too little."""

    text: str


Int = Annotated[int, BeforeValidator(_not_bool)]
Float = Annotated[float, BeforeValidator(_not_bool)]
Size = Annotated[int, BeforeValidator(_size), PlainSerializer(_size_text, when_used="json"), Accepted("a size")]
SizeOrAuto = Annotated[
    int | Literal["auto"],
    BeforeValidator(_size_or_auto),
    PlainSerializer(_size_text, when_used="json"),
    Accepted("`auto` or a size"),
]
StepsOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_auto_or(1, "steps")), Accepted("`auto`, 1 or more")]
RowsOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_auto_or(1, "rows")), Accepted("`auto`, 1 or more")]
ChunksOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_auto_or(0, "chunks")), Accepted("`auto`, 0 or more")]
PathText = Annotated[str, BeforeValidator(_path), Field(min_length=1), Accepted("path")]
ModelPath = Annotated[PathText, Accepted("directory or hub id")]
DataPath = Annotated[PathText, Accepted("path or hub id")]
TokenizerPath = Annotated[PathText, Accepted("`bytes`, directory or hub id")]


class Section(BaseModel):
    """A mapping of the config file; unknown keys are errors, values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def is_local(path: str) -> bool:
    """Whether a `path` that may also be a hub id means a file or directory of this machine."""
    if path.startswith((".", "/", "~")) or Path(path).exists():
        return True
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) is None or Path(path).suffix in (
        ".jsonl", ".json", ".parquet", ".txt"
    )  # fmt: skip
