"""What an export is asked, through the program that will run it: plain transformers, or llama.cpp in a process of its own."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
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
from tunesmith.render import Renderer

GREEDY = {
    "temperature": 0,
    "repeat_penalty": 1.0,
    "return_tokens": True,
    "cache_prompt": True,
    "samplers": ["temperature"],
}
LIKELIEST = 32  # candidates of a next token that are looked at
WIDE = 1 << 19  # numbers of a matrix that are widened to 32 bits at a time: 2 MB, which stay in the cache
START = 600.0  # seconds in which llama.cpp must have read a model


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
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids], device=models.device())).logits[0]
        found = logits[torch.tensor(places) - 1].float().log_softmax(-1)
        values, tokens = found.topk(min(LIKELIEST, found.shape[-1]))
        return [dict(zip(t, v, strict=True)) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]

    def close(self) -> None:
        self.model = None


def plain_transformers(folder: Path) -> Loaded:
    """A folder in plain transformers (or peft), which reads all of it: weights, tokenizer, template, stop tokens."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = _loader(folder).from_pretrained(folder, dtype="auto", local_files_only=True, use_safetensors=True)
        eos = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot be loaded: {str(error).splitlines()[0]}", where=str(folder)) from None
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
        large = isinstance(module, (*LINEAR, nn.Embedding)) and module.weight.numel() > WIDE
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
        out = given.new_empty(*given.shape[:-1], rows.shape[0])
        step = max(1, WIDE // rows.shape[1])
        # One piece for all: pieces that are freed lie between results, a gigabyte of them
        wide = given.new_empty(step, rows.shape[1])
        for start in range(0, rows.shape[0], step):
            part = rows[start : start + step]
            out[..., start : start + step] = linear(given, wide[: len(part)].copy_(part))
        return out if bias is None else out.add_(bias)


class LlamaCpp:
    """A GGUF file in llama.cpp's own server, in a process of its own: a bad file ends that process, not ours."""

    def __init__(self, file: Path, context: int, stops: list[int]) -> None:
        self.name = f"llama.cpp (xllamacpp {version('xllamacpp')})"
        command = [sys.executable, "-m", "tunesmith.exporting.llamacpp", str(file), str(context)]
        self._stops, self._key = stops, secrets.token_hex()  # else any user of the machine could ask it
        # A pipe that nobody reads would stop it once it is full
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in close
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )
        assert self._process.stdin and self._process.stdout
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        try:
            self._process.stdin.write(self._key + "\n")
            self._process.stdin.flush()
            self.address = self._process.stdout.readline().strip()
        except BrokenPipeError:
            self.address = ""
        if not self.address:
            self._process.communicate()
            self._said.seek(0)
            with self._said as said:
                raise ModelError(f"llama.cpp cannot load it: {_why(said.read())}", where=str(file))
        self._whole = self._ask("/tokenize", {"content": "a"})["tokens"][-1]

    def _ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(self.address + path, data, headers)
        try:
            with self._open(request, timeout=START) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            said = json.loads(error.read() or b"{}").get("error", {}).get("message", error.reason)
            raise ModelError(f"llama.cpp refuses: {said}", where=path) from None
        except (urllib.error.URLError, OSError) as error:
            raise ModelError(f"llama.cpp has ended: {error}", where=path) from None

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        text = self._ask("/apply-template", {"messages": msgspec.to_builtins(list(messages))})["prompt"]
        body = {"content": text, "add_special": True, "parse_special": True}
        return [int(token) for token in self._ask("/tokenize", body)["tokens"]]

    def answers(self, prompts: Sequence[list[int]], most: int) -> list[Answer]:
        return [self._answer(prompt, most) for prompt in prompts]

    def _answer(self, prompt: list[int], most: int) -> Answer:
        found = self._ask("/completion", {**GREEDY, "prompt": prompt, "n_predict": most})
        ids = found["tokens"]
        ended = found["stop_type"] == "eos"
        return Answer(ids[:-1] if ended and ids and ids[-1] in self._stops else ids, ended)

    def ends(self, prompt: list[int], token: int) -> bool:
        forced = {**GREEDY, "prompt": prompt, "n_predict": 2, "logit_bias": [[token, 1000.0]]}
        return bool(self._ask("/completion", forced)["stop_type"] == "eos")

    def next_tokens(self, ids: list[int], places: Sequence[int]) -> list[dict[int, float]]:
        # The token that it draws is forced, which the probabilities do not see: of half a character it would tell none
        asked = {**GREEDY, "n_predict": 1, "n_probs": LIKELIEST, "logit_bias": [[self._whole, 1000.0]]}
        found = (self._ask("/completion", {**asked, "prompt": ids[:place]}) for place in places)
        return [{t["id"]: t["logprob"] for t in f["completion_probabilities"][0]["top_logprobs"]} for f in found]

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._said.close()


def _why(said: str) -> str:
    """What llama.cpp named as the reason, of all that it wrote."""
    lines = said.strip().splitlines() or ["it says nothing of why"]
    named = [line.partition("error loading model: ")[2] for line in lines if "error loading model: " in line]
    return (named or [line for line in lines if "rror" in line] or lines)[-1][:300]
