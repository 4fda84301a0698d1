"""The Modelfile for Ollama, and where an answer stops. (The chat template is the GGUF's own.)"""

from types import SimpleNamespace

from kardia.export import ollama

CHATML = "<|im_start|>{role}\n{content}<|im_end|>\n"
LLAMA3 = "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
GEMMA = "<start_of_turn>{role}\n{content}<end_of_turn>\n"
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIALS += ["<start_of_turn>", "<end_of_turn>", "<|begin_of_text|>", "<bos>", "<pad>"]


def renderer_of(template, bos, eos):
    """A chat that renders every turn as `template`, behind BOS where BOS is not the template's own."""

    def render(chat, generate):
        start = "" if bos in template else bos
        return start + "".join(template.format(**message) for message in chat)

    tokenizer = SimpleNamespace(all_special_tokens=SPECIALS, bos_token=bos, eos_token=eos)
    return SimpleNamespace(tokenizer=tokenizer, render=render)


def test_an_answer_stops_where_its_turn_ends_or_another_begins():
    llama3 = {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
    for template, bos, eos, add_bos, stop in (
        (CHATML, "<|im_start|>", "<|im_end|>", False, {"<|im_start|>", "<|im_end|>"}),
        (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", True, llama3),
        (GEMMA, "<bos>", "<end_of_turn>", True, {"<start_of_turn>", "<end_of_turn>"}),
    ):
        assert ollama.stop_tokens(renderer_of(template, bos, eos), add_bos) == stop, template


def test_a_modelfile_goes_by_the_template_in_the_gguf(renderer):
    stop = ollama.stop_tokens(renderer, add_bos=False)
    lines = ollama.modelfile("m.gguf", stop, "Be kind.\n\nProfile: Ana", 0.7, 2048).splitlines()
    settings = [line for line in lines if not line.startswith("#")]
    assert settings[:4] == ["FROM ./m.gguf", 'SYSTEM """Be kind.', "", 'Profile: Ana"""']
    stops = [f'PARAMETER stop "{token}"' for token in ("<|im_end|>", "<|im_start|>")]
    assert settings[4:] == [*stops, "PARAMETER temperature 0.7", "PARAMETER num_ctx 2048"]
    assert any("llama-server -m m.gguf --jinja -c 2048" in line for line in lines)
