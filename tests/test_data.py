"""The data room: formats, packing, order, cache and errors, with real tokenizers, files and models."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
)

from offload.data import Dataset, count_tokens, open_dataset
from offload.errors import ConfigError, DataError
from offload.formats import IGNORE
from offload.packing import OPEN_ROWS, fill_rows, fit_rows, shuffled, windows
from offload.readers import read_documents, read_rows, read_table
from offload.samples import has_whole_rows
from offload.tokencache import cached
from offload.tokenization import CHAT_TEMPLATE, affixes, byte_tokenizer, encode_chat

EXAMPLES = Path(__file__).parents[1] / "examples"
VOCABULARY = 272


@dataclass
class Config:
    path: Any
    format: str = "tokens"
    tokenizer: str | None = "bytes"
    sequence_length: int = 16
    packing: bool = True
    padding: bool = True
    eval_fraction: float = 0.0
    eval_path: Any = None


def load(
    config: Config, cache: Path, batch: int = 4, seed: int = 0, vocab_size: int = VOCABULARY, **kwargs: Any
) -> Dataset:
    return open_dataset(
        config,
        kwargs.pop("model_dir", None),
        vocab_size=vocab_size,
        micro_batch_size=1,
        global_batch_size=batch,
        seed=seed,
        cache_dir=cache,
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def documents(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of the pieces of a batch, found by positions alone (as a model finds them), without padding."""
    found = []
    for row in range(len(batch["input_ids"])):
        ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
        if "position_ids" in batch:
            positions = batch["position_ids"][row].tolist()
            starts = [at for at, position in enumerate(positions) if position == 0]
            for start, end in pairwise([*starts, len(ids)]):
                assert positions[start:end] == list(range(end - start))
                if end - start > 1:
                    found.append((ids[start:end], labels[start:end]))
        else:
            real = int(batch["attention_mask"][row].sum()) if "attention_mask" in batch else len(ids)
            found.append((ids[:real], labels[:real]))
    return found


# packing


