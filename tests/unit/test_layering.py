"""Imports point one way. The table below is the architecture; the test reads the code against it."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Run as `python3 -m`; nothing imports them.
PROGRAMS = [
    "verl.trainer.main_ppo", "verl.encoder.__main__", "verl.doctor", "verl.merge_model", "verl.eval_generation",
    "verl.export_sentence_transformer", "verl.get_demo_model", "verl.embedding.encode",
]  # fmt: skip
# Lowest first. A module imports modules of lower layers and of its own package.
LAYERS: list[list[str]] = [
    ["verl", "verl.errors"],
    ["verl.config", "verl.config_checks", "verl.batch_plan"],
    ["verl.protocol", "verl.utils"],
    ["verl.algorithm", "verl.embedding"],
    ["verl.data"],
    ["verl.models"],
    ["verl.checkpoint"],
    ["verl.single_controller"],
    ["verl.workers"],
    ["verl.encoder"],
    ["verl.evaluation"],
    ["verl.trainer"],
    PROGRAMS,
]

# Third-party packages that only some modules may import.
RESERVED = {
    "ray": {"verl.single_controller.ray_group", "verl.trainer.main_ppo", "verl.trainer.prepare", "verl.doctor"},
    "hydra": {"verl.trainer.main_ppo", "verl.trainer.prepare", "verl.doctor"},
    "vllm": {"verl.workers.rollout.vllm"},
    "wandb": {"verl.trainer.tracking"},
    "mteb": {"verl.evaluation.local_tasks", "verl.evaluation.mteb_model", "verl.evaluation.suites"},
    "sqlite3": {"verl.encoder.store"},
}


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
            assert not local, f"{module} imports {imported} inside a function"
        package = imported.split(".")[0]
        if package in RESERVED:
            assert module in RESERVED[package], f"{module} imports {package}"


@pytest.mark.parametrize("module", sorted(modules()))
def test_init_files_are_empty_but_for_the_registries(module):
    path = modules()[module]
    if path.name == "__init__.py" and module not in ("verl", "verl.workers.reward_manager"):
        assert path.read_text() == ""


def test_nothing_imports_an_entry_point():
    for module, path in modules().items():
        imported = {name for name, _ in imports_of(path)}
        assert not imported & {"verl.trainer.main_ppo", "verl.doctor", "verl.encoder.__main__"}, module


def test_the_config_loads_nothing_heavy():
    code = (
        "import sys, verl.config, verl.embedding.prompts; "
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_no_folder_of_the_tests_passes_for_a_package():
    """tests/ is on the path, so a folder tests/vllm would be found where vllm is looked for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(name for extra in extras for name in extra)]
    packages = {re.match(r"[\w.-]+", name)[0].replace("-", "_") for name in wanted}
    assert {"vllm", "flash_attn"} <= packages
    assert not packages & {folder.name for folder in (ROOT / "tests").iterdir()}
