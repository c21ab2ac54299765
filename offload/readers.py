"""Reading training data: rows of .jsonl, .json and .parquet files, documents of .txt files, data sets from the hub.

Readers hold one row or one bounded piece of text at a time. Whatever is damaged raises `DataError` with file and line.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import xxhash

from offload.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
SEPARATOR = "<|endoftext|>"  # a line of its own that ends a document in a .txt file
PIECE = 1 << 16  # characters of one piece of a long text
_BLOCK = 1 << 20
_LARGEST_ROW = 256 << 20  # characters of one element of a JSON array

Row = tuple[str, dict[str, Any]]  # where it stands ("data.jsonl, line 3"), and its keys
Piece = tuple[str, str | dict[str, Any], bool]  # where, text or a row that holds one, whether the document ends here


class FileSource:
    """Local files, in order."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.name = str(files[0].parent if len(files) > 1 else files[0])

    def fingerprint(self) -> str:
        """A hash of the kinds and bytes of all files (their names and places do not count)."""
        digest = xxhash.xxh3_128()
        for file in self.files:
            digest.update(f"{file.suffix}:{file.stat().st_size}:".encode())
            try:
                with file.open("rb") as stream:
                    while block := stream.read(_BLOCK):
                        digest.update(block)
            except OSError as error:
                raise DataError(f"{file}: cannot be read: {error.strerror}") from error
        return digest.hexdigest()

    def rows(self) -> Iterator[Row]:
        for file in self.files:
            if file.suffix == ".txt":
                raise DataError(f"{file}: a .txt file can only be read with data.format: text")
            yield from read_rows(file)

    def texts(self) -> Iterator[Piece]:
        """Rows, and for .txt files pieces of their documents."""
        for file in self.files:
            if file.suffix == ".txt":
                for piece, ends in read_documents(file):
                    yield str(file), piece, ends
            else:
                for where, row in read_rows(file):
                    yield where, row, True


class HubSource:
    """The "train" split of a data set on the hub, through the optional package `datasets`."""

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            datasets = importlib.import_module("datasets")
        except ImportError as error:
            raise DataError(
                f"data.path: {name!r} is no file or directory here, and reading it as a data set of the hub needs the "
                "package `datasets` (pip install datasets)"
            ) from error
        try:
            self.table = datasets.load_dataset(name, split="train")
        except Exception as error:  # the hub client, the network and the data set's builder each raise their own
            raise DataError(
                f"data.path: {name!r} is no file or directory here, and cannot be loaded as a data set of the hub: "
                f"{(str(error).strip().splitlines() or [type(error).__name__])[0]}. Correct the path, or go online "
                "once so that it is cached"
            ) from error

    def fingerprint(self) -> str:
        return f"hub:{self.name}:{self.table._fingerprint}"

    def rows(self) -> Iterator[Row]:
        return read_table(self.name, self.table)

    def texts(self) -> Iterator[Piece]:
        for where, row in self.rows():
            yield where, row, True


def open_source(path: str | Path, key: str = "data.path") -> FileSource | HubSource:
    """What `path` names: a file, all data files below a directory (sorted), or a data set of the hub."""
    local = Path(path).expanduser()
    if local.is_dir():
        files = sorted(
            file
            for file in local.rglob("*")
            if file.suffix in SUFFIXES
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(local).parts)
        )
        if not files:
            raise DataError(f"{key}: {local} holds no data file; accepted: {', '.join(SUFFIXES)}")
        return FileSource(files)
    if local.is_file():
        if local.suffix not in SUFFIXES:
            raise DataError(f"{key}: {local}: unknown kind of file {local.suffix!r}; accepted: {', '.join(SUFFIXES)}")
        return FileSource([local])
    name = str(path)
    if local.suffix in SUFFIXES or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name):
        raise DataError(f"{key}: {name} does not exist")
    return HubSource(name)


def read_rows(file: Path) -> Iterator[Row]:
    """Rows of a .jsonl, .json (an array of objects, or one object per line) or .parquet file."""
    if file.suffix == ".parquet":
        return _read_parquet(file)
    if file.suffix == ".json" and _first_character(file) == "[":
        return _read_array(file)
    return _read_lines(file)


def _read_lines(file: Path) -> Iterator[Row]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error
        except RecursionError as error:
            raise DataError(f"{where}: JSON nested too deeply") from error
        yield where, _object(where, row)


