"""Tokenizers that cut, number and frame text in different ways, none of which an edit may depend on."""

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from tests.editing.golden import FOLDER

LETTERS = "abcdefghijklmnopqrstuvwxyz,' "
START, END = "[GO]", "[STOP]"


def clip(length=77):
    """Byte pairs, that of the DPL cases: "squirrel" is two tokens."""
    return CLIPTokenizer.from_pretrained(FOLDER / "dpl" / "tokenizer", model_max_length=length)


def pieces(*prompts, length=77):
    """Words cut into pieces of four characters, that of the ViMAEdit cases."""
    cut = pre_tokenizers.Split(Regex(".{1,4}"), "isolated")
    words = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), cut])
    vocabulary = {piece for prompt in prompts for piece, _ in words.pre_tokenize_str(prompt)}
    return _framed(sorted(vocabulary), words, length)


def characters(length=77):
    """Every character is a token, spaces too."""
    return _framed(LETTERS, pre_tokenizers.Split(Regex("."), "isolated"), length)


def spaced(length=77):
    """Two characters to a token, with its leading space in its offsets, and no padding token; capitals are lowered."""
    cut = pre_tokenizers.Split(Regex(" ?[^ ]{1,2}| "), "isolated")
    vocabulary = [*LETTERS, *(space + a + b for space in ("", " ") for a in LETTERS for b in ["", *LETTERS])]
    return _framed(list(dict.fromkeys(vocabulary)), cut, length, pad=None)


def _framed(vocabulary, pre_tokenizer, length, pad="[PAD]"):
    ids = {token: n for n, token in enumerate([*vocabulary, "[UNK]", "[PAD]", START, END])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, ids[START]), (END, ids[END])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, pad_token=pad)


ALL = {"clip": clip, "characters": characters, "spaced": spaced}
