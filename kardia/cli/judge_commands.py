"""The commands `judge exam`, `judge train` and `judge score`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from kardia.cli.process import FILE, configure_process
from kardia.core.console import UserError, progress, say, shorten
from kardia.core.files import as_json_lines, check_new, json_lines, write_json, write_text
from kardia.core.options import DATA, RUBRIC, option, options
from kardia.core.run_directory import Run
from kardia.data.people import load_rated
from kardia.data.rubric import METHODS, check_same_format, load_rubric
from kardia.judge.agreement import compare_with_people, merged
from kardia.judge.judge import WITNESS, JudgedReply, JudgeOptions, WitnessedJudgeOptions, weighted
from kardia.judge.opening import open_judge, unfit
from kardia.judge.train import JudgeTrainOptions, pairs_against, train_judge
from kardia.llama.worker import Worker
from kardia.models.base import EMBEDDED
from kardia.results.tables import exam_table


@dataclass
class ExamOptions:
    """Hold the options of `judge exam` and `judge score`."""

    judge: str = option(EMBEDDED, "A .gguf file.")
    judge_lora: str = option("auto", "Its LoRA (.gguf): auto = the embedded judge's, none, a file.")
    judge_gpu_layers: int = option(-1, "Layers on the GPU (-1: all if possible).", min=-1)
    rubric: Path = option(RUBRIC, "Criteria and wording.")
    pairs: Path = option(DATA / "judge_exam.jsonl", "Exam pairs.")

    def open(self, worker: Worker, rubric, methods: tuple[str, ...] = (), witness: str = ""):
        """Return (judge, result of its exam)."""
        named = {"judge": self.judge, "judge_gpu_layers": self.judge_gpu_layers, "exam_pairs": self.pairs}
        named |= {"judge_lora": self.judge_lora}
        chosen = WitnessedJudgeOptions(**named, witness=witness) if witness else JudgeOptions(**named)
        return open_judge(worker, rubric, chosen, methods=methods)


@click.group()
def judge() -> None:
    """Examine a judge, or let it score your own replies."""


PEOPLE = "Replies that people rated, as `data import` writes them; repeatable."
AGAINST = "Also learn from this run's (or model's) answers to the training dialogues; repeatable."
ALL_METHODS = "Examine every method on every criterion, also what rubric or the judge's size rules out."


@judge.command("exam")
@options(ExamOptions)
@click.option("--all-methods", is_flag=True, help=ALL_METHODS)
@click.option("--witness", default="auto", show_default=True, help=WITNESS)
@click.option("--people", multiple=True, type=FILE, help=PEOPLE)
@click.option("--json", "json_file", type=FILE, default=None, help="Write the result to this file, too.")
def judge_exam(
    options: ExamOptions,
    all_methods: bool,
    people: tuple[Path, ...],
    witness: str,
    json_file: Path | None,
) -> None:
    """Examine whether this GGUF is fit to judge.

    Accuracy per criterion and method with Wilson intervals, against chance, "the longer reply wins" and cheap
    cues. Also: sentences that beg for a good grade (no score may rise), length bias, repeatability. Of
    several methods the best is chosen and its accuracy cross-validated; training uses exactly what was
    examined.

    With --people it is compared with replies that people rated: AUC per set and criterion with its interval.
    What is found is kept and shown with every run that this judge scores.

    \b
    kardia_lite.py judge exam
    kardia_lite.py judge exam --judge qwen2.5-7b-instruct-q4_k_m.gguf
    kardia_lite.py data import emotional-reactions-reddit.csv --format epitome --out reactions.jsonl
    kardia_lite.py judge exam --people reactions.jsonl
    """
    configure_process(False, options.judge)
    rubric = load_rubric(options.rubric)
    for path in people:  # a mistake in a file shows before the exam's minutes
        load_rated(path, [c.name for c in rubric.criteria])
    with Worker() as worker:
        scorer, result = options.open(worker, rubric, METHODS if all_methods else (), witness)
        if people:
            found = [compare_with_people(scorer, result["key"], path) for path in people]
            result["people"] = merged([result["people"], *found])
    click.echo(exam_table(result).text())
    if json_file:
        write_json(json_file, result)


@judge.command("train")
@options(JudgeTrainOptions)
@click.option("--out", required=True, type=FILE, help="The LoRA to write (.gguf); use it with --judge-lora.")
@click.option("--against", multiple=True, metavar="RUN", help=AGAINST)
@click.option("--resume", is_flag=True, help="Go on with an interrupted training (or begin).")
@click.pass_obj
def judge_train(
    script, options: JudgeTrainOptions, out: Path, against: tuple[str, ...], resume: bool
) -> None:
    """Teach a small model to judge, by pairs of replies.

    It writes a LoRA that was trained on pairs of a better and a worse reply. This is how data/judge_lora.gguf
    was made.

    With --against RUN the judge also learns what the policy's own answers look like: RUN answers the training
    dialogues, and each answer stands against the written one. After a GRPO run that came to please the judge
    alone, train the judge against it, and train the policy again.

    \b
    kardia_lite.py judge train --out judge_lora.gguf
    kardia_lite.py judge train --against runs/sft --against runs/grpo --out judge_lora2.gguf
    kardia_lite.py judge exam --judge-lora judge_lora2.gguf
    """
    configure_process(options.offline, options.judge, *[source for source in against if source != "base"])
    rubric, runs = load_rubric(options.rubric), [Path(s) for s in against if (Path(s) / "run.json").is_file()]
    for path in runs:
        check_same_format(path, Run(path).facts, rubric.form)
    rows = script.load_rows([options.dialogues], rubric, "dialogue") if against else []

    def load_policy(base, bits: int, **lora):
        return script.load_policy(base, "transformers", bits, **lora)

    def draw() -> list[dict]:
        pairs = []
        with Worker() as worker:
            for source in against:
                answerer = script.Answerer(source, worker, rubric.form)
                pairs += pairs_against(answerer, source, rows, rubric, options.seed)
        return pairs

    result = train_judge(options, out, load_policy, resume, draw if against else None)
    for when in ("before", "after"):
        share, low, high = result[when]
        pairs = f"{result['pairs']} held-out pairs"
        click.echo(f"{when:<7} {share:.1%} of {pairs} right ({low:.0%} to {high:.0%})")
    click.echo(out)


@judge.command("score")
@click.argument("file", type=FILE)
@options(ExamOptions)
@click.option("--out", required=True, type=FILE, help="JSONL file to write.")
def judge_score(file: Path, options: ExamOptions, out: Path) -> None:
    """Score rows {messages, response, persona?, situation?}.

    Each gets {scores: {criterion: 0..1}, rubric: 0..1}. A score is the probability that the reply is the
    better one of an exam pair; null where the judge cannot tell.

    \b
    kardia_lite.py judge score replies.jsonl --out scored.jsonl
    """
    configure_process(False, options.judge)
    check_new(out)
    rubric = load_rubric(options.rubric)
    rows, replies = read_replies(file, rubric.form)
    with Worker() as worker:
        scorer, result = options.open(worker, rubric)
        for name, why in unfit(result).items():
            say(f"warning: the judge is unfit for {name}: {why}")
        scores = []
        with progress("scoring", len(replies)) as on_progress:
            for begin in range(0, len(replies), 32):
                scores += scorer.scores(replies[begin : begin + 32])
                on_progress(len(scores))
    scored = [{**row, "scores": s, "rubric": weighted(s, rubric.weights)} for row, s in zip(rows, scores)]
    write_text(out, as_json_lines(scored))
    summary = f"{out}: {len(rows)} rows scored"
    if unknown := sum(None in row.values() for row in scores):
        context = f"the judge's context of {scorer.info['n_ctx_train']} tokens"
        summary += f", {unknown} of them null: their dialogue does not fit {context}"
    click.echo(summary)


ROW = "{messages: [{role: user or assistant, content}], response, persona?, situation?}, all texts"


def read_replies(file: Path, form) -> tuple[list[dict], list]:
    """Return (rows, what the judge reads of each). Raises UserError with every bad line of the file."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected JSONL rows with messages and response")
    rows, replies, errors = [], [], []
    for number, row, problem in json_lines(file):
        try:
            replies.append(JudgedReply.from_row(row, form))
            rows.append(row)
        except ValueError:
            errors.append(f"{file}:{number}: found {problem or shorten(row)} / expected {ROW}")
    if errors or not rows:
        raise UserError("\n".join(errors[:50]) or f"{file}: no rows")
    return rows, replies
