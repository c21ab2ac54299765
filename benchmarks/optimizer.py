"""How fast the optimizer's arithmetic is: stock operations, the compiled kernels and others, on one thread and on two.

    python -m benchmarks.optimizer [--json] [--elements 33554432] [--repeats 7]

Every candidate takes AdamW steps over arrays larger than any cache, in turn with the others, so that a machine that
drifts drifts for all; the medians and quartiles are over the repeats. `whole` is torch's fused kernel on one whole
float32 tensor, `plain` and `split` are `offload.adamw.Kernel` over chunks of the size that the engine uses. Bytes are
what a step has to read and write per parameter. DeepSpeedCPUAdam takes part where its operator can be built; its bits
are not torch's, so the engine does not use it.
"""

# ruff: noqa: E402  (PyTorch reads the environment when it is loaded)
from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median, quantiles
from typing import Any

from offload.environment import set_defaults

set_defaults()  # as the command does

import torch
from torch import Tensor

from benchmarks import machine
from offload import adamw, adamw_jit
from offload.device import limit_lane_threads
from offload.state import CHUNK_ELEMENTS

HYPER = adamw.Hyper(1e-4, 0.9, 0.999, 1e-8, 0.01, None)
BARS = {"plain torch": 0.85, "split torch": 0.35, "split numba": 0.7}
# Read and written per parameter: parameter, moments (and low half) twice, the gradient once.
BYTES = {"float32": 28, "split": 28, "split, bf16 gradient": 26}

Step = Callable[[int], None]


def main() -> int:
    """Run the benchmark; exit code 1 if a candidate misses its bar at one of the thread counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--elements", type=int, default=1 << 25, help="parameters in each array")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    result = run(args.elements, args.repeats)
    print(json.dumps(result, indent=1) if args.json else table(result))
    return 0 if all(entry["met"] for rates in result["threads"].values() for entry in rates.values()) else 1


def run(elements: int, repeats: int) -> dict[str, Any]:
    """Rates of all candidates by thread count, G parameters per second and GB per second."""
    loaded = adamw_jit.load()
    threads = {}
    for count in (1, 2):
        torch.set_num_threads(count)
        threads[str(count)] = _measure(_candidates(elements, count, loaded), elements, repeats)
    return {"machine": machine.describe(), "elements": elements, "not_compiled": loaded.reasons, "threads": threads}


def _measure(candidates: dict[str, tuple[str, Step]], elements: int, repeats: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 1):  # the first one warms up
        for name, (_, step) in candidates.items():
            begin = time.perf_counter()
            step(repeat + 1)
            if repeat:
                seconds[name].append(time.perf_counter() - begin)
    rates = {}
    for name, (kind, _) in candidates.items():
        samples = [elements / s / 1e9 for s in seconds[name]]
        ratios = [ours / whole for ours, whole in zip(seconds["whole torch"], seconds[name], strict=True)]
        low, _, high = quantiles(samples, n=4)
        rates[name] = {
            "gparams_per_s": round(median(samples), 3),
            "quartiles": [round(low, 3), round(high, 3)],
            "gb_per_s": round(median(samples) * BYTES[kind], 1),
            "of_whole": round(median(ratios), 3),
            "bar": BARS.get(name),
            "met": median(ratios) >= BARS.get(name, 0.0),
            "samples": [round(sample, 4) for sample in samples],
        }
    return rates


def _candidates(elements: int, threads: int, loaded: adamw_jit.Loaded) -> dict[str, tuple[str, Step]]:
    """By name: the kind of state and a function that takes step number n over the arrays, which all share."""
    generator = torch.Generator().manual_seed(0)
    param, grad, exp_avg = (torch.randn(elements, generator=generator) for _ in range(3))
    exp_avg_sq = torch.rand(elements, generator=generator)
    weight, low = param.to(torch.bfloat16), torch.zeros(elements, dtype=torch.int16)
    grad16 = grad.to(torch.bfloat16)
    stock = adamw.Kernel(threads, jit=False)

    def whole(step: int) -> None:
        adamw.fused_step([param], [grad], [exp_avg], [exp_avg_sq], [step], HYPER)

    def chunks(kernel: adamw.Kernel, param: Tensor, low: Tensor | None, grad: Tensor) -> Step:
        lane = ThreadPoolExecutor(1, initializer=limit_lane_threads)  # as the engine's: the kernel has its own threads

        def run_step(step: int) -> None:
            lane.submit(all_chunks, step).result()

        def all_chunks(step: int) -> None:
            for at in range(0, elements, CHUNK_ELEMENTS):
                part = slice(at, min(at + CHUNK_ELEMENTS, elements))
                n = part.stop - at
                halves = None if low is None else low[part]
                kernel.step(
                    param[part], halves, grad[part], exp_avg[part], exp_avg_sq[part], [(0, n, step)], HYPER
                )  # fmt: skip

        return run_step

    found: dict[str, tuple[str, Step]] = {
        "whole torch": ("float32", whole),
        "plain torch": ("float32", chunks(stock, param, None, grad)),
        "split torch": ("split", chunks(stock, weight, low, grad)),
        "split torch, bf16 gradient": ("split, bf16 gradient", chunks(stock, weight, low, grad16)),
    }
    if loaded.jit is not None:
        compiled = adamw.Kernel(threads)
        compiled.wait()
        found["plain, chosen"] = ("float32", chunks(compiled, param, None, grad))
        found["split numba"] = ("split", chunks(compiled, weight, low, grad))
        found["split numba, bf16 gradient"] = ("split, bf16 gradient", chunks(compiled, weight, low, grad16))
    deepspeed = _deepspeed(param, grad)
    if deepspeed is not None:
        found["whole DeepSpeedCPUAdam"] = ("float32", deepspeed)
    return found


def _deepspeed(param: Tensor, grad: Tensor) -> Step | None:
    """DeepSpeed's kernel on one whole tensor; None where its operator cannot be built. It reads OMP's thread count."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        whole = torch.nn.Parameter(param.clone())
        optimizer = DeepSpeedCPUAdam(
            [whole], lr=HYPER.lr, betas=(HYPER.beta1, HYPER.beta2), weight_decay=HYPER.weight_decay
        )
    except Exception as error:  # no compiler, no headers, a processor it does not know
        print(f"DeepSpeedCPUAdam does not take part: {type(error).__name__}: {error}")
        return None

    def run_step(step: int) -> None:
        whole.grad = grad
        optimizer.step()

    return run_step


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = []
    for count, rates in result["threads"].items():
        lines.append(f"{count} thread{'s' if count != '1' else ''}")
        for name, entry in rates.items():
            bar = "" if entry["bar"] is None else f"bar {entry['bar']:.2f} {'met' if entry['met'] else 'MISSED'}"
            lines.append(
                f"  {name:28} {entry['gparams_per_s']:6.2f} G/s ({entry['quartiles'][0]:.2f} to "
                f"{entry['quartiles'][1]:.2f}) {entry['gb_per_s']:6.1f} GB/s  {entry['of_whole']:.2f} of whole  {bar}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
