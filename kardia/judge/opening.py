"""Open a judge with its exam, its witness and what people said of it; refuse or drop what it failed.

An exam is taken once per judge, rubric, pairs and reading version, and kept in the cache. The witness is
another reader: what it says is never rewarded, so a score that rises alone is a policy that learned to please
the judge. By default it is the embedded model without any LoRA.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kardia.core import distributed, machine
from kardia.core.console import UserError, progress, say
from kardia.core.files import cache_directory, digest, file_hash, file_lock, write_json
from kardia.core.options import DATA
from kardia.data.rubric import HELD_OUT, Criterion, Rubric
from kardia.judge.agreement import known_agreement
from kardia.judge.exam import READING_VERSION, REFERENCE, load_pairs, read_pairs, run_exam, verdict
from kardia.judge.judge import (
    Calibration,
    Judge,
    JudgeOptions,
    WitnessedJudgeOptions,
    resolve_judge,
    resolve_judge_lora,
)
from kardia.llama.gguf_header import check_gguf
from kardia.llama.worker import Worker
from kardia.models.base import EMBEDDED

# What `judge exam --json data/embedded_exam.json` said of the embedded judge: minutes of every first run.
SHIPPED = DATA / "embedded_exam.json"
WITNESS_PAIRS = 12  # of each criterion: if it is right on ten, it is no coin (95%)


class Witness(Judge):
    """Another reader than the judge, without a LoRA, on the CPU: its scores are never rewarded.

    It reads a criterion by its mixture, else by contrast, by its held-out question or by pmi. If the judge is
    the same file without a LoRA, it takes no reading that is rewarded (`taken`) or has a rewarded part.
    """

    role = "witness"

    def __init__(self, worker: Worker, path, rubric: Rubric, taken: dict[str, str] | None = None) -> None:
        super().__init__(worker, path, rubric)
        self.taken = taken or {}

    def candidates(self, criterion: Criterion) -> tuple[str, ...]:
        """Return the one reading of a criterion that suits a witness; () if there is none.

        One, because every reading is an exam of its own; mixtures agree best with people (docs/judge.md).
        """
        parts = tuple(method for method, _ in criterion.mix)
        taken = self.taken.get(criterion.name)
        rewarded = {taken, *(parts if taken == "mix" else ())}
        readable = {
            "mix": parts if rewarded.isdisjoint(parts) else (),
            "contrast": criterion.cues,
            HELD_OUT: criterion.held_out,
            "pmi": "pmi" in criterion.methods,
        }
        return tuple(method for method, can in readable.items() if can and method not in rewarded)[:1]


def resolve_witness(witness: str) -> Path | None:
    """Return the witness's file: the embedded model for `auto`, None for `none`."""
    if witness == "none":
        return None
    return resolve_judge(EMBEDDED) if witness == "auto" else check_gguf(Path(witness))


def apply(judge: Judge, exam: dict) -> None:
    """Give the judge each criterion's method and calibration: from here on it speaks in probabilities."""
    judge.method, judge.calibration = {}, {}
    for name, entry in exam["criteria"].items():
        judge.method[name] = entry["method"]
        judge.calibration[name] = Calibration(entry["slope"], entry["middle"])


def unfit(result: dict) -> dict[str, str]:
    """Return {criterion: why} of the criteria that carry weight and failed."""
    entries = result["criteria"].items()
    return {name: entry["why"] for name, entry in entries if entry["weight"] > 0 and not entry["fit"]}


def open_judge(
    worker: Worker, rubric: Rubric, options: JudgeOptions, gpu_layers: int | None = None, methods=()
) -> tuple[Judge, dict]:
    """Return (the judge, its exam), methods and calibration applied, a witness at its side if one is asked.

    gpu_layers: instead of the options' own. methods: candidates for every criterion beside the rubric's.
    """
    path, adapter = resolve_judge(options.judge), resolve_judge_lora(options.judge_lora)
    layers = options.judge_gpu_layers if gpu_layers is None else gpu_layers
    judge = Judge(worker, path, rubric, layers, lora=adapter)
    pairs_path, judge_hash = options.exam_pairs, file_hash(path)
    hashes = {
        "judge_hash": judge_hash + (f"+{file_hash(adapter)}" if adapter else ""),
        "rubric_hash": rubric.hash,
        "exam_hash": file_hash(pairs_path) if pairs_path.is_file() else "missing",
    }
    key = "-".join((*hashes.values(), f"v{READING_VERSION}", *sorted(methods)))

    def examine(pairs: list[dict], on_progress: Callable) -> dict[str, Any]:
        result = run_exam(judge, pairs, hashes, on_progress, methods)
        if options.judge == EMBEDDED:
            result["judge"] = EMBEDDED  # not the cache's name for it
        return {**result, "key": key, "lora": adapter.name if adapter else None}

    # One verdict for all processes, wherever their caches are.
    result = _shipped("key", key) or _once(
        f"exam-{key}", pairs_path, rubric, f"the judge {path.name}", examine
    )
    result = distributed.same(result)
    for entry in (result, *result["criteria"].values()):  # the shipped one has its own witness
        entry.pop("witness", None)
    result.pop("witness_key", None)
    apply(judge, result)
    if isinstance(options, WitnessedJudgeOptions):
        _call_witness(judge, result, resolve_witness(options.witness), pairs_path)
    result["people"] = distributed.same(known_agreement(key))
    if machine.has_gpu() and layers and not judge.info["gpu"]:
        why = "because llama.cpp was built for no GPU: `doctor` prints the line that mends it"
        say(f"  the judge runs on the CPU, {why}")
    return judge, result


