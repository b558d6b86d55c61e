"""Embedded problems, JSONL files, the verifier."""

import json
from pathlib import Path

import pytest

from cipo_fast.config import load_config
from cipo_fast.embedded.problems import embedded_problems
from cipo_fast.errors import UserError
from cipo_fast.tasks import load_dataset, verify
from cipo_fast.tasks.jsonl import read_problems


@pytest.mark.parametrize("task", ["sort", "add"])
def test_train_and_held_out_are_disjoint_by_content(task: str) -> None:
    for seed in range(3):
        problems = embedded_problems(task, seed, 400)
        train, held_out = ({p.content for p in part} for part in problems)
        assert len(problems[1]) == len(held_out) == 400
        assert len(train) == len(problems[0]) > 7000
        assert not train & held_out


def test_embedded_answers_are_right_and_seeded() -> None:
    train, _ = embedded_problems("sort", 0, 10)
    for p in train[:50]:
        word = p.messages[0]["content"].removeprefix("sort ")
        assert len(word) == 8
        assert p.answer == "".join(sorted(word))
    train, _ = embedded_problems("add", 0, 10)
    for p in train[:50]:
        a, b = p.messages[0]["content"].removeprefix("add ").split("+")
        assert len(a) == len(b) == 2
        assert int(p.answer) == int(a) + int(b)
    assert embedded_problems("sort", 3, 10) == embedded_problems("sort", 3, 10) != embedded_problems("sort", 4, 10)


def test_verify_is_exact_once_stripped() -> None:
    p = embedded_problems("add", 0, 10)[0][0]
    assert verify(p, f" {p.answer}\n") == 1.0
    assert verify(p, p.answer + "0") == verify(p, "") == 0.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "bad.jsonl:2: not JSON"),
        ("[1]", "bad.jsonl:2: expected an object, got list"),
        ('{"answer": "x"}', "bad.jsonl:2: field 'prompt' is missing"),
        ('{"prompt": 3, "answer": "x"}', "bad.jsonl:2: field 'prompt'"),
        ('{"prompt": "q"}', "bad.jsonl:2: field 'answer' is missing"),
        ('{"prompt": "q", "answer": null}', "bad.jsonl:2: field 'answer'"),
        ('{"messages": [], "answer": "x"}', "bad.jsonl:2: field 'messages'"),
        ('{"messages": [{"role": "assistant", "content": "q"}], "answer": "x"}', "the last from the user"),
        ('{"messages": ["q"], "answer": "x"}', "bad.jsonl:2: field 'messages'"),
    ],
)
def test_a_bad_line_names_file_line_and_field(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "q", "answer": 4}\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        read_problems(path)
    assert message in str(caught.value)


def test_empty_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no problems"):
        read_problems(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="not UTF-8"):
        read_problems(tmp_path / "binary.jsonl")


def test_jsonl_both_forms_and_the_split(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    rows = [{"prompt": f"q{i}", "answer": i} for i in range(30)] + [{"prompt": "q0", "answer": 0}]
    rows.append({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": " a "})
    path.write_text("\n".join(json.dumps(r) for r in rows))
    assert read_problems(path)[-1].content == (("system", "s"), ("user", "u"))
    data = load_dataset(load_config([], [f"data.train={path}"]))
    assert len(data.held_out) == 3
    asked = {p.content for p in data.held_out}
    assert all(p.content not in asked for p in data.train)


def test_an_eval_file_never_overlaps_training(tmp_path: Path) -> None:
    train, held_out = tmp_path / "t.jsonl", tmp_path / "e.jsonl"
    train.write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "b", "answer": "2"}\n')
    held_out.write_text('{"prompt": "a", "answer": "1"}\n')
    data = load_dataset(load_config([], [f"data.train={train}", f"data.eval={held_out}"]))
    assert [p.messages[0]["content"] for p in data.train] == ["b"]
    held_out.write_text(train.read_text())
    with pytest.raises(UserError, match="nothing is left to train on"):
        load_dataset(load_config([], [f"data.train={train}", f"data.eval={held_out}"]))
    with pytest.raises(UserError, match=r"without data\.train"):
        load_config([], [f"data.eval={held_out}"])
