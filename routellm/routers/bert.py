"""``bert``: an encoder fine-tuned to say how the strong model fares on a prompt.

The paper's section 4.2: ``h = BERT(q)[CLS]`` and ``P(outcome | q) = softmax(W h + b)`` over the
three outcomes of the strong model: win, tie, loss. All weights are trained, by cross-entropy on
the pair's own battles.

The win rate is ``P(win) + P(tie) / 2``, as everywhere in this package; the paper's code counts a
tie for the weak model. Battles may carry a judge's probability, so their labels are soft
(`outcomes.py`), and battles on one prompt are merged into one example: their cross-entropy is
linear in the label, so nothing is lost. The weights kept are those with the lowest cross-entropy
of win rates on the pair's validation battles, as for ``mf``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from routellm.embeddings.base import Progress
from routellm.embeddings.sentence import MINILM
from routellm.errors import BundleError, TrainingError
from routellm.routers.base import Arrays, FitReport, Router, RouterOptions, TrainingBattles
from routellm.routers.checkpoint import fingerprint
from routellm.routers.device import computes_bfloat16, seeded, serving_device, torch_device
from routellm.routers.encoder_head import EncoderHead, adamw, pretrained
from routellm.routers.finetune import Course, Learner, epoch_batches, finetune
from routellm.routers.outcomes import (
    OUTCOMES,
    Asked,
    Examples,
    class_weights,
    outcome_loss,
    win_rates,
)
from routellm.routers.pretrained import Pretrained
from routellm.settings import EmbeddingSettings

TIE_BAND = 0.05  # a preference as close to 0.5 as this is a tie
MIN_EXAMPLES = 20
SCORE_BATCH = 32


class BertOptions(RouterOptions):
    """Options of ``bert``."""

    model: str = Field(MINILM, description="encoder: a local folder or a hub name")
    revision: str = Field(
        EmbeddingSettings.model_fields["revision"].default,
        description="pinned hub revision of `model`",
    )
    max_length: int = Field(512, ge=8, description="tokens read of a prompt (paper)")
    batch_size: int = Field(16, ge=1, description="prompts in a pass (paper)")
    accumulation_steps: int = Field(1, ge=1, description="passes in an optimizer step")
    learning_rate: float = Field(
        2e-5, gt=0, description="highest of a run; the paper's 1e-5 is for BERT-base"
    )
    weight_decay: float = Field(0.01, ge=0, description="of matrices (paper)")
    warmup_share: float = Field(0.1, ge=0, lt=1, description="steps in which the rate rises")
    clip_norm: float = Field(1.0, gt=0, description="largest norm of a gradient")
    max_steps: int = Field(2000, ge=1, description="most optimizer steps (paper)")
    epochs: int = Field(4, ge=1, description="most passes over the battles")
    evaluate_every: int = Field(
        100, ge=1, description="steps between validations; there is one an epoch at least"
    )
    patience: int = Field(3, ge=1, description="validations without a gain before it stops early")
    class_weights: bool = Field(
        False, description="raise rare outcomes, at most fourfold; win rates are then skewed"
    )
    checkpoint_every: int = Field(
        100, ge=1, description="steps between checkpoints; each validation leaves one too"
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N"
    )
    devices: int = Field(
        1, ge=1, le=64, description="GPUs of one machine that share each step of a training"
    )
    mixed_precision: bool = Field(True, description="train in bfloat16 on CUDA")


class BertRouter(Router):
    """Encoder with a head on its first vector.

    Attributes
    ----------
    model_ : EncoderHead
        Its outputs are the three outcomes' logits.
    """

    kind = "bert"
    Options = BertOptions
    reads_embeddings = False
    learns_from_validation = False
    model_: EncoderHead

    def unavailable(self) -> str:
        if self.options.device.startswith("cuda"):
            try:
                torch_device(self.options.device, "bert")
            except TrainingError as error:
                return str(error)
        return self._pretrained().unavailable()

    def fit(
        self,
        battles: TrainingBattles,
        *,
        rng: np.random.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> FitReport:
        import torch

        o: BertOptions = self.options
        seed = int(rng.integers(2**31))
        rows, preference = battles.of_pair()
        kept = ~battles.validation[rows]
        learnt = Examples.of(battles, rows[kept], preference[kept], tie_band=TIE_BAND)
        asked = Asked.of(battles, *battles.pair_validation())
        if len(learnt.prompts) < MIN_EXAMPLES or not len(asked.prompts):
            raise TrainingError(
                f"bert needs battles of the pair on {MIN_EXAMPLES} prompts to train on and on one "
                f"to validate with, found {len(learnt.prompts)} and {len(asked.prompts)}: ingest "
                "more battles"
            )
        # how much each example speaks for each outcome, 1 an example on average
        y = learnt.targets * learnt.weight[:, None]  # (u, 3)
        if o.class_weights:
            y = y * class_weights(learnt)
        y = y * (len(y) / y.sum())

        device = torch_device(o.device, self.kind)
        autocast = o.mixed_precision and computes_bfloat16(device)
        with seeded(seed, device):  # for what the pretrained weights lack
            self.model_, base = EncoderHead.open(
                self._pretrained(),
                max_length=o.max_length,
                outputs=len(OUTCOMES),
                device=device,
            )
            # starts at the outcomes' shares: no steps are spent on what holds for every prompt
            with torch.no_grad():
                self.model_.module["head"].bias.copy_(
                    torch.from_numpy(np.log(y.mean(axis=0) + 1e-3))
                )
            tokens = self.model_.tokens(learnt.prompts)
            lengths = np.array([len(t) for t in tokens])
            passes = -(-len(tokens) // o.batch_size)  # an epoch
            per_epoch = -(-passes // o.accumulation_steps)
            steps = min(o.max_steps, o.epochs * per_epoch)
            warmup = round(o.warmup_share * steps)

            def epoch(rng: np.random.Generator) -> list[list[NDArray[np.int64]]]:
                batches, n = epoch_batches(lengths, o.batch_size, rng), o.accumulation_steps
                return [batches[i : i + n] for i in range(0, len(batches), n)]

            def loss(some: NDArray[np.int64]) -> Any:
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    logits = self.model_.logits([tokens[i] for i in some])
                return outcome_loss(logits, y[some])

            parameters = dict(self.model_.module.named_parameters())
            done = finetune(
                Learner(
                    module=self.model_.module,
                    parameters=parameters,
                    optimizer=adamw(parameters, o.learning_rate, o.weight_decay),
                    epoch=epoch,
                    loss=loss,
                    validate=lambda: asked.loss(self._rates),
                ),
                Course(
                    kind=self.kind,
                    setting="training.options.bert",
                    seed=seed,
                    steps=steps,
                    steps_an_epoch=per_epoch,
                    learning_rate=o.learning_rate,
                    rise=warmup + 1,
                    fall=max(1, steps - warmup),
                    clip_norm=o.clip_norm,
                    evaluate_every=min(o.evaluate_every, per_epoch),
                    checkpoint_every=o.checkpoint_every,
                    patience=o.patience,
                ),
                fingerprint(
                    [
                        o.model_dump(exclude={"model", "checkpoint_every"}),
                        base.to_doc(),
                        seed,
                        device.type,
                    ],
                    (y, asked.prompt, asked.preference),
                    (*learnt.prompts, *asked.prompts),
                ),
                checkpoint=checkpoint,
                progress=progress,
            )
        return FitReport(
            params={
                **{k: v for k, v in o.model_dump().items() if k not in ("model", "revision")},
                "model": base.name,
                "revision": base.revision or base.sha256[:12],
                "device": device.type,
                "mixed_precision": autocast,
                "max_length": self.model_.max_length,
                "steps": steps,
                "train_prompts": len(learnt.prompts),
                "validation_prompts": len(asked.prompts),
            },
            metrics={
                "best_step": float(done.best_step),
                "validation_loss": done.validation_loss,
                "steps_done": float(done.steps),
                "training_s": done.seconds,
            },
            history=done.history,
        )

    def score(self, prompts: Sequence[str], embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        return self._rates(prompts)

    def _rates(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        tokens = self.model_.tokens(prompts)
        return win_rates(
            lambda some: self.model_.logits([tokens[i] for i in some]),
            [len(t) for t in tokens],
            SCORE_BATCH,
        )

    def _pretrained(self) -> Pretrained:
        o: BertOptions = self.options
        return pretrained(o.model, o.revision, "training.options.bert")

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        return self.model_.state()

    def load_state(self, arrays: Mapping[str, NDArray[Any]], doc: dict[str, Any]) -> None:
        device = serving_device(self.options.device, self.kind)
        try:
            self.model_ = EncoderHead.loaded(arrays, doc, outputs=len(OUTCOMES), device=device)
        except Exception as error:
            raise BundleError(
                f"the weights, configuration and tokenizer of this bert router do not make one "
                f"({type(error).__name__}): load another version or train it again"
            ) from error
