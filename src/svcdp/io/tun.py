"""A TUN device: packets of a virtual interface, for gateways in user space."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct

from svcdp.dataplane import Dataplane
from svcdp.errors import (
    ClosedError,
    ConfigError,
    FeatureUnavailable,
    MissingCapability,
    PlatformError,
)
from svcdp.io.netns import NetNS, call_in

__all__ = ["Tun", "open_device"]

# linux/if_tun.h
TUNSETIFF = 0x400454CA
IFF_TUN = 0x0001
IFF_NO_PI = 0x1000

PACKET_MAX = 65535
HEADROOM = 64  # bytes; no tunnel's headers are longer
NAME_MAX = 15  # IFNAMSIZ less the 0 at its end


class Tun:
    """A TUN device that routes what the kernel sends into it.

    The device is made when it is not there, and goes with the last who has it open, unless it is
    persistent. Addresses, routes and link state are the caller's (``ip link set NAME up``).
    ``name`` may have a ``%d`` for the kernel to fill. Raises MissingCapability without
    CAP_NET_ADMIN and FeatureUnavailable without /dev/net/tun.
    """

    def __init__(self, dp: Dataplane, name: str = "svcdp%d", *, netns: NetNS = None) -> None:
        self._dp = dp
        self._buffer = bytearray(HEADROOM + PACKET_MAX)
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._fd, self.name = call_in(netns, lambda: open_device(name))
        except BaseException:
            os.close(self._stop_read)
            os.close(self._stop_write)
            raise

    def fileno(self) -> int:
        """Readable when a packet waits."""
        self._check_open()
        return self._fd

    def process_ready(self, limit: int = 1024) -> int:
        """Route the packets that wait, ``limit`` at most, and return how many they were.

        Passed and forwarded packets and answers go back into the kernel, dropped ones do not.
        """
        self._check_open()
        view = memoryview(self._buffer)
        for count in range(limit):
            try:
                size = os.readv(self._fd, [view[HEADROOM:]])
            except BlockingIOError:
                return count
            except OSError as error:
                raise PlatformError(
                    error.errno, f"TUN device {self.name}: {error.strerror}; was it removed?"
                ) from None
            result = self._dp.process(view[: HEADROOM + size], headroom=HEADROOM)
            if result.packet is not None:
                self._write(result.packet)
        return limit

    def run(self) -> None:
        """Route packets until :meth:`stop`, which any thread may call.

        PlatformError when the device is taken away.
        """
        self._check_open()
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._stop_read, select.POLLIN)
        while True:
            if self._stop_read in (fd for fd, _ in poll.poll()):
                os.read(self._stop_read, 4096)
                return
            self.process_ready()

    def stop(self) -> None:
        """Make :meth:`run` return, also if it is called only later."""
        if self._fd >= 0:
            os.write(self._stop_write, b"\0")

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            for fd in (self._fd, self._stop_read, self._stop_write):
                os.close(fd)
            self._fd = -1

    def __enter__(self) -> Tun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._fd < 0:
            raise ClosedError(f"TUN device {self.name} is closed")

    def _write(self, packet: memoryview) -> None:
        try:
            os.write(self._fd, packet)
        except OSError as error:
            # EINVAL: not an IP packet. EIO: the link is down. Both lose what a wire would.
            if error.errno not in (errno.EINVAL, errno.EIO, errno.EAGAIN):
                raise


def open_device(name: str) -> tuple[int, str]:
    """A TUN device without packet information: its file descriptor, which does not block, and its
    name. Raises as :class:`Tun` does.
    """
    if not 0 < len(name.encode()) <= NAME_MAX:
        raise ConfigError(f"TUN device name {name!r} is not of 1 to {NAME_MAX} bytes")
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise FeatureUnavailable(
            error.errno, "cannot open /dev/net/tun; load the tun module, or expose the device"
        ) from None
    try:
        request = struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI)
        reply = fcntl.ioctl(fd, TUNSETIFF, request)
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EPERM:
            raise MissingCapability(
                error.errno, f"TUN device {name}: needs CAP_NET_ADMIN; run as root or grant it"
            ) from None
        raise PlatformError(error.errno, f"TUN device {name}: {error.strerror}") from None
    return fd, reply[:16].rstrip(b"\0").decode()
