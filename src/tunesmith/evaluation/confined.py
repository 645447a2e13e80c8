"""The inner side of the sandbox: shuts its own process in, tries whether it is shut in, then runs a program and its test.

`sandbox.run` starts it as a script, with the order on stdin. It imports the standard library alone, since all that it holds the
program can hold too. What it reports: a line with the limits that do not hold here, before the program starts; and after the
test the token, which is in no file, environment or output, with how it ended.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

UNPRIVILEGED = 0x10000000 | 0x00020000  # new namespaces: user, mount, network, System V IPC
NOSUID_NODEV_NOEXEC = 2 | 4 | 8
DEATH_SIGNAL, NO_NEW_PRIVS, SET_SECCOMP = 1, 38, 22  # prctl
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # Landlock's system calls, the same on all machines
EVERYTHING = (1 << 13) - 1  # the rights of Landlock's first version; what later ones added, seccomp refuses
READ_FILE, WRITE_FILE, READ_DIR = 1 << 2, 1 << 1, 1 << 3
OWN = EVERYTHING & ~(1 << 0 | 1 << 6 | 1 << 9 | 1 << 11)  # all but to execute, and to make devices and sockets
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH, column of the table of calls
ALLOW, REFUSE, ABSENT = 0x7FFF0000, 0x00050001, 0x00050026  # seccomp: go on; EPERM; ENOSYS
CLONE3 = 435  # its flags are behind a pointer, which a filter cannot follow: absent, so that libc falls back to clone
LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06  # instructions of the filter


def main() -> None:
    """Read the order, shut the process in, run the program. Reports instead of raising; never returns to an interpreter."""
    order = marshal.loads(sys.stdin.buffer.read())
    report: int = order["report"]
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    os.close(null)
    try:
        missing = shut_in(order)
    except Exception as error:
        os.write(report, f"the sandbox could not be set up: {error!r}"[:500].encode(errors="replace"))
        os._exit(1)
    os.write(report, " ".join(missing).encode() + b"\n")
    if not set(missing) - set(order["allow"]):
        sys.argv = ["program"]
        run(order["program"], order["test"], order["token"], report)
    os._exit(1)


def shut_in(order: dict[str, Any]) -> list[str]:
    """Set all limits, and give back the names of those that then do not hold.

    The order matters: limits are set and the disk is mounted before the calls that do so are refused.
    """
    missing = []
    os.chdir(order["folder"])
    for name in ("CORE", "FSIZE", "NOFILE", "CPU", "AS"):
        which = getattr(resource, f"RLIMIT_{name}")
        most = resource.getrlimit(which)[1]
        value = order["rlimits"][name] if most == resource.RLIM_INFINITY else min(most, order["rlimits"][name])
        resource.setrlimit(which, (value, value))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if not own_disk(libc, order["folder"], order["rlimits"]["FSIZE"]):
            missing.append("disk")
        libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
        drop_capabilities(libc)
        landlock(libc, order["folder"], order["readable"], "disk" not in missing)
        seccomp(libc, order["allowed"], order["argument"])
    else:
        missing.append("disk")
    return missing + [name for name, refused in ATTEMPTS.items() if not refused(order)]


def own_disk(libc: Any, folder: str, size: int) -> bool:
    """Mount `size` bytes of memory over the folder, seen by this process alone. False where that is not allowed."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(UNPRIVILEGED):
        return False
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as stream:
                stream.write(text)
    except OSError:
        return False
    size_and_files = f"size={size},nr_inodes=1024,mode=700".encode()
    if libc.mount(b"tunesmith", folder.encode(), b"tmpfs", NOSUID_NODEV_NOEXEC, size_and_files):
        return False
    os.chdir(folder)
    return True


def drop_capabilities(libc: Any) -> None:
    """Be an ordinary user in all but name, also where root evaluates. Raises OSError when the kernel refuses."""
    if libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)):
        raise OSError(ctypes.get_errno(), "capset")


