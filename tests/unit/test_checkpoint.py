"""Checkpoints: complete or absent, verified, and the one before used when one is damaged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from training import fit, weights
from tunesmith import api
from tunesmith.errors import RunError
from tunesmith.local import checkpoint
from tunesmith.local.loop import train
from tunesmith.runs import Run


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    from conftest import rows, write

    folder = tmp_path_factory.mktemp("run")
    return fit(folder / "run", write(folder / "d.jsonl", rows(60)), tiny, epochs=3, save_total_limit=3, save_steps=6)


def copy(run: Run, tmp_path: Path) -> Run:
    shutil.copytree(run.path, tmp_path / "copy")
    return Run(tmp_path / "copy")


def test_names_contents_and_hard_links(finished: Run) -> None:
    folders = checkpoint.existing(finished)
    assert [f.name for f in folders][-1] == "checkpoint-step-36"
    names = {p.name for p in folders[-1].iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "optimizer.safetensors",
        "rng.safetensors",
        "trainer.json",
        "MANIFEST.json",
    } <= names
    assert (folders[-1] / "model.safetensors").samefile(finished / "final_model" / "model.safetensors")  # no byte twice
    assert not {p.name for p in (finished / "final_model").iterdir()} & set(checkpoint.TRAINER_FILES)
    assert not list(finished.path.rglob("*.bin")) and not list(finished.path.rglob("*.pt"))


@pytest.mark.parametrize(
    "how",
    [
        {"optimizer": "adamw_8bit"},
        {"optimizer": "paged_adamw_8bit", "freeze_ratio": 0.5},
        {"optimizer": "adamw_8bit", "method": "lora", "lora_rank": 64},
        {"optimizer": "paged_adamw_8bit", "method": "qlora", "lora_rank": 64},
    ],
)
def test_states_of_eight_bits_come_back(how: dict[str, Any], tiny: Path, tmp_path: Path, data: Path) -> None:
    """Those of matrices of 4,096 weights and more, whose tables all stand in the same memory."""
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny)
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    model = shutil.copytree(tiny, tmp_path / "wide")
    LlamaForCausalLM(config).save_pretrained(model)
    both = [
        fit(tmp_path / name, data, model, max_steps=6, save_steps=3, eval_steps=6, save_total_limit=9, **how)
        for name in ("whole", "again")
    ]
    shutil.rmtree(both[1] / "checkpoints" / "checkpoint-step-6")
    saved = load_file(both[0] / "checkpoints" / "checkpoint-step-3" / "optimizer.safetensors")
    eight = [name for name, tensor in saved.items() if tensor.dtype == torch.uint8]
    assert len(eight) >= 8 and sum(name.startswith("qmap1/") for name in saved) == len(eight) / 2
    api.resume(both[1] / "checkpoints" / "checkpoint-step-3")
    assert both[1].last("resumed")["step"] == 3
    assert weights(both[0] / "final_model") == weights(both[1] / "final_model")


@pytest.mark.parametrize("limit", [1, 2])
def test_only_the_last_and_the_best_are_kept(tiny: Path, tmp_path: Path, data: Path, limit: int) -> None:
    run = fit(tmp_path / "run", data, tiny, epochs=4, save_steps=4, save_total_limit=limit, patience=0)
    kept = [int(f.name.removeprefix(checkpoint.PREFIX)) for f in checkpoint.existing(run)]
    best = run.summary()["best_step"]
    assert kept[-1] == 48 and best in kept and len(kept) in (limit, limit + 1)


def test_checkpoints_between_the_regular_ones_cost_none_of_them(tmp_path: Path) -> None:
    for step in (5, 8, 10, 13, 15, 17):  # every fifth is asked for, the others were made because a minute had passed
        (tmp_path / "checkpoints" / f"checkpoint-step-{step}").mkdir(parents=True)
    checkpoint.prune(Run(tmp_path), 2, {5}, 5)
    assert [checkpoint.number(f) for f in checkpoint.existing(Run(tmp_path))] == [5, 10, 15, 17]


def damage_files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_every_damaged_file_is_found_and_the_one_before_used(finished: Run, tmp_path: Path, how: str) -> None:
    names = damage_files(checkpoint.existing(finished)[-1])
    assert len(names) >= 8
    for name in names:
        run = copy(finished, tmp_path)
        *_, before, last = checkpoint.existing(run)
        data = (last / name).read_bytes()
        (last / name).unlink()  # the copy has its own files; best_model shares them no more
        if how != "remove":
            (last / name).write_bytes(
                data[: len(data) // 2] if how == "truncate" else data[:-1] + bytes([data[-1] ^ 1])
            )
        assert checkpoint.damage(last) is not None, name
        assert checkpoint.latest(run) == before
        assert any("damaged" in e["message"] for e in run.events() if e["type"] == "warning")
        shutil.rmtree(run.path)


def test_resume_from_every_checkpoint_gives_the_same_bytes(finished: Run, tmp_path: Path) -> None:
    want = weights(finished / "final_model")
    for keep in range(len(checkpoint.existing(finished))):
        run = copy(finished, tmp_path)
        for folder in checkpoint.existing(run)[keep + 1 :]:
            shutil.rmtree(folder)
        for name in ("final_model", "best_model"):
            shutil.rmtree(run / name)
        train(run, lambda: False)
        assert weights(run / "final_model") == want
        assert run.summary()["steps"] == 36
        shutil.rmtree(run.path)


def test_the_gpu_has_a_generator_too(tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        state = torch.arange(16, dtype=torch.uint8)

        def get_rng_state(self) -> torch.Tensor:
            return self.state

        def set_rng_state(self, state: torch.Tensor) -> None:
            self.state = state

    gpu = Gpu()
    monkeypatch.setattr(checkpoint, "accelerator", lambda: gpu)
    run = fit(tmp_path / "run", data, tiny, max_steps=2)
    gpu.state = torch.zeros(16, dtype=torch.uint8)
    run.append("state", state="paused")
    train(run, lambda: False)
    assert gpu.state.tolist() == list(range(16))


def test_resume_from_a_named_checkpoint(finished: Run, tmp_path: Path) -> None:
    """Training goes on from that step; what came later is deleted, and said to be."""
    run, want = copy(finished, tmp_path), weights(finished / "final_model")
    first, *later = checkpoint.existing(run)
    assert len(later) >= 2
    train(run, lambda: False, int(first.name.removeprefix(checkpoint.PREFIX)))
    said = [e["message"] for e in run.events() if e["type"] == "warning"]
    assert all(any(f"{folder.name} is deleted" in text for text in said) for folder in later)
    resumed = [e["step"] for e in run.events() if e["type"] == "resumed"]
    assert resumed == [int(first.name.removeprefix(checkpoint.PREFIX))] and weights(run / "final_model") == want


def test_a_finished_run_goes_on_from_a_named_checkpoint_or_with_more_patience(
    tiny: Path, tmp_path: Path, data: Path
) -> None:
    run = fit(tmp_path / "run", data, tiny, epochs=6, min_gain=100.0, patience=2, save_total_limit=9)
    assert run.summary()["steps"] == 36 and run.summary()["stopped_early"]
    assert api.resume(run).summary()["steps"] == 36  # nothing was asked of it
    assert api.resume(run, patience=3).summary()["steps"] == 48
    run = api.resume(run / "checkpoints" / "checkpoint-step-12", patience=1)
    summary = run.summary()  # of the history that led here, not of the steps that were taken back
    assert summary["steps"] == 24 and summary["best_step"] == 12
    assert [e["step"] for e in run.metrics("eval")] == [0, 12, 24]
    assert json.loads((run / "model_info.json").read_text())["steps"] == 24


def test_a_named_checkpoint_that_is_damaged_costs_no_other(finished: Run, tmp_path: Path) -> None:
    run = copy(finished, tmp_path)
    before = checkpoint.existing(run)
    (before[1] / "trainer.json").write_text("{}")
    for step, words in (
        (checkpoint.number(before[1]), "damaged: trainer.json has changed"),
        (5, "no checkpoint of step 5"),
    ):
        with pytest.raises(RunError, match=words):
            train(run, lambda: False, step)
    assert checkpoint.existing(run) == before


def test_damaged_checkpoints_take_no_place_among_the_last(finished: Run, tmp_path: Path) -> None:
    run = copy(finished, tmp_path)
    shutil.copytree(checkpoint.existing(run)[-1], run / "checkpoints" / "checkpoint-step-36.bak")
    _, *later = checkpoint.existing(run)
    for folder in later:
        (folder / "trainer.json").write_text("{}")
    train(run, lambda: False)
    names = {folder.name for folder in (run / "checkpoints").iterdir()}
    assert {f"damaged-{folder.name}" for folder in later} <= names and "checkpoint-step-36.bak" in names
    assert all(checkpoint.damage(folder) is None for folder in checkpoint.existing(run))
    assert weights(run / "final_model") == weights(finished / "final_model")


def test_a_damaged_best_checkpoint_is_not_published(tiny: Path, tmp_path: Path, data: Path) -> None:
    run = fit(tmp_path / "run", data, tiny, epochs=4, min_gain=100.0, patience=0, save_total_limit=9)
    best = run / "checkpoints" / f"checkpoint-step-{run.summary()['best_step']}"
    whole = (best / "model.safetensors").read_bytes()
    assert (run / "best_model" / "model.safetensors").read_bytes() == whole
    assert weights(run / "best_model") != weights(run / "final_model")
    (best / "model.safetensors").unlink()
    (best / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    train(run, lambda: False)
    assert weights(run / "best_model") == weights(run / "final_model")
    assert any("best_model is the last one" in e.get("message", "") for e in run.events())


def test_a_checkpoint_is_made_by_the_clock_too(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However rare validations and --save-steps are; but not while saving would take much of the time."""
    from conftest import rows, write
    from tunesmith.local import loop

    data = write(tmp_path / "d.jsonl", rows(60))
    counts = {}
    for share in (1e9, 1e-9):
        monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
        monkeypatch.setattr(loop, "SAVE_SHARE", share)
        run = fit(tmp_path / f"run{share}", data, tiny, save_steps=999, eval_steps=999)
        counts[share] = [e["step"] for e in run.events() if e["type"] == "checkpoint"]
    assert counts == {1e9: list(range(1, 13)), 1e-9: [1, 12]}


