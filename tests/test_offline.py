"""Offline means offline: the whole demo with every socket blocked, in this process and in the llama worker."""

import json
import os
import subprocess
import sys

import pytest

import kardia_lite as k

# On the path of every process of the demo, the worker's included, before anything else is imported.
NO_SOCKETS = """
import os, socket

def blocked(*arguments, **_):
    with open(os.environ["ATTEMPTS"], "a") as file:
        file.write(repr(arguments)[:200] + "\\n")
    raise OSError("no network in this test")

class Socket(socket.socket):
    def connect(self, address):
        return super().connect(address) if self.family == getattr(socket, "AF_UNIX", None) else blocked("connect", address)

    def connect_ex(self, address):
        return super().connect_ex(address) if self.family == getattr(socket, "AF_UNIX", None) else blocked("connect_ex", address)

    def sendto(self, *arguments):
        return blocked("sendto", *arguments[1:])

socket.socket = Socket
socket.getaddrinfo = socket.gethostbyname = socket.gethostbyname_ex = socket.create_connection = blocked
"""
DEMO = """
import sys
import kardia_lite as k
short = {"exam_pairs": k.Path(sys.argv[1])}
k.DEMO_SFT |= {"limit": 4, "max_length": 800}
k.DEMO_GRPO |= {"steps": 1, "group_size": 4, "max_tokens": 24, "force_judge": True, **short}
k.DEMO_EVALUATE |= {"limit": 2, "max_tokens": 24, **short}
k.DEMO_EXPORT |= {"answers": 1, "max_tokens": 24, "data": k.Path(sys.argv[2]), **short}
k.cli(["demo", "--out", sys.argv[3]])
"""


@pytest.fixture
def blocked_environment(tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(NO_SOCKETS)
    switches = (
        "HF_HUB_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "TRANSFORMERS_OFFLINE",
    )  # the program sets them itself
    environment = {name: value for name, value in os.environ.items() if name not in switches}
    return {
        **environment,
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "path"), str(k.HERE)]),
        "ATTEMPTS": str(tmp_path / "attempts"),
    }


def test_the_block_blocks(blocked_environment, tmp_path):
    code = "import urllib.request; urllib.request.urlopen('http://192.0.2.1/')"
    tried = subprocess.run(
        [sys.executable, "-c", code], env=blocked_environment, capture_output=True, text=True
    )
    assert (
        tried.returncode and "no network in this test" in tried.stderr and (tmp_path / "attempts").read_text()
    )


@pytest.mark.real
def test_the_whole_demo_without_a_network(blocked_environment, tmp_path, pairs, embedded):
    one = tmp_path / "one.jsonl"
    one.write_text(
        (k.DATA / "eval.jsonl").read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8"
    )
    alone = (
        ["unshare", "-n"]
        if subprocess.run("unshare -n true", shell=True, capture_output=True).returncode == 0
        else []
    )  # no interface at all, where that is allowed
    done = subprocess.run(
        [*alone, sys.executable, "-c", DEMO, pairs, one, tmp_path / "demo"],
        env=blocked_environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "attempts").exists(), (tmp_path / "attempts").read_text()
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    assert (
        json.loads((tmp_path / "demo" / "grpo" / "run.json").read_text())["status"] == "done"
        and "One chat turn" in done.stderr
    )
