"""tunesmith export: a run's model in the form that another program runs, with a certificate that it is still the same model.

Everything is built in a folder beside the target, checked there through the program itself, and then renamed: what has the
target's name is whole, and says in parity.json whether it may be deployed.
"""

from __future__ import annotations

import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import msgspec

from tunesmith import card
from tunesmith.conversation import Message
from tunesmith.data.convert import sample
from tunesmith.data.scan import Progress, conversations
from tunesmith.data.write import sha256, write_bytes, write_json
from tunesmith.errors import ModelError, UsageError
from tunesmith.evaluation.evaluate import refresh_report
from tunesmith.exporting import building, gguf_file, inspect, merged, ollama, parity, runtime, servers
from tunesmith.exporting.forms import PARITY, PROMPTS, REFUSED, SAID, is_k_quant
from tunesmith.exporting.parity import Certificate, Check
from tunesmith.exporting.weights import Weights
from tunesmith.models import facts, find, read_json
from tunesmith.preparing import give_back
from tunesmith.render import Renderer
from tunesmith.runs import Run, run_of

CONTEXT = 8192  # tokens for which a runtime reserves memory by itself
SERVED = "computed_in_16_bits"  # what is allowed of a program that not only stores its weights so
SYSTEM_ROWS = 2000  # training rows that are looked at for a common system prompt


class Source(msgspec.Struct, frozen=True):
    """What is exported: the folder of a model, and the run that made it."""

    name: str
    folder: Path
    run: Run | None


class Exported(msgspec.Struct, frozen=True):
    """An export that is done."""

    path: str  # the folder
    model: str  # the file or folder in it that is run
    command: str  # what runs it
    bytes: int  # of all its files
    certificate: Certificate  # what was checked


def export(
    model: str,
    output: str | Path,
    form: str = "merged",
    quantize: str | None = None,
    *,
    unmerged: bool = False,
    prompts: int = PROMPTS,
    license: str = "",
    data_license: str = "",
    on_progress: Progress = lambda *_: None,
) -> Exported:
    """Write a model for another program and certify it: see `forms.export`, which refuses before torch is loaded."""
    source = find_source(model)
    target = Path(output).expanduser().resolve()
    weights, renderer = Weights(source.folder), Renderer(source.folder)
    adapter = form == "adapter" or unmerged
    if adapter and not weights.changed():
        raise UsageError(
            "the model has no adapter: all its weights were trained", where=source.name, fix="--format merged"
        )
    with building.built(target) as folder:
        building.refuse_disk(_need(weights, source.folder, adapter, quantize), target.parent)
        maker = _Maker(source, weights, renderer, folder, quantize, on_progress)
        maker.adapter() if adapter else maker.model() if form in ("merged", "vllm") else maker.gguf()
        if form == "ollama":
            maker.modelfile()
        command, there = maker.command(form, target), maker.command(form, Path())  # the card goes where the folder goes
        form = "adapter" if adapter and form != "vllm" else form
        certificate = certify(folder, source, form, maker.quantize, prompts=prompts, on_progress=on_progress)
        told = {"weights": maker.file, "command": there, "license": license, "data_license": data_license}
        mark(folder, source, certificate, told)
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    if source.run:
        source.run.append(
            "export", path=str(target), form=form, quantize=maker.quantize, deployable=certificate.deployable
        )
        refresh_report(source.run)
    return Exported(str(target), str(target / maker.file), command, size, certificate)


def find_source(model: str) -> Source:
    """A run (its best model), a folder in one, a model folder or a name. Raises ModelError."""
    path = Path(model)
    best = path / "best_model"
    folder = find(str(best) if best.is_dir() else model).resolve()
    return Source(model, folder, run_of(folder))


def _need(weights: Weights, folder: Path, adapter: bool, quantize: str | None) -> int:
    """Bytes that an export takes while it is made."""
    if adapter:
        return (folder / "adapter_model.safetensors").stat().st_size
    return merged.size(weights) * (2 if quantize == "f32" or quantize and is_k_quant(quantize) else 1)


