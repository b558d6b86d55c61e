"""Word problems: true, different, by seed, and rows that a run takes."""

import re
from collections import Counter
from pathlib import Path

import pytest

from cipo_fast.config import load_config
from cipo_fast.tasks import load_dataset
from cipo_fast.verify.judging import at_once, gold_response
from cipo_fast.word_problems import main, word_problems


def test_answers_are_true_by_another_reading() -> None:
    for row in word_problems(500, 1):
        asked = row["messages"][-1]["content"]
        a, b = map(int, re.findall(r"\d+", asked))
        assert int(row["answer"]) == (a + b if "buys" in asked else a - b)
        assert int(row["answer"]) > 0


def test_questions_differ_and_follow_from_the_seed() -> None:
    few, many, other = word_problems(100, 0), word_problems(3000, 0), word_problems(100, 1)
    assert few == many[:100]
    assert few != other
    asked = Counter(row["messages"][-1]["content"] for row in many)
    assert len(asked) == 3000
    shown = {m["content"] for m in many[0]["messages"][:-1]}
    assert not shown & set(asked)


def test_a_run_takes_them_and_their_golds_verify(tmp_path: Path) -> None:
    path = tmp_path / "new" / "words.jsonl"
    assert main(["--out", str(path), "--n", "200"]) == 0
    config = load_config(["smollm2_math.yaml"], [f"data.train={path}"])
    dataset = load_dataset(config)
    assert len(dataset.train) + len(dataset.held_out) == 200
    for problem in dataset.train[:50]:
        assert problem.messages[-1]["content"].endswith("?")  # nothing is added: the turns before it show how
        gold = gold_response(problem.row)
        assert gold is not None
        verdict = at_once(problem.row, gold)
        assert verdict is not None
        assert verdict.verdict == "right"
        wrong = at_once(problem.row, f"so \\boxed{{{int(problem.answer) + 1}}}")
        assert wrong is not None
        assert wrong.verdict == "wrong"
    assert {p.source for p in dataset.train} == {"buy", "give"}


@pytest.mark.parametrize("args", [["--n", "0"], ["--n", "20000"], ["--seed", "-1"], ["--out", "/proc/no/x.jsonl"]])
def test_what_cannot_be_written_is_one_line(
    args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "x.jsonl"), *args]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
