"""What the tests share: a cache of their own, tiny models from a config, the embedded model, the command
line."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# One thread: two that wait for each other make a tiny model a hundred times slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: takes more than two seconds, the real model or processes (`make test-all`)"
    )
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU")
    config.addinivalue_line("filterwarnings", "ignore")


def run(line, ok=True):
    """Run a command line in this process. ok: it must succeed."""
    from click.testing import CliRunner

    import kardia_lite as k

    result = CliRunner().invoke(k.cli, shlex.split(line))
    if ok:
        assert result.exit_code == 0, (result.output, result.exception)
    return result


def commands():
    """Yield (whole name, command) of all commands and groups."""
    import click

    import kardia_lite as k

    def walk(group, path=()):
        for name, command in group.commands.items():
            yield " ".join((*path, name)), command
            if isinstance(command, click.Group):
                yield from walk(command, (*path, name))

    return walk(k.cli)


def names_of(directory):
    """The sorted names of what stands in a directory."""
    return sorted(path.name for path in directory.iterdir())


def lines_of(path):
    """The rows of a JSONL file. A torn line fails here."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def with_signal(score):
    """score_answers with a format component that differs: a random model's answers would all get 0."""

    def scored(answers, *rest, **more):
        rewards = score(answers, *rest, **more)
        for reward, (_, text) in zip(rewards, answers):
            reward.components["format"] = text.count("e") % 5 / 4
        return rewards

    return scored


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


