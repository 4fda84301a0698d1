"""GGUF in, merged model out, and the proof that nothing was lost on the way.

A GGUF base is imported once into a plain Hugging Face directory (`import_gguf`) and once into a BF16 GGUF with the very
same weights (`write_bf16`), so torch trains and llama.cpp rolls out the same model. After training, `merge_tensors`
adds the LoRA to the weights it was trained on, tensor by tensor from disk, and `write_gguf` puts them back into a copy
of the base's GGUF: metadata, tokenizer and chat template stay verbatim, no converter and no network needed.
`prove` then compares every export, loaded by its real loader, with the trained model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

# architecture in config.json -> (architecture in GGUF, are q/k rows permuted for GGUF's rotary layout, norm stored as weight + 1)
ARCHITECTURES = {
    "llama": ("llama", True, False),
    "mistral": ("llama", True, False),
    "qwen2": ("qwen2", False, False),
    "qwen3": ("qwen3", False, False),
    "gemma2": ("gemma2", False, True),
    "gemma3_text": ("gemma3", False, True),
}
QUANT_TYPES = ("q4_0", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "q8_0")
EXPORT_FORMATS = ("merged", "bf16", "f16", *QUANT_TYPES, "lora", "modelfile")


class ExportError(RuntimeError):
    """An export that cannot be made or that lost what was trained: one line for the user."""


def atomic(path: Path) -> Path:
    """The temporary name beside `path` that is renamed to it once complete; a leftover of a killed run is removed."""
    temporary = path.with_name(f".{path.name}.part")
    if temporary.is_dir():
        shutil.rmtree(temporary)
    temporary.unlink(missing_ok=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    return temporary


def _architecture(config: dict, what: str) -> tuple[str, bool, bool]:
    kind = config.get("model_type", "?")
    if kind not in ARCHITECTURES:
        raise ExportError(f"{what}: architecture {kind!r} has no GGUF mapping here ({', '.join(ARCHITECTURES)}); export --formats merged works for all")
    return ARCHITECTURES[kind]


def _gguf_names(config: dict) -> "dict[str, str] | object":
    import gguf

    kind = {name: value for value, name in gguf.MODEL_ARCH_NAMES.items()}[_architecture(config, "config.json")[0]]
    return gguf.get_tensor_name_map(kind, config["num_hidden_layers"])


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


# ---------------------------------------------------------------------------------- GGUF in


def _copy_metadata(reader, writer) -> None:
    from gguf import GGUFValueType

    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type", "general.quantization_version"):
            continue
        kind = field.types[0]
        writer.add_key_value(key, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)


def write_gguf(template: Path, target: Path, file_type: str, replace: dict | None = None) -> Path:
    """Write `target`: metadata of the GGUF `template`, its tensors in `file_type` (f32, f16, bf16 or q8_0), those in
    `replace` (GGUF name -> callable returning float32 [rows, columns]) from there. One tensor is in memory at a time."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(template)
    architecture = reader.get_field("general.architecture").contents()
    temporary = atomic(target)
    writer = gguf.GGUFWriter(temporary, architecture)
    _copy_metadata(reader, writer)
    writer.add_file_type(getattr(gguf.LlamaFileType, {"f32": "ALL_F32"}.get(file_type, f"MOSTLY_{file_type.upper()}")))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    wanted = getattr(gguf.GGMLQuantizationType, file_type.upper())
    plan = []
    for tensor in reader.tensors:
        kind = wanted if len(tensor.shape) > 1 else gguf.GGMLQuantizationType.F32  # norms and biases stay exact, as llama.cpp expects
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if kind == gguf.GGMLQuantizationType.Q8_0 and shape[-1] % 32:
            kind = gguf.GGMLQuantizationType.F16
        size = gguf.quant_shape_to_byte_shape(shape, kind) if kind != gguf.GGMLQuantizationType.F32 else shape
        itemsize = 4 if kind == gguf.GGMLQuantizationType.F32 else 1
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), int(np.prod(size)) * itemsize, raw_dtype=kind if kind != gguf.GGMLQuantizationType.F32 else None)
        plan.append((tensor, shape, kind))
    missing = set(replace or {}) - {tensor.name for tensor in reader.tensors}
    if missing:
        raise ExportError(f"{template}: the template has no tensor {sorted(missing)[0]!r}: it is of another model")
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, shape, kind in plan:
            values = replace[tensor.name]() if replace and tensor.name in replace else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            values = np.ascontiguousarray(values, dtype=np.float32)
            if values.shape != shape:
                raise ExportError(f"{tensor.name}: shape {values.shape} does not fit the template's {shape}: another model's GGUF?")
            writer.write_tensor_data(gguf.quants.quantize(values, kind))
        writer.close()
        os.replace(temporary, target)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    return target


