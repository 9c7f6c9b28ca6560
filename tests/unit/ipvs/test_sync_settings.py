"""What the sync daemon can be told to do."""

from __future__ import annotations

from typing import Any

import pytest

from svcdp.errors import ConfigError
from svcdp.ipvs.syncd import GROUP, PORT, SyncConfig


def test_the_defaults_are_those_of_ipvs() -> None:
    config = SyncConfig("both", "eth0")
    assert (config.group, config.port, config.ttl, config.version) == (GROUP, PORT, 1, 1)
    assert (config.threshold, config.period, config.syncid) == (3, 50, 0)
    assert config.is_multicast
    assert not SyncConfig("both", group="192.0.2.1").is_multicast


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"role": "all"}, "sync role 'all' is none of master, backup, both"),
        ({"group": "eth0"}, "sync group 'eth0' is no IP address"),
        ({"interface": ""}, r"sync group 224\.0\.0\.81 needs an interface"),
        ({"interface": "", "group": "fe80::1"}, "sync group fe80::1 needs an interface"),
        (
            {"group": "fe80::1%eth0"},
            "sync group fe80::1%eth0: the interface is a setting of its own",
        ),
        ({"port": 0}, "sync port 0 is not a number from 1 to 65535"),
        ({"ttl": 256}, "sync ttl 256 is not a number from 1 to 255"),
        ({"syncid": 256}, "syncid 256 is not a number from 0 to 255"),
        ({"version": 2}, "sync protocol version 2 is neither 0 nor 1"),
        ({"length_max": 100}, "sync messages of 100 bytes"),
    ],
)
def test_wrong_settings(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        SyncConfig(**{"role": "both", "interface": "eth0", **change})
