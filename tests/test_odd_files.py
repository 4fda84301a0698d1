"""No input is trusted: whatever a file or a model holds is accepted, or refused in one short line of ours.

No traceback, no hang, no flood. Values are drawn by hypothesis (the same ones in every run), bytes of real
files are changed by seeded generators. Each case runs under a limit of CPU time. What is valid must still be
accepted, or refusing everything would pass. The fast suite tries a tenth of the cases, the slow one all.
"""

import functools
import io
import json
import random
import re
import signal
import struct
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kardia_lite as k
from kardia.cli import chat
from kardia.cli.data_commands import coloured
from kardia.core.console import UserError, shorten
from kardia.core.files import json_lines, small_json
from kardia.core.run_directory import Run
from kardia.data import rows
from kardia.data.rubric import DEFAULT_FORMAT
from kardia.llama.gguf_header import check_gguf
from kardia.models import gguf as gguf_files
from kardia.models import gguf_tokenizer, weights

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="POSIX timers")
amount = pytest.mark.parametrize("share", [0.1, pytest.param(1, marks=pytest.mark.slow)])


def for_all(test, cases, **strategies):
    """Run `test` for so many drawn cases."""
    how = settings(derandomize=True, database=None, deadline=timedelta(seconds=60), max_examples=int(cases))
    how = settings(how, suppress_health_check=list(HealthCheck))
    how(given(**strategies)(test))()


@contextmanager
def limit(seconds):
    """More CPU time than this is a hang."""

    def stop(*_):
        raise AssertionError(f"still busy after {seconds} seconds of CPU time")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def ask(function, *arguments, seconds=10):
    """(result, None), or (None, the message) of a refusal: one line, short and harmless to a terminal."""
    with limit(seconds):
        try:
            return function(*arguments), None
        except Exception as error:
            if not type(error).__module__.startswith("kardia"):
                raise
            message = error.format_message() if isinstance(error, UserError) else str(error)
    assert message and "\n" not in message and len(message) < 1200, message[:300]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", message), message[:300]
    return None, message


def refused(*arguments, **how):
    message = ask(*arguments, **how)[1]
    assert message is not None
    return message


def accepted(*arguments, **how):
    result, message = ask(*arguments, **how)
    assert message is None, message
    return result


# ---------------------------------------------------------------------------------- what is put into files

NASTY = ["", " ", "\x00", "\x1b[31mred", "\x9b2J", "\u202etxet", "\ud800", "a\nb", "\u2028", "x" * 5000]
NASTY += ["<script>alert(1)</script>", "/etc/passwd", "-1", "NaN", "%s{}", "<|response_begin|>", "(a+)+$"]
NUMBERS = [*range(-10, 11), 2**31, 2**63, 10**400]
TEXTS = st.text(st.characters(exclude_categories=()), max_size=12)
SCALARS = st.one_of(st.sampled_from([None, True, False, *NUMBERS, *NASTY]), st.floats(), TEXTS)
KEYS = st.sampled_from(["", "a", "role", "content", "\x1b[0m", "n", "mean"])
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=8)


def mutated(data: bytes, seed: int, most: int | None = None) -> bytes:
    """Bytes flipped, replaced by large numbers, taken out, doubled or cut off, within the first `most`."""
    rng, data = random.Random(seed), bytearray(data)
    pieces = [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b'"', b"[" * 50, b"{", b"\\ud800", b"NaN"]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, how = rng.randrange(max(1, min(len(data), most or len(data)))), rng.randrange(7)
        if how == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 1:
            data[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 9, 255, 2**16, 2**31 - 1, 2**32 - 1)))
        elif how == 2:
            data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**20, 2**32, 2**63 - 1, 2**64 - 1)))
        elif how == 3:
            del data[at : at + rng.randrange(1, 40)]
        elif how == 4:
            data[at:at] = data[at : at + rng.randrange(1, 200)]
        elif how == 5:
            data[at:at] = rng.choice(pieces)
        elif rng.random() < 0.3:
            data = data[: max(1, at)]
    return bytes(data)


# ---------------------------------------------------------------------------------- JSON

