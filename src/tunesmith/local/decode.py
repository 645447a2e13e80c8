"""Many answers at a time from one model: they join a running batch when they come and leave it when they are done.

A step is one forward pass over one row without padding: a new token of every answer that is being written, and the prompts
that have just come. The linear layers see all of them at once; attention looks up each answer's own keys and values.
Models whose attention cannot be packed are asked one answer after the other.
"""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from tunesmith.local import model as models
from tunesmith.local.adapters import Adapters
from tunesmith.local.machine import free_memory
from tunesmith.local.sampling import Answer, Sampling, Token, choose, told

PROMPT_TOKENS = 2048  # of prompts in a step: what has begun is not kept waiting for longer
LENGTHS = ("max_position_embeddings", "max_seq_len", "seq_length")  # what a model's context is called
CONTEXT = 2048  # tokens, where it is called nothing: with ALiBi any number goes, and BLOOM has seen so many
ROOM = 64  # tokens of the smallest cache; they double from there


class _Group:
    """Answers that are being written, with caches of one size: [slots, heads, room, dim] a layer, answer i in slot i.

    What is not yet written is zero: memory that was never set can hold no numbers, which a mask does not hide.
    """

    def __init__(self, room: int) -> None:
        self.room, self.slots = room, 0
        self.answers: list[Answer] = []
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.places = torch.zeros(0, dtype=torch.int64)  # of the new tokens
        self.width = 0  # tokens that are looked at
        self.mask: Tensor | None = None

    def begin(self, device: torch.device) -> None:
        """Before a step: where the new tokens go, and what each may look at."""
        self.places = torch.tensor([a.done for a in self.answers], device=device)
        self.width = int(self.places.max()) + 1
        seen = torch.arange(self.width, device=device)[None] <= self.places[:, None]
        self.mask = None if bool(seen.all()) else seen[:, None, None]

    def join(self, answer: Answer, held: dict[int, tuple[Tensor, Tensor]], most: int) -> None:
        """Take an answer in, with its keys and values [1, heads, any, dim]. `most`: slots for which there is memory."""
        at = len(self.answers)
        if at == self.slots:
            self.resize(max(at + 1, min(max(8, 2 * self.slots), most)))
        for layer, pair in held.items():
            for mine, new in zip((self.keys, self.values), pair, strict=True):
                if layer not in mine:
                    mine[layer] = new.new_zeros(self.slots, new.shape[1], self.room, new.shape[3])
                mine[layer][at, :, : answer.done] = new[0, :, : answer.done]
        self.answers.append(answer)

    def resize(self, slots: int) -> None:
        """Have so many slots, all answers among them."""
        self.slots = slots
        for mine in (self.keys, self.values):
            for layer, old in mine.items():
                mine[layer] = old.new_zeros(slots, *old.shape[1:])
                mine[layer][: len(self.answers)] = old[: len(self.answers)]

    def part(self, at: int) -> dict[int, tuple[Tensor, Tensor]]:
        """The keys and values of an answer, as `join` takes them."""
        return {layer: (self.keys[layer][at : at + 1], self.values[layer][at : at + 1]) for layer in self.keys}

    def leave(self, at: int) -> None:
        """Answer `at` goes: the last one takes its slot."""
        last = self.answers.pop()
        if at < len(self.answers):
            for layer, (keys, values) in self.part(len(self.answers)).items():
                self.keys[layer][at, :, : last.done] = keys[0, :, : last.done]
                self.values[layer][at, :, : last.done] = values[0, :, : last.done]
            self.answers[at] = last
        if not self.answers:
            self.keys, self.values, self.slots = {}, {}, 0


