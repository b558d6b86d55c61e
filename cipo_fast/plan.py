"""What sharing saves: tokens, FLOPs and predicted learner time of rows, prompt-only sharing and trees.

    python -m cipo_fast.plan [B=1] [P=512] [G=8] [R=2048] [F=4] [K=4] [I=64] [C=2048]     a step of those lengths
    python -m cipo_fast.plan run=runs/embedded                                            as a run recorded them

B prompts of P tokens, each with G rollouts of R tokens, and F anchors with a follow-up turn of I tokens and K
corrections of C tokens each.
`params`, `layers`, `width` (query heads x head_dim) and `head` (vocabulary x hidden) give the model, Qwen3-4B unless
given. Trees are cut and packed as the learner does it, into packs of `pack_tokens` tokens for `ranks` devices.
`linear`, `attention` (of trees) and `rows` (the fastest attention of rows) are a device's rates in TFLOP/s, this one's
unless given (kernels/device_rates.json). Times are predictions from those rates, not measurements: a pack takes its
FLOPs over their rates, and a step the slowest rank's pack, then its next. Below the table: up to which length of all
answers (R and C) trees pay, packs aside.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from cipo_kernels import device_rates
from pydantic import BaseModel, Field, ValidationError
from rich.table import Table

from cipo_fast.config.settings import expand
from cipo_fast.errors import UserError, command, put
from cipo_fast.packing import CostModel, Node, build_trees, pack_trees
from cipo_fast.records import Conversation, Segment
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
    attention: float = field(default_factory=lambda: device_rates().attention_rate)  # ... of the attention of trees
    rows: float = field(default_factory=lambda: device_rates().rows_rate)  # ... of rows


# Of a step: half a minute and a gigabyte to lay out.
MOST_CONVERSATIONS = 16_000
MOST_TOKENS = 100_000_000  # as rows
MOST_RANKS = 16_384
LONGEST_ANSWER = 131_072  # of those for which trees are compared with rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit code 2 for bad input, with one line."""
    return command(lambda: run(sys.argv[1:] if argv is None else argv))


def run(args: Sequence[str]) -> None:
    if {"-h", "--help"} & set(args):
        put((__doc__ or "").strip())
        return
    options = parse(args)
    batch = recorded(Path(expand(options.run, "run"))) if options.run else synthetic(options)
    Terminal().print(report(batch, options))
    if not options.run:
        put(where_trees_pay(options))


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
        if key != "run" and not 0 < values[key] <= 1e18:  # type: ignore[operator]
            raise UserError(f"argument {arg!r}: expected a number above 0, at most 1e18")
    options = Options(**values)  # type: ignore[arg-type]
    if options.F > options.G:
        raise UserError(f"F={options.F} anchors of G={options.G} rollouts: every anchor is a rollout")
    _refuse_too_large(options)
    return options


def _refuse_too_large(o: Options) -> None:
    rows = o.B * (o.G * (o.P + o.R) + o.F * o.K * (o.P + o.R + o.I + o.C))
    conversations = o.B * (o.G + o.F * o.K)
    if rows > MOST_TOKENS or conversations > MOST_CONVERSATIONS:
        raise UserError(
            f"{conversations:,} conversations, {rows:,} tokens as rows: planned for at most {MOST_CONVERSATIONS:,} and "
            f"{MOST_TOKENS:,}; a smaller B says as much"
        )
    if o.ranks > MOST_RANKS:
        raise UserError(f"ranks={o.ranks}: planned for at most {MOST_RANKS:,}")


def synthetic(o: Options) -> list[Conversation]:
    """B prompts' rollouts and corrections."""
    found = []
    for _ in range(o.B):
        attempts = [_segment(o.R) for _ in range(o.G)]
        found += _conversations(_segment(o.P), attempts, [(i, _segment(o.I), [o.C] * o.K) for i in range(o.F)])
    return found


