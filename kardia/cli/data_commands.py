"""The commands `data check` and `data import`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import click

from kardia.cli.process import FILE, configure_process
from kardia.core.console import CONTROL, progress, say
from kardia.core.files import check_new
from kardia.core.options import RUBRIC, option, options
from kardia.data import importers, overview, people
from kardia.data.rubric import AnswerFormat, load_rubric
from kardia.models.base import EMBEDDED, load_tokenizer, resolve_base


@click.group()
def data() -> None:
    """Check dialogues, or import the field's public datasets."""


@dataclass
class CheckOptions:
    """Hold the options of `data check`."""

    model: str = option(EMBEDDED, "Whose tokenizer counts the tokens.")
    rubric: Path = option(RUBRIC, "Where the emotion labels are.")
    max_length: int = option(1536, "Token limit to compare with.", min=64)
    show: int = option(1, "Show this row (1 = first) with its loss mask; 0: none.", min=0)


@data.command("check")
@click.argument("files", nargs=-1, required=True, type=FILE)
@options(CheckOptions)
@click.pass_obj
def check(script, files: tuple[Path, ...], options: CheckOptions) -> None:
    """Validate rows, count tokens, show one row as the model sees it.

    All errors are listed at once, as file:line: found / expected. In the row of --show N what is trained
    stands in [[ ]] (on a terminal each span in its colour), the rest is context. Several files are checked
    for near-duplicates and for persons who stand in more than one.

    \b
    kardia_lite.py data check data/dialogues.jsonl
    kardia_lite.py data check data/dialogues.jsonl --show 3
    kardia_lite.py data check data/dialogues.jsonl data/prompts.jsonl data/eval.jsonl --show 0
    """
    model, limit = options.model, options.max_length
    configure_process(False, model)
    rubric = load_rubric(options.rubric)
    rows = script.load_rows(list(files), rubric)
    renderer = script.Renderer(load_tokenizer(resolve_base(model)), rubric.form)
    lengths = []
    with progress("counting tokens", len(rows)) as on_progress:
        for row in rows:
            longest = max((len(ids) for ids, _ in renderer.examples(row, 10**9)), default=0)
            lengths.append(longest or len(renderer.prompt(row)))
            on_progress(len(lengths))
    say(f"{len(rows)} rows are valid")
    lines = overview.describe(rows, sorted(rubric.emotions), rubric.form.label)
    click.echo("\n".join([*lines, *_lengths(rows, lengths, model, limit), *overview.repeats(rows)]))
    if options.show:
        show_row(rows[min(options.show, len(rows)) - 1], renderer, limit)


