"""A model's weights on disk, as it computes with them: the base's own or their 4-bit images, and a LoRA on top; one tensor at a time.

Everything that leaves a run (merged directory, GGUF of any type, LoRA as GGUF) is made from here, in float32 and from files,
never from a live model: merging into live 4-bit weights would quantize again and erase the LoRA.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from kardia.core.console import one_line, shorten
from kardia.core.files import temporary_path
from kardia.llama.gguf_header import check_gguf


class ExportError(RuntimeError):
    """An export that cannot be made or that lost what was trained: one line for the user."""


def small_json(path: Path, most: int):
    """The value of a JSON file of at most `most` bytes. Raises ExportError."""
    try:
        with open(path, "rb") as file:
            text = file.read(most + 1)
        if len(text) > most:
            raise ValueError(f"over {most >> 10:,} kB")
        return json.loads(text.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path}: damaged ({one_line(error)})") from error


def read_gguf(path: Path):
    """gguf's reader of a file that is whole; the last one is kept, for it takes seconds over a vocabulary and is asked for several times."""
    return _reader(str(path), check_gguf(path).stat().st_mtime_ns)


def gguf_value(reader, key: str):
    """A metadata value of a GGUF, None if it has it not."""
    found = reader.get_field(key)
    try:
        return None if found is None else found.contents()
    except Exception as error:  # a text that is not UTF-8, a list without an end
        raise ExportError(f"damaged GGUF: its {shorten(key)} cannot be read ({one_line(error)})") from error


@functools.lru_cache(maxsize=1)
def _reader(path: str, changed: int):
    import gguf

    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # on a damaged file it raises whatever numpy does
        raise ExportError(f"{path}: damaged GGUF ({one_line(error)})") from error


# ---------------------------------------------------------------------------------- the LoRA

# What a PEFT adapter may hold that W + scale * B @ A does not say: keys of adapter_config.json that a plain LoRA leaves empty.
NOT_PLAIN = (
    "use_dora",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "megatron_config",  # with it PEFT imports a module that the file names
)
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights
MODULE = re.compile(r"\w{1,60}(?:\.\w{1,60}){0,19}")
# Of a stranger's regular expressions in alpha_pattern only those that no name can make slow: letters, dots, a few numbers. On an
# odd name others take hours.
HARMLESS = re.compile(r"\^?(?:[\w-]|\\?\.|(?:\\d|\[0-9\])\+?){1,200}\$?")


