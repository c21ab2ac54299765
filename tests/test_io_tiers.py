"""Memory of NUMA nodes, real (node 0 stands in) and emulated, and one copy between tiers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from offload.io import HostTier, Ledger, Pace, StoreError, allocate, copy, lock, numa
from offload.io.tiers import measure

MIB = 1 << 20
HERE = numa.nodes()
has_numa = pytest.mark.skipif(not HERE, reason="this system does not describe NUMA nodes")


def machine(root: Path, *described: tuple[str, int, int]) -> Path:
    """A sysfs folder of nodes with (CPUs, total MiB, free MiB)."""
    for number, (cpus, total, free) in enumerate(described):
        node = root / f"node{number}"
        node.mkdir(parents=True)
        (node / "cpulist").write_text(f"{cpus}\n")
        (node / "meminfo").write_text(
            f"Node {number} MemTotal:       {total * 1024} kB\nNode {number} MemFree:        {free * 1024} kB\n"
            f"Node {number} HugePages_Total:     0\n"
        )
    return root


def test_nodes_without_cpus_are_found_and_others_named(tmp_path: Path) -> None:
    root = machine(tmp_path, ("0-7", 1000, 500), ("8-15", 1000, 500), ("", 4000, 3000), ("", 4000, 4000), ("", 0, 0))
    assert [node.node for node in numa.nodes(root) if node.memory_only] == [2, 3]
    assert numa.choose(None, 6000 * MIB, root) == (2, 3)
    assert numa.choose([2], 3000 * MIB, root) == (2,)
    assert numa.choose([1], 100 * MIB, root) == (1,)
    with pytest.raises(StoreError, match=r"node 7 does not exist or has no memory; nodes here: node 0 \(CPUs 0-7, 0.5"):
        numa.choose([2, 7], 1, root)
    with pytest.raises(StoreError, match="node 4 does not exist or has no memory"):
        numa.choose([4], 1, root)
    with pytest.raises(StoreError, match=rf"{3001 * MIB} bytes do not fit NUMA node 2, {3000 * MIB} bytes are free"):
        numa.choose([2], 3001 * MIB, root)
    with pytest.raises(StoreError, match=r"no NUMA node has memory and no CPUs; nodes here: node 0 \(CPUs 0-3"):
        numa.choose(None, 1, machine(tmp_path / "plain", ("0-3", 100, 100)))


@has_numa
def test_a_bound_buffer_has_the_policy_and_its_pages_on_the_node() -> None:
    node, ledger = HERE[0].node, Ledger()
    tier = HostTier("cxl", nodes=(node,))
    with tier.allocate(3 * MIB + 5, ledger, "param") as buffer:
        assert ledger.in_use("cxl") == buffer.nbytes and ledger.in_use("cpu") == 0
        assert numa.policy(buffer.tensor) == (2, (node,))
        assert numa.placement(buffer.tensor) == {}  # binding touches nothing
        buffer.tensor.fill_(1)
        assert numa.placement(buffer.tensor) == {node: buffer.nbytes}
    with allocate(MIB, ledger) as plain:
        assert numa.policy(plain.tensor) == (0, ())
    assert ledger.in_use("cxl") == 0 and "NUMA node 0" in HostTier("cxl", (0,)).describe()


@has_numa
def test_a_node_that_is_not_there_is_an_error_and_leaves_nothing() -> None:
    ledger = Ledger()
    with pytest.raises(StoreError, match=r"cannot bind memory to NUMA node 1000: .*EINVAL"):
        HostTier("cxl", nodes=(1000,)).allocate(MIB, ledger, "param")
    assert ledger.in_use("cxl") == 0


def test_an_emulated_tier_is_as_slow_as_it_says_and_says_so() -> None:
    tier = HostTier("cxl", pace=Pace(bandwidth=100e6, latency=0.01))
    assert tier.emulated and tier.describe() == "cxl (emulated in RAM at 0.1 GB/s and 10000000 ns)"
    ledger = Ledger()
    with tier.allocate(2 * MIB, ledger, "param") as buffer:
        source = torch.arange(2 * MIB, dtype=torch.int32).view(torch.uint8)[: 2 * MIB]
        began = time.perf_counter()
        copy(buffer.tensor, source, tier)
        assert time.perf_counter() - began >= 2 * MIB / 100e6 + 0.01
        assert torch.equal(buffer.tensor, source) and ledger.in_use("cxl") == 2 * MIB

        def back() -> None:
            copy(torch.empty(2 * MIB, dtype=torch.uint8), buffer.tensor, HostTier("cpu"), tier)

        threads = [threading.Thread(target=back) for _ in range(3)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.perf_counter() - began >= 3 * 2 * MIB / 100e6  # they share the bandwidth
    read, write = measure(tier, 2 * MIB)
    assert 10e6 < read <= 100e6 and 10e6 < write <= 100e6
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        Pace(0)


def test_a_copy_between_ordinary_tiers_widens_and_does_not_wait() -> None:
    target = torch.empty(1000)
    source = torch.randn(1000).bfloat16()
    copy(target, source, HostTier("cpu"))
    assert torch.equal(target, source.float())


def locked_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmLck"))
    return int(line.split()[1]) * 1024


def test_locked_memory_is_locked_until_it_is_freed() -> None:
    before = locked_bytes()
    with allocate(64 * 1024, Ledger()) as buffer:
        lock(buffer.tensor)
        assert locked_bytes() - before == 64 * 1024
        view = buffer.tensor[:8] + 1, buffer.tensor[8:]
    assert locked_bytes() == before and not view[1].any()  # also while a view lives


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its right to lock any amount")
def test_memory_over_the_limit_of_locked_memory_is_an_error() -> None:
    code = """
import os, resource
from offload.io import *
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
os.setuid(65534)
try:
    lock(allocate(1 << 20, Ledger()).tensor)
except StoreError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "cannot lock 1048576 bytes in RAM" in done.stdout and "ulimit -l" in done.stdout, done.stderr


def test_huge_pages_do_not_make_a_buffer_larger() -> None:
    process, nbytes = psutil.Process(), 11 * MIB + 4096
    with allocate(nbytes, Ledger()) as buffer:
        before = process.memory_info().rss
        buffer.tensor.fill_(1)
        assert nbytes - MIB < process.memory_info().rss - before < nbytes + MIB


def test_a_config_with_a_node_that_is_not_there_names_those_that_are() -> None:
    from offload.config_sections import CxlConfig
    from offload.preflight import _cxl

    assert _cxl(None) == [] and _cxl(CxlConfig(size=1 << 40, emulate=True)) == []
    (problem,) = _cxl(CxlConfig(node=[0, 977], size=4096))
    assert problem.startswith("memory.cxl: NUMA node 977 does not exist or has no memory; nodes here: node 0 (CPUs")
    assert "memory.cxl.emulate" in problem and CxlConfig(node=2, size="64GiB").nodes == [2]
