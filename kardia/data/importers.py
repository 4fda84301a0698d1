"""Public data sets in, our rows out: KardiaBench, EmpatheticDialogues and ESConv become JSONL in one schema.

A row is `{person, mbti, emotion, situation, anon_username, messages[{role, content}]}`. KardiaBench gives training
dialogues (they end in a four-span assistant turn); the other two give GRPO prompts: one opening user turn, no profile.
Everything streams: a reader yields (line, record), a converter makes the row or raises `_Skip`, and the row is written
before the next record is read. What cannot be used is counted under its reason, the first of each reason are shown, and
all are listed as file:line in `<target>.skipped.txt`: nothing is dropped silently. Licences stay with the data:
KardiaBench is cc-by-nc-nd-4.0 and ESConv is for research only, so the converted rows must not be passed on.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from kardia.core.console import shorten
from kardia.data.rows import NO_PROFILE

FORMATS = ("kardiabench", "empatheticdialogues", "esconv")
HUB_IDS = ("Jhcircle/KardiaBench", "Jhcircle/KadiaBench")  # published under both spellings
WANTED = {  # what is read when the source is a directory; ESConv's own folder holds other JSON beside it
    "kardiabench": ("*.jsonl", "*.json", "*.parquet"),
    "empatheticdialogues": ("train.csv", "valid.csv", "test.csv"),
    "esconv": ("ESConv.json",),
}
METADATA = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
)  # the `datasets` library's own
SPANS = ("understanding", "reasoning", "emotion", "response")
TAG_FORMS = (
    ("<|{}_begin|>", "<|{}_end|>"),
    ("<{}>", "</{}>"),
)  # ours first; the second is the dataset card's
ANY_TAG = re.compile(r"</?(?:{0})>|<\|(?:{0})_(?:begin|end)\|>".format("|".join(SPANS)))
CSV_HEADER = "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags"
ESCONV_LABELS = {  # ESConv names emotions by nouns, our labels are adjectives
    "anxiety": "anxious",
    "nervousness": "anxious",
    "depression": "sad",
    "sadness": "sad",
    "anger": "angry",
    "fear": "afraid",
    "shame": "ashamed",
    "disgust": "disgusted",
    "guilt": "guilty",
    "jealousy": "jealous",
}
ESCONV_ROLES = {"seeker": "user", "usr": "user", "supporter": "assistant", "sys": "assistant"}
CHUNK = 1 << 16  # characters read at once from a JSON list
MAX_ELEMENT = 32 << 20  # characters; a longer line or list element is not a dialogue
PROGRESS_EVERY = 1 << 20  # bytes between two progress calls
MAX_EXAMPLES, MAX_UNMAPPED = 5, 1000  # keep the report small whatever the file holds
SPACE = re.compile(r"[ \t\r\n]*")


class ImportProblem(RuntimeError):
    """A source that cannot be imported: one line for the user."""


@dataclass
class ImportReport:
    """What was written (`rows` = `prompts` + `dialogues`) and what was not, by reason, with where it stands."""

    rows: int = 0
    prompts: int = 0  # rows that end in a user turn
    dialogues: int = 0  # rows that end in a four-span assistant turn
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> count
    examples: dict[str, list[str]] = field(
        default_factory=dict
    )  # reason -> the first 'file:line: detail' (parquet: file:row)
    unmapped: dict[str, int] = field(default_factory=dict)  # emotion label no alias is known for -> count
    files: dict[str, int] = field(default_factory=dict)  # every file that was read -> rows from it
    skipped_list: Path | None = None  # where every skipped record is listed, if any was


class _Skip(Exception):
    """One record that cannot be used: (reason, detail, unmapped label)."""

    def __init__(self, reason: str, detail: object = "", label: str | None = None):
        super().__init__(reason)
        self.reason, self.detail, self.label = reason, shorten(detail, 100), label


class _Meter:
    """Tells `progress(bytes done, bytes in all files)` about once per MB; `at` takes the position in the current file."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None):
        self.total, self.before, self.told, self.progress = total, 0, 0, progress

    def at(self, position: int, now: bool = False) -> None:
        done = min(self.before + position, self.total)
        if self.progress and (now or done - self.told >= PROGRESS_EVERY):
            self.told = done
            self.progress(done, self.total)


# ---------------------------------------------------------------- import


