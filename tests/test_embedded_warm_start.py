"""The supervised first steps: which examples they are made of, and the folder that comes of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cipo_fast.chat import Chat
from cipo_fast.cipo.prompts import CorrectionPrompts
from cipo_fast.config import load_config
from cipo_fast.distributed import process_group
from cipo_fast.embedded.model import embedded_tokenizer
from cipo_fast.embedded.prepare import HELD_OUT, TRAIN, digest, prepare, start_of
from cipo_fast.embedded.problems import embedded_problems
from cipo_fast.embedded.tasks import task_named
from cipo_fast.embedded.tasks.task import Start
from cipo_fast.embedded.warm_start import Examples
from cipo_fast.records import Rollout
from cipo_fast.sampling import encode_prompts
from cipo_fast.tasks.problems import read_problems
from cipo_fast.verify.judging import judge

N = 400


def examples(*settings: str) -> Examples:
    config = load_config([], ["data.task=subset", *settings])
    chat = Chat(embedded_tokenizer(), config.data)
    prompts = encode_prompts(embedded_problems("subset", 0, 200)[1], chat)
    return Examples(
        prompts, CorrectionPrompts(chat, config.correction), start_of(config), task_named("subset").near_miss, 0
    )


def shown(of: Examples) -> list[tuple[str, str | None, str]]:
    """(question, attempt, target) of each example of a batch; without an attempt the prompt is bare."""
    text = of.correct.chat.text
    prompts = {tuple(p.token_ids): p.problem.messages[-1]["content"] for p in of.prompts}
    found = []
    for conversation in of.batch(N, 0):
        context, target = conversation.segments[:-1], text(conversation.segments[-1].token_ids)
        attempt = text(context[1].token_ids) if len(context) == 3 else None
        found.append((prompts[tuple(context[0].token_ids)], attempt, target))
    return found


def test_shares_of_plain_right_and_wrong_examples() -> None:
    of = examples("model.embedded.warm_plain=0.2", "model.embedded.warm_right=0.6")
    answers = {p.problem.messages[-1]["content"]: p.problem.answer for p in of.prompts}
    found = shown(of)
    assert all(target == answers[question] for question, _, target in found)
    assert [attempt is None for _, attempt, _ in found] == [True] * 80 + [False] * 320
    kept = np.mean([attempt == target for _, attempt, target in found[80:]])
    assert abs(kept - 0.6) < 4 * np.sqrt(0.6 * 0.4 / 320)


def test_weights_of_a_batch_add_up_to_one() -> None:
    batch = examples().batch(64, 1)
    assert sum(c.ce_weight * len(c.segments[-1].token_ids) for c in batch) == pytest.approx(1)


def test_own_failures_are_shown_as_they_were_sampled() -> None:
    of = examples("model.embedded.warm_plain=0", "model.embedded.warm_right=0", "model.embedded.warm_own=0.5")
    own = of.prompts[7]
    ids = [*of.correct.chat.answer("99")[:2], of.correct.chat.end_of_turn]
    of.own = [Rollout(own.problem, own.token_ids, ids, [], "99", 0.0, False, 0)]
    attempts = [(question, attempt, target) for question, attempt, target in shown(of) if attempt == "99"]
    assert set(attempts) == {(own.problem.messages[-1]["content"], "99", own.problem.answer)}
    assert abs(len(attempts) / N - 0.5) < 4 * np.sqrt(0.25 / N)


def test_an_attempt_too_long_to_be_shown_is_a_plain_problem() -> None:
    found = shown(examples("model.embedded.warm_plain=0", "correction.max_prompt_tokens=10"))
    assert {attempt for _, attempt, _ in found} == {None}


def test_the_folder_names_the_verifier_of_its_rows(tmp_path: Path) -> None:
    """Its warm start samples and judges attempts of its own, and goes on while too few of the right ones are kept."""
    small = ["model.embedded.hidden=32", "model.embedded.mlp=48", "model.embedded.layers=1", "data.task=subset",
             "model.embedded.warm_steps=12", "model.embedded.warm_own=1",
             "model.embedded.warm_accuracy=0", "model.embedded.warm_kept=1", "eval.problems=8"]  # fmt: skip
    config = load_config([], [*small, f"run.dir={tmp_path}"])
    lines: list[str] = []
    with process_group() as mesh:
        folder = Path(prepare(config, mesh, lines.append).model.path)
    assert lines[-1].startswith("warm start: 15 supervised steps, greedy accuracy 0.000, right attempts kept 0.000")
    problems = read_problems(folder / HELD_OUT)
    rows = [json.loads(line) for line in (folder / HELD_OUT).read_text(encoding="utf-8").splitlines()]
    assert len(problems) == len(rows) == 8
    assert len(read_problems(folder / TRAIN)) == 8000
    for problem, row in zip(problems, rows, strict=True):
        assert judge(problem.row, row["answer"]).verdict == judge(problem.row, row["answer"][::-1]).verdict == "right"
        assert judge(problem.row, "000").verdict == "wrong"


def test_a_start_is_the_task_s_own_but_for_what_is_set(tmp_path: Path) -> None:
    assert start_of(load_config([], ["data.task=trace"])) == task_named("trace").start
    assert start_of(load_config([], ["data.task=sort"])) == Start()
    asked = load_config([], ["data.task=trace", "model.embedded.warm_mended=0", "model.embedded.warm_steps=0"])
    assert start_of(asked) == replace(task_named("trace").start, mended=0.0, steps=0)
    (tmp_path / "mine.jsonl").write_text('{"prompt": "1", "answer": "2"}\n')
    assert start_of(load_config([], [f"data.train={tmp_path}/mine.jsonl"])) == Start()


def test_of_two_runs_that_make_the_same_start_at_once_the_first_one_counts(tmp_path: Path) -> None:
    small = ["model.embedded.hidden=32", "model.embedded.mlp=48", "data.task=add", "model.embedded.warm_steps=5"]
    config = load_config([], [*small, "eval.problems=8", f"run.dir={tmp_path}"])
    folder = tmp_path / "warm_start" / digest(config)

    def finish_first(_: str) -> None:  # the other run, while this one still computes
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "theirs").touch()

    with process_group() as mesh:
        assert prepare(config, mesh, finish_first).model.path == str(folder)
    assert [path.name for path in (tmp_path / "warm_start").rglob("*")] == [folder.name, "theirs"]
