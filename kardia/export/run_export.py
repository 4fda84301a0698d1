"""Export a run: write the formats that were asked for, prove each, and keep the record."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kardia.core import machine
from kardia.core.console import UserError, say
from kardia.core.files import file_hash, write_json
from kardia.core.options import DATA, RUBRIC, option
from kardia.export.book import best_gguf
from kardia.export.formats import Exporter, parse_formats
from kardia.export.proof import Proof, proof_prompts
from kardia.judge.judge import NO_JUDGE, JudgeOptions, resolve_judge
from kardia.judge.opening import open_judge
from kardia.llama.gguf_header import check_gguf
from kardia.llama.worker import Worker
from kardia.models.base import EMBEDDED
from kardia.models.chat_template import trained_template

FORMATS = "Comma-separated: merged, lora, modelfile, any GGUF type of llama.cpp (f16, q8_0, q4_k_m, ...)."
MERGE = "trained: the weights trained on (of a 4-bit run the dequantized NF4 ones); 16bit: the base's own."
TEMPLATE = "A GGUF of the base, of any type, when the run has none: gives the GGUFs metadata and tokenizer."


@dataclass
class ExportOptions(JudgeOptions):
    """Hold the options of `export`."""

    formats: str = option("merged,f16", FORMATS)
    merge_into: str = option("trained", MERGE, choices=("trained", "16bit"))
    gguf_template: Path | None = option(None, TEMPLATE)
    llama_cpp: Path | None = option(None, "A checkout of llama.cpp: its converter makes the GGUFs instead.")
    data: Path = option(DATA / "eval.jsonl", "Dialogues or prompts the proof is made on.")
    answers: int = option(3, "Answers that each export gives and the judge reads (0: none).", min=0)
    max_tokens: int = option(256, "Longest of these answers, tokens.", min=8)
    judge: str = option("", "Judge: a .gguf file (default: the run's, else the embedded one).")
    rubric: Path = option(RUBRIC, "Criteria and judge wording.")


@dataclass(frozen=True)
class Tools:
    """What the script gives to an export, because kardia/ may not import it."""

    load_policy: Callable  # (base, engine, bits, *, adapter, dtype) -> PeftModel
    score_answers: Callable  # ([(dialogue, answer)], rubric, judge, whole_text) -> [Reward]
    system: str  # the system prompt of a chat without a profile, for the Modelfile


def check_base(base, run, options: ExportOptions):
    """Return the run's base with the GGUF that is given now. Raises UserError if it changed."""
    source = base.template if base.imported else base.directory
    if file_hash(source) != run.facts["base_hash"]:
        changed = f"its base {source} has changed since the training"
        raise UserError(f"{run.path}: {changed}; put the old one back, or train again")
    if not options.gguf_template:
        return base
    if base.imported:
        trained_on = f"{run.path} was trained on {base.template}, which is the template already"
        raise UserError(f"--gguf-template: {trained_on}")
    return dataclasses.replace(base, template=check_gguf(options.gguf_template))


