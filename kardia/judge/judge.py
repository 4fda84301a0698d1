"""Asking a GGUF what it makes of a reply, without letting it write: every score is read off log-probabilities.

A reply is judged inside its dialogue. The context (profile, situation, turns) is decoded once, each reply once, and the
criteria hang off it as short branches: `Worker.branches`. Four methods, one number each, higher is better:

    ask        log p(" yes") - log p(" no") after a question about the reply
    contrast   log p(any good word) - log p(any bad word) after a cue, averaged over the criterion's cues
    pmi        (log p(reply | context) - log p(reply | nothing)) / tokens of the reply
    likert     expected digit of 1..5 after "Score: " in the judge's chat template

The exam (kardia/exam.py) chooses the method of each criterion and turns its raw number into a score between 0 and 1:
the probability that a reply with this number is the better one of an exam pair. Replies and dialogue are untrusted and
tokenized without special tokens; what no language model need be asked about is refused before (kardia/guards.py).
"""

from __future__ import annotations

import json
import math
import sqlite3
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

from kardia.data.rows import NO_PROFILE
from kardia.data.rubric import HELD_OUT
from kardia.judge.guards import guard
from kardia.llama.errors import LlamaError
from kardia.llama.sampling import logsumexp, sigmoid
from kardia.llama.worker import Worker
from kardia.models.chat_template import render_template

REPLY_TOKENS = 400  # a longer reply is judged by its beginning; answers here are about 40 tokens
KNOWN_BAD = -1e6  # the raw number of a reply that a guard refused; its score is 0
BIG = 1_000_000_000  # parameters from which `likert` is worth asking for; below, a model knows no digits (0.39 at 135M)
MARK = "\u0001"  # stands for untrusted text while a chat template is rendered; cannot occur in a template's own output


@dataclass(frozen=True)
class JudgedReply:
    """One reply in its dialogue. `messages` is the history, plain texts, ending with the user's turn."""

    person: str
    situation: str
    messages: tuple[tuple[str, str], ...]  # (role, text)
    reply: str

    @property
    def said(self) -> list[str]:
        """The person's own turns."""
        return [text for role, text in self.messages if role == "user"]

    @property
    def known(self) -> list[str]:
        """What else stands before the reply."""
        return [self.person, self.situation]

    @property
    def context(self) -> str:
        known = (("Profile", "" if self.person == NO_PROFILE else self.person), ("Situation", self.situation))
        head = "".join(
            f"{name}: {text}\n" for name, text in known if text
        )  # what is not known is not mentioned
        turns = "".join(
            f"{'User' if role == 'user' else 'Listener'}: {text}\n" for role, text in self.messages
        )
        return f"{head}\n{turns}Listener:" if head else f"{turns}Listener:"


@dataclass(frozen=True)
class Calibration:
    """score = sigmoid(slope * (raw - middle)); fitted on the exam so that raw numbers of any method mean the same."""

    slope: float = 1.0
    middle: float = 0.0

    def __call__(self, raw: float) -> float:
        return sigmoid(self.slope * (raw - self.middle))


class Scores:
    """Raw numbers that were read once, kept in a file: the key names judge, wording, context and reply. A cache, so whatever
    is wrong with the file (damage, a full disk, a lock) costs time and never a run."""

    def __init__(self, path: Path) -> None:
        self.file = None
        for attempt in range(2):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.file = sqlite3.connect(path, timeout=30, isolation_level=None)
                self.file.execute(
                    "create table if not exists scores (key blob primary key, raw real) without rowid"
                )
                return
            except (sqlite3.Error, OSError) as error:
                self.file = None
                if not any(word in str(error) for word in ("not a database", "malformed")):
                    return  # somebody else's lock is no damage: go on without
                for name in (path.name, f"{path.name}-journal", f"{path.name}-wal", f"{path.name}-shm"):
                    path.with_name(name).unlink(missing_ok=True)

    def get(self, keys: list[bytes]) -> dict[bytes, float]:
        found: dict[bytes, float] = {}
        try:
            for start in range(0, len(keys) if self.file else 0, 500):
                part = keys[start : start + 500]
                found.update(
                    self.file.execute(
                        f"select key, raw from scores where key in ({','.join('?' * len(part))})", part
                    )
                )
        except sqlite3.Error:
            self.file = None
        return found

    def put(self, rows: list[tuple[bytes, float]]) -> None:
        try:
            if self.file and rows:
                self.file.execute("begin")
                self.file.executemany("insert or replace into scores values (?, ?)", rows)
                self.file.execute("commit")
        except sqlite3.Error:
            self.file = None


def judge_code_hash() -> str:
    """Hash of the code between a reply and its number: what was read by other code is read again."""
    here = Path(__file__).parent
    return blake2b(
        b"".join((here / name).read_bytes() for name in ("judge.py", "guards.py", "exam.py")), digest_size=8
    ).hexdigest()


