"""Ask a GGUF what it makes of a reply, without letting it write: every score is read off log-probabilities.

The context (profile, situation, turns) is decoded once, each reply once, and the criteria are short branches
of it (`Worker.branches`). One number per method, higher is better:

    ask        log p(" yes") - log p(" no") after a question about the reply
    chat       the same in the judge's chat template, Yes or yes against No or no
    contrast   log p(any good word) - log p(any bad word) after a cue, averaged over the criterion's cues
    pmi        (log p(reply | context) - log p(reply | nothing)) / (tokens of the reply + USUAL_TOKENS)
    likelihood log p(reply | context) / tokens of the reply
    likert     expected digit of 1..5 after "Score: " in the judge's chat template
    mix        a weighted sum of some of the above, with the weights of the rubric
    row        the weighted mean of the row's own criteria; a row without any is not asked
    reference  (log p(reply | reference, context) - log p(reply | context)) / (tokens + USUAL_TOKENS)

The exam (exam.py) chooses the method of each criterion and turns its raw number into a score between 0 and 1:
the probability that a reply with this number is the better one of an exam pair. Replies and dialogue are
untrusted and tokenized without special tokens; guards.py refuses some before any model is asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kardia.core.console import UserError
from kardia.core.options import DATA, option
from kardia.data.rows import find_span
from kardia.data.rubric import AnswerFormat, Criterion, Rubric
from kardia.judge.guards import guard
from kardia.judge.judged_reply import JudgedReply
from kardia.llama.gguf_header import check_gguf, read_gguf
from kardia.llama.sampling import logsumexp, sigmoid
from kardia.llama.worker import Worker
from kardia.models.base import EMBEDDED, embedded_gguf, resolve_base
from kardia.models.chat_template import render_template

REPLY_TOKENS = 400  # a longer reply is judged by its beginning; answers here are about 40 tokens
# A usual reply's length. Per token alone, pmi is largest for a reply of three words, which says little; GRPO
# found that within 60 steps (docs/judge.md).
USUAL_TOKENS = 32
KNOWN_BAD = -1e6  # the raw number of a reply that a guard refused; its score is 0
ASKED = 300_000_000  # parameters from which `ask` is worth trying; on less it is a coin (docs/judge.md)
BIG = 1_000_000_000  # parameters from which `likert` is worth asking for: right on 0.39 of the pairs at 135M
IN_CHAT = ("chat", "likert")  # the methods that are asked in the judge's chat template
MARK = "\u0001"  # stands for untrusted text while a chat template is rendered; no template writes it itself

WITNESS = "Reads what is never rewarded: auto = the embedded model without LoRA, none, a .gguf."

Scores = dict[str, float | None]  # {criterion: 0..1}, None where the judge cannot tell
Numbers = dict[tuple[str, str], float | None]  # {(criterion, method): raw number}
NOT_ASKED = object()  # of a reply whose row has nothing to ask
NO_JUDGE = "none"  # --judge none


@dataclass
class JudgeOptions:
    """Options of every command that asks a judge."""

    judge: str = option(EMBEDDED, "Judge: a .gguf file, or none where no rubric is rewarded.")
    judge_gpu_layers: int = option(-1, "Judge layers on the GPU (-1: all if they fit, else none).", min=-1)
    judge_lora: str = option("none", "The judge's LoRA (.gguf), as `judge train` writes it.")
    exam_pairs: Path = option(DATA / "judge_exam.jsonl", "Exam pairs the judge must pass; they calibrate it.")


@dataclass
class WitnessedJudgeOptions(JudgeOptions):
    """Options of the commands that also ask another reader, whose scores are never rewarded."""

    witness: str = option("auto", WITNESS)


@dataclass(frozen=True)
class Calibration:
    """score = sigmoid(slope * (raw - middle)), fitted on the exam: numbers of all methods mean the same."""

    slope: float = 1.0
    middle: float = 0.0

    def __call__(self, raw: float | None) -> float | None:
        """Return the score 0..1 of a raw number; None stays None, what a guard refused is 0."""
        if raw is None:
            return None
        if raw == KNOWN_BAD:  # whatever the slope: a guard's word is final
            return 0.0
        return sigmoid(self.slope * (raw - self.middle))


class Judge:
    """A judge GGUF behind the worker, with a LoRA or without, and the rubric it is asked about."""

    role = "judge"  # its place in the worker

    def __init__(self, worker: Worker, path, rubric: Rubric, gpu_layers: int = 0, lora=None) -> None:
        self.worker, self.rubric = worker, rubric
        self.info = worker.load(self.role, path, gpu_layers)
        worker.set_lora(self.role, lora)
        self.path, self.lora = str(path), lora
        self.calibration: dict[str, Calibration] = {}
        self.witness: Judge | None = None  # another reader, whose scores are never rewarded
        self.method: dict[str, str] = {}  # the exam's choice; without one the first that suits the judge
        self._tokens: dict[str, list[int]] = {}

    def refused(self, reply: JudgedReply) -> str | None:
        """Return the guard that refuses a reply without asking the model, or None."""
        return guard(reply.reply, reply.said, reply.known, self.rubric.guards)

    def candidates(self, criterion: Criterion) -> tuple[str, ...]:
        """Return the criterion's methods that suit this judge; all of them if none does.

        A judge with a LoRA is first read by what it was taught. Questions and digits are for bigger ones.
        """
        fewest = {"ask": ASKED, "chat": ASKED, "likert": BIG}
        suits = tuple(m for m in criterion.methods if self.info["n_params"] >= fewest.get(m, 0))
        taught = (criterion.taught,) if self.lora and criterion.taught else ()
        return tuple(dict.fromkeys((*taught, *(suits or criterion.methods))))

    def chosen(self, criterion: Criterion) -> str:
        """Return the method the criterion is asked by."""
        return self.method.get(criterion.name) or self.candidates(criterion)[0]

    @property
    def wanted(self) -> list[tuple[Criterion, str]]:
        """Return every criterion with its chosen method."""
        return [(c, self.chosen(c)) for c in self.rubric.criteria]

    def raw(self, replies: list[JudgedReply]) -> list[Scores]:
        """Return a raw number per reply and criterion by the chosen method; None: it cannot tell."""
        numbers = self.numbers(replies, self.wanted)
        return [{name: raw for (name, _), raw in row.items()} for row in numbers]

    def scores(self, replies: list[JudgedReply]) -> list[Scores]:
        """Return a score 0..1 per reply and criterion; None: the judge cannot tell; 0: a guard refused."""
        plain, rows = Calibration(), self.raw(replies)
        return [{name: self.calibration.get(name, plain)(raw) for name, raw in row.items()} for row in rows]

    def witness_of(self, dialogues, texts: list[str], form: AnswerFormat) -> list[dict]:
        """Return the witness's scores of the reply spans of answers to dialogues; [] without a witness."""
        pairs = [(dialogue, find_span(text, form.reply) or "") for dialogue, text in zip(dialogues, texts)]
        return self.witness_scores([JudgedReply.from_dialogue(*pair, form) for pair in pairs])

    def witness_scores(self, replies: list[JudgedReply]) -> list[Scores]:
        """Return the witness's scores of the criteria that it can read; [] without a witness."""
        if self.witness is None or not self.witness.calibration:
            return []
        known = self.witness.calibration
        asked = [(c, self.witness.method[c.name]) for c in self.witness.rubric.criteria if c.name in known]
        rows = self.witness.numbers(replies, asked)
        return [{name: known[name](raw) for (name, _), raw in row.items()} for row in rows]

    def numbers(
        self, replies: list[JudgedReply], wanted: list[tuple[Criterion, str]], guarded: bool = True
    ) -> list[Numbers]:
        """Return {(criterion, method): raw number} per reply; None where the context is too long.

        A guard's refusal is KNOWN_BAD. Not `guarded`: the model alone is asked, as the exam does.
        """
        own = [(c, method) for c, method in wanted if method == "row"]
        if own:
            rows = self.numbers(replies, [pair for pair in wanted if pair not in own], guarded)
            for row, raw in zip(rows, self._read_own(replies, guarded)):
                row.update({(c.name, method): raw for c, method in own if raw is not NOT_ASKED})
            return rows
        # What a mixture needs is read once, also where it is wanted by itself.
        mixed = [c for c, method in wanted if method == "mix"]
        if mixed:
            parts = [(c, method) for c in mixed for method, _ in c.mix]
            plain = [pair for pair in dict.fromkeys((*wanted, *parts)) if pair[1] != "mix"]
            rows = self.numbers(replies, plain, guarded)
            for row in rows:
                row.update({(c.name, "mix"): mixture(c, row) for c in mixed})
            keys = [(c.name, method) for c, method in wanted]
            return [{key: row[key] for key in keys if key in row} for row in rows]
        results: list[Numbers] = [dict.fromkeys((c.name, method) for c, method in wanted) for _ in replies]
        groups: dict[tuple[str, str], list[int]] = {}
        for i, reply in enumerate(replies):
            if guarded and self.refused(reply):
                results[i] = dict.fromkeys(results[i], KNOWN_BAD)
            else:
                groups.setdefault((reply.context, reply.reference), []).append(i)
        plain = [(c, method) for c, method in wanted if method not in IN_CHAT]
        in_chat = [(c, method) for c, method in wanted if method in IN_CHAT]
        for (context, reference), members in groups.items():  # one prefix, all its replies
            texts = {i: replies[i].reply.strip() for i in members}
            if plain:
                self._read_plain(context, texts, plain, results, reference)
            if in_chat:
                self._read_in_chat(context, texts, in_chat, results)
        for row, reply in zip(results, replies):
            if not reply.reference:  # there is nothing to compare with
                for key in [key for key in row if key[1] == "reference"]:
                    del row[key]
        return results

    def _read_own(self, replies: list[JudgedReply], guarded: bool) -> list[Any]:
        """Return the weighted mean of each reply's own criteria, log-odds; NOT_ASKED for a row without."""
        raws: list[Any] = [NOT_ASKED] * len(replies)
        for criteria in dict.fromkeys(reply.criteria for reply in replies if reply.criteria):
            members = [i for i, reply in enumerate(replies) if reply.criteria == criteria]
            asked = [(c, self.candidates(c)[0]) for c in criteria]
            total = sum(c.weight for c in criteria)
            for i, row in zip(members, self.numbers([replies[i] for i in members], asked, guarded)):
                values = [row[c.name, method] for c, method in asked]
                raws[i] = next((value for value in values if value in (None, KNOWN_BAD)), NOT_ASKED)
                if raws[i] is NOT_ASKED:
                    raws[i] = sum(c.weight * value for c, value in zip(criteria, values)) / total
        return raws

    def _ids(self, text: str) -> list[int]:
        if text not in self._tokens:
            self._tokens[text] = self.worker.tokenize(self.role, [text])[0]
        return self._tokens[text]

    def _start(self) -> list[int]:
        return [self.info["bos"]] if self.info["add_bos"] else []

    def _fitting(self, texts: dict[int, str], others: int) -> dict[int, list[int]]:
        """Return the tokens of replies that fit beside `others` tokens; no score depends on neighbours."""
        tokenized = self.worker.tokenize(self.role, list(texts.values()))
        replies = {i: ids[:REPLY_TOKENS] for i, ids in zip(texts, tokenized)}
        return {i: ids for i, ids in replies.items() if others + len(ids) <= self.info["n_ctx_train"]}

    def _read_plain(
        self, context: str, texts: dict[int, str], wanted: list, results: list[Numbers], reference: str = ""
    ) -> None:
        """Read ask, contrast, pmi, likelihood and reference of the replies in one context into `results`."""
        prefix = self._start() + self.worker.tokenize(self.role, [context])[0]
        cues = dict.fromkeys(cue for c, method in wanted for cue in c.cues_of(method))  # each is asked once
        suffixes = [(self._ids(cue.text), [self._ids(w) for w in (*cue.good, *cue.bad)]) for cue in cues]
        tail = sum(len(cue) + sum(map(len, words)) for cue, words in suffixes)
        asked = any(method == "reference" for _, method in wanted)
        told = self._start() + self._told(context, reference if asked else "")
        longest = max(len(prefix), len(told))
        replies = self._fitting({i: f" {text}" for i, text in texts.items()}, longest + tail)
        if not replies:
            return
        methods, ids = {method for _, method in wanted}, list(replies.values())
        scored = not methods.isdisjoint(("pmi", "likelihood", "reference"))
        answers = alone = self.worker.branches(self.role, prefix, ids, suffixes, score_reply=scored)
        if "pmi" in methods:
            nothing = self._start() + self._ids("Listener:")
            alone = self.worker.branches(self.role, nothing, ids, [], score_reply=True)
        informed = answers
        if "reference" in methods and reference:
            informed = self.worker.branches(self.role, told, ids, [], score_reply=True)
        for i, answer, bare, better in zip(replies, answers, alone, informed):
            margins = {}
            for cue, logps in zip(cues, answer["suffixes"]):
                good = len(cue.good)
                margins[cue] = logsumexp(logps[:good]) - logsumexp(logps[good:])
            for c, method in wanted:
                own = c.cues_of(method)
                if method == "pmi":
                    gain = answer["reply"] - bare["reply"]
                    results[i][c.name, method] = gain / (len(replies[i]) + USUAL_TOKENS)
                elif method == "reference":
                    gain = better["reply"] - answer["reply"]
                    results[i][c.name, method] = gain / (len(replies[i]) + USUAL_TOKENS)
                elif method == "likelihood":
                    results[i][c.name, method] = answer["reply"] / len(replies[i])
                elif own:
                    results[i][c.name, method] = sum(margins[cue] for cue in own) / len(own)

    def _told(self, context: str, reference: str) -> list[int]:
        """Return the context after a good reply, of which the judge reads as much as of any; [] without."""
        if not reference:
            return []
        good = self.worker.tokenize(self.role, [f"A good reply: {reference.strip()}"])[0][:REPLY_TOKENS]
        return good + self.worker.tokenize(self.role, [f"\n\n{context}"])[0]

    def _read_in_chat(
        self, context: str, texts: dict[int, str], wanted: list, results: list[Numbers]
    ) -> None:
        """Read chat and likert of the replies in one context into `results`, in the judge's chat template."""
        before, after = self._template(context)
        digits = [self._ids(str(digit))[-1:] for digit in range(1, 6)]
        yes_or_no = [self._ids(word)[-1:] for word in ("Yes", "yes", "No", "no")]
        suffixes = []
        for c, method in wanted:
            # The blank belongs to the prompt: many tokenizers have no token for a blank and a digit.
            scale = "Answer with a number from 1 (not at all) to 5 (fully)."
            asked = f"How well does this hold: {c.description}? {scale}{after}Score: "
            if method == "chat":
                question = c.cues_of("ask")[0].text.strip().removesuffix("Answer:").strip()
                asked = f"{question} Answer with yes or no.{after}"
            words = yes_or_no if method == "chat" else digits
            suffixes.append((self.worker.tokenize(self.role, [f"\n\n{asked}"], special=True)[0], words))
        replies = self._fitting(texts, len(before) + sum(len(cue) + 5 for cue, _ in suffixes))
        if not replies:
            return
        answers = self.worker.branches(self.role, before, list(replies.values()), suffixes)
        for i, answer in zip(replies, answers):
            for (c, method), logps in zip(wanted, answer["suffixes"]):
                if method == "chat":
                    results[i][c.name, method] = logsumexp(logps[:2]) - logsumexp(logps[2:])
                    continue
                peak = max(logps)
                weights = [math.exp(x - peak) for x in logps]
                expected = sum(digit * weight for digit, weight in enumerate(weights, 1)) / sum(weights)
                results[i][c.name, method] = expected

    def _template(self, context: str) -> tuple[list[int], str]:
        """Return (ids up to the reply, the chat template's text after the user's turn)."""
        info, rendered = self.info, f"Here is a conversation and a reply of the listener.\n\n{MARK}\n"
        if info["template"]:
            turns = [{"role": "user", "content": rendered.strip("\n")}]
            rendered = render_template(info["template"], turns, info["bos_piece"], info["eos_piece"])
        if rendered.count(MARK) != 1:
            hint = "use method contrast or pmi"
            raise UserError(f"{self.path}: its chat template does not carry the user's text; {hint}")
        head, end = rendered.split(MARK)
        if end.rstrip().endswith("<think>"):  # some templates always open a thought (DeepSeek-R1's)
            end = end.rstrip() + "\n\n</think>\n\n"
        ids = self.worker.tokenize(self.role, [head], special=True)[0]
        ids += self.worker.tokenize(self.role, [context + " "])[0]  # untrusted text: without special tokens
        start = self._start()
        return (ids if ids[:1] == start else start + ids), end


