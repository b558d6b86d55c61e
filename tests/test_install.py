"""The built wheel: what it puts at top level, and that it runs from another directory without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: building leaves files behind
    for name in ("cipo_fast", "kernels", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True, timeout=250, stdin=subprocess.DEVNULL)
    return next(folder.glob("*.whl"))


def test_the_wheel_installs_two_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"cipo_fast", "cipo_kernels"}
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"cipo_fast", "cipo_kernels"}
    assert {"cipo_kernels/device_rates.json", "cipo_kernels/launch_configs.json"} <= set(names)
    recipes = {path.name for path in (ROOT / "configs").rglob("*.yaml")}
    assert {name.split("/")[-1] for name in names if name.startswith("cipo_fast/configs/")} == recipes
    page = {str(path.relative_to(ROOT)) for path in (ROOT / "cipo_fast/report/static").rglob("*") if path.is_file()}
    assert page <= set(names)


def test_the_wheel_runs_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    """Unpacked ahead of everything on the path, away from the checkout, a recipe named without its folder."""
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    code = "import cipo_fast, cipo_kernels; print(cipo_fast.__file__, cipo_kernels.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.count(str(installed)) == 2
    done = subprocess.run(
        [sys.executable, "-m", "cipo_fast.train", "grpo.yaml", "--dry-run"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0 anchors a step" in done.stdout
    assert "steps: 160" in done.stdout  # the embedded recipe came along
