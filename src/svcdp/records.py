"""Specs checked, and compiled into what the core takes."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import zip_longest
from typing import NamedTuple

from svcdp import schedulers
from svcdp._core.engine import PLAIN, plain_members
from svcdp._core.engine import Destination as Handle
from svcdp.abc import Scheduler
from svcdp.errors import ConfigError, ConflictError
from svcdp.types import (
    DestinationSpec,
    Flow,
    PassiveHealth,
    Protocol,
    ServiceSpec,
    Settings,
    SourceRule,
    TunnelSpec,
    Verdict,
)

logger = logging.getLogger(__name__)

Key = tuple[str, int, str]
Endpoint = tuple[str, int]
#: The endpoints of a source rule in the order in which they came; None: the rule has none.
Subset = tuple[Endpoint, ...] | None

#: Networks (None: any source), whether to masquerade, verdict and answer when nobody serves, mark,
#: the service of a rule with endpoints of its own.
CompiledRule = tuple[tuple[tuple[bytes, bytes], ...] | None, bool, int, int, int, "Record | None"]
#: Method, tunnel type, checksum, port and source, MTU, mark.
Config = tuple[int, int, bool, int, bytes, int, int]
#: Id, weight, upper and lower threshold, config.
Member = tuple[int, int, int, int, Config]

#: By the numbers of service.pxd, which are the kernel's (uapi/linux/ip_vs.h).
METHODS = {"masq": 0, "local": 1, "tunnel": 2, "dr": 3}
TUNNELS = {"ipip": 0, "gue": 1, "gre": 2}
REMOVALS = {"drain": 0, "expire": 1, "drop": 2, "reset": 4}
ENGINES = {"": 0, "sip": 1}
HELPERS = ("", "ftp")
FTP_PORT = 21
#: Verdict, and svcdp_answer of abi.h.
ON_EMPTY = {
    "reject": (int(Verdict.REJECT), 0),
    "unreachable": (int(Verdict.REJECT), 1),
    "drop": (int(Verdict.DROP), 0),
}

#: Of services.
PROTOCOLS = tuple(protocol.name.lower() for protocol in Protocol)

WEIGHT_MAX = (1 << 31) - 1
SECONDS_MAX = (1 << 31) - 1
MARK_MAX = (1 << 32) - 1


@dataclass(slots=True)
class Record:
    """A service as `Core.commit` takes it: addresses as bytes, times in ns, members by id with
    the newest first.
    """

    address: bytes
    port: int
    protocol: int
    scheduler: int
    chooser: Callable[..., int | None] | None
    candidates: tuple[Handle, ...] | None
    persistence: int
    is_timed: bool
    affinity: int
    masquerade: bytes | None
    members: list[Member]
    rules: tuple[CompiledRule, ...]
    words: int  #: 32-bit words of an address of its family
    last_port: int
    scheduler_flags: int
    table_size: int
    netmask: bytes
    engine: int
    one_packet: bool
    timeouts: int  #: class
    on_removal: int
    grace: int
    failures_max: int  #: 0: destinations are not ejected
    ejection: int
    ejection_max: int
    mss_clamp: bool
    is_ftp: bool

    def strip(self) -> None:
        """Let go of what a commit took over: of large clusters that is a million members."""
        self.members.clear()
        for *_, subset in self.rules:
            if subset is not None:
                subset.members.clear()


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Address(NamedTuple):
    """An IP address: as `ipaddress` prints it, and as it is on the wire."""

    text: str
    packed: bytes
    version: int


def parse_address(text: str) -> Address:
    """ValueError unless the text is an IP address without a scope id: packets carry none."""
    try:
        # As strict as ipaddress, and ten times as fast.
        if ":" not in text:
            return Address(text, socket.inet_pton(socket.AF_INET, text), 4)
        packed = socket.inet_pton(socket.AF_INET6, text)
        printed = socket.inet_ntop(socket.AF_INET6, packed)
        if "." not in printed:
            return Address(printed, packed, 6)
    except (OSError, ValueError):
        pass
    if "%" in text:
        raise ValueError(f"{text!r} has a scope id")
    address = ipaddress.ip_address(text)
    return Address(str(address), address.packed, address.version)


@lru_cache(maxsize=1 << 16)
def parse_network(text: str) -> Network:
    """A CIDR, or one address. ValueError."""
    return ipaddress.ip_network(text)


@lru_cache(maxsize=1024)
def parse_networks(sources: tuple[str, ...], version: int) -> tuple[tuple[bytes, bytes], ...]:
    """(address, mask) of the CIDRs of one IP version. ValueError."""
    networks = [ipaddress.ip_network(source) for source in sources]
    return tuple(
        (network.network_address.packed, network.netmask.packed)
        for network in networks
        if network.version == version
    )


def check_address(text: str, what: str) -> Address:
    """As parse_address(), with a ConfigError that says where the text stands."""
    try:
        if isinstance(text, str):
            return parse_address(text)
    except ValueError:
        pass
    raise ConfigError(f"{what}: {text!r} is no IP address")


def is_unicast(address: Address) -> bool:
    """Whether one host has the address, and no interface need be named beside it: what
    ip_vs_ctl.c, ip_vs_add_dest, asks of servers.
    """
    first, second = address.packed[:2]
    if address.version == 4:
        return not 224 <= first < 240 and address.text not in ("0.0.0.0", "255.255.255.255")
    return first != 0xFF and (first, second & 0xC0) != (0xFE, 0x80) and address.text != "::"


def check_network(text: str, what: str) -> str:
    """A CIDR as ipaddress prints it, and an address where it holds just that. ConfigError."""
    try:
        # A zone would be lost on the way into the core.
        if isinstance(text, str) and "%" not in text:
            network = parse_network(text)
            alone = network.prefixlen == network.max_prefixlen
            return str(network.network_address if alone else network)
    except ValueError:
        pass
    raise ConfigError(f"{what}: {text!r} is no network")


def check_number(number: int, low: int, high: int, what: str) -> int:
    """ConfigError unless it is an int in that range."""
    if not isinstance(number, int) or not low <= number <= high:
        raise ConfigError(f"{what} {number!r} is not a number from {low} to {high}")
    return number


def check_port(port: int, what: str, low: int = 1) -> int:
    """ConfigError unless it is ``low``..65535."""
    if type(port) is int and low <= port <= 65535:
        return port
    return check_number(port, low, 65535, f"{what}: port")


def check_key(address: str, port: int, protocol: str) -> Key:
    """A service key with the address as ipaddress prints it. ConfigError."""
    what = f"service {address!r}"
    if protocol not in PROTOCOLS:
        raise ConfigError(f"{what}: protocol {protocol!r} is none of {', '.join(PROTOCOLS)}")
    if protocol == "any":
        return (check_network(address, what), check_number(port, 0, 0, f"{what}: port"), protocol)
    text = check_address(address, what).text
    if protocol == "fwmark":
        if text not in ("0.0.0.0", "::"):
            raise ConfigError(f"{what}: a fwmark service has the address 0.0.0.0 or ::")
        return (text, check_number(port, 1, MARK_MAX, f"{what}: mark"), protocol)
    return (text, check_port(port, what, 0), protocol)


def check_flag(flag: bool, what: str) -> None:
    if not isinstance(flag, bool):
        raise ConfigError(f"{what} {flag!r} is neither True nor False")


def check_choice(choice: str, choices: Collection[str], what: str) -> None:
    if not isinstance(choice, str) or choice not in choices:
        names = ", ".join(name or '""' for name in choices)
        raise ConfigError(f"{what} {choice!r} is none of {names}")


def check_settings(settings: Settings) -> None:
    """ConfigError."""
    if not isinstance(settings, Settings):
        raise ConfigError(f"{settings!r} are no Settings")
    modes = {"conn_reuse_mode": (0, 3), "drop_entry": (0, 3), "drop_packet": (0, 3)}
    seconds = {"lblc_expiration": (1, SECONDS_MAX), "lblcr_expiration": (1, SECONDS_MAX)}
    bounds = {**modes, **seconds, "am_droprate": (1, 1 << 30), "answer_rate": (0, 1 << 30)}
    for field in fields(Settings):
        value = getattr(settings, field.name)
        if field.name in bounds:
            check_number(value, *bounds[field.name], field.name)
        else:
            check_flag(value, field.name)


def check_service(spec: ServiceSpec) -> ServiceSpec:
    """The spec with its address normalised. ConfigError when a field is not what it should be;
    destinations are looked at by check_destination().
    """
    if not isinstance(spec, ServiceSpec):
        raise ConfigError(f"{spec!r} is no ServiceSpec")
    address, port, protocol = check_key(*spec.key)
    for field in ("scheduler", "persistence_group", "name"):
        if not isinstance(getattr(spec, field), str):
            raise ConfigError(f"{spec!r}: {field} must be a string")
    for field in ("destinations", "rules", "scheduler_flags", "timeouts", "kept"):
        if not isinstance(getattr(spec, field), tuple | list):
            raise ConfigError(f"{spec!r}: {field} must be a tuple")
    for field in ("one_packet", "mss_clamp", "persistence_timed"):
        check_flag(getattr(spec, field), f"{spec}: {field}")
    if spec.persistence is not None:
        check_number(spec.persistence, 1, SECONDS_MAX, f"{spec}: persistence (seconds)")
    if spec.persistence_netmask is not None:
        bits = 128 if ":" in address else 32
        check_number(spec.persistence_netmask, 1, bits, f"{spec}: persistence_netmask (bits)")
    check_range(spec, port)
    for flag in spec.scheduler_flags:
        check_choice(flag, schedulers.FLAGS.get(spec.scheduler, ()), f"{spec}: scheduler flag")
    check_number(spec.mh_table_size, 251, 655373, f"{spec}: mh_table_size")
    if not schedulers.is_table_size(spec.mh_table_size):
        raise ConfigError(f"{spec}: mh_table_size {spec.mh_table_size} is no prime")
    check_choice(spec.on_removal, REMOVALS, f"{spec}: on_removal")
    check_grace(spec)
    check_choice(spec.persistence_engine, ENGINES, f"{spec}: persistence_engine")
    check_choice(spec.helper, HELPERS, f"{spec}: helper")
    if spec.persistence_engine and (protocol != "udp" or spec.persistence is None):
        raise ConfigError(f"{spec}: persistence_engine sip needs udp and persistence")
    if spec.helper and protocol not in ("tcp", "fwmark"):
        raise ConfigError(f"{spec}: helper {spec.helper} needs tcp")
    check_passive(spec)
    if spec.one_packet and protocol not in ("udp", "fwmark"):
        raise ConfigError(f"{spec}: one_packet needs udp")
    kept = check_endpoints(spec.kept, f"{spec}: kept")
    if spec.address == address and spec.kept == kept:
        return spec
    return replace(spec, address=address, kept=kept)


def check_endpoints(endpoints: Sequence[Endpoint], what: str) -> tuple[Endpoint, ...]:
    """Pairs of address, which is normalised, and port; each once. ConfigError."""
    if not isinstance(endpoints, tuple | list) or not all(
        isinstance(each, tuple | list) and len(each) == 2 for each in endpoints
    ):
        raise ConfigError(f"{what}: {endpoints!r} is no tuple of (address, port)")
    return tuple(
        dict.fromkeys(
            (check_address(address, what).text, check_port(port, what, 0))
            for address, port in endpoints
        )
    )


def check_grace(spec: ServiceSpec) -> None:
    """ConfigError unless connections are given a time that they can have."""
    grace = spec.removal_grace
    if not isinstance(grace, int | float) or not 0 <= grace <= SECONDS_MAX:
        raise ConfigError(f"{spec}: removal_grace {grace!r} is not 0 to {SECONDS_MAX} seconds")
    if grace and spec.on_removal != "reset":
        raise ConfigError(f"{spec}: removal_grace needs on_removal reset")


def check_passive(spec: ServiceSpec) -> None:
    """ConfigError unless the service can see whether its destinations answer."""
    health = spec.passive_health
    if health is None:
        return
    if not isinstance(health, PassiveHealth):
        raise ConfigError(f"{spec}: passive_health {health!r} is no PassiveHealth")
    if spec.protocol not in ("tcp", "fwmark"):
        raise ConfigError(f"{spec}: passive_health needs tcp")
    if spec.helper:
        raise ConfigError(f"{spec}: passive_health and helper {spec.helper} exclude each other")
    check_number(health.failures, 1, 1 << 30, f"{spec}: passive_health: failures")
    first, longest = health.ejection, health.max_ejection
    if not all(isinstance(each, int | float) for each in (first, longest)) or not (
        0 < first <= longest <= SECONDS_MAX
    ):
        raise ConfigError(
            f"{spec}: passive_health: ejection {first!r} and max_ejection {longest!r} are not"
            f" seconds, above 0 and up to {SECONDS_MAX}, in this order"
        )


def ports_of(spec: ServiceSpec) -> tuple[int, int]:
    """The first and last port of a service."""
    return (spec.port, spec.last_port or spec.port) if spec.port else (0, 65535)


def is_ftp(spec: ServiceSpec) -> bool:
    """Whether what comes to other ports of the address may be FTP's data for the service."""
    return spec.protocol == "tcp" and spec.port == FTP_PORT and not spec.last_port


