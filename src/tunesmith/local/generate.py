"""Answers: chat with a model exactly as it was trained (same template, same stop tokens)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tunesmith.conversation import Conversation, Message
from tunesmith.errors import DataError
from tunesmith.local import model as models
from tunesmith.local.decode import Decoder
from tunesmith.local.sampling import Answer, Sampling
from tunesmith.models import find
from tunesmith.render import TOP_P, Renderer

HALF_SIGN = "\ufffd"  # what a part of a character's bytes is decoded to


class Chat:
    """A loaded model that answers. Temperature 0 is greedy; otherwise answers depend on the seed alone."""

    def __init__(self, name: str, template: str | None = None) -> None:
        self.renderer = Renderer(find(name), template)
        self.decoder = Decoder(models.to_judge(name))
        self.context = self.decoder.context

    def __call__(
        self, prompts: list[Conversation], max_tokens: int = 256, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """One answer for each conversation, which ends with what the user said. In order."""
        return [text for text, _, _ in self.said(prompts, max_tokens, temperature, seed)]

    def said(
        self,
        prompts: list[Conversation],
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        told: Callable[[int], object] = lambda _: None,
    ) -> list[tuple[str, bool | None, int]]:
        """(answer, whether the model ended it by itself, its tokens) for each conversation, many at a time. In order.

        Of a prompt that leaves less than max_tokens (at most half the context) for its answer, the beginning is cut. Longer
        prompts are begun first: rows that end together leave no slots half empty. `told` hears of each answer that is done.
        """
        room = min(max_tokens, self.context // 2)
        ids = [self.renderer.prompt_ids(p.messages, p.tools)[room - self.context :] for p in prompts]
        answers = [Answer(p, self._how(room, temperature, seed + i)) for i, p in enumerate(ids)]
        for answer in sorted(answers, key=lambda a: -len(a.prompt)):
            self.decoder.add(answer)
        done = 0
        while self.decoder.busy():
            self.decoder.step()
            if (now := sum(bool(a.finish) for a in answers)) > done:
                told(now - done)
                done = now
        return [(self._text(a.ids), a.finish == "stop", len(a.ids)) for a in answers]

    def _how(self, max_tokens: int, temperature: float, seed: int, top_p: float = TOP_P) -> Sampling:
        return Sampling(max_tokens, temperature, top_p, seed, frozenset(self.renderer.stop_ids))

    def _text(self, ids: list[int]) -> str:
        end = next((i for i, token in enumerate(ids) if token in self.renderer.stop_ids), len(ids))
        return self.renderer.decode(ids[:end]).strip()

    def room(self, messages: tuple[Message, ...]) -> int:
        """Tokens that the context leaves for an answer."""
        return int(self.context - len(self.renderer.prompt_ids(messages)))

    def stream(
        self,
        messages: tuple[Message, ...],
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        top_p: float = TOP_P,
    ) -> Iterator[str]:
        """The answer piece by piece, as it is written. Raises DataError where the context leaves no room for one."""
        left = self.room(messages)
        if left < 1:
            raise DataError(
                f"the prompt is {self.context - left} tokens, the model's context {self.context}", fix="shorten it"
            )
        answer = Answer(self.renderer.prompt_ids(messages), self._how(min(max_tokens, left), temperature, seed, top_p))
        written = Written(self.renderer)
        self.decoder.add(answer)
        try:
            while not answer.finish:
                for _, token in self.decoder.step():
                    if piece := written.add(token.id):
                        yield piece
            if piece := written.rest():
                yield piece
        finally:  # the reader may have left in the middle
            answer.finish = answer.finish or "cancelled"


class Written:
    """Text of tokens as they come: only whole characters, and nothing of what may become a stop string.

    `stopped`: a stop string has come; it is no part of the text. `characters`: of the text, those held back among them.
    """

    def __init__(self, renderer: Renderer, stops: Sequence[str] = ()) -> None:
        self._renderer, self._stops = renderer, [s for s in stops if s]
        self._ids: list[int] = []
        self._shown, self._read = 0, 0  # tokens before which nothing is decoded again, and whose text is known
        self._held = ""
        self.stopped, self.characters = False, 0

    def add(self, token: int) -> str:
        """What can be shown after one more token."""
        self._ids.append(token)
        before = self._renderer.decode(self._ids[self._shown : self._read])
        text = self._renderer.decode(self._ids[self._shown :])
        if text.endswith(HALF_SIGN) and len(self._ids) - self._read < 8:  # no character has more bytes than four
            return ""
        self._shown, self._read = self._read, len(self._ids)
        return self._show(text[len(before) :])

    def rest(self) -> str:
        """What was still held back, at the end."""
        more = self._renderer.decode(self._ids[self._shown :])[
            len(self._renderer.decode(self._ids[self._shown : self._read])) :
        ]
        self._shown = self._read = len(self._ids)
        shown = self._show(more)
        rest, self._held = self._held, ""
        return shown + ("" if self.stopped else rest)

    def _show(self, new: str) -> str:
        if self.stopped:
            return ""
        self.characters += len(new)
        self._held += new
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self.characters -= len(self._held) - min(found)
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown
