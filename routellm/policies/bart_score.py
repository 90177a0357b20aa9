"""BARTScore: how likely a sequence-to-sequence model finds an answer (Yuan et al. 2021).

arXiv 2106.11520, equation 2, in its direction from source to hypothesis, which needs no reference:
``1/T sum_t log p(answer_t | answer_<t, prompt)``. Hybrid-LLM's scores of quality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from routellm.embeddings.sentence import clean
from routellm.errors import TrainingError
from routellm.evaluation.metrics import Floats
from routellm.policies.recorded import Recorded
from routellm.routers.device import torch_device
from routellm.routers.pretrained import Pretrained

_BATCH = 8


@dataclass
class BartScore:
    """Scores answers by a BART, or any other sequence-to-sequence model.

    Attributes
    ----------
    model, revision : str
        A local folder or a hub name (the paper's is ``facebook/bart-large-cnn``), and its pinned
        revision.
    max_length : int
        Tokens read of a prompt, and of an answer.
    """

    model: str
    revision: str
    max_length: int = 512
    _loaded: tuple[Any, Any] | None = field(default=None, init=False)

    def __call__(self, table: Recorded, column: int) -> Floats:
        """Return the scores (n,) of a model's answers on a table, in nats a token, at most 0."""
        return self.score(table.prompts, table.answers[table.models[column]])

    def score(self, sources: Sequence[str], targets: Sequence[str]) -> Floats:
        """Return the mean log-likelihood (n,) of each target's tokens, given its source.

        Raises
        ------
        TrainingError
            If the model cannot be had or is no sequence-to-sequence model.
        """
        import torch

        model, tokenizer = self._open()
        out = np.empty(len(sources))
        order = np.argsort([-len(s) - len(t) for s, t in zip(sources, targets, strict=True)])
        with torch.inference_mode():
            for start in range(0, len(order), _BATCH):
                some = order[start : start + _BATCH]
                read = self._tokens(tokenizer, [sources[i] for i in some], model.device)
                written = self._tokens(tokenizer, [targets[i] for i in some], model.device)
                labels = written["input_ids"].masked_fill(written["attention_mask"] == 0, -100)
                logits = model(**read, labels=labels).logits.float()  # (b, t, vocabulary)
                each = torch.nn.functional.cross_entropy(
                    logits.transpose(1, 2), labels, reduction="none", ignore_index=-100
                )  # (b, t)
                count = (labels != -100).sum(dim=1).clamp(min=1)
                out[some] = (-each.sum(dim=1) / count).double().cpu().numpy()
        return out

    def _tokens(self, tokenizer: Any, texts: Sequence[str], device: Any) -> Any:
        return tokenizer(
            [clean(one) for one in texts],
            max_length=self.max_length,
            truncation=True,
            padding=True,
            return_tensors="pt",
            return_token_type_ids=False,
        ).to(device)

    def _open(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

            where = Pretrained(self.model, self.revision, None, "policies.bart_score")
            folder = where.get().folder
            try:
                model: Any = AutoModelForSeq2SeqLM.from_pretrained(
                    folder, local_files_only=True, use_safetensors=True
                )
                tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            except Exception as error:
                raise TrainingError(
                    f"{self.model} cannot be loaded as a sequence-to-sequence model "
                    f"({type(error).__name__}): name another in `policies.bart_score.model`"
                ) from error
            self._loaded = model.to(torch_device("auto", "bart_score")).eval(), tokenizer
        return self._loaded
