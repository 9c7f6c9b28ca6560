"""``svcdp controller``"""

from __future__ import annotations

from typing import Any

import click

from svcdp.cli.options import config_options

__all__ = ["command"]


@click.command("controller")
@click.option(
    "--lease-namespace",
    metavar="NS",
    default="svcdp",
    show_default=True,
    envvar="SVCDP_LEASE_NAMESPACE",
    help="Where the Lease is by which one of several controllers works.",
)
@click.option(
    "--lease-duration",
    metavar="SECONDS",
    type=click.IntRange(1, 3600),
    default=15,
    show_default=True,
    help="After how long another one takes over when nothing more is heard.",
)
@click.option(
    "--class-only",
    is_flag=True,
    help="Leave Services that name no loadBalancerClass to a cloud, or whoever serves them.",
)
@click.option(
    "--bind-address",
    metavar="ADDRESS:PORT",
    default="0.0.0.0:10280",
    show_default=True,
    help="Address and port of /healthz, /readyz and /metrics; empty: none.",
)
@config_options(("kubeconfig", "log_level", "log_format"))
def command(
    lease_namespace: str,
    lease_duration: int,
    class_only: bool,
    bind_address: str,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Give a cluster's Services of type LoadBalancer addresses from its LoadBalancerPools, until
    stopped. Once for the cluster: any number may run, of which one works.

    Without --kubeconfig it goes by the service account of its Pod.
    """
    from svcdp.node import controller, logs
    from svcdp.node.config import load
    from svcdp.node.values import IN_CLUSTER, Bind

    config = load(config_file, flags=flags).config
    try:
        place = Bind(bind_address).place
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--bind-address") from None
    logs.configure(config.log_level, config.log_format)
    controller.run(
        controller.ControllerConfig(
            "" if config.kubeconfig == IN_CLUSTER else config.kubeconfig,
            lease_namespace,
            lease_duration,
            class_only,
            place,
        )
    )
