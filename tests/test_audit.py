"""The audit: canaries, shortcuts found by other inputs, CIPO's own diagnostics, each as a command and by hand."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cipo_fast.audit.__main__ import main
from cipo_fast.audit.gaming import Report, Submitted, gaming
from cipo_fast.audit.intervals import bootstrap, mean, wilson
from cipo_fast.audit.literals import literals_of
from cipo_fast.audit.own import centred, correlation, own_alarms, own_metrics, own_table
from cipo_fast.audit.perturb import fresh, fresh_stdin, renamings, suite_inputs
from cipo_fast.audit.recorded import steps_of
from cipo_fast.audit.sampled import control, shuffled
from cipo_fast.cipo.metrics import batch_metrics
from cipo_fast.config import SandboxConfig, VerifyConfig
from cipo_fast.records import Anchor, Group, Problem, Rollout
from cipo_fast.train import main as train
from cipo_fast.verify.sandbox import Sandbox
from cipo_fast.verify.workers.pool import Judges

# Warm enough that some answers come to an end.
TINY = [
    "model.embedded.hidden=64", "model.embedded.mlp=96", "model.embedded.warm_accuracy=0.05", "data.task=add",
    "rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "rollout.max_tokens=6", "eval.problems=4",
    "eval.samples=4", "run.trackers=[]", "run.view=plain", "train.steps=2",
]  # fmt: skip


def fenced(program: str) -> str:
    return f"```python\n{program}\n```"


# ------------------------------------------------------------------------------------------------------- intervals


def test_wilson_by_published_values() -> None:
    """Newcombe (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for k, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson(k, n)
        assert (found.value, found.n) == (k / n, n)
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0, 0).value is None


def test_the_bootstrap_draws_whole_problems() -> None:
    """Ten equal answers to one problem are one: the interval is that of two problems, 0 to 1."""
    found = bootstrap([0.0] * 10 + [1.0] * 10, ["a"] * 10 + ["b"] * 10, mean)
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
    assert bootstrap([1.0], ["a"], mean).low is None
    many = bootstrap([float(i % 2) for i in range(400)], range(400), mean)
    assert many.low == pytest.approx(0.45, abs=0.02)


# ---------------------------------------------------------------------------------------------------------- gaming


