"""Command-line options that several verbs share. Those of the config follow from its struct."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import click

from svcdp.node.config import NodeConfig, Setting, settings

__all__ = ["OFFLINE", "config_options", "manifests_option", "node_option", "output_option"]

Function = TypeVar("Function", bound=Callable[..., Any])

OFFLINE = (
    "zone",
    "addresses",
    "primary_addresses",
    "pod_cidrs",
    "detect_local_mode",
    "pod_interface",
    "pod_mark",
    "service_cidrs",
    "service_node_port_range",
    "allocations_file",
    "service_proxy_name",
    "scheduler",
    "node_port_addresses",
    "localhost_node_ports",
    "masquerade_all",
    "masquerade_ports",
)
"""Settings that decide what a packet's fate is, wherever it is computed."""


def config_options(only: Collection[str] = ()) -> Callable[[Function], Function]:
    """Add ``--config`` and a flag for each setting (or for those in ``only``)."""

    def decorate(function: Function) -> Function:
        for setting in reversed(settings()):
            if setting.name != "manifests" and (not only or setting.name in only):
                function = _option(setting)(function)
        return click.option(
            "--config",
            "config_file",
            metavar="FILE",
            envvar="SVCDP_CONFIG",
            help="YAML file of kind NodeConfig, or kube-proxy's.",
        )(function)

    return decorate


def _option(setting: Setting) -> Callable[[Function], Function]:
    if setting.is_switch:
        names = f"{setting.flag}/--no-{setting.flag[2:]}"
        return click.option(names, default=None, help=_help(setting))
    metavar = "|".join(setting.choices) or ("LIST" if setting.is_list else "VALUE")
    return click.option(
        setting.flag, metavar=metavar, multiple=setting.is_list, help=_help(setting)
    )


def _help(setting: Setting) -> str:
    text = setting.description[0].upper() + setting.description[1:]
    default = getattr(NodeConfig(node_name=""), setting.name)
    if setting.is_switch:
        default = "yes" if default else "no"
    return f"{text} [default: {default}]" if default not in ("", ()) else f"{text}."


def manifests_option(required: bool) -> Callable[[Function], Function]:
    """``-f DIR``"""
    return click.option(
        "-f",
        "--manifests",
        metavar="DIR",
        required=required,
        help="Folder of Service and EndpointSlice manifests.",
    )


def node_option(function: Function) -> Function:
    """``--node``, for verbs that stand in for a node."""
    return click.option(
        "--node", "node_name", metavar="NAME", help="The node to be [default: this host's name]."
    )(function)


def output_option(*choices: str) -> Callable[[Function], Function]:
    """``-o``; without it, text for people."""
    return click.option("-o", "--output", type=click.Choice(choices), help="Output format.")
