"""Something is learned, and from the rewards: 40 steps of `add` on 16 problems, in four seconds.

Measured is the accuracy of the rollouts, the mean of the last five steps minus that of the first five. The bounds come
from seeds that are not tested here, from this start (0.03 of the answers are right): CIPO 0.158 to 0.291 (mean 0.220,
standard deviation 0.042, 8 seeds), GRPO 0.163 to 0.356 (0.251, 0.056, 10 seeds), CIPO with shuffled rewards -0.025 to
-0.008 (-0.018, 0.007, 8 seeds). So LEARNED is more than three standard deviations below what learns, and NOTHING more
than three above what does not.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_train import SMALL, run_dir

from cipo_fast.config import configs_dir, load_config
from cipo_fast.distributed import process_group
from cipo_fast.embedded.prepare import HELD_OUT, TRAIN, prepare
from cipo_fast.records import Anchor, Group, Rollout
from cipo_fast.sampling import Sampler
from cipo_fast.train import main

LEARNED, NOTHING = 0.08, 0.02
SETTINGS = [
    *SMALL, "train.steps=40", "rollout.prompts_per_step=16", "rollout.samples_per_prompt=8", "sync.probe_every=50",
    "run.save_rollouts_every=0", "checkpoint.every=0", "checkpoint.export=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, warm: Path) -> Path:
    """A model that adds two numbers right now and then, and the problems."""
    folder = run_dir(tmp_path_factory.mktemp("start"), warm)
    config = load_config([], [*SMALL, "seed=100", "eval.problems=64", f"run.dir={folder}"])
    with process_group() as mesh:
        return Path(prepare(config, mesh, print).model.path)


def gain(start: Path, folder: Path, seed: int, *settings: str) -> float:
    """Accuracy after 40 steps less that before, on 16 problems chosen by `seed`."""
    problems = (start / TRAIN).read_text(encoding="utf-8").splitlines(keepends=True)
    folder.mkdir(exist_ok=True)
    few = folder / "few.jsonl"
    few.write_text("".join(problems[i] for i in np.random.default_rng(seed).permutation(len(problems))[:16]))
    args = [str(configs_dir() / "embedded.yaml"), *SETTINGS, f"seed={seed}", f"model.path={start}",
            f"data.train={few}", f"data.eval={start / HELD_OUT}", f"run.dir={folder / 'run'}"]  # fmt: skip
    assert main([*args, *settings]) == 0
    rows = map(json.loads, (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return difference([row["rollout/accuracy"] for row in rows])


def difference(accuracy: list[float]) -> float:
    assert len(accuracy) == 40
    return float(np.mean(accuracy[-5:]) - np.mean(accuracy[:5]))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("settings", [["optim.lr=6e-4"], ["correction.lambda_corr=0", "optim.lr=4e-4"]],
                         ids=["cipo", "grpo"])  # fmt: skip
def test_forty_steps_learn(settings: list[str], seed: int, start: Path, tmp_path: Path) -> None:
    assert gain(start, tmp_path, seed, *settings) > LEARNED


def test_shuffled_rewards_teach_nothing(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: as many rewards as before, each for the answer of another; the mean of three seeds."""
    found = []
    for seed in range(3):
        with monkeypatch.context() as patch:
            accuracy = shuffle_rewards(np.random.default_rng(seed), patch)
            gain(start, tmp_path / str(seed), seed, "optim.lr=6e-4")
        found.append(difference(accuracy))
    assert np.mean(found) < NOTHING, found


def shuffle_rewards(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the verifier says of a step's rollouts, and of its corrections, is dealt out anew among all of them.
    Evaluations are left alone. Gives the list of every step's accuracy by the true rewards."""
    groups: Callable[..., list[Group]] = Sampler.groups
    correct: Callable[..., None] = Sampler.correct
    accuracy: list[float] = []

    def deal(rollouts: list[Rollout]) -> None:
        for rollout, reward in zip(rollouts, rng.permutation([r.reward for r in rollouts]), strict=True):
            rollout.reward = float(reward)

    def shuffled_groups(
        self: Sampler, prompts: object, n: int, sampling: object, step: int, purpose: str
    ) -> list[Group]:
        found = groups(self, prompts, n, sampling, step, purpose)
        if purpose == "rollout":
            rollouts = [r for group in found for r in group.rollouts]
            accuracy.append(float(np.mean([r.reward for r in rollouts])))
            deal(rollouts)
        return found

    def shuffled_correct(
        self: Sampler, anchors: list[Anchor], n: int, sampling: object, step: int, purpose: str
    ) -> None:
        correct(self, anchors, n, sampling, step, purpose)
        if purpose == "correction":
            deal([r for anchor in anchors for r in anchor.corrections])

    monkeypatch.setattr(Sampler, "groups", shuffled_groups)
    monkeypatch.setattr(Sampler, "correct", shuffled_correct)
    return accuracy
