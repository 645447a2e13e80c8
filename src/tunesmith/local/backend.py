"""The backend of this machine: one worker process for each run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from tunesmith.backends import Completer, stopped
from tunesmith.costs import Answer, Question
from tunesmith.errors import RunError, UsageError
from tunesmith.layout import create_run
from tunesmith.local import ENVIRONMENT, loading
from tunesmith.local.worker import LOCKED
from tunesmith.planning import Prepared
from tunesmith.runs import Run

PACKAGES = ("torch", "transformers", "peft", "accelerate")  # without which the worker could not even say what is wrong
PROBE = "from tunesmith.local import loading\nwith loading():\n  from tunesmith.local.probe import main\nmain()"
_workers: dict[str, subprocess.Popen[bytes]] = {}  # of this process, by run directory


class LocalBackend:
    """Trains in a child process that ends with this one; its words are the run's event log."""

    def submit(self, prepared: Prepared, path: Path) -> Run:
        _refuse_missing()  # before anything is written
        run = lay_out(prepared, path)
        self.resume(run)
        return run

    def resume(self, run: Run, step: int | None = None) -> None:
        _refuse_missing()
        command = [sys.executable, "-m", "tunesmith.local.worker", str(run), "--attached"]
        command += [] if step is None else ["--step", str(step)]
        run.append("state", state="queued")  # so that an older word is not taken for this worker's
        with (run / "worker.log").open("ab") as log:
            _workers[str(run)] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=_environment(), start_new_session=True
            )

    def poll(self, run: Run) -> str:
        """The run's own word; "failed" as soon as a worker of ours is gone without having said how it ended."""
        worker = _workers.get(str(run))
        if worker is None:
            return run.state()
        code = worker.poll()
        if code is None:
            return "running"
        _forget(run)
        if code == LOCKED:
            raise RunError("another process is training this run", where=str(run), fix="wait for it, or stop it first")
        state = run.state()
        if state in ("succeeded", "failed"):  # whatever ended the process after it had said so
            return state
        if code in (-signal.SIGINT, -signal.SIGTERM):  # stopped before it could hear it: the last checkpoint stands
            run.append("state", state="cancelled")
            return "cancelled"
        if state in ("queued", "preparing", "running", "interrupted", "unknown"):
            run.append(
                "error",
                message=_why(code),
                where=str(run),
                fix=f"see {run / 'worker.log'}; go on with: tunesmith train --resume {run:q}",
                exit_status=1,
                lost=True,
            )
            run.append("state", state="failed")
            return "failed"
        return state

    def cancel(self, run: Run, at_once: bool = False) -> None:
        """Ask for a checkpoint and the end; or end the worker with all that it has started."""
        worker = _workers.get(str(run))
        if worker and worker.poll() is None:
            if at_once:
                os.killpg(worker.pid, signal.SIGKILL)
            else:
                worker.terminate()

    def interrupt(self, run: Run, at_once: bool = False) -> None:
        self.cancel(run, at_once)
        if not at_once:
            return
        _forget(run)  # one that is not in the table yet ends when its standard input closes
        if run.state() != "succeeded":
            run.append("state", state="cancelled")
            raise stopped(run) from None

    def act(self, run: Run, what: str) -> str:
        """Cancelling from another process asks the worker by the number in its lock."""
        if what == "pause":
            fix = f"tunesmith runs cancel {run:q} makes a checkpoint and ends; go on with: tunesmith train --resume {run:q}"
            raise UsageError("a run on this machine does not pause", where=str(run), fix=fix)
        if what == "resume":
            raise UsageError("training needs this terminal", where=str(run), fix=f"tunesmith train --resume {run:q}")
        if not run.busy():
            return run.state()
        holder = run.holder()
        if holder is None:
            raise RunError("its process cannot be told", where=str(run), fix="Ctrl-C where it was started")
        os.kill(holder, signal.SIGTERM)
        deadline = time.monotonic() + 60
        while run.busy() and time.monotonic() < deadline:
            time.sleep(0.1)
        return run.state()

    def completer(self, model: str, template: str | None = None) -> Completer:
        with loading():
            from tunesmith.local.generate import Chat

        chat: Any = Chat(model, template)
        return chat  # type: ignore[no-any-return]


def _forget(run: Run) -> None:
    """Wait for the end of a run's worker, if there is one."""
    if worker := _workers.pop(str(run), None):
        worker.wait()
        if worker.stdin:
            worker.stdin.close()


def _refuse_missing() -> None:
    if missing := next((name for name in PACKAGES if find_spec(name) is None), None):
        fix = "pip install 'tunesmith[local]', or have a service train: --provider openai"
        raise UsageError(f"training here needs {missing}", where="--provider", fix=fix)


def probe(prepared: Prepared) -> tuple[Question, Answer]:
    """What a step of this plan costs here, measured in a process of its own. Raises RunError where that is not possible."""
    plan, rows = prepared.plan, prepared.tokens["train"]
    learnt = plan.supervised_tokens["train"] / plan.tokens["train"]
    question = Question(plan.model.folder, plan.recipe, rows.lengths().tolist(), learnt, plan.steps)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(os.getpid())],
        input=msgspec.json.encode(question),
        capture_output=True,
        env=_environment(),
    )
    if done.returncode:
        if done.returncode in (-signal.SIGKILL, -signal.SIGSEGV):
            raise RunError(
                "memory ran out where two of its layers were tried",
                where=plan.recipe.model,
                fix="a smaller model, --lora or --method qlora; without trying: --no-probe",
            )
        words = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
        raise RunError(f"the probe failed: {words[-1]}", where=plan.recipe.model, fix="leave it out: --no-probe")
    return question, msgspec.json.decode(done.stdout, type=Answer)


def _environment() -> dict[str, str]:
    return {
        **ENVIRONMENT,
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONWARNINGS": "ignore",
    }


def lay_out(prepared: Prepared, path: Path) -> Run:
    """A run directory with everything the loop needs."""
    from tunesmith.tokens import save_tokens

    def fill(run: Run) -> None:
        for side, rows in prepared.tokens.items():
            if len(rows):
                save_tokens(rows, run / "data", side)

    return create_run(prepared, path, fill)


def _why(code: int) -> str:
    if code == -signal.SIGKILL:
        return "the worker was killed (by the system, when memory ran out?); a smaller --batch-size needs less"
    return f"the worker ended with status {code}"
