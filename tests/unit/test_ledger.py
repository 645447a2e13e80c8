"""row_losses.npy: of each row and epoch the loss that a plain computation gives, whoever shares the work; no run ends for it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import STARTER
from training import architecture, fit, weights
from tunesmith import api
from tunesmith.errors import Interrupted
from tunesmith.local import ledger
from tunesmith.local.backend import lay_out
from tunesmith.local.batches import step_rows
from tunesmith.local.loop import train
from tunesmith.local.loss import LossModule
from tunesmith.runs import ROW_LOSSES, Run

WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "in small parts": {"micro_batch_tokens": 64, "batch_size": 12},
    "accumulated": {"gradient_accumulation_steps": 3},
    "lora": {"method": "lora", "lora_rank": 4},
    "frozen, with the cache": {"freeze_ratio": 0.5},
    "frozen, without it": {"freeze_ratio": 0.5, "prefix_cache": False},
}


def table(run: Run) -> np.ndarray:
    return np.load(run / ROW_LOSSES)


def plain(model: Path, run: Run) -> list[float]:
    """The mean loss of each training row under a model, by transformers alone, one row at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    from tunesmith.render import Renderer

    found, judge, renderer = (
        [],
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(),
        Renderer(model),
    )
    for row in api.load(run / "data" / "train.jsonl"):
        rendered = renderer.render(row)
        ids, mask = torch.tensor([rendered.ids]), torch.tensor([rendered.mask], dtype=torch.bool)
        with torch.no_grad():
            found.append(judge(input_ids=ids, labels=ids.where(mask, torch.tensor(-100)), use_cache=False).loss.item())
    return found


def first_step(run: Run, model: Path) -> None:
    """What the first step has written is what the base model thinks of its rows; and of no other row anything is known."""
    found, recipe = table(run), run.recipe()
    want, seen = plain(model, run), step_rows(found.shape[1], recipe, 0)
    assert found.shape == (1, len(want)) and found.dtype == np.float32 and len(seen) in (4, 12)
    assert found[0, seen].tolist() == pytest.approx([want[row] for row in seen], rel=1e-4)
    assert np.flatnonzero(found[0]).tolist() == sorted(seen)
    assert len(set(found[0, seen].tolist())) == len(seen)


@pytest.mark.parametrize("way", WAYS)
def test_a_rows_loss_is_that_of_a_plain_computation(way: str, tiny: Path, tmp_path: Path, data: Path) -> None:
    first_step(fit(tmp_path / "run", data, tiny, max_steps=1, **WAYS[way]), tiny)


@pytest.mark.parametrize(("name", "mode"), [("gemma2", "logits"), ("falcon", "single")])
def test_models_that_cannot_be_packed(name: str, mode: str, tmp_path: Path, data: Path) -> None:
    model = architecture(name, tmp_path / "model", vocab_size=8192)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(STARTER / file, model / file)
    run = fit(tmp_path / "run", data, model, max_steps=1, gradient_accumulation_steps=3)
    assert next(e["mode"] for e in run.events() if e.get("state") == "running") == mode
    first_step(run, model)


