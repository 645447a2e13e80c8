"""What is trained: methods, the frozen bottom and its cache, what happens when memory runs out or a model overfits."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from conftest import rows, write
from training import architecture, fit, losses, weights
from tunesmith import api
from tunesmith.data.write import host as this_host
from tunesmith.errors import UsageError
from tunesmith.local import loop, methods, prefix
from tunesmith.local import model as models
from tunesmith.local.checkpoint import Position
from tunesmith.local.loop import train
from tunesmith.local.step import Engine, out_of_memory
from tunesmith.local.worker import failure
from tunesmith.recipe import Recipe


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "qwen2", "llama"])
def test_freezing_keeps_embeddings_and_bottom_in_each_architecture(name: str, tmp_path: Path) -> None:
    model = methods.apply(models.load(architecture(name, tmp_path)), Recipe(freeze_ratio=0.5))
    _, layers = methods.decoder_layers(model)
    top = {id(p) for p in layers[1].parameters()}
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert top <= {id(p) for _, p in trained}
    rest = [n for n, p in trained if id(p) not in top]
    assert rest and all("norm" in n or "ln_f" in n or "lm_head" in n or "embed_out" in n for n in rest), rest
    assert not model.get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize(("ratio", "frozen"), [(0.5, 1), (0.9, 1), (0.0, 0)])
def test_freezing_keeps_the_bottom(tiny: Path, ratio: float, frozen: int) -> None:
    model = methods.apply(models.load(tiny), Recipe(freeze_ratio=ratio))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    if not frozen:
        assert len(trained) == len(list(model.named_parameters()))
    else:
        assert {n.split(".")[2] for n in trained if ".layers." in n} == {"1"}
        assert "model.norm.weight" in trained and "model.embed_tokens.weight" not in trained


def test_lora_targets_rank_and_freezing(tiny: Path) -> None:
    def trained(**settings: object) -> dict[str, torch.nn.Parameter]:
        model = methods.apply(models.load(tiny), Recipe(method="lora", lora_alpha=8, **settings))
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    every = trained(lora_rank=3)
    assert len(every) == 2 * 2 * 7 and all("lora_" in n for n in every)  # A and B, two layers, seven maps
    assert {min(p.shape) for p in every.values()} == {3}
    assert {n.split(".")[-4] for n in trained(lora_targets="q_proj,v_proj")} == {"q_proj", "v_proj"}
    assert {n.split(".layers.")[1][0] for n in trained(freeze_ratio=0.5)} == {"1"}
    again = trained(lora_rank=3)
    assert all(torch.equal(every[n], again[n]) for n in every)  # the seed alone decides


def test_the_method_freeze_trains_the_upper_three_tenths(tiny: Path, tmp_path: Path, data: Path) -> None:
    plan = api.plan(data, model=str(tiny), method="freeze")
    assert (plan.recipe.freeze_ratio, plan.origin["freeze_ratio"]) == (0.7, "auto: method freeze")
    run = fit(tmp_path / "run", data, tiny, method="freeze", max_steps=2)
    trained = next(e["trainable"] for e in run.events() if e.get("state") == "running")
    assert trained == plan.trainable_parameters < plan.model.parameters / 4
    with pytest.raises(UsageError, match=r"freeze_ratio: is 1\.0; expected a number from 0 up to 1"):
        api.plan(data, model=str(tiny), freeze_ratio=1.0)


def test_qlora_keeps_four_bits_and_its_adapter_loads_in_peft(tiny: Path, tmp_path: Path, data: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    recipe = Recipe(method="qlora", lora_alpha=16)
    model: Any = methods.apply(
        models.load(tiny, quantisation=methods.quantisation(recipe, torch.device("cpu"))), recipe
    )
    kinds = {p.dtype for n, p in model.named_parameters() if "base_layer" in n}
    assert kinds == {torch.uint8}
    run = fit(tmp_path / "run", data, tiny, method="qlora", epochs=2)
    assert losses(run)[-1] < losses(run)[0]
    assert AutoPeftModelForCausalLM.from_pretrained(run.path).peft_config["default"].r == 16
    plan = api.plan(data, model=str(tiny), method="qlora")
    assert plan.trainable_parameters == next(e["trainable"] for e in run.events() if e.get("state") == "running")


def test_what_cannot_be_done_here_is_said_before_anything_is_read(
    tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="fp16 needs a GPU"):
        api.plan(data, model=str(tiny), mixed_precision="fp16")
    with monkeypatch.context() as apple:
        apple.setattr(sys, "platform", "darwin")
        for settings in ({"method": "qlora"}, {"optimizer": "adamw_8bit"}):
            with pytest.raises(UsageError, match="not for Apple's GPU"):
                api.plan(data, model=str(tiny), **settings)
    with monkeypatch.context() as windows:
        windows.setattr("tunesmith.preflight.sys.platform", "win32")
        with pytest.raises(UsageError, match="WSL 2"):
            api.plan(data, model=str(tiny))
    monkeypatch.setattr("tunesmith.preflight.find_spec", lambda name: None)
    for settings in ({"method": "qlora"}, {"optimizer": "adamw_8bit"}):
        with pytest.raises(UsageError, match="needs bitsandbytes"):
            api.plan(data, model=str(tiny), **settings)


def split(name: str, folder: Path, **settings: Any) -> tuple[prefix.Prefix | None, str]:
    recipe = Recipe(freeze_ratio=0.5, **settings)
    module, _ = models.loss_module(methods.apply(models.load(architecture(name, folder)), recipe))
    return prefix.split(module, recipe)


@pytest.mark.parametrize(
    "words", ["MPS backend out of memory (…)", "[enforce] DefaultCPUAllocator: can't allocate", ""]
)
def test_allocators_without_an_error_type(words: str) -> None:
    assert out_of_memory(RuntimeError(words)) is bool(words)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "phi3", "gpt_neox"])
def test_the_bottom_and_what_stands_above_make_the_whole(name: str, tmp_path: Path) -> None:
    found, reason = split(name, tmp_path)
    assert found is not None, reason
    assert len(found.below) == 1
    names = {n for n, _ in found.module.model.named_parameters()}
    with found.above():
        assert {n for n, _ in found.module.model.named_parameters()} < names
    assert {n for n, _ in found.module.model.named_parameters()} == names  # put back as it was


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("gpt2", {}, "dropout"),
        ("opt", {}, "run apart"),
        ("cohere", {}, "logits mode"),
        ("llama", {"neftune_alpha": 5.0}, "NEFTune"),
    ],
)
def test_where_the_bottom_cannot_be_run_apart_the_reason_is_given(
    name: str, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    found, why = split(name, tmp_path, **settings)
    assert found is None and reason in why


def test_the_cache_is_for_these_rows_and_weights_alone(tiny: Path, tmp_path: Path, data: Path, cache: Path) -> None:
    def files() -> set[str]:
        return {p.name for p in (cache / "prefix").glob("*")}

    fit(tmp_path / "one", data, tiny, freeze_ratio=0.5)
    first = files()
    assert len(first) == 2 and all(name.endswith(".f32") for name in first)
    fit(tmp_path / "lora", data, tiny, freeze_ratio=0.5, method="lora", max_steps=2)
    assert len(files() - first) == 1  # another method, another key: and of its training rows not all were seen
    other = write(tmp_path / "other.jsonl", rows(50))
    fit(tmp_path / "other", other, tiny, freeze_ratio=0.5)
    assert len(files()) == 5


def test_a_cache_that_finds_no_room_is_no_end(
    tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prefix.os, "posix_fallocate", full)
    run = fit(tmp_path / "run", data, tiny, freeze_ratio=0.5, max_steps=2)
    assert any("is not kept: No space left" in e.get("message", "") for e in run.events())
    assert not list((cache / "prefix").iterdir())


def test_a_cache_where_no_folder_can_be_is_no_end(
    tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    run = fit(tmp_path / "run", data, tiny, freeze_ratio=0.5, max_steps=2)
    assert any("is not kept: Not a directory" in e.get("message", "") for e in run.events()) and run.last("done")


def test_what_decides_the_bottom_is_in_the_caches_name(tiny: Path, tmp_path: Path, data: Path, cache: Path) -> None:
    theta = tmp_path / "theta"
    shutil.copytree(tiny, theta)
    config = json.loads((theta / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    (theta / "config.json").write_text(json.dumps(config))
    seen = 0
    for number, (model, settings) in enumerate(
        [(tiny, {}), (theta, {}), (tiny, {"mixed_precision": "bf16"}), (tiny, {"gradient_checkpointing": True})]
    ):
        fit(tmp_path / f"run{number}", data, model, freeze_ratio=0.5, **settings)
        seen, before = len(list((cache / "prefix").iterdir())), seen
        assert seen == before + 2, number  # one for the training rows, one for the validation rows
    fit(tmp_path / "again", data, tiny, freeze_ratio=0.5)
    assert len(list((cache / "prefix").iterdir())) == seen


def test_no_cache_that_would_fill_the_disk(
    tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(prefix.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    run = fit(tmp_path / "run", data, tiny, freeze_ratio=0.5, max_steps=2)
    assert any("over half of the" in e.get("message", "") for e in run.events()) and not (cache / "prefix").exists()


def test_what_a_killed_run_had_begun_of_a_cache_is_removed(tiny: Path, tmp_path: Path, data: Path, cache: Path) -> None:
    folder = cache / "prefix"
    folder.mkdir(parents=True)
    host = this_host()
    left = {f"mine.{host}-{os.getpid()}.tmp", f"elsewhere.x{host}-{2**22 + 1}.tmp", "another.tmp"}
    for name in (f"old.{host}-{2**22 + 1}.tmp", "old.f32", *left):
        (folder / name).touch()
    os.utime(folder / "old.f32", (0, 0))
    fit(tmp_path / "run", data, tiny, freeze_ratio=0.5, max_steps=2)
    found = {path.name for path in folder.iterdir()}
    assert left <= found and not any("old" in name for name in found)


def test_out_of_memory_goes_on_with_smaller_parts_to_the_same_result(
    tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(tmp_path / "whole", data, tiny, batch_size=8, epochs=2)
    collate = loop.batches.collate

    def short_of_memory(tokens: Any, chosen: list[int], device: torch.device) -> Any:
        if len(chosen) > 4 and tokens.starts[-1] > 300:  # in training; validation goes by tokens
            raise torch.OutOfMemoryError("no")
        return collate(tokens, chosen, device)

    monkeypatch.setattr(loop.batches, "collate", short_of_memory)
    run = fit(tmp_path / "run", data, tiny, batch_size=8, epochs=2)
    assert [e["message"] for e in run.events() if e["type"] == "warning"] == [
        "out of memory: going on with 4 rows at a time, to the same result"
    ]
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    monkeypatch.setattr(loop.batches, "collate", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(torch.OutOfMemoryError):
        fit(tmp_path / "never", data, tiny, batch_size=8)


def test_what_the_failed_pass_has_kept_is_free_before_the_next(
    tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a resume goes on with the smaller parts: to the same bytes."""
    own, kept, checked = Engine.loss, [], []

    def runs_out(self: Engine, side: str, rows: list[int], forward: Any = None) -> Any:
        if kept and not checked:
            checked.append(kept[0]())
        loss = own(self, side, rows, forward)
        if side == "train" and len(rows) > 4:
            kept.append(weakref.ref(loss[0]))
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return loss

    monkeypatch.setattr(Engine, "loss", runs_out)
    run = fit(tmp_path / "run", data, tiny, batch_size=8, epochs=2, save_steps=3, save_total_limit=9)
    assert len(kept) == 1 and checked == [None]
    want = weights(run / "final_model")
    train(run, lambda: False, 3)
    assert len(kept) == 1 and weights(run / "final_model") == want
    monkeypatch.setattr(Engine, "loss", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(torch.OutOfMemoryError):  # one row at a time cannot be halved
        fit(tmp_path / "one", data, tiny, batch_size=1, gradient_accumulation_steps=8)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), "out of memory"),
        (MemoryError(), "out of memory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
        (UsageError("said"), "said"),
        (RuntimeError("shapes do not match"), None),
    ],
)
def test_what_is_no_defect(error: BaseException, words: str | None) -> None:
    found = failure(error, "run")
    assert (found is None) if words is None else (found is not None and words in found.message)


