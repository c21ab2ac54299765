"""Tokenizers: the embedded byte tokenizer, loading any other, and turning texts and conversations into token ids."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# One call encodes at most this many characters: a `tokenizers` encoding takes about 260 bytes per token while it lives.
BATCH_CHARACTERS = 1 << 16
# Encoding in threads buys nothing for batches of this size, and the pool would keep its memory for the whole run.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors  # noqa: E402
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast  # noqa: E402

from offload.errors import DataError  # noqa: E402

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, mapped to the byte itself."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    alphabet, shift = {}, 0
    for byte in range(256):
        alphabet[chr(byte if byte in printable else 256 + shift)] = byte
        shift += byte not in printable
    return alphabet


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose token ids 0..255 are the bytes of the UTF-8 text; needs no files.

    Ids 256..260 are `<|pad|>`, `<|bos|>`, `<|eos|>`, `<|im_start|>` and `<|im_end|>` (`len(tokenizer)` is 261; a model
    may round its vocabulary up, to 272 say). A text gets `<|bos|>` in front. The chat template is ChatML-like and marks
    the assistant's turns. `save_pretrained` and `AutoTokenizer.from_pretrained` give the same tokenizer back.
    """
    tokenizer = Tokenizer(models.BPE(vocab=_byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # One call per token: ids follow the order of the calls.
    for token in ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"):
        tokenizer.add_special_tokens([token])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str | None, model_dir: str | Path | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer that `data.tokenizer` names: "bytes", a local directory or a hub id; `None` means the model's own.

    Returns `None` when nothing is named and the model brings no tokenizer. Raises `DataError` when a named one cannot
    be loaded. Code that ships with a tokenizer is never run.
    """
    if name == "bytes":
        return byte_tokenizer()
    if name is None and model_dir is None:
        return None
    source = str(model_dir) if name is None else name
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, ImportError or a parser's own error
        if name is None and not _has_tokenizer_files(Path(source)):
            return None
        raise DataError(
            f"data.tokenizer: cannot load a tokenizer from {source!r}: {_first_line(error)}. "
            'Accepted: "bytes", a directory with tokenizer.json, or a hub id that is cached or can be downloaded'
        ) from error


def _has_tokenizer_files(directory: Path) -> bool:
    return any(directory.glob("tokenizer*")) or any(directory.glob("vocab*")) or any(directory.glob("*.tiktoken"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def fingerprint(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A hash of everything that decides which ids a text becomes."""
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Padding and truncation belong to the last call, not to the tokenizer.
        core = json.loads(backend.to_str())
        core.pop("padding", None)
        core.pop("truncation", None)
    else:
        core = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    parts = [core, tokenizer.chat_template, sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items())]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens around it."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that go before and after a document: what the tokenizer adds by itself, and an end-of-text token."""
    bare = encode(tokenizer, ["a"])[0]
    full = tokenizer("a", verbose=False)["input_ids"]
    prefix, suffix = [], []
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            prefix, suffix = list(full[:start]), list(full[start + len(bare) :])
            break
    if tokenizer.eos_token_id is not None and (not suffix or suffix[-1] != tokenizer.eos_token_id):
        suffix.append(tokenizer.eos_token_id)
    return prefix, suffix


@functools.lru_cache(maxsize=8)
def _marks_generation(template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[Any] | None
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation and, for each, whether the assistant has to produce it.

    The tokenizer's chat template renders the conversation. If it marks the assistant's part with `{% generation %}`
    that mark decides. If not, a turn is what the template adds to the rendering of the messages before it with
    `add_generation_prompt`, up to and including the token that ends the turn.
    Raises `ValueError` when the assistant's turns cannot be found in the rendering, and what the template raises.
    """
    template = tokenizer.get_chat_template(tools=tools)
    if tokenizer.is_fast and _marks_generation(template):
        out: Any = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        return list(out["input_ids"]), [bool(flag) for flag in out["assistant_masks"]]

    def render(upto: int, prompt: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(messages[:upto], tools=tools, tokenize=False, add_generation_prompt=prompt)
        )

    full = render(len(messages))
    spans, floor = [], 0
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start, end = _turn(tokenizer, full, floor, index, message.get("content") or "", render)
            spans.append((start, end))
            floor = end
    return _encode_spans(tokenizer, full, spans)


def _turn(
    tokenizer: PreTrainedTokenizerBase, full: str, floor: int, index: int, content: str, render: Any
) -> tuple[int, int]:
    """Where in `full` the assistant's message number `index` stands, given that it starts at `floor` or later."""
    content = content.strip()
    before = render(index, prompt=True) if index else None
    if before is not None and len(before) >= floor and full.startswith(before):
        start = len(before)
    else:
        start = full.find(content, floor)
        if start < 0 or not content:
            raise ValueError(f"the chat template does not show message {index} (assistant) as it was given")
    after = render(index + 1)
    if full.startswith(after):
        end = len(after)
    else:
        # Some templates show a turn otherwise once others follow it (they drop its reasoning, say): what ends the turn
        # is then looked for behind its content.
        tail = after[after.rfind(content) + len(content) :]
        end = full.find(content + tail, start)
        if end < 0 or not content:
            raise ValueError(
                f"the chat template renders message {index} (assistant) differently when others follow; "
                "mark the assistant's part in the template with {% generation %}"
            )
        end += len(content + tail)
    trimmed = full[start:end].rstrip()
    if trimmed.endswith(tuple(tokenizer.all_special_tokens)):
        end = start + len(trimmed)  # white space after the end-of-turn token is not the assistant's
    return start, end


def _encode_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """Ids of `text`, and which of them lie in `spans` (character ranges, ascending)."""
    if tokenizer.is_fast:
        out = tokenizer(
            text,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        mask = [any(start <= at and to <= end for start, end in spans) for at, to in out["offset_mapping"]]
        return list(out["input_ids"]), mask
    ids: list[int] = []
    mask = []
    cuts = [0, *(edge for span in spans for edge in span), len(text)]
    for number, piece in enumerate(encode(tokenizer, [text[a:b] for a, b in itertools.pairwise(cuts)])):
        ids += piece
        mask += [number % 2 == 1] * len(piece)
    return ids, mask
