"""The report's reading side: a run's files to one document, in whatever state they are."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from report_runs import HOSTILE, metrics, problem, tokens, write_lines, write_run

from cipo_fast import train
from cipo_fast.config import load_config
from cipo_fast.errors import Preempted, TrainingStopped, UserError
from cipo_fast.recorder import Recorder
from cipo_fast.records import Anchor, Group, Problem, Rollout, TokenStats
from cipo_fast.report import page
from cipo_fast.report.__main__ import main
from cipo_fast.report.files import Files, number
from cipo_fast.report.page import document, html, write_page
from cipo_fast.report.rollouts import cut, read_problems, sample_rollouts, size_of, spread
from cipo_fast.updates import note_advantages, watched_answers


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    found = document([write_run(tmp_path / "run", "optim.lr=1e-3")])
    (run,) = found["runs"]
    assert run["skipped"] == []
    assert run["name"] == "run"
    assert ["optim.lr", "0.001", "0.0002"] in run["settings"]
    assert not [key for key, *_ in run["settings"] if key.startswith("run.")]
    about = dict(run["about"])
    assert about["model"] == "embedded"
    assert about["steps"] == "6 of 6, ended"
    assert about["versions"] == "torch 2.13.0"
    assert run["cost"]["sampled"] == 600
    assert run["cost"]["saved"] == 0.75
    assert dict(run["phases"])["train"] == pytest.approx(0.6)
    assert [(a["name"], a["first"], a["last"], a["steps"]) for a in run["alarms"]] == [("no_variance", 3, 4, 2)]
    before, after = (point["figures"] for point in run["evaluations"])
    assert before["t1"][1] < before["t1"][0] < before["t1"][2]  # with its interval
    assert run["changes"]["t1"][0] == pytest.approx(after["t1"][0] - before["t1"][0], abs=1e-4)
    assert run["curves"]["step"] == [1, 2, 3, 4, 5, 6]
    assert run["curves"]["series"]["rate/sampled"] == [1000.0] * 6
    assert "correction/right_to_wrong" not in run["curves"]["series"]  # never had a value
    assert [step["step"] for step in run["rollouts"]] == [1, 6]
    json.dumps(found, allow_nan=False)


def test_evaluations_made_since_are_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    evaluations = folder / "evaluations"
    for name in ("model-n64", "torn", "old"):
        (evaluations / name).mkdir()
    text = (evaluations / "step-00006" / "results.json").read_text()
    (evaluations / "model-n64" / "results.json").write_text(text)
    (evaluations / "torn" / "results.json").write_text(text[:40])
    (evaluations / "old" / "results.json").write_text('{"figures": {"t1": 0.5}}')
    (run,) = document([folder])["runs"]
    assert [other["name"] for other in run["others"]] == ["model-n64", "old"]
    assert run["others"][0]["figures"]["t1"] == run["evaluations"][-1]["figures"]["t1"]
    assert run["others"][1]["figures"] == {}
    assert run["skipped"] == ["evaluations/torn/results.json: torn, no whole JSON"]


def test_problems_are_compared(tmp_path: Path) -> None:
    found = document([write_run(tmp_path / "a"), write_run(tmp_path / "b", "seed=1")])["compare"]
    assert [(c["run"], c["when"]) for c in found["columns"]] == [
        (0, "before"),
        (0, "step 6"),
        (1, "before"),
        (1, "step 6"),
    ]
    assert found["of"] == 8
    lost = next(p for p in found["problems"] if p["id"] == "p0")
    assert lost["prompt"] == "question 0"
    assert [cell["right"] for cell in lost["cells"]] == [3, 1, 3, 1]
    assert lost["cells"][0]["greedy"] == ["right", "p0 True"]
    assert (lost["cells"][0]["kept"], lost["cells"][0]["checked"]) == (1, 1)


def test_problems_that_one_run_has_alone_have_no_cell_in_the_other(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    for samples in runs[1].glob("evaluations/*/samples.jsonl"):
        samples.write_text(samples.read_text().replace('"content": ""', '"content": "other"'), encoding="utf-8")
    found = document(runs)["compare"]
    assert found["of"] == 16
    assert {tuple(cell is None for cell in p["cells"]) for p in found["problems"]} == {
        (False, False, True, True), (True, True, False, False),
    }  # fmt: skip


def test_runs_that_differ_in_their_seed_are_one_arm(tmp_path: Path) -> None:
    seeds = [write_run(tmp_path / f"cipo_s{seed}", f"seed={seed}") for seed in (0, 1)]
    other = write_run(tmp_path / "grpo", "correction.lambda_corr=0")
    assert document([*seeds, other])["arms"] == [{"name": "cipo", "runs": [0, 1]}, {"name": "grpo", "runs": [2]}]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    found = document([write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run")])
    assert len({run["name"] for run in found["runs"]}) == 2


def test_what_is_torn_is_named_and_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "eval.jsonl", "rollouts/step-00001.jsonl", "evaluations/step-00006/samples.jsonl"):
        with (folder / name).open("ab") as file:
            file.write(b'{"step": 7, "rollout/acc')
    (folder / "summary.json").write_text('{"before": ', encoding="utf-8")
    (folder / "evaluations" / "step-00000" / "results.json").write_bytes(b"\0" * 40)
    (run,) = document([folder])["runs"]
    named = {line.split(":")[0] for line in run["skipped"]}
    assert named == {
        "metrics.jsonl", "eval.jsonl", "rollouts/step-00001.jsonl", "evaluations/step-00006/samples.jsonl",
        "summary.json", "evaluations/step-00000/results.json",
    }  # fmt: skip
    assert run["curves"]["step"] == [1, 2, 3, 4, 5, 6]
    assert len(run["rollouts"][0]["problems"]) == 2
    assert run["evaluations"][0]["figures"]["t1"][1:] == [None, None]


def test_an_older_run_is_read(tmp_path: Path) -> None:
    """No advantages, verdicts or tokens; settings that are no more; a metric row of another form."""
    folder = write_run(
        tmp_path / "run", rollouts={2: [{"problem": "x", "prompt": "q", "text": "t", "reward": 1.0}, {"y": 1}]}
    )
    (folder / "started.jsonl").unlink()
    (folder / "config.yaml").write_text("seed: 3\nold: {setting: 1}\n", encoding="utf-8")
    write_lines(folder / "metrics.jsonl", [{"epoch": 1}, metrics(2), {"step": 3, "rollout/accuracy": "high"}])
    (run,) = document([folder])["runs"]
    assert ["old.setting", "1", "not a setting of this version"] in run["settings"]
    assert run["name"] == "run"
    (attempt,) = run["rollouts"][0]["problems"][0]["attempts"]
    assert attempt == {"text": "t", "tokens": None, "advantage": None, "verdict": "right"}
    assert run["curves"]["series"]["rollout/accuracy"] == [0.32, None]
    assert any(line.startswith("metrics.jsonl: 1 lines of another format") for line in run["skipped"])
    assert any(line.startswith("rollouts/step-00002.jsonl: 1 lines") for line in run["skipped"])


def test_settings_are_those_that_the_run_last_went_on_with(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for step in (2, 10):
        (folder / f"config-from-step-{step}.yaml").write_text(f"seed: {step}\n", encoding="utf-8")
    assert document([folder])["runs"][0]["seed"] == 10


def test_a_run_that_broke_off_at_its_start_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n", encoding="utf-8")
    (run,) = document([folder])["runs"]
    assert run["rollouts"] == run["evaluations"] == run["skipped"] == []
    assert "has not ended" in dict(run["about"])["steps"]
    assert write_page([folder], tmp_path / "page.html") > 50_000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{there}/nothing"], "no such folder"),
        (["{there}"], "holds no run"),
        (["{there}/run", "--out"], "a file name is expected"),
        (["--port=80"], "unknown option --port=80"),
        (["--out", "x.html"], "a run's folder is expected"),
        (["{there}/run", "--out", "{there}/no/such/x.html"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line(args: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    write_run(tmp_path / "run")
    assert main([arg.format(there=tmp_path) for arg in args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_command_writes_beside_the_run(tmp_path: Path, capsys: Any) -> None:
    folder = write_run(tmp_path / "run")
    assert main([str(folder)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (folder / "report.html").read_bytes().startswith(b"<!doctype html>")
    assert not list(folder.glob("*.part"))


def test_data_is_inert_in_the_page(tmp_path: Path) -> None:
    lines = problem(HOSTILE, HOSTILE, HOSTILE + "!")
    found = document([write_run(tmp_path / "run", rollouts={1: lines})])
    content = html(found).decode("utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', content, re.DOTALL)
    assert not re.search("[<>&\u2028\u2029]", data)
    assert json.loads(data)["runs"][0]["rollouts"][0]["problems"][0]["attempts"][0]["text"] == HOSTILE
    assert content.count("<script") == 3  # the data, the library, the page's own
    assert "http" not in re.sub(r"https://github\.com/leeoniya/uPlot", "", content.replace("http-equiv", ""))
    assert "Permission is hereby granted" in content


def test_the_page_stays_small(tmp_path: Path) -> None:
    """500 steps, and more rollouts than a page can hold: the first and the last step are in it; an overlong answer
    keeps both ends."""
    long = "x" * 900_000 + "end"
    lines = [line for i in range(40) for line in problem(f"p{i}", "y" * 3000)]
    steps = dict.fromkeys(range(1, 501, 9), lines)
    steps[1] = problem("long", long)
    folder = write_run(tmp_path / "run", steps=500, rollouts=steps)
    out = tmp_path / "page.html"
    assert write_page([folder], out) < 5e6
    run = document([folder])["runs"][0]
    assert [run["rollouts"][0]["step"], run["rollouts"][-1]["step"]] == [1, 496]
    attempt = run["rollouts"][0]["problems"][0]["attempts"][0]
    assert attempt["cut"] > 0
    assert attempt["text"].startswith("xxx")
    assert attempt["text"].endswith("xxxend")
    assert run["rollouts"][-1]["of"] == 40
    assert 0 < len(run["rollouts"][-1]["problems"]) < 40
    assert len(run["curves"]["step"]) == 500


def test_many_steps_are_means_of_several(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=1500)
    curves = document([folder])["runs"][0]["curves"]
    assert (curves["every"], len(curves["step"]), curves["step"][0]) == (3, 500, 3)
    assert curves["series"]["rollout/accuracy"][0] == pytest.approx(0.32)
    assert {len(values) for values in curves["series"].values()} == {500}
    assert curves["sampled"][0] == 300


def test_texts_are_cut_to_what_there_is_room_for() -> None:
    found = {
        "prompt": "p",
        "attempts": [{"text": "a" * 50_000, **tokens("a")}, {"text": "b", "logp": [1.0], "pieces": ["b"]}],
    }
    cut(found, 10_000)
    assert size_of(found) < 10_000
    assert found["attempts"][1]["text"] == "b"
    assert found["attempts"][1]["logp"] == [1.0]  # what is short keeps its tokens


def test_tokens_go_before_texts_do(tmp_path: Path) -> None:
    """A step whose tokens are too many shows its problems all the same, and colours where people look first."""
    lines = [line for i in range(6) for line in problem(f"p{i}", "x" * 1000)]
    folder = write_run(tmp_path / "run", rollouts={1: lines})
    (step,) = sample_rollouts(Files(folder), 100_000)
    first, *others = step["problems"]
    assert len(others) == 5
    assert "pieces" in first["attempts"][0]
    assert "pieces" not in others[-1]["attempts"][0]
    assert all(p["attempts"][0]["text"] == "x" * 1000 for p in step["problems"])


def test_spread_has_both_ends() -> None:
    assert spread([1, 2, 3], 5) == [1, 2, 3]
    assert spread(list(range(100)), 4) == [0, 33, 66, 99]


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), float("inf"), 10**400])
def test_what_is_no_number(value: Any) -> None:
    assert number(value) is None


# ------------------------------------------------------------------------------------------- what the recorder keeps


def rollout(text: str, right: bool = False) -> Rollout:
    ids = list(range(len(text)))
    asked = Problem("p", ({"role": "user", "content": "q"},), "x", "s")
    return Rollout(asked, [0], ids, [-1.0] * len(ids), text, float(right), False, 0, "right" if right else "wrong")


def test_tokens_of_a_step_go_to_the_attempts_that_were_shown_first() -> None:
    answers = [rollout("aaa"), rollout("bbbb")]
    group = Group(answers[0].problem, [0], answers)
    anchor = Anchor(answers[1], 0, 1, [0], [0], [rollout("cc"), rollout("d" * 50)])
    config = load_config([], ["run.save_tokens=8"]).run
    kept = watched_answers([group], [anchor], config, step=1)
    assert [r.text for r in kept] == ["bbbb", "cc"]  # then there is room for 2 more
    assert answers[0].tokens is None
    assert watched_answers([group], [anchor], load_config([], ["run.save_tokens=0"]).run, step=1) == []
    every = load_config([], ["run.save_rollouts_every=2"]).run
    assert watched_answers([group], [anchor], every, step=1) == []


def test_answers_without_a_gradient_have_advantage_0() -> None:
    answers = [rollout("a"), rollout("b")]
    group = Group(answers[0].problem, [0], answers)
    anchor = Anchor(answers[0], 0, 0, [0], [0], [rollout("c")])
    taught: Any = SimpleNamespace(sampler_logps=answers[1].sampler_logps, advantage=1.5)
    note_advantages([group], [anchor], [taught], "rl")
    assert [r.advantage for r in (*answers, *anchor.corrections)] == [0.0, 1.5, 0.0]
    note_advantages([group], [anchor], [taught], "ce")
    assert anchor.corrections[0].advantage is None


def test_the_recorder_writes_what_the_report_reads(tmp_path: Path) -> None:
    config = load_config([], [f"run.dir={tmp_path}"])
    first = rollout("ab")
    first.advantage, first.tokens = -0.5, TokenStats([-1.25, float("nan")], [0.1, 0.2])
    group = Group(first.problem, [0], [first, rollout("x", right=True)])
    recorder = Recorder(config, lambda ids: ["a", "b"])
    recorder._rollouts(3, [group], [])
    (found,) = read_problems(Files(tmp_path), "rollouts/step-00003.jsonl")
    attempt, plain = found["attempts"]
    assert attempt["pieces"] == ["a", "b"]
    assert attempt["gap"] == [-0.25, None]
    assert attempt["entropy"] == [0.1, 0.2]
    assert attempt["advantage"] == -0.5
    assert "pieces" not in plain


def test_problems_with_a_flip_take_turns_with_others(tmp_path: Path) -> None:
    still = [{**line, "problem": "still", "corrections": None} for line in problem("still")]
    folder = write_run(tmp_path / "run", rollouts={1: [*still, *problem("flips")]})
    (step,) = sample_rollouts(Files(folder), 10**6)
    assert [p["id"] for p in step["problems"]] == ["flips", "still"]


# ------------------------------------------------------------------------------------------------ at the end of a run


def ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *settings: str) -> tuple[Any, list[str], list[Path]]:
    """(a config, lines that are said, pages that are written)."""
    lines: list[str] = []
    pages: list[Path] = []
    monkeypatch.setattr(page, "write_page", lambda folders, out: pages.append(out))
    monkeypatch.setattr(train, "is_main", lambda: True)
    return load_config([], [f"run.dir={tmp_path}", *settings]), lines, pages


def test_a_run_ends_with_its_page_and_a_stopped_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, lines, pages = ending(tmp_path, monkeypatch)
    view: Any = SimpleNamespace(say=lines.append)
    with train.reported(config, view):
        pass
    with pytest.raises(TrainingStopped), train.reported(config, view):
        raise TrainingStopped("enough")
    assert pages == [tmp_path / "report.html"] * 2
    with pytest.raises(Preempted), train.reported(config, view):  # whoever sent the signal may not wait
        raise Preempted("SIGTERM")
    assert len(pages) == 2


def test_run_report_false_writes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, lines, pages = ending(tmp_path, monkeypatch, "run.report=false")
    with train.reported(config, SimpleNamespace(say=lines.append)):  # type: ignore[arg-type]
        pass
    assert (lines, pages) == ([], [])


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("surprise"), UserError("no run")])
def test_a_page_that_fails_is_one_warning(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, lines, _ = ending(tmp_path, monkeypatch)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(page, "write_page", fail)
    with train.reported(config, SimpleNamespace(say=lines.append)):  # type: ignore[arg-type]
        pass
    (line,) = lines
    assert line.startswith("warning: ")
    assert str(error) in line