def import_tokenizer(source: Path):
    """The tokenizer of a GGUF. Two of transformers' gaps are closed: it takes the special tokens from a class default
    instead of the file (SmolLM2's end token becomes <|im_start|>, and the model would never learn to stop), and it would
    strip spaces before punctuation when decoding."""
    import gguf
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ExportError(f"{source}: transformers cannot read this GGUF's tokenizer ({str(error).splitlines()[0]})") from error
    reader = gguf.GGUFReader(source)
    tokens = reader.get_field("tokenizer.ggml.tokens")
    for name in ("bos", "eos", "padding", "unknown"):
        field = reader.get_field(f"tokenizer.ggml.{name}_token_id")
        if field is not None:
            setattr(tokenizer, {"padding": "pad_token", "unknown": "unk_token"}.get(name, f"{name}_token"), tokens.contents(int(field.contents())))
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def import_gguf(source: Path, target: Path) -> Path:
    """Dequantize a GGUF into a Hugging Face directory `target` (bfloat16 safetensors, tokenizer, chat template).

    transformers does the reading; it keeps a quantizer on the dequantized model, which is taken off here.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    tokenizer = import_tokenizer(source)
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ExportError(f"{source}: transformers cannot import this GGUF ({str(error).splitlines()[0]}); give the model's Hugging Face directory") from error
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    temporary = atomic(target)
    model.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    add_compatibility_keys(temporary / "config.json")
    os.replace(temporary, target)
    return target


def add_compatibility_keys(path: Path) -> None:
    """transformers 5 writes rope_parameters, 4.x reads rope_theta and silently takes 10,000 without it: write both."""
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    path.write_text(json.dumps(config, indent=2) + "\n")


# ---------------------------------------------------------------------------------- LoRA out


def read_adapter(adapter: Path) -> tuple[dict, dict]:
    """A PEFT adapter directory -> (adapter_config, tensors {module path: (A [r, in], B [out, r])} in float32).

    Refused in one line: pickle (.bin), DoRA, modules_to_save, rank patterns: a merge or a GGUF LoRA would lose them.
    """
    from safetensors.torch import load_file

    config_path, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    if not config_path.is_file() or not weights.is_file():
        hint = "adapter_model.bin is a pickle and is not read" if (adapter / "adapter_model.bin").is_file() else "adapter_config.json and adapter_model.safetensors are needed"
        raise ExportError(f"{adapter}: not a LoRA adapter ({hint})")
    try:
        config = json.loads(config_path.read_text())
        tensors = load_file(weights)
    except Exception as error:  # safetensors raises its own exception class for a damaged file
        raise ExportError(f"{adapter}: damaged adapter ({str(error).splitlines()[0]})") from error
    for key in ("use_dora", "modules_to_save", "rank_pattern"):
        if config.get(key):
            raise ExportError(f"{adapter}: {key} is not supported; train a plain LoRA")
    return config, lora_pairs(tensors, str(adapter))


def lora_pairs(tensors: dict, where: str = "LoRA") -> dict:
    """PEFT's state {"base_model.model.<module>.lora_A.weight": tensor, ..} -> {module: (A [r, in], B [out, r])}, float32."""
    pairs: dict[str, dict[str, object]] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        if kind not in ("A", "B"):
            raise ExportError(f"{where}: unexpected tensor {name!r} in a plain LoRA")
        pairs.setdefault(module, {})[kind] = tensor.float()
    return {module: (pair["A"], pair["B"]) for module, pair in pairs.items()}


def lora_scale(config: dict, module: str = "") -> float:
    """PEFT's scale of B @ A: alpha / r, or alpha / sqrt(r) for rsLoRA; alpha_pattern may name a module's own alpha."""
    alpha = next((a for pattern, a in (config.get("alpha_pattern") or {}).items() if module.endswith(pattern)), config["lora_alpha"])
    return alpha / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])