class Decoder:
    """A model that writes. `add` an answer, `step` until its `finish` is set; one thread at a time.

    `most`: answers in work at once; `tokens`: room for the keys and values of all of them together, in `memory` bytes at most
    (else of half of what is free). Others wait, in order. `longest`: tokens of a prompt and its answer for which there is room.
    """

    def __init__(self, model: nn.Module, most: int = 256, tokens: int = 1 << 17, memory: float | None = None) -> None:
        self.model: Any = model.eval()
        self.causal = models.causal(model)
        self.adapters = Adapters(self.causal)
        self.device = next(model.parameters()).device
        config = self.causal.config.get_text_config()
        self.context = next((int(n) for name in LENGTHS if (n := getattr(config, name, None))), CONTEXT)
        memory = free_memory() / 2 if memory is None else memory
        self._most, self._tokens = most, max(ROOM, min(tokens, int(memory / self.token_bytes())))
        self.longest = min(self.context, 1 << (self._tokens.bit_length() - 1))
        self._waiting: deque[Answer] = deque()
        self._reading: list[Answer] = []
        self._groups: dict[int, _Group] = {}
        self._parts: list[tuple[Answer, int]] = []  # whose prompts are read in this step, and how much of them
        self.packed = not self._bends() and models.loss_module(model)[0].mode == "packed" and self._same()

    def _bends(self) -> bool:
        """Whether positions turn otherwise once a row is long: packed, one long answer would change all others."""
        config = self.causal.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        return rope.get("rope_type") in ("dynamic", "longrope")

    def token_bytes(self) -> int:
        """Of a token's keys and values in all layers."""
        config = self.causal.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None) or 1
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        shared = getattr(config, "num_key_value_heads", None) or heads
        return int(2 * config.num_hidden_layers * shared * size * max(2, self.causal.dtype.itemsize))

    # ---- who is there

    def add(self, answer: Answer) -> None:
        """Let an answer be written. Its prompt (one token at least) and its max_tokens must fit the context together."""
        answer.chance = random.Random(answer.how.seed)
        self._waiting.append(answer)

    def busy(self) -> bool:
        return bool(self._waiting or self._reading or any(g.answers for g in self._groups.values()))

    def load(self) -> tuple[int, int]:
        """How many answers are in work and how many wait."""
        return len(self._reading) + sum(len(g.answers) for g in self._groups.values()), len(self._waiting)

    def clear(self) -> None:
        """Forget every answer, after an error in the middle of a step."""
        self._waiting.clear()
        self._reading, self._groups, self._parts = [], {}, []

    def _needed(self, room: int) -> int:
        """Slots of so many tokens that are used, or will be by answers whose prompts are read."""
        return len(self._group(room).answers) + sum(_room(a.size() + 1) == room for a in self._reading)

    def _held(self) -> int:
        """Tokens of the slots that are needed."""
        groups = sum(len(g.answers) * g.room for g in self._groups.values())
        return groups + sum(_room(a.size() + 1) for a in self._reading)

    def _join(self, room: int, answer: Answer, held: dict[int, tuple[Tensor, Tensor]]) -> None:
        others = self._held() - room * self._needed(room)
        self._group(room).join(answer, held, (self._tokens - others) // room)

    def _shrink(self) -> None:
        """Give slots back that nobody needs, where there are more than there is memory for."""
        needed = {room: self._needed(room) for room in {_room(a.size() + 1) for a in self._reading} | set(self._groups)}
        if sum(room * max(n, self._group(room).slots) for room, n in needed.items()) > self._tokens:
            for room, n in needed.items():
                self._group(room).resize(min(n, self._group(room).slots))

    def _leave(self) -> None:
        """What is finished goes."""
        for answer in self._reading:
            if answer.finish:
                answer.held, answer.cache = {}, None
        self._reading = [a for a in self._reading if not a.finish]
        for group in self._groups.values():
            for at in reversed(range(len(group.answers))):
                if group.answers[at].finish:
                    group.leave(at)

    def _grow(self) -> None:
        """Answers that fill their cache move to one of twice the size. Where there is no room, the last to come waits again:
        what it has written is kept, and read anew when its turn comes."""
        for group in [g for _, g in sorted(self._groups.items(), reverse=True)]:
            for at in reversed(range(len(group.answers))):
                answer = group.answers[at]
                if answer.done < group.room:
                    continue
                if self._held() + group.room > self._tokens and self.load()[0] > 1:
                    answer.done = 0
                    self._waiting.appendleft(answer)
                else:
                    self._join(2 * group.room, answer, group.part(at))
                group.leave(at)

    def _group(self, room: int) -> _Group:
        return self._groups.setdefault(room, _Group(room))

    def _admit(self) -> None:
        held, (count, _) = self._held(), self.load()
        while self._waiting and count < self._most:
            answer = self._waiting[0]
            room = _room(answer.size() + 1)
            if not answer.finish and count and held + room > self._tokens:
                return
            self._waiting.popleft()
            if not answer.finish:  # else cancelled while it waited
                self._reading.append(answer)
                held, count = held + room, count + 1

    # ---- a step

    @torch.inference_mode()
    def step(self) -> list[tuple[Answer, Token]]:
        """One token for every answer whose prompt has been read. What was cancelled leaves without one."""
        self._leave()
        self._grow()
        self._admit()
        self._shrink()
        chosen = self._packed_step() if self.packed else self._single_step()
        self._leave()
        return chosen

    def _packed_step(self) -> list[tuple[Answer, Token]]:
        writing = [g for g in self._groups.values() if g.answers]
        for group in writing:
            group.begin(self.device)
        self._parts, left = [], PROMPT_TOKENS
        for answer in self._reading:
            if count := min(answer.size() - answer.done, left):
                self._parts.append((answer, count))
                left -= count
        owners = [(a, 1) for g in writing for a in g.answers] + self._parts
        if not owners:
            return []
        hidden = self._forward(owners)
        ends: list[tuple[Answer, int]] = []  # with the places of their last tokens
        at = 0
        for answer, count in owners:
            if answer.how.echo and not answer.ids:
                self._hear(answer, self._head(hidden[at : at + count]))
            answer.done, at = answer.done + count, at + count
            if answer.done == answer.size():
                ends.append((answer, at - 1))
        chosen = choose([a for a, _ in ends], self._head(hidden[[place for _, place in ends]])) if ends else []
        for answer, _ in self._parts:
            if answer.done == answer.size() - 1:  # its prompt has been read, and a token has come
                self._reading.remove(answer)
                self._join(_room(answer.done + 1), answer, answer.held)
                answer.held = {}
        return chosen

    def _forward(self, owners: list[tuple[Answer, int]]) -> Tensor:
        """The last hidden states [tokens, d] of the next tokens of some answers, so many of each."""
        ids = [token for answer, count in owners for token in answer.ahead(count)]
        positions = [place for answer, count in owners for place in range(answer.done, answer.done + count)]
        row = torch.tensor([ids, positions], device=self.device)
        self.adapters.where = self._places(owners)
        out = self.causal.base_model(input_ids=row[:1], position_ids=row[1:], use_cache=False, cached=self)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def _head(self, hidden: Tensor) -> Tensor:
        head = self.causal.get_output_embeddings()
        return head(hidden).float()

    def _places(self, owners: list[tuple[Answer, int]]) -> dict[str, Tensor]:
        found: dict[str, list[int]] = {}
        at = 0
        for answer, count in owners:
            if answer.adapter is not None:
                found.setdefault(answer.adapter, []).extend(range(at, at + count))
            at += count
        return {name: torch.tensor(places, device=self.device) for name, places in found.items()}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention: query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim] -> [1, tokens, heads, dim].

        Called by the model's layers. First the new tokens of all answers that are written, then the parts of prompts.
        """
        heads, shared = query.shape[1], query.shape[1] // key.shape[1]
        out = query.new_empty(1, query.shape[2], heads, query.shape[3])
        at = 0
        for group in self._groups.values():
            if not (n := len(group.answers)):
                continue
            keys, values, here = group.keys[layer], group.values[layer], slice(at, at + n)
            slots = torch.arange(n, device=key.device)
            keys[slots, :, group.places] = key[0, :, here].transpose(0, 1)
            values[slots, :, group.places] = value[0, :, here].transpose(0, 1)
            asked = query[0, :, here].transpose(0, 1).reshape(n, heads // shared, shared, -1)
            found = scaled_dot_product_attention(  # heads that share keys stand as queries of one head
                asked, keys[:n, :, : group.width], values[:n, :, : group.width], attn_mask=group.mask, scale=scale
            )
            out[0, here] = found.reshape(n, heads, -1)
            at += n
        for answer, count in self._parts:
            first, upto, here = answer.done, answer.done + count, slice(at, at + count)
            if layer not in answer.held:
                room = _room(answer.size())
                answer.held[layer] = tuple(x.new_empty(1, x.shape[1], room, x.shape[3]) for x in (key, value))
            keys, values = answer.held[layer]
            keys[:, :, first:upto], values[:, :, first:upto] = key[:, :, here], value[:, :, here]
            seen = None
            if first:  # a later part of a long prompt
                places = torch.arange(upto, device=key.device)
                seen = places[None] <= places[first:, None]
            found = scaled_dot_product_attention(
                query[:, :, here],
                keys[:, :, :upto],
                values[:, :, :upto],
                attn_mask=seen,
                is_causal=seen is None,
                scale=scale,
                enable_gqa=shared > 1,
            )
            out[:, here] = found.transpose(1, 2)
            at += count
        return out

    def _single_step(self) -> list[tuple[Answer, Token]]:
        """One answer after the other, each with transformers' own cache."""
        found = []
        for answer in self._reading:
            answer.cache = answer.cache or DynamicCache(config=self.causal.config)
            ids = answer.ahead(answer.size())
            self.adapters.where = self._places([(answer, len(ids))])
            row = torch.tensor([ids], device=self.device)
            heard = answer.how.echo and not answer.ids
            every = {} if heard else {"logits_to_keep": 1}
            logits = self.causal(input_ids=row, past_key_values=answer.cache, use_cache=True, **every).logits[0].float()
            if heard:
                self._hear(answer, logits)
            answer.done += len(ids)
            found += choose([answer], logits[-1:])
        return found

    def _hear(self, answer: Answer, logits: Tensor) -> None:
        """Note the probabilities of the prompt's tokens that follow those of `logits` [n, vocabulary]."""
        following = answer.prompt[answer.done + 1 :][: len(logits)]
        answer.heard = [*answer.heard, *told(logits[: len(following)], following, answer.how.logprobs or 0)]

    @torch.inference_mode()
    def _same(self) -> bool:
        """Whether steps with the cache give the logits of a plain forward pass: they do unless a model's attention is its own."""
        vocabulary = self.causal.get_input_embeddings().weight.shape[0]
        ids = [(7 * i + 3) % vocabulary for i in range(12)]
        want = self.causal(input_ids=torch.tensor([ids], device=self.device), use_cache=False).logits[0, -1].float()
        answer = Answer(ids[:-1], Sampling(max_tokens=2))
        self._reading = [answer]
        try:
            self._packed_step()  # reads all but the last
            answer.ids = ids[-1:]
            self._parts = []
            self._group(ROOM).begin(self.device)
            got = self._head(self._forward([(answer, 1)]))[0]
        except (TypeError, NotImplementedError, RuntimeError, AttributeError, ValueError):
            return False
        finally:
            self._reading, self._groups = [], {}
        near = 1e-3 if next(self.model.parameters()).dtype == torch.float32 else 5e-2
        return bool((got - want).abs().max() <= near * want.abs().max().clamp_min(1.0))


def _room(tokens: int) -> int:
    """The size of the cache for so many tokens."""
    return max(ROOM, 1 << (tokens - 1).bit_length())
