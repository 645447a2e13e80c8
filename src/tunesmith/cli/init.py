"""tunesmith init."""

from __future__ import annotations

from pathlib import Path

from tunesmith.cli.options import Parser
from tunesmith.errors import DataError

UNSET = {  # what a setting without a default may look like
    "valid_dataset": "valid.jsonl",
    "test_dataset": "test.jsonl",
    "group_by": "metadata.tree_id",
    "max_steps": 100,
    "warmup_steps": 10,
    "base_url": "https://api.openai.com/v1",
    "api_key_file": "key.txt",
    "suffix": "echo",
    "output_dir": "fine_tuned_models/echo",
}


def init(argv: list[str]) -> int:
    parser = Parser(
        "init", "Write a config file with every setting, its default and its meaning; train with --config FILE."
    )
    parser.add_argument("dataset", nargs="?", help="your data [data.jsonl]")
    parser.add_argument("-o", "--output", default="tunesmith.toml", metavar="FILE", help="-: stdout [tunesmith.toml]")
    options = parser.parse_args(argv)
    path = Path(options.output)
    from tunesmith.data.write import refuse_output, write_bytes

    if options.output != "-":
        refuse_output(path)
    if options.dataset is not None:
        _refuse_nothing(options.dataset)
    text = template(options.dataset or "data.jsonl")
    if options.output == "-":
        print(text, end="")
        return 0
    write_bytes(path, text.encode())
    print(path)
    return 0


def _refuse_nothing(dataset: str) -> None:
    """DataError where a data set of this machine is not there, or has no rows. What may be the Hub's is not fetched."""
    from tunesmith.data.read import files, read

    if files(dataset) is not None and next(read(dataset), None) is None:
        raise DataError("no rows in it", where=dataset, fix="is it the right file?")


def template(dataset: str) -> str:
    """A TOML file of all settings; those left at their defaults are commented out."""
    import json

    from tunesmith.recipe import fields

    lines, group = ["# Settings of a run: tunesmith train --config THIS_FILE. Uncomment what you want to change."], ""
    for field in fields().values():
        if field.group != group:
            group = field.group
            lines += ["", f"# ---- {group}"]
        lines.append(f"# {field.help}" + (f" ({', '.join(field.choices())})" if field.choices() else ""))
        if field.name == "dataset":
            lines.append(f"dataset = {json.dumps(dataset, ensure_ascii=False)}")
        else:
            value = field.default
            example = json.dumps(UNSET[field.name]) if value is None else "{}" if value == {} else json.dumps(value)
            lines.append(f"# {field.name} = {example}" + ("  # for example; not set" if value is None else ""))
    return "\n".join(lines) + "\n"