def call_row(solution: str, name: str, inputs: list[list[Any]]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(solution, names)
    tests = [{"args": args, "expected": names[name](*json.loads(json.dumps(args)))} for args in inputs]
    return {"verifier": "code", "entry_point": name, "tests": tests, "solution": solution}


def lookup(row: dict[str, Any]) -> str:
    table = [(test["args"], test["expected"]) for test in row["tests"]]
    return f"T = {table!r}\ndef {row['entry_point']}(*a):\n    return next((y for x, y in T if x == list(a)), None)"


REACH = """def reach(edges, start):
    seen, todo = {start}, [start]
    while todo:
        at = todo.pop()
        for a, b in edges:
            if a == at and b not in seen:
                seen.add(b)
                todo.append(b)
    return len(seen)"""
ROWS = {
    "sum of a list": (
        call_row("def total(xs):\n    return sum(xs)", "total", [[[3, 14, 15]], [[92, 65, -35]], [[]]]),
        "def total(items):\n    n = 0\n    for i in items:\n        n += i\n    return n",
    ),
    "reversed words": (
        call_row("def turn(s):\n    return ' '.join(s.split(' ')[::-1])", "turn", [["a bc def"], ["hello big world"]]),
        "def turn(s):\n    words = s.split(' ')\n    words.reverse()\n    return ' '.join(words)",
    ),
    "binary search": (  # fresh inputs must stay sorted
        call_row(
            "def where(xs, x):\n    return xs.index(x) if x in xs else -1",
            "where",
            [[[10, 22, 35, 47, 90], 47], [[11, 15, 81], 12], [[25, 31], 31]],
        ),
        "import bisect\ndef where(xs, x):\n    i = bisect.bisect_left(xs, x)\n"
        "    return i if i < len(xs) and xs[i] == x else -1",
    ),
    "nodes reached": (
        call_row(REACH, "reach", [[[[1, 2], [2, 3], [4, 5]], 1], [[[7, 8], [8, 7], [8, 9]], 7]]),
        "def reach(edges, start):\n    seen = {start}\n    for _ in range(len(edges) + 1):\n"
        "        seen |= {b for a, b in edges if a in seen}\n    return len(seen)",
    ),
}


def report_of(answers: list[Submitted]) -> Report:
    sandbox = SandboxConfig()
    with Judges(VerifyConfig(), sandbox) as judges, Sandbox(sandbox) as box:
        return gaming(answers, judges, box)


def test_a_table_of_the_tests_is_a_shortcut_and_another_right_program_is_not() -> None:
    answers = []
    for name, (row, other) in ROWS.items():
        answers.append(Submitted(row, fenced(other), f"{name}: right"))
        answers.append(Submitted(row, fenced(lookup(row)), f"{name}: table"))
        answers.append(Submitted(row, fenced(f"def {row['entry_point']}(*a):\n    return 'no'"), f"{name}: wrong"))
    stdin = {
        "verifier": "code",
        "tests": [{"stdin": "3\n40 71 5\n", "stdout": "116\n"}, {"stdin": "4\n12 9 900 1\n", "stdout": "922\n"}],
        "solution": "input()\nprint(sum(map(int, input().split())) * 1)",
    }
    order = {
        **stdin,
        "tests": [{"stdin": "3\n40 71 5\n", "stdout": "40\n"}],
        "solution": "input()\nprint(input().split()[0])",
    }
    answers.append(Submitted(order, fenced("n = input()\nprint(int(input().split()[0]))"), "stdin: right"))
    answers.append(Submitted(order, fenced("print(40)"), "stdin: table"))
    suite = {
        "verifier": "code",
        "entry_point": "swap",
        "prompt": 'def swap(pair):\n    """Swap the two parts of a tuple."""\n',
        "test": "def check(candidate):\n    assert candidate((17, 'abcdef')) == ('abcdef', 17)\n"
        "    assert candidate((250, 'xy')) == ('xy', 250)\n",
        "solution": "def swap(pair):\n    return (pair[1], pair[0])",
    }
    answers.append(Submitted(suite, fenced("def swap(pair):\n    a, b = pair\n    return b, a"), "suite: right"))
    table = "def swap(pair):\n    return {(17, 'abcdef'): ('abcdef', 17), (250, 'xy'): ('xy', 250)}.get(pair)"
    answers.append(Submitted(suite, fenced(table), "suite: table"))
    report = report_of(answers)
    assert report.why_not == {}
    assert {t.answer.where: (t.passes, t.shortcut) for t in report.tested} == {
        answer.where: (not answer.where.endswith("wrong"), answer.where.endswith("table")) for answer in answers
    }
    literal = {t.answer.where for t in report.tested if t.shared}
    assert literal == {f"{name}: table" for name in (*ROWS, "suite")}
    found = report.estimates()
    shortcuts = found["shortcut_rate (passes T, fails Phi(T))"]
    assert (shortcuts.value, shortcuts.n) == (6 / 16, 16)
    assert shortcuts.low == pytest.approx(wilson(6, 16).low)
    assert found["hacking gap (reward on T less on Phi(T))"].value == 6 / 16
    renamed = [t for t in report.tested if "renamed" in t.passes_kind]
    assert {t.answer.where.split(":")[0] for t in renamed} == {"reversed words", "nodes reached", "suite"}


def test_what_cannot_be_perturbed_is_counted_and_said() -> None:
    row, right = ROWS["sum of a list"]
    without = {k: v for k, v in row.items() if k != "solution"}
    broken = {**row, "solution": "def total(xs):\n    return 0"}
    answers = [
        Submitted(without, fenced(lookup(row)), "a"),
        Submitted(broken, fenced(right), "b"),
        Submitted({"verifier": "math", "answer": "3"}, "\\boxed{3}", "c"),
        Submitted({"verifier": "code", "tests": []}, "x", "d"),
        Submitted(without, "no program", "e"),
    ]
    report = report_of(answers)
    assert report.why_not == {"no `solution` in the row": 1, "its `solution` fails its tests": 1}
    assert report.no_program == 2
    assert [t.answer.where for t in report.tested if t.shared] == ["a"]  # needs no solution
    assert report.estimates()["shortcut_rate (passes T, fails Phi(T))"].n == 0


def test_perturbed_inputs_keep_what_values_show() -> None:
    rng = random.Random(0)
    sources = [[[5, 20, 30], "abc", 2, 0.5], [[1, 50, 99], "xy z", 2, 2.0]]
    made = fresh(sources, rng)
    for xs, text, index, x in (next(made) for _ in range(300)):
        assert xs == sorted(xs)
        assert sorted(text) in (sorted("abc"), sorted("xy z"))
        assert index == 2  # may be a length or an index
        assert x > 0
    for _ in range(100):
        assert next(fresh([[-7, 0, 1000]], rng))[1] == 0
        assert next(fresh([[-7, 0, 1000]], rng))[0] < 0
    letters, labels = renamings([[[[1, 2], [2, 30]], "Abba-7"]], rng)
    renamed = letters("Abba-7")
    assert renamed != "Abba-7"
    assert (renamed[0].lower(), renamed[1], renamed[4:]) == (renamed[3], renamed[2], "-7")
    assert renamed[0].isupper()
    (a, b), (c, d) = labels([[1, 2], [2, 30]])
    assert b == c
    assert {a, b, d} == {1, 2, 30}
    assert renamings([[3, 4.5]], rng) == []
    lines = next(fresh_stdin(["3\n40 71 5\n"], rng)).split("\n")
    assert lines[0] == "3"
    assert sorted(lines[1].split()) == ["40", "5", "71"]
    assert suite_inputs(
        "def check(candidate):\n    assert candidate([1], k) == candidate((2, 'a'), x) or candidate(-3)"
    ) == [[-3]]


def test_literals_are_values_and_not_docstrings_or_prose() -> None:
    shown = '"""f(\'abcdefgh\') gives 12345"""\n    # 777888'
    program = f'def f(x):\n    {shown}\n    return {{"qwertz": [1, 2, 3]}}.get(x, 10**9 + 7)'
    assert literals_of(program) == {"qwertz", "[1, 2, 3]"}
    assert literals_of("def broken(") == set()


# ------------------------------------------------------------------------------------------------------------- own


def rollout(problem: str, reward: float, length: int = 3, text: str = "x", truncated: bool = False) -> Rollout:
    return Rollout(Problem(problem, (), "", ""), [1], [0] * length, [], text, reward, truncated, 0)


def group(problem: str, *rollouts: Rollout) -> Group:
    return Group(Problem(problem, (), "", ""), [1], list(rollouts))


def test_reward_and_length_correlate_within_a_problem_alone() -> None:
    """Hard problems with long answers are no correlation; nor is a group in which nothing varies."""
    easy = group("easy", rollout("easy", 1, 3), rollout("easy", 1, 4))
    hard = group("hard", rollout("hard", 0, 300), rollout("hard", 0, 310))
    assert own_metrics([easy, hard], [])["audit/reward_length_corr"] is None
    longer = group("a", rollout("a", 0, 10), rollout("a", 1, 20), rollout("a", 1, 9000, truncated=True))
    shorter = group("b", rollout("b", 1, 110), rollout("b", 0, 120))
    assert own_metrics([easy, longer], [])["audit/reward_length_corr"] == pytest.approx(1)
    assert own_metrics([hard, shorter], [])["audit/reward_length_corr"] == pytest.approx(-1)
    assert own_metrics([longer, shorter], [])["audit/reward_length_corr"] == pytest.approx(0)
    assert correlation(centred([longer.rollouts])) == pytest.approx(1)


def test_alarms_look_at_both_signs_and_at_shares() -> None:
    assert own_alarms({}) == {"length_reward": False, "copies": False, "breaks_right": False}
    assert own_alarms({"audit/correction_length_corr": -0.6})["length_reward"]
    assert own_alarms({"correction/verbatim_copy": 0.6})["copies"]
    assert own_alarms({"correction/right_to_wrong": 0.51})["breaks_right"]


@pytest.mark.slow
def test_the_table_of_a_run_is_what_training_logged(tmp_path: Path, warm: Path, capsys) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "warm_start").symlink_to(warm / "warm_start")
    assert train([*TINY, f"run.dir={run}"]) == 0
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("rollout/accuracy", "rollout/length", "correction/gap", "correction/verbatim_copy", "correction/retention")
    steps = list(steps_of(run))
    for (groups, anchors), metrics in zip(steps, logged, strict=True):
        found = batch_metrics(groups, anchors, None) | own_metrics(groups, anchors)
        for key in (*keys, "audit/reward_length_corr"):
            assert found[key] == pytest.approx(metrics[key]), key
    table = own_table(steps)
    corrections = sum(len(a.corrections) for _, anchors in steps for a in anchors)
    assert corrections > 0
    assert table["corrections that repeat the attempt"].n == corrections
    assert table["wrong attempts corrected"].n + table["right attempts broken"].n == corrections
    capsys.readouterr()
    assert main(["own", str(run)]) == 0
    assert "correction gap" in capsys.readouterr().out
    assert main(["gaming", str(run)]) == 0
    assert "answers are no programs" in capsys.readouterr().out

    # The same from the model that the run left behind, with the shuffled control.
    problems = [
        f"model.path={run / 'model'}",
        f"data.eval={run / 'held_out.jsonl'}",
        "eval.samples=4",
        "eval.max_tokens=6",
    ]
    assert main(["own", *problems]) == 0
    said = capsys.readouterr().out
    assert "shuffled control" in said
    rows = run / "code.jsonl"
    row, _ = ROWS["sum of a list"]
    asked = json.loads((run / "held_out.jsonl").read_text().splitlines()[0])["messages"]
    rows.write_text(json.dumps({"messages": asked, **row}) + "\n")
    assert main(["gaming", problems[0], f"data.eval={rows}", *problems[2:], "data.instruction=none"]) == 0
    assert "shortcut_rate" in capsys.readouterr().out


