"""What decides before any model is asked (guards), and what decides whether a model may decide (the exam)."""

import dataclasses
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import run

import kardia_lite as k
from kardia.data.rubric import GUARDS, METHODS, Cue
from kardia.judge import exam, opening, train
from kardia.judge.cues import CUES, cue_report, followed_cue
from kardia.judge.exam_statistics import chance, choose_method, fit_calibration, wilson
from kardia.judge.guards import guard
from kardia.judge.judge import (
    KNOWN_BAD,
    USUAL_TOKENS,
    Calibration,
    Judge,
    JudgedReply,
    JudgeOptions,
    WitnessedJudgeOptions,
    weighted,
)
from kardia.judge.opening import Witness, apply, drop_unfit_criteria, resolve_witness
from kardia.llama.sampling import sigmoid
from kardia.models import packed_rows
from kardia.models.policy import new_lora
from kardia.results.tables import exam_table

CASES = yaml.safe_load((Path(__file__).parent / "guards.yaml").read_text(encoding="utf-8"))
SAID = [CASES["said"]]
EXAM_PAIRS, TRAIN_PAIRS = k.DATA / "judge_exam.jsonl", k.DATA / "judge_train.jsonl"

# ---------------------------------------------------------------- guards


def test_every_guard_refuses_what_it_is_for():
    cases = {**CASES["refused"], "too long to be read": ["Oh no. " * 300]}
    assert set(cases) == set(GUARDS)
    found = [(reply, why, guard(reply, SAID)) for why, replies in cases.items() for reply in replies]
    assert [case for case in found if case[1] != case[2]] == []
    assert [reply for reply, why, _ in found if guard(reply, SAID, names=[why]) != why] == []
    assert [reply for reply, *_ in found if guard(reply, SAID, names=[]) is not None] == []


def test_guards_spare_kind_replies_that_come_close():
    spared = [(reply, SAID) for reply in CASES["spared"]]
    spared += [(case["reply"], [case["said"]]) for case in CASES["answered"]]
    assert len(spared) > 100
    assert [(reply, guard(reply, said)) for reply, said in spared if guard(reply, said)] == []


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_guards_spare_every_better_reply(rubric, every):
    """The rules are narrow: 867 good replies and every response of the dialogues pass."""
    replies = []
    for path in (EXAM_PAIRS, TRAIN_PAIRS):
        pairs = exam.load_pairs(path, [c.name for c in rubric.criteria])
        replies += [JudgedReply.from_pair(pair, "better") for pair in pairs]
    assert len(replies) == 867
    for row in k.load_rows([k.DATA / "dialogues.jsonl", k.DATA / "eval.jsonl"], rubric):
        for i in range(1, len(row.messages), 2):
            history = dataclasses.replace(row, messages=row.messages[:i])
            replies.append(JudgedReply.from_dialogue(history, k.find_span(row.messages[i][1], "response")))
    assert [r.reply for r in replies[::every] if guard(r.reply, r.said)] == []


def test_what_the_person_speaks_of_may_be_answered():
    code = "Breathe first. Then try:\n```\nfor row in rows:\n    print(row)\n```"
    assert guard(code, ["My python homework is due at nine and I am crying over a loop."]) is None
    assert guard(code, SAID) == "markup"
    russian = ["Моя печь сломалась, и я плакала."]
    assert guard("Мне очень жаль, что печь сломалась.", russian) is None
    assert guard("I am sorry about the oven, truly.", russian) == "other script"


# ---------------------------------------------------------------- what a judge sees and reads


class FakeWorker:
    """Tokens are characters; log-probabilities follow from the ids, so they can be worked out by hand."""

    def __init__(self, context=10_000, n_params=10**6, template=""):
        self.info = {"bos": 1, "add_bos": True, "n_ctx_train": context, "n_params": n_params, "gpu": False}
        self.info |= {"template": template, "bos_piece": "<s>", "eos_piece": "</s>"}
        self.asked = []

    def load(self, role, path, gpu_layers):
        return self.info

    def set_lora(self, role, path):
        pass

    def tokenize(self, role, texts, special=False):
        return [[ord(c) for c in text] for text in texts]

    def branches(self, role, prefix, replies, suffixes, score_reply=False):
        self.asked.append((prefix, replies, suffixes, score_reply))
        words = [[-(len(word) + i) for i, word in enumerate(choices)] for _, choices in suffixes]
        return [{"suffixes": words, "reply": -1.0 * len(prefix) * len(reply)} for reply in replies]


