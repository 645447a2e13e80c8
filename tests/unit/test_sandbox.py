"""What a program in the sandbox cannot do. Every hostile program runs for real, against things that this test would miss."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT
from tunesmith.evaluation import sandbox
from tunesmith.evaluation.sandbox import Limits, Result, run, run_all

TEST = "assert answer() == 42"
GOOD = "def answer(): return 42"
QUICK = Limits(seconds=2, memory=256 << 20)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for temporary files and a home, both with a file to lose; afterwards nothing is lost, left over or running."""
    kept = [tmp_path / "tmp" / "sibling" / "file", tmp_path / "home" / "file"]
    for file in kept:
        file.parent.mkdir(parents=True)
        file.write_text("kept")
    inside = shutil.copy(sandbox.INSIDE, tmp_path / "confined.py")  # so that its processes can be told from all others
    monkeypatch.setattr(sandbox, "INSIDE", inside)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SECRET", "not to be seen")
    yield tmp_path
    assert [file.read_text() for file in kept] == ["kept", "kept"]
    assert [p.name for p in (tmp_path / "tmp").iterdir()] == ["sibling"]
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["file"]
    assert not running(inside)


def running(path: Path | str) -> list[str]:
    """Processes that have the path on their command line; zombies have none."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = file.read_bytes().decode(errors="replace")
        except OSError:
            continue
        found += [text] if str(path) in text else []
    return found


def body(statements: str) -> str:
    """A program whose answer is right, if only it gets there."""
    lines = "".join(f"    {line}\n" for line in statements.strip().splitlines())
    return f"import os, sys, time, signal, ctypes, shutil, socket\ndef answer():\n{lines}    return 42\n"


def test_a_right_program_passes_and_a_wrong_one_says_where() -> None:
    assert run(GOOD, TEST) == Result("passed")
    wrong = run("def answer(): return 41", f"x = 1\n{TEST}, 'it is 41'")
    assert wrong == Result("failed", "AssertionError: it is 41 at: assert answer() == 42, 'it is 41'")
    assert not wrong.passed and run(GOOD, TEST).passed
    assert run("def answer(:", TEST).error.startswith("SyntaxError")


def test_what_programs_may_do() -> None:
    useful = body("""
import asyncio, threading, tempfile, pathlib, dataclasses, random, decimal
async def later(): await asyncio.sleep(0.001)
asyncio.run(later())
thread = threading.Thread(target=time.sleep, args=(0.001,)); thread.start(); thread.join()
with tempfile.TemporaryDirectory() as folder: pathlib.Path(folder, "a").write_text("b")
pathlib.Path("a").write_text("1"); os.rename("a", "b"); os.remove("b")
assert os.getcwd() == os.environ["HOME"] and os.listdir() == []
""")
    assert run(useful, TEST) == Result("passed")


def test_the_limits_are_those_that_were_asked_for() -> None:
    shown = body("""
