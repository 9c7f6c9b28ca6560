"""A director moves: ipvsadm's lines and the same packets, and both list the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import wire
from replay import Replay
from scenario import Scenario
from topology import CLIENT, MARKED, VIRTUAL, director, server, side_of
from uml import UserModeLinux

from svcdp.ipvs.listing import ListedService, connections, services
from svcdp.ipvs.names import NumericNames
from svcdp.ipvs.restore import parse
from svcdp.types import DestinationSpec, ServiceSpec

SERVERS = [server(number) for number in (1, 2, 3)]
V4, V6 = VIRTUAL[4], VIRTUAL[6]
LINES = f"""\
-A -t {V4}:80 -s wrr
-a -t {V4}:80 -r {SERVERS[1]}:8080 -m -w 2
-a -t {V4}:80 -r {SERVERS[2]}:8080 -m -w 3 -x 100 -y 50
-a -t {V4}:80 -r {SERVERS[0]}:8080 -m
-A -t {V4}:443 -s rr -p 600 -M 255.255.255.0
-a -t {V4}:443 -r {SERVERS[0]} -i
-a -t {V4}:443 -r {SERVERS[1]} -i --tun-type gre --tun-csum
-a -t {V4}:443 -r {SERVERS[2]} -g -w 0
-A -u {V4}:53 -s sh -b sh-port,sh-fallback
-a -u {V4}:53 -r {SERVERS[0]}:5353 -m
-a -u {V4}:53 -r {SERVERS[1]}:5353 -m
-A -t [{V6}]:80 -s lc
-a -t [{V6}]:80 -r [{server(1, 6)}]:8080 -m
-a -t [{V6}]:80 -r [{server(2, 6)}]:8080 -m
-A -f 1 -s rr -p 60
-a -f 1 -r {SERVERS[1]} -m
""".splitlines()


def packets() -> Iterable[bytearray]:
    for port in range(4000, 4010):
        yield wire.packet("tcp", CLIENT[4], port, V4, 80)
        yield wire.packet("udp", CLIENT[4], port, V4, 53)
        yield wire.packet("tcp", CLIENT[6], port, V6, 80)
    for port in range(5000, 5003):
        yield wire.packet("tcp", CLIENT[4], port, V4, 443)
        yield wire.packet("tcp", CLIENT[4], port, V4, 443, "A")
        yield wire.packet("tcp", CLIENT[4], port, MARKED[4], 999)


CHANGES = [
    f"-e -t {V4}:80 -r {SERVERS[1]}:8080 -m -w 0",
    f"-d -t {V4}:80 -r {SERVERS[0]}:8080",
    f"-a -t {V4}:80 -r {SERVERS[0]}:8080 -m -w 7",
    f"-E -u {V4}:53 -s mh",
]
SCENARIO = Scenario("a director moves").marks().ipvs(*LINES).send(*packets())
SCENARIO.wait(2.1)  # until the kernel has copied its counters
VIEWS = {
    "list": ("-n",),
    "stats": ("-n", "--stats"),
    "stats-exact": ("-n", "--stats", "--exact"),
    "thresholds": ("-n", "--thresholds"),
    "tun-info": ("-n", "--tun-info"),
    "nosort": ("-n", "--nosort"),
    "connections": ("-n", "-c"),
}
for options in VIEWS.values():
    SCENARIO._step("list", *options)
SCENARIO.ipvs(*CHANGES)._step("list", "-n", "--nosort")
LISTED = [*VIEWS, "changed"]


class Director(Replay):
    """Its lines are read, and its tables written, by what svcdp ipvs is made of."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self.specs: list[ServiceSpec] = []

    def _ipvs(self, *lines: str) -> str:
        self.specs = parse("\n".join(lines), NumericNames(), self.specs).specs
        # A tunnel's source is what a node finds by its routes. ipvsadm clamps no MSS.
        self.dp.apply(
            replace(spec, destinations=tuple(map(routed, spec.destinations)), mss_clamp=False)
            for spec in self.specs
        )
        return ""

    def _list(self, *options: str) -> str:
        if "-c" in options:
            return "\n".join(connections(self.dp.export_connections(self._now), NumericNames()))
        view = next((o[2:] for o in options if o in VIEW_OPTIONS), "")
        listed = map(ListedService, self.dp.services())
        exact, order = "--exact" in options, "--nosort" not in options
        return "\n".join(services(listed, NumericNames(), view=view, exact=exact, order=order))


VIEW_OPTIONS = ("--stats", "--thresholds", "--tun-info")


def routed(spec: DestinationSpec) -> DestinationSpec:
    if spec.tunnel is None:
        return spec
    return replace(spec, tunnel=replace(spec.tunnel, source=director(side_of(spec.address), 4)))


@pytest.fixture(scope="module")
def listed(kernel: UserModeLinux) -> dict[str, tuple[list[str], list[str]]]:
    """Lines of each listing, the kernel's and ours."""
    (result,) = kernel.run([SCENARIO.data()])
    pairs = zip(SCENARIO.steps, result, Director(SCENARIO).run(result), strict=True)
    texts = [(a[1].splitlines(), b[1].splitlines()) for step, a, b in pairs if step[0] == "list"]
    return dict(zip(LISTED, texts, strict=True))


def by_service(lines: list[str]) -> dict[str, list[str]]:
    """The kernel lists services as its hash table has them, but servers in their order."""
    found: dict[str, list[str]] = {}
    servers: list[str] = []
    for line in lines:
        if line.startswith("  -> ") and found:
            servers.append(line)
        else:
            servers = found[line] = []
    return found


def without_seconds(lines: list[str]) -> list[str]:
    """Connections, without the last digit of what is left of their time."""
    return sorted(f"{line[:8]}{line[9:]}" for line in lines[2:])


@pytest.mark.parametrize("name", LISTED)
def test_listings(name: str, listed: dict[str, tuple[list[str], list[str]]]) -> None:
    theirs, ours = listed[name]
    same: Callable[[list[str]], object] = {
        "nosort": by_service,
        "changed": by_service,
        "connections": without_seconds,
    }.get(name, list)
    if name != "connections":
        assert theirs.pop(0).startswith("IP Virtual Server version ")
    assert same(ours) == same(theirs)
