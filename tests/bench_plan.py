"""The README's table of models and cards: what the plan says (kardia/budget.py), nothing measured.

python tests/bench_plan.py            the table in Markdown
python tests/bench_plan.py --terms    and each plan term by term
python tests/bench_plan.py --count    how far the plan of an update is from what the real one takes, counted on tensors without data (a minute)
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kardia.models import memory_plan  # noqa: E402


def shape(hidden, layers, heads, kv_heads, inner, vocabulary, tied, kind="qwen2"):
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "Qwen2.5-0.5B": shape(896, 24, 14, 2, 4864, 151936, True),
    "Qwen2.5-1.5B": shape(1536, 28, 12, 2, 8960, 151936, True),
    "Qwen2.5-3B": shape(2048, 36, 16, 2, 11008, 151936, True),
    "Qwen2.5-7B": shape(3584, 28, 28, 4, 18944, 152064, False),
    "Llama-3.1-8B": shape(4096, 32, 32, 8, 14336, 128256, False, "llama"),
}
CARDS = 6, 8, 12, 16, 24
JUDGES = {"135M judge": (270_000_000, 49_152), "3B judge, Q4_K_M": (2_000_000_000, 151_936)}
SFT = memory_plan.Setting(completion=2048)


def grpo(judge_bytes, judge_vocabulary, **more):
    return memory_plan.Setting(
        **{
            "prompt": 512,
            "completion": 256,
            "group": 8,
            "micro": 8,
            "rollout": "llama",
            "judge_bytes": judge_bytes,
            "judge_vocabulary": judge_vocabulary,
            **more,
        }
    )


def words(s):
    host = ["table on host"] * s.host_embedding
    if s.rollout == "none":
        return ", ".join(host)
    passes = [f"micro {s.micro}"] * (s.micro < s.group)
    return ", ".join(
        [
            s.rollout_type if s.rollout == "llama" else "hf",
            *passes,
            *["judge on CPU"] * (not s.judge_on_gpu),
            *host,
        ]
    )


def count() -> None:
    import pytest
    import test_memory_plan as counting

    print(
        "| planned, relative to counted | of what the update takes | with weights, LoRA and gradients |\n|---|---|---|"
    )
    for model, config in SHAPES.items():
        for what, setting in counting.SETTINGS.items():
            _, update, both = counting.compare(config, setting, pytest.MonkeyPatch())
            print(f"| {model}, {what} | {update:+.1%} | {both:+.1%} |", flush=True)


def main(show_terms: bool) -> None:
    rows = [
        ("SFT, 2,048 tokens", SFT),
        *((f"GRPO 8 x 256, {name}", grpo(*judge)) for name, judge in JUDGES.items()),
    ]
    print("| | " + " | ".join(f"{card} GB" for card in CARDS) + " |\n|---|" + "---|" * len(CARDS))
    for model, config in SHAPES.items():
        for what, wanted in rows:
            cells = []
            for card in CARDS:
                best, least = memory_plan.fit(config, memory_plan.usable(card), wanted)
                if (
                    best is None
                    and wanted.rollout == "none"
                    and (best := memory_plan.longest_that_fits(config, memory_plan.usable(card), wanted))
                ):
                    cells.append(f"{memory_plan.total(config, best):.1f}, cut to {best.completion:,} tokens")
                else:
                    cells.append(
                        f"{memory_plan.total(config, best):.1f}{', ' * bool(words(best))}{words(best)}"
                        if best
                        else f"no ({memory_plan.total(config, least):.1f})"
                    )
            print(f"| {model}, {what} | " + " | ".join(cells) + " |")
    if show_terms:
        for model, config in SHAPES.items():
            for what, wanted in rows:
                for micro in (wanted.micro,):
                    found = memory_plan.terms(config, replace(wanted, micro=micro))
                    print(
                        f"\n{model}, {what}: {sum(found.values()):.2f} GB\n"
                        + "\n".join(f"  {gb:6.2f} {name}" for name, gb in found.items())
                    )


if __name__ == "__main__":
    count() if "--count" in sys.argv else main("--terms" in sys.argv)
