"""Out of memory: what is given up, in which order, and that the step which failed is the step that is done."""

import json

import pytest
import torch
from test_grpo_math import fixed_rollouts, lora

import kardia_lite as k
from kardia.core import machine
from kardia.llama.errors import LlamaOutOfMemory
from kardia.models import packed_rows
from kardia.training import out_of_memory as ladders


def test_the_order_of_the_rungs_and_whole_groups():
    ladder, told = k.Ladder(8, 128, 256, 8), []
    while (change := ladder.down(3, False, "CUDA out of memory")) is not None:
        told.append(change)
        assert ladder.group is None or ladder.passes <= ladder.group
    kinds = [change.split(" ")[0] for change in told]
    assert kinds == sorted(kinds, key=["micro-batch", "logits", "completion", "group"].index), told
    assert (
        told[:3] == ["micro-batch 8 -> 4", "micro-batch 4 -> 2", "micro-batch 2 -> 1"]
        and told[-1] == "group size 4 -> 2"
    )
    assert (ladder.passes, ladder.chunk, ladder.tokens, ladder.group) == (
        1,
        8,
        128,
        2,
    )  # half the length is the least, a group of two still has siblings
    assert [rung["step"] for rung in ladder.rungs] == [3] * len(told)


def test_smaller_passes_are_no_help_while_answers_are_drawn():
    ladder = k.Ladder(8, 128, 256, 8)
    assert ladder.down(1, True, "x") == "completion length 256 -> 192" and ladder.passes == 8
    sft = k.Ladder(4)
    assert sft.down(1, True, "x") is None and sft.down(1, False, "x") == "micro-batch 4 -> 2"


def test_what_counts_as_out_of_memory():
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        LlamaOutOfMemory("x.gguf: no context of 4096 tokens"),
    ):
        assert machine.out_of_memory(error)
    for error in (
        RuntimeError("shapes do not fit"),
        ValueError("out of memory of the bank"),
        k.LlamaError("no such file"),
        KeyboardInterrupt(),
    ):
        assert not machine.out_of_memory(error)


def test_a_damaged_ladder_in_run_json_is_refused():
    assert ladders.rungs_of({}, 5) == ([], None)
    rungs = [
        {"step": 2, "passes": 4, "chunk": None, "tokens": 256, "group": 8},
        {"step": 7, "passes": 2, "chunk": None, "tokens": 256, "group": 8},
    ]
    assert (
        ladders.rungs_of({"ladder": rungs}, 5)[1]["passes"] == 4
        and ladders.rungs_of({"ladder": rungs}, 1)[1] is None
    )
    for bad in ([1], [{"step": "x"}], [{"step": 1, "passes": 0}], [{"step": 1, "passes": 10**30}]):
        with pytest.raises(k.UserError, match="damaged"):
            ladders.rungs_of({"ladder": bad}, 5)


# ---------------------------------------------------------------------------------- a real trainer, injected errors


def make_trainer(tiny, renderer, tmp_path, steps=2, lengths=(7, 3, 12, 1, 9, 4, 11, 2), **more):
    from datasets import Dataset
    from trl import GRPOConfig

    config = GRPOConfig(
        **dict(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            num_generations=8,
            max_completion_length=16,
            max_steps=steps,
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
            logging_steps=1,
            scale_rewards="group",
            loss_type="dapo",
        )
        | more
    )
    rows = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": f"{word} and then"}]}
            for word in ("Rain", "A long day in the office")
        ]
    )
    fixed, drawn = fixed_rollouts(renderer.tokenizer, list(lengths)), []

    def rollouts(prompts, trainer):
        out = fixed(prompts, trainer)
        keep = trainer.max_completion_length
        out = {
            **out,
            "completion_ids": [ids[:keep] for ids in out["completion_ids"]],
            "logprobs": [values[:keep] for values in out["logprobs"]],
        }
        drawn.append((prompts, out))
        return out

    trainer = k.make_grpo_trainer_class()(
        model=lora(tiny("llama", vocab_size=49152)),
        reward_funcs=lambda completion_ids, **_: [sum(ids) % 97 / 97 for ids in completion_ids],
        args=config,
        train_dataset=rows,
        processing_class=renderer.tokenizer,
        rollout_func=rollouts,
    )
    trainer.create_model_card = lambda *_, **__: None
    return trainer, drawn


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def failing(monkeypatch, when, where=(packed_rows.Pack, "logps"), error=None):
    """Memory runs out in calls for which when(number of the call, arguments, keywords) holds."""
    thing, name = where
    function, calls = getattr(thing, name), [0]

    def fails(*arguments, **more):
        calls[0] += 1
        if when(calls[0], arguments, more):
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB.")
        return function(*arguments, **more)

    monkeypatch.setattr(thing, name, fails)
    return calls


