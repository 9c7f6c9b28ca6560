"""Destinations that leave clients without an answer: seen, passed over, asked again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import wire
from bench import CLIENT, SECOND, VIRTUAL, Bench
from partial import CSUM_PARTIAL, packets_of

import svcdp
from svcdp import DestinationSpec, PassiveHealth, Reason, SourceRule, Verdict
from svcdp.abc import Scheduler
from svcdp.types import Destination

ONE, TWO, THREE = ("10.1.1.1", 8080), ("10.1.1.2", 8080), ("10.1.1.3", 8080)
ALL = (ONE, TWO, THREE)
ISN = 0xFFFFFFFF  # its successor is 0
ONCE = PassiveHealth(failures=1, ejection=10, max_ejection=40)


class Trial(Bench):
    """Destinations that answer, or do not."""

    def __init__(
        self,
        *destinations: Any,
        health: PassiveHealth = ONCE,
        max_connections: int = 4096,
        **fields: Any,
    ) -> None:
        super().__init__(max_connections)
        self.fields = {"passive_health": health, **fields}
        self.serve(*(destinations or ALL), **self.fields)

    def syn(self, port: int = 40000, *, isn: int = ISN, client: str = CLIENT[4]) -> svcdp.Result:
        numbers = (isn, 0)
        return self.dp.process(
            wire.packet("tcp", client, port, VIRTUAL[4], 80, "S", numbers=numbers)
        )

    def answer(
        self,
        to: svcdp.Result,
        flags: str = "SA",
        *,
        port: int = 40000,
        isn: int = ISN,
        client: str = CLIENT[4],
    ) -> svcdp.Result:
        """What the destination of a SYN says to it."""
        assert to.destination is not None
        numbers = (5000, (isn + 1) % 2**32)
        return self.dp.process(
            wire.packet("tcp", *to.destination, client, port, flags, numbers=numbers)
        )

    def refuse(self, port: int) -> tuple[str, int]:
        """A connection that is refused: by whom."""
        syn = self.syn(port)
        assert self.answer(syn, "RA", port=port).reason == Reason.REPLY
        assert syn.destination is not None
        return syn.destination

    def picks(self, count: int, first: int = 50000) -> list[tuple[str, int]]:
        """Who gets new connections, which are answered."""
        found = []
        for port in range(first, first + count):
            syn = self.syn(port)
            self.answer(syn, port=port)
            assert syn.destination is not None
            found.append(syn.destination)
        return found

    def ejected(self) -> set[tuple[str, int]]:
        (service,) = self.dp.services()
        return {(each.address, each.port) for each in service.destinations if each.ejected}


def others(*gone: tuple[str, int]) -> set[tuple[str, int]]:
    return set(ALL) - set(gone)


# -- what is a failure -----------------------------------------------------------------------------


def test_a_refusal() -> None:
    bench = Trial()
    gone = bench.refuse(1)
    assert bench.ejected() == {gone}
    assert set(bench.picks(6)) == others(gone)
    bench.now += 3 * SECOND
    (status,) = [each for each in bench.dp.services()[0].destinations if each.ejected]
    assert (status.failures, status.last_failure) == (1, 3)
    assert bench.dp.stats().ejections == 1
    assert bench.dp.stats().retries == 0


@pytest.mark.parametrize("flags", ["R", "RA", "A", "SA"])
def test_what_does_not_fit_the_syn_says_nothing(flags: str) -> None:
    """Who does not know the sequence number cannot have a destination ejected."""
    bench = Trial()
    syn = bench.syn()
    bench.answer(syn, flags, isn=ISN - 1)
    bench.answer(syn, flags, isn=ISN + 0x10000)
    if flags in ("R", "A"):
        bench.answer(syn, flags)
    assert bench.ejected() == set()
    assert bench.answer(syn, "RA").reason == Reason.REPLY
    assert bench.ejected() == {syn.destination}


def test_three_refusals_in_a_row() -> None:
    bench = Trial(ONE, health=PassiveHealth(failures=3))
    for port in (1, 2):
        bench.refuse(port)
    bench.picks(1)
    for port in (3, 4):
        bench.refuse(port)
        assert bench.ejected() == set()
    bench.refuse(5)
    assert bench.ejected() == {ONE}
    assert bench.dp.services()[0].destinations[0].failures == 5


@pytest.mark.parametrize("code", [0, 1, 3, 10, 13])
def test_an_icmp_error(code: int) -> None:
    bench = Trial()
    syn = bench.syn()
    assert syn.packet is not None
    sent = bytes(syn.packet)
    for _ in range(2):
        error = wire.icmp_error(sent, "10.1.1.254", code=code)
        assert bench.dp.process(error).reason == Reason.RELATED
    assert bench.ejected() == {syn.destination}
    assert bench.dp.stats().ejections == 1
    # It counted for this SYN already; the next one goes elsewhere at once.
    bench.now += SECOND
    assert bench.syn().destination != syn.destination
    assert bench.dp.services()[0].destinations[0].failures <= 1


def test_icmp_errors_that_say_nothing() -> None:
    bench = Trial()
    syn = bench.syn()
    assert syn.packet is not None
    sent = bytes(syn.packet)
    other = bytearray(sent)
    other[24:28] = bytes(4)  # the sequence number
    for error in (
        wire.icmp_error(sent, "10.1.1.254", code=4),  # too big
        wire.icmp_error(sent, "10.1.1.254", kind=11, code=0),  # TTL
        wire.icmp_error(bytes(other), "10.1.1.254"),
        wire.icmp_error(sent[:24], "10.1.1.254"),  # no sequence number
    ):
        bench.dp.process(error)
    assert bench.ejected() == set()


def test_silence() -> None:
    """A client that gave up, seen when its connection is over."""
    bench = Trial()
    syn = bench.syn()
    bench.now += 61 * SECOND
    bench.dp.sweep()
    assert bench.ejected() == {syn.destination}


def test_silence_of_who_answered_others() -> None:
    """What is known late of a time when it was not there says nothing of it now."""
    bench = Trial(ONE, health=ONCE)
    for port in range(10):
        bench.syn(port + 1)
    bench.now += 30 * SECOND
    bench.picks(1)
    bench.now += 31 * SECOND
    bench.dp.sweep()
    assert bench.dp.stats().connections == 1
    assert bench.dp.services()[0].destinations[0].failures == 0
    # Nor is who asked before the end of an ejection a reason for the next.
    bench.now += 1000 * SECOND
    bench.syn(20)
    bench.refuse(21)
    bench.now += 61 * SECOND
    bench.dp.sweep()
    assert bench.dp.stats().ejections == 1


def unsound(name: str, port: int) -> bytearray:
    """A SYN that no server sees or answers."""
    payload = bytes(600) if name == "long" else b""
    flags = "SF" if name == "FIN" else "S"
    numbers = (ISN, 0)
    packet = wire.packet("tcp", CLIENT[4], port, VIRTUAL[4], 80, flags, payload, numbers=numbers)
    if name == "checksum":
        packet[36] ^= 1
    elif name == "hops":
        packet[8] = 3
    elif name == "options":
        packet = bytearray([0x46, *packet[1:20], 1, 1, 1, 0, *packet[20:]])
        packet[3] += 4
    elif name == "data offset":
        packet[32] = 0xF0
    packet[10:12] = bytes(2)
    header = 4 * (packet[0] & 15)
    packet[10:12] = wire.internet_checksum(bytes(packet[:header])).to_bytes(2, "big")
    return packet


@pytest.mark.parametrize("name", ["checksum", "hops", "long", "options", "data offset", "FIN"])
def test_silence_after_what_nobody_answers(name: str) -> None:
    """Or a stranger could have whoever it likes ejected."""
    bench = Trial()
    for _ in range(3):
        for port in range(1, 10):
            bench.dp.process(unsound(name, port))
        bench.now += SECOND
    bench.now += 100 * SECOND
    bench.dp.sweep()
    assert bench.dp.stats().connections == 0
    assert (bench.dp.stats().ejections, bench.dp.stats().retries) == (0, 0)


def test_an_unsound_syn_does_not_begin_anew() -> None:
    bench = Trial()
    first = bench.syn(isn=ISN - 5)
    bench.now += SECOND
    assert bench.dp.process(unsound("checksum", 40000)).destination == first.destination
    bench.answer(first, "RA", isn=ISN - 5)
    assert bench.ejected() == {first.destination}


def test_a_syn_that_the_host_left_a_checksum_to_do() -> None:
    """As the kernel hands over what this host sends."""
    bench = Trial()
    batch = svcdp.PacketBatch(1, 2048)
    batch.append(unsound("checksum", 7))
    packets_of(batch)[0].flags |= CSUM_PARTIAL
    bench.dp.process_batch(batch)
    bench.now += 61 * SECOND
    bench.dp.sweep()
    assert bench.dp.stats().ejections == 1


def test_the_end_of_an_answered_connection_is_none() -> None:
    bench = Trial()
    for port, flags in ((1, []), (2, ["A"]), (3, ["A", "F"]), (4, ["R"])):
        syn = bench.syn(port)
        bench.answer(syn, port=port)
        for each in flags:
            bench.send(each, port=port)
    bench.now += 10_000 * SECOND
    bench.dp.sweep()
    assert bench.dp.stats().connections == 0
    assert bench.ejected() == set()
    assert bench.dp.stats().ejections == 0


def test_a_refusal_in_an_established_connection_is_none() -> None:
    bench = Trial()
    syn = bench.syn()
    bench.answer(syn)
    bench.send("A")
    bench.answer(syn, "RA")
    assert bench.ejected() == set()


def test_the_end_of_a_connection_whose_client_was_dropped_is_none() -> None:
    """The table threw it out (drop_entry): nobody knows whether it would have been answered."""
    bench = Trial()
    bench.dp.configure(replace(bench.dp.settings, drop_entry=3))
    for port in range(200):
        bench.syn(1000 + port)
    for _ in range(100):
        bench.now += SECOND // 100
        bench.dp.configure(bench.dp.settings)
        bench.send("A", port=1)
    assert bench.dp.stats().connections < 150
    assert bench.dp.stats().ejections == 0


# -- SYNs sent again -------------------------------------------------------------------------------


def test_a_syn_that_is_sent_again_goes_elsewhere() -> None:
    bench = Trial(health=PassiveHealth())
    first = bench.syn()
    bench.now += SECOND
    second = bench.syn()
    assert second.reason == Reason.NEW
    assert second.destination in others(first.destination)
    assert bench.dp.stats().retries == 1
    assert bench.dp.stats().connections == 1
    # The late answer of the first is nobody's; the second's is the client's.
    assert bench.answer(first).reason == Reason.NO_SERVICE
    assert bench.answer(second).reason == Reason.REPLY
    assert bench.send("A").destination == second.destination
    counts = [each.active + each.inactive for each in bench.dp.services()[0].destinations]
    assert sum(counts) == 1


def test_a_flood_of_syns_is_no_retry() -> None:
    bench = Trial()
    first = bench.syn()
    for _ in range(20):
        bench.now += SECOND // 50
        assert bench.syn().destination == first.destination
    assert bench.ejected() == set()
    assert bench.dp.stats().retries == 0


def test_a_new_sequence_number_begins_anew() -> None:
    bench = Trial()
    first = bench.syn()
    bench.now += SECOND
    again = bench.syn(isn=9)
    assert (again.reason, again.destination) == (Reason.ESTABLISHED, first.destination)
    bench.answer(first, "RA", isn=ISN)
    assert bench.ejected() == set()
    bench.answer(first, "RA", isn=9)
    assert bench.ejected() == {first.destination}


def test_an_answered_syn_is_not_moved() -> None:
    """The answer was lost behind us."""
    bench = Trial()
    first = bench.syn()
    bench.answer(first)
    bench.now += SECOND
    again = bench.syn()
    assert (again.reason, again.destination) == (Reason.ESTABLISHED, first.destination)


def test_an_answer_to_data_too() -> None:
    """TCP Fast Open (RFC 7413): the SYN has data, and its answer acknowledges them."""
    bench = Trial()
    first = bench.syn()
    assert bench.answer(first, isn=ISN + 100).reason == Reason.REPLY
    bench.now += SECOND
    again = bench.syn()
    assert (again.reason, again.destination) == (Reason.ESTABLISHED, first.destination)


def test_a_retry_was_let_in_before() -> None:
    """What turns new connections away does not matter to it, and nobody else pays for it."""
    other = "192.0.2.77"
    bench = Trial(persistence=100, scheduler="fo", health=PassiveHealth())
    bound = bench.syn(1, client=other)
    bench.answer(bound, port=1, client=other)
    first = bench.syn()
    assert first.destination == bound.destination
    bench.dp.configure(replace(bench.dp.settings, drop_packet=3, am_droprate=1))
    bench.now += SECOND
    assert bench.syn(2).reason == Reason.OVERLOAD
    again = bench.syn()
    assert again.reason == Reason.NEW
    assert again.destination in others(*filter(None, [first.destination]))
    bench.dp.configure(svcdp.Settings())
    assert bench.syn(2, client=other).destination == bound.destination


def test_a_retry_in_a_full_table() -> None:
    """There is room: its own."""
    bench = Trial(ONE, TWO, health=PassiveHealth(), max_connections=1)
    first = bench.syn()
    assert bench.syn(2).reason == Reason.TABLE_FULL
    bench.now += SECOND
    again = bench.syn()
    assert again.reason == Reason.NEW
    assert {first.destination, again.destination} == {ONE, TWO}


def test_a_retry_that_a_scheduler_in_python_has_nobody_for() -> None:
    """It stays where it is."""

    class Once(Scheduler):
        def __init__(self) -> None:
            self.asked = 0

        def pick(self, flow: svcdp.Flow, destinations: Sequence[Destination]) -> int | None:
            self.asked += 1
            return 0 if self.asked == 1 else None

    svcdp.register_scheduler("test-once")(Once)
    bench = Trial(scheduler="test-once", health=PassiveHealth())
    first = bench.syn()
    for _ in range(2):
        bench.now += SECOND
        again = bench.syn()
        assert (again.verdict, again.destination) == (Verdict.FORWARD, first.destination)
    assert bench.dp.stats().retries == 0
    assert bench.answer(first).reason == Reason.REPLY
    assert bench.syn(2).reason == Reason.NO_DESTINATION


FULL_TWO = DestinationSpec(*TWO, 2, upper=1)
ONLY_ONE = (SourceRule(endpoints=(ONE,)),)
WITHOUT_ONE = (SourceRule(endpoints=(TWO, THREE)),)


@pytest.mark.parametrize(
    ("destinations", "fields"),
    [
        pytest.param([(*ONE, 0)], {}, id="no weight"),
        pytest.param([ONE, (*TWO, 0)], {}, id="others have no weight"),
        pytest.param([(*ONE, 0), (*TWO, 0)], {}, id="nobody has"),
        pytest.param([ONE], {}, id="others are removed"),
        pytest.param([], {}, id="all are removed"),
        pytest.param([ONE, FULL_TWO], {"scheduler": "fo"}, id="another is overloaded"),
        pytest.param(ALL, {"passive_health": None}, id="switched off"),
        pytest.param(ALL, {"scheduler": "none"}, id="the service serves nobody"),
        pytest.param(ALL, {"rules": ONLY_ONE}, id="for this client there are no others"),
        pytest.param(ALL, {"rules": (SourceRule(("203.0.113.0/24",)),)}, id="not admitted"),
        pytest.param(None, {}, id="the service is removed"),
    ],
)
def test_a_retry_stays_where_nobody_else_is(
    destinations: Sequence[Any] | None, fields: dict[str, Any]
) -> None:
    """As without passive health: so a late answer is the client's."""
    bench = Trial(ONE, health=PassiveHealth())
    first = bench.syn()
    if destinations is None:
        bench.dp.apply([])
    else:
        bench.serve(*destinations, **{**bench.fields, **fields})
    bench.syn(2)
    for _ in range(3):
        bench.now += SECOND
        again = bench.syn()
        assert (again.reason, again.destination) == (Reason.ESTABLISHED, ONE)
    assert bench.dp.stats().retries == 0
    assert bench.answer(first).reason == Reason.REPLY


