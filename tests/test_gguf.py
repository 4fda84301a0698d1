"""GGUF in and out on tiny models: what is written and read again is the same, one tensor at a time."""

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kardia.llama.gguf_header import read_gguf
from kardia.models import gguf as gguf_files
from kardia.models.model_files import ExportError
from kardia.models.weights import Weights, write_merged

FAMILIES = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 128},  # a head's size that is not in the file: 128 is what transformers takes
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 16},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 16, "num_hidden_layers": 7},
}


def tokens(vocabulary):
    """A SentencePiece vocabulary of this size: specials, bytes, letters."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    return pieces + [(f"[{i}]", 0.0, 4) for i in range(vocabulary - len(pieces))]


@pytest.fixture
def written(tiny_directory, template_of, tmp_path):
    """written("llama") -> (the model's directory, a GGUF of it in bf16, written from a template of zeros)."""

    def make(family):
        directory = tiny_directory(family.split(",")[0], vocab_size=300, **FAMILIES[family])
        template = template_of(directory, tmp_path / "template.gguf", tokens=tokens(300), chat_template="x")
        tensors = gguf_files.gguf_tensors(Weights(directory))
        return directory, gguf_files.write_gguf(template, tmp_path / "whole.gguf", "bf16", tensors)

    return make


def test_our_header_reads_what_the_gguf_package_reads(tmp_path):
    """Every type of metadata and of tensor."""
    path, kinds = tmp_path / "all.gguf", gguf.GGUFValueType
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    values = {"UINT8": 255, "INT8": -1, "UINT16": 65535, "INT16": -2, "UINT32": 2**32 - 1, "INT32": -3}
    values |= {
        "FLOAT32": 0.1,
        "UINT64": 2**64 - 1,
        "INT64": -4,
        "FLOAT64": 0.1,
        "BOOL": True,
        "STRING": "naïve",
    }
    for name, value in values.items():
        writer.add_key_value(f"one.{name}", value, kinds[name])
        writer.add_key_value(f"list.{name}", [value] * 3, kinds.ARRAY, kinds[name])
    numbers = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_0"):
        kind = gguf.GGMLQuantizationType[name]
        raw = None if name in ("F32", "F16") else kind
        data = numbers.astype(np.float16) if name == "F16" else gguf.quants.quantize(numbers, kind)
        writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert {key: ours.value(key) for key in ours.fields} == {k: f.contents() for k, f in fields.items()}
    for key, field in fields.items():
        items = int(field.types[-1]) if len(field.types) > 1 else None
        assert (ours.fields[key][0], ours.item_type(key)) == (int(field.types[0]), items)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors] and ours.value("absent") is None
    for tensor in theirs.tensors:
        mine, shape = ours.tensors[tensor.name], tuple(map(int, tensor.shape[::-1]))
        assert (mine.shape, mine.kind, mine.n_bytes) == (shape, tensor.tensor_type, tensor.n_bytes)
        assert np.array_equal(mine.values(), gguf.quants.dequantize(tensor.data, tensor.tensor_type))


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES if family != "llama"]


@pytest.mark.parametrize("family", ["llama", *SLOW])
def test_a_model_comes_back_from_its_gguf(written, family, tmp_path):
    """bf16 in, bf16 out: names, row order of q and k, norms, biases and tied heads are undone exactly."""
    directory, path = written(family)
    back = gguf_files.import_gguf(path, tmp_path / "back")
    before, after = (load_file(d / "model.safetensors") for d in (directory, back))
    assert before.keys() == after.keys()
    # gemma's norms are stored as weight + 1, which rounds once more
    atol = 1e-2 if "gemma" in family else 0
    if "gemma" in family:
        # Divided by the root of this in attention. It is not in the file.
        assert json.loads((back / "config.json").read_text())["query_pre_attn_scalar"] == 8
    for name, tensor in before.items():
        assert torch.allclose(tensor.float(), after[name].float(), atol=atol, rtol=0), name
        assert after[name].dtype == torch.bfloat16


def test_an_import_reads_one_tensor_at_a_time(written, tmp_path, monkeypatch):
    """A 7B model in float32 would take 30 GB: no model may be built, and no tensor kept."""
    import gguf
    from transformers import PreTrainedModel

    _, path = written("llama")
    calls, kept = [], []
    plain = gguf.quants.dequantize

    def counted(*arguments):
        calls.append(1)
        return plain(*arguments)

    monkeypatch.setattr(gguf.quants, "dequantize", counted)
    built = classmethod(lambda *_, **__: pytest.fail("built"))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", built)
    save = gguf_files.save_shards

    def save_slowly(tensors, directory, shard_bytes=0):
        def watched():
            for pair in tensors:
                kept.append(len(calls))
                yield pair

        return save(watched(), directory, 10_000)

    monkeypatch.setattr(gguf_files, "save_shards", save_slowly)
    back = gguf_files.import_gguf(path, tmp_path / "back")
    assert kept == list(range(1, len(kept) + 1))  # each is read when it is written
    assert len(list(back.glob("*.safetensors"))) > 3 and (back / "model.safetensors.index.json").is_file()
    assert sorted(Weights(back)) == sorted(Weights(tmp_path / "base"))


def test_a_file_that_does_not_fit_together_is_one_line(written, tiny_directory, template_of, tmp_path):
    directory, path = written("llama")
    data = path.read_bytes()
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(data.replace(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"))
    with pytest.raises(ExportError, match="odd.gguf: the GGUF lacks model.layers.1.self_attn.q_proj.weight"):
        gguf_files.import_gguf(odd, tmp_path / "back")
    larger = template_of(directory, tmp_path / "larger.gguf", tokens=tokens(301))
    with pytest.raises(ExportError, match="its header says tokenizer.ggml.tokens 301, its tensors 300"):
        gguf_files.import_gguf(larger, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    unknown = tiny_directory("phi", "phi")
    with pytest.raises(ExportError, match="'phi' has no GGUF mapping here"):
        gguf_files.gguf_tensors(Weights(unknown))


def test_a_full_disk_leaves_nothing(written, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    directory, path = written("llama")

    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    for write in (
        lambda: gguf_files.import_gguf(path, tmp_path / "out"),
        lambda: write_merged(Weights(directory), tmp_path / "out", [2]),
    ):
        with pytest.raises(ExportError, match="out: cannot be written .No space left"):
            write()
        assert not list(tmp_path.glob("*out*"))