def import_dataset(
    source: str | Path,
    format: str,
    target: Path,
    emotions: dict[str, str],
    progress: Callable[[int, int], None] | None = None,
    split: str = "all",
) -> ImportReport:
    """Convert `source` (a file, a directory, or KardiaBench's hub id) to rows in `target`, a JSONL file.

    `emotions` maps every known lower-case label or alias to one of the 32 labels. `split` other than "all" reads only
    those files of a directory or hub data set whose name contains it (train, test, ..). `target` and the list of
    skipped records are written under temporary names and renamed when complete, so a failure leaves older ones as
    they were. Raises ImportProblem, one line, for whatever the user can mend.
    """
    if format not in FORMATS:
        raise ImportProblem(f"unknown format {shorten(format, 100)!r}: use one of {', '.join(FORMATS)}")
    target = Path(target)
    skipped = target.with_name(f"{target.name}.skipped.txt")
    temporary, temporary_skipped = (path.with_name(f".{path.name}.part") for path in (target, skipped))
    report = ImportReport()
    try:
        paths = _locate(source, format, split)
        if target.is_dir() or target.resolve() in [path.resolve() for path in paths]:
            raise ImportProblem(
                f"{target}: a directory or the source itself cannot be the target: name another file"
            )
        meter = _Meter(sum(path.stat().st_size for path in paths), progress)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as out, open(temporary_skipped, "w", encoding="utf-8") as listed:
                for path in paths:
                    before = report.rows
                    out.writelines(_rows(path, format, emotions, report, meter, listed))
                    report.files[str(path)] = report.rows - before
                    meter.before += path.stat().st_size
            if not report.rows:
                raise ImportProblem(_nothing_usable(source, report))
            if report.skipped:
                os.replace(temporary_skipped, skipped)
                report.skipped_list = skipped
            else:
                skipped.unlink(missing_ok=True)  # an earlier import's list is not this one's
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
            temporary_skipped.unlink(missing_ok=True)
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except OSError as error:
        raise ImportProblem(
            f"{error.filename or source}: {error.strerror or shorten(str(error), 100)}"
        ) from error
    meter.at(0, now=True)
    return report


def _rows(
    path: Path, format: str, emotions: dict[str, str], report: ImportReport, meter: _Meter, skipped: TextIO
) -> Iterator[bytes]:
    """The file's usable rows as JSONL lines; the others go to the report and, each with its place, to `skipped`."""
    convert = {"kardiabench": _kardia_row, "empatheticdialogues": _opening_row, "esconv": _esconv_row}[format]
    for line, record in _records(path, format, meter):
        try:
            if isinstance(record, _Skip):
                raise record
            if not isinstance(record, dict):
                raise _Skip("record is not a JSON object", record)
            row = convert(record, emotions)
            try:
                encoded = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            except UnicodeEncodeError:  # an escaped half of a surrogate pair is legal JSON but no text
                raise _Skip("text holds a broken character (lone surrogate)") from None
        except _Skip as skip:
            report.skipped[skip.reason] = report.skipped.get(skip.reason, 0) + 1
            listed, where = (
                report.examples.setdefault(skip.reason, []),
                f"{path.name}:{line}: {skip.detail}".rstrip(": "),
            )
            if len(listed) < MAX_EXAMPLES:
                listed.append(where)
            skipped.write(f"{path.name}:{line}: {skip.reason}{': ' * bool(skip.detail)}{skip.detail}\n")
            if skip.label is not None:
                label = (
                    skip.label
                    if skip.label in report.unmapped or len(report.unmapped) < MAX_UNMAPPED
                    else "(others)"
                )
                report.unmapped[label] = report.unmapped.get(label, 0) + 1
            continue
        is_prompt = row["messages"][-1]["role"] == "user"
        report.rows, report.prompts, report.dialogues = (
            report.rows + 1,
            report.prompts + is_prompt,
            report.dialogues + (not is_prompt),
        )
        yield encoded


def _nothing_usable(source: str | Path, report: ImportReport) -> str:
    if not report.skipped:
        return f"{source}: no rows in it"
    top = sorted(report.skipped.items(), key=lambda item: -item[1])[:3]
    reasons = "; ".join(f"{count} x {reason} ({report.examples[reason][0]})" for reason, count in top)
    return f"{source}: none of its {sum(report.skipped.values())} records can be used: {reasons}"


# ---------------------------------------------------------------- where the files are


