"""Offline means offline: the whole demo with every socket blocked, in every process of it."""

import json
import os
import subprocess
import sys

import pytest

from kardia.core.options import DATA, PROJECT

# On the path of every process of the demo, the worker's included, before anything else is imported.
NO_SOCKETS = """
import os, socket

def blocked(*arguments, **_):
    with open(os.environ["ATTEMPTS"], "a") as file:
        file.write(repr(arguments)[:200] + "\\n")
    raise OSError("no network in this test")

class Socket(socket.socket):
    def connect(self, address):
        local = self.family == getattr(socket, "AF_UNIX", None)
        return super().connect(address) if local else blocked("connect", address)

    def connect_ex(self, address):
        local = self.family == getattr(socket, "AF_UNIX", None)
        return super().connect_ex(address) if local else blocked("connect_ex", address)

    def sendto(self, *arguments):
        return blocked("sendto", *arguments[1:])

socket.socket = Socket
socket.getaddrinfo = socket.gethostbyname = socket.gethostbyname_ex = socket.create_connection = blocked
"""
# The demo as it is, of a little model and with every step made short: of an option that stands twice the last
# one counts.
DEMO = """
import sys
from pathlib import Path
import kardia_lite as k
from kardia.cli import demo
model, pairs, rows, out = sys.argv[1:]
demo.embedded_gguf = lambda: Path(model)
judge, quick = f"--judge {model} --exam-pairs {pairs}", "--witness none"
short = {
    "sft": f"--limit 4 --max-length 800 --model {model}",
    "judge": f"--judge {model} --pairs {pairs} {quick}",
    "grpo": f"--steps 1 --group-size 4 --max-tokens 24 --force-judge --eval-prompts 2 {judge} {quick}",
    "evaluate": f"--limit 2 --max-tokens 24 {judge} {quick}",
    "export": f"--answers 1 --max-tokens 24 --data {rows} {judge}",
}
for step in demo.STEPS:
    step["line"] += " " + short.get(step["line"].split()[0], "")
k.cli(["demo", "--out", out])
"""


@pytest.fixture
def blocked_environment(tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(NO_SOCKETS)
    # the program sets these itself
    switches = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in switches}
    path = os.pathsep.join([str(tmp_path / "path"), str(PROJECT)])
    return {**environment, "PYTHONPATH": path, "ATTEMPTS": str(tmp_path / "attempts")}


@pytest.mark.slow
def test_the_whole_demo_without_a_network(blocked_environment, tmp_path, pairs, little):
    def run(*command, **more):
        return subprocess.run(command, env=blocked_environment, capture_output=True, text=True, **more)

    tried = run(sys.executable, "-c", "import urllib.request as r; r.urlopen('http://192.0.2.1/')")
    attempts = tmp_path / "attempts"
    assert tried.returncode and "no network in this test" in tried.stderr and attempts.read_text()
    attempts.unlink()  # the block blocks; the demo must not meet it
    row = (DATA / "eval.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / "one.jsonl").write_text(row + "\n", encoding="utf-8")
    # no interface at all, where that is allowed
    alone = subprocess.run("unshare -n true", shell=True, capture_output=True).returncode == 0
    start = ["unshare", "-n", sys.executable] if alone else [sys.executable]
    demo = tmp_path / "demo"
    done = run(*start, "-c", DEMO, little, pairs, tmp_path / "one.jsonl", demo, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not attempts.exists(), attempts.read_text()
    assert (demo / "report.html").stat().st_size > 10_000 and "One chat turn" in done.stderr
    assert json.loads((demo / "grpo" / "run.json").read_text())["status"] == "done"
    assert "memory" in (demo / "report.html").read_text(encoding="utf-8").lower()
    assert (demo / "grpo" / "tokens.jsonl").is_file()
