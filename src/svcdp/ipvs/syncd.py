"""The sync daemon: a thread that tells other directors of connections, and hears from them."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from svcdp.dataplane import Dataplane
from svcdp.errors import ConfigError, PlatformError
from svcdp.io.netns import NetNS, call_in
from svcdp.ipvs.addresses import to_wire
from svcdp.ipvs.receiver import Receiver, ReceiverStats
from svcdp.ipvs.sender import Sender, SenderStats
from svcdp.ipvs.sync import MESSAGE_MAX, MessageBuilder, encode_request

__all__ = ["GROUP", "PORT", "SyncConfig", "SyncDaemon", "SyncStats"]

logger = logging.getLogger(__name__)

GROUP = "224.0.0.81"
PORT = 8848

TICK = 0.25  # seconds between two looks for what to send
REQUEST_PAUSE = 10.0  # seconds
INTERFACE_CHECK = 4  # ticks between two looks whether the interface is another one now
BURST = 256  # datagrams that are taken before it is looked for what to send
RECEIVE_BUFFER = 4 << 20  # bytes: a table comes faster than it can be taken
DATAGRAM_MAX = 65535
NAME_SIZE = 16  # bytes of an interface's name (IFNAMSIZ)

SO_RCVBUFFORCE = 33  # asm-generic/socket.h


@dataclass(frozen=True, slots=True)
class SyncConfig:
    """How to reach the other directors; the defaults are those of IPVS. ConfigError.

    ``role``: tell others ("master"), hear from them ("backup"), or both. ``group`` is a multicast
    address, which needs an ``interface``; or the address of the one other director, from which
    alone messages are taken then. ``syncid``: put into what is sent; a backup with 0 hears all.
    ``full_interval``: seconds after which the whole table is sent again, 0: only when asked.
    Connections are told of at packet number ``threshold``, then each ``period`` packets (0: no
    more), and at changes of state.
    """

    role: Literal["master", "backup", "both"]
    interface: str = ""
    group: str = GROUP
    port: int = PORT
    syncid: int = 0
    ttl: int = 1
    version: Literal[0, 1] = 1
    length_max: int = MESSAGE_MAX
    full_interval: float = 0
    threshold: int = 3
    period: int = 50

    def __post_init__(self) -> None:
        if self.role not in ("master", "backup", "both"):
            raise ConfigError(f"sync role {self.role!r} is none of master, backup, both")
        try:
            address = ipaddress.ip_address(self.group)
        except ValueError:
            raise ConfigError(f"sync group {self.group!r} is no IP address") from None
        if getattr(address, "scope_id", None):
            raise ConfigError(f"sync group {self.group}: the interface is a setting of its own")
        if (address.is_multicast or address.is_link_local) and not self.interface:
            raise ConfigError(f"sync group {self.group} needs an interface")
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"sync port {self.port} is not a number from 1 to 65535")
        if not 1 <= self.ttl <= 255:
            raise ConfigError(f"sync ttl {self.ttl} is not a number from 1 to 255")
        MessageBuilder(self.syncid, self.length_max, self.version)

    @property
    def is_multicast(self) -> bool:
        return ipaddress.ip_address(self.group).is_multicast


@dataclass(frozen=True, slots=True)
class SyncStats:
    """Counters since the start."""

    messages_sent: int
    bytes_sent: int
    errors: int  #: of sockets
    strangers: int  #: datagrams from another address than the peer's
    sent: SenderStats
    received: ReceiverStats


class SyncDaemon:
    """Keeps the connections of several directors alike, from `start` to `stop`.

    A director that starts asks the others for their whole table: so one that comes back after a
    crash knows what the rest know (those running Linux's IPVS do not answer that). It asks again
    when services or destinations were added of whose connections it was told before.
    The protocol proves nothing: whoever can send to the port can make connections. Use it on a
    network of its own.
    """

    def __init__(self, dp: Dataplane, config: SyncConfig, *, netns: NetNS = None) -> None:
        self._dp = dp
        self.config = config
        self._netns = netns
        self._channel: _Channel | None = None
        self._sender: Sender | None = None
        self._receiver = Receiver(None, config.syncid)
        self._thread: threading.Thread | None = None
        self._stop_read = self._stop_write = -1
        self._messages = self._bytes = self._errors = self._strangers = 0
        self._broken = ""
        #: What ended the thread before its time, or None.
        self.error: BaseException | None = None

    def start(self) -> None:
        """Open the sockets, then run. PlatformError when they cannot be opened; RuntimeError when
        already started.
        """
        if self._thread is not None:
            raise RuntimeError("the sync daemon is started already")
        config = self.config
        self._channel = call_in(self._netns, lambda: _Channel(config))
        if config.role != "backup":
            self._sender = Sender(
                self._dp,
                config.syncid,
                length_max=config.length_max,
                version=config.version,
                full_interval=config.full_interval,
                threshold=config.threshold,
                period=config.period,
            )
        self._receiver = Receiver(
            self._dp if config.role != "master" else None,
            # A master hears requests of all that hear it.
            config.syncid if config.role != "master" else 0,
            packets=config.threshold,
            on_request=self._sender.request if self._sender else lambda: None,
        )
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="svcdp-sync", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Send what waits, then close. Idempotent."""
        if self._thread is None:
            return
        os.write(self._stop_write, b"\0")
        self._thread.join()
        self._thread = None
        for fd in (self._stop_read, self._stop_write):
            os.close(fd)
        if self._sender is not None:
            self._sender.close()
        if self._channel is not None:
            self._channel.close()

    def check(self) -> None:
        """PlatformError when the thread ended before its time."""
        if self.error is not None:
            raise PlatformError(errno.EIO, f"connections are no longer synchronised: {self.error}")

    def stats(self) -> SyncStats:
        """The counters."""
        received = self._receiver.stats
        return SyncStats(
            self._messages,
            self._bytes,
            self._errors,
            self._strangers,
            self._sender.stats if self._sender else SenderStats(),
            replace(received, outcomes=dict(received.outcomes)),
        )

    # -- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            logger.exception("the sync daemon failed")
            self.error = error

    def _serve(self) -> None:
        due = ask = time.monotonic()
        ticks = 0
        while True:
            now = time.monotonic()
            if now >= due:
                due = now + TICK
                ticks += 1
                if ticks % INTERFACE_CHECK == 0 or self._channel is None:
                    self._reopen()
                if now >= ask:
                    ask = now + REQUEST_PAUSE
                    self._ask()
                if self._sender is not None:
                    self._send(self._sender.messages(now))
            if self._wait(due - now):
                break
            self._receive()
        if self._sender is not None:
            self._send(self._sender.messages(time.monotonic()))
            self._send(self._sender.flush())

    def _ask(self) -> None:
        """For the whole table, while this one lacks something of it: messages get lost, and
        services come later than connections.
        """
        if self._receiver.lacks_something():
            self._send([encode_request(self.config.syncid)])

    def _wait(self, timeout: float) -> bool:
        """For a datagram. True: it is time to stop."""
        poll = select.poll()
        poll.register(self._stop_read, select.POLLIN)
        if self._channel is not None:
            poll.register(self._channel.incoming, select.POLLIN)
        return self._stop_read in (fd for fd, _ in poll.poll(max(timeout, 0) * 1000))

    def _receive(self) -> None:
        if self._channel is None:
            return
        for _ in range(BURST):
            try:
                data, source = self._channel.incoming.recvfrom(DATAGRAM_MAX)
            except BlockingIOError:
                return
            except OSError as error:
                self._fail(error)
                return
            if self._channel.is_peer(source[0]):
                self._receiver.receive(data)
            else:
                self._strangers += 1

    def _send(self, messages: Iterable[bytes]) -> None:
        for message in messages:
            if self._channel is None:
                self._errors += 1
                continue
            try:
                self._channel.send(message)
            except OSError as error:
                self._fail(error)
            else:
                self._messages += 1
                self._bytes += len(message)
                self._broken = ""

    def _reopen(self) -> None:
        """Sockets stay with an interface that went; another may have its name now."""
        if self._channel is not None:
            if self._channel.is_current():
                return
            self._channel.close()
            self._channel = None
        config = self.config
        try:
            self._channel = call_in(self._netns, lambda: _Channel(config))
        except PlatformError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        """Count an error; log it when it is another than the last."""
        self._errors += 1
        text = error.strerror or str(error)
        if text != self._broken:
            self._broken = text
            logger.warning("sync with other directors failed: %s", text)


class _Channel:
    """The sockets: one that hears, one that tells. PlatformError."""

    def __init__(self, config: SyncConfig) -> None:
        self._config = config
        self._family = socket.AF_INET6 if ":" in config.group else socket.AF_INET
        self._peer = str(ipaddress.ip_address(config.group))
        self._stack = contextlib.ExitStack()
        try:
            self._index = socket.if_nametoindex(config.interface) if config.interface else 0
            scope = (0, self._index) if self._family == socket.AF_INET6 else ()
            self._target = (config.group, config.port, *scope)
            self.incoming = self._socket()
            self._outgoing = self._socket()
            self._open_incoming()
            self._open_outgoing()
        except OSError as error:
            self._stack.close()
            place = f" on {config.interface}" if config.interface else ""
            raise PlatformError(
                error.errno,
                f"cannot synchronise by {config.group} port {config.port}{place}:"
                f" {error.strerror or error}",
            ) from None

    def close(self) -> None:
        self._stack.close()

    def send(self, message: bytes) -> None:
        # Not connected: else an ICMP error about one message would be the next one's.
        self._outgoing.sendto(message, self._target)

    def is_peer(self, address: str) -> bool:
        """Whether to listen to this address. Of a multicast group all that are heard."""
        return self._config.is_multicast or address.partition("%")[0] == self._peer

    def is_current(self) -> bool:
        """Whether the interface is still there, by the same name."""
        if not self._config.interface:
            return True
        try:
            name = self.incoming.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, NAME_SIZE)
        except OSError:
            return False
        return name.rstrip(b"\0") == self._config.interface.encode()

    def _socket(self) -> socket.socket:
        sock = socket.socket(self._family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._stack.callback(sock.close)
        if self._family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if self._config.interface:
            name = self._config.interface.encode()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name)
        return sock

    def _open_incoming(self) -> None:
        config = self._config
        sock = self.incoming
        with contextlib.suppress(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        if not config.is_multicast:
            sock.bind(("", config.port))
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        group = to_wire(config.group)
        if self._family == socket.AF_INET:
            member = struct.pack("=4s4si", group, bytes(4), self._index)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
        else:
            member = struct.pack("=16si", group, self._index)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, member)
        sock.bind(self._target)

    def _open_outgoing(self) -> None:
        sock = self._outgoing
        ttl = self._config.ttl
        if self._family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, ttl)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 0)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, ttl)