def answers_in(pack):
    return pack.index.shape[0]


def test_smaller_passes_and_chunks_change_nothing_but_memory(tiny, renderer, tmp_path, monkeypatch, capsys):
    """Passes of more than one answer fail until the chunk is small, too, and in the middle of a step: the weights must be those of
    the run that had memory, and its log must count each answer once."""
    trainer, _ = make_trainer(tiny, renderer, tmp_path / "a")
    trainer.train()
    straight, log = weights_of(trainer), [row for row in trainer.state.log_history if "loss" in row]
    trainer, drawn = make_trainer(tiny, renderer, tmp_path / "b")
    rungs = []
    trainer.on_rung = lambda told: rungs.append(dict(told[-1]))
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        failing(
            patch, lambda n, a, m: n > 2 and (answers_in(a[0]) > 1 or a[5] > 32)
        )  # in the third of four micro-batches of the first step
        trainer.train()
    assert [(rung["passes"], rung["chunk"], rung["step"]) for rung in rungs] == [
        (2, 128, 1),
        (1, 128, 1),
        (1, 32, 1),
    ]
    assert (
        {rung["tokens"] for rung in rungs} == {16}
        and {rung["group"] for rung in rungs} == {8}
        and len(drawn) == 2
    )  # no answer was drawn twice
    assert torch.allclose(weights_of(trainer), straight, atol=2e-6) and not torch.equal(
        straight, torch.zeros_like(straight)
    )
    again = [row for row in trainer.state.log_history if "loss" in row]
    for a, b in zip(log, again):
        assert (
            a["reward"] == b["reward"]
            and a["num_tokens"] == b["num_tokens"]
            and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        )
    told = capsys.readouterr().err
    assert (
        "step 1: out of memory in the update (CUDA out of memory. Tried to allocate 1.50 GiB.); micro-batch 4 -> 2, and the step once more"
        in told
    )


def test_completion_length_then_group_size_and_groups_stay_whole(tiny, renderer, tmp_path, monkeypatch):
    """Every pass fails until a group has four answers of half the length; from then on all groups are drawn and pushed whole."""
    trainer, drawn = make_trainer(tiny, renderer, tmp_path, lengths=(16, 3, 14, 16, 9, 15, 11, 16))
    rungs, seen = [], []
    trainer.on_rung = lambda told: rungs.append(dict(told[-1]))
    trainer.record = lambda step, inputs, output: seen.append(
        (
            step,
            [row["prompt"][0]["content"] for row in inputs],
            output["advantages"].clone(),
            output["completion_mask"].sum(1),
        )
    )
    failing(monkeypatch, lambda n, a, m: trainer.num_generations > 4)
    trainer.train()
    assert [(rung["passes"], rung["chunk"], rung["tokens"], rung["group"]) for rung in rungs][-4:] == [
        (1, 8, 16, 8),
        (1, 8, 12, 8),
        (1, 8, 8, 8),
        (1, 8, 8, 4),
    ]
    assert [(step, len(advantages)) for step, _, advantages, _ in seen] == [
        (1, 16),
        (1, 16),
        (1, 16),
        (1, 8),
        (2, 8),
    ]  # two prompts; drawn anew when their length or number changed
    for _, prompts, advantages, lengths in seen[3:]:
        assert all(len(set(prompts[i : i + 4])) == 1 for i in (0, 4)) and len(set(prompts)) == 2
        assert advantages.view(2, 4).sum(1).abs().max() < 1e-3 and lengths.max() <= 8  # each group's own mean
    assert trainer.state.global_step == 2 and weights_of(trainer).isfinite().all()


