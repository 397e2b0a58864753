"""The structure of the source tree: which module imports which, names with one meaning, sizes of files.

The files are parsed and not imported, so that imports inside functions count as well.
"""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sipo_kernels", "sipo", "benchmarks")
MOST_LINES = 400

# A module may import those of its own layer and of the layers above its line.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("sipo_kernels",),
    ("sipo.fields", "sipo.files", "sipo.locks", "sipo.processes", "sipo.progress", "sipo.seeds", "sipo.yaml_files"),
    ("sipo.schedule",),
    ("sipo", "sipo.batch", "sipo.loss", "sipo.protocols"),
    ("sipo.families",),
    ("sipo.data",),
    ("sipo.cache",),
    ("sipo.training",),
    ("sipo.analysis",),
    ("sipo.demo",),
    ("sipo.recipe",),
    ("sipo.cli", "sipo.__main__"),
)
APART = {("sipo.recipe", "sipo.demo")}  # of what a layer may import otherwise

SAME_MODULES = {
    "__init__": "every package has one",
    "__main__": "what `python -m` runs of a package",
    "config": "the settings of one section of the YAML, in the package that uses them",
    "launch": "one for each compiled backend: calls its kernels",
    "plan": "one for each compiled backend: chooses its kernels' launch parameters",
}

# Files of tests that test the benchmarks. All others import the package alone.
OF_BENCHMARKS = (
    "benchmark_results",
    "test_alignment",
    "test_benchmarks",
    "test_diffusers_schedulers",  # of benchmarks/previous_level.py
    "test_gpu_check",
)


@functools.cache
def sources() -> dict[str, Path]:
    """Files of the packages by the name of their module; a package's own is its ``__init__.py``."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path, module: str = "") -> Iterator[str]:
    """Names of what a file imports: "a.b" for ``import a.b`` as for ``from a import b``, where b is a module."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            for name in node.names:
                whole = f"{base}.{name.name}"
                yield whole if whole in sources() else base


@functools.cache
def graph() -> dict[str, set[str]]:
    """Which modules of the packages each of them imports."""
    return {name: {other for other in imported(path, name) if other in sources()} for name, path in sources().items()}


def layer(module: str) -> tuple[int, str]:
    """A module's layer, and the entry that says so: the longest that it is, or is below."""
    entries = [(entry, number) for number, row in enumerate(LAYERS) for entry in row]
    found = [(e, n) for e, n in entries if module == e or (e != "sipo" and module.startswith(f"{e}."))]
    assert found, f"{module} is in no layer, expected a place for it in LAYERS"
    entry, number = max(found, key=lambda item: len(item[0]))
    return number, entry


def test_the_parser_sees_imports_inside_functions_and_relative_ones(tmp_path: Path) -> None:
    file = tmp_path / "made.py"
    file.write_text("import torch.nn\ndef f():\n    from ..loss import SIPOLoss\n    from sipo import cache as c\n")
    assert list(imported(file, "sipo.cache.made")) == ["torch.nn", "sipo.loss", "sipo.cache"]


def test_imports_run_down_the_layers() -> None:
    up = set()
    for module, others in graph().items():
        if module.partition(".")[0] == "benchmarks":
            continue
        own, entry = layer(module)
        for other in others:
            below, other_entry = layer(other) if not other.startswith("benchmarks") else (len(LAYERS), "benchmarks")
            if below > own or (entry, other_entry) in APART:
                up.add(f"{module} -> {other}")
    assert not up


def test_no_module_imports_itself_by_way_of_others() -> None:
    cycles: set[str] = set()
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        if module in above:
            cycles.add(" -> ".join([*above[above.index(module) :], module]))
        elif module not in done:
            for other in sorted(graph()[module]):
                visit(other, (*above, module))
            done.add(module)

    for module in graph():
        visit(module, ())
    assert done == set(sources())
    assert not cycles


