"""What programs cannot do in the sandbox, on every tier that works here. Started by root, all of it runs once more as
another uid and, where root's Python is closed to others, as root with the way opened."""

# ruff: noqa: E501 (a program is one line)

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cipo_fast.config import SandboxConfig
from cipo_fast.errors import UserError
from cipo_fast.verify.sandbox import Call, Sandbox, choose

ROOT = Path(__file__).parents[1]
NOBODY = 65534
LIMITS = {"cpu_s": 2.0, "wall_s": 4.0, "memory_mib": 256}


def working(kind):
    try:
        return choose(SandboxConfig(tier=kind))
    except UserError as error:
        return str(error)


@pytest.fixture(scope="module", params=["bubblewrap", "sandlock"])
def sandbox(request):
    tier = working(request.param)
    if isinstance(tier, str):
        pytest.skip(tier)
    with Sandbox(SandboxConfig(**LIMITS), tier) as sandbox:
        yield sandbox


def nested(sandbox):
    return sandbox.tier.kind == "bubblewrap"


def one(sandbox, program, *args):
    [result] = sandbox.call(program, "f", [Call(list(args))])
    return result


def printed(sandbox, program, stdin=""):
    [result] = sandbox.run(program, [stdin])
    return result


REFUSED = """
def f(*args):
    try:
        attempt(*args)
    except (OSError, ValueError) as error:
        return "refused: " + type(error).__name__
    return "done"
"""


def refused(sandbox, attempt, *args):
    result = one(sandbox, attempt + REFUSED, *args)
    assert result.outcome == "ok", result
    return result.value.startswith("refused")


# -- files


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/etc/shadow", "/root/.bashrc", "/home", "/var", "/sys/kernel", "/boot"]
)
def test_files_of_the_host_cannot_be_read(sandbox, path):
    attempt = "import os\ndef attempt(path): os.listdir(path) if os.path.isdir(path) else open(path).close()\n"
    assert refused(sandbox, attempt, path)


