import pytest

from svcdp.kube import NodeContext


@pytest.fixture
def node() -> NodeContext:
    return NodeContext(
        name="n1", addresses=["192.0.2.1", "2001:db8::1"], pod_cidrs=["10.1.0.0/16", "fd01::/48"]
    )
