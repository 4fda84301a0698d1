"""Whatever stands on the command line: an answer, or one line and exit 1 or 2; what passes is a number that the run can use."""

import dataclasses
import math

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kardia_lite as k

COMMANDS = {
    "sft": k.SFTOptions,
    "grpo": k.GRPOOptions,
    "evaluate": k.EvaluateOptions,
    "export": k.ExportOptions,
    "judge train": k.JudgeTrainOptions,
}
NAMED = {
    "sft": [],
    "grpo": ["--from", "nowhere"],
    "evaluate": ["base"],
    "export": ["nowhere", "--to", "elsewhere"],
    "judge train": [],
}
ODD = [
    "nan",
    "inf",
    "-inf",
    "1e999",
    "-1",
    "0",
    "-0.0",
    "1e-400",
    "9" * 40,
    "0x10",
    "1_000",
    "١٢",
    "",
    " ",
    "true",
    "None",
    "1.5",
    "4 ",
    "16\n",
    "--",
    "-",
    "\x1b[31m",
    "a" * 5000,
    "../../x",
    "auto",
    "none",
    "é",
    "{}",
    "[1]",
    "%s",
    "$HOME",
    "4,8",
]
VALUES = st.one_of(
    st.sampled_from(ODD),
    st.integers(-(10**12), 10**12).map(str),
    st.floats().map(str),
    st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=20),
)


@pytest.fixture
def reached(monkeypatch):
    """The commands up to the point where work would begin."""
    seen = []
    for name in ("train_sft", "train_grpo", "export_run", "train_judge"):
        monkeypatch.setattr(
            k,
            name,
            lambda options, *a, **m: (_ for _ in ()).throw(
                k.UserError(f"reached {seen.append(options) or ''}")
            ),
        )
    monkeypatch.setattr(
        k,
        "evaluate",
        lambda models, options, target: (_ for _ in ()).throw(
            k.UserError(f"reached {seen.append(options) or ''}")
        ),
    )
    monkeypatch.setattr(k, "start", lambda *a: None)
    return seen


@settings(
    max_examples=600, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_any_value_of_any_option(reached, data):
    command = data.draw(st.sampled_from(sorted(COMMANDS)))
    fields = dataclasses.fields(COMMANDS[command])
    chosen = data.draw(
        st.lists(
            st.sampled_from([f for f in fields if f.type != "bool"]),
            min_size=1,
            max_size=3,
            unique_by=lambda f: f.name,
        )
    )
    arguments = [f"--{f.name.replace('_', '-')}={data.draw(VALUES)}" for f in chosen]
    reached.clear()
    result = CliRunner().invoke(
        k.cli,
        [
            *command.split(),
            *NAMED[command],
            *([] if command in ("evaluate", "export") else ["--out", "nowhere"]),
            *arguments,
        ],
    )
    assert isinstance(result.exception, SystemExit) and result.exit_code in (1, 2), (
        arguments,
        result.exception,
    )
    assert (
        "Traceback" not in result.stderr
        and len([line for line in result.stderr.splitlines() if line.startswith("Error")]) == 1
    )
    for options in reached:  # it was let through: every number is one that can be counted to
        for f in fields:
            value = getattr(options, f.name)
            if f.type in ("int", "float"):
                assert (
                    math.isfinite(value)
                    and value >= f.metadata.get("min", value)
                    and value <= f.metadata.get("max", value)
                    and abs(value) < 2**32
                    or f.type == "float"
                ), (f.name, value)


def test_good_values_pass(reached):
    CliRunner().invoke(
        k.cli,
        [
            "sft",
            "--out",
            "x",
            "--epochs",
            "0.5",
            "--learning-rate",
            "1e-4",
            "--bits",
            "4",
            "--seed",
            "4294967295",
        ],
    )
    assert (reached[0].epochs, reached[0].learning_rate, reached[0].bits, reached[0].seed) == (
        0.5,
        1e-4,
        4,
        4294967295,
    )


def test_bytes_that_are_no_text(tmp_path):
    result = CliRunner().invoke(k.cli, ["sft", "--out", str(tmp_path / "r\udcff")])
    assert (
        result.exit_code == 2
        and "not UTF-8; rename the file" in result.stderr
        and "\udcff" not in result.stderr
    )
