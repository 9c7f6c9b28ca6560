"""Every scheduler that the kernel has picks the same servers, in the same order."""

from __future__ import annotations

import random

import pytest
import wire
from scenario import Packet, Scenario
from topology import VIRTUAL, server

TCP4 = f"-t {VIRTUAL[4]}:80"
WEIGHTS = {1: 1, 2: 3, 3: 5, 4: 2, 5: 4}
#: With the flags that change what is picked.
SCHEDULERS = {
    "rr": "",
    "wrr": "",
    "lc": "",
    "wlc": "",
    "sed": "",
    "nq": "",
    "fo": "",
    "ovf": "",
    "sh": "",
    "sh-port": "-b sh-port",
    "sh-fallback": "-b sh-fallback",
    "sh-both": "-b sh-port,sh-fallback",
    "mh": "",
    "mh-port": "-b mh-port",
    "mh-fallback": "-b mh-fallback",
    "mh-both": "-b mh-port,mh-fallback",
    "dh": "",
    "lblc": "",
    "lblcr": "",
}


def client(rng: random.Random) -> tuple[str, int]:
    """Whoever comes next. Clients of many networks: they are what source hashing hashes."""
    octets = (rng.choice((11, 100, 203)), rng.randrange(256), rng.randrange(256), 7)
    return ".".join(map(str, octets)), rng.randrange(1024, 65536)


class Clients:
    """Opens connections, and ends some: the least loaded is another one each time."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._open: list[tuple[str, int]] = []

    def packets(self, count: int) -> list[Packet]:
        packets = []
        for _ in range(count):
            if self._open and self._rng.random() < 0.3:
                who = self._open.pop(self._rng.randrange(len(self._open)))
                packets.append(wire.packet("tcp", *who, VIRTUAL[4], 80, "A"))
                packets.append(wire.packet("tcp", *who, VIRTUAL[4], 80, "RA"))
            else:
                who = client(self._rng)
                self._open.append(who)
                packets.append(wire.packet("tcp", *who, VIRTUAL[4], 80, "S"))
        return packets


def one(number: int, weight: int | None = None, more: str = "") -> str:
    shown = WEIGHTS[number] if weight is None else weight
    return f"{TCP4} -r {server(number)}:8080 -m -w {shown} {more}"


def changing(name: str, options: str) -> Scenario:
    """Weights, quiescing, removal, return and thresholds, with connections that come and go."""
    clients = Clients(seed=1)
    steps = Scenario(name)
    steps.ipvs(f"-A {TCP4} -s {name.partition('-')[0]} {options}")
    steps.ipvs(*(f"-a {one(number, more='-x 8 -y 4' * (number == 4))}" for number in WEIGHTS))
    steps.send(*clients.packets(40)).services()
    steps.ipvs(f"-e {one(2, 7)}").send(*clients.packets(30)).services()
    steps.ipvs(f"-e {one(3, 0)}").send(*clients.packets(30)).services()
    steps.ipvs(f"-d {TCP4} -r {server(1)}:8080").send(*clients.packets(20)).services()
    steps.ipvs(f"-e {one(3)}", f"-a {one(1, 6)}").send(*clients.packets(30)).services()
    steps.ipvs(f"-e {one(4, 9, '-x 20')}").send(*clients.packets(40)).services()
    steps.ipvs(f"-e {one(4, 9)}").send(*clients.packets(20)).services()
    return steps


SCENARIOS = [changing(name, options) for name, options in SCHEDULERS.items()]


@pytest.mark.usefixtures("agree")
def test_a_scheduler(scenario: Scenario) -> None:
    """Nothing more: `agree` compares."""
