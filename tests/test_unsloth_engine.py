"""Unsloth under our trainers, without Unsloth: a small stand-in records what it is asked for and gives back a real tiny model.

What the stand-in cannot show (that Unsloth's own forward gives the log-probs and gradients of transformers) was compared once with
the library itself on a CPU, its Triton kernels interpreted. Here: what is asked of it, what is refused, and whose LoRA is trained.
"""

import os
import sys
import types

import pytest
import torch

from kardia.core.console import UserError
from kardia.models import packed_rows
from kardia.models import unsloth as engine

VARIABLES = (
    "UNSLOTH_ALLOW_CPU",
    "UNSLOTH_GRPO_PREFIX_GROUPER",
    "UNSLOTH_RETURN_HIDDEN_STATES",
    "UNSLOTH_DISABLE_STATISTICS",
    "UNSLOTH_COMPILE_LOCATION",
)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """As if nothing was set; what is set here is forgotten."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)


class Asked(dict):
    """What the stand-in was asked for: {function: keyword arguments}."""


@pytest.fixture
def unsloth(monkeypatch):
    """A stand-in for the library: it loads with transformers, dresses nothing up, and its layers hand a layout to `attention_dispatch`
    as Unsloth's do (run_attention -> _flex_shared_prefix_attention)."""
    asked, dispatch = Asked(), types.ModuleType("unsloth.utils.attention_dispatch")
    dispatch._flex_shared_prefix_attention = None

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(**arguments):
            from transformers import AutoModelForCausalLM

            asked["from_pretrained"] = arguments
            print("==((====))==  Unsloth")
            model = AutoModelForCausalLM.from_pretrained(
                arguments["model_name"], dtype=arguments["dtype"], attn_implementation="sdpa"
            ).requires_grad_(False)
            model.is_loaded_in_4bit = arguments["load_in_4bit"] and not asked.get("no bitsandbytes")
            if asked.get("grow"):
                model.resize_token_embeddings(model.config.vocab_size + 1)
            return like_unsloths(model, dispatch), None

        @staticmethod
        def patch_peft_model(model, use_gradient_checkpointing):
            asked["patch_peft_model"] = {"use_gradient_checkpointing": use_gradient_checkpointing}
            return model

    root, utils = types.ModuleType("unsloth"), types.ModuleType("unsloth.utils")
    root.FastLanguageModel, root.utils, utils.attention_dispatch = FastLanguageModel, utils, dispatch
    for name, module in (
        ("unsloth", root),
        ("unsloth.utils", utils),
        ("unsloth.utils.attention_dispatch", dispatch),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def like_unsloths(model, dispatch):
    """Attention that knows nothing of `pack`, takes the layout as prefix_seg_info, and refuses a mask beside it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module, query, key, value, attention_mask, prefix_seg_info=None, pack=None, scaling=None, **more
    ):
        if prefix_seg_info is None:
            if attention_mask is not None and attention_mask.dtype == torch.long:
                attention_mask = (
                    None  # in training Unsloth drops whatever mask there is, and attends causally
                )
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
        q, k, v = (states.transpose(1, 2) for states in (query, key, value))  # [1, L, heads, D]
        return dispatch._flex_shared_prefix_attention(q, k, v, prefix_seg_info, scale=None), None

    AttentionInterface.register("like_unsloths", attention)
    AttentionMaskInterface.register("like_unsloths", sdpa_mask)
    model.set_attn_implementation("like_unsloths")
    return model


def lora(model, rank=4):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def load(directory, dress=lora, bits=16, window=256):
    return engine.load(directory, bits, torch.float32, window, 7, 0, dress)


# ------------------------------------------------------------------------------------------------ before the import


def test_what_unsloth_reads_while_it_is_imported(tmp_path):
    engine.prepare_import(tmp_path)
    assert os.environ["UNSLOTH_ALLOW_CPU"] == "1"  # TRL's trainers stay TRL's
    assert os.environ["UNSLOTH_COMPILE_LOCATION"] == str(
        tmp_path / "unsloth"
    )  # not ./unsloth_compiled_cache, a part of the import path
    assert "UNSLOTH_DISABLE_STATISTICS" in os.environ


def test_a_users_own_cache_is_respected_but_not_his_trainers(tmp_path, monkeypatch):
    monkeypatch.setenv("UNSLOTH_COMPILE_LOCATION", "/elsewhere")
    monkeypatch.setenv("UNSLOTH_ALLOW_CPU", "0")
    engine.prepare_import(tmp_path)
    assert os.environ["UNSLOTH_COMPILE_LOCATION"] == "/elsewhere"
    assert os.environ["UNSLOTH_ALLOW_CPU"] == "1"


def test_the_cache_is_absolute(tmp_path, monkeypatch):
    from pathlib import Path

    monkeypatch.chdir(tmp_path)
    engine.prepare_import(Path("here"))
    assert os.environ["UNSLOTH_COMPILE_LOCATION"] == str(tmp_path / "here" / "unsloth")


def test_trls_own_trainers_pass(unsloth, tmp_path):
    engine.bring_in(tmp_path)


@pytest.mark.parametrize("how", ["another class", "another __init__"])
def test_rewritten_trainers_are_refused(unsloth, tmp_path, monkeypatch, how):
    """As Unsloth leaves them without UNSLOTH_ALLOW_CPU: GRPOTrainer is a generated class, SFTTrainer's __init__ another function."""
    import trl

    if how == "another class":
        monkeypatch.setattr(
            trl,
            "GRPOTrainer",
            type("UnslothGRPOTrainer", (trl.GRPOTrainer,), {"__module__": "UnslothGRPOTrainer"}),
            raising=False,
        )
    else:
        monkeypatch.setattr(trl.SFTTrainer, "__init__", lambda self, *arguments, **more: None)
    with pytest.raises(UserError, match="replaces .*Trainer.*--engine transformers"):
        engine.bring_in(tmp_path)


def test_an_import_that_fails_is_one_line(tmp_path, monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "unsloth":
                raise RuntimeError("operator torchvision::nms does not exist\nand more")

    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(UserError, match="cannot be imported .*torchvision::nms") as error:
        engine.bring_in(tmp_path)
    assert "\n" not in error.value.message


# ------------------------------------------------------------------------------------------------ which bases


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "llama"}, None),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "factor": 32.0}}, None),
        (
            {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
            None,
        ),  # an older config.json
        (
            {"model_type": "qwen2", "sliding_window": 32768, "use_sliding_window": False},
            None,
        ),  # named, not used: Qwen2.5
        ({"model_type": "qwen3", "layer_types": ["full_attention"] * 2}, None),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding window"),  # Mistral 7B v0.1
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True}, "sliding window"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"model_type": "gemma3_text"}, "no fast path"),
        ({}, "no fast path"),
        (
            {"model_type": "llama", "hidden_act": "gelu"},
            "activation gelu",
        ),  # its MLP is SwiGLU whatever the config says
        ({"model_type": "llama", "rope_scaling": {"rope_type": "dynamic"}}, "RoPE of type dynamic"),
        ({"model_type": "llama", "rope_scaling": "odd"}, "RoPE of type odd"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "quantized already"),
    ],
)
def test_which_bases_are_taken(config, why):
    found = engine.unsupported_reason(config)
    assert found is None if why is None else why in found


