"""The command, end to end, on a smaller embedded model."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_on_ranks import generate_by_prompt
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cipo_fast.config import comparison, configs_dir, load_config
from cipo_fast.embedded.model import embedded_tokenizer, new_model
from cipo_fast.embedded.prepare import digest
from cipo_fast.errors import TrainingStopped
from cipo_fast.learner import Learner
from cipo_fast.policy import Policy
from cipo_fast.rollout import EngineFailure
from cipo_fast.rollout.local import LocalEngine
from cipo_fast.train import main

TRAIN_PY = Path(__file__).parents[1] / "cipo_fast" / "train.py"
# Small, and warm enough within a second or two that some answers are right.
SMALL = [
    "model.embedded.hidden=64", "model.embedded.mlp=96", "model.embedded.warm_accuracy=0.05", "data.task=add",
    "rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "rollout.max_tokens=6", "eval.problems=16",
    "eval.samples=2", "run.trackers=[]", "run.view=plain", "train.steps=2",
    "sync.probe_every=1",
]  # fmt: skip


def run_dir(tmp_path: Path, warm: Path, name: str = "run") -> Path:
    """A new run directory whose warm starts are kept in `warm`."""
    folder = tmp_path / name
    folder.mkdir()
    (folder / "warm_start").symlink_to(warm / "warm_start")
    return folder


def problems_of(folder: Path) -> list[str]:
    """The problems of the embedded task that a run of SMALL trained on, as settings."""
    prepared = folder / "warm_start" / digest(load_config([], SMALL))
    return [f"data.train={prepared / 'train.jsonl'}", f"data.eval={prepared / 'held_out.jsonl'}"]


def train(folder: Path, *args: str) -> int:
    return main([*SMALL, f"run.dir={folder}", *args])


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_equal_weights(a: Path, b: Path) -> None:
    wa, wb = weights(a), weights(b)
    assert wa.keys() == wb.keys()
    assert [name for name in wa if not torch.equal(wa[name], wb[name])] == []


# -------------------------------------------------------------------------------------------------- what a run leaves

KEYS = [
    "step",
    "seed",
    "rollout/accuracy",
    "correction/wrong_to_right",
    "correction/right_to_wrong",
    "correction/retention",
    "correction/gap",
    "replay/rho",
    "tokens/forwarded",
    "tokens/rows",
    "loss/total",
    "grad/norm",
    "sync/parity_max_abs",
    "time/generate_s",
    "time/verify_s",
    "time/old_logp_s",
    "time/train_s",
    "time/sync_s",
    "time/idle_s",
    "time/step_s",
    "anchors/right_wanted",
    "anchors/right",
    "anchors/wrong_wanted",
    "anchors/wrong",
    "anchors/dropped",
    "rollout/no_variance",
    "correction/no_variance",
    "correction/verbatim_copy",
    "rollout/length",
    "correction/length",
    "rollout/truncated",
    "correction/truncated",
    "rollout/entropy",
    "correction/entropy",
    "rollout/clip_fraction",
    "rollout/ratio_max",
    "rollout/approx_kl",
    "rollout/sampler_gap",
]


def test_a_run_leaves_what_it_promises(tmp_path: Path, warm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_dir(tmp_path, warm)
    assert train(folder, "train.steps=3", "checkpoint.every=2", "run.trackers=[tensorboard]", "eval.every=2") == 0
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [key for key in KEYS if key not in rows[0]] == []
    assert rows[0]["tokens/rows"] > rows[0]["tokens/forwarded"] > 0
    assert all(row["sync/parity_max_abs"] < 1e-4 for row in rows)  # trainer and engine are the same policy, each step
    ratios = [row["rollout/ratio_max"] for row in rows if row["rollout/no_variance"] < 1]
    assert ratios == [1.0] * len(ratios) != []  # one update a batch
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["before"].keys() >= {"greedy", "t1", "pass_at_2"}
    assert summary["after"].keys() >= {
        "greedy",
        "t1",
        "pass_at_2",
        "wrong_to_right",
        "right_to_wrong",
        "correction_gap",
        "after_check_1",
    }
    evaluations = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    spent = {key: evaluations[-1][key] for key in ("tokens/sampled", "flops/total", "seconds")}
    assert evaluations[-1] == {"step": 3, **spent, **{f"eval/{key}": v for key, v in summary["after"].items()}}
    assert spent["tokens/sampled"] == sum(row["tokens/sampled"] for row in rows) > 0
    assert spent["flops/total"] == pytest.approx(sum(row["flops/sample"] + row["flops/train"] for row in rows))
    assert summary["steps"] == 3
    assert 0 < summary["tokens_saved"] < 1
    assert summary["config"]["train"]["steps"] == 3
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"step-2", "step-3"}
    assert list((folder / "tensorboard").iterdir())
    rollouts = [json.loads(line) for line in (folder / "rollouts" / "step-00001.jsonl").read_text().splitlines()]
    assert len(rollouts) == 8 * 4
    corrected = [r for r in rollouts if r["corrections"]]
    assert len(corrected) == 8
    assert all(len(r["corrections"]) == 4 for r in corrected)
    printed = capsys.readouterr().out
    assert "step    3/3" in printed
    assert "accuracy, T=1" in printed
    exported = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert exported.num_parameters() > 0
    assert AutoTokenizer.from_pretrained(folder / "model").chat_template


EMBEDDED_RECIPES = sorted(
    p.name
    for p in configs_dir().glob("*.yaml")
    if "path:" not in p.read_text() and "nudge" not in p.name  # wants rows with hints: test_nudge_run.py
)


@pytest.mark.parametrize("name", EMBEDDED_RECIPES)
def test_every_recipe_of_the_embedded_model_runs(name: str, tmp_path: Path, warm: Path) -> None:
    folder = run_dir(tmp_path, warm)
    assert train(folder, str(configs_dir() / name), "train.steps=2") == 0
    rows = metrics(folder)
    assert len(rows) == 2
    assert (rows[0]["anchors/right"] + rows[0]["anchors/wrong"] > 0) == ("grpo" not in name)


@pytest.mark.parametrize(
    "override",
    [
        "train.packing=rows", "train.updates_per_step=3", "loss.beta=0.1", "loss.entropy_coef=0.01",
        "loss.ratio=sequence",
        "loss.normalize=sequences", "loss.scale_advantages=false", "correction.risk_norm=pooled",
        "correction.risk_norm=literal", "correction.preference=soft", "model.activation_checkpointing=true",
        "train.pack_tokens=140", "loss.is_cap=null", "optim.schedule=cosine", "rollout.temperature=0.8",
        "model.attention=flash",
    ],
)  # fmt: skip
def test_every_switch_runs(override: str, tmp_path: Path, warm: Path) -> None:
    folder = run_dir(tmp_path, warm)
    assert train(folder, override) == 0
    rows = metrics(folder)
    assert all(row["train/skipped"] == 0 for row in rows)
    if override == "train.updates_per_step=3":
        assert rows[-1]["rollout/ratio_max"] > 1.0  # old log-probs are from before the step's first update
    if override == "train.packing=rows":
        assert rows[0]["tokens/saved"] == 0.0


def test_rows_and_small_packs_train_to_the_same(tmp_path: Path, warm: Path) -> None:
    """The control, and packs so small that trees are split: the same losses as the default, up to rounding."""
    found = []
    for i, args in enumerate([[], ["train.packing=rows"], ["train.pack_tokens=140"]]):
        folder = run_dir(tmp_path, warm, str(i))
        assert train(folder, "loss.entropy_coef=0.01", *args) == 0
        found.append(metrics(folder))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert b["loss/total"] == pytest.approx(a["loss/total"], abs=1e-6)
            assert b["grad/norm"] == pytest.approx(a["grad/norm"], rel=1e-4)
            assert b["rollout/accuracy"] == a["rollout/accuracy"]


def test_lambda_corr_0_is_grpo_bit_for_bit(tmp_path: Path, warm: Path) -> None:
    """No correction is sampled, and no setting of the correction stream or of replay leaves a trace."""
    settings = ["correction.loss=both", "correction.risk_norm=pooled", "correction.preference=soft", "replay.rho0=0.7"]
    a, b = run_dir(tmp_path, warm, "a"), run_dir(tmp_path, warm, "b")
    assert train(a, "configs/grpo.yaml") == 0
    assert train(b, "correction.lambda_corr=0", *settings) == 0
    assert_equal_weights(a, b)
    same = [{k: v for k, v in row.items() if k != "replay/rho"} for row in timeless(metrics(a))]
    assert same == [{k: v for k, v in row.items() if k != "replay/rho"} for row in timeless(metrics(b))]
    assert all(row["correction/length"] is None for row in same)


# ------------------------------------------------------------------------------------------------------------- resume


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, warm: Path) -> None:
    """10 steps straight, against 5, a SIGKILL somewhere after them, and the rest."""
    args = ["train.steps=10", "checkpoint.every=5", "run.trackers=[tensorboard]"]
    straight, killed = run_dir(tmp_path, warm, "straight"), run_dir(tmp_path, warm, "killed")
    assert run_command(straight, *args).returncode == 0
    with subprocess.Popen(
        command(killed, *args, "train.steps=1000000", "checkpoint.every=5"),
        stdout=subprocess.DEVNULL,
        env=environment(),
    ) as process:
        wait_for_lines(killed / "metrics.jsonl", 7, process)
        process.send_signal(signal.SIGKILL)
    for later in (killed / "checkpoints").glob("step-*"):  # had it been slow to die, it has gone on
        assert int(later.name[5:].removesuffix(".part")) in (5, 10)
        if later.name != "step-5":
            subprocess.run(["rm", "-r", str(later)], check=True)
    assert run_command(killed, *args, "checkpoint.resume=true").returncode == 0
    assert_equal_weights(straight, killed)
    assert timeless(metrics(straight)) == timeless(metrics(killed))
    before = [json.loads((f / "summary.json").read_text()) for f in (straight, killed)]
    assert before[0]["before"] == before[1]["before"]
    assert before[0]["after"] == before[1]["after"]
    assert sorted(p.name for p in (straight / "rollouts").iterdir()) == sorted(
        p.name for p in (killed / "rollouts").iterdir()
    )


def test_resume_continues_the_controller_the_learning_rate_and_the_reference(tmp_path: Path, warm: Path) -> None:
    args = ["loss.beta=0.1", "optim.schedule=linear", "replay.n_min=1", "train.updates_per_step=2", "train.steps=4"]
    straight, resumed = run_dir(tmp_path, warm, "straight"), run_dir(tmp_path, warm, "resumed")
    assert train(straight, *args) == 0
    assert train(resumed, *args, "checkpoint.every=2", "checkpoint.keep=9") == 0
    subprocess.run(["rm", "-r", str(resumed / "checkpoints" / "step-4")], check=True)
    assert train(resumed, *args, "checkpoint.every=2", "checkpoint.resume=true") == 0
    assert_equal_weights(straight, resumed)
    assert timeless(metrics(straight)) == timeless(metrics(resumed))


def test_a_second_run_loses_nothing_of_the_first(tmp_path: Path, warm: Path) -> None:
    folder = run_dir(tmp_path, warm)
    assert train(folder, "seed=1", "train.steps=1") == 0
    first = (folder / "metrics.jsonl").read_text()
    assert train(folder, "seed=1", "train.steps=1") == 0
    aside = list((folder / "previous").iterdir())
    assert len(aside) == 1
    assert (aside[0] / "metrics.jsonl").read_text() == first
    assert timeless(metrics(aside[0])) == timeless(metrics(folder))


# --------------------------------------------------------------------------------------------------------- non-finite


def poison(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """The loss of the given forward passes (counted over training packs) is multiplied by nan."""
    inner, counter = Policy.forward, [0]

    def forward(self: Policy, pack, what: str = "loss", temperature: float | None = None):
        output = inner(self, pack, what, temperature)
        if what == "loss" and (pack.rl_weight != 0).any():
            counter[0] += 1
            if counter[0] in calls:
                return output._replace(loss=output.loss * float("nan"))
        return output

    monkeypatch.setattr(Policy, "forward", forward)


def test_a_non_finite_step_is_skipped_and_counted(tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, clean = run_dir(tmp_path, warm), run_dir(tmp_path, warm, "clean")
    assert train(clean, "train.steps=1") == 0
    poison(monkeypatch, {2, 3})  # step 2, and the search for its bad pack
    assert train(folder, "train.steps=3") == 0
    rows = metrics(folder)
    assert [row["train/skipped"] for row in rows] == [0, 1, 0]
    assert rows[1]["loss/total"] is None
    assert json.loads((folder / "summary.json").read_text())["skipped"] == 1
    saved = torch.load(folder / "failed" / "step-2-rank-0.pt", weights_only=False)
    assert len(saved.input_ids) == rows[1]["tokens/forwarded"]


def test_three_non_finite_steps_in_a_row_stop_the_run(
    tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, clean = run_dir(tmp_path, warm), run_dir(tmp_path, warm, "clean")
    assert train(clean, "train.steps=1") == 0
    poison(monkeypatch, set(range(2, 100)))
    assert train(folder, "train.steps=9") == 1
    error = capsys.readouterr().err
    assert error.startswith("stopped: 3 updates in a row were not finite")
    assert error.count("\n") == 1
    assert len(metrics(folder)) == 4
    assert len(list((folder / "failed").iterdir())) == 3
    monkeypatch.undo()
    # The checkpoint holds the weights from before: going on from it is the clean run's policy.
    assert train(folder, "train.steps=4", "checkpoint.resume=true") == 0
    assert_equal_weights(folder, clean)


def test_weights_that_blew_up_stop_the_run_with_a_sentence(
    tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, update = run_dir(tmp_path, warm), Learner.update

    def blow_up(self: Learner, packs, step: int):
        done = update(self, packs, step)
        if packs[0].rl_weight.any():  # not the warm start's
            for parameter in self.policy.parameters():
                parameter.data.mul_(float("nan"))
        return done

    monkeypatch.setattr(Learner, "update", blow_up)
    assert train(folder, "train.steps=3") == 1
    assert "stopped: policy version 1 gives probabilities that are not finite" in capsys.readouterr().err


@pytest.mark.parametrize("lost_in", ["generate", "sync"])
def test_an_engine_that_cannot_be_had_back_stops_the_run_with_a_checkpoint(
    lost_in: str, tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In step 3, while it samples or after the update: nothing is lost, and nothing is trained twice."""
    folder, clean = run_dir(tmp_path, warm), run_dir(tmp_path, warm, "clean")
    assert train(clean, "train.steps=4") == 0
    inner = getattr(LocalEngine, lost_in)

    def lost(self: LocalEngine, *args):
        # Step 3 samples with version 2, and its sync brings version 3.
        if armed and (self.policy_version == 2 if lost_in == "generate" else args[1] == 3):
            raise EngineFailure("gone")
        return inner(self, *args)

    def no_more(self: LocalEngine) -> None:
        raise TrainingStopped("the engine did not come back")

    armed = [True]
    monkeypatch.setattr(LocalEngine, lost_in, lost)
    monkeypatch.setattr(LocalEngine, "restart", no_more)
    assert train(folder, "train.steps=4", "checkpoint.every=0") == 1
    assert "stopped: the engine did not come back; saved as " in capsys.readouterr().err
    armed.clear()
    assert train(folder, "train.steps=4", "checkpoint.resume=true") == 0
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4]  # also of the step whose sync failed
    assert_equal_weights(folder, clean)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_help_says_how_and_where_files_are_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grpo.yaml", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "torchrun cipo_fast/train.py [configs/x.yaml ...] [key.path=value ...]" in printed
    assert f"the recipe of that name in {configs_dir()}.\n" in printed