def _locate(source: str | Path, format: str, split: str) -> list[Path]:
    path = Path(source).expanduser()
    if format == "kardiabench" and not path.exists():
        path = next(
            (_download(name) for name in HUB_IDS if name.lower() == Path(source).as_posix().lower()), path
        )
    if not path.exists():
        hint = f" (or pass the hub id {HUB_IDS[0]})" if format == "kardiabench" else ""
        raise ImportProblem(f"{path}: no such file or directory{hint}")
    found = [path]
    if path.is_dir():
        found = [
            hit
            for pattern in WANTED[format]
            for hit in sorted(path.rglob(pattern))
            if hit.is_file() and hit.name not in METADATA
        ]
        found = [
            hit for hit in found if not any(part.startswith(".") for part in hit.relative_to(path).parts)
        ]
        if found and split != "all":
            names = [hit.name for hit in found]
            found = [hit for hit in found if split.lower() in hit.name.lower()]
            if not found:
                raise ImportProblem(
                    f"{path}: no file with {split!r} in its name (there are {shorten(', '.join(names), 100)}): choose another --split, or all"
                )
    if not found:
        raise ImportProblem(f"{path}: no {' or '.join(WANTED[format])} in this directory")
    for hit in found:
        if not hit.stat().st_size:
            raise ImportProblem(f"{hit}: the file is empty")
    return found


def _download(name: str) -> Path:
    """The hub data set's files in the local cache. It is gated: every failure says what to do next."""
    otherwise = f"or on a machine where that works `hf download {HUB_IDS[0]} --repo-type dataset --local-dir kardiabench`, bring that folder here and import it"
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise ImportProblem(f"{name}: pip install huggingface_hub, {otherwise}") from None
    network = errors.HfHubHTTPError.__bases__[
        0
    ]  # of httpx, whose errors are not OSErrors; of requests before huggingface_hub 1.0
    for spelling in (name, *(other for other in HUB_IDS if other != name)):
        try:
            return Path(
                huggingface_hub.snapshot_download(
                    spelling, repo_type="dataset", allow_patterns=list(WANTED["kardiabench"])
                )
            )
        except (OSError, network) as error:
            failure = error
            if not isinstance(error, errors.RepositoryNotFoundError) or isinstance(
                error, errors.GatedRepoError
            ):
                break
    status = getattr(getattr(failure, "response", None), "status_code", None)
    if isinstance(failure, errors.GatedRepoError):
        steps = "access is gated: accept the conditions on the dataset's page with your account, run `hf auth login`, try again"
    elif isinstance(failure, (errors.RepositoryNotFoundError, errors.LocalTokenNotFoundError)) or status in (
        401,
        403,
    ):
        steps = "the hub does not show it without a valid login: run `hf auth login` and try again"
    elif isinstance(failure, errors.OfflineModeIsEnabled):
        steps = "offline mode is on (HF_HUB_OFFLINE): unset it and try again"
    else:
        cause = failure.__cause__ or failure
        steps = f"cannot be downloaded ({type(cause).__name__}: {shorten(str(cause), 80)}): check the network and try again"
    raise ImportProblem(f"{spelling}: {steps}, {otherwise}") from failure


# ---------------------------------------------------------------- readers: file -> (line, record or _Skip)


def _records(path: Path, format: str, meter: _Meter) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as stream:
        head = stream.read(4096)
    if head.startswith(b"PAR1") and format == "kardiabench":
        return _parquet(path, meter)
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"PAR1")) or b"\0" in head:
        raise ImportProblem(f"{path}: a binary file, expected UTF-8 text: unpack or convert it first")
    if format == "empatheticdialogues":
        return _conversations(path, meter)
    is_list = head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    return _array(path, meter) if is_list else _json_lines(path, meter)


def _open(path: Path) -> TextIO:
    return open(path, encoding="utf-8-sig", newline="\n")  # only LF ends a line: not U+2028, not a lone CR


def _not_utf8(path: Path) -> ImportProblem:
    """The problem naming the line of the first bad byte, found by reading again: the readers decode in blocks."""
    with open(path, "rb") as stream:
        line, utf8 = 1, codecs.getincrementaldecoder("utf-8")()
        for raw in iter(lambda: stream.read(CHUNK), b""):
            try:
                line += utf8.decode(raw).count("\n")
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                break
    return ImportProblem(f"{path}:{line}: not UTF-8: convert the file first")


