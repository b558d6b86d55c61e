"""What must hold as root and as another uid: run once more where root can become another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOBODY = 65534
ISOLATION = ["test_sandbox_isolation.py", "test_sandbox_limits.py"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("uid", "files"),
    [
        (NOBODY, ISOLATION),
        (0, ISOLATION),  # root with a Python that others may read: the sandlock tier, too
        (NOBODY, ["test_sandbox_programs.py", "test_canaries.py"]),
    ],
)
def test_as_another_uid(uid: int, files: list[str]) -> None:
    if os.geteuid() != 0:
        pytest.skip("root alone can become another")
    command = [sys.executable, str(ROOT / "tests/as_another.py"), str(uid), sys.executable, "-m", "pytest", "-x", "-q"]
    command += ["-p", "no:cacheprovider", "-rs", *(f"tests/{name}" for name in files)]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "no isolation works here" not in done.stdout, done.stdout[-2000:]