def check_range(spec: ServiceSpec, port: int) -> None:
    if spec.last_port and (spec.protocol == "fwmark" or port == 0):
        raise ConfigError(f"{spec}: last_port needs a first port")
    if spec.last_port:
        check_number(spec.last_port, port, 65535, f"{spec}: last_port")


def check_destinations(
    specs: Sequence[DestinationSpec], service: ServiceSpec
) -> dict[Endpoint, DestinationSpec]:
    """The specs as by check_destination(), each under its endpoint. ConfigError, ConflictError."""
    if ":" not in service.address and service.protocol != "any":
        plain = plain_members(specs)
        if plain is not None:
            return plain
    checked: dict[Endpoint, DestinationSpec] = {}
    for spec in specs:
        spec = check_destination(spec, service)
        endpoint = (spec.address, spec.port)
        if endpoint in checked:
            raise ConflictError(f"{service} names {spec.address}:{spec.port} twice")
        checked[endpoint] = spec
    return checked


def check_destination(spec: DestinationSpec, service: ServiceSpec) -> DestinationSpec:
    """The spec with its addresses normalised. ConfigError."""
    if not isinstance(spec, DestinationSpec):
        raise ConfigError(f"{service}: {spec!r} is no DestinationSpec")
    if service.protocol == "any":
        raise ConfigError(f"{service}: protocol any turns clients away: it has no destinations")
    try:
        address = check_address(spec.address, "address")
        if not is_unicast(address):
            raise ConfigError("no server has such an address: not unicast, or link-local")
        check_port(spec.port, "destination", 0)
        check_number(spec.weight, 0, WEIGHT_MAX, "weight")
        check_number(spec.upper, 0, WEIGHT_MAX, "upper")
        check_number(spec.lower, 0, spec.upper or WEIGHT_MAX, "lower (upper at most)")
        check_number(spec.mtu, 0, 65535, "mtu")
        check_number(spec.mark, 0, MARK_MAX, "mark")
        check_choice(spec.method, METHODS, "forwarding method")
        if (":" in service.address) != (address.version == 6) and spec.method != "tunnel":
            raise ConfigError(f"address of the other IP family; {spec.method} needs one family")
        if spec.method != "masq" and spec.port not in (0, service.port):
            raise ConfigError(
                f"{spec.method} leaves the port as it is: {spec.port} must be that of the service"
            )
        tunnel = check_tunnel(spec, address)
        check_range_port(spec, service)
    except ConfigError as error:
        raise ConfigError(f"{service}: destination {spec.address!r}: {error}") from None
    if spec.address == address.text and tunnel == spec.tunnel:
        return spec
    return replace(spec, address=address.text, tunnel=tunnel)


