"""How other trainers are driven for benchmarks/train.py: the same rows, batches, arithmetic and settings for each.

Each function trains on `rows` ({"ids", "mask", "messages"}, in file order) and returns {"seconds", "first", "last"}: the
time of the training loop, and the loss of its first and last step.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FREEZE = 0.7  # of the layers, from the bottom
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
Rows = list[dict[str, Any]]


def labels(row: dict[str, Any]) -> list[int]:
    return [i if m else -100 for i, m in zip(row["ids"], row["mask"], strict=True)]


def layers_kept(model: Path) -> int:
    """How many of a model's layers are trained when FREEZE of them are not."""
    count = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    return int(count - int(FREEZE * count))


def trainer_arguments(options: argparse.Namespace, out: str, how: str) -> dict[str, Any]:
    return dict(
        output_dir=out, max_steps=-1 if how == "packed" else options.steps * options.epochs,
        num_train_epochs=options.epochs, per_device_train_batch_size=options.batch, use_cpu=True,
        report_to="none", save_strategy="no", logging_steps=1, learning_rate=1e-3, lr_scheduler_type="constant",
        weight_decay=0.0, max_grad_norm=1.0, disable_tqdm=True, bf16=False, gradient_checkpointing=False,
        train_sampling_strategy="group_by_length" if how == "grouped" else "sequential",
    )  # fmt: skip


class Spy:
    """Times and losses, as a transformers callback: `callback()`."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.clock: list[float] = []

    def callback(self) -> Any:
        import transformers

        spy = self

        class Callback(transformers.TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                spy.clock.append(time.perf_counter())

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                spy.clock.append(time.perf_counter())

            def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
                if logs and "loss" in logs:
                    spy.losses.append(float(logs["loss"]))

        return Callback()

    def found(self) -> dict[str, float]:
        return {"seconds": self.clock[-1] - self.clock[0], "first": self.losses[0], "last": self.losses[-1]}


def loaded(options: argparse.Namespace, folder: Path) -> Any:
    """The model in fp32, its bottom frozen where the method is freeze."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if options.method == "freeze":
        layers = model.model.layers
        model.requires_grad_(False)
        for part in (*layers[int(FREEZE * len(layers)) :], model.model.norm):
            part.requires_grad_(True)
    return model


def trainer(options: argparse.Namespace, rows: Rows, folder: Path, out: str, how: str) -> dict[str, float]:
    import transformers
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer, model, spy = AutoTokenizer.from_pretrained(folder), loaded(options, folder), Spy()
    if options.method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**LORA))
    items = [{"input_ids": r["ids"], "attention_mask": [1] * len(r["ids"]), "labels": labels(r)} for r in rows]
    transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**trainer_arguments(options, out, how)),
        train_dataset=Dataset.from_list(items),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100),
        callbacks=[spy.callback()],
    ).train()
    return spy.found()


