"""Specs checked, and compiled into what the core takes."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from svcdp import schedulers
from svcdp._core.engine import Destination as Handle
from svcdp.abc import Scheduler
from svcdp.errors import ConfigError
from svcdp.types import DestinationSpec, Flow, Protocol, ServiceSpec, SourceRule, Verdict

logger = logging.getLogger(__name__)

Key = tuple[str, int, str]
Endpoint = tuple[str, int]

WEIGHT_MAX = (1 << 31) - 1
SECONDS_MAX = (1 << 31) - 1


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
    affinity: int
    masquerade: bytes | None
    members: list[tuple[int, int]]
    rules: tuple[tuple[tuple[tuple[bytes, bytes], ...] | None, bool, int], ...]


class Address(NamedTuple):
    """An IP address: as `ipaddress` prints it, and as it is on the wire."""

    text: str
    packed: bytes
    version: int


# A cluster names each of its addresses many times.
@lru_cache(maxsize=1 << 17)
def parse_address(text: str) -> Address:
    """ValueError unless the text is an IP address without a scope id: packets carry none."""
    if "%" in text:
        raise ValueError(f"{text!r} has a scope id")
    address = ipaddress.ip_address(text)
    return Address(str(address), address.packed, address.version)


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


def check_number(number: int, low: int, high: int, what: str) -> int:
    """ConfigError unless it is an int in that range."""
    if not isinstance(number, int) or not low <= number <= high:
        raise ConfigError(f"{what} {number!r} is not a number from {low} to {high}")
    return number


def check_port(port: int, what: str) -> int:
    """ConfigError unless it is 1..65535."""
    return check_number(port, 1, 65535, f"{what}: port")


def check_key(address: str, port: int, protocol: str) -> Key:
    """A service key with the address as ipaddress prints it. ConfigError."""
    what = f"service {address!r}"
    if protocol not in ("tcp", "udp", "sctp"):
        raise ConfigError(f"{what}: protocol {protocol!r} is none of tcp, udp, sctp")
    return (check_address(address, what).text, check_port(port, what), protocol)


def check_service(spec: ServiceSpec) -> ServiceSpec:
    """The spec with its address normalised. ConfigError when a field is not what it should be;
    destinations are looked at by check_destination().
    """
    if not isinstance(spec, ServiceSpec):
        raise ConfigError(f"{spec!r} is no ServiceSpec")
    address, _, _ = check_key(*spec.key)
    for field in ("scheduler", "persistence_group", "name"):
        if not isinstance(getattr(spec, field), str):
            raise ConfigError(f"{spec!r}: {field} must be a string")
    for field in ("destinations", "rules"):
        if not isinstance(getattr(spec, field), tuple | list):
            raise ConfigError(f"{spec!r}: {field} must be a tuple")
    if spec.persistence is not None:
        check_number(spec.persistence, 1, SECONDS_MAX, f"{spec}: persistence (seconds)")
    return replace(spec, address=address) if spec.address != address else spec


def check_destination(spec: DestinationSpec, service: ServiceSpec) -> DestinationSpec:
    """The spec with its address normalised. ConfigError."""
    if not isinstance(spec, DestinationSpec):
        raise ConfigError(f"{service}: {spec!r} is no DestinationSpec")
    try:
        address = check_address(spec.address, "address")
        if (":" in service.address) != (address.version == 6):
            raise ConfigError("address of the other IP family; masq needs one family")
        check_port(spec.port, "destination")
        check_number(spec.weight, 0, WEIGHT_MAX, "weight")
        if spec.method != "masq":
            raise ConfigError(f"forwarding method {spec.method!r} is not available; use masq")
    except ConfigError as error:
        raise ConfigError(f"{service}: destination {spec.address!r}: {error}") from None
    return spec if spec.address == address.text else replace(spec, address=address.text)


def compile_rules(
    rules: tuple[SourceRule, ...], service: ServiceSpec
) -> tuple[tuple[tuple[tuple[bytes, bytes], ...] | None, bool, int], ...]:
    version = parse_address(service.address).version
    compiled = []
    for rule in rules:
        if not isinstance(rule, SourceRule) or not isinstance(rule.sources, tuple | list):
            raise ConfigError(f"{service}: {rule!r} is no SourceRule with a tuple of sources")
        if not isinstance(rule.masquerade, bool):
            raise ConfigError(
                f"{service}: masquerade {rule.masquerade!r} is neither True nor False"
            )
        try:
            if not all(isinstance(source, str) for source in rule.sources):
                raise ValueError(f"{rule.sources!r} are not all strings")
            # Networks of the other family admit nobody; that is not "any".
            networks = parse_networks(tuple(rule.sources), version) if rule.sources else None
        except ValueError as error:
            raise ConfigError(f"{service}: source rule: {error}") from None
        if rule.on_empty not in ("reject", "drop"):
            raise ConfigError(f"{service}: on_empty {rule.on_empty!r} is neither reject nor drop")
        compiled.append(
            (
                networks,
                rule.masquerade,
                int(Verdict.REJECT if rule.on_empty == "reject" else Verdict.DROP),
            )
        )
    return tuple(compiled)


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
    handles: dict[Endpoint, Handle],
    scheduler: Scheduler | None,
    affinity: int,
) -> Record:
    """What the core takes for a spec whose destinations have these handles, in the order in which
    they were added. ConfigError.
    """
    address = parse_address(spec.address)
    masquerade = None
    if spec.masquerade_address is not None:
        source = check_address(spec.masquerade_address, f"{spec}: masquerade_address")
        if source.version != address.version:
            raise ConfigError(f"{spec}: masquerade_address is of the other IP family")
        masquerade = source.packed
    newest_first = [*reversed(handles.items())]
    weights = {(m.address, m.port): m.weight for m in spec.destinations}
    members = [(handle.id, weights[endpoint]) for endpoint, handle in newest_first]
    return Record(
        address=address.packed,
        port=spec.port,
        protocol=Protocol[spec.protocol.upper()],
        scheduler=schedulers.BUILTIN.get(spec.scheduler, schedulers.PYTHON),
        chooser=None if scheduler is None else Chooser(spec, scheduler),
        candidates=None
        if scheduler is None
        else tuple(
            handle.with_weight(weights[endpoint])
            for endpoint, handle in newest_first
            if weights[endpoint]
        ),
        persistence=(spec.persistence or 0) * 10**9,
        affinity=affinity,
        masquerade=masquerade,
        members=members,
        rules=compile_rules(spec.rules, spec),
    )
