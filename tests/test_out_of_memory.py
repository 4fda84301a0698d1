"""Out of memory: what shrinks by itself, that the failed step is done again, and where the run stops."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_losses import WORDS, grpo_trainer, losses_of, sft_trainer, weights_of

import kardia_lite as k
from kardia.core import machine
from kardia.llama.errors import LlamaError, LlamaOutOfMemory
from kardia.models import packed_rows
from kardia.training import checkpoints, plan
from kardia.training.out_of_memory import PassSize, recorded_changes

TOO_MUCH = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB.")
SIZES = {"gradient_accumulation_steps": 4, "num_generations": 8, "per_device_train_batch_size": 4}
SIZES |= {"learning_rate": 0.05, "prompts": WORDS[:2], "lengths": (7, 3, 12, 1, 9, 4, 11, 2)}


def test_the_order_in_which_a_pass_shrinks():
    size, changes = PassSize(8, 128), []
    while (change := size.shrink(3, "CUDA out of memory")) is not None:
        changes.append(change)
    smaller = ["micro-batch 8 -> 4", "micro-batch 4 -> 2", "micro-batch 2 -> 1"]
    assert changes == [*smaller, "logits chunk 128 -> 32", "logits chunk 32 -> 8"]
    assert [change["step"] for change in size.changes] == [3] * 5
    assert PassSize(1, None).shrink(1, "x") is None


def test_what_counts_as_out_of_memory():
    cpu = "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried"
    errors = [TOO_MUCH, RuntimeError(cpu), MemoryError(), RuntimeError("CUDA error: out of memory")]
    errors.append(LlamaOutOfMemory("x.gguf: no context of 4096 tokens"))
    assert [error for error in errors if not machine.out_of_memory(error)] == []
    others = [RuntimeError("shapes do not fit"), ValueError("out of memory of the bank")]
    others += [LlamaError("no such file"), KeyboardInterrupt()]
    assert [error for error in others if machine.out_of_memory(error)] == []


def test_a_resumed_run_has_the_size_that_held_there(tmp_path):
    """Also from a run.json of version 0.1.0, whose records say more; a damaged record is one line."""
    first = {"step": 2, "passes": 2, "chunk": 128, "tokens": 256, "group": 8}
    changes = [first, {"step": 6, "passes": 1, "chunk": 32}]
    facts = {"command": "grpo", "options": {}, "ladder": changes}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    trainer = SimpleNamespace(pass_size=PassSize(8, 128), args=SimpleNamespace(device=torch.device("cpu")))
    assert checkpoints.prepare_resume(k.Run(tmp_path), trainer) is None and trainer.pass_size.passes == 8
    for step, passes in ((1, 8), (2, 2), (3, 2), (6, 1)):
        trainer.pass_size.set_for(step)
        assert trainer.pass_size.passes == passes
    assert recorded_changes({}) == []
    one = {"step": 1, "passes": 1}
    for bad in (1, {"step": "x"}, {**one, "passes": 0}, {**one, "passes": 10**30}, {**one, "chunk": "x"}):
        with pytest.raises(k.UserError, match="damaged"):
            recorded_changes({"ladder": [bad]})


def failing(monkeypatch, when, thing=packed_rows.PackedRow, name="logps", error=TOO_MUCH):
    """Memory runs out in calls for which when(number of the call, arguments, keywords) holds."""
    function, calls = getattr(thing, name), []

    def fails(*arguments, **keywords):
        calls.append(1)
        if when(len(calls), arguments, keywords):
            raise error
        return function(*arguments, **keywords)

    monkeypatch.setattr(thing, name, fails)


def answers_in(row):
    return row.index.shape[0]


@pytest.fixture
def make(tiny, renderer, tmp_path):
    """make() -> (a trainer, a list with an entry per time that it draws answers)."""

    def trainer_and_draws():
        trainer, drawn = grpo_trainer(True, tiny, renderer, tmp_path, **SIZES), []
        rollout = trainer.rollout_func

        def counted(prompts, trainer):
            drawn.append(1)
            return rollout(prompts, trainer)

        trainer.rollout_func = counted
        return trainer, drawn

    return trainer_and_draws


def test_smaller_passes_and_chunks_change_nothing_but_memory(make, monkeypatch, capsys):
    """Passes of more than one answer fail in the middle of a step, until the chunk is small, too. The weights
    are those of the run that had memory, its log counts each answer once, and no answer is drawn twice."""
    straight, _ = make()
    straight.train()
    (trainer, drawn), recorded = make(), []
    trainer.on_shrink = lambda changes: recorded.append(dict(changes[-1]))
    torch.manual_seed(0)
    failing(monkeypatch, lambda n, a, kw: n > 2 and (answers_in(a[0]) > 1 or kw["chunk"] > 32))
    trainer.train()
    assert [(c["passes"], c["chunk"], c["step"]) for c in recorded] == [(2, 128, 1), (1, 128, 1), (1, 32, 1)]
    assert len(drawn) == 2
    assert torch.allclose(weights_of(trainer.model), weights_of(straight.model), atol=2e-6)
    for a, b in zip(losses_of(straight), losses_of(trainer), strict=True):
        assert a["reward"] == b["reward"] and a["num_tokens"] == b["num_tokens"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    printed = capsys.readouterr().err
    assert f"step 1: out of memory in the update ({TOO_MUCH}); micro-batch 4 -> 2, and" in printed


def test_where_the_smallest_pass_does_not_fit_the_run_stops_with_the_way_on(make, monkeypatch):
    trainer, _ = make()
    trainer.smaller_options = plan.smaller_answers(k.GRPOOptions(max_tokens=256, group_size=8))
    failing(monkeypatch, lambda *_: True)
    with pytest.raises(k.UserError) as stopped:
        trainer.train()
    facts = ["step 1: out of memory", "micro-batch 1, logits chunk 8", "--resume --max-tokens 192"]
    facts.append("--resume --group-size 4")
    assert [fact for fact in facts if fact not in stopped.value.message] == []


def test_while_answers_are_drawn_the_run_stops_with_the_way_on(make):
    trainer, _ = make()
    trainer.smaller_options = plan.smaller_answers(k.GRPOOptions(max_tokens=100, group_size=2))

    def short(prompts, trainer):
        raise LlamaOutOfMemory("policy.gguf: no context of 4096 tokens")

    trainer.rollout_func = short
    stop = r"while drawing or judging answers \(policy.gguf: no context .*--max-tokens 75"
    with pytest.raises(k.UserError, match=stop) as stopped:
        trainer.train()
    assert "--group-size" not in stopped.value.message  # a group of one has no siblings
    assert not trainer.pass_size.changes


def test_other_errors_are_not_swallowed(make, monkeypatch):
    trainer, _ = make()
    failing(monkeypatch, lambda n, *_: n == 3, error=RuntimeError("mat1 and mat2 shapes do not fit"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        trainer.train()
    assert not trainer.pass_size.changes


def test_the_largest_pass_comes_first_and_leaves_no_trace(make, monkeypatch):
    """It is computed before anything is drawn, is larger than any that comes, and shrinks the pass where it
    must."""
    straight, _ = make()
    straight.train()
    (trainer, drawn), sizes, logps = make(), [], packed_rows.PackedRow.logps
    trainer.longest = list(range(100, 130))

    def spy(row, *arguments, **keywords):
        sizes.append((row.ids.shape[1], len(drawn)))
        return logps(row, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(packed_rows.PackedRow, "logps", spy)
        trainer.train()
    assert sizes[0] == (30 + 4 * 16, 0) and max(size for size, _ in sizes[1:]) < sizes[0][0]
    assert torch.equal(weights_of(trainer.model), weights_of(straight.model))
    for a, b in zip(losses_of(straight), losses_of(trainer), strict=True):
        same = {key for key in a if "time" not in key}
        assert {key: a[key] for key in same} == {key: b[key] for key in same}
    trainer, drawn = make()
    trainer.longest = list(range(100, 130))
    failing(monkeypatch, lambda n, a, kw: answers_in(a[0]) > 2 and not drawn)
    trainer.train()
    assert [change["passes"] for change in trainer.pass_size.changes] == [2]
    assert trainer.state.global_step == 2


own_path = pytest.param(False, id="TRL's own path", marks=pytest.mark.slow)


@pytest.mark.parametrize("packed", [pytest.param(True, id="packed"), own_path])
def test_sft_shrinks_and_ends_at_the_same_weights(tiny, renderer, tmp_path, monkeypatch, packed):
    generator, rows, ends = torch.Generator().manual_seed(0), [], []
    for n in (20, 9, 31, 14, 8, 25, 17, 12):
        ids = torch.randint(100, 900, (n,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (n // 2) + ids[n // 2 :]})
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}

    def too_large(n, arguments, keywords):
        return n > 2 and len(arguments[2]["lengths" if packed else "input_ids"]) > 1

    for fails in (False, True):
        trainer = sft_trainer(True, tiny, renderer, tmp_path, rows, packed, learning_rate=0.05, **sizes)
        with monkeypatch.context() as patch:
            if fails:
                failing(patch, too_large, type(trainer), "compute_loss")
            trainer.train()
        ends.append(weights_of(trainer.model))
        assert [change["passes"] for change in trainer.pass_size.changes] == ([2, 1] if fails else [])
        assert not packed or all(row["num_tokens"] == 136.0 * row["step"] for row in losses_of(trainer))
    assert torch.allclose(*ends, atol=2e-6)
