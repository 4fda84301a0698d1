"""The shared-prefix update against TRL's own path: same log-probs, same entropies, same gradients, on tiny random models."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch

import kardia_lite as k
from kardia.models import packed_rows


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
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
    ids, mask = (
        torch.zeros(len(rows), P + C, dtype=torch.long),
        torch.zeros(len(rows), P + C, dtype=torch.long),
    )
    for i, (p, c) in enumerate(rows):
        ids[i, P - len(p) : P], ids[i, P : P + len(c)] = p, c
        mask[i, P - len(p) : P + len(c)] = 1
    return ids, mask, C


def both_ways(model, ids, mask, keep, temperature=0.9):
    """(log-probs, entropies, gradients) of TRL's path and of ours; the model's attention is exchanged in between."""
    from trl import GRPOTrainer

    ours = k.make_grpo_trainer_class()
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda m: m, autocast=contextlib.nullcontext),
        temperature=temperature,
        share_prefix=True,
        model_kwarg_keys={"logits_to_keep"},
        _entropy_bonus_enabled=False,
        ladder=k.Ladder(8),
    )
    trainer._group_logps = lambda *a: ours._group_logps(trainer, *a)
    completion = mask[:, -keep:].float()
    weights = torch.randn(completion.shape, generator=torch.Generator().manual_seed(3)) * completion
    results = []
    for path in (GRPOTrainer._full_logits_logps, ours._packed_logps):
        if path is not GRPOTrainer._full_logits_logps:
            assert packed_rows.enable_packed_rows(model.base_model.model) is None
        model.zero_grad()
        logps, entropies, _ = path(trainer, model, ids, mask, keep, compute_entropy=True)
        (logps * weights).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((logps.detach() * completion, entropies.detach() * completion, gradient))
    return results


GEMMA2 = {
    "attn": "eager",
    "sliding_window": 8,
    "attn_logit_softcapping": 0.7,
    "final_logit_softcapping": 1.5,
}  # transformers' SDPA has no soft cap


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 8}),
        ("gemma2", GEMMA2),
        ("gemma3_text", {"sliding_window": 8}),
    ],
    ids=["llama", "qwen2", "qwen3", "mistral", "mistral sliding", "gemma2", "gemma3"],
)
@pytest.mark.parametrize(
    "groups", [[(20, [7, 3, 12])], [(20, [7, 1]), (9, [5, 5])]], ids=["one group", "two prompts"]
)
def test_shared_prefix_equals_trls_path(tiny, kind, changes, groups):
    (logps, entropies, gradient), (ours, our_entropies, our_gradient) = both_ways(
        lora(tiny(kind, **changes)), *batch(groups)
    )
    assert (logps - ours).abs().max() < 1e-4
    assert (entropies - our_entropies).abs().max() < 1e-3
    assert (gradient - our_gradient).norm() / gradient.norm() < 1e-4


def test_gradient_checkpointing_changes_nothing(tiny):
    """The pack must reach the attention again when a layer is computed a second time."""
    model = lora(tiny("gemma3_text", sliding_window=8)).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    (logps, _, gradient), (ours, _, our_gradient) = both_ways(model, *batch([(20, [7, 3, 12])]))
    assert (logps - ours).abs().max() < 1e-4 and (gradient - our_gradient).norm() / gradient.norm() < 1e-4


def leaky(tokens, before, window, device):
    return torch.ones(tokens, before + tokens, dtype=torch.bool, device=device)


def test_a_wrong_mask_would_be_noticed(tiny, monkeypatch):
    """The comparison above has teeth: let tokens see what comes after them, and it fails."""
    model = lora(tiny("llama"))
    both_ways(model, *batch([(20, [7, 3, 12])]))
    packing_enable = packed_rows.enable_packed_rows
    monkeypatch.setattr(packed_rows, "_causal", leaky)
    monkeypatch.setattr(packed_rows, "enable", lambda lm: None)
    (logps, _, _), (ours, _, _) = both_ways(model, *batch([(20, [7, 3, 12])]))
    assert (logps - ours).abs().max() > 1e-2
    assert packing_enable(tiny("llama")) is not None  # and so does the probe before a run


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda m: setattr(m.config, "layer_types", ["full_attention", "chunked_attention"]),
            "chunked_attention",
        ),
        (lambda m: setattr(m.config, "logit_scale", 0.5), "scaled logits"),
        (lambda m: m.get_output_embeddings().weight.requires_grad_(True), "output layer"),
        (
            lambda m: setattr(type(m), "_can_set_attn_implementation", classmethod(lambda cls: False)),
            "cannot be exchanged",
        ),
    ],
)
def test_what_cannot_share_a_prefix_says_why_and_is_left_alone(tiny, monkeypatch, spoil, reason):
    model = tiny("llama")
    model.requires_grad_(False)
    monkeypatch.setattr(
        type(model), "_can_set_attn_implementation", type(model)._can_set_attn_implementation
    )  # put back afterwards
    spoil(model)
    assert reason in packed_rows.enable_packed_rows(model)
    assert model.config._attn_implementation == "sdpa"


def test_an_exchanged_attention_is_plain_sdpa_without_a_pack(tiny):
    """Generation, evaluation and TRL's own path run on the same model: with padding, with a cache, with a soft cap."""
    for kind, changes in (("llama", {}), ("gemma2", GEMMA2), ("gemma3_text", {"sliding_window": 8})):
        model = tiny(kind, **changes).eval()
        ids, mask, _ = batch([(20, [7, 3, 12])])
        before = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        generated = model.generate(input_ids=ids[:1, :20], max_new_tokens=8, do_sample=False)
        model.requires_grad_(False)
        assert packed_rows.enable_packed_rows(model) is None
        assert torch.allclose(
            model(input_ids=ids, attention_mask=mask).logits[mask.bool()], before, atol=1e-5
        )
        assert torch.equal(
            model.generate(input_ids=ids[:1, :20], max_new_tokens=8, do_sample=False), generated
        )


