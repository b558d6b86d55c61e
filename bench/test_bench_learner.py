"""The learner's update on a CIPO batch of the embedded job: token trees against one row a conversation.

`pytest bench/ --benchmark-only -k learner`. Both see the same conversations in one process, in turn; their losses are
compared before anything is timed. The figure to read is `rows / tree` in extra_info.
"""

import statistics
import time

import numpy as np
import pytest

from cipo_fast.config import Config, OptimConfig, load_config
from cipo_fast.distributed import process_group
from cipo_fast.embedded.model import new_model
from cipo_fast.learner import Learner
from cipo_fast.packing import Pack, build_trees, make_pack, pack_trees
from cipo_fast.policy import ATTENTION, build_policy, cost_model
from cipo_fast.records import Conversation, Segment

ROUNDS = 15


def cipo_batch(config: Config, seed: int) -> list[Conversation]:
    """32 prompts of 16 tokens, 8 rollouts of 9; 32 anchors with 8 tokens of glue and 8 corrections of 9: the lengths of
    the embedded job once its answers have the right form."""
    rng = np.random.default_rng(seed)

    def tokens(n: int) -> Segment:
        return Segment(rng.integers(5, 261, size=n).tolist())

    def conversation(*segments: Segment) -> Conversation:
        stream = "rollout" if len(segments) == 2 else "correction"
        logps = [-1.0] * len(segments[-1].token_ids)
        return Conversation(segments, logps, stream, float(rng.normal()), 1 / 2304, 0.0)

    found = []
    for _ in range(config.rollout.prompts_per_step):
        prompt = tokens(16)
        attempts = [tokens(9) for _ in range(config.rollout.samples_per_prompt)]
        found += [conversation(prompt, attempt) for attempt in attempts]
        glue = tokens(8)
        found += [conversation(prompt, attempts[0], glue, tokens(9)) for _ in range(config.samples_per_anchor)]
    return found


def test_learner_trees_against_rows(benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config([], [])
    batch = cipo_batch(config, 0)
    with process_group() as mesh:
        model = new_model(config, ATTENTION)
        cost = cost_model(model.config, model.num_parameters())
        learner = Learner(build_policy(model, config, mesh), OptimConfig(lr=1e-30), 1)  # the weights stay as they are

        def packs(packing: str) -> list[Pack]:
            return [make_pack(members) for members in pack_trees(build_trees(batch, packing), 16384, cost)[0]]

        def update(packing: str) -> float:
            started = time.perf_counter()
            learner.update(packs(packing), 0)  # packing is part of the cost
            return time.perf_counter() - started

        losses = [learner.update(packs(packing), 0).loss for packing in ("tree", "rows")]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        seconds: dict[str, list[float]] = {"tree": [], "rows": []}
        for _ in range(ROUNDS):
            for packing in seconds:
                seconds[packing].append(update(packing))
        tree, rows = (statistics.median(seconds[packing]) for packing in ("tree", "rows"))
        sizes = {packing: sum(len(p.input_ids) for p in packs(packing)) for packing in seconds}
        benchmark.extra_info.update(tree_s=tree, rows_s=rows, ratio=rows / tree, tokens=sizes)
        with capsys.disabled():
            print(f"\nupdate: tree {tree:.3f} s, rows {rows:.3f} s, rows / tree {rows / tree:.2f} {sizes}")
        benchmark.pedantic(lambda: update("tree"), rounds=5)
    assert rows / tree >= 1.5