def judged(reply, person="Ana, 40", situation="Rain.", said="It rains."):
    return JudgedReply(person, situation, (("user", said),), reply)


def text_of(ids):
    return "".join(map(chr, ids))


def test_contexts_of_every_kind_of_row(rubric):
    assert judged("x").context == "Profile: Ana, 40\nSituation: Rain.\n\nUser: It rains.\nListener:"
    assert judged("x", person=k.NO_PROFILE, situation="").context == "User: It rains.\nListener:"
    answer = k.render_answer({"understanding": "u", "reasoning": "r", "emotion": "sad", "response": "Oh no."})
    messages = (("user", "hi"), ("assistant", answer), ("user", "well"))
    turns = (("user", "hi"), ("assistant", "Oh no."), ("user", "well"))
    dialogue = k.Dialogue("Ana", "", "sad", "Rain.", "a", messages)
    assert JudgedReply.from_dialogue(dialogue, "x") == JudgedReply("Ana", "Rain.", turns, "x")
    chat = [{"role": role, "content": text} for role, text in (("system", "Be kind."), *messages)]
    row = {"messages": chat, "response": answer, "persona": "Ana", "situation": None}
    assert JudgedReply.from_row(row) == JudgedReply("Ana", "", turns, "Oh no.")
    pair = {"messages": chat[1:2], "better": "b", "worse": "w"}
    assert JudgedReply.from_pair(pair, "worse") == JudgedReply("", "", (("user", "hi"),), "w")
    for wrong in (3, {}, {**row, "response": 5}, {**row, "messages": [3]}, {**row, "messages": chat[:1]}):
        with pytest.raises(ValueError):
            JudgedReply.from_row(wrong)


def test_a_judge_reads_each_method_from_its_own_words(rubric):
    worker = FakeWorker()
    judge = Judge(worker, "j.gguf", rubric)
    empathy = next(c for c in rubric.criteria if c.name == "empathy")
    replies = [judged("Take your time."), judged(" I hear you. "), judged("I hear you.", situation="")]
    numbers = judge.numbers(replies, [(empathy, m) for m in ("ask", "contrast", "pmi", "likelihood")])
    # One prefix per context, and pmi's bare one.
    assert [len(asked[1]) for asked in worker.asked] == [2, 2, 1, 1]
    prefix, ids, suffixes, _ = worker.asked[0]
    assert text_of(prefix[1:]) == replies[0].context and prefix[0] == 1
    assert [text_of(reply) for reply in ids] == [" Take your time.", " I hear you."]
    assert text_of(suffixes[0][0]) == empathy.ask and [text_of(w) for w in suffixes[0][1]] == [" yes", " no"]
    assert numbers[0]["empathy", "ask"] == -4 - (-4)  # " yes" first, " no" second: lengths 4 and 3
    gain, tokens = -(len(prefix) - len("Listener:") - 1), len(" Take your time.")
    assert numbers[0]["empathy", "pmi"] == pytest.approx(gain * tokens / (tokens + USUAL_TOKENS))
    assert numbers[0]["empathy", "likelihood"] == pytest.approx(-len(prefix))
    assert judge.scores([judged(" \n")]) == [dict.fromkeys(rubric.weights, 0.0)]  # a guard: no model is asked
    assert len(worker.asked) == 4
    free = Judge(worker, "j.gguf", dataclasses.replace(rubric, guards=()))
    assert free.refused(judged("Score: 5")) is None and judge.refused(judged("Score: 5"))


def test_a_big_judge_answers_in_its_chat_template(rubric):
    template = "{% for m in messages %}<u>{{ m.content | trim }}</u>{% endfor %}<think>\n"
    worker = FakeWorker(n_params=7 * 10**9, template=template)
    judge = Judge(worker, "j.gguf", rubric)
    safety = next(c for c in rubric.criteria if c.name == "safety")
    value = judge.numbers([judged("I hear you.")], [(safety, "likert")])[0]["safety", "likert"]
    weights = [2.718281828459045 ** -(1 + i) for i in range(5)]
    assert value == pytest.approx(sum(d * w for d, w in enumerate(weights, 1)) / sum(weights))
    before, ids, suffixes, _ = worker.asked[0]
    assert text_of(before[1:]).startswith("<u>Here is a conversation") and text_of(ids[0]) == "I hear you."
    assert text_of(suffixes[0][0]).endswith("</u><think>\n\n</think>\n\nScore: ")
    both = judge.numbers([judged("I hear you.")], [(safety, "chat"), (safety, "likert")])[0]
    assert both == {(safety.name, "likert"): value, (safety.name, "chat"): pytest.approx(2.0)}
    asked = text_of(worker.asked[1][2][0][0])  # the rubric's question, of which the word "Answer:" is no part
    assert asked.startswith("\n\nIs the reply safe and responsible? Answer with yes or no.</u>")
    assert [text_of(word) for word in worker.asked[1][2][0][1]] == list("ssoo")  # the last character: a token
    judge.info["template"] = "{{ 'no text' }}"
    with pytest.raises(k.UserError, match="does not carry the user's text"):
        judge.numbers([judged("I hear you.")], [(safety, "likert")])


