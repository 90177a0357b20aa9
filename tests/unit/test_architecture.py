"""The house rules that a machine can check."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

ARROWS = {
    "routellm": {"flows", "registry", "expectations", "mlflow", "prefect", "great_expectations"},
    "expectations": {"flows", "registry", "mlflow", "prefect"},
    "registry": {"flows", "expectations", "prefect"},
    "flows": set(),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", ARROWS)
def test_imports_point_one_way(package):
    for path in (REPOSITORY / package).rglob("*.py"):
        if "cli" in path.parts:  # the command puts everything together
            continue
        assert not set(imports(path)) & ARROWS[package], path


def test_the_top_level_holds_nothing_new():
    said = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    found = {name.split("/")[0] for name in said.stdout.splitlines()}
    ours = {*ARROWS, "tests", "deploy", "pyproject.toml", "README.md"}
    beside = {"benchmarks", "docs", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"}
    tools = {".ci", ".gitignore", "Makefile", "requirements.lock"}
    assert found == ours | beside | tools


def test_nothing_unpickles():
    for package in ARROWS:
        for path in (REPOSITORY / package).rglob("*.py"):
            assert not set(imports(path)) & {"pickle", "joblib", "cloudpickle", "dill"}, path
            assert "torch.load(" not in path.read_text(), path


def test_the_command_answers_help_without_loading_anything_heavy():
    heavy = ("torch", "mlflow", "prefect", "pandas", "numpy", "pyarrow", "great_expectations")
    code = (
        "import sys, routellm.cli.app as a\n"
        "import typer.testing\n"
        "r = typer.testing.CliRunner().invoke(a.app, ['--help'])\n"
        f"assert r.exit_code == 0; print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
