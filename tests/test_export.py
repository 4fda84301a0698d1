"""What leaves a run: weights, GGUFs of six architectures, LoRAs, and the proof's arithmetic."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import names_of
from conftest import run as command

import kardia_lite as k
from kardia.core.console import UserError
from kardia.core.options import DATA, PROJECT
from kardia.export import formats, proof, run_export
from kardia.llama.worker import Worker
from kardia.models import gguf as gguf_files
from kardia.models import gguf_tokenizer
from kardia.models.adapter import read_adapter
from kardia.models.generate import load_plain, torch_logits
from kardia.models.model_files import ExportError, add_compatibility_keys
from kardia.models.weights import Weights, write_merged

SIZES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}  # rows that divide by Q8_0's 32
GEMMA2 = {"query_pre_attn_scalar": 16, "sliding_window": 16}
GEMMA2 |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEMMA3 = {"sliding_window": 16, "query_pre_attn_scalar": 16, "num_hidden_layers": 7}
FAMILIES = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", GEMMA2),
    "gemma3": ("gemma3_text", GEMMA3),
}
PATTERNS = {
    "alpha_pattern": {"q_proj": 1, "layers.1.mlp.up_proj": 32},
    "rank_pattern": {"k_proj": 2, "down_proj": 8},
    "use_rslora": True,
}
PROMPTS = [[1, *range(3, 40)], [1, 50, 7, 7, 60], [1, 90]]


def make_adapter(directory, path, seed=1, size=0.3, **changes):
    """A LoRA with something in it, on all linear layers of the model in `directory`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(model, LoraConfig(**config))
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = size * torch.randn_like(weight)
    model.save_pretrained(path)
    return model.eval()


def both(model):
    """(logits of base + LoRA, logits of the base)."""
    trained = torch_logits(model, PROMPTS)
    with model.disable_adapter():
        return trained, torch_logits(model, PROMPTS)


def llama_logits(worker, path, lora=None):
    worker.load("m", path)
    worker.set_lora("m", lora)
    return worker.next_logits("m", PROMPTS)


@pytest.fixture(scope="module")
def worker():
    with Worker() as worker:
        yield worker


def far_below(trained, other, base, share=0.02):
    """KL(trained || other) is far below what the LoRA moved the base."""
    kl, effect = proof.kl_and_agreement(trained, other)[0], proof.kl_and_agreement(trained, base)[0]
    assert effect > 0.01 and kl < share * effect, (kl, effect)


# ---------------------------------------------------------------------------- weights and GGUFs

