"""Asking a GGUF what it makes of a reply, without letting it write: every score is read off log-probabilities.

A reply is judged inside its dialogue. The context (profile, situation, turns) is decoded once, each reply once, and the
criteria hang off it as short branches: `Worker.branches`. Three methods, one number each, higher is better:

    contrast   log p(any good word) - log p(any bad word) after a cue, averaged over the criterion's cues
    pmi        (log p(reply | context) - log p(reply | nothing)) / tokens of the reply
    likert     expected digit of 1..5 after "Score: " in the judge's chat template

The exam (kardia/exam.py) turns the raw number into a score between 0 and 1: the probability that a reply with this
number is the better one of an exam pair. Replies and dialogue are untrusted and tokenized without special tokens.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from kardia.llama import LlamaError, Worker, logsumexp, sigmoid

REPLY_TOKENS = 400  # a longer reply is judged by its beginning; answers here are about 40 tokens
KNOWN_BAD = -1e6  # the raw number of a reply that a guard refused; its score is 0
MARK = "\u0001"  # stands for untrusted text while a chat template is rendered; cannot occur in a template's own output


@dataclass(frozen=True)
class Item:
    """One reply in its dialogue. `messages` is the history, plain texts, ending with the user's turn."""

    person: str
    situation: str
    messages: tuple[tuple[str, str], ...]  # (role, text)
    reply: str

    @property
    def context(self) -> str:
        turns = "".join(f"{'User' if role == 'user' else 'Listener'}: {text}\n" for role, text in self.messages)
        return f"Profile: {self.person}\nSituation: {self.situation}\n\n{turns}Listener:"


@dataclass(frozen=True)
class Calibration:
    """score = sigmoid(slope * (raw - middle)); fitted on the exam so that raw numbers of any method mean the same."""

    slope: float = 1.0
    middle: float = 0.0

    def __call__(self, raw: float) -> float:
        return sigmoid(self.slope * (raw - self.middle))


