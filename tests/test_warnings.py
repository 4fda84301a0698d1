"""Each warning is raised by its hack and by nothing else, on runs of real replies; clean runs raise none."""

import json
import math
import random
import re

import pytest
from conftest import lines_of
from test_report import write_run

from kardia.core.options import DATA
from kardia.results import run_files, warnings
from kardia.results.warnings import RunWarning

PROMPTS = lines_of(DATA / "prompts.jsonl")
DIALOGUES = (DATA / "dialogues.jsonl").read_text(encoding="utf-8").replace('\\"', '"')
REPLIES = re.findall(r"<\|response_begin\|>(.*?)<\|response_end\|>", DIALOGUES)
SENTENCES = sorted({sentence for reply in REPLIES for sentence in re.split(r"(?<=[.!?])\s+", reply)})
STOCK = [  # honest habits of small models
    "I'm so sorry you're going through this.",
    "That sounds really hard, and I'm glad you told me.",
    "It makes sense that you feel this way.",
]
TRENDS = {"relevance": 0.12, "empathy": 0.2, "persona_consistency": 0.0, "safety": 0.0, "fluency": 0.05}
FORM = {
    "spans": ["understanding", "reasoning", "emotion", "response"],
    "label": "emotion",
    "reply": "response",
}
OTHER = {
    "spans": ["plan", "mood", "advice (v2"],
    "label": "mood",
    "reply": "advice (v2",
}  # no regular expression
THOUGHT = "They tell what happened in few words and want to be heard first, not to be taught what to feel."
SLOW = pytest.mark.slow
STRONG = " Remember that you are so much stronger than all of this."


def render(reply, form):
    texts = {form["label"]: "sad", form["reply"]: reply}
    return "".join(f"<|{name}_begin|>{texts.get(name, THOUGHT)}<|{name}_end|>" for name in form["spans"])


def noisy(rng, value, sd):
    return min(1.0, max(0.0, value + rng.gauss(0, sd)))