def trl(options: argparse.Namespace, rows: Rows, folder: Path, out: str, how: str) -> dict[str, float]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    spy = Spy()
    data = Dataset.from_list([{"input_ids": r["ids"], "completion_mask": list(map(int, r["mask"]))} for r in rows])
    SFTTrainer(
        model=loaded(options, folder),
        args=SFTConfig(
            **trainer_arguments(options, out, how), max_length=1024, packing=how == "packed", completion_only_loss=True
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(**LORA) if options.method == "lora" else None,
        callbacks=[spy.callback()],
    ).train()
    return spy.found()


def llamafactory(options: argparse.Namespace, rows: Rows, folder: Path, out: str, how: str) -> dict[str, float]:
    from llamafactory.data.formatter import StringFormatter
    from llamafactory.data.template import register_template
    from llamafactory.train.tuner import run_exp

    spy = Spy()
    register_template(  # the starter's, without the line break after the answer, which nothing is learnt from
        name="starter",
        format_user=StringFormatter(slots=["<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"]),
        format_assistant=StringFormatter(slots=["{{content}}<|im_end|>"]),
    )
    data = Path(out) / "data"
    data.mkdir()
    pairs = [{"prompt": r["messages"][0]["content"], "response": r["messages"][1]["content"]} for r in rows]
    (data / "rows.json").write_text(json.dumps(pairs))
    about = {"rows": {"file_name": "rows.json", "columns": {"prompt": "prompt", "response": "response"}}}
    (data / "dataset_info.json").write_text(json.dumps(about))
    arguments = trainer_arguments(options, f"{out}/out", how)
    del arguments["gradient_checkpointing"]
    arguments |= dict(
        model_name_or_path=str(folder), stage="sft", do_train=True, finetuning_type=options.method, dataset_dir=str(data),
        dataset="rows", template="starter", cutoff_len=1024, gradient_accumulation_steps=1, overwrite_cache=True,
        disable_gradient_checkpointing=True, disable_shuffling=True, flash_attn="sdpa", plot_loss=False, fp16=False,
        neat_packing=how == "packed",
    )  # fmt: skip
    if options.method == "lora":
        arguments |= dict(lora_rank=16, lora_alpha=32, lora_dropout=0.0, lora_target="all")
    if options.method == "freeze":
        arguments |= dict(freeze_trainable_layers=layers_kept(folder))
    run_exp(arguments, callbacks=[spy.callback()])
    return spy.found()


class _Padded:
    pad_id = 0


def torchtune_tokenizer() -> _Padded:
    return _Padded()


def torchtune_rows(tokenizer: object = None, file: str = "", packed: bool = False) -> Any:
    """A torchtune data set: rows as the benchmark wrote them, or several of them to 1,024 tokens that do not see each other."""
    import torch
    from torchtune.datasets import PackedDataset

    class Encoded(torch.utils.data.Dataset):  # type: ignore[misc]
        rows = tuple(json.loads(line) for line in Path(file).read_text().splitlines())

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> dict[str, list[int]]:
            return {"tokens": list(self.rows[index]["ids"]), "labels": labels(self.rows[index])}

    return PackedDataset(Encoded(), max_seq_len=1024) if packed else Encoded()


def torchtune(options: argparse.Namespace, rows: Rows, folder: Path, out: str, how: str) -> dict[str, float]:
    """Needs torchao 0.9 (a newer one breaks its imports). It has no recipe that freezes layers."""
    if options.method == "freeze" or how == "grouped":
        raise SystemExit("torchtune has no recipe for this")
    import torchtune as package
    from omegaconf import OmegaConf

    sys.modules.setdefault("peers", sys.modules[__name__])
    config = json.loads((folder / "config.json").read_text())
    shape = dict(
        vocab_size=config["vocab_size"], num_layers=config["num_hidden_layers"], num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"], embed_dim=config["hidden_size"], max_seq_len=2048, rope_base=10000,
        intermediate_dim=config["intermediate_size"], norm_eps=config["rms_norm_eps"], scale_factor=1,
    )  # fmt: skip
    builder = "torchtune.models.llama3_2._component_builders."
    if options.method == "lora":
        modules = ["q_proj", "k_proj", "v_proj", "output_proj"]
        shape |= dict(lora_attn_modules=modules, apply_lora_to_mlp=True, lora_rank=16, lora_alpha=32, lora_dropout=0.0)
    settings = OmegaConf.create(dict(
        output_dir=out, seed=0, shuffle=False, batch_size=options.batch, epochs=options.epochs,
        max_steps_per_epoch=None if how == "packed" else options.steps,
        model={"_component_": builder + ("lora_llama3_2" if options.method == "lora" else "llama3_2"), **shape},
        tokenizer={"_component_": "peers.torchtune_tokenizer"},
        dataset={"_component_": "peers.torchtune_rows", "file": str(options.folder / "ordered.jsonl"), "packed": how == "packed"},
        checkpointer={
            "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(folder), "model_type": "LLAMA3_2",
            "checkpoint_files": ["model.safetensors"], "recipe_checkpoint": None, "output_dir": out,
        },
        optimizer={"_component_": "torch.optim.AdamW", "lr": 1e-3, "weight_decay": 0.0, "fused": True},
        lr_scheduler={
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 0, "num_cycles": 0.0,
        },
        loss={"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}, optimizer_in_bwd=False, clip_grad_norm=1.0,
        resume_from_checkpoint=False, save_adapter_weights_only=True, gradient_accumulation_steps=1, compile=False,
        device="cpu", dtype="fp32", enable_activation_checkpointing=False, enable_activation_offloading=False,
        metric_logger={"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": out + "/log"},
        log_every_n_steps=1, log_peak_memory_stats=False,
    ))  # fmt: skip
    kind = "lora" if options.method == "lora" else "full"
    file = Path(str(package.__file__)).parent.parent / "recipes" / f"{kind}_finetune_single_device.py"
    spec = importlib.util.spec_from_file_location("recipe", file)
    assert spec and spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe = getattr(module, f"{'LoRA' if kind == 'lora' else 'Full'}FinetuneRecipeSingleDevice")
    losses: list[float] = []
    step = recipe._loss_step

    def loss_step(self: Any, batch: Any) -> Any:
        loss = step(self, batch)
        losses.append(float(loss))
        return loss

    recipe._loss_step, recipe.save_checkpoint = loss_step, lambda self, epoch: None
    training = recipe(cfg=settings)
    training.setup(cfg=settings)
    began = time.perf_counter()
    training.train()
    return {"seconds": time.perf_counter() - began, "first": losses[0], "last": losses[-1]}


def run(name: str, options: argparse.Namespace, rows: Rows) -> dict[str, float]:
    """Train with the peer `name`; `name:grouped` and `name:packed`: with its own grouping by length or packing."""
    peer, _, how = name.partition(":")
    known = {"trainer": trainer, "trl": trl, "llamafactory": llamafactory, "torchtune": torchtune}
    os.environ |= {"DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "true"}
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as out:
        return known[peer](options, rows, options.folder / options.shape, out, how)
