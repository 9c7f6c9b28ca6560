"""From objects in memory to services in force: ``python -m benchmarks.bench_sync [--gate]``.

Without ``--gate`` a table for people: everything at first, one change, memory, and how late packets
and the event loop are during 100 changes a second. With it what must follow the size of the change
and not that of the cluster; the yardstick is a loop in plain Python in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

from svcdp import Dataplane
from svcdp.kube.model import Object
from svcdp.kube.state import Change
from svcdp.kube.tracker import Tracker
from svcdp.node.daemon import GC_THRESHOLDS
from svcdp.sync import Sync

from .cluster import ENDPOINTS, NODE, PLAIN, cluster, endpoint_slice, plain_cluster
from .memory import resident
from .reference import Packets

#: Everything at first, for each destination, in objects of the plain loop.
FULL_MAX = 30
#: One change among 10,000 Services, in changes among 100.
GROWTH_MAX = 1.8
TRIES = 5
CHANGES = 100
#: Changes a second, and for how many of them lags are measured.
RATE, CHURN = 100, 1000
#: Seconds between two packets.
GAP = 0.0002


@dataclass(frozen=True, slots=True)
class Made:
    """What the plain loop makes."""

    address: str
    port: int
    weight: int


def plain_loop(count: int) -> float:
    """Seconds for as many frozen objects in a dict."""
    start = time.perf_counter()
    made = {}
    for number in range(count):
        made[number] = Made("10.1.0.1", number, 1)
    return time.perf_counter() - start


class Node:
    """A node that takes objects in the steps in which :class:`svcdp.sync.Sync` does."""

    def __init__(self, objects: Iterable[Object], services: int, endpoints: int) -> None:
        self._services, self._endpoints = services, endpoints
        objects = tuple(objects)
        before = resident()
        self._dataplane = Dataplane(1 << 16, seed=1)
        self._tracker = Tracker(NODE)
        self.seconds = self.take(objects)
        self.bytes = resident() - before
        specs = [service.spec for service in self._dataplane.services()]
        self.destinations = sum(len(spec.destinations) for spec in specs)

    def take(self, objects: Iterable[Object]) -> float:
        """Seconds until these are in force."""
        start = time.perf_counter()
        keys = self._tracker.apply([(0, "", Change(objects=tuple(objects)))])
        specs = [self._tracker.spec(key) for key in sorted(keys)]
        self._dataplane.update([spec for spec in specs if spec is not None])
        return time.perf_counter() - start

    def change(self) -> float:
        """Median seconds of a change: an endpoint is no longer ready, in one Service after the
        other. All is as before when this returns.
        """
        times = []
        for i in range(CHANGES):
            number = 10 * (i * 37 % (self._services // 10)) + PLAIN
            changed = endpoint_slice(number, endpoints=self._endpoints, without=1)
            times.append(self.take([changed]))
            self.take([endpoint_slice(number, endpoints=self._endpoints)])
        return statistics.median(times)


class Feed:
    """A source that has a cluster, and then changes at a rate."""

    name = "feed"
    errors = ()

    def __init__(self, services: int) -> None:
        self._services = services
        self._first = Change(objects=tuple(cluster(services)))
        self.done = asyncio.Event()

    async def changes(self) -> AsyncIterator[Sequence[Change]]:
        yield [self._first]
        for i in range(CHURN):
            await asyncio.sleep(1 / RATE)
            number = 10 * (i * 37 % (self._services // 10)) + PLAIN
            yield [Change(objects=(endpoint_slice(number, without=i % ENDPOINTS),))]
        self.done.set()
        await asyncio.Event().wait()


class Lags:
    """How late others come to their turn, in seconds: the event loop, and a thread that processes
    one packet after the other and needs the GIL for it, as an embedder's does.
    """

    def __init__(self, dataplane: Dataplane) -> None:
        self._dataplane = dataplane
        self.of_loop: list[float] = []
        self.of_packets: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._process)
        self._thread.start()
        self._task = asyncio.get_running_loop().create_task(self._tick())

    def stop(self) -> None:
        self._task.cancel()
        self._stop.set()
        self._thread.join()

    async def _tick(self) -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            self.of_loop.append(time.perf_counter() - start - 0.001)

    def _process(self) -> None:
        packets = Packets(1)
        packets.of_flows(PLAIN, syn=True)
        template = bytes(packets.memory[:64])
        while not self._stop.is_set():
            start = time.perf_counter()
            time.sleep(GAP)
            self._dataplane.process(bytearray(template))
            self.of_packets.append(time.perf_counter() - start - GAP)


async def churn(services: int) -> dict[str, Lags]:
    """How late they were in quiet, while everything came, and during the changes."""
    dataplane = Dataplane(1 << 16, seed=1)
    feed = Feed(services)
    found = {"quiet": Lags(dataplane)}
    await asyncio.sleep(2)
    found["quiet"].stop()
    async with Sync(dataplane, NODE) as sync:
        found["full list"] = Lags(dataplane)
        sync.follow(feed)
        await sync.ready()
        found["full list"].stop()
        found[f"{RATE} changes/s"] = Lags(dataplane)
        await feed.done.wait()
        found[f"{RATE} changes/s"].stop()
    return found


def gate() -> list[str]:
    """What is wrong. Neighbours only make a try slower: the best counts."""
    small = Node(cluster(100, 10), 100, 10)
    tries = []
    for _ in range(2):
        large = Node(cluster(10_000, 10), 10_000, 10)
        tries.append(large.seconds / plain_loop(large.destinations))
    full = min(tries)
    growth = min(large.change() / small.change() for _ in range(TRIES))
    verdicts = [
        (f"everything: {full:.1f} x the plain loop, at most {FULL_MAX}", full > FULL_MAX),
        (
            f"a change among 10,000 Services: {growth:.2f} x one among 100, at most {GROWTH_MAX}",
            growth > GROWTH_MAX,
        ),
    ]
    for verdict, _ in verdicts:
        print(verdict)
    return [verdict for verdict, missed in verdicts if missed]


def table() -> None:
    line = "{:<46} {:>12} {:>8} {:>10} {:>11} {:>9}"
    print(
        line.format(
            "Services x endpoints", "destinations", "all, s", "plain loop", "a change ms", "bytes"
        )
    )
    for what, make, services in (
        ("one port", plain_cluster, 5_000),
        ("two ports and all kinds", cluster, 5_000),
        ("two ports and all kinds", cluster, 10_000),
    ):
        node = Node(make(services), services, ENDPOINTS)
        print(
            line.format(
                f"{services:,} x {ENDPOINTS}, {what}",
                f"{node.destinations:,}",
                f"{node.seconds:.1f}",
                f"{plain_loop(node.destinations):.2f}",
                f"{node.change() * 1000:.2f}",
                f"{node.bytes / node.destinations:.0f}",
            ),
            flush=True,
        )
        del node
        gc.collect()
    print("late, ms (median, 99 %, longest):")
    for when, lags in asyncio.run(churn(5_000)).items():
        for who, times in (("event loop", lags.of_loop), ("packets", lags.of_packets)):
            times.sort()
            shown = (statistics.median(times), times[len(times) * 99 // 100], times[-1])
            print(f"{when:<14} {who:<11}", *(f"{each * 1000:8.2f}" for each in shown))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_sync", description=__doc__)
    parser.add_argument("--gate", action="store_true", help="fail when a bound is missed")
    options = parser.parse_args()
    gc.set_threshold(*GC_THRESHOLDS)  # as svcdp run does
    if not options.gate:
        table()
        return
    wrong = gate()
    if wrong:
        sys.exit("\n".join(["missed:", *wrong]))


if __name__ == "__main__":
    main()
