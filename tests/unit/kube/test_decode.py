"""Manifests in, records out; and what is said about bad ones."""

from __future__ import annotations

import json

import pytest

from svcdp.errors import ManifestError
from svcdp.kube import decode
from svcdp.kube.decode import decode_value
from svcdp.kube.model import EndpointSlice, Service, parse_address

GOOD = b"""\
# two documents and something else
apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: shop
  creationTimestamp: 2024-01-01T00:00:00Z
  labels: null
spec:
  clusterIP: 10.96.0.10
  ports:
  - {name: http, port: 80, targetPort: web}
status: {loadBalancer: {}}
---
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: web-1
  namespace: shop
  labels: {kubernetes.io/service-name: web}
addressType: IPv4
endpoints:
- addresses: [10.1.0.7]
  conditions: {ready: true, serving: null}
ports:
- {name: http, port: 8080}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: 7}
"""


def test_documents() -> None:
    found = decode(GOOD, "web.yaml")
    assert not found.errors
    assert found.ignored == {"apps/v1 Deployment": 1}
    web, slice_ = found.objects
    assert isinstance(web, Service)
    assert web.metadata.creation_timestamp == "2024-01-01T00:00:00Z"
    assert [(port.name, port.port) for port in web.spec.ports or ()] == [("http", 80)]
    assert isinstance(slice_, EndpointSlice)
    assert slice_.ref == web.ref == ("shop", "web")
    assert [str(found.key) for found in (web, slice_)] == [
        "Service shop/web",
        "EndpointSlice shop/web-1",
    ]