def _lines(path: Path, meter: _Meter) -> Iterator[tuple[int, str]]:
    """Numbered text lines without BOM, CR and LF."""
    with _open(path) as stream:
        for number, text in enumerate(iter(lambda: stream.readline(MAX_ELEMENT + 1), ""), 1):
            if len(text) > MAX_ELEMENT:
                raise ImportProblem(f"{path}:{number}: a line over {MAX_ELEMENT >> 20} MB")
            meter.at(stream.buffer.tell())
            yield number, text.strip("\r\n")


def _json_lines(path: Path, meter: _Meter) -> Iterator[tuple[int, Any]]:
    for number, text in _lines(path, meter):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            record = _Skip("malformed JSON", str(error))
        yield number, record


def _array(path: Path, meter: _Meter) -> Iterator[tuple[int, Any]]:
    """The elements of one JSON list, through a window `text` whose part before `pos` is done with.

    A decoding error may only mean that the rest is not read yet, so it counts once the file is at its end. A real flaw
    hides everything after it, so it ends the import and not one row. Each step reads as much again as is unread: a
    long element costs a few attempts, not one per chunk.
    """
    decode, text, pos, line, ended = json.JSONDecoder().raw_decode, "", 0, 1, False
    allowed = "["  # the marks that may come now; "" after the list; None: a value must come; "]" alone: a value may, too
    with _open(path) as stream:
        while True:
            end = SPACE.match(text, pos).end()
            line, pos = line + text.count("\n", pos, end), end
            mark, flaw, at = text[pos : pos + 1], "a torn download?", pos
            if mark and (allowed is None or (allowed == "]" and mark != "]")):
                try:
                    value, end = decode(text, pos)
                    if end < len(text) or ended:
                        yield line, value
                        line, pos, allowed = line + text.count("\n", pos, end), end, ",]"
                        continue
                except (ValueError, RecursionError) as error:
                    flaw, at = (
                        f"{shorten(getattr(error, 'msg', str(error)), 100)}; {flaw}",
                        getattr(error, "pos", pos),
                    )
            elif mark:
                if mark not in allowed:
                    raise ImportProblem(
                        f"{path}:{line}: expected {' or '.join(allowed) or 'the end'} of the JSON list, found {mark}"
                    )
                pos, allowed = pos + 1, {"[": "]", ",": None, "]": ""}[mark]
                continue
            elif ended and allowed == "":
                return
            if len(text) - pos > MAX_ELEMENT:
                raise ImportProblem(f"{path}:{line}: a list element over {MAX_ELEMENT >> 20} MB ({flaw})")
            if ended:
                raise ImportProblem(
                    f"{path}:{line + text.count(chr(10), pos, at)}: malformed JSON list, unreadable from here ({flaw})"
                )
            more = stream.read(max(CHUNK, min(len(text) - pos, MAX_ELEMENT + 1 - len(text) + pos)))
            text, pos, ended = text[pos:] + more, 0, not more
            meter.at(stream.buffer.tell())


