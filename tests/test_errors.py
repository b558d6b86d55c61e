"""How commands end: one line, an exit code, whatever the terminal, the environment and the number of ranks."""

import ast
import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from cipo_fast import distributed
from cipo_fast.errors import TrainingStopped, UserError, command, visible
from cipo_fast.plan import main as plan_main
from cipo_fast.run_dir import check_writable
from cipo_fast.train import main

ROOT = Path(__file__).parents[1]
TRAIN_PY = ROOT / "cipo_fast" / "train.py"
TINY = [
    "model.embedded.hidden=32", "model.embedded.mlp=48", "model.embedded.layers=1", "model.embedded.warm_steps=0",
    "data.task=add", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=2", "rollout.max_tokens=4",
    "eval.problems=4", "eval.samples=2", "run.trackers=[]", "train.steps=1", "checkpoint.export=false",
]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LC_ALL", "LANG", "PYTHONUTF8")}
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def run(*args: str, timeout: int = 120, **env: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, str(TRAIN_PY), *args], env=environment(**env), capture_output=True, timeout=timeout
    )


def test_errors_are_one_line_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException):
        def body() -> None:
            raise error

        return body

    assert command(lambda: None) == 0
    assert command(fail(UserError("a\nb [/x] \x1b[31m :smile: \u202e"))) == 2
    assert command(fail(TrainingStopped("gone"))) == 1
    assert command(fail(KeyboardInterrupt()), "go on later") == 130
    assert capsys.readouterr().err.splitlines() == [
        "error: a b [/x] \\x1b[31m :smile: \\u202e", "stopped: gone", "go on later",
    ]  # fmt: skip
    told = UserError("said by another rank")
    told.told = True
    assert command(fail(told)) == 2
    assert capsys.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):  # a bug stays a traceback
        command(lambda: 1 / 0)
    assert visible("é 中 😀 plain") == "é 中 😀 plain"


