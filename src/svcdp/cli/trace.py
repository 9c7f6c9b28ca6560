"""``svcdp trace``"""

from __future__ import annotations

from typing import Any

import click

from svcdp.cli.options import OFFLINE, config_options, manifests_option, node_option, output_option
from svcdp.cli.printers import document, endpoint, table

__all__ = ["command"]


def _mark(context: click.Context, parameter: click.Parameter, text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no number such as 0x80000") from None


@click.command("trace")
@click.argument("flow")
@manifests_option(required=False)
@node_option
@click.option(
    "--mark",
    metavar="NUMBER",
    default="0",
    callback=_mark,
    help="Firewall mark of the packet, as Pods' packets by podInterface have it [default: 0]",
)
@output_option("json", "yaml")
@config_options((*OFFLINE, "run_dir", "admin_socket"))
def command(
    flow: str,
    manifests: str | None,
    mark: int,
    output: str | None,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Say where the first packet of FLOW would go, and why. Nothing is sent.

    By what a folder says, else by what a running daemon serves, with the connections that it
    knows. FLOW is text such as "tcp 192.0.2.4:40000 -> 10.96.0.10:80".
    """
    from svcdp.cli.offline import offline_dataplane
    from svcdp.explain import parse_flow
    from svcdp.node import views
    from svcdp.node.client import AdminClient
    from svcdp.node.config import load

    parse_flow(flow)
    config = load(config_file, flags=flags).config
    request = {"flow": flow, "mark": mark}
    if manifests:
        (found,) = views.explanation(offline_dataplane(manifests, config), request)
    else:
        with AdminClient(config.admin_path) as client:
            (found,) = client.get("explanation", **request)
    if output:
        click.echo(document({"flow": flow, **found}, output))
    else:
        click.echo(_text(flow, found))


def _text(flow: str, found: dict[str, Any]) -> str:
    lines = [f"Flow:      {flow}", f"Action:    {found['action']}"]
    lines.append(f"Service:   {found['service'] or '<none>'}")
    lines += ["Reasons:", *(f"  {reason}" for reason in found["reasons"])]
    if found["destinations"]:
        rows = [
            [
                endpoint(each["address"], each["port"]),
                each["weight"],
                each["method"],
                "yes" if each["masquerade"] else "no",
            ]
            for each in found["destinations"]
        ]
        lines += ["", table(["DESTINATION", "WEIGHT", "METHOD", "MASQUERADE"], rows)]
    return "\n".join(lines)
