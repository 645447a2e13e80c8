"""What a step costs on this machine, measured in about two seconds on the first one and two layers of a model.

The layers have random weights: the model's own are not read. All else is what training runs: the same loader, method, loss
and optimizer. What two layers cost more than one is what each further layer costs. `backend.PROBE` starts it.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.costs import Answer, Question
from tunesmith.local import batches, load
from tunesmith.local import model as models
from tunesmith.local.loss import chunked_cross_entropy
from tunesmith.local.machine import accelerator, free_memory, held, tune
from tunesmith.local.step import Engine
from tunesmith.recipe import Recipe
from tunesmith.tokens import Tokens

TOKENS = 1024  # of a step that is timed, at most
HEAD = 20e6  # numbers in the embedding of the probed model, at most: the head's cost is proportional to them
BUDGET = 2.0  # seconds of measuring, without imports


def answer(question: Question) -> Answer:
    """Measure one and two layers; see `costs.Answer` for what comes out."""
    recipe = msgspec.structs.replace(
        question.recipe,
        freeze_ratio=0.0,
        gradient_checkpointing=False,
        torch_compile=False,
        nproc=1,
        micro_batch_tokens=2**20,
    )
    if recipe.method == "freeze":
        recipe = msgspec.structs.replace(recipe, method="full")
    torch.set_num_threads(int(recipe.threads))
    load(recipe)
    libraries = 0.0 if accelerator() else held()  # of the memory that is asked about: the GPU's, where there is one
    segments = typical(question.lengths)
    tokens = sum(segments)
    ends = time.perf_counter() + BUDGET
    found = []
    for count in (1, 2):
        engine, scale = _engine(Path(question.folder), recipe, count, segments, question.supervised)
        found.append(_measure(engine, ends if count == 2 else ends - BUDGET / 2))
        del engine
    one, two = found
    # Never less than nothing: with layers of microseconds, what else runs on the machine decides the sign.
    layer = {key: max(0.0, two[key] - one[key]) / (1 if key == "weights" else tokens) for key in one}
    rest = {key: max(0.0, one[key] / (1 if key == "weights" else tokens) - layer[key]) for key in one}
    return Answer(
        libraries=libraries,
        available=free_memory(),
        tokens_at_most=largest_batch(question),
        layer_seconds=layer["step"],
        layer_forward_seconds=layer["forward"],
        layer_bytes=layer["weights"],
        layer_saved_bytes=layer["saved"],
        rest_seconds=rest["step"],
        rest_forward_seconds=rest["forward"],
        rest_saved_bytes=rest["saved"],
        head_scale=scale,
        head_seconds=one["head"] / tokens,
        head_forward_seconds=one["head_forward"] / tokens,
        optimizer_seconds=one["optimizer"],
    )


def typical(lengths: list[int]) -> list[int]:
    """Rows as in a step, spread over all lengths, of up to TOKENS tokens together."""
    ordered = sorted(lengths)
    count = max(1, min(len(ordered), TOKENS // max(1, sum(ordered) // len(ordered))))
    picked = [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]
    return [min(n, TOKENS) for n in picked]


def largest_batch(question: Question) -> int:
    """Tokens of the largest micro-batch that the run will see: its batches are known before."""
    starts = np.cumsum([0, *question.lengths[:100_000]])
    rows = Tokens(np.zeros(0, np.int32), np.zeros(0, np.bool_), starts)
    recipe, most = question.recipe, 0
    for step in range(min(question.steps, 20_000)):
        chosen = batches.step_rows(len(rows), recipe, step)
        for part in batches.in_parts(rows, chosen, int(recipe.batch_size), int(recipe.micro_batch_tokens)):
            most = max(most, sum(rows.length(r) for r in part))
    return most


def _engine(folder: Path, recipe: Recipe, layers: int, segments: list[int], supervised: float) -> tuple[Engine, float]:
    """A model of so many layers in training, and by how much its vocabulary is smaller than the real one."""
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    whole = text.vocab_size
    text.vocab_size = int(min(whole, max(4096, HEAD // text.hidden_size)))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, None)
    with tempfile.TemporaryDirectory() as place:
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(place)
        module, _ = models.for_training(recipe, max(segments), Path(place))
    tokens = sum(segments)
    ids = np.arange(tokens, dtype=np.int32) * 7919 % text.vocab_size
    mask = np.random.default_rng(0).random(tokens) < supervised
    rows = Tokens(ids.astype(np.int32), mask, np.cumsum([0, *segments]))
    return Engine(module, recipe, {"train": rows, "valid": rows}), whole / text.vocab_size


def _measure(engine: Engine, ends: float) -> dict[str, float]:
    """Seconds of a step without its optimizer, of that, of a forward pass, and of the head; bytes of the weights, and of
    what a forward pass keeps for the backward one."""
    rows = list(range(len(engine.sets["train"])))
    saved: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}
    shapes = {shape for p in engine.model.parameters() for shape in (p.shape, p.shape[::-1])}
    copies: dict[int, int] = {}  # of weights in 16 bits, which autocast keeps

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in own:
            return tensor
        if tensor.element_size() == 2 and tensor.ndim == 2 and tensor.shape in shapes:
            copies[storage.data_ptr()] = storage.nbytes()
        else:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss, _ = engine.loss("train", rows)
    head: Any = engine.model.get_output_embeddings()
    if head.weight.requires_grad:  # its gradient, which is counted with the others
        saved = {k: n for k, n in saved.items() if n != head.weight.nbytes}
    loss.backward()
    engine.step(rows, 0.0)  # the optimizer's state is made
    grads = [torch.zeros_like(p) for p in engine.model.parameters() if p.requires_grad]

    def optimize() -> None:
        trained = [p for p in engine.model.parameters() if p.requires_grad]
        for p, g in zip(trained, grads, strict=True):
            p.grad = g
        engine.optimizer.step()

    optimizer = _seconds(optimize, ends)
    engine.optimizer.zero_grad(set_to_none=True)

    def forward_backward() -> None:
        engine.loss("train", rows)[0].backward()
        engine.optimizer.zero_grad(set_to_none=True)

    sup = engine.sets["train"].supervised(rows)
    hidden = torch.randn(sup, head.weight.shape[1], device=engine.device, requires_grad=True)
    targets = torch.zeros(sup, dtype=torch.int64, device=engine.device)

    def through_head() -> None:
        chunked_cross_entropy(hidden, head.weight, None, targets)

    with torch.no_grad():
        head_forward = _seconds(through_head, ends)
    return {
        "step": _seconds(forward_backward, ends),
        "forward": _seconds(engine.validate, ends),
        "optimizer": optimizer / sum(g.numel() for g in grads),
        "head": _seconds(through_head, ends),
        "head_forward": head_forward,
        "weights": float(sum(p.nbytes for p in engine.model.parameters()) + sum(copies.values())),
        "saved": float(sum(saved.values())),
    }


def _seconds(work: Callable[[], object], ends: float) -> float:
    """The least of a few tries, at least one, for as long as there is time."""
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        work()
        if gpu := accelerator():
            gpu.synchronize()
        now = time.perf_counter()
        best = min(best, now - began)
        if now > ends:
            break
    return best


def _end_with(parent: int) -> None:
    """End when whoever asked has been killed: a large model's layers would hold memory that nobody waits for."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    """Answer the question on standard input; the first word is the process without which this one ends."""
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    tune()
    sys.stdout.buffer.write(msgspec.json.encode(answer(msgspec.json.decode(sys.stdin.buffer.read(), type=Question))))
