"""What an evaluation makes of answers: estimators against all subsets, figures against hand counts, and its files."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch

from cipo_fast.chat import Chat
from cipo_fast.cipo.prompts import CorrectionPrompts
from cipo_fast.config import Config, load_config
from cipo_fast.embedded.model import embedded_tokenizer, new_model
from cipo_fast.embedded.problems import embedded_problems
from cipo_fast.engines import twin_of
from cipo_fast.errors import Preempted, TrainingStopped, UserError
from cipo_fast.evaluation.estimators import all_at_k, maj_at_k, pass_at_k, powers
from cipo_fast.evaluation.figures import figures, paired, per_problem
from cipo_fast.evaluation.records import SAMPLES, Answer, Chain, Record, canonical_of, read_records, record_of
from cipo_fast.evaluation.report import Results, compare
from cipo_fast.evaluation.sample import evaluate, settings_of
from cipo_fast.marking import build_judges
from cipo_fast.records import Completion
from cipo_fast.rollout import Finished, Sampling
from cipo_fast.rollout.local import LocalEngine
from cipo_fast.sampling import Prompt, Sampler, encode_prompts

# ------------------------------------------------------------------------------------------------------- estimators


def subsets(values: Sequence, k: int) -> list[tuple]:
    return list(combinations(values, k))


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_and_all_at_k_are_means_over_all_subsets(n: int) -> None:
    for c, k in product(range(n + 1), range(1, n + 1)):
        drawn = subsets([True] * c + [False] * (n - c), k)
        assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in drawn]), abs=1e-12)
        assert all_at_k(n, c, k) == pytest.approx(np.mean([all(s) for s in drawn]), abs=1e-12)


def test_known_values_and_what_is_refused() -> None:
    assert pass_at_k(32, 1, 8) == 0.25
    assert pass_at_k(1000, 1, 1000) == 1
    for estimator in (pass_at_k, all_at_k):
        for n, c, k in ((8, 0, 9), (8, 0, 0), (4, 8, 1)):
            with pytest.raises(ValueError, match="samples"):
                estimator(n, c, k)
    with pytest.raises(ValueError, match="k=3 of n=2"):
        maj_at_k(["a", "b"], [True, False], [3])
    assert [powers(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def voted(answers: Sequence[tuple[str, bool]], share: dict[str, float]) -> float:
    """Who wins a vote, drawn by lot among equals."""
    votes = Counter(answer for answer, _ in answers if answer)
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(share[answer] for answer in winners) / len(winners) if winners else 0.0


@pytest.mark.parametrize(
    "text",
    ["R", "x", "-", "Rx", "RRxx", "RRxyz-", "RSSxxy", "RrrXxx--", "RRRRRR", "xxyyzz", "RRSSxxyy-", "Rrxxyz", "------"],
)
def test_majorities_are_means_over_all_subsets(text: str) -> None:
    """Capital letters R and S are right; - is no answer; r is R judged wrong; x and X are the same, and wrong."""
    answers = ["" if c == "-" else c.lower() for c in text]
    rights = [c in "RS" for c in text]
    share = {a: float(np.mean([r for b, r in zip(answers, rights, strict=True) if a == b])) for a in answers}
    ks = list(range(1, len(text) + 1))
    pairs = list(zip(answers, rights, strict=True))
    expected = [np.mean([voted(s, share) for s in subsets(pairs, k)]) for k in ks]
    assert maj_at_k(answers, rights, ks) == pytest.approx(expected, abs=1e-12)


def test_majorities_of_many_samples() -> None:
    """One vote is an answer; all votes are the plain majority; numbers stay finite at the limit."""
    answers, rights = ["r"] * 400 + ["w"] * 350 + [""] * 250, [True] * 400 + [False] * 600
    one, most, every = maj_at_k(answers, rights, [1, 500, 1000])
    assert one == pytest.approx(0.4, abs=1e-12)
    assert 0.9 < most < 1
    assert every == pytest.approx(1.0, abs=1e-12)


def test_canonical_answers() -> None:
    exact = {"verifier": "exact", "answer": "a"}
    assert canonical_of(exact, " a\r\nb ") == canonical_of(exact, "a\nb")
    mathematics = {"verifier": "math", "answer": "1/2"}
    same = [canonical_of(mathematics, f"so \\boxed{{{text}}}") for text in ("1/2", "0.5", "\\frac{1}{2}", "\\frac12")]
    assert len(set(same)) == 1
    assert canonical_of(mathematics, "\\boxed{0.25}") != same[0]
    assert canonical_of(mathematics, "\\boxed{(B)}") == canonical_of(mathematics, "\\boxed{\\text{B}}")
    assert canonical_of(mathematics, "no box") == ""
    assert canonical_of(mathematics, "\\boxed{" + "7" * 3000 + "e2000}")  # more digits than Python writes
    assert canonical_of({"verifier": "code"}, "print(1)") is None


# ---------------------------------------------------------------------------------------------------------- figures


def answer(right: bool, text: str = "", truncated: bool = False, canonical: str | None = "?") -> Answer:
    text = text or ("yes" if right else "no")
    return Answer(
        text, 3, float(right), "right" if right else "wrong", truncated, text if canonical == "?" else canonical
    )


def record(name: str, rights: str, chains: Sequence[Chain] = (), checks: int = 0, **more: object) -> Record:
    """`rights`: 1 or 0 an attempt; the first stands for the greedy one too."""
    attempts = [answer(c == "1") for c in rights]
    return replace(
        Record(name, "s", len(rights), checks, attempts[0], attempts, list(chains)),
        **more,  # type: ignore[arg-type]
    )


def test_figures_of_chains_count_what_was_not_shown() -> None:
    right, wrong = answer(True), answer(False)
    chains = [
        Chain(0, [right, wrong]),  # kept, then broken
        Chain(1, [wrong, right]),  # copied, then mended
        Chain(2, [None, None], "truncated"),
        Chain(3, [right, None], "too long"),  # mended, stays so
        Chain(4, [right, None], "failed"),  # mended; of the second round nobody knows
    ]
    found = per_problem(record("a", "10000", chains, 2))
    assert found["wrong_to_right"] == (2, 3)
    assert found["right_to_wrong"] == (0, 1)
    assert found["wrong_to_right_2"] == (1, 1)
    assert found["right_to_wrong_2"] == (1, 1)
    assert found["after_check_1"] == (3, 5)
    assert found["after_check_2"] == (2, 4)
    assert found["check_gain"] == (2, 5)
    assert found["not_shown"] == (3, 9)
    assert found["verbatim_copies"] == (2, 6)
    assert found["correction_gap"] == (pytest.approx(2 - 3 * 0.25), 3)  # others: one of four is right
    assert found["t1"] == (1, 5)
    assert found["pass_at_2"] == (pytest.approx(0.4), 1)
    assert found["maj_at_5"] == (0, 1)


def test_names_follow_from_n_and_checks_alone() -> None:
    full, none = record("a", "1010", [Chain(0, [answer(True)])], 1), record("b", "0000", checks=1)
    lost = replace(record("c", "00", checks=1), n=4)  # two answers could not be judged
    assert list(per_problem(full)) == list(per_problem(none)) == list(per_problem(lost))
    found = figures([full, none, lost])
    assert found["pass_at_4"].count == 2
    assert found["pass_at_2"].count == 3
    assert found["wrong_to_right"].value is None
    assert found["wrong_to_right"].count == 0
    code = record("d", "10", greedy=None, attempts=[answer(True, canonical=None), answer(False, canonical=None)])
    assert "maj_at_2" not in figures([code])
    assert figures([code])["greedy"].value is None


def some_records(rng: np.random.Generator, problems: int, p: float) -> list[Record]:
    return [record(f"{i}", "".join("1" if x < p else "0" for x in rng.random(4))) for i in range(problems)]


def test_an_interval_is_that_of_a_plain_bootstrap() -> None:
    """Against resampling the records themselves, with other draws."""
    records = some_records(np.random.default_rng(1), 60, 0.3)
    found = figures(records)["t1"]
    rng, means = np.random.default_rng(5), []
    for _ in range(2000):
        drawn = [records[i] for i in rng.integers(60, size=60)]
        means.append(np.mean([a.right for r in drawn for a in r.attempts]))
    assert (found.low, found.high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.015)
    assert found == figures(records)["t1"]  # the same each time
    assert figures(records[:1])["t1"].low is None


def test_pairs_are_of_the_problems_that_both_have() -> None:
    rng = np.random.default_rng(2)
    a = some_records(rng, 50, 0.4)
    b = [replace(r, attempts=[answer(True), *r.attempts[1:]]) for r in a[10:]] + some_records(rng, 60, 0.5)[50:]
    found = paired(a, b)
    assert (found.problems, found.left_out) == (40, (10, 10))
    t1 = found.differences["t1"]
    assert t1.a == figures(a[10:])["t1"].value
    assert t1.value == pytest.approx(np.mean([not r.attempts[0].right for r in a[10:]]) / 4)
    assert t1.low is not None
    assert t1.high is not None
    alone = figures(a[10:])["t1"]
    assert t1.high - t1.low < alone.high - alone.low  # type: ignore[operator]  # that is what pairing is for
    assert paired(a, a).differences["t1"].high == 0
    with pytest.raises(UserError, match="no problem in common"):
        paired(a, [replace(r, content="another") for r in a])


def test_a_record_comes_back_from_its_line() -> None:
    found = record("a", "10", [Chain(0, [answer(True), None], "too long")], 2, failed=1, failure="lost")
    assert record_of(found.line()) == found
    for bad in ('{"problem": "a"}', "[]", '{"problem"', "\0\0"):
        with pytest.raises(ValueError, match=r"Expecting|not a|double|char"):
            record_of(bad)


# --------------------------------------------------------------------------------------------------------- sampling

SETTINGS = [
    "model.embedded.hidden=32", "model.embedded.mlp=48", "data.task=add", "eval.samples=512", "eval.checked=3",
    "eval.checks=3", "eval.max_tokens=5", "verify.workers=1",
]  # fmt: skip


Setup = tuple[Sampler, list[Prompt], CorrectionPrompts, Config]


class Ending:
    """The local engine of a random model, which ends no answer: three in four end here at their last token. Keeps every
    prompt."""

    max_model_len: int | None = None

    def __init__(self, engine: LocalEngine, end: int):
        self.engine, self.end = engine, end
        self.asked: list[list[int]] = []

    def generate(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seed: int, finished: Finished | None = None
    ) -> list[list[Completion]]:
        self.asked += list(prompts)
        found = self.engine.generate(prompts, n, sampling, seed)
        return [[self._ended(completion) for completion in completions] for completions in found]

    def _ended(self, found: Completion) -> Completion:
        if sum(found.token_ids) % 4 == 0:
            return found
        return replace(found, token_ids=[*found.token_ids[:-1], self.end], truncated=False)


@pytest.fixture(scope="module")
def setup(mesh: object) -> Iterator[Setup]:
    """With a tiny model."""
    config = load_config([], SETTINGS)
    config.eval.samples = 4
    torch.manual_seed(0)
    chat = Chat(embedded_tokenizer(), config.data)
    model = twin_of(new_model(config, "sdpa"), "cpu", torch.float32)
    engine = LocalEngine(model, chat.end_ids(None), 0, 512)
    problems = embedded_problems("add", 0, 7)[1]
    with build_judges(config, print) as judges:
        sampler = Sampler(Ending(engine, chat.end_ids(None)[-1]), chat, 0, judges)  # type: ignore[arg-type]
        yield sampler, encode_prompts(problems, chat), CorrectionPrompts(chat, config.correction), config


def run(setup: Setup, folder: Path, **more: object) -> Results:
    sampler, prompts, correct, config = setup
    return evaluate(sampler, prompts, correct, config, folder, {"model": "m"}, **more)  # type: ignore[arg-type]


def lines(folder: Path) -> list[dict]:
    """samples.jsonl without the time."""
    found = [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


@pytest.fixture
def by_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of three problems."""
    monkeypatch.setattr("cipo_fast.evaluation.sample.AT_ONCE", 12)


