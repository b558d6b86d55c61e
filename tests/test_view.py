"""What a run shows: foreign text as it is, in every place, live and plain."""

import io
import re
import sys

import pytest

from cipo_fast.evaluation.figures import Figure
from cipo_fast.view import View, figures_table, step_line

FOREIGN = "a[/b]c [/usr/lib/x.py] [bold]x[/] :smile: \x1b[31mred\x1b[0m \u202e"
SHOWN = "a[/b]c [/usr/lib/x.py] [bold]x[/] :smile: \\x1b[31mred\\x1b[0m \\u202e"
METRICS = {
    "step": 1, "rollout/accuracy": 0.5, "replay/rho": None, "loss/total": 0.1, "grad/norm": 1.0, "tokens/forwarded": 1,
    "tokens/rows": 2, "time/step_s": 1.0,
    **{f"time/{p}_s": 0.1 for p in ("generate", "verify", "old_logp", "train", "sync", "probe", "idle")},
}  # fmt: skip


@pytest.mark.parametrize("mode", ["plain", "live"])
def test_foreign_text_is_shown_as_it_is(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "200")
    with View(mode, 3, FOREIGN, quiet=False) as view:
        view.say(f"said {FOREIGN}")
        view.note(f"noted {FOREIGN}")
        view.console.print(view._render())
        view.step(METRICS)
        view.busy(f"busy {FOREIGN}")
        view.console.print(view._render())
    printed = out.getvalue()
    for word in ("", "said ", "noted ", "busy "):
        assert word + SHOWN in printed, word
    assert "\x1b[31m" not in printed


@pytest.mark.parametrize(("steps", "every"), [(4, 0), (4, 1), (6, 2), (7, 3), (1, 1)])
def test_what_is_left_counts_evaluations(monkeypatch: pytest.MonkeyPatch, steps: int, every: int) -> None:
    """A step takes 1 s, an evaluation 10; one follows every `every`th step, and the last."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    view = View("plain", steps, "t", quiet=False, evaluate_every=every)
    view.evaluated("before training", {"t1": 0.25, "pass_at_8": 0.5}, 10.0)
    assert view.left_s() is None
    evaluated = {step for step in range(1, steps) if every and step % every == 0} | {steps}
    for step in range(1, steps + 1):
        view.step(METRICS | {"step": step})
        assert view.left_s() == steps - step + 10.0 * len([at for at in evaluated if at >= step])
        if step in evaluated:
            view.evaluated("", {"t1": 0.5, "pass_at_8": 0.75}, 10.0)
            assert view.left_s() == steps - step + 10.0 * len([at for at in evaluated if at > step])


def test_the_live_view_shows_evaluation_alarms_rates_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "160")
    view = View("plain", 4, "t", quiet=False)
    view.evaluated("at step 1", {"t1": 0.5, "pass_at_8": 0.75}, 10.0)
    more = {"alarm/copies": 1, "alarm/mismatch": 0, "tokens/sampled": 1000, "memory/peak_gb": 1.234}
    view.step(METRICS | more | {"time/generate_s": 0.5})
    out.seek(0)
    out.truncate()
    view.console.print(view._render())
    shown = out.getvalue()
    for text in ("at step 1: T=1 0.500, pass@8 0.750", "alarm: copies", "2,000", "1.23 GB", "left 0:00:13"):
        assert text in shown, text
    assert "mismatch" not in shown


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color_is_honoured(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    view = View("plain", 4, "t", quiet=False)
    view.step(METRICS | {"alarm/copies": 1})
    view.console.print(view._render())
    colours = re.findall(r"\x1b\[[0-9;]*m", out.getvalue())
    assert any(re.search(r"[\[;](3[0-8]|9[0-7])", code) for code in colours) != no_color


def test_a_plain_line_fits_160_columns_and_is_aligned() -> None:
    rates = dict.fromkeys(("correction/wrong_to_right", "correction/right_to_wrong", "correction/gap"), 0.5)
    usual = METRICS | rates | {"correction/retention": 0.5, "replay/rho": 0.3}
    large = {"step": 9999, "loss/total": -0.9, "time/step_s": 999.5, "time/train_s": 444.0, "correction/gap": -0.5}
    unknown = {"correction/right_to_wrong": None, "correction/gap": None, "replay/rho": None}
    rare = {"verify/timeout": 0.01, "verify/failed": 3, "train/skipped": 1, "alarm/copies": 1, "alarm/mismatch": 1}
    plain = step_line(usual, 9999)
    for other in (large, unknown, rare, large | rare):
        line = step_line(usual | other, 9999)
        assert len(line) <= 160
        for column in ("accuracy", "right>wrong", "gap", "rho", "loss", "(generate", "train"):
            assert line.index(column) == plain.index(column), column
    assert plain.endswith(")")
    assert step_line(usual | {"alarm/copies": 1}, 9999) == f"{plain}  copies"
    assert step_line(usual | {"train/skipped": 1}, 9999) == f"{plain}  skipped 1"
    assert step_line(usual | large | rare, 9999).endswith("…")


def test_a_table_takes_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    view = View("plain", 1, "t", quiet=False)
    view.console.print(figures_table({"x": Figure(0.5, None, None, 3)}, FOREIGN))
    assert SHOWN in " ".join(out.getvalue().split())


def test_an_ascii_terminal_gets_a_substitute(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    monkeypatch.setattr(sys, "stdout", out)
    with View("plain", 1, "title · é 😀", quiet=False) as view:
        view.step(METRICS)
        view.console.print(view._render())
    out.flush()
    assert b"title ? ? ?" in out.buffer.getvalue()