def _parquet(path: Path, meter: _Meter) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportProblem(
            f"{path}: reading parquet needs pyarrow: pip install pyarrow, or pass JSONL"
        ) from None
    try:
        # one row group after the other, through a small buffer: else pyarrow keeps the whole file (478 MB of 500) in memory
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as table:
            size, total, number = path.stat().st_size, max(table.metadata.num_rows, 1), 0
            for group in range(table.metadata.num_row_groups):
                for batch in table.iter_batches(batch_size=64, row_groups=[group], use_threads=False):
                    for record in batch.to_pylist():
                        number += 1
                        yield number, record
                    meter.at(size * number // total)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ImportProblem(f"{path}: not a readable parquet file ({shorten(str(error), 100)})") from error


def _conversations(path: Path, meter: _Meter) -> Iterator[tuple[int, Any]]:
    """EmpatheticDialogues: one record per run of lines with the same conv_id: emotion, situation and first user turn.

    The files are not quoted CSV: text never holds a comma (it says `_comma_`) but may hold stray quotes, so a plain
    split is right and the csv module is wrong. Trailing fields may be missing or be more than the header's.
    """
    lines = _lines(path, meter)
    header = next(lines, (1, ""))[1]
    if header.strip() != CSV_HEADER:
        raise ImportProblem(
            f"{path}:1: expected header {CSV_HEADER}, found {shorten(header, 100) or 'nothing'}"
        )
    current, start, record = None, 0, {}
    for number, text in lines:
        if not text.strip():
            continue
        fields = [part.replace("_comma_", ",").strip() for part in text.split(",")]
        if len(fields) < 7 or not fields[1].isdecimal() or len(fields[1]) > 9:
            yield (
                number,
                _Skip("malformed line", f"expected 7 or more fields with a number second, found {text}"),
            )
            continue
        if fields[0] != current:
            if current is not None:
                yield start, record
            current, start = fields[0], number
            record = {"emotion": fields[2], "situation": fields[3], "opening": ""}
        if not record["opening"] and int(fields[1]) % 2:  # odd: the one who tells; even: the listener
            record["opening"] = fields[5]
    if current is not None:
        yield start, record


# ---------------------------------------------------------------- converters: record -> row, or _Skip


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


def _row(
    emotion: str,
    situation: str,
    messages: list[dict],
    person: str = NO_PROFILE,
    mbti: str = "",
    username: str = "",
) -> dict:
    username = username or "user_" + hashlib.sha256(person.encode("utf-8", "replace")).hexdigest()[:10]
    return {
        "person": person,
        "mbti": mbti,
        "emotion": emotion,
        "situation": situation,
        "anon_username": username,
        "messages": messages,
    }


def _spans(content: str) -> list[str] | None:
    """The inner texts of the four spans in either tag form; None unless all four stand there, in order, filled, and nothing else."""
    for begin, end in TAG_FORMS:
        rest, inner = content.strip(), []
        for span in SPANS:
            opening = begin.format(span)
            text, closing, after = rest[len(opening) :].partition(end.format(span))
            if not rest.startswith(opening) or not closing or not text.strip() or ANY_TAG.search(text):
                break
            inner.append(text.strip())
            rest = after.lstrip()
        if len(inner) == len(SPANS) and not rest:
            return inner
    return None


def _kardia_row(record: dict, emotions: dict[str, str]) -> dict:
    person, situation = _text(record, "person"), _text(record, "situation")
    emotion = _label(_text(record, "emotion"), emotions)
    turns = record.get("messages")
    if isinstance(turns, str) and turns.lstrip().startswith(
        "["
    ):  # a list that went through a CSV or a text column
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            pass
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _Skip("messages missing or not a list of turns", turns)
    if turns and turns[0].get("role") == "system":
        turns = turns[1:]  # our renderer writes its own
    roles = [turn.get("role") for turn in turns]
    if not roles or roles != ["user" if i % 2 == 0 else "assistant" for i in range(len(roles))]:
        raise _Skip("turns do not alternate user, assistant", f"found {shorten(roles)}")
    messages = []
    for number, turn in enumerate(turns, 1):
        content = _text(turn, "content")
        if turn["role"] == "assistant":
            inner = _spans(content)
            if inner is None:
                raise _Skip("assistant turn is not the four spans", f"turn {number}: {content}")
            inner[2] = _label(inner[2], emotions, "emotion span")
            begin, end = TAG_FORMS[0]
            content = "".join(
                begin.format(span) + text + end.format(span) for span, text in zip(SPANS, inner)
            )
        messages.append({"role": turn["role"], "content": content})
    mbti, username = _text(record, "mbti", optional=True), _text(record, "anon_username", optional=True)
    return _row(emotion, situation, messages, person, mbti, username)


def _opening_row(record: dict, emotions: dict[str, str]) -> dict:
    if not record["opening"]:
        raise _Skip("conversation without a user turn")
    opening = {"role": "user", "content": record["opening"]}
    return _row(_label(_text(record, "emotion"), emotions), _text(record, "situation"), [opening])


def _esconv_row(record: dict, emotions: dict[str, str]) -> dict:
    noun = _text(record, "emotion_type").lower()
    emotion = _label(ESCONV_LABELS.get(noun, noun), emotions)
    situation, opening = _text(record, "situation"), []
    turns = record.get("dialog")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _Skip("dialog missing or not a list of turns", turns)
    for turn in turns:
        role = ESCONV_ROLES.get(str(turn.get("speaker")))
        if role is None:
            raise _Skip("unknown speaker", turn.get("speaker"))
        if role == "assistant" and opening:
            break  # the prompt ends where the supporter first answers; a greeting before it is dropped
        if role == "user":
            opening.append(_text(turn, "content", optional=True))
    if not any(opening):
        raise _Skip("conversation without a user turn")
    return _row(emotion, situation, [{"role": "user", "content": " ".join(part for part in opening if part)}])
