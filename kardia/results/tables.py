"""Lay out an evaluation, an exam and an export as tables: made once, printed on a terminal and in the report.

The numbers may come from a damaged file, so an unknown one is shown as a dash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kardia.core.console import printable
from kardia.results.run_files import fixed, number
from kardia.results.statistics import well_read

PREFERRED = 0.85  # share: a reader who reads well prefers written replies to a small model's
NOTHING = 1e-7  # KL under which training did not move the base at all
MOST = 50  # rows and columns of a table


@dataclass
class Cell:
    """One cell. The report also draws `mean`, its interval and `marks` from 0 to 1, and shows `detail`."""

    text: str
    detail: str = ""
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    marks: tuple = ()
    tone: str = ""  # "up" is good news, "down" is bad news


def _plain(text: str) -> str:
    """Return text for a terminal: a Windows console may not know the dash and the minus sign."""
    return printable(text).replace("–", "-").replace("−", "-")


@dataclass
class Table:
    """A title, one heading per column, and rows of texts or cells."""

    title: str
    head: list[str]
    rows: list[list[str | Cell]]

    def text(self) -> str:
        """Return the table for a terminal."""
        rows = [[cell.text if isinstance(cell, Cell) else cell for cell in row] for row in self.rows]
        rows = [[_plain(cell) for cell in row] for row in [self.head, *rows]]
        widths, lines = [max(map(len, column)) for column in zip(*rows)], []
        for first, *middle, last in rows:  # the last column may hold a long text
            cells = [cell.rjust(width) for cell, width in zip(middle, widths[1:])]
            lines.append("  ".join([first.ljust(widths[0]), *cells, last]).rstrip())
        return "\n".join(lines)


@dataclass
class Tables:
    """Tables that belong to one subject, and the sentences below them."""

    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return everything for a terminal."""
        parts = [table.text() for table in self.tables if table.rows]
        return "\n\n".join([*parts, "\n".join(map(_plain, self.notes))]).rstrip()


def percent(value, digits: int = 0) -> str:
    """Return a share as a percentage, or a dash if it is unknown."""
    known = number(value)
    return "–" if known is None else f"{known:.{digits}%}"


def _interval(entry: dict, show: Callable[..., str] = fixed, **how) -> str:
    if number(entry.get("low")) is None or number(entry.get("high")) is None:
        return ""
    return f" ({show(entry['low'], **how)} to {show(entry['high'], **how)})"


def _score(entry: dict | None, key: str, marks: tuple = (), more: str = "", show=fixed) -> Cell:
    """Return a mean with its interval, as text and as what the report draws."""
    entry = entry or {}
    mean = number(entry.get(key))
    if mean is None:
        return Cell("–")
    low, high = number(entry.get("low")), number(entry.get("high"))
    known = tuple(mark for mark in marks if number(mark) is not None)
    return Cell(f"{show(mean)}{_interval(entry, show)}{more}", mean=mean, low=low, high=high, marks=known)


TONES = {"up": "better", "down": "worse", "": "not told apart"}


def tone_of(entry: dict) -> str:
    """Return "up" or "down" if the interval excludes 0, else ""."""
    if (number(entry.get("low")) or 0) > 0:
        return "up"
    return "down" if (number(entry.get("high")) or 0) < 0 else ""


def trend_sentence(trend: dict | None) -> str:
    """Return in one sentence whether the reward of a GRPO run rose."""
    trend = trend or {}
    low, high, slope = (fixed(trend.get(key), 4, True, "") for key in ("low", "high", "slope_per_step"))
    if not low or not high:
        return "too few steps to tell whether the reward moved"
    words = {"up": "rose", "down": "fell", "": "did not rise by more than chance explains"}
    first, last = (fixed(trend.get(f"{part}_quarter"), 3) for part in ("first", "last"))
    words = (
        f"mean reward of the rollouts {words[tone_of(trend)]}: {first} in the first quarter, {last} in the"
    )
    return _plain(f"{words} last; slope {slope or '–'} per step (95% interval {low} to {high})")


def _difference(entry: dict | None) -> Cell:
    if entry is None or number(entry.get("mean")) is None:
        return Cell("–")
    text, tone = f"{fixed(entry['mean'], sign=True)}{_interval(entry, sign=True)}", tone_of(entry)
    return Cell(f"{text} {TONES[tone]}", tone=tone)


