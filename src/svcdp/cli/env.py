"""``svcdp env``"""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

import click

from svcdp.cli.options import config_options, manifests_option
from svcdp.cli.printers import note
from svcdp.errors import NotFoundError

__all__ = ["command"]

#: What a shell takes for a variable.
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@click.command("env")
@click.argument("pod", required=False)
@click.option("-n", "--namespace", metavar="NS", default="default", help="[default: default]")
@manifests_option(required=False)
@click.option(
    "--format",
    "form",
    type=click.Choice(("dotenv", "shell", "json")),
    default="dotenv",
    show_default=True,
    help="NAME=value as Docker's --env-file takes it, export lines, or an object.",
)
@config_options(
    ("service_cidrs", "service_node_port_range", "allocations_file", "run_dir", "admin_socket")
)
def command(
    pod: str | None,
    namespace: str,
    manifests: str | None,
    form: str,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Print the environment variables that tell a container of Services.

    Of the Services in a folder, else those of a running daemon. A POD of manifests says whether
    it wants to be told (enableServiceLinks); without one all is told.
    """
    from svcdp.node.config import load

    config = load(config_file, flags=flags).config
    if manifests:
        found = _offline(manifests, config, namespace, pod)
    else:
        found = _online(config.admin_path, namespace, pod)
    if form == "json":
        click.echo(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        if not _IDENTIFIER.fullmatch(name):
            note(f"warning: {name!r} is left out: no shell knows such a name")
        elif form == "shell":
            click.echo(f"export {name}={shlex.quote(value)}")
        else:
            click.echo(f"{name}={value}")


def _offline(folder: str, config: Any, namespace: str, pod: str | None) -> dict[str, str]:
    from svcdp.cli.offline import offline_objects
    from svcdp.discovery.env import environment
    from svcdp.kube.model import ObjectKey, Pod, Service

    objects = offline_objects(folder, config)
    links = True
    if pod:
        key = ObjectKey("Pod", namespace, pod)
        mine = next((each for each in objects if isinstance(each, Pod) and each.key == key), None)
        if mine is None:
            raise NotFoundError(f"{key}: not in {folder}")
        links = mine.wants_service_links
    services = (each for each in objects if isinstance(each, Service))
    return environment(services, namespace, enable_service_links=links)


def _online(path: str, namespace: str, pod: str | None) -> dict[str, str]:
    from svcdp.node.client import AdminClient

    with AdminClient(path) as client:
        links = True
        if pod:
            mine = [each for each in client.get("pods", namespace=namespace) if each["name"] == pod]
            if not mine:
                raise NotFoundError(
                    f"Pod {namespace}/{pod}: the daemon knows Pods of manifests only"
                )
            links = mine[0]["enableServiceLinks"]
        items = client.get("environment", namespace=namespace, serviceLinks=links)
        return {item["name"]: item["value"] for item in items}
