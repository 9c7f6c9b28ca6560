"""What SLOs are made of: the results of health checks, as Kubernetes' components publish them.

https://kubernetes.io/docs/reference/instrumentation/slis/
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

__all__ = ["Slis"]


class Slis:
    """Checks by name, for each probe (``healthz``, ``livez``, ``readyz``) by itself."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._last = Gauge(
            "kubernetes_healthcheck",
            "Whether a check passed when it was last asked for.",
            ["type", "name"],
            registry=self._registry,
        )
        self._total = Counter(
            "kubernetes_healthchecks",
            "Results of a check.",
            ["type", "name", "status"],
            registry=self._registry,
        )

    def observe(self, probe: str, checks: Mapping[str, bool]) -> None:
        """A probe was answered, by what these checks said."""
        for name, passes in checks.items():
            self._last.labels(probe, name).set(passes)
            self._total.labels(probe, name, "success" if passes else "error").inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
