"""The embedded tasks: their problems, near misses and verifiers, against brute force."""

import itertools

import numpy as np
import pytest

from cipo_fast.embedded import verifiers
from cipo_fast.embedded.problems import embedded_problems
from cipo_fast.embedded.tasks import carry, chain, latin, shoot, task_named, trace
from cipo_fast.errors import UserError
from cipo_fast.records import Problem
from cipo_fast.verify.judging import judge

TASKS = ["trace", "sort", "add", "carry", "chain", "shoot", "subset", "latin"]
HOSTILE = ["", " ", "0", "-", "١٢٣", "¹²³", "1\n2", "-12", "+12", "1.5", "9" * 10_000, "None", "\x00", "z0"]


def question(problem: Problem) -> str:
    return problem.messages[0]["content"]


def verdict(problem: Problem, text: str) -> str:
    return judge(problem.row, text).verdict


@pytest.mark.parametrize("task", TASKS)
def test_problems_are_seeded_and_different(task: str) -> None:
    train, held_out = embedded_problems(task, 3, 400)
    assert (train, held_out) == embedded_problems(task, 3, 400) != embedded_problems(task, 4, 400)
    assert len(held_out) == 400
    assert len(train) > 7000
    problems = [*train, *held_out]
    assert len({p.content for p in problems}) == len({p.id for p in problems}) == len(problems)


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_to_imitate_is_right_and_hostile_texts_are_not(task: str) -> None:
    problems = embedded_problems(task, 0, 60)[1]
    for p in problems:
        assert verdict(p, p.answer) == verdict(p, f" {p.answer}\n") == "right"
        assert {verdict(p, text) for text in (*HOSTILE, p.answer + "0", p.answer[:-1])} == {"wrong"}


@pytest.mark.parametrize("task", TASKS)
def test_near_misses_are_mostly_wrong(task: str) -> None:
    rng = np.random.default_rng(0)
    problems = embedded_problems(task, 0, 300)[1]
    misses = [task_named(task).near_miss(question(p), p.answer, rng) for p in problems]
    wrong = np.mean([verdict(p, miss) == "wrong" for p, miss in zip(problems, misses, strict=True)])
    assert wrong > 0.7


@pytest.mark.parametrize("task", TASKS)
def test_sizes(task: str) -> None:
    sizes = task_named(task).sizes
    for size in (sizes[0], sizes[-1]):
        train, held_out = embedded_problems(task, 0, 400, size)
        assert len(held_out) == 400
        assert len(train) > 7000
        assert all(len(question(p)) < 60 and len(p.answer) <= 26 for p in train)
    for size in (sizes[0] - 1, sizes[-1] + 1):
        with pytest.raises(UserError, match=rf"data.task_size={size}: this task has {sizes[0]} to {sizes[-1]}"):
            embedded_problems(task, 0, 10, size)


def test_carry_waits_for_the_last_columns() -> None:
    problems = embedded_problems("carry", 0, 400)[1]
    long = 0
    for p in problems:
        a, b = question(p).removeprefix("carry ").split("+")
        assert int(p.answer) == int(a) + int(b)
        assert len(p.answer) == len(a) + 1 == len(b) + 1 == 7
        nines = "".join("9" if int(i) + int(j) == 9 else "." for i, j in zip(a, b, strict=True))
        long += "999" in nines
    assert long > 80
    rng = np.random.default_rng(0)
    misses = [carry.near_miss("carry 949+051", "1000", rng) for _ in range(200)]
    assert {miss[3] for miss in misses} == {"0"}
    assert {miss[1:3] for miss in misses} == {"99", "90", "00", "09"}


def test_chain_counts_hops() -> None:
    asked = "chain agbccfdaehfbgdhe c3"
    assert [chain.after(asked, hops) for hops in range(4)] == ["c3", "f2", "b1", "c0"]
    hops = [question(p)[-1] for p in embedded_problems("chain", 0, 300, 4)[1]]
    assert sorted(set(hops)) == ["1", "2", "3", "4"]
    for p in embedded_problems("chain", 0, 50)[1]:
        assert p.answer == chain.after(question(p), int(question(p)[-1]))


def test_shoot_misses_by_what_the_first_value_is_off() -> None:
    rng = np.random.default_rng(0)
    for p in embedded_problems("shoot", 0, 100)[1]:
        _, steps, last = question(p).split(" ")
        paths = [shoot.path(first, [int(c) for c in steps]) for first in range(shoot.BASE)]
        assert [path for path in paths if path[-1] == last] == [p.answer]
        miss = shoot.near_miss(question(p), p.answer, rng)
        assert miss in paths
        assert (int(miss[0]) - int(p.answer[0])) % shoot.BASE == (int(miss[-1]) - int(last)) % shoot.BASE != 0


def test_subset_by_enumeration() -> None:
    for p in embedded_problems("subset", 0, 10)[1]:
        _, digits, total = question(p).split(" ")
        right = {"".join(c) for c in itertools.permutations(digits, 3) if sum(map(int, c)) == int(total)}
        judged = {f"{n:03d}" for n in range(1000) if verifiers.subset(f"{n:03d}", {"prompt": question(p)})}
        assert judged == right
        assert len(right) >= 6
    assert verifiers.subset("224", {"prompt": "subset 122345 8"})  # there twice
    assert not verifiers.subset("332", {"prompt": "subset 122345 8"})


def test_latin_by_enumeration() -> None:
    assert len(set(latin.squares())) == 576
    for p in embedded_problems("latin", 0, 8, 6)[1]:
        shown = question(p).removeprefix("latin ").replace(" ", "")
        right = {
            "".join(digit for digit, cell in zip(square, shown, strict=True) if cell == ".")
            for square in latin.squares()
            if all(cell in (".", digit) for digit, cell in zip(square, shown, strict=True))
        }
        texts = map("".join, itertools.product("1234", repeat=6))
        assert {text for text in texts if verifiers.latin(text, {"prompt": question(p)})} == right


def test_the_answer_of_a_trace_is_its_last_character() -> None:
    assert trace.run("3b12c103") == "31202332"
    for p in embedded_problems("trace", 0, 200)[1]:
        answer, shown = p.answer.split(" ")
        register = 0
        for step, after in zip(question(p).removeprefix("trace "), shown, strict=True):
            register = "abcd".index(step) if step.isalpha() else (register + int(step)) % 4
            assert after == str(register)
        assert answer == shown[-1]


def test_a_near_miss_of_a_trace_holds_the_right_working() -> None:
    rng = np.random.default_rng(0)
    for p in embedded_problems("trace", 0, 200)[1]:
        miss = task_named("trace").near_miss(question(p), p.answer, rng)
        assert miss[1:] == p.answer[1:]
        assert miss[0] in set("0123") - {p.answer[0]}
