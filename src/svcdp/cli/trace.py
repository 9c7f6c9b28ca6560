"""``svcdp trace``"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from svcdp.cli.options import OFFLINE, config_options, manifests_option, node_option, output_option
from svcdp.cli.printers import document, endpoint, table

if TYPE_CHECKING:
    from svcdp.dataplane import Explanation

__all__ = ["command"]


@click.command("trace")
@click.argument("flow")
@manifests_option(required=True)
@node_option
@output_option("json", "yaml")
@config_options(OFFLINE)
def command(
    flow: str, manifests: str, output: str | None, config_file: str | None, **flags: Any
) -> None:
    """Say where the first packet of FLOW would go, and why. Nothing is sent.

    FLOW is text such as "tcp 192.0.2.4:40000 -> 10.96.0.10:80".
    """
    from svcdp.cli.offline import offline_dataplane
    from svcdp.node.config import load

    config = load(config_file, flags=flags).config
    explanation = offline_dataplane(manifests, config).explain(flow)
    if output:
        click.echo(document({"flow": flow, **_plain(explanation)}, output))
    else:
        click.echo(_text(flow, explanation))


def _plain(explanation: Explanation) -> dict[str, Any]:
    service = explanation.service
    return {
        "action": explanation.action,
        "service": str(service) if service else None,
        "destinations": [
            {
                "address": destination.address,
                "port": destination.port,
                "weight": destination.weight,
                "method": destination.method,
                "masquerade": destination.masquerade,
            }
            for destination in explanation.destinations
        ],
        "reasons": list(explanation.reasons),
    }


def _text(flow: str, explanation: Explanation) -> str:
    lines = [f"Flow:      {flow}", f"Action:    {explanation.action}"]
    lines.append(f"Service:   {explanation.service or '<none>'}")
    lines += ["Reasons:", *(f"  {reason}" for reason in explanation.reasons)]
    if explanation.destinations:
        rows = [
            [endpoint(d.address, d.port), d.weight, d.method, "yes" if d.masquerade else "no"]
            for d in explanation.destinations
        ]
        lines += ["", table(["DESTINATION", "WEIGHT", "METHOD", "MASQUERADE"], rows)]
    return "\n".join(lines)
