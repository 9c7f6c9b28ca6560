"""A gateway of one's own: packets in, routed packets out. No daemon, no root, no threads.

    python examples/gateway.py

Two web servers stand behind 192.0.2.10:80; a client of theirs sends a packet, a server answers,
and a stranger asks for a port that nobody serves.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from ipaddress import ip_address

import svcdp


def build() -> svcdp.Dataplane:
    """A dataplane with one service. `seed` makes random choices the same in every run."""
    dp = svcdp.Dataplane(max_connections=100_000, seed=1)
    with dp.transaction() as tx:
        web = tx.service("192.0.2.10", 80, "udp", scheduler="rr", name="web")
        web.add("10.0.0.1", 8080)
        web.add("10.0.0.2", 8080)
    return dp


def route(dp: svcdp.Dataplane, packets: Iterable[bytearray]) -> Iterator[tuple[bytes, str | None]]:
    """What to send for each packet, and the address to send it to (None: where it says itself)."""
    for packet in packets:
        result = dp.process(packet)
        match result.verdict:
            case svcdp.Verdict.FORWARD:
                yield bytes(packet), result.next_hop
            case svcdp.Verdict.PASS:
                yield bytes(packet), None
            case svcdp.Verdict.REJECT if result.packet is not None:
                yield bytes(result.packet), None  # the answer: a TCP reset or an ICMP error
            case svcdp.Verdict.DROP:
                print(f"dropped: {result.reason.name}")


def datagram(source: str, source_port: int, target: str, target_port: int) -> bytearray:
    """An IPv4 packet with an empty UDP datagram; checksum 0 stands for "not computed"."""
    header = struct.pack("!BBHHHBBH", 0x45, 0, 28, 0, 0, 64, 17, 0)
    addresses = ip_address(source).packed + ip_address(target).packed
    return bytearray(header + addresses + struct.pack("!HHHH", source_port, target_port, 8, 0))


def endpoints(packet: bytes) -> str:
    """Source and destination of a packet that `datagram` made."""
    source, target = ip_address(packet[12:16]), ip_address(packet[16:20])
    source_port, target_port = struct.unpack("!HH", packet[20:24])
    return f"{source}:{source_port} -> {target}:{target_port}"


def main() -> None:
    """Route three packets and say what became of them."""
    dp = build()
    arriving = [
        datagram("198.51.100.7", 40000, "192.0.2.10", 80),
        datagram("10.0.0.2", 8080, "198.51.100.7", 40000),
        datagram("198.51.100.7", 40001, "192.0.2.10", 81),
    ]
    before = [endpoints(bytes(packet)) for packet in arriving]
    for was, (packet, next_hop) in zip(before, route(dp, arriving), strict=True):
        print(f"{was}  becomes  {endpoints(packet)}  next hop {next_hop or '(unchanged)'}")
    print(dp.explain("udp 198.51.100.8:40000 -> 192.0.2.10:80"))


if __name__ == "__main__":
    main()
