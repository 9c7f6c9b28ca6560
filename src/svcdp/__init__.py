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

from svcdp._core.batch import PacketBatch
from svcdp._core.decap import decapsulate
from svcdp._core.engine import Result
from svcdp._core.fragment import fragment
from svcdp._version import __version__
from svcdp.dataplane import (
    Captures,
    Connection,
    ConnectionState,
    ConnectionWatch,
    Dataplane,
    DestinationStatus,
    Explanation,
    PossibleDestination,
    ServiceStatus,
    Stats,
    Transaction,
    VirtualService,
)
from svcdp.errors import (
    CapacityError,
    ClosedError,
    ConfigError,
    ConflictError,
    FeatureUnavailable,
    ManifestError,
    MissingCapability,
    NotFoundError,
    PlatformError,
    RulesError,
    SourceError,
    StateError,
    SvcdpError,
)
from svcdp.schedulers import register_scheduler
from svcdp.types import (
    DestinationSpec,
    Flow,
    ForwardMethod,
    PassiveHealth,
    Protocol,
    Reason,
    ServiceSpec,
    Settings,
    SourceRule,
    TunnelSpec,
    Verdict,
    fwmark_key,
)

__all__ = [
    "CapacityError",
    "Captures",
    "ClosedError",
    "ConfigError",
    "ConflictError",
    "Connection",
    "ConnectionState",
    "ConnectionWatch",
    "Dataplane",
    "DestinationSpec",
    "DestinationStatus",
    "Explanation",
    "FeatureUnavailable",
    "Flow",
    "ForwardMethod",
    "ManifestError",
    "MissingCapability",
    "NotFoundError",
    "PacketBatch",
    "PassiveHealth",
    "PlatformError",
    "PossibleDestination",
    "Protocol",
    "Reason",
    "Result",
    "RulesError",
    "ServiceSpec",
    "ServiceStatus",
    "Settings",
    "SourceError",
    "SourceRule",
    "StateError",
    "Stats",
    "SvcdpError",
    "Transaction",
    "TunnelSpec",
    "Verdict",
    "VirtualService",
    "__version__",
    "decapsulate",
    "fragment",
    "fwmark_key",
    "register_scheduler",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())
