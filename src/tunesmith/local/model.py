"""Models in and out of memory: load from a folder, choose how they run, save what plain transformers and peft load."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

from tunesmith.costs import ADAPTERS
from tunesmith.errors import ModelError, UsageError
from tunesmith.local import attention, methods
from tunesmith.local.loss import LossModule
from tunesmith.models import find, read_json
from tunesmith.preflight import launched
from tunesmith.recipe import Recipe
from tunesmith.runs import run_of

transformers.utils.logging.set_verbosity_error()
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a kernel that it would fetch from the network
warnings.filterwarnings(
    "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
)  # peft's, not the user's
transformers.utils.logging.disable_progress_bar()


OWN_HEADS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
)  # settings of heads that do more than a product


def device() -> torch.device:
    """The GPU if there is one, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load(
    folder: Path,
    merge: bool = False,
    quantisation: Any = None,
    dtype: torch.dtype = torch.float32,
    place: torch.device | None = None,
    longest: int | None = None,
) -> nn.Module:
    """A causal language model on this machine's device, or in a `place`, adapters applied. No code from the folder is run.

    `merge`: an adapter becomes part of the weights, as it must where training goes on from it. `quantisation`: a
    transformers configuration for the linear layers' weights. `longest`: no row has more tokens.
    """
    base, adapter = folder, None
    if (folder / "adapter_config.json").exists():
        base, adapter = find(str(read_json(folder / "adapter_config.json")["base_model_name_or_path"])), folder
        dtype = torch.float32 if merge else dtype
    try:
        model = _pretrained(base, quantisation, dtype, longest)
        if adapter:
            from peft import PeftModel

            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # of 4-bit GPT-2, now on its 16 bits
                model = PeftModel.from_pretrained(model, str(adapter))
            model = model.merge_and_unload().requires_grad_(True) if merge else model
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"cannot be loaded: {str(error).splitlines()[0]}",
            where=str(folder),
            fix="does it load with plain transformers?",
        ) from None
    return _unpacked(model) if quantisation else model.to(place or device())


