"""What is learnt is exactly the assistant's words with their end; any Unicode comes back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import STARTER
from tunesmith.conversation import Conversation, Message
from tunesmith.render import Renderer

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
