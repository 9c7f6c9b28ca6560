"""What ``ipvsadm-save`` printed, or a person wrote for ``ipvsadm -R``, as services."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Address
from typing import NamedTuple

from svcdp import schedulers
from svcdp.errors import ConfigError
from svcdp.ipvs.keys import read_endpoint, read_key
from svcdp.ipvs.names import Names
from svcdp.ipvs.words import CHECKSUMS, METHODS, Command, read_number, read_words
from svcdp.records import (
    Endpoint,
    Key,
    check_destination,
    check_service,
    is_unicast,
    parse_address,
)
from svcdp.types import DestinationSpec, ServiceSpec, SourceRule, TunnelSpec

__all__ = ["STATES", "Restored", "new_service", "parse"]

SECONDS_MAX = 31 * 24 * 3600
NUMBER_MAX = (1 << 31) - 1
#: The kernel's; with another one mh would send clients to other servers than it does.
MH_TABLE_SIZE = 4093
#: The states whose timeouts ``--set`` sets, in its order.
STATES = ("established", "fin_wait", "udp")
#: Options of tunnels, in the order in which errors name them.
TUNNEL = ("tun-type", "tun-port", *CHECKSUMS)

Options = dict[str, str]


class Restored(NamedTuple):
    """What there is when ipvsadm has run all lines."""

    specs: list[ServiceSpec]
    timeouts: dict[str, float]  #: seconds by state, of those that ``--set`` has set
    zeroed: frozenset[Key]  #: services whose counters ``-Z`` has set to zero


def parse(text: str, names: Names, base: Iterable[ServiceSpec] = ()) -> Restored:
    """What there is when ipvsadm has run all lines, on the services of ``base``.

    Destinations are in the order in which they were added. Tunnels have no source address yet:
    who serves them knows the routes. A client that nobody can serve is told so by ICMP port
    unreachable, as IPVS does. ConfigError names the line and the word.
    """
    table = _Table(names, base)
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if words and words[0] == "ipvsadm":
            del words[0]
        if not words or words[0].startswith("#"):
            continue
        try:
            table.run(read_words(words))
        except ConfigError as error:
            raise ConfigError(f"line {number}: {error}") from None
    return table.restored()


class _Table:
    """The services, as commands change them."""

    def __init__(self, names: Names, base: Iterable[ServiceSpec]) -> None:
        self._names = names
        self._services: dict[Key, ServiceSpec] = {}
        self._servers: dict[Key, dict[Endpoint, DestinationSpec]] = {}
        self._timeouts: dict[str, float] = {}
        self._zeroed: set[Key] = set()
        for spec in base:
            self._services[spec.key] = spec
            self._servers[spec.key] = {
                (each.address, each.port): each for each in spec.destinations
            }

    def restored(self) -> Restored:
        specs = [self._finished(key, spec) for key, spec in self._services.items()]
        return Restored(specs, self._timeouts, frozenset(self._zeroed & self._services.keys()))

    def _finished(self, key: Key, spec: ServiceSpec) -> ServiceSpec:
        servers = tuple(self._servers[key].values())
        # As everywhere here, unless somebody says no.
        mss_clamp = spec.mss_clamp or any(each.tunnel for each in servers)
        return replace(spec, destinations=servers, mss_clamp=mss_clamp)

    def run(self, command: Command) -> None:
        if command.name == "clear":
            self._services.clear()
            self._servers.clear()
        elif command.name == "set":
            for state, word in zip(STATES, command.timeouts, strict=True):
                seconds = read_number(word, 0, SECONDS_MAX, "--set")
                if seconds:  # 0 keeps what is
                    self._timeouts[state] = seconds
        elif command.name == "zero" and not command.options:
            self._zeroed.update(self._services)
        elif command.name == "zero":
            self._zeroed.add(self._known(read_key(command.options, self._names)).key)
        elif command.name.endswith("-service"):
            self._run_on_service(command)
        else:
            self._run_on_server(command)

    def _run_on_service(self, command: Command) -> None:
        key = read_key(command.options, self._names)
        known = self._services.get(key)
        if command.name == "add-service":
            if known is not None:
                raise ConfigError(f"{known} exists already")
            self._services[key] = _configured(new_service(key), command.options)
            self._servers[key] = {}
            return
        service = self._known(key)
        if command.name == "delete-service":
            del self._services[key], self._servers[key]
        else:
            self._services[key] = _configured(service, command.options)

    def _known(self, key: Key) -> ServiceSpec:
        if key not in self._services:
            raise ConfigError(f"there is no service {ServiceSpec(*key)}")
        return self._services[key]

    def _run_on_server(self, command: Command) -> None:
        options = command.options
        service = self._known(read_key(options, self._names))
        servers = self._servers[service.key]
        if "real-server" not in options:
            raise ConfigError("which server? Give -r")
        word = options["real-server"]
        is_mark = service.protocol == "fwmark"
        own_port = 0 if is_mark else service.port
        address, port = read_endpoint(word, "tcp" if is_mark else service.protocol, self._names)
        method = next((METHODS[name] for name in METHODS if name in options), "dr")
        if command.name != "delete-server" and method != "masq":
            port = own_port  # as ipvsadm does it: only masquerading can change a port
        endpoint = (address, port or own_port)
        if command.name == "add-server":
            if endpoint in servers:
                raise ConfigError(f"{service} has the server {word} already")
            servers[endpoint] = self._server(service, DestinationSpec(*endpoint), method, options)
            return
        if endpoint not in servers:
            raise ConfigError(f"{service} has no server {word}")
        if command.name == "delete-server":
            del servers[endpoint]
        else:
            servers[endpoint] = self._server(service, servers[endpoint], method, options)

    def _server(
        self, service: ServiceSpec, old: DestinationSpec, method: str, options: Options
    ) -> DestinationSpec:
        _check_unicast(old.address)
        tunnel = None
        if method == "tunnel":
            tunnel = _read_tunnel(options)
        else:
            for name in TUNNEL:
                if name in options:
                    raise ConfigError(f"--{name} is for tunnels: give -i")
        upper = read_number(options.get("u-threshold", "0"), 0, NUMBER_MAX, "-x")
        lower = read_number(options.get("l-threshold", "0"), 0, NUMBER_MAX, "-y")
        if lower > upper:
            raise ConfigError(f"-y: {lower} is above -x {upper}")
        weight = read_number(options.get("weight", "1"), 0, NUMBER_MAX, "-w")
        server = replace(old, weight=weight, method=method, upper=upper, lower=lower, tunnel=tunnel)
        if tunnel is None:
            return check_destination(server, service)
        stand_in = replace(tunnel, source=old.address)
        return replace(check_destination(replace(server, tunnel=stand_in), service), tunnel=tunnel)


def new_service(key: Key) -> ServiceSpec:
    """What all restored services have in common."""
    return ServiceSpec(
        *key, rules=(SourceRule(on_empty="unreachable"),), mh_table_size=MH_TABLE_SIZE
    )


def _configured(service: ServiceSpec, options: Options) -> ServiceSpec:
    """With these options; ipvsadm sets back those that are not given."""
    scheduler = options.get("scheduler", "wlc")
    if scheduler not in schedulers.names():
        raise ConfigError(f"-s: {scheduler!r} is none of {', '.join(schedulers.names())}")
    persistence = None
    if "persistent" in options:
        persistence = read_number(options["persistent"], 1, SECONDS_MAX, "-p")
    elif service.port == 0:
        raise ConfigError(f"{service}: a service of all ports needs -p (or was a port forgotten?)")
    if options.get("pe", "sip") != "sip":
        raise ConfigError(f"--pe: {options['pe']!r} is not sip")
    if "ops" in options and service.protocol not in ("udp", "fwmark"):
        raise ConfigError("-o is for UDP")
    netmask = _read_netmask(service, options["netmask"]) if "netmask" in options else None
    return check_service(
        replace(
            service,
            scheduler=scheduler,
            scheduler_flags=_read_flags(scheduler, options.get("sched-flags", "")),
            persistence=persistence,
            persistence_netmask=netmask if persistence else None,
            persistence_engine=options.get("pe", ""),
            one_packet="ops" in options,
        )
    )


def _read_flags(scheduler: str, text: str) -> tuple[str, ...]:
    """By name or by number (flag-1), in the order of their bits."""
    bits = schedulers.FLAGS.get(scheduler, {})
    numbered = {f"flag-{bit}": flag for flag, bit in bits.items()}
    flags = set()
    for word in text.split(",") if text else ():
        flag = numbered.get(word, word)
        if flag not in bits:
            known = f"it has {', '.join(bits)}" if bits else "it has none"
            raise ConfigError(f"-b: {scheduler} has no flag {word!r}: {known}")
        flags.add(flag)
    return tuple(sorted(flags, key=lambda flag: bits[flag]))


def _read_netmask(service: ServiceSpec, text: str) -> int | None:
    """In bits; None for all of them."""
    if ":" in service.address:
        bits = read_number(text, 1, 128, "-M")
        return None if bits == 128 else bits
    try:
        zeros = int(IPv4Address(text)) ^ (1 << 32) - 1
    except ValueError:
        raise ConfigError(f"-M: {text!r} is not like 255.255.255.0") from None
    bits = 32 - zeros.bit_length()
    if zeros & zeros + 1 or not bits:
        raise ConfigError(f"-M: {text!r} is not ones, then zeros")
    return bits if zeros else None


def _read_tunnel(options: Options) -> TunnelSpec:
    kind = options.get("tun-type", "ipip")
    # Remote checksum offload is a checksum like another in packets that are passed on.
    checksum = "tun-csum" in options or "tun-remcsum" in options
    if kind == "gue":
        if "tun-port" not in options:
            raise ConfigError("--tun-type gue needs --tun-port")
        port = read_number(options["tun-port"], 1, 65535, "--tun-port")
        return TunnelSpec("gue", port=port, checksum=checksum)
    if kind not in ("ipip", "gre"):
        raise ConfigError(f"--tun-type: {kind!r} is none of ipip, gue, gre")
    for name in ("tun-port", "tun-remcsum") if kind == "gre" else ("tun-port", *CHECKSUMS):
        if name in options:
            raise ConfigError(f"--{name} does not go with --tun-type {kind}")
    return TunnelSpec("gre" if kind == "gre" else "ipip", checksum=checksum)


def _check_unicast(text: str) -> None:
    if not is_unicast(parse_address(text)):
        raise ConfigError(f"-r: {text} cannot be a server's: not unicast, or link-local")
