"""Every setting changes something: one small proof for each, and a check that none is missing."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import rows, write
from training import fit, losses, weights
from tunesmith import api, planning, preparing
from tunesmith.errors import DataError, UsageError
from tunesmith.layout import output_path
from tunesmith.local import batches
from tunesmith.planning import Plan
from tunesmith.recipe import Recipe, fields
from tunesmith.remote import service
from tunesmith.runs import Run


class Bench:
    """Plans and short runs on sixty rows with the tiny model."""

    def __init__(self, tiny: Path, folder: Path) -> None:
        self.tiny, self.folder, self.data = tiny, folder, write(folder / "data.jsonl", rows(60))
        self.count = 0

    def plan(self, **settings: Any) -> Plan:
        return api.plan(**{"dataset": self.data, "model": str(self.tiny), **settings})

    def prepare(self, **settings: Any) -> planning.Prepared:
        return api.prepare(**{"dataset": self.data, "model": str(self.tiny), **settings})

    def run(self, **settings: Any) -> Run:
        self.count += 1
        return fit(
            self.folder / f"run{self.count}",
            settings.pop("dataset", self.data),
            settings.pop("model", self.tiny),
            **settings,
        )

    def pair(self, name: str, value: Any, **common: Any) -> tuple[Run, Run]:
        """A run without and one with the setting."""
        return self.run(**common), self.run(**common, **{name: value})


PROOFS: dict[str, Callable[[Bench], None]] = {}


def proves(*names: str) -> Callable[[Callable[[Bench], None]], Callable[[Bench], None]]:
    def keep(function: Callable[[Bench], None]) -> Callable[[Bench], None]:
        for name in names:
            PROOFS[name] = function
        return function

    return keep


@proves("dataset", "columns")
def _(b: Bench) -> None:
    other = write(b.folder / "other.jsonl", [{"ask": r["prompt"], "say": r["completion"]} for r in rows(20)])
    assert b.plan(dataset=other, columns={"prompt": "ask", "completion": "say"}).rows["train"] == 16
    with pytest.raises(DataError, match="no known format"):
        b.plan(dataset=other)


@proves("valid_dataset", "test_dataset")
def _(b: Bench) -> None:
    other = write(b.folder / "other.jsonl", [{"prompt": f"other {i}", "completion": "x"} for i in range(7)])
    assert b.plan(valid_dataset=str(other)).rows == {"train": 54, "valid": 7, "test": 6}
    assert b.plan(test_dataset=str(other)).rows == {"train": 54, "valid": 6, "test": 7}
    asked = write(b.folder / "asked.jsonl", [{"prompt": r["prompt"], "completion": "another answer"} for r in rows(60)])
    assert [i.code for i in b.plan(valid_dataset=str(asked), test_fraction=0).issues if i.code == "leak"] == ["leak"]
    with pytest.raises(DataError, match="54 rows of the test set are training rows"):
        b.plan(test_dataset=str(b.data))
    with pytest.raises(DataError, match="7 validation rows ask what a test row asks"):
        b.plan(valid_dataset=str(other), test_dataset=str(other))


@proves("valid_fraction", "test_fraction")
def _(b: Bench) -> None:
    assert b.plan(valid_fraction=0.2, test_fraction=0.0).rows == {"train": 48, "valid": 12, "test": 0}
    assert b.plan().rows == {"train": 48, "valid": 6, "test": 6}
    for many, valid, test in (
        (100, 0.1, 0.1),
        (20_000, 0.025, 0.1),
        (1_000_000, 0.0005, 0.002),
        (300_000, 0.001666, 0.006666),
    ):
        assert preparing.held_out(Recipe(), many) == {"valid_fraction": valid, "test_fraction": test}
        assert math.ceil(many * valid) <= 500 and math.ceil(many * test) <= 2000
    assert preparing.held_out(Recipe(split_method="threshold"), 10**6)["valid_fraction"] == 0.1


@proves("split_method", "seed")
def _(b: Bench) -> None:
    def test_rows(**settings: Any) -> list[str]:
        return sorted(c.source for c in b.prepare(**settings).splits["test"])

    assert len({tuple(test_rows(split_method=m)) for m in ("hash", "threshold", "shuffle")}) == 3
    assert test_rows(seed=1) != test_rows(seed=2)


@proves("group_by")
def _(b: Bench) -> None:
    grouped = write(b.folder / "g.jsonl", [{**r, "metadata": {"tree": i // 3}} for i, r in enumerate(rows(60))])
    splits = b.prepare(dataset=grouped, group_by="metadata.tree").splits
    trees = [{c.metadata["tree"] for c in part} for part in splits.values()]
    assert not trees[0] & trees[1] and not trees[0] & trees[2] and [len(t) for t in trees] == [16, 2, 2]


@proves("max_length", "over_long")
def _(b: Bench) -> None:
    longest = b.plan().longest
    with pytest.raises(DataError, match="over-long"):
        b.plan(max_length=longest - 1)
    assert b.plan(max_length=longest - 1, over_long="drop").dropped > 0
    cut = b.plan(max_length=longest - 1, over_long="truncate")
    assert cut.longest == longest - 1 and cut.dropped == 0
    with pytest.raises(DataError, match="over the model's context"):
        b.plan(max_length=100_000)


@proves("base_url", "api_key_file", "suffix", "learning_rate_multiplier")  # what is sent: tests/remote/test_hostile.py
def _(b: Bench) -> None:
    plan = b.plan(
        provider="openai", model="gpt-4.1", base_url="http://127.0.0.1:1/v1", suffix="a", learning_rate_multiplier=2
    )
    assert (plan.recipe.base_url, plan.recipe.suffix, plan.recipe.learning_rate_multiplier) == (
        "http://127.0.0.1:1/v1",
        "a",
        2,
    )
    for name in ("base_url", "api_key_file", "suffix"):
        assert [i.code for i in b.plan(**{name: "x"}).issues if i.where == name and "has no effect" in i.message] == [
            "idle-setting"
        ]
    with pytest.raises(UsageError, match="a multiplier is of a service"):
        b.plan(learning_rate_multiplier=2)
    (b.folder / "key").write_text(" sk-from-a-file \n")
    assert service.key("https://host/v1", str(b.folder / "key")) == "sk-from-a-file"
    (b.folder / "key").write_text("two words")
    for path in ("key", "none"):
        with pytest.raises(UsageError, match="no key"):
            service.key("https://host/v1", str(b.folder / path))


@proves("nproc", "sharding")  # that the work is shared, to the same result: test_processes.py
def _(b: Bench) -> None:
    assert [i.code for i in b.plan(sharding="fsdp2").issues if i.where == "sharding"] == ["idle-setting"]
    with pytest.raises(UsageError, match="qlora cannot be spread"):
        b.plan(method="qlora", nproc=2, sharding="fsdp2")


@proves("num_workers")
def _(b: Bench) -> None:
    """How many processes render: what the rows become is the same."""
    seen: list[int] = []
    spread = preparing.spread
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "PART", 4)
        patch.setattr(preparing, "spread", lambda f, parts, n, here: seen.append(n) or spread(f, parts, n, here))
        one, three = b.prepare(num_workers=1), b.prepare(num_workers=3)
    assert seen == [1, 3]
    for side in ("train", "valid", "test"):
        assert one.tokens[side].ids.tolist() == three.tokens[side].ids.tolist() != []
        assert one.tokens[side].starts.tolist() == three.tokens[side].starts.tolist()


@proves("provider")
def _(b: Bench) -> None:
    run = api.train(b.data, model=str(b.tiny), provider="fake", output_dir=str(b.folder / "fake"), max_steps=3)
    assert run.state() == "succeeded" and run.summary()["steps"] == 3 and not (run / "best_model").exists()
    with pytest.raises(UsageError, match='did you mean "huggingface"'):
        b.plan(provider="hugingface")


@proves("model")
def _(b: Bench) -> None:
    assert b.plan(model="starter").model.parameters > 10 * b.plan().model.parameters
    for name in ("./nope", "no/such/place", "no-such-model"):
        with pytest.raises(UsageError, match=r"no such model folder|neither a folder"):
            b.plan(model=name)


@proves("task")
def _(b: Bench) -> None:
    assert output_path(b.plan(task="code").recipe) == Path("fine_tuned_models/code_data")
    assert b.plan(dataset="echo", task="code").recipe.persona == "none"


@proves("chat_template")
def _(b: Bench) -> None:
    bare = bare_copy(b.tiny, b.folder / "bare")
    for task, heading in (("chat", "User: "), ("instruct", "### Instruction:\n"), ("code", "")):
        prepared = b.prepare(model=str(bare), task=task)
        first, row = prepared.splits["train"][0], prepared.tokens["train"].row(0)[0]
        assert prepared.renderer.decode(row).startswith(heading + first.messages[0].content)
    assert prepared.plan.recipe.chat_template == "completion"
    assert prepared.plan.origin["chat_template"] == "auto: task code: the model has none of its own"
    assert b.plan(task="code").recipe.chat_template == "model"
    mine = b.folder / "mine.jinja"
    mine.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
                    "{% if add_generation_prompt %}<assistant>{% endif %}")  # fmt: skip
    run = b.run(chat_template=str(mine), max_steps=1, method="lora")
    assert run.template() == mine.read_text() and run.recipe().chat_template == str(mine)
    assert (run / "best_model" / "chat_template.jinja").read_text() == mine.read_text()
    with pytest.raises(UsageError, match=r'no chat template "instrct" \(did you mean "instruct"'):
        b.plan(chat_template="instrct")
    with pytest.raises(UsageError, match="the model has no chat template"):
        b.plan(model=str(bare), chat_template="model")
    mine.write_text("{% for %}")
    with pytest.raises(UsageError, match="no Jinja template"):
        b.plan(chat_template=str(mine))


def bare_copy(model: Path, folder: Path) -> Path:
    """A model without its chat template."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