@given(st.integers(1, 300), st.integers(0, 5), st.integers(0, 9))
def test_shuffled_is_a_permutation_that_can_be_entered_anywhere(length: int, seed: int, epoch: int) -> None:
    whole = shuffled(np.arange(length), length, seed, epoch)
    assert sorted(whole.tolist()) == list(range(length))
    part = shuffled(np.arange(length // 2, length), length, seed, epoch)
    assert part.tolist() == whole[length // 2 :].tolist()


def test_shuffled_mixes_and_does_not_repeat_itself() -> None:
    orders = {tuple(shuffled(np.arange(50), 50, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400
    means = np.mean([shuffled(np.arange(50), 50, seed, 0) for seed in range(2000)], axis=0)
    assert np.abs(means - 24.5).max() < 2  # standard deviation of each mean is 0.32


lengths = st.lists(st.integers(2, 40), min_size=1, max_size=60)


@given(lengths, st.integers(4, 24))
def test_filled_rows_hold_every_token_once_and_are_full(sizes: list[int], size: int) -> None:
    starts = np.cumsum([0, *sizes]).tolist()
    rows = list(fill_rows(zip(starts, sizes, strict=False), size))
    pieces = [piece for row in rows for piece in row]
    assert [at for start, length in pieces for at in range(start, start + length)] == list(range(sum(sizes)))
    assert all(length >= 2 for _, length in pieces)
    used = [sum(length for _, length in row) for row in rows]
    assert all(size - 2 <= tokens <= size for tokens in used[:-1]) and used[-1] <= size
    edges = set(starts)
    assert all(not any(start < edge < start + length for edge in edges) for start, length in pieces)


@given(lengths, st.integers(4, 24))
def test_fitted_rows_hold_every_piece_once(sizes: list[int], size: int) -> None:
    starts = np.cumsum([0, *sizes]).tolist()
    pieces = [piece for document in zip(starts, sizes, strict=False) for piece in windows(document, size)]
    assert all(2 <= length <= size for _, length in pieces)
    rows = list(fit_rows(pieces, size))
    assert sorted(piece for row in rows for piece in row) == pieces
    assert all(sum(length for _, length in row) <= size for row in rows)


def test_first_fit_packs_tightly_and_keeps_few_rows_open() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(10, 600, 3000)
    rows = list(fit_rows([(0, int(n)) for n in sizes], 1024))
    assert len(rows) * 1024 < 1.03 * sizes.sum() + OPEN_ROWS * 1024 / 2


token_rows = st.lists(
    st.tuples(st.lists(st.integers(0, 255), min_size=2, max_size=40), st.booleans()), min_size=1, max_size=15
)


@settings(max_examples=40, deadline=None)
@given(rows=token_rows, size=st.integers(4, 24), packing=st.booleans(), labelled=st.booleans(), seed=st.integers(0, 99))
def test_every_counted_token_appears_once(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], size: int, packing: bool, labelled: bool, seed: int
) -> None:
    """Each epoch has every document's tokens once, in pieces that begin uncounted; a resumed run sees the same."""
    folder = tmp_path_factory.mktemp("data")
    # Ids tell documents apart: what a row holds can be traced back to where it came from.
    made, at = [], 0
    for tokens, every in rows:
        ids = list(range(at, at + len(tokens)))
        at += len(tokens)
        row: dict[str, Any] = {"input_ids": ids}
        if labelled:
            row["labels"] = [i if every or i % 3 else IGNORE for i in ids]
        made.append(row)
    path = write_rows(folder / "rows.jsonl", made)
    config = Config(path, tokenizer=None, sequence_length=size, packing=packing)
    data = load(config, folder / "cache", batch=3, seed=seed, vocab_size=at)
    steps = data.train.steps_per_epoch
    batches = [data.train.batch(step) for step in range(2 * steps + 1)]
    samples = [sample for batch in batches for sample in zip(*[batch[key] for key in sorted(batch)], strict=True)]
    keys = [key for key in sorted(batches[0]) if key != "attention_mask"]
    epoch = [
        {key: batch[key][j] for key in batch}
        for step, batch in enumerate(batches)
        for j in range(3)
        if step * 3 + j < len(data.train)
    ]
    assert len(samples) == 3 * len(batches) and set(keys) >= {"input_ids", "labels"}
    found = [piece for row in epoch for piece in documents({key: value[None] for key, value in row.items()})]
    seen = [i for ids, _ in found for i in ids]
    assert len(seen) == len(set(seen)) == sum(count_tokens({k: v[None] for k, v in r.items()}) for r in epoch)
    labels_of = {
        i: label for row in made for i, label in zip(row["input_ids"], row.get("labels", row["input_ids"]), strict=True)
    }
    begin = {row["input_ids"][0] for row in made}
    for ids, labels in found:
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        assert not any(i in begin for i in ids[1:])  # no piece runs over the end of its document
        first = labels_of[ids[0]] if labelled and not packing else IGNORE
        assert labels == [first, *(labels_of[i] for i in ids[1:])]
    missing = set(labels_of) - set(seen)
    if not labelled:
        assert not missing
    else:  # only what has nothing to count is left out
        for row in made:
            whole = all(i in missing for i in row["input_ids"])
            assert whole or len(row["input_ids"]) > size or not missing & set(row["input_ids"])
            if whole and len(row["input_ids"]) <= size:
                assert all(label == IGNORE for label in row["labels"][1:])
    # Resuming is asking for the next step, in another process's view of the same cache.
    again = load(config, folder / "cache", batch=3, seed=seed, vocab_size=at)
    for step in reversed(range(len(batches))):
        other = again.train.batch(step)
        assert other.keys() == batches[step].keys()
        assert all(torch.equal(other[key], batches[step][key]) for key in other)


def test_order_is_by_seed_and_epoch_and_batches_cross_epochs(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"input_ids": [i] * 16} for i in range(10)])
    data = load(Config(path), tmp_path / "cache", batch=4)
    assert len(data.train) == 10 and data.train.steps_per_epoch == 3
    order = torch.cat([data.train.batch(step)["input_ids"][:, 0] for step in range(10)]).tolist()
    epochs = [order[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = load(Config(path), tmp_path / "cache", batch=4, seed=1)
    assert other.train.batch(0)["input_ids"][:, 0].tolist() != order[:4]
    with pytest.raises(ValueError, match="negative"):
        data.train.batch(-1)
    assert len(os.listdir(tmp_path / "cache")) == 2  # the seed changes neither tokens nor rows


# packed documents in real models


def tiny(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, intermediate_size=64, use_cache=False),
        Qwen3Config(**SMALL, intermediate_size=64, head_dim=16, num_key_value_heads=1, use_cache=False),
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, use_cache=False),
        Gemma3TextConfig(
            **SMALL,
            intermediate_size=64,
            head_dim=16,
            num_key_value_heads=1,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            use_cache=False,
        ),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("format", ["text", "chat"])
def test_packed_documents_are_alone_in_the_model(config: Any, format: str, tmp_path: Path) -> None:
    """Logits and loss of packed documents equal those of each document run by itself; padding counts for nothing."""
    model = tiny(config)
    if format == "text":
        path = write_rows(tmp_path / "rows.jsonl", [{"text": "abc" * n} for n in (3, 9, 1, 4, 6, 20)])
    else:
        turns = [("hi", "hello"), ("2+2?", "4"), ("and?", "a longer answer, this"), ("bye", "bye!")]
        path = write_rows(
            tmp_path / "rows.jsonl",
            [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns],
        )
    data = load(Config(path, format=format, sequence_length=80), tmp_path / "cache", batch=1)
    several = 0
    for batch in data.train.eval_batches():
        assert "attention_mask" not in batch
        with torch.no_grad():
            packed = model(**batch)
            alone = []
            for ids, labels in documents(batch):
                out = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
                alone.append((out.logits[0], out.loss * sum(label != IGNORE for label in labels)))
        several += len(alone) > 1
        logits = torch.cat([logits for logits, _ in alone])
        torch.testing.assert_close(packed.logits[0, : len(logits)], logits, atol=2e-5, rtol=1e-4)
        counted = (batch["labels"] != IGNORE).sum()
        torch.testing.assert_close(packed.loss * counted, sum(loss for _, loss in alone), atol=1e-4, rtol=1e-5)
        assert count_tokens(batch) == len(logits)
    assert several


def test_padding_counts_for_nothing_without_packing(tmp_path: Path) -> None:
    model = tiny(LlamaConfig(**SMALL, intermediate_size=64))
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "abc" * n} for n in (3, 9, 1)])
    data = load(Config(path, format="text", sequence_length=32, packing=False), tmp_path / "cache", batch=3)
    batch = next(data.train.eval_batches())
    assert "position_ids" not in batch
    assert count_tokens(batch) == int(batch["attention_mask"].sum()) == sum(3 * n + 2 for n in (3, 9, 1))
    with torch.no_grad():
        loss = model(**batch).loss
        total = count = 0.0
        for ids, labels in documents(batch):
            alone = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
            total, count = total + alone * (len(ids) - 1), count + len(ids) - 1
    torch.testing.assert_close(loss, total / count)
    full = write_rows(tmp_path / "full.jsonl", [{"input_ids": [1] * 32}] * 3)
    batch = load(Config(full, sequence_length=32, packing=False), tmp_path / "cache").train.batch(0)
    assert set(batch) == {"input_ids", "labels"} and count_tokens(batch) == 4 * 32


def test_rows_that_are_not_filled_are_left_out_without_padding(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"input_ids": list(range(n))} for n in (32, 9, 70, 5)])
    whole = load(Config(path, sequence_length=32, packing=False, padding=False), tmp_path / "cache", batch=3)
    (batch,) = whole.train.eval_batches()
    assert set(batch) == {"input_ids", "labels"} and has_whole_rows(batch)
    assert batch["input_ids"].tolist() == [list(range(32)), list(range(32)), list(range(32, 64))]
    assert whole.notes == ["3 rows that samples do not fill are left out"] and whole.train.tokens == 96
    packed = load(Config(path, sequence_length=32, padding=False), tmp_path / "cache", batch=3)
    (batch,) = packed.train.eval_batches()
    assert packed.train.left_out == 1 and count_tokens(batch) == 96 and not has_whole_rows(batch)
    padded = load(Config(path, sequence_length=32, packing=False), tmp_path / "cache", batch=6).train.batch(0)
    assert not has_whole_rows(padded) and has_whole_rows({**padded, "attention_mask": torch.ones(6, 32)})
    with pytest.raises(DataError, match="no sample fills a row of 128 tokens"):
        load(Config(path, sequence_length=128, packing=False, padding=False), tmp_path / "cache")


