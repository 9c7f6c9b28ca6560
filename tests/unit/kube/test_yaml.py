"""YAML as PyYAML reads it, timestamps apart."""

from __future__ import annotations

import pytest
import yaml

from svcdp.kube._yaml import documents

TEXTS = [
    "a: 1\nb: [true, no, ~, null, 1.5, 0x1f, 017, 1_000, .inf, x]\n",
    "'1': \"2\"\nb: !!str 3\nc: !!int '4'\nd: ! 5\ne: !!float 6\n",
    "a: |\n  one\n  two\nb: >\n  three\n  four\n",
    "--- 1\n---\n--- {}\n...\n--- [[], [[]]]\n",
    "base: &b {a: 1, b: 2}\nx: {<<: *b, b: 3}\ny:\n  c: 4\n  <<: [*b, {d: 5, a: 6}]\n",
    "a: &a 1\nb: *a\nc: &c [2]\nd: [*c, *c]\n--- &a x\n",
    "&k key: &v value\n*v : *k\n",
    "? 1\n: 2\n",
    "a: 'it''s'\nb: \"\\u00e9\"\n",
    "{a: {b: {c: [d, {e: f}]}}}",
]


@pytest.mark.parametrize("text", TEXTS)
def test_values(text: str) -> None:
    assert list(documents(text.encode())) == list(yaml.safe_load_all(text))


def test_timestamps_stay_text() -> None:
    assert list(documents(b"a: 2024-01-01T00:00:00Z")) == [{"a": "2024-01-01T00:00:00Z"}]


@pytest.mark.parametrize(
    "text",
    [
        "<<: 1",
        "<<: [1]",
        "a: !!set {b}",
        "a: !x b",
        "a: !x {}",
        "[a]: b",
        "a: &a {b: *a}",
        "{a: &a 1, b: &a 2}",
        "=: 1",
    ],
)
def test_what_is_refused_has_a_line(text: str) -> None:
    with pytest.raises(yaml.MarkedYAMLError) as info:
        list(documents(b"x: y\n---\n" + text.encode()))
    assert info.value.problem_mark is not None
    assert info.value.problem_mark.line == 2
