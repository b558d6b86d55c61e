"""Where rows come from: files, Parquet, the hub's cache; several of them with weights; what is refused."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cipo_fast.config import DataConfig, load_config, read_config
from cipo_fast.errors import UserError
from cipo_fast.run_dir import inputs_of
from cipo_fast.tasks import epoch_rows, load_dataset, rows_of_eval
from cipo_fast.tasks.formats import INSTRUCTION
from cipo_fast.tasks.problems import quiet, read_problems


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(n: int, name: str = "q") -> list[dict[str, Any]]:
    return [{"prompt": f"{name}{i}", "answer": i} for i in range(n)]


# ---------------------------------------------------------------------------------------------------------- settings


def test_one_file_or_a_list_on_a_command_line_and_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, *questions(20, name))
    assert load_config([], ["data.train=a.jsonl"]).data.sources("train") == [tmp_path / "a.jsonl"]
    both = load_config([], ["data.train=[a.jsonl, b.jsonl]", "data.weights=[2, 0.5]"])
    assert both.data.sources("train") == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert both.data.weights == [2.0, 0.5]
    (tmp_path / "c.yaml").write_text("data:\n  train:\n  - a.jsonl\n  - hub:own/set:main:train\n  eval: b.jsonl\n")
    config = load_config(["c.yaml"], [])
    assert config.data.sources("train") == [tmp_path / "a.jsonl", "hub:own/set:main:train"]
    assert config.data.sources("eval") == [tmp_path / "b.jsonl"]
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert read_config(tmp_path / "again.yaml") == config
    assert load_config([], ["data.train=hub:own/set"]).data.train == "hub:own/set"
    assert load_config([], []).data.sources("train") == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.train=none.jsonl", "data.train: no file"),
        ("data.train=[a.jsonl, none.jsonl]", "data.train: no file"),
        ("data.train=hub:gsm8k", "expected hub:OWNER/NAME"),
        ("data.train=hub:a/b:c:d:e", "expected hub:OWNER/NAME"),
        ("data.train=[]", "data.train"),
        ("data.weights=[1, 2]", "data.weights has 2 weights for 1 of data.train"),
        ("data.weights=[0]", "data.weights"),
        ("data.verifier=maths", "expected exact, math, code or path/to/file.py:function"),
        ("data.verifier=own.py:judge", "no file"),
        ("data.format=gsm", "data.format"),
    ],
)
def test_settings_that_cannot_be_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", *questions(3))
    with pytest.raises(UserError, match=message.replace(".", r"\.").replace("/", "/")):
        load_config([], ["data.train=a.jsonl", setting])


def test_a_functions_file_is_absolute_and_part_of_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", *questions(3))
    (tmp_path / "own.py").write_text("def judge(response, row):\n    return True\n")
    config = load_config([], ["data.train=a.jsonl", "data.verifier=own.py:judge"])
    assert config.data.verifier == f"{tmp_path}/own.py:judge"
    before = inputs_of(config, 1)
    (tmp_path / "own.py").write_text("def judge(response, row):\n    return False\n")
    after = inputs_of(config, 1)
    assert {key for key in before if before[key] != after[key]} == {"data.verifier content"}


# --------------------------------------------------------------------------------------------------------- verifiers


def test_who_says_which_verifier(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "answer": 4},
        {"prompt": "b", "answer": "4.0", "verifier": "math", "policy": {"percent": "either"}},
        {"prompt": "c", "tests": [{"args": [1], "expected": 1}], "solution": "def f(x): return x"},
        {"prompt": "d", "reward_model": {"style": "rule", "ground_truth": "4"}, "data_source": "openai/gsm8k"},
        {"prompt": "e", "answer": 4.0, "verifier": "math"},
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    problems = read_problems(path)
    assert [p.verifier for p in problems] == ["exact", "math", "code", "math", "math"]
    assert [p.answer for p in problems] == ["4", "4.0", "", "4", "4"]
    assert problems[1].fields == {"policy": {"percent": "either"}}
    assert problems[2].row["tests"] == [{"args": [1], "expected": 1}]
    settings = DataConfig(math={"percent": "value", "units": "ignore"})
    assert read_problems(path, quiet, settings)[1].fields["policy"] == {"percent": "either", "units": "ignore"}
    with pytest.raises(UserError, match=r"a\.jsonl:3: field 'answer' is missing"):
        read_problems(path, quiet, DataConfig(verifier="math"))
    with pytest.raises(UserError, match=r"a\.jsonl:1: field 'tests' is missing"):
        read_problems(path, quiet, DataConfig(verifier="code"))
    with pytest.raises(UserError, match=r"a\.jsonl:1: field 'verifier' is 'maths'"):
        read_problems(write(tmp_path / "a.jsonl", {"prompt": "a", "answer": 1, "verifier": "maths"}))


def test_a_users_function_gets_the_row_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def judge(response, row):\n    return True\n")
    row = {"prompt": "a", "words": 3, "share": 0.5, "nested": {"n": [1, 2.5, None, True]}, "answer": 4}
    path = write(tmp_path / "a.jsonl", {**row, "verifier": "own.py:judge"})
    (problem,) = read_problems(path)  # the file beside the row's own
    assert problem.verifier == f"{tmp_path}/own.py:judge"
    assert {**problem.row, "verifier": None} == {**row, "verifier": None}
    gsm8k = write(tmp_path / "g.jsonl", {"question": "a", "answer": "b\n#### 4"})
    (problem,) = read_problems(gsm8k, quiet, DataConfig(verifier=f"{tmp_path}/own.py:judge"))
    assert problem.row["answer"] == "b\n#### 4"
    assert problem.messages[0]["content"] == "a"
    with pytest.raises(UserError, match=r"verifier none\.py:judge: no file"):
        read_problems(write(tmp_path / "b.jsonl", {"prompt": "a", "verifier": "none.py:judge"}))


def test_what_a_run_writes_of_its_problems_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def judge(response, row):\n    return True\n")
    stub = "def f(x):\n    ...\n"
    rows = [
        {"prompt": stub, "entry_point": "f", "test": "def check(candidate): assert candidate(1)", "verifier": "code"},
        {"prompt": "Write f.", "entry_point": "f", "test": "assert f(1)", "verifier": "code"},
        {"prompt": "a", "answer": 4, "words": 3, "verifier": "own.py:judge"},
        {"question": "b", "answer": "#### 4"},
        {"prompt": "c", "answers": ["1", "2"], "verifier": "math"},
        {"prompt": "d", "tests": [{"args": [1], "kwargs": None, "expected": None, "stdin": None}]},
    ]
    problems = read_problems(write(tmp_path / "a.jsonl", *rows))
    assert problems[0].row["prompt"] == stub
    assert "prompt" not in problems[1].row
    assert problems[4].answer == "1, 2"
    assert problems[5].row["tests"] == [{"args": [1], "expected": None}]
    again = read_problems(
        write(tmp_path / "b.jsonl", *({**p.row, "id": p.id, "messages": p.messages} for p in problems))
    )
    assert [p.content for p in again] == [p.content for p in problems]
    assert [p.verifier for p in again] == [p.verifier for p in problems]
    for one, other in zip(again, problems, strict=True):
        assert {**one.row, **other.row} == one.row
    with pytest.raises(UserError, match="field 'policy' is not an object"):
        read_problems(write(tmp_path / "c.jsonl", {"prompt": "a", "answer": 4, "verifier": "math", "policy": "x"}))


def test_prompts_ask_for_what_their_verifier_reads(tmp_path: Path) -> None:
    box = "Put it in \\boxed{}."
    rows = [
        {"prompt": "a", "answer": 4, "verifier": "math"},
        {"prompt": f"b {box}", "answer": 4, "verifier": "math"},
        {"messages": [{"role": "system", "content": box}, {"role": "user", "content": "c"}], "answer": 4},
        {"prompt": "d", "answer": 4},
    ]
    rows[2]["verifier"] = "math"
    path = write(tmp_path / "a.jsonl", *rows)

    def ends(**data: Any) -> list[str]:
        return [p.messages[-1]["content"] for p in read_problems(path, quiet, DataConfig(**data))]

    assert ends() == [f"a\n\n{INSTRUCTION['math']}", f"b {box}", "c", "d"]
    assert ends(instruction="none") == ["a", f"b {box}", "c", "d"]
    assert ends(system_prompt=box)[0] == "a"
    assert ends(instruction="Be brief.")[3] == "d\n\nBe brief."
    rows = [{"messages": p.messages, "answer": "4", "verifier": p.verifier} for p in read_problems(path)]
    again = write(tmp_path / "again.jsonl", *rows)  # a run's held_out.jsonl
    assert [p.content for p in read_problems(again)] == [p.content for p in read_problems(path)]


# ------------------------------------------------------------------------------------------------ Parquet and the hub


def test_parquet_is_read_as_json_lines_are(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [
        {"question": "q1", "answer": 27.0, "id": 1, "extra": {"a": [1, None]}},
        {"question": "q2\u2028\n", "answer": 0.5, "id": 2, "extra": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read_problems(tmp_path / "a.parquet")
    assert [(p.id, p.answer) for p in found] == [("1", "27"), ("2", "0.5")]
    assert [p.messages for p in found] == [p.messages for p in read_problems(write(tmp_path / "a.jsonl", *rows))]
    assert found[1].where == f"{tmp_path}/a.parquet: row 2"
    config = load_config([], [f"data.eval={tmp_path}/a.parquet"])
    assert rows_of_eval(config) == 2
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"b\.parquet: no readable Parquet"):
        read_problems(tmp_path / "b.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": b"\xff", "answer": 1}]), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet: row 1: field 'prompt' must be text"):
        read_problems(tmp_path / "c.parquet")


NO_PACKAGE = """
import sys
sys.modules["pyarrow"] = sys.modules["datasets"] = None
from pathlib import Path
from cipo_fast.errors import UserError
from cipo_fast.tasks.problems import read_problems
for source in (Path("a.parquet"), "hub:own/set"):
    try:
        read_problems(source)
    except UserError as error:
        print(error)
