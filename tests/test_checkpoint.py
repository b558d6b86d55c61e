"""Checkpoints that were cut short, have rotted, or could not be written."""

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conversations import random_conversations
from torch.distributed.checkpoint import CheckpointException

from cipo_fast.checkpoint import CheckpointFailed, Checkpoints, Progress, _reason, saved
from cipo_fast.cipo.replay import ReplayState
from cipo_fast.config import OptimConfig, load_config
from cipo_fast.embedded.model import new_model
from cipo_fast.errors import UserError
from cipo_fast.learner import Learner
from cipo_fast.packing import build_trees, make_pack
from cipo_fast.policy import ATTENTION, build_policy

START = Progress(0, ReplayState(0.3))


def learner_of(mesh: object, hidden: int = 32) -> Learner:
    config = load_config([], [f"model.embedded.hidden={hidden}", "model.embedded.mlp=48"])
    return Learner(build_policy(new_model(config, ATTENTION), config, mesh), OptimConfig(lr=1e-2), 9)  # type: ignore[arg-type]


def update(learner: Learner) -> None:
    pack = make_pack(build_trees(random_conversations(0, n_trees=1, depth=2)))
    assert learner.update([pack], 0).applied


def state(learner: Learner) -> list[torch.Tensor]:
    moments = [m for values in learner.optimizer.state.values() for m in (values["exp_avg"], values["exp_avg_sq"])]
    return [tensor.detach().clone() for tensor in (*learner.policy.parameters(), *moments)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def learner(mesh: object) -> Learner:
    return learner_of(mesh)


@pytest.fixture(scope="module")
def two(learner: Learner, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    """A folder with step-2 and step-4, and the state that step-2 holds."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    checkpoints = Checkpoints(folder, 9, print)
    update(learner)
    checkpoints.save(learner, replace(START, step=2))
    before = state(learner)
    update(learner)
    checkpoints.save(learner, replace(START, step=4))
    assert not same(state(learner), before)
    return folder, before


@pytest.fixture
def copy(two: tuple[Path, list[torch.Tensor]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(two[0], tmp_path / "checkpoints"))


def flip(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut(path: Path, share: float = 0.5) -> None:
    os.truncate(path, int(path.stat().st_size * share))


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda p: cut(p / "__0_0.distcp"), "__0_0.distcp has "),
    (lambda p: cut(p / "__0_0.distcp", 0), "__0_0.distcp has 0 bytes of "),
    (lambda p: flip(p / "__0_0.distcp"), "__0_0.distcp is not what was written"),
    (lambda p: flip(p / ".metadata"), ".metadata is not what was written"),
    (lambda p: flip(p / "state.json"), "state.json is not what was written"),
    (lambda p: cut(p / "state.json"), "state.json has "),
    (lambda p: (p / ".metadata").unlink(), ".metadata is missing"),
    (lambda p: (p / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda p: cut(p / "manifest.json"), "manifest.json cannot be read"),
    (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    (lambda p: p.rename(p.with_name("step-4.part")), "step-4.part is passed over: it was not finished"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_said(
    damage: Callable[[Path], object], said: str, learner: Learner, two: tuple[Path, list[torch.Tensor]], copy: Path
) -> None:
    damage(copy / "step-4")
    lines: list[str] = []
    assert Checkpoints(copy, 2, lines.append).load_newest(learner).step == 2
    assert same(state(learner), two[1])
    assert len(lines) == 1
    assert said in lines[0]


def test_a_damaged_one_is_kept_and_not_counted(learner: Learner, copy: Path) -> None:
    flip(copy / "step-4" / "__0_0.distcp")
    checkpoints = Checkpoints(copy, 2, print)
    progress = checkpoints.load_newest(learner)
    checkpoints.save(learner, replace(progress, step=3))
    assert [p.name for p in saved(copy)] == ["step-2", "step-3", "step-4"]
    checkpoints.save(learner, replace(progress, step=4))  # in its place
    checkpoints.save(learner, replace(progress, step=5))
    assert sorted(p.name for p in copy.iterdir()) == ["step-4", "step-4.damaged", "step-5"]
    assert Checkpoints(copy, 2, print).load_newest(learner).step == 5


def test_none_whole_is_one_line_that_names_each(learner: Learner, copy: Path) -> None:
    for step in (2, 4):
        flip(copy / f"step-{step}" / "__0_0.distcp")
    with pytest.raises(UserError, match=r"step-4: .*checksum.*step-2: .*checksum.*checkpoint.resume=false") as error:
        Checkpoints(copy, 2, print).load_newest(learner)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_shape_is_refused_in_one_line(mesh: object, copy: Path) -> None:
    with pytest.raises(UserError, match=r"step-4: it does not fit this model \(.*[sS]ize") as error:
        Checkpoints(copy, 2, print).load_newest(learner_of(mesh, hidden=64))
    assert "\n" not in str(error.value)


def test_the_same_state_is_not_written_twice(learner: Learner, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, print)
    where = checkpoints.save(learner, replace(START, step=1))
    inode = where.stat().st_ino
    assert checkpoints.save(learner, replace(START, step=1)) == where
    assert where.stat().st_ino == inode
    again = Checkpoints(tmp_path, 2, print)
    again.save(learner, again.load_newest(learner))
    assert where.stat().st_ino == inode
    again.save(learner, replace(START, step=1, before={"t1": 0.5}))  # the step is the same, what is known of it is not
    assert where.stat().st_ino != inode
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_an_end_at_any_moment_of_a_second_saving_leaves_the_step(
    learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off at every rename in turn, as kill -9 would: a checkpoint of the step can be loaded each time."""
    Checkpoints(tmp_path, 1, print).save(learner, replace(START, step=1))
    rename, left = Path.rename, [0]

    class Killed(BaseException):
        pass

    def counted(self: Path, target: Path) -> Path:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return rename(self, target)

    for n in range(2):
        checkpoints = Checkpoints(tmp_path, 1, print)
        with monkeypatch.context() as patch:
            left[0] = n + 1  # the first rename is DCP's own, of its metadata
            patch.setattr(Path, "rename", counted)
            with pytest.raises(Killed):
                checkpoints.save(learner, replace(START, step=1, seconds=n + 1.0))
        assert Checkpoints(tmp_path, 1, print).load_newest(learner).step == 1


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk does to a process: a write beyond `size` bytes of a file fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 30_000])  # state.json fits neither, one tensor's part fits the second
def test_what_cannot_be_written_leaves_the_older_ones_and_nothing_else(size: int, learner: Learner, copy: Path) -> None:
    checkpoints = Checkpoints(copy, 1, print)
    progress = checkpoints.load_newest(learner)
    with files_of_at_most(size), pytest.raises(CheckpointFailed, match="step-6 cannot be saved") as error:
        checkpoints.save(learner, replace(progress, step=6))
    print(error.value)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in copy.iterdir()) == ["step-2", "step-4"]
    assert Checkpoints(copy, 1, print).load_newest(learner).step == 4
    checkpoints.save(learner, replace(progress, step=8))  # there is room again
    assert [p.name for p in copy.iterdir()] == ["step-8"]