def test_who_is_alone_fails_each_client_once() -> None:
    bench = Trial(ONE, health=PassiveHealth(failures=2))
    for port, failures, ejected in ((1, 1, set()), (2, 2, {ONE})):
        for _ in range(3):
            assert bench.syn(port).destination == ONE
            bench.now += SECOND
        (status,) = bench.dp.services()[0].destinations
        assert (status.failures, bench.ejected()) == (failures, ejected)
    assert bench.syn(3).destination == ONE  # better than nobody
    assert bench.dp.stats().retries == 0


@pytest.mark.parametrize(
    ("destinations", "fields"),
    [
        pytest.param([(*ONE, 0), TWO], {}, id="no weight"),
        pytest.param([TWO], {}, id="removed"),
        pytest.param([(*ONE, 0), (*TWO, 0), THREE], {}, id="one of two"),
        pytest.param(ALL, {"rules": WITHOUT_ONE}, id="others serve this client"),
    ],
)
def test_a_retry_moves_to_who_is_there_now(
    destinations: Sequence[Any], fields: dict[str, Any]
) -> None:
    bench = Trial(ONE, health=PassiveHealth())
    bench.syn()
    bench.serve(*destinations, **{**bench.fields, **fields})
    bench.now += SECOND
    again = bench.syn()
    assert again.reason == Reason.NEW
    assert again.destination in others(ONE)
    assert bench.dp.stats().retries == 1