def read_adapter(adapter: Path) -> tuple[dict, dict]:
    """A PEFT adapter directory -> (its LoRA's r, lora_alpha, use_rslora, rank_pattern, alpha_pattern and target_modules, tensors
    {module path: (A [r, in], B [out, r])} in float32). Patterns and targets name every module in full, as the tensors do:
    nothing that a stranger wrote is left to be interpreted.

    Refused in one line: pickle (.bin), DoRA, modules_to_save and the like, which a merge or a GGUF LoRA would lose.
    """
    from safetensors.torch import load_file

    config_path, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    if not config_path.is_file() or not weights.is_file():
        pickles = sorted(
            path.name
            for path in adapter.glob("adapter_model*")
            if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")
        )
        hint = (
            f"{shorten(pickles[0])} is a pickle, which can run code, and is not read: save it as safetensors"
            if pickles
            else "adapter_config.json and adapter_model.safetensors are needed"
        )
        raise ExportError(f"{adapter}: not a LoRA adapter ({hint})")
    config = small_json(config_path, 1 << 20)
    try:
        tensors = load_file(weights)
    except Exception as error:  # safetensors raises its own exception class for a damaged file
        raise ExportError(f"{adapter}: damaged adapter ({one_line(error)})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ExportError(
            f"{adapter}: not a LoRA (peft_type {shorten(config.get('peft_type') if isinstance(config, dict) else config)!r}); only LoRA can be merged here"
        )
    for key in NOT_PLAIN:
        if config.get(key):
            raise ExportError(f"{adapter}: {key} is not supported; train a plain LoRA")
    if config.get("bias", "none") != "none":
        raise ExportError(
            f"{adapter}: trained biases (bias {shorten(config['bias'])!r}) are not supported; train a plain LoRA"
        )
    if shorten(config.get("init_lora_weights")).lower().startswith(CHANGES_THE_BASE):
        raise ExportError(
            f"{adapter}: init_lora_weights {shorten(config['init_lora_weights'])!r} changes the base's own weights; train a plain LoRA"
        )
    r, alpha, patterns = config.get("r"), config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(r, int) or isinstance(r, bool) or not 0 < r <= 1 << 16 or not _is_alpha(alpha):
        raise ExportError(
            f"{adapter}: damaged adapter (adapter_config.json without r and lora_alpha: found {shorten(r)} and {shorten(alpha)})"
        )
    for key, value in patterns.items() if isinstance(patterns, dict) else [("", patterns)]:
        if not HARMLESS.fullmatch(key) or key.count("+") > 4 or not _is_alpha(value):
            raise ExportError(
                f"{adapter}: alpha_pattern {shorten(key)!r}: {shorten(value)} is not supported (names of modules with dots and \\d+, and a number)"
            )
    pairs = lora_pairs(tensors, str(adapter))
    if not pairs:
        raise ExportError(f"{adapter}: damaged adapter (no LoRA in adapter_model.safetensors)")
    for module, (a, b) in pairs.items():
        if not MODULE.fullmatch(module) or re.search(r"\d{7}", module):
            raise ExportError(f"{adapter}: {shorten(module)!r} is no name of a module")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ExportError(
                f"{adapter}: the LoRA of {module} holds NaN or infinite numbers: the training diverged; lower --learning-rate"
            )
    alphas = {
        module: next(
            (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), alpha
        )
        for module in pairs
    }  # the first that matches, as in PEFT
    return {
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": config.get("use_rslora") is True,
        "target_modules": sorted(pairs),
        "rank_pattern": {module: a.shape[0] for module, (a, _) in pairs.items() if a.shape[0] != r},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
    }, pairs


