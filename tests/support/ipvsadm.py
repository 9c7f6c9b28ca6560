"""What a real ipvsadm printed on a real kernel: the files of tests/unit/ipvs/golden."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

from svcdp.errors import ConfigError
from svcdp.ipvs.listing import ListedService, Rates
from svcdp.ipvs.names import NumericNames, SystemNames
from svcdp.ipvs.restore import parse
from svcdp.status import ConnectionState, DestinationStatus, ServiceStatus
from svcdp.types import ServiceSpec

GOLDEN = Path(__file__).parents[1] / "unit" / "ipvs" / "golden"
TEMPLATE = 0x1000


def golden(name: str) -> str:
    return (GOLDEN / name).read_text()


def listing(name: str) -> list[str]:
    """The lines of a listing, without the first, which names the program."""
    lines = golden(f"{name}.txt").splitlines()
    assert lines[0].startswith("IP Virtual Server version")
    return lines[1:]


class GoldenNames(SystemNames):
    """Of the guest: hosts from its file, ports as everywhere."""

    def __init__(self) -> None:
        lines = [line.split() for line in golden("hosts").splitlines()]
        self._names = {address: name for address, name, *_ in lines}
        self._addresses = {name: address for address, *names in lines for name in names}

    def address(self, host: str, version: int) -> str:
        if host not in self._addresses:
            raise ConfigError(f"{host!r} is no IPv{version} address")
        return self._addresses[host]

    def host(self, address: str) -> str:
        return self._names.get(address, address)


def parse_text(text: str) -> list[ServiceSpec]:
    return parse(text, NumericNames()).specs


def specs(rules: str = "services.rules") -> list[ServiceSpec]:
    return parse_text(golden(rules))


def idle(spec: ServiceSpec) -> ListedService:
    """A service that never had a packet."""
    return ListedService(
        ServiceStatus(
            spec,
            [
                DestinationStatus(d.address, d.port, d.weight, d.method, 0, 0, 0, 0, 0, 0, 0)
                for d in spec.destinations
            ],
        )
    )


def counted() -> ListedService:
    """A service whose destinations have the numbers of counters.txt."""
    rows = [[int(word) for word in line.split()] for line in golden("counters.txt").splitlines()]
    oldest_first = rows[:0:-1]  # the first is the service's; the kernel lists the newest first
    lines = ["-A -t 192.0.2.10:80 -s wlc"]
    lines += [f"-a -t 192.0.2.10:80 -r 10.0.0.{n}:80 -m" for n in range(1, len(rows))]
    (spec,) = parse_text("\n".join(lines))
    statuses = []
    for each, row in zip(spec.destinations, oldest_first, strict=True):
        active, inactive, _, total, packets_in, packets_out, bytes_in, bytes_out = row[:8]
        counters = (active, inactive, total, packets_in, bytes_in, packets_out, bytes_out)
        statuses.append(
            DestinationStatus(each.address, each.port, each.weight, each.method, *counters)
        )
    return ListedService(
        ServiceStatus(spec, statuses),
        tuple(Rates(*row[8:]) for row in oldest_first),
        tuple(row[2] for row in oldest_first),
    )


def connections() -> list[ConnectionState]:
    """Those of /proc/net/ip_vs_conn."""
    return [_connection(line.split()) for line in golden("connections.proc").splitlines()[1:]]


def _connection(words: list[str]) -> ConnectionState:
    protocol, client, client_port, virtual, virtual_port, server, port, state, seconds = words
    fwmark = 0
    if protocol == "IP":
        fwmark = int(virtual.replace(":", "")[:8], 16)
        protocol, virtual = "fwmark", "0" * 8 if len(virtual) == 8 else "::"
    is_template = client_port == "0000"
    return ConnectionState(
        protocol=protocol.lower(),
        client=_address(client),
        client_port=int(client_port, 16),
        virtual=_address(virtual),
        virtual_port=int(virtual_port, 16),
        destination=_address(server),
        destination_port=int(port, 16),
        source=_address(client),
        source_port=int(client_port, 16),
        state=f"SCTP_{state}" if protocol == "SCTP" else state,
        timeout=0,
        expires_in=int(seconds) + 0.5,
        flags=TEMPLATE if is_template else 0,
        fwmark=fwmark,
    )


def _address(text: str) -> str:
    return str(ip_address(bytes.fromhex(text)) if len(text) == 8 else ip_address(text))