def test_files_can_be_read_by_others_and_edited_without_harm(finished: Run, tmp_path: Path) -> None:
    import os

    run = copy(finished, tmp_path)
    shutil.rmtree(run / "best_model")
    last = checkpoint.existing(run)[-1]
    checkpoint.publish(last, run / "best_model")
    mask = os.umask(0)
    os.umask(mask)
    assert {p.stat().st_mode & 0o777 for p in (finished / "final_model").iterdir()} == {0o666 & ~mask}
    (run / "best_model" / "generation_config.json").write_text("{}")
    assert checkpoint.damage(last) is None


def test_what_is_published_is_on_the_disk_before_it_is_said(
    tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: set[int] = set()
    fsync = os.fsync

    def noted(handle: int) -> None:
        reached.add(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    run = fit(tmp_path / "run", data, tiny, max_steps=2)
    for folder in (run / "best_model", run / "final_model"):
        assert {path.stat().st_ino for path in (folder, *folder.iterdir())} <= reached
    assert {(run / name).stat().st_ino for name in ("config.json", "model.safetensors", "tokenizer.json")} <= reached


def test_a_save_that_fails_leaves_nothing_behind(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.local import model as models
    from tunesmith.local.checkpoint import Position

    run = copy(finished, tmp_path)
    before = sorted(p.name for p in (run / "checkpoints").iterdir())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(run, None, None, checkpoint.State(None, {}, {}), Position(step=99))  # type: ignore[arg-type]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == before


def test_resume_of_a_run_that_had_just_stopped_early_trains_no_further(tiny: Path, tmp_path: Path, data: Path) -> None:
    run = fit(tmp_path / "run", data, tiny, epochs=8, patience=2, min_gain=100.0)
    want, steps = weights(run / "final_model"), run.summary()["steps"]
    assert steps == 36 < run.summary()["planned_steps"]
    for name in ("final_model", "best_model"):  # as if killed between the last checkpoint and the end
        shutil.rmtree(run / name)
    train(run, lambda: False)
    assert weights(run / "final_model") == want and run.summary()["steps"] == steps
    assert not list(tmp_path.rglob(".*.tmp"))  # publishing a second time leaves nothing behind
