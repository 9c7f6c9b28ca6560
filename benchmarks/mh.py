"""Maglev hashing, counted: how even its table is, what moves when servers come and go, and whose
connections that breaks. Nothing is timed, and every run counts the same.

``python -m benchmarks.mh`` takes a minute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from ipaddress import ip_address

from svcdp import Dataplane, DestinationSpec, ServiceSpec, Settings

SIZES = (4093, 16381, 65537, 131071, 655373)
SERVERS = (10, 100, 1000)
VIRTUAL, PORT = "10.96.0.1", 80
CONNECTIONS = 50_000
SYN, ACK = 2, 16

Endpoint = tuple[str, int]


def servers(count: int) -> list[str]:
    return [str(ip_address("10.1.0.1") + number) for number in range(count)]


def service(addresses: Sequence[str], scheduler: str, size: int) -> ServiceSpec:
    return ServiceSpec(
        VIRTUAL,
        PORT,
        destinations=tuple(DestinationSpec(address, PORT) for address in addresses),
        scheduler=scheduler,
        mh_table_size=size,
    )


# -- the table -------------------------------------------------------------------------------------


def table(addresses: Sequence[str], size: int) -> list[Endpoint]:
    """Who has each entry."""
    dp = Dataplane(max_connections=1)
    dp.apply([service(addresses, "mh", size)])
    return dp.hash_table(VIRTUAL, PORT)


def needless(before: list[Endpoint], after: list[Endpoint]) -> float:
    """Of the entries of servers that are there before and after, the part that moved from one of
    them to another."""
    both = set(before) & set(after)
    pairs = [pair for pair in zip(before, after, strict=True) if pair[0] in both]
    return sum(old != new and new in both for old, new in pairs) / len(pairs)


def print_tables() -> None:
    line = "| {:>6} | {:>7} | {:>13} | {:>9} | {:>10} | {:>7} |"
    print(line.format("M", "servers", "share / ideal", "one goes", "one in 20", "one new"))
    for size in SIZES:
        for count in SERVERS:
            addresses = servers(count)
            whole = table(addresses, size)
            shares = [share * count / size for share in Counter(whole).values()]
            moved = [
                needless(whole, table(changed, size))
                for changed in (
                    addresses[: count // 2] + addresses[count // 2 + 1 :],
                    [address for n, address in enumerate(addresses) if n % 20 != 10 % count],
                    servers(count + 1),
                )
            ]
            even = f"{min(shares):.3f}-{max(shares):.3f}"
            print(line.format(size, count, even, *(f"{part:.2%}" for part in moved)))


# -- connections -----------------------------------------------------------------------------------


def packet(number: int, flags: int) -> bytearray:
    """Of the connection of a client. Nobody looks at its checksums."""
    data = bytearray(40)
    data[0], data[3], data[8], data[9] = 0x45, len(data), 64, 6
    data[12:16] = (ip_address("198.18.0.0") + number).packed
    data[16:20] = ip_address(VIRTUAL).packed
    data[20:22] = (40000).to_bytes(2, "big")
    data[22:24] = PORT.to_bytes(2, "big")
    data[32], data[33] = 0x50, flags
    return data


def send(dp: Dataplane, flags: int) -> list[str]:
    """A packet on every connection; the servers that they went to."""
    packets = [packet(number, flags) for number in range(CONNECTIONS)]
    dp.process_batch(packets)
    return [str(ip_address(bytes(data[16:20]))) for data in packets]


def broken(scheduler: str, size: int, after: list[str], before: list[str], keep: bool) -> float:
    """Of the connections to servers that stay, the part that a change sends to another one."""
    dp = Dataplane(max_connections=1 << 17, seed=1)
    dp.apply([service(before, scheduler, size)])
    first = send(dp, SYN)
    if not keep:
        # As after a restart, or on another node: nothing is known of the connections.
        dp = Dataplane(max_connections=1 << 17, seed=1, settings=Settings(sloppy_tcp=True))
    dp.apply([service(after, scheduler, size)])
    pairs = [pair for pair in zip(first, send(dp, ACK), strict=True) if pair[0] in after]
    return sum(old != new for old, new in pairs) / len(pairs)


def print_connections() -> None:
    line = "| {:<14} | {:>10} | {:>8} | {:>8} | {:>7} | {:>6} |"
    print(line.format("change", "with table", "must", "mh 65537", "mh 4093", "sh"))
    schedulers = (("mh", 65537), ("mh", 4093), ("sh", 251))
    for count in (10, 100):
        addresses = servers(count)
        for change, after, must in (
            ("one goes", addresses[: count // 2] + addresses[count // 2 + 1 :], 0.0),
            ("one new", servers(count + 1), 1 / (count + 1)),
        ):
            kept = max(broken(*how, after, addresses, True) for how in schedulers)
            lost = [broken(*how, after, addresses, False) for how in schedulers]
            parts = (f"{part:.2%}" for part in (kept, must, *lost))
            print(line.format(f"{change} ({count})", *parts))


if __name__ == "__main__":
    print_tables()
    print()
    print_connections()