# ------------------------------------------------------------------------------------------------ loading


def test_what_is_asked_of_unsloth(unsloth, tiny_directory, capsys):
    directory = tiny_directory("llama")
    load(directory, bits=4)
    asked = unsloth["from_pretrained"]
    assert (
        asked["model_name"] == str(directory) and asked["use_exact_model_name"]
    )  # no other repository in its place
    assert (
        asked["local_files_only"] and asked["use_safetensors"] and asked["trust_remote_code"] is False
    )  # no network, no pickle, no code
    assert (asked["load_in_4bit"], asked["load_in_16bit"]) == (True, False)
    assert asked["device_map"] == {"": 0}  # the rank's own GPU
    assert asked["max_seq_length"] == 256  # the base's window: no stretched RoPE, no truncated rows
    assert asked["offload_embedding"] is False and asked["fix_tokenizer"] is False
    assert unsloth["patch_peft_model"]["use_gradient_checkpointing"] == "unsloth"
    assert capsys.readouterr().out == ""  # its banner is not our product


def test_16_bits(unsloth, tiny_directory):
    load(tiny_directory("llama"), bits=16)
    assert (unsloth["from_pretrained"]["load_in_4bit"], unsloth["from_pretrained"]["load_in_16bit"]) == (
        False,
        True,
    )


def test_the_dress_gets_the_base_and_its_lora_is_trained(unsloth, tiny_directory):
    model = load(tiny_directory("llama"))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert {model.get_parameter(name).dtype for name in trained} == {torch.float32}


@pytest.mark.parametrize("rslora", [False, True])
def test_a_trained_adapter_is_read_as_in_the_other_engine(unsloth, tiny, tiny_directory, tmp_path, rslora):
    """Another rank than the default, ranks and alphas of their own for some modules: log-probs and files are those of plain PEFT."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    import kardia_lite as k

    directory = tiny_directory("llama")
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = LoraConfig(
        r=6,
        lora_alpha=9,
        target_modules="all-linear",
        use_rslora=rslora,
        rank_pattern={"q_proj": 3},
        alpha_pattern={"model.layers.1.mlp.up_proj": 5},
        task_type="CAUSAL_LM",
    )
    plain = get_peft_model(plain, config)
    for name, weight in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    plain.save_pretrained(tmp_path / "adapter", selected_adapters=["default"])
    model = load(directory, lambda base: k.put_on(base, tmp_path / "adapter", "base"))
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "again", selected_adapters=["default"])
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_of_another_base_is_one_line(unsloth, tiny_directory, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import kardia_lite as k

    other = AutoModelForCausalLM.from_pretrained(tiny_directory("llama", "other", hidden_size=64))
    get_peft_model(other, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(UserError, match="does not fit the base"):
        load(tiny_directory("llama"), lambda base: k.put_on(base, tmp_path / "adapter", "base"))


def test_a_vocabulary_that_grew_is_refused(unsloth, tiny_directory):
    """Unsloth makes room when its own tokenizer has more tokens than the base has rows: the export would not fit."""
    unsloth["grow"] = True
    with pytest.raises(UserError, match="vocabulary to 98 tokens"):
        load(tiny_directory("llama"))


def test_4_bits_that_became_16_are_refused(unsloth, tiny_directory):
    """Where bitsandbytes does not work, Unsloth loads 16 bits and prints a line on stdout, which nobody reads here."""
    unsloth["no bitsandbytes"] = True
    with pytest.raises(UserError, match="without 4 bits"):
        load(tiny_directory("llama"), bits=4)


def test_a_damaged_base_is_one_line(unsloth, tiny_directory):
    directory = tiny_directory("llama")
    (directory / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="the model cannot be loaded"):
        load(directory)


# ------------------------------------------------------------------------------------------------ shared rows


def rows_and_plain(causal):
    """log-probs of two answers: from one packed row, and from rows of their own."""
    text = torch.randint(3, 97, (40,), generator=torch.Generator().manual_seed(1))
    prompt, answers = text[:20], [text[20:33], text[33:]]
    row = packed_rows.pack(prompt, answers)
    packed = row.logps(causal, row.predictors, torch.cat(answers))[0]
    plain = []
    for answer in answers:
        logits = causal(input_ids=torch.cat([prompt, answer])[None], use_cache=False).logits[
            0, len(prompt) - 1 : -1
        ]
        plain.append(logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0])
    return packed, torch.cat(plain)


def test_without_our_function_a_packed_row_is_wrong(unsloth, tiny_directory):
    """The stand-in, like Unsloth in training, lets `pack` and the mask fall on the floor: the tests below do test something."""
    packed, plain = rows_and_plain(load(tiny_directory("qwen2")).base_model.model)
    assert (packed - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_our_rows_go_through_its_layers(unsloth, tiny_directory, kind):
    changes = {"sliding_window": None} if kind == "mistral" else {}
    causal = load(tiny_directory(kind, **changes)).base_model.model
    assert engine.enable_packed_rows(causal) is None
    packed, plain = rows_and_plain(causal)
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=0)


def test_gradients_through_its_layers(unsloth, tiny_directory):
    model = load(tiny_directory("llama"))
    assert engine.enable_packed_rows(model.base_model.model) is None
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    found = []
    for which in range(2):
        model.zero_grad()
        rows_and_plain(model.base_model.model)[which].sum().backward()
        found.append(
            {
                name: weight.grad.clone()
                for name, weight in model.named_parameters()
                if weight.grad is not None
            }
        )
    assert found[0].keys() == found[1].keys() and found[0]
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=2e-4, rtol=1e-3)


def test_side_by_side_without_a_prompt(unsloth, tiny_directory):
    """SFT's micro-batch: dialogues in one row do not see each other."""
    causal = load(tiny_directory("llama")).base_model.model
    assert engine.enable_packed_rows(causal) is None
    texts = torch.arange(3, 33).split([18, 12])
    row = packed_rows.pack(texts[0][:0], texts)
    together = row.hidden(causal)
    alone = torch.cat(
        [causal.base_model(input_ids=text[None], use_cache=False).last_hidden_state[0] for text in texts]
    )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_a_version_that_computes_rows_otherwise_is_left_as_it_was(unsloth, tiny_directory):
    dispatch = sys.modules["unsloth.utils.attention_dispatch"]
    causal = load(tiny_directory("llama")).base_model.model
    forward = causal.base_model.forward
    del dispatch._flex_shared_prefix_attention
    assert engine.enable_packed_rows(causal) == "another version of Unsloth"
    assert causal.base_model.forward == forward


def test_rows_that_come_out_wrong_are_found(unsloth, tiny_directory, monkeypatch):
    causal = load(tiny_directory("llama")).base_model.model
    forward = causal.base_model.forward
    monkeypatch.setattr(
        packed_rows,
        "shared_prefix_attention",
        lambda module, q, k, v, *_, **__: (
            v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2),
            None,
        ),
    )
    assert "are off by" in engine.enable_packed_rows(causal)
    assert causal.base_model.forward == forward


# ------------------------------------------------------------------------------------------------ around TRL's trainers


def test_the_kl_reference_is_the_sft_adapter(tiny):
    model = lora(tiny("llama"))
    engine.check_reference(model, 0.0)  # without KL nobody is missed
    with pytest.raises(UserError, match=r"--beta 0.04: no copy of the SFT adapter"):
        engine.check_reference(model, 0.04)
    model.add_adapter("ref", model.peft_config["default"])
    engine.check_reference(model, 0.04)
