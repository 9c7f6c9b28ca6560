"""Changes of objects in, changed specs out, at a cost that follows the change."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace

from svcdp.errors import ManifestError, SvcdpError
from svcdp.kube.claims import Claims, Key
from svcdp.kube.context import NodeContext
from svcdp.kube.events import Event
from svcdp.kube.health import HealthCheck, LocalEndpoints, is_eligible, is_excluded, local_endpoints
from svcdp.kube.model import ObjectKey, Service, ServiceRef
from svcdp.kube.own import informed
from svcdp.kube.resolve import NOBODY, resolve_node, resolve_service
from svcdp.kube.state import Change, State
from svcdp.types import ServiceSpec

__all__ = ["Tracker"]

log = logging.getLogger(__name__)


class Tracker:
    """What :func:`svcdp.kube.resolve` says, kept up to date.

    Only Services that a change touches are resolved again: all, when what is known of the node
    changes, which its Node and ServiceCIDRs tell where ``node`` does not. Not safe for several
    threads.
    """

    def __init__(self, node: NodeContext) -> None:
        self.node = node
        self._given = node
        #: Changes of Nodes and of ServiceCIDRs that count; None: look, whatever they are.
        self._heard: tuple[int, int] | None = (0, 0)
        self.state = State()
        self.claims = Claims()
        self._new = self.claims.replace(NOBODY, resolve_node(node))
        self._problems: dict[ServiceRef, list[ManifestError]] = {}
        self._local: dict[ServiceRef, LocalEndpoints] = {}  # of those that must know
        #: Services that changes of objects touched, for those who follow them. Theirs to empty.
        self.touched: set[ServiceRef] = set()

    def apply(self, changes: Iterable[tuple[int, str, Change]]) -> set[Key]:
        """Take changes in, each with the rank and name of its source.

        Returns the keys whose spec may be different now: :meth:`spec` knows.
        """
        return set().union(*self.steps(changes))

    def steps(self, changes: Iterable[tuple[int, str, Change]]) -> Iterator[set[Key]]:
        """As :meth:`apply`, Service by Service: who iterates may do something else in between."""
        touched: set[ServiceRef] = set()
        for rank, source, change in changes:
            touched |= self.state.apply(rank, source, change)
        self.touched |= touched
        touched |= self._listen()
        keys, self._new = self._new, set()
        yield keys
        for ref in touched:
            yield self._resolve(ref)

    def renumber(self, addresses: Iterable[str]) -> None:
        """The node has these addresses now, which the next changes take into account. ConfigError
        where one is none.
        """
        self._given = replace(self._given, addresses=addresses)
        self._heard = None

    def spec(self, key: Key) -> ServiceSpec | None:
        """The spec in force for a key; None: nobody's."""
        return self.claims.held(key)

    @property
    def is_eligible(self) -> bool:
        """Whether load balancers may send to this node. Yes where no source ever had its Node."""
        nodes = self.state.nodes
        return self.node.name not in nodes or is_eligible(nodes[self.node.name])

    @property
    def is_excluded(self) -> bool:
        """Whether its Node's label keeps load balancers' addresses from this node."""
        return is_excluded(self.state.nodes.get(self.node.name))

    def _listen(self) -> set[ServiceRef]:
        """Take in what sources say of the node; returns the Services that it matters to."""
        heard = (self.state.changed["Node"], self.state.changed["ServiceCIDR"])
        if heard == self._heard:
            return set()
        self._heard = heard
        own = self.state.nodes.get(self.node.name)
        node = informed(self._given, own, self.state.service_cidrs.values())
        if node == self.node:
            return set()
        self.node = node
        self._new |= self.claims.replace(NOBODY, resolve_node(node))
        return set(self.state.services)

    def take_triggers(self) -> list[str]:
        """Those of :attr:`State.triggers` that are new."""
        taken, self.state.triggers = self.state.triggers, []
        return taken

    def problems(self) -> list[SvcdpError]:
        """What is wrong with the objects now."""
        found: list[SvcdpError] = [*self.state.conflicts()]
        for ref in sorted(self._problems):
            found += self._problems[ref]
        return [*found, *self.claims.conflicts()]

    def events(self) -> list[Event]:
        """What of that those who made the objects should see."""
        found = [
            Event.of(ObjectKey("Service", *ref), _reason(problem), problem)
            for ref, problems in self._problems.items()
            for problem in problems
        ]
        return found + [
            Event(ObjectKey("Service", *ref), "AddressConflict", str(error))
            for ref, error in self.claims.contests()
        ]

    def uid(self, key: ObjectKey) -> str:
        """That of a Service, or of a Node its name, as components report of Nodes."""
        if key.kind == "Node":
            return key.name
        service = self.state.services.get(ServiceRef(key.namespace, key.name))
        return (service and service.metadata.uid) or ""

    def health_checks(self) -> list[HealthCheck]:
        """What health-check node ports have to say; by Service."""
        return [check for _, local in sorted(self._local.items()) for check in local.checks]

    def without_local_endpoints(self) -> tuple[int, int]:
        """How many Services have traffic that must stay on this node and finds nobody here: by
        internal, and by external traffic policy.
        """
        return (
            sum(local.lacks_internal for local in self._local.values()),
            sum(local.lacks_external for local in self._local.values()),
        )

    def _resolve(self, ref: ServiceRef) -> set[Key]:
        service = self.state.services.get(ref)
        self._problems.pop(ref, None)
        self._local.pop(ref, None)
        if service is None:
            return self.claims.replace(ref, ())
        try:
            return self._resolve_service(ref, service)
        except Exception as error:  # a bug; it must not cost other Services their changes
            log.exception("%s: cannot be resolved", service.key)
            self._problems[ref] = [service.problem("spec", f"cannot be resolved: {error!r}")]
            return set()

    def _resolve_service(self, ref: ServiceRef, service: Service) -> set[Key]:
        slices = self.state.slices(ref)
        local = local_endpoints(service, slices, self.node)
        if any(local):
            self._local[ref] = local
        resolved = resolve_service(service, slices, self.node)
        if resolved.problems:
            self._problems[ref] = resolved.problems
        return self.claims.replace(ref, resolved.claims)


def _reason(problem: ManifestError) -> str:
    is_annotation = problem.field.startswith("$.metadata.annotations")
    return "InvalidAnnotation" if is_annotation else "InvalidService"
