"""What a file of source says in its errors: messages and fixes as they will be read, for docs/errors.md."""

from __future__ import annotations

import ast
import itertools
import math
import re
from collections.abc import Iterator

Functions = tuple[ast.FunctionDef, ...]  # that a piece of source stands in, the outermost first
Given = tuple[int, ast.expr, Functions]  # a line, what is assigned or handed over there, and where that stands


class Sayings:
    """The texts of one file of source as they will be read, with names in braces where something is filled in. A name stands
    for what is assigned to it in its function, or for what callers in the file give; a call for what its function returns."""

    MOST = 6  # forms of one text; more of them are left as a name in braces

    def __init__(self, file: ast.Module) -> None:
        self.functions: dict[str, ast.FunctionDef] = {}
        self.calls: list[tuple[ast.Call, Functions]] = []  # each with the functions that it stands in
        self._find(file, ())

    def _find(self, node: ast.AST, inside: Functions) -> None:
        if isinstance(node, ast.FunctionDef):
            self.functions[node.name] = node
            inside = (*inside, node)
        if isinstance(node, ast.Call):
            self.calls.append((node, inside))
        for child in ast.iter_child_nodes(node):
            self._find(child, inside)

    def together(self, message: ast.expr, fix: ast.expr | None, inside: Functions) -> Iterator[tuple[str, str]]:
        """(message, fix) in each form; two names that are assigned in one statement go together."""
        fixes = [each for each in self.known(fix, inside) if not fix or each[0] <= fix.lineno]
        for line, value, where in self.known(message, inside):
            own = [one for one in fixes if one[0] == line] or fixes
            ways = [way for _, v, w in own for way in self.texts(v, w)[: None if isinstance(v, ast.IfExp) else 1]]
            worded = [way for way in dict.fromkeys(ways) if has_words(way)]
            for text in self.texts(value, where):
                yield text, "; or ".join(worded) or (_named(fix) if fix else "")

    def known(self, node: ast.expr | None, inside: Functions) -> list[Given]:
        """What a name stands for, else the expression itself."""
        found = self.given(node.id, inside) if isinstance(node, ast.Name) else []
        return found or ([(node.lineno, node, inside)] if node else [])

    def given(self, name: str, inside: Functions, handed_over: bool = True) -> list[Given]:
        """What is assigned to a name, or handed over under it."""
        found: list[Given] = []
        for depth in range(len(inside), 0, -1):
            function, outer = inside[depth - 1], inside[:depth]
            for node in ast.walk(function):
                if isinstance(node, ast.NamedExpr) and node.target.id == name:
                    found.append((node.lineno, node.value, outer))
                if isinstance(node, ast.Assign):
                    for target in node.targets:
                        pairs = (
                            zip(target.elts, node.value.elts, strict=False)
                            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                            else [(target, node.value)]
                        )
                        found += [(node.lineno, v, outer) for t, v in pairs if isinstance(t, ast.Name) and t.id == name]
            names = [a.arg for a in function.args.args]
            if name in names and handed_over:
                place = names.index(name) - (names[0] in ("self", "cls"))
                for call, where in self.calls:
                    if _called(call) == function.name:
                        value = next((k.value for k in call.keywords if k.arg == name), None)
                        value = value or (call.args[place] if place < len(call.args) else None)
                        found += [(call.lineno, value, where)] if value else []
            if found:
                return found
        return []

    def texts(self, node: ast.expr, inside: Functions, left: int = 3) -> list[str]:
        """Every form of a text, at least one."""
        if isinstance(node, ast.Constant):
            return [str(node.value).replace("\n", " ")]
        if isinstance(node, ast.IfExp):
            said = [part for part in (node.body, node.orelse) if not _is_none(part)]
            return [text for part in said for text in self.texts(part, inside, left)]
        if _is_text(node):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node.left, node.right]  # type: ignore[attr-defined]
            forms = [self.texts(part, inside, left) for part in parts]
            if math.prod(map(len, forms)) > self.MOST:
                forms = [one if len(one) == 1 else [_named(part)] for one, part in zip(forms, parts, strict=True)]
            return ["".join(form) for form in itertools.product(*forms)]
        if isinstance(node, ast.FormattedValue):
            return self.texts(node.value, inside, left)
        if isinstance(node, ast.Call) and _called(node) == "did_you_mean":
            return [""]
        values = self.given(node.id, inside, handed_over=False) if isinstance(node, ast.Name) else []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.functions:
            function = self.functions[node.func.id]
            returned = [n.value for n in ast.walk(function) if isinstance(n, ast.Return) and n.value]
            values = [(0, v, (function,)) for v in returned if not _is_none(v)]
        found = list(dict.fromkeys(t for _, v, w in values for t in self.texts(v, w, left - 1))) if left else []
        told = len(found) <= self.MOST and (found == [""] or any(map(has_words, found)))
        return found if told else [_named(node)]


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_text(node: ast.expr) -> bool:
    """Whether an expression is put together from texts: no sum of numbers."""
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add) and (_is_text(node.left) or _is_text(node.right))
    if isinstance(node, ast.IfExp):
        return _is_text(node.body) or _is_text(node.orelse)
    return isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str)


def _called(node: ast.Call) -> str:
    """The function's name: of this file, or a method of the same object."""
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        return node.func.attr if node.func.value.id in ("self", "cls") else ""
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _named(node: ast.expr) -> str:
    """A name in braces for what is filled in, as near as the source has one."""
    if isinstance(node, ast.FormattedValue):
        return _named(node.value)
    if isinstance(node, ast.Name):
        return f"{{{node.id}}}"
    if isinstance(node, ast.Attribute):
        return "{kind}" if node.attr == "__name__" else f"{{{node.attr}}}"
    if isinstance(node, ast.Subscript):
        return _named(node.value)
    called = node.func if isinstance(node, ast.Call) else None
    name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
    if isinstance(node, ast.Call) and name in ("str", "repr", "join", "sorted", "list") and node.args:
        return _named(node.args[0])
    return "{…}"


def has_words(text: str) -> bool:
    """Whether more than what is filled in can be read in it."""
    return bool(re.search(r"[a-zA-Z]", re.sub(r"\{[^}]*\}", "", text)))