def pairs_of(summary: dict[str, Any]) -> dict[tuple[str, str], dict[str, dict]]:
    """Return {(model, other): {metric: its paired difference}} of evaluation.json, of at most MOST pairs."""
    pairs: dict[tuple[str, str], dict[str, dict]] = {}
    for entry in summary.get("differences") or []:
        pair = str(entry.get("better")), str(entry.get("than"))
        pairs.setdefault(pair, {})[str(entry.get("metric"))] = entry
    return dict(list(pairs.items())[:MOST])


def evaluation_table(summary: dict[str, Any]) -> Tables:
    """Return the tables of evaluation.json: means per model (95% interval), paired differences, win rates.

    Criteria stand also on the paper's scale from 1 to 5, which is 1 + 4 x score."""
    scores, rows = summary.get("metrics") or {}, []
    names = (summary.get("models") or list(scores))[:MOST]
    metrics = list(dict.fromkeys(m for name in names for m in scores.get(name) or {}))[:MOST]
    # Format, label and the user's own are no grades.
    shares = [metric for metric in summary.get("rewards") or metrics[:2] if metric != "rubric"]
    for metric in metrics:
        entries = [(scores.get(name) or {}).get(metric) or {} for name in names]
        grades = [1 + 4 * (number(entry.get("mean")) or 0.0) for entry in entries]
        fives = ["" if metric in shares else f" = {grade:.2f}/5" for grade in grades]
        cells = [_score(entry, "mean", more=five) for entry, five in zip(entries, fives)]
        rows.append([metric.replace("_", " "), *cells])
    pairs, wins = pairs_of(summary), []
    compared = list(dict.fromkeys(metric for entries in pairs.values() for metric in entries))[:MOST]
    gaps = [[m.replace("_", " "), *(_difference(each.get(m)) for each in pairs.values())] for m in compared]
    for entry in (summary.get("win_rate") or [])[:MOST]:
        rate = _score(entry, "rate", (0.5,), show=percent)
        wins.append(
            [f"{entry.get('model')} against {entry.get('against')}", rate, fixed(entry.get("ties"), 0)]
        )
    heads = ["metric", *(f"{better} minus {than}" for better, than in pairs)]
    judge = f", judge {summary['judge']}" if summary.get("judge") else ""
    about = f"{summary.get('prompts', '?')} held-out prompts{judge}. Scores are from 0 to 1."
    won = Table("Win rates on the rubric, half is a draw", ["comparison", "prompts won", "ties"], wins)
    gaps = Table("Paired differences, the same prompts", heads, gaps)
    written, notes = reference_table(summary.get("reference") or {}, names)
    seen = _witness_table(summary.get("witness") or {})
    shown = [Table("Scores", ["metric", *map(str, names)], rows), gaps, won, written, seen]
    return Tables(shown, [about, *notes] if rows else [])


def reference_table(reference: dict[str, dict], names: list) -> tuple[Table, list[str]]:
    """Return (how often written replies beat each model's, sentences about a judge that does not see it)."""
    models = [name for name in names if reference.get(name)]
    metrics = list(dict.fromkeys(metric for name in models for metric in reference[name]))[:MOST]
    rows, notes = [], []
    for metric in metrics:
        entries = [reference[name].get(metric) or {} for name in models]
        cells = [_score(e, "rate", (0.5,), f" of {e.get('n', '?')}", percent) for e in entries]
        rows.append([metric.replace("_", " "), *cells])
    for name in models:
        found = {metric: number(entry.get("rate")) for metric, entry in well_read(reference[name]).items()}
        lost = [m.replace("_", " ") for m, rate in found.items() if rate is not None and rate < 0.5]
        weak = [m.replace("_", " ") for m, rate in found.items() if rate is not None and rate < PREFERRED]
        if lost:
            why = "either the policy is over-optimized, or this judge reads nothing there"
            notes.append(f"{name} scores above the written replies on {', '.join(lost)}: {why}")
        elif weak:
            notes.append(f"written replies beat {name} in under {PREFERRED:.0%} on {', '.join(weak)}")
    title = "Reference test: where the judge read both, the written reply scores above the model's"
    return Table(title, ["written replies win", *map(str, models)], rows), notes


def _witness_table(witness: dict[str, dict]) -> Table:
    """Return the witness's mean scores per model; they are never rewarded."""
    models = list(witness)[:MOST]
    metrics = list(dict.fromkeys(metric for name in models for metric in witness[name]))[:MOST]
    rows = [
        [m.replace("_", " "), *(_score(witness[name].get(m), "mean") for name in models)] for m in metrics
    ]
    return Table("The witness's scores, which are never rewarded", ["witness", *map(str, models)], rows)