def landlock(libc: Any, folder: str, readable: list[str], writable: bool) -> None:
    """Refuse all files but those under `readable`, to read, and under the folder. Does nothing without Landlock."""
    ruleset = libc.syscall(CREATE_RULESET, struct.pack("Q", EVERYTHING), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return
    rights = dict.fromkeys(readable, READ_FILE | READ_DIR)
    rights |= {os.devnull: READ_FILE | WRITE_FILE, folder: OWN if writable else READ_FILE | READ_DIR}
    for path, right in rights.items():
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # not on this machine
            continue
        if not os.path.isdir(path):
            right &= READ_FILE | WRITE_FILE
        libc.syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", right, place), 0)
        os.close(place)
    libc.syscall(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def seccomp(libc: Any, allowed: list[list[int]], argument: list[tuple[list[int], int, int, list[int]]]) -> None:
    """Refuse all system calls but those listed. Does nothing where the kernel has no seccomp, or on an unknown machine."""
    machine = os.uname().machine
    if machine not in MACHINES or sys.maxsize < 1 << 32:
        return
    arch, column = MACHINES[machine]
    # the architecture must be this one, and x86_64's calls not those of its 32-bit form (from 2**30)
    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, arch), (RETURN, 0, 0, REFUSE)]
    code += [(LOAD, 0, 0, 0), (AT_LEAST, 0, 1, 1 << 30), (RETURN, 0, 0, REFUSE)]
    code += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, ABSENT)]
    for numbers in allowed:
        if numbers[column] >= 0:
            code += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, ALLOW)]
    for numbers, index, mask, values in argument:
        body = [step for value in values for step in argument_is(index, mask, value)] + [(RETURN, 0, 0, REFUSE)]
        code += [(EQUAL, 0, len(body), numbers[column]), *body]
    code.append((RETURN, 0, 0, REFUSE))
    steps = b"".join(struct.pack("HBBI", *step) for step in code)
    held = ctypes.create_string_buffer(steps, len(steps))
    libc.prctl(SET_SECCOMP, 2, struct.pack("HxxxxxxP", len(code), ctypes.addressof(held)), 0, 0)


def argument_is(index: int, mask: int, value: int) -> list[tuple[int, int, int, int]]:
    """Instructions that allow the call where an argument (64 bits, the lower half first) has this value under the mask."""
    low, high = 16 + 8 * index, 20 + 8 * index
    return [
        (LOAD, 0, 0, low),
        (AND, 0, 0, mask & 0xFFFFFFFF),
        (EQUAL, 0, 4, value & 0xFFFFFFFF),
        (LOAD, 0, 0, high),
        (AND, 0, 0, mask >> 32 & 0xFFFFFFFF),
        (EQUAL, 0, 1, value >> 32),
        (RETURN, 0, 0, ALLOW),
    ]


def refused(act: Callable[[], object]) -> bool:
    try:
        act()
    except (OSError, MemoryError):
        return True
    return False


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)
    os.wait()


def no_socket(order: dict[str, Any]) -> bool:
    found = int(ctypes.CDLL(None).socket(2, 1, 0))  # AF_INET, SOCK_STREAM
    if found >= 0:
        os.close(found)
    return found < 0


# Each limit is tried, in the very process that is to run the program. outside: a file of this user's, beside the folder.
ATTEMPTS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "files": lambda order: (
        refused(lambda: os.open(order["outside"], os.O_RDONLY))
        and refused(lambda: os.open(order["outside"], os.O_WRONLY))
    ),
    "network": no_socket,
    "processes": lambda order: refused(fork) and refused(lambda: os.kill(os.getppid(), 0)),
    "memory": lambda order: refused(lambda: bytearray(order["rlimits"]["AS"])),
}


def run(program: str, test: str, token: bytes, report: int) -> None:
    """Run the program and then its test in one namespace, and report how that ended. Does not return.

    Both are compiled before either runs, so neither can swallow the other. What the program may change is held in local names.
    """
    write, leave, execute, describe, memory = os.write, os._exit, exec, described, token + b" memory out of memory"
    try:
        module = ModuleType("program")
        sys.modules["program"] = module
        parts = [
            compile(text, name, "exec", dont_inherit=True) for text, name in ((program, "program"), (test, "test"))
        ]
        for part in parts:
            execute(part, module.__dict__)
    except MemoryError:
        write(report, memory)
    except BaseException as error:
        write(report, token + b" failed " + describe(error, test))
    else:
        write(report, token + b" passed ")
    leave(0)


def described(error: BaseException, test: str) -> bytes:
    """The error in a line of 300 bytes at most, with the line of the test that it came from."""
    try:
        if isinstance(error, SystemExit):
            return b"ended itself before its test had"
        words, place, lines = (
            f"{type(error).__name__}: {error}"[:1000].removesuffix(": "),
            error.__traceback__,
            test.splitlines(),
        )
        line = ""
        while place:
            if place.tb_frame.f_code.co_filename == "test" and place.tb_lineno <= len(lines):
                line = f" at: {lines[place.tb_lineno - 1].strip()}"
            place = place.tb_next
        return " ".join((words + line).split()).encode(errors="replace")[:300]
    except BaseException:  # an exception of the program's own, which cannot even be shown
        return b"raised an exception"


if __name__ == "__main__":
    main()