@proves("persona")
def _(b: Bench) -> None:
    assert b.plan(dataset="echo").recipe.persona == "Deep Tree Echo"
    assert "named in" in b.plan(dataset="echo").origin["persona"]
    assert b.plan().recipe.persona == "none"
    assert b.plan(persona="Ada").recipe.persona == "Ada"


@proves("method", "lora_rank", "lora_alpha", "lora_dropout")
def _(b: Bench) -> None:
    full, lora = b.pair("method", "lora")
    assert (lora / "best_model" / "adapter_model.safetensors").exists() and not (
        full / "best_model" / "adapter_model.safetensors"
    ).exists()
    assert lora.recipe().lora_alpha == 32
    size = (lora / "best_model" / "adapter_model.safetensors").stat().st_size
    wider = b.run(method="lora", lora_rank=32)
    assert (wider / "best_model" / "adapter_model.safetensors").stat().st_size > 1.8 * size
    assert losses(b.run(method="lora", lora_alpha=64))[-1] != losses(lora)[-1]
    assert losses(b.run(method="lora", lora_dropout=0.5))[1:] != losses(lora)[1:]


@proves("use_rslora", "use_dora")
def _(b: Bench) -> None:
    plain = b.run(method="lora", lora_rank=16)
    rank_stable = b.run(method="lora", lora_rank=16, use_rslora=True, lora_alpha=32)
    assert losses(rank_stable)[0] == losses(plain)[0] and losses(rank_stable)[-1] != losses(plain)[-1]
    assert losses(b.run(method="lora", lora_rank=16, use_rslora=True)) == losses(plain)  # auto: the same scale here
    assert {b.plan(method="lora", lora_rank=r, use_rslora=True).recipe.lora_alpha for r in (4, 64)} == {8}
    dora = b.run(method="lora", lora_rank=16, use_dora=True)
    sizes = {n.replace("lora_A", "lora_magnitude_vector") for n in adapters(plain) if "lora_A" in n}
    assert adapters(dora) == adapters(plain) | sizes
    assert b.plan(method="lora", use_dora=True).trainable_parameters == trainable(dora)


