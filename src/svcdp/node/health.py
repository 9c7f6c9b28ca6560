"""How this node's proxy is, as it really is: what probes are told.

=============  ==========================================================  =====================
check          fails when                                                  makes fail
=============  ==========================================================  =====================
``updates``    the last update failed, or a change has waited for long     all
``rules``      the capture rules could not be brought up to date           all
``sources``    a source cannot be read                                     readyz
``node``       the Node is being deleted, or tainted by the autoscaler     healthz
``start``      nothing is served yet                                       readyz
=============  ==========================================================  =====================

``livez`` and health-check node ports go by the first two. Where the API server is away neither a
restart nor another node helps, and what was known goes on to be served: load balancers, which go
by ``healthz``, must not leave all nodes at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from svcdp.sync import Progress

__all__ = ["Health"]

TIMEOUT = 60.0  # seconds; kube-proxy's, twice its syncPeriod


class Health:
    """``progress`` is asked at each look, and ``source_error``: what is wrong with what is read
    besides, or "". For the event loop's thread.
    """

    def __init__(
        self,
        progress: Callable[[], Progress],
        source_error: Callable[[], str] = str,
        is_eligible: Callable[[], bool] = lambda: True,
    ) -> None:
        self._progress = progress
        self._source_error = source_error
        self._is_eligible = is_eligible
        #: Whether packets are captured and served.
        self.is_serving = False
        #: What is wrong with the capture rules, or "".
        self.rules_error = ""

    @property
    def node_eligible(self) -> bool:
        """Whether load balancers may send here (`svcdp.kube.health.is_eligible`)."""
        return self._is_eligible()

    @property
    def is_alive(self) -> bool:
        """What ``/livez`` says."""
        return all(self.liveness().values())

    @property
    def stale_seconds(self) -> float:
        """For how long a source has not been readable."""
        since = self._progress().unread_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def last_updated(self) -> float:
        """When the last update succeeded, in seconds since 1970; 0: never."""
        return self._progress().updated

    def liveness(self) -> dict[str, bool]:
        """What ``/livez`` goes by: each check, and whether it passes."""
        progress = self._progress()
        waited = progress.waiting_since
        late = waited is not None and time.monotonic() - waited > TIMEOUT
        return {
            "updates": progress.failure is None and not late,
            "rules": not self.rules_error,
        }

    def health(self) -> dict[str, bool]:
        """What ``/healthz`` goes by."""
        return {**self.liveness(), "node": self.node_eligible}

    def readiness(self) -> dict[str, bool]:
        """What ``/readyz`` goes by."""
        unread = self._progress().unread_since is not None or bool(self._source_error())
        return {"start": self.is_serving, **self.liveness(), "sources": not unread}
