"""Kubernetes objects as frozen records that hold only what a Service proxy reads.

Fields are those of the API (``core/v1`` Service, ``discovery.k8s.io/v1`` EndpointSlice)
in Python's spelling. Where the API server writes ``null`` (Go's nil slice), so may
these: None means absent.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Annotated, Literal, NamedTuple

import msgspec

from svcdp.errors import ManifestError

__all__ = [
    "Endpoint",
    "EndpointConditions",
    "EndpointHints",
    "EndpointPort",
    "EndpointSlice",
    "LoadBalancerPool",
    "Node",
    "NodeAddress",
    "Object",
    "ObjectKey",
    "ObjectMeta",
    "Pod",
    "Service",
    "ServiceCIDR",
    "ServicePort",
    "ServiceRef",
    "parse_address",
    "parse_cidr",
]

SERVICE_NAME_LABEL = "kubernetes.io/service-name"
# Objects with one of these labels, whatever its value, are for somebody else's proxy, unless the
# first one names this proxy.
PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
HEADLESS_LABEL = "service.kubernetes.io/headless"
ZONE_LABEL = "topology.kubernetes.io/zone"

# \Z, since $ lets a newline follow.
_SUBDOMAIN = msgspec.Meta(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?\Z", max_length=253)
_LABEL_OR_EMPTY = msgspec.Meta(pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?\Z", max_length=63)

# What the API admits and DNS can say (RFC 1035, 2.3.1), with the dot at the end or without.
_EXTERNAL_NAME = msgspec.Meta(
    pattern=r"^([A-Za-z0-9_]([-A-Za-z0-9_]{0,61}[A-Za-z0-9_])?(\.|\Z))*\Z", max_length=253
)

Name = Annotated[str, _SUBDOMAIN]
PortName = Annotated[str, _LABEL_OR_EMPTY]
PortNumber = Annotated[int, msgspec.Meta(ge=1, le=65535)]
OptionalPortNumber = Annotated[int, msgspec.Meta(ge=0, le=65535)]
TransportProtocol = Literal["TCP", "UDP", "SCTP"]
IPFamily = Literal["IPv4", "IPv6"]


class ServiceRef(NamedTuple):
    """What identifies a Service, and what its EndpointSlices name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class ObjectKey(NamedTuple):
    """What identifies an object."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.namespace}/{self.name}"
            if self.namespace
            else f"{self.kind} {self.name}"
        )


class _Record(msgspec.Struct, frozen=True, rename="camel", gc=False):
    """Plain data without cycles: the garbage collector need not look at it."""


class ObjectMeta(_Record, frozen=True):
    """``creation_timestamp`` is RFC 3339 text in UTC, so it sorts as text."""

    name: Name
    namespace: Name | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    finalizers: tuple[str, ...] | None = None
    uid: str | None = None

    @property
    def zone(self) -> str:
        """Where labels say that a Node, or a Pod, is; "": they do not."""
        return (self.labels or {}).get(ZONE_LABEL, "")

    def hidden_from(self, proxy_name: str) -> bool:
        """Whether labels make the object invisible to the proxy of that name ("": the default
        one).
        """
        labels = self.labels or {}
        if HEADLESS_LABEL in labels:
            return True
        return labels.get(PROXY_NAME_LABEL) != (proxy_name or None)


class ServicePort(_Record, frozen=True):
    """One port of a Service. ``target_port``, a number or a name, is for those who make slices:
    a proxy goes by the numbers in these. ``app_protocol`` is shown only.
    """

    port: PortNumber
    name: PortName | None = None
    protocol: TransportProtocol | None = None
    target_port: OptionalPortNumber | str | None = None
    node_port: OptionalPortNumber | None = None
    app_protocol: str | None = None


class ClientIPConfig(_Record, frozen=True):
    """``timeout_seconds``: how long a client stays with its endpoint."""

    timeout_seconds: Annotated[int, msgspec.Meta(ge=1, le=86400)] | None = None


class SessionAffinityConfig(_Record, frozen=True):
    """Settings of session affinity."""

    client_ip: ClientIPConfig | None = msgspec.field(name="clientIP", default=None)


class LoadBalancerIngress(_Record, frozen=True, omit_defaults=True):
    """One address of a load balancer, or a name that it has instead (``hostname``).

    ``ip_mode`` Proxy: its packets come with another address.
    """

    ip: str | None = None
    hostname: str | None = None
    ip_mode: Literal["VIP", "Proxy"] | None = None


class LoadBalancerStatus(_Record, frozen=True):
    """Where a load balancer takes traffic for a Service."""

    ingress: tuple[LoadBalancerIngress, ...] | None = None


class ServiceStatus(_Record, frozen=True):
    """What has become of a Service."""

    load_balancer: LoadBalancerStatus | None = None


class ServiceSpec(_Record, frozen=True):
    """The wish in a Service; not to be confused with :class:`svcdp.ServiceSpec`."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"] | None = None
    cluster_ip: str | None = msgspec.field(name="clusterIP", default=None)
    cluster_ips: tuple[str, ...] | None = msgspec.field(name="clusterIPs", default=None)
    ip_families: tuple[IPFamily, ...] | None = None
    ip_family_policy: Literal["SingleStack", "PreferDualStack", "RequireDualStack"] | None = None
    allocate_load_balancer_node_ports: bool | None = None
    ports: tuple[ServicePort, ...] | None = None
    selector: dict[str, str] | None = None
    publish_not_ready_addresses: bool | None = None
    session_affinity: Literal["None", "ClientIP", ""] | None = None
    session_affinity_config: SessionAffinityConfig | None = None
    external_ips: tuple[str, ...] | None = msgspec.field(name="externalIPs", default=None)
    external_name: Annotated[str, _EXTERNAL_NAME] | None = None
    internal_traffic_policy: Literal["Cluster", "Local", ""] | None = None
    external_traffic_policy: Literal["Cluster", "Local", ""] | None = None
    health_check_node_port: OptionalPortNumber | None = None
    load_balancer_ip: str | None = msgspec.field(name="loadBalancerIP", default=None)
    load_balancer_class: str | None = None
    load_balancer_source_ranges: tuple[str, ...] | None = None
    traffic_distribution: str | None = None

    @property
    def keeps_external_traffic(self) -> bool:
        """Whether traffic from outside stays on the node (kube-proxy's ``ExternalPolicyLocal``): by
        its policy, if it has an address or a port of its own for outside.
        """
        is_outside = self.type in ("NodePort", "LoadBalancer") or bool(self.external_ips)
        return is_outside and self.external_traffic_policy == "Local"


