"""The package keeps its limits: sizes, one direction of imports, names at the top level, docstrings,
comments."""

import ast
import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("core", "data", "results", "llama", "models", "judge", "training", "export", "cli")
SCRIPT = ROOT / "kardia_lite.py"
MODULES = [SCRIPT, *sorted((ROOT / "kardia").rglob("*.py"))]
TESTS = sorted((ROOT / "tests").glob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in [*MODULES, *TESTS]}
TOP_LEVEL = set(
    "kardia_lite.py kardia rubrics.yaml data tests docs requirements.txt requirements-gpu.txt README.md "
    "Makefile pyproject.toml LICENSE .ci .gitignore".split()
)


def name(path):
    return str(path.relative_to(ROOT))


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_sizes():
    """The script has at most 900 lines, a module 400, a function 50, a line 110 columns; nothing escapes the
    formatter."""
    wrong = []
    for path, tree in TREES.items():
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        wrong += [
            f"{name(path)}:{n} is {len(line)} wide" for n, line in enumerate(lines, 1) if len(line) > 110
        ]
        if re.search(r"#\s*fmt:\s*" + "(skip|off)", text):
            wrong.append(f"{name(path)} escapes the formatter")
        if path in MODULES:
            limit = 900 if path == SCRIPT else 400
            wrong += [f"{name(path)} has {len(lines)} lines"] if len(lines) > limit else []
            long = [f for f in functions(tree) if f.end_lineno - f.lineno + 1 > 50]
            wrong += [f"{name(path)}: {f.name} has {f.end_lineno - f.lineno + 1} lines" for f in long]
    assert not wrong, "\n".join(wrong)


def test_imports_go_one_way():
    """A folder imports itself and the folders before it; nothing imports the script."""
    wrong = []
    for path in MODULES[1:]:
        folder = path.relative_to(ROOT / "kardia").parts[0]
        for node in ast.walk(TREES[path]):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, name(path)
                modules = (
                    [node.module] if node.module != "kardia" else [f"kardia.{a.name}" for a in node.names]
                )
            for module in modules:
                parts = module.split(".")
                if parts[0] == "kardia_lite":
                    wrong.append(f"{name(path)} imports the script")
                if parts[0] == "kardia" and ORDER.index(parts[1]) > ORDER.index(folder):
                    wrong.append(f"{name(path)} imports {module}")
                if (
                    parts[0] == "kardia"
                    and folder == "results"
                    and parts[1] not in ("core", "data", "results")
                ):
                    wrong.append(f"{name(path)} imports {module}")
                if parts[0] == "llama_cpp" and folder not in ("llama", "cli"):
                    wrong.append(f"{name(path)} imports llama_cpp")
    assert not wrong, "\n".join(wrong)


HEAVY = set("torch transformers trl peft datasets bitsandbytes llama_cpp matplotlib scipy numpy".split())


def test_heavy_imports_stay_inside_functions():
    """`--help` answers at once."""
    wrong = []
    for path in MODULES:
        for node in TREES[path].body:
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{name(path)}: {m}" for m in modules if m.split(".")[0] in HEAVY]
    assert not wrong, wrong


def public(tree):
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                methods = [m for m in node.body if isinstance(m, ast.FunctionDef)]
                yield from (m for m in methods if not m.name.startswith(("_", "on_")))


INHERITED = set(  # methods of other libraries' classes
    "convert show format_message parse_args invoke list_commands training_step compute_loss passes_of "
    "largest_pass".split()
)


def test_public_things_have_a_docstring():
    missing = [
        f"{name(path)}: {node.name}"
        for path in MODULES
        for node in public(TREES[path])
        if not ast.get_docstring(node) and node.name not in INHERITED
    ]
    assert not missing, "\n".join(missing)


def comment_lines(path):
    text = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0] for t in tokens if t.type == tokenize.COMMENT}, len(text.splitlines())


def test_comments_say_why():
    """Between 5 and 10% of the lines carry a comment."""
    counts = [comment_lines(path) for path in MODULES]
    share = sum(len(lines) for lines, _ in counts) / sum(total for _, total in counts)
    assert 0.05 <= share <= 0.10, share


def test_the_script_shows_what_trains():
    """A student finds the losses, the reward and the advantages in it."""
    defined = {f.name for f in functions(TREES[SCRIPT])}
    assert defined >= {
        "sft_loss",
        "score_answers",
        "group_advantages",
        "gdpo_advantages",
        "grpo_loss",
        "answer_logps",
        "sample_group",
    }
    rulers = re.findall(r"^# -{60,} (\d+) (.+)$", SCRIPT.read_text(encoding="utf-8"), flags=re.M)
    assert [int(number) for number, _ in rulers] == list(range(1, len(rulers) + 1)) and len(rulers) >= 10


def test_the_top_level_stays_what_the_card_says():
    try:
        tracked = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    assert {path.split("/")[0] for path in tracked.splitlines()} <= TOP_LEVEL