def test_every_round_shows_the_newest_answer_alone(setup: Setup, tmp_path: Path) -> None:
    """As in training: the problem's prompt, one answer, the request to check it; the answer is the last round's."""
    sampler, prompts, correct, _ = setup
    engine: Ending = sampler.engine  # type: ignore[assignment]
    engine.asked.clear()
    run(setup, tmp_path)
    glue, text = tuple(correct.glue[True].after_end), correct.chat.text
    bare = {tuple(p.token_ids): p.problem.id for p in prompts}
    found = set()
    for ids in map(tuple, engine.asked):
        if ids not in bare:
            (prompt,) = (start for start in bare if ids[: len(start)] == start)
            assert ids[-len(glue) :] == glue
            found.add((bare[prompt], text(ids[len(prompt) : -len(glue)])))
    assert found == {
        (r.problem, answer.text)
        for r in read_records(tmp_path)
        for chain in r.chains
        for answer in (r.attempts[chain.attempt], *chain.answers[:-1])
        if answer is not None and not answer.truncated
    }
    assert any(answer for r in read_records(tmp_path) for chain in r.chains for answer in chain.answers[1:])


def test_all_that_was_sampled_is_kept(setup: Setup, tmp_path: Path) -> None:
    results = run(setup, tmp_path)
    records = read_records(tmp_path)
    assert [r.problem for r in records] == [p.problem.id for p in setup[1]]
    assert all(len(r.attempts) == 4 and len(r.chains) == 3 and r.greedy for r in records)
    assert all(len(chain.answers) == 3 for r in records for chain in r.chains)
    cut = [a.truncated for r in records for a in r.attempts]
    assert 0 < sum(cut) < len(cut)
    assert results.figures["truncated"].value == pytest.approx(np.mean(cut))
    ended = [c.ended == "truncated" for r in records for c in r.chains if r.attempts[c.attempt].truncated]
    assert ended == [True] * len(ended) != []
    assert results.tokens == sum(a.tokens for r in records for a in r.answers) > 0
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["figures"]["t1"]["value"] == results.values["t1"]
    assert written["settings"].items() >= {"n": 4, "checked": 3, "checks": 3, "seed": 0}.items()
    assert "| pass_at_4 |" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("torn", ["whole batches", "a problem more", "half a line", "zeros"])
