"""The cache that all commands share: made once, by one process, and measured once per machine."""

import subprocess
import sys
from pathlib import Path

import pytest

from kardia.models import base

ROOT = Path(__file__).resolve().parent.parent

MAKER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from kardia.base import made_once
target = Path(sys.argv[2])
with made_once(target):
    if not target.exists():
        time.sleep(1)
        target.write_text("made")
        print("I made it")
"""


def test_two_processes_make_a_thing_once(tmp_path):
    """Two commands started together on an empty cache once wrote over each other's temporary files."""
    command = [sys.executable, "-c", MAKER, str(ROOT), str(tmp_path / "thing")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(said) == ["", "I made it\n"] and (tmp_path / "thing").read_text() == "made"


@pytest.mark.parametrize("faster", [True, False])
def test_the_attention_is_measured_once_per_machine(tmp_path, monkeypatch, faster):
    measured = []
    monkeypatch.setenv("KARDIA_CACHE", str(tmp_path))
    monkeypatch.setattr(base, "fused_is_faster", lambda worker, gguf: measured.append(gguf) or faster)
    assert [base.fused_attention(None, Path("a.gguf")), base.fused_attention(None, Path("b.gguf"))] == [
        faster,
        faster,
    ]
    assert measured == [Path("a.gguf")]
    monkeypatch.setattr(base, "machine", lambda: "another one")
    base.fused_attention(None, Path("b.gguf"))
    assert len(measured) == 2
