"""Read and write GGUF files: no converter, no network.

A GGUF base is imported once into a Hugging Face directory (`import_gguf`). What leaves is written into a copy
of a GGUF of the same base (`write_gguf`): metadata and tokenizer stay verbatim, tensors are replaced. For the
architectures in gguf_names.py every tensor was compared with llama.cpp's converter on random models, in all
types of WRITTEN_HERE: equal bit for bit. Others go through that converter (`convert`), if it is given.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from kardia.core.console import one_line, shorten
from kardia.core.files import temporary_path
from kardia.llama.gguf_header import Header, read_gguf
from kardia.models.adapter import lora_scale
from kardia.models.gguf_import import check_sizes, query_scalar, rope_parameters
from kardia.models.gguf_names import architecture_of, heads_of, is_left_out, permute, tensor_names
from kardia.models.gguf_tokenizer import import_tokenizer
from kardia.models.model_files import ExportError, add_compatibility_keys, save_shards
from kardia.models.weights import Weights

WRITTEN_HERE = ("f32", "f16", "bf16", "q8_0")  # the others by llama.cpp's quantizer
# llama.cpp refuses these without calibration data.
NEEDS_IMATRIX = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s")


def file_types() -> tuple[str, ...]:
    """Return every type llama.cpp can write, by its lower-case name; the exact ones first."""
    from gguf import LlamaFileType

    names = (name for name in LlamaFileType.__members__ if name.startswith("MOSTLY_"))
    every = [name.removeprefix("MOSTLY_").lower() for name in names]
    return (*WRITTEN_HERE, *(name for name in every if name not in WRITTEN_HERE))


def gguf_tensors(weights: Weights) -> dict[str, Callable]:
    """Return {GGUF tensor name: function returning its float32 values} for a model, in GGUF's own layout."""
    config = weights.config
    _, permuted, norm_plus_one = architecture_of(config, str(weights.directory))
    name_of, tensors = tensor_names(config), {}

    def values(name: str):
        tensor, heads = weights.read(name), heads_of(name, config)
        if permuted and heads:
            tensor = permute(tensor, heads)
        return (tensor + 1 if norm_plus_one and name.endswith("norm.weight") else tensor).numpy()

    for name in weights:
        if not is_left_out(name, config):
            tensors[name_of(name)] = lambda name=name: values(name)
    return tensors


# ---------------------------------------------------------------------------------- out


def check_template(template: Path, weights: Weights) -> None:
    """Raise ExportError unless the GGUF `template` is of the same model."""
    header, config = read_gguf(template), weights.config
    if header.value("split.count") not in (None, 0, 1):
        fix = "join the parts first (llama-gguf-split --merge)"
        raise ExportError(f"{template}: one part of a split GGUF; {fix}")
    kind, stored = header.value("general.architecture"), header.tensors
    rows = stored["token_embd.weight"].shape[-2:-1] if "token_embd.weight" in stored else ()
    sizes = [header.value(f"{kind}.{key}") for key in ("block_count", "embedding_length")]
    theirs = (kind, *sizes, rows[0] if rows else None)
    embed = next((name for name in weights if name.endswith("embed_tokens.weight")), None)
    wanted = architecture_of(config, str(weights.directory))[0]
    vocabulary = weights.shape(embed)[0] if embed else None
    ours = (wanted, config["num_hidden_layers"], config["hidden_size"], vocabulary)
    if theirs != ours:
        form = "a {} of {} layers x {}, {} tokens"
        one, other = (form.format(*map(shorten, facts)) for facts in (theirs, ours))
        fix = "give a GGUF of the same model, of any type"
        raise ExportError(f"{template}: {one}; the model is {other}: {fix}")
    _complete(template, set(stored), gguf_tensors(weights))


def _complete(template: Path, names: set[str], tensors: dict[str, Callable]) -> dict[str, Callable]:
    """Return `tensors` for each of the template's `names` (but rope_freqs) or raise ExportError."""
    if "output.weight" in names - set(tensors):  # some converters write tied embeddings twice
        tensors = {**tensors, "output.weight": tensors["token_embd.weight"]}
    why = "it is of another model"
    for name in sorted(set(tensors) - names):
        raise ExportError(f"{template}: the template has no tensor {name!r}: {why}")
    for name in sorted(names - set(tensors)):
        if not name.startswith("rope_"):
            raise ExportError(f"{template}: the template has a tensor {name!r} that the model has not: {why}")
    return tensors


