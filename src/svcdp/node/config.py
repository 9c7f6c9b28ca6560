"""The node daemon's settings: one struct, and where each value came from.

A value is taken from a flag, else from the environment, else from the file (YAML,
``kind: NodeConfig``), else it is the default. The names of a setting follow from its
field: ``pod_cidrs`` is ``--pod-cidrs``, ``SVCDP_POD_CIDRS`` and ``podCIDRs``. A key that
nobody knows is an error, and so is a bad value: the message names the key and the place.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import msgspec
import yaml
from msgspec import Meta

from svcdp.errors import ConfigError
from svcdp.ipvs.sync import LENGTH_MAX, MESSAGE_MAX, MESSAGE_MIN
from svcdp.ipvs.syncd import GROUP, PORT
from svcdp.node import kubeproxy
from svcdp.node.kubeproxy import Given
from svcdp.node.values import (
    Address,
    Bind,
    Cidr,
    Mark,
    MarkField,
    Range,
    Server,
    StateTimeout,
    Switch,
)
from svcdp.types import Settings

__all__ = ["API_VERSION", "KIND", "LoadedConfig", "NodeConfig", "Setting", "load", "settings"]

API_VERSION = "svcdp.io/v1alpha1"
KIND = "NodeConfig"

INT_MAX = (1 << 31) - 1

_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _key(name: str) -> str:
    """``pod_cidrs`` -> ``podCIDRs``, as Kubernetes writes its keys."""
    head, *rest = name.split("_")
    special = {"asn": "ASN", "cidrs": "CIDRs", "id": "ID", "ttl": "TTL"}
    return head + "".join(special.get(word, word.capitalize()) for word in rest)


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True, rename=_key):
    """The settings of ``svcdp run``. The descriptions are the help texts of its flags."""

    manifests: Annotated[
        str, Meta(description="folder of Service and EndpointSlice manifests, watched")
    ] = ""
    kubeconfig: Annotated[
        str,
        Meta(
            description="kubeconfig of the cluster to follow; in-cluster: by the Pod's service"
            " account"
        ),
    ] = ""
    min_sync_period: Annotated[
        float, Meta(ge=0, description="least seconds between two updates that a cluster causes")
    ] = 1.0
    ipvs: Annotated[
        str, Meta(description="file of ipvsadm-save's lines to serve in place of manifests")
    ] = ""
    node_name: Annotated[str, Meta(description="this node's name (default: the host name)")] = (
        msgspec.field(default_factory=socket.gethostname)
    )
    zone: Annotated[
        str, Meta(description="this node's zone, for topology hints of EndpointSlices")
    ] = ""
    addresses: Annotated[
        tuple[Address, ...],
        Meta(
            description="the node's addresses (default: those of its interfaces, as they come"
            " and go)"
        ),
    ] = ()
    pod_cidrs: Annotated[
        tuple[Cidr, ...],
        Meta(
            description="where Pods live; traffic from elsewhere is masqueraded where needed"
            " (default with NodeCIDR: those of its Node)"
        ),
    ] = ()
    primary_addresses: Annotated[
        tuple[Address, ...],
        Meta(description="those that it is known by, one of each family (default: its Node's)"),
    ] = ()
    service_cidrs: Annotated[
        tuple[Cidr, ...],
        Meta(
            description="where cluster IPs are, besides ServiceCIDRs; routed, so that the node"
            " itself reaches them; the rest of their traffic is turned away"
        ),
    ] = ()
    service_node_port_range: Annotated[
        Range, Meta(description="node ports of manifests, and of their Services that name none")
    ] = Range("30000-32767")
    allocations_file: Annotated[
        str,
        Meta(
            description="file that remembers the cluster IPs, node ports and load-balancer"
            " addresses that Services of manifests were given (default: none)"
        ),
    ] = ""
    service_proxy_name: Annotated[
        str,
        Meta(
            pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?\Z",
            description="serve only Services whose label service.kubernetes.io/service-proxy-name"
            " says so, beside another proxy",
        ),
    ] = ""
    scheduler: Annotated[
        str, Meta(description="scheduler of Services whose annotations name none")
    ] = "rr"
    detect_local_mode: Annotated[
        Literal["ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"],
        Meta(
            description="how Pods are told: by podCIDRs (of all nodes, of this one) or podInterface"
        ),
    ] = "ClusterCIDR"
    pod_interface: Annotated[
        str, Meta(description="interface that Pods' packets come in by; veth+: all that begin so")
    ] = ""
    pod_mark: Annotated[Mark, Meta(description="mark bit of packets from podInterface")] = Mark(
        0x00080000
    )
    node_port_addresses: Annotated[
        tuple[Cidr, ...],
        Meta(description="addresses that serve node ports (default: the primary ones)"),
    ] = ()
    localhost_node_ports: Annotated[
        bool, Meta(description="relay TCP node ports at 127.0.0.1 and ::1 too")
    ] = False
    masquerade_all: Annotated[bool, Meta(description="masquerade all traffic to cluster IPs")] = (
        False
    )
    masquerade_ports: Annotated[
        Range, Meta(description="source ports of masqueraded connections")
    ] = Range("1024-29999")
    queues: Annotated[Range, Meta(description="NFQUEUE numbers, a worker thread each")] = Range(
        "100-103"
    )
    tunnel_queues: Annotated[
        Range, Meta(description="NFQUEUE numbers for packets that may leave in a tunnel")
    ] = Range("104")
    fail_open: Annotated[
        bool, Meta(description="a full queue lets packets pass, else it drops them")
    ] = True
    bypass: Annotated[
        bool, Meta(description="packets pass while nobody listens on the queues, else drop")
    ] = True
    gso: Annotated[bool, Meta(description="take packets of up to 64 KiB from the kernel")] = True
    max_connections: Annotated[
        int, Meta(ge=1, le=1 << 28, description="bound of the connection table")
    ] = 1 << 20
    rules: Annotated[
        Literal["auto", "iptables", "nft", "none"],
        Meta(description="tool that installs the capture rules; none: you do it"),
    ] = "auto"
    keep_rules: Annotated[
        bool, Meta(description="leave the rules when stopping, for the next start to take over")
    ] = False
    forward_mark: Annotated[Mark, Meta(description="mark bit of packets that svcdp rewrote")] = (
        Mark(0x00100000)
    )
    pass_mark: Annotated[Mark, Meta(description="mark bit of packets that svcdp let pass")] = Mark(
        0x00200000
    )
    dr_marks: Annotated[
        MarkField, Meta(description="mark bits that number the destinations reached by dr")
    ] = MarkField(0xFFC00000)
    dataplane: Annotated[
        tuple[Switch, ...],
        Meta(description="name=number of IPVS's sysctls and alike, such as sloppy_tcp=1"),
    ] = ()
    timeouts: Annotated[
        tuple[StateTimeout, ...],
        Meta(description="state=seconds without a packet that end a connection: udp=30"),
    ] = ()
    netns: Annotated[
        str, Meta(description="network namespace to serve, a name or a path (default: own)")
    ] = ""
    run_dir: Annotated[str, Meta(description="folder for what must survive a crash")] = "/run/svcdp"
    admin_socket: Annotated[
        str, Meta(description="socket of `svcdp get` (default: admin.sock in the run folder)")
    ] = ""
    state_file: Annotated[
        str, Meta(description="file in which connections outlive a restart (default: none)")
    ] = ""
    state_interval: Annotated[
        float, Meta(ge=1, description="seconds after which connections are saved again")
    ] = 60.0
    dns: Annotated[
        bool, Meta(description="be the cluster's DNS server for this node, at dnsAddresses")
    ] = False
    dns_addresses: Annotated[
        tuple[Address, ...],
        Meta(
            description="addresses of the cluster's DNS Service (default: the tenth of each of"
            " serviceCIDRs)"
        ),
    ] = ()
    dns_zone: Annotated[str, Meta(description="zone of the cluster's names")] = "cluster.local"
    dns_upstreams: Annotated[
        tuple[Server, ...],
        Meta(
            description="resolvers to ask for all other names (default: those of /etc/resolv.conf)"
        ),
    ] = ()
    dns_recursion: Annotated[
        tuple[Cidr, ...],
        Meta(description="networks that may ask for all other names (default: private ones)"),
    ] = ()
    dns_rate: Annotated[
        float, Meta(ge=0, description="DNS questions a second of one client, 0: any number")
    ] = 1000.0
    dns_log: Annotated[bool, Meta(description="log each DNS question")] = False
    announce: Annotated[
        Literal["none", "l2"],
        Meta(
            description="answer ARP and NDP for the load-balancer addresses that this node has; one"
            " node has each"
        ),
    ] = "none"
    announce_interfaces: Annotated[
        tuple[str, ...],
        Meta(
            description="where: names or patterns such as eth* (default: those with the node's"
            " addresses)"
        ),
    ] = ()
    announce_nodes: Annotated[
        tuple[str, ...],
        Meta(
            description="nodes that share the addresses, whether they live or not (default: this"
            " one; with a cluster those that renew Leases)"
        ),
    ] = ()
    announce_lease_namespace: Annotated[
        str, Meta(description="namespace of these Leases, one a node")
    ] = "svcdp"
    announce_lease_duration: Annotated[
        int, Meta(ge=1, le=3600, description="seconds after which a silent node counts as dead")
    ] = 2
    bgp_file: Annotated[
        str,
        Meta(
            description="file of the load-balancer addresses that routers may send here, for a BGP"
            " speaker (default: none)"
        ),
    ] = ""
    bgp_format: Annotated[
        Literal["bird", "exabgp", "frr"], Meta(description="speaker that reads it")
    ] = "bird"
    bgp_asn: Annotated[int, Meta(ge=0, lt=1 << 32, description="number of FRR's `router bgp`")] = 0
    bgp_reload: Annotated[
        tuple[str, ...],
        Meta(description="program and arguments, without a shell, that have the speaker read it"),
    ] = ()
    sync_role: Annotated[
        Literal["none", "master", "backup", "both"],
        Meta(description="tell other nodes of connections (IPVS sync protocol), or hear of theirs"),
    ] = "none"
    sync_interface: Annotated[
        str, Meta(description="interface to the other nodes; multicast needs it")
    ] = ""
    sync_group: Annotated[
        Address, Meta(description="multicast group, or the address of the one other node")
    ] = Address(GROUP)
    sync_port: Annotated[int, Meta(ge=1, le=65535, description="UDP port of all nodes")] = PORT
    sync_id: Annotated[
        int, Meta(ge=0, le=255, description="of nodes that belong together; 0 hears all")
    ] = 0
    sync_ttl: Annotated[
        int, Meta(ge=1, le=255, description="TTL of what is told to a multicast group")
    ] = 1
    sync_version: Annotated[
        Literal[0, 1], Meta(description="of the sync protocol in what is told; 0 is IPv4 alone")
    ] = 1
    sync_maxlen: Annotated[
        int, Meta(ge=MESSAGE_MIN, le=LENGTH_MAX, description="bytes of a sync message")
    ] = MESSAGE_MAX
    sync_threshold: Annotated[
        int,
        Meta(ge=1, le=INT_MAX, description="packet of a client at which a connection is told of"),
    ] = 3
    sync_period: Annotated[
        int,
        Meta(ge=0, le=INT_MAX, description="packets after which it is told of again, 0: never"),
    ] = 50
    sync_full_interval: Annotated[
        float,
        Meta(ge=0, description="seconds after which all connections are told again, 0: never"),
    ] = 0.0
    sync_retry: Annotated[
        float, Meta(ge=0.5, description="longest wait for another try of a failed update, seconds")
    ] = 30.0
    healthz_bind_address: Annotated[
        Bind, Meta(description="address and port of /healthz, /livez and /readyz; empty: none")
    ] = Bind("0.0.0.0:10256")
    metrics_bind_address: Annotated[
        Bind, Meta(description="address and port of /metrics, /proxyMode, /configz; empty: none")
    ] = Bind("127.0.0.1:10249")
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="least level logged")
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"], Meta(description="key=value, or a JSON object a line")
    ] = "text"

    @property
    def admin_path(self) -> str:
        """Where the admin socket is."""
        return self.admin_socket or f"{self.run_dir}/admin.sock"

    @property
    def dns_servers(self) -> tuple[Address, ...]:
        """Where DNS questions are answered: nowhere without ``dns``."""
        if not self.dns:
            return ()
        networks = map(ipaddress.ip_network, self.service_cidrs)
        tenth = (Address(str(each[10])) for each in networks if each.num_addresses > 10)
        return self.dns_addresses or tuple(tenth)

    @property
    def timeouts_by_state(self) -> dict[str, float]:
        """What ``timeouts`` says; the last of two for the same state counts."""
        return {timeout.state: timeout.seconds for timeout in self.timeouts}

    @property
    def dataplane_settings(self) -> Settings:
        """What ``dataplane`` says; the last of two that set the same counts."""
        return Settings(**{switch.name: switch.value for switch in self.dataplane})


@dataclass(frozen=True)
class Setting:
    """One field of :class:`NodeConfig`, and the names it goes by."""

    name: str
    key: str
    type: Any
    description: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "SVCDP_" + self.name.upper()

    @property
    def is_list(self) -> bool:
        return get_origin(self._bare_type) is tuple

    @property
    def is_switch(self) -> bool:
        return self._bare_type is bool

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a setting that has only a few."""
        is_choice = get_origin(self._bare_type) is Literal
        return tuple(map(str, get_args(self._bare_type))) if is_choice else ()

    @property
    def _bare_type(self) -> Any:
        return get_args(self.type)[0]


