"""What leaves a run: weights, GGUF of six architectures, LoRA as GGUF, the proof's arithmetic, and everything that can go wrong."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import kardia_lite as k
from kardia.export import formats, proof
from kardia.models import gguf as gguf_files
from kardia.models import gguf_tokenizer, weights
from kardia.models.weights import ExportError, Weights, read_adapter, write_merged

GEMMA2 = {
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
ROOMY = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}  # rows that divide by Q8_0's 32
FAMILIES = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", GEMMA2),
    "gemma3": ("gemma3_text", {"sliding_window": 16, "query_pre_attn_scalar": 16, "num_hidden_layers": 7}),
}


@pytest.fixture
def family(request, tiny_directory, template_of, tmp_path):
    kind, changes = FAMILIES[request.param]
    directory = tiny_directory(kind, **{**ROOMY, **changes})
    return directory, template_of(directory, tmp_path / "template.gguf")


def make_adapter(directory, path, seed=1, size=0.3, **changes):
    """A LoRA with something in it, on all linear layers of the model in `directory`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = get_peft_model(
        model,
        LoraConfig(
            **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
        ),
    )
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = size * torch.randn_like(weight)
    model.save_pretrained(path)
    return model.eval()


PROMPTS = [[1, *range(3, 40)], [1, 50, 7, 7, 60], [1, 90]]


def llama_logits(path, lora=None):
    with k.Worker() as worker:
        worker.load("m", path)
        worker.set_lora("m", lora)
        return worker.next_logits("m", PROMPTS)


def far_below(trained, other, base, share=0.02):
    """KL(trained || other), and that it is far below what the LoRA moved the base."""
    kl, effect = proof.kl_and_agreement(trained, other)[0], proof.kl_and_agreement(trained, base)[0]
    assert effect > 0.01 and kl < share * effect, (kl, effect)
    return kl


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_every_architecture_computes_the_same_in_llama_cpp(family, tmp_path):
    """Base + LoRA in torch against the GGUF written without any converter: q/k permuted, norms + 1, biases, tied heads."""
    directory, template = family
    model = make_adapter(directory, tmp_path / "adapter")
    trained = k.torch_logits(model, PROMPTS)
    with model.disable_adapter():
        base = k.torch_logits(model, PROMPTS)
    for kind, share in (("f32", 1e-4), ("f16", 1e-3), ("bf16", 0.02), ("q8_0", 0.05)):
        path = gguf_files.write_gguf(
            template,
            tmp_path / f"{kind}.gguf",
            kind,
            gguf_files.gguf_tensors(Weights(directory, 16, tmp_path / "adapter")),
        )
        logits = llama_logits(path)
        far_below(trained, logits, base, share)
        assert abs(proof.kept(base, trained, logits) - 1) < 0.1


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {
            "alpha_pattern": {"q_proj": 1, "layers.1.mlp.up_proj": 32},
            "rank_pattern": {"k_proj": 2, "down_proj": 8},
            "use_rslora": True,
        },
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_a_lora_gguf_scales_as_peft_does(family, changes, tmp_path):
    directory, template = family
    model = make_adapter(directory, tmp_path / "adapter", size=0.2, **changes)
    trained = k.torch_logits(model, PROMPTS)
    with model.disable_adapter():
        base = k.torch_logits(model, PROMPTS)
    config, pairs = read_adapter(tmp_path / "adapter")
    lora = gguf_files.write_lora_gguf(
        config, pairs, json.loads((directory / "config.json").read_text()), tmp_path / "lora.gguf"
    )
    on = gguf_files.write_gguf(
        template, tmp_path / "base.gguf", "f32", gguf_files.gguf_tensors(Weights(directory))
    )
    far_below(trained, llama_logits(on, lora), base, 1e-3)  # what is left is llama.cpp's float16 cache
    merged = write_merged(Weights(directory, 16, tmp_path / "adapter"), tmp_path / "merged", [2])
    far_below(trained, k.torch_logits(k.load_plain(merged, torch.float32), PROMPTS), base)


