"""Run by test_ranks_failing.py: `ranks_failing.py FOLDER PHASE:HOW ... -- SETTINGS`.

For each PHASE two ranks of the trainer, forked (to import everything once), with one failure put into one of them: an
exception, a death or a silence. Warm starts are kept in FOLDER/warm_start. Nobody watches over the ranks, as torchrun
would. Prints a JSON object: PHASE:HOW -> exit codes and standard errors of the two ranks, and the checkpoints."""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from cipo_fast import checkpoint, engines, marking, train
from cipo_fast.distributed import leave_after
from cipo_fast.learner import Learner
from cipo_fast.policy import Policy
from cipo_fast.recorder import Recorder
from cipo_fast.rollout.local import LocalEngine

# phase -> where the failure is, on which rank, and after the first call of what in train.py
PHASES = {
    "build": (engines, "twin_of", 1, "build"),
    "evaluate": (LocalEngine, "generate", 1, "timed_evaluation"),
    "sample": (LocalEngine, "generate", 1, "cipo_step"),
    "verify": (marking.Marking, "rollouts", 1, "cipo_step"),
    "update": (Learner, "update", 1, "cipo_step"),
    "gather": (Policy, "full_weights", 1, "cipo_step"),
    "sync": (LocalEngine, "sync", 1, "cipo_step"),
    "probe": (LocalEngine, "score", 1, "cipo_step"),
    "open": (Recorder, "open", 0, "train"),
    "record": (Recorder, "step", 0, "cipo_step"),
    "checkpoint": (FileSystemWriter, "write_data", 1, "cipo_step"),
    "state": (checkpoint.json, "dumps", 0, "cipo_step"),
    "export": (train, "export", 0, "train"),
}
EXCEPTIONS = {"OSError": OSError, "RuntimeError": RuntimeError}


def put_in(phase: str, how: str) -> None:
    place, name, rank, after = PHASES[phase]
    inner, outer, armed = getattr(place, name), getattr(train, after), []

    def failing(*args, **kwargs):
        if armed and dist.get_rank() == rank:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            while how == "hang":
                signal.pause()
            raise EXCEPTIONS[how]("put in by the test")
        return inner(*args, **kwargs)

    def arming(*args, **kwargs):
        armed.append(True)
        return outer(*args, **kwargs)

    setattr(place, name, failing)
    setattr(train, after, arming)


def rank(number: int, port: int, log: Path, case: str, settings: list[str]) -> None:
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    put_in(*case.split(":"))
    leave_after(lambda: train.main(settings))


def run(folder: Path, case: str, settings: list[str]) -> dict[str, object]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    name = case.replace(":", "-")
    (folder / name).mkdir()
    (folder / name / "warm_start").symlink_to(folder / "warm_start")
    logs = [folder / f"{name}.{number}.err" for number in range(2)]
    running = {}
    for number in range(2):
        pid = os.fork()
        if pid == 0:
            rank(number, port, logs[number], case, [*settings, f"run.dir={folder / name}"])
        running[pid] = number
    started, codes, deadline = time.monotonic(), [None, None], None
    while running and time.monotonic() < (deadline or started + 100):
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
                deadline = deadline or time.monotonic() + 20
        time.sleep(0.05)
    for pid in running:  # None: it did not end within 20 seconds of the other one
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    checkpoints = [p.name for p in (folder / name / "checkpoints").glob("step-*") if p.suffix != ".part"]
    return {"codes": codes, "errors": [log.read_text() for log in logs], "checkpoints": checkpoints}


if __name__ == "__main__":
    split = sys.argv.index("--")
    print(json.dumps({case: run(Path(sys.argv[1]), case, sys.argv[split + 1 :]) for case in sys.argv[2:split]}))