def test_count_tokens_of_any_cut_of_a_packed_batch(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"input_ids": [5] * n, "labels": [5] * n} for n in (9, 6, 2, 11, 15)])
    data = load(Config(path, sequence_length=16), tmp_path / "cache", batch=4)
    whole = next(data.train.eval_batches())
    assert count_tokens(whole) == 9 + 6 + 2 + 11 + 15 == data.train.tokens
    assert sum(count_tokens({k: v[i : i + 1] for k, v in whole.items()}) for i in range(len(whole["labels"]))) == 43
    arange = torch.arange(8).expand(2, 8)
    assert count_tokens({"input_ids": torch.ones(2, 8, dtype=torch.long), "position_ids": arange}) == 16
    assert count_tokens({"inputs_embeds": torch.ones(2, 8, 4)}) == 16
    assert count_tokens({"pixel_values": torch.ones(2, 3, 8, 8)}) == 0
    assert count_tokens({"input_ids": arange, "attention_mask": torch.ones(2, 1, 8, 8)}) == 16


# formats


def test_alpaca_counts_the_answer_only(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Long.", "output": "x" * 900, "source": "ignored"},
        {"instruction": "y" * 900, "input": None, "output": "lost"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = load(Config(path, format="alpaca", sequence_length=600), tmp_path / "cache", batch=3)
    tokenizer = data.tokenizer
    assert tokenizer is not None
    pieces = [piece for batch in data.train.eval_batches() for piece in documents(batch)]
    answers = sorted(tokenizer.decode([label for label in labels if label != IGNORE]) for _, labels in pieces)
    assert answers[:2] == ["3<|eos|>", "hi<|eos|>"] and set(answers[2]) == {"x"} and len(pieces) == 3
    prompts = [
        str(tokenizer.decode([i for i, label in zip(*piece, strict=True) if label == IGNORE])) for piece in pieces
    ]
    assert all(prompt.startswith("<|bos|>Below is") and prompt.endswith("### Response:\n") for prompt in prompts)
    assert sum("### Input:\n1 and 2\n" in prompt for prompt in prompts) == 1
    assert all(labels in ([*[IGNORE] * k, *ids[k:]] for k in range(len(ids))) for ids, labels in pieces)
    assert data.notes == [
        "2 of 4 examples are longer than data.sequence_length 600 and were cut at the end",
        "1 of 4 examples have no counted token left and were left out",
    ]
    assert load(Config(path, format="alpaca", sequence_length=600), tmp_path / "cache").notes == data.notes


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hé?"},
    {"role": "assistant", "content": "Grüße 🙂"},
    {"role": "user", "content": "Grüße 🙂"},
    {"role": "assistant", "content": "Yes.\n"},
]
PLAIN_TEMPLATE = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# Shows the reasoning of the last turn only, as several published templates do.
FORGETFUL_TEMPLATE = PLAIN_TEMPLATE.replace(
    "{{ message['content'] + '<|im_end|>' }}",
    "{{ '<think></think>' if loop.last and message['role'] == 'assistant' else '' }}"
    "{{ message['content'] + '<|im_end|>' }}",
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PLAIN_TEMPLATE], ids=["generation", "prefix"])
def test_chat_counts_the_assistants_turns_and_their_ends(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    ids, counted = encode_chat(tokenizer, CHAT, None)
    assert tokenizer.decode(ids) == (
        "<|bos|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHé?<|im_end|>\n<|im_start|>assistant\n"
        "Grüße 🙂<|im_end|>\n<|im_start|>user\nGrüße 🙂<|im_end|>\n<|im_start|>assistant\nYes.\n<|im_end|>\n"
    )
    answers = [i for i, count in zip(ids, counted, strict=True) if count]
    assert tokenizer.decode(answers) == "Grüße 🙂<|im_end|>Yes.\n<|im_end|>"
    assert encode_chat(tokenizer, CHAT[2:3], None)[1].count(True) == len("Grüße 🙂".encode()) + 1  # no turn before it


def test_chat_template_that_shows_turns_differently_later() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = FORGETFUL_TEMPLATE
    ids, counted = encode_chat(tokenizer, CHAT, None)
    answers = tokenizer.decode([i for i, count in zip(ids, counted, strict=True) if count])
    assert answers == "Grüße 🙂<|im_end|><think></think>Yes.\n<|im_end|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{{ loop.last }}{% endfor %}"
    with pytest.raises(ValueError, match="chat template"):
        encode_chat(tokenizer, CHAT, None)


def test_chat_template_errors_name_the_line(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN_TEMPLATE
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": CHAT[1:3]}, {"messages": CHAT}])
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: .*no system"):
        load(Config(path, format="chat", tokenizer=str(tmp_path / "tokenizer"), sequence_length=99), tmp_path / "cache")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(DataError, match="needs a tokenizer with a chat template, and this one has none"):
        load(Config(path, format="chat", tokenizer=str(tmp_path / "bare"), sequence_length=99), tmp_path / "cache")


def test_text_documents_and_their_borders(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(
        "\nOne.\n\nStill one.\n\n\nTwo.\r\n<|endoftext|>\nThree.\n\n\n\n<|endoftext|>\n\n\nFour.", newline=""
    )
    assert list(read_documents(file)) == [
        ("One.\n\nStill one.", True),
        ("Two.", True),
        ("Three.", True),
        ("Four.", True),
    ]
    data = load(Config(file, format="text"), tmp_path / "cache", batch=1)
    found = [ids for batch in data.train.eval_batches() for ids, _ in documents(batch)]
    tokens = [i for ids in found for i in ids]
    assert data.tokenizer is not None
    assert data.tokenizer.decode(tokens) == (
        "<|bos|>One.\n\nStill one.<|eos|><|bos|>Two.<|eos|><|bos|>Three.<|eos|><|bos|>Four.<|eos|>"
    )


def test_long_documents_come_in_pieces_and_lose_nothing(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n\n" for i in range(20_000)) + "z" * 200_000
    (tmp_path / "a.txt").write_text(text)
    write_rows(tmp_path / "b.jsonl", [{"text": text}])
    assert all(len(piece) < 200_000 for piece, _ in read_documents(tmp_path / "a.txt"))
    for name in ("a.txt", "b.jsonl"):
        data = load(Config(tmp_path / name, format="text", sequence_length=4096), tmp_path / "cache", batch=8)
        ids = [i for batch in data.train.eval_batches() for piece, _ in documents(batch) for i in piece]
        assert bytes(ids[1:-1]) == text.encode() and ids[0] == 257 and ids[-1] == 258


def test_kinds_of_files_give_the_same(tmp_path: Path) -> None:
    rows = [{"text": f"document {i} é\n" * 3, "more": [i]} for i in range(300)]
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "d.json").write_text("\ufeff" + "\n".join(json.dumps(row) for row in rows))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    contents = [[row for _, row in read_rows(tmp_path / name)] for name in sorted(os.listdir(tmp_path))]
    assert len(contents) == 5 and all(content == rows for content in contents)
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "a.jsonl").rename(folder / "sub" / "2.jsonl")
    (folder / "1.txt").write_text("first")
    (folder / "README.md").write_text("not data")
    (folder / ".hidden.jsonl").write_text("not data")
    data = load(Config(folder, format="text", sequence_length=64), tmp_path / "cache", batch=1)
    first = next(data.train.eval_batches())["input_ids"][0].tolist()
    assert bytes(first[1:6]) == b"first"


def test_rows_of_a_hub_table() -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    assert list(read_table("org/name", table)) == [
        ("org/name, row 1", {"text": "a"}),
        ("org/name, row 2", {"text": "b"}),
    ]


def test_hub_without_network_or_package(tmp_path: Path) -> None:
    """In processes of their own: `datasets` reads its offline switch when imported."""
    code = (
        "import sys\nfrom offload.errors import DataError\nfrom offload.readers import open_source\n"
        "if sys.argv[1] == 'absent': sys.modules['datasets'] = None\n"
        "try: open_source('no-such-owner/no-such-data')\nexcept DataError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    kinds = {"absent": "pip install datasets", "offline": "go online once"}
    if "datasets" not in sys.modules and not pytest.importorskip("importlib.util").find_spec("datasets"):
        kinds.pop("offline")
    for kind, expected in kinds.items():
        out = subprocess.run([sys.executable, "-c", code, kind], env=environment, capture_output=True, text=True)
        assert expected in out.stdout and "no-such-owner/no-such-data" in out.stdout, out.stderr


# splits


def test_eval_fraction_holds_out_whole_documents_by_seed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"input_ids": [i] * 7} for i in range(50)])
    config = Config(path, sequence_length=8, packing=False, eval_fraction=0.2)

    def split(seed: int) -> tuple[set[int], set[int]]:
        data = load(config, tmp_path / "cache", batch=4, seed=seed)
        assert data.eval is not None
        parts = []
        for samples in (data.train, data.eval):
            ids = [i for batch in samples.eval_batches() for i in batch["input_ids"][:, 0].tolist()]
            assert len(ids) == len(set(ids)) == len(samples)
            parts.append(set(ids))
        return parts[0], parts[1]

    train, held_out = split(0)
    assert len(held_out) == 10 and train | held_out == set(range(50)) and not train & held_out
    assert split(0) == (train, held_out)
    assert split(1)[1] != held_out
    data = load(config, tmp_path / "cache", batch=4)
    assert data.eval is not None
    assert [len(batch["labels"]) for batch in data.eval.eval_batches()] == [4, 4, 2]


