"""Answers: chat with a model exactly as it was trained (same template, same stop tokens)."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread
from typing import Any

import torch
from transformers import GenerationConfig, TextIteratorStreamer

from tunesmith.conversation import Conversation, Message
from tunesmith.errors import DataError
from tunesmith.local import model as models
from tunesmith.models import find
from tunesmith.render import Renderer

BATCH = 16  # prompts answered at a time


class Chat:
    """A loaded model that answers. Temperature 0 is greedy; otherwise answers depend on the seed alone."""

    def __init__(self, name: str, template: str | None = None) -> None:
        folder = find(name)
        self.renderer = Renderer(folder, template)
        self.model: Any = models.to_judge(name)
        self.model.generation_config = (
            GenerationConfig()
        )  # the folder's own sampling defaults must not mix with what is asked for here
        self.context = self.model.config.get_text_config().max_position_embeddings

    def __call__(
        self, prompts: list[Conversation], max_tokens: int = 256, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """One answer for each conversation, which ends with what the user said. In order.

        Of a prompt that leaves less than max_tokens (at most half the context) for its answer, the beginning is cut.
        """
        room = min(max_tokens, self.context // 2)
        ids = [self.renderer.prompt_ids(p.messages, p.tools)[room - self.context :] for p in prompts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        answers = [""] * len(ids)
        torch.manual_seed(seed)
        for start in range(0, len(order), BATCH):
            group = order[start : start + BATCH]
            for i, answer in zip(group, self._batch([ids[i] for i in group], room, temperature), strict=True):
                answers[i] = answer
        return answers

    @torch.inference_mode()
    def _batch(self, prompts: list[list[int]], max_tokens: int, temperature: float) -> list[str]:
        width = max(map(len, prompts))
        device = next(self.model.parameters()).device
        ids = torch.tensor([[self.renderer.pad_id] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        out = self.model.generate(ids, attention_mask=mask, **self._how(max_tokens, temperature))
        return [self._text(row[width:].tolist()) for row in out]

    def _how(self, max_tokens: int, temperature: float) -> dict[str, Any]:
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 0.95}
            if temperature > 0
            else {"do_sample": False}
        )
        return {
            "max_new_tokens": max_tokens,
            "eos_token_id": self.renderer.stop_ids,
            "pad_token_id": self.renderer.pad_id,
            **sampling,
        }

    def _text(self, ids: list[int]) -> str:
        end = next((i for i, token in enumerate(ids) if token in self.renderer.stop_ids), len(ids))
        return self.renderer.decode(ids[:end]).strip()

    def room(self, messages: tuple[Message, ...]) -> int:
        """Tokens that the context leaves for an answer."""
        return int(self.context - len(self.renderer.prompt_ids(messages)))

    def stream(
        self, messages: tuple[Message, ...], max_tokens: int = 256, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        """The answer piece by piece, as it is written. Raises DataError where the context leaves no room for one."""
        left = self.room(messages)
        if left < 1:
            raise DataError(
                f"the prompt is {self.context - left} tokens, the model's context {self.context}", fix="shorten it"
            )
        torch.manual_seed(seed)
        ids = torch.tensor([self.renderer.prompt_ids(messages)], device=next(self.model.parameters()).device)
        streamer = TextIteratorStreamer(_Decoder(self.renderer))
        arguments = {
            "attention_mask": torch.ones_like(ids),
            "streamer": _NewOnly(streamer, ids.shape[1]),
            **self._how(min(max_tokens, left), temperature),
        }
        failures: list[BaseException] = []

        def write() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(ids, **arguments)
            except BaseException as error:
                failures.append(error)
                streamer.end()  # else the reader would wait for ever

        thread = Thread(target=write, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failures:
            raise failures[0]


class _Decoder:
    """What a streamer needs of a tokenizer."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer

    def decode(self, ids: list[int], **_: Any) -> str:
        return self._renderer.decode(ids)


class _NewOnly:
    """A streamer without the prompt, which generate() puts first."""

    def __init__(self, streamer: TextIteratorStreamer, prompt: int) -> None:
        self._streamer, self._skip = streamer, prompt

    def put(self, ids: torch.Tensor) -> None:
        flat = ids.reshape(-1)
        skipped, self._skip = min(self._skip, len(flat)), max(0, self._skip - len(flat))
        if len(flat) > skipped:
            self._streamer.put(flat[skipped:])

    def end(self) -> None:
        self._streamer.end()
