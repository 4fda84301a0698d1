"""Read a PEFT LoRA: plain, whole and finite, or refused in one line."""

from __future__ import annotations

import re
from pathlib import Path

from kardia.core.console import one_line, shorten
from kardia.core.files import small_json
from kardia.models.model_files import ExportError

# Keys of adapter_config.json that a plain LoRA leaves empty: W + scale * B @ A does not say what they mean.
# With megatron_config PEFT would even import a module that the file names.
NOT_PLAIN = (
    "use_dora modules_to_save fan_in_fan_out lora_bias layer_replication trainable_token_indices use_qalora "
    "target_parameters use_bdlora alora_invocation_tokens arrow_config kasa_config velora_config "
    "monteclora_config megatron_config"
).split()
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights
MODULE = re.compile(r"\w{1,60}(?:\.\w{1,60}){0,19}")
# The only regular expressions accepted in alpha_pattern: no name can make them slow. Others can take hours.
HARMLESS = re.compile(r"\^?(?:[\w-]|\\?\.|(?:\\d|\[0-9\])\+?){1,200}\$?")


def read_adapter(adapter: Path) -> tuple[dict, dict]:
    """Return (facts, {module path: (A [r, in], B [out, r])} in float32) of a PEFT adapter directory.

    The facts are r, lora_alpha, use_rslora, target_modules, rank_pattern and alpha_pattern, every module
    named in full. Raise ExportError for pickles, damage, and what an export would lose (DoRA, ..).
    """
    from safetensors.torch import load_file

    _check_files(adapter)
    config = small_json(adapter / "adapter_config.json", 1 << 20)
    try:
        tensors = load_file(adapter / "adapter_model.safetensors")
    except Exception as error:  # safetensors raises its own exception class for a damaged file
        raise ExportError(f"{adapter}: damaged adapter ({one_line(error)})") from error
    patterns = _check_config(adapter, config)
    pairs = lora_pairs(tensors, str(adapter))
    _check_pairs(adapter, pairs)
    r, alpha, alphas = config["r"], config["lora_alpha"], {}
    for module in pairs:
        matching = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        alphas[module] = next(matching, alpha)  # the first that matches, as in PEFT
    facts = {"r": r, "lora_alpha": alpha, "use_rslora": config.get("use_rslora") is True}
    facts["target_modules"] = sorted(pairs)
    facts["rank_pattern"] = {module: a.shape[0] for module, (a, _) in pairs.items() if a.shape[0] != r}
    facts["alpha_pattern"] = {module: value for module, value in alphas.items() if value != alpha}
    return facts, pairs


def _check_files(adapter: Path) -> None:
    if all((adapter / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")):
        return
    hint = "adapter_config.json and adapter_model.safetensors are needed"
    for path in sorted(adapter.glob("adapter_model*")):
        if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"):
            name = shorten(path.name)
            hint = f"{name} is a pickle, which can run code, and is not read: save it as safetensors"
    raise ExportError(f"{adapter}: not a LoRA adapter ({hint})")


def _check_config(adapter: Path, config) -> dict:
    """Return the alpha_pattern of a plain LoRA's adapter_config.json, else raise ExportError."""
    kind = config.get("peft_type") if isinstance(config, dict) else config
    if not isinstance(config, dict) or kind != "LORA":
        raise ExportError(
            f"{adapter}: not a LoRA (peft_type {shorten(kind)!r}); only LoRA can be merged here"
        )
    odd = [f"{key} is not supported" for key in NOT_PLAIN if config.get(key)]
    if (bias := config.get("bias", "none")) != "none":
        odd.append(f"trained biases (bias {shorten(bias)!r}) are not supported")
    start = shorten(config.get("init_lora_weights"))
    if start.lower().startswith(CHANGES_THE_BASE):
        odd.append(f"init_lora_weights {start!r} changes the base's own weights")
    if odd:
        raise ExportError(f"{adapter}: {odd[0]}; train a plain LoRA")
    r, alpha, patterns = config.get("r"), config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(r, int) or isinstance(r, bool) or not 0 < r <= 1 << 16 or not _is_alpha(alpha):
        values = f"found {shorten(r)} and {shorten(alpha)}"
        raise ExportError(
            f"{adapter}: damaged adapter (adapter_config.json without r and lora_alpha: {values})"
        )
    for key, value in patterns.items() if isinstance(patterns, dict) else [("", patterns)]:
        if not HARMLESS.fullmatch(key) or key.count("+") > 4 or not _is_alpha(value):
            why = "is not supported (names of modules with dots and \\d+, and a number)"
            raise ExportError(f"{adapter}: alpha_pattern {shorten(key)!r}: {shorten(value)} {why}")
    return patterns


def _is_alpha(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1e6


def _check_pairs(adapter: Path, pairs: dict) -> None:
    if not pairs:
        raise ExportError(f"{adapter}: damaged adapter (no LoRA in adapter_model.safetensors)")
    for module, (a, b) in pairs.items():
        if not MODULE.fullmatch(module) or re.search(r"\d{7}", module):
            raise ExportError(f"{adapter}: {shorten(module)!r} is no name of a module")
        if not (a.isfinite().all() and b.isfinite().all()):
            why = "holds NaN or infinite numbers: the training diverged; lower --learning-rate"
            raise ExportError(f"{adapter}: the LoRA of {module} {why}")


def lora_pairs(tensors: dict, where: str = "LoRA") -> dict:
    """Return {module: (A [r, in], B [out, r])}, float32, of PEFT's state dict."""
    pairs: dict[str, dict] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        if kind not in ("A", "B") or kind in pairs.get(module, ()):
            raise ExportError(f"{where}: unexpected tensor {shorten(name)!r} in a plain LoRA")
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            dtype = str(tensor.dtype).removeprefix("torch.")
            wanted = "float32, float16 or bfloat16 is needed"
            raise ExportError(f"{where}: {shorten(name)} is stored as {dtype}; {wanted}")
        pairs.setdefault(module, {})[kind] = tensor.float()
    for module, pair in pairs.items():
        fits = len(pair) == 2 and pair["A"].ndim == 2 and pair["A"].shape[:1] == pair["B"].shape[1:]
        if not fits or not pair["A"].shape[0]:
            why = "is damaged (A and B do not fit together)"
            raise ExportError(f"{where}: the LoRA of {shorten(module)} {why}")
    return {module: (pair["A"], pair["B"]) for module, pair in pairs.items()}


def lora_scale(config: dict, module: str, rank: int) -> float:
    """Return PEFT's scale of B @ A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732).

    alpha_pattern may give a module its own alpha. `rank` is that of its A, so rank_pattern needs no reading.
    """
    alpha = (config.get("alpha_pattern") or {}).get(module, config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
