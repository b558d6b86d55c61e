"""The commands that read a run: `python -m cipo_fast.evaluate` and `python -m cipo_fast.export`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_train import run_dir, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from cipo_fast.evaluate import main, parse, prepared
from cipo_fast.export import main as export_main

SAME = ["--n", "2", "--checks", "1"]  # as the run has it


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, warm: Path) -> Path:
    """A run of two steps, with a checkpoint of each."""
    folder = run_dir(tmp_path_factory.mktemp("finished"), warm)
    assert train(folder, "checkpoint.every=1", "eval.every=1", "optim.lr=1e-3") == 0
    return folder


def with_other_eos(folder: Path, token: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = token
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, "eos_token_id": tokenizer.eos_token_id}))


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def values(folder: Path) -> dict[str, float | None]:
    return {name: figure["value"] for name, figure in results(folder)["figures"].items()}


def samples(folder: Path) -> list[dict]:
    """All that was answered, less the time it took."""
    found = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def rows(run: Path) -> dict[int, dict[str, float | None]]:
    found = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    return {row["step"]: {k.removeprefix("eval/"): v for k, v in row.items() if k.startswith("eval/")} for row in found}


def test_a_run_keeps_every_evaluation(finished: Path) -> None:
    folders = sorted(path.name for path in (finished / "evaluations").glob("step-?????"))
    assert folders == ["step-00000", "step-00001", "step-00002"]
    for step, row in rows(finished).items():
        assert row == values(finished / "evaluations" / f"step-{step:05d}")
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["after"] == rows(finished)[2]
    assert summary["after"].keys() >= {"greedy", "t1", "pass_at_2", "wrong_to_right", "after_check_1", "correction_gap"}


def test_the_command_gives_the_runs_own_figures(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of model/, and of each checkpoint, which holds no model that transformers could load."""
    assert main([str(finished), *SAME]) == 0
    printed = capsys.readouterr().out
    for label in ("accuracy, greedy", "pass@2", "pass^2", "maj@2", "accuracy after a check"):
        assert label in printed
    own = {step: samples(finished / "evaluations" / f"step-{step:05d}") for step in (1, 2)}
    assert own[1] != own[2]
    assert samples(finished / "evaluations" / "model-n2") == own[2]
    for step in (1, 2):
        assert main([str(finished), "--checkpoint", str(step), *SAME]) == 0
        assert samples(finished / "evaluations" / f"step-{step:05d}-n2") == own[step]
        assert values(finished / "evaluations" / f"step-{step:05d}-n2") == rows(finished)[step]
    assert results(finished / "evaluations" / "step-00001-n2")["settings"]["n"] == 2


