"""An answer that is being written: what is asked, how its tokens are chosen, what has come of it so far."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import torch
from torch import Tensor


class Sampling(msgspec.Struct, frozen=True):
    """How an answer's tokens are chosen, names and ranges as in OpenAI's protocol. Temperature 0: always the likeliest.

    `logprobs`: so many likeliest tokens are told with each token; None: not even its own probability. `echo`: the same of
    the prompt's tokens.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    echo: bool = False


class Token(msgspec.Struct, frozen=True):
    """A token, its log-probability before temperature and penalties, and the likeliest ones, where they were asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Answer(msgspec.Struct, eq=False):
    """What is asked, and what has come of it so far. `finish`: "" while it is written, then stop, length or cancelled."""

    prompt: list[int]
    how: Sampling
    adapter: str | None = None
    ids: list[int] = []
    heard: list[Token] = []  # the prompt's tokens from the second on, for `echo`
    finish: str = ""
    done: int = 0  # tokens of prompt and answer whose keys and values are held
    held: dict[int, tuple[Tensor, Tensor]] = {}  # these, by layer [1, heads, room, dim], while the prompt is read
    chance: random.Random | None = None
    cache: Any = None  # of a model that is asked one answer at a time

    def size(self) -> int:
        return len(self.prompt) + len(self.ids)

    def ahead(self, most: int) -> list[int]:
        """The next tokens that the model has not seen."""
        if self.ids and self.done == self.size() - 1:
            return self.ids[-1:]
        return (self.prompt + self.ids)[self.done : self.done + most]


def choose(answers: list[Answer], logits: Tensor) -> list[tuple[Answer, Token]]:
    """The next token of each, from logits [answers, vocabulary] fp32; adds it to the answer, and sets `finish` at its end."""
    kept: dict[int, Tensor] = {i: logits[i].clone() for i, a in enumerate(answers) if a.how.logprobs is not None}
    for i, answer in enumerate(answers):
        _adjust(logits[i], answer)
    drawn = [i for i, a in enumerate(answers) if a.how.temperature > 0]
    every = len(drawn) == len(answers)
    picked = [0] * len(answers) if every else logits.argmax(1).tolist()
    if drawn:
        tokens = _draw([answers[i] for i in drawn], logits if every else logits[drawn])
        for i, token in zip(drawn, tokens, strict=True):
            picked[i] = token
    found = []
    for i, (answer, token) in enumerate(zip(answers, picked, strict=True)):
        how = answer.how
        if not how.max_tokens:  # only the prompt was to be judged
            answer.finish = "length"
            continue
        answer.ids.append(token)
        if token in how.stop_ids:
            answer.finish = "stop"
        elif len(answer.ids) >= how.max_tokens:
            answer.finish = "length"
        found.append((answer, told(kept[i][None], [token], how.logprobs or 0)[0] if i in kept else Token(token)))
    return found


def _adjust(logits: Tensor, answer: Answer) -> None:
    """Penalties for what the answer has said, and the biases that were asked for, in place (OpenAI's definitions)."""
    how = answer.how
    if (how.presence_penalty or how.frequency_penalty) and answer.ids:
        said, counts = torch.tensor(answer.ids, device=logits.device).unique(return_counts=True)
        logits[said] -= how.presence_penalty + how.frequency_penalty * counts
    for token, bias in how.logit_bias.items():
        if token < len(logits):
            logits[token] += bias


def _draw(answers: list[Answer], logits: Tensor) -> list[int]:
    """A token for each by its probability: within the likeliest that make up top_p together (nucleus, Holtzman et al. 2020)."""
    heat = [a.how.temperature for a in answers]
    if any(h != 1 for h in heat):
        logits = logits / torch.tensor(heat, device=logits.device)[:, None]
    shares = torch.softmax(logits, 1)
    for i, answer in enumerate(answers):
        if answer.how.top_p < 1:
            ordered, places = shares[i].sort(descending=True)
            outside = ordered.cumsum(0) - ordered >= answer.how.top_p
            outside[0] = False
            shares[i, places[outside]] = 0
    sums = shares.cumsum(1)
    chance = torch.tensor([a.chance.random() if a.chance else 0.0 for a in answers], device=logits.device)
    total = sums[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # rounding must not lead beyond what is possible
    wanted = torch.minimum(chance[:, None] * total, below)
    picked: list[int] = torch.searchsorted(sums, wanted, right=True).squeeze(1).tolist()
    last = shares.shape[1] - 1
    return [min(token, last) for token in picked]  # where a model's numbers are none, any token is as good


def told(logits: Tensor, tokens: list[int], top: int) -> list[Token]:
    """Tokens with their log-probabilities, and the `top` likeliest of each place; logits [n, vocabulary]."""
    shares = torch.log_softmax(logits, 1)
    own = shares.gather(1, torch.tensor(tokens, device=logits.device)[:, None]).squeeze(1).tolist()
    best = shares.topk(min(top, shares.shape[1]), 1)
    rows = zip(tokens, own, best.indices.tolist(), best.values.tolist(), strict=True)
    return [Token(t, p, tuple(zip(i, v, strict=True))) for t, p, i, v in rows]