def test_a_killed_evaluation_ends_as_one_that_was_not(setup: Setup, tmp_path: Path, by_three: None, torn: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(setup, whole)
    asked = []

    def pause() -> None:
        asked.append(1)
        if len(asked) == 7:  # five in a batch
            raise Preempted("SIGTERM")

    with pytest.raises(Preempted):
        run(setup, killed, pause=pause)
    assert lines(killed) == lines(whole)[:3]
    more: dict[str, bytes] = {"half a line": b'{"problem": "add', "zeros": b"\0" * 50, "whole batches": b""}
    more["a problem more"] = (whole / SAMPLES).read_bytes().splitlines(keepends=True)[3]
    with (killed / SAMPLES).open("ab") as file:
        file.write(more[torn])
    begun = []
    results = run(setup, killed, progress=begun.append, anew=False)
    assert begun == [3, 6, 7]
    assert lines(killed) == lines(whole)
    assert results.values == run(setup, whole).values


def test_other_settings_are_refused_or_begun_anew(setup: Setup, tmp_path: Path) -> None:
    run(setup, tmp_path)
    (tmp_path / "mine").write_text("kept")
    other = setup[3].model_copy(deep=True)
    other.eval.checks = 1
    changed = (*setup[:3], other)
    with pytest.raises(UserError, match=r"other settings \(checks\)"):
        run(changed, tmp_path, anew=False)
    assert len(lines(tmp_path)[0]["chains"][0]["answers"]) == 3
    assert "after_check_2" not in run(changed, tmp_path).figures
    assert len(lines(tmp_path)[0]["chains"][0]["answers"]) == 1
    assert (tmp_path / "mine").read_text() == "kept"


def test_another_body_of_a_function_is_another_setting(setup: Setup, tmp_path: Path) -> None:
    """Its verdicts would stand beside those of the one before."""
    file, (first, *_), config = tmp_path / "own.py", setup[1], setup[3]
    prompt = replace(first, problem=replace(first.problem, verifier=f"{file}:judge"))
    found = []
    for verdict in (True, False):
        file.write_text(f"def judge(response, row):\n    return {verdict}\n")
        found.append(settings_of(config, [prompt], {}))
    assert {key for key in found[0] if found[0][key] != found[1][key]} == {"functions_sha256"}
    assert "functions_sha256" not in settings_of(config, [first], {})


def test_a_folder_that_cannot_be_written_stops(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingStopped, match="file/x cannot be written"):
        run(setup, tmp_path / "file" / "x")


def test_what_is_too_long_to_be_shown_is_counted(setup: Setup, tmp_path: Path) -> None:
    sampler, prompts, _, config = setup
    room = max(len(p.token_ids) for p in prompts) + 5 + 1
    short = CorrectionPrompts(sampler.chat, config.correction.model_copy(update={"max_prompt_tokens": room}))
    run((sampler, prompts, short, config), tmp_path)
    chains = [chain for r in read_records(tmp_path) for chain in r.chains]
    assert {"too long"} <= {chain.ended for chain in chains}
    assert all(set(chain.answers) == {None} for chain in chains if chain.ended == "truncated")


def test_foreign_names_stay_in_their_line(setup: Setup, tmp_path: Path) -> None:
    problems = [replace(p, problem=replace(p.problem, source=f"a|b\n\x1b[31m{i % 2}")) for i, p in enumerate(setup[1])]
    run((setup[0], problems, *setup[2:]), tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "\n## a\\|b \\x1b[31m0\n" in text
    assert "\x1b" not in text


def test_a_comparison_tells_sources_apart(setup: Setup, tmp_path: Path) -> None:
    problems = [replace(p, problem=replace(p.problem, source=f"s{i % 2}")) for i, p in enumerate(setup[1])]
    a, b = (tmp_path / name / "evaluations" / "step-1" for name in ("one", "two"))
    run((setup[0], problems, *setup[2:]), a)
    run((setup[0], problems[::-1], *setup[2:]), b)  # in another place, other samples
    found = compare(a, b)
    assert list(found.sources) == ["s0", "s1"]
    for source, differences in found.sources.items():
        of = [[r for r in read_records(folder) if r.source == source] for folder in (a, b)]
        alone = paired(*of)
        assert differences == alone.differences
    assert "\n## s1\n" in (b / "compared-with-one-step-1.md").read_text()


def test_a_comparison_is_written(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = tmp_path / "one" / "evaluations" / "step-1", tmp_path / "two" / "evaluations" / "step-2"
    run(setup, a)
    run((setup[0], setup[1][2:], *setup[2:]), b)
    found = compare(a, b)
    assert (found.problems, found.left_out) == (5, (2, 0))
    written = json.loads((b / "compared-with-one-step-1.json").read_text())
    assert written["differences"]["greedy"]["value"] == found.differences["greedy"].value
    assert written["sources"] == {}  # all are of one
    assert "2 only in the first" in (b / "compared-with-one-step-1.md").read_text()
