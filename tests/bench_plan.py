"""Print the table of docs/gpu_and_memory.md of models and cards: what the plan says, nothing measured.

python tests/bench_plan.py            the table in Markdown
python tests/bench_plan.py --count    how far the plan of an update is from the real one, without data
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kardia.models import memory_plan
from kardia.models.memory_terms import Setting, total, usable


def shape(hidden, layers, heads, kv_heads, inner, vocabulary, tied, kind="qwen2"):
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": kv_heads, "intermediate_size": inner, "vocab_size": vocabulary}
    return {"model_type": kind, "tie_word_embeddings": tied, **sizes}


SHAPES = {
    "Qwen2.5-0.5B": shape(896, 24, 14, 2, 4864, 151936, True),
    "Qwen2.5-1.5B": shape(1536, 28, 12, 2, 8960, 151936, True),
    "Qwen2.5-3B": shape(2048, 36, 16, 2, 11008, 151936, True),
    "Qwen2.5-7B": shape(3584, 28, 28, 4, 18944, 152064, False),
    "Llama-3.1-8B": shape(4096, 32, 32, 8, 14336, 128256, False, "llama"),
}
CARDS = (6, 8, 12, 16, 24)
JUDGES = {"135M judge": (270_000_000, 49_152), "3B judge, Q4_K_M": (2_000_000_000, 151_936)}
SFT = Setting(completion=2048)


def grpo(judge_bytes, judge_vocabulary, **more):
    wanted = {"prompt": 512, "completion": 256, "group": 8, "micro": 8, "rollout": "llama"}
    judge = {"judge_bytes": judge_bytes, "judge_vocabulary": judge_vocabulary}
    return Setting(**{**wanted, **judge, **more})


WANTED = {"SFT, 2,048 tokens": SFT}
WANTED |= {f"GRPO 8 x 256, {name}": grpo(*judge) for name, judge in JUDGES.items()}


def words(s):
    draws = {"none": [], "llama": [s.rollout_type], "hf": ["hf"]}[s.rollout]
    changes = ((s.micro < s.group, f"micro {s.micro}"), (not s.judge_on_gpu, "judge on CPU"))
    changes += ((s.host_embedding, "table on host"),)
    return draws + [text for applies, text in changes if applies]


def cell(config, gb, wanted):
    best, least = memory_plan.fit(config, gb, wanted)
    cut = None
    if best is None and wanted.rollout == "none":
        cut = memory_plan.longest_that_fits(config, gb, wanted)
    if cut:
        return f"{total(config, cut):.1f}, cut to {cut.completion:,} tokens"
    if best is None:
        return f"no ({total(config, least):.1f})"
    return ", ".join([f"{total(config, best):.1f}", *words(best)])


def count() -> None:
    import pytest
    import test_memory_plan as counting

    print("| planned, relative to counted | of what the update takes | with weights, LoRA and gradients |")
    print("|---|---|---|")
    for model, config in SHAPES.items():
        for what, setting in counting.SETTINGS.items():
            _, update, both = counting.compare(config, setting, pytest.MonkeyPatch())
            print(f"| {model}, {what} | {update:+.1%} | {both:+.1%} |", flush=True)


def main() -> None:
    print("| | " + " | ".join(f"{card} GB" for card in CARDS) + " |\n|---|" + "---|" * len(CARDS))
    for model, config in SHAPES.items():
        for what, wanted in WANTED.items():
            cells = [cell(config, usable(card), wanted) for card in CARDS]
            print(f"| {model}, {what} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    count() if "--count" in sys.argv else main()
