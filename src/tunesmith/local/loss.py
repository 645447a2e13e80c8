"""Cross-entropy only where there is a label, in chunks, with its gradient made in the same pass.

The [tokens, vocabulary] matrix never exists whole: for each chunk of supervised positions the logits
are computed, turned in place into their gradient (softmax - one-hot) and used up at once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

LEAST = 1e-30  # a probability under this is taken from the logits again: fp32 ends at 1e-38
CHUNK = 512  # rows of logits at a time: 512 x 50k fp32 is 100 MB; larger was not faster on 2 cores


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        hits: list[Tensor] | None,
        each: list[Tensor] | None,
    ) -> Tensor:
        need_h, need_w, need_b, *_ = ctx.needs_input_grad
        narrow = _narrow(weight)
        grad_h = torch.empty_like(hidden) if need_h else None
        grad_w = torch.zeros_like(weight) if need_w else None
        grad_b = torch.zeros_like(bias) if need_b and bias is not None else None
        rights = hidden.new_empty((hidden.shape[0], 1), dtype=torch.float32)
        memory = _memory(hidden, narrow)
        for start in range(0, hidden.shape[0], CHUNK):
            h, t = hidden[start : start + CHUNK].to(narrow.dtype), targets[start : start + CHUNK, None]
            logits = _logits(h, narrow, bias, memory)
            shares = torch.softmax(
                logits, 1, out=logits
            )  # one pass, a row at a time: it stays in the processor's cache
            right = rights[start : start + CHUNK] = shares.gather(1, t)
            if hits is not None:
                hits.append((shares.amax(1, keepdim=True) == right).sum())
            if not (need_h or need_w or need_b):
                continue
            grad = shares.scatter_(1, t, right - 1).to(narrow.dtype)  # softmax - one-hot, in the logits' memory
            if grad_h is not None:
                part = grad_h[start : start + CHUNK]
                torch.mm(grad, narrow, out=part) if part.dtype == grad.dtype else part.copy_(grad @ narrow)
            if grad_w is not None:
                grad_w.addmm_(grad.t(), h) if grad_w.dtype == grad.dtype else grad_w.add_(grad.t() @ h)
            if grad_b is not None:
                grad_b += grad.sum(0)
        losses = -rights.clamp_min(LEAST).log()
        total = losses.sum()
        if each is not None:
            each.append(losses.squeeze(1))
        low = rights.squeeze(1) < LEAST
        if bool(low.any()):
            total = total + _beyond(hidden[low], weight, bias, targets[low, None])
        ctx.save_for_backward(*(g for g in (grad_h, grad_w, grad_b) if g is not None))
        ctx.have = (grad_h is not None, grad_w is not None, grad_b is not None)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        return (*(next(saved).mul_(scale) if have else None for have in ctx.have), None, None, None)


def _beyond(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """What the losses of some rows are over -log LEAST: their targets' probability is too small for a softmax."""
    logits = _logits(hidden, weight, bias)
    exact = torch.logsumexp(logits, 1) - logits.gather(1, targets).squeeze(1)
    return (exact + math.log(LEAST)).sum()


def _narrow(weight: Tensor) -> Tensor:
    """The head's weights in autocast's type, where that is on: once, not for every chunk and product."""
    kind = weight.device.type
    return weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight


def _memory(hidden: Tensor, weight: Tensor) -> Tensor | None:
    """One chunk's logits, used again for every chunk: fresh memory each time halves the product's speed on a CPU."""
    plain = hidden.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(hidden.device.type)
    return hidden.new_empty(min(CHUNK, len(hidden)), len(weight)) if plain else None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, memory: Tensor | None = None) -> Tensor:
    logits = hidden @ weight.t() if memory is None else torch.mm(hidden, weight.t(), out=memory[: len(hidden)])
    return (logits if bias is None else logits.add_(bias)).float()


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    hits: list[Tensor] | None = None,
    each: list[Tensor] | None = None,
) -> Tensor:
    """Sum of -log p(target) in nats, fp32. hidden [n, d], weight [vocabulary, d], targets [n] int64.

    `hits`: a list to which the number of targets that were the likeliest tokens is added, chunk by chunk. `each`: one to
    which the losses [n] are added (69 nats at most: the sum alone knows what is less likely than 1e-30).
    """
    result: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, hits, each)
    return result


@torch.no_grad()
def token_scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per position: -log p(target) [n] fp32, whether the target was the likeliest token [n] bool, and the probability of the
    likeliest [n] fp32."""
    found = []
    narrow = _narrow(weight)
    memory = _memory(hidden, narrow)
    for h, t in zip(hidden.to(narrow.dtype).split(CHUNK), targets.split(CHUNK), strict=True):
        logits = _logits(h, narrow, bias, memory)
        found.append(_scored(logits, t))
    losses, right, sure = (torch.cat(part) for part in zip(*found, strict=True))
    return losses, right, sure


def _scored(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As token_scores, from logits [n, vocabulary] fp32."""
    total = torch.logsumexp(logits, 1)
    top, likeliest = logits.max(1)
    losses = total - logits.gather(1, targets[:, None]).squeeze(1)
    return losses, likeliest == targets, (top - total).exp()