def test_methods_that_suit_a_judge(rubric):
    criterion = dataclasses.replace(rubric.criteria[0], methods=METHODS)
    small = {"ask", "chat", "likert"}
    for n_params, left_out in ((10**6, small), (5 * 10**8, {"likert"}), (2 * 10**9, set())):
        judge = Judge(FakeWorker(n_params=n_params), "j", rubric)
        assert judge.candidates(criterion) == tuple(m for m in METHODS if m not in left_out)
    taught = Judge(FakeWorker(), "j", rubric, lora="l.gguf")
    assert taught.candidates(criterion)[:2] == ("ask", "contrast") and taught.chosen(criterion) == "ask"
    mixed = dataclasses.replace(criterion, methods=("mix", "ask"))
    assert taught.candidates(mixed) == ("contrast", "mix")  # the LoRA's own part first; the exam chooses
    digits = dataclasses.replace(criterion, methods=("likert",))
    assert taught.candidates(digits) == ("likert",)  # what is left if nothing suits
    taught.method[criterion.name] = "pmi"
    assert taught.chosen(criterion) == "pmi"


def test_what_does_not_fit_is_unknown_and_never_zero(rubric):
    cues = [cue for c in rubric.criteria for cue in c.cues]
    tail = sum(len("".join((cue.text, *cue.good, *cue.bad))) for cue in cues)
    judge = Judge(FakeWorker(context=tail + 200), "j", rubric)
    replies = ["I hear you.", " ".join(CASES["spared"][:12])]
    short, long = judge.scores([judged(reply) for reply in replies])
    assert None not in short.values() and set(long.values()) == {None}  # each by itself
    assert weighted(short, rubric.weights) is not None and weighted(long, rubric.weights) is None
    weights = {"a": 1.0, "b": 3.0, "c": 0.0}
    assert weighted({"a": 1.0, "b": 0.5, "c": None}, weights) == 0.625  # no weight: may be unknown
    assert weighted({"a": 1.0, "b": None}, weights) is None and weighted({"a": 1.0}, {"a": 0.0}) is None


def test_calibrated_scores_and_the_witness(rubric):
    judge = Judge(FakeWorker(), "j", rubric)
    assert judge.witness_scores([judged("I hear you.")]) == []
    judge.calibration = {"safety": Calibration(2.0, 1.0)}
    raw, score = (f([judged("I hear you.")])[0]["safety"] for f in (judge.raw, judge.scores))
    assert score == sigmoid(2 * (raw - 1)) and Calibration()(KNOWN_BAD) == 0.0 and Calibration()(None) is None
    judge.witness = Witness(FakeWorker(), "w", rubric)
    assert judge.witness_scores([judged("I hear you.")]) == []  # it can read nothing
    exam_of_witness = {"criteria": {"safety": {"method": "held_out", "slope": 1.0, "middle": 0.0}}}
    apply(judge.witness, exam_of_witness)
    assert judge.witness_scores([judged("I hear you."), judged("")]) == [{"safety": 0.5}, {"safety": 0.0}]
    questions = [text_of(suffix[0]) for suffix in judge.witness.worker.asked[-1][2]]
    assert questions == [c.held_out for c in rubric.criteria if c.name == "safety"]
    nothing = {"cues": (), "held_out": "", "mix": ()}
    bare = dataclasses.replace(rubric.criteria[0], name="bare", methods=("ask",), **nothing)
    judge.witness.rubric = dataclasses.replace(rubric, criteria=(*rubric.criteria, bare))
    assert list(judge.witness_scores([judged("I hear you.")])[0]) == [
        "safety"
    ]  # nothing of what it cannot read
    plain = dataclasses.replace(bare, held_out="\nIs it? Answer:")
    assert judge.witness.candidates(plain) == ("held_out",)  # it has no cues


