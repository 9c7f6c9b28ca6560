"""The file that remembers what Services without an API server were given."""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from svcdp._files import replacing
from svcdp.errors import PlatformError, StateError
from svcdp.kube.allocate import FAMILIES, Holdings, text_of
from svcdp.kube.model import ServiceRef, family_of, parse_address

__all__ = ["AllocationsFile"]

_Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class _File(msgspec.Struct, rename="camel", omit_defaults=True):
    """By ``namespace/name``, what each Service has: cluster IPs and node ports by slot, and
    addresses from LoadBalancerPools.
    """

    version: Literal[1]
    services: dict[str, dict[str, str | _Port]]
    load_balancers: dict[str, tuple[str, ...]] = {}


class AllocationsFile:
    """What the file at ``path`` has; nothing if there is none. Without a path nothing is kept.

    Those who give addresses away put into ``services`` and ``load_balancers`` what Services have
    now, and save it. ``problem``: why the last time failed. PlatformError if the file cannot be
    read, StateError if it is not in order.
    """

    def __init__(self, path: str | os.PathLike[str] = "") -> None:
        self._path = Path(path) if path else None
        self.services: Holdings = {}
        self.load_balancers: Mapping[ServiceRef, tuple[str, ...]] = {}
        self.problem: PlatformError | None = None
        if self._path:
            self._load(self._path)

    def _load(self, path: Path) -> None:
        try:
            file = msgspec.json.decode(path.read_bytes(), type=_File)
            self.services = {
                _ref(name): {slot: _number(slot, slots[slot]) for slot in slots}
                for name, slots in file.services.items()
            }
            _check(self.services)
            self.load_balancers = {
                _ref(name): tuple(map(parse_address, texts))
                for name, texts in file.load_balancers.items()
            }
        except FileNotFoundError:
            pass
        except OSError as error:
            message = f"{path}: cannot be read: {error.strerror}"
            raise PlatformError(error.errno, message) from error
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError, TypeError) as error:
            raise StateError(
                f"{path}: no allocations of svcdp: {error}; restore it, or remove it to begin anew"
            ) from None

    async def save(self) -> None:
        """In place of what the file has; a crash leaves the old or the new one. What comes in the
        way is ``problem``: Services are served all the same.

        Until it is done nobody may change what is to be saved.
        """
        if self._path:
            self.problem = await asyncio.to_thread(self._write, self._path)

    def _write(self, path: Path) -> PlatformError | None:
        services = {
            str(ref): {
                slot: text_of(slot, number) if slot in FAMILIES else number
                for slot, number in slots.items()
            }
            for ref, slots in sorted(self.services.items())
        }
        balanced = {str(ref): texts for ref, texts in sorted(self.load_balancers.items())}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(msgspec.json.format(msgspec.json.encode(_File(1, services, balanced))))
        except OSError as error:
            return PlatformError(
                error.errno, f"{path}: allocations are not saved: {error.strerror}"
            )
        return None


def _ref(name: str) -> ServiceRef:
    return ServiceRef(*name.split("/"))


def _number(slot: str, value: str | int) -> int:
    if slot not in FAMILIES:
        if isinstance(value, int):
            return value
        raise ValueError(f"{value!r} is no port")
    if isinstance(value, str) and family_of(address := parse_address(value)) == slot:
        return int(ipaddress.ip_address(address))
    raise ValueError(f"{value!r} is not of {slot}")


def _check(holdings: Holdings) -> None:
    """ValueError if two Services have the same."""
    seen: dict[tuple[str, int], ServiceRef] = {}
    for ref, slots in holdings.items():
        for slot, number in slots.items():
            kind = slot if slot in FAMILIES else "port"
            if (other := seen.setdefault((kind, number), ref)) != ref:
                raise ValueError(f"{text_of(slot, number)} is both {other}'s and {ref}'s")
