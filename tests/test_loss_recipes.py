"""gspo, cispo, dual_clip and nfpo: each recipe trains; what they refuse, and what they caution against."""

from pathlib import Path

import pytest
from test_grpo_reference import batch
from test_train import metrics, run_dir, train

from cipo_fast.cipo.objective import conversations
from cipo_fast.config import cautions, load_config
from cipo_fast.errors import UserError


@pytest.mark.parametrize("recipe", ["gspo", "cispo", "dual_clip", "nfpo"])
def test_a_recipe_trains(recipe: str, tmp_path: Path, warm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_dir(tmp_path, warm)
    light = ["train.steps=1", "eval.problems=2", "checkpoint.export=false", "optim.lr=1e-3"]
    light += ["rollout.prompts_per_step=64", "rollout.samples_per_prompt=8"]  # one in fifty is right
    assert train(folder, f"{recipe}.yaml", *light) == 0
    [row] = metrics(folder)
    assert row["train/skipped"] == 0
    assert row["grad/norm"] > 0
    assert row["rollout/ratio_max"] > 1.001  # there is something to clip, or to weigh
    printed = capsys.readouterr()
    assert "ratios" not in printed.out + printed.err  # no caution


def test_in_gspo_every_sequence_weighs_the_same() -> None:
    """J = mean over i of min(s_i A_i, clip(s_i) A_i): nothing of it grows with an answer's length."""
    config = load_config(["gspo.yaml"], [])
    groups, _ = batch(config)
    found = conversations(groups, [], config, 1)
    lengths = [len(c.segments[-1].token_ids) for c in found]
    assert len(set(lengths)) > 1
    answers = sum(len(group.rollouts) for group in groups)
    assert [c.rl_weight * n for c, n in zip(found, lengths, strict=True)] == pytest.approx([1 / answers] * len(found))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["loss.clip=cispo", "loss.ratio=sequence"], "loss.clip=cispo holds the ratios of tokens"),
        (["loss.clip=cispo", "loss.dual_clip=3"], "loss.dual_clip bounds the loss of loss.clip=ppo"),
        (["loss.n_step=2", "loss.clip=cispo"], "loss.n_step multiplies the ratios of tokens"),
        (["loss.n_step=2", "loss.ratio=sequence"], "loss.n_step multiplies the ratios of tokens"),
    ],
)
def test_what_nobody_defined_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config([], settings)


UPDATES = "train.updates_per_step=4"
OVERLAP = ["rollout.engine=vllm_server", "rollout.server.start=true", "rollout.overlap=1"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], None),
        (["gspo.yaml"], None),
        (["loss.ratio=sequence", UPDATES], "loss.eps_low=0.2, loss.eps_high=0.28: that is a range for the ratios of"),
        (["loss.ratio=sequence", UPDATES, "loss.eps_high=4e-4"], "loss.eps_low=0.2, loss.eps_high=0.0004"),
        (["gspo.yaml", "train.updates_per_step=1"], "loss.ratio=sequence: with one update"),
        (["loss.n_step=4", UPDATES], None),
        (["loss.n_step=4"], "loss.n_step=4: with one update a batch all ratios are 1, and the loss is GRPO's"),
        (["loss.clip=cispo"], "loss.clip=cispo: with one update"),
        (["loss.dual_clip=3"], "loss.dual_clip=3.0: with one update"),
        (
            ["replay.rho_min=0.04"],
            "rho stays at replay.rho_min once it is there: 8 corrections of right anchors a step",
        ),
        (["correction.anchors_per_prompt=0.1"], "rho stays at replay.rho0: 8 corrections of right anchors a step"),
        (["correction.anchors_per_prompt=0.1", "replay.adaptive=false"], None),
        (["correction_start.yaml"], None),
        (["correction.start_steps=160"], "correction.start_steps=160: all of train.steps=160 are supervised"),
        (["ce.yaml", "right_weight.yaml"], "with correction.loss=ce there is none"),
        (["loss.n_step=4", *OVERLAP], None),
        (["loss.n_step=4", "loss.is_level=sequence", *OVERLAP], "loss.n_step=4: with one update a batch all ratios"),
    ],
)
def test_cautions(settings: list[str], said: str | None) -> None:
    files = [s for s in settings if s.endswith(".yaml")]
    lines = cautions(load_config(files, [s for s in settings if s not in files]))
    assert len(lines) == (said is not None)
    assert said is None or said in lines[0]


def test_a_caution_is_said_once_at_the_start(tmp_path: Path, warm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    light = ["train.steps=1", "eval.problems=2", "checkpoint.export=false"]
    assert train(run_dir(tmp_path, warm), "loss.ratio=sequence", *light) == 0
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("gspo.yaml") == 1
