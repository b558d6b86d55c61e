"""Three ranks against one process: the same loss and gradients, whatever each rank has; and what they tell each other.

Gradients are compared, not weights: AdamW gives the same weights for any factor between gradients, and so does
clipping to a norm.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients_on_ranks import CASES, gradients, model_of, packs_of_rank, settings, trees

from cipo_fast.packing import make_pack
from cipo_fast.policy import Policy, build_policy


@pytest.fixture(scope="module")
def on_three_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("gradients_on_ranks.py")
    done = subprocess.run(
        [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=3",
         str(script), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=250, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return {path.stem: torch.load(path, weights_only=False) for path in folder.glob("*.pt")}


def test_ranks_are_unequal() -> None:
    sizes = [[len(pack.target_id) for pack in packs_of_rank(rank)] for rank in range(3)]
    assert len({sum(packs) for packs in sizes}) == 3
    assert sizes[2][1] == 0


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("bfloat16")])
def test_gradients_add_up_over_ranks(case: str, on_three_ranks: dict[str, Any]) -> None:
    """Against a policy that is not sharded, on one pack of everything: loss weights hold the global normalisers, so
    ranks add up. An average would be a third."""
    update, found, _ = on_three_ranks[case]
    config = settings(case)
    expected, alone = gradients(Policy(model_of(case), config), config, [make_pack(trees())])
    assert update.loss == pytest.approx(expected.loss, rel=1e-5)
    assert update.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for stream, stats in expected.streams.items():
        assert update.streams[stream] == pytest.approx(stats, rel=1e-4, abs=1e-6)
    assert found.keys() == alone.keys()
    for name in alone:
        assert (found[name] - alone[name]).abs().max() <= 1e-5 * alone[name].abs().max(), name


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("bfloat16")])
def test_gradients_of_bfloat16_add_up_over_ranks(case: str, mesh, on_three_ranks: dict[str, Any]) -> None:
    """Ranks compute in bfloat16 and add up in float32, so only other packs, other roundings, make a difference."""
    update, found, _ = on_three_ranks[case]
    config = settings(case)
    expected, alone = gradients(build_policy(model_of(case), config, mesh), config, [make_pack(trees())])
    assert update.loss == pytest.approx(expected.loss, rel=1e-2)
    for name in alone:
        assert found[name].dtype == torch.float32
        assert (found[name] - alone[name]).norm() <= 2e-2 * alone[name].norm(), name


def test_a_head_of_its_own_is_gathered_and_reduced_beside_the_layers(on_three_ranks: dict[str, Any]) -> None:
    """Gathered before the last layer ends, reduced before the first layer's backward pass does; else with the root's,
    before the first layer and after the last gradient."""
    order = on_three_ranks["untied"][2]
    last, first = "layers.1", "layers.0"
    assert order.index("gather lm_head") < order.index(f"forward {last}")
    assert order.index("reduce lm_head") < order.index(f"reduce {last}") < order.index(f"reduce {first}")
    assert not any("lm_head" in event for event in on_three_ranks["float32"][2])


def test_one_ranks_error_is_everybodys_and_the_first_one_counts(on_three_ranks: dict[str, Any]) -> None:
    assert on_three_ranks["heard"] == [["RankFailure('rank 1: ValueError: of rank 1')", "none", list(range(8))]] * 3
