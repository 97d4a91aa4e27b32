"""Imports point downwards. The table below is the architecture, and the tests compare the code with it."""

import ast
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from verl import DataProto, GraceEncoder

ROOT = Path(__file__).parents[2]

# Run as `python3 -m`; nothing imports them.
PROGRAMS = [
    "verl.trainer.main_ppo", "verl.encoder.__main__", "verl.doctor", "verl.merge_model", "verl.eval_generation",
    "verl.export_sentence_transformer", "verl.get_demo_model", "verl.centre",
    "verl.report.__main__", "verl.serve.__main__", "verl.push_to_hub", "verl.mine_negatives", "verl.plan",
]  # fmt: skip
# Lowest first. A module imports modules of lower layers and of its own package.
LAYERS: list[list[str]] = [
    ["verl", "verl.errors", "verl.verl_keys"],
    [
        "verl.prompt_options",
        "verl.text_roles",
        "verl.config",
        "verl.config_fields",
        "verl.unread_settings",
        "verl.config_checks",
        "verl.step_schedule",
        "verl.batch_plan",
    ],
    ["verl.protocol", "verl.utils"],
    ["verl.algorithm", "verl.embedding"],
    ["verl.data"],
    ["verl.models"],
    ["verl.checkpoint"],
    ["verl.single_controller"],
    ["verl.workers"],
    ["verl.planning"],
    ["verl.encoder"],
    ["verl.serve"],
    ["verl.evaluation"],
    ["verl.hub"],
    ["verl.report"],
    ["verl.trainer"],
    PROGRAMS,
]

# Third-party packages that only some modules may import.
RESERVED = {
    "ray": {
        "verl.single_controller.ray_cluster",
        "verl.single_controller.ray_group",
        "verl.trainer.train",
        "verl.trainer.machine_checks",
    },
    "hydra": {"verl.trainer.compose", "verl.trainer.overrides"},
    "vllm": {"verl.workers.rollout.vllm"},
    **{name: {"verl.trainer.trackers"} for name in ("wandb", "mlflow", "swanlab", "trackio")},
    "mteb": {
        "verl.evaluation.evaluate",
        "verl.evaluation.local_tasks",
        "verl.evaluation.mteb_model",
        "verl.evaluation.published",
        "verl.evaluation.suites",
    },
    "sqlite3": {"verl.encoder.store"},
    "uvicorn": {"verl.serve.server"},
    "prometheus_client": {"verl.serve.app", "verl.serve.metrics"},
}


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in (ROOT / "verl").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = path
    return found


def layer_of(module: str) -> int:
    matches = [
        (len(p), i) for i, layer in enumerate(LAYERS) for p in layer if module == p or module.startswith(p + ".")
    ]
    return max(matches)[1]


@cache
def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(imported module, whether the import stands inside a function)."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, id(node) not in top))
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_only_from_its_own_layer_and_below(module):
    for imported, local in imports_of(modules()[module]):
        if imported.split(".")[0] == "verl":
            assert layer_of(imported) <= layer_of(module), f"{module} imports {imported}, which lies above it"
            # A program parses its arguments before it imports its work.
            assert not local or module in PROGRAMS, f"{module} imports {imported} inside a function"
        package = imported.split(".")[0]
        if package in RESERVED:
            assert module in RESERVED[package], f"{module} imports {package}"


@pytest.mark.parametrize("module", sorted(modules()))
def test_init_files_are_empty_but_for_the_registries(module):
    path = modules()[module]
    if path.name == "__init__.py" and module not in ("verl", "verl.workers.reward_manager"):
        assert path.read_text() == ""


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: imported_modules(module) for module in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def imported_modules(module: str) -> set[str]:
    """The modules of verl that a module imports; `from package import module` counts as the module."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(known[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    found &= known.keys()
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.stem)
def test_a_test_imports_no_other_test(path):
    imported = [name for name, _ in imports_of(path) if name.rpartition(".")[2].startswith("test_")]
    assert not imported, "move what both need to a module of its own in tests/"


def test_no_two_test_files_have_the_same_name():
    # pytest imports test files by their names alone, and refuses the second of two with the same one.
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


def test_pytest_enters_every_folder_of_tests(pytestconfig):
    # One whose name is in norecursedirs (dist and build are, by default) is left out without a word.
    left_out = pytestconfig.getini("norecursedirs")
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert not [name for name in folders for pattern in left_out if fnmatch(name, pattern)]


def test_nothing_imports_an_entry_point():
    for module, path in modules().items():
        imported = {name for name, _ in imports_of(path)}
        assert not imported & {
            "verl.trainer.main_ppo",
            "verl.doctor",
            "verl.encoder.__main__",
            "verl.report.__main__",
        }, module


def printed_by(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


@pytest.mark.parametrize("imported", ["verl", "verl.config, verl.embedding.prompts"])
def test_the_package_and_its_config_load_nothing_heavy(imported):
    heavy = ("torch", "ray", "transformers", "vllm", "pandas")
    assert printed_by(f"import sys, {imported}; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_the_package_gives_its_two_classes():
    assert DataProto.__module__ == "verl.protocol" and GraceEncoder.__module__ == "verl.encoder.grace_encoder"


def test_an_unknown_name_of_the_package_is_an_error_that_names_it():
    with pytest.raises(ImportError, match="GraceDecoder"):
        from verl import GraceDecoder  # noqa: F401


def test_no_folder_of_the_tests_passes_for_a_package():
    """tests/ is on the path, so a folder tests/vllm would be found where vllm is looked for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(name for extra in extras for name in extra)]
    packages = {re.match(r"[\w.-]+", name)[0].replace("-", "_") for name in wanted}
    assert {"vllm", "peft"} <= packages
    assert not packages & {folder.name for folder in (ROOT / "tests").iterdir()}
