"""Read and check the header of a GGUF file without loading it: 0.1 s for 100,000 tokens.

The gguf package takes five seconds for the same; it is used for writing and for the types.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kardia.core.console import shorten
from kardia.llama.errors import LlamaError

MAX_STRINGS = 1 << 21  # in a GGUF's vocabulary: eight times the largest there is
MAX_KEY = 1 << 16  # bytes, by the format
# struct's letter of each metadata type: u8, i8, u16, i16, u32, i32, f32, bool, u64, i64, f64.
LETTERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))
UINT32, STRING, ARRAY = 4, 8, 9  # metadata types


@dataclass(frozen=True)
class Tensor:
    """A tensor of a GGUF file, unread."""

    path: Path
    name: str
    shape: tuple[int, ...]  # [rows, columns], as torch has it; the file has them the other way round
    kind: Any  # GGMLQuantizationType
    offset: int  # of its first byte in the file
    n_bytes: int

    @property
    def n_elements(self) -> int:
        """Return the number of weights."""
        return math.prod(self.shape)

    def values(self):
        """Return a float32 array [rows, columns]."""
        import numpy as np
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        data = np.memmap(self.path, np.uint8, "r", self.offset, (self.n_bytes,))
        return dequantize(data.reshape(quant_shape_to_byte_shape(self.shape, self.kind)), self.kind)


def check_gguf(path: str | Path) -> Path:
    """Return `path` if it is a GGUF whose header and tensors are all there. Raises LlamaError in one line."""
    return read_gguf(path).path


def read_gguf(path: str | Path) -> Header:
    """Return the header of a GGUF whose tensors are all there. Raises LlamaError in one line."""
    path = Path(path)
    if not path.is_file():
        raise LlamaError(f"{path}: no such GGUF file")
    try:
        with open(path, "rb") as file:
            magic, size = file.read(4), path.stat().st_size
            if magic != b"GGUF":
                raise LlamaError(f"{path}: not a GGUF file (it begins with {magic!r}, not with b'GGUF')")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = Header(path, data)
    except OSError as error:
        raise LlamaError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (struct.error, ValueError, KeyError, IndexError, OverflowError) as error:
        why = f"{type(error).__name__}: {str(error)[:100]}"
        raise LlamaError(f"{path}: truncated GGUF or a damaged one ({why}); download it again") from error
    if not header.tensors:
        raise LlamaError(f"{path}: this GGUF holds no tensors (a vocabulary only?); give a model's GGUF")
    if header.end > size:
        raise LlamaError(f"{path}: truncated GGUF ({size:,} bytes of {header.end:,}); download it again")
    return header


class Header:
    """A GGUF's metadata, each value read when it is asked for, and where its tensors lie.

    fields: {key: (type, place)}. tensors: {name: Tensor}. end: bytes the file must have.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 4  # behind the magic
        version, tensors, pairs = self._read("I"), self._read("Q"), self._read("Q")
        if version not in (2, 3):
            raise ValueError(f"version {version}")
        if tensors > 1 << 16 or pairs > 1 << 16:
            raise ValueError(f"{tensors} tensors, {pairs} metadata")
        self.fields: dict[str, tuple[int, int]] = {}
        for _ in range(pairs):
            key, kind = self._text(), self._read("I")
            if key in self.fields:
                raise ValueError("a key of its metadata stands there twice")
            self.fields[key] = (kind, self.at)
            self._skip(kind)
        infos = [self._tensor() for _ in range(tensors)]
        self.data = data[: self.at]  # the file is closed now
        kind, at = self.fields.get("general.alignment", (UINT32, None))
        alignment = 32 if at is None else self._value(kind, at)
        if kind != UINT32 or not alignment or alignment & (alignment - 1):
            raise ValueError(f"alignment {shorten(alignment)}")
        start = -(-self.at // alignment) * alignment
        placed = [Tensor(path, *info, start + offset, size) for *info, offset, size in infos]
        self.tensors = {tensor.name: tensor for tensor in placed}
        if len(self.tensors) != tensors:
            raise ValueError("a tensor's name stands there twice")
        # The sum counts, too: tensors that share their bytes would make a large model of a small file.
        total = start + sum(tensor.n_bytes for tensor in placed)
        self.end = max([total, *(tensor.offset + tensor.n_bytes for tensor in placed)])

    def value(self, key: str) -> Any:
        """Return a metadata value, or None if the file has none. Raises LlamaError if it cannot be read."""
        if key not in self.fields:
            return None
        try:
            return self._value(*self.fields[key])
        except ValueError as error:  # a text that is not UTF-8
            raise LlamaError(f"{self.path}: damaged GGUF (its {shorten(key)} cannot be read)") from error

    def item_type(self, key: str) -> int | None:
        """Return the type of a list's items; None for what is no list."""
        kind, at = self.fields[key]
        return struct.unpack_from("<I", self.data, at)[0] if kind == ARRAY else None

    def bf16_bytes(self) -> int:
        """Return the size that the file would have in BF16."""
        return self.at + 2 * sum(tensor.n_elements for tensor in self.tensors.values())

    def _tensor(self) -> tuple:
        """Return (name, shape, type, offset in the tensors' part, bytes) of the next tensor."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name, dimensions = self._text(), self._read("I")
        if dimensions > 4:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        shape = tuple(self._read("Q") for _ in range(dimensions))[::-1]
        kind = GGMLQuantizationType(self._read("I"))
        block, size = GGML_QUANT_SIZES[kind]
        return name, shape, kind, self._read("Q"), math.prod(shape) // block * size

    def _read(self, letter: str) -> int:
        (value,) = struct.unpack_from(f"<{letter}", self.data, self.at)
        self.at += struct.calcsize(f"<{letter}")
        return value

    def _text(self) -> str:
        """Return the next key or name."""
        length = self._read("Q")
        if length > min(MAX_KEY, len(self.data) - self.at):
            raise ValueError("a string ends beyond the file, or is no key")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def _skip(self, kind: int, count: int = 1) -> None:
        if kind == STRING:
            at = self.at
            for _ in range(count):
                at += 8 + struct.unpack_from("<Q", self.data, at)[0]
            self.at = at
        elif kind == ARRAY:
            inner, length = self._read("I"), self._read("Q")
            if inner == ARRAY or length > MAX_STRINGS:
                raise ValueError("an array of arrays, or one longer than any vocabulary")
            self._skip(inner, length)
        else:
            self.at += count * struct.calcsize(f"<{LETTERS[kind]}")

    def _value(self, kind: int, at: int) -> Any:
        """Return the value of a type at a place: a number, a text, or a list of either."""
        if kind == ARRAY:
            inner, length = struct.unpack_from("<IQ", self.data, at)
            return self._values(inner, at + 12, length)
        return self._values(kind, at, 1)[0]

    def _values(self, kind: int, at: int, count: int) -> list:
        if kind != STRING:
            return list(struct.unpack_from(f"<{count}{LETTERS[kind]}", self.data, at))
        texts = []
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", self.data, at)
            texts.append(self.data[at + 8 : at + 8 + length].decode())
            at += 8 + length
        return texts
