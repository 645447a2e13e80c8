"""Ids and masks, token by token, for each kind of template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conftest import STARTER
from tunesmith.conversation import Conversation, Message
from tunesmith.errors import DataError, ModelError
from tunesmith.render import TEMPLATES, Renderer, chosen_template

CHAT = Conversation(
    (
        Message("system", "Be kind."),
        Message("user", "Hi"),
        Message("assistant", "Hello."),
        Message("user", "Bye"),
        Message("assistant", "See you."),
    ),
    source="f:1",
)


def model_folder(tmp_path: Path, template: str | None, **config: object) -> Path:
    """The starter's tokenizer with another template."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copyfile(STARTER / "tokenizer.json", folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "eos_token": "<|im_end|>",
                "pad_token": "<|pad|>",
                **({"chat_template": template} if template else {}),
                **config,
            }
        )
    )
    return folder


def marked(renderer: Renderer, conversation: Conversation = CHAT) -> str:
    """The text with what is learnt in brackets."""
    row, out, inside = renderer.render(conversation), "", False
    for i, m in zip(row.ids, row.mask, strict=True):
        out += ("⟦" if m and not inside else "⟧" if inside and not m else "") + renderer.decode([i], special=True)
        inside = bool(m)
    return out + ("⟧" if inside else "")


def test_starter() -> None:
    assert marked(Renderer(STARTER)) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦See you.<|im_end|>⟧\n"
    )


def test_template_without_marks(tmp_path: Path) -> None:
    chatml = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert marked(Renderer(model_folder(tmp_path, chatml))) == marked(Renderer(STARTER))


def test_base_model_without_template_gets_the_documented_one(tmp_path: Path) -> None:
    renderer = Renderer(model_folder(tmp_path, None))
    assert not renderer.is_own
    assert (
        marked(renderer)
        == "System: Be kind.\n\nUser: Hi\n\nAssistant:⟦ Hello.<|im_end|>⟧\n\nUser: Bye\n\nAssistant:⟦ See you.<|im_end|>⟧"
    )
    assert (
        renderer.decode(renderer.prompt_ids([Message("user", "What makes you unique?")]), special=True)
        == "User: What makes you unique?\n\nAssistant:"
    )
    renderer.save(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == renderer.template


ASKED = {
    "chat": ("System: Be kind.\n\nUser: Hi\n\nAssistant:", " Hello."),
    "instruct": ("Be kind.\n\n### Instruction:\nHi\n\n### Response:\n", "Hello."),
    "completion": ("Be kind.\nHi\n", "Hello."),
}
BYE = {
    "chat": ("\n\nUser: Bye\n\nAssistant:", " See you."),
    "instruct": ("\n\n### Instruction:\nBye\n\n### Response:\n", "See you."),
    "completion": ("\n\nBye\n", "See you."),
}


@pytest.mark.parametrize("name", ASKED)
def test_templates_of_tasks(name: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path, None)
    renderer = Renderer(folder, chosen_template(name, folder))
    (first, hello), (second, bye) = ASKED[name], BYE[name]
    assert marked(renderer) == f"{first}⟦{hello}<|im_end|>⟧{second}⟦{bye}<|im_end|>⟧"
    assert renderer.decode(renderer.prompt_ids(CHAT.messages[:2]), special=True) == first
    assert set(TEMPLATES) == set(ASKED)


def test_code_goes_on_where_its_prompt_ends(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, None)
    renderer = Renderer(folder, chosen_template("completion", folder))
    for prompt in ("def f():\n", "def f(): ", "def f():\n\t"):
        row = Conversation((Message("user", prompt), Message("assistant", "return 1")))
        assert marked(renderer, row) == f"{prompt}⟦return 1<|im_end|>⟧"


def test_bos_of_the_default_template_is_the_tokenizers_own(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    folder = model_folder(tmp_path, None)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    assert marked(Renderer(folder), Conversation((Message("text", "abc"),))) == "<|im_start|>⟦abc<|im_end|>⟧"


def test_plain_text_is_learnt_whole() -> None:
    assert marked(Renderer(STARTER), Conversation((Message("text", "def f(): pass"),))) == "⟦def f(): pass<|im_end|>⟧"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>>{% endif %}",
            "differently from its own generation prompt",
        ),
    ],
)
def test_template_that_cannot_be_used(tmp_path: Path, template: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        Renderer(model_folder(tmp_path, template)).render(CHAT)
    assert caught.value.where == "f:1"


def test_template_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="refuses"):
        Renderer(model_folder(tmp_path, "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}")).render(CHAT)


@pytest.mark.parametrize(
    ("config", "words"),
    [({"eos_token": None}, "no end-of-sequence"), ({"eos_token": "<nope>"}, "not in the vocabulary")],
)
def test_tokenizer_that_cannot_be_used(tmp_path: Path, config: dict[str, object], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        Renderer(model_folder(tmp_path, None, **config))


def test_ids_equal_those_of_transformers() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(STARTER)
    messages = [{"role": m.role, "content": m.content} for m in CHAT.messages]
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ours = Renderer(STARTER).render(CHAT)
    assert (ours.ids, ours.mask) == (theirs["input_ids"], theirs["assistant_masks"])
    prompt = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True, return_dict=False)
    assert Renderer(STARTER).prompt_ids(CHAT.messages[:2]) == prompt
    assert tokenizer.pad_token != tokenizer.eos_token


def test_template_that_writes_earlier_turns_differently_is_refused_not_mismasked(tmp_path: Path) -> None:
    """Qwen3's adds an empty thought to the last answer only: a prefix of the rows is not a prefix of the text."""
    thinking = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = Renderer(model_folder(tmp_path, thinking))
    with pytest.raises(DataError, match="differently from its own generation prompt"):
        renderer.render(CHAT)
    assert marked(renderer, Conversation(CHAT.messages[:3])).endswith("⟦<think></think>Hello.<|im_end|>⟧\n")


def test_spaces_are_learnt_with_tokenizers_that_trim_offsets(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    folder = model_folder(tmp_path, None)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    code = Conversation((Message("user", "x"), Message("assistant", "def f():\n        return  1")))
    assert marked(Renderer(folder), code).endswith("⟦ def f():\n        return  1<|im_end|>⟧")