@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), ("gemma3_text", {"sliding_window": 8})])
def test_dialogues_side_by_side_do_not_see_each_other(tiny, kind, changes):
    """Packing without a prompt: the hidden states are those of each text alone, and another neighbour changes none of them."""
    model = tiny(kind, **changes)
    model.requires_grad_(False)
    texts = [torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)) for n in (12, 5, 30)]
    alone = torch.cat([model.base_model(input_ids=t[None]).last_hidden_state[0] for t in texts])
    assert packed_rows.enable_packed_rows(model) is None
    row = packed_rows.pack(texts[0][:0], texts)
    assert torch.allclose(row.hidden(model), alone, atol=1e-5)
    other = packed_rows.pack(texts[0][:0], [texts[0], texts[1].flip(0), texts[2]]).hidden(model)
    assert torch.equal(other[:12], row.hidden(model)[:12]) and torch.equal(other[17:], row.hidden(model)[17:])
    assert row.predictors.tolist() == [*range(11), *range(12, 16), *range(17, 46)]


@pytest.mark.parametrize(
    ("kind", "changes"), [("llama", {}), ("gemma2", GEMMA2), ("gemma3_text", {"sliding_window": 8})]
)
@pytest.mark.parametrize("prompt", [20, 0])
def test_flex_attention_says_the_same(tiny, monkeypatch, kind, changes, prompt):
    """The way a GPU may choose, run here without its compiler: which tokens see which, windows, soft caps, shared heads. FlexAttention
    has no backward pass on a CPU; there it is compared on the GPU itself before it is chosen."""
    from torch.nn.attention.flex_attention import flex_attention

    model = tiny(kind, **changes).eval()
    assert packed_rows.enable_packed_rows(model) is None and packed_rows.kernel() == "segments"
    ids = torch.randint(3, 97, (60,), generator=torch.Generator().manual_seed(3))
    row = packed_rows.pack(ids[:prompt], [ids[20:27], ids[30:33], ids[40:52]])
    with torch.no_grad():
        before = row.hidden(model)
        monkeypatch.setattr(packed_rows, "_kernel", [flex_attention])
        assert packed_rows.kernel() == "flex"
        assert torch.allclose(row.hidden(model), before, atol=2e-5)
        monkeypatch.setattr(
            packed_rows.Pack, "blocks", lambda row, window: None
        )  # every token sees all of the row
        assert not torch.allclose(row.hidden(model), before, atol=1e-2)