def adapters(run: Run) -> set[str]:
    from safetensors.torch import load_file

    return {n.removesuffix(".weight") for n in load_file(run / "best_model" / "adapter_model.safetensors")}


def trainable(run: Run) -> int:
    return int(next(e["trainable"] for e in run.events() if e.get("state") == "running"))


@proves("quant_type", "double_quant", "compute_dtype")
def _(b: Bench) -> None:
    first = {
        name: losses(b.run(method="qlora", max_steps=2, **settings))
        for name, settings in {
            "nf4": {},
            "fp4": {"quant_type": "fp4"},
            "single": {"double_quant": False},
            "bf16": {"compute_dtype": "bf16"},
            "32 bits": {"method": "lora"},
        }.items()
        if name != "32 bits"
    }
    whole = losses(b.run(method="lora", max_steps=2))
    assert len({found[0] for found in first.values()} | {whole[0]}) == 5  # each its own rounding of the weights
    assert all(found[0] == pytest.approx(whole[0], rel=0.02) for found in first.values())


@proves("prefix_cache")
def _(b: Bench) -> None:
    kept, again, without = (b.run(freeze_ratio=0.5, epochs=3, prefix_cache=on) for on in (True, True, False))
    found = [[e["found"] for e in run.events() if e["type"] == "prefix_cache"] for run in (kept, again, without)]
    assert found == [[False, False], [True, True], []]
    assert losses(kept) == losses(again) == losses(without)
    assert len({weights(run / "final_model") for run in (kept, again, without)}) == 1


