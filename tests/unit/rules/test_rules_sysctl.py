"""Which sysctls change, what the rules must drop instead, and that all comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakehost import Host

from svcdp.errors import PlatformError
from svcdp.rules.sysctl import Guard, Sysctls

# Of conf/all, conf/default and two interfaces: accept_local and rp_filter, before.
CASES = {
    "nothing is on": (
        {"all": "0 0", "default": "0 0", "eth0": "0 0", "eth1": "0 0"},
        "1 0",
        Guard(martians=True),
    ),
    "loose already": (
        {"all": "0 2", "default": "0 1", "eth0": "0 1", "eth1": "0 0"},
        "1 2",
        Guard(martians=True),
    ),
    "strict everywhere": (
        {"all": "0 1", "default": "0 0", "eth0": "0 0", "eth1": "0 2"},
        "1 2",
        Guard(martians=True, strict_default=True, loose=("eth1",)),
    ),
    "strict by default, but not everywhere": (
        {"all": "0 0", "default": "0 1", "eth0": "0 1", "eth1": "0 0"},
        "1 2",
        Guard(martians=True, strict_default=True, loose=("eth1",)),
    ),
    "strict in one place": (
        {"all": "0 0", "default": "0 0", "eth0": "0 1", "eth1": "0 2"},
        "1 2",
        Guard(martians=True, strict=("eth0",)),
    ),
    "local sources are welcome everywhere": (
        {"all": "1 0", "default": "0 0", "eth0": "0 0", "eth1": "1 0"},
        "1 0",
        Guard(),
    ),
    "local sources are welcome in one place": (
        {"all": "0 0", "default": "1 0", "eth0": "0 0", "eth1": "1 0"},
        "1 0",
        Guard(martians=True, trusted=("eth1",)),
    ),
}


@pytest.mark.parametrize(("before", "after", "guard"), CASES.values(), ids=CASES)
def test_cases(host: Host, before: dict[str, str], after: str, guard: Guard) -> None:
    host.sysctls(before)
    sysctls = Sysctls(host.run_dir)
    assert sysctls.guard() == guard
    sysctls.apply()
    assert host.values() == after
    # Another process, after a crash of the first, finds the same.
    again = Sysctls(host.run_dir)
    assert again.guard() == guard
    again.apply()
    assert host.values() == after
    again.restore()
    assert {name: host.values(name) for name in before} == before
    assert again.show() == ""
    assert not list(Path(host.run_dir).glob("*"))


def test_what_others_set_meanwhile_stays(host: Host) -> None:
    host.sysctls({"eth0": "0 1"})
    sysctls = Sysctls(host.run_dir)
    sysctls.apply()
    assert host.values() == "1 2"
    host.sysctls({"all": "0 2"})
    sysctls.restore()
    assert host.values() == "0 0"
    host.sysctls({"all": "0 1"})
    sysctls.restore()
    assert host.values() == "0 1"


def test_what_is_needed_no_more_is_undone(host: Host) -> None:
    host.sysctls({"eth0": "0 1"})
    sysctls = Sysctls(host.run_dir)
    sysctls.apply()
    host.sysctls({"eth0": "0 0"})
    sysctls.apply()
    assert host.values() == "1 0"
    sysctls.restore()
    assert host.values() == "0 0"


def test_a_crash_between_saving_and_setting(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svcdp.rules.sysctl.write", lambda name, value: None)
    Sysctls(host.run_dir).apply()
    monkeypatch.undo()
    monkeypatch.setattr("svcdp.rules.sysctl.CONF", host.conf)
    assert host.values() == "0 0"
    Sysctls(host.run_dir).restore()
    assert host.values() == "0 0"


def test_nothing_is_set_that_could_not_be_saved(host: Host) -> None:
    Path(host.run_dir).write_text("a file where the folder should be")
    with pytest.raises(PlatformError, match=r"cannot save sysctls in .*/run"):
        Sysctls(host.run_dir).apply()
    assert host.values() == "0 0"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"all/rp_filter": 5}'])
def test_damaged_file(host: Host, text: str) -> None:
    sysctls = Sysctls(host.run_dir)
    sysctls.apply()
    (file,) = Path(host.run_dir).iterdir()
    file.write_text(text)
    with pytest.raises(PlatformError, match=rf"{file} is damaged: remove it"):
        sysctls.restore()