def check_range_port(spec: DestinationSpec, service: ServiceSpec) -> None:
    """A service of many ports has destinations of one port, or (0) of each its own."""
    if service.protocol == "fwmark" or service.port == 0 or service.last_port:
        return
    if spec.port == 0 and spec.method == "masq":
        raise ConfigError("port 0 keeps the packet's: for services of several ports")


def check_tunnel(spec: DestinationSpec, address: Address) -> TunnelSpec | None:
    """The tunnel with its source normalised; None for other methods. ConfigError."""
    tunnel = spec.tunnel
    if spec.method != "tunnel":
        if tunnel is not None:
            raise ConfigError(f"method {spec.method} has no tunnel")
        return None
    if not isinstance(tunnel, TunnelSpec):
        raise ConfigError("method tunnel needs a TunnelSpec")
    check_choice(tunnel.type, TUNNELS, "tunnel type")
    check_flag(tunnel.checksum, "tunnel checksum")
    if tunnel.type == "gue":
        check_port(tunnel.port, "gue")
    elif tunnel.port:
        raise ConfigError(f"a {tunnel.type} tunnel has no port")
    source = check_address(tunnel.source, "tunnel source")
    if source.version != address.version:
        raise ConfigError("tunnel source is not of the destination's IP family")
    return tunnel if tunnel.source == source.text else replace(tunnel, source=source.text)


