"""A small encoder fine-tuned to give texts numbers: what policies score, rank and choose by.

It reads one text or several as one (a query; a query and an answer; a query and two answers) and
gives one number in [0, 1] or several, trained by binary cross-entropy against labels in [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routellm.errors import BundleError, TrainingError
from routellm.evaluation.metrics import Floats
from routellm.model_folder import read_model, write_model
from routellm.routers.device import seeded, torch_device
from routellm.routers.encoder_head import EncoderHead, Tokens, adamw, pretrained
from routellm.routers.finetune import Course, Learner, epoch_batches, finetune
from routellm.settings import ScorerSettings

_BATCH = 32  # texts scored at once
_VALIDATION = 8  # one prompt of so many is kept to stop early by
_WEIGHT_DECAY, _CLIP_NORM, _WARM_UP = 0.01, 1.0, 0.1  # as for the router kind `bert`

_DOCUMENT = "scorer.json"
_GOLDEN_TOLERANCE = 1e-3
# of our own, since what a table holds need not be anybody's who gets the folder
_GOLDEN = (
    ("What is 17 + 25?", "17 + 25 = 42. The answer is 42."),
    ("Name a mammal that lays eggs.", "The blue whale does."),
)

_LAYER = re.compile(r"\blayers?\.(\d+)\.")

Parts = tuple[str, ...]


@dataclass
class EncoderScore:
    """Numbers in [0, 1] for texts.

    Attributes
    ----------
    name : str
        Who it works for: errors name it.
    outputs : int
        Numbers for each text.
    """

    name: str
    settings: ScorerSettings
    outputs: int = 1
    seed: int = 0
    _model: EncoderHead | None = field(default=None, init=False)

    def fit(self, texts: Sequence[Parts], labels: Floats, prompt: NDArray[np.int64]) -> None:
        """Learn, from at most `examples` of the texts, drawn at random.

        Parameters
        ----------
        texts : sequence of tuple of str, length n
        labels : ndarray (n, outputs)
            In [0, 1].
        prompt : ndarray of int (n,)
            Which prompt a text is of: no prompt is both trained on and stopped by.

        Raises
        ------
        TrainingError
            If there are too few texts, or the encoder is not to be had.
        """
        o = self.settings
        rng = np.random.default_rng(self.seed)
        rows = rng.permutation(len(texts))[: o.examples]
        kept = prompt[rows] % _VALIDATION == 0
        learnt, asked = rows[~kept], rows[kept]
        if len(learnt) < o.batch_size or not len(asked):
            raise TrainingError(
                f"{self.name} needs examples of more prompts to learn from than the {len(texts)} "
                "here: give more rows"
            )
        device = torch_device("auto", "scorer")
        with seeded(self.seed, device):
            self._model, _ = EncoderHead.open(
                pretrained(o.model, o.revision, "policies.scorer"),
                max_length=o.max_length,
                outputs=self.outputs,
                device=device,
            )
            self._start_at(labels[learnt].mean(axis=0))
            tokens = dict(zip(rows.tolist(), self._tokens([texts[i] for i in rows]), strict=True))
            self._train(tokens, labels, learnt, asked)

    def save(self, directory: Path) -> None:
        """Write it so that `directory` holds all of it or does not exist."""
        assert self._model is not None, "fit it first"
        arrays, doc = self._model.state()
        golden = [(text, self.score([text])[0].tolist()) for text in _GOLDEN]
        document = {"outputs": self.outputs, "encoder": doc, "golden": golden}
        write_model(directory, arrays, document, _DOCUMENT)

    @classmethod
    def load(cls, name: str, directory: Path, settings: ScorerSettings) -> EncoderScore:
        """Read what `save` wrote.

        Raises
        ------
        BundleError
            If a file is missing or damaged, or its numbers are not those it was saved with.
        """
        again = "name a folder that `routellm policies` wrote"
        found = cls(name, settings)
        try:
            arrays, doc = read_model(directory, _DOCUMENT, again=again)
            found.outputs = int(doc["outputs"])
            device = torch_device("auto", "scorer")
            found._model = EncoderHead.loaded(
                arrays, doc["encoder"], outputs=found.outputs, device=device
            )
            texts = [tuple(text) for text, _ in doc["golden"]]
            off = found.score(texts) - np.array([numbers for _, numbers in doc["golden"]])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise BundleError(
                f"no whole scorer in {directory} ({type(error).__name__}): {again}"
            ) from error
        if not np.abs(off).max() <= _GOLDEN_TOLERANCE:
            raise BundleError(
                f"the scorer in {directory} gives other numbers than when it was saved (off by "
                f"{np.abs(off).max():.4f}): {again}"
            )
        return found

    def score(self, texts: Sequence[Parts]) -> Floats:
        """Return the numbers (n, outputs) of texts."""
        return self._scores(self._tokens(texts))

    def _tokens(self, texts: Sequence[Parts]) -> list[Tokens]:
        assert self._model is not None, "fit it first"
        return self._model.parted_tokens(texts)

    def _scores(self, tokens: Sequence[Tokens]) -> Floats:
        import torch

        assert self._model is not None, "fit it first"
        out = np.empty((len(tokens), self.outputs))
        order = np.argsort([-len(one) for one in tokens], kind="stable")  # little padding
        with torch.inference_mode():
            for start in range(0, len(order), _BATCH):
                some = order[start : start + _BATCH]
                found = self._model.logits([tokens[i] for i in some]).double().sigmoid()
                out[some] = found.cpu().numpy()
        return out

    def _start_at(self, share: Floats) -> None:
        """Begin at the labels' mean: no steps are spent on what holds for every text."""
        import torch

        assert self._model is not None
        share = np.clip(share, 0.01, 0.99)
        with torch.no_grad():
            bias = self._model.module["head"].bias
            bias.copy_(torch.from_numpy(np.log(share / (1 - share))))

    def _train(
        self,
        tokens: dict[int, Tokens],
        labels: Floats,
        learnt: NDArray[np.int64],
        asked: NDArray[np.int64],
    ) -> None:
        import torch
        from torch.nn import functional as F

        assert self._model is not None
        model, o = self._model, self.settings
        lengths = np.array([len(tokens[i]) for i in learnt])
        per_epoch = -(-len(learnt) // o.batch_size)
        steps = o.epochs * per_epoch
        warm_up = round(_WARM_UP * steps)

        def epoch(rng: np.random.Generator) -> list[list[NDArray[np.int64]]]:
            return [[learnt[rows]] for rows in epoch_batches(lengths, o.batch_size, rng)]

        def loss(some: NDArray[np.int64]) -> Any:
            logits = model.logits([tokens[i] for i in some])
            y = torch.from_numpy(labels[some]).to(logits)
            return F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(1).sum()

        def validate() -> float:
            p = np.clip(self._scores([tokens[i] for i in asked]), 1e-7, 1 - 1e-7)
            y = labels[asked]
            return float(-(y * np.log(p) + (1 - y) * np.log(1 - p)).mean())

        parameters = _trained(model.module, o.trained_layers)
        finetune(
            Learner(
                module=model.module,
                parameters=parameters,
                optimizer=adamw(parameters, o.learning_rate, _WEIGHT_DECAY),
                epoch=epoch,
                loss=loss,
                validate=validate,
            ),
            Course(
                kind=self.name,
                setting="policies.scorer",
                seed=self.seed,
                steps=steps,
                steps_an_epoch=per_epoch,
                learning_rate=o.learning_rate,
                rise=warm_up + 1,
                fall=max(1, steps - warm_up),
                clip_norm=_CLIP_NORM,
                evaluate_every=per_epoch,
                checkpoint_every=steps + 1,
                patience=o.epochs,
            ),
            run="",  # minutes at most: no checkpoint is kept
        )


def _trained(module: Any, layers: int) -> dict[str, Any]:
    """Return the parameters that are trained, by name: those of the last layers, and the head.

    The others are frozen, and what lies below is computed forwards alone. An encoder whose layers
    are not called so is trained whole.
    """
    parameters = dict(module.named_parameters())
    of = {name: int(found[1]) for name in parameters if (found := _LAYER.search(name))}
    first = max(of.values(), default=0) - layers + 1
    for name, one in parameters.items():
        if of and not name.startswith("head.") and of.get(name, -1) < first:
            one.requires_grad_(False)
    return {name: one for name, one in parameters.items() if one.requires_grad}
