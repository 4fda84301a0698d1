"""Full disks, read-only places, damaged checkpoints, strangers' checkpoints, second processes: one line, and nothing is lost."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from test_keep import SFT, files_of, steps_of

import kardia_lite as k
from kardia.core import files
from kardia.training import checkpoints

unix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX")


def run(*arguments, code=0):
    result = CliRunner().invoke(k.cli, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    if code:
        assert (
            isinstance(result.exception, SystemExit)
            and len([line for line in result.stderr.splitlines() if line.startswith("Error")]) == 1
        ), result.stderr
    return result


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(megabytes) -> a directory on a file system of that size."""
    mounted = []

    def make(megabytes):
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", path], capture_output=True
        ).returncode:
            pytest.skip("mounting a tmpfs is not allowed here")
        mounted.append(path)
        return path

    yield make
    for path in mounted:
        subprocess.run(["umount", "-l", path], check=True)


def fill(path, leave):
    free = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize
    with open(path / "filler", "wb") as file:
        file.write(b"\0" * max(0, free - leave))


# ---------------------------------------------------------------------------------- full disks


@unix
def test_a_disk_that_is_too_small_is_told_before_the_first_step(little, small_disk):
    disk = small_disk(12)
    told = run("sft", "--model", little, *SFT, "--out", disk / "run", code=1).stderr
    assert (
        "checkpoints and logs need about 0.03 GB" in told
        and "0.01 GB are free" in told
        and not (disk / "run" / "log.jsonl").exists()
    )


@unix
@pytest.mark.real
@pytest.mark.parametrize("leave", [200_000, 0])
def test_a_disk_that_fills_up_costs_nothing_but_time(little, small_disk, tmp_path, monkeypatch, leave):
    disk, to_disk, whole = small_disk(48), checkpoints.to_disk, tmp_path / "whole"
    run("sft", "--model", little, *SFT, "--out", whole)

    def full_after_the_first(directory):
        to_disk(directory)
        if directory.name == "checkpoint-2":
            fill(disk, leave)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "to_disk", full_after_the_first)
        told = run("sft", "--model", little, *SFT, "--out", disk / "run", code=1).stderr
    assert "cannot be written" in told and "make room" in told and "--resume" in told
    assert [p.name for p in checkpoints.checkpoints(k.Run(disk / "run"))] == [
        "checkpoint-2"
    ] and checkpoints.damage(disk / "run" / "checkpoint-2") is None
    steps_of(disk / "run")  # no line is torn
    (disk / "filler").unlink()
    run("sft", "--model", little, *SFT, "--out", disk / "run", "--resume")
    assert files_of(disk / "run") == files_of(whole) and steps_of(disk / "run") == steps_of(whole)


@unix
def test_all_lines_or_none(small_disk, tmp_path):
    (tmp_path / "run.json").write_text('{"command": "sft", "options": {}}')
    one = k.Run(tmp_path)
    disk = small_disk(1)
    (disk / "run.json").write_text('{"command": "sft", "options": {}}')
    other = k.Run(disk)
    one.append("log.jsonl", [{"step": 1}])
    other.append("log.jsonl", [{"step": 1}])
    fill(disk, 0)
    with pytest.raises(k.UserError, match="log.jsonl: cannot be written .*No space left"):
        other.append("log.jsonl", [{"step": 2, "text": "x" * 100_000}])
    assert (disk / "log.jsonl").read_text() == (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'
    with pytest.raises(OSError, match="run.json"):
        other.update(text="x" * 100_000)
    assert (
        json.loads((disk / "run.json").read_text()) == {"command": "sft", "options": {}}
        and len(list(disk.iterdir())) == 3
    )


@unix
def test_read_only_places_and_missing_permission(little, small_disk, tmp_path):
    disk = small_disk(4)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for arguments in (
        ["sft", "--model", little, *SFT, "--out", disk / "run"],
        ["judge", "train", "--out", disk / "judge.gguf", "--pairs", k.DATA / "nothing.jsonl"],
    ):
        assert "Traceback" not in run(*arguments, code=1).stderr
    assert (
        "Read-only file system" in run("sft", "--model", little, *SFT, "--out", disk / "run", code=1).stderr
    )
    if os.geteuid() == 0:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o700)
        os.chmod(tmp_path, 0o755)
        os.seteuid(65534)
        try:
            with pytest.raises((k.UserError, PermissionError), match="Permission denied"):
                k.Run.create(locked / "run", "sft", k.SFTOptions(), resume=False)
            with pytest.raises((k.UserError, PermissionError)):
                k.Run.create(tmp_path / "run", "sft", k.SFTOptions(), resume=False)
        finally:
            os.seteuid(0)
        assert not (tmp_path / "run").exists() and not list(locked.iterdir())


# ---------------------------------------------------------------------------------- run directories


