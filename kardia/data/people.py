"""Turn public sets of replies that people rated into rows that a judge can be compared with.

A row is {set, criterion, y, messages, response}: y is 1 where people rated the reply in the upper third of
the scale, 0 in the lower third; what lies between is counted and left out. Nothing is downloaded: the user
brings the files, whose licences stay with them.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kardia.core.console import UserError, one_line, shorten
from kardia.core.files import as_json_lines, checked_rows, write_text

LOW, HIGH = 1 / 3, 2 / 3  # of the scale
OVERALL = "overall"  # a rating of the whole reply: compared with the rubric's weighted score
USR_SCALES = {  # what was rated -> our criterion, the least and the highest grade
    "Natural": ("fluency", 1, 3),
    "Maintains Context": ("relevance", 1, 3),
    "Overall": (OVERALL, 1, 5),
}
USR_NAMES = {"pc": "usr-personachat", "tc": "usr-topicalchat"}  # by the first letters of the file's name
Counts = dict[tuple[str, str], Counter]  # {(set, criterion): {high, low, between}}


class Rated(NamedTuple):
    """One reply that people rated; the last turn is the person's, and speakers alternate."""

    set: str
    criterion: str
    rating: float  # 0 to 1 of the scale
    turns: list[str]
    reply: str

    def row(self) -> dict[str, Any]:
        """Return the reply as a row; y is 1 or 0."""
        roles = [("user", "assistant")[(len(self.turns) - i) % 2 == 0] for i in range(len(self.turns))]
        messages = [{"role": role, "content": turn} for role, turn in zip(roles, self.turns)]
        facts = {"set": self.set, "criterion": self.criterion, "y": int(self.rating >= HIGH)}
        return {**facts, "messages": messages, "response": self.reply}


def import_rated(source: str | Path, format: str, target: Path) -> Counts:
    """Write the replies of `source` that people rated clearly high or low to `target`; return the counts.

    Raises UserError if the file is not of the format or no reply of it can be used; `target` is then left as
    it was.
    """
    source, counts, rows = Path(source), {}, []
    if source.is_dir():
        raise UserError(f"{source}: a directory; name one file of the set")
    try:
        for rated in FORMATS[format](source):
            verdict = "high" if rated.rating >= HIGH else "low" if rated.rating <= LOW else "between"
            counts.setdefault((rated.set, rated.criterion), Counter())[verdict] += 1
            # A reply that people rated in the middle is neither good nor bad: AUC needs two sides.
            told = rated.reply.strip() and rated.turns and all(turn.strip() for turn in rated.turns)
            if verdict != "between" and told:
                rows.append(rated.row())
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or one_line(error)})") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        why = shorten(f"{type(error).__name__}: {one_line(error)}", 200)
        raise UserError(f"{source}: is no {format} file as it was published ({why})") from error
    if not rows:
        raise UserError(f"{source}: no reply in it that people rated clearly high or low")
    write_text(Path(target), as_json_lines(rows))
    return counts


def load_rated(path: Path, criteria: list[str]) -> list[dict]:
    """Return the rows of a file that `import_rated` wrote (or a user) about these criteria or the whole.

    Raises UserError with every flaw of the file, one line each.
    """
    expected = "set, criterion, response (texts), y (0 or 1) and messages [{role, content}] with a user's"
    hint = "file of rated replies; `data import` makes one"
    rows = checked_rows(path, _flaw, expected, hint)
    rows = [row for row in rows if row["criterion"] in (*criteria, OVERALL)]
    if not rows:
        raise UserError(f"{path}: no rated reply for {', '.join(criteria)} or {OVERALL}")
    return rows


