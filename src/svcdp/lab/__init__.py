"""Labs: hosts in network namespaces with links between them, for demos, tests and benchmarks.

Needs root and the ``ip`` command. Everything is made in new network namespaces; the one that the
process is in stays as it is.
"""

from svcdp.lab.lab import Lab as Lab
from svcdp.lab.lab import wait_until as wait_until
from svcdp.lab.namespace import Namespace as Namespace
from svcdp.lab.topology import Server as Server
from svcdp.lab.topology import Topology as Topology

__all__ = ["Lab", "Namespace", "Server", "Topology", "wait_until"]
