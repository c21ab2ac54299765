"""What the rows of each `data.format` mean: checking their keys, and turning them into token ids and labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn, Protocol, TypeVar

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from offload.errors import DataError
from offload.readers import PIECE, FileSource, HubSource
from offload.tokenization import BATCH_CHARACTERS, affixes, encode, encode_chat

IGNORE = -100  # label of a token that is not counted

KEYS = {
    "text": "text (a string)",
    "alpaca": "instruction, output and optionally input (strings)",
    "chat": "messages (a list of {role, content}) and optionally tools (a list)",
    "tokens": "input_ids (a list of integers) and optionally labels (as long; -100 where not counted)",
}

_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


T = TypeVar("T", bound=tuple[Any, ...])


class Sink(Protocol):
    """Where encoded documents go: ids in any number of parts, then the end of the document.

    A document of fewer than two tokens has nothing to predict, and the sink leaves it out.
    """

    def append(self, ids: Any, labels: Any | None) -> None: ...

    def end_document(self) -> None: ...


class Encoder:
    """Encodes one source in one format into a sink; `notes` says afterwards what was cut or left out."""

    def __init__(
        self, format: str, tokenizer: PreTrainedTokenizerBase | None, sequence_length: int, vocab_size: int
    ) -> None:
        self.format = format
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.examples = self.truncated = self.dropped = 0

    def run(self, source: FileSource | HubSource, sink: Sink) -> None:
        if self.format == "text":
            self._text(source, sink)
        elif self.format == "tokens":
            self._tokens(source, sink)
        else:
            self._answers(source, sink)

    @property
    def notes(self) -> list[str]:
        notes = []
        if self.truncated:
            notes.append(
                f"{self.truncated} of {self.examples} examples are longer than data.sequence_length "
                f"{self.sequence_length} and were cut at the end"
            )
        if self.dropped:
            why = "have fewer than two tokens" if self.format == "text" else "have no counted token left"
            notes.append(f"{self.dropped} of {self.examples} examples {why} and were left out")
        return notes

    def _get(self, where: str, row: dict[str, Any], key: str, kind: type | tuple[type, ...], what: str) -> Any:
        if key not in row:
            self._refuse(where, row, f"missing key {key!r}")
        if not isinstance(row[key], kind):
            self._refuse(where, row, f"{key!r} must be {what}, got {type(row[key]).__name__}")
        return row[key]

    def _string(self, where: str, row: dict[str, Any], key: str) -> str:
        value = self._get(where, row, key, str, "a string")
        return self._encodable(where, row, key, value)

    def _encodable(self, where: str, row: dict[str, Any], key: str, value: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            self._refuse(where, row, f"{key!r} holds a lone surrogate ({error.object[error.start]!r})")
        return value

    def _refuse(self, where: str, row: dict[str, Any], what: str) -> NoReturn:
        raise DataError(
            f"{where}: {what}. A row of format {self.format} takes {KEYS[self.format]}; "
            f"this one has: {', '.join(map(str, row)) or 'no key'}"
        )

    def _check_ids(self, where: str, ids: np.ndarray) -> None:
        if len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
            bad = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise DataError(
                f"{where}: token id {bad} is outside the model's vocabulary of {self.vocab_size}; "
                "use the model's own tokenizer, or a model with a larger vocab_size"
            )

    # text

    def _text(self, source: FileSource | HubSource, sink: Sink) -> None:
        assert self.tokenizer is not None
        prefix, suffix = affixes(self.tokenizer)
        length = 0
        for batch in _batches(self._pieces(source)):
            for (where, _, ends), ids in zip(
                batch, encode(self.tokenizer, [text for _, text, _ in batch]), strict=True
            ):
                part = np.asarray([*([] if length else prefix), *ids, *(suffix if ends else [])], dtype=np.int64)
                self._check_ids(where, part)
                sink.append(part, None)
                length += len(part)
                if ends:
                    self.examples += 1
                    self.dropped += length < 2
                    sink.end_document()
                    length = 0

    def _pieces(self, source: FileSource | HubSource) -> Iterator[tuple[str, str, bool]]:
        for where, value, ends in source.texts():
            if isinstance(value, str):
                yield where, value, ends
                continue
            text = self._string(where, value, "text")
            if not text.strip():
                self.examples += 1
                self.dropped += 1
                continue
            start = 0
            while len(text) - start > PIECE:
                cut = text.rfind("\n", start, start + PIECE) + 1
                cut = cut if cut > start else start + PIECE
                yield where, text[start:cut], False
                start = cut
            yield where, text[start:], True

    # tokens

    def _tokens(self, source: FileSource | HubSource, sink: Sink) -> None:
        for where, row in source.rows():
            self.examples += 1
            ids = self._integers(where, row, "input_ids")
            self._check_ids(where, ids)
            labels = None
            if row.get("labels") is not None:
                labels = self._integers(where, row, "labels")
                if len(labels) != len(ids):
                    self._refuse(where, row, f"'labels' has {len(labels)} entries and 'input_ids' {len(ids)}")
                self._check_ids(f"{where}: labels", labels[labels != IGNORE])
            if len(ids) < 2 or (labels is not None and not (labels[1:] != IGNORE).any()):
                self.dropped += 1
                continue
            sink.append(ids, labels)
            sink.end_document()

    def _integers(self, where: str, row: dict[str, Any], key: str) -> np.ndarray:
        values = self._get(where, row, key, (list, np.ndarray), "a list of integers")
        if any(isinstance(v, bool) or not isinstance(v, (int, np.integer)) for v in values):
            self._refuse(where, row, f"{key!r} must hold integers only")
        try:
            return np.asarray(values, dtype=np.int64)
        except OverflowError:
            self._refuse(where, row, f"{key!r} holds an integer of more than 64 bits")

    # alpaca and chat

    def _answers(self, source: FileSource | HubSource, sink: Sink) -> None:
        encoded = self._alpaca(source) if self.format == "alpaca" else self._chat(source)
        for where, ids, counted in encoded:
            self.examples += 1
            self._check_ids(where, np.asarray(ids, dtype=np.int64))
            if len(ids) > self.sequence_length:
                self.truncated += 1
                ids, counted = ids[: self.sequence_length], counted[: self.sequence_length]
            counted[:1] = [False]
            if not any(counted):
                self.dropped += 1
                continue
            sink.append(ids, [i if count else IGNORE for i, count in zip(ids, counted, strict=True)])
            sink.end_document()

    def _alpaca(self, source: FileSource | HubSource) -> Iterator[tuple[str, list[int], list[bool]]]:
        """The prompt and the answer are encoded apart, so a prompt has the same ids when the model is asked later."""
        assert self.tokenizer is not None
        prefix, suffix = affixes(self.tokenizer)
        for batch in _batches(self._alpaca_texts(source)):
            prompts = encode(self.tokenizer, [prompt for _, prompt, _ in batch])
            answers = encode(self.tokenizer, [answer for _, _, answer in batch])
            for (where, _, _), prompt, answer in zip(batch, prompts, answers, strict=True):
                ids = [*prefix, *prompt, *answer, *suffix]
                yield where, ids, [at >= len(prefix) + len(prompt) for at in range(len(ids))]

    def _alpaca_texts(self, source: FileSource | HubSource) -> Iterator[tuple[str, str, str]]:
        for where, row in source.rows():
            instruction = self._string(where, row, "instruction")
            output = self._string(where, row, "output")
            context = self._string(where, row, "input") if row.get("input") is not None else ""
            template = _ALPACA_WITH_INPUT if context.strip() else _ALPACA
            yield where, template.format(instruction=instruction, input=context), output

    def _chat(self, source: FileSource | HubSource) -> Iterator[tuple[str, list[int], list[bool]]]:
        assert self.tokenizer is not None
        if not self.tokenizer.chat_template:
            raise DataError(
                "data.format: chat needs a tokenizer with a chat template, and this one has none; use the tokenizer of "
                'an instruction-tuned model, or data.tokenizer: "bytes"'
            )
        for where, row in source.rows():
            messages = [self._message(where, row, message) for message in self._messages(where, row)]
            tools = row.get("tools")
            try:
                yield where, *encode_chat(self.tokenizer, messages, tools)
            except (ValueError, TypeError, jinja2.TemplateError) as error:
                raise DataError(f"{where}: the conversation cannot be rendered: {error}") from error

    def _messages(self, where: str, row: dict[str, Any]) -> list[Any]:
        messages = self._get(where, row, "messages", list, "a list")
        if not messages:
            self._refuse(where, row, "'messages' is empty")
        if row.get("tools") is not None:
            self._get(where, row, "tools", list, "a list")
        return list(messages)

    def _message(self, where: str, row: dict[str, Any], message: Any) -> dict[str, Any]:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            self._refuse(where, row, f"each message must be an object with a 'role', got {str(message)[:60]}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            self._refuse(where, row, f"the 'content' of a message must be a string, got {type(content).__name__}")
        self._encodable(where, row, "content", content or "")
        return {key: value for key, value in message.items() if value is not None}


def _batches(items: Iterator[T]) -> Iterator[list[T]]:
    """Groups of consecutive items (place, texts...) with about `BATCH_CHARACTERS` characters in their texts."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += sum(len(part) for part in item[1:] if isinstance(part, str))
        if size >= BATCH_CHARACTERS or len(batch) >= 512:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
