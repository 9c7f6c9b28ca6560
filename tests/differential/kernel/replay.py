"""The same scenario on svcdp: a dataplane, and the little that a router does around it."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import wire
from scenario import Result, Scenario
from topology import (
    FOREIGN_NETWORK,
    MARKED_NETWORK,
    SIDES,
    VIRTUAL_NETWORK,
    director,
    side_of,
)

from svcdp import (
    Dataplane,
    Settings,
    SourceRule,
    SvcdpError,
    Transaction,
    TunnelSpec,
    Verdict,
    fragment,
    fwmark_key,
)

SECOND = 10**9
HEADROOM = 128
MARK = 1

#: As /proc/net/ip_vs names them.
METHODS = {"masq": "Masq", "local": "Local", "tunnel": "Tunnel", "dr": "Route"}
#: As /proc/net/ip_vs_conn names states (ip_vs_proto_sctp.c), where it has other names.
STATES = {
    "SCTP_COOKIE_SENT": "C-SENT",
    "SCTP_COOKIE_REPLIED": "C-REPLIED",
    "SCTP_COOKIE_WAIT": "C-WAIT",
    "SCTP_COOKIE_ECHOED": "C-ECHOED",
    "SCTP_SHUTDOWN_SENT": "S-SENT",
    "SCTP_SHUTDOWN_RECEIVED": "S-RECEIVED",
    "SCTP_SHUTDOWN_ACK_SENT": "S-ACK-SENT",
}
#: IPVS's answer when there is nobody to serve, for TCP too.
RULES = (SourceRule(on_empty="unreachable"),)


def ipvsadm_parser() -> argparse.ArgumentParser:
    """The words of ipvsadm(8) that scenarios use."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    for letter in "AEDaedC":
        parser.add_argument(f"-{letter}", dest="command", action="store_const", const=letter)
    parser.add_argument("--set", nargs=3, type=int)
    for word, protocol in {"-t": "tcp", "-u": "udp", "--sctp-service": "sctp"}.items():
        parser.add_argument(word, dest="service", type=lambda a, p=protocol: (*endpoint(a), p))
    parser.add_argument("-f", dest="fwmark", type=int)
    parser.add_argument("-6", dest="version", action="store_const", const=6, default=4)
    parser.add_argument("-s", dest="scheduler", default="wlc")
    parser.add_argument("-b", dest="flags", type=lambda text: tuple(text.split(",")), default=())
    parser.add_argument("-p", dest="persistent", type=int, nargs="?", const=300)
    parser.add_argument("-M", dest="netmask")
    parser.add_argument("-o", dest="one_packet", action="store_true")
    parser.add_argument("--pe", dest="engine", default="")
    parser.add_argument("-r", dest="server", type=endpoint)
    parser.add_argument("-w", dest="weight", type=int, default=1)
    parser.add_argument("-x", dest="upper", type=int, default=0)
    parser.add_argument("-y", dest="lower", type=int, default=0)
    for word, method in {"-m": "masq", "-i": "tunnel", "-g": "dr"}.items():
        parser.add_argument(word, dest="method", action="store_const", const=method, default="dr")
    parser.add_argument("--tun-type", default="ipip")
    parser.add_argument("--tun-port", type=int, default=0)
    parser.add_argument("--tun-csum", action="store_true")
    return parser


def endpoint(text: str) -> tuple[str, int]:
    """``address:port``, ``[address]:port`` or an address alone."""
    if text.count(":") != 1 and not text.startswith("["):
        return text, 0
    address, _, port = text.rpartition(":")
    return address.strip("[]"), int(port)


PARSER = ipvsadm_parser()


def is_within(address: str, networks: dict[int, str]) -> bool:
    ip = ipaddress.ip_address(address)
    return ip in ipaddress.ip_network(networks[ip.version])


def is_local(address: str) -> bool:
    """Whether an address is the director's."""
    own = (director(side, version) for side in SIDES for version in (4, 6))
    return (
        address in own or is_within(address, VIRTUAL_NETWORK) or is_within(address, MARKED_NETWORK)
    )


