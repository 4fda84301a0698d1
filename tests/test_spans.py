"""The four-span answer: what is one, what is not, and what the person is told."""

import pytest

import kardia_lite as k

GOOD = {"understanding": "u", "reasoning": "r", "emotion": "sad", "response": "p"}
ANSWER = k.render_answer(GOOD)


def test_round_trip():
    assert k.parse_answer(ANSWER) == GOOD


@pytest.mark.parametrize(
    "text", [f"\n {ANSWER}\n", ANSWER.replace("<|reasoning_begin|>", "\n\n<|reasoning_begin|> ")]
)
def test_white_space_around_spans_is_fine(text):
    assert k.parse_answer(text) == GOOD


def test_text_inside_a_span_may_be_anything_but_a_marker():
    spans = {**GOOD, "response": "a < b, <|im_end|>, <|x|>, ünïcödé\nsecond line"}
    assert k.parse_answer(k.render_answer(spans)) == spans


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "<|understanding_begin|> is missing"),
        ("I am sorry.", "<|understanding_begin|> is missing"),
        (ANSWER.replace("<|reasoning_end|>", ""), "<|reasoning_end|> is missing"),
        (ANSWER[: -len("<|response_end|>")], "<|response_end|> is missing"),  # cut off at the token limit
        (ANSWER + "<|response_begin|>q<|response_end|>", "stands 2 times"),
        (ANSWER + ANSWER, "stands 2 times"),
        (k.render_answer({**GOOD, "emotion": " \n"}), "the emotion span is empty"),
        (ANSWER + " Take care!", "text outside"),
        ("Well: " + ANSWER, "text outside"),
        (ANSWER.replace("<|reasoning_begin|>", " hm <|reasoning_begin|>"), "text outside"),
        (
            "<|emotion_begin|>sad<|emotion_end|>" + ANSWER.replace("<|emotion_begin|>sad<|emotion_end|>", ""),
            "out of order",
        ),
        (
            ANSWER.replace(
                "<|understanding_begin|>u<|understanding_end|>",
                "<|understanding_end|>u<|understanding_begin|>",
            ),
            "out of order",
        ),
        (
            ANSWER.replace(
                "<|understanding_end|><|reasoning_begin|>", "<|reasoning_begin|><|understanding_end|>"
            ),
            "out of order",
        ),
        (ANSWER.lower().replace("<|response_begin|>", "<|Response_Begin|>"), "<|response_begin|> is missing"),
    ],
)
def test_what_is_not_an_answer_says_why(text, reason):
    with pytest.raises(k.SpanError, match=reason.replace("|", r"\|")):
        k.parse_answer(text)


def test_a_span_is_found_in_an_invalid_answer():
    assert k.find_span("<|response_begin|> hi <|response_end|> and more", "response") == "hi"
    assert k.find_span("<|response_begin|> hi", "response") is None