def test_who_is_a_witness(embedded, rubric, tmp_path):
    """By default the embedded model without a LoRA; of the judge's own weights nothing that is rewarded."""
    assert resolve_witness("none") is None and resolve_witness("auto") == embedded.gguf(16)
    with pytest.raises(k.UserError, match="gguf"):
        resolve_witness(str(tmp_path / "nothing.gguf"))
    fluency = dataclasses.replace(rubric.criteria[0], mix=(("contrast", 2.0), ("pmi", 1.0)))
    for taken, left in (
        (None, "mix"),
        ("contrast", "held_out"),
        ("ask", "mix"),
        ("mix", "held_out"),
    ):
        witness = Witness(FakeWorker(), "w", rubric, {fluency.name: taken})
        assert witness.candidates(fluency) == (left,), taken
    unmixed = dataclasses.replace(fluency, mix=())
    assert Witness(FakeWorker(), "w", rubric).candidates(unmixed) == ("contrast",)
    bare = dataclasses.replace(unmixed, cues=(), held_out="", methods=("pmi",))
    assert Witness(FakeWorker(), "w", rubric).candidates(bare) == ("pmi",)
    assert Witness(FakeWorker(), "w", rubric, {bare.name: "pmi"}).candidates(bare) == ()


# ---------------------------------------------------------------- the exam, with a judge made of arithmetic


class FakeJudge(Judge):
    """A judge whose number is a function of (reply, criterion, method)."""

    def __init__(self, rubric, number):
        super().__init__(FakeWorker(), "fake.gguf", rubric)
        self.number = number

    def numbers(self, replies, wanted, guarded=True):
        return [{(c.name, m): self.number(r, c.name, m) for c, m in wanted} for r in replies]


def pairs(n=40, criterion="relevance"):
    row = {"criterion": criterion, "person": "", "messages": [{"role": "user", "content": "hi"}]}
    texts = [(f"good {i} " + "x" * (i % 2) * 20, f"bad {i} " + "y" * 10) for i in range(n)]
    return [{**row, "better": b, "worse": w, "situation": str(i)} for i, (b, w) in enumerate(texts)]


HASHES = {"judge_hash": "j", "rubric_hash": "r", "exam_hash": "e"}


def take(number, rubric, rows=None, **more):
    return exam.run_exam(FakeJudge(rubric, number), rows or pairs(), HASHES, **more)


def is_good(reply, *_):
    return float(reply.reply.startswith("good"))


def length(reply, *_):
    return float(len(reply.reply))


def test_flaws_of_an_exam_file_are_lines(tmp_path):
    path, good = tmp_path / "pairs.jsonl", pairs(1)[0]
    flaws = {"found str": "no row", "found list": [1], "found better = None": {**good, "better": None}}
    flaws |= {"found messages = []": {**good, "messages": []}, "found person = 3": {**good, "person": 3}}
    flaws["found messages = [{'role': 'user'}]"] = {**good, "messages": [{"role": "user"}]}
    path.write_text("\n".join(map(json.dumps, flaws.values())), encoding="utf-8")
    with pytest.raises(exam.ExamError) as error:
        exam.load_pairs(path, ["relevance"])
    lines = error.value.message.splitlines()
    assert [line.split(" / ")[0] for line in lines] == [f"{path}:{i}: {f}" for i, f in enumerate(flaws, 1)]
    for missing in (tmp_path / "none.jsonl", EXAM_PAIRS):
        with pytest.raises(k.UserError, match="no such exam file|no pair for the criteria charm"):
            exam.load_pairs(missing, ["charm"])


def test_the_better_method_is_chosen_and_the_verdict_is_cross_validated(rubric):
    def number(reply, criterion, method):
        return is_good(reply) if method == "pmi" else random.Random(reply.reply + method).random()

    relevance = dataclasses.replace(rubric.criteria[0], methods=("contrast", "pmi", "likert"))
    rubric = dataclasses.replace(rubric, criteria=(relevance, *rubric.criteria[1:]))
    result = take(number, rubric)
    entry = result["criteria"]["relevance"]
    assert entry["method"] == "pmi" and entry["accuracy"] == 1.0 and entry["fit"]
    assert entry["methods"]["pmi"]["accuracy"] == 1.0 and entry["methods"]["contrast"]["accuracy"] < 0.8
    assert "likert" not in entry["methods"]  # a million parameters know no digits
    assert result["overall"]["accuracy"] == 1.0
    assert result["judge"] == "fake.gguf" and result["exam_hash"] == "e" and result["pairs"] == 40


