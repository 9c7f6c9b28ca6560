"""Changes that take effect together, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from operator import is_
from types import TracebackType
from typing import TYPE_CHECKING, Any

from svcdp._core.engine import Destination as Handle
from svcdp.abc import Scheduler
from svcdp.errors import ConfigError, ConflictError, NotFoundError
from svcdp.records import (
    Endpoint,
    Key,
    Record,
    Subset,
    check_address,
    check_destination,
    check_destinations,
    check_key,
    check_service,
)
from svcdp.types import DestinationSpec, ServiceSpec

if TYPE_CHECKING:
    from svcdp.dataplane import Dataplane

__all__ = ["Transaction", "VirtualService"]


@dataclass(slots=True)
class Installed:
    """A service in force. ``handles`` in the order in which destinations were added, and
    ``subsets`` of them for each of its rules.
    """

    spec: ServiceSpec
    handles: dict[Endpoint, Handle]
    subsets: tuple[Subset, ...]
    scheduler: Scheduler | None
    record: Record


def subset_edits(
    state: Installed, base: Installed | None
) -> list[list[tuple[str, int, int]] | None]:
    """The steps from what the rules of a service were to what they are, by id. None: it is new."""
    if base is None:
        return [None] * len(state.subsets)
    former = base.subsets[: len(state.subsets)]
    return [
        _steps(state, after, base, before) for after, before in zip_longest(state.subsets, former)
    ]


def _steps(
    state: Installed, after: Subset, base: Installed, before: Subset
) -> list[tuple[str, int, int]]:
    if not after and not before:
        return []
    former = dict(_weights(base, before))
    weights = dict(_weights(state, after))
    steps = [("remove", id, 0) for id in former if id not in weights]
    for id, weight in weights.items():
        if id not in former:
            steps.append(("add", id, weight))
        elif weight != former[id]:
            steps.append(("edit", id, weight))
    return steps


def _weights(state: Installed, subset: Subset) -> Iterator[tuple[int, int]]:
    """(id, weight) of each, in this order."""
    weights = {(member.address, member.port): member.weight for member in state.spec.destinations}
    for endpoint in subset or ():
        yield state.handles[endpoint].id, weights[endpoint]


class VirtualService:
    """A service inside a transaction. What is done to it takes effect at the commit."""

    def __init__(self, spec: ServiceSpec, base: Installed | None) -> None:
        self._base = base
        self._spec = spec
        self._members: dict[Endpoint, DestinationSpec] = {}
        self._edits: list[tuple[str, Endpoint, int]] = []
        if base is not None:
            for member in base.spec.destinations:
                self._members[member.address, member.port] = member

    @property
    def spec(self) -> ServiceSpec:
        """The service as it will be."""
        members = tuple(self._members.values())
        known = self._spec.destinations
        if type(known) is tuple and len(known) == len(members) and all(map(is_, known, members)):
            return self._spec
        return replace(self._spec, destinations=members)

    def add(
        self, address: str, port: int, weight: int = 1, method: str = "masq", **fields: Any
    ) -> None:
        """Add a destination. ConflictError when the service has it already.

        ``fields`` are the others of :class:`svcdp.DestinationSpec`. ConfigError.
        """
        try:
            spec = DestinationSpec(address, port, weight, method, **fields)
        except TypeError as error:
            raise ConfigError(f"{self._spec}: destination {address}: {error}") from None
        member = check_destination(spec, self._spec)
        endpoint = (member.address, member.port)
        if endpoint in self._members:
            raise ConflictError(f"{self._spec} already has a destination {address}:{port}")
        self._insert(endpoint, member)

    def update(self, address: str, port: int, **fields: Any) -> None:
        """Change fields of a destination; it keeps its place and its connections. Weight 0
        gives it no new ones. NotFoundError, ConfigError.
        """
        endpoint = self._endpoint(address, port)
        if not fields.keys() <= {"weight", "method", "upper", "lower", "tunnel", "mtu", "mark"}:
            raise ConfigError(f"{self._spec}: destination {address}: unknown in {[*fields]}")
        changed = check_destination(replace(self._members[endpoint], **fields), self._spec)
        self._edit(endpoint, changed)

    def remove(self, address: str, port: int) -> None:
        """Remove a destination. What becomes of its connections is said by the service's
        ``on_removal``. NotFoundError.
        """
        endpoint = self._endpoint(address, port)
        del self._members[endpoint]
        self._edits.append(("remove", endpoint, 0))

    def _insert(self, endpoint: Endpoint, member: DestinationSpec) -> None:
        self._members[endpoint] = member
        self._edits.append(("add", endpoint, member.weight))

    def _edit(self, endpoint: Endpoint, member: DestinationSpec) -> None:
        self._members[endpoint] = member
        self._edits.append(("edit", endpoint, member.weight))

    def _endpoint(self, address: str, port: int) -> Endpoint:
        endpoint = (check_address(address, f"{self._spec}: destination").text, port)
        if endpoint not in self._members:
            raise NotFoundError(f"{self._spec} has no destination {address}:{port}")
        return endpoint

    def _become(self, members: Sequence[DestinationSpec]) -> None:
        """Have exactly these destinations, and keep what is there."""
        wanted = check_destinations(members, self._spec)
        if not self._members:
            self._members = wanted
            self._edits += [("add", endpoint, each.weight) for endpoint, each in wanted.items()]
            return
        for endpoint in [*self._members]:
            if endpoint not in wanted:
                self.remove(*endpoint)
        for endpoint, member in wanted.items():
            have = self._members.get(endpoint)
            if have is None:
                self._insert(endpoint, member)
            elif have != member:
                self._edit(endpoint, member)


class Transaction:
    """Changes that take effect together at the end of the ``with`` block, or not at all."""

    def __init__(self, dataplane: Dataplane) -> None:
        self._dataplane = dataplane
        self._services: dict[Key, VirtualService | None] = {}
        self._bases: dict[Key, Installed | None] = {}

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._dataplane._commit(self._services, self._bases)

    def service(
        self, address: str, port: int, protocol: str = "tcp", **fields: Any
    ) -> VirtualService:
        """Create a service, or edit the one that is there: it keeps what is not named.

        ``fields`` are those of :class:`svcdp.ServiceSpec`, for example ``scheduler`` or
        ``persistence``. ConfigError.
        """
        key = check_key(address, port, protocol)
        staged = self._stage(key)
        try:
            spec = (
                replace(staged._spec, **fields)
                if staged is not None
                else ServiceSpec(*key, **fields)
            )
        except TypeError as error:
            raise ConfigError(f"service {address}: {error}") from None
        check_service(spec)
        if staged is None:
            # Removed earlier in this transaction or never there: it starts without destinations.
            staged = VirtualService(spec, self._bases[key])
            for endpoint in [*staged._members]:
                staged.remove(*endpoint)
        if "destinations" in fields:
            staged._become(spec.destinations)
        # Last: who catches an error here and goes on commits nothing of it.
        staged._spec = spec
        self._services[key] = staged
        return staged

    def remove_service(self, address: str, port: int, protocol: str = "tcp") -> None:
        """Remove a service. What becomes of its connections is said by its ``on_removal``.
        NotFoundError.
        """
        key = check_key(address, port, protocol)
        if self._stage(key) is None:
            raise NotFoundError(f"no service {address}:{port}/{protocol}")
        self._services[key] = None

    def _stage(self, key: Key) -> VirtualService | None:
        if key not in self._services:
            base = self._dataplane._installed.get(key)
            self._bases[key] = base
            self._services[key] = None if base is None else VirtualService(base.spec, base)
        return self._services[key]
