"""Losses, advantages and rewards against TRL's own, packed rows against plain ones, on tiny random models."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import with_lora

import kardia_lite as k
from kardia.data.rewards import with_rewards
from kardia.models import packed_rows
from kardia.training import plan, trainers

GEMMA2 = {"attn": "eager", "sliding_window": 8, "attn_logit_softcapping": 0.7, "final_logit_softcapping": 1.5}
KINDS = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with a window": ("mistral", {"sliding_window": 8}),
    "gemma2": ("gemma2", GEMMA2),  # transformers' SDPA has no soft cap
    "gemma3": ("gemma3_text", {"sliding_window": 8}),
}


def lora(model):
    return with_lora(model, r=4, lora_alpha=8)


def batch(groups, seed=0):
    """Ragged prompts (left-padded) and answers (right-padded), as TRL hands them over: ids, mask, C."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n):
        return torch.randint(3, 97, (n,), generator=generator)

    rows = []
    for prompt_length, lengths in groups:
        prompt = tokens(prompt_length)
        rows += [(prompt, tokens(n)) for n in lengths]
    P, C = max(len(p) for p, _ in rows), max(len(c) for _, c in rows)
    ids = torch.zeros(len(rows), P + C, dtype=torch.long)  # [B, P + C]
    mask = torch.zeros_like(ids)
    for i, (p, c) in enumerate(rows):
        ids[i, P - len(p) : P], ids[i, P : P + len(c)] = p, c
        mask[i, P - len(p) : P + len(c)] = 1
    return ids, mask, C


def both_ways(model, ids, mask, C):
    """(log-probs, entropies, gradients) of TRL's path and of packed rows."""
    from trl import GRPOTrainer

    packed = trainers.trainer_class(trainers.GRPOHooks)._packed_logps
    needs = {"model_kwarg_keys": {"logits_to_keep"}, "_entropy_bonus_enabled": False}
    needs |= {"pass_size": SimpleNamespace(chunk=5), "answer_logps": k.answer_logps}
    trainer = SimpleNamespace(temperature=0.9, **needs)
    completion = mask[:, -C:].float()  # [B, C]
    weights = torch.randn(completion.shape, generator=torch.Generator().manual_seed(3)) * completion
    results = []
    for path in (GRPOTrainer._full_logits_logps, packed):
        if path is packed:
            assert trainers.enable_packed_rows("transformers", model) is None
        model.zero_grad()
        logps, entropies, _ = path(trainer, model, ids, mask, C, compute_entropy=True)
        (logps * weights).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((logps.detach() * completion, entropies.detach() * completion, gradient))
    return results


def assert_same(one, other):
    (logps, entropies, gradient), (ours, our_entropies, our_gradient) = one, other
    assert (logps - ours).abs().max() < 1e-4 and (entropies - our_entropies).abs().max() < 1e-3
    assert (gradient - our_gradient).norm() / gradient.norm() < 1e-4


