"""docs/own-task.md does what it says, word for word, in a fresh folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "own-task.md"


def blocks() -> tuple[dict[str, str], str]:
    """({file name: its text}, the commands): a file is named at the start of the paragraph before it."""
    text = DOCUMENT.read_text(encoding="utf-8")
    names = re.findall(r"`(\w+\.py)`", text.replace("```", "\0"))
    codes = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    [commands] = re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(codes) == 2
    return dict(zip(names, codes, strict=False)), commands


def test_it_is_short() -> None:
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120


@pytest.mark.slow
def test_it_works_as_it_stands(tmp_path: Path) -> None:
    files, commands = blocks()
    assert set(files) == {"problems.py", "verifier.py"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    script = ["bash", "-euo", "pipefail", "-c", commands]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "runs/own/summary.json").read_text())
    assert summary["steps"] == 20
    assert summary["before"]["t1"] > 0.05  # the verifier marks some of them right
    rollouts = [json.loads(line) for file in (tmp_path / "runs/own/rollouts").glob("step-*") for line in file.open()]
    right = [r for r in rollouts if r["verdict"] == "right"]
    assert {r["verdict"] for r in rollouts} >= {"right", "wrong"}
    assert any(r["text"].strip() != r["answer"] for r in right)  # it is not the answer that is compared with
    judged = [json.loads(line) for line in (tmp_path / "judged.jsonl").open()]
    assert {line["verdict"] for line in judged} >= {"right", "wrong"}
