"""tunesmith export, and parity, which certifies an export again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.cli.options import Parser, positive, show_json
from tunesmith.errors import UsageError

if TYPE_CHECKING:
    from tunesmith.exporting.parity import Certificate


def export(argv: list[str]) -> int:
    parser = Parser(
        "export",
        "Write a run's best model for another program, and certify through that program that it is still the same model.",
    ).with_json()
    parser.add_argument("run", nargs="?", help="a run, one of its checkpoints, a model folder, or a model's name")
    parser.add_argument("--model-path", metavar="PATH", help="the same as RUN")
    parser.add_argument(
        "--format",
        default="merged",
        metavar="FORMAT",
        help="merged (a model folder of 16 bits), adapter, gguf (llama.cpp), ollama, vllm [merged]",
    )
    parser.add_argument(
        "--quantize",
        metavar="TYPE",
        help="of gguf and ollama: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0; with llama-quantize installed also q4_k_m and "
        "the like [f16]; of merged and vllm: bf16 or f16 [that of the base]",
    )
    parser.add_argument("-o", "--output-dir", metavar="DIR", help="a new folder for it")
    parser.add_argument(
        "--unmerged", action="store_true", help="of vllm: the adapter beside its base, instead of one model"
    )
    parser.add_argument(
        "--prompts", type=positive, default=16, metavar="N", help="held-out prompts that both answer [16]"
    )
    parser.add_argument("--license", default="", metavar="ID", help="licence of the model, for its card: apache-2.0")
    parser.add_argument("--data-license", default="", metavar="ID", help="licence of the data, for the card")
    options = parser.parse_args(argv)
    model = _one(options.run, options.model_path)
    if not options.output_dir:
        raise UsageError("where to?", where="--output-dir", fix=f"tunesmith export {model} -o exported")
    from tunesmith.cli.progress import Bar
    from tunesmith.exporting import forms

    with Bar() as bar:
        done = forms.export(
            model,
            options.output_dir,
            options.format,
            options.quantize,
            unmerged=options.unmerged,
            prompts=options.prompts,
            license=options.license,
            data_license=options.data_license,
            on_progress=bar,
        )
    if options.json:
        show_json(done)
    else:
        print(_table(done.certificate))
        print(f"\nwritten: {done.path}  ({done.bytes / 1e6:,.1f} MB)")
        if done.certificate.deployable:
            print(f"run it:  {done.command}")
    return _status(done.certificate, options.json)


def parity(argv: list[str]) -> int:
    parser = Parser("parity", "Certify an export again: after it was copied, or changed by hand.").with_json()
    parser.add_argument("export", help="the folder that tunesmith export has made")
    parser.add_argument("--against", metavar="MODEL", help="the run or model that it was made of, where that has moved")
    parser.add_argument(
        "--prompts", type=positive, default=16, metavar="N", help="held-out prompts that both answer [16]"
    )
    options = parser.parse_args(argv)
    from tunesmith.cli.progress import Bar
    from tunesmith.exporting import forms

    with Bar() as bar:
        found = forms.parity(options.export, options.against, options.prompts, bar)
    show_json(found) if options.json else print(_table(found))
    return _status(found, options.json)


def _one(run: str | None, path: str | None) -> str:
    """The model that is meant by either of two options."""
    if not run and not path or run and path:
        raise UsageError(
            "one model is exported", where="RUN or --model-path", fix="tunesmith export my_run -o exported"
        )
    return str(run or path)


def _table(found: Certificate) -> str:
    from tunesmith.cli.progress import table

    rows = [("", "check", "found", "wanted")]
    rows += [("✓" if c.passed else "✗", c.name, c.found, c.limit) for c in found.checks]
    return f"{found.form} {found.quantize}, through {found.runtime}\n{table(rows)}"


def _status(found: Certificate, as_json: bool) -> int:
    """The verdict on stdout; 1 where it must not be deployed."""
    if not as_json:
        for check in found.failed():
            print(f"\n  {check.name}: {check.cause or check.found}")
        word = "deployable: it is the model that was trained" if found.deployable else "not deployable"
        print(f"\ncertificate: {word}")
    return 0 if found.deployable else 1
