"""The daemon's log on stderr: ``key=value``, or one JSON object a line.

Fields go in ``extra``: ``log.info("rules installed", extra={"backend": "nft"})``.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from typing import Any

__all__ = ["configure", "warn"]

log = logging.getLogger(__name__)

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure(level: str, style: str) -> None:
    """Send svcdp's log to stderr. ``style`` is text or json."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JSON() if style == "json" else _Text())
    logger = logging.getLogger("svcdp")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def warn(notes: Sequence[str]) -> None:
    """Say in one line what of kube-proxy's configuration changes nothing."""
    if notes:
        log.warning("of kube-proxy's configuration: %s", "; ".join(notes))


def _fields(formatter: logging.Formatter, record: logging.LogRecord) -> dict[str, Any]:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    fields: dict[str, Any] = {
        "time": f"{moment}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": record.getMessage(),
    }
    fields |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
    if record.exc_info:
        fields["exception"] = formatter.formatException(record.exc_info)
    return fields


class _JSON(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_fields(self, record), default=str)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return " ".join(f"{key}={_quote(value)}" for key, value in _fields(self, record).items())


def _quote(value: Any) -> str:
    text = str(value)
    if text and text.isprintable() and not set(text) & set(' ="'):
        return text
    return json.dumps(text, ensure_ascii=False)
