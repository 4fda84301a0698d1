"""The commands `judge exam`, `judge train` and `judge score`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from kardia.cli.process import FILE, configure_process
from kardia.core.console import UserError, progress, say
from kardia.core.files import as_json_lines, check_new, write_json, write_text
from kardia.core.options import DATA, RUBRIC, option, options
from kardia.core.run_directory import Run
from kardia.data.people import load_rated
from kardia.data.rubric import METHODS, Rubric, check_same_format, load_rubric
from kardia.judge.agreement import agreement, compare_with_people, merged, rated_scores
from kardia.judge.judge import (
    WITNESS,
    Judge,
    JudgeOptions,
    WitnessedJudgeOptions,
    resolve_judge,
    weighted,
)
from kardia.judge.opening import open_judge, unfit
from kardia.judge.replies import read_replies
from kardia.judge.teacher import load_replies, read_by_teacher, soft_pairs
from kardia.judge.train import JudgeTrainOptions, pairs_against, train_judge
from kardia.llama.gguf_header import check_gguf
from kardia.llama.worker import Worker
from kardia.models.base import EMBEDDED
from kardia.results.tables import exam_table, people_table


@dataclass
class ExamOptions:
    """Hold the options of `judge exam` and `judge score`."""

    judge: str = option(EMBEDDED, "A .gguf file.")
    judge_lora: str = option("none", "Its LoRA (.gguf), as `judge train` writes it.")
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
TEACHER = "A bigger judge (.gguf) whose readings of --replies are learned."
REPLIES = "What the teacher reads: rows as `judge score` takes them, or a GRPO run; repeatable."
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


@dataclass
class _Sources:
    """What `judge train` learns from beside a file of pairs: a policy's answers, a teacher's readings."""

    script: Any
    rubric: Rubric
    options: JudgeTrainOptions
    against: tuple[str, ...]
    teacher: Path | None
    replies: tuple[Path, ...]

    def draw(self) -> list[dict]:
        """Return pairs of a written reply and one of every run of --against."""
        rubric, pairs = self.rubric, []
        rows = self.script.load_rows([self.options.dialogues], rubric, "dialogue")
        with Worker() as worker:
            for source in self.against:
                answerer = self.script.Answerer(source, worker, rubric.form)
                pairs += pairs_against(answerer, source, rows, rubric, self.options.seed)
        return pairs

    def teach(self) -> tuple[list[dict], list[dict]]:
        """Return the teacher's pairs to learn from and to test on."""
        replies = load_replies(list(self.replies), self.rubric)
        with Worker() as worker:
            readings = read_by_teacher(worker, check_gguf(self.teacher), replies, self.rubric)
        return soft_pairs(readings, self.options.seed)


@judge.command("train")
@options(JudgeTrainOptions)
@click.option("--out", required=True, type=FILE, help="The LoRA to write (.gguf); use it with --judge-lora.")
@click.option("--against", multiple=True, metavar="RUN", help=AGAINST)
@click.option("--teacher", type=FILE, default=None, help=TEACHER)
@click.option("--replies", multiple=True, type=FILE, metavar="FILE|RUN", help=REPLIES)
@click.option("--people", multiple=True, type=FILE, help=f"{PEOPLE} Compared with the result.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted training (or begin).")
@click.pass_obj
def judge_train(
    script,
    options: JudgeTrainOptions,
    out: Path,
    against: tuple[str, ...],
    teacher: Path | None,
    replies: tuple[Path, ...],
    people: tuple[Path, ...],
    resume: bool,
) -> None:
    """Teach a small model to judge, by pairs of replies.

    It writes a LoRA that was trained on pairs of a better and a worse reply.

    With --against RUN the judge also learns what the policy's own answers look like: RUN answers the training
    dialogues, and each answer stands against the written one. After a GRPO run that came to please the judge
    alone, train the judge against it, and train the policy again.

    With --teacher a bigger judge reads --replies, and its readings are learned instead of --pairs. What it
    has read is kept, so a second training begins at once. An eighth of the conversations is held out.

    \b
    kardia_lite.py judge train --out judge_lora.gguf
    kardia_lite.py judge train --against runs/sft --against runs/grpo --out judge_lora2.gguf
    kardia_lite.py judge train --teacher qwen2.5-7b-instruct-q4_k_m.gguf --replies runs/grpo --out taught.gguf
    kardia_lite.py judge exam --judge-lora judge_lora2.gguf --people reactions.jsonl
    """
    if bool(teacher) != bool(replies):
        raise UserError("--teacher needs --replies to read, and --replies a --teacher; give both")
    configure_process(options.offline, options.judge, *[source for source in against if source != "base"])
    rubric, runs = load_rubric(options.rubric), [Path(s) for s in against if (Path(s) / "run.json").is_file()]
    for path in runs:
        check_same_format(path, Run(path).facts, rubric.form)
    reader = resolve_judge(options.judge) if people else None  # a .gguf: now, not after the training
    rated = [row for path in people for row in load_rated(path, [c.name for c in rubric.criteria])]

    def load_policy(base, bits: int, **lora):
        return script.load_policy(base, "transformers", bits, **lora)

    sources = _Sources(script, rubric, options, against, teacher, replies)
    parts = (sources.draw if against else None, sources.teach if teacher else None)
    result = train_judge(options, out, load_policy, resume, *parts)
    for when in ("before", "after"):
        (share, low, high), pairs = result[when], f"{result['pairs']} held-out pairs"
        click.echo(f"{when:<7} {share:.1%} of {pairs} right ({low:.0%} to {high:.0%})")
    if rated:
        with Worker() as worker, progress("rated replies", len(rated)) as on_progress:
            trained = Judge(worker, reader, rubric, lora=out)
            click.echo(people_table(agreement(rated, rated_scores(trained, rated, on_progress))).text())
    click.echo(out)


@judge.command("score")
@click.argument("file", type=FILE)
@options(ExamOptions)
@click.option("--out", required=True, type=FILE, help="JSONL file to write.")
def judge_score(file: Path, options: ExamOptions, out: Path) -> None:
    """Score rows {messages, response, persona?, situation?}.

    A GRPO run's completions.jsonl is read, too. Each row gets {scores: {criterion: 0..1}, rubric: 0..1}. A
    score is the probability that the reply is the better one of an exam pair; null where the judge cannot
    tell.

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
