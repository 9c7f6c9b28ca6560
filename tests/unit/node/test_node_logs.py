"""Log lines."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from svcdp.node import logs


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    logger = logging.getLogger("svcdp")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    log = logging.getLogger("svcdp.node")
    log.debug("not shown")
    log.info("rules installed", extra={"backend": "nft", "file": 'a "b"', "empty": ""})
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.endswith(
        'Z level=info logger=svcdp.node message="rules installed"'
        ' backend=nft file="a \\"b\\"" empty=""\n'
    )


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("debug", "json")
    try:
        raise OSError("no")
    except OSError:
        logging.getLogger("svcdp").exception("two\nlines", extra={"count": 3})
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    fields = json.loads(line)
    assert (fields["level"], fields["message"], fields["count"]) == ("error", "two\nlines", 3)
    assert "OSError: no" in fields["exception"]