class LossModule(nn.Module):
    """Tokens in, (sum of losses, number of supervised tokens) out: the whole forward pass of training.

    It is a module so that wrappers for several processes hook one `forward`. `mode` is how the model runs:
    "packed" (all conversations at once), "single" (one after the other, for models whose attention
    cannot be packed), or "logits" (the model's own head, for models that do more than a matrix product there).
    `hits`: None, or a list to which each forward pass adds how many of its tokens were the likeliest. `by_row`: None, or one to
    which it adds the mean loss of each of its conversations [conversations] (0 where nothing is learnt).
    """

    hits: list[Tensor] | None = None
    by_row: list[Tensor] | None = None

    def __init__(self, model: nn.Module, mode: str = "packed", neftune_alpha: float = 0.0) -> None:
        super().__init__()
        self.model, self.mode, self.neftune_alpha = model, mode, neftune_alpha
        causal: Any = model.get_base_model() if hasattr(model, "peft_config") else model
        self._causal, self._decoder, self._head = (
            [causal],
            [causal.base_model],
            [causal.get_output_embeddings()],
        )  # lists: not submodules twice

    def hidden(self, ids: Tensor, segments: list[int], bottom: Tensor | None = None) -> Tensor:
        """Last hidden states [tokens, d] of conversations that stand one after the other in `ids` [tokens].

        `bottom` [tokens, d]: what enters the decoder in place of the embeddings of `ids`.
        """
        decoder = self._decoder[0]
        if bottom is None and self.neftune_alpha and self.model.training:
            bottom = self._noisy(ids, segments)
        given = {"input_ids": ids[None]} if bottom is None else {"inputs_embeds": bottom[None]}
        if self.mode == "packed":
            positions = torch.cat([torch.arange(n, device=ids.device) for n in segments])
            out = decoder(**given, position_ids=positions[None], use_cache=False, segments=segments)
            return out.last_hidden_state[0]
        (name, whole), parts = next(iter(given.items())), []
        for part in whole[0].split(segments):
            parts.append(decoder(**{name: part[None]}, use_cache=False).last_hidden_state[0])
        return torch.cat(parts)

    def _noisy(self, ids: Tensor, segments: list[int]) -> Tensor:
        """Embeddings with uniform noise of alpha / sqrt(conversation length x d) (NEFTune, Jain et al. 2023)."""
        embeds: Tensor = self._causal[0].get_input_embeddings()(ids)
        lengths = torch.tensor(segments, device=ids.device).repeat_interleave(torch.tensor(segments, device=ids.device))
        scale = self.neftune_alpha / (lengths * embeds.shape[1]).sqrt()
        return embeds + scale[:, None] * torch.empty_like(embeds).uniform_(-1, 1)

    def forward(
        self, ids: Tensor, mask: Tensor, segments: list[int], bottom: Tensor | None = None
    ) -> tuple[Tensor, int]:
        """ids [tokens] int64, mask [tokens] bool (True: to be predicted), segments: conversation lengths."""
        at = supervised(mask, segments)
        if self.mode == "logits":
            losses, right, _ = self._own_losses(ids, at, segments)
            if self.hits is not None:
                self.hits.append(right.sum())
            self._note(losses.detach(), at, segments)
            return losses.sum(), len(at)
        head = self._head[0]
        hidden = self.hidden(ids, segments, bottom)[at]
        each: list[Tensor] | None = None if self.by_row is None else []
        total = chunked_cross_entropy(hidden, head.weight, getattr(head, "bias", None), ids[at + 1], self.hits, each)
        if each:
            self._note(each[0], at, segments)
        return total, len(at)

    def _note(self, losses: Tensor, at: Tensor, segments: list[int]) -> None:
        """Add the mean loss of each conversation to `by_row`, from those of the positions `at`."""
        if self.by_row is None:
            return
        lengths = torch.tensor(segments, device=at.device)
        owner = torch.bucketize(at, lengths.cumsum(0), right=True)
        sums = torch.zeros(len(segments), device=at.device).index_add_(0, owner, losses.float())
        self.by_row.append(sums / torch.bincount(owner, minlength=len(segments)).clamp_min(1))

    @torch.no_grad()
    def scores(self, ids: Tensor, mask: Tensor, segments: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per supervised token: loss in nats, whether it was the likeliest, the likeliest one's probability, index of its
        conversation."""
        at = supervised(mask, segments)
        owner = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(segments))[at.cpu()]
        if self.mode == "logits":
            return *self._own_losses(ids, at, segments), owner
        head = self._head[0]
        return *token_scores(
            self.hidden(ids, segments)[at], head.weight, getattr(head, "bias", None), ids[at + 1]
        ), owner

    def _own_losses(self, ids: Tensor, at: Tensor, segments: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """By the model's own head, one conversation at a time: as `token_scores`, of the positions `at`."""
        learnt = torch.zeros_like(ids, dtype=torch.bool)
        learnt[at] = True
        found = []
        for part, here in zip(ids.split(segments), learnt.split(segments), strict=True):
            where = here.nonzero().squeeze(1)
            logits = self._causal[0](input_ids=part[None], use_cache=False).logits[0, where].float()
            found.append(_scored(logits, part[where + 1]))
        losses, right, sure = (torch.cat(part) for part in zip(*found, strict=True))
        return losses, right, sure


def supervised(mask: Tensor, segments: list[int]) -> Tensor:
    """Positions [n] whose next token is to be predicted: the next is masked True and of the same conversation."""
    nxt = torch.zeros_like(mask)
    nxt[:-1] = mask[1:]
    ends = torch.tensor(segments).cumsum(0) - 1
    nxt[ends.to(mask.device)] = False
    return nxt.nonzero().squeeze(1)