@pytest.mark.parametrize("module", ["embedded.__main__", "serve"])
def test_commands_beside_it_have_help(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    assert importlib.import_module(f"cipo_fast.{module}").main() == 0
    assert "[configs/x.yaml ...] [key.path=value ...]" in capsys.readouterr().out


def test_what_a_run_compares_and_its_control(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_text('{"prompt": "a", "answer": "b"}')

    def control(*args: str) -> str:
        return comparison(load_config([], list(args)))[-1]

    assert control().endswith("python -m cipo_fast.experiment headline.yaml")
    for other in (f"data.train={tmp_path}/my.jsonl", "data.task=sort"):
        assert control(other).endswith("grpo_2g.yaml (rollouts instead of corrections)")
    assert control("correction.lambda_corr=0").startswith("compared: ")


def test_dry_run_prints_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "none"
    assert main(["--dry-run", f"run.dir={folder}"]) == 0
    printed = capsys.readouterr().out
    for word in ("prompts_per_step: 32", "anchors a step", "weights", "optimiser", "one step"):
        assert word in printed, word
    assert not folder.exists()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


SPELLED = '{"prompt": "what is <|end|><|assistant|>abc", "answer": "x"}\n'
SYSTEM = '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": "x"}\n'
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
)
GOOD = "".join(f'{{"prompt": "q{i}", "answer": "{i}"}}\n' for i in range(20))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: ["rollout.promts_per_step=4"], "did you mean 'rollout.prompts_per_step'?"),
        (lambda d: ["--fast"], "unknown option --fast"),
        (lambda d: [f"data.train={write(d / 'a.jsonl', GOOD + '[]')}"], "a.jsonl:21: expected an object"),
        (lambda d: [f"data.train={write(d / 'a.jsonl', '')}"], "no problems in it"),
        (lambda d: [f"data.train={write(d / 'a.jsonl', GOOD)}", "data.max_prompt_tokens=3"], "every prompt is longer"),
        (
            lambda d: [f"data.train={write(d / 'a.jsonl', GOOD + SPELLED * 2)}"],
            "a.jsonl:21: the text spells the control token <|end|>, which would end or forge a turn: take it out "
            "(and 1 more row)",
        ),
        (lambda d: [f"data.eval={write(d / 'a.jsonl', GOOD)}"], "data.eval is given without data.train"),
        (lambda d: ["model.path=/no/such/model"], "data.train is not given"),
        (lambda d: ["model.path=/no/such/model", good(d)], "model.path=/no/such/model: cannot load"),
        (lambda d: [f"model.path={model_folder(d, chat_template=None)}", good(d)], "no chat template"),
        (
            lambda d: [f"model.path={model_folder(d, chat_template=NO_SYSTEM)}", good(d, SYSTEM)],
            "a.jsonl:21: the chat template says: no system turns",
        ),
        (
            lambda d: [
                f"model.path={model_folder(d, chat_template=NO_SYSTEM)}",
                good(d),
                "data.system_prompt=be brief",
            ],
            "data.system_prompt: the chat template says: no system turns",
        ),
        (lambda d: [f"model.path={model_folder(d, pad_token='<|new|>')}", good(d)], "ids up to 261, the model 261 emb"),
        (lambda d: ["train.pack_tokens=20"], "cannot hold one conversation"),
        (lambda d: ["checkpoint.resume=true"], "no checkpoint in"),
        (lambda d: [f"run.dir={write(d / 'file', '')}"], "is a file; name a folder"),
        (lambda d: ["rollout.max_tokens=1"], "every answer is longer than rollout.max_tokens=1"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(make, message: str, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "never"
    args = make(tmp_path)
    capsys.readouterr()  # what making them printed
    assert main([*SMALL, f"run.dir={folder}", *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not folder.exists()


def good(folder: Path, more: str = "") -> str:
    return f"data.train={write(folder / 'a.jsonl', GOOD + more)}"


def model_folder(folder: Path, **of_tokenizer: str | None) -> Path:
    new_model(load_config([], ["model.embedded.hidden=32"]), "sdpa").save_pretrained(folder / "model")
    tokenizer = embedded_tokenizer()
    for name, value in of_tokenizer.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def test_what_is_dropped_or_cannot_be_right_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = '{"prompt": "' + "x" * 99 + '", "answer": "1"}\n{"prompt": "q", "answer": 1234567.0}\n'
    path = write(tmp_path / "a.jsonl", GOOD + more)
    args = [
        f"data.train={path}",
        "data.max_prompt_tokens=10",
        "model.embedded.warm_accuracy=0",
        "rollout.prompts_per_step=4",
    ]
    assert main([*SMALL, *args, f"run.dir={tmp_path / 'r'}", "seed=2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of 20 prompts dropped" in printed
    assert "data.train: 1 of 19 answers are longer than rollout.max_tokens=6" in printed
    assert "in 1 of 22 rows the answer is a number with a fraction" in printed
    assert "an answer ends with <|end|> (1)" in printed
    recorded = load_config([str(tmp_path / "r" / "config.yaml")], [])
    assert recorded.data.date is not None  # the day it started, also for whoever starts it again


def test_an_exported_model_trains_through_model_path(tmp_path: Path, warm: Path) -> None:
    """Any folder with a chat template goes through the same code."""
    first = run_dir(tmp_path, warm)
    assert train(first, "train.steps=1") == 0
    args = [f"model.path={first / 'model'}", "optim.lr=1e-4", "data.max_prompt_tokens=64", "correction.followup=check",
            "correction.max_prompt_tokens=128", "eval.max_tokens=6", *problems_of(first)]  # fmt: skip
    assert train(tmp_path / "second", *args) == 0
    assert len(metrics(tmp_path / "second")) == 2


# ------------------------------------------------------------------------------------------------- processes of its own


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def command(folder: Path, *args: str) -> list[str]:
    return [sys.executable, str(TRAIN_PY), *SMALL, f"run.dir={folder}", *args]


def run_command(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *args), env=environment(), timeout=250, capture_output=True, text=True)


def wait_for_lines(path: Path, n: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while not path.exists() or path.read_bytes().count(b"\n") < n:
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_torchrun_two_ranks(tmp_path: Path, warm: Path) -> None:
    """Two ranks share the work of a step, agree, and write one set of files."""
    folder = run_dir(tmp_path, warm)
    torchrun = Path(sys.executable).with_name("torchrun")
    arguments = [*SMALL, f"run.dir={folder}", "train.pack_tokens=256", "checkpoint.every=1"]
    done = subprocess.run(
        [str(torchrun), "--standalone", "--nproc-per-node=2", str(TRAIN_PY), *arguments],
        env=environment(), timeout=250, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["sync/parity_max_abs"] < 1e-4 for row in rows)
    assert len((folder / "rollouts" / "step-00001.jsonl").read_text().splitlines()) == 32


def sampled_texts(folder: Path, step: int) -> list[tuple[str, list[str]]]:
    """Every rollout of a step and its corrections, in order."""
    lines = (folder / "rollouts" / f"step-{step:05d}.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["text"], [c["text"] for c in row["corrections"] or []]) for row in map(json.loads, lines)]


def test_two_ranks_are_one_run(tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With samples that depend on the prompt alone, two ranks do what one does: the same rollouts, anchors and
    corrections in the same order, the same losses, gradient norms and statistics, the same weights."""
    one, two = run_dir(tmp_path, warm, "one"), run_dir(tmp_path, warm, "two")
    more = ["train.pack_tokens=256", "train.steps=3", "loss.entropy_coef=0.01"]
    monkeypatch.setattr(LocalEngine, "generate", generate_by_prompt)
    assert train(one, *more) == 0
    script, torchrun = Path(__file__).with_name("run_on_ranks.py"), Path(sys.executable).with_name("torchrun")
    done = subprocess.run(
        [str(torchrun), "--standalone", "--nproc-per-node=2", str(script), *SMALL, f"run.dir={two}", *more],
        env=environment(), timeout=250, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for a, b in zip(timeless(metrics(one)), timeless(metrics(two)), strict=True):
        assert {k for k in a if a[k] is None} == {k for k in b if b[k] is None}
        assert {k: v or 0.0 for k, v in a.items()} == pytest.approx(
            {k: v or 0.0 for k, v in b.items()}, rel=1e-3, abs=1e-5
        )
    for step in (1, 2, 3):
        assert sampled_texts(one, step) == sampled_texts(two, step)
    wa, wb = weights(one), weights(two)
    for name in wa:
        assert (wa[name] - wb[name]).abs().max() < 2e-6, name  # lr 2e-4: an update is a hundred times that


def test_config_is_a_record_of_the_run(tmp_path: Path, warm: Path) -> None:
    folder = run_dir(tmp_path, warm)
    assert train(folder, "train.steps=1", "correction.kappa=0.5") == 0
    assert "kappa: 0.5" in (folder / "config.yaml").read_text()
    again = run_dir(tmp_path, warm, "again")
    assert main([str(folder / "config.yaml"), f"run.dir={again}"]) == 0
    assert timeless(metrics(again)) == timeless(metrics(folder))
