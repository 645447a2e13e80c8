"""Answers of a service's model: many prompts at a time, each asked with patience."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import openai

from tunesmith.conversation import Conversation, Message
from tunesmith.errors import ServiceError
from tunesmith.remote.many import many
from tunesmith.remote.service import ODD, Service, cut_off
from tunesmith.remote.upload import as_sent

NEW_MODEL = 180.0  # seconds that a model which has just been made may be unknown


class Answers:
    """Chat with a model of a service; as `local.generate.Chat`, but for what only this machine can do."""

    context = 1 << 20  # tokens: not known here, and the service says when it is over

    def __init__(self, service: Service, model: str) -> None:
        self._service, self._model = service, model

    def __call__(
        self, prompts: list[Conversation], max_tokens: int = 256, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """One answer each. Raises TunesmithError when the service stays out of reach or refuses."""
        return [text for text, _, _ in self.said(prompts, max_tokens, temperature, seed)]

    def said(
        self,
        prompts: list[Conversation],
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        told: Callable[[int], object] = lambda _: None,
    ) -> list[tuple[str, bool | None, int]]:
        """(answer, whether the model ended it by itself, its tokens) each; None and 0 where the service does not say."""
        found: dict[int, tuple[str, bool | None, int]] = {}
        for at, answer in many(
            lambda at: self._answer(prompts[at], max_tokens, temperature, seed), range(len(prompts))
        ):
            if isinstance(answer, Exception):
                raise answer
            found[at] = answer
            told(1)
        return [found[at] for at in range(len(prompts))]

    def _answer(
        self, prompt: Conversation, max_tokens: int, temperature: float, seed: int
    ) -> tuple[str, bool | None, int]:
        order = self._order(prompt, max_tokens, temperature, seed)

        def ask(client: Any) -> tuple[str, bool | None, int]:
            answer = client.chat.completions.create(**order)
            if not answer.choices or not isinstance(answer.choices[0].message.content, str | None):
                raise ValueError("no text")
            first, spent = answer.choices[0], getattr(answer.usage, "completion_tokens", 0)
            ended = {"stop": True, "length": False}.get(str(first.finish_reason))
            return str(first.message.content or ""), ended, spent if isinstance(spent, int) else 0

        found: tuple[str, bool | None, int] = self._when_known(
            lambda: self._service.read(ask, "asking the model", self._missing)
        )
        return found

    @property
    def _missing(self) -> str:
        return f'the service has no model "{self._model}"'

    def _order(self, prompt: Conversation, max_tokens: int, temperature: float, seed: int) -> dict[str, Any]:
        sent = as_sent(prompt)
        how = {"max_completion_tokens": max_tokens, "temperature": temperature, "seed": seed}
        return {"model": self._model, **sent, **how}

    def _when_known(self, ask: Any) -> Any:
        """A model that was made a moment ago may take minutes to be known everywhere."""
        deadline = time.monotonic() + (NEW_MODEL if self._model.startswith("ft:") else 0.0)
        while True:
            try:
                return ask()
            except ServiceError as error:
                if self._missing not in error.message or time.monotonic() > deadline:
                    raise
                time.sleep(5)

    def stream(
        self,
        messages: tuple[Message, ...],
        max_tokens: int,
        temperature: float,
        seed: int,
        top_p: float | None = None,
    ) -> Iterator[str]:
        """An answer, piece by piece as it comes. `top_p`: None leaves it to the service."""
        order = self._order(Conversation(messages), max_tokens, temperature, seed)
        order |= {} if top_p is None else {"top_p": top_p}
        chunks = self._service.read(
            lambda c: c.chat.completions.create(**order, stream=True), "asking the model", self._missing
        )
        heard = False
        try:
            for chunk in chunks:
                heard = True
                if chunk.choices and chunk.choices[0].delta and chunk.choices[0].delta.content:
                    yield chunk.choices[0].delta.content
            if not heard:  # another protocol's page has no chunks in it
                raise ValueError("no stream")
        except Exception as error:
            if not cut_off(error) and not isinstance(error, (openai.OpenAIError, *ODD)):
                raise
            raise self._service.explained(error, "the answer broke off") from None

    def room(self, messages: tuple[Message, ...]) -> int:
        """Tokens left for an answer: as many as one likes, as far as is known here."""
        return self.context
