"""Small expressions that choose rows: `metadata.augmented == true and turns > 2`. Parsed, never executed.

Names are fields of a row: metadata.NAME, prompt, answer and system (texts), turns and source. Values are true, false,
null, numbers and strings. Operators: == != < <= > >= in, not in, and, or, not. A missing field is null, and a comparison
that makes no sense (a text with a number) is false.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from tunesmith.conversation import Conversation
from tunesmith.errors import UsageError, did_you_mean

Expression = Callable[[dict[str, Any]], Any]
FIELDS = ("metadata", "prompt", "answer", "system", "turns", "source")
_VALUES = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def where(text: str) -> Callable[[Conversation], bool]:
    """The expression as a test of conversations. Raises UsageError naming what it cannot read."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _bad(text, f"cannot be read: {getattr(error, 'msg', error)}") from None
    found = _compile(tree.body, text)
    return lambda row: bool(found(fields(row)))


def fields(row: Conversation) -> dict[str, Any]:
    """What an expression sees of a conversation."""
    return {
        "metadata": row.metadata,
        "prompt": "\n".join(m.content for m in row.prompt() if m.role == "user"),
        "answer": row.answer(),
        "system": next((m.content for m in row.messages if m.role in ("system", "developer")), None),
        "turns": sum(m.role == "assistant" for m in row.messages),
        "source": row.source,
    }


def _bad(text: str, why: str) -> UsageError:
    return UsageError(why, where=f"--where '{text}'", fix="for example: metadata.augmented == true and turns > 1")


def _compile(node: ast.expr, text: str) -> Expression:
    """A function of the fields for a node; only the nodes below are known."""
    match node:
        case ast.Constant(value=str() | int() | float() as value):
            return lambda row: value
        case ast.Name(id=name) if name in _VALUES:
            return lambda row: _VALUES[name]
        case ast.Name(id=name):
            if name not in FIELDS:
                raise _bad(text, f'no field "{name}"{did_you_mean(name, list(FIELDS))}; a row has {", ".join(FIELDS)}')
            return lambda row: row[name]
        case ast.Attribute(value=inner, attr=key) | ast.Subscript(value=inner, slice=ast.Constant(value=str() as key)):
            whole = _compile(inner, text)
            return lambda row: found.get(key) if isinstance(found := whole(row), dict) else None
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            truth = _compile(inner, text)
            return lambda row: not truth(row)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return lambda row: -number
        case ast.List(elts=items) | ast.Tuple(elts=items):
            members = [_compile(item, text) for item in items]
            return lambda row: [member(row) for member in members]
        case ast.BoolOp(op=joint, values=values):
            parts = [_compile(value, text) for value in values]
            whether = all if isinstance(joint, ast.And) else any
            return lambda row: whether(part(row) for part in parts)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            a, b, compare = _compile(left, text), _compile(right, text), _COMPARE[type(op)]
            return lambda row: _safe(compare, a(row), b(row))
    raise _bad(text, f"{ast.unparse(node)!r} is not part of the language")


def _safe(compare: Callable[[Any, Any], bool], a: Any, b: Any) -> bool:
    try:
        return bool(compare(a, b))
    except TypeError:
        return False