def test_choosing_among_coins_does_not_make_a_judge():
    """The best of many useless methods looks good on its own pairs; cross-validation is not misled."""
    random.seed(1)
    held_out, seen = [], []
    for _ in range(200):
        right = {f"coin {m}": [float(random.random() < 0.5) for _ in range(25)] for m in range(8)}
        method, crossed = choose_method(right)
        seen.append(sum(right[method]) / 25)
        held_out.append(sum(crossed) / 25)
    assert sum(seen) / 200 > 0.6 and abs(sum(held_out) / 200 - 0.5) < 0.04
    assert choose_method({"a": [1.0, 0.0], "b": [0.0, 1.0]})[0] == "a"  # a tie goes to the first
    # The gate's own error: judges that toss coins with four methods pass in about one criterion of forty.
    random.seed(2)
    passed = 0
    for _ in range(60):
        right = {method: [float(random.random() < 0.5) for _ in range(26)] for method in METHODS}
        passed += chance(right, sum(choose_method(right)[1]), 200) <= 0.025
    assert passed <= 5


def test_verdicts(rubric):
    noise = "not distinguishable from chance"
    for number, fit, why in (
        (lambda reply, *_: random.Random(reply.reply).random(), False, noise),
        (length, False, noise),
        (lambda *_: None, False, "0% right"),
        (lambda *_: 0.0, False, "50% right"),  # every pair a tie
        (is_good, True, "100% right"),
    ):
        entry = take(number, rubric)["criteria"]["relevance"]
        assert entry["fit"] is fit and why in entry["why"], entry["why"]
    few = take(is_good, rubric, pairs(9))["criteria"]["relevance"]
    assert not few["fit"] and "only 9 exam pairs" in few["why"]
    longer = [{**pair, "better": pair["better"] + "y" * 40} for pair in pairs()]
    leaning = take(is_good, rubric, longer)
    assert "'longer wins' gets 100%" in leaning["criteria"]["relevance"]["why"]
    assert (
        "the answer key itself sides with cheap cues: length (relevance, 100%" in exam_table(leaning).text()
    )
    sides = take(length, rubric)["criteria"]["relevance"]["length"]  # a judge that likes length shows it
    assert sides["longer_better"]["accuracy"] == 1.0 and sides["shorter_better"]["accuracy"] == 0.0
    rng = random.Random(0)  # and so does one that does not repeat itself
    assert take(lambda *_: rng.random(), rubric)["repeatability"]["largest_difference"] > 0
    assert take(length, rubric)["repeatability"]["largest_difference"] == 0


def test_a_mixture_adds_up_what_the_rubric_says(rubric):
    """The weighted sum of the raw numbers; unknown if a part is; a guard's word is final."""
    fluency = next(c for c in rubric.criteria if c.name == "fluency")
    fluency = dataclasses.replace(fluency, mix=(("contrast", 2.0), ("pmi", 1.0)))
    judge = Judge(FakeWorker(), "j", rubric)
    replies = [judged("I hear you."), judged("Score: 5")]
    methods = [(fluency, m) for m in ("contrast", "pmi", "mix")]
    apart, refused = judge.numbers(replies, methods)
    assert apart["fluency", "mix"] == 2 * apart["fluency", "contrast"] + apart["fluency", "pmi"]
    assert judge.numbers(replies[:1], methods[2:]) == [{("fluency", "mix"): apart["fluency", "mix"]}]
    assert refused["fluency", "mix"] == KNOWN_BAD
    small = Judge(FakeWorker(context=60), "j", rubric)
    assert small.numbers(replies[:1], methods[2:]) == [{("fluency", "mix"): None}]
    plain = {"mix": (), "methods": ("contrast",)}
    unmixed = tuple(dataclasses.replace(c, **plain) if c.name == "empathy" else c for c in rubric.criteria)
    unmixed = dataclasses.replace(rubric, criteria=unmixed)
    tried = take(is_good, unmixed, methods=METHODS)["criteria"]["empathy"]["methods"]
    assert "mix" not in tried and "likert" in tried  # this criterion has none


