"""The table of the in-process part: ``python -m benchmarks [-o json]``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

from .cases import Case, Hit, NewConnection, Update, measure
from .memory import bytes_a_connection

#: Times the C loop.
HIT_MAX = 2.5
#: Times the C loop: 300 ns on a machine where that takes 105 for a new flow, which is the one
#: that the bound was set on. And how far the fastest and slowest may be apart in ns.
NEW_MAX, NEW_SPREAD_MAX = 2.8, 1.5
CONNECTIONS = (1_000, 100_000, 1_000_000)
SERVICES = (1, 100, 10_000)

#: Made one at a time: a million connections are not kept longer than they are measured.
CASES: list[Callable[[], Case]] = [
    *(lambda n=n: Hit(n, ratio_max=HIT_MAX) for n in CONNECTIONS),
    *(lambda n=n, b=b: Hit(n, batch=b) for b in (256, 1024) for n in CONNECTIONS),
    lambda: Hit(100_000, room=1 << 20),
    lambda: Hit(1_000, how="list"),
    lambda: Hit(1_000, batch=1, how="single packet"),
    *(lambda n=n: NewConnection(n, ratio_max=NEW_MAX) for n in SERVICES),
    lambda: Update(10_000),
]


def bound(case: Case) -> str:
    if case.ratio_max is not None:
        return f"{case.ratio_max} x C"
    return f"{case.ns_max} ns" if case.ns_max is not None else ""


def rows() -> Iterator[dict[str, Any]]:
    """One line after the other, as they are measured."""
    for make in CASES:
        case = make()
        svcdp, c, ratio = measure(case)
        yield {
            "case": case.name,
            "svcdp_ns": round(svcdp, 1),
            "c_ns": round(c, 1),
            "ratio": round(ratio, 2),
            "bound": bound(case),
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    if parser.parse_args().output == "json":
        result = {"cases": list(rows()), "bytes_a_connection": round(bytes_a_connection(), 1)}
        print(json.dumps(result, indent=2))
        return
    line = "{:<56} {:>10} {:>9} {:>7}  {}"
    print(line.format("case", "svcdp ns", "C ns", "ratio", "bound"))
    for row in rows():
        print(line.format(*row.values()), flush=True)
    print(f"memory a connection, both directions: {bytes_a_connection():.1f} bytes")