def test_eval_fraction_of_one_long_text_holds_out_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 899 + "b" * 99)
    data = load(Config(tmp_path / "a.txt", format="text", eval_fraction=0.1), tmp_path / "cache", batch=1)
    assert data.eval is not None and data.train.tokens == 900 and data.eval.tokens == 100
    assert all(98 not in batch["input_ids"] for batch in data.train.eval_batches())
    path = write_rows(tmp_path / "rows.jsonl", [{"input_ids": [1, 2, 3]}])
    with pytest.raises(DataError, match=r"eval_fraction: 0.1 of 1 examples.*data\.eval_path"):
        load(Config(path, eval_fraction=0.1), tmp_path / "cache")


def test_eval_path(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", [{"input_ids": [1] * 8}])
    other = write_rows(tmp_path / "eval.jsonl", [{"input_ids": [2] * 8}, {"input_ids": [3]}])
    data = load(Config(train, sequence_length=8, eval_path=other), tmp_path / "cache")
    assert data.eval is not None and set(next(data.eval.eval_batches())["input_ids"].flatten().tolist()) == {2}
    assert data.notes == ["eval: 1 of 2 examples have no counted token left and were left out"]
    with pytest.raises(DataError, match=r"data\.eval_path: .*missing\.jsonl does not exist"):
        load(Config(train, eval_path=tmp_path / "missing.jsonl"), tmp_path / "cache")
    with pytest.raises(ConfigError, match="both are set"):
        load(Config(train, eval_path=other, eval_fraction=0.5), tmp_path / "cache")


# damage


@pytest.mark.parametrize(
    ("format", "line", "message"),
    [
        ("text", '{"text": "a"', "not valid JSON: .* at column"),
        ("text", '["a"]', "must be a JSON object, got list"),
        (
            "text",
            '{"txt": "a"}',
            r"missing key 'text'. A row of format text takes text \(a string\); this one has: txt",
        ),
        ("text", '{"text": 3}', "'text' must be a string, got int"),
        ("text", '{"text": "\\ud800"}', "lone surrogate"),
        ("alpaca", '{"instruction": "a"}', "missing key 'output'.*instruction, output and optionally input"),
        ("alpaca", '{"instruction": "a", "output": "b", "input": 1}', "'input' must be a string, got int"),
        ("chat", '{"messages": []}', "'messages' is empty"),
        ("chat", '{"messages": [{"content": "a"}]}', "with a 'role'"),
        ("chat", '{"messages": [{"role": "user"}]}', "'content' of a message must be a string, got NoneType"),
        ("tokens", '{"input_ids": "abc"}', "'input_ids' must be a list of integers, got str"),
        ("tokens", '{"input_ids": [1, 2.5]}', "integers only"),
        ("tokens", '{"input_ids": [1, 99999999999999999999]}', "more than 64 bits"),
        ("tokens", '{"input_ids": [1, 2], "labels": [1]}', "'labels' has 1 entries and 'input_ids' 2"),
        ("tokens", '{"input_ids": [1, 272]}', "token id 272 is outside the model's vocabulary of 272"),
        ("tokens", '{"input_ids": [1, -1]}', "token id -1 is outside"),
        ("tokens", '{"input_ids": [1, 2], "labels": [-100, 300]}', "labels: token id 300 is outside"),
    ],
)
def test_a_damaged_line_is_named(format: str, line: str, message: str, tmp_path: Path) -> None:
    good = {
        "text": {"text": "a"},
        "alpaca": {"instruction": "a", "output": "b"},
        "chat": {"messages": CHAT},
        "tokens": {"input_ids": [1, 2]},
    }[format]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(good) + "\n\n" + line + "\n" + json.dumps(good) + "\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 3(:|: labels:) .*{message}"):
        load(Config(path, format=format, sequence_length=256), tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []  # nothing half made stays


def test_damaged_files_are_named(tmp_path: Path) -> None:
    def fails(name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            load(Config(tmp_path / name, format="text"), tmp_path / "cache")

    fails("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8")
    fails("b.txt", b"ok\n\xc3\n", r"b\.txt, line 2: not UTF-8")
    fails("c.json", b'[{"text": "a"},\n {"text": "b"\n', r"c\.json, line \d: not valid JSON")
    fails("d.json", b'[{"text": "a"}\n {"text": "b"}]', r"d\.json, line 2: expected a comma")
    fails("e.json", b'[{"text": "a"}, 3]', r"e\.json, line 1: expected an object, got '3\]'")
    fails("f.json", b'[{"text": "a"}]\n[]', r"f\.json, line 2: expected nothing after the array")
    fails("g.json", b'[\n{"text": "a"},\n{"text": tru},\n' + b" " * 200_000 + b"]", r"g\.json, line 3: not valid JSON")
    fails("h.parquet", b"PAR1 not really", r"h\.parquet: damaged or not a parquet file")
    fails("i.csv", b"a,b", r"i\.csv: unknown kind of file '\.csv'; accepted: \.jsonl")
    for name, content in (("empty.jsonl", b""), ("blank.jsonl", b"\n\n"), ("empty.json", b"[]"), ("empty.txt", b"\n")):
        fails(name, content, rf"{name} gives nothing to train on")
    table = tmp_path / "j.parquet"
    pa.parquet.write_table(pa.Table.from_pylist([{"text": "a"}, {"text": None}]), table)
    with pytest.raises(DataError, match=r"j\.parquet, row 2: 'text' must be a string, got NoneType"):
        load(Config(table, format="text"), tmp_path / "cache")
    with pytest.raises(DataError, match=r"can only be read with data\.format: text"):
        load(Config(tmp_path / "b.txt", format="chat"), tmp_path / "cache")
    with pytest.raises(DataError, match="holds no data file"):
        (tmp_path / "nothing").mkdir()
        load(Config(tmp_path / "nothing", format="text"), tmp_path / "cache")


def test_config_that_cannot_work(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"input_ids": [1, 2]}])
    for change, message in (
        ({"format": "csv"}, "data.format: 'csv'; accepted: text, alpaca, chat, tokens"),
        ({"sequence_length": 3}, "data.sequence_length: 3"),
        ({"eval_fraction": 1.0}, "data.eval_fraction: 1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(replace(Config(path), **change), tmp_path / "cache")
    with pytest.raises(ConfigError, match="not a multiple of micro_batch_size 3"):
        open_dataset(
            Config(path), None, vocab_size=9, micro_batch_size=3, global_batch_size=4, seed=0, cache_dir=tmp_path
        )


# tokenizers


def test_byte_tokenizer_survives_saving(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 261
    text = "".join(map(chr, range(1, 0x500))) + "🙂  \n\t end "
    assert tokenizer(text)["input_ids"] == [257, *text.encode()]
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.convert_tokens_to_ids(["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]) == list(
        range(256, 261)
    )
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == [257, *text.encode()] and len(again) == 261
    assert again.decode([257, *text.encode(), 258], skip_special_tokens=True) == text
    assert (again.pad_token_id, again.bos_token_id, again.eos_token_id) == (256, 257, 258)
    assert encode_chat(again, CHAT, None) == encode_chat(tokenizer, CHAT, None)
    assert affixes(again) == ([257], [258])


def test_the_models_own_tokenizer(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "abc"}])
    config = Config(path, format="text", tokenizer=None)
    byte_tokenizer().save_pretrained(tmp_path / "model")
    batch = load(config, tmp_path / "cache", model_dir=tmp_path / "model").train.batch(0)
    assert batch["input_ids"][0, :6].tolist() == [257, 97, 98, 99, 258, 256]
    LlamaConfig(**SMALL).save_pretrained(tmp_path / "bare")
    assert AutoConfig.from_pretrained(tmp_path / "bare").vocab_size == VOCABULARY
    for model_dir in (None, tmp_path / "bare"):
        with pytest.raises(DataError, match="brings no tokenizer"):
            load(config, tmp_path / "cache", model_dir=model_dir)
    with pytest.raises(DataError, match=r"data\.tokenizer: cannot load a tokenizer from"):
        load(replace(config, tokenizer=str(tmp_path / "bare")), tmp_path / "cache")
    tokens = write_rows(tmp_path / "tokens.jsonl", [{"input_ids": [1, 2, 3]}])
    data = load(Config(tokens, tokenizer=None), tmp_path / "cache", model_dir=tmp_path / "bare")
    assert data.tokenizer is None and data.train.batch(0)["input_ids"].shape == (4, 16)


def test_a_tokenizer_too_large_for_the_model(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "abc"}])
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: token id 257 is outside the model's vocabulary of 256"):
        load(Config(path, format="text"), tmp_path / "cache", vocab_size=256)
    load(Config(path, format="text"), tmp_path / "cache")
    with pytest.raises(DataError, match="has token id 258, outside the model's vocabulary of 256"):
        load(Config(path, format="text"), tmp_path / "cache", vocab_size=256)  # from the cache


