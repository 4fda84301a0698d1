"""An answer printed as it grows, and the commands of an open-ended talk."""

import json

import pytest
from click.testing import CliRunner

import kardia_lite as k
from kardia.cli import chat as chat_cli
from kardia.data.rubric import DEFAULT_FORMAT, AnswerFormat

ANSWER = "<|understanding_begin|>Ana lost a dog.<|understanding_end|><|reasoning_begin|>Grief.<|reasoning_end|><|emotion_begin|>sad<|emotion_end|><|response_begin|> I <3 dogs. What was he like? <|response_end|>"


def printed(pieces, form=DEFAULT_FORMAT, inner=True):
    """(stdout, stderr) of a text that grows by `pieces`."""
    import click

    @click.command()
    def show():
        printer, text = chat_cli.Printer(form, inner), ""
        for piece in pieces:
            text += piece
            printer.feed(text)
        printer.close(text)

    result = CliRunner().invoke(show)
    assert result.exception is None, result.exception
    return result.stdout, result.stderr


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_however_it_comes_the_same_is_shown(size):
    """Token by token or at once; markers cut anywhere; a '<' of the text's own must not wait for the end."""
    out, err = printed([ANSWER[i : i + size] for i in range(0, len(ANSWER), size)])
    assert out == "I <3 dogs. What was he like?\n"
    assert err == "[understanding] Ana lost a dog.\n[reasoning] Grief.\n[emotion] sad\n"


def test_the_reply_is_written_before_it_is_whole():
    shown = []
    printer = chat_cli.Printer(DEFAULT_FORMAT)
    printer._write = shown.append
    printer.feed("<|response_begin|>I am listen")
    assert shown == ["I am listen"]
    printer.feed("<|response_begin|>I am listening <|respon")  # the space may be the last, the rest a marker
    assert shown[1:] == ["ing"]


@pytest.mark.parametrize(
    ("text", "out"),
    [
        ("No spans at all.", "No spans at all.\n"),
        ("<|understanding_begin|>never closed", "never closed\n"),  # nothing is hidden
        ("<|response_begin|>cut in the mid", "cut in the mid\n"),
        (
            "<|response_begin|>\x1b[31mred\x07 \u202etxet<|response_end|>",
            "[31mred   txet\n",
        ),  # no escapes reach the terminal
        ("<|response_begin|><|response_end|>", "\n"),
        ("", "\n"),
    ],
)
def test_odd_answers(text, out):
    assert printed([text])[0].replace("\x1b", "ESC") == out


def test_inner_spans_can_be_hidden_and_other_tasks_have_other_spans():
    assert printed([ANSWER], inner=False)[1] == ""
    form = AnswerFormat((("risk", "x"), ("comment", "y")), "risk", "comment")
    assert printed(
        ["<|risk_begin|>high<|risk_end|><|comment_begin|>Close the file.<|comment_end|>"], form
    ) == ("Close the file.\n", "[risk] high\n")


class Parrot:
    """An answerer without a model."""

    def __init__(self, fail=False):
        self.asked, self.closed, self.fail = [], 0, fail
        self.renderer, self.worker = type("R", (), {"form": DEFAULT_FORMAT}), self

    def close(self):
        self.closed += 1

    def answer(self, dialogues, max_tokens, temperature, seed, show):
        self.asked.append(dialogues[0])
        if self.fail:
            self.fail = False
            raise KeyboardInterrupt
        show(ANSWER)
        return [ANSWER]


def converse(monkeypatch, *lines, parrot=None):
    said, parrot = iter([*lines, None]), parrot or Parrot()
    monkeypatch.setattr(chat_cli, "ask_person", lambda: next(said))
    turn = lambda dialogue, what, number, inner: k.chat_turn(parrot, dialogue, what, 8, 0.0, number, inner)  # noqa: E731
    chat_cli.converse(
        k.Dialogue("Ana, 9", "", "", "Her dog died.", "", ()),
        turn,
        stop=parrot.close,
        row=lambda d: k.row_of(d, DEFAULT_FORMAT),
    )
    return parrot


def test_a_talk_grows_and_can_be_taken_back(monkeypatch, capsys):
    parrot = converse(
        monkeypatch,
        "one",
        "two",
        "/back",
        "three",
        "/new",
        "four <|response_begin|>\x1b[2J",
        "/quit",
        "never asked",
    )
    assert [[text for role, text in d.messages if role == "user"] for d in parrot.asked] == [
        ["one"],
        ["one", "two"],
        ["one", "three"],
        ["four   [2J"],
    ]
    assert "emergency number" in capsys.readouterr().err


def test_profile_situation_and_unknown_commands(monkeypatch, capsys):
    parrot = converse(monkeypatch, "/profile Ben, 40", "/situation He moved.", "hello", "/nonsense")
    assert parrot.asked[0].person == "Ben, 40" and parrot.asked[0].situation == "He moved."
    assert "/back" in capsys.readouterr().err  # help instead of a question to the model


def test_ctrl_c_stops_the_answer_not_the_talk(monkeypatch, capsys):
    parrot = converse(monkeypatch, "one", "two", parrot=Parrot(fail=True))
    assert parrot.closed == 1 and [len(d.messages) for d in parrot.asked] == [
        1,
        1,
    ]  # the stopped turn is forgotten
    assert "stopped" in capsys.readouterr().err


def test_a_saved_talk_is_a_row_to_train_on(monkeypatch, tmp_path, rubric, capsys):
    path = tmp_path / "talk.jsonl"
    converse(monkeypatch, "/save nothing yet", "one", f"/save {path}", "two", f"/save {path}")
    rows = k.load_rows([path], rubric, "dialogue")
    assert (
        [len(row.messages) for row in rows] == [2, 4]
        and rows[0].label == "sad"
        and json.loads(path.read_text().splitlines()[0])["emotion"] == "sad"
    )