class Replay:
    """A scenario on a dataplane whose clock shows the kernel's times."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._now = 0
        self._mark = 0
        self._on_removal = "drop"
        settings = Settings(decrement_ttl=True, answer_rate=0, **scenario.settings)
        self.dp = Dataplane(1 << 14, 1, clock=lambda: self._now, settings=settings)

    def run(self, kernel: Result) -> Result:
        """The outcome of each step, at the same times as in the kernel."""
        outcomes = []
        for (kind, *arguments), (second, _) in zip(self._scenario.steps, kernel, strict=True):
            self._now = int(second * SECOND)
            # What has expired is no load any more: the kernel has timers, a daemon sweeps.
            self.dp.sweep()
            outcomes.append([second, getattr(self, f"_{kind}")(*arguments)])
        return outcomes

    # -- configuration --

    def _ipvs(self, *lines: str) -> str:
        said = ""
        for line in lines:
            try:
                self._command(PARSER.parse_args(line.split()))
            except SvcdpError as error:
                said += f"{error}\n"
        return said

    def _command(self, words: argparse.Namespace) -> None:
        if words.set:
            states = ("established", "fin_wait", "udp")
            chosen = zip(states, words.set, strict=True)
            self.dp.configure_timeouts({state: value for state, value in chosen if value})
            return
        if words.command == "C":
            self.dp.apply(())
            return
        key = fwmark_key(words.fwmark, words.version) if words.fwmark else words.service
        with self.dp.transaction() as tx:
            if words.command in "AE":
                tx.service(*key, **self._service_fields(words))
            elif words.command == "D":
                tx.remove_service(*key)
            else:
                self._server(words.command, tx, key, words)

    def _service_fields(self, words: argparse.Namespace) -> dict[str, Any]:
        return {
            "scheduler": words.scheduler,
            "scheduler_flags": words.flags,
            "mh_table_size": 4093,  # CONFIG_IP_VS_MH_TAB_INDEX=12
            "persistence": words.persistent,
            "persistence_netmask": words.netmask and prefix_length(words.netmask),
            "persistence_engine": words.engine,
            "one_packet": words.one_packet,
            "on_removal": self._on_removal,
            "helper": "ftp" if words.service and words.service[1] == 21 else "",
            "rules": RULES,
        }

    def _server(
        self, command: str, tx: Transaction, key: tuple[str, int, str], words: argparse.Namespace
    ) -> None:
        service = tx.service(*key)
        address, port = words.server
        if command == "d":
            service.remove(address, port)
            return
        version = ipaddress.ip_address(address).version
        side = side_of(address)
        fields: dict[str, Any] = {
            "weight": words.weight,
            "method": "local" if is_local(address) else words.method,
            "upper": words.upper,
            "lower": words.lower,
            "mtu": self._scenario.mtu[side],
        }
        if fields["method"] == "tunnel":
            fields["tunnel"] = TunnelSpec(
                words.tun_type, director(side, version), words.tun_port, words.tun_csum
            )
        change: Callable[..., None] = service.add if command == "a" else service.update
        change(address, port, **fields)

    def _sysctl(self, name: str, value: int) -> None:
        if name == "expire_nodest_conn":
            # svcdp has it by service. The transaction edits those that are there already.
            self._on_removal = "expire" if value else "drop"
            with self.dp.transaction() as tx:
                for status in self.dp.services():
                    tx.service(*status.spec.key, on_removal=self._on_removal)
            return
        kind = type(getattr(Settings(), name))
        self.dp.configure(replace(self.dp.settings, **{name: kind(value)}))

    def _marks(self) -> None:
        self._mark = MARK

    def _wait(self, seconds: float) -> None:
        pass

    # -- packets --

    def _send(self, side: str, *packets: str) -> list[list[list[str]]]:
        return [
            [[out, packet.hex()] for out, packet in self._packet(side, bytes.fromhex(data))]
            for data in packets
        ]

    def _pieces(self, side: str, *packets: str) -> list[list[str]]:
        return [out for came in self._send(side, *packets) for out in came]

    def _packet(self, side: str, packet: bytes) -> list[tuple[str, bytes]]:
        """What comes out for a packet that came in from ``side``, and where."""
        target = wire.read(packet).destination
        marked = is_within(target, MARKED_NETWORK) or is_within(target, FOREIGN_NETWORK)
        result = self.dp.process(
            bytearray(HEADROOM) + packet,
            self._now,
            headroom=HEADROOM,
            mark=self._mark if marked else 0,
        )
        if result.verdict == Verdict.DROP or result.packet is None:
            return []
        out = bytes(result.packet)
        if result.verdict == Verdict.REJECT:
            return [(side, out)]
        if result.verdict == Verdict.FORWARD and result.next_hop is not None:
            target = result.next_hop
        else:
            target = wire.read(out).destination
        if is_local(target):
            return [("host", out if out[0] >> 4 == 4 else out[40:])]
        if result.verdict == Verdict.PASS:
            out = routed(out)
        side = side_of(target)
        return [(side, part) for part in fragment(out, self._scenario.mtu[side])]

    # -- observations --

    def _services(self) -> list[Any]:
        rows = []
        for status in self.dp.services():
            address, port, protocol = status.spec.key
            if protocol == "fwmark":
                name = f"FWM {port:08X}"
            else:
                name = f"{protocol.upper()} {proc_address(address)}:{port:04X}"
            servers = [
                [d.address, d.port, METHODS[d.method], d.weight, d.active, d.inactive]
                for d in reversed(status.destinations)  # IPVS lists the newest first
            ]
            rows.append([name, status.spec.scheduler, servers])
        return rows

    def _connections(self) -> list[Any]:
        known = [
            [
                c.protocol.upper(),
                c.client,
                c.client_port,
                c.virtual,
                c.virtual_port,
                *(("0.0.0.0", 0) if c.method == "bypass" else (c.destination, c.destination_port)),
                STATES.get(c.state, c.state.removeprefix("SCTP_")),
                int(c.expires_in),
            ]
            for c in self.dp.connections()
        ]
        templates = [
            [
                "IP" if t.fwmark else t.protocol.upper(),
                t.client,
                0,
                mark_address(t.fwmark, t.client) if t.fwmark else t.virtual,
                t.virtual_port,
                t.destination,
                t.destination_port,
                t.state,
                int(t.expires_in),
            ]
            for t in self.dp.export_connections()
            if t.is_template
        ]
        return known + templates

    def _counters(self) -> list[Any]:
        rows: list[Any] = []
        for status in self.dp.services():
            servers = [
                [d.connections_total, d.packets_in, d.packets_out, d.bytes_in, d.bytes_out]
                for d in reversed(status.destinations)
            ]
            sums = [sum(column) for column in zip(*servers, strict=True)]
            address, port, protocol = status.spec.key
            name = f"{protocol.upper()} {show(address, port)}"
            rows.append([f"FWM {port}" if protocol == "fwmark" else name, [sums, *servers]])
        return rows


def show(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def proc_address(address: str) -> str:
    ip = ipaddress.ip_address(address)
    return ip.packed.hex().upper() if ip.version == 4 else f"[{ip.exploded}]"


def mark_address(mark: int, client: str) -> str:
    """What IPVS writes as the virtual address of a template that is of a firewall mark."""
    size = len(ipaddress.ip_address(client).packed)
    return str(ipaddress.ip_address(mark.to_bytes(4, "big").ljust(size, b"\0")))


def prefix_length(netmask: str) -> int:
    """Of a dotted IPv4 mask; IPv6 has it as it is."""
    if netmask.isdecimal():
        return int(netmask)
    return ipaddress.ip_network(f"0.0.0.0/{netmask}").prefixlen


def routed(packet: bytes) -> bytes:
    """What a router makes of a packet: RFC 1812 5.3.1, RFC 8200 3."""
    if packet[0] >> 4 == 6:
        return packet[:7] + bytes([packet[7] - 1]) + packet[8:]
    header = packet[:8] + bytes([packet[8] - 1]) + packet[9:10] + bytes(2) + packet[12:20]
    checksum = wire.internet_checksum(header).to_bytes(2, "big")
    return header[:10] + checksum + header[12:] + packet[20:]
