"""``svcdp dns``"""

from __future__ import annotations

from typing import Any

import click

from svcdp.cli.options import config_options, manifests_option

__all__ = ["command"]

LISTEN = ("127.0.0.1:1053", "[::1]:1053")


@click.command("dns")
@manifests_option(required=False)
@click.option(
    "--listen",
    metavar="ADDRESS:PORT",
    multiple=True,
    default=LISTEN,
    show_default=True,
    help="Where to answer, by UDP and TCP; again for more.",
)
@click.option(
    "--zone",
    "--dns-zone",
    "dns_zone",
    metavar="NAME",
    help="Zone of the cluster's names. [default: cluster.local]",
)
@click.option(
    "--upstream",
    "--dns-upstreams",
    "dns_upstreams",
    metavar="ADDRESS[:PORT]",
    multiple=True,
    help="Resolver to ask for all other names; again for more. [default: /etc/resolv.conf's]",
)
@click.option(
    "--metrics", metavar="ADDRESS:PORT", help="Where to serve /metrics. [default: nowhere]"
)
@config_options(
    (
        *("kubeconfig", "min_sync_period", "dns_recursion", "dns_rate", "dns_log"),
        *("service_cidrs", "service_node_port_range", "allocations_file"),
        *("log_level", "log_format"),
    )
)
def command(
    listen: tuple[str, ...], metrics: str | None, config_file: str | None, **flags: Any
) -> None:
    """Answer DNS questions for the names of Services until stopped, and do nothing else.

    It needs no rights but to bind its ports. SIGHUP reads the manifests again.
    """
    from svcdp.node import dns, logs
    from svcdp.node.config import load

    config = load(config_file, flags=flags).config
    places = [place for each in listen if (place := _place(each, "--listen"))]
    logs.configure(config.log_level, config.log_format)
    dns.run(config, places, _place(metrics, "--metrics") if metrics else None)


def _place(text: str, option: str) -> tuple[str, int] | None:
    from svcdp.node.values import Bind

    try:
        return Bind(text).place
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=option) from None
