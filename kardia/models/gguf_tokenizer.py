"""Build a transformers tokenizer from a GGUF that splits text as llama.cpp does with the same file.

transformers reads these files too, but not faithfully. Special tokens come from a class's defaults (SmolLM2's
end token becomes <|im_start|>, and the model would never learn to stop), and the rule for splitting words and
digits is not read. A SentencePiece vocabulary (gemma, mistral, llama 2) becomes a Unigram model that splits
words otherwise and falls apart into characters once saved. So the two common kinds are built here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kardia.core.console import one_line
from kardia.llama.gguf_header import read_gguf
from kardia.models.model_files import ExportError

Field = Callable[[str], object]  # key below "tokenizer." -> its value, None if the file lacks it

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # kinds of token in a GGUF; 6 is a byte
SPECIALS = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}

# The pattern that cuts text into words before merging, by tokenizer.ggml.pre, and whether digits stand alone.
LIKE_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LIKE_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {
    "gpt-2": (LIKE_GPT2, False),
    "smollm": (LIKE_GPT2, True),
    "qwen2": (LIKE_LLAMA3.replace("{DIGITS}", ""), False),
    "llama-bpe": (LIKE_LLAMA3.replace("{DIGITS}", "{1,3}"), False),
}


def import_tokenizer(source: Path):
    """Return the tokenizer of a GGUF; of unknown kinds, transformers' own reading. Raise ExportError."""
    from transformers import AutoTokenizer

    header = read_gguf(source)

    def field(key: str):
        return header.value(f"tokenizer.{key}")

    try:
        kind, words = field("ggml.model"), field("ggml.pre")
        if kind == "llama":
            return _wrap(_sentencepiece(field), field, add_bos=True)
        if kind == "gpt2" and words in WORDS:
            return _wrap(_byte_level(field), field, add_bos=words == "llama-bpe")
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
        return _name_specials(tokenizer, field)
    except Exception as error:  # `tokenizers` raises plain Exception for damaged merges
        raise ExportError(f"{source}: its tokenizer cannot be read ({one_line(error)})") from error


def _name_specials(tokenizer, field: Field):
    tokens = field("ggml.tokens")
    for name, attribute in SPECIALS.items():
        if (token := field(f"ggml.{name}_token_id")) is not None:
            setattr(tokenizer, attribute, tokens[int(token)])
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def _wrap(inner, field: Field, add_bos: bool):
    """Return a `tokenizers` tokenizer with the file's special tokens and template; add_bos: the default."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    tokens = field("ggml.tokens")
    kinds = list(zip(tokens, field("ggml.token_type")))
    special = [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind == CONTROL]
    inner.add_special_tokens(special)
    inner.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == USER_DEFINED])
    bos, asked = field("ggml.bos_token_id"), field("ggml.add_bos_token")
    if bos is not None and (add_bos if asked is None else asked):
        text = tokens[int(bos)]
        inner.post_processor = processors.TemplateProcessing(
            single=f"{text} $A", pair=f"{text} $A {text} $B", special_tokens=[(text, int(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=field("chat_template"))
    return _name_specials(tokenizer, field)


def _byte_level(field: Field):
    """Return GPT-2's kind: bytes as letters, words by a pattern, merges in the file."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pattern, digits_alone = WORDS[field("ggml.pre")]
    vocabulary = {token: i for i, token in enumerate(field("ggml.tokens"))}
    merges = [tuple(pair.split(" ")) for pair in field("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=field("ggml.pre") == "llama-bpe"))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits_alone else []
    steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(field: Field):
    """Return SentencePiece's kind of BPE. The file keeps no merges but a score for each piece.

    The better the score, the earlier two neighbours become that piece.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, scores, kinds = field("ggml.tokens"), field("ggml.scores"), field("ggml.token_type")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if (longest := max(map(len, tokens))) > 512:  # each is cut at every place
        raise ValueError(f"a token of {longest:,} characters")
    merges = []
    for i, piece in enumerate(tokens):
        for cut in range(1, len(piece)) if kinds[i] == NORMAL else ():
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[i], vocabulary[left], vocabulary[right], left, right))
    pairs = [merge[3:] for merge in sorted(merges)]
    unknown = next((token for token, kind in zip(tokens, kinds) if kind == UNKNOWN), None)
    bpe = models.BPE(vocabulary, pairs, fuse_unk=True, byte_fallback=True, unk_token=unknown)
    tokenizer = Tokenizer(bpe)
    normalize = [normalizers.Replace(" ", "▁")]
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if field("ggml.add_space_prefix") in (True, None):
        normalize.insert(0, normalizers.Prepend("▁"))
        decode.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(normalize)
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer
