"""What differs between engines and between 16 and 4 bits: gradients of 4-bit weights, the LoRA's precision, the embedding table in
the computer's memory; and the whole way (load, SFT, GRPO, resume, export and its proof), on a GPU in both engines."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from launched import with_signal

import kardia_lite as k
from kardia.core import machine
from kardia.models import packed_rows
from kardia.models.weights import read_adapter

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def run(*arguments):
    result = CliRunner().invoke(k.cli, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def base_of(directory):
    return k.Base("tiny", directory, None, "hash")


def gradients(model, ids):
    """Of every LoRA weight, for the sum of all log-probs."""
    model.train()
    model.zero_grad()
    logits = model(input_ids=ids[None]).logits[0, :-1].float()
    logits.log_softmax(-1).gather(-1, ids[1:, None]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def with_lora(model):
    """A LoRA that does something."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_4_bit_gradients_survive_a_pass_in_eval_mode(tiny_directory):
    """After one, bitsandbytes packs 4-bit weights anew for a CPU with AVX512-BF16, and its kernel for these has no gradients: all
    training after the trial of packed rows would learn from half of each. (Elsewhere nothing of this happens.)"""
    model = with_lora(
        k.load_policy(
            base_of(tiny_directory("llama", **SIZES)), "transformers", 4, rank=4, dtype=torch.float32
        )
    )
    ids = torch.randint(3, 97, (40,), generator=torch.Generator().manual_seed(0))
    before = gradients(model, ids)
    assert packed_rows.enable_packed_rows(model.base_model.model) is None
    with torch.no_grad():
        model.eval()(input_ids=ids[None])
    after = gradients(model, ids)
    assert all(
        torch.allclose(before[name], after[name], rtol=1e-3, atol=1e-4 * float(before[name].abs().max()))
        for name in before
    )


def test_the_lora_of_a_4_bit_model_is_trained_in_float32(little, tmp_path, unjudged, monkeypatch):
    """TRL would round it to bfloat16, in which steps of 2e-5 move few of the weights."""
    monkeypatch.setattr(k, "score_answers", with_signal(k.score_answers))
    common = ["--rubric", unjudged]
    run(
        "sft",
        "--model",
        little,
        "--bits",
        4,
        "--limit",
        8,
        "--batch-size",
        2,
        "--max-length",
        700,
        *common,
        "--out",
        tmp_path / "sft",
    )
    run(
        "grpo",
        "--from",
        tmp_path / "sft",
        "--steps",
        2,
        "--group-size",
        4,
        "--max-tokens",
        16,
        "--learning-rate",
        "2e-5",
        "--beta",
        "0.1",
        *common,
        "--out",
        tmp_path / "grpo",
    )
    (_, before), (_, after) = (
        read_adapter(tmp_path / "sft" / "adapter"),
        read_adapter(tmp_path / "grpo" / "adapter"),
    )
    from safetensors.torch import load_file

    for name in ("sft", "grpo"):
        assert {
            t.dtype for t in load_file(tmp_path / name / "adapter" / "adapter_model.safetensors").values()
        } == {torch.float32}
    moved = [float((x != y).float().mean()) for name in before for x, y in zip(before[name], after[name])]
    assert min(moved) > 0.9
    first, second = (json.loads(line) for line in (tmp_path / "grpo" / "log.jsonl").read_text().splitlines())
    assert first["kl"] == 0 and 0 < second["kl"] < 1  # the reference is the SFT adapter, to the last bit


@pytest.mark.parametrize("bits", [16, 4])
def test_an_embedding_table_in_the_computers_memory_changes_nothing(tiny_directory, bits):
    directory = tiny_directory("llama", tie_word_embeddings=False, **SIZES)
    plain, host = (
        with_lora(
            k.load_policy(
                base_of(directory), "transformers", bits, rank=4, dtype=torch.float32, host_embedding=h
            )
        )
        for h in (False, True)
    )
    ids = torch.randint(3, 97, (40,), generator=torch.Generator().manual_seed(0))
    table = plain.get_input_embeddings().weight
    held = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert (
        held(plain) - held(host) == table.numel()
    )  # it is no parameter any more, so nothing moves it to a GPU
    for model in (plain, host):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    a, b = gradients(plain, ids), gradients(host, ids)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert host.get_input_embeddings().weight.grad is None  # a table of its size once more, at every pass
    assert packed_rows.enable_packed_rows(host.base_model.model) is None
    assert torch.equal(
        plain.generate(input_ids=ids[None], max_new_tokens=5, do_sample=False),
        host.generate(input_ids=ids[None], max_new_tokens=5, do_sample=False),
    )


