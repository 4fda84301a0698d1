"""Turn public data sets into our rows: KardiaBench, EmpatheticDialogues and ESConv become our JSONL.

KardiaBench gives dialogues, which end in a four-span assistant turn. The other two give GRPO prompts: one
user turn, no profile. Each row is written before the next record is read, so memory does not grow with the
file. What cannot be used is counted under its reason and listed in `<target>.skipped.txt`. Licences stay with
the data: KardiaBench is cc-by-nc-nd-4.0, ESConv is for research only: converted rows must not be passed on.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from kardia.core.console import UserError, one_line, shorten
from kardia.core.files import temporary_path
from kardia.data.rows import NO_PROFILE
from kardia.data.rubric import DEFAULT_FORMAT

FORMATS = {  # name -> the files that are read of a directory; ESConv's own folder holds other JSON beside it
    "kardiabench": ("*.jsonl", "*.json", "*.parquet"),
    "empatheticdialogues": ("train.csv", "valid.csv", "test.csv"),
    "esconv": ("ESConv.json",),
}
HUB_IDS = ("Jhcircle/KardiaBench", "Jhcircle/KadiaBench")  # published under both spellings
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of `datasets`
CSV_HEADER = "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags"
ESCONV_NOUNS = "anxiety nervousness depression sadness anger fear shame disgust guilt jealousy".split()
ADJECTIVES = "anxious anxious sad sad angry afraid ashamed disgusted guilty jealous".split()  # our labels
ESCONV_LABELS = dict(zip(ESCONV_NOUNS, ADJECTIVES))
ESCONV_ROLES = {"seeker": "user", "usr": "user", "supporter": "assistant", "sys": "assistant"}
SPANS = DEFAULT_FORMAT.names  # KardiaBench has the same
ANY_TAG = re.compile(r"</?(?:{0})>|<\|(?:{0})_(?:begin|end)\|>".format("|".join(SPANS)))
ANSWERS = [  # a whole answer, in our markers and in those of the dataset card
    re.compile(r"\s*".join(form.format(span) for span in SPANS), re.DOTALL)
    for form in (r"<\|{0}_begin\|>(.*?)<\|{0}_end\|>", r"<{0}>(.*?)</{0}>")
]
LONGEST = 4 << 20  # characters of one line: no dialogue has as many
LARGEST_LIST = 512 << 20  # bytes of a JSON list, which is read whole; the published one has 20 MB


class _Skip(Exception):
    """One record that cannot be used: (reason, detail, unmapped label)."""

    def __init__(self, reason: str, detail: Any = "", label: str | None = None):
        self.reason, self.detail, self.label = reason, shorten(detail, 100), label


@dataclass
class ImportReport:
    """What was written and what was not, by reason, with the place of each."""

    rows: int = 0
    prompts: int = 0  # rows that end in a user turn; the others end in a four-span assistant turn
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> count
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> its first five places
    unmapped: Counter[str] = field(default_factory=Counter)  # label that no alias is known for -> count
    files: dict[str, int] = field(default_factory=dict)  # file -> rows from it
    skipped_list: Path | None = None  # the file that lists every skipped record, if there is any

    @property
    def dialogues(self) -> int:
        """Return the number of rows that end in a four-span assistant turn."""
        return self.rows - self.prompts

    def skip(self, place: str, error: _Skip) -> str:
        """Count a record that cannot be used; return its line for the list."""
        self.skipped[error.reason] += 1
        if self.skipped[error.reason] <= 5:
            example = f"{place}: {error.detail}".rstrip(": ")
            self.examples.setdefault(error.reason, []).append(example)
        # A file may hold a million different labels; the report of them stays small.
        if error.label is not None and (error.label in self.unmapped or len(self.unmapped) < 1000):
            self.unmapped[error.label] += 1
        return f"{place}: {error.reason}: {error.detail}".rstrip(": ") + "\n"


def import_dataset(
    source: str | Path, format: str, target: Path, emotions: dict[str, str], on_progress=None, split="all"
) -> ImportReport:
    """Convert `source` (a file, a directory, or KardiaBench's hub id) to rows in `target`, a JSONL file.

    `emotions` maps every lower-case label or alias to a label; `on_progress` receives (bytes done, of all).
    `split` other than "all" reads only the files of a directory that have it in their name. `target` and the
    list of skipped records are renamed when complete: a failure leaves older ones as they were.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {shorten(format, 100)!r}: use one of {', '.join(FORMATS)}")
    target, paths, report = Path(target), _locate(source, format, split), ImportReport()
    if target.is_dir() or target.resolve() in [path.resolve() for path in paths]:
        raise UserError(f"{target}: a directory or the source itself cannot be the target: name another file")
    skipped = target.with_name(f"{target.name}.skipped.txt")
    temporary, temporary_skipped = temporary_path(target), temporary_path(skipped)
    total, done = sum(path.stat().st_size for path in paths), 0
    try:
        with open(temporary, "wb") as out, open(temporary_skipped, "wb") as listing:
            for path in paths:
                before = report.rows
                for position in _convert(path, format, emotions, report, out, listing):
                    if on_progress:
                        on_progress(done + position, total)
                report.files[str(path)] = report.rows - before
                done += path.stat().st_size
        if not report.rows:
            top = [f"{n} x {why} ({report.examples[why][0]})" for why, n in report.skipped.most_common(3)]
            unusable = f"none of its {report.skipped.total()} records can be used: {'; '.join(top)}"
            raise UserError(f"{source}: {unusable if top else 'no rows in it'}")
        skipped.unlink(missing_ok=True)  # an earlier import's list is not this one's
        if report.skipped:
            report.skipped_list = temporary_skipped.replace(skipped)
        temporary.replace(target)
    except OSError as error:  # a full disk's error names no file
        raise UserError(f"{error.filename or target}: {error.strerror or one_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)
        temporary_skipped.unlink(missing_ok=True)
    return report


def _convert(path: Path, format: str, emotions: dict, report: ImportReport, out, listing) -> Iterator[int]:
    """Write usable records as rows to `out`, count and list the others. Yield the bytes read so far."""
    to_row = {"kardiabench": _kardia_row, "empatheticdialogues": _opening_row, "esconv": _esconv_row}[format]
    with open(path, "rb") as stream:
        for number, (place, record) in enumerate(_records(stream, path, format)):
            if number % 64 == 0:
                yield stream.tell()
            try:
                if isinstance(record, _Skip):
                    raise record
                if not isinstance(record, dict):
                    raise _Skip("record is not a JSON object", record)
                row = to_row(record, emotions)
                out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            except (_Skip, UnicodeEncodeError) as error:
                if isinstance(error, UnicodeEncodeError):
                    error = _Skip("a text is not UTF-8 (convert the file) or holds half a surrogate pair")
                listing.write(report.skip(f"{path.name}{place}", error).encode(errors="replace"))
                continue
            report.rows += 1
            report.prompts += row["messages"][-1]["role"] == "user"
    yield path.stat().st_size


def _locate(source: str | Path, format: str, split: str) -> list[Path]:
    """Return the files to read. Raise UserError where there is none."""
    path = Path(source).expanduser()
    is_hub_id = path.as_posix().lower() in [name.lower() for name in HUB_IDS]
    if format == "kardiabench" and is_hub_id and not path.exists():
        path = _download()
    if not path.exists():
        raise UserError(f"{path}: no such file or directory (KardiaBench has the hub id {HUB_IDS[0]})")
    if not path.is_dir():
        return [path]
    hits = [hit for pattern in FORMATS[format] for hit in sorted(path.rglob(pattern)) if hit.is_file()]
    shown = [hit for hit in hits if "/." not in f"/{hit.relative_to(path).as_posix()}"]  # nothing hidden
    hits = [hit for hit in shown if hit.name not in METADATA]
    if not hits:
        raise UserError(f"{path}: no {' or '.join(FORMATS[format])} in this directory")
    paths = [hit for hit in hits if split == "all" or split.lower() in hit.name.lower()]
    if not paths:
        names = shorten(", ".join(hit.name for hit in hits), 100)
        raise UserError(f"{path}: no file with {split!r} in its name (there are {names}): change --split")
    return paths


def _download() -> Path:
    """Return the local copy of the hub data set. It is gated, so the error says what to do."""
    import huggingface_hub

    wanted, failures = list(FORMATS["kardiabench"]), []
    for name in HUB_IDS:
        try:
            return Path(huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns=wanted))
        except Exception as error:  # httpx's and the hub's errors have no other base in common
            failures.append(f"{name}: cannot be downloaded ({type(error).__name__}: {one_line(error)})")
    download = f"hf download {HUB_IDS[0]} --repo-type dataset --local-dir kardiabench"
    raise UserError(
        f"{failures[0]}: access is gated, so accept the conditions on the dataset's page with your account,"
        " run `hf auth login`, and check the network and HF_HUB_OFFLINE; or on a machine where that works"
        f" run `{download}`, bring that folder here and import it"
    )


# ---------------------------------------------- readers: stream -> (place in the file, record or _Skip)


def _records(stream: BinaryIO, path: Path, format: str) -> Iterator[tuple[str, Any]]:
    head = stream.read(4096)
    stream.seek(0)
    if head.startswith(b"PAR1") and format == "kardiabench":
        return _parquet(stream, path)
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"PAR1")) or b"\0" in head:
        raise UserError(f"{path}: a binary file, expected UTF-8 text: unpack or convert it first")
    # Only a line feed ends a line: neither U+2028 nor a lone CR does. A byte that is not UTF-8 becomes half a
    # surrogate pair, which no row can hold: that record is skipped, and its place is known.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    if format == "empatheticdialogues":
        return _conversations(text, path)
    is_list = head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return _json_list(text, path) if is_list else _json_lines(text, path)


