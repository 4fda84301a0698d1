"""Set process-wide switches before anything heavy is imported."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import click

from kardia.core import distributed, machine
from kardia.models.base import EMBEDDED

FILE = click.Path(path_type=Path)
DEFAULTS = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "BITSANDBYTES_NOWELCOME": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_DISABLE": "1",  # other libraries' progress bars would cut through our lines
}


def configure_process(offline: bool, *models: str) -> None:
    """Set environment, logging and memory. Without a hub id among `models` the process works offline."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if distributed.size() == 1:
        # transformers would spread a batch over all GPUs that it sees, llama.cpp a model's layers.
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if offline or all(name == EMBEDDED or Path(name).exists() for name in models):
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    machine.keep_freed_pages()
    for category in (FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
