"""Tables, ages and documents as kubectl prints them."""

from __future__ import annotations

import json

import pytest
import yaml

from svcdp.cli.printers import age, document, shown, table


def test_table() -> None:
    assert table(["NAME", "AGE"], [["a-long-name", 5], ["b", "10d"]]) == (
        "NAME          AGE\na-long-name   5\nb             10d"
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("größe 大", "größe 大"),
        ("\x1b[2J\r", "^[[2J\\r"),
        ("a\nb\tc\x07\x9b\u202e", "a\\nb\\tc\\x07\\x9b\\u202e"),
        ("\ud800", "\\ud800"),  # of JSON; no terminal's encoding has it
    ],
)
def test_nothing_commands_the_terminal(text: str, line: str) -> None:
    assert shown(text) == table([], [[text]]) == line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3600, "<invalid>"),
        (-2, "<invalid>"),
        (-1, "0s"),
        # The cases of k8s.io/apimachinery/pkg/util/duration/duration_test.go.
        (0, "0s"),
        (1.9, "1s"),
        (119, "119s"),
        (120, "2m"),
        (121, "2m1s"),
        (599, "9m59s"),
        (600, "10m"),
        (3 * 3600 - 1, "179m"),
        (3 * 3600, "3h"),
        (3 * 3600 + 60, "3h1m"),
        (8 * 3600, "8h"),
        (2 * 86400 - 1, "47h"),
        (2 * 86400, "2d"),
        (2 * 86400 + 3600, "2d1h"),
        (8 * 86400, "8d"),
        (2 * 365 * 86400, "2y"),
        (2 * 365 * 86400 + 86400, "2y1d"),
        (8 * 365 * 86400, "8y"),
    ],
)
def test_age(seconds: float, text: str) -> None:
    assert age(seconds) == text


@pytest.mark.parametrize(("output", "read"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_document(output: str, read: object) -> None:
    value = {"kind": "List", "items": [{"b": 1, "a": None}]}
    assert callable(read)
    assert read(document(value, output)) == value
