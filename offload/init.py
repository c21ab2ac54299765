"""`offload init`: a commented config, with what this machine has written next to the budgets."""

from __future__ import annotations

from pathlib import Path

import jinja2
import psutil
import yaml

from offload import tables
from offload.errors import ConfigError

_TEMPLATE = """\
# offload config. Relative paths start at the directory the command is run in.
# Check it with `offload plan {{ file }}`, run it with `offload train {{ file }}`.

model:
{%- if model %}
  path: {{ model }}              # local Hugging Face directory or hub id
{%- else %}
  path: ./my-model            # local Hugging Face directory or hub id
  # architecture: {model_type: llama, hidden_size: 256}   # instead of path: a fresh model with random weights
{%- endif %}
  dtype: bfloat16             # bfloat16 | float32: what is computed in and streamed

data:
  path: data.jsonl            # .jsonl .json .parquet .txt, a directory of them, or a hub data set id
  format: alpaca              # text | alpaca | chat | tokens
  # tokenizer: bytes          # default: the model's own; "bytes" for the embedded byte tokenizer
  sequence_length: 1024
  packing: true               # several samples per row
  eval_fraction: 0.0          # share of the samples held back for evaluation

train:
  method: full
  steps: 1000                 # or epochs: 3
  micro_batch_size: 1         # rows per forward; auto: the planner takes the largest that pays
  global_batch_size: 16       # rows per step; more rows spread the cost of moving the weights
  optimizer: {name: adamw, lr: 1.0e-5, betas: [0.9, 0.999], eps: 1.0e-8, weight_decay: 0.0}
  schedule: {name: cosine, warmup_steps: 50}     # cosine | linear | constant
  max_grad_norm: 1.0          # null: no clipping, and then the optimizer overlaps with backward
  commit_every: auto          # steps between durable commits
  # eval_every: 100           # needs data.eval_fraction or data.eval_path
  # report_to: [tensorboard]
  seed: 0

memory:                       # hard budgets; auto: what this machine has, less room for the system
  device: auto                # {{ device }}
  gpu: auto                   # {{ gpu }}
  cpu: auto                   # {{ cpu }}
  # Memory on CXL cards (NUMA nodes without CPUs), if there is any: docs/config.md
  # cxl: {size: 64GiB}
  # The store of weights and optimizer state. Default: <output>/store. Give the fastest SSDs, several are striped:
  # nvme: [{path: /mnt/nvme0/offload, size: 500GiB}]
  # here: {{ disk }}

output: runs/my-run
"""


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
