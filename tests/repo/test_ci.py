"""On CI nothing may be skipped: neither a test nor a module of tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SKIPPED_TEST = "import pytest\ndef test_it(): pytest.skip('no kernel')\n"
SKIPPED_MODULE = "import pytest\npytest.importorskip('no_such_module')\n"
EXPECTED_FAILURE = "import pytest\n@pytest.mark.xfail\ndef test_it(): assert 0\n"


@pytest.mark.parametrize(
    ("content", "ci", "status"),
    [
        (SKIPPED_TEST, "true", pytest.ExitCode.TESTS_FAILED),
        (SKIPPED_TEST, "", pytest.ExitCode.OK),
        (SKIPPED_MODULE, "true", pytest.ExitCode.INTERRUPTED),
        (SKIPPED_MODULE, "", pytest.ExitCode.NO_TESTS_COLLECTED),
        (EXPECTED_FAILURE, "true", pytest.ExitCode.OK),
    ],
)
def test_a_skip_is_a_failure(tmp_path: Path, content: str, ci: str, status: int) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_sample.py").write_text(content)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path],
        env={**os.environ, "CI": ci, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stdout
    if ci and "skip" in content:
        assert "on CI nothing may be" in done.stdout