class _Maker:
    """Writes the files of one export. `file`: what is run of them."""

    def __init__(
        self, source: Source, weights: Weights, renderer: Renderer, folder: Path, quantize: str | None, told: Progress
    ) -> None:
        self._source, self._weights, self._renderer, self._folder = source, weights, renderer, folder
        self._told = told
        self._done = 0
        self.quantize = quantize or ""
        self.file = ""

    def _wrote(self, count: int) -> None:
        self._done += count
        self._told(0, min(1.0, self._done / merged.size(self._weights)), "writing the weights")

    def model(self) -> None:
        kind = merged.dtype(self._weights, self.quantize)
        self.quantize = next(name for name, one in merged.TYPES.items() if one == kind)
        merged.write_merged(self._weights, self._renderer, self._folder, kind, self._wrote)

    def adapter(self) -> None:
        """The adapter's own files, with tokenizer and template."""
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(self._source.folder / name, self._folder / name)
        self._renderer.save(self._folder)
        self.quantize = "f32"

    def gguf(self) -> None:
        name = self._called()
        self.quantize = self.quantize or "f16"
        k_quant = is_k_quant(self.quantize)
        self.file = f"{name}-{self.quantize}.gguf"
        first = "f16" if k_quant else self.quantize
        path = self._folder / (f"{name}-f16.gguf" if k_quant else self.file)
        gguf_file.write_gguf(self._weights, self._renderer, path, first, name, self._wrote)
        if k_quant:
            self._told(0, 0.0, f"quantising to {self.quantize}")
            gguf_file.requantise(path, self._folder / self.file, self.quantize)
            path.unlink()

    def modelfile(self) -> None:
        text = ollama.modelfile(self.file, self._renderer, system_of(self._source.run), _context(self._weights))
        write_bytes(self._folder / "Modelfile", text.encode())

    def _called(self) -> str:
        """The run's name as that of a file, of a model and as a word of a shell."""
        run = self._source.run
        name = (run.path.resolve() if run else self._source.folder.resolve()).name
        return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "model"

    def command(self, form: str, target: Path) -> str:
        """What runs the export, as a shell takes it."""
        where, name = shlex.quote(str(target)), self._called()
        if form == "ollama":
            called = (
                re.sub("[^a-z0-9._-]+", "-", name.lower()).strip("-_.") or "model"
            )  # a name at Ollama has no others
            return f"ollama create {called} -f {shlex.quote(str(target / 'Modelfile'))} && ollama run {called}"
        if form == "gguf":
            return f"llama-server -m {shlex.quote(str(target / self.file))} --jinja"
        if form == "vllm":
            return shlex.join(["vllm", *servers.vllm_serve(self._folder, target, name)])
        return f"tunesmith chat {where}"


def _context(weights: Weights) -> int:
    """Tokens for which a runtime of GGUF files is started."""
    config = gguf_file.text_config(weights.config)
    known = gguf_file.settings(config, gguf_file.model_facts(config, weights.folder))
    return min(CONTEXT, next(int(n) for key, n in known.items() if key.endswith(".context_length")))


def system_of(run: Run | None) -> str | None:
    """The system prompt that a run's training rows share."""
    path = run / "data" / "train.jsonl" if run else None
    if path is None or not path.exists():
        return None
    rows = [row for row, _ in zip(conversations(str(path)), range(SYSTEM_ROWS), strict=False)]
    return ollama.own_system(rows)


# ---- the certificate


