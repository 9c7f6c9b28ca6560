"""Kubernetes objects to specs: no packets, no kernel, any operating system.

Needs ``svcdp[node]`` (msgspec and PyYAML; watchfiles to follow a folder).
"""

from svcdp.kube.apiserver import ApiServerSource as ApiServerSource
from svcdp.kube.context import NodeContext as NodeContext
from svcdp.kube.decode import Decoded as Decoded
from svcdp.kube.decode import decode as decode
from svcdp.kube.resolve import Resolution as Resolution
from svcdp.kube.resolve import resolve as resolve
from svcdp.kube.resolve import resolve_all as resolve_all
from svcdp.kube.sources import ManifestSource as ManifestSource
from svcdp.kube.sources import read_folder as read_folder
from svcdp.kube.state import Change as Change

__all__ = [
    "ApiServerSource",
    "Change",
    "Decoded",
    "ManifestSource",
    "NodeContext",
    "Resolution",
    "decode",
    "read_folder",
    "resolve",
    "resolve_all",
]
