"""ARP kept quiet about the virtual addresses of a real server, for as long as anybody here asks."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from svcdp.errors import PlatformError
from svcdp.rules.sysctl import Changes, namespace_file, original, undo, write

__all__ = ["quiet_arp"]

#: Values with which nobody asks this host, in ARP, for a virtual address that is on another of its
#: devices: the director answers (Documentation/networking/ip-sysctl.rst).
LEAST = {"all/arp_ignore": 1, "all/arp_announce": 2}


@contextlib.contextmanager
def quiet_arp(run_dir: str) -> Iterator[None]:
    """The sysctls of ARP in this network namespace are at least those of a real server.

    The last process to leave puts back what was there before the first one, also after a crash;
    what somebody else has set since then stays. A file in the folder, which names the namespace
    by its inode, has the values of then, and its lock those who are inside. PlatformError.
    """
    path = namespace_file(Path(run_dir), "arp")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = _enter(path)
    except PlatformError:
        raise
    except OSError as error:
        raise PlatformError(error.errno, f"{error.filename or path}: {error.strerror}") from None
    try:
        yield
    finally:
        try:
            _leave(path, fd)
        finally:
            os.close(fd)


def _enter(path: Path) -> int:
    """The file, open and locked."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if _is_alone(fd) and os.fstat(fd).st_nlink:
                changes = _wanted(_saved(fd))
                _save(fd, changes)
                for name, (_, ours) in changes.items():
                    write(name, ours)
            fcntl.flock(fd, fcntl.LOCK_SH)
            status = os.fstat(fd)
        except BaseException:
            os.close(fd)
            raise
        if status.st_nlink and status.st_size:
            return fd
        # The last one left in the moment before the lock.
        os.close(fd)


def _leave(path: Path, fd: int) -> None:
    if _is_alone(fd):
        undo(_saved(fd))
        path.unlink()


def _is_alone(fd: int) -> bool:
    """Nobody else has the file locked, and nobody can until this process lets it go. If not, this
    process has it locked no more either (flock(2))."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wanted(saved: Changes) -> Changes:
    """What must be set, and what was there before anybody of us set it."""
    before = {name: original(name, saved) for name in LEAST}
    return {
        name: (before[name], str(least))
        for name, least in LEAST.items()
        if int(before[name]) < least
    }


def _saved(fd: int) -> Changes:
    """Empty also where a crash left half a file: then nothing was set yet."""
    try:
        return {n: (old, new) for n, (old, new) in json.loads(os.pread(fd, 4096, 0)).items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def _save(fd: int, changes: Changes) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(changes).encode(), 0)