ONE_GROUP, TWO_PROMPTS = [(20, [7, 3, 12])], [(20, [7, 1]), (9, [5, 5])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_equals_trls_path(tiny, kind):
    """Log-probs, entropies, gradients: one group, and two prompts of different lengths."""
    name, changes = KINDS[kind]
    for groups in (ONE_GROUP, TWO_PROMPTS):
        assert_same(*both_ways(lora(tiny(name, **changes)), *batch(groups)))


def test_gradient_checkpointing_changes_nothing(tiny):
    """The row reaches the attention again when a layer is computed a second time."""
    model = lora(tiny("gemma3_text", sliding_window=8)).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(*both_ways(model, *batch(ONE_GROUP)))


def test_a_wrong_mask_would_be_noticed(tiny, monkeypatch):
    """If tokens see what comes after them, the comparison fails, and so does the trial before a run."""

    def leaky(tokens, before, window, device):
        return torch.ones(tokens, before + tokens, dtype=torch.bool, device=device)

    model = lora(tiny("llama"))
    both_ways(model, *batch(ONE_GROUP))
    enable = packed_rows.enable_packed_rows
    monkeypatch.setattr(packed_rows, "_causal", leaky)
    monkeypatch.setattr(packed_rows, "enable_packed_rows", lambda lm: None)
    (logps, _, _), (ours, _, _) = both_ways(model, *batch(ONE_GROUP))
    assert (logps - ours).abs().max() > 1e-2 and enable(tiny("llama")) is not None


def test_what_cannot_take_packed_rows_says_why_and_is_left_alone(tiny, monkeypatch):
    model, chunked = tiny("llama"), ["full_attention", "chunked_attention"]
    never = classmethod(lambda cls: False)
    spoils = {
        "chunked_attention": (model.config, "layer_types", chunked),
        "scaled logits": (model.config, "logit_scale", 0.5),
        "output layer": (model.get_output_embeddings().weight, "requires_grad", True),
        "cannot be exchanged": (type(model), "_can_set_attn_implementation", never),
    }
    for reason, (thing, name, value) in spoils.items():
        with monkeypatch.context() as patch:
            patch.setattr(thing, name, value, raising=False)
            assert reason in packed_rows.enable_packed_rows(model)
            assert model.config._attn_implementation == "sdpa"


def test_without_a_row_the_attention_is_plain(tiny):
    """Generation, evaluation and TRL's own path run on the same model: with padding, a cache, a soft cap."""
    for name, changes in (KINDS["llama"], KINDS["gemma2"], KINDS["gemma3"]):
        model = tiny(name, **changes).eval()
        ids, mask, _ = batch(ONE_GROUP)
        real, greedy = mask.bool(), {"max_new_tokens": 8, "do_sample": False}
        before = model(input_ids=ids, attention_mask=mask).logits[real]
        generated = model.generate(input_ids=ids[:1, :20], **greedy)
        assert packed_rows.enable_packed_rows(model) is None
        after = model(input_ids=ids, attention_mask=mask).logits[real]
        assert torch.allclose(after, before, atol=1e-5)
        assert torch.equal(model.generate(input_ids=ids[:1, :20], **greedy), generated)


def test_dialogues_side_by_side_do_not_see_each_other(tiny):
    """Hidden states are those of each text alone, and another neighbour changes none of them."""
    for name, changes in (KINDS["llama"], KINDS["gemma3"]):
        model = tiny(name, **changes)
        texts = [torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)) for n in (12, 5, 30)]
        alone = torch.cat([model.base_model(input_ids=t[None]).last_hidden_state[0] for t in texts])
        assert packed_rows.enable_packed_rows(model) is None
        row = packed_rows.pack(texts[0][:0], texts)
        hidden = row.hidden(model)
        assert torch.allclose(hidden, alone, atol=1e-5)
        other = packed_rows.pack(texts[0][:0], [texts[0], texts[1].flip(0), texts[2]]).hidden(model)
        assert torch.equal(other[:12], hidden[:12]) and torch.equal(other[17:], hidden[17:])
        assert row.predictors.tolist() == [*range(11), *range(12, 16), *range(17, 46)]


# ---------------------------------------------------------------------------------- the functions alone


def test_sft_loss_is_the_mean_cross_entropy_of_the_trained_tokens(tiny):
    """Against torch's own loss of each dialogue; its gradient: test_sft_steps_equal_those_of_trls_trainer."""
    model, lengths = lora(tiny("llama")), [12, 5, 30]
    ids = torch.randint(3, 97, (sum(lengths),), generator=torch.Generator().manual_seed(0))  # [L]
    labels = ids.clone()
    labels[[0, 1, 2, 12, 17, 18, 30]] = -100
    expected, count = 0.0, int((labels != -100).sum())
    for text, label in zip(ids.split(lengths), labels.split(lengths)):
        logits = model(input_ids=text[None]).logits[0, :-1]  # [tokens - 1, vocabulary]
        expected += torch.nn.functional.cross_entropy(logits, label[1:], reduction="sum").item() / count
    assert trainers.enable_packed_rows("transformers", model) is None
    row = {"input_ids": ids, "labels": labels, "lengths": lengths}
    loss, sums = k.sft_loss(model, row)
    assert loss.item() == pytest.approx(expected, rel=1e-5) and sums["trained"] == count
    assert k.sft_loss(model, row, tokens_in_step=2 * count)[0].item() == pytest.approx(expected / 2)


