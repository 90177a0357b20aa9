"""A tiny untrained BERT as the hub has them, and battles with a rule in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from routellm.routers.base import Pair, TrainingBattles

WORDS = ("apple", "river", "tiger", "window", "garden", "pencil", "music", "winter")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def save_tiny_bert(folder: Path, *, seed: int = 0) -> Path:
    """Write a BERT of 2 layers and width 32 with a WordPiece tokenizer; it reads 64 tokens."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    digits = [f"{mark}{i}" for mark in ("", "##") for i in range(10)]
    words = [*SPECIAL, *WORDS, "hard", "easy", *digits]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{k}_token": v for k, v in names.items()}
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    return folder


def hard_battles(n: int = 300, seed: int = 1) -> TrainingBattles:
    """Return battles in which strong wins on prompts with the word `hard`, and ties on others."""
    rng = np.random.default_rng(seed)
    prompts = [
        " ".join([*rng.choice(WORDS, rng.integers(1, 9)), "hard" if i % 2 else "easy", str(i)])
        for i in range(n)
    ]
    swapped = rng.random(n) < 0.5
    preference = np.where(np.arange(n) % 2, 1.0, 0.5)
    return TrainingBattles(
        prompts=tuple(prompts),
        embeddings=np.empty((n, 0), np.float32),
        prompt=np.arange(n),
        models=("strong", "weak"),
        model_a=np.where(swapped, 1, 0),
        model_b=np.where(swapped, 0, 1),
        preference_a=np.where(swapped, 1 - preference, preference),
        weight=np.ones(n),
        label_kind=np.full(n, "human"),
        validation=np.arange(n) % 10 < 2,
        pair=Pair("strong", "weak"),
    )