one_is_fast = [pytest.param(name, marks=[] if name == "gemma3" else pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("name", one_is_fast)
def test_every_architecture_computes_the_same_in_llama_cpp(
    name, worker, tiny_directory, template_of, tmp_path
):
    """Base + LoRA in torch against GGUFs written without a converter (q/k permuted, norms + 1, biases, tied
    heads), and against the LoRA as GGUF on the base's GGUF, which scales as PEFT does."""
    kind, changes = FAMILIES[name]
    directory = tiny_directory(kind, **{**SIZES, **changes})
    template = template_of(directory, tmp_path / "template.gguf")
    trained, base = both(make_adapter(directory, tmp_path / "adapter"))
    tensors = gguf_files.gguf_tensors(Weights(directory, 16, tmp_path / "adapter"))
    for type_, share in (("f32", 1e-4), ("f16", 1e-3), ("bf16", 0.02), ("q8_0", 0.05)):
        path = gguf_files.write_gguf(template, tmp_path / f"{type_}.gguf", type_, tensors)
        logits = llama_logits(worker, path)
        far_below(trained, logits, base, share)
        assert abs(proof.kept(base, trained, logits) - 1) < 0.1, type_
    on = tmp_path / "base.gguf"
    gguf_files.write_gguf(template, on, "f32", gguf_files.gguf_tensors(Weights(directory)))
    for number, more in enumerate(({}, {"use_rslora": True}, PATTERNS)):
        adapter = tmp_path / f"adapter{number}"
        trained, base = both(make_adapter(directory, adapter, size=0.2, **more))
        config, pairs = read_adapter(adapter)
        sizes = json.loads((directory / "config.json").read_text())
        lora = gguf_files.write_lora_gguf(config, pairs, sizes, tmp_path / f"lora{number}.gguf")
        # what is left is llama.cpp's float16 cache
        far_below(trained, llama_logits(worker, on, lora), base, 1e-3)
        merged = write_merged(Weights(directory, 16, adapter), tmp_path / f"merged{number}", [2])
        far_below(trained, torch_logits(load_plain(merged, torch.float32), PROMPTS), base)


def test_merging_is_what_peft_merges(tiny_directory, tmp_path):
    """PEFT's own merge_and_unload is the oracle, on a float32 base so that nothing is rounded."""
    directory = tiny_directory("qwen3")
    patterns = {"alpha_pattern": {"v_proj": 3}, "rank_pattern": {"o_proj": 2}}
    model = make_adapter(directory, tmp_path / "adapter", **patterns)
    ours = Weights(directory, 16, tmp_path / "adapter")
    theirs = model.merge_and_unload().state_dict()
    assert set(ours) == set(theirs)
    for name in ours:
        assert torch.allclose(ours.read(name), theirs[name], atol=1e-6), name


def test_a_large_model_is_written_in_shards(tiny_directory, tmp_path):
    from safetensors.torch import save_file

    directory = tiny_directory("llama")
    make_adapter(directory, tmp_path / "adapter")
    # Mistral's snapshots hold the same weights again under other names, which are not read
    save_file({"layers.0.attention.wq.weight": torch.zeros(4, 4)}, directory / "consolidated.safetensors")
    trained = Weights(directory, 16, tmp_path / "adapter")
    assert not any("wq" in name for name in trained)
    whole = write_merged(trained, tmp_path / "whole", [2, 5])
    parts = write_merged(trained, tmp_path / "parts", [2, 5], shard_bytes=20_000)
    files = sorted(p.name for p in parts.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((parts / f).stat().st_size < 24_000 for f in files)
    assert np.array_equal(*(torch_logits(load_plain(p, torch.float32), PROMPTS) for p in (whole, parts)))
    assert json.loads((parts / "generation_config.json").read_text())["eos_token_id"] == [2, 5]
    # a merged, sharded model is a base like any other; of an incomplete one the missing file is named
    assert sorted(Weights(parts)) == sorted(Weights(directory))
    (parts / files[1]).unlink()
    with pytest.raises(ExportError, match=f"{files[1]}: this part of the model is missing"):
        Weights(parts)


def test_transformers_4_finds_its_keys(tmp_path):
    linear = {"rope_type": "linear", "factor": 4.0}
    local = {"full_attention": {"rope_theta": 1e6, **linear}, "sliding_attention": {"rope_theta": 1e4}}
    cases = [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_theta": 5e5}),
        ({"rope_parameters": {"rope_theta": 5e5, **linear}}, {"rope_theta": 5e5, "rope_scaling": linear}),
        (
            {"rope_parameters": local},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": linear},
        ),
        ({"rope_theta": 7e4}, {"rope_theta": 7e4}),
    ]
    for rope, expected in cases:
        config = {"model_type": "llama", "dtype": "bfloat16", **rope}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
        (tmp_path / "tokenizer.json").write_text("{}")
        add_compatibility_keys(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert {key: config.get(key) for key in expected} == expected and config["torch_dtype"] == "bfloat16"
        tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


# ---------------------------------------------------------------------------- a second family, SentencePiece

CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' }}"
    "{{ m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def pieces_of(texts, size=1500):
    """A SentencePiece vocabulary as a GGUF holds it, [(piece, score, kind)]; frequent merges first."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    made = ["".join(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    specials = ("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>")
    tokens = [("<unk>", 0.0, 2), *((token, 0.0, 3) for token in specials), ("\n\n", 0.0, 4)]
    tokens += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    tokens += [(c, -1e6, 1) for c in sorted({c for t in texts for c in t.replace(" ", "▁")})]
    known = {token for token, *_ in tokens}
    scored = {piece: -float(i) for i, piece in reversed(list(enumerate(made))) if piece not in known}
    return tokens + [(piece, scored[piece], 1) for piece in dict.fromkeys(made) if piece in scored]


def contents(file, message):
    lines = (DATA / file).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"][message]["content"] for line in lines]


@pytest.fixture(scope="module")
def vocabulary():
    return pieces_of(contents("dialogues.jsonl", 0))


def ids_of(vocabulary):
    """What config.json says of the tokens, and of the longest text."""
    specials = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    return {"vocab_size": len(vocabulary), "max_position_embeddings": 2048, **specials}


@pytest.fixture
def gemma_gguf(vocabulary, tiny_directory, template_of, tmp_path):
    """A little model of a second family in one GGUF: SentencePiece, a template without a system role."""
    changes = {"sliding_window": 64, "query_pre_attn_scalar": 16}
    directory = tiny_directory("gemma3_text", **SIZES, **changes, **ids_of(vocabulary))
    template = template_of(directory, tmp_path / "template.gguf", tokens=vocabulary, chat_template=CHAT)
    tensors = gguf_files.gguf_tensors(Weights(directory))
    return gguf_files.write_gguf(template, tmp_path / "little-gemma.gguf", "q8_0", tensors)


def test_a_sentencepiece_tokenizer_splits_as_llama_cpp_does(worker, gemma_gguf, tmp_path):
    """transformers reads such a vocabulary as Unigram; once saved, it even split words into letters."""
    from transformers import AutoTokenizer

    texts = [*contents("eval.jsonl", 1)[:20], "I've 1234 cats\n\nand   naïve 你好! \U0001f642"]
    texts += [" leading", "trailing ", "<bos><start_of_turn>user\nhi<end_of_turn>\n"]
    tokenizer = gguf_tokenizer.import_tokenizer(gemma_gguf)
    tokenizer.save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    worker.load("m", gemma_gguf)
    expected = worker.tokenize("m", texts, special=True)
    for some in (tokenizer, again):
        assert [some(t, add_special_tokens=False)["input_ids"] for t in texts] == expected
        assert [some.decode(ids, skip_special_tokens=False) for ids in expected] == texts
    assert max(map(len, expected)) < max(map(len, texts)) / 2  # words, not characters


@pytest.mark.slow
def test_a_second_family_goes_the_whole_way(gemma_gguf, pairs, tmp_path):
    """GGUF in, SFT, GGUF out, every format proved: nothing in it is SmolLM2's own."""
    size = "--limit 8 --max-steps 20 --batch-size 2 --max-length 2000 --learning-rate 3e-2"
    command(f"sft --model {gemma_gguf} {size} --out {tmp_path}/run")
    line = f"export {tmp_path}/run --to {tmp_path}/out --answers 2 --max-tokens 8 --judge {gemma_gguf}"
    result = command(f"{line} --exam-pairs {pairs} --formats merged,F16,bf16,q8_0,lora,modelfile")
    book = book_in(tmp_path / "out")["formats"]
    assert set(book) == {"merged", "f16", "bf16", "q8_0", "lora", "lora gguf", "modelfile"}
    assert all(entry["ok"] for entry in book.values()), result.output
    for name, entry in book.items():
        if name != "modelfile":
            assert entry["kl"] < 0.05 * entry["kl_base"] and entry["kept"] > 0.9, (name, entry)
            assert entry.get("same_tokens", 1) == 1, name
    ends = json.loads((tmp_path / "out" / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [5, 2]  # <end_of_turn>, <eos>
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert 'PARAMETER stop "<end_of_turn>"' in modelfile and "<bos>" not in modelfile
    assert not list((tmp_path / "out").glob(".*"))


def test_llama_3_1s_rope_comes_in_with_the_gguf(worker, vocabulary, tiny_directory, template_of, tmp_path):
    """transformers' import ignores rope_freqs: torch would train a model that llama.cpp does not run."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    directory = tiny_directory("llama", **SIZES, **ids_of(vocabulary), rope_parameters=rope)
    wave = 2 * np.pi * 10000.0 ** (np.arange(0, 16, 2) / 16)
    smooth = (64 / wave - 1) / 3
    factors = np.where(wave < 16, 1, np.where(wave > 64, 8, 1 / ((1 - smooth) / 8 + smooth)))
    factors = factors.astype(np.float32)

    def template(name, values):
        more = {"tokens": vocabulary, "chat_template": CHAT, "tensors": {"rope_freqs.weight": values}}
        return template_of(directory, tmp_path / name, **more)

    tensors = gguf_files.gguf_tensors(Weights(directory))
    path = gguf_files.write_gguf(template("t.gguf", factors), tmp_path / "scaled.gguf", "f32", tensors)
    imported = gguf_files.import_gguf(path, tmp_path / "imported")
    ids = [torch.randint(10, len(vocabulary), (400,), generator=torch.manual_seed(0)).tolist()]
    ours, before = (torch_logits(load_plain(d, torch.float32), ids) for d in (imported, directory))
    worker.load("m", path)
    assert proof.kl_and_agreement(ours, worker.next_logits("m", ids))[0] < 1e-5
    assert np.allclose(ours, before, atol=1e-3)
    with pytest.raises(ExportError, match="rope_freqs are not Llama 3.1's"):
        gguf_files.import_gguf(template("odd.gguf", factors[::-1].copy()), tmp_path / "odd")


# ---------------------------------------------------------------------------- the proof's arithmetic


def logits(seed, scale=1.0, rows=40, size=200):
    return scale * np.random.default_rng(seed).standard_normal((rows, size)).astype(np.float32)


def test_kept_tells_noise_from_loss():
    base, learned = logits(0, 3), logits(1)
    trained = base + learned
    assert proof.kept(base, trained, trained) == pytest.approx(1)
    assert proof.kept(base, trained, base) == pytest.approx(0)
    # a constant on all logits is no change
    assert proof.kept(base, trained, base + 0.3 * learned + 5) == pytest.approx(0.3)
    noisy = trained + logits(2, 1.5)
    # KL alone would call it worse than the base
    assert proof.kl_and_agreement(trained, noisy)[0] > proof.kl_and_agreement(trained, base)[0]
    assert proof.kept(base, trained, noisy) == pytest.approx(1, abs=0.15)


def test_verdict():
    cases = [  # KL of the export, KL of the base, share kept, quantized?
        (1e-5, 2.0, 1.0, False, "ok"),
        (0.19, 2.0, 0.95, False, "ok"),
        (0.3, 2.0, 0.95, False, "lost"),  # an exact type has no excuse
        (0.3, 2.0, 0.95, True, "noisy"),
        (0.3, 2.0, 0.4, True, "lost"),  # the movement is gone
        (2.5, 2.0, 0.9, True, "lost"),  # the noise is larger than the whole effect
        (2.0, 2.0, 0.0, False, "lost"),  # the bare base
        (1e-4, 1e-4, 0.0, False, "lost"),  # the bare base, after little training
        (5e-5, 1e-4, 1.0, False, "ok"),  # little training, all there; the rest is the loader's arithmetic
        (5e-5, 0.0, 0.3, False, "ok"),  # no training at all: nothing to lose
        (float("nan"), 2.0, 1.0, False, "lost"),
        (1e-5, 2.0, float("nan"), True, "lost"),
    ]
    for *numbers, expected in cases:
        assert proof.verdict(*numbers)[0] == expected, numbers


def test_places_of_one_dialogue_share_a_pass(tiny):
    """(That the logits are those of each prompt alone is in test_base.py.)"""
    model, calls = tiny("llama"), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    torch_logits(model, [[1, 2, 3, 4, 5], [1, 2, 3], [9, 8], [1, 2], [9, 8, 7], [1, 2, 3]])
    assert len(calls) == 2


# ---------------------------------------------------------------------------- what is refused, in one line


def refused(function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_adapter_that_cannot_be_merged_is_one_line(tiny_directory, tmp_path):
    from safetensors.torch import load_file, save_file

    base, adapter = tiny_directory("llama"), tmp_path / "adapter"
    make_adapter(base, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    cases = [
        ({"use_dora": True}, "use_dora is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"bias": "all"}, "trained biases"),
        ({"init_lora_weights": "pissa"}, "changes the base's own weights"),
        ({"peft_type": "IA3"}, "not a LoRA"),
        ({"r": None}, "without r and lora_alpha"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is not supported"),
    ]
    for changes, words in cases:
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        assert words in refused(read_adapter, adapter)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    whole, name = path.read_bytes(), next(iter(tensors))
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    for how in ("half", "not a number", "only A", "gone"):
        path.write_bytes(whole)
        if how == "half":
            path.write_bytes(whole[:1000])
        elif how == "not a number":
            save_file({**tensors, name: tensors[name] * float("nan")}, path)
        elif how == "only A":
            save_file({name: tensors[name] for name in tensors if "lora_B" not in name}, path)
        else:
            path.unlink()
        assert str(adapter) in refused(Weights, base, 16, adapter), how
    (adapter / "adapter_config.json").write_text("{")
    assert str(adapter) in refused(Weights, base, 16, adapter)


def test_another_models_adapter_or_template_is_refused(tiny_directory, template_of, tmp_path):
    base = tiny_directory("llama", "base")
    other = tiny_directory("llama", "other", num_hidden_layers=3, hidden_size=48)
    qwen = tiny_directory("qwen2", "qwen")
    make_adapter(other, tmp_path / "adapter")
    assert "adapter of another base" in refused(Weights, base, 16, tmp_path / "adapter")
    template = template_of(other, tmp_path / "other.gguf")
    sizes = "a llama of 3 layers x 48, 97 tokens; the model is a llama of 2 layers x 32, 97 tokens"
    check = gguf_files.check_template
    assert sizes in refused(check, template, Weights(base))
    assert "the model is a qwen2" in refused(check, template_of(base, tmp_path / "b.gguf"), Weights(qwen))
    split = template_of(base, tmp_path / "split.gguf", metadata={"split.count": 3})
    assert "one part of a split GGUF" in refused(check, split, Weights(base))
    # qwen2 has biases that llama has not: they would have stayed in the file as they were
    tensors = gguf_files.gguf_tensors(Weights(qwen))
    tensors.pop("blk.0.attn_q.bias")
    arguments = (template_of(qwen, tmp_path / "q.gguf"), tmp_path / "out.gguf", "f16", tensors)
    assert "a tensor 'blk.0.attn_q.bias' that the model has not" in refused(gguf_files.write_gguf, *arguments)
    assert not (tmp_path / "out.gguf").exists() and not list(tmp_path.glob(".*"))


def test_formats_are_checked_at_the_command_line(tmp_path):
    unknown = "'q99' is not one of merged, lora, modelfile or a GGUF type"
    for text, words in (("q99", unknown), ("iq1_s", "needs an importance matrix"), (",", "no format given")):
        assert words in failed(f"export {tmp_path} --to {tmp_path}/out --formats {text}", code=2)
    assert formats.parse_formats(" merged, Q8_0,merged ") == ["merged", "q8_0"]
    offered = {"f16", "bf16", "f32", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_s", "iq4_xs", "q4_0"}
    assert offered <= set(gguf_files.file_types())


# ---------------------------------------------------------------------------- the command


def failed(line, code=1):
    """The error of a command line that is refused."""
    result = command(line, ok=False)
    assert result.exit_code == code and "Traceback" not in result.output, (result.output, result.exception)
    return result.stderr


def book_in(directory):
    return json.loads((directory / "export.json").read_text())


@pytest.fixture
def template(vocabulary, tiny_directory, template_of, tmp_path):
    """A GGUF of the base `hub-base` of the run: a random little llama."""
    base = tiny_directory("llama", "hub-base", **SIZES, **ids_of(vocabulary))
    return template_of(base, tmp_path / "template.gguf", tokens=vocabulary, chat_template=CHAT)


@pytest.fixture
def run(template, tmp_path):
    """A finished run on `hub-base`, with a LoRA that changes much."""
    base = tmp_path / "hub-base"
    gguf_tokenizer.import_tokenizer(template).save_pretrained(base)
    make_adapter(base, tmp_path / "run" / "adapter")
    facts = {"command": "sft", "options": {}, "status": "done", "bits": 16, "model": "someone/hub-base"}
    facts |= {"base": str(base), "base_gguf": None, "base_hash": k.file_hash(base)}
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts))
    return tmp_path / "run"


def line_of(run, to, formats, more=""):
    rows = run.parent / "rows.jsonl"
    lines = (DATA / "eval.jsonl").read_text(encoding="utf-8").splitlines(True)
    rows.write_text("".join(lines[:2]), encoding="utf-8")
    return f"export {run} --to {to} --formats {formats} --answers 0 --data {rows} {more}"


def export(*arguments):
    return command(line_of(*arguments))


def lost(*arguments):
    return failed(line_of(*arguments))


def test_a_hub_base_exports_without_a_gguf_and_with_one(run, template, tmp_path):
    error = lost(run, tmp_path / "a", "merged,lora,q8_0")
    assert "came without a GGUF" in error and "--gguf-template" in error and not (tmp_path / "a").exists()
    assert "as PEFT adapter only" in export(run, tmp_path / "a", "merged,lora").stderr
    config = json.loads((tmp_path / "a" / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/hub-base"
    # once the template is there, the GGUF LoRA is added to what is there
    result = export(run, tmp_path / "a", "lora", f"--gguf-template {template}")
    book = book_in(tmp_path / "a")["formats"]
    assert set(book) == {"merged", "lora", "lora gguf"}
    assert (tmp_path / "a" / book["lora gguf"]["file"]).exists()
    # people will put the LoRA on the template, whose own weights are 0 here: far from what was trained
    assert book["lora gguf"]["kl_on_template"] > book["lora gguf"]["kl"]
    assert "on the base's own GGUF its KL" in result.stderr
    wrong = {f"--gguf-template {tmp_path}/nothing.gguf": "no such GGUF file"}
    wrong[f"--llama-cpp {tmp_path}"] = "no convert_hf_to_gguf.py there"
    for more, words in wrong.items():
        assert words in lost(run, tmp_path / "c", "f16", more) and not (tmp_path / "c").exists()


def test_an_export_that_was_stopped_goes_on_and_another_is_kept_out(run, template, tmp_path, monkeypatch):
    out, calls, write = tmp_path / "out", [], formats.Exporter.write
    stop_at, more = ["q8_0"], f"--gguf-template {template}"

    def counted(self, kind, quantize):
        calls.append(kind)
        if kind in stop_at:
            raise KeyboardInterrupt
        return write(self, kind, quantize)

    monkeypatch.setattr(formats.Exporter, "write", counted)
    assert "the same command goes on" in lost(run, out, "merged,q8_0,f16", more)
    assert names_of(out) == ["export.json", "merged"]  # no half file, no hidden folder
    (out / ".part").mkdir()  # what a kill -9 would leave
    (out / ".part" / "half.gguf").write_bytes(b"x")
    stop_at.clear()
    calls.clear()
    result = export(run, out, "merged,q8_0,f16", more)
    assert calls == ["q8_0", "f16"] and "merged: already there, and proved" in result.stderr
    assert not (out / ".part").exists() and "merged" in result.stdout
    make_adapter(tmp_path / "hub-base", run / "adapter", seed=2)  # another training
    assert "another run or with other settings" in lost(run, out, "merged", more)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    assert "thesis.txt" in lost(run, tmp_path / "mine", "merged")
    assert names_of(tmp_path / "mine") == ["thesis.txt"]


def test_what_is_refused_before_the_work(run, tiny_directory, tmp_path, monkeypatch):
    adapter = run / "adapter"

    def refused(words):
        assert words in lost(run, tmp_path / "out", "merged") and not (tmp_path / "out").exists()

    with monkeypatch.context() as patch:
        patch.setattr(formats.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        refused("are free")
    make_adapter(tiny_directory("llama", "other", hidden_size=48), adapter)
    refused("another base")
    assert "another base" in failed(f"chat {run} --say hi")
    (adapter / "adapter_model.safetensors").write_bytes(b"\x00" * 9)
    refused("damaged adapter")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04.")
    refused("pickle")
    shutil.rmtree(adapter)
    refused("no adapter/")
    (tmp_path / "hub-base" / "generation_config.json").write_text("{}")
    refused("has changed since the training")


def test_a_template_with_another_tokenizer_is_caught(run, vocabulary, template_of, tmp_path):
    """Same shapes, same tensors, other words: the logits agree, for they are asked by token ids."""
    words = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    words += [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
    words += [(f"w{i}", -float(i), 1) for i in range(len(vocabulary) - len(words))]
    template = template_of(tmp_path / "hub-base", tmp_path / "template.gguf", tokens=words)
    error = lost(run, tmp_path / "out", "f16", f"--gguf-template {template}")
    assert "splits text into other tokens" in error
    entry = book_in(tmp_path / "out")["formats"]["f16"]
    assert entry["kl"] < 1e-3 and entry["same_tokens"] == 0


def test_one_lost_format_does_not_stain_the_others(run, template, tmp_path, monkeypatch):
    """A file that cannot be loaded fails alone; a later good one removes it; a Modelfile needs no proof."""
    out, write, more = tmp_path / "out", formats.Exporter.write, f"--gguf-template {template}"

    def spoil(self, kind, quantize):
        (artefact,) = write(self, kind, quantize)
        if kind == "f16":
            whole = artefact.path.read_bytes()
            artefact.path.write_bytes(whole[: len(whole) // 2])
        return [artefact]

    assert "none that passed its proof is there" in lost(run, out, "modelfile", more)
    assert not out.exists()
    monkeypatch.setattr(formats.Exporter, "write", spoil)
    assert "truncated GGUF" in lost(run, out, "f16,q8_0,modelfile", more)
    book = book_in(out)["formats"]
    assert not book["f16"]["ok"] and book["q8_0"]["ok"]
    assert book["modelfile"]["describes"] == book["q8_0"]["file"]
    assert book_in(run)["formats"] == book
    assert (out / (book["f16"]["file"])).name.endswith(".failed")
    export(run, out, "q8_0", more)  # nothing of what was asked for now is lost
    monkeypatch.setattr(formats.Exporter, "write", write)
    export(run, out, "f16", more)
    names = ["Modelfile", "export.json", "someone-hub-base-run-f16.gguf", "someone-hub-base-run-q8_0.gguf"]
    assert names_of(out) == names
    monkeypatch.setattr(proof.Proof, "measure_trained", lambda self: pytest.fail("nothing is to be measured"))
    shutil.move(out, tmp_path / "moved")
    export(run, tmp_path / "moved", "modelfile", more)
    assert "FROM ./someone-hub-base-run-q8_0.gguf" in (tmp_path / "moved" / "Modelfile").read_text()


def test_answers_are_judged_once_and_forgotten_with_their_questions(monkeypatch):
    """The book's mean scores, with a judge that is a table."""
    scores = {"good": 1.0, "bad": 0.0, "unread": None}

    def score(answers, rubric, judge, whole_text):
        assert whole_text
        return [k.Reward({"format": 1.0, "rubric": scores[text]}, {}, None) for _, text in answers]

    opened = []
    monkeypatch.setattr(run_export, "open_judge", lambda *a: (opened.append(a), {}))
    tools = run_export.Tools(None, score, "")
    book = {"trained": {"answers": ["good", "bad"]}, "formats": {"f16": {"answers": ["unread", "unread"]}}}
    asked, options = ["q1", "q2"], run_export.ExportOptions()
    run_export.rescore(book, asked, None, k.EMBEDDED, options, None, tools)
    assert book["trained"]["rubric"] == 0.5 and book["formats"]["f16"]["rubric"] is None
    assert book["judge"] == k.EMBEDDED and book["formats"]["f16"]["valid"] == 1.0
    run_export.rescore(book, asked, None, k.EMBEDDED, options, None, tools)
    assert len(opened) == 1
    run_export.forget_other_answers(book, "others")
    assert "answers" not in book["formats"]["f16"] and book["questions"] == "others"


# ---------------------------------------------------------------------------- disks and converters

CONVERTER = """import sys; sys.path.insert(0, {home!r})
from pathlib import Path
from kardia.models import gguf, weights
directory, _, kind, _, out = sys.argv[1:]
gguf.write_gguf(Path({template!r}), Path(out), kind, gguf.gguf_tensors(weights.Weights(Path(directory))))
"""
FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.path.insert(0, sys.argv[2])
sys.argv = sys.argv[2:]
import kardia_lite
kardia_lite.cli()
"""


@pytest.mark.slow
def test_llama_cpps_converter_is_used_where_given(run, template, tmp_path):
    """A stand-in converter: the real one was run on these architectures once; here it is how it is called."""
    checkout = tmp_path / "llama.cpp"
    checkout.mkdir()
    script = checkout / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER.format(home=str(PROJECT), template=str(template)))
    more = f"--llama-cpp {checkout}"
    export(run, tmp_path / "out", "f16,q5_0", more)
    book = book_in(tmp_path / "out")["formats"]
    assert book["f16"]["ok"] and book["q5_0"]["ok"]
    script.write_text("import sys; print('loading'); sys.exit('Model FooForCausalLM is not supported')")
    assert "Model FooForCausalLM is not supported" in lost(run, tmp_path / "bad", "f16", more)
    assert not names_of(tmp_path / "bad")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_full_disk_leaves_one_line_and_no_half_file(run, template, tmp_path):
    """The kernel lets no file grow beyond a limit (for q5_0 it is the bf16 file on the way)."""
    for kind in ("merged", "f16", "q5_0"):
        out = tmp_path / kind
        line = line_of(run, out, kind, f"--gguf-template {template}").split()
        start = [sys.executable, "-c", FULL, "300000", str(PROJECT)]
        done = subprocess.run([*start, *line], capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("Error: "), done.stderr
        assert not [p for p in out.rglob("*") if p.name != "export.json"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux's prlimit")
def test_llama_cpps_quantizer_failing_leaves_one_line_and_no_half_file(run, template, tmp_path, monkeypatch):
    """It returns an error and leaves what it had written; only the worker's own files are limited here."""
    import resource

    quantize = Worker.quantize

    def on_a_full_disk(self, source, target, kind):
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
        quantize(self, source, target, kind)

    monkeypatch.setattr(Worker, "quantize", on_a_full_disk)
    error = lost(run, tmp_path / "out", "f16,q5_0", f"--gguf-template {template}")
    assert "llama.cpp could not quantize to q5_0" in error
    assert names_of(tmp_path / "out") == ["export.json", "someone-hub-base-run-f16.gguf"]
