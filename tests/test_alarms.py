"""Alarms for learning nothing, and what is measured over all sampled tokens."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cipo_fast.alarms import NAMES, Alarms
from cipo_fast.cipo.anchors import AnchorCounts
from cipo_fast.cipo.metrics import batch_metrics
from cipo_fast.learner import ALL_STATS
from cipo_fast.records import Anchor, Group, Problem, Rollout
from cipo_fast.train import main

TRAIN_PY = Path(__file__).parents[1] / "cipo_fast" / "train.py"


def group(texts: str, answer: str, truncated: bool = False) -> Group:
    """One rollout a word; right where the word is the answer."""
    problem = Problem("p", ({"role": "user", "content": "q"},), answer, "test")
    rollouts = [
        Rollout(problem, [1], [2, 3], [-1.0, -1.0], text, float(text == answer and not truncated), truncated, 0)
        for text in texts.split()
    ]
    return Group(problem, [1], rollouts)


def anchored(group: Group, rewards: list[float]) -> Anchor:
    anchor = Anchor(group.rollouts[0], 0, 0, [1], [4])
    anchor.corrections = [Rollout(group.problem, [1], [2], [-1.0], "c", reward, False, 0) for reward in rewards]
    return anchor


def metrics(groups: list[Group], anchors: list[Anchor], step: int = 1, **more: float | None) -> dict:
    right = sum(a.right for a in anchors)
    counts = AnchorCounts(right_wanted=1, right=right, wrong_wanted=1, wrong=len(anchors) - right, dropped=0)
    return {"step": step, "grad/norm": 0.5, **batch_metrics(groups, anchors, counts), **more}


def on(flags: dict) -> list[str]:
    return [name for name in NAMES if flags[f"alarm/{name}"]]


GOOD = [group("42 41", "42"), group("42 42", "42")]
CORRECTED = [anchored(GOOD[0], [1.0, 0.0])]
WRONG = [group("42 42", "42.0"), group("1 2", "3")]
RIGHT = [group("3 3", "3")]
CUT = [group("1 1", "1", truncated=True), group("x x", "1", truncated=True)]


@pytest.mark.parametrize(
    ("name", "groups", "anchors", "more", "words"),
    [
        ("no_variance", WRONG, [anchored(WRONG[0], [0.0, 0.0])], {},
         ["0 of 4 answers are right", "wanted '42.0', got '42'", "(1) the verifier compares the whole answer"]),
        ("no_variance", RIGHT, [anchored(RIGHT[0], [1.0, 1.0])], {},
         ["2 of 2 answers are right", "(1) the problems are too easy"]),
        ("no_variance", [*RIGHT, WRONG[0]], [anchored(RIGHT[0], [1.0])], {}, ["2 of 4", "temperature is too low"]),
        ("truncated", [*CUT, group("1 1", "1", truncated=True)], CORRECTED, {},
         ["all 6 answers are cut off", "(1) the token that ends"]),
        ("no_anchors", GOOD, [], {}, ["0 of 2 anchors", "(1) correction prompts are longer"]),
        ("no_change", GOOD, CORRECTED, {"grad/norm": 0.0}, ["grad norm 0.0"]),
        ("no_change", GOOD, CORRECTED, {"sync/changed": 0}, ["optim.lr is below what model.dtype can hold"]),
    ],
)  # fmt: skip
def test_an_alarm_is_named_said_once_and_ends(name, groups, anchors, more, words) -> None:
    alarms = Alarms(after=3, outside=0.1)
    said = []
    for step in range(1, 8):
        flags, lines = alarms.step(metrics(groups, anchors, step, **more), groups, anchors)
        assert (name in on(flags)) == (step >= 3)
        said += [(step, line) for line in lines if line.startswith(f"alarm, step {step}: {name}: ")]
    assert [step for step, _ in said] == [3, 6]
    assert [word for word in words if word not in said[0][1]] == []
    assert "\n" not in said[0][1]
    flags, lines = alarms.step(metrics(GOOD, CORRECTED), GOOD, CORRECTED)
    assert (on(flags), lines) == ([], [])
    flags, _ = alarms.step(metrics(groups, anchors, **more), groups, anchors)  # counted anew
    assert name not in on(flags)


def test_answers_that_do_not_end_are_the_first_cause() -> None:
    _, lines = Alarms(1, 0.1).step(metrics(CUT, []), CUT, [])
    assert "(1) answers do not end: 4 of 4 are truncated" in next(x for x in lines if ": no_variance: " in x)


@pytest.mark.parametrize(
    ("verifier", "verdict", "why", "words"),
    [
        (
            "math",
            "unparsable",
            "no closed box",
            ["(1) 4 of 4 answers cannot be read (mostly: 'no closed box')", "boxed"],
        ),
        ("code", "timeout", "CPU time", ["(1) 4 of 4 answers ran out of time (mostly: 'CPU time')", "sandbox.cpu_s"]),
        ("own.py:right", "wrong", "returned False", ["(1) the function returns False", ": 'returned False')"]),
    ],
)
def test_causes_of_all_wrong_are_the_verifiers(verifier: str, verdict: str, why: str, words: list[str]) -> None:
    groups = [group("42 41", "7"), group("1 2", "7")]
    for r in (r for g in groups for r in g.rollouts):
        r.problem, r.verdict, r.why = replace(r.problem, verifier=verifier), verdict, why
    _, lines = Alarms(1, 0.1).step(metrics(groups, []), groups, [])
    line = next(x for x in lines if ": no_variance: " in x)
    assert [word for word in words if word not in line] == []
    assert "compares the whole answer" not in line


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("copies", {"correction/verbatim_copy": 0.9}, "90% of corrections repeat their attempt"),
        ("breaks_right", {"correction/right_to_wrong": 0.6}, "60% of corrections of right attempts are wrong"),
        ("length_reward", {"audit/reward_length_corr": -0.75}, "-0.75, -"),
    ],
)
def test_what_corrections_may_teach_is_watched(name: str, more: dict[str, float], words: str) -> None:
    flags, lines = Alarms(1, 0.1).step(metrics(GOOD, CORRECTED, **more), GOOD, CORRECTED)
    assert on(flags) == [name]
    assert words in lines[0]
    weak = {"rollout/accuracy": 0.2}  # a fresh attempt is wrong more often still
    flags, _ = Alarms(1, 0.1).step(metrics(GOOD, CORRECTED, **more, **weak), GOOD, CORRECTED)
    assert on(flags) == ([] if name == "breaks_right" else [name])


def test_what_is_no_alarm() -> None:
    """Variance in corrections alone is something to learn from; GRPO has no anchors; a sync that was not asked."""
    alarms = Alarms(1, 0.1)
    assert on(alarms.step(metrics(WRONG, [anchored(WRONG[0], [1.0, 0.0])]), WRONG, [])[0]) == []
    grpo = {**metrics(GOOD, []), "anchors/right_wanted": 0, "anchors/wrong_wanted": 0, "grad/norm": None}
    assert on(alarms.step(grpo, GOOD, [])[0]) == []
    assert on(alarms.step(metrics(GOOD, CORRECTED, **{"sync/changed": 5, "grad/norm": 0.0}), GOOD, CORRECTED)[0]) == []


def test_mismatch_is_said_at_once() -> None:
    alarms = Alarms(4, 0.1)
    outside = {"rollout/mismatch_outside": 0.01, "correction/all_mismatch_outside": 0.2}
    found = [alarms.step(metrics(GOOD, CORRECTED, i, **outside), GOOD, []) for i in range(6)]
    assert [on(flags) for flags, _ in found] == [["mismatch"]] * 6
    assert [len(lines) for _, lines in found] == [1, 0, 0, 0, 1, 0]
    assert "20.0% of the sampled tokens" in found[0][1][0]


# ---------------------------------------------------------------------------------------- over all sampled tokens

TINY = [
    "model.embedded.hidden=32", "model.embedded.mlp=48", "model.embedded.layers=1", "model.embedded.warm_accuracy=0.02",
    "data.task=add", "rollout.prompts_per_step=6", "rollout.samples_per_prompt=3", "rollout.max_tokens=4",
    "eval.problems=4", "eval.samples=2", "run.trackers=[]", "checkpoint.export=false", "run.view=plain", "seed=3",
]  # fmt: skip


def run(folder: Path, warm: Path, *args: str, ranks: int = 1) -> list[dict]:
    folder.mkdir()
    (folder / "warm_start").symlink_to(warm / "warm_start")
    arguments = [*TINY, f"run.dir={folder}", *args]
    if ranks == 1:
        assert main(arguments) == 0
    else:
        torchrun = str(Path(sys.executable).with_name("torchrun"))
        done = subprocess.run(
            [torchrun, "--standalone", f"--nproc-per-node={ranks}", str(TRAIN_PY), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=250, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


KEYS = [f"{stream}/{key}" for stream in ("rollout", "correction") for key in ALL_STATS]


@pytest.mark.parametrize("args", [[], ["correction.loss=ce", "correction.context=bare"], ["train.updates_per_step=2"]])
def test_all_sampled_tokens_are_measured_as_if_none_were_left_out(args: list[str], tmp_path: Path, warm: Path) -> None:
    """An entropy bonus too small to move anything keeps every answer in; what is measured is the same then, and where
    nothing is left out the two ways of counting are one."""
    ours = run(tmp_path / "a", warm, *args, "train.steps=1")[0]
    whole = run(tmp_path / "b", warm, *args, "train.steps=1", "loss.entropy_coef=1e-30", "correction.loss=rl")[0]
    assert ours["rollout/no_variance"] > 0  # something was left out
    rounding = 1e-4 if "train.updates_per_step=2" in args else 1e-6  # the second starts from the first's result
    for key in KEYS:
        assert ours[key] == pytest.approx(whole[key], rel=rounding, abs=1e-9), key
    if not args:
        for stream in ("rollout", "correction"):
            for key in ALL_STATS:
                assert whole[f"{stream}/{key}"] == pytest.approx(whole[f"{stream}/{key[4:]}"], rel=1e-6, abs=1e-12)
        assert ours["rollout/all_entropy"] != pytest.approx(ours["rollout/entropy"], rel=1e-3)


def test_two_ranks_measure_the_same_and_only_when_asked(tmp_path: Path, warm: Path) -> None:
    asked = ["train.steps=2", "train.measure_every=2", "train.pack_tokens=260"]
    one, two = run(tmp_path / "a", warm, *asked), run(tmp_path / "b", warm, *asked, ranks=2)
    assert all(row[key] is None for row in (one[0], two[0]) for key in KEYS)
    assert one[1]["rollout/all_entropy"] > 0
    assert two[1]["rollout/all_entropy"] > 0
    never = run(tmp_path / "c", warm, "train.steps=2", "train.measure_every=0", "train.pack_tokens=260")
    assert all(row[key] is None for row in never for key in KEYS)
    for a, b in zip(one, never, strict=True):  # measuring changes nothing
        assert a["loss/total"] == b["loss/total"]


def test_a_run_says_its_alarms(tmp_path: Path, warm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Problems whose answers no answer can equal: the run ends well, and said why it learned nothing."""
    rows = "".join(json.dumps({"prompt": f"add {i}", "answer": f"{i}.0 [/b]"}) + "\n" for i in range(40))
    (tmp_path / "data.jsonl").write_text(rows)
    found = run(tmp_path / "a", warm, f"data.train={tmp_path / 'data.jsonl'}", "train.steps=3", "run.alarm_after=2",
                "model.embedded.warm_steps=0", "rollout.max_tokens=12", "correction.lambda_corr=0")  # fmt: skip
    assert [row["alarm/no_variance"] for row in found] == [0, 1, 1]
    assert all(f"alarm/{name}" in row for row in found for name in NAMES)
    printed = capsys.readouterr().out
    assert printed.count("alarm, step 2: no_variance: ") == 1
    assert ".0 [/b]', got " in printed