# cache


def test_the_cache_is_keyed_by_content_and_made_again_when_damaged(tmp_path: Path) -> None:
    path, cache = write_rows(tmp_path / "rows.jsonl", [{"text": "abc" * 9}] * 9), tmp_path / "cache"
    config = Config(path, format="text")
    first = load(config, cache).train.batch(0)["input_ids"]

    def stamps() -> dict[str, int]:
        return {str(file): file.stat().st_mtime_ns for file in cache.rglob("*.bin")}

    before = stamps()
    moved = path.rename(tmp_path / "moved.jsonl")
    assert torch.equal(load(replace(config, path=moved), cache).train.batch(0)["input_ids"], first)
    assert stamps() == before
    tokens = next(cache.glob("tokens-*")) / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    assert torch.equal(load(replace(config, path=moved), cache).train.batch(0)["input_ids"], first)
    assert tokens.stat().st_mtime_ns != before[str(tokens)]
    write_rows(moved, [{"text": "other"}] * 9)
    assert not torch.equal(load(replace(config, path=moved), cache).train.batch(0)["input_ids"], first)


def test_a_killed_run_leaves_no_entry_and_its_rest_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom offload.tokencache import cached\n"
        "def build(writers):\n    writers['a'].append(range(100000))\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "cached(Path(sys.argv[1]), 'entry', {'a': '<i8'}, build)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert [name.partition("-")[0] for name in os.listdir(tmp_path)] == ["entry.tmp"]

    def build(writers: dict[str, Any]) -> dict[str, Any]:
        writers["a"].append([1, 2, 3])
        return {"note": 1}

    entry = cached(tmp_path, "entry", {"a": "<i8"}, build)
    assert entry.meta == {"note": 1} and entry.arrays["a"].read(1, 2).tolist() == [2, 3]
    assert os.listdir(tmp_path) == ["entry"]
    with pytest.raises(DataError, match="ends at byte 24"):
        entry.arrays["a"].read(2, 2)
    entry.close()


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    def build(writers: dict[str, Any]) -> dict[str, Any]:
        writers["a"].append(range(1 << 20))
        return {}

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit()
    try:
        with pytest.raises(DataError, match=os.strerror(errno.EFBIG)):
            cached(tmp_path / "cache", "entry", {"a": "<i8"}, build)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert os.listdir(tmp_path / "cache") == []


