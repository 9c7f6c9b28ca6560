"""Connections that outlive the daemon: saved now and then and at its end, taken up at its start."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
from contextlib import suppress

from svcdp.dataplane import Dataplane
from svcdp.errors import PlatformError, SvcdpError
from svcdp.ipvs.saved import restore, save

__all__ = ["ConnectionStore"]

log = logging.getLogger(__name__)


class ConnectionStore:
    """Keeps the connections of a dataplane in a file. Without a path it does nothing.

    What goes wrong with the file is logged: packets are served all the same. A file that cannot
    be read is kept beside the next one, as ``PATH.unreadable``.
    """

    def __init__(self, dataplane: Dataplane, path: str, interval: float) -> None:
        self._dataplane = dataplane
        self._path = path
        self._interval = interval
        self._lock = threading.Lock()  # one writer of the file at a time
        self._saving: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Go on with what the file has, then save every ``interval`` seconds. To be called when
        services are known: connections without one are left out.
        """
        if not self._path:
            return
        await asyncio.to_thread(self._restore)
        self._saving = asyncio.create_task(self._save_often())

    async def close(self) -> None:
        """Save a last time. Not when `open` did not come to its end: the file has more then."""
        if self._saving is None:
            return
        self._saving.cancel()
        with suppress(asyncio.CancelledError):
            await self._saving
        await asyncio.to_thread(self._save)

    async def _save_often(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await asyncio.to_thread(self._save)

    def _restore(self) -> None:
        try:
            outcomes = restore(self._dataplane, self._path)
        except SvcdpError as error:
            if not isinstance(error, PlatformError) or error.errno != errno.ENOENT:
                log.error("connections are not restored", extra={"error": str(error)})
                with suppress(OSError):
                    os.replace(self._path, f"{self._path}.unreadable")
        else:
            text = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
            log.info("connections restored", extra={"outcomes": text or "none"})

    def _save(self) -> None:
        try:
            with self._lock:
                count, refused = save(self._path, self._dataplane.export_connections())
        except SvcdpError as error:
            log.error("connections are not saved", extra={"error": str(error)})
        except Exception:  # a bug; the next time may do, and packets are served all the same
            log.exception("connections are not saved")
        else:
            log.debug("connections saved", extra={"count": count})
            if refused:
                log.error("connections that cannot be saved", extra={"count": refused})
