"""Any lines for ``svcdp ipvs restore``: services that a dataplane takes, or an error that names
the line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from svcdp import Dataplane
from svcdp.errors import ConfigError
from svcdp.ipvs.names import NumericNames
from svcdp.ipvs.restore import parse
from svcdp.ipvs.save import save
from svcdp.types import ServiceSpec

SERVICES = ["-t 192.0.2.10:80", "-u 192.0.2.10:53", "-t [2001:db8::10]:80", "-f 5", "-f 5 -6"]
SERVERS = ["-r 10.0.0.1:80", "-r 10.0.0.2", "-r [fd00::1]:80", "-r 192.0.2.1:0"]
SERVICE_OPTIONS = ["-s rr", "-s sh -b sh-port", "-p", "-p 10 -M 255.255.255.0", "-M 64", "-o"]
SERVER_OPTIONS = ["-m", "-g", "-i", "-w 0", "-w 9", "-x 9 -y 5", "--tun-type gre", "--tun-csum"]
SERVER_OPTIONS += ["--tun-type gue --tun-port 6080", "--tun-remcsum"]

any_words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def lines(draw: st.DrawFn) -> str:
    """Mostly right, sometimes wrong, sometimes anything."""
    if draw(st.integers(0, 9)) == 0:
        return draw(any_words)
    service = draw(st.sampled_from(SERVICES))
    if draw(st.booleans()):
        words = [draw(st.sampled_from(["-A", "-E", "-A", "-D"])), service]
        options: Sequence[str] = SERVICE_OPTIONS
    else:
        words = [draw(st.sampled_from(["-a", "-e", "-a", "-d"])), service]
        words.append(draw(st.sampled_from(SERVERS)))
        options = SERVER_OPTIONS
    words += draw(st.lists(st.sampled_from(options), max_size=2, unique=True))
    if draw(st.integers(0, 19)) == 0:
        words.insert(draw(st.integers(0, len(words))), draw(any_words))
    return " ".join(words)


def complete(spec: ServiceSpec) -> ServiceSpec:
    """With sources for its tunnels, as a node finds them."""
    return replace(
        spec,
        destinations=tuple(
            replace(each, tunnel=replace(each.tunnel, source=each.address)) if each.tunnel else each
            for each in spec.destinations
        ),
    )


def attempt(text: str, base: list[ServiceSpec]) -> list[ServiceSpec]:
    """What there is afterwards."""
    problem = ""
    try:
        return parse(text, NumericNames(), base).specs
    except ConfigError as error:
        problem = str(error)
    assert re.match(r"line \d+: ", problem)
    return base


@given(st.lists(lines(), max_size=8))
def test_any_lines(text: list[str]) -> None:
    specs: list[ServiceSpec] = []
    for line in text:
        specs = attempt(line, specs)
    Dataplane(16).apply(map(complete, specs))
    assert parse("\n".join(save(specs)), NumericNames()).specs == specs


@given(st.text())
def test_any_text(text: str) -> None:
    attempt(text, [])
