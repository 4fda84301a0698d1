"""Unsloth under our trainers, without Unsloth: a small stand-in records what it is asked for and returns a
real tiny model.

Here: what is set before the import, what is refused, what is asked of it, and whose LoRA is trained. That
Unsloth's own forward gives transformers' log-probs and gradients takes the library itself.
"""

import importlib.machinery
import os
import sys
import types

import pytest
import torch

from kardia.core.console import UserError
from kardia.models import packed_rows
from kardia.models import unsloth as engine
from kardia.models.base import Base

VARIABLES = "ALLOW_CPU GRPO_PREFIX_GROUPER RETURN_HIDDEN_STATES DISABLE_STATISTICS COMPILE_LOCATION".split()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """As if nothing was set; what is set here is forgotten."""
    for name in VARIABLES:
        monkeypatch.setenv(f"UNSLOTH_{name}", "x")
        monkeypatch.delenv(f"UNSLOTH_{name}")


@pytest.fixture
def unsloth(monkeypatch):
    """A stand-in: it loads with transformers; its attention asks `attention_dispatch` for a layout."""
    asked, dispatch = {}, types.ModuleType("unsloth.utils.attention_dispatch")
    dispatch._flex_shared_prefix_attention = None

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(**arguments):
            from transformers import AutoModelForCausalLM

            asked.update(arguments)
            print("==((====))==  Unsloth")
            model = AutoModelForCausalLM.from_pretrained(arguments["model_name"], dtype=arguments["dtype"])
            model.is_loaded_in_4bit = arguments["load_in_4bit"] and not asked.get("no bitsandbytes")
            if asked.get("grow"):
                model.resize_token_embeddings(model.config.vocab_size + 1)
            return like_unsloths(model.requires_grad_(False), dispatch), None

        @staticmethod
        def patch_peft_model(model, use_gradient_checkpointing):
            asked["checkpointing"] = use_gradient_checkpointing
            return model

    root, utils = types.ModuleType("unsloth"), types.ModuleType("unsloth.utils")
    root.__spec__ = importlib.machinery.ModuleSpec("unsloth", None)
    root.FastLanguageModel, root.utils, utils.attention_dispatch = FastLanguageModel, utils, dispatch
    modules = {"unsloth": root, "unsloth.utils": utils, "unsloth.utils.attention_dispatch": dispatch}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def like_unsloths(model, dispatch):
    """Attention that knows no `pack`, takes the layout as prefix_seg_info, drops a mask in training."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(module, query, key, value, mask, prefix_seg_info=None, pack=None, scaling=None, **more):
        if prefix_seg_info is None:
            mask = None if mask is not None and mask.dtype == torch.long else mask
            return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **more)
        q, k, v = (states.transpose(1, 2) for states in (query, key, value))  # [1, L, heads, D]
        return dispatch._flex_shared_prefix_attention(q, k, v, prefix_seg_info, scale=None), None

    AttentionInterface.register("like_unsloths", attention)
    AttentionMaskInterface.register("like_unsloths", sdpa_mask)
    model.set_attn_implementation("like_unsloths")
    return model


def lora(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def load(directory, bits=16):
    return engine.load(directory, bits, torch.float32, 256, 7, 0, lora)


# ---------------------------------------------------------------------------------- before the import


def test_what_unsloth_reads_while_it_is_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNSLOTH_ALLOW_CPU", "0")
    engine.prepare_import(tmp_path.relative_to(tmp_path) / "here")
    assert os.environ["UNSLOTH_ALLOW_CPU"] == "1"  # TRL's trainers stay TRL's, whatever was set
    # not ./unsloth_compiled_cache, a part of the import path
    assert os.environ["UNSLOTH_COMPILE_LOCATION"] == str(tmp_path / "here" / "unsloth")
    assert os.environ["UNSLOTH_DISABLE_STATISTICS"] == "1"
    monkeypatch.setenv("UNSLOTH_COMPILE_LOCATION", "/elsewhere")
    engine.prepare_import(tmp_path)
    assert os.environ["UNSLOTH_COMPILE_LOCATION"] == "/elsewhere"  # a user's own cache is respected


def test_rewritten_trainers_and_a_failed_import_are_refused(unsloth, tmp_path, monkeypatch):
    """Without UNSLOTH_ALLOW_CPU, Unsloth leaves a generated GRPOTrainer and another SFTTrainer.__init__."""
    import trl

    engine.import_unsloth(tmp_path)
    fake = type("UnslothGRPOTrainer", (trl.GRPOTrainer,), {"__module__": "UnslothGRPOTrainer"})
    changes = [(trl, "GRPOTrainer", fake), (trl.SFTTrainer, "__init__", lambda self, *_, **__: None)]
    for owner, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value, raising=False)
            with pytest.raises(UserError, match="replaces .*Trainer.*--engine transformers"):
                engine.import_unsloth(tmp_path)

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "unsloth":
                raise RuntimeError("operator torchvision::nms does not exist\nand more")

    monkeypatch.delitem(sys.modules, "unsloth")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(UserError, match="cannot be imported .*torchvision::nms") as error:
        engine.import_unsloth(tmp_path)
    assert "\n" not in error.value.message


def test_which_bases_it_takes():
    """What Unsloth would silently compute otherwise goes to the other engine."""
    llama, window = {"model_type": "llama"}, {"model_type": "qwen2", "sliding_window": 4096}
    layers = {"model_type": "qwen3", "layer_types": ["full_attention"]}
    for config, why in (
        (llama, None),
        ({**llama, "rope_parameters": {"rope_type": "llama3", "factor": 32.0}}, None),
        ({**llama, "rope_scaling": {"type": "linear", "factor": 2.0}}, None),  # an older config.json
        ({**window, "use_sliding_window": False}, None),  # named, not used: Qwen2.5
        (layers, None),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding window"),  # Mistral 7B v0.1
        ({**window, "use_sliding_window": True}, "sliding window"),
        ({**layers, "layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"model_type": "gemma3_text"}, "no fast path"),
        ({}, "no fast path"),
        ({**llama, "hidden_act": "gelu"}, "activation gelu"),  # its MLP is SwiGLU whatever the config says
        ({**llama, "rope_scaling": {"rope_type": "dynamic"}}, "RoPE of type dynamic"),
        ({**llama, "rope_scaling": "odd"}, "RoPE of type odd"),
        ({**llama, "quantization_config": {"quant_method": "gptq"}}, "quantized already"),
    ):
        reason = engine.unsupported_reason(config)
        assert reason is None if why is None else why in reason, config


def test_the_choice_of_an_engine(unsloth, tiny_directory, monkeypatch, capsys):
    llama = Base("a llama", tiny_directory("llama"), None, "x")
    gemma = Base("a gemma", tiny_directory("gemma3_text", "gemma"), None, "x")
    monkeypatch.setattr(engine.machine, "has_gpu", lambda: False)
    assert [engine.choose_engine(e, llama) for e in ("transformers", "auto")] == ["transformers"] * 2
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        engine.choose_engine("unsloth", llama)
    monkeypatch.setattr(engine.machine, "has_gpu", lambda: True)
    assert [engine.choose_engine(e, llama) for e in ("unsloth", "auto")] == ["unsloth"] * 2
    assert engine.choose_engine("auto", gemma) == "transformers" and "no fast path" in capsys.readouterr().err
    with pytest.raises(UserError, match="a gemma has no fast path"):
        engine.choose_engine("unsloth", gemma)


# ---------------------------------------------------------------------------------- loading


def test_what_is_asked_of_unsloth_and_whose_lora_is_trained(unsloth, tiny_directory, capsys):
    directory = tiny_directory("llama")
    model = load(directory, bits=4)
    expected = {
        **{"model_name": str(directory), "use_exact_model_name": True},  # no other repository in its place
        **{"local_files_only": True, "use_safetensors": True, "trust_remote_code": False},
        **{"load_in_4bit": True, "load_in_16bit": False, "device_map": {"": 0}},
        **{"max_seq_length": 256, "checkpointing": "unsloth"},  # the base's window: no stretched RoPE
        **{"offload_embedding": False, "fix_tokenizer": False},
    }
    assert {key: unsloth[key] for key in expected} == expected
    assert capsys.readouterr().out == ""  # its banner is not our product
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all(".lora_" in name and w.dtype == torch.float32 for name, w in trained.items())
    unsloth["no bitsandbytes"] = True  # it goes on in 16 bits, with a line on stdout that nobody reads here
    with pytest.raises(UserError, match="without 4 bits"):
        load(directory, bits=4)
    unsloth["grow"] = True  # it adds rows when its own tokenizer has more tokens: no export would fit
    with pytest.raises(UserError, match="vocabulary to 98 tokens"):
        load(directory)
    (directory / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="the model cannot be loaded"):
        load(directory)


def test_our_rows_go_through_its_layers(unsloth, tiny_directory, monkeypatch):
    dispatch = sys.modules["unsloth.utils.attention_dispatch"]
    causal = load(tiny_directory("qwen2")).base_model.model
    forward = causal.base_model.forward
    assert packed_rows.probe(causal) > 1e-4  # without our function a packed row is wrong
    assert engine.enable_packed_rows(causal) is None and packed_rows.probe(causal) < 1e-5
    causal.base_model.forward = forward
    with monkeypatch.context() as patch:
        wrong = lambda module, q, k, v, *_, **__: (q.transpose(1, 2), None)  # noqa: E731
        patch.setattr(packed_rows, "shared_prefix_attention", wrong)
        assert "are off by" in engine.enable_packed_rows(causal) and causal.base_model.forward == forward
    del dispatch._flex_shared_prefix_attention
    assert engine.enable_packed_rows(causal) == "another version of Unsloth"
    assert causal.base_model.forward == forward


def test_the_kl_reference_is_the_sft_adapter(tiny):
    model = lora(tiny("llama"))
    engine.check_reference(model, 0.0)  # without KL nobody is missed
    with pytest.raises(UserError, match=r"--beta 0.04: no copy of the SFT adapter"):
        engine.check_reference(model, 0.04)
    model.add_adapter("ref", model.peft_config["default"])
    engine.check_reference(model, 0.04)
