"""Embedded problems, JSONL files, the verifier."""

import json
from pathlib import Path

import pytest

from cipo_fast.config import load_config
from cipo_fast.embedded.problems import embedded_problems
from cipo_fast.errors import UserError
from cipo_fast.records import Problem
from cipo_fast.tasks import check_data, load_dataset, load_held_out
from cipo_fast.tasks.problems import read_problems
from cipo_fast.verify import exact


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


def verdict(problem: Problem, text: str) -> str:
    return exact.judge(problem.row, text).verdict


def test_verify_is_exact_once_stripped() -> None:
    p = embedded_problems("add", 0, 10)[0][0]
    assert verdict(p, f" {p.answer}\n") == "right"
    assert verdict(p, p.answer + "0") == verdict(p, "") == "wrong"


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


ROW = '{"prompt": "q", "answer": %s}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (ROW % "NaN", "field 'answer' is NaN"),
        (ROW % "-Infinity", "field 'answer' is -Infinity"),
        (ROW % "1e999", "field 'answer' is 1e999, beyond any float"),
        (ROW % ("7" * 5000), "field 'answer' is a number of 5000 digits"),
        (ROW % "true", "field 'answer' is neither text nor a number"),
        (ROW % '["4"]', "field 'answer' is neither text nor a number"),
        (ROW % '""', "field 'answer' is blank"),
        (ROW % r'" \n\u200b\u2028\u0000"', "field 'answer' is blank"),
        (ROW % r'"\ud83d"', r"field 'answer' holds a lone surrogate (\ud83d)"),
        (r'{"prompt": "a\udc00b", "answer": 1}', r"field 'prompt' holds a lone surrogate (\udc00)"),
        (r'{"id": "\ud800", "prompt": "a", "answer": 1}', "field 'id' holds a lone surrogate"),
        ('{"id": [1], "prompt": "a", "answer": 1}', "field 'id' is neither text nor a number"),
        ('{"prompt": "  ", "answer": 1}', "field 'prompt' is blank"),
        ('{"messages": [{"role": "user", "content": ""}], "answer": 1}', "field 'messages[0].content' is blank"),
        ('{"messages": [{"role": "user", "content": null}], "answer": 1}', "field 'messages[0].content' is not text"),
        ('{"prompt": [{"role": "tool", "content": "x"}, {"role": "user", "content": "x"}], "answer": 1}',
         "field 'prompt[0].role' is 'tool': expected one of system, user, assistant"),
        ('{"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}], "answer": 1}', "is not text"),
        ('{"prompt": [{"role": "user", "content": "q", "tool_calls": [1]}], "answer": 1}', "prompt[0].tool_calls"),
        ('{"prompt": "q", "messages": [{"role": "user", "content": "q"}], "answer": 1}', "both 'prompt' and"),
        ('{"prompt": "q", "answer": 1, "answer": 2}', "field 'answer' stands there twice"),
        ('{"prompt": "q", "answer": "1", "solution": "2"}', "fields 'answer' and 'solution' differ"),
        ('{"prompt": "q", "reward_model": {"style": "model", "ground_truth": "2"}}', "field 'reward_model.style'"),
        ('{"prompt": "q", "reward_model": {"style": "rule", "ground_truth": {"a": 1}}}', "'reward_model.ground_truth'"),
        ('{"prompt": "q", "answer": 1, "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"messages": [{"role": "system", "content": " "}, {"role": "user", "content": "q"}], "answer": 1}',
         "field 'messages[0].content' is blank"),
        ('{"prompt": "q", "system": "be brief", "answer": 1}', "field 'system' is beside 'prompt': it would not be"),
        ('{"messages": [{"role": "user", "content": "q"}], "tools": [{"name": "f"}], "answer": 1}', "field 'tools' is"),
        ('{"prompt": "q", "images": ["a.png"], "answer": 1}', "field 'images' is beside 'prompt'"),
        ('{"prompt": "q", "videos": ["a.mp4"], "answer": 1}', "field 'videos' is beside 'prompt'"),
        ('{"prompt": "q", "chat_template_kwargs": {"x": 1}, "answer": 1}', "field 'chat_template_kwargs' is beside"),
        ("prompt,answer", "not JSON"),
        ('{"prompt": "q", "answer": 1} {"prompt": "q", "answer": 1}', "not JSON: Extra data at column 30"),
        ("3", "expected an object, got number"),
    ],
)  # fmt: skip
def test_what_a_row_cannot_mean_is_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "q", "answer": 4}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_problems(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_newlines_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    separators = "\u2028\u2029\x85"
    rows = [{"prompt": f"a{separators}b", "answer": "x"}, {"prompt": "c\x0b\x0c\x1e\x00", "answer": f"y{separators}z"}]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines) + b"\n \n\xef\xbb\xbf" + lines[0] + b"\n{")
    with pytest.raises(UserError, match=r"a\.jsonl:6: not JSON"):
        read_problems(path)
    path.write_bytes(path.read_bytes()[:-1])
    problems = read_problems(path)
    assert [p.messages[0]["content"] for p in problems] == [rows[0]["prompt"], rows[1]["prompt"], rows[0]["prompt"]]
    assert problems[1].answer == rows[1]["answer"]
    assert [p.where for p in problems] == [f"{path}:{n}" for n in (1, 3, 5)]


