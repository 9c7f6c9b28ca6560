"""deploy/ by itself: the image's recipe and the manifest say what the rest of the house says."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from svcdp.cli.group import cli
from svcdp.node.config import load
from svcdp.node.controller import LEASE
from svcdp.rules.probe import COMMANDS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RECIPE = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
# The package of each command that rules need.
PACKAGES = {"ip": "iproute2", "nft": "nftables", "ipset": "ipset"}


def instructions(word: str) -> list[list[str]]:
    lines = [line for line in RECIPE.splitlines() if line.startswith(f"{word} ")]
    return [shlex.split(line)[1:] for line in lines]


def test_what_the_image_copies_is_there() -> None:
    for _, source, target in instructions("COPY")[1:]:
        assert os.access(ROOT / source, os.X_OK)
        assert target == "/usr/local/bin/kube-proxy"


def test_the_image_has_the_tools_that_rules_need() -> None:
    installed = instructions("RUN")[-2]
    commands = {command for each in COMMANDS.values() for command in each}
    wanted = {PACKAGES.get(command, "iptables") for command in commands}
    assert wanted <= set(installed)


@pytest.mark.parametrize("stage", [0, 1])
def test_both_stages_have_the_same_python(stage: int) -> None:
    images = [words[0] for words in instructions("FROM")]
    assert images[stage] == images[0]
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", images[stage])


def test_the_manifests_configuration_is_one(tmp_path: Path) -> None:
    found = {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "svcdp.yaml").read_text())}
    file = tmp_path / "node.yaml"
    file.write_text(found["ConfigMap"]["data"]["node.yaml"])
    config = load(str(file), environ={}).config
    pod = found["DaemonSet"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    # As the image itself, so that neither hides what the other does.
    assert container["args"] == json.loads(RECIPE.rpartition("CMD ")[2])
    health = config.healthz_bind_address.place
    assert health is not None
    assert container["ports"][0]["hostPort"] == health[1]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert {config.run_dir, str(Path(config.state_file).parent)} <= mounts.keys()
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}


def test_the_controllers_command_and_ports_are_its_own() -> None:
    text = (DEPLOY / "svcdp-controller.yaml").read_text()
    found = {each["kind"]: each for each in yaml.safe_load_all(text)}
    [container] = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    name, *arguments = container["args"]
    verb = cli.get_command(click.Context(cli), name)
    assert verb is not None
    parsed = verb.make_context(name, arguments).params
    [port] = container["ports"]
    assert parsed["bind_address"] == f"0.0.0.0:{port['containerPort']}"
    assert parsed["lease_namespace"] == found["Deployment"]["metadata"]["namespace"]
    probes = {container[each]["httpGet"]["port"] for each in ("livenessProbe", "readinessProbe")}
    assert probes == {port["name"]}
    granted = [rule.get("resourceNames", [LEASE]) for rule in found["Role"]["rules"]]
    assert granted == [[LEASE], [LEASE]]