def test_group_advantages():
    """Worked out by hand; unknown rewards (NaN) take no part, and a group that cannot teach gets 0."""
    nan = float("nan")
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5, 1.0, nan, 0.0, nan, 0.3, nan, nan, nan, 0.7, 0.7, 0.7, 0.7])
    advantages = k.group_advantages(rewards, 4).view(4, 4)
    std = math.sqrt((0.25 + 0.25) / 3)
    assert advantages[0].tolist() == pytest.approx([0.5 / (std + 1e-4), -0.5 / (std + 1e-4), 0, 0], abs=1e-6)
    std = math.sqrt(0.5)
    assert advantages[1].tolist() == pytest.approx([0.5 / (std + 1e-4), 0, -0.5 / (std + 1e-4), 0], abs=1e-6)
    assert advantages[2].tolist() == [0] * 4 and advantages[3].abs().max() < 1e-6


def test_grpo_loss_by_hand():
    """min(ratio A, clip(ratio) A): the clip bites only where a token would go further where it is pushed."""
    ratios, advantages = torch.tensor([[1.5, 0.5], [1.5, 0.5]]), torch.tensor([2.0, -1.0])
    old, mask = torch.zeros(2, 2), torch.ones(2, 2)
    logps = ratios.log().requires_grad_(True)
    loss, parts = k.grpo_loss(logps, old, advantages, mask, 4.0, 0.2)
    expected = -(1.2 * 2 + 0.5 * 2 + 1.5 * -1 + 0.8 * -1) / 4
    assert loss.item() == pytest.approx(expected)
    assert parts["clip_ratio/region_mean"].tolist() == [[1, 0], [0, 1]]
    loss.backward()
    # A clipped token is not pushed.
    assert logps.grad.tolist() == [[0, pytest.approx(-0.25)], [pytest.approx(0.375), 0]]
    masked, _ = k.grpo_loss(logps, old, advantages, torch.tensor([[1, 0], [0, 0]]), 1.0, 0.2)
    assert masked.item() == pytest.approx(-2.4)
    reference = (ratios * 2).log()
    with_kl, parts = k.grpo_loss(logps, old, advantages, mask, 4.0, 0.2, reference, beta=0.1)
    kl = [ratio * (2 - math.log(2) - 1) for ratio in (1.5, 0.5, 1.5, 0.5)]
    assert parts["kl"].detach().flatten().tolist() == pytest.approx(kl)
    assert with_kl.item() == pytest.approx(expected + 0.1 * sum(kl) / 4)


def test_reward_is_the_weighted_sum_and_unknown_is_never_zero(rubric):
    known = k.Reward({"format": 1.0, "emotion": 0.0, "rubric": 0.5}, {}, None)
    unknown = k.Reward({"format": 1.0, "emotion": 1.0, "rubric": None}, {}, None)
    assert math.isclose(known.total(rubric), 0.5) and unknown.total(rubric) is None
    assert unknown.total(with_rewards(rubric, ("rubric=0",))) == 1.0


def test_behind_a_gate_content_counts_only_where_the_format_holds(rubric):
    """An invalid answer has 0 from everything, also from what nobody could judge; a valid one all of its
    content."""
    gated = with_rewards(rubric, ("format=gate",))
    assert gated.rewards == {"format": 0.0, "emotion": 0.5, "rubric": 0.5}
    invalid = k.Reward({"format": 0.0, "emotion": 1.0, "rubric": None}, {}, "text outside the spans")
    valid = k.Reward({"format": 1.0, "emotion": 1.0, "rubric": 0.5}, {}, None)
    assert (invalid.total(gated), valid.total(gated)) == (0.0, 0.75)
    assert invalid.counted(gated) == {"format": 0.0, "emotion": 0.0, "rubric": 0.0}
    assert valid.counted(gated) == valid.components and invalid.counted(rubric) == invalid.components
    unknown = k.Reward({"format": 1.0, "emotion": 1.0, "rubric": None}, {}, None)
    assert unknown.total(gated) is None


