"""Rows of tokens as batches: the global batch of any step, and what of it is padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from offload.formats import IGNORE
from offload.packing import shuffled
from offload.tokencache import Entry


class Samples:
    """Rows of one split. `len()` is their number; all have `sequence_length` tokens, padding included."""

    def __init__(
        self,
        tokens: Entry,
        rows: Entry,
        *,
        sequence_length: int,
        packing: bool,
        mask_first: bool,
        pad_id: int,
        global_batch_size: int,
        seed: int,
    ) -> None:
        self._tokens = tokens
        self._rows = rows
        self._sequence_length = sequence_length
        self._packing = packing
        self._mask_first = mask_first
        self._pad_id = pad_id
        self._global_batch_size = global_batch_size
        self._seed = seed

    def __len__(self) -> int:
        return len(self._rows.arrays["rows"]) - 1

    @property
    def steps_per_epoch(self) -> int:
        """Global batches that hold every row at least once; the last one goes on into the next epoch."""
        return -(-len(self) // self._global_batch_size)

    @property
    def tokens(self) -> int:
        """Non-pad tokens of one epoch."""
        return int(self._rows.meta["tokens"])

    @property
    def left_out(self) -> int:
        """Rows that were left out because `data.padding` is false."""
        return int(self._rows.meta["left_out"])

    def batch(self, step: int) -> dict[str, Tensor]:
        """The global batch of `step` (0-based): int64 CPU tensors of shape [global_batch_size, sequence_length].

        Sample number k = step * global_batch_size + j is row k % len(self) of epoch k // len(self), and each epoch is
        a permutation of the rows chosen by the seed and the epoch. `labels` are -100 where not counted. There is an
        `attention_mask` only if the batch has padding and is not packed, and `position_ids` only if it is packed.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        samples = np.arange(step * self._global_batch_size, (step + 1) * self._global_batch_size)
        epochs, positions = np.divmod(samples, len(self))
        indices = np.empty_like(samples)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = shuffled(positions[here], len(self), self._seed, int(epoch))
        return self._collate(indices)

    def eval_batches(self) -> Iterator[dict[str, Tensor]]:
        """All rows once, in order, in batches of `global_batch_size`; the last batch may have fewer rows."""
        for start in range(0, len(self), self._global_batch_size):
            yield self._collate(np.arange(start, min(start + self._global_batch_size, len(self))))

    def close(self) -> None:
        self._tokens.close()
        self._rows.close()

    def _collate(self, indices: np.ndarray) -> dict[str, Tensor]:
        shape = (len(indices), self._sequence_length)
        ids = np.full(shape, self._pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORE, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        arrays = self._tokens.arrays
        for at, index in enumerate(indices):
            first, end = self._rows.arrays["rows"].read(int(index), 2)
            column = 0
            pieces = self._rows.arrays["pieces"].read(2 * int(first), 2 * int(end - first)).reshape(-1, 2)
            for start, length in pieces.tolist():
                span = slice(column, column + length)
                ids[at, span] = arrays["tokens"].read(start, length)
                labels[at, span] = arrays["labels"].read(start, length) if "labels" in arrays else ids[at, span]
                if self._mask_first:
                    labels[at, column] = IGNORE
                positions[at, span] = np.arange(length)
                mask[at, span] = 1
                column += length
        batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        if self._packing:
            batch["position_ids"] = torch.from_numpy(positions)
        elif not mask.all():
            batch["attention_mask"] = torch.from_numpy(mask)
        return batch


def count_tokens(batch: dict[str, Tensor]) -> int:
    """Tokens of a batch (or of any rows of it) that are not padding.

    With an `attention_mask` its ones; in a packed batch all but the padding: positions 0 that no position 1 follows
    and whose label is not counted. Otherwise every token of `input_ids` (or `inputs_embeds`; without both, none).
    """
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None and mask.ndim == 2:
        return int(mask.count_nonzero())
    ids = batch["input_ids"] if "input_ids" in batch else batch.get("inputs_embeds", torch.empty(0, 1))[..., 0]
    if positions is None or positions.shape != ids.shape:
        return ids.numel()
    following = torch.nn.functional.pad(positions[:, 1:], (0, 1))
    padding = (positions == 0) & (following != 1)
    if "labels" in batch:
        padding &= batch["labels"] == IGNORE
    return ids.numel() - int(padding.count_nonzero())


def has_whole_rows(batch: Mapping[str, Tensor]) -> bool:
    """Whether every row of the batch is one sequence without padding, as far as its masks and positions tell."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None and (mask.ndim != 2 or not bool((mask != 0).all())):
        return False
    return positions is None or bool((positions.diff(dim=-1) == 1).all())