"""


def test_a_missing_package_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", NO_PACKAGE], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count("pip install cipo-fast[hub]") == 2


def cached(folder: Path, repository: str, config: str, **splits: list[dict[str, Any]]) -> None:
    """What `datasets` leaves in its cache of a hub data set."""
    datasets_json = pytest.importorskip("datasets.packaged_modules.json.json")
    files = {name: [str(write(folder / f"{config}-{name}.jsonl", *rows))] for name, rows in splits.items()}
    name = repository.split("/")[-1]
    builder = datasets_json.Json(
        cache_dir=str(folder / "other"), dataset_name=name, config_name=config, data_files=files, hash="0123"
    )
    target = folder / "cache" / repository.replace("/", "___") / config / "0.0.0" / "0123"
    builder.download_and_prepare(output_dir=str(target))


FROM_CACHE = """
import sys, time
started = time.monotonic()
from cipo_fast.errors import UserError
from cipo_fast.tasks.problems import quiet, read_problems
from cipo_fast.tasks.hub import fingerprint
for name, role in [line.split() for line in sys.argv[1:]]:
    try:
        found = read_problems(name, quiet, None, role)
        print(len(found), found[0].answer, found[0].id, found[0].source, len(fingerprint(name, role)))
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize("offline", [True, False])
def test_the_hub_from_its_cache(tmp_path: Path, offline: bool) -> None:
    rows = [{"question": f"q{i}", "answer": f"x\n#### {i},000"} for i in range(1, 4)]
    cached(tmp_path, "own/gsm8k", "main", train=rows, test=rows[:1])
    cached(tmp_path, "own/gsm8k", "socratic", train=rows[:2])
    cached(tmp_path, "own/two", "first", train=rows)
    cached(tmp_path, "own/two", "second", train=rows)
    env = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    env |= {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    asked = [
        "hub:own/gsm8k train",
        "hub:own/gsm8k eval",
        "hub:own/gsm8k:socratic train",
        "hub:own/gsm8k:main:train eval",
        "hub:own/gsm8k:main:none train",
        "hub:own/two train",
        "hub:own/none train",
    ]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", FROM_CACHE, *asked], capture_output=True, text=True, timeout=120, env=env, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[:4] == [
        "3 1000 gsm8k-1 own/gsm8k 16",
        "1 1000 gsm8k-1 own/gsm8k 16",
        "2 1000 gsm8k-1 own/gsm8k:socratic 16",
        "3 1000 gsm8k-1 own/gsm8k:main:train 16",
    ]
    assert lines[4] == "hub:own/gsm8k:main:none: no split 'none'; it has train, test: hub:own/gsm8k:CONFIG:SPLIT"
    assert lines[5].startswith("hub:own/two: name a config, hub:own/two:CONFIG; it has ")
    assert lines[6].startswith(f"hub:own/none: not in the cache ({tmp_path}/cache), and ")
    assert ("HF_HUB_OFFLINE is set" in lines[6]) == offline
    assert time.monotonic() - started < 60


