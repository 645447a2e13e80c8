"""The import rules of the design, checked on the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

SRC = ROOT / "src" / "tunesmith"
# A module imports only from its own layer and those before it.
LAYERS = [
    {"errors"},
    {"conversation"},
    {"recipe", "models", "settings"},
    {"data"},
    {"words"},
    {"render"},
    {"tokens"},
    {"costs"},
    {"preflight"},
    {"preparing"},
    {"planning"},
    {"hosted"},
    {"runs"},
    {"removal"},
    {"card"},
    {"layout"},
    {"backends"},
    {"local"},
    {"remote"},
    {"evaluation"},
    {"exporting"},
    {"api"},
    {"server"},
    {"cli"},
]
TRAINING = {"torch", "transformers", "peft", "accelerate", "tensorboard", "safetensors"}
FOLDERS = {  # libraries: where alone they are imported (doctor may ask torch about GPUs)
    **dict.fromkeys(TRAINING, ("local", "exporting", "cli.doctor")),
    "openai": ("remote",),
    **dict.fromkeys(("starlette", "uvicorn", "sqlalchemy", "multipart"), ("server",)),
}
MODULES = 160  # at least so many are found: the test must not pass on an empty folder


def modules() -> dict[str, ast.Module]:
    found = {
        str(p.relative_to(SRC).with_suffix("")).replace("/", "."): ast.parse(p.read_text()) for p in SRC.rglob("*.py")
    }
    assert len(found) >= MODULES, f"only {len(found)} modules found"
    return found


def imports(tree: ast.Module) -> set[str]:
    """Modules that are imported for use; imports for type checkers do not count."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module == "tunesmith":
                names.update(f"tunesmith.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return names


def layer(name: str) -> int:
    head = name.split(".")[0]
    return next(i for i, names in enumerate(LAYERS) if head in names)


def test_each_layer_imports_only_from_those_above() -> None:
    wrong, checked = [], 0
    for name, tree in modules().items():
        if name in ("__init__", "__main__"):
            continue
        for target in imports(tree):
            if target.startswith("tunesmith."):
                checked += 1
                if layer(target.removeprefix("tunesmith.")) > layer(name):
                    wrong.append(f"{name} imports {target}")
    assert not wrong
    assert checked > 100


def test_libraries_stay_in_their_folders_and_the_client_knows_nothing_of_training() -> None:
    wrong, seen = [], set()
    for name, tree in modules().items():
        for target in imports(tree):
            head = target.split(".")[0]
            seen.add(head)
            if head in FOLDERS and not name.startswith(FOLDERS[head]):
                wrong.append(f"{name} imports {target}")
            if name.startswith("remote.") and target.startswith("tunesmith.local"):
                wrong.append(f"{name} imports {target}")
    assert not wrong and set(FOLDERS) - seen == {"accelerate"}  # which its launcher alone imports


def test_no_inheritance_but_from_exception_protocol_and_what_libraries_demand() -> None:
    allowed = {
        "Exception",
        "Protocol",
        "Struct",
        "Module",
        "Function",
        "Extension",
        "Formatter",
        "ArgumentParser",
        "HelpFormatter",
        "TunesmithError",
        "UsageError",
    }
    wrong = [
        f"{name}: {node.name}({ast.unparse(base)})"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if ast.unparse(base).split(".")[-1] not in allowed
    ]
    assert not wrong


def test_files_have_one_purpose_and_a_docstring() -> None:
    long = {p.name: n for p in SRC.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long
    assert not [
        name for name, tree in modules().items() if not ast.get_docstring(tree) and not name.endswith("__init__")
    ]


def test_light_commands_load_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for argv in (
        ["--help"],
        ["train", "--help"],
        ["data", "check", "d.jsonl", "--structure-only"],
        ["runs", "list"],
        ["keys", "add", "ann"],
    ):
        code = (
            f"import sys; from tunesmith.cli import main\ntry: main({argv!r})\nexcept SystemExit: pass\n"
            f"print(sorted({TRAINING | {'numpy', 'datasets'}!r} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]", argv
