"""Services without an API server get addresses from an allocator; a file remembers which."""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from svcdp._files import replacing
from svcdp.abc import Source
from svcdp.errors import PlatformError, StateError, SvcdpError
from svcdp.kube.allocate import FAMILIES, Allocator, Holdings, text_of
from svcdp.kube.model import Object, Service, ServiceRef, family_of, parse_address
from svcdp.kube.state import Change

__all__ = ["AllocatingSource", "allocated", "load_allocations", "save_allocations"]

_Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class _File(msgspec.Struct):
    """``services``: by ``namespace/name``, what each has."""

    version: Literal[1]
    services: dict[str, dict[str, str | _Port]]


def load_allocations(path: str | os.PathLike[str]) -> Holdings:
    """What :func:`save_allocations` wrote; nothing if there is no file. PlatformError if it cannot
    be read, StateError if it is not in order.
    """
    try:
        file = msgspec.json.decode(Path(path).read_bytes(), type=_File)
        found = {
            ServiceRef(*name.split("/")): {slot: _number(slot, slots[slot]) for slot in slots}
            for name, slots in file.services.items()
        }
        _check(found)
        return found
    except FileNotFoundError:
        return {}
    except OSError as error:
        message = f"{path}: cannot be read: {error.strerror}"
        raise PlatformError(error.errno, message) from error
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise StateError(
            f"{path}: no allocations of svcdp: {error}; restore it, or remove it to begin anew"
        ) from None


def save_allocations(path: str | os.PathLike[str], holdings: Holdings) -> None:
    """In place of what the file has; a crash leaves the old or the new one. PlatformError."""
    services = {
        str(ref): {
            slot: text_of(slot, number) if slot in FAMILIES else number
            for slot, number in slots.items()
        }
        for ref, slots in sorted(holdings.items())
    }
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(msgspec.json.format(msgspec.json.encode(_File(1, services))))
    except OSError as error:
        message = f"{path}: allocations are not saved: {error.strerror}"
        raise PlatformError(error.errno, message) from error


def allocated(
    objects: Iterable[Object], allocator: Allocator
) -> tuple[list[Object], Sequence[SvcdpError]]:
    """All objects, Services completed, and what these go without."""
    found = list(objects)
    services: dict[ServiceRef, Service] = {}
    for each in found:
        if isinstance(each, Service):
            services.setdefault(each.ref, each)
    gone = allocator.holdings.keys() - services.keys()
    complete = allocator.update(services.values(), gone)
    return [
        complete[each.ref] if isinstance(each, Service) and services[each.ref] is each else each
        for each in found
    ], allocator.problems


class AllocatingSource:
    """Another source, whose Services it completes. With a ``path`` they have the same addresses
    the next time: what is new is in that file before anybody hears of it.

    Raises as :func:`load_allocations`.
    """

    def __init__(
        self,
        source: Source,
        service_cidrs: Iterable[str],
        node_ports: tuple[int, int],
        path: str = "",
    ) -> None:
        self._source = source
        self._path = path
        remembered = load_allocations(path) if path else {}
        self._allocator = Allocator(service_cidrs, node_ports, remembered)
        # What is out of range now leaves the file, too.
        self._saved = self._allocator.revision if self._allocator.holdings == remembered else None
        self._copies: dict[ServiceRef, dict[str, Service]] = {}  # by origin; the first counts
        self._refs: dict[str, set[ServiceRef]] = {}  # of each origin
        self._listed = False
        self._unsaved: SvcdpError | None = None

    @property
    def name(self) -> str:
        """That of the other source."""
        return self._source.name

    @property
    def errors(self) -> Sequence[SvcdpError]:
        """Those of the other source, and what Services go without."""
        own = [self._unsaved] if self._unsaved else []
        return [*self._source.errors, *self._allocator.problems, *own]

    async def changes(self) -> AsyncIterator[list[Change]]:
        """Those of the other source, and of Services that get or lose something by them."""
        async with aclosing(self._source.changes()) as batches:  # type: ignore[type-var]
            async for batch in batches:
                completed = self._completed(batch)
                await self._save()
                yield completed

    def _completed(self, batch: Sequence[Change]) -> list[Change]:
        touched: set[ServiceRef] = set()
        for change in batch:
            touched |= self._take(change)
        if not self._listed:
            self._listed = True
            touched |= self._allocator.holdings.keys()
        present = [self._effective(ref) for ref in touched if self._copies.get(ref)]
        gone = [ref for ref in touched if not self._copies.get(ref)]
        changed = self._allocator.update(present, gone)
        found = []
        for change in batch:
            objects = tuple(self._complete(change.origin, each) for each in change.objects)
            found.append(replace(change, objects=objects))
            for each in objects:
                if isinstance(each, Service) and changed.get(each.ref) is each:
                    del changed[each.ref]
        others = [Change(min(self._copies[ref]), (each,)) for ref, each in changed.items()]
        return [*found, *others]

    def _take(self, change: Change) -> set[ServiceRef]:
        """Note where Services are; returns those that the change is about."""
        new = {each.ref: each for each in change.objects if isinstance(each, Service)}
        old = self._refs.get(change.origin, set())
        deleted = {ServiceRef(*key[1:]) for key in change.deleted if key.kind == "Service"}
        gone = (old if change.replace else old & deleted) - new.keys()
        for ref in gone:
            del self._copies[ref][change.origin]
            if not self._copies[ref]:
                del self._copies[ref]
        for ref, service in new.items():
            self._copies.setdefault(ref, {})[change.origin] = service
        self._refs[change.origin] = (old - gone) | new.keys()
        return gone | new.keys()

    def _effective(self, ref: ServiceRef) -> Service:
        copies = self._copies[ref]
        return copies[min(copies)]

    def _complete(self, origin: str, each: Object) -> Object:
        if isinstance(each, Service) and origin == min(self._copies.get(each.ref, ("",))):
            return self._allocator.complete[each.ref]
        return each

    async def _save(self) -> None:
        """A file that cannot be written is a problem; Services are served all the same."""
        revision = self._allocator.revision
        if not self._path or self._saved == revision:
            return
        try:
            # Until it is done nobody asks for the next batch, so the holdings stay as they are.
            await asyncio.to_thread(save_allocations, self._path, self._allocator.holdings)
        except PlatformError as error:
            self._unsaved = error
        else:
            self._unsaved = None
            self._saved = revision


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
