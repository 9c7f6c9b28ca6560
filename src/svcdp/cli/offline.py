"""A dataplane made of manifests, without a kernel: what trace and replay work on."""

from __future__ import annotations

from svcdp.cli.printers import note
from svcdp.dataplane import Dataplane
from svcdp.kube import read_folder, resolve_all
from svcdp.kube.allocations import allocated
from svcdp.kube.allocationsfile import AllocationsFile
from svcdp.kube.balancers import balanced
from svcdp.kube.model import Object
from svcdp.node.config import NodeConfig
from svcdp.node.context import node_context

__all__ = ["offline_dataplane", "offline_objects"]


def offline_objects(folder: str, config: NodeConfig) -> list[Object]:
    """What a folder says, Services completed as a node with ``config`` would. Problems become
    notes.
    """
    decoded = read_folder(folder)
    node_ports = config.service_node_port_range
    file = AllocationsFile(config.allocations_file)
    objects, lacking = allocated(
        decoded.objects, config.service_cidrs, (node_ports.first, node_ports.last), file.services
    )
    objects, unbalanced = balanced(objects, file.load_balancers)
    for problem in (*decoded.errors, *lacking, *unbalanced):
        note(f"warning: {problem}")
    return objects


def offline_dataplane(folder: str, config: NodeConfig) -> Dataplane:
    """Serve what a folder says, as a node with ``config`` would. Problems become notes.

    Masqueraded source ports and random picks are the same in every run.
    """
    objects = offline_objects(folder, config)
    resolution = resolve_all(objects, node_context(config, config.addresses))
    for problem in resolution.problems:
        note(f"warning: {problem}")
    ports = config.masquerade_ports
    dataplane = Dataplane(
        config.max_connections, seed=0, masquerade_ports=(ports.first, ports.last)
    )
    dataplane.apply(resolution.specs)
    return dataplane
