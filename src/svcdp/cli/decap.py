"""``svcdp decap``"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

__all__ = ["command"]

CONF = Path("/proc/sys/net/ipv4/conf")

RUN_DIR = "/run/svcdp"

#: rp_filter, of which the greater of "all" and the device counts. Clients come out of the tunnel,
#: and the way to them does not lead into it. Loose needs some address on the device.
OFF, LOOSE = "0", "2"


@click.command("decap")
@click.option(
    "--type",
    "types",
    type=click.Choice(["ipip", "gre", "gue"]),
    multiple=True,
    default=["ipip"],
    help="A type of tunnel to serve; may be repeated. [default: ipip]",
)
@click.option(
    "--vip",
    "virtual",
    metavar="ADDRESS",
    multiple=True,
    help="A virtual address to serve, which this host gets; may be repeated.",
)
@click.option("--local", metavar="ADDRESS", default="", help="Where tunnels end [default: any].")
@click.option(
    "--from",
    "sources",
    metavar="NETWORK",
    multiple=True,
    help="A director that may send; may be repeated. [default: anybody]",
)
@click.option(
    "--device", metavar="NAME", default="svcdp-decap", show_default=True, help="The TUN device."
)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=6080,
    show_default=True,
    help="UDP port of GUE.",
)
def command(
    types: Sequence[str],
    virtual: Sequence[str],
    local: str,
    sources: Sequence[str],
    device: str,
    port: int,
) -> None:
    """Be the real server of a tunnel: take packets out of it.

    For hosts whose kernel has no tunnel device. The packets come out of a TUN device, and the
    host's own programs answer the clients directly. --vip puts the virtual address on that
    device, refuses packets for other ones, and lets this host keep quiet about it in ARP
    (net.ipv4.conf.all.arp_ignore and arp_announce); all of it goes when the command ends, and
    what concerns ARP with the last such command.
    """
    from svcdp.io.decap import Decapsulator

    with Decapsulator(
        types, device, local=local, sources=sources, virtual=virtual, port=port
    ) as tunnels:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: tunnels.stop())
        with _configured(tunnels.name, virtual):
            click.echo(f"{tunnels.name}: packets of {', '.join(types)} come out here")
            tunnels.run()
        click.echo(f"{tunnels.taken} packets came out, {tunnels.refused} were refused")


@contextlib.contextmanager
def _configured(device: str, virtual: Sequence[str]) -> Iterator[None]:
    """The device up and with its addresses, and this host quiet about them in ARP."""
    from svcdp.rules.arp import quiet_arp
    from svcdp.rules.tools import run

    with contextlib.ExitStack() as stack:
        has_ipv4 = any(":" not in address for address in virtual)
        (CONF / device / "rp_filter").write_text(LOOSE if has_ipv4 else OFF)
        if has_ipv4:
            stack.enter_context(quiet_arp(RUN_DIR))
        run(["ip", "link", "set", device, "up"])
        for address in virtual:
            options = ["nodad"] if ":" in address else []
            run(["ip", "address", "add", address, "dev", device, *options])
        if not has_ipv4 and (CONF / "all" / "rp_filter").read_text().strip() != OFF:
            click.echo(
                f"net.ipv4.conf.all.rp_filter is on: no IPv4 packet gets out of {device}"
                " until it has an IPv4 address and a loose rp_filter (2)",
                err=True,
            )
        yield
