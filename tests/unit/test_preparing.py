"""Data sets too large for memory: prepared on disk, the same as in memory, and used again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import rows, write
from training import losses, weights
from tunesmith import api, preparing
from tunesmith.data.write import host as this_host
from tunesmith.errors import DataError
from tunesmith.local.backend import lay_out
from tunesmith.local.loop import train
from tunesmith.planning import Prepared


def prepared(dataset: Path, tiny: Path, **settings: Any) -> Prepared:
    return api.prepare(str(dataset), model=str(tiny), **settings)


def same(one: Prepared, two: Prepared) -> None:
    assert one.plan == two.plan
    for side in ("train", "valid", "test"):
        assert list(one.splits[side]) == list(two.splits[side])
        for part in ("ids", "mask", "starts"):
            assert getattr(one.tokens[side], part).tolist() == getattr(two.tokens[side], part).tolist()


@pytest.fixture
def folder(cache: Path) -> Path:
    """Where data sets are kept."""
    return cache / "data"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Every data set counts as too large for memory."""
    monkeypatch.setattr(preparing, "LARGE", 0)
    monkeypatch.setattr(preparing, "PART", 16)
    return monkeypatch


SETTINGS: list[dict[str, Any]] = [
    {},
    {"split_method": "shuffle", "seed": 7},
    {"split_method": "threshold"},
    {"max_length": 40, "over_long": "drop"},
    {"max_length": 40, "over_long": "truncate"},
    {"num_workers": 2},
    {"valid_fraction": 0.0, "test_fraction": 0.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_as_in_memory(
    settings: dict[str, Any], tiny: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "rows.jsonl", rows(90, 5) + rows(10, 30))
    small = prepared(data, tiny, **settings)
    assert not folder.exists()
    monkeypatch.setattr(preparing, "LARGE", 0)
    monkeypatch.setattr(preparing, "PART", 16)
    first, again = prepared(data, tiny, **settings), prepared(data, tiny, **settings)
    same(small, first)
    same(small, again)
    assert len(list(folder.iterdir())) == 1


def test_files_of_their_own(tiny: Path, tmp_path: Path, folder: Path, large: pytest.MonkeyPatch) -> None:
    """Held-out files are stored beside the training rows."""
    every = rows(60)
    parts = {"train": every[:40], "valid": every[40:50], "test": every[50:]}
    files = {side: write(tmp_path / f"{side}.jsonl", part) for side, part in parts.items()}
    settings: dict[str, Any] = {"valid_dataset": str(files["valid"]), "test_dataset": str(files["test"])}
    found = prepared(files["train"], tiny, **settings)
    same(found, prepared(files["train"], tiny, **settings))
    large.setattr(preparing, "LARGE", 1 << 30)
    same(found, prepared(files["train"], tiny, **settings))
    (kept,) = folder.iterdir()
    assert {"all.jsonl", "valid.jsonl", "test.jsonl"} <= {file.name for file in kept.iterdir()}


def test_what_is_kept_is_used(tiny: Path, data: Path, folder: Path, large: pytest.MonkeyPatch) -> None:
    prepared(data, tiny)
    large.setattr(preparing, "_made", lambda *_: pytest.fail("made again"))
    prepared(data, tiny)
    prepared(data, tiny, learning_rate=1e-4, epochs=2, batch_size=2)  # nothing of the data
    for settings in ({"seed": 1}, {"max_length": 64}, {"test_fraction": 0.2}, {"over_long": "drop"}, {"task": "code"}):
        with pytest.raises(pytest.fail.Exception):
            prepared(data, tiny, **settings)
    data.write_bytes(data.read_bytes()[:-2] + b" }")
    with pytest.raises(pytest.fail.Exception):
        prepared(data, tiny)


def test_what_is_damaged_is_made_anew(tiny: Path, data: Path, folder: Path, large: pytest.MonkeyPatch) -> None:
    whole = prepared(data, tiny)
    (kept,) = folder.iterdir()
    names = sorted(path.name for path in kept.iterdir())
    for name, damage in (("facts.json", b"{"), ("train.ids.npy", b""), ("train.rows.npy", b"x"), ("all.jsonl", None)):
        assert name in names, names
        (kept / name).unlink() if damage is None else (kept / name).write_bytes(damage)
        same(whole, prepared(data, tiny))
        assert sorted(path.name for path in kept.iterdir()) == names


def test_what_decides_the_ids_decides_what_is_used(
    tiny: Path, tmp_path: Path, data: Path, folder: Path, large: pytest.MonkeyPatch
) -> None:
    larger = tmp_path / "larger"
    shutil.copytree(tiny, larger)
    config = json.loads((larger / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps({**config, "vocab_size": 9000}))
    for count, settings in enumerate(({}, {"model": larger}, {"chat_template": "instruct"}, {"max_length": 64}), 1):
        api.prepare(str(data), **{"model": tiny, **settings})
        assert len(list(folder.iterdir())) == count
    prepared(data, tiny)
    assert len(list(folder.iterdir())) == 4
    for name, value in (("FORM", 99), ("MOST_HELD_OUT", {"valid_fraction": 1, "test_fraction": 1})):
        large.setattr(preparing, name, value)  # another version's rules
        prepared(data, tiny)
    assert len(list(folder.iterdir())) == 6


def test_a_run_from_disk_is_the_same_run(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights byte for byte; the run's tokens are the kept files themselves, and stay when those go."""

    def run(name: str) -> Any:
        found = lay_out(prepared(data, tiny, epochs=1, batch_size=4, threads=1), tmp_path / name)
        train(found, lambda: False)
        return found

    small = run("small")
    monkeypatch.setattr(preparing, "LARGE", 0)
    found = run("large")
    assert weights(found / "best_model") == weights(small / "best_model") and losses(found) == losses(small)
    assert os.stat(found / "data" / "train.ids.npy").st_nlink == 2
    for name in ("train.jsonl", "test.jsonl", "train.ids.npy", "train.mask.npy", "train.starts.npy"):
        assert (found / "data" / name).read_bytes() == (small / "data" / name).read_bytes()
    assert found.manifest()["data_hashes"] == small.manifest()["data_hashes"]


def test_nothing_is_kept_of_bad_data(tiny: Path, tmp_path: Path, folder: Path, large: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "rows.jsonl", [*rows(20), {"prompt": "a", "completion": ""}])
    for settings in ({}, {"max_length": 4}):
        with pytest.raises(DataError):
            prepared(data, tiny, **settings)
    assert list(folder.iterdir()) == []


def test_what_a_killed_process_had_begun_is_removed(
    tiny: Path, data: Path, folder: Path, large: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    old = folder / "unused"
    host = this_host()
    for left in (folder / f"abc.{host}-{gone.pid}.tmp", folder / f"abc.{host}-{os.getpid()}.tmp", old):
        left.mkdir(parents=True)
    os.utime(old, (0, 0))
    prepared(data, tiny)
    left_over = sorted(entry.name for entry in folder.iterdir())
    assert len(left_over) == 2 and f"abc.{host}-{os.getpid()}.tmp" in left_over  # a living process's, and the new one


def test_rows_with_their_places(tiny: Path, data: Path, large: pytest.MonkeyPatch) -> None:
    found = prepared(data, tiny).splits["train"]
    assert all(row.source.startswith(f"{data}:") for row in found)
    assert found[0] == next(iter(found)) and found[-1] == list(found)[-1]
    with pytest.raises(IndexError):
        found[len(found)]


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_it_says_how_far_it_is(limit: int, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "LARGE", limit)
    monkeypatch.setattr(preparing, "PART", 16)
    told: list[tuple[int, float, str]] = []
    found = api.prepare(str(data), model=str(tiny), on_progress=lambda *said: told.append(said))
    shares = {what: [share for _, share, other in told if other == what] for _, _, what in told}
    assert list(shares) == ["reading", "comparing", "splitting", "rendering"]
    assert (
        shares["rendering"] == sorted(shares["rendering"]) and shares["rendering"][-1] == shares["reading"][-1] == 1.0
    )
    assert told[-1][0] == sum(found.plan.rows.values())
