"""An answer printed as it grows, and the commands of an open-ended conversation."""

import json

import click
import pytest
from click.testing import CliRunner

import kardia_lite as k
from kardia.cli import chat
from kardia.data.rubric import DEFAULT_FORMAT, AnswerFormat

ANSWER = (
    "<|understanding_begin|>Ana lost a dog.<|understanding_end|><|reasoning_begin|>Grief.<|reasoning_end|>"
    "<|emotion_begin|>sad<|emotion_end|><|response_begin|> I <3 dogs. What was he like? <|response_end|>"
)


def printed(pieces, form=DEFAULT_FORMAT, inner=True, close=True):
    """(stdout, stderr) of a text that grows by `pieces`."""

    @click.command()
    def show():
        printer, text = chat.Printer(form, inner), ""
        for piece in pieces:
            text += piece
            printer.feed(text)
        if close:
            printer.close(text)

    result = CliRunner().invoke(show)
    assert result.exception is None, result.exception
    return result.stdout, result.stderr


def test_however_it_comes_the_same_is_shown():
    """Token by token or at once; markers cut anywhere; a '<' of the text's own must not wait for the end."""
    for size in (1, 3, 7, 1000):
        out, err = printed([ANSWER[i : i + size] for i in range(0, len(ANSWER), size)])
        assert out == "I <3 dogs. What was he like?\n", size
        assert err == "[understanding] Ana lost a dog.\n[reasoning] Grief.\n[emotion] sad\n", size


def test_the_reply_is_written_before_it_is_whole():
    assert printed(["<|response_begin|>I am listen"], close=False)[0] == "I am listen"
    # the space may be the last one, the rest a marker
    assert printed(["<|response_begin|>I am listen", "ing <|respon"], close=False)[0] == "I am listening"
    assert printed(["<|response_begin|>half a character \ufffd"], close=False)[0] == "half a character"


def test_odd_answers():
    for text, out in (
        ("No spans at all.", "No spans at all.\n"),
        ("<|understanding_begin|>never closed", "never closed\n"),  # nothing is hidden
        ("<|response_begin|>cut in the mid", "cut in the mid\n"),
        # no escapes reach the terminal
        ("<|response_begin|>\x1b[31mred\x07 \u202etxet<|response_end|>", "[31mred   txet\n"),
        ("<|response_begin|><|response_end|>", "\n"),
        ("", "\n"),
    ):
        assert printed([text])[0].replace("\x1b", "ESC") == out, text


def test_inner_spans_can_be_hidden_and_other_tasks_have_other_spans():
    assert printed([ANSWER], inner=False)[1] == ""
    form = AnswerFormat((("risk", "x"), ("comment", "y")), "risk", "comment")
    text = "<|risk_begin|>high<|risk_end|><|comment_begin|>Close the file.<|comment_end|>"
    assert printed([text], form) == ("Close the file.\n", "[risk] high\n")


class Talk:
    """A conversation with a parrot, typed line by line."""

    def __init__(self, monkeypatch, *lines, fail=False):
        self.asked, self.seeds, self.stopped, self.fail = [], [], 0, fail
        typed = iter([*lines, None])
        monkeypatch.setattr(chat, "ask_person", lambda: next(typed))
        dialogue = k.Dialogue("Ana, 9", "", "", "Her dog died.", "", ())
        chat.Conversation(self.answer, self.stop, DEFAULT_FORMAT, dialogue, seed=5).run()

    def stop(self):
        self.stopped += 1

    def answer(self, dialogue, seed, show):
        self.asked.append(dialogue)
        self.seeds.append(seed)
        if self.fail:
            self.fail = False
            raise KeyboardInterrupt
        show(ANSWER)
        return ANSWER


def test_a_conversation_grows_and_can_be_taken_back(monkeypatch, capsys):
    lines = ("one", "two", "/back", "three", "/new", "four <|response_begin|>\x1b[2J", "/quit", "never asked")
    talk = Talk(monkeypatch, *lines)
    said = [[text for role, text in dialogue.messages if role == "user"] for dialogue in talk.asked]
    assert said == [["one"], ["one", "two"], ["one", "three"], ["four   [2J"]]
    assert talk.seeds == [5, 6, 7, 8] and "emergency number" in capsys.readouterr().err


def test_profile_situation_and_unknown_commands(monkeypatch, capsys):
    talk = Talk(monkeypatch, "/profile Ben, 40", "/situation He moved.", "/inner", "hello", "/nonsense")
    assert (talk.asked[0].person, talk.asked[0].situation) == ("Ben, 40", "He moved.")
    err = capsys.readouterr().err  # help instead of a question to the model
    assert "/back" in err and "[emotion]" not in err


def test_ctrl_c_stops_the_answer_not_the_conversation(monkeypatch, capsys):
    talk = Talk(monkeypatch, "one", "two", fail=True)
    assert talk.stopped == 1
    assert [len(dialogue.messages) for dialogue in talk.asked] == [1, 1]  # the stopped turn is forgotten
    assert "stopped" in capsys.readouterr().err


def test_a_saved_conversation_is_a_row_to_train_on(monkeypatch, tmp_path, rubric, capsys):
    path = tmp_path / "talk.jsonl"
    Talk(monkeypatch, "/save nothing yet", "one", f"/save {path}", "two", f"/save {path}")
    rows = k.load_rows([path], rubric, "dialogue")
    assert [len(row.messages) for row in rows] == [2, 4] and rows[0].label == "sad"
    assert json.loads(path.read_text().splitlines()[0])["emotion"] == "sad"
    with pytest.raises(click.ClickException, match="cannot be written"):
        Talk(monkeypatch, "one", f"/save {tmp_path}")
