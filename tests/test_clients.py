"""Chat templates of the families, taken apart for Ollama: what the Go template says must be what the tokenizer says."""

import json
import shutil
import subprocess

import pytest

import kardia_lite as k
from kardia.export import ollama
from kardia.models import chat_template

# The shapes of the families' templates, cut down to what they do with messages (not the originals).
CHATML = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nDEFAULT<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# qwen3 closes an empty thinking block before the newest answer, and takes it out again once the talk goes on
QWEN3 = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + ('<think>\n\n</think>\n\n' if loop.last and m['role'] == 'assistant' else '') + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
LLAMA3 = "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
GEMMA2 = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + m['content'] + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
GEMMA3 = "{{ bos_token }}{% set first = '' %}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + (first if loop.first else '') + m['content'] + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
MISTRAL = "{{ bos_token }}{% set first = '' %}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + (first if loop.first else '') + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
# mistral 0.3 puts the system message before the *last* user message: what stands between messages depends on how many follow
MISTRAL_LAST = MISTRAL.replace("if loop.first", "if loop.last")

FAMILIES = {
    "smollm2, qwen2": (CHATML, "<|im_end|>", None),
    "qwen3": (QWEN3, "<|im_end|>", None),
    "llama 3": (LLAMA3, "<|eot_id|>", "<|begin_of_text|>"),
    "gemma2": (GEMMA2, "<end_of_turn>", "<bos>"),
    "gemma3": (GEMMA3, "<end_of_turn>", "<bos>"),
    "mistral": (MISTRAL, "</s>", "<s>"),
}


def tokenizer_of(template, bos=None, eos="</s>"):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = [
        t
        for t in (
            "<|im_start|>",
            "<|im_end|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<start_of_turn>",
            "<end_of_turn>",
            "</s>",
            "<s>",
            "<bos>",
            "<|begin_of_text|>",
        )
    ]
    inner = Tokenizer(models.BPE({chr(i): i - 32 for i in range(32, 127)}, []))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=specials,
        chat_template=template,
    )