def test_json_is_the_same_as_yaml() -> None:
    metadata = {"name": "web", "creationTimestamp": "2024-01-01T00:00:00Z"}
    spec = {"clusterIP": "10.96.0.10", "ports": [{"port": 80}]}
    web = {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": [web]}).encode()
    from_json, from_yaml = decode(text, "x.json"), decode(text, "x.yaml")
    assert not from_json.errors
    assert from_json.objects == from_yaml.objects == decode_value(web)


SERVICE = b"""\
apiVersion: v1
kind: Service
metadata:
  name: web
spec:
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, 'fd00::10']
  ipFamilies: [IPv4, IPv6]
  sessionAffinityConfig:
    clientIP:
      timeoutSeconds: 60
  ports:
  - name: http
    port: 80
    protocol: TCP
    nodePort: 30080
  - name: https
    port: 443
"""
SLICE = b"""\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: web-1
  labels:
    kubernetes.io/service-name: web
addressType: IPv4
endpoints:
- addresses:
  - 10.1.0.7
ports:
- name: http
  port: 8080
"""
WEB, WEB_1 = "Service default/web", "EndpointSlice default/web-1"
MISTAKES = [
    # file, what is replaced, by what, line, field, object
    (SERVICE, b"port: 80", b"port: 0", 14, "$.spec.ports[0].port", WEB),
    (SERVICE, b"port: 80", b"port: 65536", 14, "$.spec.ports[0].port", WEB),
    (SERVICE, b"port: 80", b"port: eighty", 14, "$.spec.ports[0].port", WEB),
    (SERVICE, b"port: 80\n", b"targetPort: 80\n", 13, "$.spec.ports[0].port", WEB),
    (SERVICE, b"port: 443", b"port: 80", 18, "$.spec.ports[1].port", WEB),
    (SERVICE, b"protocol: TCP", b"protocol: tcp", 15, "$.spec.ports[0].protocol", WEB),
    (SERVICE, b"nodePort: 30080", b"nodePort: -1", 16, "$.spec.ports[0].nodePort", WEB),
    (SERVICE, b"name: https", b"name: http", 17, "$.spec.ports[1].name", WEB),
    (SERVICE, b"name: https", b"targetPort: 1", 17, "$.spec.ports[1].name", WEB),
    (SERVICE, b"name: https", b"name: on", 17, "$.spec.ports[1].name", WEB),
    (SERVICE, b"name: https", b'name: "a\\nb"', 17, "$.spec.ports[1].name", WEB),
    (SERVICE, b"name: https", b'name: "a\\n"', 17, "$.spec.ports[1].name", WEB),
    (SERVICE, b"  name: web", b'  name: "web\\n"', 4, "$.metadata.name", "Service default/web\n"),
    (SERVICE, b"spec:\n", b'spec:\n  externalName: "a.b\\n"\n', 6, "$.spec.externalName", WEB),
    (SERVICE, b"clusterIP: 10.96.0.10", b"clusterIP: 10.96.0.256", 6, "$.spec.clusterIP", WEB),
    (SERVICE, b"clusterIP: 10.96.0.10", b"clusterIP: [1]", 6, "$.spec.clusterIP", WEB),
    (SERVICE, b"'fd00::10'", b"'fd00::10%eth0'", 7, "$.spec.clusterIPs[1]", WEB),
    (SERVICE, b"'fd00::10'", b"'10.0.0.1'", 7, "$.spec.clusterIPs[1]", WEB),
    (SERVICE, b"'fd00::10'", b"None", 7, "$.spec.clusterIPs[1]", WEB),
    (SERVICE, b"[IPv4, IPv6]", b"[IPv4, IPv5]", 8, "$.spec.ipFamilies[1]", WEB),
    (
        SERVICE,
        b"Seconds: 60",
        b"Seconds: 86401",
        11,
        "$.spec.sessionAffinityConfig.clientIP.timeoutSeconds",
        WEB,
    ),
    (SERVICE, b"  name: web", b"  name: Web_1", 4, "$.metadata.name", "Service default/Web_1"),
    (SERVICE, b"metadata:\n  name: web\n", b"", 1, "$.metadata", "Service"),
    (SERVICE, b"kind: Service\n", b"", 1, "$.kind", ""),
    (SERVICE, b"apiVersion: v1", b"apiVersion: 1", 1, "$.apiVersion", ""),
    (SLICE, b"addressType: IPv4", b"addressType: IPv5", 7, "$.addressType", WEB_1),
    (SLICE, b"addressType: IPv4", b"x: y", 1, "$.addressType", WEB_1),
    (SLICE, b"- 10.1.0.7", b"- web.example", 10, "$.endpoints[0].addresses[0]", WEB_1),
    (SLICE, b"- 10.1.0.7", b"- 0.0.0.0", 10, "$.endpoints[0].addresses[0]", WEB_1),
    (SLICE, b"- 10.1.0.7", b"- 255.255.255.255", 10, "$.endpoints[0].addresses[0]", WEB_1),
    (SLICE, b"- 10.1.0.7", b"- fe80::7", 10, "$.endpoints[0].addresses[0]", WEB_1),
    (SLICE, b"- 10.1.0.7", b"- 7", 10, "$.endpoints[0].addresses[0]", WEB_1),
    (SLICE, b"port: 8080", b"port: 70000", 13, "$.ports[0].port", WEB_1),
    (SLICE, b"service-name: web", b"service-name: 5", 5, "$.metadata.labels", WEB_1),
]


@pytest.mark.parametrize(("text", "old", "new", "line", "field", "object_"), MISTAKES)
def test_mistakes(text: bytes, old: bytes, new: bytes, line: int, field: str, object_: str) -> None:
    assert text.count(old) == 1 or old == b"port: 80"
    assert not decode(text, "web.yaml").errors
    [error] = decode(text.replace(old, new, 1), "web.yaml").errors
    assert (error.file, error.line, error.object) == ("web.yaml", line, object_)
    assert error.field.removesuffix("[...]") == field
    assert str(error).startswith(f"web.yaml:{line}: ")


def test_a_mistake_in_a_later_document_and_in_a_list() -> None:
    items = b"".join(b"- " + part.replace(b"\n", b"\n  ").rstrip(b" ") for part in (SERVICE, SLICE))
    text = GOOD + b"---\napiVersion: v1\nkind: List\nitems:\n" + items
    text = text.replace(b"port: 443", b"port: -443").replace(b"port: 8080\n", b"port: x\n")
    first, second = decode(text, "a.yml").errors
    lines = text.split(b"\n")
    assert first.field == "$.items[0].spec.ports[1].port"
    assert b"-443" in lines[first.line - 1]
    assert second.field == "$.items[1].ports[0].port"
    assert b"port: x" in lines[second.line - 1]


def test_a_mistake_in_json_has_its_line() -> None:
    text = b'{\n\t"apiVersion": "v1",\n\t"kind": "Service",\n\t"metadata": {\n\t\t"name": 5}}'
    [error] = decode(text, "web.json").errors
    assert (error.line, error.field) == (5, "$.metadata.name")


def test_an_object_is_in_a_file_once() -> None:
    [error] = decode(SERVICE + b"---\n" + SERVICE, "web.yaml").errors
    assert (error.line, error.object) == (20, WEB)
    assert "twice" in error.message


def test_a_list_is_a_list() -> None:
    [error] = decode(b"apiVersion: v1\nkind: List\nitems: 5\n", "web.yaml").errors
    assert (error.line, error.field) == (3, "$.items")


def test_a_value_that_is_no_object_is_refused() -> None:
    for value in (None, 5, [], {"kind": "Service"}, {"apiVersion": "v1", "kind": "Service"}):
        with pytest.raises(ManifestError):
            decode_value(value)


HOSTILE = [
    ("nothing", b""),
    ("a comment", b"# later\n---\n"),
    ("deep", b"[" * 200_000),
    ("deep blocks", b"- " * 200_000),
    ("deep mappings", b"{a: " * 200_000),
    ("endless alias", b"a: &a [*a]"),
    ("unknown alias", b"a: *b"),
    ("a list of lists of lists", b"".join(
        [b"a0: &a0 [x,x,x,x,x,x,x,x,x]\n"]
        + [b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12)]
    )),
    ("python", b"!!python/object/apply:os.system [id]"),
    ("huge number", b"a: " + b"9" * 5000),
    ("bad timestamp", b"a: !!timestamp x"),
    ("bad bool", b"a: !!bool x"),
    ("bad int", b"a: !!int ''"),
    ("bad binary", b"a: !!binary '\xc3\xa9'"),
    ("key that is a list", b"? [a]\n: b"),
    ("not UTF-8", b"a: \xff\xfe"),
    ("zero byte", b"a: \x00"),
    ("a scalar", b"hello"),
    ("a list", b"[1, 2]"),
    ("truncated", GOOD[:150]),
    ("tab", b"a:\n\tb: c"),
    ("two roots", b"a: b: c"),
]  # fmt: skip