@proves("lora_targets")
def _(b: Bench) -> None:
    few = b.run(method="lora", lora_targets="q_proj,v_proj")
    assert b.plan(method="lora", lora_targets="q_proj,v_proj").trainable_parameters == trainable(few)
    assert trainable(few) == 2 * 16 * ((32 + 32) + (32 + 16))  # two layers, rank 16, q 32->32 and v 32->16
    with pytest.raises(UsageError, match='no layer "nope"'):
        b.run(method="lora", lora_targets="nope")


@proves("freeze_ratio")
def _(b: Bench) -> None:
    from safetensors.torch import load_file

    run = b.run(freeze_ratio=0.5)
    before, after = (load_file(f / "model.safetensors") for f in (b.tiny, run / "final_model"))
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and all(k.startswith("model.layers.1.") or k == "model.norm.weight" for k in changed)


@proves("epochs", "max_steps", "batch_size", "gradient_accumulation_steps")
def _(b: Bench) -> None:
    assert b.plan(batch_size=4, epochs=2).steps == 24
    assert b.plan(batch_size=4, epochs=2, max_steps=5).steps == 5
    assert b.plan(batch_size=8, epochs=2).steps == 12
    assert b.plan(batch_size=4, gradient_accumulation_steps=3, epochs=2).steps == 8
    assert b.run(max_steps=3).summary()["steps"] == 3


@proves("learning_rate", "lr_scheduler", "warmup_ratio", "warmup_steps")
def _(b: Bench) -> None:
    for settings, share in (({"epochs": 1}, 0.1), ({"epochs": 50, "batch_size": 1}, round(100 / 2400 - 5e-7, 6))):
        found = b.plan(**settings)
        assert found.recipe.warmup_ratio == share and "auto: a tenth of the steps" in found.origin["warmup_ratio"]

    def rates(**settings: Any) -> list[float]:
        return [e["lr"] for e in b.run(**{"max_steps": 8, **settings}).metrics("step")]

    assert max(rates(learning_rate=5e-4)) == 5e-4
    assert rates(lr_scheduler="constant", warmup_ratio=0)[0] == rates(lr_scheduler="constant", warmup_ratio=0)[-1]
    assert rates(lr_scheduler="linear") != rates(lr_scheduler="cosine")
    assert [r < 1e-3 for r in rates(warmup_steps=4)[:4]] == [True, True, True, False]
    assert rates(warmup_ratio=0.5)[0] == 1e-3 / 4


@proves("micro_batch_tokens")
def _(b: Bench) -> None:
    sizes: list[int] = []
    collate = batches.collate

    def counted(tokens: Any, rows: list[int], device: Any) -> Any:
        sizes.append(len(rows))
        return collate(tokens, rows, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "collate", counted)
        whole = b.run(max_steps=4, patience=0, valid_fraction=0.0)
        assert sizes == [4, 4, 4, 4]
        sizes.clear()
        parts = b.run(max_steps=4, patience=0, valid_fraction=0.0, micro_batch_tokens=20)
    assert set(sizes) == {1} and len(sizes) == 16
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    assert b.plan(batch_size=40, micro_batch_tokens=100).memory_mb < b.plan(batch_size=40).memory_mb


@proves("optimizer")
def _(b: Bench) -> None:
    whole, small = b.pair("optimizer", "adamw_8bit", epochs=2, save_steps=12)
    assert losses(small) != losses(whole) and losses(small) == pytest.approx(losses(whole), rel=0.01)
    states = [
        (r / "checkpoints" / "checkpoint-step-24" / "optimizer.safetensors").stat().st_size for r in (whole, small)
    ]
    assert states[1] < 0.6 * states[0]  # the starter's small matrices stay in 32 bits
    assert losses(b.run(optimizer="paged_adamw_8bit", epochs=2)) == losses(small)