def _is_alpha(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1e6


def lora_pairs(tensors: dict, where: str = "LoRA") -> dict:
    """PEFT's state {"base_model.model.<module>.lora_A.weight": tensor, ..} -> {module: (A [r, in], B [out, r])}, float32."""
    pairs: dict[str, dict[str, object]] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        if kind not in ("A", "B") or kind in pairs.get(module, ()):
            raise ExportError(f"{where}: unexpected tensor {shorten(name)!r} in a plain LoRA")
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise ExportError(
                f"{where}: {shorten(name)} is stored as {str(tensor.dtype).removeprefix('torch.')}; float32, float16 or bfloat16 is needed"
            )
        pairs.setdefault(module, {})[kind] = tensor.float()
    for module, pair in pairs.items():
        if (
            len(pair) < 2
            or pair["A"].ndim != 2
            or pair["B"].ndim != 2
            or pair["A"].shape[0] != pair["B"].shape[1]
            or not pair["A"].shape[0]
        ):
            raise ExportError(
                f"{where}: the LoRA of {shorten(module)} is damaged (A and B do not fit together)"
            )
    return {module: (pair["A"], pair["B"]) for module, pair in pairs.items()}


def lora_scale(config: dict, module: str, rank: int) -> float:
    """PEFT's scale of B @ A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732). alpha_pattern may give a module its own
    alpha, by its whole name; `rank` is its A's, so rank_pattern needs no reading."""
    alpha = (config.get("alpha_pattern") or {}).get(module, config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


# ---------------------------------------------------------------------------------- the base


PART = re.compile(r"[\w-][\w.-]{0,200}\.safetensors")  # a plain name: nothing leads out of the directory


def shards(directory: Path) -> dict[str, Path]:
    """{tensor name: the safetensors file that holds it} of a Hugging Face directory. A hub snapshot may hold other copies of
    the weights besides (consolidated.safetensors): the index, or model.safetensors, says which count."""
    from safetensors import safe_open

    index = directory / "model.safetensors.index.json"
    if index.is_file():
        whole = small_json(index, 64 << 20)
        names = whole.get("weight_map") if isinstance(whole, dict) else None
        if not isinstance(names, dict) or not all(
            isinstance(file, str) and PART.fullmatch(file) for file in names.values()
        ):
            raise ExportError(f"{index}: damaged (weight_map must name files beside it, tensor by tensor)")
        found = {name: directory / file for name, file in names.items()}
        if missing := sorted({str(file) for file in found.values() if not file.is_file()}):
            raise ExportError(f"{missing[0]}: this part of the model is missing; download it again")
        return found
    files = (
        [directory / "model.safetensors"]
        if (directory / "model.safetensors").is_file()
        else sorted(directory.glob("*.safetensors"))
    )
    if not files:
        raise ExportError(
            f"{directory}: no *.safetensors in the base's directory (pickled weights, .bin or .pth, are not read)"
        )
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                found.update(dict.fromkeys(opened.keys(), file))
        except Exception as error:  # safetensors' own class
            raise ExportError(f"{file}: damaged ({one_line(error)})") from error
    return found


def nf4_round_trip(weight):
    """The values a 4-bit (NF4, double-quantized) Linear really computes with: quantize and dequantize, float32 [out, in]."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed, state = quantize_4bit(weight.to(device), blocksize=64, quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(packed, state).float().cpu()


def is_quantized(name: str, n_dims: int, bits: int) -> bool:
    """Does a 4-bit run hold this tensor in NF4? All linear layers but the output head (transformers' own rule)."""
    return (
        bits == 4
        and n_dims == 2
        and name.endswith(".weight")
        and "lm_head" not in name
        and "embed" not in name
    )


class Weights:
    """The tensors of a Hugging Face directory as a model computes with them: W, or with `bits` 4 the values of its NF4 image,
    plus scale * B @ A where `adapter` has a LoRA. Read from disk one by one.

    A LoRA trained on NF4 corrects NF4's errors too, so it belongs on the dequantized NF4 weights (measured: KL to the
    trained model 2e-12, against 0.088 when added to the 16-bit base). Raises ExportError if the adapter is not of this base.
    """

    def __init__(self, directory: Path, bits: int = 16, adapter: Path | None = None) -> None:
        from kardia.core.machine import read_config

        self.directory, self.bits, self.adapter = directory, bits, adapter
        try:
            self.config = read_config(directory)
        except ValueError as error:
            raise ExportError(str(error)) from error
        self.files, self._open = shards(directory), {}
        self.lora, self.pairs = read_adapter(adapter) if adapter else ({}, {})
        for module, (a, b) in self.pairs.items():
            name = f"{module}.weight"
            if name not in self.files:
                tied = module == "lm_head" and self.config.get("tie_word_embeddings")
                raise ExportError(
                    f"{adapter}: module {module!r} is not in the base {directory} ({self.config.get('model_type')}): "
                    + ("its output layer is the embedding itself" if tied else "adapter of another base")
                )
            if (b.shape[0], a.shape[1]) != self.shape(name):
                raise ExportError(
                    f"{adapter}: LoRA of {module} is {b.shape[0]}x{a.shape[1]}, the base's weight {self.shape(name)}: adapter of another base"
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def _file(self, name: str):
        from safetensors import safe_open

        path = self.files[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]

    def _asked(self, name: str, question):
        from safetensors import SafetensorError

        try:
            return question(self._file(name))
        except SafetensorError as error:  # the index names a tensor that is not there, or the file is damaged
            raise ExportError(f"{self.files[name]}: damaged ({one_line(error)})") from error

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._asked(name, lambda file: file.get_slice(name).get_shape()))

    def stored(self, name: str):
        """The base's own tensor, in its own dtype."""
        return self._asked(name, lambda file: file.get_tensor(name))

    def changed(self, name: str) -> bool:
        return name.removesuffix(".weight") in self.pairs or is_quantized(
            name, len(self.shape(name)), self.bits
        )

    def read(self, name: str):
        """The tensor as the model computes with it, float32."""
        tensor = self.stored(name)
        values = nf4_round_trip(tensor) if is_quantized(name, tensor.ndim, self.bits) else tensor.float()
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self.pairs:
            a, b = self.pairs[module]
            values = values + lora_scale(self.lora, module, a.shape[0]) * (b @ a)
        return values

    def bytes(self) -> int:
        """Size of the weights as they are stored."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    def count(self) -> int:
        """Number of parameters stored."""
        from math import prod

        return sum(prod(self.shape(name)) for name in self.files)


# ---------------------------------------------------------------------------------- a merged directory


def write_merged(weights: Weights, target: Path, stop: list[int], shard_bytes: int = 5_000_000_000) -> Path:
    """The model as a directory that plain `transformers` loads (4.57 and 5.x), tensors in the base's dtype, shards of at most
    `shard_bytes` written as they fill. `stop`: ids of the tokens that end an answer, the first is the trained one."""
    from safetensors.torch import save_file

    temporary = temporary_path(target)
    temporary.mkdir(parents=True)
    try:
        shard, size, total, parts = {}, 0, 0, []

        def flush():
            nonlocal shard, size
            parts.append((f"part-{len(parts):05d}.safetensors", list(shard)))
            try:
                save_file(shard, temporary / parts[-1][0], metadata={"format": "pt"})
            except Exception as error:  # safetensors' own class, also for a full disk
                raise ExportError(f"{target}: cannot be written ({one_line(error)})") from error
            shard, size = {}, 0

        for name in weights:
            stored = weights.stored(name)
            n_bytes = stored.numel() * stored.element_size()
            if shard and size + n_bytes > shard_bytes:
                flush()
            shard[name] = (
                weights.read(name).to(stored.dtype) if weights.changed(name) else stored
            ).contiguous()
            size, total = size + n_bytes, total + n_bytes
        flush()
        weight_map = {}
        for i, (old, names) in enumerate(parts):
            new = (
                f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
                if len(parts) > 1
                else "model.safetensors"
            )
            (temporary / old).rename(temporary / new)
            weight_map.update(dict.fromkeys(names, new))
        if len(parts) > 1:
            (temporary / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            )
        for file in weights.directory.iterdir():  # tokenizer, chat template, generation config
            if (
                file.suffix in (".json", ".jinja", ".model", ".txt")
                and file.name != "model.safetensors.index.json"
            ):
                shutil.copyfile(file, temporary / file.name)
        add_compatibility_keys(temporary)
        add_stop_tokens(temporary, stop)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def add_compatibility_keys(directory: Path) -> None:
    """What transformers 4.x needs in a directory that 5.x wrote: 4.x reads rope_theta where 5.x writes rope_parameters, and
    silently takes 10,000 without it; gemma3 has one set for each kind of layer; tokenizer classes have other names."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if isinstance(rope.get("sliding_attention"), dict) and isinstance(rope.get("full_attention"), dict):
        config.setdefault("rope_local_base_freq", rope["sliding_attention"].get("rope_theta"))
        rope = rope["full_attention"]
        config.setdefault("sliding_window_pattern", config.get("_sliding_window_pattern", 6))
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault(
                "rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"}
            )
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    path = directory / "tokenizer_config.json"
    if path.is_file():
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        if (
            tokenizer.get("tokenizer_class") in ("TokenizersBackend", None)
            and (directory / "tokenizer.json").is_file()
        ):
            tokenizer["tokenizer_class"] = (
                "PreTrainedTokenizerFast"  # both read it: the tokenizer as tokenizer.json says, no class's own idea
            )
            path.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def add_stop_tokens(directory: Path, stop: list[int]) -> None:
    """generation_config.json names every token that ends an answer, or `generate` would run on: a chat's end of turn is
    often not the tokenizer's end of text (gemma)."""
    path = directory / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    before = config.get("eos_token_id")
    ids = list(
        dict.fromkeys(
            [*stop, *(before if isinstance(before, list) else [before] if before is not None else [])]
        )
    )
    config["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