def test_criteria_that_the_judge_failed(rubric):
    """Refused, dropped or forced; a resumed run keeps what it began with."""
    fit = {"fit": True, "weight": 1.0, "why": "good"}
    entries = {name: dict(fit) for name in rubric.weights}
    entries["safety"] = {"fit": False, "weight": 1.0, "why": "a coin"}
    result = {"judge": "j", "criteria": entries}

    def settled(before=None, **options):
        chosen = SimpleNamespace(**{"unfit": "refuse", "force_judge": False, **options})
        return drop_unfit_criteria(rubric, result, chosen, before or {})

    with pytest.raises(k.UserError, match="unfit for safety .safety: a coin.. Give a better --judge"):
        settled()
    left, dropped = settled(unfit="drop")
    assert dropped == ["safety"] and left.weights["safety"] == 0 and left.weights["fluency"] == 1
    assert settled(force_judge=True) == (rubric, [])
    assert settled(before={"dropped_criteria": ["fluency"]})[1] == ["fluency"]
    assert settled(before={"dropped_criteria": []}) == (rubric, [])
    entries.update({name: entries["safety"] for name in entries})
    left, dropped = settled(unfit="drop")  # what can be checked is left
    assert dropped == list(rubric.weights) and left.rewards == pytest.approx(
        {"format": 0.5, "emotion": 0.5, "rubric": 0}
    )
    assert settled(before={"dropped_criteria": dropped})[0].rewards == left.rewards
    rubric = dataclasses.replace(rubric, given={"format": 0.0, "emotion": 0.0, "rubric": 1.0})
    with pytest.raises(k.UserError, match="unfit for every criterion"):
        settled(unfit="drop")


def test_what_counts_as_a_cue():
    turn = "My sister Ana moved to Lima."
    counts = {
        "Ana moved? I hope you'll visit!": (31, 1, 0, 2, 0, 1, 1, 1, 0, 1),
        "Perhaps she and Tom like it, maybe 3 years?": (43, 1, 1, 0, 2, 0, 0, 0, 2, 0),
    }
    for reply, expected in counts.items():
        found = tuple(int(number(reply, turn)) for number in CUES.values())
        assert found == expected, dict(zip(CUES, found))


def test_a_judge_that_follows_a_cue_more_than_the_answer_key_is_refused(rubric):
    """The worse reply has the question mark in half of the pairs; nothing else differs."""
    rows = pairs(60)
    for i, row in enumerate(rows):
        row["better"], row["worse"] = f"good {i:02}{'?!'[i % 2]}", f"fair {i:02}{'!?'[i % 2]}"

    def asks(reply, *_):  # right in 70%: it also sees some of what is good
        number = int("".join(c for c in reply.reply if c.isdecimal()))
        return 2.0 * reply.reply.endswith("?") + 3.0 * (is_good(reply) and number % 5 < 2)

    entry = take(asks, rubric, rows)["criteria"]["relevance"]
    assert entry["accuracy"] > 0.65 and not entry["fit"]
    assert "it sides with more question mark in" in entry["why"]
    cue = entry["cues"]["question mark"]
    assert cue["n"] == 60 and cue["key"] == 0.5 and cue["judge"] > cue["right"]
    assert take(is_good, rubric, rows)["criteria"]["relevance"]["fit"]
    assert "question mark" in exam_table(take(asks, rubric, rows)).text()
    never = cue_report(rows, [(None, None)] * 60)
    assert followed_cue(never) is None and never["length"] == {"n": 0}


def test_written_replies_against_a_small_model_s(rubric):
    """A judge for whom a small model beats a person is refused; one that is not sure is told so."""
    references = [{**row, "criterion": "reference"} for row in pairs(20)]

    def fooled(reply, criterion, method):  # sees what is good in the exam, but likes the model's
        return is_good(reply) if reply.situation.startswith("e") else -is_good(reply)

    rows = [{**row, "situation": f"e{row['situation']}"} for row in pairs()]
    result = take(fooled, rubric, rows + references)
    entry = result["criteria"]["relevance"]
    assert entry["accuracy"] == 1.0 and not entry["fit"] and result["pairs"] == 40
    assert entry["why"] == "a small model's reply beats the written one in 100% of 20"
    assert "in under 85% of pairs on relevance" in exam_table(result).text()
    honest = take(is_good, rubric, rows + references)["criteria"]["relevance"]
    assert honest["fit"] and honest["reference"]["accuracy"] == 1.0


def test_a_judge_that_can_be_begged_shows_it(rubric):
    def begged(reply, *_):
        return is_good(reply) + ("Nobody could" in reply.reply)  # no guard knows this sentence

    result = take(begged, rubric, methods=("likert",))
    canaries, table = result["canaries"], exam_table(result).text()
    assert set(canaries["failed"]) == {"thinks well of itself"} and canaries["held"] < canaries["n"]
    assert "likert" in table and "'thinks well of itself' raised" in table and "bit-identical" in table
    firm = take(is_good, rubric)["canaries"]
    assert firm["held"] == firm["held_with_guards"] == firm["n"] > 0 and not firm["failed"]
    gullible = take(length, rubric)["canaries"]  # what the rules catch is not the judge's merit
    assert gullible["held"] == 0 and gullible["held_with_guards"] == gullible["refused"] < gullible["n"]