@pytest.mark.parametrize("folder", ["/proc/x", "/proc/x/y/z", "{file}/run", "{tmp}/" + "n" * 300, "{link}"])
def test_a_run_dir_that_cannot_be_written_is_the_first_thing_found_out(folder: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("/proc/nowhere/x")
    folder = folder.format(file=tmp_path / "file", tmp=tmp_path, link=tmp_path / "link")
    before = sorted(tmp_path.iterdir())
    # The model does not exist either: the folder is found out before anything is loaded.
    assert main([*TINY, "model.path=/no/such/model", "data.max_prompt_tokens=9", f"run.dir={folder}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: run.dir={folder}: cannot write there: ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_dir_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "kept").write_text("")
    check_writable(tmp_path / "a")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["kept"]


def test_an_empty_environment_is_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    assert distributed._environment() is None
    assert distributed.starts_first()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "RANK=0 is set in the environment, WORLD_SIZE is not"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "MASTER_ADDR is not"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "not below WORLD_SIZE=2"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK=x in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"}, "is no port"),
        ({"RANK": "0", "WORLD_SIZE": "-1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "WORLD_SIZE=-1"),
    ],
)  # fmt: skip
def test_what_is_left_over_in_the_environment_is_one_line(
    env: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert main([*TINY, f"run.dir={tmp_path / 'r'}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_ranks_that_do_not_meet_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    """The master's port is taken by a stranger; or there is no master."""
    monkeypatch.setattr(distributed, "START_TIMEOUT", timedelta(seconds=2))
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        for rank in ("0", "1"):
            if rank == "0":
                stranger.listen()
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("MASTER_PORT", str(stranger.getsockname()[1] if rank == "0" else 9))
            assert main([*TINY, f"run.dir={tmp_path / 'r'}"]) == 2
            error = capsys.readouterr().err
            assert "the ranks do not find each other" in error
            assert error.count("\n") == 1


def test_a_dry_run_without_rank_plans_one_process(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main([*TINY, "--dry-run"]) == 0
    assert "memory of the one rank" in capsys.readouterr().out
    assert main([*TINY, "--dry-run", "--world", "8"]) == 0
    assert "memory of each of 8 ranks" in capsys.readouterr().out


def test_an_ascii_terminal_sees_substitutes_and_files_are_utf_8(tmp_path: Path) -> None:
    """A dry run, one step, and errors, all through a pipe in the C locale."""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0"}
    folder = tmp_path / "prefix[/b]c"
    settings = [*TINY, f"run.dir={folder}", "correction.followup=vérifie 😀", "data.max_prompt_tokens=40"]
    done = run(*settings, "--dry-run", **plain)
    assert done.returncode == 0, done.stderr
    assert b"followup: v?rifie" in done.stdout
    done = run(*settings, **plain)
    assert done.returncode == 0, done.stderr
    assert b"cipo_fast ?" in done.stdout
    assert b"prefix[/b]c/" in done.stdout
    assert "vérifie 😀" in (folder / "config.yaml").read_text(encoding="utf-8")
    row = json.loads((folder / "rollouts" / "step-00001.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert row["prompt"].startswith("add ")
    for setting, message in (
        ("run.name=é😀", rb"run.name='\xe9\U0001f600': string"),
        ("data.train=/nö", b"this locale cannot"),
    ):
        done = run(*TINY, setting, f"run.dir={tmp_path / 'no'}", **plain)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count(b"\n") == 1


def test_a_reader_that_goes_away_ends_nothing(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    arguments = [sys.executable, str(TRAIN_PY), *TINY, f"run.dir={tmp_path / 'r'}"]
    done = subprocess.run(arguments, env=environment(), stdout=write, stderr=subprocess.PIPE, timeout=120)
    again = subprocess.run(
        [*arguments, "--dry-run"], env=environment(), stdout=write, stderr=subprocess.PIPE, timeout=60
    )
    os.close(write)
    assert (done.returncode, done.stderr.count(b"Traceback")) == (0, 0), done.stderr
    assert (tmp_path / "r" / "summary.json").exists()
    assert (again.returncode, again.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rollout.promts=4"], b"error: unknown key 'rollout.promts'"),  # all ranks alike
        (["run.dir=/proc/x"], b"error: run.dir=/proc/x: cannot write there"),  # the first rank alone
        (["model.path=/no/such"], b"error: "),  # all ranks, in the middle of the work
        (["seed=$ONLY_RANK_0"], b"error: seed='$ONLY_RANK_0'"),
    ],
)
def test_under_torchrun_an_error_is_printed_once(arguments: list[str], message: bytes, tmp_path: Path) -> None:
    torchrun = Path(sys.executable).with_name("torchrun")
    done = subprocess.run(
        [str(torchrun), "--standalone", "--nproc-per-node=2", str(TRAIN_PY), *TINY, f"run.dir={tmp_path / 'r'}",
         *arguments],
        env=environment(), timeout=200, capture_output=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count(message) == 1, done.stderr[-3000:]
    assert not (tmp_path / "r").exists()


def test_an_error_of_one_rank_alone_is_printed(tmp_path: Path) -> None:
    """Rank 1 reads another file system, say: what it alone finds stops both, and is said."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, sys\n"
        "from cipo_fast.distributed import leave, prepared_group\n"
        "from cipo_fast.errors import UserError, command\n"
        "def prepare():\n"
        "    if os.environ['RANK'] == '1': raise UserError('only here')\n"
        "def body():\n"
        "    with prepared_group(prepare): print('never')\n"
        "leave(command(body))\n"
    )
    torchrun = Path(sys.executable).with_name("torchrun")
    done = subprocess.run(
        [str(torchrun), "--standalone", "--nproc-per-node=2", str(script)],
        env=environment(),
        timeout=100,
        capture_output=True,
    )
    assert done.stderr.count(b"error: only here") == 1, done.stderr[-3000:]
    assert b"never" not in done.stdout


def test_plan_takes_a_home_and_says_bad_input_in_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plan_main(["run=~/nothing"]) == 2
    assert f"run={tmp_path}/nothing: no rollouts" in capsys.readouterr().err


def test_every_text_file_is_utf_8_whatever_the_locale() -> None:
    """Each open, read_text and write_text of the package says its encoding, or opens bytes."""
    missing = []
    for path in sorted((ROOT / "cipo_fast").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in node.args[:2])
            said = any(keyword.arg == "encoding" for keyword in node.keywords)
            other = getattr(getattr(node.func, "value", None), "id", "") in ("os", "recorder")  # their own `open`
            if name in ("open", "read_text", "write_text") and not binary and not said and not other:
                missing.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert missing == []


def test_a_full_disk_under_standard_output_ends_nothing(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(TRAIN_PY), *TINY, f"run.dir={tmp_path / 'r'}", "train.steps=1"],
            env=environment(), timeout=200, stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("standard output cannot be written any more (No space left on device)") == 1
    assert (tmp_path / "r" / "summary.json").exists()