def test_where_flex_attention_cannot_be_had_the_other_way_is_taken(tiny, monkeypatch):
    """No GPU, no compiler: the trial fails, says False, and leaves things as they were."""
    model = tiny("llama")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    assert packed_rows.flex_is_faster(model) is False and packed_rows.kernel() == "segments"


@pytest.mark.gpu
def test_whichever_is_chosen_on_a_gpu_has_the_same_log_probs(tiny):
    model = tiny("llama", head_dim=64).to("cuda", torch.bfloat16)
    assert packed_rows.enable_packed_rows(model) is None
    print("on this GPU:", packed_rows.kernel())


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_log_probs_in_chunks_and_their_gradient_are_those_of_the_whole(softcap):
    torch.manual_seed(0)
    head, hidden, targets = (
        torch.nn.Linear(16, 50, bias=False),
        torch.randn(23, 16, requires_grad=True),
        torch.randint(0, 50, (23,)),
    )
    logits = head(hidden)
    whole = ((softcap * torch.tanh(logits / softcap) if softcap else logits) / 0.7).log_softmax(-1)
    upstream = torch.randn(23)
    (expected,) = torch.autograd.grad((whole.gather(1, targets[:, None])[:, 0] * upstream).sum(), hidden)
    logps, entropies, best = packed_rows.token_logps(hidden, head, targets, 0.7, softcap, chunk=5)
    assert torch.allclose(logps, whole.gather(1, targets[:, None])[:, 0], atol=1e-6)
    assert torch.allclose(entropies, -(whole.exp() * whole).sum(-1), atol=1e-5)
    assert torch.equal(best.bool(), whole.argmax(-1) == targets)
    (logps * upstream).sum().backward()
    assert torch.allclose(hidden.grad, expected, atol=1e-6)


