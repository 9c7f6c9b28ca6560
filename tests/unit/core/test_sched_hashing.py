"""dh, sh and mh: who gets which part of the hash space, and what becomes of it in changes."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import ipvs_model
import pytest
import wire
from bench import CLIENT, SECOND, VIRTUAL, Bench

import svcdp
from svcdp.schedulers import is_table_size

PRIMES = (251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 65537, 131071, 655373)
CLIENTS = [f"192.0.{n // 256}.{n % 256}" for n in range(1024)]


class Farm(Bench):
    """A UDP service; its servers are called by their ports."""

    def __init__(self, scheduler: str, *weights: int, size: int = 4093, **fields: Any) -> None:
        super().__init__(1 << 13)
        self.serve(protocol="udp", scheduler=scheduler, mh_table_size=size, **fields)
        with self.dp.transaction() as tx:
            service = self.service(tx)
            for name, weight in enumerate(weights, 1):
                service.add("10.1.0.1", name, weight)

    def service(self, tx: svcdp.Transaction) -> svcdp.VirtualService:
        return tx.service(VIRTUAL[4], 80, "udp")

    def edit(self, name: int, **fields: int) -> None:
        with self.dp.transaction() as tx:
            self.service(tx).update("10.1.0.1", name, **fields)

    def pick(self, client: str = CLIENT[4], port: int = 40000) -> int | None:
        """The server of a new connection."""
        self.now += 301 * SECOND
        result = self.send(client=client, port=port, protocol="udp")
        return None if result.destination is None else result.destination[1]

    def picks(self) -> list[int | None]:
        return [self.pick(client) for client in CLIENTS]


def python_hash(data: bytes) -> int:
    """Python hashes bytes with SipHash-1-3; without randomization its key is 0."""
    code = f"print(hash({data!r}))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout) & ipvs_model.MASK64


@pytest.mark.skipif(sys.hash_info.algorithm != "siphash13", reason="another hash is built in")
@pytest.mark.parametrize("data", [b"a", b"\1\2\3\4", b"8 bytes.", b"more than eight bytes"])
def test_siphash_of_the_model(data: bytes) -> None:
    """The core is held against the model below."""
    assert ipvs_model.siphash13(0, 0, data) == python_hash(data)


def test_dh_looks_at_the_destination_only() -> None:
    farm = Farm("dh", 1, 100)
    assert len(set(farm.picks())) == 1
    (server,) = set(farm.picks())
    farm.edit(server, weight=0)
    assert set(farm.picks()) == {None}, "and at nobody else"


def test_dh_deals_addresses_to_servers_in_turn() -> None:
    farm = Farm("dh")
    with farm.dp.transaction() as tx:
        service = tx.service("0.0.0.0", 9, "fwmark", scheduler="dh")
        for name in (1, 2, 3):
            service.add("10.1.0.1", name)
    picks = set()
    for last in range(256):
        packet = wire.packet("udp", CLIENT[4], 1000 + last, f"10.96.0.{last}", 80)
        result = farm.dp.process(packet, mark=9)
        # The newest has buckets 0, 3, 6 and so on.
        bucket = ipvs_model.hash8(ipvs_model.fold(f"10.96.0.{last}"))
        assert result.destination == ("10.1.0.1", (3, 2, 1)[bucket % 3])
        picks.add(bucket)
    assert len(picks) > 100


def test_sh_takes_weight_buckets_and_one_for_the_quiesced() -> None:
    farm = Farm("sh", 100, 0, 55)
    hashes = [ipvs_model.hash8(ipvs_model.fold(client)) for client in CLIENTS]
    picks = dict(zip(hashes, farm.picks(), strict=True))
    assert len(picks) == 256, "every bucket is tried"
    buckets = [picks[bucket] for bucket in range(256)]
    assert buckets == [3] * 55 + [None] + [1] * 100 + [3] * 55 + [None] + [1] * 44


def test_sh_fallback_finds_somebody() -> None:
    farm = Farm("sh", 3, 3, 3, scheduler_flags=("sh-fallback",))
    before = farm.picks()
    farm.edit(2, weight=0)
    after = farm.picks()
    # The quiesced server keeps one bucket in seven, and its clients find others.
    assert set(after) == {1, 3}
    assert set(before) == {1, 2, 3}
    for name in (1, 3):
        farm.edit(name, weight=0)
    assert farm.pick() is None


@pytest.mark.parametrize("scheduler", ["sh", "mh"])
def test_ports_count_where_the_service_wants_it(scheduler: str) -> None:
    with_ports = Farm(scheduler, 1, 1, 1, 1, scheduler_flags=(f"{scheduler}-port",))
    without = Farm(scheduler, 1, 1, 1, 1)
    assert len({with_ports.pick(port=port) for port in range(1, 60)}) > 1
    assert len({without.pick(port=port) for port in range(1, 60)}) == 1


@pytest.mark.parametrize("size", [251, 4093, 65537])
@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 3000, 500, 2, 40), (1, 0, 7, (1 << 31) - 1)])
def test_mh_is_the_kernels_table(size: int, weights: tuple[int, ...]) -> None:
    farm = Farm("mh", *weights, size=size)
    model = ipvs_model.Service("mh", table_size=size)
    # At once: the model takes its time for a table.
    model.servers[:] = [
        ipvs_model.Server("10.1.0.1", name, weight, weight)
        for name, weight in reversed([*enumerate(weights, 1)])
    ]
    model.begin()
    assert isinstance(model.scheduler, ipvs_model.Maglev)
    wanted = [(server.address, server.port) for server in model.scheduler.table]
    assert farm.dp.hash_table(VIRTUAL[4], 80, "udp") == wanted


def test_sh_shows_its_table_and_others_have_none() -> None:
    farm = Farm("sh", 2, 1)
    table = farm.dp.hash_table(VIRTUAL[4], 80, "udp")
    assert [port for _, port in table] == [2, 1, 1] * 85 + [2]
    assert Farm("rr", 1).dp.hash_table(VIRTUAL[4], 80, "udp") == []
    assert Farm("mh", 0).dp.hash_table(VIRTUAL[4], 80, "udp") == []
    with pytest.raises(svcdp.NotFoundError):
        farm.dp.hash_table(VIRTUAL[4], 81, "udp")


def test_a_quiesced_server_keeps_its_share_of_mh() -> None:
    """And its clients find nobody, unless the service falls back. Nobody else moves."""
    farm = Farm("mh", 1, 1, 1)
    before = farm.picks()
    farm.edit(2, weight=0)
    assert farm.picks() == [None if pick == 2 else pick for pick in before]
    with farm.dp.transaction() as tx:
        tx.service(VIRTUAL[4], 80, "udp", scheduler_flags=("mh-fallback",))
    after = farm.picks()
    assert {new for old, new in zip(before, after, strict=True) if old == 2} == {1, 3}
    assert all(new == old for old, new in zip(before, after, strict=True) if old != 2)
    farm.edit(2, weight=7)
    farm.edit(2, weight=1)
    assert farm.picks() == before


def test_mh_shares_follow_the_weights() -> None:
    shares = Counter(Farm("mh", 1, 2, 5).picks())
    for name, weight in ((1, 1), (2, 2), (3, 5)):
        assert abs(shares[name] / len(CLIENTS) - weight / 8) < 0.05


def test_mh_moves_little_when_a_server_goes() -> None:
    farm = Farm("mh", *[1] * 10, size=65537)
    before = farm.picks()
    with farm.dp.transaction() as tx:
        farm.service(tx).remove("10.1.0.1", 4)
    after = farm.picks()
    moved = sum(new != old for old, new in zip(before, after, strict=True) if old != 4)
    assert 4 not in after
    assert moved < len(CLIENTS) / 50


def test_mh_of_servers_that_never_had_a_weight() -> None:
    farm = Farm("mh", 0, 0, scheduler_flags=("mh-fallback",))
    assert farm.pick() is None
    farm.edit(1, weight=1)
    assert set(farm.picks()) == {1}


def test_the_size_of_the_table_can_change() -> None:
    farm = Farm("mh", 1, 1, 1, size=251)
    small = farm.picks()
    with farm.dp.transaction() as tx:
        tx.service(VIRTUAL[4], 80, "udp", mh_table_size=4093)
    assert farm.picks() != small
    assert farm.picks() == Farm("mh", 1, 1, 1).picks()


@pytest.mark.parametrize("size", PRIMES)
def test_table_sizes(size: int) -> None:
    assert is_table_size(size)
    assert not is_table_size(size + 1)
    assert Farm("mh", 1, 1, size=size).pick() in (1, 2)


@pytest.mark.parametrize("size", [0, 1, 241, 255, 65536, 655357 + 2, 655379, "251", 251.0, None])
def test_no_table_sizes(size: Any) -> None:
    with pytest.raises(svcdp.ConfigError, match="mh_table_size"):
        Farm("mh", 1, size=size)


def test_mh_has_no_more_servers_than_entries() -> None:
    farm = Farm("mh", *[1] * 251, size=251)
    before = farm.picks()
    with pytest.raises(svcdp.CapacityError, match="251"), farm.dp.transaction() as tx:
        farm.service(tx).add("10.1.0.1", 252)
    assert farm.picks() == before, "nothing of it happened"
    assert set(before) <= set(range(1, 252))


def test_mh_falls_back_only_to_servers_with_a_share() -> None:
    """Of 251 servers with weights from 1 to 8 some come too late for an entry."""
    farm = Farm("mh", *[1] + [8] * 250, size=251, scheduler_flags=("mh-fallback",))
    with farm.dp.transaction() as tx:
        for name in range(2, 252):
            farm.service(tx).update("10.1.0.1", name, weight=0)
    assert set(farm.picks()) == {None}


@pytest.mark.parametrize(
    ("scheduler", "flags"),
    [
        ("rr", ("sh-port",)),
        ("sh", ("mh-port",)),
        ("mh", ("mh-port", "flag-1")),
        ("mh", ("",)),
        ("sh", (1,)),
    ],
)
def test_flags_of_other_schedulers(scheduler: str, flags: tuple[Any, ...]) -> None:
    with pytest.raises(svcdp.ConfigError, match="flag"):
        Farm(scheduler, 1, scheduler_flags=flags)


@pytest.mark.parametrize("scheduler", ["dh", "sh", "mh"])
@pytest.mark.parametrize("version", [4, 6])
def test_both_families_serve(scheduler: str, version: int) -> None:
    bench = Bench()
    servers = {4: "10.1.0.1", 6: "fd01::1"}
    bench.serve(
        (servers[version], 1), (servers[version], 2), address=VIRTUAL[version], scheduler=scheduler
    )
    result = bench.send(client=CLIENT[version], to=(VIRTUAL[version], 80))
    assert result.verdict is svcdp.Verdict.FORWARD
