"""The node daemon and its settings. Needs ``svcdp[node]``.

``svcdp.node.daemon.run(NodeConfig(...))`` is what ``svcdp run`` does.
"""

from svcdp.node.config import NodeConfig as NodeConfig
from svcdp.node.config import load as load

__all__ = ["NodeConfig", "load"]