@proves("adam_beta1", "adam_beta2", "adam_epsilon")
def _(b: Bench) -> None:
    plain = losses(b.run(max_steps=4))
    for name, value in (("adam_beta1", 0.5), ("adam_beta2", 0.9), ("adam_epsilon", 1e-2)):
        assert losses(b.run(max_steps=4, **{name: value}))[-1] != plain[-1]


@proves("torch_compile")
def _(b: Bench) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        plain, compiled = b.pair("torch_compile", True, max_steps=3)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert weights(compiled / "final_model") and torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@proves("neftune_alpha")
def _(b: Bench) -> None:
    plain, noisy = b.pair("neftune_alpha", 50.0, max_steps=4)
    assert losses(noisy)[0] != losses(plain)[0]
    assert plain.metrics("eval")[0]["loss"] == noisy.metrics("eval")[0]["loss"]  # no noise in validation


@proves("weight_decay")
def _(b: Bench) -> None:
    plain, decayed = b.pair("weight_decay", 0.9, epochs=2)
    assert weights(plain / "final_model") != weights(decayed / "final_model")


@proves("max_grad_norm")
def _(b: Bench) -> None:
    free, clipped = b.pair("max_grad_norm", 1e-4, max_steps=4)
    never = b.run(max_steps=4, max_grad_norm=0)
    assert losses(clipped)[-1] != losses(free)[-1]
    assert all(e["grad_norm"] > 0 for e in never.metrics("step"))  # still measured


@proves("mixed_precision")
def _(b: Bench) -> None:
    full, half = b.pair("mixed_precision", "bf16", max_steps=3)
    assert losses(half) != losses(full) and losses(half) == pytest.approx(losses(full), rel=0.02)
    assert losses(b.run(max_steps=3, mixed_precision="no")) == losses(full)


@proves("gradient_checkpointing")
def _(b: Bench) -> None:
    kept, recomputed = b.pair("gradient_checkpointing", True, max_steps=4)
    assert losses(recomputed) == losses(kept)  # the same numbers
    assert saved_bytes(b.tiny, True) < 0.6 * saved_bytes(b.tiny, False)  # for less memory
    assert losses(b.run(max_steps=4, gradient_checkpointing=True, method="lora")) == losses(
        b.run(max_steps=4, method="lora")
    )


