"""One kernel for the whole run, and the verdicts of a module's scenarios."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from replay import Replay
from scenario import Result, Scenario, assert_same
from uml import UserModeLinux, is_installed


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UserModeLinux]:
    if not is_installed():
        pytest.skip("needs the Debian packages user-mode-linux and ipvsadm")
    folder: Path = tmp_path_factory.mktemp("uml")
    with UserModeLinux(folder) as running:
        yield running


@pytest.fixture(scope="module")
def verdicts(kernel: UserModeLinux, request: pytest.FixtureRequest) -> dict[str, Result]:
    """What the kernel made of each of the module's SCENARIOS."""
    scenarios: list[Scenario] = request.module.SCENARIOS
    results = kernel.run([scenario.data() for scenario in scenarios])
    return {scenario.name: result for scenario, result in zip(scenarios, results, strict=True)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "scenario" in metafunc.fixturenames:
        metafunc.parametrize("scenario", metafunc.module.SCENARIOS, ids=str)


@pytest.fixture
def agree(scenario: Scenario, verdicts: dict[str, Result], kernel: UserModeLinux) -> None:
    """The dataplane did as the kernel did."""
    result = verdicts[scenario.name]
    assert_same(scenario, result, Replay(scenario).run(result), kernel.release)
