"""Training with verifiers that run in workers: the command on the embedded model, a user's function for its sums."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_train import SMALL, TRAIN_PY, metrics, timeless

from cipo_fast.chat import Chat
from cipo_fast.config import DataConfig, SandboxConfig, VerifyConfig, configs_dir, load_config
from cipo_fast.distributed import process_group
from cipo_fast.embedded.model import embedded_tokenizer, new_model
from cipo_fast.embedded.prepare import prepare
from cipo_fast.errors import TrainingStopped
from cipo_fast.evaluate import main as evaluate_main
from cipo_fast.marking import Marking
from cipo_fast.records import Completion, Problem
from cipo_fast.rollout import Sampling
from cipo_fast.rollout.local import LocalEngine
from cipo_fast.sampling import Prompt, Sampler
from cipo_fast.train import main
from cipo_fast.try_out import refuse_exploits
from cipo_fast.verify import Judgement, VerifierFailure
from cipo_fast.verify.workers.pool import Judges

TOKENIZER = embedded_tokenizer()
CHAT = Chat(TOKENIZER, DataConfig())
# A sum is right when it is right: the row's answer is not looked at.
SUM = """
def right(response, row):
    a, b = row["prompt"].removeprefix("add ").split("+")
    {instead}
    return response.strip() == str(int(a) + int(b))
"""


def verifier(folder: Path, instead: str = "pass") -> str:
    """The setting of `right`, whose second line is `instead`."""
    (folder / "sums.py").write_text(SUM.format(instead=instead))
    return f"data.verifier={folder / 'sums.py'}:right"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder, with the problems of `add` in it."""
    folder = tmp_path_factory.mktemp("model")
    with process_group() as mesh:
        return Path(prepare(load_config([], [*SMALL, f"run.dir={folder}"]), mesh, lambda line: None).model.path)


def settings(model: Path, folder: Path, *args: str) -> list[str]:
    return [
        str(configs_dir() / "embedded.yaml"), *SMALL, f"model.path={model}", f"data.train={model / 'train.jsonl'}",
        f"data.eval={model / 'held_out.jsonl'}", f"run.dir={folder}", *args,
    ]  # fmt: skip


def rollouts(folder: Path) -> list[dict[str, Any]]:
    """With the rows that they name."""
    rows = {line["problem"]: line["row"] for line in lines_of(folder / "rollouts" / "problems.jsonl")}
    records = [line for path in sorted((folder / "rollouts").glob("step-*.jsonl")) for line in lines_of(path)]
    return [record | {"row": rows[record["problem"]]} for record in records]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------- whole runs


def test_a_users_function_trains_the_run_that_exact_match_trains(tmp_path: Path, model: Path) -> None:
    """Bit for bit, where both say the same: judging beside generation changes nothing."""
    assert main(settings(model, tmp_path / "exact")) == 0
    assert main(settings(model, tmp_path / "user", verifier(tmp_path))) == 0
    exact, user = metrics(tmp_path / "exact"), metrics(tmp_path / "user")
    assert timeless(exact) == timeless(user)
    assert all(row["verify/failed"] == 0 for row in user)
    shares = [sum(row[f"verify/{v}"] for v in ("right", "wrong", "unparsable", "timeout")) for row in user]
    assert shares == pytest.approx([1.0] * len(user))
    before, after = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("exact", "user"))
    assert before["after"]["t1"] == after["after"]["t1"]
    without = {key: value for key, value in before["after"].items() if not key.startswith("maj_at_")}
    assert after["after"] == without != before["after"]  # a function of one's own knows no equal answers
    for record in rollouts(tmp_path / "user"):
        assert record["row"]["verifier"] == verifier(tmp_path).removeprefix("data.verifier=")
        assert record["row"]["prompt"] == record["prompt"]
        assert (record["verdict"] == "right") == (record["reward"] == 1)
        if record["truncated"]:
            assert (record["verdict"], record["why"]) == ("unparsable", f"cut off at {record['tokens']} tokens")