class Judge:
    """A judge GGUF behind the worker. `rubric.criteria` gives name, description, method and cues of each criterion."""

    def __init__(self, worker: Worker, path, rubric, gpu_layers: int = 0, role: str = "judge") -> None:
        self.worker, self.rubric, self.role = worker, rubric, role
        self.info = worker.load(role, path, gpu_layers)
        self.path = str(path)
        self.calibration: dict[str, Calibration] = {}
        self._tokens: dict[str, list[int]] = {}

    def _ids(self, text: str) -> list[int]:
        if text not in self._tokens:
            self._tokens[text] = self.worker.tokenize(self.role, [text])[0]
        return self._tokens[text]

    def _start(self) -> list[int]:
        return [self.info["bos"]] if self.info["add_bos"] else []

    def raw(self, items: list[Item], only: str | None = None) -> list[dict[str, float | None]]:
        """Raw numbers per item and criterion (or of the one criterion `only`); None where the judge cannot tell (context too long)."""
        criteria = [c for c in self.rubric.criteria if only in (None, c.name)]
        results: list[dict[str, float | None]] = [dict.fromkeys(c.name for c in criteria) for _ in items]
        groups: dict[str, list[int]] = {}
        for i, item in enumerate(items):
            if guard(item):
                results[i] = dict.fromkeys(results[i], KNOWN_BAD)
            else:
                groups.setdefault(item.context, []).append(i)
        plain = [c for c in criteria if c.method in ("contrast", "pmi")]
        likert = [c for c in criteria if c.method == "likert"]
        for context, members in groups.items():  # one prefix, all its replies
            if plain:
                self._raw_plain(context, members, items, plain, results)
            if likert:
                self._raw_likert(items[members[0]], members, items, likert, results)
        return results

    def _fits(self, *lengths: int) -> bool:
        return sum(lengths) <= self.info["n_ctx_train"]

    def _raw_plain(self, context, members, items, criteria, results) -> None:
        prefix = self._start() + self.worker.tokenize(self.role, [context])[0]
        replies = [ids[:REPLY_TOKENS] for ids in self.worker.tokenize(self.role, [f" {items[i].reply.strip()}" for i in members])]
        cues = list(dict.fromkeys(cue for c in criteria if c.method == "contrast" for cue in c.cues))  # a cue shared by criteria is asked once
        suffixes = [(self._ids(cue.text), [self._ids(word) for word in (*cue.good, *cue.bad)]) for cue in cues]
        tail = sum(len(cue) + sum(map(len, words)) for cue, words in suffixes)
        if not self._fits(len(prefix), max(map(len, replies)), tail):
            return
        pmi = [c.name for c in criteria if c.method == "pmi"]
        answers = self.worker.branches(self.role, prefix, replies, suffixes, score_reply=bool(pmi))
        alone = self.worker.branches(self.role, self._start() + self._ids("Listener:"), replies, [], score_reply=True) if pmi else []
        for row, (i, answer) in enumerate(zip(members, answers)):
            margins = {cue: logsumexp(logps[: len(cue.good)]) - logsumexp(logps[len(cue.good) :]) for cue, logps in zip(cues, answer["suffixes"])}
            for c in criteria:
                if c.method == "contrast":
                    results[i][c.name] = sum(margins[cue] for cue in c.cues) / len(c.cues)
            for name in pmi:
                results[i][name] = (answer["reply"] - alone[row]["reply"]) / len(replies[row])

    def _raw_likert(self, item, members, items, criteria, results) -> None:
        before, between, after = self._template(item.context)
        replies = [ids[:REPLY_TOKENS] for ids in self.worker.tokenize(self.role, [items[i].reply.strip() for i in members])]
        digits = [[self.worker.tokenize(self.role, [str(d)])[0][-1]] for d in range(1, 6)]
        suffixes = []
        for criterion in criteria:
            question = f"\n\nHow well does this hold: {criterion.description}? Answer with a number from 1 (not at all) to 5 (fully)."
            text = self.worker.tokenize(self.role, [between + question + after + "Score: "], special=True)[0]
            suffixes.append((text, digits))
        if not self._fits(len(before), max(map(len, replies)), sum(len(cue) + 5 for cue, _ in suffixes)):
            return
        for i, answer in zip(members, self.worker.branches(self.role, before, replies, suffixes)):
            for criterion, logps in zip(criteria, answer["suffixes"]):
                peak = max(logps)
                weights = [math.exp(x - peak) for x in logps]
                results[i][criterion.name] = sum(d * w for d, w in enumerate(weights, 1)) / sum(weights)

    def _template(self, context: str) -> tuple[list[int], str, str]:
        """(ids up to the reply, our text right after the reply, the template's end of the user turn). Untrusted text is tokenized apart."""
        intro = "Here is a conversation and a reply of the listener.\n\n"
        message = f"{intro}{MARK}{MARK}"
        text = self.info["template"]
        if text:
            rendered = render_template(text, [{"role": "user", "content": message}], self.info["bos_piece"], self.info["eos_piece"])
        else:
            rendered = message + "\n"
        try:
            head, _, end = rendered.split(MARK)
        except ValueError:
            raise LlamaError(f"{self.path}: its chat template does not carry the user's text; use method contrast or pmi") from None
        ids = self.worker.tokenize(self.role, [head], special=True)[0] + self.worker.tokenize(self.role, [context + " "])[0]
        start = self._start()
        return (ids if ids[:1] == start else start + ids), "", end

    def scores(self, items: list[Item]) -> list[dict[str, float | None]]:
        """Scores between 0 and 1 per item and criterion, None where the judge cannot tell, 0 where a guard knows better."""
        out = []
        for item, raw in zip(items, self.raw(items)):
            out.append({name: x if x is None else 0.0 if x == KNOWN_BAD else self.calibration.get(name, Calibration())(x) for name, x in raw.items()})
        return out


def guard(item: Item) -> str | None:
    """What no language model needs to be asked about: an empty reply, and one that hands the user's own words back
    (more than half of its three-word runs), which a likelihood would love. Such a reply gets the lowest score."""
    words = re.findall(r"[\w']+", item.reply.lower())
    if not words:
        return "empty"
    said = re.findall(r"[\w']+", " ".join(text for role, text in item.messages if role == "user").lower())
    runs = {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
    if runs and len(runs & {tuple(said[i : i + 3]) for i in range(len(said) - 2)}) > len(runs) / 2:
        return "echo"
    return None


def render_template(template: str, messages: list[dict[str, str]], bos: str, eos: str) -> str:
    """A GGUF's chat template, rendered in Jinja's sandbox (it is a stranger's program). Thinking is closed before the score."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals.update(raise_exception=refuse)
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos, enable_thinking=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise LlamaError(f"the judge's chat template cannot be rendered ({str(error).splitlines()[0]})") from error


def weighted(scores: dict[str, float | None], weights: dict[str, float]) -> float | None:
    """The rubric score: weighted mean over the criteria that carry weight; None as soon as one of them is unknown."""
    total = sum(weights.values())
    if not total or any(scores.get(name) is None for name, weight in weights.items() if weight):
        return None
    return sum(weight * scores[name] for name, weight in weights.items() if weight) / total