def _flaw(row: Any) -> str:
    """Return what is not as a rated row must be, in a few words; "" if nothing is."""
    if not isinstance(row, dict):
        return type(row).__name__
    for key in ("set", "criterion", "response"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            return f"{key} = {shorten(row.get(key), 40)}"
    if isinstance(row.get("y"), bool) or row.get("y") not in (0, 1):
        return f"y = {shorten(row.get('y'), 40)}"
    try:
        turns = [(message["role"], message["content"]) for message in row["messages"]]
    except (KeyError, TypeError):
        turns = []
    known = all(role in ("user", "assistant", "system") and isinstance(text, str) for role, text in turns)
    if not known or not any(role == "user" for role, _ in turns):
        return f"messages = {shorten(row.get('messages'), 40)}"
    return ""


# ---------------------------------------------- readers: one per format, as it was published


def _epitome(path: Path) -> Iterator[Rated]:
    """One of EPITOME's three tables (Sharma et al. 2020): level 0, 1 or 2 of a way to show empathy."""
    name = f"epitome-{path.stem.removesuffix('-reddit')}"
    for row in _table(path, ("seeker_post", "response_post", "level"), ","):
        yield Rated(name, "empathy", float(row["level"]) / 2, [row["seeker_post"]], row["response_post"])


def _usr(path: Path) -> Iterator[Rated]:
    """A file of USR (Mehri and Eskenazi 2020): several people's ratings of each of several replies."""
    name = USR_NAMES.get(path.stem[:2], f"usr-{path.stem}")
    for item in _items(path):
        turns = [line.strip() for line in item["context"].splitlines() if line.strip()]
        for answer in item["responses"]:
            for key, (criterion, least, most) in USR_SCALES.items():
                rating = (statistics.fmean(answer[key]) - least) / (most - least)
                yield Rated(name, criterion, rating, turns, answer["response"].strip())


def _diasafety(path: Path) -> Iterator[Rated]:
    """A split of DiaSafety (Sun et al. 2022): a reply is Safe or Unsafe in its context."""
    for item in _items(path):
        rating = {"safe": 1.0, "unsafe": 0.0}[item["label"].lower()]
        yield Rated(f"diasafety-{path.stem}", "safety", rating, [item["context"]], item["response"])


def _grade(path: Path) -> Iterator[Rated]:
    """GRADE's human_judgement.json (Huang et al. 2020): several people's ratings of coherence, 1 to 5."""
    for item in _items(path):
        scores = item["HumanScores"]
        scores = json.loads(scores) if isinstance(scores, str) else scores
        name = "grade-" + item["Dataset"].lower().removesuffix("_eval")
        turns = [turn.strip() for turn in item["Context"].split("|||")]
        yield Rated(name, "relevance", (statistics.fmean(scores) - 1) / 4, turns, item["Response"])


def _cola(path: Path) -> Iterator[Rated]:
    """A split of CoLA (Warstadt et al. 2019): source, 1 or 0, the author's mark, a sentence; no header."""
    for row in _table(path, ("source", "label", "mark", "sentence"), "\t", header=False):
        yield Rated("cola", "fluency", float(row["label"]), ["Tell me something."], row["sentence"])


FORMATS = {"epitome": _epitome, "usr": _usr, "diasafety": _diasafety, "grade": _grade, "cola": _cola}


def _items(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON list."""
    items = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(items, list):
        raise ValueError("no list of records")
    return items


def _table(path: Path, columns: tuple[str, ...], delimiter: str, header: bool = True) -> Iterator[dict]:
    """Yield the rows of a table that has these columns."""
    quoting = csv.QUOTE_MINIMAL if header else csv.QUOTE_NONE  # a lone quotation mark is text in CoLA
    with open(path, encoding="utf-8-sig", newline="") as file:
        names = None if header else columns
        reader = csv.DictReader(file, names, delimiter=delimiter, quoting=quoting)
        if missing := [column for column in columns if column not in (reader.fieldnames or [])]:
            raise ValueError(f"no column {' or '.join(missing)}")
        for row in reader:
            if any(row[column] is None for column in columns):
                raise ValueError(f"line {reader.line_num} is too short")
            yield row
