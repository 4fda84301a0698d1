"""The shared-prefix update against TRL's own path: same log-probs, same entropies, same gradients, on tiny random models."""

import math
from types import SimpleNamespace

import pytest
import torch

import kardia_lite as k


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def batch(groups, seed=0):
    """Ragged prompts (left-padded) and completions (right-padded), as TRL hands them over: ids, mask, logits_to_keep."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt_length, lengths in groups:
        prompt = torch.randint(3, 97, (prompt_length,), generator=generator)
        rows += [(prompt, torch.randint(3, 97, (n,), generator=generator)) for n in lengths]
    P, C = max(len(p) for p, _ in rows), max(len(c) for _, c in rows)
    ids, mask = torch.zeros(len(rows), P + C, dtype=torch.long), torch.zeros(len(rows), P + C, dtype=torch.long)
    for i, (p, c) in enumerate(rows):
        ids[i, P - len(p) : P], ids[i, P : P + len(c)] = p, c
        mask[i, P - len(p) : P + len(c)] = 1
    return ids, mask, C


def both_ways(model, ids, mask, keep, temperature=0.9):
    """(logps, entropies, gradients) of TRL's path and of ours."""
    from trl import GRPOTrainer

    ours = k.make_grpo_trainer_class()
    import contextlib

    trainer = SimpleNamespace(accelerator=SimpleNamespace(unwrap_model=lambda m: m, autocast=contextlib.nullcontext), temperature=temperature, share_prefix=True,
                              model_kwarg_keys={"logits_to_keep"}, _entropy_bonus_enabled=False)  # fmt: skip
    trainer._group_logps = lambda *a: ours._group_logps(trainer, *a)
    completion = mask[:, -keep:].float()
    weights = torch.randn(completion.shape, generator=torch.Generator().manual_seed(3)) * completion
    results = []
    for path in (GRPOTrainer._full_logits_logps, ours._get_per_token_logps_and_entropies):
        model.zero_grad()
        logps, entropies, _ = path(trainer, model, ids, mask, keep, compute_entropy=True)
        (logps * weights).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((logps.detach() * completion, entropies.detach() * completion, gradient))
    return results


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("groups", [[(20, [7, 3, 12])], [(20, [7, 1]), (9, [5, 5])]], ids=["one group", "two prompts"])
def test_shared_prefix_equals_trls_path(tiny, kind, groups):
    model = lora(tiny(kind, **({"sliding_window": None} if kind == "mistral" else {})))
    assert k.can_share_prefix(model.config)
    (logps, entropies, gradient), (ours, our_entropies, our_gradient) = both_ways(model, *batch(groups))
    assert (logps - ours).abs().max() < 1e-4
    assert (entropies - our_entropies).abs().max() < 1e-3
    assert (gradient - our_gradient).norm() / gradient.norm() < 1e-4


def test_a_wrong_mask_would_be_noticed(tiny, monkeypatch):
    """The comparison above has teeth: let completions see each other and it fails."""
    model = lora(tiny("llama"))
    pack = k.pack_group

    def leaky(prompt, completions, dtype):
        ids, positions, mask, predictors = pack(prompt, completions, dtype)
        return ids, positions, torch.full_like(mask, torch.finfo(dtype).min).triu(1), predictors

    monkeypatch.setattr(k, "pack_group", leaky)
    (logps, _, _), (ours, _, _) = both_ways(model, *batch([(20, [7, 3, 12])]))
    assert (logps - ours).abs().max() > 1e-2


@pytest.mark.parametrize(("kind", "changes"), [("gemma2", {}), ("gemma3_text", {}), ("mistral", {"sliding_window": 8})])
def test_sliding_windows_and_soft_caps_fall_back(tiny, kind, changes):
    assert not k.can_share_prefix(tiny(kind, **changes).config)


def test_chunks_do_not_change_log_probs():
    torch.manual_seed(0)
    head, hidden, targets = torch.nn.Linear(16, 50, bias=False), torch.randn(23, 16), torch.randint(0, 50, (23,))
    whole = (head(hidden) / 0.7).log_softmax(-1)
    logps, entropies = k.token_logps(hidden, head, targets, 0.7, chunk=5)
    assert torch.allclose(logps, whole.gather(1, targets[:, None])[:, 0], atol=1e-6)
    assert torch.allclose(entropies, -(whole.exp() * whole).sum(-1), atol=1e-5)


def test_reward_is_the_weighted_sum_and_unknown_is_never_zero():
    weights = {"format": 1 / 3, "emotion": 1 / 3, "rubric": 1 / 3}
    known = k.Reward({"format": 1.0, "emotion": 0.0, "rubric": 0.5}, {}, None)
    unknown = k.Reward({"format": 1.0, "emotion": 1.0, "rubric": None}, {}, None)
    assert math.isclose(known.total(weights), 0.5)
    assert unknown.total(weights) is None
    assert unknown.total({"format": 0.5, "emotion": 0.5, "rubric": 0.0}) == 1.0


def test_an_unjudged_answer_gets_none_from_every_reward_function(rubric):
    """TRL sums what it is given and takes None as 0: one unknown component must therefore silence all."""
    rollouts = k.Rollouts.__new__(k.Rollouts)
    rollouts.rubric = rubric
    rewards = [k.Reward({"format": 1.0, "emotion": 1.0, "rubric": None}, {}, None), k.Reward({"format": 1.0, "emotion": 0.0, "rubric": 0.4}, {}, None)]
    rollouts.rewards = lambda completions, index: rewards
    by_name = {f.__name__: f(prompts=[], completions=[], index=[]) for f in rollouts.reward_functions()}
    assert by_name == {"format": [None, 1.0], "emotion": [None, 0.0], "rubric": [None, 0.4]}


class FakeJudge:
    def scores(self, items):
        return [{"relevance": 0.5, "empathy": 0.5, "persona_consistency": 0.5, "safety": 0.5, "fluency": None if "?" in item.reply else 0.5} for item in items]


def test_components_of_answers(rubric):
    dialogue = k.Dialogue("Ana", "", "sad", "Rain.", "a", (("user", "It rains."),))
    spans = {"understanding": "u", "reasoning": "r", "emotion": "sad", "response": "Rain on Sunday."}
    texts = [k.render_answer(spans), k.render_answer({**spans, "emotion": "Sad"}), "Rain.", k.render_answer({**spans, "response": "Why?"})]
    rewards = k.score_answers([(dialogue, text) for text in texts], rubric, FakeJudge())
    assert [r.components["format"] for r in rewards] == [1, 1, 0, 1]
    assert [r.components["emotion"] for r in rewards] == [1, 0, 0, 1]
    assert [r.components["rubric"] for r in rewards] == [0.5, 0.5, 0.5, None]
    assert rewards[2].problem == "<|understanding_begin|> is missing"


def test_trend_has_an_interval(tmp_path):
    import json

    def run(slope):
        path = tmp_path / f"r{slope}"
        path.mkdir()
        rows = [{"step": s, "group": 0, "reward": 0.4 + slope * s + 0.05 * math.sin(7 * s + i)} for s in range(1, 21) for i in range(4)]
        (path / "completions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return k.reward_trend(SimpleNamespace(path=path))

    rising, flat = run(0.02), run(0.0)
    assert rising["low"] > 0.01 and rising["last_quarter"] > rising["first_quarter"] and "rose" in k.trend_sentence(rising)
    assert flat["low"] < 0 < flat["high"] and "did not rise" in k.trend_sentence(flat)
