"""Where objects come from: a folder of manifests."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path

from svcdp.errors import ManifestError, SourceError
from svcdp.kube.decode import Decoded, decode
from svcdp.kube.state import Change

__all__ = ["ManifestSource", "read_folder"]

_SUFFIXES = (".yaml", ".yml", ".json")
_MAX_BYTES = 256 << 20  # of one file; 10,000 Services with their slices are some 20 MB


@dataclass(slots=True)
class _File:
    """What is known of a file. ``seen`` changes with every write that stat() can see."""

    seen: tuple[int, ...] = ()
    digest: bytes = b""
    errors: tuple[ManifestError, ...] = ()
    ignored: Counter[str] | None = None


class ManifestSource:
    """The ``*.yaml``, ``*.yml`` and ``*.json`` files right in a folder, hidden ones apart.

    A file with an error in it counts as it was before; a file that is gone takes its objects
    with it. The folder is watched, not its files: so a ConfigMap volume, which swaps a
    symbolic link, is followed. ``interval`` is the time in seconds between looks for which no
    event is needed, for file systems that have none.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str = "", *, interval: float = 5.0):
        self.folder = Path(folder)
        self.name = name or str(folder)
        self._interval = interval
        self._files: dict[str, _File] = {}
        self._lost: SourceError | None = None
        self._again: asyncio.Event | None = None  # set: look now

    def rescan(self) -> None:
        """Have :meth:`changes` look now, without an event. For the event loop's thread."""
        if self._again is not None:
            self._again.set()

    @property
    def errors(self) -> tuple[ManifestError | SourceError, ...]:
        """What is wrong now."""
        found = [error for _, file in sorted(self._files.items()) for error in file.errors]
        return (*found, self._lost) if self._lost else tuple(found)

    @property
    def ignored(self) -> Counter[str]:
        """How many objects of other kinds the files hold: ``{"apps/v1 Deployment": 2}``."""
        total: Counter[str] = Counter()
        for file in list(self._files.values()):  # a scan may run in another thread
            total += file.ignored or Counter()
        return total

    def scan(self, written: Collection[str] = ()) -> list[Change]:
        """What is different from the last scan; the first one returns everything. Blocks.

        ``written`` are names of files to read even if they look the same. Raises SourceError
        if the folder cannot be read; a file that cannot be is one of :attr:`errors`.
        """
        found = self._list()
        changes = []
        for name in self._files.keys() - found.keys():
            del self._files[name]
            changes.append(Change(origin=name, replace=True))
        for name, seen in found.items():
            file = self._files.setdefault(name, _File())
            if file.seen != seen or name in written:
                file.seen = seen
                changes += self._read(name, file)
        return changes

    async def changes(self) -> AsyncIterator[list[Change]]:
        """First everything, then what changes, for ever. Raises SourceError only at first.

        A batch is empty when only :attr:`errors` changed.
        """
        started = False
        while True:
            try:
                async with aclosing(self._events()) as events:
                    async for written in events:
                        before = self.errors
                        changes = await asyncio.to_thread(self.scan, written)
                        self._lost = None
                        if changes or self.errors != before or not started:
                            started = True
                            yield changes
            except (OSError, SourceError) as error:
                lost = error if isinstance(error, SourceError) else self._unreadable(error)
                if not started:
                    raise lost from error
                if str(lost) != str(self._lost):
                    self._lost = lost
                    yield []
                await asyncio.sleep(self._interval)

    async def _events(self) -> AsyncGenerator[frozenset[str], None]:
        """Names of files that were written; the first and many others are empty.

        Whatever is written after the first was yielded is in a later one. Ends when the path
        is another folder than it was, and for a rescan.
        """
        from watchfiles import awatch

        folder = os.stat(self.folder)
        self._again = asyncio.Event()
        watch = awatch(
            self.folder,
            watch_filter=None,
            recursive=False,
            rust_timeout=round(self._interval * 1000),
            yield_on_timeout=True,
            stop_event=self._again,
        )
        async with aclosing(watch):
            first = asyncio.ensure_future(anext(watch, None))
            try:
                await asyncio.sleep(0)  # runs it to its first await: the watch is set up
                yield frozenset()
                events = await first
            finally:
                first.cancel()
                with suppress(asyncio.CancelledError, OSError):
                    await first
            while events is not None and os.path.samestat(folder, os.stat(self.folder)):
                yield frozenset(os.path.basename(path) for _, path in events)
                events = await anext(watch, None)

    def _list(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name.endswith(_SUFFIXES) and not name.startswith(".") and entry.is_file():
                        with suppress(FileNotFoundError):
                            stat = entry.stat()
                            found[name] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        except OSError as error:
            raise self._unreadable(error) from error
        return dict(sorted(found.items()))

    def _read(self, name: str, file: _File) -> list[Change]:
        path = self.folder / name
        try:
            with open(path, "rb") as stream:
                data = stream.read(_MAX_BYTES + 1)
        except OSError as error:
            file.digest = b""
            file.errors = (ManifestError(f"cannot be read: {error.strerror}", file=str(path)),)
            return []
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest == file.digest:
            return []
        file.digest = digest
        if len(data) > _MAX_BYTES:
            file.errors = (
                ManifestError(f"is larger than {_MAX_BYTES >> 20} MiB; split it", file=str(path)),
            )
            return []
        decoded = decode(data, str(path))
        file.errors = tuple(decoded.errors)
        if decoded.errors:
            return []
        file.ignored = decoded.ignored
        return [Change(origin=name, objects=tuple(decoded.objects), replace=True)]

    def _unreadable(self, error: OSError) -> SourceError:
        return SourceError(f"{self.folder}: cannot be read: {error.strerror or error}")


def read_folder(folder: str | os.PathLike[str]) -> Decoded:
    """All that a daemon started now would take from a folder of manifests. Blocks.

    Raises SourceError if the folder cannot be read.
    """
    source = ManifestSource(folder)
    objects = [found for change in source.scan() for found in change.objects]
    errors = [error for error in source.errors if isinstance(error, ManifestError)]
    return Decoded(objects, errors, source.ignored)
