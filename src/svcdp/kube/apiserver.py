"""Where objects come from: an API server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping

import msgspec

from svcdp.errors import ManifestError, SvcdpError
from svcdp.kube.assign import decode_pool
from svcdp.kube.decode import decode_json
from svcdp.kube.model import (
    HEADLESS_LABEL,
    PROXY_NAME_LABEL,
    EndpointSlice,
    LoadBalancerPool,
    Node,
    Object,
    ObjectKey,
    Service,
    ServiceCIDR,
)
from svcdp.kube.reflector import (
    ABSENT,
    FORBIDDEN,
    SILENCE,
    ApiError,
    Reflector,
    Requests,
    Resource,
)
from svcdp.kube.state import Change

__all__ = ["POOLS", "ApiServerSource", "explained", "list_pools"]

log = logging.getLogger(__name__)

POOLS = Resource(
    "loadbalancerpools.svcdp.io",
    "LoadBalancerPool",
    "/apis/svcdp.io/v1alpha1/loadbalancerpools",
    decode_pool,
)


class _Items(msgspec.Struct):
    items: list[msgspec.Raw]


async def list_pools(client: Requests) -> list[LoadBalancerPool]:
    """Those of an API server that can be read, by name. ApiError."""
    try:
        found = msgspec.json.decode(await client.get(POOLS.path, {}), type=_Items)
        pools = [decode_pool(bytes(item)).pool for item in found.items]
    except ApiError as error:
        text = explained(error, f"cannot list {POOLS.name}: ")
        if error.status == FORBIDDEN:
            text += f" (grant the verb list on {POOLS.name})"
        raise ApiError(text, status=error.status) from error
    except (msgspec.MsgspecError, ManifestError) as error:
        raise ApiError(f"{client.url}: this is no API server's answer: {error}") from None
    return sorted(filter(None, pools), key=lambda each: each.key)


def explained(error: SvcdpError, what: str = "") -> str:
    """What is wrong, and if it is that there are no LoadBalancerPools at all, what to do."""
    text = f"{what}{error}"
    if isinstance(error, ApiError) and error.status == ABSENT and POOLS.name in text:
        text += " (install its CustomResourceDefinition, deploy/loadbalancerpools.yaml)"
    return text


class ApiServerSource:
    """The Services and EndpointSlices of all namespaces, ServiceCIDRs, and the Node called
    ``node_name`` ("": none), followed.

    With a ``service_proxy_name`` those that a label gives to the proxy of that name, else those
    without such a label: a label that comes or goes is a change. ServiceCIDRs are then not asked
    for, nor missed where the server has none or does not tell. ``hidden`` ones, that no proxy or
    another one serves, come too if asked for: they have names, and :func:`svcdp.kube.resolve`
    leaves them out.

    ``client`` is a :class:`svcdp.kube.client.Client`; it is not closed. Between two batches of
    changes are at least ``min_period`` seconds; in a batch is only what became of each object.
    ``retry``: first and longest wait after an error, in seconds. ``silence``: seconds without
    a word of the server after which it is asked anew.
    What cannot be reached does not end :meth:`changes`: it is one of :attr:`errors`.
    """

    def __init__(
        self,
        client: Requests,
        name: str = "",
        *,
        node_name: str = "",
        service_proxy_name: str = "",
        hidden: bool = False,
        min_period: float = 1.0,
        retry: tuple[float, float] = (0.5, 30.0),
        silence: float = SILENCE,
        page: int = 500,
    ) -> None:
        self.name = name or client.url
        self._min_period = min_period
        self._pending: dict[ObjectKey, Object | None] = {}
        self._wake = asyncio.Event()

        def reflect(resource: Resource[Object]) -> Reflector[Object]:
            return Reflector(
                client,
                resource,
                self._take,
                self._wake.set,
                retry=retry,
                silence=silence,
                page=page,
            )

        named = f"!{PROXY_NAME_LABEL}"
        if service_proxy_name:
            named = f"{PROXY_NAME_LABEL}={service_proxy_name}"
        visible = {} if hidden else {"labelSelector": f"{named},!{HEADLESS_LABEL}"}
        resources: list[Resource[Object]] = [
            Resource("services", "Service", "/api/v1/services", _service, visible),
            Resource(
                "endpointslices.discovery.k8s.io",
                "EndpointSlice",
                "/apis/discovery.k8s.io/v1/endpointslices",
                _slice,
                visible,
            ),
        ]
        if node_name:
            own = {"fieldSelector": f"metadata.name={node_name}"}
            resources.append(Resource("nodes", "Node", "/api/v1/nodes", _node, own))
        if not service_proxy_name:
            resources.append(
                Resource(
                    "servicecidrs.networking.k8s.io",
                    "ServiceCIDR",
                    "/apis/networking.k8s.io/v1/servicecidrs",
                    _service_cidr,
                    optional=True,
                )
            )
        self._reflectors = tuple(map(reflect, resources))

    @property
    def errors(self) -> tuple[SvcdpError, ...]:
        """What is wrong now."""
        return tuple(error for each in self._reflectors for error in each.errors)

    async def changes(self) -> AsyncIterator[list[Change]]:
        """First everything, as soon as all was listed, then what changes, for ever.

        A batch is empty when only :attr:`errors` changed.
        """
        tasks = [asyncio.create_task(each.run()) for each in self._reflectors]
        for task in tasks:
            task.add_done_callback(lambda _: self._wake.set())
        try:
            async for batch in self._batches(tasks):
                yield batch
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _batches(self, tasks: list[asyncio.Task[None]]) -> AsyncIterator[list[Change]]:
        told: tuple[str, ...] = ()
        started = False
        while True:
            await self._wake.wait()
            self._wake.clear()
            for task in tasks:
                if task.done():
                    task.result()  # raises what ended it: a bug
            errors = tuple(map(str, self.errors))
            if not all(each.listed for each in self._reflectors):
                # Nobody is told before the first batch: these words are for the log.
                for text in errors:
                    if text not in told:
                        log.warning("%s", text)
                told = errors
                continue
            if not self._pending and errors == told and started:
                continue
            told, started = errors, True
            yield self._batch()
            await asyncio.sleep(self._min_period)

    def _batch(self) -> list[Change]:
        pending, self._pending = self._pending, {}
        if not pending:
            return []
        gone = tuple(key for key, found in pending.items() if found is None)
        return [Change(objects=tuple(filter(None, pending.values())), deleted=gone)]

    def _take(self, changed: Mapping[ObjectKey, Object | None]) -> None:
        self._pending.update(changed)
        self._wake.set()


def _service(data: bytes) -> Service:
    return decode_json(data, Service)


def _slice(data: bytes) -> EndpointSlice:
    return decode_json(data, EndpointSlice)


def _node(data: bytes) -> Node:
    return decode_json(data, Node)


def _service_cidr(data: bytes) -> ServiceCIDR:
    return decode_json(data, ServiceCIDR)
