"""Full disks, read-only places, damaged checkpoints, second processes: one line, and nothing is lost."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from conftest import names_of, run
from test_checkpoints import files_of, steps_of

from kardia.core import files
from kardia.core.console import UserError
from kardia.core.options import PROJECT
from kardia.core.run_directory import Run
from kardia.export import formats
from kardia.training import checkpoints

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
START = '{"command": "sft", "options": {}}'
SFT = "--limit 6 --batch-size 2 --max-length 900 --max-steps 6 --save-steps 2 --learning-rate 1e-2"


@dataclasses.dataclass
class Options:
    seed: int = 1
    rate: float = dataclasses.field(default=0.1)
    save_steps: int = dataclasses.field(default=5, metadata={"free": True})


def create(path, options=None, resume=False, **facts):
    return Run.create(path, "sft", options or Options(), resume=resume, **facts)


def refused(line):
    """Return the one line that a command line is refused with."""
    result = run(line, ok=False)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    return error


@pytest.fixture
def small_disk(tmp_path, request):
    """small_disk(megabytes) -> a directory on a file system of that size."""

    def make(megabytes):
        path = tmp_path / "disk"
        path.mkdir()
        command = f"mount -t tmpfs -o size={megabytes}m tmpfs {path}".split()
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs is not allowed here")
        request.addfinalizer(lambda: subprocess.run(["umount", "-l", path], check=True))
        return path

    return make


def fill(path, leave):
    free = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize
    (path / "filler").write_bytes(b"\0" * max(0, free - leave))


# ---------------------------------------------------------------------------------- full and read-only disks


def test_all_lines_or_none_on_a_full_disk(small_disk):
    disk = small_disk(1)
    (disk / "run.json").write_text(START)
    run_ = Run(disk)
    run_.append("log.jsonl", [{"step": 1}])
    fill(disk, 0)
    with pytest.raises(UserError, match="log.jsonl: cannot be written .*No space left.*make room.*--resume"):
        run_.append("log.jsonl", [{"step": 2, "text": "x" * 100_000}])
    with pytest.raises(OSError, match="run.json"):
        run_.update(text="x" * 100_000)
    assert (disk / "log.jsonl").read_text() == '{"step": 1}\n' and (disk / "run.json").read_text() == START
    assert names_of(disk) == ["filler", "log.jsonl", "run.json"]


def test_read_only_places_and_missing_permission(small_disk, tmp_path):
    disk = small_disk(1)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(UserError, match="Read-only file system"):
        create(disk / "run")
    if os.geteuid() == 0:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o700)
        os.chmod(tmp_path, 0o755)
        os.seteuid(65534)
        try:
            for path in (locked / "run", tmp_path / "run"):
                with pytest.raises((UserError, PermissionError), match="Permission denied"):
                    create(path)
        finally:
            os.seteuid(0)
        assert names_of(tmp_path) == ["disk", "locked"] and names_of(locked) == []


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_refused_before_the_first_step(little, small_disk):
    disk = small_disk(12)
    message = refused(f"sft --model {little} {SFT} --out {disk}/run")
    assert "checkpoints and logs need about 0.03 GB" in message and "0.01 GB are free" in message
    assert not (disk / "run" / "log.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("leave", [200_000, 0])
def test_a_disk_that_fills_up_costs_nothing_but_time(little, small_disk, tmp_path, monkeypatch, leave):
    disk, to_disk, whole = small_disk(48), checkpoints.sync_to_disk, tmp_path / "whole"
    line = f"sft --model {little} {SFT} --out"
    run(f"{line} {whole}")

    def full_after_the_first(directory):
        to_disk(directory)
        if directory.name == "checkpoint-2":
            fill(disk, leave)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "sync_to_disk", full_after_the_first)
        message = refused(f"{line} {disk}/run")
    assert "cannot be written" in message and "make room" in message and "--resume" in message
    assert [p.name for p in checkpoints.checkpoints(Run(disk / "run"))] == ["checkpoint-2"]
    assert checkpoints.damage(disk / "run" / "checkpoint-2") is None
    steps_of(disk / "run")  # no line is torn
    (disk / "filler").unlink()
    run(f"{line} {disk}/run --resume")
    assert files_of(disk / "run") == files_of(whole) and steps_of(disk / "run") == steps_of(whole)


# ---------------------------------------------------------------------------------- locks


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path):
    path = tmp_path / "run"
    with create(path):
        with pytest.raises(UserError, match="another process is working on this run"):
            create(path, resume=True)
        Run(path)  # reading needs no lock
    assert names_of(path) == ["run.json"]
    code = "import sys, pathlib; from kardia.core import files; path = pathlib.Path(sys.argv[1])\n"
    code += "lock = files.lock_directory(path, 'x'); print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(path / ".lock")]
    other = subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(UserError, match="another process"):
        create(path, resume=True)
    other.kill()
    other.communicate()
    create(path, resume=True).__exit__()
    assert names_of(path) == ["run.json"]


def test_a_lock_whose_file_cannot_be_removed_is_released(tmp_path, monkeypatch):
    """As on Windows, where an open file stays: a run that is done must not end with an error."""
    lock = files.lock_directory(tmp_path / ".lock", "taken")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", Mock(side_effect=PermissionError(13, "in use by another process")))
        files.unlock_directory(lock)
    files.unlock_directory(files.lock_directory(tmp_path / ".lock", "taken"))
    assert names_of(tmp_path) == []


def test_two_exports_into_one_directory(tmp_path):
    held = files.lock_directory(tmp_path / ".lock", "x")

    class Exporter(formats.Exporter):
        def __init__(self, target):
            self.target, self.work = target, target / ".part"

    (tmp_path / ".part").mkdir()
    (tmp_path / ".part" / "half.gguf").write_text("another export's")
    with pytest.raises(UserError, match="another process is exporting into it"), Exporter(tmp_path):
        pass
    assert (tmp_path / ".part" / "half.gguf").exists()
    files.unlock_directory(held)
    with Exporter(tmp_path):
        assert not list((tmp_path / ".part").iterdir())  # the leftover of a killed one
    assert not list(tmp_path.iterdir())


def test_resume_wants_the_same_options_and_files(tmp_path, capsys):
    path, hashes = tmp_path / "run", {"data": "aaaa", "model": "m"}
    create(path, hashes=hashes).__exit__()
    with pytest.raises(UserError, match="exists already; choose another --out, or --resume"):
        create(path)
    create(path, Options(save_steps=9), resume=True, hashes=hashes).__exit__()
    with pytest.raises(UserError, match=r"--resume with another --rate \(0.2; the run has 0.1\)"):
        create(path, Options(rate=0.2), resume=True, hashes=hashes)
    with pytest.raises(UserError, match="the data is not what it was when the run began .aaaa, now bbbb"):
        create(path, resume=True, hashes={"data": "bbbb"})
    assert names_of(path) == ["run.json"] and capsys.readouterr().err == ""
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".run.json.123.part").write_text("{")
    for name in ("killed", "new"):
        assert create(tmp_path / name, resume=True).facts["status"] == "running"
        assert "nothing to go on with there; beginning" in capsys.readouterr().err


def test_torn_and_repeated_lines_are_gone_after_a_resume(tmp_path):
    (tmp_path / "run.json").write_text(START)
    run_, whole = Run(tmp_path), [{"step": step, "text": "é\u2028"} for step in (1, 2, 3)]
    run_.append("log.jsonl", whole)
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'{"step": 4, "text": {"a": "b"}\n{"step": 9, "t\xff\xfe"}\n[1]\n{"step": "2"}\n')
        file.write(b'{"step": 2, {}')
    run_.rewind(2)
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines if line] == whole[:2]


def test_nothing_leads_out_of_a_run_directory(tmp_path):
    run_, outside = tmp_path / "run", tmp_path / "outside"
    run_.mkdir()
    outside.mkdir()
    (run_ / "run.json").write_text(START)
    for name in ("log.jsonl", "adapter", "checkpoint-5", ".adapter.part"):
        (run_ / name).symlink_to(outside)
        for call in (Run, lambda path: create(path, resume=True)):
            with pytest.raises(UserError, match="a link that leads out of the directory"):
                call(run_)
        (run_ / name).unlink()
    (run_ / "latest").symlink_to("run.json")
    assert Run(run_) and outside.is_dir()


def test_a_hash_is_of_what_is_there_now(tmp_path):
    small, large = tmp_path / "small.json", tmp_path / "large.safetensors"
    for value in (b"a", b"b"):
        small.write_bytes(value)
        large.write_bytes(value * ((1 << 26) + 1))
        whole = large.read_bytes()
        assert files.file_hash(small) == files.digest(value)
        assert files.file_hash(large) == files.file_hash(large) == files.digest(whole)
        assert files.file_hash(tmp_path) == files.digest(whole + value)
        (tmp_path / "notes.txt").write_text("not a part of the model")


# ---------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def run_of(tmp_path):
    """run_of(3, 5, ..) -> a Run with whole checkpoints of these steps."""

    def make(*steps):
        path = tmp_path / "run"
        path.mkdir(exist_ok=True)
        files.write_json(path / "run.json", {"command": "sft", "options": {}, "status": "running"})
        for step in steps:
            here = path / f"checkpoint-{step}"
            here.mkdir()
            files.write_json(here / "trainer_state.json", {"global_step": step, "max_steps": 100})
            for name in ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth"):
                (here / name).write_bytes(name.encode() * 100)
            files.write_json(here / checkpoints.SEAL, {p.name: files.file_hash(p) for p in here.iterdir()})
        return Run(path)

    return make


def test_a_damaged_checkpoint_is_skipped_with_a_line(run_of, capsys):
    run_ = run_of(5, 10, 15, 20, 25)
    newest = run_.path / "checkpoint-25" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:-1])  # a torn file
    flipped = run_.path / "checkpoint-20" / "adapter_model.safetensors"
    flipped.write_bytes(flipped.read_bytes().replace(b"adapter", b"adaptfr", 1))  # a flipped bit, same size
    (run_.path / "checkpoint-15" / "rng_state.pth").unlink()
    (run_.path / "checkpoint-10" / checkpoints.SEAL).write_text("{")
    assert checkpoints.newest(run_).name == "checkpoint-5"
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert lines[:3] == [
        "checkpoint-25 is skipped (optimizer.pt is damaged)",
        "checkpoint-20 is skipped (adapter_model.safetensors is damaged)",
        "checkpoint-15 is skipped (rng_state.pth is missing)",
    ]
    assert lines[3].startswith("checkpoint-10 is skipped (its seal cannot be read") and len(lines) == 4
    (run_.path / "checkpoint-5" / checkpoints.SEAL).unlink()
    assert checkpoints.newest(run_) is None and "seal.json is missing" in capsys.readouterr().err


def test_checkpoints_go_by_step_whatever_the_clock_says(run_of):
    """The clock jumps back before the third checkpoint: it is still the newest, and the oldest goes."""
    run_ = run_of(2, 4)

    def save(model, trial):
        here = Path(trainer._get_output_dir(trial)) / "checkpoint-6"
        here.mkdir(parents=True)
        files.write_json(here / "trainer_state.json", {"global_step": 6, "max_steps": 100})
        (here / "training_args.bin").write_bytes(b"a pickle")

    state, args = SimpleNamespace(global_step=6), SimpleNamespace(save_total_limit=2)
    trainer = SimpleNamespace(state=state, args=args, _save_checkpoint=save)
    checkpoints.save_whole_checkpoints(run_, trainer)
    for _ in range(2):  # the second time as after a damaged one
        trainer._save_checkpoint(None, None)
        os.utime(run_.path / "checkpoint-6", (1, 1))
        assert [p.name for p in checkpoints.checkpoints(run_)] == ["checkpoint-4", "checkpoint-6"]
        assert checkpoints.newest(run_).name == "checkpoint-6" and not list(run_.path.glob(".checkpoint*"))
    assert names_of(run_.path / "checkpoint-6") == [checkpoints.SEAL, "trainer_state.json"]


class Bomb:
    def __reduce__(self):
        return (os.system, (f"touch {os.environ['BOMB']}",))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_foreign_checkpoint_runs_no_code(little, tmp_path, monkeypatch, name):
    """A run directory may come from somebody else, seal and all."""
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    line = f"sft --model {little} {SFT} --out {tmp_path}/run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "tidy", Mock(side_effect=ArithmeticError))
        assert isinstance(run(line, ok=False).exception, ArithmeticError)
    run_ = Run(tmp_path / "run")
    run_.update(status="running")
    newest, last = checkpoints.checkpoints(run_)  # of steps 4 and 6; without the last there is work left
    shutil.rmtree(last)
    shutil.rmtree(run_.path / "adapter")
    (newest / name).write_bytes(pickle.dumps(Bomb()))
    hashes = {p.name: files.file_hash(p) for p in newest.iterdir() if p.name != checkpoints.SEAL}
    files.write_json(newest / checkpoints.SEAL, hashes)
    assert "holds something else than numbers" in refused(f"{line} --resume")
    assert not (tmp_path / "exploded").exists()
