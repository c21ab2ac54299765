"""The memory section against the system: its parts add up to the peak that another process sees of this one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

from offload import report
from offload.memory import process_tree, resident_and_pss

PROGRAM = """
import json, sys
import torch
import offload

engine = offload.wrap(None, json.loads(sys.argv[1]))
torch.manual_seed(0)
batch = {"input_ids": torch.randint(0, 8000, (8, 128)), "labels": torch.randint(0, 8000, (8, 128))}
for _ in range(3):
    engine.step(batch)
engine.close()
print("closed", flush=True)
sys.stdin.read()
"""


def resident_peak(pid: int) -> int:
    """Bytes of a process that were in RAM at most since the run began to reserve, as the kernel counts them."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]


def beyond(pid: int) -> int:
    """Resident bytes of a process beyond the PSS of its tree."""
    counted = [resident_and_pss(member) for member in process_tree(pid)]
    return counted[0][0] - sum(pss for _, pss in counted)


def test_the_section_adds_up_to_what_the_system_measured(tmp_path: Path) -> None:
    config = {
        "model": {
            "architecture": {
                "model_type": "llama", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
                "num_attention_heads": 4, "vocab_size": 8000, "tie_word_embeddings": False,
            },
            "dtype": "float32",
        },
        "data": {"path": "none.jsonl", "sequence_length": 128},
        "train": {"steps": 3, "micro_batch_size": 4, "global_batch_size": 8, "schedule": {"name": "constant"}},
        "memory": {"device": "cpu", "cpu": "1GiB"},
        "planner": {"solver": "greedy", "activations": "recompute"},
        "output": str(tmp_path / "run"),
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(config)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdin is not None and program.stdout is not None
        watched = threading.Thread(target=program.stdout.readline)
        watched.start()
        highest = 0
        shared: list[int] = []  # pages of libraries count by their share, which changes as other programs come and go
        while watched.is_alive():
            watched.join(0.1)
            most = resident_peak(program.pid)
            if most < highest:  # the run begins, and the kernel counts anew
                del shared[:-1]
            highest = most
            shared.append(beyond(program.pid))
        program.stdin.close()
    assert program.returncode == 0
    memory = json.loads((tmp_path / "run" / "memory.json").read_text())
    page = report.build(tmp_path / "run").path.joinpath("report.html").read_text()
    table = page[page.index('class="parts"') : page.index("measured peak</td>")]
    parts = dict(re.findall(r'<tr><td>([^<]*)</td><td class="n" data-bytes="(-?\d+)"', table))
    told = sum(map(int, parts.values()))
    measured = highest - min(max(highest - told, min(shared)), max(shared))
    assert abs(told - measured) <= 0.01 * measured, (told, measured, parts)
    # What is named is there: without the rest, what the plan has for the framework is left over at most.
    named = {name: int(n) for name, n in parts.items() if "measured" not in name and "not touched" not in name}
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    framework = plan["categories"]["gpu"]["framework"] + plan["categories"]["cpu"]["program"]
    assert -0.05 * measured <= measured - sum(named.values()) <= framework, (measured, parts, framework)
    assert memory["process"]["pss_peak"] == told
