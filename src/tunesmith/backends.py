"""The seam between a plan and whoever carries it out: one protocol, a lookup, and a fake that learns nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tunesmith.conversation import Conversation
from tunesmith.errors import Interrupted, TunesmithError, UsageError, did_you_mean
from tunesmith.layout import create_run
from tunesmith.runs import GOING, Event, Run

if TYPE_CHECKING:
    from tunesmith.planning import Prepared

POLL_SECONDS = 0.1
BACKENDS = {
    "huggingface": "tunesmith.local.backend:LocalBackend",
    "openai": "tunesmith.remote.backend:OpenAIBackend",
    "fake": "tunesmith.backends:FakeBackend",
}


class Backend(Protocol):
    """Starts, watches over and stops the work on a run. The run directory holds everything else."""

    def submit(self, prepared: Prepared, path: Path) -> Run:
        """Create the run and start the work; returns at once."""
        ...

    def resume(self, run: Run, step: int | None = None) -> None:
        """Start the work again from the last checkpoint, or from that of `step`; returns at once."""
        ...

    def poll(self, run: Run) -> str:
        """queued, preparing, running, paused, succeeded, failed, cancelled, or interrupted."""
        ...

    def cancel(self, run: Run, at_once: bool = False) -> None:
        """Ask the work to stop; a local run checkpoints first, unless it has to end `at_once`."""
        ...

    def interrupt(self, run: Run, at_once: bool = False) -> None:
        """What Ctrl-C does to who is watching: ask the work to stop.

        Raises Interrupted, which says how to go on, where the work goes on without us, or where it had to end `at_once`.
        """
        ...

    def act(self, run: Run, what: str) -> str:
        """pause or resume the work, or cancel it from another process than the one that began it; the state it has then.

        Raises UsageError where the backend cannot.
        """
        ...

    def completer(self, model: str, template: str | None = None) -> Completer:
        """Answers of a model, where the backend has them; `template`: the text of another chat template than its own."""
        ...


class Completer(Protocol):
    """Chat with a model: batches of conversations in, one answer each out."""

    def __call__(
        self, prompts: list[Conversation], max_tokens: int = 256, temperature: float = 0.0, seed: int = 0
    ) -> list[str]: ...

    def said(
        self,
        prompts: list[Conversation],
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        told: Callable[[int], object] = lambda _: None,
    ) -> list[tuple[str, bool | None, int]]:
        """(answer, whether the model ended it by itself or None, its tokens); `told` hears of each that is done."""
        ...


def get(provider: str) -> Backend:
    """The backend of a provider. Raises UsageError for an unknown one."""
    if provider not in BACKENDS:
        raise UsageError(
            f'no provider "{provider}"{did_you_mean(provider, list(BACKENDS))}',
            where="--provider",
            fix=f"known: {', '.join(BACKENDS)}",
        )
    module, _, name = BACKENDS[provider].partition(":")
    return getattr(import_module(module), name)()  # type: ignore[no-any-return]


class FakeBackend:
    """Learns nothing and ends at once: for dry runs, and for tests of everything around training."""

    def submit(self, prepared: Prepared, path: Path) -> Run:
        run = create_run(prepared, path)
        self.resume(run)
        return run

    def resume(self, run: Run, step: int | None = None) -> None:
        run.append("state", state="running")
        steps = run.manifest()["plan"]["steps"]
        for step in range(1, steps + 1):
            run.append(
                "step",
                step=step,
                epoch=0.0,
                loss=1 / step,
                lr=0.0,
                grad_norm=0.0,
                tokens=0,
                total_tokens=0,
                total_supervised_tokens=0,
                seconds=0.0,
                tokens_per_second=0.0,
                memory_mb=0,
            )
        run.append(
            "done",
            step=steps,
            best_step=steps,
            stopped_early=False,
            seconds=0.0,
            tokens_per_second=0.0,
            peak_memory_mb=0,
        )
        run.append("state", state="succeeded")

    def poll(self, run: Run) -> str:
        return run.state()

    def cancel(self, run: Run, at_once: bool = False) -> None:
        if run.state() not in ("succeeded", "failed"):
            run.append("state", state="cancelled")

    def interrupt(self, run: Run, at_once: bool = False) -> None:
        self.cancel(run)
        if at_once:
            raise stopped(run)

    def act(self, run: Run, what: str) -> str:
        if what != "cancel":
            raise UsageError(f"a dry run cannot {what}", where=str(run), fix="it has ended")
        self.cancel(run)
        return run.state()

    def completer(self, model: str, template: str | None = None) -> Completer:
        return Echo()


class Echo:
    """Says what was said last."""

    def __call__(
        self, prompts: list[Conversation], max_tokens: int = 256, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        return [p.messages[-1].content if p.messages else "" for p in prompts]

    def said(
        self,
        prompts: list[Conversation],
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        told: Callable[[int], object] = lambda _: None,
    ) -> list[tuple[str, bool | None, int]]:
        return [(text, True, 0) for text in self(prompts)]


@contextmanager
def interruptible(backend: Backend, path: Path) -> Iterator[None]:
    """Around all that begins, or goes on with, the run at `path`: a Ctrl-C at any moment after it was laid out raises
    Interrupted, which says how to go on. That of `watch` is gentler."""
    try:
        yield
    except KeyboardInterrupt:
        run = Run(path)
        if (run / "run.json").exists() and run.state() != "succeeded":
            backend.interrupt(run, at_once=True)
        raise


def watch(run: Run, backend: Backend, on_event: Callable[[Run, Event], None] | None = None, offset: int = 0) -> Run:
    """Pass on events until the run ends. Ctrl-C asks a local worker to stop (a second one is passed on), and leaves a job at a
    service alone: then Interrupted says how to come back to it."""
    return follow(run, backend.poll, backend.interrupt, on_event, offset)


def follow(
    run: Run,
    poll: Callable[[Run], str],
    interrupt: Callable[[Run], None],
    on_event: Callable[[Run, Event], None] | None = None,
    offset: int = 0,
) -> Run:
    interrupted = False
    while True:
        try:
            state = poll(run)
            events, offset = run.events_from(offset)
            for event in events:
                if on_event:
                    on_event(run, event)
            if state not in GOING:
                break
            time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            interrupt(run)
    if state == "succeeded":
        return run
    if state in ("paused", "cancelled") and run.last("state").get("at") == "service":
        go_on = f"go on with: tunesmith runs resume {run:q}" if state == "paused" else "a new job begins anew"
        raise Interrupted(f"the job is {state} at the service", where=str(run), fix=go_on)
    if state == "cancelled" and (run / "remote.json").exists():
        raise Interrupted("cancelled before the service had a job", where=str(run), fix="begin a new run")
    if state in ("paused", "cancelled"):
        raise stopped(run)
    raise failure(run)


def stopped(run: Run) -> Interrupted:
    """What to tell the user of a run on this machine that was ended before its time."""
    step = max((e["step"] for e in run.metrics("step")), default=0)
    return Interrupted(
        f"stopped at step {step}; its checkpoints are kept" if step else "stopped before its first step",
        where=str(run),
        fix=f"go on with: tunesmith train --resume {run:q}",
    )


def failure(run: Run) -> TunesmithError:
    """What a failed run's last error says."""
    last = run.last("error")
    error = TunesmithError(
        last.get("message", "the run failed"),
        where=last.get("where", str(run)),
        fix=last.get("fix", f"see {run / 'worker.log'}"),
    )
    error.exit_status = last.get("exit_status", 1)
    return error
