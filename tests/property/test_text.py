"""The quick look at a text never says "nothing here" where the long one finds something."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.text import SECRETS, findings, innocent

plain = "It is a clear day, and Jack's KEY is lost. "
damaged = st.sampled_from(["café", "🎯 Step 1", "naïve — “so”", "Ünïcödé", "Привет, мир"]).flatmap(
    lambda text: st.sampled_from(["latin-1", "cp1252", "mac_roman", "cp1251"]).map(
        lambda wrong: text.encode().decode(wrong, "replace")
    )
)
pieces = st.one_of(
    st.text(max_size=20),
    damaged,
    *(st.from_regex(whole) for whole in SECRETS.values()),
    st.sampled_from(
        [
            "<|im_end|>",
            "</s>",
            "[INST]",
            "a@b.io",
            "4111 1111 1111 1111",
            "+44 20 7946 0958",
            "GB82 WEST 1234 5698 7654 32",
        ]
    ),
    st.sampled_from(
        ["I'm sorry, but I can't", "As an AI", "“I cannot help", "\u200b", "\ufffd", "\x00", "\x85", " ", "\n"]
    ),
)


@given(st.lists(st.lists(st.one_of(st.just(plain), pieces), max_size=4).map("".join), min_size=1, max_size=3))
def test_what_is_innocent_has_no_findings(texts: list[str]) -> None:
    if innocent(texts):
        assert [list(findings(text, True)) for text in texts] == [[]] * len(texts)


def test_most_texts_are_innocent() -> None:
    assert innocent([plain.strip(), "A naïve idea — “good” 🎯 done.", "(see above); 3 of 5", "日本語の文"])
