"""Sets of captured addresses, by ``ipset``: of each kind one for IPv4 and one for IPv6."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from svcdp.dataplane import Captures
from svcdp.errors import RulesError
from svcdp.rules.plan import Element, family_of
from svcdp.rules.tools import run
from svcdp.types import Protocol

__all__ = ["REAL", "VIRTUAL", "destroy", "full", "load", "show", "update"]

VIRTUAL, REAL = "SVCDP-VIRTUAL", "SVCDP-REAL"  # 4 or 6 is appended
INET = {4: "inet", 6: "inet6"}
MAXELEM = 1 << 24  # a bound, not a size; the default of 65536 is less than large clusters need

RELEASE_TIME = 5.0  # seconds
RELEASE_INTERVAL = 0.01


def full(captures: Captures) -> str:
    """Input of ``ipset restore`` that makes the sets hold exactly this.

    Each is built aside and swapped in, so that no packet sees half of it.
    """
    lines = []
    for kind, elements in ((VIRTUAL, captures.virtual), (REAL, captures.real)):
        for family, inet in INET.items():
            name = f"{kind}{family}"
            lines += [
                f"create {each} hash:ip,port family {inet} maxelem {MAXELEM}"
                for each in (name, f"{name}-NEW")
            ]
            lines.append(f"flush {name}-NEW")  # of what a killed process left
            lines += [
                f"add {name}-NEW {_text(element)}"
                for element in sorted(elements)
                if family_of(element[1]) == family
            ]
            lines += [f"swap {name}-NEW {name}", f"destroy {name}-NEW"]
    return "".join(f"{line}\n" for line in lines)


def load(script: str) -> None:
    """Run ``ipset restore``; what is there already is no error."""
    # For each name of a protocol ipset reads /etc/protocols, and takes three times as long.
    for protocol in Protocol:
        script = script.replace(f",{protocol.name.lower()}:", f",{protocol:d}:")
    run(["ipset", "-exist", "restore"], script)


def update(added: Captures, removed: Captures) -> None:
    """Add and delete elements; after an error none is changed."""
    try:
        load(_changes("add", added) + _changes("del", removed))
    except RulesError:
        # The tool stopped at the line that failed: take back what came before it.
        load(_changes("del", added) + _changes("add", removed))
        raise


def destroy() -> None:
    """Remove the sets.

    nf_tables lets go of a set a moment after the rules that used it are gone
    (``nf_tables_trans_destroy_work()`` in net/netfilter/nf_tables_api.c).
    """
    deadline = time.monotonic() + RELEASE_TIME
    for name in _names():
        while True:
            try:
                run(["ipset", "destroy", name])
                break
            except RulesError as error:
                if "in use" not in error.stderr or time.monotonic() > deadline:
                    raise
            time.sleep(RELEASE_INTERVAL)


def show() -> str:
    """The sets and their elements, as ``ipset save`` prints them."""
    return "".join(run(["ipset", "save", name]) for name in _names())


def _names() -> list[str]:
    names = run(["ipset", "list", "-name"]).split()
    return [name for name in names if name.startswith((VIRTUAL, REAL))]


def _changes(verb: str, captures: Captures) -> str:
    return "".join(
        f"{verb} {name} {_text(element)}\n"
        for kind, elements in ((VIRTUAL, captures.virtual), (REAL, captures.real))
        for name, element in _named(kind, elements)
    )


def _named(kind: str, elements: Iterable[Element]) -> Iterator[tuple[str, Element]]:
    for element in sorted(elements):
        yield f"{kind}{family_of(element[1])}", element


def _text(element: Element) -> str:
    protocol, address, port = element
    return f"{address},{protocol}:{port}"