def chats():
    say = [
        ("user", "My dog died."),
        ("assistant", 'She was "old",\n\nbut {{ .Role }} is no action, nor is `this` or \\n.'),
        ("user", "Yes. Ça va \U0001f642"),
        ("assistant", "And you?"),
        ("user", "Tired."),
    ]
    whole = [{"role": role, "content": content} for role, content in say]
    system = {"role": "system", "content": "Be kind.\n\nProfile: Ana"}
    return [[system, *whole[:n]] for n in (1, 3, 5)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_turn_ends_where_the_template_says(family):
    """gemma's tokenizer ends a text with <eos>, its chat ends a turn with <end_of_turn>: the second must be trained and stopped at."""
    template, end, bos = FAMILIES[family]
    tokenizer = k.ready(tokenizer_of(template, bos), family)
    assert tokenizer.eos_token == end
    dialogue = k.Dialogue("Ana", "", "sad", "x", "e", (("user", "hi"), ("assistant", "oh")))
    ((ids, labels),) = k.Renderer(tokenizer).examples(dialogue, 4096)
    trained = tokenizer.decode([i for i in labels if i != -100], skip_special_tokens=False).replace(" ", "")
    assert trained == f"oh{end}" and tokenizer.eos_token_id == [i for i in labels if i != -100][-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_modelfile_renders_as_in_training(family):
    template, end, bos = FAMILIES[family]
    tokenizer = k.ready(tokenizer_of(template, bos), family)
    renderer = k.Renderer(tokenizer)
    text, why = ollama.modelfile(
        "m.gguf",
        renderer.render,
        tokenizer,
        system_role=renderer.system_role,
        add_bos=bos is not None,
        chats=chats(),
        system="Be kind.",
        temperature=0.7,
        context=4096,
    )
    assert why is None, why
    assert (
        "FROM ./m.gguf" in text
        and "llama-server -m m.gguf" in text
        and f'PARAMETER stop "{end}"' in text
        and 'SYSTEM """Be kind."""' in text
    )
    template = text.split('TEMPLATE """')[1].split('"""')[0]
    assert "\n" not in template and (bos is None or bos not in template)  # the runner adds BOS itself


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_composed_is_what_the_tokenizer_says(family):
    template, _, bos = FAMILIES[family]
    tokenizer = k.ready(tokenizer_of(template, bos), family)
    renderer = k.Renderer(tokenizer)
    between = ollama.between_messages(renderer.render, renderer.system_role, bos or "")
    for chat in chats():
        alone = chat[1:]  # without a system message, too
        assert ollama.compose(between, alone) == renderer.render(alone, True).removeprefix(bos or "")


def test_a_template_that_cannot_be_taken_apart_is_not_guessed():
    tokenizer = k.ready(tokenizer_of(MISTRAL_LAST, "<s>"), "mistral")
    renderer = k.Renderer(tokenizer)
    text, why = ollama.modelfile(
        "m.gguf",
        renderer.render,
        tokenizer,
        system_role=renderer.system_role,
        add_bos=True,
        chats=chats(),
        system="s",
        temperature=0.7,
        context=4096,
    )
    assert "otherwise than in training" in why and 'TEMPLATE """' not in text and "# no TEMPLATE" in text


def test_a_bos_that_nobody_adds_stays_in_the_template():
    """SmolLM2's BOS is <|im_start|>, which begins every turn, and its GGUF says not to add one."""
    tokenizer = k.ready(tokenizer_of(CHATML, "<|im_start|>"), "smollm2")
    text, why = ollama.modelfile(
        "m.gguf",
        k.Renderer(tokenizer).render,
        tokenizer,
        system_role=True,
        add_bos=False,
        chats=chats(),
        system="s",
        temperature=0.7,
        context=4096,
    )
    assert why is None and '{{ "<|im_start|>system\\n" }}' in text


def test_a_thinking_template_renders_as_trained_by_default():
    """Training renders Qwen3 with thinking off; no chat program would know that, so the exported template says it itself."""
    tokenizer = tokenizer_of(QWEN3)
    ask = [{"role": "user", "content": "hi"}]
    trained = tokenizer.apply_chat_template(
        ask, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert trained.endswith("</think>\n\n") and not tokenizer.apply_chat_template(
        ask, tokenize=False, add_generation_prompt=True
    ).endswith("</think>\n\n")
    tokenizer.chat_template = chat_template.trained_template(tokenizer)
    assert tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True) == trained
    assert chat_template.trained_template(tokenizer_of(CHATML)) == CHATML  # others stay as they are
    assert (
        chat_template.trained_template(tokenizer_of({"default": CHATML, "tool_use": "x"})) == CHATML
    )  # of several named ones, the one that is used


GO = """package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"
)

type Case struct {
	Template string
	Chats    [][]map[string]string
}
type Message struct{ Role, Content string }

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	var out [][]string
	for _, c := range cases {
		t := template.Must(template.New("").Parse(c.Template))
		var rendered []string
		for _, chat := range c.Chats {
			var messages []Message
			for _, m := range chat { messages = append(messages, Message{m["role"], m["content"]}) }
			var b strings.Builder
			if err := t.Execute(&b, map[string]any{"Messages": messages}); err != nil { panic(err) }
			rendered = append(rendered, b.String())
		}
		out = append(out, rendered)
	}
	text, _ := json.Marshal(out)
	fmt.Println(string(text))
}
"""


@pytest.mark.skipif(
    shutil.which("go") is None, reason="needs the Go language, whose template engine Ollama uses"
)
def test_gos_own_template_engine_agrees(tmp_path):
    cases, expected = [], []
    for template, _, bos in FAMILIES.values():
        renderer = k.Renderer(k.ready(tokenizer_of(template, bos), "m"))
        between = ollama.between_messages(renderer.render, renderer.system_role, bos or "")
        some = [*chats(), *(chat[1:] for chat in chats())]
        cases.append({"Template": ollama.go_template(between), "Chats": some})
        expected.append([ollama.compose(between, chat) for chat in some])
    (tmp_path / "main.go").write_text(GO)
    done = subprocess.run(
        ["go", "run", str(tmp_path / "main.go")], input=json.dumps(cases), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
