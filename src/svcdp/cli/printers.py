"""Output as kubectl prints it: tables without boxes, JSON and YAML lists, names."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Column", "Item", "age", "document", "endpoint", "note", "shown", "table"]

Item = Mapping[str, Any]

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "y": 365 * 86400}
_AGES = (
    (2 * 60, ("s", "")),
    (10 * 60, ("m", "s")),
    (3 * 3600, ("m", "")),
    (8 * 3600, ("h", "m")),
    (2 * 86400, ("h", "")),
    (8 * 86400, ("d", "h")),
    (2 * 365 * 86400, ("d", "")),
    (8 * 365 * 86400, ("y", "d")),
    (math.inf, ("y", "")),
)


@dataclass(frozen=True)
class Column:
    """A column of a table: its header and what it shows of an item."""

    header: str
    cell: Callable[[Item], object]
    wide: bool = False
    """Shown only with ``-o wide``."""
    volatile: bool = False
    """Changes all the time: no reason for ``-w`` to print a line."""


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell and three spaces apart. Empty ``headers``: none."""
    lines = [
        [shown(str(cell)) for cell in row] for row in ([headers] if headers else []) + list(rows)
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def shown(text: str) -> str:
    """The text in a line, for a terminal, which obeys nothing that somebody wrote into it.

    Escape is ``^[`` and carriage return ``\\r``, as kubectl has them (terminal.go); what else is
    not printable is written as in Python.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else _escape(each) for each in text)


def _escape(character: str) -> str:
    return "^[" if character == "\x1b" else repr(character)[1:-1]


def document(value: object, output: str) -> str:
    """``value`` as JSON or YAML."""
    if output == "json":
        return json.dumps(value, indent=2)
    import yaml

    return yaml.safe_dump(value, sort_keys=False).rstrip()


def age(seconds: float) -> str:
    """A duration as kubectl writes ages: ``119s``, ``3m20s``, ``5d``.

    The limits are those of ``k8s.io/apimachinery/pkg/util/duration.HumanDuration``.
    """
    whole = int(seconds)
    if whole < 0:  # of another host's clock
        return "0s" if whole == -1 else "<invalid>"
    big, small = next(units for limit, units in _AGES if whole < limit)
    count, rest = divmod(whole, _SECONDS[big])
    detail = rest // _SECONDS[small] if small else 0
    return f"{count}{big}" + (f"{detail}{small}" if detail else "")


def endpoint(address: str, port: int) -> str:
    """``192.0.2.1:80`` or ``[2001:db8::1]:80``."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def note(message: str) -> None:
    """Something for the person at the terminal: on stderr, so that pipes carry data only."""
    print(message, file=sys.stderr)
