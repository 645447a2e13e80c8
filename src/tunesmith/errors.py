"""Every error that a user can meet; each names the place and the fix in one line.

TunesmithError      exit status 1: the work failed
├── UsageError      exit status 2: an option, a key or a path that was given is wrong
│   ├── ModelError  the base model is missing or cannot be trained
│   └── RunError    the run directory is taken, busy, or holds nothing to go on from
├── DataError       exit status 3: the data cannot be trained on
├── ServiceError    a service refused, or did not answer
└── Interrupted     exit status 130: stopped by the user, after a checkpoint
"""

from __future__ import annotations


class TunesmithError(Exception):
    """Root of the tree. `where` is a place ("data.jsonl:3"), `fix` what to do about it."""

    exit_status = 1

    def __init__(self, message: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(message)
        self.message, self.where, self.fix = message, where, fix

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        mend = f" -- {self.fix}" if self.fix else ""
        return " ".join(f"{place}{self.message}{mend}".split())


class UsageError(TunesmithError):
    exit_status = 2


class ModelError(UsageError):
    pass


class RunError(UsageError):
    pass


class DataError(TunesmithError):
    exit_status = 3


class ServiceError(TunesmithError):
    """`status`: what it said by HTTP, 0 where it said nothing that could be read."""

    status = 0

    def refusal(self) -> bool:
        """Whether the service has said no: asking again would bring the same."""
        return 400 <= self.status < 500 and self.status not in (408, 429)


class Interrupted(TunesmithError):
    exit_status = 130


def counted(number: int, word: str) -> str:
    """ "1 error", "2 errors"."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def did_you_mean(word: str, known: list[str]) -> str:
    """' (did you mean "epochs"?)' for the nearest known word, else ''."""
    return f' (did you mean "{near}"?)' if (near := nearest(word, known)) else ""


def nearest(word: str, known: list[str]) -> str | None:
    """The known word that is likest, where one is like it at all."""
    import difflib  # only on the way to an error: 4 ms

    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.6)), None)
