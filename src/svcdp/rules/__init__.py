"""Kernel rules that hand the packets of services to queues, and take them back afterwards.

:mod:`svcdp.rules.probe` says what this host can do.
"""

from svcdp.rules.backend import Backend as Backend
from svcdp.rules.plan import CapturePlan as CapturePlan
from svcdp.rules.probe import choose as choose

__all__ = ["Backend", "CapturePlan", "choose"]
