"""Sets of what is captured, by ``ipset``.

Of each kind of element and IP version one of addresses with a port, and one of whole addresses.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection
from functools import cache

from svcdp.errors import RulesError
from svcdp.rules.plan import Element, Kind, family_of
from svcdp.rules.tools import run
from svcdp.types import Protocol

__all__ = ["KINDS", "destroy", "full", "load", "set_name", "show", "update"]

KINDS: tuple[Kind, ...] = ("tunnel", "virtual", "real")
PREFIX = "SVCDP-"
INET = {4: "inet", 6: "inet6"}
MAXELEM = 1 << 24  # a bound, not a size; the default of 65536 is less than large clusters need

RELEASE_TIME = 5.0  # seconds
RELEASE_INTERVAL = 0.01


@cache
def set_name(kind: Kind, family: int, *, whole: bool = False) -> str:
    """``SVCDP-REAL4``, or ``SVCDP-REAL-ALL4`` of whole addresses."""
    return f"{PREFIX}{kind.upper()}{'-ALL' if whole else ''}{family}"


def full(elements: Collection[Element]) -> str:
    """Input of ``ipset restore`` that makes the sets hold exactly this.

    Each is built aside and swapped in, so that no packet sees half of it.
    """
    by_set: defaultdict[tuple[Kind, bool, bool], list[str]] = defaultdict(list)
    lines = []
    for each in elements:  # of large clusters a million
        by_set[each.kind, ":" in each.address, not each.protocol].append(_text(each))
    for kind in KINDS:
        for family, inet in INET.items():
            for whole in (False, True):
                name = set_name(kind, family, whole=whole)
                shape = f"hash:ip{'' if whole else ',port'} family {inet} maxelem {MAXELEM}"
                lines += [f"create {each} {shape}" for each in (name, f"{name}-NEW")]
                lines.append(f"flush {name}-NEW")  # of what a killed process left
                texts = by_set[kind, family == 6, whole]
                lines += [f"add {name}-NEW {each}" for each in texts]
                lines += [f"swap {name}-NEW {name}", f"destroy {name}-NEW"]
    return "".join(f"{line}\n" for line in lines)


def load(script: str) -> None:
    """Run ``ipset restore``; what is there already is no error."""
    # For each name of a protocol ipset reads /etc/protocols, and takes three times as long.
    for protocol in Protocol:
        script = script.replace(f",{protocol.name.lower()}:", f",{protocol:d}:")
    run(["ipset", "-exist", "restore"], script)


def update(added: Collection[Element], removed: Collection[Element]) -> None:
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
    return [name for name in names if name.startswith(PREFIX)]


def _changes(verb: str, elements: Collection[Element]) -> str:
    return "".join(f"{verb} {_set_of(each)} {_text(each)}\n" for each in sorted(elements))


def _set_of(element: Element) -> str:
    return set_name(element.kind, family_of(element.address), whole=not element.protocol)


def _text(element: Element) -> str:
    if not element.protocol:
        return element.address
    return f"{element.address},{element.protocol}:{element.port}"
