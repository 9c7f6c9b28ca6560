"""A plan that cannot be made true is refused before anything happens."""

from __future__ import annotations

from typing import Any

import pytest

from svcdp.errors import ConfigError
from svcdp.rules import CapturePlan


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"queues": (5, 4)}, "queues 5-4"),
        ({"queues": (-1, 4)}, "queues -1-4"),
        ({"queues": (0, 65536)}, "queues 0-65536"),
        ({"forward_mark": 0}, "forward_mark 0x0"),
        ({"forward_mark": 3}, "forward_mark 0x3"),
        ({"pass_mark": 1 << 32}, "pass_mark 0x100000000"),
        ({"pass_mark": -1}, "pass_mark -0x1"),
        ({"forward_mark": 4, "pass_mark": 4}, "are both 0x4"),
        ({"service_cidrs": ("10.96.0.1/12",)}, "10.96.0.1/12 has host bits set"),
        ({"addresses": ("node",)}, "'node'"),
    ],
)
def test_bad_plan(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CapturePlan(**fields)


def test_source_of_a_route_is_the_first_address_of_its_family() -> None:
    plan = CapturePlan(addresses=("2001:db8::1", "192.0.2.1", "192.0.2.2", "2001:db8::2"))
    assert plan.source_of("10.96.0.0/12") == "192.0.2.1"
    assert plan.source_of("fd00:10:96::/112") == "2001:db8::1"
    assert CapturePlan(addresses=("192.0.2.1",)).source_of("fd00:10:96::/112") is None
