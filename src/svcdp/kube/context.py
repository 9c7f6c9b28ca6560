"""What ``resolve`` must know of the node it resolves for."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from svcdp.errors import ConfigError, ManifestError
from svcdp.kube.model import IPFamily, family_of, parse_address
from svcdp.types import ForwardMethod

__all__ = ["SCHEDULERS", "NodeContext"]

SCHEDULERS = frozenset(
    "rr wrr lc wlc sed nq fo ovf dh sh mh lblc lblcr twos random".split()  # noqa: SIM905
)
_FAMILIES: tuple[IPFamily, IPFamily] = ("IPv4", "IPv6")
_LOOPBACK: dict[IPFamily, str] = {"IPv4": "127.0.0.1", "IPv6": "::1"}
_LOOPBACK_NETWORK: dict[IPFamily, str] = {"IPv4": "127.0.0.0/8", "IPv6": "::1/128"}
_DETECT_LOCAL = ("ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix")
POD_MARK = 0x00080000
"""The mark bit of packets from Pods' interfaces, if nothing else is said."""


@dataclass(frozen=True)
class NodeContext:
    """A node, as far as it matters to Services. A bad value raises ConfigError.

    ``addresses`` are all addresses of the node and ``primary_addresses`` the one of each
    family that it is known by (of a family that they lack, the first of ``addresses``).
    Traffic that does not come from ``pod_cidrs`` is masqueraded on its way to a cluster IP;
    where a family has none, nothing is. ``detect_local`` tells what these CIDRs are: of all Pods
    (``ClusterCIDR``) or of this node's (``NodeCIDR``). With ``BridgeInterface`` and
    ``InterfaceNamePrefix`` Pods of this node are told by the interface that their packets come in
    by, whatever their address: somebody puts the bit ``pod_mark`` into the firewall mark of these.
    ``service_cidrs`` are where cluster IPs are: what no Service has there is turned away. Without
    them it passes. With a ``service_proxy_name`` only Services whose label
    ``service.kubernetes.io/service-proxy-name`` has this value count, else those without it.
    ``node_port_addresses`` are CIDRs whose addresses of this node serve node ports. A family
    of which they hold none is not restricted; no CIDRs at all or the word ``primary`` mean
    the primary addresses (kube-proxy's nftables mode). Loopback serves them only with
    ``localhost_node_ports``.
    ``scheduler`` is that of Services whose annotations name none; ``schedulers`` and ``methods``
    are the values that annotations may have.
    """

    name: str = ""
    addresses: Iterable[str] = ()
    primary_addresses: Iterable[str] | None = None
    zone: str = ""
    pod_cidrs: Iterable[str] = ()
    detect_local: Literal["ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"] = (
        "ClusterCIDR"
    )
    pod_mark: int = POD_MARK
    node_port_addresses: Iterable[str] = ()
    localhost_node_ports: bool = False
    masquerade_all: bool = False
    service_cidrs: Iterable[str] = ()
    service_proxy_name: str = ""
    scheduler: str = "rr"
    schedulers: Iterable[str] = SCHEDULERS
    methods: Iterable[str] = frozenset((ForwardMethod.MASQ, ForwardMethod.TUNNEL, ForwardMethod.DR))

    def __post_init__(self) -> None:
        if self.detect_local not in _DETECT_LOCAL:
            raise ConfigError(
                f"detect_local is {self.detect_local!r}; it must be one of"
                f" {', '.join(_DETECT_LOCAL)}"
            )
        self._set("addresses", _addresses("addresses", self.addresses))
        if self.primary_addresses is not None:
            primary = _addresses("primary_addresses", self.primary_addresses)
            if len({family_of(address) for address in primary}) != len(primary):
                raise ConfigError("primary_addresses has two addresses of one family")
            self._set("primary_addresses", primary)
        self._set("pod_cidrs", _cidrs("pod_cidrs", self.pod_cidrs))
        self._set("service_cidrs", _cidrs("service_cidrs", self.service_cidrs))
        words = _texts("node_port_addresses", self.node_port_addresses)
        if "primary" in words and len(words) > 1:
            raise ConfigError("node_port_addresses: 'primary' must stand alone")
        if words != ("primary",):
            words = _cidrs("node_port_addresses", words)
        self._set("node_port_addresses", words)
        self._set("schedulers", frozenset(_texts("schedulers", self.schedulers)))
        if self.scheduler not in self.schedulers:
            known = ", ".join(sorted(self.schedulers))
            raise ConfigError(f"scheduler {self.scheduler!r} is none of {known}")
        self._set("methods", frozenset(_texts("methods", self.methods)))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def primary_address(self, family: IPFamily) -> str | None:
        """The address of this family that the node is known by."""
        return self._primary.get(family)

    def pod_cidrs_of(self, family: IPFamily) -> tuple[str, ...]:
        """Those of ``pod_cidrs`` that are of this family."""
        return tuple(cidr for cidr in self.pod_cidrs if family_of(cidr) == family)

    @property
    def marks_pods(self) -> bool:
        """Whether Pods are told by a mark, not by their address."""
        return self.detect_local in ("BridgeInterface", "InterfaceNamePrefix")

    def own_networks_of(self, family: IPFamily) -> tuple[str, ...]:
        """Where packets of this family come from that the node itself sends."""
        own = (address for address in self.addresses if family_of(address) == family)
        return (_LOOPBACK_NETWORK[family], *own)

    def node_port_addresses_of(self, family: IPFamily) -> tuple[str, ...]:
        """The addresses of this family on which node ports are served."""
        return self._node_ports[family]

    @cached_property
    def _primary(self) -> dict[IPFamily, str]:
        others = (address for address in self.addresses if not _is_loopback(address))
        primary: dict[IPFamily, str] = {}
        for address in (*(self.primary_addresses or ()), *others):
            primary.setdefault(family_of(address), address)
        return primary

    @cached_property
    def _node_ports(self) -> dict[IPFamily, tuple[str, ...]]:
        return {family: self._serving_node_ports(family) for family in _FAMILIES}

    def _serving_node_ports(self, family: IPFamily) -> tuple[str, ...]:
        words = tuple(self.node_port_addresses)
        if not words or words == ("primary",):
            primary = self.primary_address(family)
            found = [primary] if primary else []
        else:
            networks = [ipaddress.ip_network(word) for word in words if family_of(word) == family]
            found = [
                address
                for address in self.addresses
                if family_of(address) == family
                and not _is_loopback(address)
                and (not networks or any(_parse(address) in network for network in networks))
            ]
        if self.localhost_node_ports:
            found.append(_LOOPBACK[family])
        return tuple(dict.fromkeys(found))


_parse = ipaddress.ip_address


def _is_loopback(address: str) -> bool:
    return _parse(address).is_loopback


def _texts(field: str, values: Iterable[str]) -> tuple[str, ...]:
    if isinstance(values, str):
        raise ConfigError(f"{field} must be a list, not the text {values!r}")
    return tuple(map(str, values))


def _addresses(field: str, values: Iterable[str]) -> tuple[str, ...]:
    try:
        return tuple(parse_address(text) for text in _texts(field, values))
    except ManifestError as error:
        raise ConfigError(f"{field}: {error.message}") from None


def _cidrs(field: str, values: Iterable[str]) -> tuple[str, ...]:
    try:
        return tuple(
            str(ipaddress.ip_network(text, strict=False)) for text in _texts(field, values)
        )
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from None
