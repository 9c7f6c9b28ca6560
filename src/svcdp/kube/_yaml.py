"""YAML for input that nobody vouches for, with a line for every field.

PyYAML's loaders are not for such input: the C one crashes on some kB of ``[``, and both
follow nine lines of aliases to 10**9 values. They are slow, too. So values are built here
from libyaml's events: without recursion, and with bounds. Timestamps stay text, as in JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import yaml
from yaml import CSafeLoader, Node, ScalarNode
from yaml.constructor import ConstructorError, SafeConstructor
from yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from yaml.nodes import MappingNode, SequenceNode
from yaml.resolver import Resolver

__all__ = ["Lines", "documents"]

_MAX_DEPTH = 100  # levels of nesting; an EndpointSlice has 6
_MAX_GROWTH = 10  # how many times larger aliases may make a document
_TAG = "tag:yaml.org,2002:"
_MERGE = object()  # the key ``<<``
_RESOLVER: Any = Resolver()


def documents(data: bytes) -> Iterator[object]:
    """The value of each document. Raises yaml.YAMLError and nothing else."""
    parser = CSafeLoader(data)
    while parser.check_event():
        if type(parser.get_event()) is DocumentStartEvent:
            yield _document(parser)


def _document(parser: CSafeLoader) -> object:
    items: list[object] = []  # of the innermost collection; keys and values in turn
    opened: list[tuple[list[object], Any, int]] = []  # what is around it
    anchors: dict[str, tuple[object, int]] = {}  # values and their sizes
    events = size = 0
    while True:
        event: Any = parser.get_event()
        kind = type(event)
        events += 1
        before = size
        size += 1
        if kind is ScalarEvent:
            value = _scalar(event)
        elif kind is SequenceStartEvent or kind is MappingStartEvent:
            if len(opened) == _MAX_DEPTH:
                raise _error(f"more than {_MAX_DEPTH} levels deep", event)
            if event.tag not in (None, "!", _TAG + "seq", _TAG + "map"):
                raise _error(f"tag {event.tag} is not supported", event)
            opened.append((items, event, before))
            items = []
            continue
        elif kind is SequenceEndEvent:
            value = items
            items, event, before = opened.pop()
        elif kind is MappingEndEvent:
            content = items
            items, event, before = opened.pop()
            value = _mapping(content, event)
        elif kind is AliasEvent:
            if event.anchor not in anchors:
                raise _error(f"alias *{event.anchor} has no value yet", event)
            value, grown = anchors[event.anchor]
            size += grown
            if size > _MAX_GROWTH * events + 1000:
                raise _error(f"aliases make it more than {_MAX_GROWTH} times larger", event)
        else:
            assert kind is DocumentEndEvent
            return items[0]
        if kind is not AliasEvent and event.anchor:
            if event.anchor in anchors:
                raise _error(f"anchor &{event.anchor} is there already", event)
            anchors[event.anchor] = (value, size - before)
        items.append(value)


def _scalar(event: Any) -> object:
    text, tag = event.value, event.tag
    if tag is None and not event.implicit[0]:
        return text  # quoted
    try:
        if tag in (None, "!"):
            return _plain(text) if len(text) < 64 else _plain.__wrapped__(text)
        return _construct(tag, text)
    except yaml.MarkedYAMLError as error:
        raise _error(error.problem, event) from error
    except Exception as error:  # whatever int(), float() and base64 have to say
        raise _error(f"{text[:20]!r} is not a value of its tag", event) from error


@lru_cache(maxsize=1 << 14)
def _plain(text: str) -> object:
    """What a plain scalar stands for: ``80``, ``true``, ``null``, or itself."""
    tag = _RESOLVER.resolve(ScalarNode, text, (True, False))
    if tag in (_TAG + "str", _TAG + "timestamp"):
        return text
    return _MERGE if tag == _TAG + "merge" else _construct(tag, text)


def _construct(tag: str, text: str) -> object:
    return SafeConstructor().construct_document(ScalarNode(tag, text))


def _mapping(items: list[object], event: Any) -> dict[object, object]:
    try:
        found = dict(zip(items[::2], items[1::2], strict=True))
    except TypeError:
        raise _error("a key must be a scalar", event) from None
    merge = found.pop(_MERGE, None)
    if merge is None:
        return found
    merged: dict[object, object] = {}
    for other in reversed(merge if isinstance(merge, list) else [merge]):
        if not isinstance(other, dict):
            raise _error("<< needs a mapping, or a list of them", event)
        merged |= other
    return merged | found


def _error(message: Any, event: Any) -> yaml.MarkedYAMLError:
    return ConstructorError(None, None, message, event.start_mark)


class Lines:
    """On which line of a file a field is. Parses it again, when it is first asked."""

    def __init__(self, data: bytes) -> None:
        self._nodes: list[Node] = []
        self._rest = yaml.compose_all(data, Loader=CSafeLoader)

    def line(self, document: int, path: str) -> int:
        """The line of a field such as ``$.spec.ports[0].port``, or of what should hold it.

        Only for what :func:`documents` or a JSON parser has passed: they bound the depth.
        What is JSON and not YAML is all on line 1.
        """
        try:
            while len(self._nodes) <= document:
                self._nodes.append(next(self._rest))
        except (yaml.YAMLError, StopIteration):
            return 1
        node = self._nodes[document]
        line = node.start_mark.line
        for key, index in re.findall(r"\.([^.\[]+)|\[(\d+)\]", path):
            if key and isinstance(node, MappingNode):
                found = [pair for pair in node.value if pair[0].value == key]
                if not found:
                    break
                line, node = found[0][0].start_mark.line, found[0][1]
            elif index and isinstance(node, SequenceNode) and int(index) < len(node.value):
                node = node.value[int(index)]
                line = node.start_mark.line
            else:
                break
        return int(line) + 1
