"""The documents say what is so: every verb, every setting, every command."""

import re
import shlex

from tests.conftest import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def commands(*, run):
    """Return the shell commands of every page that are run here (or are marked as not run)."""
    found = []
    for page in PAGES:
        for block in re.finditer(
            r"(<!-- not run: .+? -->\n)?```bash\n(.*?)```", page.read_text(), re.S
        ):
            if bool(block.group(1)) == run:
                continue
            lines = block.group(2).replace("\\\n", " ").splitlines()
            found += [(page.name, line.split("  #")[0].strip()) for line in lines if line.strip()]
    return found


def test_every_verb_is_documented_with_an_example_in_its_help():
    from routellm.cli.app import app

    text = (REPOSITORY / "docs" / "cli.md").read_text()
    verbs = {c.name or c.callback.__name__: c for c in app.registered_commands}
    assert len(verbs) == 24
    for name, command in verbs.items():
        assert f"| `{name}" in text, name
        assert command.epilog.startswith(f"Example: routellm {name}"), name
        assert command.callback.__doc__, name


def test_every_setting_is_documented_as_it_is():
    from routellm.settings import settings_table

    assert settings_table() in (REPOSITORY / "docs" / "settings.md").read_text()


def test_every_router_kind_and_option_is_documented_as_it_is():
    from routellm.routers.base import options_table, router_kinds

    text = (REPOSITORY / "docs" / "routers.md").read_text()
    assert options_table() in text
    for kind in router_kinds():
        assert f"## `{kind}`" in text


def test_commands_that_are_not_run_here_still_name_verbs_and_options_that_exist():
    import typer.testing

    from routellm.cli.app import app

    runner = typer.testing.CliRunner()
    groups = {group.name for group in app.registered_groups}
    checked = 0
    for page, line in commands(run=False):
        words = shlex.split(line)
        if not words[0].endswith("routellm"):
            continue
        verb = words[1:3] if words[1] in groups else words[1:2]
        shown = runner.invoke(app, [*verb, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, (page, line)
        for option in (w.split("=")[0] for w in words if w.startswith("--")):
            assert option in shown.output, (page, line)
        checked += 1
    assert checked > 3


def test_every_benchmark_that_a_page_names_can_be_run():
    pages = [*REPOSITORY.glob("docs/*.md"), REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md"]
    named = {
        module
        for page in pages
        for module in re.findall(r"python -m benchmarks\.([a-z_]+)", page.read_text())
    }
    assert len(named) > 5
    for module in named:
        file = REPOSITORY / "benchmarks" / f"{module}.py"
        if not file.exists():
            file = REPOSITORY / "benchmarks" / module / "__main__.py"
        assert '__name__ == "__main__"' in file.read_text(), module