def test_at_the_bottom_there_is_one_line(tiny, renderer, tmp_path, monkeypatch):
    trainer, _ = make_trainer(tiny, renderer, tmp_path)
    failing(monkeypatch, lambda n, a, m: True)
    with pytest.raises(
        k.UserError,
        match=r"step 1: out of memory .*nothing is left to give up: micro-batch 1, logits chunk 8, completion length 8, group size 2",
    ):
        trainer.train()


def test_other_errors_are_not_swallowed(tiny, renderer, tmp_path, monkeypatch):
    trainer, _ = make_trainer(tiny, renderer, tmp_path)
    failing(
        monkeypatch, lambda n, a, m: n == 3, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    )
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        trainer.train()
    assert not trainer.ladder.rungs


def test_the_largest_pass_comes_first_and_leaves_no_trace(tiny, renderer, tmp_path, monkeypatch):
    trainer, _ = make_trainer(tiny, renderer, tmp_path / "a")
    trainer.train()
    straight, log = weights_of(trainer), trainer.state.log_history
    trainer, drawn = make_trainer(tiny, renderer, tmp_path / "b")
    trainer.longest, sizes = list(range(100, 130)), []
    logps = packed_rows.Pack.logps
    monkeypatch.setattr(
        packed_rows.Pack,
        "logps",
        lambda self, *a, **m: (sizes.append((self.ids.shape[1], len(drawn))), logps(self, *a, **m))[1],
    )
    trainer.train()
    assert (
        sizes[0] == (30 + 4 * 16, 0) and max(size for size, _ in sizes[1:]) < sizes[0][0]
    )  # before anything was drawn
    assert torch.equal(weights_of(trainer), straight)
    assert [
        {
            key: value
            for key, value in row.items()
            if "time" not in key and "runtime" not in key and "per_second" not in key
        }
        for row in trainer.state.log_history
    ] == [
        {
            key: value
            for key, value in row.items()
            if "time" not in key and "runtime" not in key and "per_second" not in key
        }
        for row in log
    ]


def test_the_largest_pass_finds_the_rung_before_any_answer_is_drawn(tiny, renderer, tmp_path, monkeypatch):
    trainer, drawn = make_trainer(tiny, renderer, tmp_path)
    trainer.longest = list(range(100, 130))
    failing(monkeypatch, lambda n, a, m: answers_in(a[0]) > 2 and not drawn)
    trainer.train()
    assert [rung["passes"] for rung in trainer.ladder.rungs] == [2] and trainer.state.global_step == 2


def test_memory_that_runs_out_while_answers_are_drawn(tiny, renderer, tmp_path, capsys):
    trainer, drawn = make_trainer(tiny, renderer, tmp_path)
    rollouts = trainer.rollout_func

    def short(prompts, trainer):
        if trainer.max_completion_length > 12:
            raise LlamaOutOfMemory("policy.gguf: no context of 4096 tokens")
        return rollouts(prompts, trainer)

    trainer.rollout_func = short
    trainer.train()
    assert [(rung["passes"], rung["tokens"]) for rung in trainer.ladder.rungs] == [
        (4, 12)
    ] and trainer.state.global_step == 2
    assert "out of memory drawing" in capsys.readouterr().err