def settings() -> tuple[Setting, ...]:
    """All settings, in the order of the struct."""
    return tuple(
        Setting(field.name, field.encode_name, field.type, get_args(field.type)[1].description)
        for field in msgspec.structs.fields(NodeConfig)
    )


@dataclass(frozen=True)
class LoadedConfig:
    """A config, and for each field where its value came from. ``notes`` are about words of
    kube-proxy's that change nothing.
    """

    config: NodeConfig
    origins: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """``(key, value, origin)`` of every setting, for people."""
        for setting in settings():
            value = getattr(self.config, setting.name)
            text = ",".join(value) if setting.is_list else str(value)
            origin = self.origins.get(setting.name, "default")
            yield setting.key, text.lower() if setting.is_switch else text, origin


def load(
    file: str | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    flags: Mapping[str, Any] | None = None,
    kube_proxy: Sequence[str] | None = None,
) -> LoadedConfig:
    """Put a config together.

    ``file`` is a path or None, of a NodeConfig or a KubeProxyConfiguration; instead of it and of
    flags there may be the arguments of ``kube_proxy``'s command line. ``flags`` maps field names
    to text (a list of texts for lists, a bool for switches), None where a flag was not given.
    Raises :class:`svcdp.ConfigError` for the first bad key or value.
    """
    given: dict[str, Given] = {}
    notes: tuple[str, ...] = ()
    if kube_proxy is not None:
        given, notes = _from_kube_proxy(kube_proxy)
    elif file:
        given, notes = _from_file(file)
    for setting in settings():
        if setting.variable in environ:
            given[setting.name] = Given(environ[setting.variable], f"env {setting.variable}")
        flag = (flags or {}).get(setting.name)
        if flag is not None and flag != ():
            given[setting.name] = Given(flag, f"flag {setting.flag}")
    values = {s.name: _convert(s, given[s.name]) for s in settings() if s.name in given}
    origins = {name: entry.origin for name, entry in given.items()}
    config = NodeConfig(**values)
    if config.forward_mark == config.pass_mark:
        raise ConfigError("forwardMark and passMark must be different bits: change one of them")
    if config.dr_marks & (config.forward_mark | config.pass_mark):
        raise ConfigError("drMarks must hold neither forwardMark nor passMark: change one of them")
    if _overlap(config.queues, config.tunnel_queues):
        raise ConfigError("queues and tunnelQueues must be different numbers: change one of them")
    if config.manifests and _overlap(config.masquerade_ports, config.service_node_port_range):
        raise ConfigError(
            "masqueradePorts and serviceNodePortRange must be different numbers: change one of them"
        )
    if config.dns and not config.dns_servers:
        raise ConfigError("dns needs addresses to answer at: set dnsAddresses, or serviceCIDRs")
    if config.bgp_file and config.bgp_format == "frr" and not config.bgp_asn:
        raise ConfigError("bgpFormat frr needs the number of `router bgp`: set bgpASN")
    return LoadedConfig(config, origins, notes)


