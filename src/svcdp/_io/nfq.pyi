"""Types of ``svcdp._io.nfq``; the docstrings are in ``nfq.pyx``."""

from typing import Self

from typing_extensions import disjoint_base

from svcdp._core.engine import Core

TABLE: str

@disjoint_base
class Queue:
    def __new__(
        cls,
        core: Core,
        number: int,
        *,
        fail_open: bool,
        gso: bool,
        max_packets: int,
        receive_buffer: int,
        forward_mark: int,
        pass_mark: int,
        repeat: bool,
    ) -> Self: ...
    @property
    def number(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    def fileno(self) -> int: ...
    def run(self) -> None: ...
    def process_ready(self, limit: int) -> int: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...
    def stats(self) -> dict[str, int]: ...
    def kernel_counters(self) -> tuple[int, int, int]: ...

def is_bound(number: int) -> bool: ...