def _unpacked(model: nn.Module) -> nn.Module:
    """Have 4-bit weights stay as they are. On a CPU with AVX512-BF16 bitsandbytes packs them anew at the first validation, with
    scales of 16 bits: what is trained from then on is another model; and it fails on rows that are no multiple of its block."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def for_training(recipe: Recipe, longest: int, folder: Path | None = None) -> tuple[LossModule, str]:
    """A recipe's model with what is trained marked, set up as it runs, for rows of `longest` tokens at most; why not packed.

    `folder`: with these weights instead of the recipe's model's. A base that only carries adapters is held in the 16 bits
    that it runs in; one that will be spread over processes is not put on a GPU whole.
    """
    half = methods.precision(recipe, device())
    dtype = half if half and recipe.method in ADAPTERS else torch.float32
    place = torch.device("cpu") if recipe.sharding == "fsdp2" and launched() else None
    base = load(folder or find(recipe.model), True, methods.quantisation(recipe, device()), dtype, place, longest)
    module, slow = loss_module(methods.apply(base, recipe))
    arrange(module, recipe)
    module.train()
    return module, slow


def to_judge(name: str) -> nn.Module:
    """A model by name or folder for scores and answers: in 16 bits on a GPU; an adapter that was trained on 4-bit weights, on
    those."""
    folder = find(name)
    quantisation = None
    if (folder / "adapter_config.json").exists():
        run = run_of(folder)
        quantisation = methods.quantisation(run.recipe(), device()) if run else None
    return load(folder, quantisation=quantisation, dtype=methods.half(device()) or torch.float32).eval()


def _pretrained(folder: Path, quantisation: Any, dtype: torch.dtype, longest: int | None) -> Any:
    """The model with packed attention; with a sliding window that a row could be over, or where refused, with its own."""
    config = read_json(folder / "config.json")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    longest = longest or config.get("max_position_embeddings")
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "use_safetensors": True,
        "trust_remote_code": False,
        "local_files_only": True,
    }
    if quantisation:
        arguments |= {"quantization_config": quantisation, "device_map": {"": device()}}
    if config.get("attn_logit_softcapping"):  # the fused kernel has no soft cap
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **arguments)
    if not window or (longest is not None and longest <= window):
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention.NAME, **arguments)
            if getattr(
                model, "_supports_attention_backend", True
            ):  # else it takes any name, and MPT then lacks its mask
                return model
        except (ValueError, KeyError) as error:  # KeyError: Falcon and others look up a class by that name
            if "attention" not in str(error) and attention.NAME not in str(error):
                raise
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


def causal(model: nn.Module) -> Any:
    """The transformers model itself, from under its adapters where it has any."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def loss_module(model: nn.Module) -> tuple[LossModule, str]:
    """The fastest way to run this model that gives its own loss, found by trying, and why it is not "packed".

    Two short conversations are scored in each mode and compared with the model's own logits.
    """
    was_training = model.training
    model.eval()
    where = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(12, device=where) * 7 + 3) % vocabulary
    mask = torch.ones(12, dtype=torch.bool, device=where)
    reasons: list[str] = []
    plain_head = isinstance(
        model.get_output_embeddings(), nn.Linear
    )  # not one with adapters, which need their own forward
    modes = ["packed", "single", "logits"] if plain_head else ["logits"]
    if causal(model).config._attn_implementation != attention.NAME and plain_head:
        modes.remove("packed")  # with its own it would make a mask of tokens x tokens over all conversations
        reasons.append("its attention cannot be packed")
    near = 1e-4 if next(model.parameters()).dtype == torch.float32 else 2e-2
    config = causal(model).config.get_text_config()
    if near > 1e-4 and any(getattr(config, name, None) for name in OWN_HEADS):
        modes = ["logits"]  # what a head does besides could be less than 16 bits show
    with torch.no_grad():
        want = LossModule(model, "logits")(ids, mask, [7, 5])[0]
        for mode in modes:
            try:
                got = LossModule(model, mode)(ids, mask, [7, 5])[0]
            except (TypeError, NotImplementedError, RuntimeError, AttributeError, ValueError) as error:
                reasons.append(f"{mode}: {str(error).splitlines()[0]}")
                continue
            if torch.allclose(got, want, rtol=near):
                break
            reasons.append(f"{mode}: loss {got:.4f}, the model's own {want:.4f}")
    model.train(was_training)
    return LossModule(model, mode), "; ".join(reasons)


def arrange(module: LossModule, recipe: Recipe) -> None:
    """Set up how the model runs in training: recomputed activations, noise on its embeddings, compiled layers."""
    if recipe.gradient_checkpointing:
        causal(module.model).activation_checkpointing_enable({"use_reentrant": False})
    if recipe.neftune_alpha and module.mode == "logits":
        raise UsageError("neftune_alpha: this model's embeddings cannot be reached", fix="leave it out")
    module.neftune_alpha = recipe.neftune_alpha
    if not recipe.torch_compile and methods.precision(recipe, device()) is None:
        from tunesmith.local.fused import fuse

        fuse(module.model, again=not recipe.gradient_checkpointing)
    if recipe.torch_compile:
        for layer in methods.decoder_layers(module.model)[1]:
            layer.compile(dynamic=True)  # each by itself: the same code for all of them, and weights keep their names


def save(model: nn.Module, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Weights (safetensors) and configuration: a model folder, or an adapter folder for peft. `weights`: instead of those
    in the model, by the same names."""
    kind: Any = model
    implementation = kind.config._attn_implementation
    kind.config._attn_implementation = "sdpa" if implementation == attention.NAME else implementation
    try:
        kind.save_pretrained(folder, safe_serialization=True, state_dict=weights)
    finally:
        kind.config._attn_implementation = implementation
    if hasattr(model, "peft_config"):
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card; the run writes its own
