"""The code in an answer: where it stands, in which language, whether it parses, and of what it is made.

Python is parsed by the interpreter's own compiler, which alone knows all of its rules; the other languages by their tree-sitter
grammars, which also give the nodes of broken code (docs/decisions/0019-tree-sitter.md).
"""

from __future__ import annotations

import importlib
import re
import tomllib
import warnings
from collections import Counter
from functools import cache
from typing import Any

from tunesmith.conversation import Conversation
from tunesmith.recipe import FACTS

LONGEST = 20_000  # characters that a grammar parses: of 100,000 the worst text found took a grammar 31 s, of these 0.6
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([^\s`{]*)")


@cache
def languages() -> dict[str, dict[str, Any]]:
    """facts/languages.toml: tags and grammar of each language, in the order in which they are tried."""
    with (FACTS / "languages.toml").open("rb") as stream:
        return tomllib.load(stream)


def named(tag: object) -> str | None:
    """The language that a fence's tag or a row's metadata names; None for one that is not known."""
    wanted = tag.strip().casefold() if isinstance(tag, str) else ""
    return next((name for name, facts in languages().items() if wanted == name or wanted in facts["tags"]), None)


def fences(text: str) -> list[tuple[str, str]]:
    """(tag, content) of the fenced blocks of a Markdown text (CommonMark 4.5); one that is not closed goes to the end."""
    found: list[tuple[str, list[str]]] = []
    fence = ""
    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if not fence:
            if mark:
                fence = mark[1]
                found.append((mark[2].casefold(), []))
        elif mark and mark[1].startswith(fence) and not line[mark.end(1) :].strip():
            fence = ""
        else:
            found[-1][1].append(line)
    return [(tag, "\n".join(lines) + "\n") for tag, lines in found]


def code_of(answer: str) -> tuple[str, str]:
    """(code, tag) of an answer. Without a fence the whole answer is code, without a tag.

    With fences: the first block that is tagged with a known language or not at all, and the later ones with the same tag, one
    after the other; code of no known language (a shell's, say) is passed over where there is other.
    """
    blocks = fences(answer)
    if not blocks:
        return answer, ""
    tag = next((tag for tag, _ in blocks if not tag or named(tag)), blocks[0][0])
    return "".join(content for other, content in blocks if other == tag), tag


def question(row: Conversation) -> str:
    """The code that an answer may continue: in `prompt` of the metadata, else in the last message before the answer."""
    given = row.metadata.get("prompt")
    asked = row.prompt()
    return code_of(given if isinstance(given, str) else asked[-1].content if asked else "")[0]


def language(row: Conversation, tag: str = "") -> str | None:
    """The language of an answer to this row; None where nothing tells.

    By the tag of the answer's fence; else by `language` or `lang` of the row's metadata; else by the tag of the reference's
    fence; else the first language in which the reference, alone or after its prompt, is without an error.
    """
    reference, own = code_of(row.answer())
    for name in (tag, row.metadata.get("language"), row.metadata.get("lang"), own):
        if found := named(name):
            return found
    if own or not reference.strip():
        return None
    return next((name for name in languages() if stands(name, row, reference) is not None), None)


def stands(name: str, row: Conversation, code: str) -> str | None:
    """The program that code is of: itself, or after its prompt, which a bare body continues. None where neither parses.

    A body may have lost its line break and the indentation of its first line, as answers often do.
    """
    return next((text for text in (code, *continued(row, code)) if parses(name, text)), None)


def continued(row: Conversation, code: str) -> list[str]:
    """Ways to read code as the continuation of its prompt."""
    before = question(row)
    return [before + code, f"{before}\n{code}", f"{before}\n    {code}"] if before else []


def parses(name: str, code: str) -> bool:
    """Whether code has no syntax error: of Python what this interpreter says, else what the tree-sitter grammar does."""
    if name != "python":
        return not tree(name, code).has_error
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(code, "answer", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the last two: nested too deeply for the compiler
        return False
    return True


def tree(name: str, code: str) -> Any:
    """The root of the syntax tree, also of broken code."""
    from tree_sitter import Parser

    return Parser(_grammar(name)).parse(code[:LONGEST].encode(errors="replace")).root_node


@cache
def _grammar(name: str) -> Any:
    from tree_sitter import Language

    module, _, function = languages()[name]["grammar"].partition(":")
    return Language(getattr(importlib.import_module(module), function)())


def kinds(name: str, code: str) -> Counter[str]:
    """How often each kind of named node is in the syntax tree, without the root, comments and errors."""
    found: Counter[str] = Counter()
    cursor = tree(name, code).walk()
    deeper = cursor.goto_first_child()
    while deeper:
        node = cursor.node
        if node.is_named and not node.is_error and "comment" not in node.type:
            found[node.type] += 1
        while not (cursor.goto_first_child() if deeper else cursor.goto_next_sibling()):
            if deeper:
                deeper = False
            elif not cursor.goto_parent():
                return found
        deeper = True
    return found
