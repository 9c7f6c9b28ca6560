"""Who holds a virtual address, port and protocol when several Services want it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from svcdp.errors import ConflictError
from svcdp.kube.model import ServiceRef
from svcdp.types import ServiceSpec

__all__ = ["Claim", "Claims", "Key"]

Key = tuple[str, int, str]
"""Address, port, protocol: :attr:`svcdp.ServiceSpec.key`."""

_NEVER = "~"  # sorts behind every timestamp


class Claim(NamedTuple):
    """A spec that a Service wants to be in force.

    Claims are ordered by who goes first: the map of service addresses is consulted before
    node ports (kube-proxy's dispatch), then the older Service, then its namespace and name.
    """

    node_port: bool
    created: str
    owner: ServiceRef
    spec: ServiceSpec

    @classmethod
    def of(
        cls, owner: ServiceRef, created: str | None, spec: ServiceSpec, node_port: bool
    ) -> Claim:
        """A claim; ``created`` is the Service's creationTimestamp, if it has one."""
        return cls(node_port, created or _NEVER, owner, spec)

    @property
    def rank(self) -> tuple[bool, str, ServiceRef]:
        """The lowest goes first."""
        return self[:3]


class Claims:
    """All claims; of those for one key the first holds it, and the next when that one goes."""

    def __init__(self) -> None:
        self._by_key: dict[Key, list[Claim]] = {}  # sorted by rank
        self._by_owner: dict[ServiceRef, tuple[Claim, ...]] = {}
        self._contested: set[Key] = set()

    def replace(self, owner: ServiceRef, claims: Iterable[Claim]) -> set[Key]:
        """From now on these are all claims of a Service; returns the keys to look at again."""
        new = tuple(claims)
        old = self._by_owner.pop(owner, ())
        keys = {claim.spec.key for claim in (*old, *new)}
        for key in {claim.spec.key for claim in old}:
            rest = [claim for claim in self._by_key.pop(key) if claim.owner != owner]
            if rest:
                self._by_key[key] = rest
        for claim in new:
            candidates = self._by_key.setdefault(claim.spec.key, [])
            candidates.append(claim)
            candidates.sort(key=lambda claim: claim.rank)  # stable: a Service's own in order
        if new:
            self._by_owner[owner] = new
        for key in keys:
            if len(self._by_key.get(key, ())) > 1:
                self._contested.add(key)
            else:
                self._contested.discard(key)
        return keys

    def held(self, key: Key) -> ServiceSpec | None:
        """The spec in force for a key."""
        candidates = self._by_key.get(key)
        return candidates[0].spec if candidates else None

    def held_by(self, owner: ServiceRef) -> tuple[ServiceSpec, ...]:
        """The specs of one Service that are in force."""
        return tuple(
            claim.spec
            for claim in self._by_owner.get(owner, ())
            if self._by_key[claim.spec.key][0] is claim
        )

    def __iter__(self) -> Iterator[ServiceSpec]:
        """All specs in force, in the order in which their keys were first claimed."""
        return (candidates[0].spec for candidates in self._by_key.values())

    def __len__(self) -> int:
        return len(self._by_key)

    def conflicts(self) -> list[ConflictError]:
        """Claims that are not in force, and who is in their way."""
        return [error for _, error in self.contests()]

    def contests(self) -> list[tuple[ServiceRef, ConflictError]]:
        """As :meth:`conflicts`, each with who goes without."""
        errors = []
        for key in sorted(self._contested):
            if key[2] == "any":
                continue  # the ports are contested too, or they are of one mind
            first, *others = self._by_key[key]
            address, port, protocol = key
            where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
            errors += [
                (
                    other.owner,
                    ConflictError(
                        f"{protocol} {where} is held by {_title(first)};"
                        f" {_title(other)} goes without"
                    ),
                )
                for other in others
            ]
        return errors


def _title(claim: Claim) -> str:
    return f"Service {claim.spec.name}" + (" (node port)" if claim.node_port else "")
