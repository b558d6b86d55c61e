"""What the kernel is asked for, through ctypes: namespaces, mounts, capabilities, a system call filter, limits."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
import struct
from typing import Any

_libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL keeps the interpreter's lock: a clone must not lose it

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWPID = 0x00020000, 0x10000000, 0x20000000
_SIGCHLD = 17
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MNT_DETACH = 2, 4, 8, 4096, 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
STACK = 512 << 20  # of a program's main thread: deep recursion through C functions needs it

# Denied to programs, by number on x86_64 and on aarch64. socketpair stays: asyncio and multiprocessing use it.
_DENIED = {
    "socket": (41, 198), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "userfaultfd": (323, 282), "perf_event_open": (298, 241),
    "bpf": (321, 280), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "open_by_handle_at": (304, 265),
    "personality": (135, 92), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "pidfd_getfd": (438, 438), "kcmp": (312, 272), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "syslog": (103, 116), "kexec_load": (246, 104), "acct": (163, 89),
    "swapon": (167, 224), "quotactl": (179, 60), "fanotify_init": (300, 262), "process_madvise": (440, 440),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239),
}  # fmt: skip
_MACHINES = {"x86_64": (0, 0xC000003E, 56, 302), "aarch64": (1, 0xC00000B7, 220, 261)}  # column, audit, clone, prlimit
_CLONE3 = 435
_EPERM, _ENOSYS = 1, 38
_NEW_NAMESPACES = 0x7E020000


def filtered() -> bool:
    """Whether the system call filter is known for this machine."""
    return platform.machine() in _MACHINES


def check(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def _prctl(option: int, *values: int) -> int:
    padded = [*values, 0, 0, 0, 0][:4]
    return int(_libc.prctl(option, *[ctypes.c_ulong(value) for value in padded]))


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    result = _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    check(result, f"mount {target}")


def mount_proc(options: str = "") -> None:
    mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)


def become(uid: int) -> None:
    """From root to nobody in particular, for good."""
    for capability in range(64):
        _prctl(_PR_CAPBSET_DROP, capability)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    no_new_privileges()


def no_new_privileges() -> None:
    check(_prctl(_PR_SET_NO_NEW_PRIVS, 1), "no_new_privs")


def die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, 9)


def reap_descendants() -> None:
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def dumpable(yes: bool) -> None:
    """Not dumpable: who has the same uid can neither trace the process nor read its /proc entries."""
    _prctl(_PR_SET_DUMPABLE, int(yes))


def clone_into_namespaces() -> int:
    """Like fork; the child is process 1 of namespaces of its own for users, processes and mounts."""
    _column, _, clone, _ = _MACHINES[platform.machine()]
    flags = _CLONE_NEWUSER | _CLONE_NEWPID | _CLONE_NEWNS | _SIGCHLD
    return check(int(_libc.syscall(ctypes.c_long(clone), ctypes.c_long(flags), 0, 0, 0, 0)), "clone")


def furnish(uid: int, gid: int, file_bytes: int) -> None:
    """Fresh namespaces get their own /proc, /tmp and /dev/shm; then no more can be made, and no capability is left."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        _write(f"/proc/self/{name}", text)
    _write("/proc/sys/user/max_user_namespaces", "0")
    mount_proc("subset=pid")
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    mount("tmpfs", "/mnt", "tmpfs", flags, f"size={file_bytes},nr_inodes=1024,mode=755")
    for name, target in (("/mnt/tmp", "/tmp"), ("/mnt/shm", "/dev/shm")):  # one file system: one limit for both
        os.mkdir(name, 0o777)
        mount(name, target, "", _MS_BIND)
    check(_libc.umount2(b"/mnt", _MNT_DETACH), "umount")
    os.chdir("/tmp")
    drop_capabilities()


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def drop_capabilities() -> None:
    for capability in range(64):
        _prctl(_PR_CAPBSET_DROP, capability)
    header = struct.pack("=Ii", 0x20080522, 0)
    check(_libc.capset(header, bytes(24)), "capset")
    no_new_privileges()


def limit(limits: dict[str, Any], tasks: int) -> None:
    """Resource limits of the calling process and all it starts; `tasks`: most processes and threads of its uid in its
    user namespace, 0: any number. The supervisor keeps finer limits."""
    seconds = math.ceil(limits["cpu_s"]) + 1
    base = int(open("/proc/self/statm", encoding="ascii").read().split()[0]) * resource.getpagesize()  # noqa: SIM115 (closed at once)
    memory = base + (limits["memory_mib"] << 20)
    file_bytes = limits["file_mib"] << 20
    wanted = {
        resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: memory, resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 256, resource.RLIMIT_CORE: 0, resource.RLIMIT_MEMLOCK: 64 << 10,
        resource.RLIMIT_MSGQUEUE: 0, resource.RLIMIT_SIGPENDING: 256,
    }  # fmt: skip
    if tasks:
        wanted[resource.RLIMIT_NPROC] = tasks
    for which, value in wanted.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def refuse_calls() -> None:
    """Install the system call filter: what a program has no business with fails with EPERM."""
    if not filtered():
        return
    program = _filter()
    buffer = ctypes.create_string_buffer(program, len(program))
    descriptor = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    pointer = ctypes.create_string_buffer(descriptor, len(descriptor))
    check(_prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(pointer)), "seccomp")


def _filter() -> bytes:
    """Classic BPF: 32-bit loads from struct seccomp_data (0 number, 4 machine, 16 and 20 first argument)."""
    column, audit, clone, prlimit = _MACHINES[platform.machine()]
    load, equal, greater, some, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, fail, kill = 0x7FFF0000, 0x00050000, 0x80000000

    def op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    lines = [op(load, 4), op(equal, audit, 1, 0), op(give, kill), op(load, 0)]
    lines += [op(greater, 0x40000000, 0, 1), op(give, fail | _ENOSYS)]
    for numbers in _DENIED.values():
        lines += [op(equal, numbers[column], 0, 1), op(give, fail | _EPERM)]
    lines += [op(equal, _CLONE3, 0, 1), op(give, fail | _ENOSYS)]
    lines += [op(equal, clone, 0, 4), op(load, 16), op(some, _NEW_NAMESPACES, 0, 1), op(give, fail | _EPERM)]
    lines += [op(give, allow)]
    lines += [op(equal, prlimit, 0, 3), op(load, 16), op(equal, 0, 1, 0), op(give, fail | _EPERM)]
    lines += [op(give, allow)]
    return b"".join(lines)