class Judge:
    """A judge GGUF behind the worker, with a LoRA or without. `rubric.criteria` gives name, methods and wording of each criterion.

    `identity` names the weights (their hash); with a `cache` file, numbers of that judge are read only once.
    """

    def __init__(
        self,
        worker: Worker,
        path,
        rubric,
        gpu_layers: int = 0,
        role: str = "judge",
        lora=None,
        identity: str = "",
        cache: Path | None = None,
    ) -> None:
        self.worker, self.rubric, self.role = worker, rubric, role
        self.info = worker.load(role, path, gpu_layers)
        worker.set_lora(role, lora)
        self.path, self.lora, self.identity = str(path), lora, identity
        self.calibration: dict[str, Calibration] = {}
        self.other_words: dict[
            str, Calibration
        ] = {}  # of the held-out questions; empty until the exam says what they are worth
        self.method: dict[str, str] = {}  # the exam's choice; without one the first that suits the judge
        self.cache = Scores(cache) if cache and identity else None
        self._reading = judge_code_hash()
        self._tokens: dict[str, list[int]] = {}

    def _ids(self, text: str) -> list[int]:
        if text not in self._tokens:
            self._tokens[text] = self.worker.tokenize(self.role, [text])[0]
        return self._tokens[text]

    def _start(self) -> list[int]:
        return [self.info["bos"]] if self.info["add_bos"] else []

    def candidates(self, criterion) -> tuple[str, ...]:
        """The criterion's methods that suit this judge: with a LoRA the question it was taught, else a big one's digits or a
        small one's words; what is left if nothing suits."""
        if self.lora and "ask" in criterion.methods:
            return ("ask",)
        suits = tuple(m for m in criterion.methods if m != "likert" or self.info["n_params"] >= BIG)
        return suits or criterion.methods

    def chosen(self, criterion) -> str:
        return self.method.get(criterion.name) or self.candidates(criterion)[0]

    def raw(self, items: list[JudgedReply]) -> list[dict[str, float | None]]:
        """Raw number per item and criterion by the chosen method; None where the judge cannot tell."""
        numbers = self.numbers(items, [(c, self.chosen(c)) for c in self.rubric.criteria])
        return [{name: raw for (name, _), raw in row.items()} for row in numbers]

    def numbers(
        self, items: list[JudgedReply], wanted: list[tuple], cached: bool = True, guarded: bool = True
    ) -> list[dict[tuple[str, str], float | None]]:
        """Per item {(criterion name, method): raw number}; None where the context is too long, KNOWN_BAD where a guard refused
        (`guarded` False: the model alone is asked, as the exam does)."""
        results: list[dict[tuple[str, str], float | None]] = [
            dict.fromkeys((c.name, m) for c, m in wanted) for _ in items
        ]
        keys = (
            {(i, c.name, m): self._key(item, c, m) for i, item in enumerate(items) for c, m in wanted}
            if self.cache and cached
            else {}
        )
        known = self.cache.get(list(keys.values())) if keys else {}
        groups: dict[str, list[int]] = {}
        for i, item in enumerate(items):
            if guarded and guard(item.reply, item.said, item.known):
                results[i] = dict.fromkeys(results[i], KNOWN_BAD)
            elif keys and all(keys[i, c.name, m] in known for c, m in wanted):
                results[i] = {(c.name, m): known[keys[i, c.name, m]] for c, m in wanted}
            else:
                groups.setdefault(item.context, []).append(i)
        plain, likert = [(c, m) for c, m in wanted if m != "likert"], [c for c, m in wanted if m == "likert"]
        for context, members in groups.items():  # one prefix, all its replies
            if plain:
                self._read_plain(context, members, items, plain, results)
            if likert:
                self._read_likert(items[members[0]], members, items, likert, results)
        if keys and groups:
            fresh = {
                keys[i, name, m]: raw
                for members in groups.values()
                for i in members
                for (name, m), raw in results[i].items()
                if raw is not None
            }
            self.cache.put(list(fresh.items()))
        return results

    def _key(self, item: JudgedReply, criterion, method: str) -> bytes:
        wording = (
            criterion.description
            if method == "likert"
            else [asdict(cue) for cue in criterion.cues_of(method)]
        )
        return blake2b(
            json.dumps([self._reading, self.identity, method, wording, item.context, item.reply]).encode(),
            digest_size=16,
        ).digest()

    def _fits(self, *lengths: int) -> bool:
        return sum(lengths) <= self.info["n_ctx_train"]

    def _read_plain(self, context, members, items, wanted, results) -> None:
        prefix = self._start() + self.worker.tokenize(self.role, [context])[0]
        replies = [
            ids[:REPLY_TOKENS]
            for ids in self.worker.tokenize(self.role, [f" {items[i].reply.strip()}" for i in members])
        ]
        cues = list(
            dict.fromkeys(cue for c, method in wanted for cue in c.cues_of(method))
        )  # a cue shared by criteria is asked once
        suffixes = [
            (self._ids(cue.text), [self._ids(word) for word in (*cue.good, *cue.bad)]) for cue in cues
        ]
        tail = sum(len(cue) + sum(map(len, words)) for cue, words in suffixes)
        fits = [
            row for row, reply in enumerate(replies) if self._fits(len(prefix), len(reply), tail)
        ]  # each by itself: a score never hangs on its neighbours
        members, replies = [members[row] for row in fits], [replies[row] for row in fits]
        if not members:
            return
        pmi = [c.name for c, method in wanted if method == "pmi"]
        answers = self.worker.branches(self.role, prefix, replies, suffixes, score_reply=bool(pmi))
        alone = (
            self.worker.branches(
                self.role, self._start() + self._ids("Listener:"), replies, [], score_reply=True
            )
            if pmi
            else []
        )
        for row, (i, answer) in enumerate(zip(members, answers)):
            margins = {
                cue: logsumexp(logps[: len(cue.good)]) - logsumexp(logps[len(cue.good) :])
                for cue, logps in zip(cues, answer["suffixes"])
            }
            for c, method in wanted:
                if own := c.cues_of(method):
                    results[i][c.name, method] = sum(margins[cue] for cue in own) / len(own)
            for name in pmi:
                results[i][name, "pmi"] = (answer["reply"] - alone[row]["reply"]) / len(replies[row])

    def _read_likert(self, item, members, items, criteria, results) -> None:
        before, between, after = self._template(item.context)
        replies = [
            ids[:REPLY_TOKENS]
            for ids in self.worker.tokenize(self.role, [items[i].reply.strip() for i in members])
        ]
        digits = [[self.worker.tokenize(self.role, [str(d)])[0][-1]] for d in range(1, 6)]
        suffixes = []
        for criterion in criteria:
            question = f"\n\nHow well does this hold: {criterion.description}? Answer with a number from 1 (not at all) to 5 (fully)."
            text = self.worker.tokenize(self.role, [between + question + after + "Score: "], special=True)[0]
            suffixes.append((text, digits))
        fits = [
            row
            for row, reply in enumerate(replies)
            if self._fits(len(before), len(reply), sum(len(cue) + 5 for cue, _ in suffixes))
        ]
        members, replies = [members[row] for row in fits], [replies[row] for row in fits]
        if not members:
            return
        for i, answer in zip(members, self.worker.branches(self.role, before, replies, suffixes)):
            for criterion, logps in zip(criteria, answer["suffixes"]):
                peak = max(logps)
                weights = [math.exp(x - peak) for x in logps]
                results[i][criterion.name, "likert"] = sum(d * w for d, w in enumerate(weights, 1)) / sum(
                    weights
                )

    def _template(self, context: str) -> tuple[list[int], str, str]:
        """(ids up to the reply, our text right after the reply, the template's end of the user turn). Untrusted text is tokenized apart."""
        intro = "Here is a conversation and a reply of the listener.\n\n"
        message = f"{intro}{MARK}{MARK}"
        text = self.info["template"]
        if text:
            rendered = render_template(
                text, [{"role": "user", "content": message}], self.info["bos_piece"], self.info["eos_piece"]
            )
        else:
            rendered = message + "\n"
        try:
            head, _, end = rendered.split(MARK)
        except ValueError:
            raise LlamaError(
                f"{self.path}: its chat template does not carry the user's text; use method contrast or pmi"
            ) from None
        if end.rstrip().endswith(
            "<think>"
        ):  # templates that open a thought whatever they are told (DeepSeek-R1's)
            end = end.rstrip() + "\n\n</think>\n\n"
        ids = (
            self.worker.tokenize(self.role, [head], special=True)[0]
            + self.worker.tokenize(self.role, [context + " "])[0]
        )
        start = self._start()
        return (ids if ids[:1] == start else start + ids), "", end

    def scores(self, items: list[JudgedReply]) -> list[dict[str, float | None]]:
        """Scores between 0 and 1 per item and criterion, None where the judge cannot tell, 0 where a guard knows better."""
        out = []
        for item, raw in zip(items, self.raw(items)):
            out.append(
                {
                    name: x
                    if x is None
                    else 0.0
                    if x == KNOWN_BAD
                    else self.calibration.get(name, Calibration())(x)
                    for name, x in raw.items()
                }
            )
        return out

    def held_out_scores(self, items: list[JudgedReply]) -> list[dict[str, float | None]]:
        """The same replies asked for in the words that are never rewarded: {criterion: 0..1}, None where the judge cannot tell."""
        asked = [(c, HELD_OUT) for c in self.rubric.criteria if c.name in self.other_words]
        return (
            [
                {
                    name: x if x is None else 0.0 if x == KNOWN_BAD else self.other_words[name](x)
                    for (name, _), x in row.items()
                }
                for row in self.numbers(items, asked)
            ]
            if asked
            else []
        )


def weighted(scores: dict[str, float | None], weights: dict[str, float]) -> float | None:
    """The rubric score: weighted mean over the criteria that carry weight; None as soon as one of them is unknown."""
    total = sum(weights.values())
    if not total or any(scores.get(name) is None for name, weight in weights.items() if weight):
        return None
    return sum(weight * scores[name] for name, weight in weights.items() if weight) / total