def test_what_cannot_be_judged_is_left_out_and_counted(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raising = verifier(tmp_path, "if response.strip().endswith('7'): raise ZeroDivisionError('no sevens')")
    folder = tmp_path / "run"
    every_term = ["loss.beta=0.01", "loss.entropy_coef=0.01", "correction.loss=both"]
    assert main(settings(model, folder, raising, "verify.max_failed=1", *every_term)) == 0
    rows, records = metrics(folder), rollouts(folder)
    failed = sum(row["verify/failed"] for row in rows)
    per_step = 8 * 4
    assert 0 < failed < 2 * per_step
    corrections = [c for record in records for c in record["corrections"] or []]
    assert not [r for r in (*records, *corrections) if r["text"].strip().endswith("7") and not r["truncated"]]
    assert per_step * len(rows) - failed <= len(records) < per_step * len(rows)
    assert all(row["grad/norm"] > 0 for row in rows)
    said = capsys.readouterr().out
    assert "answers could not be judged and are left out; the first: " in said
    assert "ZeroDivisionError" in said
    evaluation = json.loads((folder / "summary.json").read_text())["after"]
    assert evaluation["failed"] + evaluation["answers"] > evaluation["failed"] > 0


def test_too_many_failures_end_the_run_in_its_first_step(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The held-out rows can be judged, so that the evaluation before training passes; its state is saved."""
    only_training = verifier(tmp_path, "assert int(row['id'].split('-')[1]) < 16, 'a training row'")
    assert main(settings(model, tmp_path / "run", only_training)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("stopped: 32 of 32 answers could not be judged (verify.max_failed=0.01); the first: ")
    assert "train.jsonl:" in line  # the row
    assert all(part in line for part in ("AssertionError", "a training row", "sums.py:4"))
    assert "saved as" in line
    assert (tmp_path / "run" / "checkpoints" / "step-0").is_dir()


def test_a_verifier_that_always_raises_ends_before_training(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    always = verifier(tmp_path, "raise KeyError('tests')")
    assert main(settings(model, tmp_path / "run", always)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "48 of 48 answers could not be judged" in line
    assert "KeyError at sums.py:4: 'tests'" in line
    tasks = ["--tasks", str(model / "held_out.jsonl"), "--n", "2", "--checks", "1", "--out", str(tmp_path / "out")]
    assert evaluate_main([str(model), *tasks, "eval.max_tokens=6", "correction.followup=check", always]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_a_hanging_answer_is_a_timeout_and_the_step_goes_on(tmp_path: Path, model: Path) -> None:
    hanging = verifier(tmp_path, "while response.strip().endswith('3'): pass")
    folder = tmp_path / "run"
    assert main(settings(model, folder, hanging, "verify.timeout_s=1", "eval.problems=4", "train.steps=1")) == 0
    (row,) = metrics(folder)
    assert row["verify/timeout"] > 0 == row["verify/failed"]
    hung = [r for r in rollouts(folder) if r["verdict"] == "timeout"]
    assert hung
    assert all(r["text"].strip().endswith("3") and r["reward"] == 0 for r in hung)
    assert all("no verdict within 1 s" in r["why"] for r in hung)


def test_sources_have_accuracies_of_their_own(tmp_path: Path, model: Path) -> None:
    lines = (model / "train.jsonl").read_text().splitlines()
    for name, part in (("odd", lines[1:400:2]), ("even", lines[0:400:2])):
        rows = [json.loads(line) | {"data_source": name} for line in part]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = f"data.train=[{tmp_path}/odd.jsonl,{tmp_path}/even.jsonl]"
    assert main(settings(model, tmp_path / "run", both, "data.weights=[3,1]", "rollout.prompts_per_step=16")) == 0
    rows = metrics(tmp_path / "run")
    asked = [record["source"] for record in rollouts(tmp_path / "run")]
    assert asked.count("odd") > 1.5 * asked.count("even") > 0  # 3 to 1 in an epoch
    for row, step in zip(rows, (asked[:64], asked[64:]), strict=True):
        parts = [(row[f"source/{name}/accuracy"] or 0) * step.count(name) for name in ("odd", "even")]
        assert sum(parts) / len(step) == pytest.approx(row["rollout/accuracy"])


CODE = [
    {"entry_point": "f", "tests": [{"args": [i], "expected": i + 1}], "solution": "def f(n):\n    return n + 1"}
    for i in range(12)
]


@pytest.mark.slow
def test_programs_run_in_the_sandbox_and_bad_golds_are_dropped(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The toy writes no program, but it is asked for some: the sandbox is said, exploits are tried, golds are run."""
    rows = [{**row, "id": f"row-{i}", "prompt": f"add {i}+1"} for i, row in enumerate(CODE)]
    rows[3]["solution"] = "def f(n):\n    return n"
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.train={tmp_path / 'code.jsonl'}", "data.eval=null", "data.instruction=none", "train.steps=1"]
    assert main(settings(model, tmp_path / "run", *data)) == 0
    said = capsys.readouterr().out
    assert "sandbox: " in said
    assert "canaries: " in said
    assert ", 0 failed" in said
    assert f"1 of 11 golds do not verify, their rows are dropped: {tmp_path / 'code.jsonl'}:4 (wrong" in said
    records = rollouts(tmp_path / "run")
    assert {record["row"]["verifier"] for record in records} == {"code"}
    assert "row-3" not in {record["problem"] for record in records}
    assert {record["verdict"] for record in records} <= {"unparsable", "wrong"}
    assert main([*settings(model, tmp_path / "dry", *data), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "# answers are judged by code" in said
    assert "# an execution has 5 s of CPU time, 15 s by the clock, 1024 MiB" in said


def test_a_verifier_that_is_not_there_is_refused_before_a_model_is_loaded(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verifier(tmp_path)
    for name, what in ((f"{tmp_path}/none.py:right", "none.py"), (f"{tmp_path}/sums.py:left", "left")):
        assert main([*settings(model, tmp_path / "run", f"data.verifier={name}"), "model.path=/nowhere"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ")
        assert what in line
        assert "/nowhere" not in line


def test_two_ranks_judge_their_own_shares(tmp_path: Path, model: Path) -> None:
    raising = verifier(tmp_path, "if response.strip().endswith('7'): raise ZeroDivisionError('no sevens')")
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    for most, code in ((1, 0), (0, 1)):
        folder = tmp_path / f"run{most}"
        done = subprocess.run(
            [torchrun, "--standalone", "--nproc-per-node=2", str(TRAIN_PY),
             *settings(model, folder, raising, f"verify.max_failed={most}")],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=250, capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode == 0) == (code == 0), done.stderr[-3000:]
        if code:
            assert done.stderr.count("could not be judged (verify.max_failed=0)") == 1  # one rank tells, both end
        else:
            assert sum(row["verify/failed"] for row in metrics(folder)) > 0


def test_a_signal_leaves_no_worker(tmp_path: Path, model: Path) -> None:
    """Sent while answers hang: the run ends as it would, and so does every process under it."""
    hanging = verifier(tmp_path, "while response.strip().endswith('3'): pass")
    folder = tmp_path / "run"
    command = [
        sys.executable,
        str(TRAIN_PY),
        *settings(model, folder, hanging, "verify.timeout_s=3", "verify.max_failed=1", "train.steps=50"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("step "):
                break
        else:
            pytest.fail(f"it ended before its first step: {process.stderr.read()[-3000:]}")
        below = descendants(process.pid)
        assert below  # the nursery and workers
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        assert "the same command goes on" in process.stderr.read()
    assert process.returncode == 75
    deadline = time.monotonic() + 10
    while alive := [pid for pid in below if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def descendants(pid: int) -> list[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        parents[int(name.split(" ")[0])] = int(rest.split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


# ------------------------------------------------------------------------------------------- beside generation


class Recorded:
    """Judges who note what is submitted, and when."""

    def __init__(self, events: list[str]):
        self.events = events

    def submit(self, row: dict[str, Any], response: str) -> Future[Judgement]:
        self.events.append(f"judge {row['answer']}: {response}")
        found: Future[Judgement] = Future()
        if response == "fail":
            found.set_exception(VerifierFailure("a worker was lost"))
        else:
            found.set_result(Judgement("right" if response == row["answer"] else "wrong", "seen"))
        return found


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    config = load_config([], ["model.embedded.hidden=32", "model.embedded.mlp=48", "seed=3"])
    ends = [TOKENIZER.eos_token_id, *range(100, 125)]  # untrained, it would hardly come to an end
    engine = LocalEngine(new_model(config, "sdpa"), ends, TOKENIZER.pad_token_id, 6)
    engine._whole, engine.policy_version = True, 0
    return engine


def problem(text: str) -> Problem:
    return Problem(text, ({"role": "user", "content": text},), text, "test")


def test_the_local_engine_tells_of_answers_as_they_end(engine: LocalEngine) -> None:
    prompts = [CHAT.prompt(problem(text).messages, text) for text in ("a", "bcd", "efghi", "j")]
    steps, told = [], []
    counting = engine.model.register_forward_pre_hook(lambda *_: steps.append(1))
    found = engine.generate(
        prompts, 3, Sampling(1.0, 1.0, 60), 5, lambda i, ids: told.append((i, tuple(ids), len(steps)))
    )
    counting.remove()
    ended = [(i, tuple(c.token_ids)) for i, group in enumerate(found) for c in group if not c.truncated]
    assert sorted((i, ids) for i, ids, _ in told) == sorted(ended)
    assert len(ended) > 3
    at = [step for _, _, step in told]
    assert at == sorted(at)
    assert at[0] < len(steps) // 2  # the first long before the last token
    assert engine.generate(prompts, 3, Sampling(1.0, 1.0, 60), 5) == found  # listening changes nothing


def test_an_answer_beyond_its_own_room_is_cut_and_not_told(engine: LocalEngine) -> None:
    """In a batch generation goes on for the prompt with the most room."""
    prompts = [CHAT.prompt(problem(text).messages, text) for text in ("a", "b" * 40)]
    engine.max_model_len = len(prompts[1]) + 4
    told: list[int] = []
    try:
        found = engine.generate(prompts, 3, Sampling(1.0, 1.0, 60), 5, lambda i, ids: told.append(i))
    finally:
        engine.max_model_len = None
    assert told.count(1) == sum(not c.truncated for c in found[1])
    assert told.count(0) == sum(not c.truncated for c in found[0])
    assert any(c.truncated for c in found[1])


def test_judging_begins_before_generation_ends_and_equal_answers_are_judged_once(
    engine: LocalEngine, mesh: object
) -> None:
    events: list[str] = []

    class Noted:
        def generate(self, *args: Any) -> list[list[Completion]]:
            found = engine.generate(*args)
            events.append("generated")
            return found

    prompts = [Prompt(p, CHAT.prompt(p.messages, p.id)) for p in map(problem, ("a", "b", "c"))]
    sampler = Sampler(Noted(), CHAT, 0, Recorded(events))  # type: ignore[arg-type]
    groups = sampler.groups(prompts, 6, Sampling(0.3, 1.0, 30), 1, "test")
    answers = [r for group in groups for r in group.rollouts]
    assert len(answers) == 18
    whole = {(r.problem.id, tuple(r.token_ids)) for r in answers if not r.truncated}
    assert len(events) == 1 + len(whole) < 19
    assert events.index("generated") > 0
    assert events[-1] == "generated"  # the last one was told of before generate returned
    assert {r.why for r in answers if not r.truncated} == {"seen"}


def test_marking_leaves_out_what_fails_and_never_judges_what_is_cut(mesh: object) -> None:
    events: list[str] = []
    marking = Marking(Recorded(events), CHAT, [problem("ab")])  # type: ignore[arg-type]
    end = TOKENIZER.eos_token_id

    def completion(text: str, truncated: bool = False) -> Completion:
        ids = TOKENIZER(text, add_special_tokens=False)["input_ids"] + ([] if truncated else [end])
        return Completion(ids, [-1.0] * len(ids), truncated, 3)

    sampled = [completion("ab"), completion("fail"), completion("ab", True), completion("ab"), completion("x")]
    threads = [threading.Thread(target=marking.finished, args=(0, c.token_ids)) for c in (sampled[0], sampled[3])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    marking.submit([sampled])
    judged, failures = marking.rollouts(0, [1], sampled)
    assert [(r.text, r.verdict, r.reward) for r in judged] == [
        ("ab", "right", 1.0), ("ab", "unparsable", 0.0), ("ab", "right", 1.0), ("x", "wrong", 0.0)
    ]  # fmt: skip
    assert (judged[1].why, judged[1].policy_version) == ("cut off at 2 tokens", 3)
    assert failures == ["ab: a worker was lost"]
    assert events == ["judge ab: ab", "judge ab: fail", "judge ab: x"]


def test_a_paid_exploit_ends_the_run_before_it_begins(mesh: object) -> None:
    class Gullible:
        def submit(self, row: dict[str, Any], response: str) -> Future[Judgement]:
            found: Future[Judgement] = Future()
            found.set_result(Judgement("right"))
            return found

    said: list[str] = []
    with pytest.raises(TrainingStopped, match=r"canaries failed \(.*: what the verifiers pay for would be learned"):
        refuse_exploits(Gullible(), [replace(problem("a"), verifier="code")], said.append)  # type: ignore[arg-type]
    assert any("earned a reward" in line for line in said)


def test_exact_answers_need_no_process() -> None:
    before = descendants(os.getpid())
    with Judges(VerifyConfig(), SandboxConfig()) as judges:
        assert judges.submit({"verifier": "exact", "answer": "1"}, " 1\n").result().verdict == "right"
        assert descendants(os.getpid()) == before