def test_a_retry_where_all_others_are_ejected() -> None:
    """Nobody is better off there, until this one is ejected too: then all are asked again."""
    bench = Trial((*ONE, 3), (*TWO, 2), scheduler="fo", health=PassiveHealth(failures=2))
    bench.serve((*ONE, 0), TWO, **bench.fields)
    for port in (1, 2):
        assert bench.refuse(port) == TWO
    bench.serve((*ONE, 3), TWO, **bench.fields)
    assert bench.syn().destination == ONE
    bench.now += SECOND
    assert (bench.syn().reason, bench.ejected()) == (Reason.ESTABLISHED, {TWO})
    assert bench.refuse(3) == ONE
    assert bench.ejected() == {ONE, TWO}
    bench.syn(isn=9)
    bench.now += SECOND
    again = bench.syn(isn=9)
    assert (again.reason, again.destination) == (Reason.NEW, TWO)
    assert bench.ejected() == set()
    assert bench.dp.stats().retries == 1


def test_a_late_answer_to_a_masqueraded_client() -> None:
    rules = (SourceRule(masquerade=True),)
    bench = Trial(ONE, rules=rules, masquerade_address="198.51.100.1")
    first = bench.syn()
    assert first.packet is not None
    sent = wire.read(bytes(first.packet))
    for _ in range(3):
        bench.now += SECOND
        again = bench.syn()
        assert again.packet is not None
        assert wire.read(bytes(again.packet)).source_port == sent.source_port
    answer = bench.answer(first, port=sent.source_port, client=sent.source)
    assert (answer.reason, answer.next_hop) == (Reason.REPLY, CLIENT[4])


