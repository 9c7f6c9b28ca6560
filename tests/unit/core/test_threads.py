"""Several threads on one dataplane while another changes services."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import wire
from bench import SECOND, VIRTUAL

import svcdp
from svcdp import DestinationSpec, Reason, ServiceSpec, SourceRule, Verdict

WORKERS = 4
FLOWS = 150
ROUNDS = 40
DESTINATIONS = [f"10.1.0.{n}" for n in range(1, 9)]


def together(*tasks: Callable[[], None]) -> None:
    """Run tasks at the same time; raise what they raise."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(tasks))

    def run(task: Callable[[], None]) -> None:
        try:
            start.wait(30)
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


def spec(protocol: str, destinations: list[str], **fields: object) -> ServiceSpec:
    members = tuple(DestinationSpec(address, 8080) for address in destinations)
    return ServiceSpec(VIRTUAL[4], 80, protocol, members, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("masquerade", [False, True])
def test_one_connection_one_destination(masquerade: bool) -> None:
    """All workers send packets of all flows, at once with changes that never remove all.

    Flows are known to all workers, so that several try to make one connection together. The
    first eight destinations stay, others come and go, and the clock does not move: a TCP
    connection that was made once must stay where it is.
    """
    dp = svcdp.Dataplane(1 << 14, 7, clock=lambda: 0, masquerade_ports=(20000, 40000))
    fields = {
        "masquerade_address": "198.51.100.1",
        "rules": (SourceRule(masquerade=masquerade),),
        "scheduler": "random",
    }
    dp.apply([spec("tcp", DESTINATIONS, **fields), spec("udp", DESTINATIONS, **fields)])
    seen: list[dict[tuple[int, int], set[tuple[str, str, int]]]] = [{} for _ in range(WORKERS)]
    sent = [0] * WORKERS
    stop = threading.Event()

    def worker(number: int) -> None:
        draw = random.Random(number)
        for _ in range(ROUNDS):
            batch, flows = svcdp.PacketBatch(FLOWS), [*range(1, FLOWS + 1)]
            draw.shuffle(flows)
            for flow in flows:
                batch.append(wire.packet("tcp", "192.0.2.4", flow, VIRTUAL[4], 80))
            dp.process_batch(batch)
            sent[number] += FLOWS
            for index, flow in enumerate(flows):
                assert batch.verdict(index) == Verdict.FORWARD, batch.reason(index)
                there = wire.read(batch[index])
                seen[number].setdefault((wire.TCP, flow), set()).add(
                    (there.destination, there.source, there.source_port)
                )
            datagrams = [
                wire.packet("udp", "192.0.2.4", draw.randrange(1, 60000), VIRTUAL[4], 80)
                for _ in range(64)
            ]
            dp.process_batch(datagrams)
            sent[number] += 64

    def changes() -> None:
        draw = random.Random(99)
        while not stop.is_set():
            extra = [f"10.2.0.{draw.randrange(1, 20)}"]
            for protocol in ("tcp", "udp"):
                dp.update([spec(protocol, DESTINATIONS + extra, **fields)])
            dp.update([spec("tcp", ["10.1.0.1"], **fields)])
            dp.update([], [(VIRTUAL[4], 81, "tcp")])
            dp.sweep()
            dp.captures()
            dp.services()
            dp.stats()
            dp.explain("tcp 192.0.2.4:1 -> 10.96.0.10:80")
            for _ in dp.connections():
                pass

    def workers() -> None:
        try:
            together(*(lambda n=n: worker(n) for n in range(WORKERS)))  # type: ignore[misc]
        finally:
            stop.set()

    together(workers, changes)
    for flow in range(1, FLOWS + 1):
        ways = set().union(*(part[wire.TCP, flow] for part in seen))
        assert len(ways) == 1, f"flow {flow} went {ways}"
    stats = dp.stats()
    assert sum(stats.packets.values()) == sum(sent)
    assert stats.connections == stats.connections_created - stats.connections_expired
    live = list(dp.connections())
    assert sum(c.protocol == "tcp" for c in live) == FLOWS
    assert stats.packets[Verdict.FORWARD, Reason.NEW] == stats.connections_created
    # Everything ends: nothing is left over, and no counter is off.
    dp.sweep(1000 * SECOND)
    stats = dp.stats()
    assert (stats.connections, stats.persistence_templates) == (0, 0)
    assert stats.connections_expired == stats.connections_created
    for service in dp.services():
        for destination in service.destinations:
            assert (destination.active, destination.inactive) == (0, 0), destination
    assert dp.draining() == svcdp.Captures()


def test_a_full_small_table() -> None:
    """Insertions, expiries and moves in a few stripes, on several clocks' worth of time."""
    dp = svcdp.Dataplane(100, 3, clock=lambda: 0)
    dp.apply([spec("udp", DESTINATIONS, persistence=2), spec("tcp", DESTINATIONS)])
    total = [0] * WORKERS

    def worker(number: int) -> None:
        draw = random.Random(number)
        for round_ in range(150):
            packets = [
                wire.packet(
                    draw.choice(["tcp", "udp"]),
                    f"192.0.2.{draw.randrange(20)}",
                    draw.randrange(1, 30),
                    VIRTUAL[4],
                    80,
                    draw.choice(["S", "S", "A", "R", "F"]),
                )
                for _ in range(64)
            ]
            dp.process_batch(packets, round_ * 30 * SECOND)
            total[number] += 64

    def changes() -> None:
        for round_ in range(300):
            dp.update([spec("udp", DESTINATIONS[round_ % 7 :], persistence=2)])
            dp.sweep(round_ * 15 * SECOND)

    together(changes, *(lambda n=n: worker(n) for n in range(WORKERS)))  # type: ignore[misc]
    stats = dp.stats()
    assert sum(stats.packets.values()) == sum(total)
    assert stats.connections + stats.persistence_templates <= 100
    assert stats.connections == stats.connections_created - stats.connections_expired
    dp.sweep(10**6 * SECOND)
    # Templates outlive the connections that hung on them.
    dp.sweep(10**7 * SECOND)
    stats = dp.stats()
    assert (stats.connections, stats.persistence_templates) == (0, 0)
    for service in dp.services():
        for destination in service.destinations:
            assert (destination.active, destination.inactive) == (0, 0)
    assert dp.process(wire.packet("tcp", "192.0.2.4", 1, VIRTUAL[4], 80)).reason == Reason.NEW


def test_a_batch_belongs_to_one_thread() -> None:
    """Whoever comes while it is being processed is refused, and nothing else happens."""

    @svcdp.register_scheduler("test-meddler")
    class Meddler(svcdp.abc.Scheduler):
        def pick(self, flow: object, destinations: object) -> int:
            for call in (
                lambda: dp.process_batch(batch),
                batch.clear,
                lambda: batch.append(b"x"),
            ):
                with pytest.raises(RuntimeError, match="being processed"):
                    call()
            return 0

    dp = svcdp.Dataplane(64, 1, clock=lambda: 0)
    dp.apply([spec("tcp", DESTINATIONS, scheduler="test-meddler")])
    batch = svcdp.PacketBatch(64)
    for port in range(1, 17):
        batch.append(wire.packet("tcp", "192.0.2.4", port, VIRTUAL[4], 80))
    assert set(dp.process_batch(batch)) == {Verdict.FORWARD}
    assert dp.stats().scheduler_errors == 0
    batch.clear()


def test_a_commit_lets_others_have_the_gil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also inside the one call into the core that brings a whole cluster into force."""
    specs = [
        ServiceSpec(f"10.96.{n >> 8}.{n & 255}", 80, "tcp", (DestinationSpec("10.1.0.1", 80),))
        for n in range(2000)
    ]
    packet = wire.packet("tcp", "192.0.2.4", 40000, specs[-1].address, 80)
    inside: list[svcdp.Dataplane | None] = [None]
    stop, seen = threading.Event(), threading.Event()
    commit = svcdp.Dataplane.commit

    def watched(self: svcdp.Dataplane, *args: Any) -> None:
        inside[0] = self
        commit(self, *args)  # between these two lines Python gives the GIL to nobody
        inside[0] = None

    def look() -> None:
        while not stop.is_set():
            dp = inside[0]
            # It is in the call as long as the services are not in force.
            if dp is not None and dp.process(bytearray(packet)).verdict == Verdict.PASS:
                seen.set()

    monkeypatch.setattr(svcdp.Dataplane, "commit", watched)
    thread = threading.Thread(target=look, daemon=True)
    interval = sys.getswitchinterval()
    deadline = time.monotonic() + 30
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        while not seen.is_set() and time.monotonic() < deadline:
            svcdp.Dataplane(16).apply(specs)
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert seen.is_set()
