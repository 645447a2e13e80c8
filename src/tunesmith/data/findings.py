"""The table of findings (facts/findings.toml) and what it makes of a code: an Issue with its severity."""

from __future__ import annotations

import tomllib
from functools import cache
from typing import Any

import msgspec

from tunesmith.conversation import Issue
from tunesmith.recipe import FACTS

ORDER = ("error", "warning", "info")


@cache
def table() -> dict[str, dict[str, Any]]:
    """Every code with severity, meaning and fix; further keys are severities for a task or a provider."""
    with (FACTS / "findings.toml").open("rb") as stream:
        return tomllib.load(stream)


def finding(code: str, where: str, message: str, fix: str = "") -> Issue:
    """An Issue of a code in the table, with its general severity."""
    return Issue(table()[code]["severity"], code, where, message, fix)


def graded(issue: Issue, task: str | None, provider: str | None) -> Issue:
    """The issue with the severity it has for this task and this provider; the provider's word is the last."""
    known = table()[issue.code]
    severity = known.get(provider or "", known.get(task or "", issue.severity))
    return issue if severity == issue.severity else msgspec.structs.replace(issue, severity=severity)