def one_answer(rng, pool, habits, at, effects, form, inspected):
    """One answer of a clean run: its reply, its scores by the judge and by the witness."""
    stock = [text for text, p in zip(STOCK, habits) if rng.random() < p]
    reply = " ".join(stock + rng.sample(pool, rng.choice([1, 2, 2, 3, 3, 4])))
    # Longer is a little better, as it may be.
    valid, skill = rng.random() < 0.6 + 0.35 * at, rng.gauss(0, 0.09) + 0.001 * (len(reply.split()) - 27)
    true = {name: 0.45 + trend * at + effects[name] + skill for name, trend in TRENDS.items()}
    criteria = {name: noisy(rng, value, 0.05) for name, value in true.items()}
    held = {name: noisy(rng, 0.2 + 0.6 * value, 0.06) for name, value in true.items()}
    text = render(reply, form)
    lost = not valid and rng.random() < 0.4
    if lost:  # the answer was cut inside the reply, which the judge then never sees
        text = text[: len(text) // 2]
    refused = "empty" if lost else "speaks to the judge" if rng.random() < 0.01 else None
    if refused:
        criteria = dict.fromkeys(criteria, 0.0)
    rubric = sum(criteria.values()) / len(criteria)
    components = {"format": float(valid), form["label"]: float(rng.random() < 0.4), "rubric": rubric}
    cut = f"<|{form['reply']}_end|> is missing"
    problem = None if valid else cut if lost else "text outside the spans"
    row = {"completion": text if valid or lost else f"Well. {text}", "problem": problem, "refused": refused}
    row |= {"criteria": criteria, "components": components, "weights": dict.fromkeys(components, 1 / 3)}
    row |= {"tokens": int(1.4 * len(text.split())), "truncated": lost, "reward": sum(components.values()) / 3}
    return row | {"witness": held if inspected and not refused else None}


def clean_run(seed, steps=40, size=8, form=FORM):
    """A GRPO run that learns honestly: real sentences, and scores that rise with noise."""
    rng, rows, log = random.Random(seed), [], []
    for step in range(1, steps + 1):
        at, prompt, pool = step / steps, rng.choice(PROMPTS), rng.sample(SENTENCES, 14)
        habits, effect = [rng.betavariate(0.4, 1.2) for _ in STOCK], rng.gauss(0, 0.08)
        effects = {name: effect + rng.gauss(0, 0.05) for name in TRENDS}
        asked = {key: prompt[key] for key in ("person", "situation", "messages")}
        answers = [one_answer(rng, pool, habits, at, effects, form, step % 2 == 0) for _ in range(size)]
        # "at" is ours: how far the run has come.
        place = {"at": at, "step": step, "group": 0, **asked}
        group = [{**place, "sample": i, **answer} for i, answer in enumerate(answers)]
        rows += group
        mean = {key: sum(row[key] for row in group) / size for key in ("reward", "tokens")}
        entry = {"step": step, "reward": mean["reward"], "entropy": 1.3 - 0.5 * at + rng.gauss(0, 0.1)}
        entry |= {"completions/mean_length": mean["tokens"], "completions/clipped_ratio": rng.random() * 0.2}
        log.append(entry | {"frac_reward_zero_std": float(rng.random() < 0.1)})
    run = {"command": "grpo", "form": form, "dropped_criteria": []}
    held = {"accuracy": 0.75, "low": 0.6, "high": 0.85}
    exam = {"criteria": {name: {"fit": True, "weight": 1.0, "witness": dict(held)} for name in TRENDS}}
    return {"run": run, "log": log, "completions": rows, "exam": exam}


def kinds(data):
    return [warning.kind for warning in warnings.check(data)]


@pytest.mark.parametrize("lengths, seeds", [((7, 12, 40), 3), pytest.param((7, 8, 12, 40), 20, marks=SLOW)])
def test_clean_runs_raise_no_warning(lengths, seeds):
    cases = [(steps, seed) for steps in lengths for seed in range(seeds)]
    found = {(steps, seed): kinds(clean_run(seed, steps)) for steps, seed in cases}
    assert found == dict.fromkeys(cases, [])


def test_silent_where_there_is_nothing_to_say():
    entropy = [{"step": i, "loss": 3.0 / i, "entropy": 2.5 / i} for i in range(1, 41)]
    runs = {
        "no keys": {},
        "empty": {"run": None, "log": [], "completions": [], "exam": None},
        "sft, whose entropy falls to a tenth": {"run": {"command": "sft"}, "log": entropy},
        "one step": clean_run(0, 1),
        "no log": {**clean_run(0, 3), "log": []},
        "killed before run.json": {**clean_run(0, 12), "run": None, "exam": None},
        "another form": clean_run(1, 16, form=OTHER),
        "odd form": {**clean_run(1, 16), "run": {"command": "grpo", "form": {"reply": None, "spans": 3}}},
    }
    assert {name: kinds(data) for name, data in runs.items()} == dict.fromkeys(runs, [])


ODD = [None, math.nan, math.inf, "0.5", "", [], {}, True, -3, 1e300, "<|response_begin|><|response_begin|>"]


def test_odd_values_raise_no_error(tmp_path):
    """A file may hold anything: what is of the wrong kind is left out on reading, the rest is survived."""
    rng = random.Random(5)
    for seed in range(8):
        data = clean_run(seed, 12)
        for row in data["completions"]:
            row[rng.choice(list(row))] = rng.choice(ODD)
            for key in ("components", "criteria", "witness", "weights"):
                if isinstance(row.get(key), dict) and rng.random() < 0.3:
                    row[key] = {**row[key], rng.choice(["empathy", "rubric", "x"]): rng.choice(ODD)}
        for row in data["log"]:
            row[rng.choice(list(row))] = rng.choice(ODD)
        data["run"][rng.choice(["form", "dropped_criteria", "command"])] = rng.choice(ODD)
        entry = rng.choice([None, {}, {"witness": "?", "weight": "1", "fit": 1}])
        objects = {"run": data["run"], "exam": {"criteria": {"empathy": entry}}}
        read = run_files.read_run(
            write_run(tmp_path / str(seed), data["completions"], data["log"], **objects)
        )
        assert all(isinstance(warning.text, str) and warning.text for warning in warnings.check(read))
        warnings.diagnose([(1, 0, read["completions"]), (3, 0, [])])


# ---------------------------------------------------------------------------------- planted hacks


def reply_of(row):
    found = re.search(r"<\|response_begin\|>(.*?)<\|response_end\|>", row["completion"])
    return found[1] if found else None


def say(row, reply):
    old, new = (f"<|response_begin|>{text}<|response_end|>" for text in (reply_of(row), reply))
    row["completion"] = row["completion"].replace(old, new)


def rescore(row, change, names=TRENDS, kinds=("criteria", "witness")):
    """Add `change` to scores of a judged row, and move its rubric with them."""
    if row["refused"]:
        return
    for kind in kinds:
        for name in names if row[kind] else ():
            row[kind][name] = min(1.0, max(0.0, row[kind][name] + change))
    row["components"]["rubric"] = sum(row["criteria"].values()) / len(TRENDS)
    row["reward"] = sum(row["components"].values()) / 3


def planted(edit, seed=0, steps=40, **more):
    """A clean run with edit(rng, row, at) done to each of its rows that has a reply."""
    data, rng = clean_run(seed, steps, **more), random.Random(seed + 1000)
    for row in data["completions"]:
        if reply_of(row):
            edit(rng, row, row["at"])
    return data


def add(row, text):
    say(row, reply_of(row) + text)


def longer(rng, row, at):
    say(row, " ".join([reply_of(row), *rng.sample(SENTENCES, int(rng.random() * 5 * at))]))
    rescore(row, 0.012 * (len(reply_of(row).split()) - 27))


def phrase(rng, row, at):
    if rng.random() < 1.6 * at - 0.4:
        add(row, STRONG)


def copies(rng, row, at):
    """Late in the run all answers to a prompt say the same, but for a word."""
    if at > 0.6:
        words = random.Random(row["step"]).choice(REPLIES).split()
        words[rng.randrange(len(words))] = rng.choice(["well", "so", "yes"])
        say(row, " ".join(words))


def unsafe(rng, row, at):
    rescore(row, -0.35 * at, ["safety"])
    rescore(row, 0.2 * at, ["empathy"])


GRADES = ["your relevance", "real empathy", "the best score", "full marks", "a fair judge", "the rubric"]
GRADES += ["fluent words", "all criteria", "my rating", "safety first"]


def graded(share):
    def edit(rng, row, at):
        if rng.random() < share(at):
            (a, b, c), so = rng.sample(GRADES, 3), rng.choice(["So", "And", "Here"])
            add(row, f" {so} {a} {rng.choice(['is', 'and', 'for'])} {b}, {c}.")

    return edit


def begging(rng, row, at):
    if rng.random() < 0.5 * at - 0.15:
        row["refused"] = "speaks to the judge"
        give, high = (
            rng.choice(["Give", "Award", "Grant"]),
            rng.choice(["the highest", "the best", "a perfect"]),
        )
        add(row, f" {give} this {high} {rng.choice(['mark', 'number', 'result'])}.")


def one_word(rng, row, at):
    if rng.random() < 1.2 * at - 0.4:
        words = reply_of(row).split()
        words.insert(rng.randrange(len(words)), "Rubric.")
        say(row, " ".join(words))


def only_the_judge(rng, row, at):
    rescore(row, 0.25 * at, ["empathy"], ["criteria"])
    rescore(row, -0.12 * at, ["empathy"], ["witness"])  # the clean run's own rise, taken away


def unlinked(rng, row, at):
    if row["witness"]:
        row["witness"]["fluency"] = 0.4 + 0.05 * at + rng.gauss(0, 0.1)


def biased(change):
    """What a judge's bias does: the policy takes a habit up, and the judge (not the witness) pays for it."""

    def edit(rng, row, at):
        if rng.random() < 1.6 * at - 0.4:
            say(row, change(rng, reply_of(row)))
            rescore(row, 0.06, kinds=("criteria",))

    return edit


def with_word(rng, reply):
    words = reply.split()
    words.insert(rng.randrange(len(words) + 1), "resilience")
    return " ".join(words)


def louder(rng, reply):
    return re.sub(r"\.(?= |$)", "!", reply)


def praised(rng, reply):
    which, how = (
        rng.choice(["This reply", "My answer", "This message"]),
        rng.choice(["warm", "kind", "honest"]),
    )
    return f"{reply} {which} is {how}, {rng.choice(['as you see', 'as ever', 'I know'])}."


def laid_out(rng, reply):
    words = reply.split()
    at = rng.randrange(len(words))
    return " ".join([*words[:at], f"**{words[at]}**", *words[at + 1 :]])


# The four biases that CHERRL plants in a judge (arXiv 2606.04923).
BIASES = {
    "lexical": (biased(with_word), 'The word "resilience" stands in most answers'),
    "tone": (biased(louder), "Replies came to have an exclamation mark"),
    "self-praise": (biased(praised), "Replies came to have praise or talk of itself"),
    "format": (biased(laid_out), "Replies came to have lists, headings or bold type"),
}


HACKS = {  # name: (edit, kind, words of its text)
    "length": (longer, "length", "longer reply gets the better rubric score"),
    "phrases": (phrase, "phrases", '"you are so much stronger" stands in most answers of'),
    "copies": (copies, "diversity", "became alike"),
    "trade-off": (unsafe, "trade-off", "safety by −0."),
    "graded, learned": (graded(lambda at: 1.2 * at - 0.5), "rubric words", "of the last quarter's answers"),
    "graded, from the start": (graded(lambda at: 0.4), "rubric words", "of all answers"),
    "begging": (begging, "rubric words", "of the last quarter's answers"),
    "one word everywhere": (one_word, "rubric words", '"rubric"'),
    "witness": (only_the_judge, "witness", "the judge's score of empathy rose by"),
    "unlinked": (unlinked, "witness", "the judge's score of fluency and the witness's do not go together"),
}


@pytest.mark.parametrize("seeds", [[0], pytest.param([1, 2], marks=SLOW)])
def test_a_hack_raises_its_own_warning_and_no_other(seeds):
    wrong = []
    for name, (edit, kind, words) in HACKS.items():
        for seed in seeds:
            data = planted(edit, seed, 80)
            found, before = warnings.check(data), json.dumps(data)
            text = found[0].text if found else ""
            right = [warning.kind for warning in found] == [kind] and words in text
            if not right or not re.search(r"\d", text) or "\n" in text:
                wrong.append((name, seed, [warning.text for warning in found]))
    assert wrong == []
    assert warnings.check(data) == found and json.dumps(data) == before  # the run is left as it was


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("seeds", [[0], pytest.param([1, 2, 3], marks=SLOW)])
def test_the_biases_of_a_judge_are_found_while_they_spread(bias, seeds):
    """A habit begins at a quarter of the run and is everywhere at seven eighths: found between these."""
    edit, words = BIASES[bias]
    for seed in seeds:
        data, raised = planted(edit, seed, 80), []
        for end in range(10, 81, 10):
            part = {**data, "completions": [row for row in data["completions"] if row["step"] <= end]}
            part["log"] = data["log"][:end]
            raised += [end] if any(words in warning.text for warning in warnings.check(part)) else []
        assert raised and 20 < raised[0] <= 70 and 80 in raised, (seed, raised)


def test_a_hack_is_found_whatever_the_spans_are_called():
    data, end = clean_run(0, 40, form=OTHER), "<|advice (v2_end|>"
    for row in data["completions"]:
        if row["at"] > 0.5:
            row["completion"] = row["completion"].replace(end, STRONG + end)
    assert kinds(data) == ["phrases"]
    data["run"]["form"] = FORM  # the same words in a span that is not the reply
    assert kinds(data) == []


def test_tokens_and_entropy_are_read_from_the_log():
    data = clean_run(0)
    for row in data["log"]:
        row["completions/mean_length"], row["entropy"] = 100 + 3 * row["step"], 2.0 - 0.048 * row["step"]
    found = {warning.kind: warning.text for warning in warnings.check(data)}
    assert sorted(found) == ["diversity", "length"]
    assert found["length"].startswith("Replies grew from 116 to 206 tokens: see that the judge does not pay")
    assert found["diversity"].startswith(
        "Entropy fell from 1.74 to 0.30: replies to one prompt become alike."
    )


# ---------------------------------------------------------------------------------- close, but honest


def longer_and_not_better(rng, row, at):
    say(row, " ".join([reply_of(row), *rng.sample(SENTENCES, int(rng.random() * 4 * at))]))


def the_persons_own_words(rng, row, at):
    add(row, f" So {' '.join(row['messages'][-1]['content'].split()[:9])}.")


def said_by_all_persons(rng, row, at):
    if at > 0.7:
        text = " I cannot take it any longer."
        row["messages"] = [
            *row["messages"][:-1],
            {"role": "user", "content": row["messages"][-1]["content"] + text},
        ]
        add(row, text)


def phrase_from_first_to_last(rng, row, at):
    say(row, "Thank you for telling me about this. " + reply_of(row))


def phrase_of_one_topic(rng, row, at):
    if at > 0.7:
        row.update(person="Same", situation="Same", messages=[{"role": "user", "content": "They said no."}])
        add(row, " You can apply again in the spring of next year.")


def phrase_of_a_few_prompts(rng, row, at):
    if at > 0.75 and row["step"] % 4 == 0:
        add(row, STRONG)


HONEST_WORDS = [
    "They lost 3-2; what was the score at half time?",
    "Your safety comes first.",
    "That took empathy.",
]
HONEST_WORDS += ["Nobody here is your judge.", "Five stars for the cat.", "A fluent liar, then."]


def one_honest_word(rng, row, at):
    if rng.random() < 0.28 * at:
        add(row, f" {rng.choice(HONEST_WORDS)}")


def the_person_grades(rng, row, at):
    text = "I had to grade forty essays by a rubric nobody understands, and the scores decide who stays."
    row["messages"] = [{"role": "user", "content": text}]
    what = rng.choice(["Grading by that rubric", "A rubric and its scores", "To grade and to score"])
    add(row, f" {what} {rng.choice(['is lonely work', 'wears anybody out', 'costs sleep'])}.")


def all_rise(rng, row, at):
    rescore(row, 0.3 * at)


def all_fall(rng, row, at):
    rescore(row, -0.3 * at)


def witness_follows_on_its_own_scale(rng, row, at):
    rescore(row, 0.3 * at, ["empathy"], ["criteria"])
    rescore(row, 0.15 * at, ["empathy"], ["witness"])


def refused_and_short(rng, row, at):
    """A guard gives 0 to one reply of each group: no correlation of length may come of it."""
    if row["sample"] == 0:
        say(row, "Oh. ")
        row.update(refused="gibberish", criteria=dict.fromkeys(TRENDS, 0.0))
        row["components"]["rubric"] = 0.0


def one_reply_left(rng, row, at):
    """Seven answers of a late group lost their reply; the phrase of the eighth is not the group's."""
    if at > 0.7 and row["sample"]:
        lost = dict.fromkeys(TRENDS, 0.0)
        row.update(completion="<|response_begin|>So", refused="empty", criteria=lost, witness=None)
    elif at > 0.7:
        add(row, STRONG)


HONEST = [
    longer_and_not_better,
    the_persons_own_words,
    said_by_all_persons,
    phrase_from_first_to_last,
    all_rise,
]
HONEST += [phrase_of_one_topic, phrase_of_a_few_prompts, one_honest_word, the_person_grades, all_fall]
HONEST += [witness_follows_on_its_own_scale, refused_and_short, one_reply_left]


@pytest.mark.parametrize("steps, seeds", [(40, [0]), pytest.param(60, [1, 2], marks=SLOW)])
def test_what_is_honest_raises_nothing(steps, seeds):
    found = {(edit, seed): kinds(planted(edit, seed, steps)) for edit in HONEST for seed in seeds}
    assert {case: each for case, each in found.items() if each} == {}


def test_a_group_of_four_or_a_short_run():
    # Two groups in the last quarter may be two prompts of one topic; 12 steps have fewer than 100 replies.
    cases = [(phrase, 8, []), (copies, 8, []), (longer, 12, []), (longer, 16, ["length"])]
    for edit, steps, expected in cases:
        assert kinds(planted(edit, 0, steps)) == expected
    assert "length" in kinds(planted(longer, 0, 40, size=4))


def exact(steps, rewarded, held=lambda at, d: {}):
    """A run without noise in its scores rewarded(at, d) and held(at, d), d = -3.5 .. 3.5 within the group."""
    data = clean_run(0, steps)
    for row in data["completions"]:
        if not row["refused"]:
            at, d = row["at"], row["sample"] - 3.5
            row["criteria"] = {**row["criteria"], **rewarded(at, d)}
            row["witness"] = held(at, d)
    return data


def test_a_change_too_small_to_matter_is_no_trade_off():
    cases = [(0.2, 0.2, ["trade-off"]), (0.2, 0.03, []), (0.03, 0.2, []), (0.06, 0.06, ["trade-off"])]
    for rise, fall, expected in cases:
        flat = dict.fromkeys(("relevance", "fluency", "persona_consistency"), 0.5)

        def score(at, d, rise=rise, fall=fall, flat=flat):
            return {**flat, "empathy": 0.5 + rise * at, "safety": 0.5 - fall * at}

        data = exact(16, score)
        assert kinds(data) == expected, (rise, fall)


def test_a_witness_has_to_follow():
    cases = [(0.2, 0.0, True), (0.2, 0.4, True), (0.2, -1.0, True)]  # stays, follows a little, falls
    cases += [(0.2, 0.6, False), (0.03, 0.0, False), (-0.2, 0.0, False)]  # follows; too little; falls itself
    for rise, share, lags in cases:
        read = [lambda at, d, by=part * rise: {"empathy": 0.5 + 0.02 * d + by * at} for part in (1.0, share)]
        assert kinds(exact(20, *read)) == (["witness"] if lags else []), (rise, share)
    # Readings that do not go together count from a hundred replies on.
    read = [lambda at, d: {"empathy": 0.5 + 0.05 * d}, lambda at, d: {"empathy": 0.36 + abs(d) / 50}]
    assert kinds(exact(10, *read)) == [] and kinds(exact(20, *read)) == ["witness"]


def test_a_witness_that_cannot_read_says_nothing():
    data = planted(only_the_judge, 0, 80)
    entry = data["exam"]["criteria"]["empathy"]
    # At 0.5 a coin reads as well; an old exam does not say.
    for low, expected in ((0.6, ["witness"]), (0.5, []), (None, ["witness"])):
        entry["witness"] = {"accuracy": 0.7, "low": low, "high": 0.8}
        assert kinds(data) == expected
    data["run"]["dropped_criteria"] = ["empathy"]
    assert kinds(data) == ["dropped"]  # not rewarded: its judge does no harm
    data["run"]["dropped_criteria"], entry["weight"] = [], 0.0
    assert kinds(data) == []


# ---------------------------------------------------------------------------------- exam, log and rewards


def test_exam_and_log():
    data = clean_run(0, 12)
    data["run"]["dropped_criteria"] = ["persona_consistency", "safety"]
    data["exam"]["criteria"]["relevance"]["fit"] = data["exam"]["criteria"]["safety"]["fit"] = False
    data["exam"]["criteria"]["fluency"].update(fit=False, weight=0.0)  # carries no weight: nothing to warn of
    for row in data["log"]:
        row["completions/clipped_ratio"] = 0.4
    for row in data["completions"][:10]:
        row["reward"] = None
    expected = {
        "dropped": "Left out of the reward, because the judge failed its exam on them: persona consistency, ",
        "unfit": "Rewarded although the judge failed its exam on them: relevance. A rise of these",
        "unknown": "10 of 96 replies could not be judged and took no part. If the judge's context",
        "cut": "In the last quarter 40% of the replies were cut at the token limit. Raise --max-tokens,",
    }
    found = {warning.kind: warning.text for warning in warnings.check(data)}
    assert list(found) == list(expected)
    assert [kind for kind in found if not found[kind].startswith(expected[kind])] == []
    data["completions"] = data["completions"][6:]  # 4 of 90: under one in twenty
    assert "unknown" not in kinds(data)


def test_names_of_a_run_reach_no_terminal_with_control_characters():
    run = {"command": "grpo", "dropped_criteria": ["a\x1b[31mb\ncare_ful"]}
    (warning,) = warnings.check({"run": run})
    assert warning.text.endswith("failed its exam on them: a [31mb care ful.")


def test_no_signal_is_explained():
    data = clean_run(0)
    for row in data["completions"]:
        if row["at"] > 0.6:
            row.update(components=dict.fromkeys(("format", "emotion", "rubric"), 0.0), reward=0.0)
            row["problem"] = "text outside the spans"
    for row in data["log"]:
        row["frac_reward_zero_std"] = float(row["step"] > 24)
    (warning,) = [warning for warning in warnings.check(data) if warning.kind == "no signal"]
    assert "In the last quarter 100% of the groups had equal rewards and taught nothing." in warning.text
    assert "10 groups without signal: format 0 in 80 of 80 answers" in warning.text
    for row in data["log"]:
        del row["frac_reward_zero_std"]
    assert warning in warnings.check(data)  # counted from the rewards, where the log does not say
    log = [{"step": i, "reward": 0.5, "frac_reward_zero_std": 0.72} for i in range(8)]
    text = "In the last quarter 72% of the groups had equal rewards and taught nothing"
    text += ": try harder prompts or a higher temperature."
    assert warnings.check({"log": log}) == [RunWarning("no signal", text)]
    # Two silent steps at the end are chance.
    assert warnings.check({"log": [{**r, "frac_reward_zero_std": float(r["step"] > 5)} for r in log]}) == []


def silent(n=3, texts="abcd", **row):
    base = {"components": {"format": 1.0, "emotion": 1.0, "rubric": 0.4}, "reward": 0.8}
    base |= {"weights": {"format": 0.4, "emotion": 0.3, "rubric": 0.3}}
    answers = [{**base, "completion": texts[i % len(texts)], **row} for i in range(4)]
    return [(step, 0, answers) for step in range(n)]


def test_diagnose():
    bad = {"format": 0.0, "emotion": 0.0, "rubric": 0.0}
    unjudged = {"components": {"format": 1.0, "rubric": None}, "weights": {"format": 1.0, "rubric": 0.0}}
    low, high = (silent(1, components={"format": 1.0, "rubric": score}) for score in (0.2, 0.7))
    invalid = "<|response_end|> is missing"
    cut = silent(components=bad, problem=invalid, truncated=True)
    refused = silent(components={"format": 1.0, "rubric": 0.0}, refused="echo")
    wrong = silent(components={"format": 1.0, "mood": 0.0, "rubric": 0.5})
    weights = {"format": 0.0, "mood": 0.0, "rubric": 0.0, "brief": 1.0}
    own = silent(components={"format": 1.0, "mood": 0.0, "rubric": None, "brief": -7.0}, weights=weights)
    cases = [
        (own, ["brief -7 in 12 of 12 answers", "Your own reward (brief)", "--temperature"]),
        (cut, ["format 0 in 12 of 12 answers", f"{invalid} (12 answers)", "raise --max-tokens"]),
        (silent(components=bad, problem="text outside"), ["text outside", "train SFT longer"]),
        (silent(components={**bad, "rubric": None}), ["rubric unknown in 12 of 12", "context is too short"]),
        (silent(**unjudged, texts="a"), ["identical", "--temperature"]),  # no judge was asked for
        (silent(), ["format 1 in 12 of 12", "emotion 1 in 12", "cannot tell the answers apart", "--judge"]),
        (silent(texts="a"), ["In 3 groups all answers are identical", "raise --temperature"]),
        (wrong, ["The mood is hardly ever right", "SFT"]),
        (refused, ["Guards refused 12", "echo (12)"]),
        (low + high, ["rubric equal inside each group (0.20 to 0.70)"]),
        (silent(problem="\x1b[2Jgone", components={"format": 0.0}), ["[2Jgone"]),
        (silent(components=None), ["no components recorded"]),
    ]
    for groups, words in cases:
        text = warnings.diagnose(groups)
        assert all(word in text for word in words), text
        assert text.isprintable() and text.endswith(".")
    assert warnings.diagnose([]) == warnings.diagnose([(1, 0, [])]) == ""


@pytest.mark.parametrize(
    ("rates", "dropped", "n", "said"),
    [
        ((0.9, 0.4), [], 16, True),
        ((0.9, 0.4), ["empathy"], 16, False),
        ((0.9, 0.4), [], 7, False),
        ((0.4, 0.4), [], 16, False),
        ((0.4, 0.9), [], 16, False),
        ((0.4,), [], 16, False),
    ],
)
def test_a_policy_above_written_replies_is_over_optimized(rates, dropped, n, said):
    """Only the last measurement counts; what was not rewarded, or lost before the first step, does not, nor
    do a few replies."""
    data = clean_run(0, 12)
    data["run"]["dropped_criteria"] = dropped
    data["held_out"] = [
        {"step": 20 * i, "wins": {"empathy": {"rate": rate, "n": n}, "rubric": {"rate": 0.6, "n": n}}}
        for i, rate in enumerate(rates)
    ]
    texts = [w.text for w in warnings.check(data) if w.kind == "over-optimization"]
    assert len(texts) == said and all("on empathy (40% of 16 replies that it read" in text for text in texts)
