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
from svcdp.kube.allocate import FAMILIES, NODE_PORTS, Allocator, Holdings, text_of
from svcdp.kube.events import Event
from svcdp.kube.model import (
    Object,
    Service,
    ServiceCIDR,
    ServiceRef,
    family_of,
    parse_address,
)
from svcdp.kube.own import networks
from svcdp.kube.state import Change, State

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
    objects: Iterable[Object],
    service_cidrs: Iterable[str],
    node_ports: tuple[int, int] = NODE_PORTS,
    remembered: Holdings | None = None,
) -> tuple[list[Object], Sequence[SvcdpError]]:
    """All objects, Services completed, and what these go without. ServiceCIDRs among them say
    where cluster IPs are, too.
    """
    found = list(objects)
    services: dict[ServiceRef, Service] = {}
    for each in found:
        if isinstance(each, Service):
            services.setdefault(each.ref, each)
    cidrs = networks(service_cidrs, (each for each in found if isinstance(each, ServiceCIDR)))
    allocator = Allocator(cidrs, node_ports, remembered)
    gone = allocator.holdings.keys() - services.keys()
    complete = allocator.update(services.values(), gone)
    return [
        complete[each.ref] if isinstance(each, Service) and services[each.ref] is each else each
        for each in found
    ], allocator.problems


class AllocatingSource:
    """Another source, whose Services it completes. With a ``path`` they have the same addresses
    the next time: what is new is in that file before anybody hears of it.

    Its ServiceCIDRs are where cluster IPs are, besides ``service_cidrs``. When they change,
    Services keep what is still in range. Raises as :func:`load_allocations`.
    """

    def __init__(
        self,
        source: Source,
        service_cidrs: Iterable[str],
        node_ports: tuple[int, int],
        path: str = "",
    ) -> None:
        self._source = source
        self._service_cidrs = tuple(service_cidrs)
        self._node_ports = node_ports
        self._path = path
        self._state = State()  # of Services and ServiceCIDRs alone
        self._networks: tuple[str, ...] | None = None  # None: nothing was listed yet
        self._allocator = Allocator()
        self._holdings = load_allocations(path) if path else {}
        self._saved: int | None = None  # the revision that is in the file
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

    @property
    def events(self) -> Sequence[Event]:
        """What Services go without, for those who made them."""
        return self._allocator.events

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
            own = tuple(each for each in change.objects if isinstance(each, Service | ServiceCIDR))
            touched |= self._state.apply(0, "", replace(change, objects=own))
        services = self._state.services
        cidrs = networks(self._service_cidrs, self._state.service_cidrs.values())
        if cidrs != self._networks:
            touched |= services.keys() | self._holdings.keys()
            self._move(cidrs)
        present = [services[ref] for ref in touched if ref in services]
        changed = self._allocator.update(present, touched - services.keys())
        complete = self._allocator.complete
        # Of copies in several files another one may count now, which was told of as it is.
        changed |= {each.ref: complete[each.ref] for each in present}
        found = []
        for change in batch:
            objects = [self._complete(change.origin, each) for each in change.objects]
            found.append(replace(change, objects=tuple(objects)))
            for each in objects:
                if isinstance(each, Service) and changed.get(each.ref) is each:
                    del changed[each.ref]
        others = [Change(self._state.origin(each.key), (each,)) for each in changed.values()]
        return [*found, *others]

    def _move(self, cidrs: tuple[str, ...]) -> None:
        """Have cluster IPs in these networks from now on."""
        held = self._holdings
        self._allocator = Allocator(cidrs, self._node_ports, held)
        self._holdings = self._allocator.holdings
        # What is out of range now leaves the file, too.
        is_saved = self._networks is None and self._holdings == held
        self._saved = self._allocator.revision if is_saved else None
        self._networks = cidrs

    def _complete(self, origin: str, each: Object) -> Object:
        if isinstance(each, Service) and origin == self._state.origin(each.key):
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