def test_memory_stays_small(tmp_path: Path) -> None:
    """6 MB of text become 6 million tokens: 48 MB as a list, 1.5 GB as encodings of the tokenizer. None is kept."""
    with (tmp_path / "big.txt").open("w") as file:
        for i in range(6_000):
            file.write(f"paragraph {i} " * 70 + "\n")
    code = (
        "import json, resource, sys, types\nfrom pathlib import Path\nfrom offload.data import open_dataset\n"
        "folder = Path(sys.argv[1])\n"
        "cfg = types.SimpleNamespace(path=folder / 'big.txt', format='text', tokenizer='bytes', sequence_length=1024,\n"
        "    packing=True, padding=True, eval_fraction=0.01, eval_path=None)\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "import transformers.tokenization_utils_tokenizers\n"
        "(folder / 'small.txt').write_text('a small one ' * 999)\n"
        "def run(name):\n"
        "    data = open_dataset(types.SimpleNamespace(**{**vars(cfg), 'path': folder / name}), None, vocab_size=272,\n"
        "        micro_batch_size=1, global_batch_size=8, seed=0, cache_dir=folder / 'cache')\n"
        "    for step in range(min(data.train.steps_per_epoch, 200)): data.train.batch(step)\n"
        "    return data.train.tokens\n"
        "run('small.txt')\nbefore = peak()\ntokens = run('big.txt')\n"
        "print(json.dumps([tokens, (peak() - before) / 1024]))\n"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    tokens, growth_mib = json.loads(out.stdout)
    assert tokens > 6e6 and growth_mib < 40


# what ships


@pytest.mark.parametrize(
    ("name", "format", "rows"),
    [("quickstart.txt", "text", 100), ("alpaca.jsonl", "alpaca", 60), ("chat.jsonl", "chat", 40)],
)
def test_shipped_examples(name: str, format: str, rows: int, tmp_path: Path) -> None:
    config = Config(EXAMPLES / name, format=format, sequence_length=1024)
    data = load(config, tmp_path / "cache")
    assert data.notes == []
    count = len(np.fromfile(next((tmp_path / "cache").glob("tokens-*")) / "documents.bin", "<i8")) // 2
    assert count >= rows
    assert data.train.tokens / (len(data.train) * 1024) > 0.85


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A model this small is slower in threads, and far slower when the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_tiny_model_learns_the_shipped_text(tmp_path: Path) -> None:
    data = load(Config(EXAMPLES / "quickstart.txt", format="text", sequence_length=128), tmp_path / "cache", batch=8)
    torch.manual_seed(0)
    config = LlamaConfig(**{**SMALL, "hidden_size": 64}, intermediate_size=128, use_cache=False)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    losses = []
    for step in range(60):
        loss = model(**data.train.batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 5.3 and sum(losses[-5:]) / 5 < 3.0
