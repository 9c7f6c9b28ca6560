"""One interface on which addresses are announced: questions come in, answers and news go out."""

from __future__ import annotations

import asyncio
import ctypes
import ipaddress
import logging
import socket
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from svcdp.announce import arp, ndp

__all__ = ["Counted", "Interface", "Link"]

log = logging.getLogger(__name__)

SO_ATTACH_FILTER = 26  # asm-generic/socket.h
FRAME_MAX = 2048  # bytes; a question is shorter
BURST = 64  # frames read at a time; others of the event loop get their turn in between

#: linux/filter.h: load a half word, a byte; skip where it is not equal; return.
LDH, LDB, JEQ, RET = 0x28, 0x30, 0x15, 0x06
#: What the kernel gives us, of frames that have the ethertype.
ARP_REQUESTS = ((LDH, 0, 0, 20), (JEQ, 0, 1, arp.REQUEST), (RET, 0, 0, FRAME_MAX), (RET, 0, 0, 0))
SOLICITATIONS = (
    (LDB, 0, 0, 20),
    (JEQ, 0, 3, ndp.ICMPV6),
    (LDB, 0, 0, 54),
    (JEQ, 0, 1, ndp.SOLICITATION),
    (RET, 0, 0, FRAME_MAX),
    (RET, 0, 0, 0),
)


@dataclass(frozen=True, slots=True)
class Interface:
    """An Ethernet device, which is another one with another ``mac`` (packed): neighbours must be
    told.
    """

    name: str
    index: int
    mac: bytes


@dataclass(slots=True)
class Counted:
    """Frames sent since the start."""

    answers: int = 0
    announcements: int = 0


class Link:
    """Answers on ``interface`` for what :meth:`own` said last, while ``may_answer`` says so. For
    the event loop's thread. OSError where the interface cannot be listened at.

    Frames are seen beside the kernel, which goes on to answer for the addresses that it has.
    """

    def __init__(
        self, interface: Interface, counted: Counted, may_answer: Callable[[], bool]
    ) -> None:
        self.interface = interface
        self._counted = counted
        self._may_answer = may_answer
        self._owned: frozenset[bytes] = frozenset()
        self._groups: set[bytes] = set()
        self._sockets: dict[int, socket.socket] = {}  # by ethertype
        self._member: socket.socket | None = None
        loop = asyncio.get_running_loop()
        try:
            for kind, program in ((arp, ARP_REQUESTS), (ndp, SOLICITATIONS)):
                sock = _listen(interface, kind.ETHERTYPE, program)
                self._sockets[kind.ETHERTYPE] = sock
                loop.add_reader(sock, self._read, sock, kind.answer)
        except BaseException:
            self.close()
            raise

    def own(self, addresses: Iterable[bytes]) -> None:
        """Answer for these (packed), and no others."""
        self._owned = frozenset(addresses)
        self._join({ndp.solicited_node(each) for each in self._owned if len(each) == 16})

    def announce(self, address: bytes) -> None:
        """Tell everybody that it (packed) is here."""
        kind = arp if len(address) == 4 else ndp
        frame = kind.announcement(address, self.interface.mac)
        self._send(self._sockets[kind.ETHERTYPE], frame)
        self._counted.announcements += 1

    def close(self) -> None:
        """Answer no more. Idempotent."""
        loop = asyncio.get_running_loop()
        for sock in self._sockets.values():
            loop.remove_reader(sock)
            sock.close()
        self._sockets.clear()
        if self._member is not None:
            self._member.close()
            self._member = None

    def _read(
        self,
        sock: socket.socket,
        answer: Callable[[bytes, frozenset[bytes], bytes], bytes | None],
    ) -> None:
        for _ in range(BURST):
            try:
                frame = sock.recv(FRAME_MAX)
            except BlockingIOError:
                return
            except OSError as error:  # it went down, and may come again
                log.debug("nothing can be read", extra=self._about(error))
                return
            reply = answer(frame, self._owned, self.interface.mac)
            if reply is not None and self._may_answer():
                self._counted.answers += 1
                self._send(sock, reply)

    def _send(self, sock: socket.socket, frame: bytes) -> None:
        try:
            sock.send(frame)
        except OSError as error:  # down, or its queue is full: they ask again
            log.debug("a frame was not sent", extra=self._about(error))

    def _join(self, groups: set[bytes]) -> None:
        """Have the kernel, and switches that listen to MLD, give us what is for these groups."""
        for group in self._groups - groups:
            self._change(socket.IPV6_LEAVE_GROUP, group)
        joined = {
            each for each in groups - self._groups if self._change(socket.IPV6_JOIN_GROUP, each)
        }
        self._groups = (self._groups & groups) | joined

    def _change(self, what: int, group: bytes) -> bool:
        try:
            if self._member is None:
                kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
                self._member = socket.socket(socket.AF_INET6, kind)
            request = group + struct.pack("@I", self.interface.index)
            self._member.setsockopt(socket.IPPROTO_IPV6, what, request)
        except OSError as error:
            extra = {"group": str(ipaddress.ip_address(group)), **self._about(error)}
            log.warning("a multicast group cannot be joined or left", extra=extra)
            return False
        return True

    def _about(self, error: OSError) -> dict[str, str]:
        return {"interface": self.interface.name, "error": error.strerror or str(error)}


def _listen(
    interface: Interface, ethertype: int, program: Iterable[tuple[int, int, int, int]]
) -> socket.socket:
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    sock = socket.socket(socket.AF_PACKET, kind, 0)  # 0: nothing comes before it is bound
    try:
        code = b"".join(struct.pack("@HBBI", *each) for each in program)
        memory = ctypes.create_string_buffer(code, len(code))
        head = struct.pack("@HP", len(code) // 8, ctypes.addressof(memory))
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, head)
        sock.bind((interface.name, ethertype))
    except BaseException:
        sock.close()
        raise
    return sock
