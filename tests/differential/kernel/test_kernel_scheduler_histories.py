"""Schedulers over histories drawn at random: weights with and without a common divisor, thresholds
that shut everybody out, servers that go and return; IPv4 with many virtual addresses.
"""

from __future__ import annotations

import itertools
import random

import pytest
import wire
from scenario import Packet, Scenario
from topology import SERVERS, VIRTUAL, server

HASHES = {"sh": "-b sh-port,sh-fallback", "mh": "-b mh-port,mh-fallback"}
#: Those of IPv4 first and every other one: it has more virtual addresses here.
SCHEDULERS = (
    *("lblc", "rr", "lblcr", "lc", "dh", "wlc", "wrr", "sed", "sh", "mh", "ovf", "fo", "nq"),
)
SERVICES = {4: "-f 1", 6: f"-t [{VIRTUAL[6]}]:80"}
#: Marked ones. The kernel's errors about those of IPv6 that no interface has come from elsewhere.
VIRTUALS = {4: [f"10.97.{n}.{n + 1}" for n in range(4)], 6: [VIRTUAL[6]]}
CLIENTS = {4: "{}.{}.{}.7", 6: "2001:db8:{}:{}::{}"}
STEPS = 12


class History:
    """Commands that are possible, and packets, as they come to its mind.

    Thresholds are only taken away: of a server with more connections than its new threshold the
    kernels of the Debian packages think otherwise than those from 6.1.187 on, and svcdp.
    """

    def __init__(self, scheduler: str, version: int, seed: int) -> None:
        self.rng = random.Random(f"{scheduler} {version} {seed}")
        self.version = version
        self.service = SERVICES[version]
        self.steps = Scenario(f"{scheduler} IPv{version} {seed}")
        self.servers = [*SERVERS]
        self.upper = {number: self.rng.choice((0, 2, 3, 5)) for number in SERVERS}
        self.open: list[tuple[str, int, str]] = []
        self.port = 1024
        self.steps.marks().ipvs(
            f"-A {self.service} -s {scheduler} {HASHES.get(scheduler, '')}",
            *(self.command("-a", number, self.weight()) for number in SERVERS),
        )
        for _ in range(2):
            for _ in range(STEPS):
                self.rng.choice((self.send, self.send, self.change))()
            # Connections that clients gave up are forgotten.
            self.steps.wait(11)
        self.send()
        self.steps.services()

    def command(self, verb: str, number: int, weight: int) -> str:
        upper = self.upper[number]
        return f"{verb} {self.one(number)} -m -w {weight} -x {upper} -y {int(upper == 3)}"

    def one(self, number: int) -> str:
        address = server(number, self.version)
        return f"{self.service} -r " + (address if self.version == 4 else f"[{address}]:80")

    def weight(self) -> int:
        return self.rng.choice((0, 1, 2, 3, 4, 6, 9, 20, 100, 65535))

    def change(self) -> None:
        """Edit one or all, remove one, or have one return."""
        gone = [number for number in SERVERS if number not in self.servers]
        what = self.rng.random()
        if gone and what < 0.4:
            number = self.rng.choice(gone)
            self.servers.append(number)
            self.upper[number] = 0
            self.steps.ipvs(self.command("-a", number, self.weight()))
        elif what < 0.5:
            number = self.servers.pop(self.rng.randrange(len(self.servers)))
            self.steps.ipvs(f"-d {self.one(number)}")
        elif what < 0.7:
            weights = {number: self.rng.choice((2, 4, 6)) for number in self.servers}
            self.steps.ipvs(*(self.command("-e", *item) for item in weights.items()))
        else:
            number = self.rng.choice(self.servers)
            if self.rng.random() < 0.3:
                self.upper[number] = 0
            self.steps.ipvs(self.command("-e", number, self.weight()))

    def send(self) -> None:
        packets: list[Packet] = []
        for _ in range(self.rng.randrange(1, 12)):
            packets += self.packets()
        self.steps.send(*packets)

    def packets(self) -> list[Packet]:
        """A client opens a connection or gives one up."""
        if self.open and self.rng.random() < 0.3:
            client, port, virtual = self.open.pop(self.rng.randrange(len(self.open)))
            return [wire.packet("tcp", client, port, virtual, 80, "R")]
        # Ports are not used again: two virtual addresses may share a server.
        self.port += 1
        octets = (self.rng.choice((11, 100, 203)), self.rng.randrange(256), self.rng.randrange(256))
        client = CLIENTS[self.version].format(*octets)
        virtual = self.rng.choice(VIRTUALS[self.version])
        self.open.append((client, self.port, virtual))
        return [wire.packet("tcp", client, self.port, virtual, 80, flags) for flags in ("S", "A")]


SCENARIOS = [
    History(scheduler, version, 0).steps
    for scheduler, version in zip(SCHEDULERS, itertools.cycle((4, 6)), strict=False)
]


@pytest.mark.usefixtures("agree")
def test_a_history(scenario: Scenario) -> None:
    """Nothing more: `agree` compares."""
