"""Training data: from files to the global batch of any step.

`open_dataset` tokenises a source once into flat files (`tokencache`), lays its documents into rows of
`sequence_length` (`packing`) and returns a `Dataset`; `Samples.batch(step)` is a pure function of the data, the seed
and the step, so resuming in the middle of an epoch is asking for the next step. Nothing but the batch is held in RAM.

Rules:

- *text*: a document is a row's `text`, or a document of a .txt file (`readers.read_documents` says where one ends). It
  gets the special tokens that the tokenizer adds, and its end-of-text token. Every token counts but the first of a
  piece. Long documents are cut into windows; with `packing` rows are filled to the end.
- *alpaca*, *chat*: only the answer counts. Longer examples are cut at the end. With `packing`, whole examples share a
  row.
- *tokens*: `input_ids`, and `labels` if given. Rows with labels are packed whole, rows without are filled as text is;
  longer ones are cut into windows.

With `padding` off, rows that are not filled to the end are left out.

A packed row has `position_ids` that start again at 0 for every piece and no `attention_mask`: from that, transformers
builds masks in which documents do not see each other, provided the model keeps no cache (`use_cache=False`). Padding
at the end of a packed row is position 0, each pad token a sequence of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from offload.errors import ConfigError, DataError
from offload.formats import IGNORE, KEYS, Encoder
from offload.packing import Piece, pack, shuffled
from offload.readers import open_source
from offload.samples import Samples, count_tokens
from offload.tokencache import Entry, FlatWriter, TokenWriter, cached
from offload.tokenization import fingerprint, load_tokenizer

__all__ = ["Dataset", "Samples", "count_tokens", "open_dataset"]

_LAYOUT_VERSION = 1  # part of every cache key: raise it when the same data would be encoded or packed otherwise
_SHORTEST_ROW = 4
_DOCUMENTS_AT_ONCE = 4096


class DataConfig(Protocol):
    """The `data` section of the config, as far as it is used here."""

    path: Any
    format: Any
    tokenizer: Any
    sequence_length: Any
    packing: Any
    padding: Any
    eval_fraction: Any
    eval_path: Any


class Dataset:
    """The splits of `data`: `train`, and `eval` if asked for. `notes` says what was cut or left out; `tokenizer` is
    `None` only for pre-tokenised data whose model brings none. A context manager; `close` closes the files."""

    def __init__(
        self, train: Samples, eval: Samples | None, tokenizer: PreTrainedTokenizerBase | None, notes: list[str]
    ) -> None:
        self.train = train
        self.eval = eval
        self.tokenizer = tokenizer
        self.notes = notes

    def close(self) -> None:
        for samples in (self.train, self.eval):
            if samples is not None:
                samples.close()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_dataset(
    data_cfg: DataConfig,
    model_dir_or_none: str | Path | None,
    *,
    vocab_size: int,
    micro_batch_size: int,
    global_batch_size: int,
    seed: int,
    cache_dir: Path,
) -> Dataset:
    """Opens the data that the config's `data` section names, tokenising it into `cache_dir` if it is not there yet.

    `model_dir_or_none` is where the model's own tokenizer lives. The cache is keyed by the content of the data and of
    the tokenizer, so a resumed run finds its files and a changed one makes new ones.
    Raises `DataError` for data that is missing, damaged, empty or has token ids outside `vocab_size`, and
    `ConfigError` for a config that cannot work.
    """
    _check(data_cfg, micro_batch_size, global_batch_size)
    tokenizer = load_tokenizer(data_cfg.tokenizer, model_dir_or_none)
    if tokenizer is None and data_cfg.format != "tokens":
        raise DataError(
            "data.tokenizer: the model brings no tokenizer, so one must be named: "
            '"bytes" for the embedded byte tokenizer, a local directory, or a hub id'
        )
    opener = _Opener(data_cfg, tokenizer, vocab_size, global_batch_size, seed, Path(cache_dir))
    tokens, notes = opener.tokens(data_cfg.path, "data.path")
    fraction = 0.0 if data_cfg.eval_path else float(data_cfg.eval_fraction)
    split = _Split(tokens, fraction, seed, cuttable=data_cfg.format == "text")
    train = opener.samples(tokens, split.train, f"train:{seed}:{fraction}" if fraction else "all")
    held_out = None
    if data_cfg.eval_path:
        eval_tokens, eval_notes = opener.tokens(data_cfg.eval_path, "data.eval_path")
        notes += [f"eval: {note}" for note in eval_notes]
        held_out = opener.samples(eval_tokens, _Split(eval_tokens, 0.0, seed, cuttable=False).train, "all")
    elif fraction:
        held_out = opener.samples(tokens, split.eval, f"eval:{seed}:{fraction}")
    for part, samples in (("", train), ("eval: ", held_out)):
        if samples is not None and samples.left_out:
            notes.append(f"{part}{samples.left_out} rows that samples do not fill are left out")
    return Dataset(train, held_out, tokenizer, notes)


def _check(cfg: DataConfig, micro_batch_size: int, global_batch_size: int) -> None:
    if cfg.format not in KEYS:
        raise ConfigError(f"data.format: {cfg.format!r}; accepted: {', '.join(KEYS)}")
    if cfg.sequence_length < _SHORTEST_ROW:
        raise ConfigError(f"data.sequence_length: {cfg.sequence_length}; accepted: {_SHORTEST_ROW} or more")
    if not 0 <= cfg.eval_fraction < 1:
        raise ConfigError(f"data.eval_fraction: {cfg.eval_fraction}; accepted: 0 or more, and less than 1")
    if cfg.eval_path and cfg.eval_fraction:
        raise ConfigError("data.eval_fraction and data.eval_path: both are set; give one of them")
    if micro_batch_size < 1 or global_batch_size % micro_batch_size:
        raise ConfigError(
            f"train.global_batch_size: {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size}"
        )


class _Opener:
    """Makes or finds the cache entries of one config."""

    def __init__(
        self,
        cfg: DataConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        vocab_size: int,
        global_batch_size: int,
        seed: int,
        cache_dir: Path,
    ) -> None:
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.cache_dir = cache_dir

    def tokens(self, path: str | Path, key: str) -> tuple[Entry, list[str]]:
        """The tokenised source and what to tell about it."""
        cfg = self.cfg
        source = open_source(path, key)
        # Only where examples are cut to it does the sequence length change the tokens.
        cut = cfg.sequence_length if cfg.format in ("alpaca", "chat") else None
        tokenizer_key = fingerprint(self.tokenizer) if cfg.format != "tokens" else None
        name = _key("tokens", source.fingerprint(), cfg.format, tokenizer_key, cut)
        dtypes = {"tokens": "<i4", "documents": "<i8"}
        if cfg.format != "text":
            dtypes["labels"] = "<i4"

        def build(writers: dict[str, FlatWriter]) -> dict[str, Any]:
            encoder = Encoder(cfg.format, self.tokenizer, cfg.sequence_length, self.vocab_size)
            sink = TokenWriter(writers)
            encoder.run(source, sink)
            if writers["documents"].length == 0:
                why = "; ".join(encoder.notes) or "there is no row in it"
                raise DataError(f"{key}: {source.name} gives nothing to train on: {why}")
            return {"notes": encoder.notes, "largest_id": sink.largest_id, "has_labels": sink.has_labels}

        entry = cached(self.cache_dir, name, dtypes, build)
        if entry.meta["largest_id"] >= self.vocab_size:  # an entry that was made for another model
            raise DataError(
                f"{key}: {source.name} has token id {entry.meta['largest_id']}, outside the model's vocabulary of "
                f"{self.vocab_size}; use the model's own tokenizer, or a model with a larger vocab_size"
            )
        return entry, list(entry.meta["notes"])

    def samples(self, tokens: Entry, documents: Callable[[], Iterator[Piece]], part: str) -> Samples:
        """Rows of those `documents` that `part` names."""
        cfg = self.cfg
        has_labels = bool(tokens.meta["has_labels"])
        name = _key("rows", tokens.directory.name, cfg.sequence_length, bool(cfg.packing), bool(cfg.padding), part)

        def counted(piece: Piece) -> bool:
            return bool((tokens.arrays["labels"].read(*piece)[1:] != IGNORE).any())

        def build(writers: dict[str, FlatWriter]) -> dict[str, Any]:
            total = pieces = left_out = 0
            writers["rows"].append([0])
            for row in pack(documents(), cfg.sequence_length, packing=cfg.packing, whole=has_labels, counted=counted):
                filled = sum(length for _, length in row)
                if not cfg.padding and filled < cfg.sequence_length:
                    left_out += 1
                    continue
                writers["pieces"].append(np.asarray(row).ravel())
                pieces += len(row)
                total += filled
                writers["rows"].append([pieces])
            if not pieces and left_out:
                raise DataError(
                    f"data.path: {cfg.path}: no sample fills a row of {cfg.sequence_length} tokens; set a shorter "
                    "data.sequence_length, or data.padding to true"
                )
            if not pieces:
                raise DataError(f"data.path: {cfg.path}: no row with a counted token")
            return {"tokens": total, "left_out": left_out}

        pad_id = 0
        if self.tokenizer is not None:
            choices = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
            pad_id = next((i for i in choices if i is not None and i < self.vocab_size), 0)
        return Samples(
            tokens,
            cached(self.cache_dir, name, {"pieces": "<i8", "rows": "<i8"}, build),
            sequence_length=cfg.sequence_length,
            packing=bool(cfg.packing),
            mask_first=bool(cfg.packing) or cfg.format != "tokens" or not has_labels,
            pad_id=pad_id,
            global_batch_size=self.global_batch_size,
            seed=self.seed,
        )


class _Split:
    """Which documents train and which are held out: a `fraction` of them, chosen by the seed.

    Where that is less than one document and documents may be cut, the end of the longest one is held out instead.
    """

    def __init__(self, tokens: Entry, fraction: float, seed: int, *, cuttable: bool) -> None:
        self._documents = tokens.arrays["documents"]
        self._count = len(self._documents) // 2
        self._seed = seed
        self._held_out = round(self._count * fraction)
        self._tail: tuple[Piece, int] | None = None  # a document, and how many of its last tokens are held out
        if not fraction or 0 < self._held_out < self._count:
            return
        if cuttable and self._held_out == 0:
            longest = max(self._all(), key=lambda document: document[1])
            tail = round(fraction * sum(length for _, length in self._all()))
            if tail >= 2 and longest[1] - tail >= 2:
                self._tail = (longest, tail)
                return
        raise DataError(
            f"data.eval_fraction: {fraction} of {self._count} examples leaves none to train on or none to evaluate; "
            "change the fraction or name a file of its own with data.eval_path"
        )

    def _all(self) -> Iterator[Piece]:
        for first in range(0, self._count, _DOCUMENTS_AT_ONCE):
            count = min(_DOCUMENTS_AT_ONCE, self._count - first)
            for start, length in self._documents.read(2 * first, 2 * count).reshape(-1, 2).tolist():  # noqa: UP028
                yield start, length

    def _chosen(self, held_out: bool) -> Iterator[Piece]:
        ranks = np.empty(0, dtype=np.int64)
        for number, document in enumerate(self._all()):
            if number % _DOCUMENTS_AT_ONCE == 0:
                here = np.arange(number, min(number + _DOCUMENTS_AT_ONCE, self._count))
                ranks = shuffled(here, self._count, self._seed, -1)  # no epoch is -1
            if (ranks[number % _DOCUMENTS_AT_ONCE] < self._held_out) == held_out:
                yield document

    def train(self) -> Iterator[Piece]:
        if self._tail is None:
            yield from self._chosen(held_out=False)
            return
        cut, tail = self._tail
        for start, length in self._all():
            yield start, length - tail if (start, length) == cut else length

    def eval(self) -> Iterator[Piece]:
        if self._tail is None:
            yield from self._chosen(held_out=True)
            return
        (start, length), tail = self._tail
        yield start + length - tail, tail


def _key(*parts: Any) -> str:
    text = json.dumps([_LAYOUT_VERSION, *parts])
    return f"{parts[0]}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