def test_a_model_on_tasks_of_ones_own(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sources, a folder without a run, an end of answers that is not the template's."""
    held_out = (finished / "held_out.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("one", held_out[:5]), ("two", held_out[5:8])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    model = tmp_path / "model"
    shutil.copytree(finished / "model", model)
    with_other_eos(model, "<|pad|>")
    tasks = [str(tmp_path / f"{name}.jsonl") for name in ("one", "two")]
    settings = ["eval.max_tokens=6", "data.max_prompt_tokens=64", "correction.followup=check"]
    out = tmp_path / "out"
    command = [str(model), "--tasks", *tasks, "--n", "4", "--checked", "2", "--out", str(out), *settings]
    assert main(command) == 0
    assert "an answer ends with <|pad|> (0), <|end|> (1)" in capsys.readouterr().out
    found = results(out)
    assert found["sources"].keys() == {"one.jsonl", "two.jsonl"}
    assert [found["sources"][f"{name}.jsonl"]["greedy"]["count"] for name in ("one", "two")] == [5, 3]
    assert found["settings"]["checks"] == 3
    assert found["figures"]["after_check_3"]["count"] == 16
    before = (out / "samples.jsonl").read_text()
    assert main(command) == 0  # nothing is left to do
    assert (out / "samples.jsonl").read_text() == before


def test_two_evaluations_are_compared(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(finished / "evaluations" / f"step-0000{step}") for step in (0, 2)]
    assert main(["--compare", *folders]) == 0
    assert "16 problems in both; 0 only in the first and 0 only in the second are left out" in capsys.readouterr().out
    written = json.loads(next((finished / "evaluations" / "step-00002").glob("compared-with-*.json")).read_text())
    apart = (rows(finished)[2]["t1"] or 0) - (rows(finished)[0]["t1"] or 0)
    assert written["differences"]["t1"]["value"] == pytest.approx(apart)


def test_an_exported_checkpoint_is_the_model(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert export_main([str(finished), "--out", str(out)]) == 0
    assert "step-2 is now" in capsys.readouterr().out
    exported, own = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (out, finished / "model"))
    assert exported.keys() == own.keys()
    assert all(torch.equal(exported[name], own[name]) for name in own)
    assert {p.name for p in out.iterdir()} == {p.name for p in (finished / "model").iterdir()}
    assert export_main([str(finished), "--step", "1"]) == 0
    earlier = AutoModelForCausalLM.from_pretrained(finished / "exported" / "step-00001").state_dict()
    assert not all(torch.equal(earlier[name], own[name]) for name in own)


def test_bad_input_is_one_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare, rotten = tmp_path / "bare", tmp_path / "rotten"
    bare.mkdir()
    shutil.copy(finished / "config.yaml", bare)
    shutil.copy(finished / "held_out.jsonl", bare)
    rotten.mkdir()
    for name in ("config.yaml", "held_out.jsonl"):
        shutil.copy(finished / name, rotten)
    for name in ("shape", "checkpoints"):
        shutil.copytree(finished / name, rotten / name)
    shard = rotten / "checkpoints" / "step-2" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-9])
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "add 1+1", "answer": "2"}\n')
    run, steps = str(finished), finished / "evaluations"
    for command, args, message in (
        (main, ["no/such", "--tasks", str(other)], "model.path=no/such"),
        (main, [str(finished / "model")], "--tasks: name the files"),
        (main, [run, "--tasks", str(tmp_path / "gone.jsonl")], f"data.eval: no file {tmp_path}/gone.jsonl"),
        (main, [run, "--tasks"], "--tasks: a file of problems"),
        (main, [run, "--checkpoint", "7"], "no checkpoint of step 7; there are those of 1, 2"),
        (main, [run, "--checkpoint", "x"], "--checkpoint: a whole number"),
        (main, [str(finished / "model"), "--checkpoint", "1", "--tasks", str(other)], "is no run's folder"),
        (main, [str(bare)], "no checkpoint in"),
        (main, [str(rotten)], "__0_0.distcp has "),
        (main, [run, "--n", "4", "--checked", "8"], "--checked 8: more than --n 4"),
        (main, [run, "--n", "1"], "eval.samples=1"),
        (main, [run, "--k", "4"], "unknown option --k"),
        (main, [run, "--out", f"{other}/x"], f"--out={other}/x: cannot write there"),
        (main, [run, run], "one model or run is expected"),
        (main, ["--compare", str(steps / "step-00000")], "two evaluations' folders"),
        (main, ["--compare", str(steps / "step-00000"), str(tmp_path)], "cannot be read"),
        (export_main, [str(bare)], "no checkpoint in"),
        (export_main, [run, "--step", "9"], "there are those of 1, 2"),
        (export_main, [run, "--out", str(rotten)], "exists; name another"),
        (export_main, [run, "--out", f"{other}/x"], f"--out={other}: cannot write there"),
        (export_main, [str(tmp_path)], "not a run's folder"),
    ):
        assert command(args) == 2, args
        error = capsys.readouterr().err.strip().splitlines()
        assert message in error[-1], args


def test_problems_that_do_not_overlap_are_not_compared(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same ids, other problems."""
    first = json.loads((finished / "held_out.jsonl").read_text().splitlines()[0])
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": first["id"], "prompt": "add 1+1", "answer": "2"}) + "\n")
    assert main([str(finished), "--tasks", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "out"), *SAME]) == 0
    capsys.readouterr()
    assert main(["--compare", str(finished / "evaluations" / "step-00000"), str(tmp_path / "out")]) == 2
    assert "no problem in common (16 and 1 problems)" in capsys.readouterr().err


def test_settings_come_from_the_run_and_the_command_line_wins(finished: Path) -> None:
    asked = parse([str(finished), "--n", "32", "eval.checked=5", "seed=7", "--checks", "2", "verify.workers=1"])
    config, weights, out = prepared(asked)
    assert (config.eval.samples, config.eval.checked, config.eval.checks, config.seed) == (32, 5, 2, 7)
    assert config.data.task == "add"
    assert config.rollout.max_tokens == 6
    assert config.data.eval == finished / "held_out.jsonl"
    assert config.eval.problems is None
    assert (weights.name, out) == ("model", finished / "evaluations" / "model-n32")
    assert not out.exists()
