"""Doing something in another network namespace."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from svcdp.errors import MissingCapability, PlatformError

__all__ = ["NetNS", "call_in", "enter"]

#: None (here), a name under /run/netns, a path, or an open file descriptor.
NetNS = str | os.PathLike[str] | int | None

T = TypeVar("T")

CLONE_NEWNET = 0x40000000


def call_in(netns: NetNS, function: Callable[[], T]) -> T:
    """The result of ``function()`` run in a network namespace, on a thread that ends with it: a
    thread keeps its namespace, and the caller's must not change. What is opened there stays there.

    PlatformError when the namespace cannot be entered; what the function raises is raised here.
    """
    if netns is None:
        return function()
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            enter(netns)
            outcome.append(function())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="svcdp-netns")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def enter(netns: NetNS) -> None:
    """Move the calling thread to a network namespace, for good. PlatformError."""
    if netns is None:
        return
    if isinstance(netns, int):
        _setns(netns, f"file descriptor {netns}")
        return
    path = os.fspath(netns)
    if "/" not in path:
        path = f"/run/netns/{path}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise PlatformError(
            error.errno, f"network namespace {path}: {error.strerror}; `ip netns list` shows them"
        ) from None
    try:
        _setns(fd, path)
    finally:
        os.close(fd)


def _setns(fd: int, what: str) -> None:
    # os.setns() came with Python 3.12.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWNET):
        number = ctypes.get_errno()
        kind = MissingCapability if number == 1 else PlatformError
        raise kind(number, f"cannot enter network namespace {what}: {os.strerror(number)}")
