"""GGUF in, GGUF out: no converter, no network.

A GGUF base is imported once into a plain Hugging Face directory (`import_gguf`); what leaves is written into a copy of a GGUF
of the same base (`write_gguf`): metadata and tokenizer stay verbatim, tensors are replaced. For the six architectures below
every tensor so written was compared with llama.cpp's own converter on random models, in f32, f16, bf16 and q8_0: equal bit
for bit. Others go through that converter (`convert`), if a directory of llama.cpp is given.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from kardia.core.console import one_line, shorten
from kardia.core.files import temporary_path
from kardia.models.gguf_tokenizer import import_tokenizer
from kardia.models.weights import (
    ExportError,
    Weights,
    add_compatibility_keys,
    gguf_value,
    lora_scale,
    read_gguf,
)

# architecture in config.json -> (architecture in GGUF, are q/k rows permuted for GGUF's rotary layout, norm stored as weight + 1)
ARCHITECTURES = {
    "llama": ("llama", True, False),
    "mistral": ("llama", True, False),
    "qwen2": ("qwen2", False, False),
    "qwen3": ("qwen3", False, False),
    "gemma2": ("gemma2", False, True),
    "gemma3_text": ("gemma3", False, True),
}
HEAD = {
    "llama": "rope.dimension_count",
    "qwen2": "",
    "qwen3": "",
    "gemma2": "attention.key_length",
    "gemma3": "attention.key_length",
}  # where transformers reads a head's size, in GGUF's names
WRITTEN_HERE = ("f32", "f16", "bf16", "q8_0")  # the others by llama.cpp's quantizer
NEEDS_IMATRIX = (
    "iq1_s",
    "iq1_m",
    "iq2_xxs",
    "iq2_xs",
    "iq2_s",
    "iq2_m",
    "iq3_xxs",
    "iq3_xs",
    "q2_k_s",
)  # llama.cpp refuses them without calibration data


def file_types() -> tuple[str, ...]:
    """Every type llama.cpp can write, by its lower-case name; the exact ones first."""
    from gguf import LlamaFileType

    names = [
        name.removeprefix("MOSTLY_").lower()
        for name in LlamaFileType.__members__
        if name.startswith("MOSTLY_")
    ]
    return (*WRITTEN_HERE, *(name for name in names if name not in WRITTEN_HERE))


def architecture_of(config: dict, what: str) -> tuple[str, bool, bool]:
    kind = config.get("model_type", "?")
    if kind not in ARCHITECTURES:
        raise ExportError(
            f"{what}: architecture {kind!r} has no GGUF mapping here ({', '.join(ARCHITECTURES)}); export --formats merged works for all, --llama-cpp DIR for what llama.cpp converts"
        )
    return ARCHITECTURES[kind]


def _names(config: dict) -> Callable[[str], str]:
    """Hugging Face's tensor name -> GGUF's."""
    import gguf

    kind = {name: value for value, name in gguf.MODEL_ARCH_NAMES.items()}[
        architecture_of(config, "config.json")[0]
    ]
    table = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])

    def name_of(name: str) -> str:
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ExportError(f"{name}: no GGUF tensor of {architecture_of(config, '')[0]} corresponds to it")
        return found

    return name_of


def _permute(rows, n_head: int):
    """Row order of q/k for GGUF's rotary layout: [heads, 2, half, ...] -> [heads, half, 2, ...]. Works on W [out, in] and on LoRA's B [out, r]."""
    shape = rows.shape
    if shape[0] % (2 * n_head):
        raise ExportError(f"{shape[0]} rows do not divide among {n_head} heads: tensor of another base")
    return rows.reshape(n_head, 2, shape[0] // n_head // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def _heads(name: str, config: dict) -> int | None:
    """Number of heads if `name` is a q or k projection (the tensors GGUF's llama permutes), else None."""
    if ".q_proj" in name:
        return config["num_attention_heads"]
    if ".k_proj" in name:
        return config.get("num_key_value_heads") or config["num_attention_heads"]
    return None


def gguf_tensors(weights: Weights) -> dict[str, Callable]:
    """{GGUF tensor name: function returning its float32 values} for each tensor of a model, in GGUF's own layout."""
    config = weights.config
    _, permuted, norm_plus_one = architecture_of(config, str(weights.directory))
    name_of, found = _names(config), {}
    for name in weights:
        if (name == "lm_head.weight" and config.get("tie_word_embeddings")) or name.endswith(
            "rotary_emb.inv_freq"
        ):
            continue  # said once; follows from the config (old Llama checkpoints store it)

        def values(name=name):
            tensor = weights.read(name)
            if permuted and (heads := _heads(name, config)):
                tensor = _permute(tensor, heads)
            return (tensor + 1 if norm_plus_one and name.endswith("norm.weight") else tensor).numpy()

        found[name_of(name)] = values
    return found


# ---------------------------------------------------------------------------------- out


def check_template(template: Path, weights: Weights) -> None:
    """Raises ExportError unless the GGUF `template` is of the same model: architecture, layers, width, vocabulary, names of tensors."""
    reader, config = read_gguf(template), weights.config
    if gguf_value(reader, "split.count") not in (None, 0, 1):
        raise ExportError(
            f"{template}: one part of a split GGUF; join the parts first (llama-gguf-split --merge)"
        )
    architecture, wanted = (
        gguf_value(reader, "general.architecture"),
        architecture_of(config, str(weights.directory))[0],
    )
    embedding = next((tensor for tensor in reader.tensors if tensor.name == "token_embd.weight"), None)
    rows = int(embedding.shape[1]) if embedding is not None and len(embedding.shape) > 1 else None
    theirs = (
        architecture,
        gguf_value(reader, f"{architecture}.block_count"),
        gguf_value(reader, f"{architecture}.embedding_length"),
        rows,
    )
    embed = next((name for name in weights if name.endswith("embed_tokens.weight")), None)
    ours = (
        wanted,
        config["num_hidden_layers"],
        config["hidden_size"],
        weights.shape(embed)[0] if embed else None,
    )
    if theirs != ours:
        told = ["{} of {} layers x {}, {} tokens".format(*map(shorten, facts)) for facts in (theirs, ours)]
        raise ExportError(
            f"{template}: a {told[0]}; the model is a {told[1]}: give a GGUF of the same model, of any type"
        )
    _complete(template, {tensor.name for tensor in reader.tensors}, gguf_tensors(weights))


def _complete(template: Path, names: set[str], tensors: dict[str, Callable]) -> dict[str, Callable]:
    """`tensors` for each of the template's `names`, or ExportError. Only rope_freqs, which is no weight, may stay as it is."""
    if "output.weight" in names - set(tensors):  # some converters write tied embeddings twice
        tensors = {**tensors, "output.weight": tensors["token_embd.weight"]}
    if extra := sorted(set(tensors) - names):
        raise ExportError(f"{template}: the template has no tensor {extra[0]!r}: it is of another model")
    if left := sorted(name for name in names - set(tensors) if not name.startswith("rope_")):
        raise ExportError(
            f"{template}: the template has a tensor {left[0]!r} that the model has not: it is of another model"
        )
    return tensors


def _copy_metadata(reader, writer, metadata: dict) -> None:
    from gguf import GGUFValueType

    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in (
            "general.architecture",
            "general.file_type",
            "general.quantization_version",
            *metadata,
        ):
            continue
        kind = field.types[0]
        if key == "general.alignment":
            writer.add_custom_alignment(field.contents())
            continue
        if kind == GGUFValueType.ARRAY and not len(field.data):
            continue  # the writer has no way to say an empty list
        writer.add_key_value(
            key, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None
        )
    for key, value in metadata.items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)