@pytest.fixture
def run_of(tmp_path):
    """run_of(3, 5, ..) -> a Run with whole checkpoints of these steps."""

    def make(*steps):
        path = tmp_path / "run"
        path.mkdir(exist_ok=True)
        files.write_json(path / "run.json", {"command": "sft", "options": {}, "status": "running"})
        for step in steps:
            (here := path / f"checkpoint-{step}").mkdir()
            files.write_json(here / "trainer_state.json", {"global_step": step, "max_steps": 100})
            for name in ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth"):
                (here / name).write_bytes(name.encode() * 100)
            files.write_json(here / checkpoints.SEAL, {p.name: files.file_hash(p) for p in here.iterdir()})
        return k.Run(path)

    return make


def test_a_damaged_checkpoint_is_skipped_with_a_line(run_of, capsys):
    run = run_of(5, 10, 15, 20, 25)
    newest = run.path / "checkpoint-25" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:-1])  # a torn file
    flipped = run.path / "checkpoint-20" / "adapter_model.safetensors"
    flipped.write_bytes(flipped.read_bytes().replace(b"adapter", b"adaptfr", 1))  # a flipped bit, same size
    (run.path / "checkpoint-15" / "rng_state.pth").unlink()
    (run.path / "checkpoint-10" / checkpoints.SEAL).write_text("{")
    assert checkpoints.newest(run).name == "checkpoint-5"
    assert [line.strip() for line in capsys.readouterr().err.splitlines()] == [
        "checkpoint-25 is skipped (optimizer.pt is damaged)",
        "checkpoint-20 is skipped (adapter_model.safetensors is damaged)",
        "checkpoint-15 is skipped (rng_state.pth is missing)",
        "checkpoint-10 is skipped (its seal cannot be read: Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
    ]
    (run.path / "checkpoint-5" / checkpoints.SEAL).unlink()
    assert checkpoints.newest(run) is None and "seal.json is missing" in capsys.readouterr().err


def test_checkpoints_go_by_step_whatever_the_clock_says(run_of, monkeypatch):
    """The clock jumps back an hour before the third checkpoint: it is the newest all the same, and the oldest goes."""
    run = run_of(2, 4)
    for step, at in ((2, 2e9), (4, 1.9e9)):
        os.utime(run.path / f"checkpoint-{step}", (at, at))

    class Trainer:
        class state:
            global_step = 6

        class args:
            save_total_limit = 2

        def _save_checkpoint(self, model, trial):
            here = os.path.join(self._get_output_dir(trial), "checkpoint-6")
            os.makedirs(here)
            files.write_json(k.Path(here) / "trainer_state.json", {"global_step": 6, "max_steps": 100})
            (k.Path(here) / "training_args.bin").write_bytes(b"a pickle")

    trainer = Trainer()
    checkpoints.whole_checkpoints(run, trainer)
    trainer._save_checkpoint(None, None)
    os.utime(run.path / "checkpoint-6", (1, 1))
    assert [p.name for p in checkpoints.checkpoints(run)] == [
        "checkpoint-4",
        "checkpoint-6",
    ] and checkpoints.newest(run).name == "checkpoint-6"
    assert (
        sorted(p.name for p in (run.path / "checkpoint-6").iterdir())
        == [checkpoints.SEAL, "trainer_state.json"]
        and trainer.args.save_total_limit is None
    )
    trainer._save_checkpoint(None, None)  # the same step again, as after a damaged one
    assert checkpoints.newest(run).name == "checkpoint-6" and not list(run.path.glob(".checkpoint*"))


def test_torn_and_repeated_lines_are_gone_after_a_resume(run_of):
    run = run_of()
    whole = [{"step": step, "text": "é\u2028"} for step in (1, 2, 3)]
    run.append("log.jsonl", whole)
    with open(run.path / "log.jsonl", "ab") as file:
        file.write(
            b'{"step": 4, "text": {"a": "b"}\n{"step": 9, "t\xff\xfe"}\n[1]\n{"step": "2"}\n{"step": 2, "torn": {}'
        )
    run.rewind(2)
    assert [
        json.loads(line) for line in (run.path / "log.jsonl").read_text(encoding="utf-8").split("\n") if line
    ] == whole[:2]


@unix
def test_two_processes_on_one_run(tmp_path):
    with k.Run.create(tmp_path / "run", "sft", k.SFTOptions(), resume=False):
        code = f"import sys; sys.path.insert(0, {str(k.HERE)!r}); import kardia_lite as k; k.Run.create(k.Path({str(tmp_path / 'run')!r}), 'sft', k.SFTOptions(), resume=True)"
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another process is working on this run" in second.stderr and second.returncode == 1
        k.Run(tmp_path / "run")  # reading needs no lock
    k.Run.create(tmp_path / "run", "sft", k.SFTOptions(), resume=True)
    k.Run.create(tmp_path / "run", "sft", k.SFTOptions(), resume=True).__exit__()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["run.json"]


