"""Who may ask what, and how often."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import lru_cache

__all__ = ["LOCAL_NETWORKS", "RateLimiter", "is_within"]

#: Who may ask for names of others unless told otherwise: nobody on the Internet, or the server
#: would be of use for attacks on third parties (RFC 5358).
LOCAL_NETWORKS = (
    *("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"),
    *("169.254.0.0/16", "::1/128", "fc00::/7", "fe80::/10"),
)

CLIENTS = 4096  # known at a time; in a node's life few others come
BURST = 2  # seconds' worth of questions that may come at once


class RateLimiter:
    """A token bucket for each client: ``rate`` questions a second, 0: as many as they like.

    Of too many clients, those are forgotten that did not ask for the longest time.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, when

    def admit(self, client: str) -> bool:
        """Whether a client may ask once more."""
        if not self._rate:
            return True
        now = self._clock()
        full = self._rate * BURST
        tokens, when = self._buckets.pop(client, (full, now))
        tokens = min(tokens + (now - when) * self._rate, full)
        is_admitted = tokens >= 1
        self._buckets[client] = (tokens - is_admitted, now)
        if len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return is_admitted

    def charge(self, client: str, questions: float) -> None:
        """Count one that cost as much as so many more: it is paid for with those to come."""
        if client in self._buckets:
            tokens, when = self._buckets[client]
            self._buckets[client] = (tokens - questions, when)


def is_within(networks: Iterable[str]) -> Callable[[str], bool]:
    """A function that says whether an address is in one of the networks."""
    known = [ipaddress.ip_network(each) for each in networks]

    @lru_cache(CLIENTS)
    def check(address: str) -> bool:
        found = ipaddress.ip_address(address)
        mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
        return any((mapped or found) in network for network in known)

    return check