@pytest.mark.parametrize(
    "scheduler",
    [
        "rr",
        "wrr",
        "random",
        "lc",
        "wlc",
        "sed",
        "nq",
        "fo",
        "ovf",
        "dh",
        "sh",
        "mh",
        "lblc",
        "lblcr",
        "twos",
    ],
)
def test_every_scheduler_passes_over_and_moves_on(scheduler: str) -> None:
    bench = Trial(*((*each, 1000) for each in ALL), scheduler=scheduler)
    first = bench.syn()
    bench.now += SECOND
    second = bench.syn()
    assert second.destination in others(first.destination)
    assert bench.ejected() == {first.destination}
    assert set(bench.picks(20)) <= others(first.destination)
    bench.now += SECOND
    third = bench.syn()
    assert {third.destination} == others(first.destination, second.destination)
    assert set(bench.picks(20, 51000)) == {third.destination}


def test_a_scheduler_in_python_sees_who_answers() -> None:
    seen = []

    class First(Scheduler):
        def pick(self, flow: svcdp.Flow, destinations: Sequence[Destination]) -> int:
            seen.append({(each.address, each.port) for each in destinations})
            return 0

    svcdp.register_scheduler("test-passive")(First)
    bench = Trial(scheduler="test-passive")
    gone = bench.refuse(1)
    bench.syn(2)
    assert seen == [set(ALL), others(gone)]