def _lengths(rows, lengths: list[int], model: str, limit: int) -> list[str]:
    """Return lines about tokens per row, and which rows are over the limit."""
    ordered = sorted(lengths)
    median, longest = ordered[len(ordered) // 2], ordered[-1]
    lines = [f"tokens per row for {model}: shortest {ordered[0]}, median {median}, longest {longest}"]
    lines += overview.histogram(lengths, limit)
    over = [row.where for row, n in zip(rows, lengths) if n > limit]
    if not over:
        return [*lines, f"over --max-length {limit}: none"]
    named = ", ".join([*over[:3], ".."] if len(over) > 3 else over)
    what = "they lose their last turns, or are too long to ask"
    return [*lines, f"over --max-length {limit}: {len(over)} ({what}): {named}"]


def show_row(row, renderer, max_length: int) -> None:
    """Print one row as the model sees it: trained tokens in [[ ]], spans in colours, context dim."""
    examples = renderer.examples(row, max_length) or [(renderer.prompt(row), [])]
    total = sum(len(ids) for ids, _ in examples)
    trained = sum(label != -100 for _, labels in examples for label in labels)
    title = f"{row.where} as the model sees it: {total} tokens, {trained} of them trained"
    title += ", which stand in [[ ]]" if trained else " (a prompt: GRPO draws the answer)"
    click.echo(f"\n{title}")
    for ids, labels in examples:
        marked = zip(ids, [label != -100 for label in labels] or [False] * len(ids))
        for is_trained, run in itertools.groupby(marked, key=lambda pair: pair[1]):
            text = renderer.tokenizer.decode([token for token, _ in run])
            if is_trained:
                click.echo(f"[[{coloured(text, renderer.form)}]]", nl=False)
            else:
                click.echo(click.style(CONTROL.sub(" ", text), dim=True), nl=False)
    click.echo()


def coloured(text: str, form: AnswerFormat) -> str:
    """Return an answer with each span in a colour and its markers dim, without control characters."""
    colours = dict(zip(form.names, itertools.cycle(("cyan", "magenta", "yellow", "green", "blue"))))
    text = CONTROL.sub(" ", text)
    pieces, position, inside = [], 0, None
    for mark in form.marker.finditer(text):
        pieces.append(_painted(text[position : mark.start()], colours.get(inside)))
        pieces.append(click.style(mark[0], dim=True))
        position = mark.end()
        inside = mark[1] if mark[2] == "begin" else None
    return "".join([*pieces, _painted(text[position:], colours.get(inside))])


def _painted(text: str, colour: str | None) -> str:
    return click.style(text, fg=colour) if colour else text


SPLIT = "Of a directory or hub dataset, only files with this in their name (train, valid, test)."
OUT = click.option("--out", type=FILE, help="JSONL file to write (default: data/<format>.jsonl here).")


@dataclass
class ImportOptions:
    """Hold the options of `data import`."""

    split: str = option("all", SPLIT)
    rubric: Path = option(RUBRIC, "Where the emotion labels are.")


@data.command("import")
@click.argument("source")
@click.option(
    "--format",
    "kind",
    required=True,
    type=click.Choice([*importers.FORMATS, *people.FORMATS]),
    help="Which one it is.",
)
@OUT
@options(ImportOptions)
def import_(source: str, kind: str, out: Path | None, options: ImportOptions) -> None:
    """Turn public datasets into our rows.

    SOURCE is a file, a directory, or (KardiaBench) the hub id. KardiaBench gives dialogues,
    EmpatheticDialogues and ESConv give GRPO prompts. What cannot be mapped is counted here and listed, record
    by record, in OUT.skipped.txt. `data check` the result.

    epitome, usr, diasafety, grade and cola are replies that people rated, one published file at a time:
    `judge exam --people OUT` compares a judge with them. Replies rated between high and low are left out.

    \b
    kardia_lite.py data import Jhcircle/KardiaBench --format kardiabench --split train --out train.jsonl
    kardia_lite.py data import empatheticdialogues/train.csv --format empatheticdialogues --out prompts.jsonl
    kardia_lite.py data import ESConv.json --format esconv --out support.jsonl
    kardia_lite.py data import emotional-reactions-reddit.csv --format epitome --out reactions.jsonl
    """
    target = out or Path("data") / f"{kind}.jsonl"
    check_new(target)
    if kind in people.FORMATS:
        click.echo("\n".join(_rated_lines(target, people.import_rated(source, kind, target))))
        return
    labels = load_rubric(options.rubric).labels
    with progress("importing") as on_progress:
        result = importers.import_dataset(source, kind, target, labels, on_progress, options.split)
    click.echo("\n".join(_import_lines(target, result)))


def _rated_lines(target: Path, counts: people.Counts) -> list[str]:
    """Return what an import of rated replies wrote and left out, as lines."""
    lines = [f"{target}:"]
    for (name, criterion), n in counts.items():
        verdicts = f"{n['high']} rated high, {n['low']} low, {n['between']} between (left out)"
        lines.append(f"  {name}, {criterion}: {verdicts}")
    return lines


def _import_lines(target: Path, result) -> list[str]:
    """Return what an import wrote and what it skipped, as lines."""
    kinds = f"({result.dialogues} dialogues, {result.prompts} prompts)"
    lines = [f"{target}: {result.rows} rows {kinds}"]
    if len(result.files) > 1:
        lines[0] += f" from {len(result.files)} files:"
        lines += [f"  {n:>7} {name}" for name, n in result.files.items()]
    for why, n in result.skipped.items():
        lines += [f"skipped {n}: {why}", *(f"  {example}" for example in result.examples.get(why, []))]
    if result.unmapped:
        labels = ", ".join(f"{label} {n}" for label, n in result.unmapped.items())
        hint = "(add them as aliases in rubrics.yaml)"
        lines.append(f"labels without a place among the emotions {hint}: {labels}")
    if result.skipped_list:
        total = sum(result.skipped.values())
        lines.append(f"all {total} skipped records, with their lines: {result.skipped_list}")
    return lines