def test_merging_is_what_peft_merges(tiny_directory, tmp_path):
    """An oracle beside our arithmetic: PEFT's own merge_and_unload, on a float32 base so that nothing is rounded."""
    directory = tiny_directory("qwen3")
    model = make_adapter(
        directory, tmp_path / "adapter", alpha_pattern={"v_proj": 3}, rank_pattern={"o_proj": 2}
    )
    ours = Weights(directory, 16, tmp_path / "adapter")
    theirs = model.merge_and_unload().state_dict()
    assert set(ours) == set(theirs)
    for name in ours:
        assert torch.allclose(ours.read(name), theirs[name], atol=1e-6), name


def test_a_large_model_is_written_in_shards(tiny_directory, tmp_path):
    directory = tiny_directory("llama")
    make_adapter(directory, tmp_path / "adapter")
    whole, parts = (
        write_merged(Weights(directory, 16, tmp_path / "adapter"), tmp_path / name, [2, 5], **how)
        for name, how in (("whole", {}), ("parts", {"shard_bytes": 20_000}))
    )
    files = sorted(p.name for p in parts.glob("*.safetensors"))
    assert (
        len(files) > 2
        and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        and all((parts / f).stat().st_size < 24_000 for f in files)
    )
    assert np.array_equal(*(k.torch_logits(k.load_plain(p, torch.float32), PROMPTS) for p in (whole, parts)))
    assert json.loads((parts / "generation_config.json").read_text())["eos_token_id"] == [2, 5]
    # a merged, sharded model is a base like any other; and an incomplete one is told by name
    assert sorted(Weights(parts)) == sorted(Weights(directory))
    (parts / files[1]).unlink()
    with pytest.raises(ExportError, match=f"{files[1]}: this part of the model is missing"):
        Weights(parts)


def test_copies_of_the_weights_in_a_hub_snapshot_are_not_read(tiny_directory, tmp_path):
    """Mistral's snapshots hold consolidated.safetensors besides, with the same weights under other names."""
    from safetensors.torch import save_file

    directory = tiny_directory("mistral")
    before = sorted(Weights(directory))
    save_file({"layers.0.attention.wq.weight": torch.zeros(4, 4)}, directory / "consolidated.safetensors")
    assert sorted(Weights(directory)) == before


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_theta": 5e5}),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                    "sliding_attention": {"rope_theta": 1e4},
                }
            },
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        ({"rope_theta": 7e4}, {"rope_theta": 7e4}),
    ],
)
def test_transformers_4_finds_its_keys(tmp_path, rope, expected):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", **rope}))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    weights.add_compatibility_keys(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {key: config.get(key) for key in expected} == expected and config["torch_dtype"] == "bfloat16"
    assert (
        json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )


# ---------------------------------------------------------------------------------- SentencePiece


