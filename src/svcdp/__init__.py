"""Kubernetes Services and IPVS-class load balancing for any Python program.

Buffers in, rewritten buffers out: no daemon, no root, no threads, no logs configured::

    import svcdp

    dp = svcdp.Dataplane()
    with dp.transaction() as tx:
        web = tx.service("10.96.0.10", 80, "tcp", scheduler="wrr")
        web.add("10.1.1.7", 8080, weight=2)
    result = dp.process(packet)

`svcdp.kube` turns Kubernetes objects into services, `svcdp.io` brings packets in and out, and
`svcdp.node` is the daemon made of it all.
"""

import logging

from svcdp._core.batch import PacketBatch as PacketBatch
from svcdp._core.engine import Result as Result
from svcdp._version import __version__ as __version__
from svcdp.dataplane import Captures as Captures
from svcdp.dataplane import Connection as Connection
from svcdp.dataplane import Dataplane as Dataplane
from svcdp.dataplane import DestinationStatus as DestinationStatus
from svcdp.dataplane import Explanation as Explanation
from svcdp.dataplane import PossibleDestination as PossibleDestination
from svcdp.dataplane import ServiceStatus as ServiceStatus
from svcdp.dataplane import Stats as Stats
from svcdp.dataplane import Transaction as Transaction
from svcdp.dataplane import VirtualService as VirtualService
from svcdp.errors import CapacityError as CapacityError
from svcdp.errors import ClosedError as ClosedError
from svcdp.errors import ConfigError as ConfigError
from svcdp.errors import ConflictError as ConflictError
from svcdp.errors import FeatureUnavailable as FeatureUnavailable
from svcdp.errors import ManifestError as ManifestError
from svcdp.errors import MissingCapability as MissingCapability
from svcdp.errors import NotFoundError as NotFoundError
from svcdp.errors import PlatformError as PlatformError
from svcdp.errors import RulesError as RulesError
from svcdp.errors import SourceError as SourceError
from svcdp.errors import SvcdpError as SvcdpError
from svcdp.schedulers import register_scheduler as register_scheduler
from svcdp.types import DestinationSpec as DestinationSpec
from svcdp.types import Flow as Flow
from svcdp.types import ForwardMethod as ForwardMethod
from svcdp.types import Protocol as Protocol
from svcdp.types import Reason as Reason
from svcdp.types import ServiceSpec as ServiceSpec
from svcdp.types import SourceRule as SourceRule
from svcdp.types import Verdict as Verdict

logging.getLogger(__name__).addHandler(logging.NullHandler())