def _criterion_row(name: str, entry: dict) -> list[str | Cell]:
    baseline = entry.get("length_baseline")
    right, verdict = number(entry.get("correct")), Cell("")
    if "fit" in entry:
        verdict = Cell("fit", tone="up") if entry["fit"] else Cell(f"UNFIT: {entry.get('why')}", tone="down")
    # A tie counts half a point, so `right` may have a half.
    count = "" if right is None else f"{right:g} of {entry.get('n')}"
    accuracy = _score(entry, "accuracy", (0.5, baseline), show=percent)
    method, weight = str(entry.get("method") or ""), fixed(entry.get("weight"), none="")
    return [name.replace("_", " "), method, weight, count, accuracy, percent(baseline), verdict]


def _method_row(name: str, entry: dict, methods: list[str]) -> list[str | Cell]:
    """Return the accuracy of each method on one criterion, by length, the reference test, the witness."""
    marks = (0.5, entry.get("length_baseline"))
    tried = entry.get("methods") or {}
    row: list[str | Cell] = [name.replace("_", " ")]
    row += [_score(tried.get(method), "accuracy", marks, show=percent) for method in methods]
    for side in ("longer_better", "shorter_better"):
        part = (entry.get("length") or {}).get(side) or {}
        row.append(f"{percent(part.get('accuracy'))} of {part['n']}" if number(part.get("n")) else "–")
    row.append(_score(entry.get("reference"), "accuracy", (0.5, PREFERRED), show=percent))
    other = entry.get("witness") or {}
    method = f" by {other['method']}" if other.get("method") else ""
    return [*row, _score(other, "accuracy", (0.5,), method.replace("_", "-"), show=percent)]


def _exam_notes(result: dict) -> list[str]:
    notes, tries, repeat = [], result.get("canaries") or {}, result.get("repeatability") or {}
    n, alone, both = (number(tries.get(key)) for key in ("n", "held", "held_with_guards"))
    if n:
        failed = {
            str(text): sorted(set(map(str, names))) for text, names in (tries.get("failed") or {}).items()
        }
        raised = "".join(f"; {text!r} raised {', '.join(names)}" for text, names in failed.items())
        note = f"begging for a grade: the model alone raised no score in {fixed(alone, 0)} of {n:.0f} tries "
        note += f"({percent((alone or 0) / n)}); rules refuse {fixed(tries.get('refused'), 0)} of them, with "
        notes.append(f"{note}both {fixed(both, 0)} held ({percent((both or 0) / n)}){raised}")
    won = {n: number((e.get("reference") or {}).get("accuracy")) for n, e in result["criteria"].items()}
    weak = [name.replace("_", " ") for name, rate in won.items() if rate is not None and rate < PREFERRED]
    if weak:
        few = f"written replies beat a small model's in under {PREFERRED:.0%} of pairs on {', '.join(weak)}"
        notes.append(f"{few}: GRPO against this judge can learn to please it alone")
    gap = number(repeat.get("largest_difference"))
    if gap is not None:
        apart = "bit-identical" if gap == 0 else f"up to {gap:.2g} apart"
        replies = f"({repeat.get('replies', '?')} replies, all criteria)"
        notes.append(f"read twice, in another order: {apart} {replies}; each reply is read alone")
    return notes


def _cue_table(criteria: dict[str, dict]) -> Table:
    """Return how often the judge and the answer key side with the reply that has more of a cheap cue."""
    rows: list[list[str | Cell]] = []
    for cue in dict.fromkeys(cue for entry in criteria.values() for cue in entry.get("cues") or {}):
        found = [(entry.get("cues") or {}).get(cue) or {} for entry in criteria.values()]
        cells = [f"{percent(each.get('judge'))} ({percent(each.get('key'))})" for each in found]
        rows.append([str(cue), *cells])
    names = [name.replace("_", " ") for name in criteria]
    return Table(
        "The judge (the answer key) prefers the reply with more of a cheap cue",
        ["sides with more", *names],
        rows,
    )


LEANS = 0.65  # of an answer key towards a cue: passing such an exam may mean no more than the cue


def _leaning_key(criteria: dict[str, dict]) -> list[str]:
    """Return a sentence about cheap cues by which the answer key itself can be passed, if there are any."""
    leaning = []
    for name, entry in criteria.items():
        for cue, found in (entry.get("cues") or {}).items():
            n, key = number(found.get("n")), number(found.get("key"))
            if n is not None and n >= 20 and key is not None and max(key, 1 - key) >= LEANS:
                leaning.append(f"{cue} ({name.replace('_', ' ')}, {percent(key)} of {n:.0f})")
    if not leaning:
        return []
    return [
        f"the answer key itself sides with cheap cues: {', '.join(leaning)}: it certifies less than it says"
    ]