@pytest.mark.parametrize("data", [data for _, data in HOSTILE], ids=[name for name, _ in HOSTILE])
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_hostile_files_are_one_error(data: bytes, suffix: str) -> None:
    found = decode(data, f"x.{suffix}")
    assert not found.objects
    [error] = found.errors
    assert error.line >= 1
    assert "\n" not in str(error)


def test_few_aliases_are_fine() -> None:
    text = SERVICE.replace(b"metadata:", b"metadata: &m", 1) + b"---\n" + SLICE
    text = text.replace(b"- addresses:", b"- &e\n  addresses:") + b"x: [1]\n"
    text = text.replace(b"ports:\n- name: http\n  port: 8080", b"- *e\nports: []")
    found = decode(text, "x.yaml")
    assert not found.errors
    assert isinstance(found.objects[1], EndpointSlice)
    assert len(found.objects[1].endpoints or ()) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("172.30.0.041", "172.30.0.41"),
        ("010.000.00.1", "10.0.0.1"),
        ("::FFFF:10.0.0.1", "10.0.0.1"),
        ("FD00:0::0:1", "fd00::1"),
    ],
)
def test_addresses(text: str, expected: str) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "1.2.3", "1.2.3.4.5", "1.2.3.256", "1.2.3.4/32", " 1.2.3.4", "0x7f.0.0.1", "1.2.3.\0",
     "\u0661.2.3.4", "fe80::1%eth0", "0.0.0.0", "::", "224.0.0.1", "ff02::1", "web"],
)  # fmt: skip
def test_not_the_address_of_a_host(text: str) -> None:
    with pytest.raises(ManifestError):
        parse_address(text)