# -- ejections -------------------------------------------------------------------------------------


def test_an_ejection_ends_and_the_next_is_longer() -> None:
    bench = Trial((*ONE, 2), TWO, scheduler="fo")
    for seconds in (10, 20, 40, 40):
        assert bench.refuse(1) == ONE
        assert bench.picks(2) == [TWO, TWO]
        bench.now += (seconds - 1) * SECOND
        bench.send("A", port=9)
        assert bench.ejected() == {ONE}
        bench.now += 2 * SECOND
        bench.send("A", port=9)
        assert bench.ejected() == set()


def test_nobody_has_to_send_for_an_ejection_to_end() -> None:
    bench = Trial()
    gone = bench.refuse(1)
    flow = f"tcp {CLIENT[4]}:9 -> {VIRTUAL[4]}:80"
    for seconds, ejected in ((9, {gone}), (2, set())):
        bench.now += seconds * SECOND
        assert bench.ejected() == ejected
        possible = {(each.address, each.port) for each in bench.dp.explain(flow).destinations}
        assert possible == others(*ejected)
    assert set(bench.picks(6)) == set(ALL)


def test_an_answer_ends_it() -> None:
    bench = Trial((*ONE, 2), TWO, scheduler="fo")
    for port in (1, 2):
        early = bench.syn(port)
        assert bench.refuse(port + 10) == ONE
        assert bench.ejected() == {ONE}
        bench.answer(early, port=port)
        assert bench.ejected() == set()
    # Which makes the next a first one again.
    assert bench.refuse(20) == ONE
    bench.now += 11 * SECOND
    bench.send("A", port=9)
    assert bench.ejected() == set()


