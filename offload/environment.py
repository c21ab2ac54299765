"""Environment variables that have to be set before PyTorch is loaded; none of them changes a result.

    from offload.environment import set_defaults
    set_defaults()
    import torch
"""

from __future__ import annotations

import os

# OpenMP's threads spin while they wait for the next operation, by default for milliseconds: that takes the cores from
# the optimizer, the I/O threads and everybody else, and made steps ten times slower on busy ones. Without any spinning
# every operation wakes a thread. About 50 us, which most gaps between two operations are shorter than, took 4 to 10 %
# off a step of a 271M llama on two cores that were free, and 14 % on cores with another busy program each.
_SPINNING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "3000"}
# Large tensors come and go with every unit (`offload.device.keep_to_the_plan`): huge pages take 3/4 of the faults.
_HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
DEFAULTS = {**_SPINNING, **_HUGE_PAGES}


def set_defaults() -> None:
    """Set what is not set. Who has chosen how OpenMP's threads wait keeps both of its variables."""
    chosen = any(name in os.environ for name in _SPINNING)
    for name, value in (_HUGE_PAGES if chosen else DEFAULTS).items():
        os.environ.setdefault(name, value)
