"""`as_another.py UID command...`, started by root: the command as another uid (0 stays root), in a mount namespace where
others can reach this interpreter, its packages and this repository even if they lie in a folder of root's own."""

import ctypes
import os
import sys
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)
NEWNS, BIND, REC, PRIVATE = 0x20000, 4096, 16384, 1 << 18


def mount(source, target, kind, flags, options=""):
    if libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()):
        raise OSError(ctypes.get_errno(), f"mount {target}")


def closed(path):
    """The topmost folder on the way that others cannot pass, if any."""
    folders = [*reversed(path.parents), path]
    return next((folder for folder in folders if not folder.stat().st_mode & 0o001), None)


def open_the_way(paths):
    needed = {path.resolve(): closed(path.resolve()) for path in paths}
    if libc.unshare(NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    mount("none", "/", "", REC | PRIVATE)
    handles = {path: os.open(path, os.O_PATH) for path, folder in needed.items() if folder}
    for folder in {folder for folder in needed.values() if folder}:
        mount("tmpfs", str(folder), "tmpfs", 0, "mode=755")
    for path, handle in handles.items():
        path.mkdir(parents=True, exist_ok=True)
        mount(f"/proc/self/fd/{handle}", str(path), "", BIND | REC)
        os.close(handle)


if __name__ == "__main__":
    uid = int(sys.argv[1])
    open_the_way([Path(sys.base_prefix), Path(sys.prefix), Path(__file__).parents[1]])
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        os.environ["HOME"] = "/tmp"
    os.execv(sys.argv[2], sys.argv[2:])