@unix
def test_two_exports_into_one_directory(tmp_path):
    held = files.lock_directory(tmp_path / ".lock", "x")

    class Exporter(k.export_formats.Exporter):
        def __init__(self, target):
            self.target, self.work = target, target / ".part"

    (tmp_path / ".part").mkdir()
    (tmp_path / ".part" / "half.gguf").write_text("somebody else's")
    with pytest.raises(k.UserError, match="another process is exporting into it"), Exporter(tmp_path):
        pass
    assert (tmp_path / ".part" / "half.gguf").exists()
    files.unlock_directory(held)
    with Exporter(tmp_path):
        assert not list((tmp_path / ".part").iterdir())  # of a killed one
    assert not list(tmp_path.iterdir())


def test_resume_wants_the_same_files(tmp_path):
    k.Run.create(
        tmp_path / "run", "sft", k.SFTOptions(), resume=False, hashes={"data": "aaaa", "model": "m"}
    ).__exit__()
    k.Run.create(
        tmp_path / "run", "sft", k.SFTOptions(), resume=True, hashes={"data": "aaaa", "model": "m"}
    ).__exit__()
    with pytest.raises(k.UserError, match="the data is not what it was when the run began .aaaa, now bbbb"):
        k.Run.create(
            tmp_path / "run", "sft", k.SFTOptions(), resume=True, hashes={"data": "bbbb", "model": "m"}
        )
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["run.json"]


def test_resume_where_there_is_nothing_begins(tmp_path, capsys):
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".run.json.123.part").write_text("{")
    for name in ("killed", "new"):
        assert k.Run.create(tmp_path / name, "sft", k.SFTOptions(), resume=True).facts["status"] == "running"
        assert "nothing to go on with there; beginning" in capsys.readouterr().err


@unix
@pytest.mark.parametrize(
    "name", ["log.jsonl", "completions.jsonl", "adapter", "checkpoint-5", ".adapter.part"]
)
def test_nothing_leads_out_of_a_run_directory(run_of, tmp_path, name):
    run = run_of()
    outside = tmp_path / "outside"
    outside.write_text("mine") if name.endswith(".jsonl") else outside.mkdir()
    (run.path / name).symlink_to(outside)
    with pytest.raises(k.UserError, match="a link that leads out of the directory"):
        k.Run(run.path)
    with pytest.raises(k.UserError, match="a link that leads out of the directory"):
        k.Run.create(run.path, "sft", k.SFTOptions(), resume=True)
    assert outside.exists() and (outside.is_dir() or outside.read_text() == "mine")


@pytest.mark.parametrize(
    "facts",
    [
        "[]",
        "null",
        '"x"',
        "{",
        "[" * 10_000,
        '{"command": 1, "options": {}}',
        '{"command": "sft", "options": []}',
        '{"command": "sft", "options": {}, "bits": "4"}',
        '{"command": "sft", "options": {}, "form": {"spans": ["(a+)+$"], "hints": ["x"], "label": "a", "reply": "b", "system": "s"}}',
        '{"command": "sft", "options": {}, "ladder": {}}',
    ],
)
def test_a_damaged_run_json_is_one_line(tmp_path, facts):
    (tmp_path / "run.json").write_text(facts)
    with pytest.raises(k.UserError, match="run.json: damaged") as told:
        k.Run(tmp_path)
    assert "\n" not in told.value.format_message() and len(told.value.format_message()) < 300


class Bomb:
    def __reduce__(self):
        return (os.system, (f"touch {os.environ['BOMB']}",))


@unix
@pytest.mark.real
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_strangers_checkpoint_runs_no_code(little, tmp_path, monkeypatch, name):
    """A run directory may come from somebody else, seal and all."""
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))

    class Enough(Exception):
        pass

    def stop(*_):
        raise Enough

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "tidy", stop)
        assert isinstance(
            CliRunner()
            .invoke(k.cli, [str(a) for a in ("sft", "--model", little, *SFT, "--out", tmp_path / "run")])
            .exception,
            Enough,
        )
    run_ = k.Run(tmp_path / "run")
    run_.update(status="running")
    newest, last = checkpoints.checkpoints(
        run_
    )  # of steps 4 and 6; without the last there is something to go on with
    shutil.rmtree(last)
    shutil.rmtree(run_.path / "adapter")
    (newest / name).write_bytes(pickle.dumps(Bomb()))
    files.write_json(
        newest / checkpoints.SEAL,
        {p.name: files.file_hash(p) for p in newest.iterdir() if p.name != checkpoints.SEAL},
    )
    told = run("sft", "--model", little, *SFT, "--out", tmp_path / "run", "--resume", code=1).stderr
    assert "holds something else than numbers" in told and not (tmp_path / "exploded").exists()
