"""The savings report: token counts by the formulas, and a run's own lengths."""

import json
from pathlib import Path

import pytest
from cipo_kernels import device_rates

from cipo_fast.packing import build_trees, row_tokens
from cipo_fast.plan import Options, _prompt_only, main, parse, recorded, report, synthetic, where_trees_pay


def rows_of(options: Options) -> dict[str, list[str]]:
    """The report's cells by packing."""
    columns = [list(column.cells) for column in report(synthetic(options), options).columns]
    return {name: cells for name, *cells in zip(*columns, strict=True)}


def test_tokens_follow_the_formulas() -> None:
    o = Options(P=512, G=8, R=1024, F=4, K=4, I=64, C=1024)
    batch = synthetic(o)
    assert row_tokens(batch) == o.G * (o.P + o.R) + o.F * o.K * (o.P + o.R + o.I + o.C)
    assert sum(t.num_tokens for t in build_trees(batch)) == o.P + o.G * o.R + o.F * (o.I + o.K * o.C)
    prompt_only = sum(t.num_tokens for t in build_trees(_prompt_only(batch)))
    assert prompt_only == o.P + o.G * o.R + o.F * o.K * (o.R + o.I + o.C)


def test_the_table_and_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["R=1024", "C=1024"]) == 0
    printed = capsys.readouterr().out
    assert "prompt shared" in printed
    assert "25,344" in printed  # 512 + 8 * 1024 + 4 * (64 + 4 * 1024)
    assert printed.splitlines()[-1] == where_trees_pay(parse(["R=1024", "C=1024"]))
    for bad, message in [
        ("X=1", "expected key=value"),
        ("R=x", "expected a number"),
        ("R=0", "above 0"),
        ("F=9", "9 anchors"),
        ("R=99999999", "tokens as rows"),
        ("B=100000", "2,400,000 conversations"),
        ("ranks=100000000", "at most 16,384"),
        ("B=1" + 400 * "0", "at most 1e18"),
        ("params=inf", "at most 1e18"),
    ]:
        assert main([bad]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for help_ in ("-h", "--help"):
        assert main([help_]) == 0
        assert "python -m cipo_fast.plan [B=1]" in capsys.readouterr().out
    assert main(["run=/no/such/run"]) == 2
    assert main(["pack_tokens=1000"]) == 2
    assert "cannot hold one conversation of 2560 tokens" in capsys.readouterr().err
    assert parse(["linear=700"]).linear == 700


def test_rates_are_this_devices_unless_given() -> None:
    assert parse([]).linear == device_rates().linear
    assert parse([]).attention == device_rates().attention_rate
    assert parse([]).rows == device_rates().rows_rate


def test_times_are_flops_over_rates() -> None:
    o = Options(P=512, G=2, R=1024, F=1, K=2, I=64, C=1024, linear=500.0, attention=200.0)
    tokens, targets = 512 + 2 * 1024 + 64 + 2 * 1024, 4 * 1024
    pairs = 512 * 513 // 2 + 2 * (1024 * 512 + 1024 * 1025 // 2)  # prompt, rollouts
    pairs += 64 * 1536 + 64 * 65 // 2 + 2 * (1024 * 1600 + 1024 * 1025 // 2)  # follow-up, corrections
    linear, attention = 6 * (tokens * o.params + targets * o.head), 14 * o.layers * o.width * pairs
    cells = rows_of(o)["trees"]
    assert cells[0] == f"{tokens:,}"
    assert cells[1] == f"{(linear + attention) / 1e15:.3g}"
    assert cells[2] == f"{attention / (linear + attention):.1%}"
    assert cells[4] == f"{linear / 500e12 + attention / 200e12:.3g} s"


def test_rows_have_a_rate_of_their_own() -> None:
    shape = dict(P=512, G=2, R=1024, F=1, K=2, I=64, C=1024, linear=500.0, attention=200.0)  # noqa: C408
    o = Options(**shape, rows=400.0)
    lengths = [512 + 1024] * 2 + [512 + 1024 + 64 + 1024] * 2
    linear = 6 * (sum(lengths) * o.params + 4 * 1024 * o.head)
    attention = 14 * o.layers * o.width * sum(n * (n + 1) // 2 for n in lengths)
    assert rows_of(o)["rows"][4] == f"{linear / 500e12 + attention / 400e12:.3g} s"
    for name in ("prompt shared", "trees"):
        assert rows_of(o)[name][4] == rows_of(Options(**shape, rows=800.0))[name][4]


@pytest.mark.parametrize("shape", [{}, {"G": 4, "F": 2, "K": 1, "P": 100}])
def test_where_trees_pay_is_where_the_table_turns(shape: dict[str, int]) -> None:
    """In one pack, where the table takes no notice of packs either."""
    rates = {"attention": 250.0, "rows": 550.0, "pack_tokens": 10**7}
    words = where_trees_pay(Options(**shape, **rates)).split()
    longest = int(words[words.index("about") + 1].replace(",", ""))
    for answer, trees_pay in ((longest - 500, True), (longest + 500, False)):
        rows = rows_of(Options(**shape, **rates, R=answer, C=answer))
        assert (seconds_of(rows["trees"]) <= seconds_of(rows["rows"])) == trees_pay


def test_trees_that_attend_as_fast_as_rows_always_pay() -> None:
    assert where_trees_pay(Options(attention=500.0, rows=500.0)).startswith("Trees pay for answers of any length")


def test_cut_trees_repeat_their_prompt_and_ranks_share_the_packs() -> None:
    shape = dict(B=4, P=500, G=8, R=1000, F=4, K=4, I=50, C=1000)  # noqa: C408
    whole, cut = rows_of(Options(**shape)), rows_of(Options(**shape, pack_tokens=8192))
    assert tokens_of(cut["trees"]) > tokens_of(whole["trees"])
    assert tokens_of(cut["rows"]) == tokens_of(whole["rows"])
    shared = rows_of(Options(**shape, pack_tokens=8192, ranks=4))
    for name, cells in shared.items():
        assert int(cells[3]) == -(-int(cut[name][3]) // 4)  # equally many packs a rank
        assert seconds_of(cells) < seconds_of(cut[name]) / 2


def tokens_of(cells: list[str]) -> int:
    return int(cells[0].replace(",", ""))


def seconds_of(cells: list[str]) -> float:
    return float(cells[4].removesuffix(" s"))


def test_lengths_of_a_run(tmp_path: Path) -> None:
    """The last recorded step: a problem with two rollouts of 30 and 40 tokens, the second corrected twice."""
    corrections = [{"prompt_tokens": 20 + 40 + 9, "tokens": n} for n in (11, 12)]
    rollouts = [
        {"problem": "a", "prompt_tokens": 20, "tokens": 30, "corrections": None},
        {"problem": "a", "prompt_tokens": 20, "tokens": 40, "corrections": corrections},
        {"problem": "b", "prompt": "a\u2028b\x85", "prompt_tokens": 5, "tokens": 6, "corrections": None},
    ]
    lines = [json.dumps(rollout, ensure_ascii=False) + "\n" for rollout in rollouts]  # as a run writes them
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step-00001.jsonl").write_text("{}\n")
    (tmp_path / "rollouts" / "step-00002.jsonl").write_text("".join(lines), encoding="utf-8")
    batch = recorded(tmp_path)
    assert [tree.num_tokens for tree in build_trees(batch)] == [20 + 30 + 40 + 9 + 11 + 12, 5 + 6]
    assert row_tokens(batch) == 50 + 60 + (69 + 11) + (69 + 12) + 11


ROW = b'{"problem": "a", "prompt_tokens": 20, "tokens": 30, "corrections": null}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ROW + ROW[:-20], "step-00002.jsonl:2: not a rollout"),  # killed while it wrote
        (ROW + b"\xff\xfe\n", "step-00002.jsonl:2: not a rollout"),
        (b"[]\n", "step-00002.jsonl:1: not a rollout"),
        (b'{"problem": "a"}\n', "prompt_tokens: Field required"),
        (ROW.replace(b"30", b'"x"'), "tokens: Input should be a valid integer"),
        (ROW.replace(b"30", b"0"), "tokens: Input should be greater"),
        (ROW.replace(b"null", b'[{"tokens": 3}]'), "corrections: 0: prompt_tokens: Field required"),
        (ROW + ROW.replace(b'"tokens"', b'"hint": 1, "tokens"'), "some of its rollouts saw a hint (nudge.hints)"),
        (b"", "step-00002.jsonl: empty"),
        (b"\n\n", "step-00002.jsonl: empty"),
    ],
)
def test_a_record_that_is_not_one_is_one_line(content: bytes, message: str, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "rollouts"
    folder.mkdir()
    (folder / "step-00001.jsonl").write_bytes(ROW)
    (folder / "step-00002.jsonl").write_bytes(content)
    assert main([f"run={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    (folder / "step-00002.jsonl").unlink()  # as it says
    assert main([f"run={tmp_path}"]) == 0
