"""What the tests share: a cache of their own, tiny models from a config, and the embedded model, imported once per session."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def pytest_configure(config):
    config.addinivalue_line("markers", "real: runs the real embedded model on the CPU (minutes, not seconds)")
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU")
    config.addinivalue_line("filterwarnings", "ignore")


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Nothing is read from or left in the user's cache."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["KARDIA_CACHE"] = str(path)
    return path


@pytest.fixture(scope="session")
def embedded(cache):
    import kardia_lite as k

    return k.resolve_base(k.EMBEDDED)


@pytest.fixture(scope="session")
def renderer(embedded):
    import kardia_lite as k

    return k.Renderer(k.load_tokenizer(embedded))


@pytest.fixture(scope="session")
def rubric():
    import kardia_lite as k

    return k.load_rubric(ROOT / "rubrics.yaml")


@pytest.fixture
def tiny():
    """A random model of any architecture: tiny("llama"), tiny("gemma3_text", sliding_window=8)."""

    def make(kind, attn="sdpa", **changes):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
        config = AutoConfig.for_model(kind, **{**sizes, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes})
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn).float()
        return model.requires_grad_(False)  # frozen, as a base is; a LoRA on top is trained

    return make