def test_a_gpu_gets_paged_8_bit_adam_and_checkpoints(monkeypatch):
    monkeypatch.setattr(k, "compute_dtype", lambda: torch.bfloat16)
    cpu = k.shared_arguments(k.SFTOptions(), 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = k.shared_arguments(k.SFTOptions(), 4)
    assert (gpu["optim"], gpu["gradient_checkpointing"], gpu["use_cpu"], gpu["bf16"]) == (
        "paged_adamw_8bit",
        True,
        False,
        True,
    )
    assert (cpu["optim"], cpu["gradient_checkpointing"], cpu["use_cpu"]) == (
        "adamw_torch",
        False,
        True,
    ) or machine.has_gpu()


def test_a_tied_embedding_table_stays(tiny):
    with pytest.raises(ValueError, match="same table"):
        machine.keep_on_host(tiny("llama", tie_word_embeddings=True))


def the_whole_way(engine, bits, model, work, rubric, monkeypatch):
    """Load, SFT, two GRPO steps of which the second one after a resume, export and its proof. Returns the run's facts."""
    monkeypatch.setattr(k, "score_answers", with_signal(k.score_answers))
    common = ["--engine", engine, "--rubric", rubric]
    run(
        "sft",
        "--model",
        model,
        "--bits",
        bits,
        "--limit",
        8,
        "--batch-size",
        2,
        "--max-steps",
        4,
        "--max-length",
        700,
        "--learning-rate",
        "5e-3",
        *common,
        "--out",
        work / "sft",
    )
    grpo = [
        "grpo",
        "--from",
        work / "sft",
        "--steps",
        2,
        "--save-steps",
        1,
        "--group-size",
        4,
        "--max-tokens",
        24,
        "--learning-rate",
        "1e-3",
        "--beta",
        "0.01",
        *common,
    ]
    run(*grpo, "--out", work / "whole")
    step_done = k.Rollouts.step_done

    def then_killed(rollouts, step):
        told = step_done(rollouts, step)
        if step == 2:
            raise KeyboardInterrupt
        return told

    with monkeypatch.context() as patch:
        patch.setattr(k.Rollouts, "step_done", then_killed)
        result = CliRunner().invoke(k.cli, [str(a) for a in [*grpo, "--out", work / "resumed"]])
        assert result.exit_code == 1 and "--resume" in result.output
    assert (work / "resumed" / "checkpoint-1").is_dir()
    run(*grpo, "--resume", "--out", work / "resumed")
    logs = [
        [json.loads(line) for line in (work / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "resumed")
    ]
    for whole, resumed in zip(*logs, strict=True):
        assert resumed["grad_norm"] > 0 and (resumed["kl"] > 0) == (
            resumed["step"] > 1
        )  # after the resume it stands where it stood, off its reference
        if (
            not torch.cuda.is_available()
        ):  # a GPU rounds otherwise from run to run, and other answers may be drawn
            assert resumed["grad_norm"] == pytest.approx(whole["grad_norm"], rel=0.05)
    one = work / "one.jsonl"
    one.write_text(
        (k.DATA / "eval.jsonl").read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8"
    )
    run(
        "export",
        work / "resumed",
        "--to",
        work / "out",
        "--formats",
        "merged,lora,q8_0",
        "--data",
        one,
        "--answers",
        0,
        "--rubric",
        rubric,
    )
    book = json.loads((work / "out" / "export.json").read_text())
    assert {"merged", "q8_0", "lora"} <= set(book["formats"]) and all(
        entry["ok"] for entry in book["formats"].values()
    ), book["formats"]
    facts = json.loads((work / "resumed" / "run.json").read_text())
    assert facts["engine"] == engine and facts["bits"] == bits and facts["status"] == "done"
    return facts


def test_the_whole_way_in_4_bits_on_a_cpu(little, tmp_path, unjudged, monkeypatch):
    facts = the_whole_way("transformers", 4, little, tmp_path, unjudged, monkeypatch)
    assert facts["setting"]["rollout"] == "llama" and not facts["setting"]["cuda"]


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
def test_the_whole_way_on_a_gpu(engine, bits, embedded, tmp_path, unjudged, monkeypatch):
    if engine == "unsloth":
        pytest.importorskip("unsloth")
    facts = the_whole_way(engine, bits, embedded.template, tmp_path, unjudged, monkeypatch)
    assert facts["setting"]["cuda"] and facts["peak_memory_gb"] > 0


def test_another_type_for_rollouts_trusts_the_sampler(little, tmp_path, unjudged, monkeypatch):
    """q8_0 weights are not quite the ones that learn: the sampler's log-probs are then the old ones, and the ratio starts off 1."""
    monkeypatch.setattr(k, "score_answers", with_signal(k.score_answers))
    common = ["--rubric", unjudged]
    run(
        "sft",
        "--model",
        little,
        "--limit",
        4,
        "--batch-size",
        2,
        "--max-length",
        700,
        *common,
        "--out",
        tmp_path / "sft",
    )
    seen = []
    drawn = k.Worker.load
    monkeypatch.setattr(
        k.Worker,
        "load",
        lambda worker, role, path, *rest, **more: (
            seen.append(Path(path).name),
            drawn(worker, role, path, *rest, **more),
        )[1],
    )
    run(
        "grpo",
        "--from",
        tmp_path / "sft",
        "--steps",
        1,
        "--group-size",
        4,
        "--max-tokens",
        16,
        "--rollout-type",
        "q8_0",
        *common,
        "--out",
        tmp_path / "grpo",
    )
    assert any(name.endswith("-bf16-q8_0.gguf") for name in seen)
    assert json.loads((tmp_path / "grpo" / "run.json").read_text())["setting"]["rollout_type"] == "q8_0"


def test_vllm_is_refused_what_it_would_lose(embedded, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: object() if name == "vllm" else find(name, *rest)
    )
    assert k.choose_rollout("vllm", embedded, 16) == "vllm"
    with pytest.raises(k.UserError, match="rounded away"):
        k.choose_rollout("vllm", embedded, 4)
