"""The page docs/config.md, printed from the schema: `python -m offload.config_reference > docs/config.md`."""

from __future__ import annotations

import textwrap

import jinja2

from offload.config_keys import accepted, all_keys, default_text, section_in
from offload.resumable import MAY_CHANGE

_PAGE = """\
<!-- Printed from the schema by python -m offload.config_reference: change it there, or in config_sections.py. -->
# Config reference

One file in YAML, TOML or JSON. Every key is optional unless marked *required*. An unknown key, a wrong type or an
impossible combination ends with exit code 2 and a message that names the key, what it got, what it accepts and the
nearest valid key; nothing is written. Relative paths start at the directory the command is run in. `--set
key.sub=value` replaces one key; the value is YAML, elements of a list are numbered from 0
(`--set memory.nvme.0.size=200GiB`).

Sizes are text such as `48GiB` (binary) or `500GB` (decimal), or a number of bytes.

## model

What is trained: `path` or `architecture`, not both. May be left out when `offload.wrap` is given a model.

{{ table("model") }}

## data

May be left out when batches come from your own loop.

{{ table("data") }}

| format | a row | counts in the loss |
|---|---|---|
| `text` | `text`; in a `.txt` file a document, which ends at a line `<\\|endoftext\\|>`, at two blank lines or with the file | every token |
| `alpaca` | `instruction`, `output`, optionally `input` | the output |
| `chat` | `messages` (a list of `role` and `content`), optionally `tools`; rendered by the tokenizer's chat template | the assistant's turns |
| `tokens` | `input_ids`, optionally `labels` (-100 where not counted) | labels, or every token |

Longer `alpaca` and `chat` samples are cut at the end; what was cut or left out is printed. A damaged row is an error with
file and line. Tokens are cached in the run directory. Padding counts neither in the loss nor in tokens.

## train

{{ table("train") }}

## zo

Belongs to `train.method: zo`; giving the section with `full` is an error. [Zeroth order](zeroth_order.md) explains it.
`train.optimizer` gives the learning rate, decay and moments; `train.max_grad_norm` does not apply.

{{ table("zo") }}

## memory

Hard budgets. A plan that exceeds one is refused with exit code 3 and what would fit.

{{ table("memory") }}

RAM is measured as the proportional set size (PSS) of the process tree less the footprint.

## planner

{{ table("planner") }}

## output

{{ table("output") }}

## What may change on `--resume`

{{ may_change }}
Note that `train.steps` is also the length of the schedule.
"""  # noqa: E501  (a row of a table is one line)


def page() -> str:
    return jinja2.Template(_PAGE, keep_trailing_newline=True).render(table=table, may_change=_may_change())


def table(section: str) -> str:
    """The table of the keys of one section, and of the sections in it."""
    lines = ["| key | default | accepted | meaning |", "|---|---|---|---|"]
    for key, field in all_keys():
        inner = section_in(field.annotation)
        if key.split(".")[0] != section or inner is field.annotation is not None or (inner and key == section):
            continue  # of another section, or only the name of the keys that follow
        default = "*required*" if field.is_required() else f"`{default_text(field)}`"
        lines.append(f"| `{key}` | {default} | {accepted(field)} | {field.description} |")
    return "\n".join(lines)


def _may_change() -> str:
    told = {"memory": "`memory` (not the paths in `memory.nvme`)"}
    names = [told.get(key, f"`{key}`") for key in MAY_CHANGE if key != "output"]  # which says where the run lies
    text = f"{', '.join(names)}. Anything else would change the numbers and is refused by key."
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    print(page(), end="")