GOOD = '{"a": "Zoë\'s dog", "n": [1, 2.5, null]}'
# bytes of a .jsonl file -> how many values are read, or words of the problem or the refusal
LINES = {
    "BOM": (b"\xef\xbb\xbf" + GOOD.encode(), 1),
    "CRLF": (f"{GOOD}\r\n{GOOD}\r\n".encode(), 2),
    "U+2028 inside a text": ('{"a": "x\u2028y"}\n'.encode(), 1),
    "blank lines": (b"\n\n \n", 0),
    "a whole surrogate pair": (b'{"a": "\\ud83d\\ude00"}', 1),
    "half a surrogate pair": (b'{"a": "\\ud83d"}', "half a surrogate pair"),
    "UTF-16": (GOOD.encode("utf-16"), "not UTF-8"),
    "Latin-1": (GOOD.encode("latin-1"), "not UTF-8"),
    "NUL bytes": (b"\0" * 100 + GOOD.encode(), "Expecting value"),
    "NUL in a text": (b'{"a": "d\0g"}', "Invalid control character"),
    "NaN": (b'{"a": NaN}', "NaN is no JSON"),
    "an integer of 400,000 digits": (b'{"a": ' + b"9" * 400_000 + b"}", "Exceeds the limit"),
    "100,000 lists deep": (b"[" * 100_000, "nested too deeply"),
    "a line of 10 MB": (GOOD.encode() + b" " * 10_000_000, 1),
    "a line of 17 MB": (b"x" * (17 << 20) + b"\n" + GOOD.encode(), "a line of over 16 MB"),
    "cut off": (GOOD[:-2].encode(), "delimiter"),
}


def test_each_line_is_a_value_or_a_problem(tmp_path):
    path = tmp_path / "rows.jsonl"
    for name, (data, expected) in LINES.items():
        path.write_bytes(data)
        lines, refusal = ask(lambda: list(json_lines(path)))
        if isinstance(expected, int):
            assert [problem for *_, problem in lines] == [""] * expected, name
        else:
            assert expected in (refusal or lines[0][2]), name
        assert refusal is None or refusal.startswith(f"{path}:1: "), name
        accepted(lambda: list(json_lines(path, strict=False)))
    assert len(accepted(lambda: list(json_lines(path)))) == 1


@amount
def test_damaged_bytes_of_json(tmp_path, share):
    path, seen = tmp_path / "rows.jsonl", set()
    for seed in range(int(300 * share)):
        path.write_bytes(mutated(f"{GOOD}\n".encode() * 4, seed))
        lines, refusal = ask(lambda: list(json_lines(path)))
        seen.add("refused" if refusal else "read" if all(not problem for *_, problem in lines) else "told")
        for *_, problem in lines or []:
            assert len(problem) < 200 and (problem == "" or problem.isprintable())
        path.write_bytes(mutated(GOOD.encode(), seed))
        ask(small_json, path, 1 << 20)
    assert seen == {"refused", "read", "told"}


