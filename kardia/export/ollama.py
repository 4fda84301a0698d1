"""Write Ollama's Modelfile for a GGUF, and the command lines that talk to a GGUF."""

# The Modelfile holds no TEMPLATE: Ollama goes by the chat template inside the GGUF. A Go template made from
# that Jinja program could differ from it. `ollama show --template kardia` prints the one that Ollama took.

from __future__ import annotations

import json
from pathlib import Path


def modelfile(gguf: str, stop: set[str], system: str, temperature: float, context: int) -> str:
    """Return the Modelfile for the file `gguf` beside it. `system` is its default system prompt."""
    lines = [f"# {line}" for line in command_lines(Path(gguf), context)]
    lines += [f"FROM ./{gguf}", f'SYSTEM """{system}"""']
    lines += [f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}" for token in sorted(stop)]
    lines += [f"PARAMETER temperature {temperature:g}", f"PARAMETER num_ctx {context}", ""]
    return "\n".join(lines)


def stop_tokens(renderer, add_bos: bool) -> set[str]:
    """Return the special tokens at which an answer must stop: what ends a turn and what begins the next one.

    With `add_bos` the runner adds BOS itself, once. Without, BOS may begin every turn, as SmolLM2's does.
    """
    tokenizer = renderer.tokenizer
    roles = ("user", "assistant", "user")
    rendered = renderer.render([{"role": role, "content": "x"} for role in roles], False)
    stop = {token for token in tokenizer.all_special_tokens if token in rendered}
    if add_bos:
        stop.discard(tokenizer.bos_token)
    return stop | {tokenizer.eos_token}


def command_lines(gguf: Path, context: int = 4096) -> list[str]:
    """Return shell lines that talk to a GGUF: llama.cpp's server, the one of llama-cpp-python, Ollama."""
    package = "'llama-cpp-python[server]'"
    return [
        f"llama-server -m {gguf} --jinja -c {context}",
        f"python -m llama_cpp.server --model {gguf} --n_ctx {context}   # pip install {package}",
        f"ollama create kardia -f {gguf.parent / 'Modelfile'} && ollama run kardia",
    ]
