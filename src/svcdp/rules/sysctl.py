"""The two sysctls that svcdp changes, and how they are what they were afterwards.

A rewritten packet may carry one of the node's own addresses as its source (masquerading, and
the replies of node ports), or a service address that is routed elsewhere. Linux drops both on
input (``fib_validate_source()`` in net/ipv4/fib_frontend.c): the first as a martian unless
``accept_local`` is set, the second where ``rp_filter`` is 1, strict. IPv6 has no such checks.

``accept_local`` is on where ``conf.all`` or the interface has it, and of ``rp_filter`` the
greater of the two counts. So ``conf.all`` alone decides, also for the veths of Pods to come:
accept_local=1, and, where something is strict, rp_filter=2, loose. What the kernel would have
dropped is then dropped by rules of svcdp, before anything of it is rewritten: see
:class:`Guard`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from svcdp.errors import PlatformError

__all__ = ["Guard", "Sysctls"]

CONF = Path("/proc/sys/net/ipv4/conf")
STRICT, LOOSE = "1", "2"
PSEUDO = {"all", "default", "lo"}


@dataclass(frozen=True)
class Guard:
    """What rules have to drop in the kernel's place, of packets that were not rewritten.

    ``martians``: those with a local source from outside, except on ``trusted`` interfaces,
    which had accept_local before. Packets without a way back by the interface that they came
    by: on ``strict`` interfaces, or, if ``strict_default``, on all but those in ``loose``.
    """

    martians: bool = False
    trusted: tuple[str, ...] = ()
    strict_default: bool = False
    strict: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()


class Sysctls:
    """The sysctls of this network namespace, and a file with what they were.

    The file names the namespace by its inode, so that one folder serves several. It outlives
    a crash; where it is lost, the values of that moment are taken for the original ones.
    """

    def __init__(self, run_dir: str) -> None:
        self._folder = Path(run_dir)

    @property
    def _file(self) -> Path:
        return self._folder / f"sysctls-{os.stat('/proc/thread-self/ns/net').st_ino}.json"

    def guard(self) -> Guard:
        """What is to be dropped once :meth:`apply` has been called."""
        return self._read()[1]

    def changes(self) -> dict[str, tuple[str, str]]:
        """What :meth:`apply` sets: path below ``conf`` -> (original value, new value)."""
        return self._read()[0]

    def apply(self) -> Guard:
        """Set what must be set. Saves the original values first."""
        changes, guard = self._read()
        if changes:
            self._save(changes)
            for name, (_, value) in changes.items():
                _write(name, value)
        return guard

    def restore(self) -> None:
        """Undo :meth:`apply`, also that of a process that crashed.

        What somebody else has set since then stays.
        """
        for name, (original, value) in self._saved().items():
            if _value(name) == value:
                _write(name, original)
        self._file.unlink(missing_ok=True)

    def show(self) -> str:
        """What is set because of us, a line each."""
        saved = self._saved().items()
        return "".join(
            f"net.ipv4.conf.{name.replace('/', '.')} = {_value(name)}, was {original}\n"
            for name, (original, _) in saved
        )

    def _read(self) -> tuple[dict[str, tuple[str, str]], Guard]:
        saved = self._saved()

        def original(name: str) -> str:
            was, value = saved.get(name, ("", ""))
            current = _value(name)
            return was if current == value else current

        changes = {}
        accepts = original("all/accept_local")
        if accepts == "0":
            changes["all/accept_local"] = (accepts, "1")
        everywhere = original("all/rp_filter")
        interfaces = sorted(path.name for path in CONF.iterdir() if path.name not in PSEUDO)
        strict_default, *strict_each = (
            max(everywhere, _value(f"{name}/rp_filter")) == STRICT
            for name in ("default", *interfaces)
        )
        strict = tuple(n for n, on in zip(interfaces, strict_each, strict=True) if on)
        loose = tuple(n for n, on in zip(interfaces, strict_each, strict=True) if not on)
        if strict or strict_default:
            changes["all/rp_filter"] = (everywhere, LOOSE)
        guard = Guard(
            martians=accepts == "0",
            trusted=tuple(n for n in interfaces if _value(f"{n}/accept_local") == "1"),
            strict_default=strict_default,
            strict=() if strict_default else strict,
            loose=loose if strict_default else (),
        )
        return changes, guard

    def _saved(self) -> Mapping[str, tuple[str, str]]:
        try:
            return {name: (old, new) for name, (old, new) in _load(self._file).items()}
        except FileNotFoundError:
            return {}

    def _save(self, changes: Mapping[str, tuple[str, str]]) -> None:
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


def _load(file: Path) -> dict[str, list[str]]:
    text = file.read_text()
    try:
        loaded: dict[str, list[str]] = json.loads(text)
    except ValueError:
        raise PlatformError(None, f"{file} is damaged: remove it") from None
    return loaded


def _value(name: str) -> str:
    try:
        return (CONF / name).read_text().strip()
    except FileNotFoundError:  # the interface has just gone
        return "0"


def _write(name: str, value: str) -> None:
    try:
        (CONF / name).write_text(value)
    except OSError as error:
        raise PlatformError(
            error.errno, f"cannot set net.ipv4.conf.{name.replace('/', '.')}: {error.strerror}"
        ) from None
