"""What the programs that people chat with need beside a GGUF: the chat template as trained, a Modelfile for Ollama, command lines.

A chat template is a Jinja program; Ollama wants a Go template. It is not translated but taken apart: rendering a few marked
messages shows what stands between any two of them, a Go template puts the same between them, and whether it renders
dialogues as the tokenizer does is checked before it is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

Chat = list[dict[str, str]]  # [{"role": .., "content": ..}, ..]


def between_messages(render: Callable[[Chat, bool], str], system_role: bool, bos: str) -> dict[str, str]:
    """The text between two messages of a chat, by the roles it stands between: {"start user": "<|im_start|>user\\n", ..}.

    render(chat, generate) is the tokenizer's template. `bos` is cut off the front (a runner that adds it would add it twice).
    Raises ValueError where messages change each other, not only what stands between them.
    """
    marks = {"S": "\u27eas\u27eb", "U": "\u27eau\u27eb", "A": "\u27eaa\u27eb", "V": "\u27eav\u27eb"}
    roles = {"S": "system", "U": "user", "A": "assistant", "V": "user"}

    def pieces(order: str, generate: bool = False) -> list[str]:
        text, out = render([{"role": roles[mark], "content": marks[mark]} for mark in order], generate), []
        for mark in order:
            before, found, text = text.partition(marks[mark])
            if not found:
                raise ValueError(f"a {roles[mark]} message does not appear where it was said")
            out.append(before)
        return [*out, text]

    start_user, user_assistant, assistant_user, _ = pieces("UAV")
    found = {
        "start user": start_user.removeprefix(bos),
        "user assistant": user_assistant,
        "assistant user": assistant_user,
        "user end": pieces("UAV", True)[-1],
    }
    if system_role:
        start_system, system_user, _ = pieces("SU")
        return {**found, "start system": start_system.removeprefix(bos), "system user": system_user}
    return {
        **found,
        "start system": found["start user"],
        "system user": "\n\n",
    }  # folded into the first user turn, as in training


def compose(between: dict[str, str], chat: Chat) -> str:
    """What `go_template` renders, in Python."""
    out, last = "", "start"
    for message in chat:
        out, last = (
            out + between.get(f"{last} {message['role']}", between["user assistant"]) + message["content"],
            message["role"],
        )
    return out + between["user end"]


def go_template(between: dict[str, str]) -> str:
    q = {
        key: "{{ " + json.dumps(text, ensure_ascii=False).replace("\\u003c", "<") + " }}" if text else ""
        for key, text in between.items()
    }
    return (
        '{{ $last := "start" }}{{ range .Messages }}{{ if eq .Role "system" }}'
        + q["start system"]
        + '{{ else if eq .Role "user" }}{{ if eq $last "start" }}'
        + q["start user"]
        + '{{ else if eq $last "system" }}'
        + q["system user"]
        + "{{ else }}"
        + q["assistant user"]
        + "{{ end }}{{ else }}"
        + q["user assistant"]
        + "{{ end }}{{ .Content }}{{ $last = .Role }}{{ end }}"
        + q["user end"]
    )


def modelfile(
    gguf: str,
    render: Callable[[Chat, bool], str],
    tokenizer,
    *,
    system_role: bool,
    add_bos: bool,
    chats: Sequence[Chat],
    system: str,
    temperature: float,
    context: int,
) -> tuple[str, str | None]:
    """(Ollama's Modelfile for a GGUF beside it, None or why it holds no template). `chats`: dialogues ending in a user message,
    with their system message, on which the template must equal the tokenizer's; `system`: what Ollama shall say when nothing is said."""
    bos, why = (tokenizer.bos_token or "") if add_bos else "", None
    lines = [*(f"# {line}" for line in command_lines(Path(gguf), context)), f"FROM ./{gguf}"]
    stop = {tokenizer.eos_token}
    try:
        between = between_messages(render, system_role, bos)
        for chat in chats:
            folded = (
                chat
                if system_role
                else [{"role": "user", "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}, *chat[2:]]
            )
            if compose(between, chat) != render(folded, True).removeprefix(bos):
                raise ValueError(f"a dialogue of {len(chat)} messages comes out otherwise than in training")
        lines.append(f'TEMPLATE """{go_template(between)}"""')
        stop |= {
            token
            for token in tokenizer.all_special_tokens
            if token != bos and any(token in between[key] for key in ("assistant user", "start user"))
        }
    except ValueError as error:
        why = str(error)
        lines.append(
            f"# no TEMPLATE: the chat template cannot be said in Ollama's terms ({why}); Ollama then goes by the one in the GGUF"
        )
    lines.append(f'SYSTEM """{system}"""')
    lines += [f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}" for token in sorted(stop)]
    return "\n".join(
        [*lines, f"PARAMETER temperature {temperature:g}", f"PARAMETER num_ctx {context}", ""]
    ), why


def command_lines(gguf: Path, context: int = 4096) -> list[str]:
    """How to talk to a GGUF: llama.cpp's server, the one that comes with llama-cpp-python, Ollama."""
    return [
        f"llama-server -m {gguf} --jinja -c {context}",
        f"python -m llama_cpp.server --model {gguf} --n_ctx {context}   # pip install 'llama-cpp-python[server]'",
        f"ollama create kardia -f {gguf.parent / 'Modelfile'} && ollama run kardia",
    ]