def order_subsets(spec: ServiceSpec, before: Sequence[Subset]) -> tuple[Subset, ...]:
    """The endpoints of each rule: who is there ``before`` keeps its place. ConfigError."""
    return tuple(
        order_subset(rule, spec, former)
        for rule, former in zip_longest(spec.rules, before[: len(spec.rules)])
    )


def order_subset(rule: SourceRule, spec: ServiceSpec, before: Subset) -> Subset:
    if not isinstance(rule, SourceRule):
        raise ConfigError(f"{spec}: {rule!r} is no SourceRule")
    if rule.endpoints is None:
        return None
    wanted = check_endpoints(rule.endpoints, f"{spec}: source rule: endpoint")
    known = {(m.address, m.port) for m in spec.destinations}
    for endpoint in wanted:
        if endpoint not in known:
            raise ConfigError(
                f"{spec}: source rule: {endpoint[0]} port {endpoint[1]} is no destination"
            )
    kept = [endpoint for endpoint in before or () if endpoint in wanted]
    return tuple(dict.fromkeys([*kept, *wanted]))


def compile_rules(
    rules: tuple[SourceRule, ...], service: ServiceSpec, subsets: list[Record | None]
) -> tuple[CompiledRule, ...]:
    version = parse_network(service.address).version
    compiled = []
    for rule, subset in zip(rules, subsets, strict=True):
        if not isinstance(rule.sources, tuple | list):
            raise ConfigError(f"{service}: {rule!r} has no tuple of sources")
        check_flag(rule.masquerade, f"{service}: masquerade")
        try:
            if not all(isinstance(source, str) for source in rule.sources):
                raise ValueError(f"{rule.sources!r} are not all strings")
            # Networks of the other family admit nobody; that is not "any".
            networks = parse_networks(tuple(rule.sources), version) if rule.sources else None
        except ValueError as error:
            raise ConfigError(f"{service}: source rule: {error}") from None
        check_choice(rule.on_empty, ON_EMPTY, f"{service}: on_empty")
        check_number(rule.mark, 0, MARK_MAX, f"{service}: source rule: mark")
        compiled.append((networks, rule.masquerade, *ON_EMPTY[rule.on_empty], rule.mark, subset))
    return tuple(compiled)


