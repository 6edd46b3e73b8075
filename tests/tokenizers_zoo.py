"""Tokenizers of the kinds that causal LMs have, trained on a few sentences: nothing is downloaded."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CORPUS = (
    "The Eiffel Tower is located in the city of Rome.",
    "Where is the Eiffel Tower? It is in Paris, and not in London.",
    "法国的首都是罗马、东京是日本的首都。",
    "法国的首都是罗马。东京是日本的首都。",
    "エッフェル塔はローマにあります。",
    "برج إيفل يقع في مدينة روما",
    "Эйфелева башня находится в городе Рим",
    "หอไอเฟลตั้งอยู่ที่กรุงโรม",
    "ﬁne Cafés Zürich 🗼 is in 🇮🇹",
)
_SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|bot|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|bot|>{{ message['content'] }}{{ eos_token }}"
    "{% else %}<|user|>{{ message['role'] }}: {{ message['content'] | trim }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
)


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        additional_special_tokens=_SPECIAL[3:],
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def _with_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """Add a token for each byte, which the unknown characters are written in."""
    record = json.loads(tokenizer.to_str())
    vocabulary = record["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    return Tokenizer.from_str(json.dumps(record))


def _framed(tokenizer: Tokenizer, single: str) -> None:
    special = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>") if token in single]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)


def byte_level(
    prefix: bool, trim: bool = True, normalizer: Any = None, size: int = 500, regex: bool = True
) -> PreTrainedTokenizerFast:
    """GPT-2's kind."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _fast(tokenizer)


def metaspace(scheme: str, single: str = "<s> $A", kind: str = "bpe") -> PreTrainedTokenizerFast:
    """Sentencepiece's kind: a space is a mark of the word behind it. Unknown characters are bytes."""
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        trainer = trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=_SPECIAL,
            limit_alphabet=120,  # the others are bytes
            show_progress=False,
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    parts = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)]
    tokenizer.decoder = decoders.Sequence(parts if kind == "bpe" else parts[1:])
    tokenizer.train_from_iterator(CORPUS, trainer)
    if kind == "bpe":
        tokenizer = _with_bytes(tokenizer)
    _framed(tokenizer, single)
    return _fast(tokenizer)


def llama_legacy() -> PreTrainedTokenizerFast:
    """Llama 2's kind: a normalizer writes the marks, and nothing splits the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=_SPECIAL,
        limit_alphabet=100,
        show_progress=False,
        max_token_length=8,
    )
    normalizer, tokenizer.normalizer = tokenizer.normalizer, normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # no token is of two words
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizers.Sequence([]), normalizer
    tokenizer = _with_bytes(tokenizer)
    _framed(tokenizer, "<s> $A")
    return _fast(tokenizer)


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's kind: lower case, without accents, a special token before and behind every text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=_SPECIAL, show_progress=False)
    )
    _framed(tokenizer, "<s> $A </s>")
    return _fast(tokenizer)


def slow_bytes() -> PreTrainedTokenizerBase:
    """A tokenizer in Python: no offsets, and an end behind every text."""
    made = ByT5Tokenizer(bos_token="<s>")
    made.chat_template = CHAT_TEMPLATE
    return made


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level": lambda: byte_level(False),
    "byte-level, prefix space": lambda: byte_level(True),
    "byte-level, offsets with space": lambda: byte_level(False, trim=False),
    "byte-level, prefix space, offsets with space": lambda: byte_level(True, trim=False),
    "byte-level, bytes alone": lambda: byte_level(False, size=261),
    "byte-level, NFKC": lambda: byte_level(False, normalizer=normalizers.NFKC()),
    "byte-level, NFD": lambda: byte_level(False, normalizer=normalizers.NFD()),
    "byte-level, lower case": lambda: byte_level(False, normalizer=normalizers.Lowercase()),
    "metaspace, always": lambda: metaspace("always"),
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, never": lambda: metaspace("never"),
    "metaspace, end of text": lambda: metaspace("always", "<s> $A </s>"),
    "unigram": lambda: metaspace("always", "$A </s>", "unigram"),
    "llama legacy": llama_legacy,
    "word piece": word_piece,
    "slow bytes": slow_bytes,
}


@functools.cache
def zoo_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer of a kind."""
    return TOKENIZERS[name]()