def _lines(stream: TextIO, path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(iter(lambda: stream.readline(LONGEST + 1), ""), 1):
        if len(line) > LONGEST:
            raise UserError(f"{path}:{number}: a line over {LONGEST >> 20} MB")
        if line.strip():
            yield f":{number}", line.strip("\r\n")


def _json_lines(stream: TextIO, path: Path) -> Iterator[tuple[str, Any]]:
    for place, line in _lines(stream, path):
        try:
            yield place, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield place, _Skip("malformed JSON", str(error))


def _json_list(stream: TextIO, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the elements of one JSON list. A flaw hides everything after it, so it ends the import."""
    if path.stat().st_size > LARGEST_LIST:
        limit = f"a JSON list over {LARGEST_LIST >> 20} MB"
        raise UserError(f"{path}: {limit}: convert it to JSONL, one record per line")
    try:
        records = json.load(stream)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: malformed JSON list ({one_line(error)}): a torn download?") from None
    for number, record in enumerate(records, 1):
        yield f": record {number}", record


def _parquet(stream: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # One row group at a time, through a small buffer: else pyarrow keeps the whole file in memory.
        with pyarrow.parquet.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False) as table:
            for group in range(table.metadata.num_row_groups):
                for batch in table.iter_batches(batch_size=16, row_groups=[group], use_threads=False):
                    # A text that stands once in a dictionary is copied into each row that names it.
                    if batch.nbytes > 4 * LONGEST:
                        raise UserError(f"{path}: row {number + 1}: 16 rows of over {LONGEST >> 18} MB")
                    for record in batch.to_pylist():
                        number += 1
                        yield f": row {number}", record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        flaw = f"not a readable parquet file ({one_line(error)})"
        raise UserError(f"{path}: row {number + 1}: {flaw}") from error


def _conversations(stream: TextIO, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield one record per conversation of EmpatheticDialogues: its emotion, situation and first user turn.

    The files are not quoted CSV: a text never holds a comma (it says `_comma_`) but may hold stray quotes, so
    a plain split is right and the csv module is wrong. Trailing fields may be missing or be too many.
    """
    lines, name, start, record = _lines(stream, path), None, "", {}
    header = next(lines, ("", ""))[1].strip()
    if header != CSV_HEADER:
        raise UserError(f"{path}:1: expected header {CSV_HEADER}, found {shorten(header, 100) or 'nothing'}")
    for place, line in lines:
        fields = [part.replace("_comma_", ",").strip() for part in line.split(",")]
        if len(fields) < 7 or not fields[1].isdecimal() or len(fields[1]) > 9:
            yield place, _Skip("malformed line", f"expected 7 fields with a number second, found {line}")
            continue
        if fields[0] != name:
            if record:
                yield start, record
            name, start = fields[0], place
            record = {"emotion": fields[2], "situation": fields[3], "opening": ""}
        if not record["opening"] and int(fields[1]) % 2:  # odd: the one who tells; even: the listener
            record["opening"] = fields[5]
    if record:
        yield start, record


# ---------------------------------------------- converters: record -> row, or _Skip


def _text(record: dict, key: str, optional: bool = False) -> str:
    value = record.get(key)
    text = value.strip() if isinstance(value, str) else ""
    if not text and not optional:
        raise _Skip(f"{key} missing or not text", f"found {shorten(value)}")
    return text


def _label(label: str, emotions: dict[str, str], what: str = "emotion") -> str:
    known = label.strip().lower().rstrip(".!").strip()
    if known not in emotions:
        raise _Skip(f"{what} has no known label", label, shorten(known))
    return emotions[known]


def _turns(record: dict, key: str) -> list[dict]:
    turns = record.get(key)
    if isinstance(turns, str):  # a list that went through a CSV or a text column
        with suppress(ValueError, RecursionError):
            turns = json.loads(turns)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _Skip(f"{key} missing or not a list of turns", turns)
    return turns


def _row(record: dict, emotion: str, messages: list[dict], person: str = NO_PROFILE) -> dict:
    row = {"person": person, "mbti": _text(record, "mbti", optional=True), "emotion": emotion}
    row["situation"] = _text(record, "situation")
    made_up = f"user_{hashlib.sha256(person.encode('utf-8', 'replace')).hexdigest()[:10]}"
    name = _text(record, "anon_username", optional=True) or made_up
    return {**row, "anon_username": name, "messages": messages}


def _answer(content: str, emotions: dict[str, str]) -> str | None:
    """Return an answer's four spans in our markers; None unless these and nothing else are there, filled."""
    if len(ANY_TAG.findall(content)) != 2 * len(SPANS):  # repeated tags would make the patterns below slow
        return None
    for pattern in ANSWERS:
        match = pattern.fullmatch(content)
        if match and all(text.strip() for text in match.groups()):
            spans = {span: text.strip() for span, text in zip(SPANS, match.groups())}
            spans["emotion"] = _label(spans["emotion"], emotions, "emotion span")
            return "".join(f"<|{span}_begin|>{text}<|{span}_end|>" for span, text in spans.items())
    return None


def _kardia_row(record: dict, emotions: dict[str, str]) -> dict:
    person, emotion = _text(record, "person"), _label(_text(record, "emotion"), emotions)
    turns, messages = _turns(record, "messages"), []
    if turns and turns[0].get("role") == "system":
        turns = turns[1:]  # training writes its own system prompt
    roles = [turn.get("role") for turn in turns]
    if not roles or roles != [("user", "assistant")[number % 2] for number in range(len(roles))]:
        raise _Skip("turns do not alternate user, assistant", f"found {shorten(roles)}")
    for number, turn in enumerate(turns, 1):
        text = _text(turn, "content")
        content = _answer(text, emotions) if turn["role"] == "assistant" else text
        if content is None:
            raise _Skip("assistant turn is not the four spans", f"turn {number}: {text}")
        messages.append({"role": turn["role"], "content": content})
    return _row(record, emotion, messages, person)


def _opening_row(record: dict, emotions: dict[str, str]) -> dict:
    if not record["opening"]:
        raise _Skip("conversation without a user turn")
    emotion = _label(_text(record, "emotion"), emotions)
    return _row(record, emotion, [{"role": "user", "content": record["opening"]}])


def _esconv_row(record: dict, emotions: dict[str, str]) -> dict:
    noun = _text(record, "emotion_type").lower()
    emotion, opening = _label(ESCONV_LABELS.get(noun, noun), emotions), []
    for turn in _turns(record, "dialog"):
        role = ESCONV_ROLES.get(str(turn.get("speaker")))
        if role is None:
            raise _Skip("unknown speaker", turn.get("speaker"))
        if role == "assistant" and opening:
            break  # the prompt ends where the supporter first answers; a greeting before it is dropped
        if role == "user":
            opening.append(_text(turn, "content", optional=True))
    text = " ".join(part for part in opening if part)
    if not text:
        raise _Skip("conversation without a user turn")
    return _row(record, emotion, [{"role": "user", "content": text}])
