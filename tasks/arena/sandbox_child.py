"""The program that `tasks.arena.sandbox` starts: it locks itself in, then runs the code that came on its standard input.

It is run as a script by a bare interpreter (no site-packages, so it imports the standard library only). It reads one JSON
object and writes to the descriptor `status` which isolation is in force, and, in a process-id namespace, the id of the
process to kill. Each step down is final: the code has no way back to what was given up before it.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import traceback
from typing import Any, NoReturn

NOBODY = 65534
# linux/sched.h, linux/mount.h, linux/prctl.h, linux/capability.h
NEW_NAMESPACES = 0x00020000 | 0x08000000 | 0x20000000 | 0x40000000  # mounts, IPC, process ids, network
NEW_USER = 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MS_RELATIME, ST_RELATIME, ST_LOCKED = 1 << 21, 4096, 2 | 4 | 8 | 1024 | 2048  # flags a remount has to keep
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CAPABILITY_VERSION = 0x20080522
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
WORK = "/box"

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Read the order, isolate, run."""
    order: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    status: int = order["status"]
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    _die_with_parent()
    if os.getppid() != order["parent"]:
        os._exit(1)
    apart = order["namespaces"] and _unshare()
    if apart and (
        pid := os.fork()
    ):  # the first process of a process-id namespace: when it dies, all in it die
        os.write(status, f"pid {pid}\n".encode())
        os.close(status)
        _end_like(pid)
    if apart:
        os.setsid()  # a signal to its own group must not reach the process outside
    isolation = "namespaces" if apart and _new_root(order["folder"], order["files"]) else "audit hook"
    if isolation == "audit hook":
        os.chdir(order["folder"])
        if os.geteuid() == 0:
            os.chown(".", NOBODY, NOBODY)
    _drop_privileges()
    _die_with_parent()  # a change of user clears it
    with open(os.__file__, "rb"):  # without its library, what the code imports would fail for reasons of ours
        pass
    _limit(order)
    if isolation == "audit hook":
        _audit(os.path.realpath("."))
    os.write(status, f"isolation {isolation}\n".encode())
    os.closerange(3, status + 1)
    _run(order["code"])


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _unshare() -> bool:
    """Enter new namespaces; a user without privileges gets a user namespace as well, where it keeps its own id."""
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        return bool(_libc.unshare(NEW_NAMESPACES) == 0)
    if _libc.unshare(NEW_NAMESPACES | NEW_USER) != 0:
        return False
    try:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:
        return False
    return True


def _end_like(pid: int) -> NoReturn:
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [text.encode() if text is not None else None for text in (source, target, kind, data)]
    if _libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)


def _new_root(root: str, size: int) -> bool:
    """Make a root in memory that has the interpreter's libraries, read-only, and an empty folder, and move there."""
    try:
        _mount("none", "/", None, MS_REC | MS_PRIVATE)
        _mount("sandbox", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},nr_inodes=4096,mode=755")
        for path in dict.fromkeys((*LIBRARIES, *map(os.path.realpath, sys.path))):
            if os.path.isdir(path):
                os.makedirs(root + path, exist_ok=True)
                _mount(path, root + path, None, MS_BIND | MS_REC)
                held = os.statvfs(root + path).f_flag
                keep = held & ST_LOCKED | (MS_RELATIME if held & ST_RELATIME else 0)
                _mount("none", root + path, None, MS_REMOUNT | MS_BIND | MS_RDONLY | keep)
        os.mkdir(root + WORK)
        os.chmod(root + WORK, 0o777)
        os.chroot(root)
        os.chdir(WORK)
    except OSError:
        return False
    return True


def _drop_privileges() -> None:
    """Give up root's user, all capabilities and the way to new ones."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    if _libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise PermissionError("the capabilities cannot be given up")


def _limit(order: dict[str, Any]) -> None:
    for what, value in (
        (resource.RLIMIT_CPU, order["cpu_seconds"]),
        (resource.RLIMIT_AS, order["memory"]),
        (resource.RLIMIT_FSIZE, order["files"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),  # of an ordinary user: no further process or thread
    ):
        held = resource.getrlimit(what)[1]  # of the caller, who may be limited more already
        most = value if held == resource.RLIM_INFINITY else min(value, held)
        resource.setrlimit(what, (most, most))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is an OSError


_DENIED = (
    "socket.",
    "ctypes.",
    "os.exec",
    "os.fork",
    "os.kill",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "subprocess.",
)
_CHANGES = {
    "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate",
    "os.utime",
}  # fmt: skip


def _audit(folder: str) -> None:
    """Deny sockets, processes, signals, and changes of files outside `folder`, as far as Python itself reports them."""
    inside, join, realpath, writes = (
        folder + os.sep,
        os.path.join,
        os.path.realpath,
        os.O_WRONLY | os.O_RDWR | os.O_CREAT,
    )
    decode = os.fsdecode

    def outside(path: object) -> bool:
        return isinstance(path, (str, bytes)) and not realpath(join(folder, decode(path))).startswith(inside)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(_DENIED):
            raise PermissionError(f"{event} is not allowed in the sandbox")
        changes = event in _CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & writes)
        if changes and any(outside(path) for path in args[:2]):
            raise PermissionError(f"{event} outside the working folder is not allowed in the sandbox")

    sys.addaudithook(hook)


def _run(code: str) -> NoReturn:
    """Run the code as `__main__`; leave as an interpreter would, with the last line of an error on stderr."""
    leave, flush, stderr, last_lines = os._exit, sys.stdout.flush, sys.stderr, traceback.format_exception_only
    for name in ("ctypes", "_ctypes", "__main__"):
        sys.modules.pop(name, None)
    exit_code = 0
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
        flush()
    except SystemExit as error:
        flush()
        exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:  # whatever the code raises
        exit_code = 1
        try:
            flush()
            stderr.write(last_lines(error)[-1])
            stderr.flush()
        finally:
            leave(exit_code)
    leave(exit_code & 0xFF)


if __name__ == "__main__":
    main()
