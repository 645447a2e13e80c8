"""Recipe: the one declaration of every setting: type, range, default, help text.

Flags, configuration files, the JSON schema, the reference page and a run's manifest are derived from
it. To add a setting, add a field here and read it where it acts; a test fails while nothing reads it.

Values and their origins come together in `settings`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from tunesmith.errors import UsageError

FACTS = Path(__file__).parent / "facts"
Auto = Literal["auto"]
Count = Annotated[int, Meta(gt=0)]
MOST_CORES = 4096  # no machine has more; a system refuses far more threads than that
Cores = Annotated[int, Meta(gt=0, le=MOST_CORES)]
Whole = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, lt=1)]
Positive = Annotated[float, Meta(gt=0)]
Amount = Annotated[float, Meta(ge=0)]


def opt(group: str, help: str, *aliases: str, unit: str = "") -> Meta:
    """Help group and text of a setting, its further names, and what it counts where it is a number."""
    return Meta(description=help, extra={"group": group, "aliases": aliases, "unit": unit})


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every setting of a run. `"auto"` values are resolved by documented rules once the data is known."""

    dataset: Annotated[str | None, opt("data", "file, folder, sample name or Hub data set to learn from")] = None
    columns: Annotated[dict[str, str], opt("data", "map columns: prompt=question,completion=answer")] = {}
    valid_dataset: Annotated[
        str | None, opt("data", "validation rows from here instead of a share of --dataset", "validation_dataset")
    ] = None
    test_dataset: Annotated[str | None, opt("data", "test rows from here instead of a share of --dataset")] = None
    valid_fraction: Annotated[
        Share | Auto,
        opt("data", "share held out to choose the best step; auto: a tenth, 500 rows at most", unit="share"),
    ] = "auto"
    test_fraction: Annotated[
        Share | Auto,
        opt(
            "data",
            "share held out for the verdict, never seen in training; auto: a tenth, 2,000 rows at most",
            unit="share",
        ),
    ] = "auto"
    split_method: Annotated[
        Literal["hash", "threshold", "shuffle"],
        opt(
            "data",
            "hash: by content, exact counts; threshold: rows never change sides as a file grows; shuffle: by row order",
        ),
    ] = "hash"
    group_by: Annotated[str | None, opt("data", "rows equal in this field stay on one side: metadata.tree_id")] = None
    max_length: Annotated[
        Count | Auto, opt("data", "longest row in tokens; auto: the model's context", "max_seq_length", unit="tokens")
    ] = "auto"
    over_long: Annotated[
        Literal["error", "drop", "truncate"], opt("data", "what to do with rows over --max-length")
    ] = "error"
    num_workers: Annotated[
        Cores | Auto, opt("data", "processes that check and tokenize; auto: every core", unit="processes")
    ] = "auto"

    provider: Annotated[
        str, opt("model", "who trains: huggingface (this machine), openai (a service), or fake (a dry run)")
    ] = "huggingface"
    model: Annotated[str, opt("model", "starter (built in), a folder, or a Hub name", "base_model")] = "starter"
    task: Annotated[
        Literal["chat", "code", "instruct", "domain", "custom"], opt("model", "what the data teaches; sets defaults")
    ] = "chat"
    chat_template: Annotated[
        str,
        opt(
            "model",
            "how rows become text: model (its own), chat, instruct, completion or a Jinja file; auto: the model's own, "
            "where it has none the task's",
            "chat_template_path",
        ),
    ] = "auto"
    persona: Annotated[
        str, opt("model", "name that identity probes look for; auto: mined from the answers; none: no probes")
    ] = "auto"

    method: Annotated[
        Literal["full", "lora", "qlora", "freeze"],
        opt("method", "train all weights, low-rank adapters, adapters on 4-bit weights, or the upper layers"),
    ] = "full"
    lora_rank: Annotated[Count, opt("method", "rank of the adapters", "lora_r", unit="rank")] = 16
    lora_alpha: Annotated[
        Count | Auto, opt("method", "scale of the adapters; auto: twice the rank, 8 with rsLoRA", unit="factor")
    ] = "auto"
    lora_dropout: Annotated[Share, opt("method", "dropout on the adapters' input", unit="share")] = 0.0
    lora_targets: Annotated[str, opt("method", "all-linear, or module names: q_proj,v_proj", "target_modules")] = (
        "all-linear"
    )
    use_rslora: Annotated[
        bool, opt("method", "scale adapters by alpha / sqrt(rank): for high ranks (Kalajdzievski 2023)")
    ] = False
    use_dora: Annotated[
        bool, opt("method", "adapt direction and size of the weights apart (Liu et al. 2024); loads with peft alone")
    ] = False
    quant_type: Annotated[
        Literal["nf4", "fp4"], opt("method", "4-bit numbers of qlora's frozen weights", "bnb_4bit_quant_type")
    ] = "nf4"
    double_quant: Annotated[
        bool, opt("method", "qlora: quantise the scales too, 0.4 bits a weight less", "bnb_4bit_use_double_quant")
    ] = True
    compute_dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        opt("method", "qlora: type to multiply in; auto: bf16 on a GPU, fp32 on a CPU", "bnb_4bit_compute_dtype"),
    ] = "auto"
    freeze_ratio: Annotated[
        Share | Auto,
        opt(
            "method",
            "share of the layers, from the bottom, left as they are; auto: 0.7 for freeze, else 0",
            unit="share",
        ),
    ] = "auto"
    prefix_cache: Annotated[
        bool, opt("method", "keep the output of frozen layers on disk instead of computing it in every epoch")
    ] = True

    epochs: Annotated[
        Count | Auto,
        opt("training", "passes over the data", "num_epochs", "num_train_epochs", "n_epochs", unit="passes"),
    ] = "auto"
    max_steps: Annotated[Count | None, opt("training", "stop after this many optimizer steps", unit="steps")] = None
    batch_size: Annotated[
        Count | Auto, opt("training", "rows in memory at a time", "per_device_train_batch_size", unit="rows")
    ] = "auto"
    gradient_accumulation_steps: Annotated[
        Count, opt("training", "batches summed into one optimizer step", unit="batches")
    ] = 1
    micro_batch_tokens: Annotated[
        Count | Auto,
        opt("training", "a batch of more tokens goes through in parts, to the same result; auto: 8192", unit="tokens"),
    ] = "auto"
    optimizer: Annotated[
        Literal["adamw", "adamw_8bit", "paged_adamw_8bit"],
        opt(
            "training",
            "8bit: two bytes of state a weight instead of eight; paged: swapped out of a full GPU (without one: as 8bit)",
            "optim",
        ),
    ] = "adamw"
    adam_beta1: Annotated[Share, opt("training", "decay of the first moment", unit="factor")] = 0.9
    adam_beta2: Annotated[Share, opt("training", "decay of the second moment", unit="factor")] = 0.999
    adam_epsilon: Annotated[
        Positive, opt("training", "added to the root of the second moment", unit="size of a gradient")
    ] = 1e-8
    learning_rate: Annotated[Positive | Auto, opt("training", "peak learning rate", unit="a step")] = "auto"
    lr_scheduler: Annotated[
        Literal["cosine", "linear", "constant"],
        opt("training", "how the rate falls after warm-up", "lr_scheduler_type"),
    ] = "cosine"
    warmup_ratio: Annotated[
        Share | Auto, opt("training", "share of the steps that warm up; auto: a tenth, 100 steps at most", unit="share")
    ] = "auto"
    warmup_steps: Annotated[Whole | None, opt("training", "warm-up in steps, instead of the share", unit="steps")] = (
        None
    )
    weight_decay: Annotated[
        Amount, opt("training", "AdamW decay of weight matrices (not of norms and biases)", unit="a step")
    ] = 0.01
    max_grad_norm: Annotated[Amount, opt("training", "clip the gradient's norm to this; 0: never", unit="norm")] = 1.0
    seed: Annotated[Whole, opt("training", "seed of split, order, adapters and dropout", unit="number")] = 42
    mixed_precision: Annotated[
        Literal["auto", "no", "bf16", "fp16"], opt("training", "auto: bf16 on a GPU, no on a CPU; fp16: GPU only")
    ] = "auto"
    gradient_checkpointing: Annotated[bool, opt("training", "recompute activations: less memory, a third slower")] = (
        False
    )
    torch_compile: Annotated[bool, opt("training", "compile the layers first: pays on a GPU in long runs")] = False
    neftune_alpha: Annotated[
        Amount, opt("training", "noise on the embeddings, e.g. 5 (NEFTune, Jain et al. 2023); 0: none", unit="factor")
    ] = 0.0
    threads: Annotated[
        Cores | Auto,
        opt("training", "CPU threads of each process; auto: OMP_NUM_THREADS, else every core", unit="threads"),
    ] = "auto"
    nproc: Annotated[
        Count,
        opt(
            "training",
            "processes on this machine that share each step: one a GPU; the result is the same",
            unit="processes",
        ),
    ] = 1

    sharding: Annotated[
        Literal["none", "fsdp2"],
        opt(
            "training",
            "fsdp2: weights, gradients and optimizer state are spread over the processes (slower, less memory)",
        ),
    ] = "none"

    eval_steps: Annotated[
        Count | Auto, opt("watching", "validate every so many steps; auto: once an epoch", unit="steps")
    ] = "auto"
    save_steps: Annotated[
        Count | Auto, opt("watching", "checkpoint every so many steps; auto: at each validation", unit="steps")
    ] = "auto"
    save_total_limit: Annotated[
        Count, opt("watching", "newest checkpoints kept; the best stay too, and may be among these", unit="checkpoints")
    ] = 2
    save_best_limit: Annotated[
        Count,
        opt("watching", "checkpoints kept for the lowest validation losses, the best among them", unit="checkpoints"),
    ] = 1
    patience: Annotated[
        Whole, opt("watching", "stop after so many validations without gain; 0: never", unit="validations")
    ] = 3
    min_gain: Annotated[
        Amount, opt("watching", "a smaller fall of the validation loss is no gain", unit="nats a token")
    ] = 0.0

    token_accuracy: Annotated[
        bool,
        opt("watching", "also tell the share of tokens that were the likeliest, at a few percent of the time"),
    ] = False
    track: Annotated[
        Literal["none", "wandb", "mlflow"],
        opt("watching", "send the curves there too; TensorBoard files are always in logs/", "report_to"),
    ] = "none"

    base_url: Annotated[
        str | None, opt("openai", "address of the service; default: OPENAI_BASE_URL, else https://api.openai.com/v1")
    ] = None
    api_key_file: Annotated[
        str | None, opt("openai", "file with the service's key, instead of the variable OPENAI_API_KEY")
    ] = None
    suffix: Annotated[str | None, opt("openai", "word in the tuned model's name: 1 to 64 of a-z, 0-9 and -")] = None
    learning_rate_multiplier: Annotated[
        Positive | Auto,
        opt("openai", "factor on the service's own learning rate; auto: the service's choice", unit="factor"),
    ] = "auto"

    output_dir: Annotated[str | None, opt("output", "the run's directory; default RUNS_DIR/TASK_DATASET")] = None
    runs_dir: Annotated[str, opt("output", "where runs without --output-dir go")] = "fine_tuned_models"


# What may be changed when a run is gone on with: it decides when to stop or save and how the work is done, not what is learnt
SAFE = (
    "save_steps",
    "save_total_limit",
    "save_best_limit",
    "patience",
    "min_gain",
    "micro_batch_tokens",
    "prefix_cache",
    "threads",
    "nproc",
    "sharding",
    "token_accuracy",
    "track",
    "api_key_file",
)
SWITCHES = {"lora": ("method", "lora")}  # the seeds' --lora is --method lora


class Field(msgspec.Struct, frozen=True):
    """One setting as flags and the reference page need it."""

    name: str
    help: str
    group: str
    aliases: tuple[str, ...]
    unit: str
    type: Any
    default: Any

    def choices(self) -> tuple[str, ...]:
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    def number(self) -> tuple[type, Meta] | None:
        """int or float with its limits, where the setting is a number, or may be one."""
        parts = get_args(self.type) if get_origin(self.type) is Union else (self.type,)
        limited = (get_args(part) for part in parts if get_origin(part) is Annotated)
        return next(((kind, limits) for kind, limits in limited), None)


@functools.cache
def fields() -> dict[str, Field]:
    """Every setting by name, in the order of declaration."""
    hints = get_type_hints(Recipe, include_extras=True)
    defaults = dict(
        zip(Recipe.__struct_fields__[-len(Recipe.__struct_defaults__) :], Recipe.__struct_defaults__, strict=True)
    )
    found = {}
    for name, hint in hints.items():
        base, *limits, meta = get_args(hint)
        kind = Annotated[base, limits[0]] if limits else base
        found[name] = Field(
            name, meta.description, type=kind, default={} if name == "columns" else defaults[name], **meta.extra
        )
    return found


def canonical(key: str) -> str | None:
    """The setting that a key, alias or flag ("--num-epochs") names; None where there is none."""
    key = key.lstrip("-").replace("-", "_")
    for field in fields().values():
        if key == field.name or key in field.aliases:
            return field.name
    return None


def need_dataset(recipe: Recipe) -> str:
    """The data set's name, or UsageError when none was given."""
    if recipe.dataset is None:
        raise UsageError("no data set", fix="give --dataset FILE (or --dataset echo for the sample)")
    return recipe.dataset