@pytest.fixture(scope="session")
def unjudged(tmp_path_factory):
    """The rubric without its judge, whose exam takes minutes: format and label are what is rewarded."""

    text, rewards = (
        (ROOT / "rubrics.yaml").read_text(encoding="utf-8"),
        "\nrewards: {format: 1, emotion: 1, rubric: 1}\n",
    )
    assert rewards in text
    path = tmp_path_factory.mktemp("unjudged") / "rubric.yaml"
    path.write_text(text.replace(rewards, rewards.replace("rubric: 1", "rubric: 0")), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """One exam pair per criterion: enough to run the exam, too few to pass it. One file for all tests, so
    that the exam is sat once."""
    import kardia_lite as k

    first = {}
    for line in (k.DATA / "judge_exam.jsonl").read_text(encoding="utf-8").splitlines():
        first.setdefault(json.loads(line)["criterion"], line)
    del first["reference"]  # of which every criterion is asked
    path = tmp_path_factory.mktemp("exam") / "exam.jsonl"
    path.write_text("\n".join(first.values()) + "\n", encoding="utf-8")
    return path


def random_model(kind, attn="sdpa", **changes):
    """A random float32 model of any architecture, the same at every call: 2 layers of 32 dimensions."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(kind, **{**settings, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn).float()


def with_lora(model, seed=1, std=0.2, **settings):
    """A model with a random LoRA on all linear layers that changes what it says (a new one's B is 0)."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(**settings, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


@pytest.fixture
def tiny():
    """A random model of any architecture: tiny("llama"), tiny("gemma3_text", sliding_window=8)."""

    def make(kind, attn="sdpa", **changes):
        # Frozen, as a base is; a LoRA on top is trained.
        return random_model(kind, attn, **changes).requires_grad_(False)

    return make


@pytest.fixture
def tiny_directory(tiny, tmp_path):
    """tiny_directory("qwen2") -> a saved random model (bfloat16, as models come), with its norms moved off 1
    and its biases off 0."""

    def make(kind, name="base", **changes):
        import torch

        model = tiny(kind, **changes)
        for key, weight in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                weight += 0.2 * torch.randn_like(weight)
        model.to(torch.bfloat16).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


# What llama.cpp wants to know of each architecture besides sizes: key of config.json -> key of the GGUF, and
# how it is written.
GGUF_KEYS = {
    "max_position_embeddings": ("context_length", "uint32"),
    "hidden_size": ("embedding_length", "uint32"),
    "num_hidden_layers": ("block_count", "uint32"),
    "intermediate_size": ("feed_forward_length", "uint32"),
    "num_attention_heads": ("attention.head_count", "uint32"),
    "num_key_value_heads": ("attention.head_count_kv", "uint32"),
    "head_dim": ("attention.key_length", "uint32"),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", "float32"),
    "sliding_window": ("attention.sliding_window", "uint32"),
    "attn_logit_softcapping": ("attn_logit_softcapping", "float32"),
    "final_logit_softcapping": ("final_logit_softcapping", "float32"),
    "vocab_size": ("vocab_size", "uint32"),
}


def make_template(directory, path, tokens=None, chat_template=None, metadata=None, like=None, tensors=None):
    """A GGUF as someone else might have made of the same model, all its weights 0: metadata only counts. Its
    tokenizer: none, a SentencePiece one (`tokens`: [(piece, score, kind), ..]), or that of another GGUF
    (`like`)."""
    import gguf
    import numpy as np

    from kardia.llama.gguf_header import read_gguf
    from kardia.models import gguf as gguf_files
    from kardia.models.weights import Weights

    weights = Weights(directory)
    config = json.loads((directory / "config.json").read_text())
    architecture = gguf_files.architecture_of(config, "test")[0]
    writer = gguf.GGUFWriter(path, architecture)
    for key, (name, kind) in GGUF_KEYS.items():
        if config.get(key) is not None:
            getattr(writer, f"add_{kind}")(f"{architecture}.{name}", config[key])
    rope = config.get("rope_parameters") or {}
    writer.add_float32(
        f"{architecture}.rope.freq_base", rope.get("full_attention", rope).get("rope_theta", 10000.0)
    )
    writer.add_uint32(f"{architecture}.attention.value_length", config["head_dim"])
    writer.add_uint32(f"{architecture}.rope.dimension_count", config["head_dim"])
    if like:
        header, types = read_gguf(like), gguf.GGUFValueType
        for key, (kind, _) in header.fields.items():
            if key.startswith("tokenizer.") and key != "tokenizer.chat_template":
                items = header.item_type(key)
                items = None if items is None else types(items)
                writer.add_key_value(key, header.value(key), types(kind), items)
    else:
        writer.add_tokenizer_model("llama" if tokens else "none")
    if tokens:
        pieces, scores, kinds = zip(*tokens)
        writer.add_token_list(pieces)
        writer.add_token_scores(scores)
        writer.add_token_types(kinds)
        for name in ("bos", "eos", "pad"):
            getattr(writer, f"add_{name}_token_id")(config[f"{name}_token_id"])
        writer.add_bool("tokenizer.ggml.add_space_prefix", False)
        writer.add_bool("tokenizer.ggml.add_bos_token", True)
    if chat_template:
        writer.add_chat_template(chat_template)
    for key, value in (metadata or {}).items():
        writer.add_uint32(key, value)
    for name, values in {**gguf_files.gguf_tensors(weights), **(tensors or {})}.items():
        writer.add_tensor(name, np.zeros_like(values()) if callable(values) else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def template_of():
    """template_of(directory, path): see `make_template`."""
    return make_template


@pytest.fixture(scope="session")
def little(tmp_path_factory, embedded):
    """A chat model in a GGUF whose every step takes a tenth of a second: a random llama with the embedded
    model's tokenizer."""
    import torch

    from kardia.llama.gguf_header import read_gguf
    from kardia.models import gguf as gguf_files
    from kardia.models.weights import Weights

    changes = {"vocab_size": 49152, "max_position_embeddings": 2048, "pad_token_id": 2}
    path = tmp_path_factory.mktemp("little")
    model = random_model("llama", **changes, tie_word_embeddings=True)
    model.to(torch.bfloat16).save_pretrained(path / "hf")
    template = make_template(
        path / "hf",
        path / "template.gguf",
        like=embedded.template,
        chat_template=read_gguf(embedded.template).value("tokenizer.chat_template"),
    )
    return gguf_files.write_gguf(
        template, path / "little.gguf", "bf16", gguf_files.gguf_tensors(Weights(path / "hf"))
    )