def test_every_row_of_every_epoch_and_of_the_last_half_one(tiny: Path, tmp_path: Path, data: Path) -> None:
    """Their mean over a step, weighted by tokens, is the loss that the log has of it."""
    run = fit(tmp_path / "run", data, tiny, epochs=3, patience=0)
    found = table(run)
    assert found.shape == (3, 48) and (found > 0).all()
    supervised = np.array([sum(r.mask) for r in _rendered(run, tiny)])
    for step, told in enumerate(run.metrics("step")):
        rows = step_rows(48, run.recipe(), step)
        mean = (found[step // 12, rows] * supervised[rows]).sum() / supervised[rows].sum()
        assert mean == pytest.approx(told["loss"], rel=1e-5)
    half = fit(tmp_path / "half", data, tiny, epochs=2, max_steps=18, patience=0)
    assert table(half).shape == (2, 48) and (table(half) > 0).sum(1).tolist() == [48, 24]


def _rendered(run: Run, model: Path) -> list[Any]:
    from tunesmith.render import Renderer

    return Renderer(model).render_all(api.load(run / "data" / "train.jsonl"))


@pytest.mark.parametrize("method", [{}, {"method": "lora", "lora_rank": 4, "lora_dropout": 0.2}])
def test_the_weights_do_not_know_of_it(
    method: dict[str, Any], tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_it = fit(tmp_path / "with", data, tiny, **method)
    monkeypatch.setattr(LossModule, "by_row", property(lambda _: None, lambda _, value: None))
    without = fit(tmp_path / "without", data, tiny, **method)
    assert (table(with_it) > 0).all() and not table(without).any()
    assert weights(with_it / "final_model") == weights(without / "final_model")


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_processes_fill_all_rows(sharding: str, tiny: Path, tmp_path: Path, data: Path) -> None:
    settings = {"epochs": 2, "batch_size": 5, "patience": 0, "learning_rate": 1e-3, "threads": 1}
    one = fit(tmp_path / "one", data, tiny, **settings)
    two = api.train(str(data), model=str(tiny), output_dir=tmp_path / "two", nproc=2, sharding=sharding, **settings)
    assert (table(one) > 0).all() and table(two).shape == table(one).shape
    np.testing.assert_allclose(table(two), table(one), rtol=1e-4)


def test_killed_and_resumed_it_has_the_same_bytes(tiny: Path, tmp_path: Path, data: Path) -> None:
    """Killed by its own events' reader, after a step that no checkpoint holds; and asked to stop."""
    settings = {"epochs": 3, "batch_size": 4, "learning_rate": 1e-3, "threads": 1, "save_steps": 5, "patience": 0}
    whole = fit(tmp_path / "whole", data, tiny, **settings)
    stopped = lay_out(api.prepare(str(data), model=str(tiny), **settings), tmp_path / "stopped")
    with pytest.raises(Interrupted):
        train(stopped, lambda: len(stopped.metrics("step")) == 17)
    train(stopped, lambda: False)
    assert (stopped / ROW_LOSSES).read_bytes() == (whole / ROW_LOSSES).read_bytes()

    killed = lay_out(api.prepare(str(data), model=str(tiny), **settings), tmp_path / "killed")
    pid = os.fork()
    if not pid:  # a process that ends as a power cut would end it: nothing is closed or told
        train(killed, lambda: len(killed.metrics("step")) == 18 and os.kill(os.getpid(), signal.SIGKILL) is None)
        os._exit(0)
    deadline = time.monotonic() + 60
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(killed.metrics("step")) == 18 and np.count_nonzero(table(killed)) == 18 * 4
    train(killed, lambda: False)
    assert any(e["type"] == "resumed" and e["step"] == 15 for e in killed.events())
    assert (killed / ROW_LOSSES).read_bytes() == (whole / ROW_LOSSES).read_bytes()


def _warned(run: Run) -> list[str]:
    return [e["message"] for e in run.events() if e["type"] == "warning" and "rows' losses" in e["message"]]


def test_a_full_disk_costs_the_file_alone(
    tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    run = fit(tmp_path / "run", data, tiny, max_steps=2)
    assert run.state() == "succeeded" and not (run / ROW_LOSSES).exists()
    assert len(_warned(run)) == 1 and "No space left" in _warned(run)[0]


@pytest.mark.parametrize("odd", ["a folder", "garbage", "unwritable", "of another shape"])
def test_a_file_that_cannot_be_written(
    odd: str, tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said, and training goes on; a table of other rows is made anew."""
    run = lay_out(api.prepare(str(data), model=str(tiny), max_steps=2, batch_size=4, threads=1), tmp_path / "run")
    path = run / ROW_LOSSES
    if odd == "a folder":
        path.mkdir()
    elif odd == "garbage":
        path.write_bytes(b"\x93NUMPY nonsense")
    else:
        np.save(path, np.ones((1, 48) if odd == "unwritable" else (7, 9), np.float32))
    if odd == "unwritable":
        monkeypatch.setattr(ledger, "open_memmap", _refused)
    train(run, lambda: False)
    assert run.state() == "succeeded"
    assert len(_warned(run)) == (odd != "of another shape")
    if odd == "of another shape":
        assert np.count_nonzero(table(run)) == 8


def _refused(*_: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_a_row_known_by_heart_is_not_one_that_was_not_seen(tmp_path: Path) -> None:
    import torch

    run = Run(tmp_path)
    ledger.lay_out(run, 3, 2)
    ledger.Ledger(run, 4).write(4, [([2, 0], torch.tensor([0.0, 1.5]))])  # the first step of the second epoch
    assert table(run).tolist() == [[0, 0, 0], [1.5, 0, pytest.approx(ledger.LEAST)]]
    assert list(run.events()) == []