def test_the_kernels_import_torch_alone() -> None:
    foreign = set()
    for module, path in sources().items():
        if module.partition(".")[0] != "sipo_kernels":
            continue
        allowed = {"sipo_kernels", "torch", "typing_extensions", *sys.stdlib_module_names}  # torch needs it itself
        if module.startswith("sipo_kernels.backends.triton"):
            allowed.add("triton")
        foreign |= {
            f"{module} -> {other}" for other in imported(path, module) if other.partition(".")[0] not in allowed
        }
    assert not foreign


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Packages that are loaded by a fresh interpreter, after torch, then ``sipo``, then reading a YAML."""
    file = tmp_path_factory.mktemp("imports") / "run.yaml"
    sections = {
        "model": {"family": "sd15", "pretrained_model_name_or_path": "toy"},
        "data": {"dataset_name": "toy", "cache": "cache"},
        "training": {"output_dir": "run", "max_train_steps": 1, "learning_rate": 1e-4},
    }
    file.write_text(json.dumps(sections))  # JSON is YAML
    code = (
        "import json, sys\n"
        "found = []\n"
        "def note(): found.append(sorted({name.partition('.')[0] for name in sys.modules}))\n"
        "import torch; note()\n"
        "import sipo; note()\n"
        f"import sipo.recipe.config as c; c.load_config({str(file)!r}); note()\n"
        "print(json.dumps(found))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found: list[list[str]] = json.loads(run.stdout)
    return found


def test_importing_sipo_loads_torch_and_nothing_else(loaded: list[list[str]]) -> None:
    torch_alone, with_sipo, _ = map(set, loaded)
    assert with_sipo - torch_alone - set(sys.stdlib_module_names) == {"sipo", "sipo_kernels"}


def test_reading_a_yaml_loads_no_package_of_models(loaded: list[list[str]]) -> None:
    new = set(loaded[2]) - set(loaded[1]) - set(sys.stdlib_module_names)
    assert {name for name in new if not name.startswith("_")} <= {"yaml", "cython_runtime"} and "yaml" in loaded[2]


def test_tests_and_benchmarks_do_not_share_files() -> None:
    wrong = set()
    for folder, forbidden in (("benchmarks", "tests"), ("tests", "benchmarks")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if folder == "tests" and path.stem.startswith(OF_BENCHMARKS):
                continue
            names = {name.partition(".")[0] for name in imported(path)}
            if forbidden in names:
                wrong.add(f"{path.relative_to(ROOT)} imports {forbidden}")
    assert not wrong


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_no_module_is_imported_by_its_path(folder: str) -> None:
    by_path = {"spec_from_file_location", "SourceFileLoader", "run_path"}
    wrong = set()
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(parsed(path)):
            name = node.attr if isinstance(node, ast.Attribute) else ""
            if name in by_path or (name and ast.unparse(node) in ("sys.path.insert", "sys.path.append")):
                wrong.add(f"{path.relative_to(ROOT)}: {ast.unparse(node)}")
    wrong -= {"tests/disassembly.py: importlib.util.spec_from_file_location"}  # setup.py, which is in no package
    assert not wrong


def test_no_two_modules_have_one_name() -> None:
    names = defaultdict(set)
    for module, path in sources().items():
        if not module.startswith("sipo.cli."):  # a command's module has the command's name, and calls what does it
            names[path.stem].add(module)
    several = {name: modules for name, modules in names.items() if len(modules) > 1}
    assert SAME_MODULES.keys() <= several.keys()
    assert not {f"{n}: {', '.join(sorted(several[n]))}" for n in several.keys() - SAME_MODULES.keys()}


def test_no_two_classes_have_one_name() -> None:
    names = defaultdict(set)
    for module, path in sources().items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                names[node.name].add(module)
    several = {name: modules for name, modules in names.items() if len(modules) > 1}
    assert not {f"{n}: {', '.join(sorted(several[n]))}" for n in several}


def test_no_source_file_is_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources().values()}
    assert not {str(path.relative_to(ROOT)) for path, lines in lengths.items() if lines > MOST_LINES}
