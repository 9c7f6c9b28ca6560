"""``svcdp replay``"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import click

from svcdp.cli.options import OFFLINE, config_options, manifests_option, node_option, output_option
from svcdp.cli.printers import document, table

__all__ = ["command"]


@click.command("replay")
@click.argument("capture", metavar="IN.PCAP")
@click.option("-w", "--write", metavar="OUT.PCAP", help="Write what comes out.")
@manifests_option(required=True)
@node_option
@output_option("json", "yaml")
@config_options(OFFLINE)
def command(
    capture: str,
    write: str | None,
    manifests: str,
    output: str | None,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Send the packets of a capture file through the dataplane; count what became of them.

    Time is that of the capture: the same file always gives the same result.
    """
    from svcdp.cli.offline import offline_dataplane
    from svcdp.io.pcap import Reader, Writer, replay
    from svcdp.node.config import load

    dataplane = offline_dataplane(manifests, load(config_file, flags=flags).config)
    with open(capture, "rb") as source, contextlib.ExitStack() as stack:
        reader = Reader(source)
        target = stack.enter_context(_replaced(write)) if write else None
        writer = Writer(target, reader.link_type) if target else None
        done = replay(dataplane, reader, writer)
    rows = [
        [verdict.name, reason.name, count]
        for (verdict, reason), count in sorted(done.packets.items())
    ]
    if output:
        packets = [dict(zip(("verdict", "reason", "packets"), row, strict=True)) for row in rows]
        click.echo(document({"packets": packets, "notIP": done.not_ip}, output))
    else:
        click.echo(table(["VERDICT", "REASON", "PACKETS"], rows))


@contextlib.contextmanager
def _replaced(path: str) -> Iterator[BinaryIO]:
    """A new file that gets its name only when it is whole."""
    partial = f"{path}.part"
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise
