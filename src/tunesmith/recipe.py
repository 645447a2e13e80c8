"""Recipe: the one declaration of every setting: type, range, default, help text.

Flags, configuration files, the JSON schema, the reference page and a run's manifest are derived from
it. To add a setting, add a field here and read it where it acts; a test fails while nothing reads it.

Values and their origins come together in `settings`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from tunesmith.errors import UsageError

FACTS = Path(__file__).parent / "facts"
Auto = Literal["auto"]


def opt(group: str, help: str, *aliases: str, **limits: Any) -> Meta:
    """Help text, help group and further names of a setting; limits are msgspec's (ge, gt, le, lt)."""
    return Meta(description=help, extra={"group": group, "aliases": aliases}, **limits)


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every setting of a run. `"auto"` values are resolved by documented rules once the data is known."""

    dataset: Annotated[str | None, opt("data", "file, folder, sample name or Hub data set to learn from")] = None
    columns: Annotated[dict[str, str], opt("data", "map columns: prompt=question,completion=answer")] = {}
    valid_dataset: Annotated[
        str | None, opt("data", "validation rows from here instead of a share of --dataset", "validation_dataset")
    ] = None
    test_dataset: Annotated[str | None, opt("data", "test rows from here instead of a share of --dataset")] = None
    valid_fraction: Annotated[
        float | Auto, opt("data", "share held out to choose the best step; auto: a tenth, 500 rows at most")
    ] = "auto"
    test_fraction: Annotated[
        float | Auto,
        opt("data", "share held out for the verdict, never seen in training; auto: a tenth, 2,000 rows at most"),
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
        int | Auto, opt("data", "longest row in tokens; auto: the model's context", "max_seq_length")
    ] = "auto"
    over_long: Annotated[
        Literal["error", "drop", "truncate"], opt("data", "what to do with rows over --max-length")
    ] = "error"
    num_workers: Annotated[int | Auto, opt("data", "processes that check and tokenize; auto: every core")] = "auto"

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
    lora_rank: Annotated[int, opt("method", "rank of the adapters", "lora_r", ge=1)] = 16
    lora_alpha: Annotated[int | Auto, opt("method", "scale of the adapters; auto: twice the rank, 8 with rsLoRA")] = (
        "auto"
    )
    lora_dropout: Annotated[float, opt("method", "dropout on the adapters' input", ge=0, lt=1)] = 0.0
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
        float | Auto,
        opt("method", "share of the layers, from the bottom, left as they are; auto: 0.7 for freeze, else 0"),
    ] = "auto"
    prefix_cache: Annotated[
        bool, opt("method", "keep the output of frozen layers on disk instead of computing it in every epoch")
    ] = True

    epochs: Annotated[
        int | Auto, opt("training", "passes over the data", "num_epochs", "num_train_epochs", "n_epochs")
    ] = "auto"
    max_steps: Annotated[
        int | None,
        opt(
            "training",
            "stop after this many optimizer steps",
        ),
    ] = None
    batch_size: Annotated[int | Auto, opt("training", "rows in memory at a time", "per_device_train_batch_size")] = (
        "auto"
    )
    gradient_accumulation_steps: Annotated[int, opt("training", "batches summed into one optimizer step", ge=1)] = 1
    micro_batch_tokens: Annotated[
        int | Auto, opt("training", "a batch of more tokens goes through in parts, to the same result; auto: 8192")
    ] = "auto"
    optimizer: Annotated[
        Literal["adamw", "adamw_8bit", "paged_adamw_8bit"],
        opt(
            "training", "8bit: two bytes of state a weight instead of eight; paged: swapped out of a full GPU", "optim"
        ),
    ] = "adamw"
    adam_beta1: Annotated[float, opt("training", "decay of the first moment", ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, opt("training", "decay of the second moment", ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, opt("training", "added to the root of the second moment", gt=0)] = 1e-8
    learning_rate: Annotated[float | Auto, opt("training", "peak learning rate")] = "auto"
    lr_scheduler: Annotated[
        Literal["cosine", "linear", "constant"],
        opt("training", "how the rate falls after warm-up", "lr_scheduler_type"),
    ] = "cosine"
    warmup_ratio: Annotated[
        float | Auto, opt("training", "share of the steps that warm up; auto: a tenth, 100 steps at most")
    ] = "auto"
    warmup_steps: Annotated[int | None, opt("training", "warm-up in steps, instead of the share")] = None
    weight_decay: Annotated[
        float, opt("training", "AdamW decay of weight matrices (not of norms and biases)", ge=0)
    ] = 0.01
    max_grad_norm: Annotated[float, opt("training", "clip the gradient's norm to this; 0: never", ge=0)] = 1.0
    seed: Annotated[int, opt("training", "seed of split, order, adapters and dropout", ge=0)] = 42
    mixed_precision: Annotated[
        Literal["auto", "no", "bf16", "fp16"], opt("training", "auto: bf16 on a GPU, no on a CPU; fp16: GPU only")
    ] = "auto"
    gradient_checkpointing: Annotated[bool, opt("training", "recompute activations: less memory, a third slower")] = (
        False
    )
    torch_compile: Annotated[bool, opt("training", "compile the layers first: pays on a GPU in long runs")] = False
    neftune_alpha: Annotated[
        float, opt("training", "noise on the embeddings, e.g. 5 (NEFTune, Jain et al. 2023); 0: none", ge=0)
    ] = 0.0
    threads: Annotated[
        int | Auto, opt("training", "CPU threads of each process; auto: OMP_NUM_THREADS, else every core")
    ] = "auto"
    nproc: Annotated[
        int, opt("training", "processes on this machine that share each step: one a GPU; the result is the same", ge=1)
    ] = 1

    sharding: Annotated[
        Literal["none", "fsdp2"],
        opt(
            "training",
            "fsdp2: weights, gradients and optimizer state are spread over the processes (slower, less memory)",
        ),
    ] = "none"

    eval_steps: Annotated[int | Auto, opt("watching", "validate every so many steps; auto: once an epoch")] = "auto"
    save_steps: Annotated[int | Auto, opt("watching", "checkpoint every so many steps; auto: at each validation")] = (
        "auto"
    )
    save_total_limit: Annotated[
        int, opt("watching", "newest checkpoints kept; the best stay too, and may be among these", ge=1)
    ] = 2
    save_best_limit: Annotated[
        int, opt("watching", "checkpoints kept for the lowest validation losses, the best among them", ge=1)
    ] = 1
    patience: Annotated[int, opt("watching", "stop after so many validations without gain; 0: never", ge=0)] = 3
    min_gain: Annotated[float, opt("watching", "a smaller fall of the validation loss is no gain", ge=0)] = 0.0

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
        float | Auto, opt("openai", "factor on the service's own learning rate; auto: the service's choice")
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
POSITIVE = (
    "epochs",
    "max_steps",
    "batch_size",
    "learning_rate",
    "learning_rate_multiplier",
    "max_length",
    "lora_alpha",
    "micro_batch_tokens",
    "eval_steps",
    "save_steps",
    "threads",
    "num_workers",
)  # auto-or-number fields: the union's number must be above 0
MOST = {"threads": 4096, "num_workers": 4096}  # no machine has more cores; a system refuses far more threads than that
SHARES = ("freeze_ratio", "warmup_ratio", "valid_fraction", "test_fraction")  # auto-or-share fields
SWITCHES = {"lora": ("method", "lora")}  # the seeds' --lora is --method lora


class Field(msgspec.Struct, frozen=True):
    """One setting as flags and the reference page need it."""

    name: str
    help: str
    group: str
    aliases: tuple[str, ...]
    type: Any
    default: Any

    def choices(self) -> tuple[str, ...]:
        return get_args(self.type) if get_origin(self.type) is Literal else ()


@functools.cache
def fields() -> dict[str, Field]:
    """Every setting by name, in the order of declaration."""
    hints = get_type_hints(Recipe, include_extras=True)
    defaults = dict(
        zip(Recipe.__struct_fields__[-len(Recipe.__struct_defaults__) :], Recipe.__struct_defaults__, strict=True)
    )
    found = {}
    for name, hint in hints.items():
        base, meta = get_args(hint)
        default = defaults[name]
        default = {} if name == "columns" else default
        found[name] = Field(name, meta.description, meta.extra["group"], meta.extra["aliases"], base, default)
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