def fixed_rollouts(tokenizer, lengths):
    """A rollout function without a model: the same completions every time, some of them cut off."""

    def rollout(prompts, trainer):
        generator = torch.Generator().manual_seed(trainer.state.global_step)
        G = trainer.num_generations
        ids = [tokenizer(chat[0]["content"])["input_ids"] for chat in prompts]
        completions = [
            torch.randint(100, 2000, (lengths[i % len(lengths)],), generator=generator).tolist()
            for i in range(len(prompts))
        ]
        return {
            "prompt_ids": ids,
            "completion_ids": [
                c if i % 3 else [*c, tokenizer.eos_token_id] for i, c in enumerate(completions)
            ],
            "logprobs": [[-7.0] * (len(c) + (i % 3 == 0)) for i, c in enumerate(completions)],
            "G": [G] * len(ids),
        }

    return rollout


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"beta": 0.1},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True, "beta": 0.1},
        {"num_iterations": 2},
    ],
    ids=["plain", "reference pass", "micro-batches", "gradient checkpointing", "two updates per rollout"],
)
def test_whole_steps_equal_those_of_trls_trainer(tiny, renderer, tmp_path, case):
    """Two optimizer steps of two prompts x four answers on the same rollouts: TRL's GRPOTrainer and ours end at the same weights."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    ours, weights = k.make_grpo_trainer_class(), []
    for trainer_class in (GRPOTrainer, ours):
        model = lora(tiny("llama", vocab_size=49152))
        start = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        config = GRPOConfig(
            **{
                **dict(
                    output_dir=str(tmp_path),
                    per_device_train_batch_size=8,
                    num_generations=4,
                    steps_per_generation=case.get("gradient_accumulation_steps", 1),
                    max_completion_length=16,
                    max_steps=2,
                    learning_rate=1e-3,
                    lr_scheduler_type="constant",
                    optim="sgd",
                    loss_type="dapo",
                    temperature=0.9,
                    save_strategy="no",
                    report_to="none",
                    use_cpu=True,
                    bf16=False,
                    gradient_checkpointing=False,
                    shuffle_dataset=False,
                    seed=0,
                    logging_steps=1,
                    disable_tqdm=True,
                ),
                **case,
            }
        )
        rows = Dataset.from_list(
            [
                {"prompt": [{"role": "user", "content": f"{word} {word} and then"}]}
                for word in ("Rain", "A long day in the office", "Tea", "Snow")
            ]
        )
        reward = lambda completion_ids, **_: [sum(ids) % 97 / 97 for ids in completion_ids]  # noqa: E731
        trainer = trainer_class(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=rows,
            processing_class=renderer.tokenizer,
            rollout_func=fixed_rollouts(renderer.tokenizer, [7, 3, 12, 1, 9]),
        )
        trainer.create_model_card = lambda *_, **__: None
        trainer.train()
        weights.append(
            torch.cat(
                [
                    p.detach().flatten()
                    for name, p in trainer.model.named_parameters()
                    if "lora" in name and "ref" not in name
                ]
            )
        )
    moved = (weights[0] - start[: len(weights[0])]).norm()
    assert moved > 0
    assert (weights[0] - weights[1]).norm() / moved < 1e-3


@pytest.mark.parametrize("share_prefix", [True, False], ids=["packed", "TRL's own path"])
def test_an_inspected_step_tells_log_probs_of_the_weights_before_and_after_it(
    tiny, renderer, tmp_path, share_prefix
):
    """Against a plain forward pass of each answer alone, with the weights as they were and as they are; micro-batches of two."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig

    model = lora(tiny("llama", vocab_size=49152))
    config = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        num_generations=4,
        max_completion_length=16,
        max_steps=1,
        learning_rate=0.05,
        temperature=0.9,
        shuffle_dataset=False,
        lr_scheduler_type="constant",
        optim="sgd",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        seed=0,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    rows, drawn = (
        Dataset.from_list(
            [
                {"prompt": [{"role": "user", "content": f"{word} and then"}]}
                for word in ("Rain", "A long day in the office")
            ]
        ),
        [],
    )
    rollout = fixed_rollouts(renderer.tokenizer, [7, 3, 12, 1, 9])
    remember = lambda prompts, trainer: drawn.append(rollout(prompts, trainer)) or drawn[-1]  # noqa: E731
    trainer = k.make_grpo_trainer_class()(
        model=model,
        reward_funcs=lambda completion_ids, **_: [sum(ids) % 97 / 97 for ids in completion_ids],
        args=config,
        train_dataset=rows,
        processing_class=renderer.tokenizer,
        rollout_func=remember,
        enable=packed_rows.enable_packed_rows if share_prefix else lambda model: "not wanted",
    )
    trainer.create_model_card = lambda *_, **__: None
    trainer.inspecting, told = True, []

    def alone():
        with torch.no_grad():
            out = []
            for prompt, completion in zip(drawn[0]["prompt_ids"], drawn[0]["completion_ids"]):
                logits = (
                    model(input_ids=torch.tensor([prompt + completion]))
                    .logits[0, len(prompt) - 1 : -1]
                    .float()
                    / 0.9
                )
                out.append(
                    logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0].tolist()
                )
        return out

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            told.append(alone())

        def on_step_end(self, *_, **__):
            told.append(alone())
            told.append(k.moved_logps(trainer, 4, 8))

    trainer.add_callback(Watch())
    trainer.train()
    before, after, moved = told
    assert len(moved) == 4 and [ids for ids, *_ in moved] == drawn[0]["completion_ids"][4:]
    for (_, b, a), true_b, true_a in zip(moved, before[4:], after[4:]):
        assert b == pytest.approx(true_b, abs=1e-4) and a == pytest.approx(true_a, abs=1e-4)
    assert max(abs(x - y) for _, b, a in moved for x, y in zip(a, b)) > 1e-3  # the step did move them


def test_the_samplers_log_probs_are_the_old_ones_where_the_weights_differ(tiny, renderer, tmp_path):
    """4-bit in torch, dequantized in llama.cpp: the clipped ratio must start from what was sampled, else it starts from 1."""
    from datasets import Dataset
    from trl import GRPOConfig

    ratios = {}
    for trust in (False, True):
        config = GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=16,
            max_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            seed=0,
            disable_tqdm=True,
        )
        rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "Rain"}]}])
        trainer = k.make_grpo_trainer_class()(
            model=lora(tiny("llama", vocab_size=49152)),
            reward_funcs=lambda completion_ids, **_: [float(len(c)) for c in completion_ids],
            args=config,
            train_dataset=rows,
            processing_class=renderer.tokenizer,
            rollout_func=fixed_rollouts(renderer.tokenizer, [7, 3, 12, 1]),
        )
        trainer.create_model_card = lambda *_, **__: None
        trainer.trust_sampler, seen = trust, []
        compute = trainer._compute_loss
        trainer._compute_loss = lambda model, inputs: (
            seen.append(inputs.get("old_per_token_logps")),
            compute(model, inputs),
        )[1]  # noqa: B023
        trainer.train()
        ratios[trust] = seen[0]
    assert ratios[False] is None  # ratio 1: what was sampled is what is trained
    assert ratios[True] is not None and bool((ratios[True][ratios[True] != 0] == -7.0).all())


