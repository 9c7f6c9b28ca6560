"""Running the tools that talk to the kernel."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from svcdp.errors import FeatureUnavailable, MissingCapability, RulesError

__all__ = ["decode", "run", "understanding"]

TIMEOUT = 60.0  # seconds; a full set of a million elements takes a few


def run(argv: Sequence[str], stdin: str = "", *, check: bool = True) -> str:
    """What the tool printed. :class:`svcdp.RulesError` with its own words when it fails, unless
    ``check`` is off.
    """
    try:
        done = subprocess.run(
            argv, input=stdin, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except FileNotFoundError:
        raise FeatureUnavailable(errno.ENOENT, f"{argv[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        message = f"{' '.join(argv)} did not end within {TIMEOUT:.0f} s"
        raise RulesError(message, argv=argv) from None
    if done.returncode == 0 or not check:
        return done.stdout
    stderr = done.stderr.strip()
    if os.strerror(errno.EPERM) in stderr or "you must be root" in stderr:
        message = f"{' '.join(argv)}: {stderr}: it needs CAP_NET_ADMIN: run as root"
        raise MissingCapability(errno.EPERM, message)
    raise RulesError(f"{' '.join(argv)} failed: {stderr}", argv=argv, stderr=stderr)


def decode(text: str) -> Iterator[dict[str, Any]]:
    """The items of all lists in ``text``, one after the other: what ``ip -json`` prints."""
    decoder = json.JSONDecoder()
    start = 0
    while (start := text.find("[", start)) >= 0:
        items, start = decoder.raw_decode(text, start)
        yield from items


@contextmanager
def understanding(tool: str) -> Iterator[None]:
    """Inside, what a tool printed is looked at. :class:`svcdp.RulesError` when it is not what it
    should be.
    """
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise RulesError(f"{tool} prints what svcdp does not understand: {error!r}") from None