def certify(
    folder: Path,
    source: Source,
    form: str,
    quantize: str,
    *,
    prompts: int = PROMPTS,
    on_progress: Progress = lambda *_: None,
) -> Certificate:
    """Compare an export with the model that it was made of, in the program that will run it."""
    weights, renderer = Weights(source.folder), Renderer(source.folder)
    context = _context(weights) if form in ("gguf", "ollama") else facts(weights.folder).context
    room, rows = context - parity.ANSWER - 1, held_out(source.run, prompts)
    rows = [row for row in rows if len(renderer.prompt_ids(row)) <= room]
    if not rows:
        reason = f"its context of {context} tokens is too short for a prompt"
        raise ModelError(reason, where=source.name, fix="choose a base with a longer context")
    asked = [renderer.prompt_ids(row) for row in rows]
    total, done = 2 * (len(asked) + 1), 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        on_progress(0, min(1.0, done / total), "asking both models")

    checks: list[Check] = []
    name = "none"

    def take(found: Iterator[Check], what: str) -> None:
        """Checks as they come; whatever breaks them off is a finding about the export."""
        try:
            checks.extend(found)
        except Exception as error:  # of five libraries, each with its own: whatever its files make them do
            said = " ".join(str(error).split()) or type(error).__name__
            cause = getattr(error, "message", said)
            checks.append(Check(what, False, f"{type(error).__name__}: {said}", "whole", cause))

    def running() -> Iterator[Check]:
        nonlocal name
        give_back()  # what writing and comparing have freed: a model is read next
        own = _observed(source, renderer, asked, told)
        yield from _trained_on_4_bits(source, renderer, own)
        program = _program(folder, form, context, renderer)
        name = program.name
        try:
            stored = SERVED if isinstance(program, servers.Vllm) else quantize
            yield from parity.behaviour(program, renderer, own, rows, stored, told)
        finally:
            program.close()

    take(_files(folder, source, weights, renderer, form, quantize), "files")
    take(running(), "runs")
    return Certificate(
        deployable=all(check.passed for check in checks),
        model=str(source.folder),
        run=str(source.run) if source.run else None,
        form=form,
        quantize=quantize,
        runtime=name,
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        checks=checks,
        prompts=len(asked),
        probes=len(parity.probes()[0]),
        tunesmith=version("tunesmith"),
        files={p.name: sha256(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name not in SAID},
    )


def _files(
    folder: Path, source: Source, weights: Weights, renderer: Renderer, form: str, quantize: str
) -> Iterator[Check]:
    if form in ("gguf", "ollama"):
        file = _gguf(folder)
        yield from inspect.gguf_checks(file, weights, renderer, quantize)
        yield inspect.no_others(folder, file.name, *(["Modelfile"] if form == "ollama" else []))
        if form == "ollama":
            text = (folder / "Modelfile").read_text(encoding="utf-8")
            yield ollama.modelfile_check(text, renderer, system_of(source.run), file.name, _context(weights))
    elif (folder / "adapter_config.json").exists():
        yield from inspect.adapter_checks(folder, source.folder, renderer)
    else:
        yield from inspect.folder_checks(folder, weights, renderer)


def _observed(source: Source, renderer: Renderer, asked: list[list[int]], told: Callable[[int], object]) -> parity.Own:
    model = runtime.own(source.folder, renderer)
    try:
        return parity.observe(model, asked, renderer.stop_ids[0], told)
    finally:
        model.close()


def _trained_on_4_bits(source: Source, renderer: Renderer, own: parity.Own) -> list[Check]:
    """How far the model moves because its adapter, trained on 4-bit weights, now stands on those of 16."""
    if not source.run or source.run.recipe().method != "qlora":
        return []
    model = runtime.as_trained(source.folder, renderer)
    found = [model.next_tokens(text, own.places(row)) for row, text in enumerate(own.texts)]
    model.close()
    drift = next(parity.probabilities(own, found, parity.limits("trained_on_4_bits")))
    cause = drift.cause and "the adapter needs its 4-bit base"
    return [msgspec.structs.replace(drift, name="trained on 4-bit weights", cause=cause)]


def _program(folder: Path, form: str, context: int, renderer: Renderer) -> runtime.Runtime:
    if form in ("gguf", "ollama"):
        return servers.LlamaCpp(_gguf(folder), context, renderer.stop_ids)
    program = servers.vllm_program() if form == "vllm" else None
    if program:
        return servers.Vllm(program, folder, renderer.stop_ids)
    found = runtime.plain_transformers(folder)
    found.name += "; vLLM is not installed here" if form == "vllm" else ""
    return found


def _gguf(folder: Path) -> Path:
    """The one GGUF file of an export."""
    found = list(folder.glob("*.gguf"))
    if len(found) != 1:
        raise ModelError(f"{len(found)} GGUF files", where=str(folder), fix="export again")
    return found[0]


def held_out(run: Run | None, count: int) -> list[tuple[Message, ...]]:
    """Prompts for both models: of the run's test rows, then its validation rows, then general ones."""
    found: list[tuple[Message, ...]] = []
    for side in ("test", "valid") if run else ():
        path = run / "data" / f"{side}.jsonl" if run else Path()
        rows = [row for row in conversations(str(path)) if row.prompt()] if path.exists() else []
        want = count - len(found)
        found += [row.prompt() for row in (sample(rows, want, 0) if len(rows) > want > 0 else rows[:want])]
    general = [(Message("user", text),) for text in parity.probes()[1]]
    return (found + general)[:count]


def recheck(
    folder: Path, model: str | None = None, prompts: int = PROMPTS, on_progress: Progress = lambda *_: None
) -> Certificate:
    """Certify an export again: after it was copied, or changed by hand. `model`: what it was made of, where that has moved."""
    try:
        before = msgspec.json.decode((folder / PARITY).read_bytes(), type=Certificate)
    except (OSError, msgspec.MsgspecError):
        raise UsageError("parity.json is damaged", where=str(folder), fix="export again") from None
    source = find_source(model or before.model)
    if missing := [name for name in before.files if not (folder / name).is_file()]:
        gone = Check("files", False, f"{len(missing)} are missing", "all", f"{', '.join(missing)} is missing")
        found = msgspec.structs.replace(before, deployable=False, checks=[gone])
    else:
        found = certify(folder, source, before.form, before.quantize, prompts=prompts, on_progress=on_progress)
    said = read_json(folder / "model_info.json").get("export", {})
    mark(folder, source, found, {k: said.get(k, "") for k in ("weights", "command", "license", "data_license")})
    if source.run:
        refresh_report(source.run)
    return found


def mark(folder: Path, source: Source, certificate: Certificate, told: dict[str, str]) -> None:
    """parity.json, the card, and of a failed export a file that nobody overlooks."""
    failed = [f"{c.name} ({c.cause or c.found})" for c in certificate.failed()]
    said = card.Export(
        form=certificate.form,
        quantize=certificate.quantize,
        runtime=certificate.runtime,
        deployable=certificate.deployable,
        failed=failed,
        **told,
    )
    if source.run:
        card.write_card(source.run, said, folder, source.folder)
    else:
        card.write_plain(source.name, said, folder)
    write_json(folder / PARITY, certificate)
    if certificate.deployable:
        (folder / REFUSED).unlink(missing_ok=True)
        return
    text = ["It is not shown that this export is the model that was trained. Do not deploy it.", "", *failed, ""]
    write_bytes(folder / REFUSED, "\n".join(text).encode())