def pieces_of(texts, size=500):
    """A SentencePiece vocabulary as a GGUF holds it, [(piece, score, kind)]: bytes, characters, then merges, the frequent ones first."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    merges = [tuple(m) for m in json.loads(learner.to_str())["model"]["merges"]]
    made = ["".join(m) for m in merges]
    tokens = [
        ("<unk>", 0.0, 2),
        ("<bos>", 0.0, 3),
        ("<eos>", 0.0, 3),
        ("<pad>", 0.0, 3),
        ("<start_of_turn>", 0.0, 3),
        ("<end_of_turn>", 0.0, 3),
        ("\n\n", 0.0, 4),
    ]
    tokens += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    tokens += [(c, -1e6, 1) for c in sorted({c for t in texts for c in t.replace(" ", "▁")})]
    seen = {t for t, *_ in tokens}
    return tokens + [
        (piece, -float(i), 1) for i, piece in enumerate(made) if piece not in seen and not seen.add(piece)
    ]


CHAT = "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + m['content'] + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"


@pytest.fixture
def gemma_gguf(tiny_directory, template_of, tmp_path):
    """A whole little model of a second family in one GGUF: random weights, a SentencePiece tokenizer, a chat template without a system role."""
    texts = [
        json.loads(line)["messages"][0]["content"]
        for line in (k.DATA / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    tokens = pieces_of(texts)
    directory = tiny_directory(
        "gemma3_text",
        **{
            **ROOMY,
            "sliding_window": 64,
            "query_pre_attn_scalar": 16,
            "num_hidden_layers": 2,
            "max_position_embeddings": 2048,
            "vocab_size": len(tokens),
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 3,
        },
    )
    template = template_of(directory, tmp_path / "template.gguf", tokens=tokens, chat_template=CHAT)
    return gguf_files.write_gguf(
        template, tmp_path / "little-gemma.gguf", "q8_0", gguf_files.gguf_tensors(Weights(directory))
    )


def test_a_sentencepiece_tokenizer_splits_as_llama_cpp_does(gemma_gguf, tmp_path):
    """transformers reads such a vocabulary as a Unigram model; once saved, its gemma class even split words into characters."""
    from transformers import AutoTokenizer

    lines = [
        json.loads(line)["messages"][1]["content"]
        for line in (k.DATA / "eval.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    ]
    texts = [
        *lines,
        "I've 1234 cats\n\nand   naïve 你好! \U0001f642",
        " leading",
        "trailing ",
        "<bos><start_of_turn>user\nhi<end_of_turn>\n",
    ]
    tokenizer = gguf_tokenizer.import_tokenizer(gemma_gguf)
    tokenizer.save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    with k.Worker() as worker:
        worker.load("m", gemma_gguf)
        expected = worker.tokenize("m", texts, special=True)
    for some in (tokenizer, again):
        assert [some(t, add_special_tokens=False)["input_ids"] for t in texts] == expected
        assert [some.decode(ids, skip_special_tokens=False) for ids in expected] == texts
    assert max(map(len, expected)) < max(map(len, texts)) / 2  # words, not characters


def test_a_second_family_goes_the_whole_way(gemma_gguf, tmp_path):
    """GGUF in, SFT, GGUF out, every format proved: nothing in it is SmolLM2's own."""
    from click.testing import CliRunner

    def run(*arguments):
        result = CliRunner().invoke(k.cli, [str(a) for a in arguments])
        assert result.exit_code == 0, (result.output, result.exception)
        return result

    run(
        "sft",
        "--model",
        gemma_gguf,
        "--limit",
        8,
        "--max-steps",
        20,
        "--batch-size",
        2,
        "--max-length",
        2000,
        "--learning-rate",
        3e-2,
        "--out",
        tmp_path / "run",
    )
    result = run(
        "export",
        tmp_path / "run",
        "--to",
        tmp_path / "out",
        "--formats",
        "merged,F16,bf16,q8_0,lora,modelfile",
        "--answers",
        2,
        "--max-tokens",
        8,
        "--judge",
        gemma_gguf,
        "--exam-pairs",
        one_pair(tmp_path),
    )
    book = json.loads((tmp_path / "out" / "export.json").read_text())["formats"]
    assert set(book) == {"merged", "f16", "bf16", "q8_0", "lora", "lora gguf", "modelfile"}
    assert all(e["ok"] for e in book.values()), result.output
    for name, entry in book.items():
        if name != "modelfile":
            assert (
                entry["kl"] < 0.05 * entry["kl_base"]
                and entry["kept"] > 0.9
                and entry.get("same_tokens", 1) == 1
            ), (name, entry)
    assert json.loads((tmp_path / "out" / "merged" / "generation_config.json").read_text())[
        "eos_token_id"
    ] == [5, 2]  # <end_of_turn>, <eos>
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert (
        'PARAMETER stop "<end_of_turn>"' in modelfile
        and "<start_of_turn>model" in modelfile
        and '"<bos>' not in modelfile.split("PARAMETER")[0]
    )
    assert not list((tmp_path / "out").glob(".*"))


def one_pair(tmp_path):
    """Two exam pairs per criterion: enough to run it."""
    lines, seen = [], {}
    for line in (k.DATA / "judge_exam.jsonl").read_text(encoding="utf-8").splitlines():
        criterion = json.loads(line)["criterion"]
        seen[criterion] = seen.get(criterion, 0) + 1
        lines += [line] if seen[criterion] <= 2 else []
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "pairs.jsonl"


# ---------------------------------------------------------------------------------- the proof's arithmetic


def logits(seed, scale=1.0, rows=40, size=200):
    return scale * np.random.default_rng(seed).standard_normal((rows, size)).astype(np.float32)