def run_export(options: ExportOptions, run, base, renderer, rows, rubric, target: Path, tools: Tools) -> dict:
    """Write the formats into `target`, prove each equal to the trained model, return the book (export.json).

    What an earlier call of the same export finished stays as it is. A file that lost the training gets a
    .failed name. Raises UserError before anything is written if the export cannot work.
    """
    base = check_base(base, run, options)
    trained_by = run.facts["options"].get("judge")  # none where no rubric was rewarded
    judge = options.judge or (EMBEDDED if trained_by in (None, NO_JUDGE) else trained_by)
    asked = [dialogue.first_prompt() for dialogue in rows[: options.answers]]
    prompts = proof_prompts(renderer, rows)
    if not prompts:
        none = "no row fits into 1,024 tokens, and the proof needs some"
        raise UserError(f"{options.data}: {none}; give others with --data")
    if asked:
        resolve_judge(judge)  # a missing judge is reported now, not after the work
    bits = 16 if options.merge_into == "16bit" else run.facts["bits"]
    chat = ([renderer.tokenizer.eos_token_id], trained_template(renderer.tokenizer))
    name = f"{base.name}-{run.path.name}"
    exporter = Exporter(base, run.adapter, bits, target, name, chat, options.llama_cpp)
    book, formats = exporter.open_book(str(run.path), parse_formats(options.formats), say)
    with Worker() as worker, exporter:
        if set(formats) - {"modelfile"}:
            asked_of = f"{len(asked)} of {file_hash(options.data)}, {options.max_tokens} tokens"
            forget_other_answers(book, asked_of)
            book.update(data=str(options.data), prompts=len(prompts))
            book.update(machine=machine.describe_machine(), versions=machine.versions())
            dtype = machine.proof_dtype(exporter.weights.count())
            questions = [renderer.prompt(dialogue) for dialogue in asked]
            texts = [renderer.text(dialogue, 1, generate=True) for dialogue in rows[:50]]
            means = base, run, renderer, worker, tools.load_policy, dtype
            proof = Proof(*means, prompts, questions, options.max_tokens, texts)
            book["trained"] = {"answers": proof.measure_trained()}
            machine.release_memory()
        for kind in formats:
            if kind != "modelfile":
                write_and_prove(kind, exporter, proof, book)
            elif gguf := best_gguf(book, target):
                book["formats"][kind] = exporter.write_modelfile(gguf, worker, renderer, tools.system)
            else:
                say("  modelfile  left out: no GGUF passed its proof")
        rescore(book, asked, rubric, judge, options, worker, tools)
    exporter.save(book)
    write_json(run.path / "export.json", book)
    return book


def write_and_prove(kind: str, exporter: Exporter, proof: Proof, book: dict) -> None:
    """Build one format, compare what was built, move it to its name, and save the book."""
    began = time.monotonic()
    for artefact in exporter.write(kind, proof.worker.quantize):
        row = proof.measure(artefact)
        machine.release_memory()
        seconds = round(time.monotonic() - began, 1)
        entry = exporter.keep(artefact, {"format": kind, **row, "seconds": seconds})
        book["formats"][artefact.name] = entry
        exporter.save(book)  # what is done stays done if the rest is interrupted
        result = entry["why"]
        if entry["kl"] is not None:
            result = f"KL {entry['kl']:.1e}, {entry['kept']:.0%} of the training kept"
        size = f"{entry['bytes'] / 1e6:>7,.0f} MB"
        say(f"  {artefact.name:<10} {size}  {result}, {entry['verdict']}  {seconds:.0f} s")
        began = time.monotonic()


def forget_other_answers(book: dict[str, Any], questions: str) -> None:
    """Remove the answers that an earlier call gave to other questions."""
    if book.get("questions") != questions:
        for entry in book["formats"].values():
            for key in ("answers", "valid", "rubric"):
                entry.pop(key, None)
    book["questions"] = questions


def rescore(book, asked, rubric, judge: str, options: ExportOptions, worker: Worker, tools: Tools) -> None:
    """Write the judge's mean scores of the answers of the trained model and of each export."""
    entries = [entry for entry in (book.get("trained"), *book["formats"].values()) if entry]
    entries = [e for e in entries if e.get("answers") and len(e["answers"]) == len(asked)]
    if all("rubric" in entry for entry in entries):
        return
    scorer, _ = open_judge(worker, rubric, dataclasses.replace(options, judge=judge))
    for entry in entries:
        pairs = list(zip(asked, entry["answers"]))
        rewards = tools.score_answers(pairs, rubric, scorer, whole_text=True)
        known = [r.components["rubric"] for r in rewards if r.components["rubric"] is not None]
        entry["valid"] = sum(r.components["format"] for r in rewards) / len(rewards)
        entry["rubric"] = sum(known) / len(known) if known else None
    book["judge"] = judge if judge == EMBEDDED else Path(judge).name