def test_a_full_disk(learner: Learner, tmp_path: Path) -> None:
    """A file system of 600 kB, which holds no two of these checkpoints; where mounting is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount")
    try:
        checkpoints = Checkpoints(disk / "checkpoints", 1, print)
        checkpoints.save(learner, replace(START, step=1))
        with pytest.raises(CheckpointFailed, match="No space left on device"):
            checkpoints.save(learner, replace(START, step=2))
        assert Checkpoints(disk / "checkpoints", 1, print).load_newest(learner).step == 1
        assert [p.name for p in (disk / "checkpoints").iterdir()] == ["step-1"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_reason_is_one_line_whatever_the_error() -> None:
    assert _reason(RuntimeError()) == "RuntimeError"
    assert _reason(RuntimeError("\n a \n b")) == "a"
    assert _reason(CheckpointException("save", {})) != ""
    assert "No space" in _reason(CheckpointException("save", {1: (OSError(28, "No space left"), None)}))  # type: ignore


@pytest.mark.parametrize(
    ("steps", "most", "trailing"),
    [
        ([[False, False, False, True]], 3, 0),  # within a step
        ([[True, False], [False], [False, True]], 3, 0),  # over steps
        ([[False, True, False, False]], 2, 2),
        ([[False, False, False], [True]], 0, 0),  # the stop is the step's in which it happened
    ],
)
def test_updates_in_a_row_count_within_a_step(steps: list[list[bool]], most: int, trailing: int) -> None:
    progress = START
    for applied in steps:
        progress = progress.after_step(progress.replay, applied, 1.0)
    assert (progress.most_in_a_row, progress.skipped_in_a_row) == (most, trailing)
    assert progress.skipped == sum(not good for applied in steps for good in applied)


def test_the_manifest_names_every_file(two: tuple[Path, list[torch.Tensor]]) -> None:
    folder = two[0] / "step-4"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert files.keys() == {p.name for p in folder.iterdir()} - {"manifest.json"} >= {".metadata", "state.json"}
