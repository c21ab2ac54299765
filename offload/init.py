"""`offload init`: a commented config, with what this machine has written next to the budgets."""

from __future__ import annotations

from pathlib import Path

import jinja2
import psutil
import yaml

from offload import tables
from offload.config_keys import all_keys, default_text, gist, words
from offload.errors import ConfigError

_COMMENTS = 30  # the column in which comments begin
_TEMPLATE = """\
# offload config. Relative paths start at the directory the command is run in.
# Check it with `offload plan {{ file }}`, run it with `offload train {{ file }}`. All keys: docs/config.md

model:
  {{ key("model.path", model or "./my-model") }}
{%- if not model %}
  # instead of path: {{ gist("model.architecture") }}
  # architecture: {model_type: llama, hidden_size: 256}
{%- endif %}
  {{ key("model.dtype") }}

data:
  {{ key("data.path", "data.jsonl") }}
  {{ key("data.format") }}
  {{ key("data.tokenizer", "bytes", off=True) }}
  {{ key("data.sequence_length") }}
  {{ key("data.packing") }}
  {{ key("data.eval_fraction") }}

train:
  {{ key("train.method") }}
  {{ key("train.steps") }}
  {{ key("train.micro_batch_size") }}
  {{ key("train.global_batch_size") }}
  optimizer:
    {{ key("train.optimizer.name") }}
    {{ key("train.optimizer.lr") }}
    {{ key("train.optimizer.betas") }}
    {{ key("train.optimizer.eps") }}
    {{ key("train.optimizer.weight_decay") }}
  schedule:
    {{ key("train.schedule.name") }}
    {{ key("train.schedule.warmup_steps") }}
  {{ key("train.max_grad_norm") }}
  {{ key("train.commit_every") }}
  {{ key("train.eval_every", 100, off=True) }}
  {{ key("train.report_to", "[tensorboard]", off=True) }}
  {{ key("train.seed") }}

memory:                       # hard budgets; auto: what this machine has, less room for the system
  device: auto                # {{ device }}
  gpu: auto                   # {{ gpu }}
  cpu: auto                   # {{ cpu }}
  # {{ gist("memory.cxl") }}
  # cxl: {size: 64GiB}
  # {{ gist("memory.nvme") }}
  # nvme: [{path: /mnt/nvme0/offload, size: 500GiB}]
  # here: {{ disk }}

{{ key("output") }}
"""


def _key(name: str, value: object = None, off: bool = False) -> str:
    """A line of the config: a key with its default or `value`, and as comment what the schema says of it.

    `off`: the line is a comment itself.
    """
    field = dict(all_keys())[name]
    text = f"{'# ' * off}{name.rpartition('.')[2]}: {default_text(field) if value is None else value}"
    unsaid = [word for word in words(field) if word not in gist(field)]
    told = f"{' | '.join(words(field))}: {gist(field)}" if len(words(field)) > 1 and unsaid else gist(field)
    return f"{text:<{_COMMENTS - 2 * name.count('.')}}# {told}"


def config_text(model: str | None, file: str = "CONFIG") -> str:
    """The text of a config for this machine and `model` (a hub id or a directory)."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device, gpu = f"cuda: {properties.name}", f"this one has {tables.size(properties.total_memory)}"
    else:
        device, gpu = "cpu: no CUDA device here", "on cpu, the arena in RAM that stands for a GPU"
    disk = psutil.disk_usage(".")
    return jinja2.Template(_TEMPLATE, keep_trailing_newline=True).render(
        key=_key,
        gist=lambda name: gist(dict(all_keys())[name]),
        model=yaml.safe_dump(model).splitlines()[0] if model else None,
        file=file,
        device=device,
        gpu=gpu,
        cpu=f"this machine has {tables.size(psutil.virtual_memory().total)}",
        disk=f"{tables.size(disk.free)} free in {Path.cwd()}",
    )


def write(out: Path, model: str | None) -> None:
    """Write the config to a new file. Raises ConfigError when `out` exists or cannot be written."""
    if out.exists():
        raise ConfigError(f"{out} already exists; choose another with --out")
    text = config_text(model, str(out))
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}; choose another with --out") from None