def _copy_metadata(header: Header, writer, metadata: dict) -> None:
    from gguf import GGUFValueType

    written = {"general.architecture", "general.file_type", "general.quantization_version", *metadata}
    for key, (kind, _) in header.fields.items():
        value, item_type = header.value(key), header.item_type(key)
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif key not in written and value != []:  # the writer has no way to write an empty list
            of_items = None if item_type is None else GGUFValueType(item_type)
            writer.add_key_value(key, value, GGUFValueType(kind), of_items)
    for key, value in metadata.items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)


def _plan(header: Header, file_type: str) -> list[tuple]:
    """Return [(tensor, type)] of a copy in `file_type`; llama.cpp expects exact norms and biases."""
    from gguf import GGMLQuantizationType as Kind

    plan = []
    for tensor in header.tensors.values():
        kind = getattr(Kind, file_type.upper()) if len(tensor.shape) > 1 else Kind.F32
        if kind == Kind.Q8_0 and tensor.shape[-1] % 32:
            kind = Kind.F16
        plan.append((tensor, kind))
    return plan


def write_gguf(
    template: Path, target: Path, file_type: str, tensors: dict[str, Callable], metadata: dict | None = None
) -> Path:
    """Write `target`: the GGUF `template` with its tensors in `file_type` (f32, f16, bf16 or q8_0).

    metadata is added to the template's. tensors: {GGUF name: function returning float32 [rows, columns]} of
    all weights. One tensor is in memory at a time.
    """
    import gguf
    import numpy as np

    header = read_gguf(template)
    plan = _plan(header, file_type)
    tensors = _complete(template, set(header.tensors), tensors)
    temporary = temporary_path(target)
    writer = gguf.GGUFWriter(temporary, header.value("general.architecture"))
    _copy_metadata(header, writer, metadata or {})
    name = "ALL_F32" if file_type == "f32" else f"MOSTLY_{file_type.upper()}"
    writer.add_file_type(getattr(gguf.LlamaFileType, name))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor, kind in plan:
        raw, n_bytes = None, 4 * tensor.n_elements
        if kind != gguf.GGMLQuantizationType.F32:
            raw, n_bytes = kind, math.prod(gguf.quant_shape_to_byte_shape(tensor.shape, kind))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), n_bytes, raw_dtype=raw)

    def quantized():
        for tensor, kind in plan:
            # What the model has not are the template's own rope factors.
            values = tensors.get(tensor.name, tensor.values)()
            values = np.ascontiguousarray(values, dtype=np.float32)  # [rows, columns]
            if values.shape != tensor.shape:
                other = f"shape {values.shape} does not fit the template's {tensor.shape}"
                raise ExportError(f"{tensor.name}: {other}: another model's GGUF?")
            yield gguf.quants.quantize(values, kind)

    return _finish(writer, temporary, target, quantized())


def _finish(writer, temporary: Path, target: Path, tensors: Iterable) -> Path:
    """Write header, metadata and tensors, then give the file its name. A failure leaves no file."""
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor)
        writer.close()
        os.replace(temporary, target)
    except OSError as error:  # numpy's own has neither errno nor a file's name
        why = error.strerror or error
        raise ExportError(f"{target}: cannot be written ({why}); is the disk full?") from error
    finally:
        with suppress(OSError):  # a full disk again, while flushing what is thrown away
            writer.close()
        temporary.unlink(missing_ok=True)
    return target


