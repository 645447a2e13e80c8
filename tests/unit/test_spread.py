"""The work of a data check shared by several processes: the same findings in the same order, and no worse an end."""

from __future__ import annotations

import gzip
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
import pytest

from conftest import Result, write
from tunesmith.conversation import Conversation, Issue
from tunesmith.data import read
from tunesmith.data.check import Loaded, examine
from tunesmith.data.findings import finding
from tunesmith.data.spread import _held_back, can_fork, spread
from tunesmith.errors import DataError

needs_fork = pytest.mark.skipif(not can_fork(), reason="one process only where forking is not safe")


def damaged(tmp_path: Path) -> list[str]:
    """Three files: chats with every kind of finding about rows and about rows together, a CSV, a packed file."""
    chats = [
        {"messages": [{"role": "user", "content": f"What is {i} times {i}?"}, {"role": "assistant", "content": said}]}
        for i, said in enumerate(
            [f"It is {n * n}, as you can see by adding {n} to itself {n} times over." for n in range(400)]
        )
    ]
    chats[30]["messages"][1]["content"] = "As an AI language model, I have no view."
    chats[31]["note"] = "spare"  # type: ignore[assignment]
    chats[32]["messages"][1]["content"] = "caf\ufffd"
    chats[33]["messages"][1]["role"] = "bot"
    chats[350] = chats[3]
    write(tmp_path / "a.jsonl", chats)
    plain = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + plain + b"{broken\n\n")  # with a byte order mark
    (tmp_path / "b.csv").write_text("prompt,completion\n" + "".join(f"q{i},answer {i}\n" for i in range(40)))
    last = write(
        tmp_path / "c.jsonl", [*chats[:5], {"prompt": "Wie geht es dir?", "completion": "Gut, danke der Nachfrage."}]
    )
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(last.read_bytes()))
    return [str(tmp_path / name) for name in ("a.jsonl", "b.csv", "c.jsonl.gz")]


def examined(monkeypatch: pytest.MonkeyPatch, paths: list[str], processes: int, **options: bool) -> Loaded:
    monkeypatch.setattr(read, "BLOCK", 3000)  # bytes: some thirty parts
    return examine(paths, processes=processes, **options)  # type: ignore[arg-type]


@needs_fork
@pytest.mark.parametrize("options", [{}, {"near_duplicates": False}, {"structure_only": True}])
def test_many_processes_find_what_one_does(
    options: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = damaged(tmp_path)
    one, many = (examined(monkeypatch, paths, n, **options) for n in (1, 3))
    assert msgspec.json.encode(one) == msgspec.json.encode(many)
    assert one.rows_in == 447 and {"not-json", "bad-role"} <= one.counts.keys()
    if not options:
        assert {"leak", "duplicate", "template", "refusal", "unused-column"} <= one.counts.keys()


@needs_fork
def test_the_work_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process says who it is, by way of a finding: several do the rows of JSONL, this one those of CSV."""

    def each(row: Conversation) -> Iterable[Issue]:
        yield finding("cut", row.source, str(os.getpid()))

    monkeypatch.setattr(read, "BLOCK", 3000)
    found = examine(damaged(tmp_path)[:2], processes=2, each=each, near_duplicates=False)
    who = {(".csv" in i.where): set() for i in found.issues if i.code == "cut"}
    for issue in found.issues:
        if issue.code == "cut":
            who[".csv" in issue.where].add(int(issue.message))
    assert who[True] == {os.getpid()} and os.getpid() not in who[False] and len(who[False]) in (1, 2)


@needs_fork
def test_a_process_that_is_killed_is_an_error_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match="was killed"):
        examine([str(path)], processes=2, each=lambda row: os._exit(9))


def test_order_is_kept_and_no_more_is_read_than_is_worked_on() -> None:
    taken = []

    def parts() -> Iterable[int]:
        for n in range(100):
            taken.append(n)
            yield n

    results = spread(lambda n: n * n, parts(), 2, lambda n: n % 3 == 0)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(taken) <= 10
    assert list(results) == [n * n for n in range(3, 100)]


def test_the_command(tmp_path: Path, cli: Callable[..., Result]) -> None:
    path = damaged(tmp_path)[0]
    alone, shared = (cli("data", "check", path, "--json", "--num-workers", n) for n in (1, 2))
    assert alone.out == shared.out and alone.code == shared.code == 3


def test_ctrl_c_waits_until_processes_have_begun() -> None:
    """What it raises in a callback of a fork is dropped by Python, and training would go on."""
    reached = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs us may have it ignored
    try:
        with pytest.raises(KeyboardInterrupt), _held_back():
            signal.raise_signal(signal.SIGINT)
            reached.append("the end of the block")
        assert reached and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@needs_fork
def test_two_at_once_keep_their_functions_apart() -> None:
    """The work of one data set is never done by the other's function: parts that are done here delay the first fork."""
    found: dict[str, set[str]] = {}
    both = threading.Barrier(2)

    def one(name: str) -> None:
        def parts() -> Iterator[int]:
            both.wait(20)  # each has begun before either forks
            yield from range(4)

        found[name] = set(spread(lambda _: name, parts(), 2, lambda part: False))

    threads = [threading.Thread(target=one, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {"a": {"a"}, "b": {"b"}}
