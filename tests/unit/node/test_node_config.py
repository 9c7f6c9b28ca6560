"""The node's configuration: precedence, origins, and errors that name key and place."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from svcdp import Settings
from svcdp.errors import ConfigError
from svcdp.node.config import load, settings

HEADER = "apiVersion: svcdp.io/v1alpha1\nkind: NodeConfig\n"


def write(tmp_path: Path, body: str, header: str = HEADER) -> str:
    path = tmp_path / "node.yaml"
    path.write_text(header + body)
    return str(path)


def error(body: str, tmp_path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, body), environ={})
    return str(caught.value)


def test_defaults() -> None:
    loaded = load(None, environ={})
    assert loaded.config.node_name == socket.gethostname()
    assert loaded.config.queues == "100-103"
    assert (loaded.config.queues.first, loaded.config.queues.last) == (100, 103)
    assert loaded.config.admin_path == "/run/svcdp/admin.sock"
    assert {origin for _, _, origin in loaded.rows()} == {"default"}


def test_precedence_and_origins(tmp_path: Path) -> None:
    file = write(tmp_path, "queues: 1\nnodeName: file\npodCIDRs: [10.1.2.3/16]\n")
    loaded = load(
        file,
        environ={"SVCDP_NODE_NAME": "environment", "SVCDP_QUEUES": "2", "SVCDP_UNKNOWN": "x"},
        flags={"queues": "3-4", "masquerade_all": False, "gso": None, "addresses": ()},
    )
    rows = {key: (value, origin) for key, value, origin in loaded.rows()}
    assert rows["queues"] == ("3-4", "flag --queues")
    assert rows["nodeName"] == ("environment", "env SVCDP_NODE_NAME")
    assert rows["podCIDRs"] == ("10.1.0.0/16", f"{file}:5")
    assert rows["masqueradeAll"] == ("false", "flag --masquerade-all")
    assert rows["gso"] == ("true", "default")
    assert rows["forwardMark"] == ("0x00100000", "default")


def test_lists_come_as_text_too(tmp_path: Path) -> None:
    loaded = load(
        write(tmp_path, "podCIDRs: 10.0.0.0/8"),
        environ={"SVCDP_ADDRESSES": "192.0.2.1, 2001:DB8::1"},
        flags={"service_cidrs": ("10.96.0.0/12", "fd00:96::/112,fd00:97::/112")},
    )
    assert loaded.config.pod_cidrs == ("10.0.0.0/8",)
    assert loaded.config.addresses == ("192.0.2.1", "2001:db8::1")
    assert loaded.config.service_cidrs == ("10.96.0.0/12", "fd00:96::/112", "fd00:97::/112")


def test_places_to_listen_at() -> None:
    flags = {"healthz_bind_address": "[2001:DB8::0]:80", "metrics_bind_address": ""}
    config = load(environ={}, flags=flags).config
    assert config.healthz_bind_address == "[2001:db8::]:80"
    assert config.healthz_bind_address.place == ("2001:db8::", 80)
    assert config.metrics_bind_address.place is None
    config = load(environ={}).config
    assert config.healthz_bind_address.place == ("0.0.0.0", 10256)
    assert config.metrics_bind_address.place == ("127.0.0.1", 10249)


def test_every_setting_has_three_names_and_a_help_text() -> None:
    names = {setting.name: setting for setting in settings()}
    assert names["pod_cidrs"].key == "podCIDRs"
    assert names["pod_cidrs"].flag == "--pod-cidrs"
    assert names["pod_cidrs"].variable == "SVCDP_POD_CIDRS"
    assert all(setting.description for setting in names.values())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("podCIDRS: []", "{file}:3: unknown key podCIDRS: did you mean podCIDRs?"),
        ("queues: 1\nqueues: 2", "{file}:4: queues is given twice: keep one"),
        ("queues: 9-3", "queues: '9-3' is not a rising range within 0-65535 ({file}:3)"),
        ("queues: a", "queues: 'a' is not a range such as 100-103 ({file}:3)"),
        ("gso: 'yes'", "gso: Expected `bool`, got `str` ({file}:3)"),
        ("maxConnections: 0", "maxConnections: Expected `int` >= 1 ({file}:3)"),
        ("rules: ipvs", "rules: 'ipvs' is none of auto, iptables, nft, none ({file}:3)"),
        ("forwardMark: 3", "forwardMark: 3 is not one bit of 32 such as 0x00100000 ({file}:3)"),
        ("forwardMark: x", "forwardMark: 'x' is not one bit of 32 such as 0x00100000 ({file}:3)"),
        ("forwardMark: 0x200000", "forwardMark and passMark must be different bits"),
        ("drMarks: 5", "drMarks: 5 is not a row of bits of 32 such as 0xffc00000 ({file}:3)"),
        ("drMarks: 0x300000", "drMarks must hold neither forwardMark nor passMark"),
        (
            "manifests: /m\nmasqueradePorts: 2000-30000",
            "masqueradePorts and serviceNodePortRange must be different numbers",
        ),
        ("tunnelQueues: 103", "queues and tunnelQueues must be different numbers"),
        ("dataplane: [sloppy=1]", "dataplane[0]: 'sloppy=1' sets none of conn_reuse_mode, "),
        ("dataplane: [sloppy_tcp=2]", "dataplane[0]: sloppy_tcp is 0 or 1, not 2 ({file}:3)"),
        ("dataplane: [sloppy_tcp=on]", "dataplane[0]: 'sloppy_tcp=on' is not a name=number "),
        ("dataplane: [drop_entry=4]", "dataplane[0]: drop_entry 4 is not a number from 0 to 3"),
        ("timeouts: [tcp=9]", "timeouts[0]: 'tcp=9' sets none of none, established, "),
        ("timeouts: [udp=0]", "timeouts[0]: 'udp=0' is not a state=seconds such as udp=30"),
        ("addresses: [1]", "addresses[0]: Expected `str`, got `int` ({file}:3)"),
        ("healthzBindAddress: 80", "healthzBindAddress: Expected `str`, got `int` ({file}:3)"),
        ("healthzBindAddress: ':80'", "':80' is not an address and port such as 127.0.0.1:10249"),
        ("healthzBindAddress: '::1:80'", "'::1:80' is not an address and port"),
        ("healthzBindAddress: '[1.2.3.4]:80'", "'[1.2.3.4]:80' is not an address and port"),
        ("healthzBindAddress: '[::1]'", "'[::1]' is not an address and port"),
        ("healthzBindAddress: '1.2.3.4:0'", "'1.2.3.4:0' is not an address and port"),
        ("healthzBindAddress: '1.2.3.4:65536'", "'1.2.3.4:65536' is not an address and port"),
        ("healthzBindAddress: 'localhost:80'", "'localhost:80' is not an address and port"),
        ("podCIDRs: 3", "podCIDRs: Expected `array`, got `int` ({file}:3)"),
        ("podCIDRs: [10.0.0.0/99]", "podCIDRs[0]: '10.0.0.0/99' does not appear"),
        ("1: 2", "{file}:3: unknown key 1"),
        ("[x", "{file} is not YAML: "),
    ],
)
def test_errors_name_key_and_place(tmp_path: Path, body: str, message: str) -> None:
    assert message.format(file=tmp_path / "node.yaml") in error(body, tmp_path)


def test_errors_name_flag_and_variable() -> None:
    with pytest.raises(ConfigError, match=r"^gso: .* \(env SVCDP_GSO\)$"):
        load(None, environ={"SVCDP_GSO": "maybe"})
    with pytest.raises(ConfigError, match=r"^podCIDRs\[1\]: .* \(flag --pod-cidrs\)$"):
        load(None, environ={}, flags={"pod_cidrs": ("10.0.0.0/8,10.0.0.0/33",)})


@pytest.mark.parametrize("header", ["", "apiVersion: v1\nkind: NodeConfig\n", "- 1\n"])
def test_other_files_are_refused(tmp_path: Path, header: str) -> None:
    with pytest.raises(ConfigError, match=r"svcdp\.io/v1alpha1"):
        load(write(tmp_path, "", header), environ={})


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config file"):
        load(str(tmp_path / "absent.yaml"), environ={})


def test_the_example_is_good() -> None:
    example = Path(__file__).parents[3] / "examples" / "node.yaml"
    config = load(str(example), environ={}).config
    assert config.manifests == "/etc/svcdp/manifests"
    assert config.pod_cidrs == ("10.1.0.0/16", "fd00:10:1::/64")


def test_what_the_dataplane_is_told() -> None:
    environ = {"SVCDP_DATAPLANE": "sloppy_tcp=1, conn_reuse_mode=0", "SVCDP_TIMEOUTS": "udp=30"}
    config = load(environ=environ, flags={"dataplane": ("conn_reuse_mode=2",)}).config
    assert config.dataplane_settings == Settings(conn_reuse_mode=2)
    assert [(each.state, each.seconds) for each in config.timeouts] == [("udp", 30.0)]
    config = load(environ=environ).config
    assert config.dataplane_settings == Settings(sloppy_tcp=True, conn_reuse_mode=0)