def write_lora_gguf(facts: dict, pairs: dict, base_config: dict, target: Path, half: bool = False) -> Path:
    """Write a PEFT LoRA (of `read_adapter`) as llama.cpp's GGUF adapter, float32 or (`half`) float16.

    Only B of q/k is permuted (A is on the input side). llama.cpp multiplies B @ A by one alpha over the
    tensor's own rank, so PEFT's scale (rsLoRA, a module's own alpha or rank) is folded into B.
    """
    import gguf
    import numpy as np

    architecture, permuted, _ = architecture_of(base_config, "LoRA")
    name_of, alpha = tensor_names(base_config), float(facts["r"])
    dtype = np.float16 if half else np.float32
    tensors = {}
    for module, (a, b) in sorted(pairs.items()):
        rank, heads, name = a.shape[0], heads_of(module, base_config), name_of(f"{module}.weight")
        rows = b.float().numpy() * (lora_scale(facts, module, rank) * rank / alpha)  # [out, r]
        if permuted and heads:
            rows = permute(rows, heads)
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
    """Run llama.cpp's own converter on a Hugging Face directory, for `file_type` f32, f16, bf16 or q8_0."""
    temporary, script = temporary_path(target), converter(llama_cpp)
    command = [sys.executable, script, directory, "--outtype", file_type, "--outfile", temporary]
    settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    settings |= {"text": True, "errors": "replace", "env": {**os.environ, "HF_HUB_OFFLINE": "1"}}
    try:
        done = subprocess.run(list(map(str, command)), **settings)
        if done.returncode != 0 or not temporary.is_file():
            lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
            last = lines[-1][:300] if lines else f"exit {done.returncode}"
            raise ExportError(f"{script}: failed on {directory} ({last})")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def converter(llama_cpp: Path) -> Path:
    """Return the path of llama.cpp's converter. Raise ExportError if it is not there."""
    script = llama_cpp / "convert_hf_to_gguf.py"
    if not script.is_file():
        wanted = "--llama-cpp wants a checkout of llama.cpp's source"
        raise ExportError(f"{llama_cpp}: no convert_hf_to_gguf.py there; {wanted}")
    return script


# ---------------------------------------------------------------------------------- in


def import_gguf(source: Path, target: Path) -> Path:
    """Write a GGUF as a Hugging Face directory `target`: bfloat16 safetensors, tokenizer, chat template.

    transformers reads the config; tensors are dequantized one by one, for a large model does not fit whole.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    check_sizes(source)
    tokenizer = import_tokenizer(source)
    try:
        config = AutoConfig.from_pretrained(str(source.parent), gguf_file=source.name)
        config.rope_parameters = rope_parameters(source, config)
        if hasattr(config, "query_pre_attn_scalar"):
            config.query_pre_attn_scalar = query_scalar(config)
        architecture_of(config.to_dict(), str(source))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except ExportError:
        raise
    except Exception as error:  # somebody else's file in somebody else's library
        why = f"a damaged GGUF, or one that transformers cannot import ({one_line(error)})"
        raise ExportError(f"{source}: {why}; give the model's Hugging Face directory") from error
    config.architectures = [type(model).__name__]
    model.generation_config.eos_token_id = config.eos_token_id = tokenizer.eos_token_id
    temporary = temporary_path(target)
    temporary.mkdir()
    try:
        save_shards(_imported(source, model), temporary)
        config.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        add_compatibility_keys(temporary)
        os.replace(temporary, target)
    except ExportError:
        raise
    except Exception as error:  # safetensors' own class, on a full disk
        raise ExportError(f"{target}: cannot be written ({one_line(error)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _imported(source: Path, model) -> Iterable[tuple]:
    """Yield (name, bfloat16 tensor) for every weight of `model`, whose tensors have shapes and no data."""
    import numpy as np
    import torch

    config = model.config.to_dict()
    name_of, (_, permuted, norm_plus_one) = tensor_names(config), architecture_of(config, str(source))
    stored = read_gguf(source).tensors
    for name, wanted in model.state_dict().items():
        if is_left_out(name, config):
            continue
        tensor, heads = stored.get(name_of(name)), heads_of(name, config)
        if tensor is None:
            fix = "give a whole one, or the model's Hugging Face directory"
            raise ExportError(f"{source}: the GGUF lacks {shorten(name)}; {fix}")
        values = np.array(tensor.values(), dtype=np.float32)
        if values.shape != tuple(wanted.shape):
            shapes = f"{shorten(name)} is {values.shape}, not {tuple(wanted.shape)}"
            raise ExportError(f"{source}: damaged GGUF ({shapes})")
        if permuted and heads:
            values = permute(values, heads, back=True)
        if norm_plus_one and name.endswith("norm.weight"):
            values = values - 1
        yield name, torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
