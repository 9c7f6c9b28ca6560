"""Whatever a file holds, ``decode`` returns records or errors, and ``resolve`` takes them."""

from __future__ import annotations

import json
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from svcdp.errors import ManifestError
from svcdp.kube import NodeContext, decode, resolve
from svcdp.kube._yaml import documents

NODE = NodeContext(name="n1", addresses=["192.0.2.1"])
WORDS = st.sampled_from(
    "v1 discovery.k8s.io/v1 Service EndpointSlice List web 10.96.0.1 fd00::1 None TCP IPv4".split()  # noqa: SIM905
)
KEYS = st.sampled_from(
    [
        "apiVersion",
        "kind",
        "metadata",
        "name",
        "labels",
        "annotations",
        "spec",
        "clusterIP",
        "clusterIPs",
        "ipFamilies",
        "ports",
        "port",
        "protocol",
        "nodePort",
        "items",
        "addressType",
        "endpoints",
        "addresses",
        "conditions",
        "ready",
        "type",
        "svcdp.io/weights",
        "kubernetes.io/service-name",
    ]
)
# json writes characters beyond these as two escapes, which are one in JSON and an error in YAML.
TEXT = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=4)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 70_000) | WORDS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)
HEADS = st.sampled_from([("v1", "Service"), ("discovery.k8s.io/v1", "EndpointSlice")])


@given(st.binary(max_size=200), st.sampled_from(["x.yaml", "x.json"]))
@settings(deadline=None)
def test_bytes(data: bytes, file: str) -> None:
    found = decode(data, file)
    assert found.objects or found.errors or found.ignored


@given(HEADS, st.dictionaries(KEYS, VALUES), VALUES, VALUES)
@settings(deadline=None)
def test_values(head: tuple[str, str], body: dict[str, Any], metadata: Any, spec: Any) -> None:
    value = {**body, "apiVersion": head[0], "kind": head[1], "metadata": metadata, "spec": spec}
    text = json.dumps(value).encode()
    from_json, from_yaml = decode(text, "x.json"), decode(text, "x.yaml")
    assert from_json.objects == from_yaml.objects
    assert len(from_json.errors) == len(from_yaml.errors)
    try:
        specs = resolve([value], NODE)
    except ManifestError:
        assert from_json.errors
    else:
        assert specs == resolve(from_json.objects, NODE)


@given(st.lists(VALUES, max_size=3), st.booleans())
@settings(deadline=None)
def test_yaml_is_what_pyyaml_says(values: list[Any], flow: bool) -> None:
    shared = [*values, values, {"k": values}]  # PyYAML writes this with aliases
    text = yaml.safe_dump_all([*values, shared], default_flow_style=flow).encode()
    assert list(documents(text)) == list(yaml.safe_load_all(text))