def _plan(reader, file_type: str):
    """[(tensor, shape, type it will have)] of a copy in `file_type`: norms and biases stay exact, as llama.cpp expects."""
    import gguf

    exact, wanted = gguf.GGMLQuantizationType.F32, getattr(gguf.GGMLQuantizationType, file_type.upper())
    plan = []
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        kind = wanted if len(shape) > 1 else exact
        if kind == gguf.GGMLQuantizationType.Q8_0 and shape[-1] % 32:
            kind = gguf.GGMLQuantizationType.F16
        plan.append((tensor, shape, kind))
    return plan


def write_gguf(
    template: Path, target: Path, file_type: str, replace: dict | None = None, metadata: dict | None = None
) -> Path:
    """Write `target`: metadata of the GGUF `template` (`metadata` adds to it or replaces some), its tensors in `file_type` (f32,
    f16, bf16 or q8_0). `replace`: {GGUF name: function returning float32 [rows, columns]}, then of all weights. One tensor is in memory at a time."""
    import gguf
    import numpy as np

    reader = read_gguf(template)
    plan, names = _plan(reader, file_type), {tensor.name for tensor in reader.tensors}
    replace = _complete(template, names, replace) if replace else {}
    temporary = temporary_path(target)
    writer = gguf.GGUFWriter(temporary, gguf_value(reader, "general.architecture"))
    _copy_metadata(reader, writer, metadata or {})
    writer.add_file_type(
        getattr(gguf.LlamaFileType, {"f32": "ALL_F32"}.get(file_type, f"MOSTLY_{file_type.upper()}"))
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor, shape, kind in plan:
        exact = kind == gguf.GGMLQuantizationType.F32
        n_bytes = (
            int(np.prod(shape)) * 4 if exact else int(np.prod(gguf.quant_shape_to_byte_shape(shape, kind)))
        )
        writer.add_tensor_info(
            tensor.name, shape, np.dtype(np.float32), n_bytes, raw_dtype=None if exact else kind
        )

    def tensors():
        for tensor, shape, kind in plan:
            values = (
                replace[tensor.name]()
                if tensor.name in replace
                else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            )
            values = np.ascontiguousarray(values, dtype=np.float32)
            if values.shape != shape:
                raise ExportError(
                    f"{tensor.name}: shape {values.shape} does not fit the template's {shape}: another model's GGUF?"
                )
            yield gguf.quants.quantize(values, kind)

    return _finish(writer, temporary, target, tensors())


def _finish(writer, temporary: Path, target: Path, tensors) -> Path:
    """Header, metadata, tensors; then the file gets its name. Nothing is left under any name if that fails."""
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor)
        writer.close()
        os.replace(temporary, target)
    except OSError as error:  # numpy's own has neither errno nor a file's name
        raise ExportError(
            f"{target}: cannot be written ({error.strerror or error}); is the disk full?"
        ) from error
    finally:
        try:
            writer.close()
        except OSError:  # a full disk again, while flushing what is thrown away
            pass
        temporary.unlink(missing_ok=True)
    return target


