"""Byte-level BPE for the starter: 8,192 entries, trained on the corpus, some Python for code, and emoji.

The pre-tokenizer's pattern is the one of Qwen2 (each digit by itself), which other runtimes know by that
name. Bytes are the alphabet and there is no normaliser, so any Unicode text comes back as it was.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 8192
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PYTHON_SHARE = 1_500_000  # characters of the standard library's source: enough for the common words of code
EMOJI = "😀😂😊😍🙏👍👋🎉🚀✨🔥💡✅❌⚠️🎯📋📊📦🔧🛠️💻🌱🌳🌿🍀🐝🍯📚🧠💬🔄⏰❤️💪🤖🌍☀️🌧️🎵🏠🚗✈️🍎🍞☕🐶🐱📱📝🔑💰🎁👀🙂😢🤔"
CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")


def train(corpus: Path, folder: Path) -> int:
    """Write tokenizer.json, tokenizer_config.json and the chat template; returns the vocabulary's size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|pad|>",
        "eos_token": "<|im_end|>",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return int(tokenizer.get_vocab_size())


def _texts(corpus: Path) -> Iterator[str]:
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield from (m["content"] for m in row["messages"]) if "messages" in row else row.values()
    left = PYTHON_SHARE
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="ignore")[:left]
        left -= len(text)
        yield text
    yield from (" ".join(EMOJI) for _ in range(200))
    yield from ("user\nassistant\nsystem\n" for _ in range(20_000))  # so that a role is one token