def test_calibration():
    fitted = fit_calibration([2.0, 3.0, 2.5, 1e6, 2.2], [1.0, 0.5, 1.2, 0.8, 0.9])
    assert abs(fitted.middle) < 1e6 and 0 <= fitted(2.4) <= 1  # an outlier does not bend it
    clear = fit_calibration([3.0, 4.0, 5.0], [1.0, 2.0, 2.5])
    assert clear(2.0) < 0.4 < 0.6 < clear(4.0)
    wrong = fit_calibration([1.0, 2.0], [3.0, 4.0])  # a judge that is wrong more often than right
    assert wrong.slope > 0 and wrong(1.0) < wrong(4.0)


def test_intervals():
    assert wilson(0, 0) == (0.0, 1.0)
    from scipy.stats import binomtest

    for correct, n in ((0, 5), (3, 7), (26, 26), (119, 132)):
        interval = binomtest(correct, n).proportion_ci(method="wilson")
        assert wilson(correct, n) == pytest.approx((interval.low, interval.high), abs=1e-4)
    assert wilson(2, 10)[0] < wilson(2.5, 10)[0] < wilson(3, 10)[0]  # a tie is one half


# ---------------------------------------------------------------- training a judge


def test_varied_pairs_keep_the_better_reply_and_add_worse_ones(rubric):
    originals = exam.load_pairs(TRAIN_PAIRS, [c.name for c in rubric.criteria])
    varied = train.vary(originals, random.Random(0))
    replies = [(p["better"], p["worse"]) for p in varied]
    assert replies[: len(originals)] == [(p["better"], p["worse"]) for p in originals]
    assert 1.6 < len(varied) / len(originals) < 2.2
    of_persons = [p for p in varied if p["criterion"] == "persona_consistency"]
    assert 0.15 < sum(not p["situation"] for p in of_persons) / len(of_persons) < 0.35
    assert all(p["person"] for p in varied if p["criterion"] == "persona_consistency")
    assert {p["better"] for p in varied} == {p["better"] for p in originals}
    assert all(better != worse for better, worse in replies)


def encode(text):
    return [3 + ord(c) % 90 for c in text]


def tiny_judge(tiny, start, question, criterion, rank):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny("llama"), config)
    assert packed_rows.enable_packed_rows(model.base_model.model) is None
    return model, train.Margins(model, encode, start, {criterion: (Cue(question, ("y",), ("n",)),)})


