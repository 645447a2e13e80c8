"""What an export is asked, and plain transformers, which answers in this process; other programs: servers.py."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.pytorch_utils import Conv1D

from tunesmith.conversation import Message
from tunesmith.errors import ModelError
from tunesmith.local import model as models
from tunesmith.local.methods import LINEAR
from tunesmith.preparing import give_back
from tunesmith.render import Renderer

LIKELIEST = 32  # candidates of a next token that are looked at
WIDE = 1 << 20  # numbers of a matrix that are widened to 32 bits at a time: 4 MB, which stay in the cache
SMALL = WIDE // 4  # those of a layer that is widened for good
THICK = 12  # rows from which the product is faster the other way round: 3.4 against 1.8 thousand million weights a second at 16


class Answer(msgspec.Struct, frozen=True):
    """A greedy answer: its tokens without the one that ended it, and whether the model did end it."""

    ids: list[int]
    ended: bool


class Runtime(Protocol):
    """A program with a model. `name`: with its version."""

    name: str

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids after which the model answers."""
        ...

    def answers(self, prompts: Sequence[list[int]], most: int) -> list[Answer]: ...

    def ends(self, prompt: list[int], token: int) -> bool:
        """Whether an answer is at its end where this token is drawn."""
        ...

    def next_tokens(self, ids: list[int], places: Sequence[int]) -> list[dict[int, float]]:
        """For each place, the likeliest tokens after ids[:place] with their log-probabilities (nats)."""
        ...

    def close(self) -> None: ...


class Loaded:
    """A model in this process. `stops`: the tokens that end its answers; `tokenizer`: transformers' own, to render prompts."""

    name = f"transformers {version('transformers')}"

    def __init__(self, model: nn.Module, stops: list[int], pad: int, tokenizer: Any = None) -> None:
        self.model: Any = model.eval()
        self._stops, self._pad, self._tokenizer = stops, pad, tokenizer

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        plain = [{k: v for k, v in msgspec.to_builtins(m).items() if k != "weight"} for m in messages]
        return list(self._tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False))

    def answers(self, prompts: Sequence[list[int]], most: int) -> list[Answer]:
        """All prompts in one batch, padded on the left."""
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self._pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        where = models.device()
        out = self.model.generate(
            input_ids=ids.to(where),
            attention_mask=mask.to(where),
            do_sample=False,
            max_new_tokens=most,
            eos_token_id=self._stops,
            pad_token_id=self._pad,
        )
        return [self._answer(row) for row in out[:, longest:].tolist()]

    def _answer(self, ids: list[int]) -> Answer:
        end = next((i for i, token in enumerate(ids) if token in self._stops), None)
        return Answer(ids[:end], end is not None)

    def ends(self, prompt: list[int], token: int) -> bool:
        return token in self._stops

    def next_tokens(self, ids: list[int], places: Sequence[int]) -> list[dict[int, float]]:
        asked = torch.tensor([ids], device=models.device())
        with torch.no_grad():  # of a large vocabulary each place is half a megabyte
            logits = self.model(input_ids=asked, logits_to_keep=torch.tensor(places) - 1).logits[0].float()
            values, tokens = logits.topk(min(LIKELIEST, logits.shape[-1]))
            values -= logits.logsumexp(-1, keepdim=True)
        return [dict(zip(t, v, strict=True)) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]

    def close(self) -> None:
        self.model = None
        gc.collect()  # its large layers hold themselves (see `widened`): gigabytes that nobody would miss for a while
        give_back()


def plain_transformers(folder: Path) -> Loaded:
    """A folder in plain transformers (or peft), which reads all of it: weights, tokenizer, template, stop tokens."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = _loader(folder).from_pretrained(folder, dtype="auto", local_files_only=True, use_safetensors=True)
        eos = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"cannot be loaded: {str(error).splitlines()[0]}", where=str(folder), fix="export the model again"
        ) from None
    stops = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return Loaded(widened(model.to(models.device())), stops, tokenizer.pad_token_id or 0, tokenizer)


def _loader(folder: Path) -> Any:
    """What loads a folder; transformers' own way with adapters loses the lengths of DoRA."""
    if not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM


def own(folder: Path, renderer: Renderer) -> Loaded:
    """The model itself: an adapter on its base's 16 bits, as it is exported, whatever it was trained on."""
    return Loaded(widened(models.load(folder, dtype="auto")), renderer.stop_ids, renderer.pad_id)


def as_trained(folder: Path, renderer: Renderer) -> Loaded:
    """The model as it was trained: an adapter of qlora on 4-bit weights."""
    return Loaded(models.to_judge(str(folder)), renderer.stop_ids, renderer.pad_id)


def widened(model: nn.Module) -> nn.Module:
    """Have a model that is held in 16 bits compute in 32, a piece of a matrix at a time: exact, in hardly more memory."""
    for module in model.modules():
        large = isinstance(module, (*LINEAR, nn.Embedding)) and module.weight.numel() > SMALL
        if large and module.weight.is_floating_point() and module.weight.element_size() == 2:
            module.forward = _Wide(module)
            if getattr(module, "bias", None) is not None:
                module.bias.data = module.bias.data.float()
        else:
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.data = parameter.data.float()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()
    return model


class _Wide:
    """The forward of a large layer whose weight stays in 16 bits."""

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module

    def __call__(self, given: Tensor) -> Tensor:
        weight, bias = self._module.weight, getattr(self._module, "bias", None)
        if isinstance(self._module, nn.Embedding):
            scale = getattr(self._module, "embed_scale", None)  # Gemma's embeddings are multiplied
            rows = weight[given].float()
            return rows if scale is None else rows * scale.float()
        rows = weight.t() if isinstance(self._module, Conv1D) else weight  # [out, in]
        flat = given.reshape(-1, given.shape[-1])
        out = given.new_empty(len(flat), rows.shape[0])
        step = max(1, WIDE // rows.shape[1])
        # One piece for all: pieces that are freed lie between results, a gigabyte of them
        wide = given.new_empty(step, rows.shape[1])
        for start in range(0, rows.shape[0], step):
            part = rows[start : start + step]
            piece = wide[: len(part)].copy_(part)
            out[:, start : start + step] = linear(flat, piece) if len(flat) < THICK else (piece @ flat.t()).t()
        return (out if bias is None else out.add_(bias)).view(*given.shape[:-1], -1)
