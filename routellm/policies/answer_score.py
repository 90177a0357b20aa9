"""The answer scorer that several policies share: a small encoder on query and answer -> correct?

FrugalGPT's scoring function (Chen et al. 2023, arXiv 2305.05176, section 3), which best-of-n and
any other choice after generation can use as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from routellm.evaluation.metrics import Floats
from routellm.policies.encoder_score import EncoderScore, Parts
from routellm.policies.recorded import Recorded
from routellm.settings import ScorerSettings


@dataclass
class AnswerScore:
    """How good an answer is, from its text alone; trained on the answers of a table's models."""

    settings: ScorerSettings
    seed: int = 0
    _score: EncoderScore | None = field(default=None, init=False)
    _of: tuple[str, ...] = field(default=(), init=False)
    _known: dict[tuple[str, ...], Floats] = field(default_factory=dict, init=False)

    def fit(self, table: Recorded) -> None:
        """Learn from a table's rows, once however many policies ask."""
        if self._of == table.ids:
            return
        texts = [
            (p, table.answers[m][i]) for m in table.models for i, p in enumerate(table.prompts)
        ]
        score = EncoderScore("the answer scorer", self.settings, 1, self.seed)
        prompt = np.tile(np.arange(len(table)), len(table.models))
        score.fit(texts, table.quality.T.reshape(-1, 1), prompt)
        self._score, self._of, self._known = score, table.ids, {}

    def scores(self, table: Recorded) -> Floats:
        """Return the score (n, m) of every model's answer on a table."""
        assert self._score is not None, "fit it first"
        if table.ids not in self._known:
            found = self._score.score(_texts(table))[:, 0]
            self._known[table.ids] = found.reshape(len(table.models), len(table)).T
        return self._known[table.ids]

    def save(self, directory: Path) -> None:
        """Write the scorer for the gateway's policy `cascade`; see `EncoderScore.load`."""
        assert self._score is not None, "fit it first"
        self._score.save(directory)

    def usd(self, table: Recorded) -> Floats:
        """Return the dollars (n, m) of scoring each answer: its tokens and its query's are read."""
        read = table.read_tokens[:, None] + table.written_tokens
        return np.minimum(read, self.settings.max_length) * self.settings.usd_per_million / 1e6


def _texts(table: Recorded) -> list[Parts]:
    """Return every query with every answer to it: all of the first model, then of the next."""
    return [(p, table.answers[m][i]) for m in table.models for i, p in enumerate(table.prompts)]
