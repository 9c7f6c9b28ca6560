"""Packets from netfilter queues, through a dataplane, and back.

The kernel sends packets to a queue by a rule (``svcdp.rules`` installs them, or your own
``-j NFQUEUE``); an :class:`NFQueue` gives each its verdict. :class:`QueueWorkers` runs several,
a thread each; they share one dataplane.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from svcdp._io.nfq import Queue, is_bound
from svcdp.dataplane import Dataplane
from svcdp.errors import (
    ClosedError,
    ConfigError,
    FeatureUnavailable,
    MissingCapability,
    PlatformError,
)
from svcdp.io.netns import NetNS, call_in

__all__ = ["NFQueue", "QueueStats", "QueueWorkers"]

logger = logging.getLogger(__name__)

#: Mark bits of verdicts, when nobody says otherwise.
FORWARD_MARK = 0x00100000
PASS_MARK = 0x00200000


@dataclass(frozen=True, slots=True)
class QueueStats:
    """What came through a queue since it was opened."""

    received: int  #: packets
    verdicts: int  #: packets that were answered for
    truncated: int  #: packets longer than the kernel hands over; passed as they were
    outgrown: int  #: packets that a tunnel made longer than the kernel takes; dropped
    answers: int  #: resets and ICMP errors sent for rejected packets
    errors: int  #: messages, verdicts or answers that failed
    overruns: int  #: times the receive buffer was full (the kernel counts the packets)
    dropped_kernel: int  #: packets dropped because the queue was full (0 with fail-open)
    dropped_user: int  #: packets dropped because they could not be handed over
    waiting: int  #: packets in the queue now


class NFQueue:
    """One netfilter queue, bound from the start.

    With ``repeat`` a packet that goes on walks its chain again, marked: ``forward_mark`` when it
    was rewritten and ``pass_mark`` when not, so that rules there can tell. Without, and when it
    comes with one of these marks, it is accepted, and marked only when rewritten.

    ``fail_open``: packets pass when the queue is full. ``gso``: take packets of up to 64 KiB
    before they are segmented. ``max_packets``: how many may wait. ``receive_buffer``: bytes.
    ``netns``: where the queue is.

    One thread at a time may run it. Raises MissingCapability without CAP_NET_ADMIN,
    FeatureUnavailable when the kernel lacks the queue or a flag, and PlatformError when the queue
    is taken.
    """

    def __init__(
        self,
        dp: Dataplane,
        number: int,
        *,
        fail_open: bool = True,
        gso: bool = True,
        max_packets: int = 8192,
        receive_buffer: int = 8 << 20,
        forward_mark: int = FORWARD_MARK,
        pass_mark: int = PASS_MARK,
        repeat: bool = True,
        netns: NetNS = None,
    ) -> None:
        if not 0 <= number <= 65535:
            raise ConfigError(f"queue number {number} is not between 0 and 65535")
        for name, value, least, most in (
            ("forward_mark", forward_mark, 0, 0xFFFFFFFF),
            ("pass_mark", pass_mark, 0, 0xFFFFFFFF),
            ("max_packets", max_packets, 1, 0xFFFFFFFF),
            ("receive_buffer", receive_buffer, 1, 0x7FFFFFFF),
        ):
            if not least <= value <= most:
                raise ConfigError(f"{name} {value} is not between {least} and {most}")
        if repeat and (not forward_mark or not pass_mark or forward_mark & pass_mark):
            raise ConfigError("repeat needs a forward_mark and a pass_mark with bits of their own")
        self.number = number
        dp.populate()

        def open_here() -> Queue:
            try:
                return Queue(
                    dp,
                    number,
                    fail_open=fail_open,
                    gso=gso,
                    max_packets=max_packets,
                    receive_buffer=receive_buffer,
                    forward_mark=forward_mark,
                    pass_mark=pass_mark,
                    repeat=repeat,
                )
            except OSError as error:
                raise _explain(error, number) from None

        self._queue = call_in(netns, open_here)

    def run(self) -> None:
        """Serve packets until :meth:`stop`. The GIL is free meanwhile. ClosedError."""
        self._check_open()
        self._queue.run()

    def process_ready(self, limit: int = 1024) -> int:
        """Serve what waits now, about ``limit`` packets at most, and return how many they were.

        For event loops: call it when :meth:`fileno` is readable. Never blocks.
        """
        self._check_open()
        return self._queue.process_ready(limit)

    def fileno(self) -> int:
        """The file descriptor to wait for."""
        self._check_open()
        return self._queue.fileno()

    def stop(self) -> None:
        """Make :meth:`run` return, also if it is called only later. Any thread may do this."""
        self._queue.stop()

    def close(self) -> None:
        """Unbind the queue. Idempotent; RuntimeError while it runs."""
        self._queue.close()

    def stats(self) -> QueueStats:
        """The counters; those of the kernel are 0 once the queue is closed."""
        waiting, dropped_kernel, dropped_user = self._queue.kernel_counters()
        return QueueStats(
            **self._queue.stats(),
            dropped_kernel=dropped_kernel,
            dropped_user=dropped_user,
            waiting=waiting,
        )

    def __enter__(self) -> NFQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._queue.closed:
            raise ClosedError(f"queue {self.number} is closed")


class QueueWorkers:
    """The queues ``first`` to ``last`` of one dataplane, a thread each.

    ``tunnel_queues`` are the first and last of more queues, for packets that a tunnel may wrap:
    never with ``gso``, nobody could segment what is wrapped. Settings are those of
    :class:`NFQueue`.
    """

    def __init__(
        self,
        dp: Dataplane,
        first: int,
        last: int,
        *,
        tunnel_queues: tuple[int, int] | None = None,
        fail_open: bool = True,
        gso: bool = True,
        max_packets: int = 8192,
        receive_buffer: int = 8 << 20,
        forward_mark: int = FORWARD_MARK,
        pass_mark: int = PASS_MARK,
        repeat: bool = True,
        netns: NetNS = None,
    ) -> None:
        if first > last:
            raise ConfigError(f"queues {first}-{last}: the first is above the last")
        tunnels = range(0)
        if tunnel_queues is not None:
            tunnels = range(tunnel_queues[0], tunnel_queues[1] + 1)
        self._open: Callable[[int], NFQueue] = lambda number: NFQueue(
            dp,
            number,
            fail_open=fail_open,
            gso=gso and number not in tunnels,
            max_packets=max_packets,
            receive_buffer=receive_buffer,
            forward_mark=forward_mark,
            pass_mark=pass_mark,
            repeat=repeat,
            netns=netns,
        )
        self._numbers = (*range(first, last + 1), *tunnels)
        self._queues: dict[int, NFQueue] = {}
        self._threads: list[threading.Thread] = []
        self._stats: dict[int, QueueStats] = {}
        #: What ended a worker before its time, or None.
        self.error: BaseException | None = None

    def bind(self) -> None:
        """Bind all queues; their packets wait until `start`. When one cannot be bound, none is,
        and it raises as :class:`NFQueue` does. RuntimeError when they are bound already.
        """
        if self._queues:
            raise RuntimeError("the queues are bound already")
        try:
            for number in self._numbers:
                self._queues[number] = self._open(number)
        except BaseException:
            self._close()
            raise

    def start(self) -> None:
        """Serve all queues, bound as `bind` does if they are not yet. RuntimeError when already
        started.
        """
        if self._threads:
            raise RuntimeError("the workers are started already")
        if not self._queues:
            self.bind()
        self._threads = [
            threading.Thread(
                target=self._run, args=(queue,), name=f"svcdp-queue-{number}", daemon=True
            )
            for number, queue in self._queues.items()
        ]
        for thread in self._threads:
            thread.start()

    def check(self) -> None:
        """PlatformError when a worker ended before its time; the other queues are still served."""
        if self.error is not None:
            number = self.error.errno if isinstance(self.error, OSError) else None
            raise PlatformError(
                number or errno.EIO, f"a queue is no longer served: {self.error}"
            ) from self.error

    def halt(self) -> None:
        """Stop serving, for good; packets wait in the queues until `stop`. Idempotent."""
        for queue in self._queues.values():
            queue.stop()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def stop(self) -> None:
        """Stop serving, then unbind. Idempotent."""
        self.halt()
        self._close()

    def stats(self) -> dict[int, QueueStats]:
        """By queue number; after the stop what they were then."""
        if not self._queues:
            return dict(self._stats)
        return {number: queue.stats() for number, queue in self._queues.items()}

    def _run(self, queue: NFQueue) -> None:
        try:
            queue.run()
        except BaseException as error:
            logger.exception("queue failed number=%d", queue.number)
            self.error = error

    def _close(self) -> None:
        self._stats = {number: queue.stats() for number, queue in self._queues.items()}
        for queue in self._queues.values():
            queue.close()
        self._queues = {}


def _explain(error: OSError, number: int) -> PlatformError:
    """An error of the kernel in words that say what to do."""
    code = error.errno or 0
    # The kernel says EPERM to whoever binds a queue of another.
    if code in (errno.EPERM, errno.EBUSY) and is_bound(number):
        return PlatformError(
            errno.EBUSY,
            f"queue {number} is taken by another process; stop it or choose another queue",
        )
    if code in (errno.EPERM, errno.EACCES):
        return MissingCapability(
            code, f"queue {number}: needs CAP_NET_ADMIN and CAP_NET_RAW; run as root or grant them"
        )
    if code in (errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.EINVAL):
        return FeatureUnavailable(
            code,
            f"{error.strerror}: this kernel lacks nfnetlink_queue (CONFIG_NETFILTER_NETLINK_QUEUE)"
            " or one of the flags that were asked for; `svcdp check` tells which",
        )
    return PlatformError(code, error.strerror or str(error))