def compile_config(spec: DestinationSpec) -> Config:
    if spec.method == "masq" and not (spec.mtu or spec.mark):
        return PLAIN
    tunnel = spec.tunnel or TunnelSpec()
    return (
        METHODS[spec.method],
        TUNNELS[tunnel.type],
        tunnel.checksum,
        tunnel.port,
        parse_address(tunnel.source).packed if tunnel.source else b"",
        spec.mtu,
        spec.mark,
    )


def netmask(version: int, bits: int | None) -> bytes:
    size = 4 if version == 4 else 16
    ones = 8 * size if bits is None else bits
    return ((1 << ones) - 1 << 8 * size - ones).to_bytes(size, "big")


class Chooser:
    """Asks a scheduler; its first error since the service was configured is logged."""

    def __init__(self, spec: ServiceSpec, scheduler: Scheduler) -> None:
        self._spec = spec
        self._scheduler = scheduler
        self._failed = False

    def __call__(self, flow: Flow, destinations: tuple[Handle, ...]) -> int | None:
        try:
            return self._scheduler.pick(flow, destinations)
        except Exception:
            if not self._failed:
                self._failed = True
                logger.exception("scheduler failed service=%s; round robin serves", self._spec)
            raise


def compile_service(
    spec: ServiceSpec,
    specs: Mapping[Endpoint, DestinationSpec],
    handles: dict[Endpoint, Handle],
    subsets: tuple[Subset, ...],
    scheduler: Scheduler | None,
    affinity: int,
    timeouts: int,
) -> Record:
    """What the core takes for a spec whose destinations, ``specs``, have these handles, in the
    order in which they were added, and whose rules have these subsets of them. ``affinity`` and
    ``timeouts`` are numbers that the dataplane gave to its persistence group and its set of
    timeouts. ConfigError.
    """
    network = parse_network(spec.address)
    version = network.version
    address, first, last = network.network_address.packed, *ports_of(spec)
    if spec.protocol == "fwmark":
        # A mark stands where others have their address.
        address, first, last = spec.port.to_bytes(4, "big") + bytes(12), 0, 0
    elif spec.protocol == "any":
        first = last = network.prefixlen
    health = spec.passive_health
    masquerade = None
    if spec.masquerade_address is not None:
        source = check_address(spec.masquerade_address, f"{spec}: masquerade_address")
        if source.version != version:
            raise ConfigError(f"{spec}: masquerade_address is of the other IP family")
        masquerade = source.packed
    newest_first = [*reversed(handles.items())]
    members: list[Member] = [
        (handle.id, m.weight, m.upper, m.lower, compile_config(m))
        for endpoint, handle in newest_first
        for m in (specs[endpoint],)
    ]
    record = Record(
        address=address,
        port=first,
        protocol=Protocol[spec.protocol.upper()],
        scheduler=schedulers.BUILTIN.get(spec.scheduler, schedulers.PYTHON),
        chooser=None if scheduler is None else Chooser(spec, scheduler),
        candidates=None
        if scheduler is None
        else tuple(
            handle.with_weight(specs[endpoint].weight)
            for endpoint, handle in newest_first
            if specs[endpoint].weight
        ),
        persistence=(spec.persistence or 0) * 10**9,
        is_timed=spec.persistence_timed,
        affinity=affinity,
        masquerade=masquerade,
        members=members,
        rules=(),
        words=1 if version == 4 else 4,
        last_port=last,
        scheduler_flags=schedulers.flag_bits(spec.scheduler_flags),
        table_size=spec.mh_table_size,
        netmask=netmask(version, spec.persistence_netmask),
        engine=ENGINES[spec.persistence_engine],
        one_packet=spec.one_packet,
        timeouts=timeouts,
        on_removal=REMOVALS[spec.on_removal],
        grace=int(spec.removal_grace * 10**9),
        failures_max=health.failures if health else 0,
        ejection=max(1, int(health.ejection * 10**9)) if health else 0,
        ejection_max=max(1, int(health.max_ejection * 10**9)) if health else 0,
        mss_clamp=spec.mss_clamp,
        is_ftp=spec.helper == "ftp",
    )
    narrowed = [
        None if subset is None else narrow(record, [handles[each].id for each in reversed(subset)])
        for subset in subsets
    ]
    record.rules = compile_rules(spec.rules, spec, narrowed)
    return record


def narrow(record: Record, ids: list[int]) -> Record:
    """The service with these of its members only, in this order."""
    members = {member[0]: member for member in record.members}
    candidates = {handle.id: handle for handle in record.candidates or ()}
    return replace(
        record,
        members=[members[id] for id in ids],
        candidates=record.candidates and tuple(candidates[id] for id in ids if id in candidates),
    )