def test_invalid_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "q", "answer": 4}\n{"prompt": "caf\xe9", "answer": 4}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: not UTF-8 text at byte 16"):
        read_problems(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "q"}'.encode("utf-16"), "UTF-16"),
        ('{"prompt": "q"}'.encode("utf-16-le"), "UTF-16"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"PAR1\x15", "Parquet"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b'[\n {"prompt": "q"}\n]', ":1: not JSON"),
    ],
)
def test_another_kind_of_file_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_problems(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_problems(tmp_path)


def test_answers_are_as_typed_and_what_may_be_meant_otherwise_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    answers = ["4", "-0", "42.0", "1e3", r'"a\r\nb"', "12345678901234567890123"]
    path.write_text("\n".join(ROW % answer for answer in answers))
    said: list[str] = []
    problems = read_problems(path, said.append)
    assert [p.answer for p in problems] == ["4", "-0", "42.0", "1e3", "a\r\nb", "12345678901234567890123"]
    assert verdict(problems[2], " 42.0\n") == "right" != verdict(problems[2], "42")
    assert verdict(problems[4], "a\nb\r\n") == verdict(problems[4], "a\r\nb") == "right"
    assert len(said) == 2
    assert f"{path}: in 2 of 6 rows the answer is a number with a fraction or an exponent" in said[0]
    assert f"(first: {path}:3: 42.0)" in said[0]
    assert f"{path}: in 1 of 6 rows the answer has CRLF" in said[1]


def test_ids_are_unique(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(f'{{{i}"prompt": "q", "answer": 1}}\n' for i in ("", '"id": null,', '"id": 7,', '"id": "7",'))
    )
    said: list[str] = []
    assert [p.id for p in read_problems(path, said.append)] == ["a-1", "a-2", "7", "7@4"]
    assert "in 1 of 4 rows an earlier row has the same id" in said[0]


USER = '[{"role": "user", "content": "q"}]'


@pytest.mark.parametrize(
    "line",
    [
        f'{{"prompt": {USER}, "answer": "4"}}',
        f'{{"prompt": {USER}, "solution": "4"}}',
        f'{{"prompt": {USER}, "ground_truth": 4, "answer": "4", "solution": null}}',
        f'{{"data_source": "own", "prompt": {USER}, "ability": "math", "extra_info": {{"index": 0, "score": NaN}}, '
        '"reward_model": {"style": "rule", "ground_truth": "4"}}',
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}], "name": null}], "answer": "4"}',
    ],
)
def test_rows_of_trl_and_verl(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    source = "own" if "data_source" in line else "a.jsonl"
    assert read_problems(path) == [Problem("a-1", ({"role": "user", "content": "q"},), "4", source)]


def test_an_eval_file_is_used_whole_and_what_is_cut_is_said(tmp_path: Path) -> None:
    train, held_out = tmp_path / "t.jsonl", tmp_path / "e.jsonl"
    train.write_text("".join(f'{{"prompt": "{i}", "answer": 1}}\n' for i in range(50)))
    held_out.write_text("".join(f'{{"prompt": "{i}", "answer": 1}}\n' for i in range(40, 540)))
    files = [f"data.train={train}", f"data.eval={held_out}"]
    said: list[str] = []
    data = load_dataset(load_config([], files), said.append)
    assert (len(data.train), len(data.held_out)) == (40, 500)
    assert said == ["data.train: 10 of 50 problems dropped, they are held out too"]
    said.clear()
    data = load_dataset(load_config([], [*files, "eval.problems=3"]), said.append)
    assert len(data.held_out) == 3
    assert said[0] == "data.eval: the first 3 of 500 problems are used (eval.problems)"
    said.clear()
    load_dataset(load_config([], [files[0], "eval.problems=9"]), said.append)
    assert said == ["data.train: 5 problems held out, a tenth of them; eval.problems=9 asks for more"]


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
    rows[0] |= {"images": [], "system": "", "tools": None, "chat_template_kwargs": {}}
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
        check_data(load_config([], [f"data.eval={held_out}"]))
    with pytest.raises(UserError, match=r"data\.train is not given: name a JSON Lines file to train model\.path=m on"):
        check_data(load_config([], ["model.path=m"]))
    with pytest.raises(UserError, match=r"nudge\.hints=2 needs data\.train"):
        check_data(load_config([], ["nudge.hints=2"]))
    assert len(load_held_out(load_config([], [f"data.eval={held_out}"]))) == 2  # to evaluate, enough
    with pytest.raises(UserError, match=r"data\.eval is not given"):
        load_held_out(load_config([], ["model.path=m"]))