def test_sft_goes_down_and_ends_at_the_same_weights(tiny, renderer, tmp_path, monkeypatch):
    from datasets import Dataset
    from trl import SFTConfig

    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "input_ids": (ids := torch.randint(100, 900, (n,), generator=generator).tolist()),
            "labels": [-100] * (n // 2) + ids[n // 2 :],
        }
        for n in (20, 9, 31, 14, 8, 25, 17, 12)
    ]
    ends = {}
    for packed in (True, False):
        for fails in (False, True):
            config = SFTConfig(
                output_dir=str(tmp_path),
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                learning_rate=0.05,
                max_steps=2,
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
                optim="sgd",
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                bf16=False,
                seed=0,
                disable_tqdm=True,
                gradient_checkpointing=False,
                logging_steps=1,
            )
            model = lora(tiny("llama", vocab_size=49152))
            if packed:
                assert packed_rows.enable_packed_rows(model.base_model.model) is None
            trainer = k.make_sft_trainer_class(packed)(
                model=model,
                args=config,
                train_dataset=Dataset.from_list(rows),
                processing_class=renderer.tokenizer,
                data_collator=k.side_by_side if packed else None,
            )
            trainer.ladder, trainer.longest = (
                k.Ladder(4, 128 if packed else None),
                sorted(rows, key=lambda row: -len(row["input_ids"]))[:4],
            )
            with monkeypatch.context() as patch:
                if fails:
                    size = (
                        (lambda inputs: len(inputs["lengths"]))
                        if packed
                        else (lambda inputs: len(inputs["input_ids"]))
                    )
                    failing(
                        patch, lambda n, a, m: n > 2 and size(a[2]) > 1, where=(type(trainer), "compute_loss")
                    )
                trainer.train()
            ends[packed, fails] = weights_of(trainer)
            assert [rung["passes"] for rung in trainer.ladder.rungs] == ([2, 1] if fails else [])
            assert (
                all(
                    row["num_tokens"] == 136.0 * row["step"]
                    for row in trainer.state.log_history
                    if "loss" in row
                )
                or not packed
            )
    for packed in (True, False):
        assert torch.allclose(ends[packed, True], ends[packed, False], atol=2e-6)


def test_a_resumed_run_stands_on_its_rung(tmp_path):
    run_json = {
        "command": "grpo",
        "options": {},
        "ladder": [
            {"step": 2, "passes": 2, "chunk": 128, "tokens": 256, "group": 8, "why": "x"},
            {"step": 6, "passes": 2, "chunk": 128, "tokens": 192, "group": 8, "why": "x"},
        ],
    }
    (tmp_path / "run.json").write_text(json.dumps(run_json))

    class Trainer:
        pass

    trainer = Trainer()
    assert k.climb(k.Run(tmp_path), trainer, k.Ladder(8, 128, 256, 8)) is None
    assert (trainer.ladder.passes, trainer.ladder.tokens) == (
        8,
        256,
    )  # from the beginning: the rungs come where they came
    for step, here in ((1, (8, 256)), (2, (2, 256)), (3, (2, 256)), (6, (2, 192))):
        trainer.ladder.recall(step)
        assert (trainer.ladder.passes, trainer.ladder.tokens) == here


def test_the_report_says_what_was_given_up(tmp_path):
    from kardia.results import report

    rungs = [
        {
            "step": 2,
            "passes": 4,
            "chunk": 128,
            "tokens": 256,
            "group": 8,
            "why": "micro-batch 8 -> 4 (CUDA out of memory <b>)",
        }
    ]
    (tmp_path / "run.json").write_text(
        json.dumps({"command": "grpo", "options": {}, "memory_plan": {"activations": 2.0}, "ladder": rungs})
    )
    (tmp_path / "log.jsonl").write_text('{"step": 1, "reward": 0.1}\n')
    page = report.write_report([tmp_path], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "from step 2: micro-batch 8 -&gt; 4 (CUDA out of memory &lt;b&gt;)" in page