def test_gdpo_by_hand():
    """Each component is compared in its group; small differences weigh as much as large ones."""
    nan = float("nan")
    components = torch.tensor([[1.0, 0.02], [0.0, 0.01], [1.0, 0.03], [nan, nan]])
    weights = torch.tensor([0.5, 0.5])
    first = k.group_advantages(components[:, 0], 4)
    second = k.group_advantages(components[:, 1], 4)
    sums = (first + second)[:3] / 2
    expected = (sums - sums.mean()) / (sums.std() + 1e-4)
    got = k.gdpo_advantages(components, weights, 4)
    assert got[:3].tolist() == pytest.approx(expected.tolist(), abs=1e-5) and got[3] == 0
    # By sums alone the first component decides: the first and the third answer hardly differ.
    plain = k.grpo_advantages(components, weights, 4)
    assert (plain[2] - plain[0]) < 0.05 < 0.5 < (got[2] - got[0])
    assert k.gdpo_advantages(torch.ones(4, 2), weights, 4).abs().max() < 1e-6


def test_an_unjudged_answer_gets_none_from_every_reward_function(rubric):
    """TRL sums what it is given and takes None as 0: one unknown component must therefore silence all."""
    parts = ({"format": 1.0, "emotion": 1.0, "rubric": None}, {"format": 1.0, "emotion": 0.0, "rubric": 0.4})
    rewards = [k.Reward(components, {}, None) for components in parts]
    options = k.GRPOOptions(group_size=2)
    rollouts = k.Rollouts(None, None, [0, 1], options, rubric, None, None, None, lambda *_: rewards)
    asked = {"prompts": [], "completions": [[{"content": "x"}]] * 2, "index": [0, 0]}
    by_name = {f.__name__: f(**asked) for f in rollouts.reward_functions()}
    assert by_name == {"format": [None, 1.0], "emotion": [None, 0.0], "rubric": [None, 0.4]}


class FakeJudge:
    def scores(self, replies):
        names = ("relevance", "empathy", "persona_consistency", "safety")
        return [{**dict.fromkeys(names, 0.5), "fluency": None if "?" in r.reply else 0.5} for r in replies]

    def refused(self, reply):
        return None


def test_components_of_answers(rubric):
    dialogue = k.Dialogue("Ana", "", "sad", "Rain.", "a", (("user", "It rains."),))
    spans = {"understanding": "u", "reasoning": "r", "emotion": "sad", "response": "Rain on Sunday."}
    variants = (spans, {**spans, "emotion": "Sad"}, {**spans, "response": "Why?"})
    texts = [*map(k.render_answer, variants), "Rain."]
    rewards = k.score_answers([(dialogue, text) for text in texts], rubric, FakeJudge())
    assert [r.components["format"] for r in rewards] == [1, 1, 1, 0]
    assert [r.components["emotion"] for r in rewards] == [1, 0, 1, 0]
    assert [r.components["rubric"] for r in rewards] == [0.5, 0.5, None, 0.5]
    assert rewards[3].problem == "<|understanding_begin|> is missing"


# ---------------------------------------------------------------------------------- whole optimizer steps


def fixed_rollouts(tokenizer, lengths):
    """A rollout function without a model: the same answers every time, some of them cut off."""

    def rollout(prompts, trainer):
        generator = torch.Generator().manual_seed(trainer.state.global_step)
        answers = []
        for i in range(len(prompts)):
            ids = torch.randint(100, 2000, (lengths[i % len(lengths)],), generator=generator).tolist()
            answers.append(ids if i % 3 else [*ids, tokenizer.eos_token_id])
        return {
            "prompt_ids": [tokenizer(chat[0]["content"])["input_ids"] for chat in prompts],
            "completion_ids": answers,
            "logprobs": [[-7.0] * len(ids) for ids in answers],
        }

    return rollout


WORDS = ("Rain", "A long day in the office", "Tea", "Snow")
COMMON = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
COMMON |= {"gradient_checkpointing": False, "seed": 0, "logging_steps": 1, "lr_scheduler_type": "constant"}
COMMON |= {"optim": "sgd"}
GRPO = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 16, "max_steps": 2}
GRPO |= {"learning_rate": 1e-3, "loss_type": "dapo", "temperature": 0.9, "shuffle_dataset": False}
MICRO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def some_reward(completion_ids, **_):
    return [sum(ids) % 97 / 97 for ids in completion_ids]


def another_reward(completion_ids, **_):
    return [sum(ids) % 5 / 500 for ids in completion_ids]