def write_lora_gguf(adapter_config: dict, pairs: dict, base_config: dict, target: Path, half: bool = False) -> Path:
    """A PEFT LoRA as llama.cpp's GGUF adapter, float32 or (`half`) float16. Scales are folded into B; only B of q/k is permuted (A is on the input side)."""
    import gguf
    import numpy as np

    architecture, permuted, _ = _architecture(base_config, "LoRA")
    names, dtype = _gguf_names(base_config), np.float16 if half else np.float32
    temporary = atomic(target)
    writer = gguf.GGUFWriter(temporary, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter_config["r"]))  # llama.cpp scales by alpha / r = 1
    for module, (a, b) in sorted(pairs.items()):
        name = names.get_name(module)
        if name is None:
            raise ExportError(f"{module}: no GGUF tensor of {architecture} corresponds to it")
        rows = b.float().numpy() * lora_scale(adapter_config, module)
        if permuted and (heads := _heads(module, base_config)):
            rows = _permute(rows, heads)
        writer.add_tensor(f"{name}.weight.lora_a", np.ascontiguousarray(a.float().numpy(), dtype=dtype))
        writer.add_tensor(f"{name}.weight.lora_b", np.ascontiguousarray(rows, dtype=dtype))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, target)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    return target


# ---------------------------------------------------------------------------------- merge


