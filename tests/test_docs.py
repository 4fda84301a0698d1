"""The pages for people: links lead somewhere, example lines parse, tables equal what the program has."""

import re
import shlex
from pathlib import Path

import click
from click.testing import CliRunner
from conftest import commands

import kardia_lite as k
from kardia.training.progress import METRICS

ROOT = Path(__file__).parent.parent
NAMES = "README.md", "docs/**/*.md", "data/README.md", "tests/code_review/README.md"
PAGES = [page for name in NAMES for page in sorted(ROOT.glob(name))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:python|uv run|accelerate launch [^`\n]*?) ?kardia_lite\.py ?([^`\n#]*)")
PLACES = r"(?<![\w.$*-])/(?:work|home|root|tmp|usr|etc|opt|mnt|var)/|[A-Z]:\\"
FORBIDDEN = re.compile(rf"{PLACES}|\bpypi\.|pythonhosted|index-url|artifactory", re.I)
# Options of every command, of llama.cpp and of the benchmarks.
OTHERS = set("--help --lora --count --sweep".split())
COMMANDS = [(name, command) for name, command in commands() if not isinstance(command, click.Group)]
PARTS = ["Usage", "What it prints and logs", "Implementation details", "Results"]


def anchors(page):
    """Return the anchors that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            if re.match(r"https?://", link):
                continue
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken, "\n".join(broken)


def test_example_lines_parse(monkeypatch):
    # Click parses and converts before it invokes: without invoking, a line is checked and nothing runs.
    monkeypatch.setattr(click.Command, "invoke", lambda self, context: None)
    monkeypatch.setattr(
        click.Path, "convert", lambda self, value, *_: Path(value)
    )  # these files do not exist
    lines = [
        (page, line)
        for page in PAGES
        for line in COMMAND.findall(page.read_text(encoding="utf-8").replace("\\\n", " "))
    ]
    results = [(page, line, CliRunner().invoke(k.cli, shlex.split(line))) for page, line in lines]
    wrong = [f"{page.name}: {line}: {result.output}" for page, line, result in results if result.exit_code]
    assert not wrong, "\n".join(wrong)
    assert len(lines) > 40
    assert CliRunner().invoke(k.cli, shlex.split("grpo --from a --out b --group-size 1")).exit_code == 2


def test_options_in_the_text_exist():
    known = {option for _, command in COMMANDS for parameter in command.params for option in parameter.opts}
    for page in PAGES:
        for option in re.findall(r"`(--[a-z][a-z-]+)[^`\n]*`", page.read_text(encoding="utf-8")):
            assert option in known | OTHERS, f"{page.name}: {option}"


def test_the_readme_is_short_and_lists_every_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1_800
    assert sorted(re.findall(r"^\| \[`([a-z ]+)`\]", text, re.M)) == sorted(name for name, _ in COMMANDS)
    for name in k.cli.commands:
        page = ROOT / "docs" / "commands" / f"{name}.md"
        assert re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.M) == PARTS, page


def test_the_metrics_table_is_what_is_logged():
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = "\n".join(f"| `{name}` | {metric.meaning} |" for name, metric in METRICS.items())
    assert f"| metric | meaning |\n|---|---|\n{table}\n\n" in text, f"docs/metrics.md should hold:\n{table}"


def test_no_page_names_a_place_of_one_machine():
    for page in PAGES:
        assert not FORBIDDEN.findall(page.read_text(encoding="utf-8")), page
