"""The tokenizer inside a GGUF as one for transformers that splits text as llama.cpp does with the same file.

transformers reads these files too, but not faithfully: special tokens come from a class's defaults (SmolLM2's end token becomes
<|im_start|>, and the model would never learn to stop), the file's rule for splitting words and digits is not read, a
SentencePiece vocabulary (gemma, mistral, llama 2) becomes a Unigram model that splits words otherwise and falls apart into
characters once saved, and llama.cpp's converter crashes on what was saved. So the two common kinds are built here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kardia.core.console import one_line
from kardia.models.weights import ExportError, gguf_value, read_gguf

Field = Callable[[str], object]  # key below "tokenizer." -> its value, None if the file has it not

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # kinds of token in a GGUF; 6 is a byte

# How text is cut into words before merging, by the file's name for it (tokenizer.ggml.pre); digits one by one, if so.
LIKE_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LIKE_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {
    "gpt-2": (LIKE_GPT2, False),
    "smollm": (LIKE_GPT2, True),
    "qwen2": (LIKE_LLAMA3.replace("{DIGITS}", ""), False),
    "llama-bpe": (LIKE_LLAMA3.replace("{DIGITS}", "{1,3}"), False),
}


def import_tokenizer(source: Path):
    """A transformers tokenizer from the GGUF `source`; of kinds that are not known here, transformers' own reading."""
    from transformers import AutoTokenizer

    reader = read_gguf(source)
    field: Field = lambda key: gguf_value(reader, f"tokenizer.{key}")  # noqa: E731
    try:
        if field("ggml.model") == "llama":
            tokenizer = _wrap(_sentencepiece(field), field, add_bos=True)
        elif field("ggml.model") == "gpt2" and field("ggml.pre") in WORDS:
            tokenizer = _wrap(_byte_level(field), field, add_bos=field("ggml.pre") == "llama-bpe")
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
            _name_specials(tokenizer, field)
    except Exception as error:  # `tokenizers` raises plain Exception for damaged merges
        raise ExportError(f"{source}: its tokenizer cannot be read ({one_line(error)})") from error
    return tokenizer


def _name_specials(tokenizer, field: Field) -> None:
    tokens = field("ggml.tokens")
    for name, attribute in (
        ("bos", "bos_token"),
        ("eos", "eos_token"),
        ("padding", "pad_token"),
        ("unknown", "unk_token"),
    ):
        if (token := field(f"ggml.{name}_token_id")) is not None:
            setattr(tokenizer, attribute, tokens[int(token)])
    tokenizer.clean_up_tokenization_spaces = False


def _wrap(inner, field: Field, add_bos: bool):
    """A `tokenizers` tokenizer with the file's special tokens and chat template. `add_bos`: what holds if the file does not say."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = field("ggml.tokens"), field("ggml.token_type")
    inner.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds)
            if kind == CONTROL
        ]
    )
    inner.add_tokens(
        [AddedToken(token, normalized=False) for token, kind in zip(tokens, kinds) if kind == USER_DEFINED]
    )
    bos = field("ggml.bos_token_id")
    if bos is not None and (add_bos if field("ggml.add_bos_token") is None else field("ggml.add_bos_token")):
        text = tokens[int(bos)]
        inner.post_processor = processors.TemplateProcessing(
            single=f"{text} $A", pair=f"{text} $A {text} $B", special_tokens=[(text, int(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=field("chat_template"))
    _name_specials(tokenizer, field)
    return tokenizer


def _byte_level(field: Field):
    """GPT-2's kind: bytes as letters, words by a pattern, merges in the file."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pattern, digits_alone = WORDS[field("ggml.pre")]
    vocabulary = {token: i for i, token in enumerate(field("ggml.tokens"))}
    merges = [tuple(pair.split(" ")) for pair in field("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=field("ggml.pre") == "llama-bpe"))
    cut = [
        *([pre_tokenizers.Digits(individual_digits=True)] if digits_alone else []),
        pre_tokenizers.Split(Regex(pattern), "isolated"),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(field: Field):
    """SentencePiece's kind of BPE. The file keeps no merges but a score for each piece: the better the score, the earlier two
    neighbours become that piece."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, scores, kinds = field("ggml.tokens"), field("ggml.scores"), field("ggml.token_type")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if (longest := max(map(len, tokens))) > 512:  # each is cut at every place
        raise ValueError(f"a token of {longest:,} characters")
    pairs = [
        (-scores[i], vocabulary[piece[:cut]], vocabulary[piece[cut:]], piece[:cut], piece[cut:])
        for i, piece in enumerate(tokens)
        if kinds[i] == NORMAL
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    unknown = next((token for token, kind in zip(tokens, kinds) if kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [pair[3:] for pair in sorted(pairs)],
            fuse_unk=True,
            byte_fallback=True,
            unk_token=unknown,
        )
    )
    prefix = field("ggml.add_space_prefix") in (True, None)
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return tokenizer
