"""Who gets the next connection: round robins, random choice, schedulers written in Python."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import wire
from bench import VIRTUAL, Bench

import svcdp
from svcdp.abc import Scheduler
from svcdp.schedulers import BUILTIN, FLAGS, PYTHON
from svcdp.types import Destination, Flow

ROOT = Path(__file__).parents[3]


class Side:
    """The dataplane beside a model."""

    def __init__(self, scheduler: str) -> None:
        self.bench = Bench()
        self.bench.serve(scheduler=scheduler)
        self.port = 1000

    def pick(self) -> int | None:
        self.port += 1
        result = self.bench.send(port=self.port)
        return None if result.destination is None else result.destination[1]

    def picks(self, count: int) -> list[int | None]:
        return [self.pick() for _ in range(count)]


def test_weights_added_one_by_one_begin_with_a_round_of_all() -> None:
    """Seen on the kernel: cw is still 1 after weights 1, 3, 5, 2, 4 were added."""
    side = Side("wrr")
    for name, weight in enumerate((1, 3, 5, 2, 4), 1):
        with side.bench.dp.transaction() as tx:
            tx.service(VIRTUAL[4], 80).add("10.1.0.1", name, weight)
    assert side.picks(5) == [5, 4, 3, 2, 1]
    assert Counter(side.picks(15)) == {1: 1, 2: 3, 3: 5, 4: 2, 5: 4}


def test_the_scheduler_can_change() -> None:
    side = Side("rr")
    with side.bench.dp.transaction() as tx:
        service = tx.service(VIRTUAL[4], 80)
        for name, weight in enumerate((1, 3), 1):
            service.add("10.1.0.1", name, weight)
    assert side.picks(3) == [2, 1, 2]
    with side.bench.dp.transaction() as tx:
        tx.service(VIRTUAL[4], 80, scheduler="wrr")
    assert side.picks(4) == [2, 2, 2, 1]
    with side.bench.dp.transaction() as tx:
        tx.service(VIRTUAL[4], 80, scheduler="rr")
    assert side.picks(3) == [2, 1, 2]


def test_an_edit_elsewhere_does_not_disturb_a_round() -> None:
    side = Side("rr")
    with side.bench.dp.transaction() as tx:
        for name in (1, 2, 3):
            tx.service(VIRTUAL[4], 80).add("10.1.0.1", name)
    assert side.picks(1) == [3]
    side.bench.serve(("10.1.0.9", 9), address="10.96.0.11")
    with side.bench.dp.transaction() as tx:
        tx.service(VIRTUAL[4], 80, name="renamed")
    assert side.picks(3) == [2, 1, 3]


@pytest.mark.parametrize("seed", range(5))
def test_random_follows_the_weights(seed: int) -> None:
    """Chi-square with three degrees of freedom: above 16.3 once in a thousand."""
    bench = Bench(8192, seed)
    weights = {1: 1, 2: 0, 3: 2, 4: 5, 5: 0, 6: 8, 7: 0}
    bench.serve(*(("10.1.0.1", n, w) for n, w in weights.items()), scheduler="random")
    total = 4000
    picks = Counter(bench.send(port=port).destination[1] for port in range(1, total + 1))
    expected = {n: total * w / sum(weights.values()) for n, w in weights.items() if w}
    assert set(picks) == set(expected)
    assert sum((picks[n] - e) ** 2 / e for n, e in expected.items()) < 16.3


def test_random_is_repeatable_and_differs_by_seed() -> None:
    def picks(seed: int) -> list[tuple[str, int]]:
        bench = Bench(seed=seed)
        bench.serve(*(("10.1.0.1", n) for n in range(1, 50)), scheduler="random")
        return [bench.send(port=port).destination for port in range(1, 40)]

    assert picks(1) == picks(1)
    assert picks(1) != picks(2)


@pytest.mark.parametrize("scheduler", BUILTIN)
@pytest.mark.parametrize("weights", [[], [0], [0, 0, 0]])
def test_nobody_to_pick(scheduler: str, weights: list[int]) -> None:
    bench = Bench()
    bench.serve(*(("10.1.0.1", n, w) for n, w in enumerate(weights, 1)), scheduler=scheduler)
    assert bench.send().reason.name == "NO_DESTINATION"


def test_great_weights() -> None:
    side = Side("wrr")
    with side.bench.dp.transaction() as tx:
        service = tx.service(VIRTUAL[4], 80)
        service.add("10.1.0.1", 1, 2**31 - 1)
        service.add("10.1.0.1", 2, 1)
        service.add("10.1.0.1", 3, 2**31 - 1)
    # The level was 1 when the first came alone: its step is its own weight.
    assert side.picks(7) == [3, 2, 1, 3, 1, 3, 1]
    with (
        pytest.raises(svcdp.CapacityError),
        side.bench.dp.transaction() as tx,
    ):
        tx.service(VIRTUAL[4], 80).add("10.1.0.1", 4, 2**31 - 1)
    assert side.picks(2) == [3, 1]


def constants(file: str) -> dict[str, int]:
    """The enumeration constants of a file of the core."""
    text = (ROOT / "pyx/svcdp/_core" / file).read_text()
    return {name: int(value) for name, value in re.findall(r"^    ([A-Z_]+) = (\d+)$", text, re.M)}


def test_the_core_has_the_same_numbers() -> None:
    prefix = "SCHEDULER_"
    numbers = {
        name.removeprefix(prefix).lower(): number
        for name, number in constants("sched.pxd").items()
        if name.startswith(prefix)
    }
    assert numbers == {**BUILTIN, "python": PYTHON}
    bits = constants("service.pxd")
    for name, flags in FLAGS.items():
        assert flags == {
            f"{name}-fallback": bits["SCHEDULER_FALLBACK"],
            f"{name}-port": bits["SCHEDULER_PORT"],
        }


# -- schedulers written in Python ------------------------------------------------------------------


class Recorder(Scheduler):
    """Notes what it is asked and answers as `answers` say, then with the last one."""

    asked: list[tuple[Flow, list[tuple[str, int, int, int, int]]]]
    answers: list[object]

    def pick(self, flow: Flow, destinations: Sequence[Destination]) -> int | None:
        type(self).asked.append(
            (flow, [(d.address, d.port, d.weight, d.active, d.inactive) for d in destinations])
        )
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer() if callable(answer) else answer  # type: ignore[return-value]


@pytest.fixture
def recorder() -> type[Recorder]:
    class Fresh(Recorder):
        asked = []  # noqa: RUF012
        answers = [0]  # noqa: RUF012

    svcdp.register_scheduler("test-recorder")(Fresh)
    return Fresh


def test_python_is_asked_once_a_connection(recorder: type[Recorder]) -> None:
    bench = Bench()
    bench.serve(("10.1.0.1", 1, 3), ("10.1.0.2", 2, 0), ("10.1.0.3", 3), scheduler="test-recorder")
    assert bench.send().destination == ("10.1.0.3", 3)
    bench.send("A")
    bench.reply(source=("10.1.0.3", 3))
    recorder.answers[:] = [1]
    assert bench.send(port=40001).destination == ("10.1.0.1", 1)
    first = Flow("tcp", "192.0.2.4", 40000, "10.96.0.10", 80)
    assert recorder.asked == [
        (first, [("10.1.0.3", 3, 1, 0, 0), ("10.1.0.1", 1, 3, 0, 0)]),
        (
            Flow("tcp", "192.0.2.4", 40001, "10.96.0.10", 80),
            [("10.1.0.3", 3, 1, 1, 0), ("10.1.0.1", 1, 3, 0, 0)],
        ),
    ]
    assert bench.dp.stats().scheduler_errors == 0


@pytest.mark.parametrize(
    "answer",
    [ValueError("x"), 2, -1, 1 << 70, "0", 0.5, pytest.param(object(), id="o"), RecursionError()],
    ids=repr,
)
@pytest.mark.parametrize("batch", [False, True])
def test_round_robin_serves_when_python_fails(
    recorder: type[Recorder], answer: object, batch: bool
) -> None:
    recorder.answers[:] = [answer]
    bench = Bench()
    bench.serve(("10.1.0.1", 1), ("10.1.0.2", 2), scheduler="test-recorder")
    if batch:
        packets = [wire.packet("tcp", "192.0.2.4", p, VIRTUAL[4], 80) for p in range(1, 13)]
        bench.dp.process_batch(packets)
        assert Counter(wire.read(p).destination_port for p in packets) == {1: 6, 2: 6}
    else:
        assert [bench.send(port=p).destination[1] for p in range(1, 13)] == [2, 1] * 6
    assert bench.dp.stats().scheduler_errors == 12


def test_none_is_nobody(recorder: type[Recorder]) -> None:
    recorder.answers[:] = [None]
    bench = Bench()
    bench.serve(("10.1.0.1", 1), scheduler="test-recorder")
    assert bench.send().reason.name == "NO_DESTINATION"
    assert bench.dp.stats().scheduler_errors == 0


def test_python_is_not_asked_about_nobody(recorder: type[Recorder]) -> None:
    bench = Bench()
    bench.serve(("10.1.0.1", 1, 0), scheduler="test-recorder")
    assert bench.send().reason.name == "NO_DESTINATION"
    assert not recorder.asked


def test_a_scheduler_may_use_the_dataplane(recorder: type[Recorder]) -> None:
    """It may send packets, change the service that it picks for, and even remove it."""
    bench = Bench()
    dp = bench.dp

    def send() -> int:
        assert bench.send(port=1).reason.name == "NEW"
        return 0

    def same() -> int:
        assert bench.send().reason.name == "NEW"
        return 0

    def change() -> int:
        with dp.transaction() as tx:
            tx.service(VIRTUAL[4], 80).remove("10.1.0.1", 1)
        return 0

    def remove() -> int:
        with dp.transaction() as tx:
            tx.remove_service(VIRTUAL[4], 80)
        return 0

    def look() -> int:
        dp.explain("tcp 192.0.2.4:5 -> 10.96.0.10:80")
        assert dp.services()
        assert dp.captures()
        dp.sweep()
        return 0

    for answer in (send, same, change, remove, look):
        dp.apply([])
        bench.now += 1000 * 10**9
        dp.sweep()
        bench.serve(("10.1.0.1", 1), scheduler="test-recorder")
        recorder.answers[:] = [answer, 0]
        errors = dp.stats().scheduler_errors
        result = bench.send()
        assert result.destination == ("10.1.0.1", 1), answer
        assert result.reason.name == ("ESTABLISHED" if answer is same else "NEW")
        assert dp.stats().scheduler_errors == errors


def test_each_service_has_its_own_instance(recorder: type[Recorder]) -> None:
    made = []
    recorder.__init__ = lambda self: made.append(self)  # type: ignore[method-assign]
    bench = Bench()
    bench.serve(("10.1.0.1", 1), scheduler="test-recorder")
    bench.serve(("10.1.0.1", 1), scheduler="test-recorder", port=81)
    assert len(made) == 2
    bench.serve(("10.1.0.1", 1), ("10.1.0.2", 1), scheduler="test-recorder")
    assert len(made) == 2, "an edit must not make the scheduler forget"


def test_unknown_and_taken_names() -> None:
    bench = Bench()
    with pytest.raises(svcdp.ConfigError, match="no-such"):
        bench.serve(("10.1.0.1", 1), scheduler="no-such")
    assert not bench.dp.services()
    with pytest.raises(svcdp.ConfigError, match="rr"):
        svcdp.register_scheduler("rr")
    with pytest.raises(svcdp.ConfigError, match="Scheduler"):
        svcdp.register_scheduler("test-wrong")(object)  # type: ignore[type-var]


@pytest.mark.parametrize(
    "scheduler", ["rr", "wrr", "wlc", "sed", "nq", "lc", "fo", "ovf", "mh", "sh"]
)
@pytest.mark.parametrize("weights", [(1, 1, 1), (5, 0, 3, 2), (2, 6, 4), (4, 6), (0, 0), (7,), ()])
def test_destinations_that_come_at_once_or_one_by_one(
    scheduler: str, weights: tuple[int, ...]
) -> None:
    servers = [(f"10.1.0.{i}", 8080, weight) for i, weight in enumerate(weights, 1)]
    at_once, one_by_one = Bench(), Bench()
    at_once.serve(*servers, scheduler=scheduler)
    for count in range(len(servers) + 1):
        one_by_one.serve(*servers[:count], scheduler=scheduler)
    for port in range(1, 40):
        assert at_once.send(port=port).destination == one_by_one.send(port=port).destination