def _lines(file: Path, limit: int = -1) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file; a line longer than `limit` characters comes in parts of the same number."""
    number, open_line = 0, False
    try:
        with file.open(encoding="utf-8-sig") as stream:
            while part := stream.readline(limit):
                number += not open_line
                open_line = not part.endswith("\n")
                yield number, part
    except UnicodeDecodeError as error:
        raise DataError(f"{file}, line {_undecodable_line(file)}: not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error


def _undecodable_line(file: Path) -> int:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def _first_character(file: Path) -> str:
    for _, line in _lines(file, 4096):
        if stripped := line.lstrip():
            return stripped[0]
    return ""


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be a JSON object, got {type(row).__name__}")
    return row


def _read_array(file: Path) -> Iterator[Row]:
    """Elements of a JSON array, decoded one by one from a sliding window."""
    decoder = json.JSONDecoder()
    blocks = _blocks(file)
    window, line, expected = "", 1, "["
    while True:
        stripped = window.lstrip(" \t\r\n")
        line += window.count("\n", 0, len(window) - len(stripped))
        window = stripped or next(blocks, "")
        if not window:
            break
        if not stripped:
            continue
        if window[0] == "{" and "{" in expected:
            while True:
                try:
                    row, end = decoder.raw_decode(window)
                    break
                except json.JSONDecodeError as error:
                    # The window may just end inside the element: then more of the file is needed.
                    cut = error.pos >= len(window) - 16 or error.msg.startswith("Unterminated string")
                    more = _take(blocks, len(window)) if cut and len(window) < _LARGEST_ROW else ""
                    if not more:
                        at = line + window.count("\n", 0, error.pos)
                        raise DataError(f"{file}, line {at}: not valid JSON: {error.msg}") from error
                    window += more
                except RecursionError as error:
                    raise DataError(f"{file}, line {line}: JSON nested too deeply") from error
            yield f"{file}, line {line}", row
            line += window.count("\n", 0, end)
            window, expected = window[end:], ",]"
        elif window[0] in expected:
            expected = {"[": "{]", ",": "{", "]": "end"}[window[0]]
            window = window[1:]
        else:
            want = {"{": "an object", "{]": "an object", ",]": "a comma or the end of the array"}
            raise DataError(
                f"{file}, line {line}: expected {want.get(expected, 'nothing after the array')}, got {window[:20]!r}"
            )
    if expected != "end":
        raise DataError(f"{file}, line {line}: not valid JSON: the array does not end")


def _blocks(file: Path) -> Iterator[str]:
    block: list[str] = []
    size = 0
    for _, part in _lines(file, _BLOCK):
        block.append(part)
        size += len(part)
        if size >= PIECE:
            yield "".join(block)
            block, size = [], 0
    if block:
        yield "".join(block)


def _take(blocks: Iterator[str], characters: int) -> str:
    """At least `characters` more characters, or what is left."""
    taken: list[str] = []
    while characters > 0 and (block := next(blocks, "")):
        taken.append(block)
        characters -= len(block)
    return "".join(taken)


def _read_parquet(file: Path) -> Iterator[Row]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file, memory_map=False, pre_buffer=False) as parquet:
            for batch in parquet.iter_batches(batch_size=64, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: damaged or not a parquet file (after row {number}): {error}") from error


def read_table(name: str, table: Iterable[dict[str, Any]]) -> Iterator[Row]:
    """Rows of a data set object of the package `datasets`."""
    for number, row in enumerate(table, 1):
        where = f"{name}, row {number}"
        yield where, _object(where, row)


def read_documents(file: Path) -> Iterator[tuple[str, bool]]:
    """Documents of a .txt file in pieces of about 64 K characters: (piece, whether its document ends with it).

    A line `<|endoftext|>`, or two or more blank lines in a row, end a document; one blank line is a paragraph inside
    it. A piece ends in front of a line that is not blank (or inside a line that is longer than a piece).
    """
    parts: list[str] = []
    blanks: list[str] = []
    size, started = 0, False
    for _, line in _lines(file, PIECE):
        if line.strip() == SEPARATOR:
            if started:
                yield "".join(parts).rstrip("\n"), True
            parts, size, blanks, started = [], 0, [], False
        elif not line.strip():
            blanks.append(line)
        else:
            if started and len(blanks) >= 2:
                yield "".join(parts).rstrip("\n"), True
                parts, size, started = [], 0, False
            elif started:
                parts += blanks
                if size >= PIECE:
                    yield "".join(parts), False
                    parts, size = [], 0
            blanks, started = [], True
            parts.append(line)
            size += len(line)
    if started:
        yield "".join(parts).rstrip("\n"), True
