"""Whatever stands on the command line: an answer, or one line and exit 1 or 2."""

import dataclasses
import math

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kardia_lite as k
from kardia.cli import judge_commands
from kardia.export.run_export import ExportOptions
from kardia.judge.train import JudgeTrainOptions

COMMANDS = {  # options, arguments that are needed
    "sft": (k.SFTOptions, ["--out", "nowhere"]),
    "grpo": (k.GRPOOptions, ["--from", "nowhere", "--out", "nowhere"]),
    "evaluate": (k.EvaluateOptions, ["base"]),
    "export": (ExportOptions, ["nowhere", "--to", "elsewhere"]),
    "judge train": (JudgeTrainOptions, ["--out", "nowhere"]),
}
ODD = ["nan", "inf", "-inf", "1e999", "-1", "0", "-0.0", "1e-400", "9" * 40, "0x10", "1_000", "١٢", "", " "]
ODD += ["true", "None", "1.5", "4 ", "16\n", "--", "-", "\x1b[31m", "a" * 5000, "../../x", "auto", "none"]
ODD += ["é", "{}", "[1]", "%s", "$HOME", "4,8"]
VALUES = st.one_of(
    st.sampled_from(ODD),
    st.integers(-(10**12), 10**12).map(str),
    st.floats().map(str),
    st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=20),
)


@pytest.fixture
def reached(monkeypatch):
    """The options of each command that came to where its work would begin."""
    seen = []

    def stop(*arguments, **more):
        seen.extend(a for a in arguments if dataclasses.is_dataclass(a))
        raise k.UserError("reached")

    for name in ("train_sft", "train_grpo", "export_run", "evaluate"):
        monkeypatch.setattr(k, name, stop)
    monkeypatch.setattr(judge_commands, "train_judge", stop)
    return seen


HOW = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("examples", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_any_value_of_any_option(reached, examples):
    @settings(max_examples=examples, **HOW)
    @given(data=st.data())
    def check(data):
        command = data.draw(st.sampled_from(sorted(COMMANDS)))
        cls, needed = COMMANDS[command]
        fields = dataclasses.fields(cls)
        some = st.sampled_from([f for f in fields if f.type != "bool"])
        chosen = data.draw(st.lists(some, min_size=1, max_size=3, unique_by=lambda f: f.name))
        arguments = [f"--{f.name.replace('_', '-')}={data.draw(VALUES)}" for f in chosen]
        reached.clear()
        result = CliRunner().invoke(k.cli, [*command.split(), *needed, *arguments])
        assert isinstance(result.exception, SystemExit) and result.exit_code in (1, 2), (arguments, result)
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error")]
        assert "Traceback" not in result.stderr and len(errors) == 1, arguments
        for options in reached:  # it was let through: every number is one that can be counted to
            for f in fields:
                value = getattr(options, f.name)
                if f.type in ("int", "float"):
                    least, most = f.metadata.get("min", value), f.metadata.get("max", value)
                    assert math.isfinite(value) and least <= value <= most, (f.name, value)
                    assert abs(value) < 2**32 or f.type == "float", (f.name, value)

    check()


def test_good_values_pass(reached):
    line = "sft --out x --epochs 0.5 --learning-rate 1e-4 --bits 4 --seed 4294967295"
    CliRunner().invoke(k.cli, line.split())
    options = reached[0]
    values = (options.epochs, options.learning_rate, options.bits, options.seed)
    assert values == (0.5, 1e-4, 4, 4294967295)


def test_bytes_that_are_no_text(tmp_path):
    result = CliRunner().invoke(k.cli, ["sft", "--out", str(tmp_path / "r\udcff")])
    assert result.exit_code == 2 and "not UTF-8; rename the file" in result.stderr
    assert "\udcff" not in result.stderr