# ----------------------------------------------------------------------------------------------- several, and weights


def test_several_files_keep_their_names_and_unique_ids(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", *({**row, "id": i} for i, row in enumerate(questions(20, "a"))))
    b = write(tmp_path / "b.jsonl", *({**row, "id": i} for i, row in enumerate(questions(20, "b"))))
    data = load_dataset(load_config([], [f"data.train=[{a}, {b}]", "data.weights=[1, 0.5]"]))
    problems = data.train + data.held_out
    assert len({p.id for p in problems}) == 40
    assert Counter((p.source, p.weight) for p in problems) == {("a.jsonl", 1.0): 20, ("b.jsonl", 0.5): 20}
    config = load_config([], [f"data.train=[{a}, {b}]"])
    before = inputs_of(config, 1)
    write(b, *questions(20, "c"))
    assert inputs_of(config, 1) != before


def test_weights_say_how_often_an_epoch_has_a_row() -> None:
    weights = [1.0] * 10 + [2.0] * 5 + [0.5] * 8 + [1.25] * 4
    epochs = [epoch_rows(weights, 7, e) for e in range(6)]
    assert {len(rows) for rows in epochs} == {10 + 10 + 4 + 5}
    for first, second in zip(epochs[::2], epochs[1::2], strict=True):
        counts = Counter([*first.tolist(), *second.tolist()])
        assert [counts[i] for i in range(15)] == [2] * 10 + [4] * 5
        assert [counts[i] for i in range(15, 23)] == [1] * 8  # a half, then the other half
    assert [Counter(epochs[0].tolist())[i] for i in range(10, 15)] == [2] * 5
    assert sorted(Counter(np.concatenate(epochs[:4]).tolist())[i] for i in range(23, 27)) == [5] * 4
    assert len({tuple(rows.tolist()) for rows in epochs}) > 2
    again = epoch_rows(weights, 7, 3)
    assert again.tolist() == epochs[3].tolist() != epoch_rows(weights, 8, 3).tolist()
    assert epoch_rows([1.0] * 9, 3, 5).tolist() == list(range(9))
    assert len(epoch_rows([0.001] * 3, 0, 0)) == 1


# ---------------------------------------------------------------------------------------------------------- bad input


def test_a_long_line_is_read_and_noise_is_one_line(tmp_path: Path) -> None:
    long = write(tmp_path / "long.jsonl", {"prompt": "x" * 10_000_000, "answer": 1})
    assert len(read_problems(long)[0].messages[0]["content"]) == 10_000_000
    rng = np.random.default_rng(0)
    noise = tmp_path / "noise.jsonl"
    nul = tmp_path / "nul.jsonl"
    for _ in range(20):
        noise.write_bytes(rng.bytes(5000))
        with pytest.raises(UserError) as caught:
            read_problems(noise)
        assert "\n" not in str(caught.value)
    nul.write_bytes(b'{"prompt": "a\0b", "answer": 1}\n')
    with pytest.raises(UserError, match=r"nul\.jsonl:1: not JSON"):
        read_problems(nul)
    deep = tmp_path / "deep.jsonl"
    deep.write_text('{"prompt": "q", "tests": [{"args": ' + "[" * 900 + "]" * 900 + ', "expected": 1}]}')
    with contextlib.suppress(UserError):  # read, or refused in one line
        read_problems(deep)
