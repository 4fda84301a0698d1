"""What differs between engines and bits: 4-bit gradients, the LoRA's precision, a host embedding, the way."""

import json
from pathlib import Path

import pytest
import torch
from conftest import lines_of, run, with_signal
from test_checkpoints import short_rows

import kardia_lite as k
from kardia.models import packed_rows
from kardia.models.adapter import read_adapter
from kardia.models.base import keep_on_host
from kardia.training import plan
from kardia.training.step_records import StepRecords

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES["head_dim"] = 16
SFT = "--limit 8 --batch-size 2"


def policy(directory, bits, **more):
    base = k.Base("tiny", directory, None, "hash")
    model = k.load_policy(base, "transformers", bits, rank=4, dtype=torch.float32, **more)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # a LoRA that does something
    return model


def gradients(model, ids):
    """Of every LoRA weight, for the sum of all log-probs."""
    model.train()
    model.zero_grad()
    logits = model(input_ids=ids[None]).logits[0, :-1].float()
    logits.log_softmax(-1).gather(-1, ids[1:, None]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def ids():
    return torch.randint(3, 97, (40,), generator=torch.Generator().manual_seed(0))


def test_4_bit_gradients_survive_a_pass_in_eval_mode(tiny_directory, ids):
    """After one, bitsandbytes packs 4-bit weights anew for a CPU with AVX512-BF16, and its kernel for these
    has no gradients: all training after the trial of packed rows would learn from half of each. (Elsewhere
    nothing of this happens.)"""
    model = policy(tiny_directory("llama", **SIZES), 4)
    before = gradients(model, ids)
    assert packed_rows.enable_packed_rows(model.base_model.model) is None
    with torch.no_grad():
        model.eval()(input_ids=ids[None])
    after = gradients(model, ids)
    for name, value in before.items():
        assert torch.allclose(value, after[name], rtol=1e-3, atol=1e-4 * float(value.abs().max())), name


@pytest.mark.parametrize("bits", [16, 4])
def test_an_embedding_table_in_the_computers_memory_changes_nothing(tiny_directory, ids, bits):
    directory = tiny_directory("llama", tie_word_embeddings=False, **SIZES)
    plain, host = policy(directory, bits), policy(directory, bits, host_embedding=True)

    def parameters(model):
        return sum(p.numel() for p in model.parameters())

    # It is no parameter any more, so nothing moves it to a GPU.
    assert parameters(plain) - parameters(host) == plain.get_input_embeddings().weight.numel()
    for model in (plain, host):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    a, b = gradients(plain, ids), gradients(host, ids)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert host.get_input_embeddings().weight.grad is None  # a table of its size once more, at every pass
    assert packed_rows.enable_packed_rows(host.base_model.model) is None
    greedy = {"input_ids": ids[None], "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(plain.generate(**greedy), host.generate(**greedy))


def test_a_tied_embedding_table_stays(tiny):
    with pytest.raises(ValueError, match="same table"):
        keep_on_host(tiny("llama", tie_word_embeddings=True))


def test_a_gpu_gets_paged_8_bit_adam_and_checkpoints(monkeypatch):
    monkeypatch.setattr("kardia.core.machine.compute_dtype", lambda: torch.bfloat16)
    cpu = plan.shared_arguments(k.SFTOptions(), 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = plan.shared_arguments(k.SFTOptions(), 4)
    keys = ("optim", "gradient_checkpointing", "use_cpu", "bf16")
    assert [gpu[key] for key in keys] == ["paged_adamw_8bit", True, False, True]
    if not torch.cuda.is_available():
        assert [cpu[key] for key in keys[:3]] == ["adamw_torch", False, True]


@pytest.fixture
def common(unjudged, tmp_path, monkeypatch):
    """Return the options that all runs take; answers of a random model get rewards that differ."""
    monkeypatch.setattr(k, "score_answers", with_signal(k.score_answers))
    return f"--rubric {unjudged}"


def facts_of(path):
    return json.loads(path.read_text())


def test_the_lora_of_a_4_bit_model_is_trained_in_float32(little, tmp_path, common):
    """TRL would round it to bfloat16, in which steps of 2e-5 move few of the weights."""
    from safetensors.torch import load_file

    data = short_rows(tmp_path / "sft.jsonl")
    run(f"sft --model {little} --bits 4 {SFT} --data {data} {common} --out {tmp_path}/sft")
    prompts = short_rows(tmp_path / "prompts.jsonl", "prompts")
    sizes = f"--data {prompts} --steps 2 --group-size 4 --max-tokens 16"
    more = f"--learning-rate 2e-5 --beta 0.1 --judge none {common}"
    run(f"grpo --from {tmp_path}/sft {sizes} {more} --out {tmp_path}/grpo")
    pairs = []
    for name in ("sft", "grpo"):
        tensors = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        pairs.append(read_adapter(tmp_path / name / "adapter")[1])
    before, after = pairs
    moved = [float((x != y).float().mean()) for name in before for x, y in zip(before[name], after[name])]
    assert min(moved) > 0.9
    first, second = lines_of(tmp_path / "grpo" / "log.jsonl")
    # The reference is the SFT adapter, to the last bit. (One such step's KL may be below float32's
    # resolution.)
    assert first["kl"] == 0 and 0 <= second["kl"] < 1
    # Without a judge the rubric was not computed, which is not 0.
    assert "rewards/format/mean" in first and not [name for name in first if "rubric" in name]


def the_whole_way(engine, bits, model, work, common, monkeypatch):
    """Load, SFT, two GRPO steps of which the second one after a resume, export and its proof. Returns the
    run's facts."""
    common += f" --engine {engine}"
    sft = f"{SFT} --max-length 700 --max-steps 4 --learning-rate 5e-3 {common}"
    run(f"sft --model {model} --bits {bits} {sft} --out {work}/sft")
    sizes = "--steps 2 --save-steps 1 --group-size 4 --max-tokens 24 --learning-rate 1e-3 --beta 0.01"
    sizes += " --eval-prompts 2"
    grpo = f"grpo --from {work}/sft {sizes} --judge none {common}"
    run(f"{grpo} --out {work}/whole")
    step_done = StepRecords.step_done

    def then_killed(records, step):
        facts = step_done(records, step)
        if step == 2:
            raise KeyboardInterrupt
        return facts

    with monkeypatch.context() as patch:
        patch.setattr(StepRecords, "step_done", then_killed)
        result = run(f"{grpo} --out {work}/resumed", ok=False)
        assert result.exit_code == 1 and "--resume" in result.output
    assert (work / "resumed" / "checkpoint-1").is_dir()
    run(f"{grpo} --resume --out {work}/resumed")
    logs = [lines_of(work / name / "log.jsonl") for name in ("whole", "resumed")]
    for whole, resumed in zip(*logs, strict=True):
        # After the resume it stands where it stood, off its reference.
        assert resumed["grad_norm"] > 0 and (resumed["kl"] > 0) == (resumed["step"] > 1)
        # A GPU rounds otherwise from run to run, and other answers may be drawn.
        if not torch.cuda.is_available():
            assert resumed["grad_norm"] == pytest.approx(whole["grad_norm"], rel=0.05)
    one, first = work / "one.jsonl", (k.DATA / "eval.jsonl").read_text("utf-8").splitlines()[0]
    one.write_text(first + "\n", encoding="utf-8")
    formats = f"--formats merged,lora,q8_0 --data {one} --answers 0 {common.split(' --engine')[0]}"
    run(f"export {work}/resumed --to {work}/out {formats}")
    book = facts_of(work / "out" / "export.json")["formats"]
    assert {"merged", "q8_0", "lora"} <= set(book) and all(entry["ok"] for entry in book.values()), book
    facts = facts_of(work / "resumed" / "run.json")
    assert facts["engine"] == engine and facts["bits"] == bits and facts["status"] == "done"
    return facts


@pytest.mark.slow
def test_the_whole_way_in_4_bits_on_a_cpu(little, tmp_path, common, monkeypatch):
    facts = the_whole_way("transformers", 4, little, tmp_path, common, monkeypatch)
    assert facts["setting"]["rollout"] == "llama" and not facts["setting"]["cuda"]


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
def test_the_whole_way_on_a_gpu(engine, bits, embedded, tmp_path, common, monkeypatch):
    if engine == "unsloth":
        pytest.importorskip("unsloth")
    facts = the_whole_way(engine, bits, embedded.template, tmp_path, common, monkeypatch)
    assert facts["setting"]["cuda"] and facts["peak_memory_gb"] > 0


@pytest.mark.slow
def test_another_type_for_rollouts_trusts_the_sampler(little, tmp_path, common, monkeypatch):
    """q8_0 weights are not quite the ones that learn: the sampler's log-probs are then the old ones, and the
    ratio starts off 1."""
    run(f"sft --model {little} --data {short_rows(tmp_path / 'sft.jsonl')} {common} --out {tmp_path}/sft")
    loaded, load = [], k.Worker.load

    def spy(worker, role, path, *rest, **more):
        loaded.append(Path(path).name)
        return load(worker, role, path, *rest, **more)

    monkeypatch.setattr(k.Worker, "load", spy)
    sizes = "--steps 1 --group-size 4 --max-tokens 16 --rollout-type q8_0"
    run(f"grpo --from {tmp_path}/sft {sizes} --judge none {common} --out {tmp_path}/grpo")
    assert any(name.endswith("-bf16-q8_0.gguf") for name in loaded)
    assert facts_of(tmp_path / "grpo" / "run.json")["setting"]["rollout_type"] == "q8_0"
