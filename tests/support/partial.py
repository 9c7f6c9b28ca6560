"""Packets whose transport checksum is not complete, as the kernel hands over offloaded ones."""

from __future__ import annotations

import ctypes

from svcdp import PacketBatch

#: enum svcdp_packet_flags of abi.h.
CSUM_PARTIAL = 1


class Packet(ctypes.Structure):
    """struct svcdp_packet of abi.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("len", ctypes.c_uint32),
        ("mark", ctypes.c_uint32),
        ("headroom", ctypes.c_uint16),
        ("flags", ctypes.c_uint16),
        ("verdict", ctypes.c_uint8),
        ("reason", ctypes.c_uint8),
        ("answer", ctypes.c_uint16),
        ("destination", ctypes.c_uint32),
        ("answer_mtu", ctypes.c_uint32),
    )


class _Batch(ctypes.Structure):
    """The beginning of a PacketBatch object: see batch.pxd."""

    _fields_ = (
        ("references", ctypes.c_ssize_t),
        ("type", ctypes.c_void_p),
        ("methods", ctypes.c_void_p),
        ("packets", ctypes.POINTER(Packet)),
    )


def packets_of(batch: PacketBatch) -> ctypes._Pointer[Packet]:
    """The packets of a batch, as the core sees them: only queue loops set their flags."""
    return _Batch.from_address(id(batch)).packets