import resource as r
found = [r.getrlimit(kind)[1] for kind in (r.RLIMIT_AS, r.RLIMIT_FSIZE, r.RLIMIT_NOFILE, r.RLIMIT_CPU, r.RLIMIT_CORE)]
assert found == [300 << 20, 1 << 20, 20, 4, 0], found
assert os.statvfs(".").f_blocks * os.statvfs(".").f_frsize == 1 << 20
""")
    assert run(shown, TEST, Limits(seconds=3, memory=300 << 20, disk=1 << 20, open_files=20)) == Result("passed")


FILES = {
    "delete a file": "os.remove('{place}/home/file')",
    "delete a folder": "shutil.rmtree('{place}/home')",
    "delete what lies beside": "shutil.rmtree(os.path.dirname(os.path.dirname(os.getcwd())) + '/sibling')",
    "write a file": "open('{place}/home/new', 'w')",
    "overwrite a file": "open('{place}/home/file', 'w')",
    "truncate a file": "os.truncate('{place}/home/file', 0)",
    "read a file": "open('{place}/home/file').read()",
    "list a folder": "os.listdir('{place}/home')",
    "rename a file": "os.rename('{place}/home/file', '{place}/home/other')",
    "link a file": "os.link('{place}/home/file', 'mine')",
    "through a symbolic link": "os.symlink('{place}/home/file', 'link'); open('link', 'a')",
    "change its mode": "os.chmod('{place}/home/file', 0)",
    "change its owner": "os.chown('{place}/home/file', 1, 1)",
    "change its time": "os.utime('{place}/home/file', (0, 0))",
    "see its parent's environment": "open(f'/proc/{{os.getppid()}}/environ').read()",
    "see its parent's memory": "open(f'/proc/{{os.getppid()}}/mem', 'rb')",
    "a secret": "os.environ['SECRET']",
    "mount": "assert ctypes.CDLL(None).mount(b'none', os.getcwd().encode(), b'tmpfs', 0, None) == 0",
    "a device": "os.mknod('disk', 0o60600, os.makedev(8, 0))",
    "its input": "input()",
}
PROCESSES = {
    "fork without end": "while True: os.fork()",
    "start a program": "import subprocess; subprocess.run(['/bin/true'])",
    "become a program": "os.execv('/bin/true', ['true'])",
    "a daemon": "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n    os._exit(0)",
    "a thread library's process": "import multiprocessing as m; p = m.Process(target=print); p.start(); p.join()",
    "kill its parent": "os.kill(os.getppid(), 9)",
    "kill all": "os.kill(-1, 9)",
    "signal its parent as a file's owner": "import fcntl; fcntl.fcntl(socket.socketpair()[0], fcntl.F_SETOWN, os.getppid())",
    "trace its parent": "assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "raise its own limits": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
    "memory beside its own": "os.memfd_create('x')",
}


@pytest.mark.parametrize("name", [*FILES, *PROCESSES])
def test_an_act_that_is_refused_fails_the_program(name: str, place: Path) -> None:
    result = run(body((FILES | PROCESSES)[name].format(place=place)), TEST, QUICK)
    assert result.status == "failed" and result.error, result
    assert "ended itself" not in result.error and "NameError" not in result.error, result


def test_a_program_that_goes_on_after_each_refusal_has_still_done_nothing(place: Path) -> None:
    acts = [text.format(place=place) for text in (FILES | PROCESSES).values()]
    tries = (
        f"done = []\nfor act in {acts!r}:\n    try: exec(act)\n    except BaseException: continue\n    done.append(act)"
    )
    assert run(body(tries + "\nassert not done, done"), TEST, QUICK) == Result("passed")


@pytest.mark.parametrize("swallow", [False, True])
def test_no_socket_is_opened(swallow: bool, place: Path) -> None:
    """A TCP, a UDP and two local listeners of this test hear nothing."""
    tcp, udp = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
    local, abstract = (socket.socket(socket.AF_UNIX) for _ in range(2))
    path, name = "unix.sock", f"\0tunesmith-{os.getpid()}"
    before = os.getcwd()
    os.chdir(place)  # the path of a local socket may have 107 bytes
    try:
        for server, address in ((tcp, ("127.0.0.1", 0)), (udp, ("127.0.0.1", 0)), (local, path), (abstract, name)):
            server.bind(address)
            server.setblocking(False)
            if server is not udp:
                server.listen()
        acts = [
            f"socket.create_connection({tcp.getsockname()!r})",
            f"socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', {udp.getsockname()!r})",
            f"socket.socket(socket.AF_UNIX).connect({str(place / path)!r})",
            f"socket.socket(socket.AF_UNIX).connect({name!r})",
            f"socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', {name!r})",
            f"socket.socketpair()[0].connect({name!r})",
        ]
        for act in acts:
            guarded = f"try: {act}\nexcept OSError: pass" if swallow else act
            result = run(body(guarded), TEST, QUICK)
            assert result.passed == swallow and ("PermissionError" in result.error) == (not swallow), (act, result)
        with pytest.raises(BlockingIOError):
            udp.recv(1)
        for server in (tcp, local, abstract):
            with pytest.raises(BlockingIOError):
                server.accept()
    finally:
        os.chdir(before)
        for server in (tcp, udp, local, abstract):
            server.close()


@pytest.mark.parametrize(
    ("statements", "status"),
    [
        ("while True: pass", "timeout"),
        ("time.sleep(1000)", "timeout"),
        ("while True: print('x' * 1000)", "timeout"),
        (
            "for n in range(1, 65): signal.signal(n, signal.SIG_IGN) if n not in (9, 19, 32, 33) else 0\ntime.sleep(1000)",
            "timeout",
        ),
        ("while True:\n    try: time.sleep(1000)\n    except BaseException: pass", "timeout"),
        ("kept = []\nwhile True: kept.append(bytes(1 << 20))", "memory"),
        ("bytearray(1 << 40)", "memory"),
        ("kept = b'x'\nwhile True: kept += kept", "memory"),
        ("import mmap\nkept = []\nwhile True: kept.append(mmap.mmap(-1, 1 << 20))", "failed"),
        ("with open('a', 'wb') as file:\n    while True: file.write(bytes(1 << 20))", "failed"),
        ("for n in range(10 ** 9): open(f'a{n}', 'wb').write(bytes(1 << 20))", "failed"),
        ("for n in range(10 ** 9): open(f'a{n}', 'wb').close()", "failed"),
        ("kept = [open('a', 'wb') for _ in range(10 ** 9)]", "failed"),
        ("import threading\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()", "failed"),
        ("def deep(): deep()\ndeep()", "failed"),
        ("ctypes.string_at(0)", "killed"),
        ("os.abort()", "killed"),
    ],
)
def test_a_program_without_end_is_ended(statements: str, status: str) -> None:
    start = time.monotonic()
    result = run(body(statements), TEST, QUICK)
    assert result.status == status and result.error, result
    assert time.monotonic() - start < 8


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os\ndef answer(): os._exit(0)",
        "def answer(): exit(0)",
        "print('passed')\ndef answer(): pass",
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'passed\\n passed \\n')\n    except OSError: pass\nos._exit(0)",
        "import os\nos.closerange(0, 64)\ndef answer(): return 41",
        "import os\nos.closerange(0, 64)\nimport time; time.sleep(1000)",
        "import builtins\nbuiltins.AssertionError = None\ndef answer(): return 41",
        "import builtins\nbuiltins.exec = builtins.compile = print\ndef answer(): return 41",
        "import os\nos._exit = os.write = print\ndef answer(): return 41",
        "import atexit, os\natexit.register(os._exit, 0)\ndef answer(): return 41",
        "import sys\nsys.excepthook = print\ndef answer(): return 41",
        "def answer(): return 41\n'''",
        "def answer(): return 41\nif False:",
        "def answer(): return 41\nimport sys; sys.modules['__main__'].run = print",
        "class Odd(BaseException):\n    def __str__(self): raise self\ndef answer(): raise Odd",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\ndef answer(): return 41",
        "\0",
        "\ud800",
        "",
        "(" * 100_000,
    ],
)
def test_a_program_that_ends_or_bends_its_test_has_failed(program: str) -> None:
    start = time.monotonic()
    assert run(program, TEST, Limits(seconds=10)).status in ("failed", "killed")
    assert time.monotonic() - start < 9  # and not for want of time


def test_a_program_dies_with_the_process_that_evaluates_it(place: Path) -> None:
    code = f"from pathlib import Path; from tunesmith.evaluation import sandbox; sandbox.INSIDE = Path({str(sandbox.INSIDE)!r})\n"
    code += "sandbox.run('import time; time.sleep(1000)', '', sandbox.Limits(seconds=1000))"
    env = {"PYTHONPATH": str(ROOT / "src"), "TMPDIR": str(place)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    try:
        wait_until(lambda: bool(running(place / "confined.py")))
        time.sleep(0.5)  # the program sleeps now
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: not running(place / "confined.py"))


def wait_until(true: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("name", "numbers"), [("network", [41, 198]), ("processes", [56, 220]), ("processes", [62, 129])]
)
def test_where_a_limit_does_not_hold_nothing_is_run(
    name: str, numbers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel lets socket, clone and kill through here, and the trial before the program notices."""
    calls = sandbox._calls()
    monkeypatch.setattr(sandbox, "_calls", lambda: calls | {"allowed": [*calls["allowed"], numbers]})
    assert run(GOOD, TEST) == Result("refused", f"this machine cannot limit: {name}", (name,))
    assert run(GOOD, TEST, allow=["files"]).status == "refused"
    assert run(GOOD, TEST, allow=[name]) == Result("passed", "", (name,))


def test_where_other_files_can_be_read_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_readable", lambda: ["/"])
    assert run(GOOD, TEST) == Result("refused", "this machine cannot limit: files", ("files",))


def test_on_windows_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.sys, "platform", "win32")
    assert run(GOOD, TEST, allow=sandbox.ESSENTIAL).status == "refused"


def test_many_programs_run_side_by_side_and_come_back_in_order() -> None:
    seen: list[tuple[int, int]] = []
    programs = [(f"def answer(): return {42 if n % 3 else 0}", TEST) for n in range(12)]
    results = run_all(programs, workers=4, progress=lambda done, whole: seen.append((done, whole)))
    assert [result.passed for result in results] == [bool(n % 3) for n in range(12)]
    assert seen == [(n, 12) for n in range(1, 13)]
    start = time.monotonic()
    assert {r.status for r in run_all([("import time; time.sleep(60)", "")] * 4, Limits(seconds=2), workers=4)} == {
        "timeout"
    }
    assert time.monotonic() - start < 6  # one after another they would take 8


def test_sets_have_the_same_order_each_time() -> None:
    program, test = "words = list({'one', 'two', 'three', 'four', 'five'})", "raise ValueError(words)"
    assert len({run(program, test).error for _ in range(4)}) == 1