def recorded(run_dir: Path) -> list[Conversation]:
    """The conversations of a run's last recorded step. Raises UserError where that is not what a run writes."""
    try:
        files = sorted((run_dir / "rollouts").glob("step-*.jsonl"))
        content = files[-1].read_bytes() if files else b""
    except OSError as error:
        raise UserError(f"run={run_dir}: cannot be read: {error.strerror}") from None
    if not files:
        raise UserError(f"run={run_dir}: no rollouts in it (run.save_rollouts_every=0?)")
    groups: dict[str, list[Row]] = {}
    for row in _rows(files[-1], content):
        groups.setdefault(row.problem, []).append(row)
    found: list[Conversation] = []
    for rows in groups.values():
        if any(row.hint is not None for row in rows):
            raise UserError(f"run={run_dir}: some of its rollouts saw a hint (nudge.hints); it plans no such trees")
        anchors = []
        for i, row in enumerate(rows):
            if row.corrections:
                glue = row.corrections[0].prompt_tokens - row.prompt_tokens - row.tokens
                if glue < 1:
                    raise UserError(f"run={run_dir}: its corrections quote the attempt (correction.layout=quoted)")
                anchors.append((i, _segment(glue), [c.tokens for c in row.corrections]))
        attempts = [_segment(row.tokens) for row in rows]
        found += _conversations(_segment(rows[0].prompt_tokens), attempts, anchors)
    return found


class Lengths(BaseModel):
    """Of an answer, in tokens."""

    prompt_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)]
    tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)]


class Row(Lengths):
    """What is read of a rollout's line."""

    problem: str
    hint: int | None = None
    corrections: list[Lengths] | None


def _rows(file: Path, content: bytes) -> list[Row]:
    rows = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line:
            continue
        try:
            rows.append(Row.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            key = "".join(f"{part}: " for part in first["loc"])
            raise UserError(
                f"{file}:{number}: not a rollout as a run writes it ({key}{first['msg']}); was the run killed there? "
                "Remove the file: the step before it is taken then"
            ) from None
    if not rows:
        raise UserError(f"{file}: empty; remove it: the step before it is taken then")
    return rows


def report(batch: list[Conversation], o: Options) -> Table:
    """Rows, prompt-only sharing and trees, side by side. Raises UserError where a conversation is above pack_tokens."""
    flops = CostModel(6 * o.params, 14.0 * o.layers * o.width, 6 * o.head)
    attention = CostModel(0.0, flops.per_pair, 0.0)
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
        cost = _time(flops, o, o.rows if name == "rows" else o.attention)
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


def where_trees_pay(o: Options) -> str:
    """The longest answers, to 100 tokens, for which trees take no longer than rows: one line."""
    flops = CostModel(6 * o.params, 14.0 * o.layers * o.width, 0.0)  # both have the same targets
    as_trees, as_rows = _time(flops, o, o.attention), _time(flops, o, o.rows)

    def pay(answer: int) -> bool:
        follow_up = _node(o.I, [_node(answer)] * o.K)
        tree = _node(o.P, [_node(answer, [follow_up])] * o.F + [_node(answer)] * (o.G - o.F))
        rows = o.G * as_rows.of(_node(o.P + answer)) + o.F * o.K * as_rows.of(_node(o.P + 2 * answer + o.I))
        return as_trees.of(tree) <= rows

    rates = f"attention of trees at {o.attention:.0f} TFLOP/s, of rows at {o.rows:.0f}"
    if pay(LONGEST_ANSWER):
        return f"Trees pay for answers of any length up to {LONGEST_ANSWER:,} tokens: {rates}."
    low, high = 0, LONGEST_ANSWER // 100
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if pay(100 * middle) else (low, middle)
    return f"Trees pay for answers of up to about {100 * low:,} tokens: {rates}."


def _node(n: int, children: Sequence[Node] = ()) -> Node:
    return Node([0] * n, children=list(children))


def _time(flops: CostModel, o: Options, attention: float) -> CostModel:
    """In FLOPs of the linear layers, with the attention at a rate of its own."""
    return replace(flops, per_pair=flops.per_pair * o.linear / attention)


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