def base_tensors(base: Path) -> Iterator[tuple[str, object]]:
    """(name, tensor) of a Hugging Face directory, read one by one from its safetensors shards."""
    from safetensors import safe_open

    shards = sorted(base.glob("*.safetensors"))
    if not shards:
        raise ExportError(f"{base}: no *.safetensors in the base's directory")
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def nf4_round_trip(weight):
    """The values a 4-bit (NF4, double-quantized) Linear really computes with: quantize and dequantize, float32 [out, in]."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed, state = quantize_4bit(weight.to(device), blocksize=64, quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(packed, state).float().cpu()


def merge_tensors(base: Path, adapter: Path, bits: int) -> Iterator[tuple[str, object]]:
    """(name, W + scale * B @ A) for every tensor of the base, in float32 arithmetic, rounded to the base's dtype.

    A LoRA trained on NF4 corrects NF4's errors too, so for `bits` = 4 it is added to the *dequantized NF4* weights
    (measured: KL to the trained model 2e-12, against 0.088 when added to the 16-bit base).
    """
    config, pairs = read_adapter(adapter)
    base_config = json.loads((base / "config.json").read_text())
    left = set(pairs)
    for name, tensor in base_tensors(base):
        module = name.removesuffix(".weight")
        quantized = is_quantized(name, tensor, bits)
        merged = tensor
        if module in pairs or quantized:
            merged = nf4_round_trip(tensor) if quantized else tensor.float()
            if module in pairs:
                a, b = pairs[module]
                if (b.shape[0], a.shape[1]) != tuple(tensor.shape):
                    raise ExportError(f"{adapter}: LoRA of {module} is {b.shape[0]}x{a.shape[1]}, the base's weight {tuple(tensor.shape)}: adapter of another base")
                merged = merged + lora_scale(config, module) * (b @ a)
                left.discard(module)
            merged = merged.to(tensor.dtype)
        yield name, merged
    if left:
        raise ExportError(f"{adapter}: module {sorted(left)[0]!r} is not in the base {base} ({base_config.get('model_type')}): adapter of another base")


def write_merged(base: Path, adapter: Path, bits: int, target: Path, shard_bytes: int = 5_000_000_000) -> Path:
    """The merged model as a directory that plain `transformers` loads; shards of at most `shard_bytes`, written as they fill."""
    from safetensors.torch import save_file

    temporary = atomic(target)
    temporary.mkdir(parents=True)
    try:
        shard, size, index, parts = {}, 0, {}, []

        def flush():
            nonlocal shard, size
            parts.append(f"part-{len(parts):05d}.safetensors")
            save_file(shard, temporary / parts[-1], metadata={"format": "pt"})
            index.update(dict.fromkeys(shard, parts[-1]))
            shard, size = {}, 0

        total = 0
        for name, tensor in merge_tensors(base, adapter, bits):
            n_bytes = tensor.numel() * tensor.element_size()
            if shard and size + n_bytes > shard_bytes:
                flush()
            shard[name], size, total = tensor.contiguous(), size + n_bytes, total + n_bytes
        flush()
        final = {old: f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors" for i, old in enumerate(parts)}
        for old, new in final.items():
            os.replace(temporary / old, temporary / new)
        if len(parts) > 1:
            weight_map = {name: final[part] for name, part in index.items()}
            (temporary / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
        for file in base.iterdir():  # tokenizer, chat template, generation config: as they are
            if file.suffix in (".json", ".jinja", ".model", ".txt") and file.name != "model.safetensors.index.json":
                shutil.copyfile(file, temporary / file.name)
        add_compatibility_keys(temporary / "config.json")
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def gguf_tensors(directory: Path, bits: int = 16) -> Iterator[tuple[str, object]]:
    """(GGUF tensor name, function returning its float32 values) for each tensor of a Hugging Face directory, in GGUF's own layout.

    bits 4: linear layers pass through NF4 and back, so llama.cpp computes with the values a 4-bit torch model does.
    """
    from safetensors import safe_open

    config = json.loads((directory / "config.json").read_text())
    _, permuted, norm_plus_one = _architecture(config, str(directory))
    names = _gguf_names(config)
    for shard in sorted(directory.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            keys = list(file.keys())
        for name in keys:
            gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if gguf_name is None:
                raise ExportError(f"{name}: no GGUF tensor corresponds to it")
            if gguf_name == "output.weight" and config.get("tie_word_embeddings"):
                continue

            def values(shard=shard, name=name):
                with safe_open(shard, framework="pt") as file:
                    tensor = file.get_tensor(name)
                tensor = nf4_round_trip(tensor) if is_quantized(name, tensor, bits) else tensor.float()
                if permuted and (heads := _heads(name, config)):
                    tensor = _permute(tensor, heads)
                return (tensor + 1 if norm_plus_one and name.endswith("norm.weight") else tensor).numpy()

            yield gguf_name, values


def is_quantized(name: str, tensor, bits: int) -> bool:
    """Does a 4-bit run hold this tensor in NF4? All linear layers but the output head (transformers' own rule)."""
    return bits == 4 and tensor.ndim == 2 and name.endswith(".weight") and "lm_head" not in name and "embed" not in name


def modelfile(gguf_name: str, chat_template: str, stop: Iterable[str], temperature: float) -> str:
    """An Ollama Modelfile for a GGUF that lies beside it. Ollama wants a Go template: the two common shapes are written, else its own detection is used."""
    lines = [f"FROM ./{gguf_name}"]
    if "<|im_start|>" in chat_template:
        lines.append('TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"""')
    elif "<start_of_turn>" in chat_template:
        lines.append('TEMPLATE """{{- range .Messages }}<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}user{{ end }}\n{{ .Content }}<end_of_turn>\n{{ end }}<start_of_turn>model\n"""')
    lines += [f'PARAMETER stop "{word}"' for word in stop]
    return "\n".join([*lines, f"PARAMETER temperature {temperature}", ""])


# ---------------------------------------------------------------------------------- proof


def kl_and_agreement(trained, other) -> tuple[float, float]:
    """(mean KL(trained || other) in nats, share of equal greedy tokens) of next-token logits float32 [prompts, vocabulary]."""
    import numpy as np

    def log_softmax(x):
        x = x.astype(np.float64)
        x = x - x.max(1, keepdims=True)
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    width = min(trained.shape[1], other.shape[1])  # a padded vocabulary may differ in its unused tail
    p, q = log_softmax(trained[:, :width]), log_softmax(other[:, :width])
    return float((np.exp(p) * (p - q)).sum(1).mean()), float((p.argmax(1) == q.argmax(1)).mean())


def verdict(kl_export: float, kl_base: float) -> str | None:
    """None if the export kept what was trained, else why not. Far below the size of the effect: at most a tenth of it."""
    if kl_export != kl_export or kl_export > max(0.1 * kl_base, 1e-4):
        return f"KL to the trained model is {kl_export:.4f}, not far below the {kl_base:.4f} that training moved the base: the export lost what was trained"
    return None