def test_overfitting_is_said_when_it_happens(tiny: Path, tmp_path: Path) -> None:
    """Answers that nothing predicts: what is learnt of them is memorised. Said once, two validations after the best."""
    items = [{"prompt": f"q{i}", "completion": f"{i * 7919 % 1000} {i * 104729 % 1000}"} for i in range(30)]
    run = fit(tmp_path / "run", write(tmp_path / "d.jsonl", items), tiny, epochs=40, patience=0, learning_rate=1e-2)
    evals = run.metrics("eval")
    said = [e for e in run.events() if e["type"] == "overfitting"]
    assert evals[-1]["epoch"] == 40 and len(said) == 1
    best = min(evals[1:], key=lambda e: e["loss"])
    assert (said[0]["best_step"], said[0]["best_epoch"]) == (best["step"], best["epoch"])
    pairs = itertools.pairwise(evals)
    assert said[0]["step"] == next(
        b["step"] for a, b in pairs if min(a["loss"], b["loss"]) > 1.02 * best["loss"] and a["step"] > best["step"]
    )
    assert not [e for e in fit(tmp_path / "ok", tmp_path / "d.jsonl", tiny).events() if e["type"] == "overfitting"]


def test_a_loss_that_stays_level_is_no_overfitting() -> None:
    """The losses of a healthy run of 204 rows, and the same rising: the event comes once, at the second that is clearly worse."""
    for curve, at in (([3.74, 3.27, 3.08, 2.996, 3.026, 3.048, 3.035], None), ([3.74, 3.0, 3.04, 3.07, 3.09, 3.3], 5)):
        position, said = Position(), []
        for step, loss in enumerate(curve, 1):
            position.step, position.since_eval = step, 4.0 - step / 2
            position.seen(loss, position.best_loss is None or loss < position.best_loss)
            said += [step] if position.overfits() else []
        assert said == ([] if at is None else [at])


