"""YAML for input that nobody vouches for, with a line for every field."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from yaml import CSafeLoader, MarkedYAMLError, Node
from yaml.composer import Composer, ComposerError
from yaml.constructor import ConstructorError
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, SequenceNode

__all__ = ["Loader", "line_of"]

_MAX_DEPTH = 100  # levels of nesting; an EndpointSlice has 6
_MAX_GROWTH = 10  # how many times larger aliases may make a document
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


class Loader(Composer, CSafeLoader):
    """libyaml's parser under PyYAML's Python composer.

    The C composer recurses without a bound, so that some kB of ``[`` crash the process,
    and tells nobody about aliases, nine lines of which can stand for 10**9 values.
    Timestamps stay text, as in JSON.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's way)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
        for first, resolvers in CSafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, data: bytes) -> None:
        CSafeLoader.__init__(self, data)
        Composer.__init__(self)
        self._depth = 0
        self._aliases = False

    def documents(self) -> Iterator[tuple[Node, object]]:
        """Each document as its node and its value. Raises yaml.YAMLError, nothing else."""
        while self.check_node() and (node := self.get_node()):
            if self._aliases:
                _check_growth(node)
            try:
                value = self.construct_document(node)
            except MarkedYAMLError:
                raise
            except Exception as error:  # whatever int(), float() and base64 have to say
                raise ConstructorError(None, None, str(error), node.start_mark) from error
            yield node, value

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        """One node and what is in it."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            event = self.peek_event()
            raise _too_deep(event and event.start_mark)
        self._aliases = self._aliases or self.check_event(AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def line_of(node: Node, path: str) -> int:
    """The line of a field such as ``$.spec.ports[0].port``, or of what should hold it."""
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


def _too_deep(mark: Any) -> ComposerError:
    return ComposerError(None, None, f"more than {_MAX_DEPTH} levels deep", mark)


def _check_growth(root: Node) -> None:
    """Refuse aliases that make a document far larger than it is, or endless."""
    sizes: dict[int, int] = {}

    def size(node: Node, depth: int) -> int:
        if depth > _MAX_DEPTH:
            raise _too_deep(node.start_mark)
        if id(node) not in sizes:
            children = node.value if isinstance(node, SequenceNode) else ()
            if isinstance(node, MappingNode):
                children = (child for pair in node.value for child in pair)
            sizes[id(node)] = 1 + sum(size(child, depth + 1) for child in children)
        return sizes[id(node)]

    if size(root, 0) > _MAX_GROWTH * len(sizes) + 1000:
        raise ComposerError(
            None, None, f"aliases make it more than {_MAX_GROWTH} times larger", root.start_mark
        )