def write_lora_gguf(
    adapter_config: dict, pairs: dict, base_config: dict, target: Path, half: bool = False
) -> Path:
    """A PEFT LoRA as llama.cpp's GGUF adapter, float32 or (`half`) float16. Only B of q/k is permuted (A is on the input side).

    llama.cpp multiplies B @ A by one alpha over the tensor's own rank; PEFT's scale (rsLoRA, a module's own alpha or rank)
    is folded into B so that the product is the same.
    """
    import gguf
    import numpy as np

    architecture, permuted, _ = architecture_of(base_config, "LoRA")
    name_of, dtype, alpha = (
        _names(base_config),
        np.float16 if half else np.float32,
        float(adapter_config["r"]),
    )
    tensors = {}
    for module, (a, b) in sorted(pairs.items()):
        rank = a.shape[0]
        rows = b.float().numpy() * (lora_scale(adapter_config, module, rank) * rank / alpha)
        if permuted and (heads := _heads(module, base_config)):
            rows = _permute(rows, heads)
        name = name_of(f"{module}.weight")
        tensors[f"{name}.lora_a"] = np.ascontiguousarray(a.float().numpy(), dtype=dtype)
        tensors[f"{name}.lora_b"] = np.ascontiguousarray(rows, dtype=dtype)
    temporary = temporary_path(target)
    writer = gguf.GGUFWriter(temporary, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, values in tensors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    return _finish(writer, temporary, target, tensors.values())


def convert(llama_cpp: Path, directory: Path, target: Path, file_type: str) -> Path:
    """llama.cpp's own converter on a Hugging Face directory, for `file_type` f32, f16, bf16 or q8_0."""
    temporary = temporary_path(target)
    command = [
        sys.executable,
        str(converter(llama_cpp)),
        str(directory),
        "--outtype",
        file_type,
        "--outfile",
        str(temporary),
    ]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if done.returncode != 0 or not temporary.is_file():
            told = [line.strip() for line in done.stdout.splitlines() if line.strip()]
            raise ExportError(
                f"{converter(llama_cpp)}: failed on {directory} ({told[-1][:300] if told else f'exit {done.returncode}'})"
            )
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def converter(llama_cpp: Path) -> Path:
    script = llama_cpp / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise ExportError(
            f"{llama_cpp}: no convert_hf_to_gguf.py there; --llama-cpp wants a checkout of llama.cpp's source"
        )
    return script


# ---------------------------------------------------------------------------------- in


def import_gguf(source: Path, target: Path) -> Path:
    """Dequantize a GGUF into a Hugging Face directory `target` (bfloat16 safetensors, tokenizer, chat template).

    transformers does the reading; it keeps a quantizer on the dequantized model, which is taken off here.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    check_sizes(source)
    tokenizer = import_tokenizer(source)
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            **where,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            output_loading_info=True,
        )
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config.rope_parameters = _rope(source, model.config)
    except ExportError:
        raise
    except Exception as error:  # a stranger's file in a stranger's library
        raise ExportError(
            f"{source}: transformers cannot import this GGUF ({one_line(error)}); give the model's Hugging Face directory"
        ) from error
    if left := sorted(loaded["missing_keys"]):  # transformers would leave random weights there
        raise ExportError(
            f"{source}: the GGUF lacks {shorten(left[0])}; give a whole one, or the model's Hugging Face directory"
        )
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    temporary = temporary_path(target)
    try:
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        add_compatibility_keys(temporary)
        os.replace(temporary, target)
    except Exception as error:  # safetensors' own class, on a full disk
        raise ExportError(f"{target}: cannot be written ({one_line(error)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def check_sizes(source: Path) -> None:
    """Raises ExportError unless the header's sizes are those of the tensors: transformers builds what the header says, however large."""
    reader = read_gguf(source)
    architecture = gguf_value(reader, "general.architecture")
    if not isinstance(architecture, str):
        raise ExportError(f"{source}: damaged GGUF (general.architecture is {shorten(architecture)})")
    shapes = {tensor.name: [int(n) for n in tensor.shape] for tensor in reader.tensors}
    size = lambda name, side: shapes[name][side] if len(shapes.get(name, ())) > side else None  # noqa: E731
    said = {
        key.removeprefix(f"{architecture}."): gguf_value(reader, key)
        for key in reader.fields
        if key.startswith(f"{architecture}.")
    }
    if odd := [key for key, value in said.items() if isinstance(value, int) and not 0 <= value <= 1 << 24]:
        raise ExportError(f"{source}: damaged GGUF ({shorten(odd[0])} is {said[odd[0]]})")
    tokens = reader.get_field("tokenizer.ggml.tokens")
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
    found = {
        "block_count": len(blocks) if blocks == {str(i) for i in range(len(blocks))} else None,
        "embedding_length": size("token_embd.weight", 0),
        "vocab_size": size("token_embd.weight", 1),
        "feed_forward_length": size("blk.0.ffn_down.weight", 0),
        "expert_count": size("blk.0.ffn_down_exps.weight", 2),
        "context_length": size("position_embd.weight", 1),
    }
    facts = [
        (key, said[key], number)
        for key, number in found.items()
        if key in said
        and (
            number is not None
            or key in ("block_count", "embedding_length", "vocab_size")
            or key == "expert_count"
            and said[key]
        )
    ]
    facts += [("tokenizer.ggml.tokens", len(tokens.data), found["vocab_size"])] if tokens is not None else []
    heads, width = said.get("attention.head_count"), said.get("embedding_length")
    if architecture in HEAD and isinstance(heads, int) and isinstance(width, int):
        dimension = said.get(HEAD[architecture]) or (
            128 if architecture == "qwen3" else width // max(heads, 1)
        )
        for letter, key in (("q", "attention.head_count"), ("k", "attention.head_count_kv")):
            rows, count = size(f"blk.0.attn_{letter}.weight", 1), said.get(key, heads)
            facts += [
                (
                    f"{key} x {dimension}",
                    count * dimension if isinstance(count, int) and isinstance(dimension, int) else count,
                    rows,
                )
            ]
    if wrong := [fact for fact in facts if isinstance(fact[1], list) or fact[1] != fact[2]]:
        key, value, number = wrong[0]
        raise ExportError(
            f"{source}: damaged GGUF (its header says {shorten(key)} {shorten(value)}, its tensors {shorten(number)})"
        )


def _rope(source: Path, config) -> dict:
    """The rope's parameters with the scaling that transformers does not read from a GGUF: torch would train another model than
    llama.cpp runs. llama 3.1's is stored as its result (rope_freqs), so its parameters are found by trying."""
    import gguf

    reader, rope = read_gguf(source), dict(config.rope_parameters or {})
    architecture = gguf_value(reader, "general.architecture")
    scaling, factor = (gguf_value(reader, f"{architecture}.rope.scaling.{key}") for key in ("type", "factor"))
    factors = next(
        (
            gguf.quants.dequantize(t.data, t.tensor_type)
            for t in reader.tensors
            if t.name == "rope_freqs.weight"
        ),
        None,
    )
    if factors is not None:
        return {**rope, **_llama3_rope(source, factors, rope["rope_theta"])}
    if scaling in (None, "none"):
        return rope
    if scaling != "linear":
        raise ExportError(
            f"{source}: its rope scaling ({scaling}) cannot be taken over from a GGUF; give the model's Hugging Face directory, and this file as --gguf-template"
        )
    scaled = {"rope_type": "linear", "factor": factor}
    return (
        {**rope, "full_attention": {**rope["full_attention"], **scaled}}
        if "full_attention" in rope
        else {**rope, **scaled}
    )


def _llama3_rope(source: Path, factors, theta: float) -> dict:
    """{rope_type: llama3, ..} whose divisors of the frequencies are `factors` [head_dim / 2] (the formula of Llama 3.1)."""
    import numpy as np

    wave = (
        2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    )  # length of each frequency's wave, in tokens
    factor, low, high = float(factors.max()), 1.0, 4.0
    for original in (8192, *(2**n for n in range(5, 18))):
        smooth = np.clip((original / wave - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ExportError(
        f"{source}: its rope_freqs are not Llama 3.1's; give the model's Hugging Face directory, and this file as --gguf-template"
    )