def test_kept_tells_noise_from_loss():
    base, learned = logits(0, 3), logits(1)
    trained = base + learned
    assert proof.kept(base, trained, trained) == pytest.approx(1)
    assert proof.kept(base, trained, base) == pytest.approx(0)
    assert proof.kept(base, trained, base + 0.3 * learned + 5) == pytest.approx(
        0.3
    )  # a constant on all logits is no change
    noisy = trained + logits(2, 1.5)
    assert (
        proof.kl_and_agreement(trained, noisy)[0] > proof.kl_and_agreement(trained, base)[0]
    )  # KL alone would call it worse than the base
    assert proof.kept(base, trained, noisy) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("kl", "effect", "share", "quantized", "expected"),
    [
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
    ],
)
def test_verdict(kl, effect, share, quantized, expected):
    assert proof.verdict(kl, effect, share, quantized)[0] == expected


def test_places_of_one_dialogue_share_a_pass(tiny):
    model = tiny("llama")
    prompts = [[1, 2, 3, 4, 5], [1, 2, 3], [9, 8], [1, 2], [9, 8, 7], [1, 2, 3]]
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    together = k.torch_logits(model, prompts)
    assert len(calls) == 2
    for row, prompt in zip(together, prompts):
        assert np.allclose(row, model(input_ids=torch.tensor([prompt])).logits[0, -1].numpy(), atol=1e-5)


# ---------------------------------------------------------------------------------- what is refused, in one line


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"use_dora": True}, "use_dora is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"bias": "all"}, "trained biases"),
        ({"init_lora_weights": "pissa"}, "changes the base's own weights"),
        ({"peft_type": "IA3"}, "not a LoRA"),
        ({"r": None}, "without r and lora_alpha"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is not supported"),
    ],
)
def test_what_a_merge_would_lose_is_refused(tiny_directory, tmp_path, changes, told):
    make_adapter(tiny_directory("llama"), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ExportError, match=told) as error:
        read_adapter(tmp_path / "adapter")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["half", "not a number", "only A", "no json", "gone"])
