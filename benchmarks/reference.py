"""The C yardstick and packet generator of ``reference.c``, built here for this machine."""

from __future__ import annotations

import atexit
import ctypes
import functools
import mmap
import os
import shlex
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_int, c_uint16, c_uint32, c_uint64, c_void_p
from pathlib import Path

from svcdp import PacketBatch

SOURCE = Path(__file__).with_name("reference.c")
#: Bytes from one packet to the next, as in a receive ring.
STRIDE = 2048
#: Alternating, IP header included. Only headers are touched, so sizes hardly matter.
LENGTHS = (64, 1500)
SIGNATURES = {
    "reference_new": (c_void_p, [c_uint32, c_uint32, c_int]),
    "reference_clear": (None, [c_void_p]),
    "reference_free": (None, [c_void_p]),
    "reference_service": (None, [c_void_p, c_uint32, c_uint16, c_uint32, c_uint32]),
    "reference_run": (c_uint32, [c_void_p, c_void_p, c_uint32, c_void_p, c_uint32, c_uint32]),
    "reference_time": (c_uint64, [c_void_p, c_void_p, c_uint32, c_void_p, c_uint32, c_uint32]),
    "reference_time_nothing": (c_uint64, []),
    "reference_packets": (
        None,
        [
            *(c_void_p, c_uint32, c_void_p, c_uint32, c_uint32),
            *(c_uint32, POINTER(c_uint64), c_uint32, c_int),
        ],
    ),
}


@functools.cache
def library() -> ctypes.CDLL:
    """Compile ``reference.c`` into a temporary directory and load it."""
    directory = tempfile.mkdtemp(prefix="svcdp-reference-")
    atexit.register(shutil.rmtree, directory)
    target = os.path.join(directory, "reference.so")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    flags = ["-std=gnu11", "-O3", "-march=native", "-shared", "-fPIC"]
    subprocess.run([*compiler, *flags, str(SOURCE), "-o", target], check=True)
    loaded = ctypes.CDLL(target)
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


class Packets:
    """Slots of packets that a generator written in C fills: TCP, to the VIPs of `services`."""

    def __init__(self, count: int, services: int = 1) -> None:
        self.count = count
        self.services = services
        lengths = [LENGTHS[i % len(LENGTHS)] for i in range(count)]
        self.memory = mmap.mmap(-1, count * STRIDE)
        #: The same memory as svcdp sees it.
        self.batch = PacketBatch.from_buffer(
            self.memory, [i * STRIDE for i in range(count)], lengths
        )
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.lengths = (c_uint32 * count)(*lengths)
        self._random = c_uint64(1)

    def of_flows(self, first: int, *, syn: bool = False) -> None:
        """Write packets of the flows `first`, `first` + 1, ..."""
        library().reference_packets(
            self.address, STRIDE, self.lengths, self.count, first, 0, None, self.services, syn
        )

    def of_any(self, flows: int) -> None:
        """Write packets of any of so many flows, all equally likely."""
        library().reference_packets(
            self.address,
            STRIDE,
            self.lengths,
            self.count,
            0,
            flows,
            self._random,
            self.services,
            False,
        )


class Loop:
    """The C loop and its tables."""

    def __init__(self, entries: int, services: int = 1, *, replies: bool = False) -> None:
        self._library = library()
        self._table = self._library.reference_new(entries, services, replies)

    def __del__(self) -> None:
        self._library.reference_free(self._table)

    def service(self, address: int, port: int, first: int, count: int) -> None:
        """Add a service or replace its destinations: `count` addresses from `first` on."""
        self._library.reference_service(self._table, address, port, first, count)

    def clear(self) -> None:
        """Forget all flows."""
        self._library.reference_clear(self._table)

    def run(self, packets: Packets) -> int:
        """Route the packets; how many were rewritten."""
        return int(
            self._library.reference_run(
                self._table, packets.address, STRIDE, packets.lengths, packets.count, 1
            )
        )

    def time(self, packets: Packets) -> int:
        """The ns that `run` takes in C."""
        return int(
            self._library.reference_time(
                self._table, packets.address, STRIDE, packets.lengths, packets.count, 1
            )
        )

    def time_nothing(self) -> int:
        """The ns that reading the clock takes in C."""
        return int(self._library.reference_time_nothing())
