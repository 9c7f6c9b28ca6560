"""Several threads, bound clients, and changes: nothing leaks, nobody is in two places."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import wire
from bench import SECOND, VIRTUAL
from test_threads import together

import svcdp
from svcdp import DestinationSpec, Reason, ServiceSpec, Settings, SourceRule, Verdict

WORKERS = 4
ROUNDS = 30
CLIENTS = [f"192.0.2.{n}" for n in range(1, 41)]
STAYS = [f"10.1.0.{n}" for n in range(1, 5)]
COMES = [f"10.2.0.{n}" for n in range(1, 5)]


def spec(destinations: list[str], protocol: str = "tcp", **fields: Any) -> ServiceSpec:
    members = tuple(
        DestinationSpec(address, 0, method=fields.get("method", "masq")) for address in destinations
    )
    fields.pop("method", None)
    return ServiceSpec(VIRTUAL[4], 1000, protocol, members, last_port=1999, **fields)


def assert_empty(dp: svcdp.Dataplane, now: int = 0) -> None:
    """Everything has ended: nothing is left over, and no counter is off."""
    for seconds in range(2000, 2400, 70):
        dp.sweep(now + seconds * SECOND)
    stats = dp.stats()
    assert (stats.connections, stats.persistence_templates) == (0, 0)
    assert stats.connections_created == stats.connections_expired
    for service in dp.services():
        for status in service.destinations:
            assert (status.active, status.inactive) == (0, 0), status
    dp.apply([])
    assert dp.draining() == dp.captures() == svcdp.Captures()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"protocol": "udp", "one_packet": True},
        {"protocol": "udp", "on_removal": "expire"},
        {"on_removal": "drop", "method": "dr"},
        {
            "masquerade_address": "198.51.100.1",
            "rules": (SourceRule(masquerade=True),),
            "on_removal": "expire",
        },
    ],
    ids=lambda fields: "-".join(map(str, fields)) or "nat",
)
def test_bound_clients(fields: dict[str, Any]) -> None:
    """Destinations that stay have persistent clients; time goes on, destinations come and go,
    settings change, templates and connections end: at any moment a client has one destination.
    """
    protocol = fields.get("protocol", "tcp")
    base = {"scheduler": "random", "persistence": 3, "timeouts": (("udp", 2), ("syn_recv", 2))}
    clock = [0]
    dp = svcdp.Dataplane(
        2000, 7, clock=lambda: clock[0], masquerade_ports=(20000, 40000),
        settings=Settings(drop_entry=1, drop_packet=1),
    )  # fmt: skip
    dp.apply([spec(STAYS, **base, **fields)])
    stop = threading.Event()

    def worker(number: int) -> None:
        draw = random.Random(number)
        for _ in range(ROUNDS):
            batch = svcdp.PacketBatch(128)
            for _ in range(128):
                flags = draw.choice(["S", "S", "A", "R"])
                client, port = draw.choice(CLIENTS), draw.randrange(1, 300)
                to = draw.randrange(1000, 1003)
                batch.append(wire.packet(protocol, client, port, VIRTUAL[4], to, flags))
            dp.process_batch(batch, clock[0])
            for index in range(128):
                assert batch.verdict(index) in tuple(Verdict)
                if batch.verdict(index) == Verdict.FORWARD and draw.random() < 0.5:
                    answer = wire.answer_to(batch[index])
                    dp.process(answer, clock[0])

    def changes() -> None:
        draw = random.Random(99)
        while not stop.is_set():
            clock[0] += SECOND // 4
            extra = draw.sample(COMES, draw.randrange(3))
            dp.update([spec(STAYS + extra, **base, **fields)])
            dp.sweep(limit=200)
            dp.captures()
            dp.stats()
            for _ in dp.connections():
                pass
            if draw.random() < 0.1:
                dp.update([], [(VIRTUAL[4], 1000, protocol)])
                dp.update([spec(STAYS, **base, **fields)])
            if draw.random() < 0.1:
                dp.configure(
                    Settings(drop_entry=draw.choice([0, 1, 3]), conn_reuse_mode=draw.randrange(4))
                )

    def workers() -> None:
        try:
            together(*(lambda n=n: worker(n) for n in range(WORKERS)))  # type: ignore[misc]
        finally:
            stop.set()

    together(workers, changes)
    stats = dp.stats()
    assert stats.connections == stats.connections_created - stats.connections_expired
    assert stats.packets[Verdict.FORWARD, Reason.NEW]
    assert_empty(dp, clock[0])


def test_one_client_one_destination() -> None:
    """All workers open connections of the same clients at once, with nothing that unbinds them."""
    dp = svcdp.Dataplane(1 << 14, 7, clock=lambda: 0)
    group = {"persistence": 100, "persistence_group": "site", "scheduler": "random"}
    dp.apply([spec(STAYS, **group), spec(STAYS, "udp", **group)])
    went: list[dict[str, set[str]]] = [{} for _ in range(WORKERS)]

    def worker(number: int) -> None:
        draw = random.Random(number)
        for round_ in range(10):
            clients = draw.sample(CLIENTS, len(CLIENTS))
            batch = svcdp.PacketBatch(2 * len(CLIENTS))
            for client in clients:
                for protocol in ("tcp", "udp"):
                    port = 1 + number * 100 + round_
                    batch.append(wire.packet(protocol, client, port, VIRTUAL[4], 1000 + round_))
            dp.process_batch(batch)
            for index in range(len(batch)):
                packet = wire.read(batch[index])
                went[number].setdefault(packet.source, set()).add(packet.destination)

    together(*(lambda n=n: worker(n) for n in range(WORKERS)))  # type: ignore[misc]
    dp.update([spec(STAYS, **group)])
    late = {c.client: c.destination for c in dp.connections()}
    # Two workers may bind a client at the same moment: then one connection of each of them may be
    # elsewhere, but who comes later finds one destination.
    for client in CLIENTS:
        final = {
            wire.read(
                dp.process(wire.packet("tcp", client, port, VIRTUAL[4], 1500)).packet
            ).destination
            for port in range(5000, 5008)
        }
        assert len(final) == 1, (client, late[client])
        assert len(set().union(*(part[client] for part in went))) <= WORKERS
    assert dp.stats().persistence_templates == len(CLIENTS)
    assert_empty(dp)