def test_a_broken_adapter_is_one_line(tiny_directory, tmp_path, how):
    from safetensors.torch import load_file, save_file

    make_adapter(tiny_directory("llama"), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    if how == "half":
        path.write_bytes(path.read_bytes()[:1000])
    elif how == "not a number":
        save_file({**tensors, name: tensors[name] * float("nan")}, path)
    elif how == "only A":
        save_file({name: tensors[name] for name in tensors if "lora_B" not in name}, path)
    elif how == "no json":
        (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    else:
        path.unlink()
    with pytest.raises(ExportError) as error:
        Weights(tmp_path / "base", 16, tmp_path / "adapter")
    assert str(tmp_path / "adapter") in str(error.value) and "\n" not in str(error.value)


def test_an_adapter_or_a_template_of_another_model_is_told_before_anything_is_written(
    tiny_directory, template_of, tmp_path
):
    base, other = (
        tiny_directory("llama", "base"),
        tiny_directory("llama", "other", num_hidden_layers=3, hidden_size=48),
    )
    make_adapter(other, tmp_path / "adapter")
    with pytest.raises(ExportError, match="adapter of another base"):
        Weights(base, 16, tmp_path / "adapter")
    template = template_of(other, tmp_path / "other.gguf")
    with pytest.raises(
        ExportError,
        match="a llama of 3 layers x 48, 97 tokens; the model is a llama of 2 layers x 32, 97 tokens",
    ):
        gguf_files.check_template(template, Weights(base))
    qwen = tiny_directory("qwen2", "qwen")
    with pytest.raises(ExportError, match="a llama of .*; the model is a qwen2"):
        gguf_files.check_template(template_of(base, tmp_path / "base.gguf"), Weights(qwen))
    with pytest.raises(ExportError, match="one part of a split GGUF"):
        gguf_files.check_template(
            template_of(base, tmp_path / "split.gguf", metadata={"split.count": 3}), Weights(base)
        )
    phi = tiny_directory("phi", "phi")
    with pytest.raises(ExportError, match="'phi' has no GGUF mapping here"):
        gguf_files.gguf_tensors(Weights(phi))


def test_a_template_with_tensors_the_model_has_not_is_refused(tiny_directory, template_of, tmp_path):
    """qwen2 has biases that llama has not: they would have stayed in the file as they were."""
    qwen, plain = tiny_directory("qwen2", "qwen"), tiny_directory("qwen2", "plain")
    template = template_of(qwen, tmp_path / "template.gguf")
    tensors = gguf_files.gguf_tensors(Weights(plain))
    tensors.pop("blk.0.attn_q.bias")
    with pytest.raises(ExportError, match="a tensor 'blk.0.attn_q.bias' that the model has not"):
        gguf_files.write_gguf(template, tmp_path / "out.gguf", "f16", tensors)
    assert not (tmp_path / "out.gguf").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("formats", "told"),
    [
        ("q99", "'q99' is not one of merged, lora, modelfile or a GGUF type"),
        ("iq1_s", "needs an importance matrix"),
        (",", "no format given"),
    ],
)
def test_formats_are_checked_at_the_command_line(tmp_path, formats, told):
    from click.testing import CliRunner

    result = CliRunner().invoke(
        k.cli, ["export", str(tmp_path), "--to", str(tmp_path / "out"), "--formats", formats]
    )
    assert result.exit_code == 2 and told in result.stderr and "Traceback" not in result.output


def test_every_type_that_needs_no_calibration_is_offered():
    assert {"f16", "bf16", "f32", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_s", "iq4_xs", "q4_0"} <= set(
        gguf_files.file_types()
    )
    assert formats.parse_formats(" merged, Q8_0,merged ") == ["merged", "q8_0"]


@pytest.fixture
def small_run(tiny_directory, template_of, tmp_path, renderer, embedded):
    """A finished run on a random little llama that has the embedded model's tokenizer, with a LoRA that changes much."""
    base = tiny_directory(
        "llama",
        "hub-base",
        **{
            **ROOMY,
            "vocab_size": 49152,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "max_position_embeddings": 2048,
        },
    )
    for file in embedded.directory.iterdir():
        if (
            file.suffix in (".json", ".jinja")
            and "config.json" != file.name
            and "generation" not in file.name
        ):
            shutil.copy(file, base)
    make_adapter(base, tmp_path / "run" / "adapter")
    facts = {
        "command": "sft",
        "options": {},
        "status": "done",
        "bits": 16,
        "model": "someone/hub-base",
        "base": str(base),
        "base_gguf": None,
        "base_hash": k.file_hash(base),
    }
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts))
    return tmp_path / "run", base


def export_command(*arguments, **how):
    from click.testing import CliRunner

    return CliRunner().invoke(k.cli, ["export", *map(str, arguments), "--answers", "0"], **how)


