"""tunesmith completion: a script that completes commands, options and their choices in a shell.

Made from the table of commands and the help pages, so that it knows nothing that they do not.
"""

from __future__ import annotations

import argparse
import re
import tomllib

from tunesmith.backends import BACKENDS
from tunesmith.cli import COMMANDS, GROUPS, help_page
from tunesmith.cli.options import Parser
from tunesmith.data.convert import FORMATS
from tunesmith.evaluation.rowreport import CODES
from tunesmith.evaluation.tasks import TASKS
from tunesmith.exporting.forms import FORMS, facts
from tunesmith.recipe import FACTS

SHELLS = {
    "bash": 'eval "$(tunesmith completion bash)"            in ~/.bashrc',
    "zsh": 'eval "$(tunesmith completion zsh)"             in ~/.zshrc, after compinit',
    "fish": "tunesmith completion fish | source            in ~/.config/fish/config.fish",
}


def completion(argv: list[str]) -> int:
    use = "\n".join(f"  {line}" for line in SHELLS.values())
    parser = Parser(
        "completion",
        f"Print a script by which a shell completes commands, options and their choices.\n\n{use}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=list(SHELLS), help="whose script")
    print({"bash": bash, "zsh": zsh, "fish": fish}[parser.parse_args(argv).shell]())
    return 0


def tables() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(the words that may follow "", a group or a command; the choices after "COMMAND --option", where it has some, and after
    "COMMAND COMMAND" those of its first argument)."""
    words: dict[str, list[str]] = {"": [*dict.fromkeys(name.split()[0] for name in COMMANDS), "--help", "--version"]}
    words |= {group: [name.split()[1] for name in COMMANDS if name.split()[0] == group] for group in GROUPS}
    choices: dict[str, list[str]] = {}
    for name in COMMANDS:
        lines = help_page(name).read_text(encoding="utf-8").splitlines()
        heads = [head[1] for line in lines if (head := re.match(r"  (-.+?)(?:  |$)", line))]
        found = {option: head for head in heads for option in re.findall(r"--[a-z0-9][a-z0-9-]*", head)}
        words[name] = sorted({*found, "--help"})
        listed = {option: one[1] for option, head in found.items() if (one := re.search(r"\{([^}]+)\}", head))}
        choices |= {f"{name} {option}": values.split(",") for option, values in listed.items()}
        argument = next((shown[1] for line in lines if (shown := re.match(r"  \{([^}]+)\}", line))), "")
        choices |= {f"{name} {name.split()[-1]}": argument.split(",")} if argument else {}
        choices |= {f"{name} {option}": known for option, known in _named(name).items() if option in words[name]}
    return words, choices


def _named(command: str) -> dict[str, list[str]]:
    """Values that stand in tables, and may be others too where a file is also taken."""
    found = {"--config": sorted(path.stem for path in (FACTS / "presets").glob("*.toml")), "--provider": list(BACKENDS)}
    templates = sorted(path.stem for path in (FACTS / "templates").glob("*.jinja"))
    found |= {"--chat-template": templates if command == "data preview" else ["auto", "model", *templates]}
    found |= {"--drop-codes": list(CODES)}
    if command == "data convert":
        found |= {"--to": list(FORMATS)}
    if command == "export":
        found |= {"--format": list(FORMS), "--quantize": [*facts()["quantisations"], *facts()["k_quants"]]}
    if command == "evaluate":
        found |= {"--task": list(TASKS)}
    if command == "runs events":
        found |= {"--type": list(tomllib.loads((FACTS / "events.toml").read_text(encoding="utf-8")))}
    return found


def _cases(table: dict[str, list[str]], assigned: str) -> str:
    """The branches of a shell's `case`: what is typed, and the words that may follow."""
    return "\n".join(f'    "{typed}") {assigned.format(" ".join(words))} ;;' for typed, words in table.items())


def bash() -> str:
    cases, values = (_cases(table, 'words="{}"') for table in tables())
    groups = "|".join(GROUPS)
    return f"""_tunesmith() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command="" words="" option=""
  if [[ $before == "=" ]]; then before=${{COMP_WORDS[COMP_CWORD-2]}}; fi
  if [[ $word == "=" ]]; then word=""; fi
  if [[ $word == --*=* ]]; then before=${{word%%=*}} option="${{word%%=*}}=" word=${{word#*=}}; fi
  if (( COMP_CWORD > 1 )); then command=${{COMP_WORDS[1]}}; fi
  case $command in {groups}) if (( COMP_CWORD > 2 )); then command="$command ${{COMP_WORDS[2]}}"; fi ;; esac
  case $command in
{cases}
  esac
  case "$command $before" in
{values}
    *) case $command in ""|{groups}) ;; *) [[ $word == -* ]] || words="" ;; esac ;;
  esac
  COMPREPLY=($(compgen -P "$option" -W "$words" -- "$word"))
}}
complete -o bashdefault -o default -F _tunesmith tunesmith"""


def zsh() -> str:
    cases, values = (_cases(table, "found=({})") for table in tables())
    groups = "|".join(GROUPS)
    return f"""_tunesmith() {{
  local -a found
  local command="" word=$words[CURRENT] before=$words[CURRENT-1]
  if [[ $word == --*=* ]]; then before=${{word%%=*}} word=${{word#*=}}; compset -P "*="; fi
  if (( CURRENT > 2 )); then command=$words[2]; fi
  case $command in {groups}) if (( CURRENT > 3 )); then command="$command $words[3]"; fi ;; esac
  case $command in
{cases}
  esac
  case "$command $before" in
{values}
    *) case $command in ""|{groups}) ;; *) [[ $word == -* ]] || found=() ;; esac ;;
  esac
  if (( $#found )); then compadd -- $found; else _files; fi
}}
compdef _tunesmith tunesmith"""


def fish() -> str:
    words, choices = tables()
    first = "not __fish_seen_subcommand_from " + " ".join(dict.fromkeys(name.split()[0] for name in COMMANDS))
    lines = [f"complete -c tunesmith -f -n '{first}' -a '{' '.join(words[''])}'"]
    for group in GROUPS:
        known = " ".join(words[group])
        inside = f"__fish_seen_subcommand_from {group}; and not __fish_seen_subcommand_from {known}"
        lines.append(f"complete -c tunesmith -f -n '{inside}' -a '{known}'")
    for name in COMMANDS:
        inside = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in name.split())
        if argument := choices.get(f"{name} {name.split()[-1]}"):
            lines.append(f"complete -c tunesmith -f -n '{inside}' -a '{' '.join(argument)}'")
        for option in words[name]:
            values = f" -x -a '{' '.join(listed)}'" if (listed := choices.get(f"{name} {option}")) else ""
            lines.append(f"complete -c tunesmith -n '{inside}' -l {option.removeprefix('--')}{values}")
    return "\n".join(lines)