def mixture(criterion: Criterion, row: Numbers) -> float | None:
    """Return the weighted sum of a criterion's raw numbers; None or a guard's word if one of them is that."""
    parts = [(row[criterion.name, method], weight) for method, weight in criterion.mix]
    raws = [raw for raw, _ in parts]
    if None in raws:
        return None
    return KNOWN_BAD if KNOWN_BAD in raws else sum(raw * weight for raw, weight in parts)


def weighted(scores: Scores, weights: dict[str, float]) -> float | None:
    """Return the mean over the criteria that carry weight and were asked; None if one of them is unknown."""
    carrying = {name: weight for name, weight in weights.items() if weight and name in scores}
    total = sum(carrying.values())
    if not total or any(scores.get(name) is None for name in carrying):
        return None
    return sum(weight * scores[name] for name, weight in carrying.items()) / total


def resolve_judge(judge: str) -> Path:
    """Return the file llama.cpp loads; the embedded Q4_1 is read as BF16, for its noise equals the signal."""
    return resolve_base(EMBEDDED).gguf(16) if judge == EMBEDDED else check_gguf(Path(judge))


def resolve_judge_lora(lora: str) -> Path | None:
    """Return the judge's LoRA file; None for "none"."""
    return None if lora == "none" else check_gguf(Path(lora))


def judge_sizes(judge: str) -> dict[str, int]:
    """Return what a memory plan needs of a judge; others have about as many tokens as Qwen's."""
    if judge != EMBEDDED:
        return {"judge_bytes": resolve_judge(judge).stat().st_size, "judge_vocabulary": 151_936}
    # A plan must not write the BF16 file only to weigh it: 2 bytes per weight instead of the packaged ones.
    return {"judge_bytes": read_gguf(embedded_gguf()).bf16_bytes(), "judge_vocabulary": 49_152}
