"""Run the whole story: the command lines of demo.yaml, each printed and run in a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click
import yaml

from kardia.cli.process import FILE
from kardia.core import machine
from kardia.core.console import UserError, say
from kardia.core.options import DATA, PROJECT
from kardia.models.base import embedded_gguf

STEPS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))  # title and line each


@click.command()
@click.option("--out", type=FILE, default=Path("runs/demo"), show_default=True, help="Directory to make.")
@click.option("--seed", default=0, show_default=True, help="Seed of everything random.")
def demo(out: Path, seed: int) -> None:
    """Run the whole story on the embedded model in about ten minutes.

    Data check, SFT, judge exam, GRPO, evaluate, export, report, one chat turn, sized for two CPU cores. Every
    step is the command line that it prints, in a process of its own, so its memory comes back.

    \b
    kardia_lite.py demo
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: exists already; remove it or choose another --out")
    script = os.path.relpath(PROJECT / "kardia_lite.py")
    places = {"out": shlex.quote(str(out)), "data": shlex.quote(os.path.relpath(DATA))}
    places |= {"base": embedded_gguf().stem, "seed": seed}
    began = time.monotonic()
    with machine.PeakSampler() as peak:
        for number, step in enumerate(STEPS, 1):
            line, seconds = step["line"].format(**places), time.monotonic() - began
            say(f"\n[{seconds:4.0f} s] {number}. {step['title']}\n  python {script} {line}")
            code = subprocess.run([sys.executable, script, *shlex.split(line)]).returncode
            if code:
                why = f"(exit code {code}): the lines above say why"
                raise UserError(f"the demo stopped at step {number} {why}")
    minutes = (time.monotonic() - began) / 60
    say(f"\n{minutes:.1f} minutes, peak memory {peak.peak:.1f} GB, on {machine.describe_machine()}")
    click.echo(out / "report.html")
