"""Who may import whom, read off the sources."""

import ast
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("kernels", "launcher", "models", "tools")
"""Top folders that are imported as occult_train.<name>."""
INSIDE = {
    "kernels": {"kernels"},
    "parallel": {"parallel"},
    "moe": {"moe", "kernels", "parallel"},
    "models": {"models", "moe", "kernels"},
    "occult_train": {"occult_train", "models", "moe", "kernels", "parallel"},
    "launcher": {"launcher", "occult_train"},
    "tools": {"tools", "launcher", "occult_train", "models", "moe", "kernels", "parallel"},
}
"""Rooms that each room may import, itself included. `occult_train` is what lies there outside the other rooms."""
OUTSIDE = {"kernels": {"torch", "triton"}, "parallel": {"torch", "deepspeed"}}
"""Packages that rooms of few needs may import."""
LEAF = "occult_train.errors"
"""Anyone may import it."""
EXCEPTIONS = {("models", "occult_train.parallel.grid")}
"""The model hands on the grid that its layers are built with."""
DEEPSPEED = {
    "occult_train/parallel/zero.py",
    "occult_train/parallel/grid.py",
    "occult_train/engine.py",
    "occult_train/distributed.py",
    "occult_train/testing.py",
    "tools/bench/peers.py",
    "tools/bench/step_systems.py",
}


def own_sources() -> list[Path]:
    """Every source of the package once, under its real path."""
    folders = [ROOT / "occult_train", *(ROOT / name for name in LINKED)]
    found = [Path(top) / name for folder in folders for top, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if path.suffix == ".py")


def module_name(path: Path) -> str:
    """occult_train.kernels.rows.autograd for kernels/rows/autograd.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "occult_train" else ("occult_train", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = own_sources()
MODULES = {module_name(path) for path in SOURCES}
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def imports(text: str) -> set[str]:
    """Modules that a source imports, anywhere in it; relative imports begin with a dot."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # `from package import module` imports the module
            full = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else base for name in full}
    return found


def room(module: str) -> str:
    """The room of one of our modules."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in INSIDE else "occult_train"


def imports_of(path: Path) -> set[str]:
    return imports(path.read_text())


def test_all_rooms_are_read() -> None:
    assert {room(name) for name in MODULES} == set(INSIDE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import torch.nn as nn, os", {"torch.nn", "os"}),
        ("def f():\n    from occult_train.moe import layer", {"occult_train.moe.layer"}),
        ("from occult_train.moe.layer import MoELayer", {"occult_train.moe.layer"}),
        ("from occult_train import distributed, errors", {"occult_train.distributed", "occult_train.errors"}),
        ("from ..moe import layer", {"..moe"}),
        ("from . import layer", {"."}),
        ("x = 'import torch'", set()),
    ],
)
def test_imports_are_found(text: str, expected: set[str]) -> None:
    assert imports(text) == expected


@each_source
def test_rooms_import_only_what_lies_below(path: Path) -> None:
    here = room(module_name(path))
    ours = {name for name in imports_of(path) if name.split(".")[0] == "occult_train" and name != LEAF}
    wrong = {name for name in ours if room(name) not in INSIDE[here] and (here, name) not in EXCEPTIONS}
    assert not wrong, f"{here} must not import them"


@pytest.mark.parametrize("here", OUTSIDE)
def test_rooms_of_few_needs_import_nothing_else(here: str) -> None:
    for path in (path for path in SOURCES if room(module_name(path)) == here):
        others = {name.split(".")[0] for name in imports_of(path)} - {"occult_train"} - sys.stdlib_module_names
        assert others <= OUTSIDE[here], path


@pytest.mark.parametrize("path", sorted((ROOT / "models" / "families").glob("modeling_*.py")), ids=lambda p: p.stem)
def test_modelling_files_travel_alone(path: Path) -> None:
    others = {name.split(".")[0] for name in imports_of(path)} - sys.stdlib_module_names
    assert others == {"torch", "transformers"}


def test_errors_is_a_leaf() -> None:
    assert imports_of(ROOT / "occult_train" / "errors.py") <= sys.stdlib_module_names | {"collections.abc"}


def test_kernels_know_no_process_groups_and_no_modules() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not {name for name in imports_of(path) if name.startswith("torch.distributed")}, path
        bases = [
            ast.unparse(b)
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.ClassDef)
            for b in n.bases
        ]
        assert not {base for base in bases if base.split(".")[-1] == "Module"}, path


def test_deepspeed_is_touched_in_few_places() -> None:
    users = {path for path in SOURCES if any(name.split(".")[0] == "deepspeed" for name in imports_of(path))}
    assert {str(path.relative_to(ROOT)) for path in users} <= DEEPSPEED


def test_omegaconf_stays_at_the_border() -> None:
    users = {path for path in SOURCES if any(name.split(".")[0] == "omegaconf" for name in imports_of(path))}
    assert {str(path.relative_to(ROOT)) for path in users} == {"occult_train/config.py"}


def test_nobody_imports_the_bare_names() -> None:
    """A package called `kernels` would shadow Hugging Face's library of that name."""
    for path in [*SOURCES, ROOT / "setup.py", *(ROOT / "tests").rglob("*.py")]:
        wrong = {name for name in imports_of(path) if name.split(".")[0] in LINKED}
        assert not wrong, path


@each_source
def test_imports_are_absolute(path: Path) -> None:
    assert not {name for name in imports_of(path) if name.startswith(".")}


@pytest.mark.parametrize("name", LINKED)
def test_top_folders_are_reached_through_links(name: str) -> None:
    link = ROOT / "occult_train" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert not (ROOT / name / "__init__.py").exists()
    source = next(path for path in SOURCES if path.is_relative_to(ROOT / name))
    spec = find_spec(module_name(source))
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).resolve() == source
