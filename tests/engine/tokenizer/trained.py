"""Small tokenizers, trained when a test asks, and texts that are hard to cut. For this folder."""

import json
import random
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

TRAINING_LINES = (
    "The quick brown fox jumps over the lazy dog; it's 1984, and they'll say we're done.",
    "def add(left, right):\n    return left + right  # the sum\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "いろはにほへと ちりぬるを 我が世誰ぞ 常ならむ",
    "نص حكيم له سر قاطع وذو شأن عظيم",
    "{'key': [1, 2, 3], \"other\": null}\n\n\n\t\tindented        by spaces",
    "👍🏽 👩‍👩‍👧 smile 😀 and ½ + ² = ?",
) * 4

HARD_TEXTS = (
    "",
    " ",
    "Hello, world! It's 2024; we're 12345 ok? THEY'LL don'T",
    "日本語のテキスト。漢字かな交じり文 \u3000全角\uff11\uff12",
    "مرحبا بالعالم ٤٥٦ हिन्दी में पाठ 한국어 문장",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 e\u0301 é \u212b",
    "def f(x):\n\tif x:\n\t    return {'a': [1, 2]}  # ok\r\n\r\n",
    "\x00\x01\x02\x1b[0m\x7f\x85\xa0\x1c\x1d\u2028\u2029\u200b\ufeff\u00ad",
    " " * 77 + "x" + " " * 13 + "\n\n\n \t\t \n" + "\t" * 40,
    "a" * 500 + "1" * 300 + "!" * 300,
    "  1 2  3   45 \n 1 ½² ①",
    "<|im_start|>user\nhi<|im_end|>\n <|im_end|><|endoftext|> <|im_end <|im_end|",
    "\u017f '\u017f 'S 's\u00b5",
    "\U0010fffe\U000e0041\ufffd",
)


def random_texts(count: int) -> list[str]:
    """Short texts over many scripts, digits, spaces and pieces of special tokens."""
    source = random.Random(20240607)
    pools: list[Any] = [
        range(0x20, 0x7F),
        range(0x180),
        range(0x370, 0x600),
        range(0x900, 0x980),
        range(0x2000, 0x2070),
        range(0x3040, 0x3100),
        range(0xAC00, 0xAC80),
        range(0x1F300, 0x1F650),
        [ord(char) for char in " \n\t\r<|>1's"],
    ]
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(source.randint(1, 8)):
            pool = source.choice(pools)
            parts.append("".join(chr(source.choice(pool)) for _ in range(source.randint(1, 6))))
        if source.random() < 0.3:
            parts.insert(source.randrange(len(parts)), source.choice(SPECIAL_TOKENS))
        texts.append("".join(parts))
    return texts


def train_byte_level(pre_tokenizer: Any, normalizer: Any = None) -> tokenizers.Tokenizer:
    reference = tokenizers.Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        reference.normalizer = normalizer
    reference.decoder = decoders.ByteLevel()
    reference.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    reference.train_from_iterator(TRAINING_LINES, trainer)
    return reference


def train_sentencepiece(folder: Path, **options: Any) -> bytes:
    """The bytes of a small BPE tokenizer.model."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(line.replace("\n", " ") for line in TRAINING_LINES), "utf-8")
    settings: dict[str, Any] = {
        "vocab_size": 520,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["\n", "\n\n", "▁▁", "▁▁▁", "<div>", "</div>"],
        "control_symbols": ["<turn>", "</turn>"],
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "trained"),
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
        **(settings | options),
    )
    return (folder / "trained.model").read_bytes()


def gguf_metadata_of_sentencepiece(model: bytes) -> dict[str, Any]:
    """What a converter writes for a tokenizer.model."""
    parsed = sentencepiece_model_pb2.ModelProto()
    parsed.ParseFromString(model)
    user_defined = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [
            piece.piece.replace("▁", " ") if piece.type == user_defined else piece.piece
            for piece in parsed.pieces
        ],
        "tokenizer.ggml.scores": [piece.score for piece in parsed.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in parsed.pieces],
        "tokenizer.ggml.add_space_prefix": parsed.normalizer_spec.add_dummy_prefix,
        "tokenizer.ggml.unknown_token_id": parsed.trainer_spec.unk_id,
        "tokenizer.ggml.bos_token_id": parsed.trainer_spec.bos_id,
        "tokenizer.ggml.eos_token_id": parsed.trainer_spec.eos_id,
    }


def gguf_metadata_of_byte_level(reference: tokenizers.Tokenizer, pre: str) -> dict[str, Any]:
    vocabulary = reference.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL_TOKENS else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in _merges_of(reference)],
        "tokenizer.ggml.bos_token_id": vocabulary["<|im_start|>"],
        "tokenizer.ggml.eos_token_id": vocabulary["<|im_end|>"],
        "tokenizer.ggml.add_bos_token": False,
    }


def _merges_of(reference: tokenizers.Tokenizer) -> list[list[str]]:
    merges: list[list[str]] = json.loads(reference.to_str())["model"]["merges"]
    return merges
