"""bench/gpu/run_all.sh: what it runs, in which order; a script that fails or hangs costs its own time alone."""

import os
import subprocess
from pathlib import Path

from records import LIMIT_S

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu" / "run_all.sh"


def run(folder: Path, body: str, *args: str) -> tuple[int, list[str]]:
    """Exit status, and the commands that `python` was called with; `body` decides what it does with them."""
    fake = folder / "python"
    fake.write_text(f'#!/usr/bin/env bash\necho "$@" >> {folder}/calls\n{body}\n')
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(SCRIPT), *args], env=environment, timeout=60, capture_output=True, text=True)
    return done.returncode, (folder / "calls").read_text().splitlines()


def test_the_order_and_the_minutes(tmp_path: Path) -> None:
    status, calls = run(tmp_path, "")
    assert status == 0
    assert [call.split()[-1] for call in calls] == [
        "tests/test_tree_attention_triton.py", "bench/gpu/fused_loss.py", "bench/gpu/tree_attention.py",
    ]  # fmt: skip
    for call in calls:
        assert all((SCRIPT.parents[2] / word).is_file() for word in call.split() if word.endswith(".py"))
    seconds = [
        int(line.split("within ")[1].split()[0]) for line in SCRIPT.read_text().splitlines() if "within " in line
    ]
    assert sum(seconds[-3:]) < 9 * 60
    assert min(seconds[-2:]) >= LIMIT_S + 30  # the imports before, and the last case


def test_a_script_that_fails_stops_no_other(tmp_path: Path) -> None:
    status, calls = run(tmp_path, "exit 1", "--sweep")
    assert status == 1
    assert [call for call in calls if "--sweep" in call] == calls[:2]
    assert len(calls) == 5


def test_the_package_is_found_without_installation(tmp_path: Path) -> None:
    status, _ = run(tmp_path, '[ "$2" != pytest ] || [ -f "${PYTHONPATH%%:*}/cipo_kernels/__init__.py" ]')
    assert status == 0
