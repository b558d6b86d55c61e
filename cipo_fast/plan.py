"""What sharing saves: tokens, FLOPs and predicted learner time of rows, prompt-only sharing and trees.

    python -m cipo_fast.plan [P=512] [G=8] [R=2048] [F=4] [K=4] [I=64] [C=2048]     one prompt of those lengths
    python -m cipo_fast.plan run=runs/embedded                                      the lengths a run recorded

P prompt, G rollouts of R tokens, F anchors with a follow-up turn of I tokens and K corrections of C tokens each.
`params`, `layers`, `width` (query heads x head_dim) and `head` (vocabulary x hidden) give the model, Qwen3-4B unless
given; `linear` and `attention` are rates in TFLOP/s. Times are predictions from those rates, not measurements.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cipo_fast.errors import UserError
from cipo_fast.packing import CostModel, Node, build_trees
from cipo_fast.records import Conversation, Segment


@dataclass(frozen=True)
class Options:
    P: int = 512
    G: int = 8
    R: int = 2048
    F: int = 4
    K: int = 4
    I: int = 64  # noqa: E741
    C: int = 2048
    run: str = ""
    params: float = 3.63e9  # Qwen3-4B without its embedding
    layers: int = 36
    width: int = 32 * 128
    head: float = 151936 * 2560
    linear: float = 600.0  # TFLOP/s of the linear layers: assumed, between bare GEMMs (about 790) and what steps reach
    attention: float = 300.0  # TFLOP/s of attention, forward and backward: assumed


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit code 2 for bad input, with one line."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        batch = recorded(Path(options.run)) if options.run else synthetic(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console().print(report(batch, options))
    return 0


def parse(args: Sequence[str]) -> Options:
    values: dict[str, int | float | str] = {}
    for arg in args:
        key, equals, text = arg.partition("=")
        default = getattr(Options, key, None) if equals else None
        if default is None:
            known = ", ".join(Options.__dataclass_fields__)
            raise UserError(f"argument {arg!r}: expected key=value with one of {known}")
        try:
            values[key] = type(default)(text)
        except ValueError:
            raise UserError(f"argument {arg!r}: expected a number") from None
        if key != "run" and not float(values[key]) > 0:
            raise UserError(f"argument {arg!r}: expected a number above 0")
    options = Options(**values)  # type: ignore[arg-type]
    if options.F > options.G:
        raise UserError(f"F={options.F} anchors of G={options.G} rollouts: every anchor is a rollout")
    return options


def synthetic(o: Options) -> list[Conversation]:
    """One prompt's rollouts and corrections."""
    prompt = _segment(o.P)
    attempts = [_segment(o.R) for _ in range(o.G)]
    return _conversations(prompt, attempts, [(i, _segment(o.I), [o.C] * o.K) for i in range(o.F)])


def recorded(run_dir: Path) -> list[Conversation]:
    """The conversations of a run's last recorded step."""
    files = sorted((run_dir / "rollouts").glob("step-*.jsonl"))
    if not files:
        raise UserError(f"run={run_dir}: no rollouts in it (run.save_rollouts_every=0?)")
    groups: dict[str, list[dict]] = {}
    for line in files[-1].read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        groups.setdefault(record["problem"], []).append(record)
    found: list[Conversation] = []
    for records in groups.values():
        anchors = []
        for i, record in enumerate(records):
            corrections = record["corrections"] or []
            if corrections:
                glue = corrections[0]["prompt_tokens"] - record["prompt_tokens"] - record["tokens"]
                if glue < 1:
                    raise UserError(f"run={run_dir}: its corrections quote the attempt (correction.layout=quoted)")
                anchors.append((i, _segment(glue), [c["tokens"] for c in corrections]))
        attempts = [_segment(record["tokens"]) for record in records]
        found += _conversations(_segment(records[0]["prompt_tokens"]), attempts, anchors)
    return found


def report(batch: list[Conversation], options: Options) -> Table:
    """Rows, prompt-only sharing and trees, side by side."""
    cost = CostModel(6 * options.params, 14.0 * options.layers * options.width, 6 * options.head)
    table = Table(title=f"{len(batch)} conversations, forward and backward", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for column in ("tokens", "PFLOP", "attention", "predicted", "rows / this"):
        table.add_column(column, justify="right")
    packings = {
        "one row a conversation": build_trees(batch, "rows"),
        "prompt shared": build_trees(_prompt_only(batch)),
        "trees": build_trees(batch),
    }
    rows_seconds = 0.0
    for name, trees in packings.items():
        pairs = _attention(trees, cost)
        flops = sum(cost.of(tree) for tree in trees)
        seconds = (flops - pairs) / (options.linear * 1e12) + pairs / (options.attention * 1e12)
        rows_seconds = rows_seconds or seconds
        tokens = sum(tree.num_tokens for tree in trees)
        table.add_row(
            name,
            f"{tokens:,}",
            f"{flops / 1e15:.3g}",
            f"{pairs / flops:.1%}",
            f"{seconds:.3g} s",
            f"{rows_seconds / seconds:.2f}",
        )
    return table


def _attention(trees: Iterable[Node], cost: CostModel) -> float:
    pairs_only = CostModel(0.0, cost.per_pair, 0.0)
    return sum(pairs_only.of(tree) for tree in trees)


def _prompt_only(batch: list[Conversation]) -> list[Conversation]:
    """The same conversations with nothing shared below the prompt."""
    return [
        Conversation((c.segments[0], *(Segment(s.token_ids) for s in c.segments[1:])), None, c.stream, 0.0, 1.0, 0.0)
        for c in batch
    ]


def _conversations(
    prompt: Segment, attempts: list[Segment], anchors: list[tuple[int, Segment, list[int]]]
) -> list[Conversation]:
    found = [Conversation((prompt, attempt), None, "rollout", 0.0, 1.0, 0.0) for attempt in attempts]
    for i, glue, lengths in anchors:
        for n in lengths:
            found.append(Conversation((prompt, attempts[i], glue, _segment(n)), None, "correction", 0.0, 1.0, 0.0))
    return found


def _segment(n: int) -> Segment:
    return Segment([0] * n)


if __name__ == "__main__":
    sys.exit(main())