def test_a_hub_base_exports_without_a_gguf_and_with_one(small_run, template_of, embedded, tmp_path):
    run, base = small_run
    result = export_command(run, "--to", tmp_path / "a", "--formats", "merged,lora,q8_0")
    assert (
        result.exit_code == 1
        and "came without a GGUF" in result.stderr
        and "--gguf-template" in result.stderr
        and not (tmp_path / "a").exists()
    )
    result = export_command(run, "--to", tmp_path / "a", "--formats", "merged,lora")
    assert result.exit_code == 0 and "as PEFT adapter only" in result.stderr, result.output
    assert (
        json.loads((tmp_path / "a" / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "someone/hub-base"
    )
    template = template_of(base, tmp_path / "template.gguf", like=embedded.template)
    result = export_command(run, "--to", tmp_path / "b", "--formats", "f16,lora", "--gguf-template", template)
    book = json.loads((tmp_path / "b" / "export.json").read_text())["formats"]
    assert result.exit_code == 0 and set(book) == {"f16", "lora", "lora gguf"}, result.output
    result = export_command(
        run, "--to", tmp_path / "c", "--formats", "f16", "--gguf-template", tmp_path / "nothing.gguf"
    )
    assert result.exit_code == 1 and "no such GGUF file" in result.stderr and not (tmp_path / "c").exists()
    result = export_command(run, "--to", tmp_path / "c", "--formats", "f16", "--llama-cpp", tmp_path)
    assert (
        result.exit_code == 1
        and "no convert_hf_to_gguf.py there" in result.stderr
        and not (tmp_path / "c").exists()
    )


def test_llama_cpps_converter_is_used_where_given_and_its_failure_is_one_line(
    small_run, template_of, embedded, tmp_path
):
    """A stand-in converter: the real one was run on these architectures once; here it is how it is called and what comes of its end."""
    run, base = small_run
    template = template_of(base, tmp_path / "template.gguf", like=embedded.template)
    checkout = tmp_path / "llama.cpp"
    checkout.mkdir()
    (checkout / "convert_hf_to_gguf.py").write_text(
        f"import sys; sys.path.insert(0, {str(k.HERE)!r})\nfrom pathlib import Path\nfrom kardia import gguf_io\nfrom kardia.weights import Weights\n"
        "directory, _, kind, _, out = sys.argv[1:]\n"
        f"gguf_io.write_gguf(Path({str(template)!r}), Path(out), kind, gguf_io.gguf_tensors(Weights(Path(directory))))\n"
    )
    result = export_command(run, "--to", tmp_path / "out", "--formats", "f16,q5_0", "--llama-cpp", checkout)
    book = json.loads((tmp_path / "out" / "export.json").read_text())["formats"]
    assert result.exit_code == 0 and book["f16"]["ok"] and book["q5_0"]["ok"], result.output
    (checkout / "convert_hf_to_gguf.py").write_text(
        "import sys; print('loading'); sys.exit('Model FooForCausalLM is not supported')"
    )
    result = export_command(run, "--to", tmp_path / "bad", "--formats", "f16", "--llama-cpp", checkout)
    assert (
        result.exit_code == 1
        and "Model FooForCausalLM is not supported" in result.stderr
        and list((tmp_path / "bad").iterdir()) == []
    )


def test_the_same_command_goes_on_and_another_is_kept_out(
    small_run, template_of, embedded, tmp_path, monkeypatch
):
    run, base = small_run
    template = template_of(base, tmp_path / "template.gguf", like=embedded.template)
    arguments = run, "--to", tmp_path / "out", "--gguf-template", template, "--formats"
    write, calls = formats.Exporter.write, []

    def stopped(self, kind, quantize):
        calls.append(kind)
        if kind == "q8_0":
            raise KeyboardInterrupt
        return write(self, kind, quantize)

    monkeypatch.setattr(formats.Exporter, "write", stopped)
    result = export_command(*arguments, "merged,q8_0,f16")
    assert result.exit_code == 1 and "the same command goes on" in result.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "export.json",
        "merged",
    ]  # no half file, no hidden folder
    (tmp_path / "out" / ".part").mkdir()  # what a kill -9 would leave
    (tmp_path / "out" / ".part" / "half.gguf").write_bytes(b"x")
    monkeypatch.setattr(
        formats.Exporter,
        "write",
        lambda self, kind, quantize: calls.append(kind) or write(self, kind, quantize),
    )
    calls.clear()
    result = export_command(*arguments, "merged,q8_0,f16")
    assert (
        result.exit_code == 0
        and calls == ["q8_0", "f16"]
        and "merged: already there, and proved" in result.stderr
    ), result.output
    assert not (tmp_path / "out" / ".part").exists() and "merged" in result.stdout
    make_adapter(base, run / "adapter", seed=2)  # another training
    result = export_command(*arguments, "merged")
    assert result.exit_code == 1 and "another run or with other settings" in result.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    result = export_command(run, "--to", tmp_path / "mine", "--formats", "merged")
    assert (
        result.exit_code == 1
        and "thesis.txt" in result.stderr
        and [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    )


def test_a_disk_too_small_is_told_before_the_work(small_run, tmp_path, monkeypatch):
    run, _ = small_run
    monkeypatch.setattr(formats.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    result = export_command(run, "--to", tmp_path / "out", "--formats", "merged")
    assert result.exit_code == 1 and "are free" in result.stderr and not (tmp_path / "out").exists()


def test_a_gguf_lora_is_added_once_the_template_is_there(small_run, template_of, embedded, tmp_path):
    run, base = small_run
    assert export_command(run, "--to", tmp_path / "out", "--formats", "lora").exit_code == 0
    template = template_of(base, tmp_path / "template.gguf", like=embedded.template)
    result = export_command(run, "--to", tmp_path / "out", "--formats", "lora", "--gguf-template", template)
    book = json.loads((tmp_path / "out" / "export.json").read_text())["formats"]
    assert (
        result.exit_code == 0
        and set(book) == {"lora", "lora gguf"}
        and (tmp_path / "out" / book["lora gguf"]["file"]).exists()
    ), result.output
    # the template's own weights are 0 here, so the LoRA on it is far from what was trained: told, for that is where people will put it
    assert (
        book["lora gguf"]["kl_on_template"] > book["lora gguf"]["kl"]
        and "on the base's own GGUF its KL" in result.stderr
    )


def test_a_template_with_another_tokenizer_is_caught(small_run, template_of, embedded, tmp_path):
    """Same shapes, same tensors, other words: the logits agree, for they are asked by token ids."""
    run, base = small_run
    words = [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("</s>", 0.0, 3),
        *((f"<0x{i:02X}>", 0.0, 6) for i in range(256)),
    ]
    words += [(f"w{i}", -float(i), 1) for i in range(49152 - len(words))]
    template = template_of(base, tmp_path / "template.gguf", tokens=words)
    result = export_command(run, "--to", tmp_path / "out", "--formats", "f16", "--gguf-template", template)
    entry = json.loads((tmp_path / "out" / "export.json").read_text())["formats"]["f16"]
    assert (
        result.exit_code == 1
        and entry["kl"] < 1e-3
        and entry["same_tokens"] == 0
        and "splits text into other tokens" in result.stderr
    ), result.output


def test_one_lost_format_does_not_stain_the_others(small_run, template_of, embedded, tmp_path, monkeypatch):
    """A file that llama.cpp cannot load fails alone; a later call that succeeds says so; the failed file goes once a good one is there."""
    run, base = small_run
    template = template_of(base, tmp_path / "template.gguf", like=embedded.template)
    write = formats.Exporter.write

    def spoil(self, kind, quantize):
        (artefact,) = write(self, kind, quantize)
        if kind == "f16":
            artefact.path.write_bytes(artefact.path.read_bytes()[:10_000_000])
        return [artefact]

    monkeypatch.setattr(formats.Exporter, "write", spoil)
    arguments = run, "--to", tmp_path / "out", "--gguf-template", template, "--formats"
    result = export_command(*arguments, "f16,q8_0,modelfile")
    book = json.loads((tmp_path / "out" / "export.json").read_text())["formats"]
    assert (
        result.exit_code == 1
        and "truncated GGUF" in result.stderr
        and not book["f16"]["ok"]
        and book["q8_0"]["ok"]
        and book["modelfile"]["describes"] == book["q8_0"]["file"]
    ), result.output
    assert json.loads((run / "export.json").read_text())["formats"] == book
    assert export_command(*arguments, "q8_0").exit_code == 0  # nothing of what was asked for now is lost
    monkeypatch.setattr(formats.Exporter, "write", write)
    assert export_command(*arguments, "f16").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "Modelfile",
        "export.json",
        "someone-hub-base-run-f16.gguf",
        "someone-hub-base-run-q8_0.gguf",
    ]


def test_a_modelfile_alone_needs_a_gguf_and_no_proof(small_run, template_of, embedded, tmp_path, monkeypatch):
    run, base = small_run
    arguments = (
        run,
        "--to",
        tmp_path / "out",
        "--gguf-template",
        template_of(base, tmp_path / "template.gguf", like=embedded.template),
        "--formats",
    )
    result = export_command(*arguments, "modelfile")
    assert (
        result.exit_code == 1
        and "none that passed its proof is there" in result.stderr
        and not (tmp_path / "out").exists()
    )
    assert export_command(*arguments, "q8_0").exit_code == 0
    monkeypatch.setattr(k, "measure_trained", lambda *_: pytest.fail("nothing is to be measured"))
    shutil.move(tmp_path / "out", tmp_path / "moved")
    result = export_command(
        run,
        "--to",
        tmp_path / "moved",
        "--gguf-template",
        tmp_path / "template.gguf",
        "--formats",
        "modelfile",
    )
    assert (
        result.exit_code == 0
        and "FROM ./someone-hub-base-run-q8_0.gguf" in (tmp_path / "moved" / "Modelfile").read_text()
    ), result.output


def test_a_base_that_changed_since_the_training_is_told(small_run, tmp_path):
    run, base = small_run
    (base / "generation_config.json").write_text("{}")
    result = export_command(run, "--to", tmp_path / "out", "--formats", "merged")
    assert result.exit_code == 1 and "has changed since the training" in result.stderr


def test_llama_3_1s_rope_comes_in_with_the_gguf(tiny_directory, template_of, embedded, tmp_path):
    """transformers' import knows nothing of rope_freqs: torch would train a model that llama.cpp does not run."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    directory = tiny_directory(
        "llama",
        **{
            **ROOMY,
            "vocab_size": 49152,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "max_position_embeddings": 512,
            "rope_parameters": rope,
        },
    )
    wave = 2 * np.pi * 10000.0 ** (np.arange(0, 16, 2) / 16)
    smooth = (64 / wave - 1) / 3
    factors = np.where(wave < 16, 1, np.where(wave > 64, 8, 1 / ((1 - smooth) / 8 + smooth))).astype(
        np.float32
    )
    template = template_of(
        directory,
        tmp_path / "template.gguf",
        like=embedded.template,
        chat_template="x",
        tensors={"rope_freqs.weight": factors},
    )
    path = gguf_files.write_gguf(
        template, tmp_path / "scaled.gguf", "f32", gguf_files.gguf_tensors(Weights(directory))
    )
    imported = gguf_files.import_gguf(path, tmp_path / "imported")
    ids = [torch.randint(100, 40000, (400,), generator=torch.manual_seed(0)).tolist()]
    torch_says, before = (k.torch_logits(k.load_plain(d, torch.float32), ids) for d in (imported, directory))
    with k.Worker() as worker:
        worker.load("m", path)
        assert proof.kl_and_agreement(torch_says, worker.next_logits("m", ids))[0] < 1e-5
    assert np.allclose(torch_says, before, atol=1e-3)
    odd = template_of(
        directory,
        tmp_path / "odd.gguf",
        like=embedded.template,
        chat_template="x",
        tensors={"rope_freqs.weight": factors[::-1].copy()},
    )
    with pytest.raises(ExportError, match="rope_freqs are not Llama 3.1's"):
        gguf_files.import_gguf(odd, tmp_path / "odd")


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.path.insert(0, sys.argv[2])
sys.argv = sys.argv[2:]
import kardia_lite
kardia_lite.cli()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
@pytest.mark.parametrize("kind", ["merged", "f16", "q5_0"])
def test_a_full_disk_leaves_one_line_and_no_half_file(small_run, template_of, embedded, tmp_path, kind):
    """The kernel itself refuses to write on: no file of this process or its worker may grow beyond a limit (for q5_0 it is the bf16 file on the way)."""
    run, base = small_run
    template = template_of(base, tmp_path / "template.gguf", like=embedded.template)
    command = [
        sys.executable,
        "-c",
        FULL,
        "3000000",
        str(k.HERE),
        "export",
        str(run),
        "--to",
        str(tmp_path / "out"),
        "--formats",
        kind,
        "--answers",
        "0",
        "--gguf-template",
        str(template),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("Error: "), done.stderr
    assert not [p for p in (tmp_path / "out").rglob("*") if p.name != "export.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's prlimit")
def test_llama_cpps_quantizer_failing_leaves_one_line_and_no_half_file(
    small_run, template_of, embedded, tmp_path, monkeypatch
):
    """It returns an error and leaves what it had written; only the worker's own files are limited here."""
    import resource

    run, base = small_run
    quantize = k.Worker.quantize

    def on_a_full_disk(self, source, target, kind):
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        quantize(self, source, target, kind)

    monkeypatch.setattr(k.Worker, "quantize", on_a_full_disk)
    template = template_of(base, tmp_path / "template.gguf", like=embedded.template)
    result = export_command(
        run, "--to", tmp_path / "out", "--formats", "f16,q5_0", "--gguf-template", template
    )
    assert (
        result.exit_code == 1
        and "llama.cpp could not quantize to q5_0" in result.stderr
        and "Traceback" not in result.output
    ), result.output
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "export.json",
        "someone-hub-base-run-f16.gguf",
    ]