class Service(_Record, frozen=True):
    """A ``v1`` Service."""

    metadata: ObjectMeta
    spec: ServiceSpec
    status: ServiceStatus | None = None

    @property
    def key(self) -> ObjectKey:
        """What identifies it among all objects."""
        return ObjectKey("Service", *self.ref)

    @property
    def ref(self) -> ServiceRef:
        """What identifies it among Services."""
        return ServiceRef(self.metadata.namespace or "default", self.metadata.name)

    def problem(self, field: str, message: str) -> ManifestError:
        """What is wrong with it; ``field`` is a path such as ``spec.clusterIP``."""
        return ManifestError(message, field=f"$.{field}", object=str(self.key))


class EndpointConditions(_Record, frozen=True):
    """None means ready, serving and not terminating."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class ObjectReference(_Record, frozen=True):
    """What an endpoint stands for: in a cluster, a Pod."""

    name: str | None = None


class Hint(_Record, frozen=True):
    """The name of a zone or node."""

    name: str


class EndpointHints(_Record, frozen=True):
    """Whose clients an endpoint should serve."""

    for_zones: tuple[Hint, ...] | None = None
    for_nodes: tuple[Hint, ...] | None = None


class Endpoint(_Record, frozen=True):
    """One endpoint of a slice. Only ``addresses[0]`` counts; the API reserves the rest.

    ``hostname`` is its own name below a headless Service's.
    """

    addresses: tuple[str, ...]
    hostname: Annotated[str, _LABEL_OR_EMPTY] | None = None
    conditions: EndpointConditions | None = None
    node_name: str | None = None
    hints: EndpointHints | None = None
    target_ref: ObjectReference | None = None


class EndpointPort(_Record, frozen=True):
    """One port of a slice; without name or number it does not count."""

    name: PortName | None = None
    port: OptionalPortNumber | None = None
    protocol: TransportProtocol | None = None


class EndpointSlice(_Record, frozen=True):
    """A ``discovery.k8s.io/v1`` EndpointSlice."""

    metadata: ObjectMeta
    address_type: Literal["IPv4", "IPv6", "FQDN"]
    endpoints: tuple[Endpoint, ...] | None = None
    ports: tuple[EndpointPort, ...] | None = None

    @property
    def key(self) -> ObjectKey:
        """What identifies it among all objects."""
        namespace = self.metadata.namespace or "default"
        return ObjectKey("EndpointSlice", namespace, self.metadata.name)

    @property
    def ref(self) -> ServiceRef | None:
        """The Service it belongs to; None: to nobody."""
        name = (self.metadata.labels or {}).get(SERVICE_NAME_LABEL)
        return ServiceRef(self.metadata.namespace or "default", name) if name else None


class ContainerPort(_Record, frozen=True):
    """A port that a container listens on. Services may mean it by its name."""

    container_port: PortNumber
    name: PortName | None = None
    protocol: TransportProtocol | None = None


class Container(_Record, frozen=True):
    """``restart_policy`` Always makes an init container a sidecar (KEP-753)."""

    ports: tuple[ContainerPort, ...] | None = None
    restart_policy: str | None = None


class PodSpec(_Record, frozen=True):
    """What runs in a Pod, and where. With a ``subdomain`` that is a headless Service's name, its
    ``hostname`` is a name below that.
    """

    containers: tuple[Container, ...] | None = None
    init_containers: tuple[Container, ...] | None = None
    node_name: str | None = None
    hostname: Annotated[str, _LABEL_OR_EMPTY] | None = None
    subdomain: str | None = None
    enable_service_links: bool | None = None


class PodCondition(_Record, frozen=True):
    """One thing known of a Pod, such as ``Ready``."""

    type: str
    status: Literal["True", "False", "Unknown"]


class PodIP(_Record, frozen=True):
    """One address of a Pod."""

    ip: str | None = None


class PodStatus(_Record, frozen=True):
    """What has become of a Pod. Its addresses are at most one of each IP family."""

    phase: Literal["Pending", "Running", "Succeeded", "Failed", "Unknown"] | None = None
    conditions: tuple[PodCondition, ...] | None = None
    pod_ip: str | None = msgspec.field(name="podIP", default=None)
    pod_ips: tuple[PodIP, ...] | None = msgspec.field(name="podIPs", default=None)


class Pod(_Record, frozen=True):
    """A ``v1`` Pod, as far as it is an endpoint of Services."""

    metadata: ObjectMeta
    spec: PodSpec | None = None
    status: PodStatus | None = None

    @property
    def key(self) -> ObjectKey:
        """What identifies it among all objects."""
        return ObjectKey("Pod", self.metadata.namespace or "default", self.metadata.name)

    @property
    def ref(self) -> None:
        """It belongs to no one Service: several may select it."""
        return None

    @property
    def addresses(self) -> list[str]:
        """One of each family at most: the first."""
        if self.status is None:
            return []
        texts = [each.ip for each in self.status.pod_ips or ()] or [self.status.pod_ip]
        first: dict[IPFamily, str] = {}
        for address in (parse_address(text) for text in texts if text):
            first.setdefault(family_of(address), address)
        return list(first.values())

    @property
    def has_ended(self) -> bool:
        """Whether it will never serve again."""
        return self.status is not None and self.status.phase in ("Succeeded", "Failed")

    @property
    def is_ready(self) -> bool:
        """Its condition Ready; yes without one: nobody probes it."""
        conditions = (self.status and self.status.conditions) or ()
        ready = [each.status for each in conditions if each.type == "Ready"]
        return not ready or ready[0] == "True"

    @property
    def wants_service_links(self) -> bool:
        """Whether its containers are told of Services by environment variables."""
        return self.spec is None or self.spec.enable_service_links is not False

    @property
    def containers(self) -> tuple[Container, ...]:
        """Those that run as long as the Pod: sidecars too."""
        if self.spec is None:
            return ()
        sidecars = [
            each for each in self.spec.init_containers or () if each.restart_policy == "Always"
        ]
        return (*(self.spec.containers or ()), *sidecars)


class Taint(_Record, frozen=True):
    """What keeps Pods off a node, or says what becomes of it."""

    key: str


class NodeSpec(_Record, frozen=True):
    """What is wanted of a node."""

    taints: tuple[Taint, ...] | None = None
    pod_cidr: str | None = msgspec.field(name="podCIDR", default=None)
    pod_cidrs: tuple[str, ...] | None = msgspec.field(name="podCIDRs", default=None)


class NodeAddress(_Record, frozen=True):
    """One way to reach a node: ``InternalIP``, ``ExternalIP``, ``Hostname``..."""

    type: str
    address: str


class NodeStatus(_Record, frozen=True):
    """What has become of a node."""

    addresses: tuple[NodeAddress, ...] | None = None


class Node(_Record, frozen=True):
    """A ``v1`` Node, as far as its Service proxy and load balancers are told of it."""

    metadata: ObjectMeta
    spec: NodeSpec | None = None
    status: NodeStatus | None = None

    @property
    def key(self) -> ObjectKey:
        """What identifies it among all objects."""
        return ObjectKey("Node", "", self.metadata.name)

    @property
    def ref(self) -> None:
        """It belongs to no Service."""
        return None


class ServiceCIDRSpec(_Record, frozen=True):
    """One network of each IP family at most."""

    cidrs: tuple[str, ...] | None = None


class ServiceCIDR(_Record, frozen=True):
    """A ``networking.k8s.io/v1`` ServiceCIDR: where cluster IPs are (KEP-1880)."""

    metadata: ObjectMeta
    spec: ServiceCIDRSpec | None = None

    @property
    def key(self) -> ObjectKey:
        """What identifies it among all objects."""
        return ObjectKey("ServiceCIDR", "", self.metadata.name)

    @property
    def ref(self) -> None:
        """It belongs to no Service."""
        return None


class LabelRequirement(_Record, frozen=True):
    """What a label must be like. ``values`` are for In and NotIn."""

    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: tuple[str, ...] | None = None

    def is_met(self, labels: dict[str, str]) -> bool:
        """As ``metav1.LabelSelectorAsSelector`` has it: NotIn is met by a label that is not there,
        too.
        """
        if self.operator == "Exists":
            return self.key in labels
        if self.operator == "DoesNotExist":
            return self.key not in labels
        return (labels.get(self.key) in (self.values or ())) is (self.operator == "In")


class LabelSelector(_Record, frozen=True):
    """``metav1.LabelSelector``: all must be met. An empty one selects everything."""

    match_labels: dict[str, str] | None = None
    match_expressions: tuple[LabelRequirement, ...] | None = None

    def selects(self, labels: dict[str, str] | None) -> bool:
        """Whether an object with these labels is meant."""
        found = labels or {}
        return (self.match_labels or {}).items() <= found.items() and all(
            each.is_met(found) for each in self.match_expressions or ()
        )


class LoadBalancerPoolSpec(_Record, frozen=True):
    """``addresses`` are CIDRs and ranges (``192.0.2.10-192.0.2.19``). Without ``auto_assign`` an
    address is only for those that ask for just it.
    """

    addresses: tuple[str, ...]
    namespaces: tuple[Name, ...] | None = None
    service_selector: LabelSelector | None = None
    auto_assign: bool | None = None


class LoadBalancerPool(_Record, frozen=True):
    """A ``svcdp.io/v1alpha1`` LoadBalancerPool: addresses for Services of type LoadBalancer."""

    metadata: ObjectMeta
    spec: LoadBalancerPoolSpec

    @property
    def key(self) -> ObjectKey:
        """What identifies it among all objects."""
        return ObjectKey("LoadBalancerPool", "", self.metadata.name)

    @property
    def ref(self) -> None:
        """It belongs to no Service."""
        return None

    def admits(self, service: Service) -> bool:
        """Whether its addresses are for this Service: by namespace and by labels."""
        namespaces, selector = self.spec.namespaces, self.spec.service_selector
        return (not namespaces or service.ref.namespace in namespaces) and (
            selector is None or selector.selects(service.metadata.labels)
        )


Object = Service | EndpointSlice | Pod | Node | ServiceCIDR | LoadBalancerPool


def parse_address(text: str) -> str:
    """The address as :mod:`ipaddress` prints it; ManifestError if it is not one host's.

    Leading zeros are decimal and an IPv4-mapped address is the IPv4 one, as Go's
    ParseIP, and so every Kubernetes component, has it.
    """
    try:
        # ipaddress would take most of the time that it takes to resolve a cluster.
        if ":" in text:
            packed = socket.inet_pton(socket.AF_INET6, text)
            printed = socket.inet_ntop(socket.AF_INET6, packed)
            if packed[0] != 0xFF and printed != "::" and "." not in printed:
                return printed
        else:
            packed = socket.inet_pton(socket.AF_INET, text)
            if not 224 <= packed[0] < 240 and any(packed):
                return text
    except (OSError, ValueError):
        pass
    return _parse_unusual(text)


def _parse_unusual(text: str) -> str:
    """What is wrong, or not the usual way to write it."""
    text = _without_zeros(text)
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ManifestError(f"{text!r} is not an IP address") from None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            raise ManifestError(f"{text!r} has a zone; use an address without one")
        address = address.ipv4_mapped or address
    if address.is_unspecified or address.is_multicast:
        raise ManifestError(f"{text!r} is not the address of one host")
    return str(address)


def parse_cidr(text: str) -> str:
    """The network as :mod:`ipaddress` prints it; ManifestError if it is none.

    Blanks around it and host bits do not count, and leading zeros are decimal, as for Go's
    ParseCIDR as Kubernetes uses it.
    """
    address, _, length = text.strip().partition("/")
    try:
        if not (length.isascii() and length.isdigit()):
            raise ValueError
        network = (_without_zeros(address), int(length))
        return str(ipaddress.ip_network(network, strict=False))
    except ValueError:
        raise ManifestError(f"{text!r} is not a CIDR such as 192.0.2.0/24") from None


def _without_zeros(address: str) -> str:
    """An IPv4 address without leading zeros, which :mod:`ipaddress` refuses; others as they are."""
    digits = address.split(".")
    if len(digits) == 4 and all(part.isascii() and part.isdigit() for part in digits):
        return ".".join(part.lstrip("0") or "0" for part in digits)
    return address


def family_of(address: str) -> IPFamily:
    """The family of an address that :func:`parse_address` returned."""
    return "IPv6" if ":" in address else "IPv4"
