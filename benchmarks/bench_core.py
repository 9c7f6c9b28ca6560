"""pytest-benchmark's view of the cases: ``pytest benchmarks/bench_core.py --benchmark-enable``.

Each case is a group of two, svcdp and the C loop. With --benchmark-disable, which is the default,
they run once and check that both sides do the same work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .cases import HEADERS, Hit, NewConnection, Update, new_dataplane, new_loop
from .reference import STRIDE, Packets

SIDES = pytest.mark.parametrize("side", ["svcdp", "c"])


def run(benchmark: Any, case: Any, side: str, prepare: Callable[[], object]) -> None:
    benchmark.group = case.name
    call, argument = (
        (case.call, case.argument) if side == "svcdp" else (case.loop.run, case.packets)
    )
    benchmark.pedantic(call, args=(argument,), setup=prepare, rounds=2000)


@SIDES
@pytest.mark.parametrize("batch", [64, 256, 1024])
@pytest.mark.parametrize(
    "connections", [1_000, 100_000, pytest.param(10**6, marks=pytest.mark.slow)]
)
def test_hit(benchmark: Any, connections: int, batch: int, side: str) -> None:
    case = Hit(connections, batch)
    run(benchmark, case, side, case.write)


@SIDES
@pytest.mark.parametrize(("how", "batch"), [("list", 64), ("single packet", 1)])
def test_buffers(benchmark: Any, how: str, batch: int, side: str) -> None:
    case = Hit(1_000, batch, how=how)
    run(benchmark, case, side, case.write_buffers)


@SIDES
@pytest.mark.parametrize("services", [1, 100, 10_000])
def test_new_connection(benchmark: Any, services: int, side: str) -> None:
    case = NewConnection(services)
    run(benchmark, case, side, lambda: case.write(side == "c"))


@SIDES
def test_update(benchmark: Any, side: str) -> None:
    case = Update(10_000)
    benchmark.group = case.name
    benchmark.pedantic(getattr(case, side), rounds=20)


def test_both_write_the_same_bytes() -> None:
    dp, loop = new_dataplane(100, destinations=1), new_loop(10_000, 100, destinations=1)
    ours, theirs = Packets(256, services=100), Packets(256, services=100)
    for syn in (True, False):
        for packets in (ours, theirs):
            packets.of_flows(5, syn=syn)
        before = ours.memory[:]
        assert dp.process_batch(ours.batch) == bytes([1]) * 256
        assert loop.run(theirs) == 256
        assert ours.memory[:] == theirs.memory[:] != before
        assert len({ours.memory[i * STRIDE : i * STRIDE + HEADERS] for i in range(256)}) == 256