def _overlap(one: Range, other: Range) -> bool:
    return max(one.first, other.first) <= min(one.last, other.last)


def _convert(setting: Setting, given: Given) -> Any:
    value = given.value
    if setting.is_list:
        value = _split(value)
    # Text from flags and the environment may stand for numbers; in the file a type is a type.
    lax = given.origin.startswith(("env", "flag"))
    try:
        return msgspec.convert(value, setting.type, strict=not lax, dec_hook=_decode)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        if setting.choices:
            reason = f"{value!r} is none of {', '.join(setting.choices)}"
        raise ConfigError(f"{setting.key}{path.rstrip('`')}: {reason} ({given.origin})") from None


def _split(value: Any) -> Any:
    """``"a,b"`` -> ``["a", "b"]``, also within a list of such texts."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return [item.strip() for part in value for item in part.split(",") if item.strip()]
    return value


def _decode(kind: type, value: Any) -> Any:
    if kind in (Address, Bind, Cidr, Server) and not isinstance(value, str):
        raise ValueError(f"Expected `str`, got `{type(value).__name__}`")
    return kind(value)


class _Document(NamedTuple):
    """A configuration file: the values at its top, and where each is."""

    api_version: str
    data: dict[str, Any]
    origins: dict[str, str]


def _from_file(file: str) -> tuple[dict[str, Given], tuple[str, ...]]:
    document = _read(file)
    if document.api_version == kubeproxy.API_VERSION:
        return kubeproxy.translate(kubeproxy.flatten(document.data, document.origins))
    by_key = {setting.key: setting for setting in settings()}
    given = {}
    for key, value in document.data.items():
        if key not in by_key:
            close = difflib.get_close_matches(str(key), by_key, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(by_key)}"
            raise ConfigError(f"{document.origins[key]}: unknown key {key}: {hint}")
        given[by_key[key].name] = Given(value, document.origins[key])
    return given, ()


def _from_kube_proxy(arguments: Sequence[str]) -> tuple[dict[str, Given], tuple[str, ...]]:
    file, words = kubeproxy.parse(arguments)
    more: tuple[str, ...] = ()
    if file is not None:
        document = _read(file)
        if document.api_version != kubeproxy.API_VERSION:
            raise ConfigError(f"{file} is no {kubeproxy.KIND}: give it to `svcdp run --config`")
        words, more = kubeproxy.beside_file(words)
        words = {**kubeproxy.flatten(document.data, document.origins), **words}
    given, notes = kubeproxy.translate(words)
    return given, more + notes


def _read(file: str) -> _Document:
    """Raises ConfigError unless it is one of either kind."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {file}: {error}") from None
    try:
        loader = _YAML(text)
        root = loader.get_single_node()
        data = loader.construct_document(root) if root else None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if root is None or not isinstance(data, dict):
        raise ConfigError(f"{file}: expected apiVersion: {API_VERSION} and kind: {KIND}")
    lines: dict[str, int] = {}
    for key_node, _ in root.value:
        line = key_node.start_mark.line + 1
        if key_node.value in lines:
            raise ConfigError(f"{file}:{line}: {key_node.value} is given twice: keep one")
        lines[key_node.value] = line
    kinds = {API_VERSION: KIND, kubeproxy.API_VERSION: kubeproxy.KIND}
    version = data.pop("apiVersion", None)
    if not isinstance(version, str) or version not in kinds:
        at = lines.get("apiVersion", 1)
        raise ConfigError(f"{file}:{at}: apiVersion must be {' or '.join(kinds)}")
    if data.pop("kind", None) != kinds[version]:
        raise ConfigError(f"{file}:{lines.get('kind', 1)}: kind must be {kinds[version]}")
    for key in data:
        if not isinstance(key, str):
            place = f"{file}:{lines.get(str(key), 1)}"
            raise ConfigError(f"{place}: unknown key {key}: keys are texts")
    return _Document(version, data, {key: f"{file}:{lines.get(key, 1)}" for key in data})