def test_runs_with_and_without_a_bottom_agree(tiny: Path, tmp_path: Path, data: Path) -> None:
    """The bottom row by row, or all layers over packed rows: the same training but for rounding."""
    apart = fit(tmp_path / "apart", data, tiny, freeze_ratio=0.5, epochs=2)
    whole = fit(tmp_path / "whole", data, tiny, freeze_ratio=0.5, epochs=2, neftune_alpha=1e-12)
    assert any("NEFTune" in e.get("message", "") for e in whole.events())
    assert losses(apart) == pytest.approx(losses(whole), rel=1e-5)
    assert weights(apart / "final_model") != weights(tiny)


def test_a_cache_that_others_cut_or_delete_is_no_end(
    tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    first = fit(tmp_path / "a", data, tiny, freeze_ratio=0.5, max_steps=12)
    (kept,) = (Path(e["path"]) for e in first.events("prefix_cache") if e["side"] == "train")
    whole = kept.read_bytes()
    kept.write_bytes(b"cut")
    again = fit(tmp_path / "b", data, tiny, freeze_ratio=0.5, max_steps=12)
    assert losses(again) == losses(first) and kept.read_bytes() == whole
    assert [e["found"] for e in again.events("prefix_cache") if e["side"] == "train"] == [False]
    opened = prefix.Rows.__init__

    def gone(self: prefix.Rows, bottom: Any, tokens: Any, path: Path | None) -> None:
        if path:  # between the look and the opening
            path.unlink(missing_ok=True)
            raise FileNotFoundError(2, "No such file or directory", str(path))
        opened(self, bottom, tokens, path)

    monkeypatch.setattr(prefix.Rows, "__init__", gone)
    third = fit(tmp_path / "c", data, tiny, freeze_ratio=0.5, max_steps=12)
    assert losses(third) == losses(first) and any("is not kept" in e["message"] for e in third.events("warning"))

    def lost(self: prefix.Rows, *given: Any) -> None:
        opened(self, *given)
        shutil.rmtree(cache / "prefix", ignore_errors=True)  # while it is being filled

    monkeypatch.setattr(prefix.Rows, "__init__", lost)
    fourth = fit(tmp_path / "d", data, tiny, freeze_ratio=0.5, max_steps=12, valid_fraction=0.0)
    assert losses(fourth) and fourth.last("done")
