"""The two sysctls that svcdp changes on a node, and how they are what they were afterwards.

A rewritten packet may carry one of the node's own addresses as its source (masquerading, and
the replies of node ports), or a service address that is routed elsewhere. Linux drops both on
input (``fib_validate_source()`` in net/ipv4/fib_frontend.c): the first as a martian unless
``accept_local`` is set, the second where ``rp_filter`` is 1, strict. IPv6 has no such checks.

``accept_local`` is on where ``conf.all`` or the interface has it, and of ``rp_filter`` the
greater of the two counts. So ``conf.all`` alone decides, also for the veths of Pods to come,
which may be given values of their own: accept_local=1, and, where something is strict,
rp_filter=2, loose. What the kernel would have dropped is then dropped by rules of svcdp, before
anything of it is rewritten: see :class:`Guard`.

Loose still asks for some route to the source. Where there is neither a default route nor one
to the service addresses, replies are lost: give ``service_cidrs``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from svcdp.errors import PlatformError

__all__ = [
    "Changes",
    "Guard",
    "Sysctls",
    "namespace_file",
    "original",
    "tracks_connections",
    "undo",
    "value",
    "write",
]

CONF = Path("/proc/sys/net/ipv4/conf")
TRACKED = Path("/proc/sys/net/netfilter/nf_conntrack_count")
STRICT, LOOSE = "1", "2"
PSEUDO = {"all", "default", "lo"}
ACCEPT_LOCAL, RP_FILTER = "all/accept_local", "all/rp_filter"

Changes = Mapping[str, tuple[str, str]]
"""Path below ``conf`` -> (original value, new value)."""


@dataclass(frozen=True)
class Guard:
    """What the rules make up for on this host.

    In the kernel's place they drop, of packets that were not rewritten, ``martians``: those
    with a local source from outside, except on ``trusted`` interfaces, which had accept_local
    before. And packets without a way back by the interface that they came by: on ``strict``
    interfaces, or, if ``strict_default``, on all but those in ``loose``.

    Where connections are ``tracked`` they leave alone what must not be queued: see
    :func:`tracks_connections`.
    """

    martians: bool = False
    trusted: tuple[str, ...] = ()
    strict_default: bool = False
    strict: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()
    tracked: bool = False


class Sysctls:
    """The sysctls of this network namespace, and a file with what they were.

    The file names the namespace by its inode, so that one folder serves several. It outlives
    a crash; where it is lost, the values of that moment are taken for the original ones.
    """

    def __init__(self, run_dir: str) -> None:
        self._folder = Path(run_dir)

    @property
    def _file(self) -> Path:
        return namespace_file(self._folder, "sysctls")

    def changes(self) -> Changes:
        """What :meth:`apply` sets."""
        changes = {}
        if self._original(ACCEPT_LOCAL) == "0":
            changes[ACCEPT_LOCAL] = ("0", "1")
        if self._strict_default() or self._interfaces(strict=True):
            changes[RP_FILTER] = (self._original(RP_FILTER), LOOSE)
        return changes

    def guard(self) -> Guard:
        """What the rules have to drop once that is set."""
        martians = self._original(ACCEPT_LOCAL) == "0"
        trusted = tuple(n for n in _interfaces() if value(f"{n}/accept_local") == "1")
        strict_default = self._strict_default()
        listed = self._interfaces(strict=not strict_default)
        return Guard(
            martians=martians,
            trusted=trusted if martians else (),
            strict_default=strict_default,
            strict=() if strict_default else listed,
            loose=listed if strict_default else (),
            tracked=tracks_connections(),
        )

    def apply(self) -> None:
        """Set what must be set. Saves the original values first."""
        saved = self._saved()
        changes = self.changes()
        self._save({**saved, **changes})
        for name, (_, new) in changes.items():
            write(name, new)
        undo({name: saved[name] for name in saved.keys() - changes.keys()})
        self._save(changes)

    def restore(self) -> None:
        """Undo :meth:`apply`, also that of a process that crashed.

        What somebody else has set since then stays.
        """
        undo(self._saved())
        self._file.unlink(missing_ok=True)

    def show(self) -> str:
        """What is set because of us, a line each."""
        saved = self._saved().items()
        return "".join(
            f"net.ipv4.conf.{name.replace('/', '.')} = {value(name)}, was {before}\n"
            for name, (before, _) in saved
        )

    def _original(self, name: str) -> str:
        return original(name, self._saved())

    def _interfaces(self, *, strict: bool) -> tuple[str, ...]:
        """Those with a strict rp_filter, without us, or those without."""
        everywhere = self._original(RP_FILTER)
        return tuple(n for n in _interfaces() if _is_strict(everywhere, n) == strict)

    def _strict_default(self) -> bool:
        """Whether interfaces to come are strict."""
        return _is_strict(self._original(RP_FILTER), "default")

    def _saved(self) -> Changes:
        try:
            text = self._file.read_text()
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise PlatformError(
                error.errno, f"cannot read {self._file}: {error.strerror}"
            ) from None
        try:
            return {name: (old, new) for name, (old, new) in json.loads(text).items()}
        except (ValueError, TypeError, AttributeError):
            raise PlatformError(None, f"{self._file} is damaged: remove it") from None

    def _save(self, changes: Changes) -> None:
        if not changes:
            self._file.unlink(missing_ok=True)
            return
        try:
            self._folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            # Whole or not at all, also if the machine stops here.
            fresh = self._file.with_suffix(".new")
            fresh.write_text(json.dumps(changes))
            fresh.replace(self._file)
        except OSError as error:
            raise PlatformError(
                error.errno, f"cannot save sysctls in {self._folder}: {error.strerror}"
            ) from None


def tracks_connections() -> bool:
    """Whether the kernel tracks connections in this network namespace, because somebody asked.

    Then a packet is lost on its way to a queue if it shares a connection that is not confirmed
    yet (``nf_ct_drop_unconfirmed()`` in net/netfilter/nfnetlink_queue.c): so do ICMP errors
    that this host makes about the first packet of one.
    """
    try:
        return int(TRACKED.read_text()) > 0
    except FileNotFoundError:
        return False


def _interfaces() -> list[str]:
    return sorted(path.name for path in CONF.iterdir() if path.name not in PSEUDO)


def _is_strict(everywhere: str, interface: str) -> bool:
    return max(everywhere, value(f"{interface}/rp_filter")) == STRICT


def namespace_file(folder: Path, kind: str) -> Path:
    """Where a folder has what is kept of this network namespace."""
    return folder / f"{kind}-{os.stat('/proc/thread-self/ns/net').st_ino}.json"


def original(name: str, saved: Changes) -> str:
    """The value without us, who have set what is saved."""
    current = value(name)
    before, ours = saved.get(name, (current, ""))
    return before if current == ours else current


def undo(changes: Changes) -> None:
    """Put original values back, except where somebody else has set another since."""
    for name, (before, ours) in changes.items():
        if value(name) == ours:
            write(name, before)


def value(name: str) -> str:
    """That of a path below ``conf``."""
    try:
        return (CONF / name).read_text().strip()
    except FileNotFoundError:  # the interface has just gone
        return "0"


def write(name: str, text: str) -> None:
    """Set a path below ``conf``. PlatformError."""
    try:
        (CONF / name).write_text(text)
    except OSError as error:
        raise PlatformError(
            error.errno, f"cannot set net.ipv4.conf.{name.replace('/', '.')}: {error.strerror}"
        ) from None