def test_a_small_json_file_is_small(tmp_path):
    path = tmp_path / "config.json"
    for text in ("", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", " " * 2000, "{"):
        path.write_text(text)
        assert "config.json: damaged" in refused(small_json, path, 1000)
    path.write_text('{"a": 1}')
    assert accepted(small_json, path, 8) == {"a": 1} and "over 0 kB" in refused(small_json, path, 7)
    assert "damaged" in refused(small_json, tmp_path / "absent.json", 9)


# ---------------------------------------------------------------------------------- text that is shown


@amount
def test_a_value_in_a_message_is_one_short_line(share):
    def check(value, width):
        shown = accepted(shorten, value, width)
        assert len(shown) <= width and shown.isprintable()
        if isinstance(value, str) and len(value) < width and value.isprintable():
            assert shown == " ".join(value.split())

    for_all(check, 150 * share, value=ANYTHING, width=st.integers(10, 100))
    deep = functools.reduce(lambda inner, _: [inner], range(900), "x")  # deeper than Python prints
    huge = [deep, {"a": deep}, "x" * 10**7, list(range(10**6)), 1 << 10**7, [1 << 10**7], b"x" * 10**6]
    for value in (*huge, {1, "a", None}, float("nan")):
        assert 0 < len(accepted(shorten, value, seconds=3)) <= 60


PIECES = [f"<|{name}_{side}|>" for name in (*DEFAULT_FORMAT.names, "other") for side in ("begin", "end")]
PIECES += ["<|", "|>", "_begin|>", "<|response", " ", "\n", "x", "sad", "\x1b[0m", "<|response_begin_end|>"]
HOSTILE = ["\x1b[31m", "\x1b]0;title\x07", "\x9b2J", "\x9d8;;http://x\x9c", "\u202e", "\u2066", "\x00", "\r"]
HOSTILE += ["\x08", "\ud800", "hi ", "\n", "<|respon", "se_begin|>", *PIECES[:12]]
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@amount
def test_no_escape_of_a_model_reaches_the_terminal_and_nobody_types_markers(share):
    def check(pieces, cuts):
        text, out, err = "".join(pieces), io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            printer = chat.Printer(DEFAULT_FORMAT)
            for cut in sorted(cut % (len(text) + 1) for cut in cuts):
                accepted(printer.feed, text[:cut])
            accepted(printer.close, text)
        styles = re.compile(r"\x1b\[[02]m")  # ours: dim, and its end
        assert not UNPRINTABLE.search(styles.sub("", out.getvalue()) + styles.sub("", err.getvalue()))
        assert out.getvalue().endswith("\n")
        ask(k.parse_answer, text)
        typed = chat.harmless(text)
        assert not DEFAULT_FORMAT.marker.search(typed) and not UNPRINTABLE.search(typed)

    cuts = st.lists(st.integers(0, 200), max_size=6)
    for_all(check, 200 * share, pieces=st.lists(st.sampled_from(HOSTILE), max_size=16), cuts=cuts)
    for text in ("<|response_begin|>" * 100_000, "<|" + "a" * 10**6, "<|s_begin|>x<|s_end|>" * 50_000):
        ask(k.parse_answer, text, seconds=5)
        accepted(coloured, text, DEFAULT_FORMAT, seconds=5)
    for text in ("<|respon<|emotion_begin|>se_begin|>", "<|<|response_end|>response_begin|>"):
        assert not rows.MARKER.search(chat.harmless(text))
    assert chat.harmless("I said <3 | and <|x|>") == "I said <3 | and <|x|>"


# ---------------------------------------------------------------------------------- GGUF


def write_model(path, vocabulary=97, **changes):
    """A llama of two small layers as GGUF, with `changes` of its header."""
    import gguf
    import numpy as np

    header = {"block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 48}
    header |= {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 8}
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    for key, value in {**header, "vocab_size": vocabulary, **changes}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(vocabulary - 3))])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([2, 3, 3] + [1] * (vocabulary - 3))
    for name, number in (("bos", 1), ("eos", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(number)
    shapes = {"token_embd": (vocabulary, 32), "output_norm": (32,)}
    layer = {"attn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
    layer |= {"attn_output": (32, 32), "ffn_norm": (32,), "ffn_gate": (48, 32), "ffn_up": (48, 32)}
    layer |= {"ffn_down": (32, 48)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


EASY_LIES = {"block_count": [3], "vocab_size": [10**6]}
LIES = {"block_count": [0, 1, 10**6, 2**32 - 1], "attention.head_count": [0, 3, 8, 2**20]}
LIES |= {"embedding_length": [0, 31, 2**20], "feed_forward_length": [0, 47, 2**24], "context_length": [2**31]}
LIES |= {"attention.head_count_kv": [1, 4, 2**20], "rope.dimension_count": [4, 2**20]}
LIES |= {"vocab_size": [96, 2**32 - 1], "expert_count": [4, 10**6]}


@pytest.mark.parametrize("lies", [EASY_LIES, pytest.param(LIES, marks=pytest.mark.slow)], ids=["two", "all"])
def test_a_header_must_say_what_its_tensors_are(tmp_path, lies):
    """transformers builds what the header says: a model of terabytes from a file of kilobytes."""
    target = tmp_path / "imported"
    for key, values in lies.items():
        for value in values:
            path = write_model(tmp_path / "lie.gguf", **{key: value})
            message = refused(gguf_files.import_gguf, path, target, seconds=20)
            assert "damaged GGUF" in message and not target.exists(), (key, value)
    whole = write_model(tmp_path / "whole.gguf").read_bytes()
    path.write_bytes(whole.replace(b"blk.1.attn_q.w", b"blk.1.attn_z.w"))
    refused(gguf_files.import_gguf, path, target)  # else its weights would be random numbers
    if lies is LIES:
        path.write_bytes(whole)
        directory = accepted(gguf_files.import_gguf, path, tmp_path / "whole", seconds=60)
        assert json.loads((directory / "config.json").read_text())["num_hidden_layers"] == 2


@amount
def test_damaged_bytes_of_a_gguf(tmp_path, share):
    def read_all(path):
        check_gguf(path)
        gguf_files.check_sizes(path)
        return gguf_tokenizer.import_tokenizer(path)

    whole = write_model(tmp_path / "whole.gguf").read_bytes()
    header = whole.index(b"blk.1.ffn_down.weight") + 60
    path, outcomes = tmp_path / "damaged.gguf", [0, 0]  # refused, read
    for seed in range(int(400 * share)):
        path.write_bytes(mutated(whole, seed, header))
        fine = ask(read_all, path)[1] is None
        outcomes[fine] += 1
        if fine and outcomes[1] <= 12 * share:
            ask(gguf_files.import_gguf, path, tmp_path / f"imported-{seed}", seconds=30)
    assert outcomes[1] > 20 * share and outcomes[0] > 200 * share


def header(*pairs, tensors=0, version=3, more=b""):
    """The bytes of a GGUF with metadata (key, type, value's bytes)."""
    data = b"GGUF" + struct.pack("<IQQ", version, tensors, len(pairs))
    for key, kind, value in pairs:
        data += struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value
    return data + more


def tensor(dimensions=(32,), kind=0, offset=0, name=b"t"):
    sizes = struct.pack(f"<{len(dimensions)}Q", *dimensions)
    head = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dimensions))
    return head + sizes + struct.pack("<IQ", kind, offset)


def aligned(n):
    pair = (b"general.alignment", 4, struct.pack("<I", n))
    return header(pair, tensors=1, more=tensor() + bytes(200))


SHARED = b"".join(tensor((1000,), name=b"%d" % i) for i in range(64))
GGUFS = {
    "the name only": b"GGUF",
    "another file": b"PK\x03\x04" * 20,
    "an old version": header(version=1, tensors=1, more=tensor()),
    "of the other byte order": header(version=3 << 24),
    "no tensors": header(),
    "alignment 3": aligned(3),
    "arrays in arrays": header((b"a", 9, struct.pack("<IQ", 9, 1) * 5000)),
    "an array longer than the file": header((b"a", 9, struct.pack("<IQ", 8, 2**60))),
    "an array of 2^63 bytes": header((b"a", 9, struct.pack("<IQ", 0, 2**63))),
    "an unknown type": header((b"a", 77, b"")),
    "a text longer than the file": header((b"a", 8, struct.pack("<Q", 2**63))),
    "2^60 tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(10**6),
    "2^64 elements, four times": header(tensors=1, more=tensor((2**64 - 1,) * 4)),
    "4 billion dimensions": header(tensors=1, more=struct.pack("<QcI", 1, b"t", 2**32 - 1)),
    "an unknown tensor type": header(tensors=1, more=tensor(kind=999) + bytes(200)),
    "an offset beyond": header(tensors=1, more=tensor(offset=2**63) + bytes(200)),
    "tensors that share their bytes": header(tensors=64, more=SHARED + bytes(5000)),
}


def test_odd_ggufs(tmp_path):
    path = tmp_path / "odd.gguf"
    for name, data in GGUFS.items():
        path.write_bytes(data)
        assert "odd.gguf" in refused(check_gguf, path, seconds=5), name
        refused(gguf_files.import_gguf, path, tmp_path / "imported", seconds=5)
    (tmp_path / "directory.gguf").mkdir()
    (tmp_path / "link.gguf").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.gguf").symlink_to(tmp_path / "loop.gguf")
    for name in ("directory.gguf", "link.gguf", "loop.gguf", "absent.gguf", "/dev/zero"):
        assert "no such GGUF file" in refused(check_gguf, tmp_path / name)
    path.write_bytes(header(tensors=1, more=tensor() + bytes(400)))
    accepted(check_gguf, path)
    refused(gguf_files.import_gguf, path, tmp_path / "imported")


def test_an_index_of_shards_names_files_beside_it(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path.parent / "x.safetensors").write_bytes(b"")
    odd = [
        "../../x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        ".safetensors",
        "x.bin",
        5,
        None,
    ]
    for name in (*odd, ["model.safetensors"], "x\n.safetensors", "a\\..\\b.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        assert "weight_map" in refused(weights.shards, tmp_path)
    for text in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "[" * 100_000):
        index.write_text(text)
        assert "index.json: damaged" in refused(weights.shards, tmp_path)


# ---------------------------------------------------------------------------------- a run directory

ODD_FACTS = [{}, {"command": 1}, {"command": "sft", "options": []}, {"command": "sft", "bits": "4"}]
ODD_FACTS += [{"command": "sft", "hashes": [1]}, {"command": "sft", "ladder": {}}]
FORM = {"spans": ["a"], "hints": ["x"], "label": "a", "reply": "a", "system": "s"}
ODD_FACTS += [{"command": "sft", "form": {**FORM, **odd}} for odd in ({"spans": ["(a+)+$"]}, {"hints": []})]


def test_a_damaged_run_json_is_one_line(tmp_path):
    texts = ["[]", "null", '"x"', "{", "", "[" * 10_000, "9" * 5000, '{"a": "\\ud800"}']
    for text in (*texts, *map(json.dumps, ODD_FACTS)):
        (tmp_path / "run.json").write_text(text)
        message = refused(Run, tmp_path)
        assert "run.json: damaged" in message and len(message) < 300, text[:80]


def test_a_run_of_version_1_still_opens(tmp_path):
    facts = {
        "command": "grpo",
        "options": {"seed": 1},
        "model": "m",
        "base": "b",
        "base_hash": "h",
        "bits": 4,
    }
    facts |= {"hashes": None, "base_gguf": None, "ladder": [{"step": 1}], "setting": {"a": 2}, "form": FORM}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    assert accepted(Run, tmp_path).facts == facts
