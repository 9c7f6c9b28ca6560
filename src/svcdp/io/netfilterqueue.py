"""Service routing for users of the NetfilterQueue package, in the loop that they have::

    nfq = NetfilterQueue()
    nfq.bind(1, handler(dp))
    nfq.run()

This module does not import that package: whatever looks like its Packet will do.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Protocol

from svcdp.dataplane import Dataplane
from svcdp.types import Verdict

__all__ = ["Handler", "Packet", "handler"]

logger = logging.getLogger(__name__)


class Packet(Protocol):
    """The part of netfilterqueue.Packet that is used here."""

    def get_payload(self) -> bytes: ...
    def set_payload(self, payload: bytes) -> None: ...
    def accept(self) -> None: ...
    def drop(self) -> None: ...


def handler(dp: Dataplane, on_pass: Callable[[Packet], None] | None = None) -> Handler:
    """A callback that routes packets through a dataplane.

    Each packet gets exactly one verdict, whatever happens. ``on_pass`` is called for packets
    that are no service's, and then it gives the verdict; when it raises, or gives none, the
    packet is accepted. Errors are counted (``handler.errors``) and logged once each place.
    Rejected packets are answered through a raw socket, which needs CAP_NET_RAW; without it they
    are dropped in silence.
    """
    return Handler(dp, on_pass)


class _OneVerdict:
    """A packet on loan to `on_pass`: its first verdict counts, and there is one."""

    def __init__(self, packet: Packet) -> None:
        self._packet = packet
        self.given = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._packet, name)

    def get_payload(self) -> bytes:
        return self._packet.get_payload()

    def set_payload(self, payload: bytes) -> None:
        self._packet.set_payload(payload)

    def accept(self) -> None:
        self._give(self._packet.accept)

    def drop(self) -> None:
        self._give(self._packet.drop)

    def repeat(self) -> None:
        self._give(self._packet.repeat)  # type: ignore[attr-defined]

    def _give(self, verdict: Callable[[], None]) -> None:
        if not self.given:
            verdict()
            self.given = True


class Handler:
    """The callback that :func:`handler` makes."""

    def __init__(self, dp: Dataplane, on_pass: Callable[[Packet], None] | None) -> None:
        #: Packets that were accepted because something failed.
        self.errors = 0
        self._dp = dp
        self._on_pass = on_pass
        self._answers = _Answers()
        self._logged: set[str] = set()

    def __call__(self, packet: Packet) -> None:
        verdict = Verdict.PASS
        try:
            payload = bytearray(packet.get_payload())
            result = self._dp.process(payload)
            verdict = result.verdict
            if verdict is Verdict.FORWARD:
                packet.set_payload(bytes(payload))
            elif verdict is Verdict.REJECT and result.packet is not None:
                self._answers.send(bytes(result.packet))
        except Exception:
            self._log("routing a packet failed; it is accepted as it is")
            verdict = Verdict.PASS
        except BaseException:
            # Ctrl-C is for the program; the packet still gets its verdict.
            packet.accept()
            raise
        if verdict in (Verdict.DROP, Verdict.REJECT):
            packet.drop()
        elif verdict is Verdict.PASS and self._on_pass is not None:
            self._pass_on(packet, self._on_pass)
        else:
            packet.accept()

    def _pass_on(self, packet: Packet, on_pass: Callable[[Packet], None]) -> None:
        loan = _OneVerdict(packet)
        try:
            on_pass(loan)
        except Exception:
            self._log("on_pass failed; the packet is accepted")
        finally:
            loan.accept()

    def _log(self, message: str) -> None:
        self.errors += 1
        if message not in self._logged:
            self._logged.add(message)
            logger.exception(message)


class _Answers:
    """Raw sockets for the answers to rejected packets, opened with the first of each family."""

    def __init__(self) -> None:
        self._sockets: dict[int, socket.socket | None] = {}

    def send(self, answer: bytes) -> None:
        family = socket.AF_INET if answer[0] >> 4 == 4 else socket.AF_INET6
        if family not in self._sockets:
            self._sockets[family] = self._open(family)
        raw = self._sockets[family]
        if raw is None:
            return
        target = answer[16:20] if family == socket.AF_INET else answer[24:40]
        try:
            raw.sendto(answer, (socket.inet_ntop(family, target), 0))
        except OSError as error:
            logger.debug("answer not sent: %s", error)

    @staticmethod
    def _open(family: int) -> socket.socket | None:
        try:
            return socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
        except OSError as error:
            logger.warning("rejected packets are dropped unanswered: %s", error)
            return None
