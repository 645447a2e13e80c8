"""What is learnt is exactly the assistant's words with their end; any Unicode comes back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from conftest import STARTER
from tunesmith.conversation import Conversation, Message
from tunesmith.render import Renderer
from tunesmith.words import _LINES, _WORDS, Words, border

renderer = Renderer(STARTER)
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(lambda t: "<|" not in t)
turns = st.lists(st.tuples(text, text), min_size=1, max_size=4)


@settings(deadline=None)
@given(text)
def test_any_text_comes_back(said: str) -> None:
    ids = renderer.tokenizer.encode(said, add_special_tokens=False).ids
    assert renderer.decode(ids) == said


@settings(deadline=None)
@given(turns, st.booleans())
def test_mask_is_the_answers_and_their_ends(pairs: list[tuple[str, str]], system: bool) -> None:
    messages = [Message("system", "Be brief.")] if system else []
    for ask, answer in pairs:
        messages += [Message("user", ask), Message("assistant", answer)]
    row = renderer.render(Conversation(tuple(messages)))
    assert len(row.ids) == len(row.mask)
    learnt = renderer.decode([i for i, m in zip(row.ids, row.mask, strict=True) if m], special=True)
    assert learnt == "".join(f"{answer}<|im_end|>" for _, answer in pairs)
    assert renderer.decode(row.ids, special=True) == row.text


@settings(deadline=None)
@given(turns)
def test_the_prompt_is_a_prefix_of_what_was_trained(pairs: list[tuple[str, str]]) -> None:
    messages = tuple(m for ask, answer in pairs for m in (Message("user", ask), Message("assistant", answer)))
    whole = renderer.render(Conversation(messages)).ids
    prompt = renderer.prompt_ids(messages[:-1])
    assert whole[: len(prompt)] == prompt


@settings(deadline=None)
@given(turns, st.data())
def test_weight_zero_is_not_learnt(pairs: list[tuple[str, str]], draw: st.DataObject) -> None:
    kept = [draw.draw(st.booleans()) for _ in pairs]
    messages = tuple(
        m
        for (ask, answer), keep in zip(pairs, kept, strict=True)
        for m in (Message("user", ask), Message("assistant", answer, weight=int(keep)))
    )
    row = renderer.render(Conversation(messages))
    learnt = renderer.decode([i for i, m in zip(row.ids, row.mask, strict=True) if m], special=True)
    assert learnt == "".join(f"{answer}<|im_end|>" for (_, answer), keep in zip(pairs, kept, strict=True) if keep)


# ---- words, each encoded once, against the whole text

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
words = st.lists(
    st.one_of(
        st.sampled_from(
            [
                " ",
                "  ",
                "\n",
                " \n ",
                "\t",
                "\u00a0",
                "\u3000",
                "the",
                "cat",
                " the",
                ".",
                "'s",
                "1234",
                "<|im_end|>",
                "e\u0301",
            ]
        ),
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6),
    ),
    max_size=12,
).map("".join)


def trained(kind: str) -> Tokenizer:
    """A tokenizer of some family, with merges learnt from the starter's rows."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    metaspace = pre_tokenizers.Metaspace()
    tokenizer.pre_tokenizer = {"gpt2": level, "metaspace": metaspace}.get(kind, pre_tokenizers.Sequence([split, level]))
    if kind == "llama2":  # no pieces at all: a token may reach over a space
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, initial_alphabet=alphabet, show_progress=False, special_tokens=["<|im_end|>"]
    )
    tokenizer.train_from_iterator((STARTER.parent / "data" / "echo.jsonl").read_text().splitlines(), trainer)
    if kind == "strips":
        tokenizer.add_special_tokens([AddedToken("<|im_end|>", rstrip=True)])
    return tokenizer


KINDS = {kind: trained(kind) for kind in ("gpt2", "llama3", "qwen", "metaspace")} | {"starter": renderer.tokenizer}


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=300)
@given(said=words)
def test_word_by_word_is_the_same(kind: str, said: str) -> None:
    tokenizer = KINDS[kind]
    at = border(tokenizer)
    assert at
    words = Words(tokenizer, at)
    assert "".join(words.split(said)) == said
    for _ in range(2):  # new words, then known ones
        assert words.ids(words.split(said)) == tokenizer.encode(said, add_special_tokens=False).ids


def test_which_tokenizers_treat_words_apart() -> None:
    assert {kind: border(tokenizer) for kind, tokenizer in KINDS.items()} == {
        "gpt2": _WORDS, "llama3": _LINES, "qwen": _LINES, "metaspace": _WORDS, "starter": _LINES
    }  # fmt: skip
    assert not any(border(trained(kind)) for kind in ("llama2", "strips"))


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_the_same_ids_and_mask(pairs: list[tuple[str, str]]) -> None:
    """As of the whole text, whose tokens are divided where an answer begins."""
    whole = Renderer(STARTER)
    whole._words = None
    row = Conversation(tuple(m for ask, answer in pairs for m in (Message("user", ask), Message("assistant", answer))))
    want = next(whole.render_all([row]))
    got = next(renderer.render_all([row]))
    assert (got.ids, got.mask, got.text) == (want.ids, want.mask, want.text)