def saved_bytes(folder: Path, recompute: bool, tokens: int = 200) -> int:
    """Bytes that the forward pass keeps for the backward pass."""
    from tunesmith.local import model as models

    module, _ = models.for_training(Recipe(model=str(folder), gradient_checkpointing=recompute), tokens)
    held = []
    parameters = {p.data_ptr() for p in module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: held.append(t.nbytes if t.data_ptr() not in parameters else 0) or t, lambda t: t
    ):
        module.hidden(torch.arange(tokens), [tokens // 2, tokens // 2]).sum()
    return sum(held)


@proves("threads")
def _(b: Bench) -> None:
    before = torch.get_num_threads()
    for threads in (before + 1, before):
        b.run(max_steps=1, threads=threads)
        assert torch.get_num_threads() == threads


@proves("eval_steps", "save_steps", "save_total_limit")
def _(b: Bench) -> None:
    run = b.run(eval_steps=5, save_steps=3, save_total_limit=9, patience=0)
    assert [e["step"] for e in run.metrics("eval")] == [0, 5, 10, 12]
    assert {3, 6, 9, 12} <= {e["step"] for e in run.metrics("checkpoint")}
    assert (
        len(list((run / "checkpoints").iterdir()))
        > 3
        > len(list((b.run(save_total_limit=1, save_steps=3, patience=0) / "checkpoints").iterdir()))
    )


@proves("save_best_limit")
def _(b: Bench) -> None:
    run = b.run(eval_steps=2, save_steps=50, save_total_limit=1, save_best_limit=3, patience=0, epochs=2)
    lowest = sorted((e["loss"], e["step"]) for e in run.metrics("eval") if e["step"])[:3]
    kept = {int(f.name.rpartition("-")[2]) for f in (run / "checkpoints").iterdir()}
    assert kept == {step for _, step in lowest} | {24}


@proves("track")  # what arrives there: test_tracking.py
def _(b: Bench) -> None:
    os.environ["WANDB_MODE"] = "offline"
    run = b.run(track="wandb", max_steps=1)
    assert list((run / "logs" / "wandb").glob("offline-run-*")) and (run / "logs" / "wandb.id").exists()


@proves("patience", "min_gain")
def _(b: Bench) -> None:
    assert (
        b.run(epochs=6, min_gain=100.0, patience=2).summary()["steps"] == 36
    )  # the first validation is the best; two more without gain
    assert b.run(epochs=6, min_gain=100.0, patience=0).summary()["steps"] == 72


@proves("token_accuracy")
def _(b: Bench) -> None:
    run = b.run(token_accuracy=True, epochs=2)
    told = [e["accuracy"] for kind in ("step", "eval") for e in run.metrics(kind)]
    assert len(told) == 27 and all(0 <= share <= 1 for share in told) and told[-1] > told[0]
    assert "accuracy" not in b.run(max_steps=1).metrics("step")[0]


@proves("output_dir", "runs_dir")
def _(b: Bench) -> None:
    assert output_path(b.plan(output_dir="x/y").recipe) == Path("x/y")
    path = output_path(b.plan(runs_dir=str(b.folder / "runs")).recipe)
    assert path == b.folder / "runs" / "chat_data"
    (path / "full").mkdir(parents=True)
    assert output_path(b.plan(runs_dir=str(b.folder / "runs")).recipe) == b.folder / "runs" / "chat_data-2"


def test_no_setting_lacks_a_proof() -> None:
    assert set(PROOFS) == set(fields())


@pytest.mark.parametrize(
    "proof", list(dict.fromkeys(PROOFS.values())), ids=lambda p: next(n for n, f in PROOFS.items() if f is p)
)
def test_setting_acts(proof: Callable[[Bench], None], tiny: Path, tmp_path: Path) -> None:
    proof(Bench(tiny, tmp_path))


def test_what_does_nothing_is_said(tiny: Path, tmp_path: Path) -> None:
    b = Bench(tiny, tmp_path)
    found = b.plan(lora_rank=8, warmup_steps=2, warmup_ratio=0.5).issues
    said = {(i.where, i.message) for i in found if i.code == "idle-setting"}
    why = {"lora_rank": "the method is full", "warmup_ratio": "warmup_steps is set"}
    assert said == {(name, f"it has no effect: {reason}") for name, reason in why.items()}
    assert not [i for i in b.plan(lora_rank=8, method="lora").issues if i.code == "idle-setting"]
    watching = {"patience": 2, "eval_steps": 5, "save_best_limit": 2, "min_gain": 0.1}
    for given, idle in (
        ({"valid_fraction": 0.0, "save_steps": 5, **watching}, [*watching]),
        ({"valid_fraction": 0.0, "eval_steps": 5, "patience": 0}, []),  # decides save_steps; never
        ({"valid_fraction": 0.2, "save_steps": 5, **watching}, []),
        ({"valid_dataset": b.folder / "held.jsonl", "valid_fraction": 0.2}, ["valid_fraction"]),
        ({"test_dataset": b.folder / "held.jsonl", "test_fraction": 0.2}, ["test_fraction"]),
        ({"test_dataset": b.folder / "held.jsonl", "test_fraction": 0.0}, []),
    ):
        write(b.folder / "held.jsonl", rows(90)[70:])
        assert {i.where for i in b.plan(**given).issues if i.code == "idle-setting"} == {*idle}, given


def test_adapters_stand_on_linear_layers_only(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"):
        Bench(tiny, tmp_path).plan(method="lora", lora_targets="embed_tokens")


def test_a_folder_with_a_split_is_not_mixed_again(tiny: Path, tmp_path: Path) -> None:
    b = Bench(tiny, tmp_path)
    (tmp_path / "parts").mkdir()
    for side in ("my_train", "my_val"):
        write(tmp_path / "parts" / f"{side}.jsonl", rows(20))
    with pytest.raises(UsageError, match=r"--dataset .*my_train.jsonl --valid-dataset .*my_val.jsonl"):
        b.plan(dataset=tmp_path / "parts")
