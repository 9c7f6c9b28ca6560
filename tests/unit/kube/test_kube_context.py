"""What a node may say of itself."""

from __future__ import annotations

import pytest

from svcdp.errors import ConfigError
from svcdp.kube import NodeContext


def test_values_are_made_alike() -> None:
    node = NodeContext(addresses=["192.0.2.001", "2001:DB8::0:1"], pod_cidrs=["10.1.2.3/16"])
    assert node.addresses == ("192.0.2.1", "2001:db8::1")
    assert node.pod_cidrs == ("10.1.0.0/16",)
    assert node == NodeContext(addresses=("192.0.2.1", "2001:db8::1"), pod_cidrs=("10.1.0.0/16",))
    assert hash(node) == hash(NodeContext(addresses=node.addresses, pod_cidrs=node.pod_cidrs))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("addresses", ["x"]),
        ("addresses", "192.0.2.1"),
        ("primary_addresses", ["192.0.2.1", "192.0.2.2"]),
        ("pod_cidrs", ["10.0.0.0/33"]),
        ("service_cidrs", "10.96.0.0/12"),
        ("node_port_addresses", ["primary", "10.0.0.0/8"]),
        ("node_port_addresses", ["secondary"]),
        ("detect_local", "Bridge"),
    ],
)
def test_mistakes_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        NodeContext(**{field: value})  # type: ignore[arg-type]