def test_all_are_asked_again_if_none_is_left() -> None:
    bench = Trial()
    gone = {bench.refuse(port) for port in (1, 2, 3)}
    assert gone == set(ALL)
    assert bench.dp.explain(f"tcp {CLIENT[4]}:1 -> {VIRTUAL[4]}:80").action == "forward"
    assert bench.syn(4).verdict == Verdict.FORWARD
    assert bench.ejected() == set()


def test_all_are_asked_again_by_weight() -> None:
    bench = Trial((*ONE, 1), (*TWO, 0), (*THREE, 10_000), scheduler="random")
    for _ in range(8):
        bench.now += 1000 * SECOND
        bench.picks(1)
        while len(bench.ejected()) < 2:
            bench.refuse(1)
        assert bench.syn(2).destination == THREE


def test_a_service_that_serves_nobody_asks_nobody_again() -> None:
    bench = Trial()
    for port in (1, 2, 3):
        bench.refuse(port)
    bench.serve(*ALL, **bench.fields, scheduler="none")
    assert bench.ejected() == set(ALL)
    assert bench.dp.explain(f"tcp {CLIENT[4]}:1 -> {VIRTUAL[4]}:80").action == "reject"
    assert bench.syn(4).reason == Reason.NO_DESTINATION
    assert bench.ejected() == set(ALL)


def test_who_has_no_weight_is_not_asked() -> None:
    bench = Trial(ONE, (*TWO, 0))
    bench.refuse(1)
    assert bench.ejected() == {ONE}
    assert bench.syn(2).destination == ONE


def test_an_affinity_to_an_ejected_one_does_not_count() -> None:
    bench = Trial(persistence=100)
    first = bench.syn(1)
    bench.answer(first, port=1)
    assert bench.syn(2).destination == first.destination
    bench.answer(first, "RA", port=2)
    second = bench.syn(3)
    assert second.destination in others(first.destination)
    assert bench.syn(4).destination == second.destination


def test_a_retry_leaves_an_affinity() -> None:
    bench = Trial(persistence=100, health=PassiveHealth())
    first = bench.syn()
    bench.now += SECOND
    second = bench.syn()
    assert second.destination != first.destination
    assert bench.syn(2).destination == second.destination


