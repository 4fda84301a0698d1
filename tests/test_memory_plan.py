"""The memory plan against what it plans.

The real update (packed rows, PEFT, checkpoints, bitsandbytes' autograd) runs on tensors that have a size and
no data. Every storage is counted from its birth to its death, and the plan must say the same. llama.cpp's
part is compared with files its own quantizer writes and with the buffers it reports.
"""

import ctypes
import json
import random
import re
import weakref
from dataclasses import replace

import pytest
from bench_plan import CARDS, SFT, SHAPES, WANTED, grpo, shape

from kardia.core import machine
from kardia.core.console import UserError
from kardia.core.machine import GB
from kardia.models import memory_plan, memory_terms
from kardia.models.base import Base
from kardia.models.memory_terms import Setting, shape_of, terms, total, usable

SETTINGS = {"sft": SFT, "grpo": grpo(0, 0), "grpo, micro 2": grpo(0, 0, micro=2)}


def small(config, layers):
    return {**config, "num_hidden_layers": layers}


# ---------------------------------------------------------------------------------- the count


def nf4_module(linear):
    """bitsandbytes' layer without data: its forward pass as on a GPU with the real MatMul4Bit. A Params4bit
    cannot be a fake tensor, so its state is kept here."""
    import bitsandbytes as bnb
    import torch

    class NF4(bnb.nn.Linear4bit):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.bias = linear.bias
            n, state, empty = linear.weight.numel(), bnb.functional.QuantState, torch.empty
            self.weight = torch.nn.Parameter(empty(n // 2, 1, dtype=torch.uint8), requires_grad=False)
            self.weight.compress_statistics, self.weight.quant_type = True, "nf4"
            self.compute_dtype = torch.bfloat16
            scales = {"absmax": empty(-(-n // 64 // 256)), "blocksize": 256, "code": empty(256)}
            own = {"absmax": empty(-(-n // 64), dtype=torch.uint8), "blocksize": 64, "code": empty(16)}
            own |= {"shape": linear.weight.shape, "dtype": torch.bfloat16, "quant_type": "nf4"}
            own |= {"offset": empty(()), "state2": state(dtype=torch.float32, **scales)}
            self.state = state(**own)

        def forward(self, x):
            dtype, bias = x.dtype, None if self.bias is None else self.bias.to(self.compute_dtype)
            multiply = bnb.autograd._functions.MatMul4Bit.apply
            return multiply(x.to(self.compute_dtype), self.weight, None, bias, self.state).to(dtype)

    return NF4()


def policy(config, setting):
    """The model on the device "meta": base in the setting's bits, float32 LoRA, our attention."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
    from transformers.masking_utils import sdpa_mask

    from kardia.models import packed_rows

    with torch.device("meta"):
        config = AutoConfig.for_model(**config)
        dtype = torch.bfloat16 if setting.item == 2 else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        model.requires_grad_(False)
        model.config.use_cache = False
        for name, module in list(model.named_modules()):
            if setting.bits == 4 and isinstance(module, torch.nn.Linear) and name != "lm_head":
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, nf4_module(module))
        model.is_loaded_in_4bit = setting.bits == 4
        lora = LoraConfig(r=setting.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    AttentionInterface.register(packed_rows.NAME, packed_rows.shared_prefix_attention)
    AttentionMaskInterface.register(packed_rows.NAME, sdpa_mask)
    # what enable_packed_rows does, without its trial on real numbers
    model.base_model.model.set_attn_implementation(packed_rows.NAME)
    if setting.checkpointing:  # as TRL's trainers ask for it
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def make_fake(model):
    """The same model on the fake CPU; tied weights stay tied."""
    import torch

    made = {}

    def fake(x):
        if x is None:
            return None
        if id(x) not in made:
            new = torch.empty(x.shape, dtype=x.dtype)
            if isinstance(x, torch.nn.Parameter):
                new = torch.nn.Parameter(new, requires_grad=x.requires_grad)
            made[id(x)] = x, new
        return made[id(x)][1]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(x) for name, x in tensors.items()})
        if state := getattr(module, "state", None):
            state.absmax, state.offset, state.code = map(fake, (state.absmax, state.offset, state.code))
            state.state2.absmax, state.state2.code = fake(state.state2.absmax), fake(state.state2.code)
    return [x for _, x in made.values()]


def counter():
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Counter(TorchDispatchMode):
        """Bytes of all living storages, in blocks of 512 as CUDA's allocator gives them, and their peak."""

        def __init__(self):
            super().__init__()
            self.live = self.peak = 0
            self.known = {}

        def see(self, tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known[storage._cdata] = -(-storage.nbytes() // 512) * 512
                self.grow(self.known[storage._cdata])
                weakref.finalize(storage, lambda key: self.grow(-self.known.pop(key)), storage._cdata)

        def grow(self, n):
            self.live += n
            self.peak = max(self.peak, self.live)

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            dequantized = 0
            # on a GPU, over 1,536 tokens: dequantizes, multiplies, forgets
            if function is torch.ops.bitsandbytes.gemm_4bit.default:
                dequantized = args[2][0] * args[2][1] * args[0].element_size()
                self.grow(dequantized)
            out = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self.see(tensor)
            self.grow(-dequantized)
            return out

    return Counter()


def counted(config, setting, monkeypatch):
    """(GB of weights, adapter and gradients; GB at the peak of an update) of the largest row."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from kardia.models import packed_rows

    pytest.importorskip("bitsandbytes")
    if setting.cuda:  # PEFT asks whether autocast is on, and means CUDA's
        plain = torch.is_autocast_enabled
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: plain(*(device or ("cpu",))))
    P, n, C = setting.prompt, setting.micro, setting.completion
    row = packed_rows.pack(torch.zeros(P, dtype=torch.long), [torch.zeros(C, dtype=torch.long)] * n)
    row.real = row.real.nonzero(as_tuple=True)  # the same places, and their number is known without data
    model = policy(config, setting)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        held, count = make_fake(model), counter()
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None  # there from the second micro-batch on
            held += [p.grad] if p.requires_grad else []
        for x in held:
            count.see(x)
        for name in ("ids", "positions", "predictors", "index"):
            setattr(row, name, mode.from_tensor(getattr(row, name)))
        row.real = tuple(map(mode.from_tensor, row.real))
        still, causal, targets = count.live, model.base_model.model, row.ids[0][row.predictors]
        with count:
            with torch.autocast("cpu", torch.bfloat16, enabled=setting.item == 2):
                logps, *_ = row.logps(causal, row.predictors, targets, chunk=setting.chunk)
            (-logps.sum()).backward()
    return still / GB, count.peak / GB


def planned(config, setting):
    plan = terms(config, setting)
    still = plan["base weights"] + plan["LoRA and its gradients"]
    return still, still + plan["activations"] + plan["working space"]


def compare(config, setting, monkeypatch):
    """Relative error of the plan: of what lies still, of what the update takes beside it, and of both."""
    (still, peak), (p_still, p_peak) = counted(config, setting, monkeypatch), planned(config, setting)
    return p_still / still - 1, (p_peak - p_still) / (peak - still) - 1, p_peak / peak - 1


def within(config, setting, monkeypatch, moving=0.10):
    still, update, both = compare(config, setting, monkeypatch)
    assert abs(still) < 0.01 and abs(update) < moving and abs(both) < 0.05, (setting, still, update, both)


def test_the_update_on_a_gpu_takes_what_is_planned(monkeypatch):
    """Three layers instead of all: what comes once counts for more, so that a wrong term shows."""
    within(small(SHAPES["Qwen2.5-0.5B"], 3), SETTINGS["grpo, micro 2"], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("model", SHAPES)
def test_every_update_on_a_gpu_takes_what_is_planned(model, monkeypatch):
    for setting in SETTINGS.values():
        within(small(SHAPES[model], 3), setting, monkeypatch)
    if model == "Qwen2.5-7B":  # with all its layers, too
        within(SHAPES[model], SETTINGS["grpo"], monkeypatch, 0.05)
    if model == "Qwen2.5-3B":
        within(small(SHAPES[model], 3), replace(SETTINGS["grpo"], bits=16), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_and_in_16_or_32_bits_without_checkpoints(kind, item, monkeypatch):
    setting = replace(SETTINGS[kind], bits=16, cuda=False, checkpointing=False, item=item)
    within(small(SHAPES["Qwen2.5-0.5B"], 6), setting, monkeypatch)


# ---------------------------------------------------------------------------------- llama.cpp

TINY = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "vocab_size": 512}


@pytest.mark.slow
def test_a_quantized_base_is_as_large_as_llama_cpp_makes_it(tiny_directory, template_of, tmp_path):
    from kardia.llama.gguf_header import read_gguf
    from kardia.llama.worker import Worker

    tied = {"tie_word_embeddings": True}
    odd = {"hidden_size": 288, "head_dim": 72, **tied}  # no multiple of 256
    bases = [("qwen2", {"num_hidden_layers": 10}), ("llama", {"num_hidden_layers": 7, **odd})]
    bases += [("llama", {"num_hidden_layers": 9, "num_key_value_heads": 1, **tied})]
    bases += [("qwen2", {"num_hidden_layers": 8, "intermediate_size": 480})]
    for n, (kind, sizes) in enumerate(bases):
        directory = tiny_directory(kind, f"base{n}", **{**TINY, **sizes})
        source, s = template_of(directory, tmp_path / f"{n}.gguf"), shape_of(machine.read_config(directory))
        with Worker() as worker:
            for file_type in ("q8_0", "q4_k_m"):
                worker.quantize(source, target := tmp_path / f"{n}-{file_type}.gguf", file_type)
                tensors = {t.name: t.n_bytes for t in read_gguf(target).tensors.values() if len(t.shape) == 2}
                matrices = sum(size for name, size in tensors.items() if name.startswith("blk."))
                output = tensors["token_embd.weight" if s.tied else "output.weight"]
                assert memory_terms.gguf_bits(s, file_type) == (matrices, output), (n, file_type)


@pytest.mark.slow
def test_llama_cpp_takes_the_cells_and_the_buffer_that_are_planned():
    import llama_cpp as lib

    from kardia.llama.gguf_header import read_gguf
    from kardia.models.base import embedded_gguf

    lines, header = [], read_gguf(embedded_gguf())
    log = lib.llama_log_callback(lambda level, text, _: lines.append(text.decode(errors="replace")))
    lib.llama_log_set(log, ctypes.c_void_p(0))
    lib.llama_backend_init()
    keys = ("embedding_length", "block_count", "attention.head_count", "attention.head_count_kv")
    keys += ("feed_forward_length", "vocab_size")
    config = shape(*(header.value(f"llama.{key}") for key in keys), True, "llama")
    model = lib.llama_model_load_from_file(str(embedded_gguf()).encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = 2560
    params.n_ubatch, params.n_seq_max, params.kv_unified = memory_terms.UBATCH, 8, True
    params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
    lib.llama_free(lib.llama_init_from_model(model, params))
    lib.llama_model_free(model)
    lib.llama_log_set(lib.llama_log_callback(0), ctypes.c_void_p(0))  # else it would call a freed function
    buffers = re.findall(r"(KV|compute) buffer size = *([0-9.]+) MiB", "".join(lines))
    sizes, s = {kind: float(mib) * 2**20 for kind, mib in buffers}, shape_of(config)
    assert sizes["KV"] == memory_terms.kv_bytes(s, 2560)
    assert sizes["compute"] == pytest.approx(memory_terms.compute_buffer(s.vocabulary, s.hidden), rel=0.05)


# ---------------------------------------------------------------------------------- the choice


def test_a_config_it_cannot_plan_for_is_one_line():
    config = SHAPES["Qwen2.5-3B"]
    for odd, says in (
        ({}, "config.json has no hidden_size"),
        ({**config, "vocab_size": "many"}, "vocab_size = 'many' / expected a positive number"),
        ({**config, "num_attention_heads": 0}, "num_attention_heads = '0' / expected"),
        ({**config, "head_dim": [1]}, "head_dim = '[1]' / expected"),
        ({**config, "num_experts": 128}, "a mixture of experts"),
        ({"text_config": 3}, "text_config is no object"),
    ):
        with pytest.raises(UserError) as error:
            shape_of(odd)
        assert says in error.value.message and "\n" not in error.value.message
    inner = {key: value for key, value in config.items() if key != "tie_word_embeddings"}
    assert shape_of({"text_config": inner, "tie_word_embeddings": True}) == shape_of(config)


@pytest.mark.parametrize("rollout", ["llama", "hf", "none"])
def test_more_of_anything_never_takes_less(rollout):
    rng = random.Random(0)
    choices = {"bits": [4, 16], "rank": [4, 16, 64], "completion": range(8, 2048), "item": [2, 4]}
    choices |= {"rollout_type": ["bf16", "q8_0", "q4_k_m"], "judge_bytes": [0, 10**8, 10**9]}
    choices |= {"group": [2, 4, 8, 16], "checkpointing": [True, True, False], "cuda": [True, True, False]}
    choices |= {"prompt": range(1, 1500) if rollout != "none" else [0], "rollout": [rollout]}
    for _ in range(300):
        config, at = rng.choice(list(SHAPES.values())), {n: rng.choice(some) for n, some in choices.items()}
        at = Setting(micro=rng.choice([1, 2, at["group"]]), **at)
        more = {"micro": 2 * at.micro, "rank": at.rank + 1, "group": 2 * at.group, "bits": 16}
        more |= {"completion": at.completion + rng.randrange(1, 300), "chunk": 2 * at.chunk}
        more |= {"judge_bytes": at.judge_bytes + 10**8}
        if rollout != "none":
            more["prompt"] = at.prompt + rng.randrange(1, 300)
        for name, value in more.items():
            larger = replace(at, **{name: value})
            assert total(config, larger) >= total(config, at) - 1e-9, (name, at)
        assert all(gb >= 0 for gb in terms(config, at).values())


def test_what_is_said_to_fit_does_and_a_larger_card_never_gives_up_more():
    fixed = ("bits", "rank", "prompt", "completion", "group", "judge_bytes")  # what is learned stays
    for config in SHAPES.values():
        for wanted in WANTED.values():
            before = None
            for gb in (0, *(usable(card) for card in CARDS), 1000):
                best, least = memory_plan.fit(config, gb, wanted)
                assert best is None or total(config, best) <= gb
                assert (best is None) == (total(config, least) > gb)
                assert all(getattr(best or least, name) == getattr(wanted, name) for name in fixed)
                assert before is None or memory_plan.price(best) <= memory_plan.price(before)
                before = best
            assert memory_plan.price(before) == min(map(memory_plan.price, memory_plan.candidates(wanted)))


def test_flags_are_options_of_the_commands():
    import kardia_lite as k

    every = [c for wanted in WANTED.values() for c in memory_plan.candidates(wanted, tied=False)]
    assert len(every) > 100
    for setting in every:
        draws = setting.rollout != "none"
        command = k.cli.commands["grpo" if draws else "sft"]
        arguments = memory_plan.flags(setting).split() + ["--out", "run"]
        arguments += ["--from", "run"] if draws else []
        values = command.make_context("x", arguments).params
        assert values["micro_batch"] == setting.micro
        assert values["embedding"] == ("host" if setting.host_embedding else "auto")
        if draws:
            kind = setting.rollout_type if setting.rollout == "llama" else "auto"
            assert (values["rollout"], values["rollout_type"]) == (setting.rollout, kind)
            assert values["judge_gpu_layers"] == (-1 if setting.judge_on_gpu else 0)


def test_advice_names_terms_that_add_up_and_the_command():
    for gb, words in (
        (5.0, ["does not fit", "take a smaller model"]),
        (6.4, ["fits if they are cut to"]),
        (7.6, ["--embedding host --out RUN"]),
        (11.0, ["--rollout hf"]),
        (30.0, ["--rollout-type bf16 --out RUN"]),
    ):
        lines = memory_plan.advice(SHAPES["Qwen2.5-7B"], gb, model="m")
        assert all(text in "\n".join(lines) for text in words), gb
        heads = [i for i, line in enumerate(lines) if not line.startswith(" ")]
        for start, end in zip(heads, [*heads[1:], len(lines)]):
            shown = sum(float(line.split()[0]) for line in lines[start + 1 : end] if " GB  " in line)
            assert shown == pytest.approx(float(lines[start].rpartition(", ")[2].split()[0]), abs=0.06)
    cpu = {"bits": 16, "cuda": False, "checkpointing": False, "item": 4}
    assert "libraries" in "\n".join(memory_plan.advice(SHAPES["Qwen2.5-0.5B"], 64.0, **cpu))
    excess = [line for line in memory_plan.advice(SHAPES["Qwen2.5-7B"], 11.0, bits=16) if "too much" in line]
    assert excess and all("--bits 4 would fit" in line for line in excess)


def test_what_the_user_asked_for_is_not_chosen_for_them():
    """On a card that is too small for the wish, only what is `free` changes; on a CPU nothing does."""
    config, wanted, gb = SHAPES["Qwen2.5-7B"], grpo(270_000_000, 49_152), usable(12)
    assert total(config, wanted) > gb
    everything = memory_plan.choose(config, gb, wanted, memory_plan.FREE)
    assert total(config, everything) <= gb and everything.rollout_type == "q4_k_m"
    differences = memory_plan.chosen(everything, wanted)
    assert "rollouts from a q4_k_m GGUF" in differences and "the judge on the CPU" in differences
    for name in memory_plan.FREE:
        some = memory_plan.choose(config, gb, wanted, (name,))
        changed = {key for key in vars(wanted) if getattr(some, key) != getattr(wanted, key)}
        assert changed <= {name, *(["rollout_type"] if name == "rollout" else [])}
    assert memory_plan.choose(config, gb, wanted, ()) == wanted and memory_plan.chosen(wanted, wanted) == ""
    on_cpu = replace(wanted, cuda=False)
    assert memory_plan.choose(config, gb, on_cpu, memory_plan.FREE) == on_cpu
    tied = memory_plan.choose(SHAPES["Qwen2.5-3B"], 1.0, grpo(0, 0), memory_plan.FREE)
    assert not tied.host_embedding  # the output matrix needs it
    # A llama.cpp without CUDA would read 15 GB from the computer's memory for every token.
    slow = replace(wanted, llama_gpu=False)
    far = memory_plan.choose(config, gb, slow, memory_plan.FREE)
    assert far.rollout == "hf" and far.judge_on_gpu  # nothing is gained by asking for the judge elsewhere
    asked = memory_plan.choose(config, gb, slow, ("micro", "rollout_type", "judge_on_gpu"))
    assert (asked.rollout, asked.rollout_type, asked.micro) == ("llama", "bf16", 8)


def test_a_plan_is_printed_and_kept_by_a_resumed_run(tmp_path, monkeypatch, capsys):
    config, free = SHAPES["Qwen2.5-7B"], memory_plan.FREE
    (tmp_path / "config.json").write_text(json.dumps(config))
    base, wanted = Base("seven", tmp_path, None, "x"), grpo(270_000_000, 49_152)
    monkeypatch.setattr(machine, "free_for_us", lambda: usable(12))
    setting, plan = memory_plan.plan_memory(base, wanted, free)
    assert setting == memory_plan.choose(config, usable(12), wanted, free)
    assert plan == {name: round(gb, 3) for name, gb in terms(config, setting).items()}
    printed = capsys.readouterr().err
    assert "so that it fits into 12.0 GB: micro-batch 1, rollouts from a q4_k_m GGUF" in printed
    assert "memory, planned: " in printed
    monkeypatch.setattr(machine, "free_for_us", lambda: usable(4))
    before = json.loads(json.dumps(vars(setting)))
    assert memory_plan.plan_memory(base, wanted, free, before)[0] == setting
    assert "more than the 3.4 GB that are free" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    assert memory_plan.plan_memory(base, wanted, free) == (wanted, {})
    assert "no plan for seven (config.json has no" in capsys.readouterr().err


def test_a_setting_from_a_run_json_is_checked():
    facts = json.loads(json.dumps(vars(grpo(1, 2))))
    assert Setting.of(facts) == grpo(1, 2)
    assert Setting.of({"micro": 4}).micro == 4  # of a version that knew less
    assert Setting.of({**facts, "extra": 1}) == grpo(1, 2)  # of one that knew more
    assert Setting.of({**facts, "rollout": "vllm"}).rollout == "hf"  # of one that drew with vLLM
    for change in ({"micro": -1}, {"micro": "8"}, {"rollout": "rm -rf"}, {"bits": True}, {"rank": None}):
        with pytest.raises(UserError, match="damaged"):
            Setting.of({**facts, **change})
    with pytest.raises(UserError, match="damaged"):
        Setting.of("x")
