"""What a run shows: foreign text as it is, in every place, live and plain."""

import io
import sys

import pytest

from cipo_fast.evaluation.figures import Figure
from cipo_fast.view import View, figures_table

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