def test_a_tiny_judge_learns_its_pairs(tiny):
    """The loss falls and the margins part, on a random model that can only memorize."""
    model, margins = tiny_judge(tiny, [], "?", "fluency", 8)
    row = {"criterion": "fluency", "messages": [{"role": "user", "content": "u"}], "person": ""}
    rows = [{**row, "situation": "", "better": f"abc{i}", "worse": f"zyx{i}"} for i in range(8)]
    losses = []
    options = SimpleNamespace(epochs=8, learning_rate=1e-2, batch_size=4, seed=0)
    train.train(model, margins, rows, options, lambda step, steps, loss: losses.append(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert train.accuracy(margins, rows)[0] >= 7 / 8


def test_training_goes_on_where_it_was_interrupted(tiny, tmp_path, monkeypatch):
    """Interrupted after five of eight steps and resumed: the same weights, bit for bit."""
    monkeypatch.setattr(train, "SAVE_STEPS", 2)
    row = {"criterion": "fluency", "messages": [{"role": "user", "content": "u"}], "person": ""}
    rows = [{**row, "situation": "", "better": f"abc{i}", "worse": f"zyx{i}"} for i in range(8)]
    options = SimpleNamespace(epochs=2, learning_rate=1e-2, batch_size=4, seed=0)

    def trained(stop=None, resume=False, key="k"):
        model, margins = tiny_judge(tiny, [], "?", "fluency", 8)
        kept, steps = train.Progress(tmp_path / "j.gguf.partial", key, resume), []

        def on_progress(step, total, loss):
            steps.append(step)
            if step == stop:
                raise KeyboardInterrupt

        try:
            train.train(model, margins, list(rows), options, on_progress, kept)
        except KeyboardInterrupt:
            pass
        return steps, [p.detach().clone() for p in model.parameters() if p.requires_grad]

    _, whole = trained()
    trained(stop=5)
    steps, resumed = trained(resume=True)
    assert steps[0] == 5 and all((a == b).all() for a, b in zip(whole, resumed))
    with pytest.raises(k.UserError, match="of other options, pairs or another base"):
        trained(resume=True, key="other")
    (tmp_path / "j.gguf.partial").write_bytes(b"torn")
    with pytest.raises(k.UserError, match="damaged; begin again"):
        trained(resume=True)


def test_a_lora_on_the_last_blocks_only(tiny):
    model = new_lora(tiny("llama", num_hidden_layers=4), 4, 8, last_layers=1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".layers.3." in name for name in trained)


def test_pairs_of_written_replies_and_a_policy_s_own(rubric):
    rows = k.load_rows([k.DATA / "dialogues.jsonl"], rubric)[:6]
    texts = [
        k.render_answer({"understanding": "u", "reasoning": "r", "emotion": "sad", "response": f"So {i}."})
        for i in range(4)
    ]
    texts += ["no spans at all", rows[5].messages[1][1]]  # nothing to read, and the written one itself
    answerer = SimpleNamespace(answer=lambda prompts, *_: texts)
    drawn = train.pairs_against(answerer, "runs/x", rows, rubric, seed=0)
    assert len(drawn) == 8 and [p["worse"] for p in drawn[::2]] == [f"So {i}." for i in range(4)]
    assert drawn[0]["better"] == k.find_span(rows[0].messages[1][1], "response")
    assert drawn[0]["messages"] == [{"role": "user", "content": rows[0].messages[0][1]}]
    assert drawn[0]["criterion"] != drawn[1]["criterion"]
    silent = SimpleNamespace(answer=lambda prompts, *_: ["no spans"] * 6)
    with pytest.raises(k.UserError, match="none of its 6 answers has a response span"):
        train.pairs_against(silent, "runs/x", rows, rubric, seed=0)
    again = train.pairs_against(answerer, "runs/x", rows, rubric, seed=0)
    assert again == drawn and exam._flaw(drawn[0]) == ""


def test_margins_equal_the_plain_way(tiny):
    """Packed rows against one row per cue and word; words of one token and of several."""
    import torch

    model, margins = tiny_judge(tiny, [1], "\nQ?", "safety", 4)
    cues = (Cue("\nQ?", ("y",), ("n",)), Cue("\nSo it was", ("ok", "oh"), ("bad", "b")))
    margins.cues = {"safety": cues}
    pair = {"criterion": "safety", "better": "I hear you.", "worse": "Whatever!", "person": "Ana"}
    pair |= {"situation": "Rain", "messages": [{"role": "user", "content": "hi"}]}
    context = JudgedReply.from_pair(pair, "better").context

    def logp(before, word):
        ids = torch.tensor([[1, *encode(before), *encode(word)]])
        logps = model(input_ids=ids).logits[0].log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
        return logps[-len(word) :].sum()

    with torch.no_grad():
        for value, key in zip(margins(pair), ("better", "worse")):
            parts = []
            for cue in cues:
                before = f"{context} {pair[key]}{cue.text}"
                good, bad = (torch.stack([logp(before, w) for w in group]) for group in (cue.good, cue.bad))
                parts.append(good.logsumexp(0) - bad.logsumexp(0))
            assert float(value) == pytest.approx(float(sum(parts) / 2), abs=1e-4)


def test_an_exam_cannot_be_trained_on(tmp_path):
    lines = EXAM_PAIRS.read_text(encoding="utf-8").splitlines()
    (tmp_path / "mine.jsonl").write_text("\n".join(lines[:20:4]), encoding="utf-8")
    result = run(f"judge train --pairs {tmp_path}/mine.jsonl --out {tmp_path}/j.gguf", ok=False)
    assert result.exit_code == 1 and "share 5 situations" in result.output
    assert "Traceback" not in result.output


def test_the_exam_that_comes_with_the_project_is_of_this_judge_rubric_and_pairs(rubric, monkeypatch):
    """Nobody waits for it again. After a change: `judge exam --json data/embedded_exam.json`."""

    def examine(name, *arguments):
        raise AssertionError(f"{name} is not in {opening.SHIPPED.name}")

    monkeypatch.setattr(opening, "_once", examine)
    judge, result = opening.open_judge(FakeWorker(), rubric, WitnessedJudgeOptions())
    assert {c.name: judge.method[c.name] for c in rubric.criteria} == {
        name: entry["method"] for name, entry in result["criteria"].items()
    }
    assert judge.witness.calibration.keys() <= judge.calibration.keys() and result["people"] == []
    with pytest.raises(AssertionError, match="exam-"):  # another rubric is another exam
        opening.open_judge(FakeWorker(), dataclasses.replace(rubric, hash="other"), JudgeOptions())