def test_sft_steps_equal_those_of_trls_trainer(tiny, renderer, tmp_path):
    """Dialogues of very different lengths, two per pass: TRL pads them, ours lays them side by side. Same losses, accuracies and weights."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    generator, rows = torch.Generator().manual_seed(0), []
    for n in (40, 7, 23, 64, 12, 31, 9, 55):
        ids = torch.randint(100, 2000, (n,), generator=generator).tolist()
        rows.append(
            {
                "input_ids": ids,
                "labels": [-100 if i < 3 or 10 < i < 15 else token for i, token in enumerate(ids)],
            }
        )
    weights, logs = [], []
    for ours in (False, True):
        model = lora(tiny("llama", vocab_size=49152))
        config = SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=4,
            learning_rate=1e-2,
            optim="sgd",
            lr_scheduler_type="constant",
            max_length=None,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            seed=0,
            logging_steps=1,
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        if ours:
            assert packed_rows.enable_packed_rows(model.base_model.model) is None
        trainer_class, collator = (k.make_sft_trainer_class(), k.side_by_side) if ours else (SFTTrainer, None)
        trainer = trainer_class(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=renderer.tokenizer,
            data_collator=collator,
        )
        trainer.create_model_card = lambda *_, **__: None
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    start = torch.cat(
        [p.detach().flatten() for p in lora(tiny("llama", vocab_size=49152)).parameters() if p.requires_grad]
    )
    assert (weights[0] - weights[1]).norm() / (weights[0] - start).norm() < 1e-3
    for plain, packed in zip(*logs, strict=True):
        assert math.isclose(plain["loss"], packed["loss"], rel_tol=1e-4) and math.isclose(
            plain["num_tokens"], packed["num_tokens"]
        )
        assert math.isclose(plain["mean_token_accuracy"], packed["mean_token_accuracy"], abs_tol=1e-3)


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
    rewards = [
        k.Reward({"format": 1.0, "emotion": 1.0, "rubric": None}, {}, None),
        k.Reward({"format": 1.0, "emotion": 0.0, "rubric": 0.4}, {}, None),
    ]
    rollouts.rewards = lambda completions, index: rewards
    by_name = {f.__name__: f(prompts=[], completions=[], index=[]) for f in rollouts.reward_functions()}
    assert by_name == {"format": [None, 1.0], "emotion": [None, 0.0], "rubric": [None, 0.4]}


class FakeJudge:
    def scores(self, items):
        return [
            {
                "relevance": 0.5,
                "empathy": 0.5,
                "persona_consistency": 0.5,
                "safety": 0.5,
                "fluency": None if "?" in item.reply else 0.5,
            }
            for item in items
        ]


def test_components_of_answers(rubric):
    dialogue = k.Dialogue("Ana", "", "sad", "Rain.", "a", (("user", "It rains."),))
    spans = {"understanding": "u", "reasoning": "r", "emotion": "sad", "response": "Rain on Sunday."}
    texts = [
        k.render_answer(spans),
        k.render_answer({**spans, "emotion": "Sad"}),
        "Rain.",
        k.render_answer({**spans, "response": "Why?"}),
    ]
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
        rows = [
            {"step": s, "group": 0, "reward": 0.4 + slope * s + 0.05 * math.sin(7 * s + i)}
            for s in range(1, 21)
            for i in range(4)
        ]
        (path / "completions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return k.reward_trend(SimpleNamespace(path=path))

    rising, flat = run(0.02), run(0.0)
    assert (
        rising["low"] > 0.01
        and rising["last_quarter"] > rising["first_quarter"]
        and "rose" in k.trend_sentence(rising)
    )
    assert flat["low"] < 0 < flat["high"] and "did not rise" in k.trend_sentence(flat)
