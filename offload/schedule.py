"""Learning rates by step, from transformers' own schedules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)


def learning_rates(name: str, lr: float, warmup_steps: int, steps: int) -> Callable[[int], float]:
    """The learning rate of each step, counted from 0, as a function.

    Args:
        name: "cosine", "linear" or "constant", each with a linear warm-up.
        lr: the peak. warmup_steps, steps: length of the warm-up and of the whole run.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    if name == "constant":
        schedule = get_constant_schedule_with_warmup(optimizer, warmup_steps)
    else:
        make = get_cosine_schedule_with_warmup if name == "cosine" else get_linear_schedule_with_warmup
        schedule = make(optimizer, warmup_steps, steps)
    factor = schedule.lr_lambdas[0]
    return lambda step: lr * factor(step)