def people_table(people: list[dict]) -> Table:
    """Return the agreement with people per set and criterion: AUC, its interval, and the length's."""
    rows: list[list[str | Cell]] = []
    for entry in people[:MOST]:
        low, high = number(entry.get("low")), number(entry.get("high"))
        verdict = Cell("no better than a coin", tone="down")
        if low is not None and low > 0.5:
            verdict = Cell("agrees", tone="up")
        elif high is not None and high < 0.5:
            verdict = Cell("CONTRADICTS people", tone="down")
        name = f"{entry.get('set')}, {str(entry.get('criterion')).replace('_', ' ')}"
        value = _score(entry, "auc", (0.5, entry.get("length")))
        rows.append([name, fixed(entry.get("n"), 0), value, fixed(entry.get("length")), verdict])
    head = ["what people rated", "replies", "AUC (95% interval)", "longer wins", "verdict"]
    return Table("Agreement with people (AUC: 0.5 is a coin)", head, rows)


def exam_table(result: dict) -> Tables:
    """Return the exam: the verdict on each criterion, every method, cheap cues, what people say, and the
    attempts to fool the judge."""
    criteria = dict(list((result.get("criteria") or {}).items())[:MOST])
    rows = [_criterion_row(name, entry) for name, entry in criteria.items()]
    if result.get("overall"):
        *cells, accuracy, longer, _ = _criterion_row("overall", result["overall"])
        speed = number(result.get("scores_per_second")) or 0.0
        cells[3] = f"{result.get('pairs', '?')} pairs"
        # A judge on a CPU reads about one reply per second.
        speed = f"{speed:.2g}" if speed < 10 else f"{speed:.0f}"
        rows.append([*cells, accuracy, longer, "" if speed == "0" else f"{speed} scores per second"])
    methods = list(dict.fromkeys(m for entry in criteria.values() for m in entry.get("methods") or {}))[:MOST]
    tried = [_method_row(name, entry, methods) for name, entry in criteria.items() if entry.get("methods")]
    head = ["criterion", "method", "weight", "right", "accuracy (95% interval)", "longer wins", "verdict"]
    more = ["longer is better", "shorter is better", "written wins", "witness"]
    tables = [Table("", head, rows), Table("Every method", ["every method", *methods, *more], tried)]
    tables += [_cue_table(criteria), people_table(result.get("people") or [])]
    return Tables(tables, [*_leaning_key(criteria), *_exam_notes(result)] if rows else [])


WORDS = {"ok": ("ok", "up"), "noisy": ("NOISY", ""), "lost": ("LOST", "down"), "text": ("", "")}


def export_verdict(entry: dict) -> tuple[str, str]:
    """Return (word, tone) about one exported file. A file without a KL was not measured."""
    word, tone = WORDS.get(entry.get("verdict"), WORDS["ok"])
    if entry.get("ok") is False:
        return WORDS["lost"]
    if number(entry.get("kl")) is None and word:
        return "not measured", ""
    return word, tone


def _export_row(name: str, entry: dict) -> list[str | Cell]:
    kl, base, size = (number(entry.get(key)) for key in ("kl", "kl_base", "bytes"))
    word, tone = export_verdict(entry)
    of_training = None if kl is None or base is None else kl / max(base, NOTHING)
    sizes = [f"{size / 1e6:,.1f} MB" if (size or 0) >= 1e5 else "–", "–" if kl is None else f"{kl:.1e}"]
    shares = [percent(entry.get(key)) for key in ("kept", "agreement", "valid")]
    verdict = Cell(word, tone=tone, detail=str(entry.get("why") or ""))
    cells = [percent(of_training, 2), *shares, fixed(entry.get("rubric")), verdict]
    return [name, *sizes, *cells, str(entry.get("file") or entry.get("path") or "")]


def export_table(book: dict) -> Tables:
    """Return how far each exported file is from the trained model, and how its answers are judged."""
    trained, rows = book.get("trained") or {}, []
    formats = dict(list((book.get("formats") or {}).items())[:MOST])
    if number(trained.get("rubric")) is not None:
        rows.append(["(trained)", *[""] * 5, percent(trained.get("valid")), fixed(trained["rubric"]), "", ""])
    rows += [_export_row(name, entry) for name, entry in formats.items()]
    head = ["format", "size", "KL", "of training", "kept", "same token", "valid", "rubric", "verdict", "file"]
    return Tables([Table("", head, rows)] if formats else [])
