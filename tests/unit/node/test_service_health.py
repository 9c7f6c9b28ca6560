"""Health-check node ports: what load balancers hear, and ports that cannot be opened."""

from __future__ import annotations

import asyncio
import socket

import pytest
from probing import free_port, get

from svcdp.kube import NodeContext
from svcdp.kube.events import Event
from svcdp.kube.health import HealthCheck
from svcdp.kube.model import ObjectKey, ServiceRef
from svcdp.node.servicehealth import FAILED, ServiceHealth

# Loopback, in place of the node's own.
NODE = NodeContext(localhost_node_ports=True)
V4, V6 = "127.0.0.1", "::1"
WEB, CART = ServiceRef("shop", "web"), ServiceRef("shop", "cart")


class Desk:
    """A ServiceHealth, what it recorded, and whether the proxy is well."""

    def __init__(self, node: NodeContext = NODE) -> None:
        self.events: list[Event] = []
        self.is_alive = True
        self.ports = ServiceHealth(
            node.node_port_addresses_of, lambda: self.is_alive, self.events.append
        )


@pytest.mark.parametrize(
    ("endpoints", "is_alive", "status"),
    [(2, True, 200), (1, True, 200), (0, True, 503), (2, False, 503), (0, False, 503)],
)
def test_what_load_balancers_hear(endpoints: int, is_alive: bool, status: int) -> None:
    async def main() -> None:
        desk, port = Desk(), free_port()
        desk.is_alive = is_alive
        await desk.ports.update([HealthCheck(WEB, "IPv4", port, endpoints)])
        answer = await get((V4, port), "/any/path")
        await desk.ports.close()
        assert answer.status == status
        assert answer.json == {
            "service": {"namespace": "shop", "name": "web"},
            "localEndpoints": endpoints,
            "serviceProxyHealthy": is_alive,
        }
        assert answer.fields["Content-Type"] == "application/json"
        assert answer.fields["X-Content-Type-Options"] == "nosniff"
        assert answer.fields["X-Load-Balancing-Endpoint-Weight"] == str(endpoints)
        assert desk.events == []

    asyncio.run(main())


def test_after_a_bug_nobody_is_sent_here_until_it_is_known_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        desk, port = Desk(), free_port()
        check = HealthCheck(WEB, "IPv4", port, 1)
        await desk.ports.update([check])
        assert (await get((V4, port))).status == 200
        await desk.ports.update([check._replace(family="IPv5")])  # type: ignore[arg-type]
        assert (await get((V4, port))).status == 503
        assert "trying again" in caplog.text
        await desk.ports.update([check])
        assert (await get((V4, port))).status == 200
        await desk.ports.close()

    asyncio.run(main())


def test_each_family_hears_of_its_own() -> None:
    async def main() -> None:
        desk, port = Desk(), free_port(V6)
        four = HealthCheck(WEB, "IPv4", port, 1)
        six = HealthCheck(WEB, "IPv6", port, 3)
        await desk.ports.update([four, six])
        assert (await get((V4, port))).json["localEndpoints"] == 1
        assert (await get((V6, port))).json["localEndpoints"] == 3
        await desk.ports.update([six._replace(endpoints=0)])
        assert (await get((V6, port))).status == 503
        with pytest.raises(ConnectionRefusedError):
            await get((V4, port))
        await desk.ports.update([])
        with pytest.raises(ConnectionRefusedError):
            await get((V6, port))
        await desk.ports.close()

    asyncio.run(main())


def test_a_port_that_cannot_be_opened_is_an_event() -> None:
    """One event, and another try each time; others are not kept from theirs."""

    async def main() -> None:
        desk, free = Desk(), free_port()
        with socket.create_server((V4, 0)) as other:
            port = other.getsockname()[1]
            checks = [HealthCheck(WEB, "IPv4", port, 1), HealthCheck(CART, "IPv4", free, 1)]
            await desk.ports.update(checks)
            await desk.ports.update(checks)
            assert (await get((V4, free))).status == 200
        await desk.ports.update(checks)
        assert (await get((V4, port))).status == 200
        await desk.ports.close()
        (event,) = desk.events
        assert (event.regarding, event.reason) == (ObjectKey("Service", "shop", "web"), FAILED)
        assert event.type == "Warning"
        assert f"port {port} cannot be opened: {V4}: " in event.message

    asyncio.run(main())


def test_two_services_with_one_port() -> None:
    async def main() -> None:
        desk, port = Desk(), free_port()
        cart, web = HealthCheck(CART, "IPv4", port, 1), HealthCheck(WEB, "IPv4", port, 2)
        await desk.ports.update([cart, web])
        assert (await get((V4, port))).json["service"]["name"] == "cart"
        assert [event.regarding.name for event in desk.events] == ["web"]
        assert "Service shop/cart has it" in desk.events[0].message
        await desk.ports.update([web])
        assert (await get((V4, port))).json["service"]["name"] == "web"
        await desk.ports.close()

    asyncio.run(main())


def test_a_node_without_addresses_opens_nothing() -> None:
    async def main() -> None:
        desk, port = Desk(NodeContext()), free_port()
        await desk.ports.update([HealthCheck(WEB, "IPv4", port, 1)])
        with pytest.raises(ConnectionRefusedError):
            await get((V4, port))
        await desk.ports.close()
        assert desk.events == []

    asyncio.run(main())
