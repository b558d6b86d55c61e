"""The savings report: token counts by the formulas, and a run's own lengths."""

import pytest

from cipo_fast.packing import build_trees, row_tokens
from cipo_fast.plan import Options, _prompt_only, main, parse, synthetic


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
    for bad, message in [
        ("X=1", "expected key=value"),
        ("R=x", "expected a number"),
        ("R=0", "above 0"),
        ("F=9", "9 anchors"),
    ]:
        assert main([bad]) == 2
        assert message in capsys.readouterr().err
    assert main(["run=/no/such/run"]) == 2
    assert parse(["linear=700"]).linear == 700
