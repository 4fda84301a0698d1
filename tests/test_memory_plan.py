"""The memory plan against what it plans: the real update (packing, PEFT, checkpoints, bitsandbytes' autograd) runs on tensors that have
a size and no data, every storage is counted from its birth to its death, and the plan must say the same. llama.cpp's part is
compared with files its own quantizer writes and with the buffer it reports."""

import ctypes
import json
import random
import re
import weakref
from dataclasses import replace

import pytest
from bench_plan import CARDS, JUDGES, SFT, SHAPES, grpo, shape

from kardia.core import machine
from kardia.models import memory_plan

SETTINGS = {"sft": SFT, "grpo": grpo(0, 0), "grpo, micro 2": grpo(0, 0, micro=2)}


def small(config, layers):
    return {**config, "num_hidden_layers": layers}


# ------------------------------------------------------------------------------------------------ the count


def nf4_module(linear):
    """bitsandbytes' own layer for training in 4 bits, without data: `Linear4bit.forward` as on a GPU, and MatMul4Bit, the real one.
    (A Params4bit cannot be a fake tensor, so the state that hangs on it is kept here.)"""
    import bitsandbytes as bnb
    import torch

    class NF4(bnb.nn.Linear4bit):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features, self.bias, n = (
                linear.in_features,
                linear.out_features,
                linear.bias,
                linear.weight.numel(),
            )
            self.weight = torch.nn.Parameter(torch.empty(n // 2, 1, dtype=torch.uint8), requires_grad=False)
            self.weight.compress_statistics, self.weight.quant_type, self.compute_dtype = (
                True,
                "nf4",
                torch.bfloat16,
            )
            state = bnb.functional.QuantState
            scales = state(
                absmax=torch.empty(-(-n // 64 // 256)),
                blocksize=256,
                code=torch.empty(256),
                dtype=torch.float32,
            )
            self.state = state(
                absmax=torch.empty(-(-n // 64), dtype=torch.uint8),
                shape=linear.weight.shape,
                dtype=torch.bfloat16,
                blocksize=64,
                code=torch.empty(16),
                quant_type="nf4",
                offset=torch.empty(()),
                state2=scales,
            )

        def forward(self, x):
            dtype, bias = x.dtype, None if self.bias is None else self.bias.to(self.compute_dtype)
            return bnb.autograd._functions.MatMul4Bit.apply(
                x.to(self.compute_dtype), self.weight, None, bias, self.state
            ).to(dtype)

    return NF4()


def policy(config, setting):
    """`load_policy`'s model on the device "meta": base in the setting's bits, float32 LoRA on all linear layers, our attention."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
    from transformers.masking_utils import sdpa_mask

    from kardia.models import packed_rows

    with torch.device("meta"):
        config = AutoConfig.for_model(**config)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if setting.item == 2 else torch.float32, attn_implementation="sdpa"
        ).requires_grad_(False)
        model.config.use_cache = False
        for name, module in list(model.named_modules()) if setting.bits == 4 else ():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, nf4_module(module))
        model.is_loaded_in_4bit = setting.bits == 4
        model = get_peft_model(
            model,
            LoraConfig(r=setting.rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"),
        )
    AttentionInterface.register(packed_rows.NAME, packed_rows.shared_prefix_attention)
    AttentionMaskInterface.register(packed_rows.NAME, sdpa_mask)
    model.base_model.model.set_attn_implementation(
        packed_rows.NAME
    )  # what packing.enable does, without its trial on real numbers
    if setting.checkpointing:  # as TRL's trainers ask for it
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def make_fake(model):
    """The same model on the fake CPU; tied weights stay tied."""
    import torch

    made = {}

    def fake(x):
        if x is not None and id(x) not in made:
            new = torch.empty(x.shape, dtype=x.dtype)
            made[id(x)] = (
                x,
                (
                    torch.nn.Parameter(new, requires_grad=x.requires_grad)
                    if isinstance(x, torch.nn.Parameter)
                    else new
                ),
            )
        return None if x is None else made[id(x)][1]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(x) for name, x in tensors.items()})
        if state := getattr(module, "state", None):
            state.absmax, state.offset, state.code, state.state2.absmax, state.state2.code = map(
                fake, (state.absmax, state.offset, state.code, state.state2.absmax, state.state2.code)
            )
    return [x for _, x in made.values()]


def counter():
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Counter(TorchDispatchMode):
        """Bytes of all storages that are alive, in blocks of 512 as CUDA's allocator gives them, and the most there ever were."""

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
            if (
                function is torch.ops.bitsandbytes.gemm_4bit.default
            ):  # on a GPU, over 1,536 tokens: dequantizes, multiplies, forgets
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
    row.real, model = (
        row.real.nonzero(as_tuple=True),
        policy(config, setting),
    )  # the same places, and their number is known without data
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        held, count = make_fake(model), counter()
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None  # there from the second micro-batch on
            held += [p.grad] if p.requires_grad else []
        for x in held:
            count.see(x)
        row.ids, row.positions, row.predictors, row.index = map(
            mode.from_tensor, (row.ids, row.positions, row.predictors, row.index)
        )
        row.real = tuple(map(mode.from_tensor, row.real))
        still = count.live
        with count:
            with torch.autocast("cpu", torch.bfloat16, enabled=setting.item == 2):
                logps, *_ = row.logps(
                    model.base_model.model, row.predictors, row.ids[0][row.predictors], chunk=setting.chunk
                )
            (-logps.sum()).backward()
    return still / machine.GB, count.peak / machine.GB


def planned(config, setting):
    terms = memory_plan.terms(config, setting)
    still = terms["base weights"] + terms["LoRA and its gradients"]
    return still, still + terms["activations"] + terms["working space"]


def compare(config, setting, monkeypatch):
    """Relative error of the plan: of what lies still, of what the update takes beside it, and of both."""
    (still, peak), (p_still, p_peak) = counted(config, setting, monkeypatch), planned(config, setting)
    return p_still / still - 1, (p_peak - p_still) / (peak - still) - 1, p_peak / peak - 1


def within(found, moving=0.10):
    still, update, both = found
    assert abs(still) < 0.01 and abs(update) < moving and abs(both) < 0.05, found


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("model", SHAPES)
def test_the_update_on_a_gpu_takes_what_is_planned(model, kind, monkeypatch):
    """Three layers instead of all: what comes once counts for more, so that a wrong term shows."""
    within(compare(small(SHAPES[model], 3), SETTINGS[kind], monkeypatch))


def test_with_all_its_layers_too(monkeypatch):
    within(compare(SHAPES["Qwen2.5-7B"], SETTINGS["grpo"], monkeypatch), 0.05)


@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_and_in_16_or_32_bits_without_checkpoints(kind, item, monkeypatch):
    within(
        compare(
            small(SHAPES["Qwen2.5-0.5B"], 6),
            replace(SETTINGS[kind], bits=16, cuda=False, checkpointing=False, item=item),
            monkeypatch,
        )
    )


def test_and_in_16_bits_on_a_gpu(monkeypatch):
    within(compare(small(SHAPES["Qwen2.5-3B"], 3), replace(SETTINGS["grpo"], bits=16), monkeypatch))


# ------------------------------------------------------------------------------------------------ llama.cpp


@pytest.mark.parametrize(
    "kind, sizes",
    [
        ("qwen2", {"num_hidden_layers": 10}),
        ("llama", {"num_hidden_layers": 9, "num_key_value_heads": 1, "tie_word_embeddings": True}),
        (
            "llama",
            {"num_hidden_layers": 7, "hidden_size": 288, "head_dim": 72, "tie_word_embeddings": True},
        ),  # rows of 288: no multiple of 256
        ("qwen2", {"num_hidden_layers": 8, "intermediate_size": 480}),
    ],
)
def test_a_quantized_base_is_as_large_as_llama_cpp_makes_it(
    kind, sizes, tiny_directory, template_of, tmp_path
):
    from kardia.llama.worker import Worker
    from kardia.models.weights import read_gguf

    directory = tiny_directory(
        kind, **{"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "vocab_size": 512, **sizes}
    )
    source, s = (
        template_of(directory, tmp_path / "base.gguf"),
        memory_plan.shape_of(machine.read_config(directory)),
    )
    with Worker() as worker:
        for file_type in ("q8_0", "q4_k_m"):
            worker.quantize(source, target := tmp_path / f"{file_type}.gguf", file_type)
            tensors = {t.name: int(t.n_bytes) for t in read_gguf(target).tensors if len(t.shape) == 2}
            matrices = sum(n for name, n in tensors.items() if name.startswith("blk."))
            assert memory_plan.gguf_bits(s, file_type) == (
                matrices,
                tensors["token_embd.weight" if s.tied else "output.weight"],
            ), file_type


SAID: list[str] = []  # llama.cpp's log
KEPT: list = []  # the functions that write it: llama.cpp goes on calling the last one


@pytest.fixture
def llama_log():
    import llama_cpp

    KEPT.append(
        llama_cpp.llama_log_callback(lambda level, text, _: SAID.append(text.decode(errors="replace")))
    )
    llama_cpp.llama_log_set(KEPT[-1], ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def test_llama_cpp_takes_the_cells_and_the_buffer_that_are_planned(llama_log):
    from kardia.models.base import embedded_gguf
    from kardia.models.weights import gguf_value, read_gguf

    lib, reader = llama_log, read_gguf(embedded_gguf())
    value = lambda key: int(gguf_value(reader, f"llama.{key}"))  # noqa: E731
    config = shape(
        value("embedding_length"),
        value("block_count"),
        value("attention.head_count"),
        value("attention.head_count_kv"),
        value("feed_forward_length"),
        value("vocab_size"),
        True,
        "llama",
    )
    model = lib.llama_model_load_from_file(str(embedded_gguf()).encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    (
        params.n_ctx,
        params.n_batch,
        params.n_ubatch,
        params.n_seq_max,
        params.kv_unified,
        params.flash_attn_type,
    ) = 2560, 2560, memory_plan.UBATCH, 8, True, lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
    lib.llama_free(lib.llama_init_from_model(model, params))
    lib.llama_model_free(model)
    found = re.findall(r"(KV|compute) buffer size = *([0-9.]+) MiB", "".join(SAID))
    said, s = {kind: float(mib) * 2**20 for kind, mib in found}, memory_plan.shape_of(config)
    assert said["KV"] == memory_plan.kv_bytes(s, 2560)
    assert said["compute"] == pytest.approx(memory_plan.compute_buffer(s.vocabulary, s.hidden), rel=0.05)


# ------------------------------------------------------------------------------------------------ the choice


WANTED = {"sft": SFT, **{name: grpo(*judge) for name, judge in JUDGES.items()}}


@pytest.mark.parametrize(
    "config, told",
    [
        ({}, "config.json has no hidden_size"),
        ({**SHAPES["Qwen2.5-3B"], "vocab_size": "many"}, "vocab_size = 'many' / expected a positive number"),
        ({**SHAPES["Qwen2.5-3B"], "num_attention_heads": 0}, "num_attention_heads = '0' / expected"),
        ({**SHAPES["Qwen2.5-3B"], "head_dim": [1]}, "head_dim = '[1]' / expected"),
        ({**SHAPES["Qwen2.5-3B"], "num_experts": 128}, "a mixture of experts"),
        ({"text_config": 3}, "text_config is no object"),
    ],
)
def test_a_config_it_cannot_plan_for_is_told_in_one_line(config, told):
    with pytest.raises(ValueError, match=".") as raised:
        memory_plan.shape_of(config)
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_a_config_inside_a_larger_one():
    inner = {k: v for k, v in SHAPES["Qwen2.5-7B"].items() if k != "tie_word_embeddings"}
    assert memory_plan.shape_of({"text_config": inner, "tie_word_embeddings": False}) == memory_plan.shape_of(
        SHAPES["Qwen2.5-7B"]
    )


@pytest.mark.parametrize("rollout", ["llama", "hf", "vllm", "none"])
def test_more_of_anything_never_takes_less(rollout):
    rng = random.Random(0)
    for _ in range(300):
        config = rng.choice(list(SHAPES.values()))
        group = rng.choice([2, 4, 8, 16])
        at = memory_plan.Setting(
            bits=rng.choice([4, 16]),
            rank=rng.choice([4, 16, 64]),
            prompt=rng.randrange(1, 1500) if rollout != "none" else 0,
            completion=rng.randrange(8, 2048),
            group=group,
            micro=rng.choice([1, 2, group]),
            rollout=rollout,
            rollout_type=rng.choice(["bf16", "q8_0", "q4_k_m"]),
            judge_bytes=rng.choice([0, 10**8, 10**9]),
            checkpointing=rng.random() < 0.7,
            cuda=rng.random() < 0.7,
            item=rng.choice([2, 4]),
        )
        more = {
            "completion": at.completion + rng.randrange(1, 300),
            "micro": 2 * at.micro,
            "rank": at.rank + 1,
            "judge_bytes": at.judge_bytes + 10**8,
            "group": 2 * at.group,
            "chunk": 2 * at.chunk,
            "bits": 16,
        }
        if rollout != "none":
            more["prompt"] = at.prompt + rng.randrange(1, 300)
        for name, value in more.items():
            assert (
                memory_plan.total(config, replace(at, **{name: value}))
                >= memory_plan.total(config, at) - 1e-9
            ), (name, at)
        assert all(gb >= 0 for gb in memory_plan.terms(config, at).values())


@pytest.mark.parametrize("what", WANTED)
@pytest.mark.parametrize("model", SHAPES)
def test_what_is_said_to_fit_does_and_a_larger_card_never_gives_up_more(model, what):
    config, wanted, before = SHAPES[model], WANTED[what], None
    for gb in (0, *(memory_plan.usable(card) for card in CARDS), 1000):
        best, least = memory_plan.fit(config, gb, wanted)
        assert best is None or memory_plan.total(config, best) <= gb
        assert (best is None) == (memory_plan.total(config, least) > gb)
        kept = ("bits", "rank", "prompt", "completion", "group", "judge_bytes")
        assert all(
            getattr(best or least, name) == getattr(wanted, name) for name in kept
        )  # what is learned is not its to change
        assert before is None or best is not None and memory_plan.price(best) <= memory_plan.price(before)
        before = best
    assert memory_plan.price(before) == min(map(memory_plan.price, memory_plan.candidates(wanted)))


@pytest.mark.parametrize(
    "wanted",
    [SFT, *(c for name in JUDGES for c in memory_plan.candidates(grpo(*JUDGES[name]), tied=False))],
    ids=memory_plan.flags,
)
def test_flags_are_options_of_the_commands(wanted):
    import kardia_lite as k

    command = k.cli.commands["sft" if wanted.rollout == "none" else "grpo"]
    known = {name for option in command.params for name in option.opts}
    words = memory_plan.flags(wanted).split()
    needed = ["--out", "run"] + (["--from", "run"] if "--from" in known else [])
    values = command.make_context("x", words + needed, resilient_parsing=False).params
    assert values["micro_batch"] == wanted.micro
    assert values["embedding"] == ("host" if wanted.host_embedding else "auto") and values.get(
        "rollout_type"
    ) == (wanted.rollout_type if wanted.rollout == "llama" else "auto" if wanted.rollout == "hf" else None)
    assert values.get("rollout", "none") == wanted.rollout and values.get("judge_gpu_layers", -1) == (
        -1 if wanted.judge_on_gpu else 0
    )


@pytest.mark.parametrize(
    "gb, words",
    [
        (5.0, "does not fit"),
        (5.0, "take a smaller model"),
        (6.4, "fits if they are cut to"),
        (7.6, "--embedding host --out RUN"),
        (11.0, "--rollout hf"),
        (30.0, "--rollout-type bf16 --out RUN"),
    ],
)
def test_advice_names_terms_that_add_up_and_the_command(gb, words):
    lines = memory_plan.advice(SHAPES["Qwen2.5-7B"], gb, model="m")
    assert words in "\n".join(lines)
    heads = [i for i, line in enumerate(lines) if not line.startswith(" ")]
    for start, end in zip(heads, [*heads[1:], len(lines)]):
        shown = sum(float(line.split()[0]) for line in lines[start + 1 : end] if " GB  " in line)
        assert shown == pytest.approx(float(lines[start].rpartition(", ")[2].split()[0]), abs=0.06)


def test_advice_for_a_cpu_and_what_would_help():
    cpu = {"bits": 16, "cuda": False, "checkpointing": False, "item": 4}
    assert "libraries" in "\n".join(memory_plan.advice(SHAPES["Qwen2.5-0.5B"], 64.0, **cpu))
    wide = memory_plan.advice(SHAPES["Qwen2.5-7B"], 11.0, bits=16)
    assert all(
        "--bits 4 would fit" in line for line in wide if "too much" in line
    ) and "too much" in "\n".join(wide)


def test_what_the_user_said_is_not_chosen_for_them():
    """On a card that is too small for the wish, only what is `free` changes; on a CPU nothing does."""
    config, wanted = SHAPES["Qwen2.5-7B"], grpo(270_000_000, 49_152)
    gb = memory_plan.usable(12)
    assert memory_plan.total(config, wanted) > gb
    everything = memory_plan.choose(config, gb, wanted, memory_plan.FREE)
    assert (
        memory_plan.total(config, everything) <= gb
        and everything.rollout_type == "q4_k_m"
        and not everything.judge_on_gpu
    )
    told = memory_plan.chosen(everything, wanted)
    assert "rollouts from a q4_k_m GGUF" in told and "the judge on the CPU" in told
    for name in memory_plan.FREE:
        some = memory_plan.choose(config, gb, wanted, (name,))
        assert {key for key in vars(wanted) if getattr(some, key) != getattr(wanted, key)} <= {
            name,
            *(["rollout_type"] if name == "rollout" else []),
        }
    assert memory_plan.choose(config, gb, wanted, ()) == wanted and memory_plan.chosen(wanted, wanted) == ""
    assert memory_plan.choose(config, gb, replace(wanted, cuda=False), memory_plan.FREE) == replace(
        wanted, cuda=False
    )
    far = memory_plan.choose(
        config, gb, replace(wanted, llama_gpu=False), memory_plan.FREE
    )  # llama.cpp takes nothing of the card: no reason to give up anything but
    assert far.rollout_type == "bf16" and far.micro == 8 and far.judge_on_gpu  # what torch holds
    tied = memory_plan.choose(SHAPES["Qwen2.5-3B"], 1.0, grpo(0, 0), memory_plan.FREE)
    assert not tied.host_embedding  # the output matrix needs it


@pytest.mark.parametrize(
    "change", [{"micro": -1}, {"micro": "8"}, {"rollout": "rm -rf"}, {"bits": True}, {"extra": 1}, None]
)
def test_a_setting_from_a_run_json_is_checked(change):
    facts = json.loads(json.dumps(vars(grpo(1, 2))))
    assert memory_plan.Setting.of(facts) == grpo(1, 2)
    assert memory_plan.Setting.of({"micro": 4}).micro == 4  # of a version that knew less
    with pytest.raises(ValueError, match="damaged"):
        memory_plan.Setting.of({**facts, **change} if change else "x")