def _shipped(which: str, key: str) -> dict[str, Any]:
    """Return the exam that comes with the project if its `which` ("key", "witness_key") is `key`, else {}."""
    result = json.loads(SHIPPED.read_text(encoding="utf-8")) if SHIPPED.is_file() else {}
    return result if result.get(which) == key else {}


def _once(
    name: str, pairs_path: Path, rubric: Rubric, reader: str, examine: Callable, most: int = 0
) -> dict[str, Any]:
    """Return a kept result, or what examine(pairs, on_progress) returns, which is then kept.

    most: only so many pairs of each criterion, and no references.
    """
    kept = cache_directory() / f"{name}.json"
    if not kept.exists():
        with file_lock(kept):  # of several processes one examines, the others wait for its result
            if not kept.exists():
                names = [c.name for c in rubric.criteria]
                pairs = load_pairs(pairs_path, [*names, REFERENCE])
                if most:
                    own = {name: [row for row in pairs if row["criterion"] == name] for name in names}
                    pairs = [row for rows in own.values() for row in rows[:most]]
                say(f"examining {reader} on {len(pairs)} pairs (once per model, rubric and exam)")
                with progress("pairs", len(pairs)) as on_progress:
                    write_json(kept, examine(pairs, on_progress))
    return json.loads(kept.read_text(encoding="utf-8"))


def _call_witness(judge: Judge, result: dict, path: Path | None, pairs_path: Path) -> None:
    """Put a witness beside the judge, examined like it; its entries go into the exam's criteria."""
    if path is None:
        return
    rubric, own_hash = judge.rubric, file_hash(path)
    # Two readings by the same untaught weights are two readers only if no reading is shared.
    same = result["judge_hash"] == own_hash  # that of a judge with a LoRA names the LoRA, too
    witness = Witness(judge.worker, path, rubric, judge.method if same else None)
    methods = {c.name: witness.candidates(c) for c in rubric.criteria}

    def examine(pairs: list[dict], on_progress: Callable) -> dict[str, Any]:
        numbers = read_pairs(witness, pairs, methods, on_progress)
        read = [c for c in rubric.criteria if methods[c.name]]
        return {"criteria": {c.name: verdict(c, methods[c.name], numbers[c.name]) for c in read}}

    taken = digest(json.dumps(methods).encode())
    name = f"witness-{own_hash}-{rubric.hash}-{file_hash(pairs_path)}-{taken}-v{READING_VERSION}"
    if known := _shipped("witness_key", name).get("criteria"):
        found = {"criteria": {c: entry["witness"] for c, entry in known.items() if "witness" in entry}}
    else:
        found = _once(name, pairs_path, rubric, f"the witness {path.name}", examine, WITNESS_PAIRS)
    found = distributed.same(found)
    for criterion, entry in found["criteria"].items():
        keys = "method n accuracy low high fit why slope middle".split()
        result["criteria"][criterion]["witness"] = {key: entry[key] for key in keys}
    result |= {"witness": path.name, "witness_key": name}
    # It is read also where it does no better than a coin on these pairs; alarms ask for more.
    apply(witness, found)
    judge.witness = witness


def _reasons(failed: dict[str, str]) -> str:
    return "; ".join(f"{criterion}: {why}" for criterion, why in failed.items())


def refuse_unfit_criteria(result: dict, options: Any, before: dict) -> None:
    """Raise UserError if the judge failed criteria that carry weight and `options` neither drop nor force.

    options: unfit (refuse or drop), force_judge. before: the facts of a resumed run, which settled it.
    """
    failed, name = unfit(result), result["judge"]
    if failed and options.unfit == "refuse" and not options.force_judge and not before:
        fix = "Give a better --judge, drop these criteria with --unfit drop, or insist with --force-judge"
        raise UserError(f"the judge {name} is unfit for {', '.join(failed)} ({_reasons(failed)}). {fix}")


def drop_unfit_criteria(rubric: Rubric, result: dict, options: Any, before: dict) -> tuple[Rubric, list[str]]:
    """Return (the rubric to train with, names of dropped criteria).

    A resumed run keeps what it began with. Raises UserError if criteria are refused, or if none is left.
    """
    refuse_unfit_criteria(result, options, before)
    if before:
        dropped = before.get("dropped_criteria") or []
        return (rubric.without(dropped) if dropped else rubric), dropped
    failed, name = unfit(result), result["judge"]
    if options.force_judge:
        for criterion, why in failed.items():
            say(f"  FORCED: the judge is unfit for {criterion}: {why}")
        return rubric, []
    if not failed:
        return rubric, []
    left = rubric.without(failed)
    if not any(left.rewards.values()):
        why = f"is unfit for every criterion ({_reasons(failed)}), and nothing else is rewarded"
        raise UserError(f"the judge {name} {why}; give a better --judge")
    for criterion, why in failed.items():
        say(f"  dropped from the reward: {criterion} ({why})")
    if not left.rewards["rubric"]:
        others = " and ".join(name for name, weight in left.rewards.items() if weight)
        say(f"  no criterion is left: {others} alone are rewarded, the judge's scores are only logged")
    return left, list(failed)
