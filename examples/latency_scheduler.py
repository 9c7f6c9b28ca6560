"""A scheduler in Python: new connections go where answers came fastest lately.

    python examples/latency_scheduler.py

The core asks `pick()` once for each new connection; packets of known connections never take
the GIL.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import svcdp
from svcdp.abc import Scheduler
from svcdp.types import Destination

#: Seconds, smoothed; an address that was never measured counts as fast, so that it is tried.
latency: defaultdict[str, float] = defaultdict(float)


def measured(address: str, seconds: float) -> None:
    """Tell the scheduler of one more answer."""
    latency[address] += (seconds - latency[address]) / 8


@svcdp.register_scheduler("least-latency")
class LeastLatency(Scheduler):
    """The destination with the least latency for its weight."""

    def pick(self, flow: svcdp.Flow, destinations: Sequence[Destination]) -> int:
        """The index of the destination for a new connection."""
        return min(
            range(len(destinations)),
            key=lambda i: latency[destinations[i].address] / destinations[i].weight,
        )


def main() -> None:
    """Send three connections through a service with one slow server."""
    from gateway import datagram

    dp = svcdp.Dataplane()
    with dp.transaction() as tx:
        service = tx.service("192.0.2.10", 80, "udp", scheduler="least-latency")
        service.add("10.0.0.1", 8080)
        service.add("10.0.0.2", 8080)
    measured("10.0.0.1", 0.900)
    measured("10.0.0.2", 0.010)
    for port in (40000, 40001, 40002):
        result = dp.process(datagram("198.51.100.7", port, "192.0.2.10", 80))
        print(f"{port} -> {result.next_hop}")
        measured("10.0.0.2", 1.800)  # it becomes slow: the next connections go elsewhere


if __name__ == "__main__":
    main()