def test_the_repository_and_the_home_cannot_be_read(sandbox, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s")
    attempt = "def attempt(path): open(path).read()\n"
    for path in (secret, Path(__file__), ROOT / "README.md", ROOT / "cipo_fast" / "train.py"):
        assert path.exists()
        assert refused(sandbox, attempt, str(path)), path


@pytest.mark.parametrize(
    "path",
    [
        "/x",
        "/usr/lib/x",
        "/proc/x",
        "/proc/self/oom_score_adj",
        "/proc/sys/kernel/hostname",
        "/var/tmp/x",
        "/dev/x",
        "/mnt/x",
        f"{os.path.dirname(os.__file__)}/x",
        "/sandbox/inside/values.py",
        "/sandbox/x",
        "/home/x",
        "/root/x",
    ],
)
def test_nothing_can_be_written_outside_of_its_folder(sandbox, path):
    if path.endswith("oom_score_adj") and nested(sandbox):
        pytest.skip("its own /proc entry")
    attempt = "import os\ndef attempt(path): os.close(os.open(path, os.O_WRONLY | os.O_CREAT))\n"
    assert refused(sandbox, attempt, path)


def test_no_device_but_the_five(sandbox):
    attempt = "import os\ndef attempt(path): os.close(os.open(path, os.O_RDONLY))\n"
    assert refused(sandbox, attempt, "/dev/vda")
    assert refused(sandbox, attempt, "/dev/kmsg")
    assert refused(sandbox, attempt, "/dev/ptmx")
    assert refused(sandbox, attempt, "/dev/tty")
    assert not refused(sandbox, attempt, "/dev/null")
    assert not refused(sandbox, attempt, "/dev/urandom")
    node = "import os, stat\ndef attempt(): os.mknod('node', 0o600 | stat.S_IFBLK, os.makedev(254, 0))\n"
    assert refused(sandbox, node)


def test_no_file_survives_an_execution(sandbox):
    program = """
import os, tempfile
def f():
    seen = [name for name in os.listdir(".") if name != "program.py"]
    for folder in (".", "/tmp", "/dev/shm"):
        try:
            open(folder + "/left", "w").close()
        except OSError:
            pass
    return seen, tempfile.gettempdir() == os.getcwd(), os.path.exists("/dev/shm/left/x")
"""
    before = set(os.listdir("/tmp")) | set(os.listdir("/dev/shm"))
    for _ in range(3):
        assert one(sandbox, program).value == ([], True, False)
    assert "left" not in (set(os.listdir("/tmp")) | set(os.listdir("/dev/shm"))) - before


# -- environment, processes, signals


def test_the_environment_is_its_own(sandbox, monkeypatch):
    monkeypatch.setenv("CIPO_SECRET", "s")
    result = one(sandbox, "import os\ndef f(): return dict(os.environ)")
    assert "CIPO_SECRET" not in result.value
    assert set(result.value) <= {"PATH", "HOME", "LANG", "PYTHONUTF8", "PWD", "TMPDIR", "LC_CTYPE"} | {
        f"{name}_NUM_THREADS" for name in ("OPENBLAS", "OMP", "MKL")
    }


def test_processes_of_others_cannot_be_seen(sandbox):
    program = """
import os
def f(pids):
    names = []
    for pid in pids:
        for name in ("cmdline", "environ", "maps", "mem", "fd", "cwd", "root", "status"):
            path = f"/proc/{pid}/{name}"
            try:
                os.listdir(path) if name in ("fd", "cwd", "root") else open(path, "rb").read(10)
                names.append(path)
            except OSError:
                pass
    return names
"""
    pids = [os.getpid(), os.getppid(), sandbox._nest._process.pid] if sandbox._nest else [os.getpid(), os.getppid()]
    assert one(sandbox, program, pids).value == []


def test_the_supervisor_cannot_be_read_or_traced(sandbox):
    program = """
import os
def f():
    names = []
    for name in ("environ", "maps", "mem", "fd", "fdinfo", "root", "stack", "syscall"):
        path = f"/proc/{os.getppid()}/{name}"
        try:
            os.listdir(path) if name in ("fd", "fdinfo", "root") else open(path, "rb").read(10)
            names.append(name)
        except OSError:
            pass
    return names
"""
    assert one(sandbox, program).value == []


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGTERM", "SIGSTOP", "SIGINT", "SIGXCPU", "SIGSEGV"])
def test_the_supervisor_cannot_be_signalled(sandbox, signal):
    program = f"""
import os, signal
def f():
    for pid in (os.getppid(), 1):
        try:
            os.kill(pid, signal.{signal})
        except OSError:
            pass
    return "alive"
"""
    assert one(sandbox, program).value == "alive"


def test_others_cannot_be_signalled(sandbox):
    """This very process, its parent and the zygote; and everybody (kill -1)."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        program = """
import os, signal
def f(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        os.kill(-1, signal.SIGTERM)
    except OSError:
        pass
    return "alive"
"""
        assert one(sandbox, program, [child.pid, sandbox._nest._process.pid]).value == "alive"
        time.sleep(0.1)
        assert child.poll() is None
        assert one(sandbox, "def f(): return 1").value == 1
    finally:
        child.kill()
        child.wait()


LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"


@pytest.mark.parametrize(
    "call",
    [
        "libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)",
        "libc.unshare(0x10000000)",
        "libc.unshare(0x20000)",
        "libc.ptrace(16, os.getppid(), 0, 0)",
        "libc.setns(0, 0)",
        "libc.chroot(b'/tmp')",
        "libc.setuid(0)",
        "libc.memfd_create(b'x', 0)",
        "libc.umount2(b'/proc', 2)",
        "libc.sethostname(b'x', 1)",
        "libc.reboot(0)",
        "libc.syscall(425, 1, 0)",
        "libc.syscall(56, 0x10000011, 0, 0, 0, 0)",
        "libc.shmget(0, 4096, 0o1600)",
        "libc.prlimit(os.getppid(), 0, b'\\0' * 16, None)",
        "libc.personality(0x40000)",
        "libc.setpriority(0, 1, 19)",
    ],
)
def test_system_calls_that_are_refused(sandbox, call):
    if os.uname().machine != "x86_64":
        pytest.skip("numbers of x86_64")
    result = one(sandbox, f"{LIBC}def f(): return {call}, ctypes.get_errno()")
    assert result.value[0] == -1, result
    assert result.value[1] in (1, 22, 38), result


def test_no_privilege_is_left(sandbox):
    program = """
def f():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
    return {name: lines[name].split()[0] for name in ("Uid", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")}
"""
    found = one(sandbox, program).value
    assert found["Uid"] != "0"
    assert found["NoNewPrivs"] == "1"
    assert found["Seccomp"] == "2"
    assert {int(found[name], 16) for name in ("CapPrm", "CapEff", "CapAmb")} == {0}
    assert int(found["CapBnd"], 16) == 0 or not nested(sandbox)


def test_only_its_own_descriptors_are_open(sandbox):
    assert (
        printed(sandbox, "import os\nprint(sorted(map(int, os.listdir('/proc/self/fd'))))").stdout
        == "[0, 1, 2, 3, 4, 5]\n"
    )


# -- network


def test_no_network(sandbox, tmp_path):
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as path,
        socket.socket(socket.AF_UNIX) as name,
    ):
        path.bind(str(tmp_path / "s"))
        path.listen()
        name.bind("\0cipo-sandbox-test")
        name.listen()
        attempt = """
import socket
def attempt(family, kind, address):
    with socket.socket(getattr(socket, family), getattr(socket, kind)) as s:
        s.settimeout(1)
        if kind == "SOCK_DGRAM":
            s.sendto(b"x", address)
        else:
            s.connect(address)
"""
        assert refused(sandbox, attempt, "AF_INET", "SOCK_STREAM", ("127.0.0.1", tcp.getsockname()[1]))
        assert refused(sandbox, attempt, "AF_INET", "SOCK_DGRAM", ("127.0.0.1", 9))
        assert refused(sandbox, attempt, "AF_INET6", "SOCK_STREAM", ("::1", 9))
        assert refused(sandbox, attempt, "AF_UNIX", "SOCK_STREAM", str(tmp_path / "s"))
        assert refused(sandbox, attempt, "AF_UNIX", "SOCK_STREAM", "\0cipo-sandbox-test")
        assert refused(sandbox, attempt, "AF_NETLINK", "SOCK_RAW", "x")
