"""What sharing saves: tokens, FLOPs and predicted learner time of rows, prompt-only sharing and trees.

    python -m cipo_fast.plan [B=1] [P=512] [G=8] [R=2048] [F=4] [K=4] [I=64] [C=2048]     a step of those lengths
    python -m cipo_fast.plan run=runs/embedded                                            as a run recorded them

B prompts of P tokens, each with G rollouts of R tokens, and F anchors with a follow-up turn of I tokens and K
corrections of C tokens each.
`params`, `layers`, `width` (query heads x head_dim) and `head` (vocabulary x hidden) give the model, Qwen3-4B unless
given. Trees are cut and packed as the learner does it, into packs of `pack_tokens` tokens for `ranks` devices. `linear`
and `attention` are a device's rates in TFLOP/s, this one's unless given (kernels/device_rates.json). Times are
predictions from those rates, not measurements: a pack takes its FLOPs over their rates, and a step the slowest rank's
pack, then its next.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cipo_kernels import device_rates
from rich.table import Table

from cipo_fast.errors import UserError, command
from cipo_fast.packing import CostModel, Node, build_trees, pack_trees
from cipo_fast.records import Conversation, Segment
from cipo_fast.settings import expand
from cipo_fast.view import Terminal


@dataclass(frozen=True)
class Options:
    B: int = 1
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
    pack_tokens: int = 65536
    ranks: int = 1
    linear: float = field(default_factory=lambda: device_rates().linear)  # TFLOP/s of the linear layers
    attention: float = field(default_factory=lambda: device_rates().attention_rate)  # ... of the attention


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit code 2 for bad input, with one line."""
    return command(lambda: run(sys.argv[1:] if argv is None else argv))


def run(args: Sequence[str]) -> None:
    options = parse(args)
    batch = recorded(Path(expand(options.run, "run"))) if options.run else synthetic(options)
    Terminal().print(report(batch, options))


def parse(args: Sequence[str]) -> Options:
    values: dict[str, int | float | str] = {}
    defaults = vars(Options())
    for arg in args:
        key, equals, text = arg.partition("=")
        default = defaults.get(key) if equals else None
        if default is None:
            known = ", ".join(defaults)
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
    """B prompts' rollouts and corrections."""
    found = []
    for _ in range(o.B):
        attempts = [_segment(o.R) for _ in range(o.G)]
        found += _conversations(_segment(o.P), attempts, [(i, _segment(o.I), [o.C] * o.K) for i in range(o.F)])
    return found


def recorded(run_dir: Path) -> list[Conversation]:
    """The conversations of a run's last recorded step."""
    files = sorted((run_dir / "rollouts").glob("step-*.jsonl"))
    if not files:
        raise UserError(f"run={run_dir}: no rollouts in it (run.save_rollouts_every=0?)")
    groups: dict[str, list[dict]] = {}
    for line in files[-1].read_text(encoding="utf-8").split("\n"):  # a text may hold what else ends a line
        if not line:
            continue
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


def report(batch: list[Conversation], o: Options) -> Table:
    """Rows, prompt-only sharing and trees, side by side. Raises UserError where a conversation is above pack_tokens."""
    flops = CostModel(6 * o.params, 14.0 * o.layers * o.width, 6 * o.head)
    attention = CostModel(0.0, flops.per_pair, 0.0)
    cost = replace(flops, per_pair=flops.per_pair * o.linear / o.attention)
    title = f"{len(batch)} conversations, forward and backward; packs of {o.pack_tokens:,} tokens on each of {o.ranks}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for column in ("tokens", "PFLOP", "attention", "packs", "predicted", "speed-up"):
        table.add_column(column, justify="right")
    packings = {
        "rows": build_trees(batch, "rows"),
        "prompt shared": build_trees(_prompt_only(batch)),
        "trees": build_trees(batch),
    }
    rows_seconds = 0.0
    for name, trees in packings.items():
        ranks = pack_trees(trees, o.pack_tokens, cost, o.ranks)
        pieces = [piece for packs in ranks for pack in packs for piece in pack]  # a piece of a cut tree has its prompt
        total = sum(map(flops.of, pieces))
        seconds = _slowest_rank(ranks, cost) / (o.linear * 1e12)
        rows_seconds = rows_seconds or seconds
        table.add_row(
            name,
            f"{sum(piece.num_tokens for piece in pieces):,}",
            f"{total / 1e15:.3g}",
            f"{sum(map(attention.of, pieces)) / total:.1%}",
            str(len(ranks[0])),
            f"{seconds:.3g} s",
            f"{rows_seconds / seconds:.2f}",
        )
    return table


def _slowest_rank(ranks: list[list[list[Node]]], cost: CostModel) -> float:
    """Cost of a step: FSDP keeps ranks in step, so all wait for the costliest of the packs they run at a time."""
    return sum(max(sum(map(cost.of, pack)) for pack in packs) for packs in zip(*ranks, strict=True))


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
