"""``causal_llm``: a language model reads an instruction and the query, and gives its verdict.

The paper's section 4.2: an instruction-following causal LM (Llama-3-8B) whose vocabulary is
extended by label tokens; the verdict is the softmax over these at the position after the prompt,
learnt by next-token cross-entropy on that position alone.

What differs from RouteLLM's code: its five labels ``[[1]]`` to ``[[5]]`` grade the weak model's
answer, and the win rate is the mass below a grade. Battles say who was preferred, so here the
labels are strong's outcome (win, tie, loss) and the win rate is ``P(win) + P(tie) / 2``. A label
token is only ever predicted, never read, so it needs no input embedding: its row of the output
head is all there is of it, whether or not the model ties the two, and nothing is decoded to find
it. The weights are LoRA matrices rather than the whole model, unless ``lora`` is off, and a
prompt that is too long loses its middle rather than its beginning.

What is saved is these weights and which base they belong to: a hub name and commit, or a local
folder's name and SHA-256 (of its weights, configuration and tokenizer). A machine that serves the
router needs that base: from the hub or its cache, or as a folder (or a link to one) at the path it
was trained from, or under its own name in the working directory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from routellm.embeddings.base import Progress
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
from routellm.routers.instruction import AFTER, BEFORE, Instruction
from routellm.routers.outcomes import (
    OUTCOMES,
    Asked,
    outcome_loss,
    outcome_targets,
    win_rates,
)
from routellm.routers.pretrained import Base, Pretrained

LLAMA = "meta-llama/Meta-Llama-3-8B"
_LLAMA_REVISION = "8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920"
LORA_LEARNING_RATE = 1e-4  # QLoRA's for its larger models; a hundred times the full tuning's
FULL_LEARNING_RATE = 1e-6  # paper, appendix
WARMUP_SHARE = 0.03  # QLoRA; then falling to nothing
MAX_GRADIENT_NORM = 1.0
MIN_BATTLES = 20
_SHAPING = ("max_length", "lora", "lora_rank", "lora_alpha")  # options that weights need to be read


class CausalLLMOptions(RouterOptions):
    """Options of ``causal_llm``."""

    model: str = Field(LLAMA, description="causal LM: a local folder or a hub name")
    revision: str | None = Field(
        None, description="hub revision; by default a pinned one for the default model, else `main`"
    )
    hub_endpoint: str | None = Field(None, description="another Hugging Face endpoint")
    max_length: int = Field(
        2048, ge=64, description="tokens of instruction and query; more are cut from its middle"
    )
    batch_size: int = Field(8, ge=1, description="battles a step (paper)")
    gradient_accumulation: int = Field(
        1, ge=1, description="parts a step is computed in: less memory, the same step"
    )
    learning_rate: float | None = Field(
        None, gt=0, description="by default 1e-4 with LoRA, the paper's 1e-6 without"
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay")
    max_steps: int = Field(2000, ge=1, description="most steps (paper)")
    validate_every: int = Field(
        100, ge=1, description="steps between validations, each of which leaves a checkpoint"
    )
    validation_prompts: int = Field(512, ge=1, description="most prompts a validation reads")
    patience: int = Field(5, ge=1, description="validations without a gain before it stops early")
    gradient_checkpointing: bool = Field(
        True, description="compute activations twice instead of keeping them"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto computes in bfloat16 on CUDA, in float32 elsewhere"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where it is computed")
    devices: int = Field(
        1, ge=1, le=64, description="GPUs of one machine that share each step of a training"
    )
    lora: bool = Field(True, description="train LoRA matrices; off trains every weight")
    lora_rank: int = Field(16, ge=1, description="rank of the LoRA matrices")
    lora_alpha: float = Field(32.0, gt=0, description="LoRA's scale, divided by the rank")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="dropout before the LoRA matrices")
    score_batch_size: int = Field(16, ge=1, description="prompts scored at once")


class CausalLLMRouter(Router):
    """Label tokens of a causal language model.

    Attributes
    ----------
    decoder_ : transformers.PreTrainedModel
        The language model without its output head, with LoRA matrices in it.
    rows_ : torch.nn.Parameter float32 (3, h)
        The output head's rows for win, tie and loss.
    base_ : Base
        Which pretrained model this is.
    """

    kind = "causal_llm"
    Options = CausalLLMOptions
    reads_embeddings = False
    learns_from_validation = False
    golden_tolerance = 0.03  # bfloat16 has 8 bits: other GPUs, or float32 on a CPU
    decoder_: Any

    def unavailable(self) -> str:
        o: CausalLLMOptions = self.options
        if o.device == "cuda":
            try:
                torch_device(o.device, "causal_llm")
            except TrainingError as error:
                return str(error)
        if o.model == LLAMA and torch_device(o.device, "causal_llm").type == "cpu":
            return (
                f"{LLAMA} has 8 billion weights and this machine no GPU: use one, or name a small "
                "model in training.options.causal_llm.model"
            )
        return self._pretrained().unavailable()

    def _pretrained(self) -> Pretrained:
        o: CausalLLMOptions = self.options
        revision = o.revision or (_LLAMA_REVISION if o.model == LLAMA else "main")
        return Pretrained(o.model, revision, o.hub_endpoint, "training.options.causal_llm")

    def fit(
        self,
        battles: TrainingBattles,
        *,
        rng: np.random.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> FitReport:
        import torch

        o: CausalLLMOptions = self.options
        seed = int(rng.integers(2**31))
        rows, preference = battles.of_pair()
        learnt = ~battles.validation[rows]
        rows, preference = rows[learnt], preference[learnt]
        held, truth = battles.pair_validation()
        if len(rows) < MIN_BATTLES or not len(held):
            raise TrainingError(
                f"causal_llm needs {MIN_BATTLES} battles of the pair to train on and one to "
                f"validate with, found {len(rows)} and {len(held)}: ingest more battles"
            )
        asked = Asked.of(battles, held, truth, most=o.validation_prompts, seed=seed)
        prompts = [battles.prompts[i] for i in battles.prompt[rows]]
        lengths = np.array([len(p) for p in prompts])
        # how much each battle speaks for each outcome, 1 a battle on average
        weight = battles.weight[rows] / battles.weight[rows].mean()
        y = outcome_targets(preference) * weight[:, None]  # (n, 3)

        def epoch(rng: np.random.Generator) -> list[list[NDArray[np.int64]]]:
            steps = epoch_batches(lengths, o.batch_size, rng)
            parts = (np.array_split(step, o.gradient_accumulation) for step in steps)
            return [[part for part in step if len(part)] for step in parts]

        def loss(some: NDArray[np.int64]) -> Any:
            return outcome_loss(self._logits([prompts[i] for i in some]), y[some])

        device = torch_device(o.device, self.kind)
        with seeded(seed, device):
            base = self._pretrained().get()
            if not base.revision:  # the router finds its folder from wherever it is loaded
                self.options = o = o.model_copy(update={"model": str(base.folder.resolve())})
            self._open(base, device)
            if o.gradient_checkpointing:
                self.decoder_.activation_checkpointing_enable()
            parameters = self._parameters()
            rate = o.learning_rate or (LORA_LEARNING_RATE if o.lora else FULL_LEARNING_RATE)
            warmup = max(1, round(WARMUP_SHARE * o.max_steps))
            done = finetune(
                Learner(
                    module=self.decoder_,
                    parameters=parameters,
                    optimizer=torch.optim.AdamW(
                        parameters.values(), lr=rate, weight_decay=o.weight_decay
                    ),
                    epoch=epoch,
                    loss=loss,
                    validate=lambda: asked.loss(self._rates),
                ),
                Course(
                    kind=self.kind,
                    setting="training.options.causal_llm",
                    seed=seed,
                    steps=o.max_steps,
                    steps_an_epoch=-(-len(rows) // o.batch_size),
                    learning_rate=rate,
                    rise=warmup,
                    fall=max(1, o.max_steps - warmup),
                    clip_norm=MAX_GRADIENT_NORM,
                    evaluate_every=o.validate_every,
                    checkpoint_every=o.validate_every,
                    patience=o.patience,
                ),
                fingerprint(
                    [
                        o.model_dump(exclude={"model"}),
                        [base.to_doc(), BEFORE, AFTER, seed, device.type, self.bf16_],
                    ],
                    (y, asked.prompt, asked.preference),
                    (*prompts, *asked.prompts),
                ),
                checkpoint=checkpoint,
                progress=progress,
            )
        if o.gradient_checkpointing:
            self.decoder_.activation_checkpointing_disable()
        return FitReport(
            params={
                "base": base.name,
                "base_revision": base.revision or base.sha256[:12],
                "labels": len(OUTCOMES),
                "learning_rate": rate,
                "weight_decay": o.weight_decay,
                "batch_size": o.batch_size,
                "max_length": self.instruction_.max_length,
                "lora_rank": o.lora_rank if o.lora else 0,
                "trained_weights": sum(p.numel() for p in parameters.values()),
                "dtype": "bfloat16" if self.bf16_ else "float32",
                "device": device.type,
            },
            metrics={
                "best_step": float(done.best_step),
                "validation_loss": done.validation_loss,
                "train_battles": float(len(rows)),
            },
            history=done.history,
        )

    def score(self, prompts: Sequence[str], embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        return self._rates(prompts)

    def _rates(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        return win_rates(
            lambda some: self._logits([prompts[i] for i in some]),
            [len(p) for p in prompts],
            self.options.score_batch_size,
        )

    def _logits(self, prompts: Sequence[str]) -> Any:
        """Return the label tokens' logits float32 (b, 3) after each prompt."""
        import torch
        from torch.nn import functional as F

        device = self.rows_.device
        inputs = {name: moved(x, device) for name, x in self._inputs(prompts).items()}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16_):
            hidden = self.decoder_(**inputs, use_cache=False).last_hidden_state  # (b, t, h)
        # padded on the left, so every prompt's last token stands last
        return F.linear(hidden[:, -1].float(), self.rows_)

    def _inputs(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Return padded token ids, attention mask and positions, each int64 (b, t)."""
        import torch

        encoded = self.instruction_.encode(prompts)
        b, t = len(encoded), max(map(len, encoded))
        ids = torch.zeros(b, t, dtype=torch.int64)  # what stands in the padding is never read
        mask = torch.zeros(b, t, dtype=torch.int64)
        for i, one in enumerate(encoded):
            ids[i, t - len(one) :] = torch.tensor(one)
            mask[i, t - len(one) :] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.takes_positions_:  # or the padding would push learnt positions along
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return inputs

    def _open(self, base: Base, device: Any) -> None:
        """Load the base, put untrained LoRA matrices into it and make the label rows."""
        import inspect

        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        o: CausalLLMOptions = self.options
        self.bf16_ = o.dtype == "bfloat16" or (o.dtype == "auto" and computes_bfloat16(device))
        # trained weights are float32 throughout: steps of 1e-6 vanish in bfloat16
        dtype = torch.bfloat16 if self.bf16_ and o.lora else torch.float32
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                base.folder, local_files_only=True, split_special_tokens=True
            )
            lm: Any = AutoModelForCausalLM.from_pretrained(
                base.folder, local_files_only=True, use_safetensors=True, dtype=dtype
            )
        except Exception as error:
            raise TrainingError(
                f"{base.name} cannot be loaded as a causal LM ({type(error).__name__}): name "
                "another in `training.options.causal_llm.model`"
            ) from error
        head, decoder = lm.get_output_embeddings(), lm.base_model
        if head is None or decoder is lm:
            raise TrainingError(
                f"{base.name} has no output head on a decoder: name a decoder-only causal LM in "
                "`training.options.causal_llm.model`"
            )
        words = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in OUTCOMES]
        # each label's row starts as the head's for its word
        rows = torch.stack([head.weight[ids].detach().float().mean(dim=0) for ids in words])
        decoder.requires_grad_(not o.lora)
        if o.lora:
            from peft import LoraConfig, inject_adapter_in_model

            config = LoraConfig(
                r=o.lora_rank,
                lora_alpha=o.lora_alpha,  # type: ignore[arg-type]
                lora_dropout=o.lora_dropout,
                target_modules="all-linear",
            )
            decoder = inject_adapter_in_model(config, decoder)
            for p in decoder.parameters():
                if p.requires_grad:
                    p.data = p.data.float()
        self.base_ = base
        self.decoder_ = decoder.to(device).eval()
        self.rows_ = torch.nn.Parameter(rows.to(device))  # (3, h)
        self.takes_positions_ = "position_ids" in inspect.signature(decoder.forward).parameters
        limit = getattr(lm.config, "max_position_embeddings", None) or o.max_length
        self.instruction_ = Instruction.of(tokenizer, min(o.max_length, limit))

    def _parameters(self) -> dict[str, Any]:
        """Return what is trained, by name."""
        named = {name: p for name, p in self.decoder_.named_parameters() if p.requires_grad}
        return named | {"labels": self.rows_}

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        arrays = {name: p.detach().cpu().numpy().copy() for name, p in self._parameters().items()}
        o: CausalLLMOptions = self.options
        doc = {
            "base": self.base_.to_doc(),
            "prompt": [BEFORE, AFTER],
            "options": {name: getattr(o, name) for name in _SHAPING},
        }
        return arrays, doc

    def load_state(self, arrays: Mapping[str, NDArray[Any]], doc: dict[str, Any]) -> None:
        import torch

        if doc["prompt"] != [BEFORE, AFTER]:
            raise BundleError(
                "this causal_llm router was trained with another instruction than this code gives "
                "it: serve it with the version that trained it, or train it again"
            )
        self.options = self.Options.model_validate(self.options.model_dump() | doc["options"])
        base = self._pretrained().same(doc["base"], self.kind)
        try:
            # LoRA's first weights are drawn at random, and replaced
            with own_draws():
                self._open(base, serving_device(self.options.device, self.kind))
        except TrainingError as error:
            raise BundleError(f"this causal_llm router cannot be loaded: {error}") from error
        parameters = self._parameters()
        if {k: v.shape for k, v in arrays.items()} != {k: p.shape for k, p in parameters.items()}:
            raise BundleError(
                f"the weights of this causal_llm router do not fit {self.base_.name}: the copy is "
                "damaged; load another version or train it again"
            )
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(torch.from_numpy(np.array(arrays[name])))