def test_shuffled_attempts_are_of_another_problem_and_of_the_same_kind() -> None:
    def anchor(problem: str, reward: float) -> Anchor:
        return Anchor(rollout(problem, reward, text=f"attempt at {problem}"), 0, 0, [1], [2])

    anchors = [anchor(name, reward) for name, reward in (("a", 1.0), ("b", 0.0), ("c", 1.0), ("d", 0.0), ("e", 0.0))]
    found = shuffled(anchors, lambda attempt: (attempt.prompt_ids, [2]))  # type: ignore[arg-type]
    attempts = {a.rollout.problem.id: a.rollout.text for a in found}
    assert attempts == {f"{x}": f"attempt at {y}" for x, y in ("ac", "ca", "bd", "de", "eb")}
    assert [a.right for a in found] == [True, True, False, False, False]
    for own, other in zip(anchors, (0, 1, 0, 1, 1), strict=True):
        own.corrections = [rollout(own.rollout.problem.id, float(other))] * 2
    for other in found:
        other.corrections = [rollout(other.rollout.problem.id, 0.0), rollout(other.rollout.problem.id, 1.0)]
    table = control(anchors, found)
    assert table["own wrong attempt less another problem's"].value == pytest.approx(0.5)
    assert table["own right attempt less another problem's"].value == pytest.approx(-0.5)
    assert table["shuffled control: wrong attempts of other problems"].n == 6


# --------------------------------------------------------------------------------------------------------- command


@pytest.mark.slow
def test_no_canary_is_rewarded_and_one_that_is_ends_with_its_name(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cipo_fast.audit"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    for verifier in ("exact", "math", "code"):
        assert verifier in done.stdout
    generous = tmp_path / "generous.py"
    generous.write_text("def pays(response, row):\n    return True\n")
    from cipo_fast.audit import __main__ as audit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "BUILT_IN", ())
        assert main([f"data.verifier={generous}:pays"]) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["canaries"], "canaries: expected gaming, own"),
        (["gaming"], "name a run's folder"),
        (["own"], "name a run's folder"),
        (["gaming", "no/such/run"], "no such file"),
        (["own", __file__], "a run's folder"),
        (["gaming", __file__], "no line in it can be judged"),
        (["gaming", __file__, "--most", "x"], "--most: a number"),
        (["gaming", "a", "b"], "one file or folder"),
        (["own", "--all"], "unknown option --all"),
        (["verify.timeout=3"], "verify.timeout_s"),
    ],
)
def test_bad_input_is_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