def grpo_trainer(
    ours, tiny, renderer, path, prompts=WORDS, lengths=(7, 3, 12, 1, 9), rollout=None, packed=True, **changes
):
    """TRL's GRPOTrainer or ours on fixed answers, with rewards that are made of their tokens."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    trainer_class, model = GRPOTrainer, lora(tiny("llama", vocab_size=49152))
    if ours:
        advantages = k.gdpo_advantages if "multi_objective_aggregation" in changes else k.grpo_advantages
        parts = {"answer_logps": k.answer_logps, "advantages": advantages, "grpo_loss": k.grpo_loss}
        trainer_class = trainers.trainer_class(trainers.GRPOHooks, **parts)
    rows = [{"prompt": [{"role": "user", "content": f"{word} and then"}]} for word in prompts]
    trainer = trainer_class(
        model=model,
        reward_funcs=[some_reward, another_reward],
        args=GRPOConfig(str(path), **{**GRPO, **COMMON, **changes}),
        train_dataset=Dataset.from_list(rows),
        processing_class=renderer.tokenizer,
        rollout_func=rollout or fixed_rollouts(renderer.tokenizer, list(lengths)),
    )
    if ours:
        reason = trainers.enable_packed_rows("transformers", model) if packed else "not wanted"
        trainer.set_passes(reason, trainer.args.per_device_train_batch_size)
    return trainer


def sft_trainer(ours, tiny, renderer, path, rows, packed=True, **sizes):
    """TRL's SFTTrainer on padded rows, or ours on packed rows or TRL's own path."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer_class, model, collator = SFTTrainer, lora(tiny("llama", vocab_size=49152)), None
    reason = "not wanted"
    if ours:
        trainer_class = trainers.trainer_class(trainers.SFTHooks, sft_loss=k.sft_loss)
    if ours and packed:
        reason, collator = trainers.enable_packed_rows("transformers", model), trainers.side_by_side
    prepared = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = trainer_class(
        model=model,
        args=SFTConfig(str(path), **{**prepared, **COMMON, **sizes}),
        train_dataset=Dataset.from_list(rows),
        processing_class=renderer.tokenizer,
        data_collator=collator,
    )
    if ours:
        longest = sorted(rows, key=lambda row: -len(row["input_ids"]))
        micro = trainer.args.per_device_train_batch_size
        trainer.set_passes(reason, micro, longest[:micro])
    return trainer


def losses_of(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


def weights_of(model):
    named = model.named_parameters()
    return torch.cat([p.detach().flatten() for name, p in named if "lora" in name and "ref" not in name])


CASES = {
    "plain": {},
    "each component compared": {"multi_objective_aggregation": "normalize_then_sum"},
    "reference pass": {"beta": 10.0, "max_steps": 3, "learning_rate": 1e-2},  # so large that the KL decides
    "micro-batches": {**MICRO, "steps_per_generation": 4},
    "checkpointing": {"gradient_checkpointing": True, "beta": 0.1},
    "two updates per rollout": {"num_iterations": 2},
}


FAST = ("reference pass", "micro-batches", "each component compared")
one_by_one = [pytest.param(case, marks=[] if case in FAST else pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", one_by_one)
def test_whole_grpo_steps_equal_those_of_trls_trainer(tiny, renderer, tmp_path, case):
    """Two optimizer steps of two prompts x four answers on the same rollouts end at the same weights, with
    the same log."""
    start, ends, logs = weights_of(lora(tiny("llama", vocab_size=49152))), [], []
    for ours in (False, True):
        trainer = grpo_trainer(ours, tiny, renderer, tmp_path, **{"steps_per_generation": 1, **CASES[case]})
        trainer.train()
        ends.append(weights_of(trainer.model))
        logs.append(losses_of(trainer))
    moved = (ends[0] - start).norm()
    assert moved > 0 and (ends[0] - ends[1]).norm() / moved < 1e-3
    keys = "reward reward_std entropy clip_ratio/region_mean grad_norm".split()
    keys += ["kl"] if "beta" in CASES[case] else []
    for theirs, ours in zip(*logs, strict=True):
        for key in (key for key in keys if key in theirs):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-3, abs=1e-5), key


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "TRL's own path"])
def test_an_inspected_step_tells_log_probs_before_and_after_it(tiny, renderer, tmp_path, packed):
    """Against a plain forward pass of each answer alone, with the weights as they were and as they are."""
    from transformers import TrainerCallback

    drawn, rollout = [], fixed_rollouts(renderer.tokenizer, [7, 3, 12, 1, 9])

    def remember(prompts, trainer):
        drawn.append(rollout(prompts, trainer))
        return drawn[-1]

    short = {"prompts": WORDS[:2], "rollout": remember, "packed": packed, "max_steps": 1}
    trainer = grpo_trainer(True, tiny, renderer, tmp_path, **short, **MICRO, learning_rate=0.05)
    trainer.inspecting, moments, model = True, {}, trainer.model

    def alone():
        rows = []
        for prompt, answer in zip(drawn[0]["prompt_ids"], drawn[0]["completion_ids"]):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            logps = (logits.float() / 0.9).log_softmax(-1)  # [C, vocabulary]
            rows.append(logps.gather(-1, torch.tensor(answer)[:, None])[:, 0].tolist())
        return rows

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            moments["before"] = alone()

        def on_step_end(self, *_, **__):
            moments["after"] = alone()
            moments["ours"] = trainers.logps_before_and_after(trainer, 4, 8)

    trainer.add_callback(Watch())
    trainer.train()
    ours = moments["ours"]
    assert [ids for ids, *_ in ours] == drawn[0]["completion_ids"][4:]
    for (_, b, a), before, after in zip(ours, moments["before"][4:], moments["after"][4:]):
        assert b == pytest.approx(before, abs=1e-4) and a == pytest.approx(after, abs=1e-4)
    assert max(abs(x - y) for _, b, a in ours for x, y in zip(a, b)) > 1e-3  # the step did move them


