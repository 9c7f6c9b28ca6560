"""Policy routes: a packet with a mark goes to the next hop that the mark stands for.

::

    4096: fwmark 0/0xffc00000 goto 4098        what has no mark skips the others
    4097: fwmark 0x500000/0xffd00000 lookup T  T: default via the next hop
    4097: fwmark 0x900000/0xffd00000 lookup U  ...
    4098: nop

The rules look for the mark of forwarded packets too (0x100000 here), which nobody else sets.
The table's number follows from the mark. Rules and routes are recognised by their protocol
number. Where the kernel has no route to a next hop, packets to it are unreachable.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

from svcdp.errors import RulesError
from svcdp.rules.paths import Path, find_paths
from svcdp.rules.plan import Hop, family_of
from svcdp.rules.routes import PROTOCOL
from svcdp.rules.tools import run

__all__ = ["Field", "add", "apply", "commands", "refresh", "remove", "remove_all", "show"]

SKIP, CHOOSE, END = 4096, 4097, 4098
"""Priorities: after the local addresses (0), before the main table (32766)."""

TABLES = 0x53560000  # "SV": far from the numbers that people give to tables
LAST = 4278198272  # a metric; any other route comes first


class Field(NamedTuple):
    """Where marks carry the next hop: the bits of ``mask``, of packets that have ``forward``."""

    mask: int
    forward: int


def apply(hops: Collection[Hop], field: Field) -> str:
    """Make exactly these hold, whatever was there; what stays is not interrupted. Returns what
    the kernel says of next hops that it does not take.
    """
    refused = ""
    for family in (4, 6):
        wanted = _of(hops, family)
        rules = {_rule(hop, field) for hop in wanted}
        if wanted:
            rules |= _shared_rules(field)
        present = _rules(family)
        refused += _set_routes(family, _all_routes(wanted, field))
        lines = [f"rule add {rule}" for rule in sorted(rules - present)]
        lines += [f"rule delete {rule}" for rule in sorted(present - rules)]
        left = _tables(present - rules) - _tables(rules)
        lines += [f"route flush table {table}" for table in sorted(left)]
        _batch(family, lines)
    return refused


def commands(hops: Collection[Hop], field: Field) -> Iterator[str]:
    """What :func:`apply` does where nothing of ours is, as lines of a shell."""
    for family in (4, 6):
        if wanted := _of(hops, family):
            rules = _shared_rules(field) | {_rule(hop, field) for hop in wanted}
            for line in _all_routes(wanted, field) + [f"rule add {rule}" for rule in sorted(rules)]:
                yield f"ip -{family} {line}"


def add(hops: Collection[Hop], field: Field) -> str:
    """Make packets with these marks go there. Returns what :func:`apply` does."""
    refused = ""
    for family in (4, 6):
        if wanted := _of(hops, family):
            rules = {_rule(hop, field) for hop in wanted} | _shared_rules(field) - _rules(family)
            refused += _set_routes(family, _all_routes(wanted, field))
            _batch(family, [f"rule add {rule}" for rule in sorted(rules)])
    return refused


def remove(hops: Collection[Hop], field: Field) -> None:
    """Take back what :func:`add` did for these."""
    for family in (4, 6):
        lines = []
        for hop in _of(hops, family):
            lines.append(f"rule delete {_rule(hop, field)}")
            lines.append(f"route flush table {_table(hop, field)}")
        _batch(family, lines)


def refresh(hops: Collection[Hop], field: Field) -> str:
    """Follow the routes to the next hops, which may have changed. Returns what :func:`apply`
    does.
    """
    return "".join(_set_routes(family, _all_routes(_of(hops, family), field)) for family in (4, 6))


def remove_all() -> None:
    """Remove all rules of ours. The routes behind them go with those of svcdp.rules.routes."""
    for family in (4, 6):
        _batch(family, [f"rule delete {rule}" for rule in sorted(_rules(family))])


def show() -> str:
    """Our rules, a line each."""
    return "".join(f"{rule}\n" for family in (4, 6) for rule in sorted(_rules(family)))


def _of(hops: Collection[Hop], family: int) -> list[Hop]:
    return sorted(hop for hop in hops if family_of(hop.address) == family)


# Rules are written as `ip rule show` prints them, so that the two can be compared.


def _shared_rules(field: Field) -> set[str]:
    return {
        f"priority {SKIP} from all fwmark 0/{field.mask:#x} goto {END} proto {PROTOCOL}",
        f"priority {END} from all nop proto {PROTOCOL}",
    }


def _rule(hop: Hop, field: Field) -> str:
    mark, mask = hop.mark | field.forward, field.mask | field.forward
    which = f"fwmark {mark:#x}/{mask:#x} lookup {_table(hop, field)}"
    return f"priority {CHOOSE} from all {which} proto {PROTOCOL}"


def _rules(family: int) -> set[str]:
    # An error: this kernel has no policy routes, or not of this IP version.
    lines = run(["ip", f"-{family}", "rule", "show"], check=False).splitlines()
    ours = (line.split() for line in lines if line.split()[-2:] == ["proto", str(PROTOCOL)])
    return {f"priority {priority.rstrip(':')} {' '.join(rest)}" for priority, *rest in ours}


def _table(hop: Hop, field: Field) -> int:
    return TABLES + hop.mark // (field.mask & -field.mask)


def _tables(rules: set[str]) -> set[str]:
    return {found[1] for rule in rules if (found := re.search(r" lookup (\d+)", rule))}


def _all_routes(hops: Collection[Hop], field: Field) -> list[str]:
    paths = find_paths(hop.address for hop in hops)
    return [line for hop in hops for line in _routes(hop, paths.get(hop.address), field)]


def _routes(hop: Hop, path: Path | None, field: Field) -> Iterator[str]:
    table = f"table {_table(hop, field)} proto {PROTOCOL}"
    yield f"route replace unreachable default metric {LAST} {table}"
    if path is None:
        yield f"route flush {table} type unicast"
        return
    gateway = path.gateway or hop.address
    inet6 = "inet6 " * (family_of(gateway) > family_of(hop.address))
    yield f"route replace default via {inet6}{gateway} dev {path.device} onlink {table}"


def _set_routes(family: int, lines: list[str]) -> str:
    """One next hop that the kernel does not take must not keep the others from theirs: packets to
    it are unreachable. Returns what it says of those.
    """
    try:
        _batch(family, lines, "-force")
    except RulesError as error:
        return str(error)
    return ""


def _batch(family: int, lines: list[str], *options: str) -> None:
    if lines:
        run(["ip", f"-{family}", *options, "-batch", "-"], "".join(f"{each}\n" for each in lines))
