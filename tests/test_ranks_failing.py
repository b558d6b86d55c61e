"""A failure on one rank of two, in every phase, with real processes: all stop within seconds, and say why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROGRAM = Path(__file__).with_name("ranks_failing.py")
# phase:how -> rank that fails, checkpoint that is saved
AGREED = {
    "build:RuntimeError": (1, None),
    "evaluate:OSError": (1, None),  # before the first step there is nothing to save
    "sample:RuntimeError": (1, 0),
    "verify:RuntimeError": (1, 0),
    "sync:RuntimeError": (1, 1),
    "probe:RuntimeError": (1, 1),
    "open:OSError": (0, None),
    "record:OSError": (0, 1),
    "state:OSError": (0, None),
    "checkpoint:OSError": (1, None),
    "export:OSError": (0, 1),
}
ALONE = ("update:RuntimeError", "gather:RuntimeError")  # in the middle of collectives: it leaves, and is missed
DEAD = ("update:kill", "sample:kill")
SILENT = ("sample:hang",)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, warm: Path) -> dict[str, dict]:
    """What became of the ranks, in all cases. One that outlives the other by 20 seconds counts as hanging."""
    cases = [*AGREED, *ALONE, *DEAD]
    settings = [*SMALL, "train.steps=1", "eval.problems=4"]
    done = ranks(tmp_path_factory.mktemp("ranks"), warm, cases, settings)
    return done | ranks(tmp_path_factory.mktemp("silent"), warm, [*SILENT], [*settings, "run.rank_timeout_s=5"])


def ranks(folder: Path, warm: Path, cases: list[str], settings: list[str]) -> dict[str, dict]:
    (folder / "warm_start").symlink_to(warm / "warm_start")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), *cases, "--", *settings],
        stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(done.stdout)


def last_line(errors: str) -> str:
    return errors.strip().splitlines()[-1]


@pytest.mark.parametrize("case", AGREED)
def test_an_exception_of_one_rank_stops_all_and_is_told_once(ended: dict[str, dict], case: str) -> None:
    rank, saved = AGREED[case]
    found = ended[case]
    assert found["codes"] == [1, 1]
    (line,) = (line for errors in found["errors"] for line in errors.splitlines() if line.startswith("stopped: "))
    assert "put in by the test" in line
    if rank == 1 and case != "checkpoint:OSError":  # what the first rank alone writes names the folder
        assert f"rank 1: {case.partition(':')[2]}: put in by the test" in line
    assert "Traceback" not in found["errors"][1 - rank]  # one line is all that the others know
    assert found["checkpoints"] == ([] if saved is None else [f"step-{saved}"])


@pytest.mark.parametrize("case", ALONE)
def test_an_exception_between_collectives_ends_that_rank_and_is_noticed(ended: dict[str, dict], case: str) -> None:
    codes, (other, failing) = ended[case]["codes"], ended[case]["errors"]
    assert codes == [1, 1]
    assert "RuntimeError: put in by the test" in failing
    assert last_line(other).startswith("stopped: another rank has ended")


@pytest.mark.parametrize("case", DEAD)
def test_a_killed_rank_is_noticed(ended: dict[str, dict], case: str) -> None:
    assert ended[case]["codes"] == [1, -9]
    assert last_line(ended[case]["errors"][0]).startswith("stopped: another rank has ended")


def test_a_silent_rank_costs_the_time_out(ended: dict[str, dict]) -> None:
    codes, errors = ended[SILENT[0]]["codes"], ended[SILENT[0]]["errors"]
    assert codes == [1, None]  # the silent one itself: torchrun kills it, and here the test does
    assert "did not answer for 5 s (run.rank_timeout_s)" in last_line(errors[0])
