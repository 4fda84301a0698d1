"""Commands that need a trained model: export and chat."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from kardia.cli.chat import Conversation, harmless
from kardia.cli.process import FILE, configure_process
from kardia.core.console import UserError, say
from kardia.core.options import RUBRIC, option, options
from kardia.data.rows import NO_PROFILE, NO_SITUATION
from kardia.data.rubric import load_rubric
from kardia.export.formats import parse_formats
from kardia.export.proof import advice
from kardia.export.run_export import ExportOptions
from kardia.llama.worker import Worker
from kardia.results.tables import export_table

TO = "Directory of the export; what an earlier call finished stays."


@click.command()
@click.argument("run", type=FILE)
@click.option("--to", required=True, type=FILE, help=TO)
@options(ExportOptions)
@click.pass_obj
def export(script, run: Path, to: Path, options: ExportOptions) -> None:
    """Write the trained model for other programs, each file proved.

    Every format is loaded by its real loader and compared with the trained model.

    \b
    merged      a directory for transformers (4.57 and 5.x), peft, vLLM and the like
    f16, bf16   GGUF, exact; q8_0, q4_k_m and the rest are smaller; made from the base's own GGUF
    lora        the PEFT adapter, and the same as GGUF for llama.cpp's --lora
    modelfile   for Ollama: stop words, system prompt

    \b
    kardia_lite.py export runs/grpo --to out
    kardia_lite.py export runs/grpo --to out --formats q8_0,lora,modelfile

    The drift table goes to stdout and to export.json: KL to the trained model, its share of what training
    did, how much of the training is in the export, and the judge's score of its answers. An export that lost
    the training gets a .failed name and exit code 1. The same command again goes on where it was stopped.
    """
    try:
        asked = parse_formats(options.formats)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--formats") from error
    configure_process(False)
    try:
        book = script.export_run(options, run, to)
    except KeyboardInterrupt:
        raise UserError(f"stopped; the same command goes on from what is finished in {to}") from None
    click.echo(export_table(book).text())
    for line in advice(book, to):
        say(line)
    entries = book["formats"]
    if lost := [name for name in entries if not entries[name]["ok"] and entries[name]["format"] in asked]:
        why = f"the export lost what was trained ({entries[lost[0]]['why']}); kept under a .failed name"
        keep = "Exact types (f16, q8_0) or the base with --formats lora keep it"
        raise UserError(f"{', '.join(lost)}: {why}. {keep}")


@dataclass
class ChatOptions:
    """Hold the options of `chat`."""

    say: str = option("", "Say this one thing and print the answer.")
    profile: str = option(NO_PROFILE, "Who is talking.")
    situation: str = option(NO_SITUATION, "What happened.")
    max_tokens: int = option(256, "Longest answer, tokens.", min=8)
    temperature: float = option(0.7, "0: greedy.", min=0.0)
    seed: int = option(0, "Seed of everything random.", min=0)
    rubric: Path = option(RUBRIC, "Where the format of an answer is, for a model that is no run.")


@click.command()
@click.argument("model")
@options(ChatOptions)
@click.pass_obj
def chat(script, model: str, options: ChatOptions) -> None:
    """Talk to a run, an exported directory or a .gguf file.

    The reply goes to stdout, the inner spans to stderr. Without --say: an open-ended
    conversation (/help lists its commands).

    \b
    kardia_lite.py chat runs/grpo
    kardia_lite.py chat runs/grpo --say "My sister moved abroad today."
    kardia_lite.py chat model.gguf --say "I passed!" --profile "Ana, 9, plays chess"
    """
    configure_process(False, model)
    profile, situation = harmless(options.profile), harmless(options.situation)
    dialogue = script.Dialogue(profile, "", "", situation, "", ())
    with Worker() as worker:
        answerer = script.Answerer(model, worker, load_rubric(options.rubric).form)

        def answer(asked, seed: int, show) -> str:
            sampling = options.max_tokens, options.temperature, seed
            return answerer.answer([asked], *sampling, show=show)[0]

        # Ctrl-C ends the worker, which is still drawing; the next question starts it again.
        conversation = Conversation(answer, worker.close, answerer.renderer.form, dialogue, options.seed)
        if options.say:
            conversation.turn(options.say)
        else:
            conversation.run()
