"""The real server's end of tunnels, where the kernel has no device for it."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import itertools
import os
import selectors
import socket
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

from svcdp._core.decap import decapsulate_payload
from svcdp.errors import ConfigError, MissingCapability, PlatformError
from svcdp.io.tun import PACKET_MAX, open_device

__all__ = ["GUE_PORT", "TYPES", "Decapsulator"]

T = TypeVar("T")

GUE_PORT = 6080
"""IANA's."""

#: Types of tunnels, and the IP protocols that lead to them.
TYPES = {"ipip": (4, 41), "gre": (47,), "gue": (int(socket.IPPROTO_UDP),)}

RECEIVE_BUFFER = 4 << 20  # bytes a socket: Python may be busy for a while
BURST = 64  # packets of a socket before the next one has its turn

#: What happens to a packet that a wire would lose too: EIO, the link is down; EINVAL, it is no
#: packet; the others, there is no room for it now.
LOSSES = (errno.EIO, errno.EINVAL, errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM)

# Of Linux, and not in the socket module: asm-generic/socket.h, linux/udp.h.
SO_RCVBUFFORCE = 33
UDP_NO_CHECK6_RX = 102


class Decapsulator:
    """Takes packets out of tunnels and hands them to the kernel through a TUN device.

    ``types``: the tunnels. ``local``: the address that they end at, any when "". ``sources``:
    addresses and networks that may send, all when empty. ``virtual``: addresses that packets
    inside may be for, all when empty. ``port``: of GUE. Whoever may send can hand this host
    packets with any source address: say who, where the network does not.

    The device ``name`` is made, and goes with :meth:`close`; its addresses and link state are
    the caller's. Raises MissingCapability without CAP_NET_ADMIN and CAP_NET_RAW,
    FeatureUnavailable without /dev/net/tun, ConfigError for what makes no sense.
    """

    def __init__(
        self,
        types: Iterable[str] = ("ipip",),
        name: str = "svcdp-decap",
        *,
        local: str = "",
        sources: Iterable[str] = (),
        virtual: Iterable[str] = (),
        port: int = GUE_PORT,
    ) -> None:
        #: Packets that the kernel got.
        self.taken = 0
        #: Packets from or for somebody else, damaged ones, other things in a tunnel, and those
        #: that the device had no room for, or came while it was down.
        self.refused = 0
        self._sources = [_parse(ipaddress.ip_network, text) for text in sources]
        self._virtual = {_parse(ipaddress.ip_address, text).packed for text in virtual}
        self._buffer = bytearray(PACKET_MAX)
        if not 0 < port < 1 << 16:
            raise ConfigError(f"port {port} is not 1 to 65535")
        with contextlib.ExitStack() as stack:
            self._selector = stack.enter_context(selectors.DefaultSelector())
            for protocol, family in itertools.product(_protocols(types), _families(local)):
                listener = stack.enter_context(_open_socket(family, protocol, local, port))
                self._selector.register(listener, selectors.EVENT_READ, protocol)
            self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, self._stop_read)
            stack.callback(os.close, self._stop_write)
            self._selector.register(self._stop_read, selectors.EVENT_READ)
            self._device, self.name = open_device(name)
            stack.callback(os.close, self._device)
            self._resources = stack.pop_all()

    def run(self) -> None:
        """Serve until :meth:`stop`. PlatformError when the device is taken away."""
        while True:
            for key, _ in self._selector.select():
                if key.fd == self._stop_read:
                    os.read(self._stop_read, 4096)
                    return
                assert isinstance(key.fileobj, socket.socket)
                self._receive(key.fileobj, key.data)

    def stop(self) -> None:
        """Make :meth:`run` return, also if it is called only later. Any thread and signal handler
        may call it."""
        os.write(self._stop_write, b"\0")

    def close(self) -> None:
        """Idempotent."""
        self._resources.close()

    def __enter__(self) -> Decapsulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self, listener: socket.socket, protocol: int) -> None:
        """Take what waits at a socket, BURST packets at most."""
        view = memoryview(self._buffer)
        for _ in range(BURST):
            try:
                size, ancillary, _, sender = listener.recvmsg_into([view], 64)
            except BlockingIOError:
                return
            packet = None
            if self._may_send(sender[0]):
                start, traffic_class = 0, 0
                if listener.type == socket.SOCK_RAW and listener.family == socket.AF_INET:
                    # The only sockets that give the outer header, which the kernel has checked.
                    start, traffic_class = (view[0] & 15) * 4, view[1]
                for _level, _kind, data in ancillary:
                    traffic_class = int.from_bytes(data, sys.byteorder)
                packet = decapsulate_payload(view[start:size], protocol, traffic_class)
            if packet is not None and self._is_for_us(packet) and self._write(packet):
                self.taken += 1
            else:
                self.refused += 1

    def _may_send(self, sender: str) -> bool:
        if not self._sources:
            return True
        address = ipaddress.ip_address(sender.partition("%")[0])
        return any(address in network for network in self._sources)

    def _is_for_us(self, packet: bytes) -> bool:
        address = packet[16:20] if packet[0] >> 4 == 4 else packet[24:40]
        return not self._virtual or address in self._virtual

    def _write(self, packet: bytes) -> bool:
        """Whether the kernel took it."""
        try:
            os.write(self._device, packet)
        except OSError as error:
            if error.errno in LOSSES:
                return False
            raise PlatformError(
                error.errno, f"TUN device {self.name}: {error.strerror}; was it removed?"
            ) from None
        return True


def _protocols(types: Iterable[str]) -> list[int]:
    protocols: list[int] = []
    for name in dict.fromkeys(types):
        if name not in TYPES:
            raise ConfigError(f"no tunnel is of type {name!r}; known are {', '.join(TYPES)}")
        protocols += TYPES[name]
    if not protocols:
        raise ConfigError("no type of tunnel was given")
    return protocols


def _families(local: str) -> list[socket.AddressFamily]:
    if local:
        version = _parse(ipaddress.ip_address, local).version
        return [socket.AF_INET if version == 4 else socket.AF_INET6]
    has_ipv6 = os.path.exists("/proc/net/if_inet6")
    return [socket.AF_INET, socket.AF_INET6] if has_ipv6 else [socket.AF_INET]


def _open_socket(
    family: socket.AddressFamily, protocol: int, local: str, port: int
) -> socket.socket:
    """A socket that does not block and says what the outer traffic class was."""
    is_udp = protocol == socket.IPPROTO_UDP
    where = f"UDP port {port}" if is_udp else f"IP protocol {protocol}"
    try:
        listener = socket.socket(family, socket.SOCK_DGRAM if is_udp else socket.SOCK_RAW, protocol)
    except OSError as error:
        if error.errno == errno.EPERM:
            raise MissingCapability(
                error.errno, f"{where}: needs CAP_NET_RAW; run as root or grant it"
            ) from None
        raise PlatformError(error.errno, f"{where}: {error.strerror}") from None
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
            if is_udp:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                # Tunnels may do without the checksum (RFC 6935).
                listener.setsockopt(socket.IPPROTO_UDP, UDP_NO_CHECK6_RX, 1)
        elif is_udp:
            listener.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        listener.bind((local, port if is_udp else 0))
    except OSError as error:
        listener.close()
        at = f"{local}: " if local else ""
        raise PlatformError(error.errno, f"{at}{where}: {error.strerror}") from None
    return listener


def _parse(kind: Callable[[str], T], text: str) -> T:
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None
