"""Add the commands beside the run itself to the script's: doctor, data, judge, explain, report."""

from __future__ import annotations

from pathlib import Path

import click

from kardia.cli.data_commands import data
from kardia.cli.demo import demo
from kardia.cli.doctor import doctor
from kardia.cli.judge_commands import judge
from kardia.cli.model_commands import chat, export
from kardia.cli.process import FILE
from kardia.core import distributed
from kardia.core.console import UserError
from kardia.results import explain as explaining
from kardia.results import report as reporting
from kardia.results.toy import toy as worked_example

IN_ORDER = "doctor data sft grpo judge evaluate export explain report chat demo".split()


class OneLineErrors(click.Group):
    """Prints an expected mistake as one line and exits with 1. A bug keeps its traceback."""

    def parse_args(self, ctx, args):
        for arg in args:
            # bytes that are not UTF-8 arrive as half characters, which can be written nowhere
            if any("\ud800" <= c <= "\udfff" for c in arg):
                shown = arg.encode(errors="replace").decode()
                raise click.UsageError(f"{shown}: not UTF-8; rename the file")
        if distributed.size() > 1 and args and args[0] not in ("sft", "grpo"):
            raise UserError(f"{args[0]} runs in one process; sft and grpo are what accelerate may launch")
        return super().parse_args(ctx, args)

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise UserError("stopped; a run goes on with --resume") from None
        except OSError as error:
            if error.filename is None and error.errno is None:
                raise
            raise UserError(f"{error.filename or 'a file'}: {error.strerror or error}") from error

    def list_commands(self, ctx):
        """Return the commands in the order in which a run happens."""
        return sorted(self.commands, key=IN_ORDER.index)


def add_commands(cli: click.Group, script) -> None:
    """Add the commands of this folder to `cli`.

    They reach what belongs to the script as attributes of `script`, when they run: load_rows, Renderer,
    load_policy, export_run, Dialogue, Answerer.
    """
    cli.context_settings["obj"] = script
    for command in (doctor, data, judge, export, explain, report, chat, demo):
        cli.add_command(command)


STEP = "Which step (default: of the inspected groups the one with the widest rewards)."
TOY = "No run needed: GRPO with three words and four answers, to be redone on paper."


@click.command()
@click.argument("run", type=FILE, required=False)
@click.option("--step", type=click.IntRange(1), default=None, help=STEP)
@click.option("--toy", is_flag=True, help=TOY)
def explain(run: Path | None, step: int | None, toy: bool) -> None:
    """Show one GRPO group, number by number, down to its tokens.

    Rewards, mean, deviation, advantages; which tokens moved and how far, the KL of the step, the clip. Tokens
    are there of every step that was inspected (grpo --inspect-every).

    \b
    kardia_lite.py explain --toy
    kardia_lite.py explain runs/grpo
    kardia_lite.py explain runs/grpo --step 1
    """
    if toy == (run is not None):
        raise click.UsageError("give a run directory, or --toy")
    click.echo(worked_example() if toy else explaining.explain(run, step))


@click.command()
@click.argument("runs", nargs=-1, required=True, type=FILE)
@click.option("--out", type=FILE, default=None, help="HTML file (default: report.html in the last run).")
@click.option("--png", type=FILE, default=None, metavar="DIR", help="Write each figure as a PNG file, too.")
def report(runs: tuple[Path, ...], out: Path | None, png: Path | None) -> None:
    """Write one self-contained HTML file about one or several runs.

    It needs no network. Curves with confidence bands, the judge's exam, every alarm, the groups reply by
    reply, answers before and after, exports, options and hashes. Several runs: their curves lie over each
    other, and a table says in what they differ.

    \b
    kardia_lite.py report runs/grpo
    kardia_lite.py report runs/sft runs/grpo --out report.html
    """
    click.echo(reporting.write_report(list(runs), out or runs[-1] / "report.html", png))