def test_the_samplers_log_probs_are_the_old_ones_where_the_weights_differ(tiny, renderer, tmp_path):
    """4-bit in torch, dequantized in llama.cpp: the clipped ratio must start from what was sampled."""
    old, sizes = {}, {"per_device_train_batch_size": 4, "max_steps": 1}
    for from_sampler in (False, True):
        trainer = grpo_trainer(True, tiny, renderer, tmp_path, ("Rain",), (7, 3, 12, 1), **sizes)
        trainer.old_logps_from_sampler, compute = from_sampler, trainer._compute_loss

        def spy(model, inputs, compute=compute, from_sampler=from_sampler):
            old[from_sampler] = inputs.get("old_per_token_logps")
            return compute(model, inputs)

        trainer._compute_loss = spy
        trainer.train()
    assert old[False] is None  # ratio 1: what was sampled is what is trained
    assert old[True] is not None and bool((old[True][old[True] != 0] == -7.0).all())


def test_sft_steps_equal_those_of_trls_trainer(tiny, renderer, tmp_path):
    """Dialogues of very different lengths, two per pass: TRL pads them, ours lays them side by side."""
    generator, rows = torch.Generator().manual_seed(0), []
    for n in (40, 7, 23, 64, 12, 31, 9, 55):
        ids = torch.randint(100, 2000, (n,), generator=generator).tolist()
        labels = [-100 if i < 3 or 10 < i < 15 else token for i, token in enumerate(ids)]
        rows.append({"input_ids": ids, "labels": labels})
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    start, ends, logs = weights_of(lora(tiny("llama", vocab_size=49152))), [], []
    for ours in (False, True):
        trainer = sft_trainer(ours, tiny, renderer, tmp_path, rows, learning_rate=1e-2, **sizes)
        trainer.train()
        ends.append(weights_of(trainer.model))
        logs.append(losses_of(trainer))
    assert (ends[0] - ends[1]).norm() / (ends[0] - start).norm() < 1e-3
    for theirs, ours in zip(*logs, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["num_tokens"] == theirs["num_tokens"]
        assert ours["mean_token_accuracy"] == pytest.approx(theirs["mean_token_accuracy"], abs=1e-3)


def test_sizes_that_do_not_fit_are_one_line():
    with pytest.raises(k.UserError, match="--micro-batch 3 does not divide --group-size 8; try 2"):
        plan.check_grpo(k.GRPOOptions(micro_batch=3))
