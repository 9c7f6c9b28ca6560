"""The other end of the admin socket (``svcdp.node.admin``)."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any, Self

from svcdp.errors import SourceError

__all__ = ["AdminClient"]

TIMEOUT = 30.0  # seconds without a byte from the daemon


class AdminClient:
    """Asks a running daemon. Raises :class:`svcdp.SourceError` when it does not answer."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(TIMEOUT)
        try:
            self._socket.connect(path)
        except PermissionError:
            self._socket.close()
            raise SourceError(f"no access to {path}: run as the daemon's user") from None
        except OSError as error:
            self._socket.close()
            raise SourceError(
                f"no daemon listens at {path} ({error.strerror or error}):"
                " start `svcdp run`, or give its socket with --admin-socket"
            ) from None
        self._reader = self._socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()
        self._socket.close()

    def get(self, what: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Yield the items of one answer. Read it to the end before the next request."""
        request = {"get": what, **fields}
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            for line in self._reader:
                answer = json.loads(line)
                if "item" in answer:
                    yield answer["item"]
                elif "error" in answer:
                    raise SourceError(f"the daemon at {self._path} says: {answer['error']}")
                else:
                    return
        except (OSError, ValueError) as error:
            raise SourceError(f"the daemon at {self._path} does not answer: {error}") from None
        raise SourceError(f"the daemon at {self._path} closed the connection: see its log")
