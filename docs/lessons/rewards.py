"""The rewards of the lessons: functions for `grpo --reward docs/lessons/rewards.py:NAME`."""

WARM = ("sorry", "understand", "feel", "hear", "sounds", "hard", "care", "here for you")


def brief(row, answers):
    """Pay one half for a reply of at most 20 words, one half for a question at its end."""
    replies = [answer.span("response") for answer in answers]
    return [(0 < len(reply.split()) <= 20) / 2 + reply.endswith("?") / 2 for reply in replies]


def warm(row, answers):
    """Pay for warm words, a fifth each: it means well, and can be cheated."""
    replies = [answer.span("response").lower() for answer in answers]
    return [min(1.0, sum(reply.count(word) for word in WARM) / 5) for reply in replies]
