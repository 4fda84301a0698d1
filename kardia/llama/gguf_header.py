"""Check the header of a GGUF file without loading it."""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from kardia.llama.errors import LlamaError

MOST = 1 << 21  # strings in a GGUF's vocabulary: eight times the largest there is


def check_gguf(path: str | Path) -> Path:
    """Return `path` if it is a GGUF whose header and tensors are all there, else raise LlamaError (one line)."""
    path = Path(path)
    if not path.is_file():
        raise LlamaError(f"{path}: no such GGUF file")
    try:
        with open(path, "rb") as file:
            magic, size = file.read(4), path.stat().st_size
            if magic != b"GGUF":
                raise LlamaError(
                    f"{path}: not a GGUF file (it begins with {magic!r}, a GGUF begins with b'GGUF')"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                tensors, end = _extent(data)
    except OSError as error:
        raise LlamaError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (struct.error, ValueError, KeyError, IndexError, OverflowError) as error:
        raise LlamaError(
            f"{path}: truncated GGUF or a damaged one ({type(error).__name__}: {str(error)[:100]}); download it again"
        ) from error
    if not tensors:
        raise LlamaError(f"{path}: this GGUF holds no tensors (a vocabulary only?); give a model's GGUF")
    if end > size:
        raise LlamaError(f"{path}: truncated GGUF ({size:,} bytes of {end:,}); download it again")
    return path


def _extent(data) -> tuple[int, int]:
    """(number of tensors, bytes the file must have), from a GGUF's header alone. The gguf package reads it too, but takes
    more than a second over the 100,000 strings of a vocabulary; this walk takes some 15 milliseconds, at every start."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    at = 4

    def read(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(form, data, at)
        at += struct.calcsize(form)
        return value

    def text() -> bytes:
        nonlocal at
        length = read("<Q")
        if length > len(data) - at:
            raise ValueError("a string ends beyond the file")
        at += length
        return data[at - length : at] if length < 256 else b""

    def skip(kind: int, count: int = 1) -> None:
        nonlocal at
        if kind == 8:
            for _ in range(count):
                at += 8 + struct.unpack_from("<Q", data, at)[0]
        elif kind == 9:
            inner, length = read("<I"), read("<Q")
            if inner == 9 or length > MOST:
                raise ValueError("an array of arrays, or one longer than any vocabulary")
            skip(inner, length)
        else:
            at += count * {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}[kind]

    version, tensors, pairs = read("<I"), read("<Q"), read("<Q")
    if version not in (2, 3):
        raise ValueError(f"version {version}")
    if tensors > 1 << 16 or pairs > 1 << 16:
        raise ValueError(f"{tensors} tensors, {pairs} metadata")
    alignment, end, total = 32, 0, 0
    for _ in range(pairs):
        key, kind = text(), read("<I")
        if key == b"general.alignment" and kind == 4:
            alignment = read("<I")
        else:
            skip(kind)
    if not alignment or alignment & (alignment - 1):
        raise ValueError(f"alignment {alignment}")
    for _ in range(tensors):
        text()
        if (dimensions := read("<I")) > 4:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        elements = math.prod(read("<Q") for _ in range(dimensions))
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(read("<I"))]
        total += elements // block * size
        end = max(
            end, read("<Q") + elements // block * size, total
        )  # tensors that share their bytes would be a small file of a large model
    return tensors, -(-at // alignment) * alignment + end
