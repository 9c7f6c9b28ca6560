"""Memory a connection: how much more of it is resident once the table holds a million."""

from __future__ import annotations

import os
from pathlib import Path

from .cases import FILL, new_dataplane
from .reference import Packets


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def bytes_a_connection(connections: int = 1_000_000) -> float:
    """Both directions, index included."""
    dp = new_dataplane(1)
    packets = Packets(FILL)
    before = resident()
    for first in range(0, connections, FILL):
        packets.of_flows(first, syn=True)
        dp.process_batch(packets.batch)
    return (resident() - before) / dp.stats().connections