def test_removed_and_switched_off() -> None:
    bench = Trial()
    bench.serve(*ALL)
    bench.refuse(1)
    bench.now += SECOND
    syn = bench.syn(2)
    bench.now += SECOND
    assert bench.syn(2).destination == syn.destination, "off"
    bench.serve(*ALL, **bench.fields)
    gone = bench.refuse(3)
    assert bench.ejected() == {gone}
    bench.serve(*ALL)
    assert bench.ejected() == set()
    bench.serve(*ALL, **bench.fields)
    gone = bench.refuse(4)
    bench.serve(*(each for each in ALL if each != gone), **bench.fields)
    bench.serve(*ALL, **bench.fields)
    assert bench.ejected() == set()


def test_many_are_ejected() -> None:
    """1,024 at a time, whatever their Services."""
    bench = Trial(*((f"10.2.{number // 250}.{number % 250 + 1}", 80) for number in range(1100)))
    for port in range(1, 1101):
        bench.refuse(port)
    assert len(bench.ejected()) == 1024
    assert set(bench.picks(100)).isdisjoint(bench.ejected())
    bench.now += 11 * SECOND
    bench.send("A", port=1)
    assert bench.ejected() == set()


def test_masqueraded_connections() -> None:
    rules = (SourceRule(masquerade=True),)
    bench = Trial(rules=rules, masquerade_address="198.51.100.1")
    syn = bench.syn()
    assert syn.packet is not None
    sent = wire.read(bytes(syn.packet))
    bench.now += SECOND
    assert bench.syn().destination != syn.destination
    assert bench.dp.stats().retries == 1
    assert sent.source == "198.51.100.1"


def test_other_methods_are_not_judged() -> None:
    """Their answers do not come this way."""
    bench = Trial(
        *(DestinationSpec(address, 80, method="dr") for address in ("10.1.1.1", "10.1.1.2"))
    )
    first = bench.syn()
    for _ in range(3):
        bench.now += SECOND
        assert bench.syn().destination == first.destination
    bench.now += 100 * SECOND
    bench.dp.sweep()
    assert bench.dp.stats().ejections == 0


def test_explain() -> None:
    bench = Trial()
    flow = f"tcp {CLIENT[4]}:1 -> {VIRTUAL[4]}:80"
    gone = bench.refuse(1)
    found = bench.dp.explain(flow)
    assert {(each.address, each.port) for each in found.destinations} == others(gone)
    assert "1 that did not answer are passed over" in found.reasons
    for port in (2, 3):
        bench.refuse(port)
    found = bench.dp.explain(flow)
    assert {(each.address, each.port) for each in found.destinations} == set(ALL)
    assert "none of them answered lately: all are asked again" in found.reasons
    assert bench.ejected() == set(ALL), "nothing changes"


@pytest.mark.parametrize("scheduler", ["fo", "lc", "sh", "lblc"])
def test_explain_picks_who_is_asked_again(scheduler: str) -> None:
    """An ejection ends by the clock: no packet has to come first."""
    bench = Trial((*ONE, 2), scheduler=scheduler)
    assert bench.refuse(1) == ONE
    bench.serve((*ONE, 2), TWO, **bench.fields)
    bench.now += 11 * SECOND
    found = bench.dp.explain(f"tcp {CLIENT[4]}:9 -> {VIRTUAL[4]}:80")
    assert {(each.address, each.port) for each in found.destinations} == {ONE, TWO}
    assert found.picked is not None
    assert (found.picked.address, found.picked.port) == bench.syn(9).destination
    assert bench.ejected() == set()


@pytest.mark.parametrize(
    "fields",
    [
        {"passive_health": PassiveHealth(failures=0)},
        {"passive_health": PassiveHealth(ejection=0)},
        {"passive_health": PassiveHealth(ejection=20, max_ejection=10)},
        {"passive_health": PassiveHealth(ejection=float("nan"))},
        {"passive_health": True},
        {"passive_health": PassiveHealth(), "helper": "ftp"},
        {"passive_health": PassiveHealth(), "protocol": "udp"},
    ],
)
def test_wrong_settings(fields: dict[str, Any]) -> None:
    with pytest.raises(svcdp.ConfigError, match="passive_health"):
        Bench().serve(ONE, **fields)
