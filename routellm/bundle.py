"""A router as files: weights in safetensors, all else in JSON, each file's digest beside it.

A bundle is what is registered, downloaded, cached and served: the router, what its thresholds
mean (calibration), what its strong fractions are worth (its curve on a benchmark), and golden
predictions that a fresh copy must reproduce before it serves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from routellm.calibration import Calibration, Platt, check_share
from routellm.embeddings import Encoder, get_encoder
from routellm.errors import BundleError, UsageError
from routellm.evaluation.metrics import Curve
from routellm.model_folder import read_model, write_model
from routellm.routers.base import Pair, Router, make_router, router_class
from routellm.settings import EmbeddingSettings

_DOCUMENT = "router.json"


@dataclass(frozen=True)
class QualityCurve:
    """What strong fractions of a version are worth, on one benchmark.

    Attributes
    ----------
    benchmark : str
        What it was measured on; other queries have another curve.
    n : int
        How many prompts.
    pgr : tuple of 101 floats
        Performance gap recovered at strong fractions of 0, 1, ..., 100 % (exact reading).
    """

    benchmark: str
    n: int
    pgr: tuple[float, ...]

    def strong_fraction(self, quality: float) -> float:
        """Return the smallest strong fraction that recovers this share of the gap, its CPT.

        Raises
        ------
        UsageError
            If the quality is outside [0, 1].
        """
        check_share(quality, "quality")
        curve = Curve(np.linspace(0.0, 1.0, len(self.pgr)), np.array(self.pgr))
        return min(1.0, curve.cpt(quality))


@dataclass(frozen=True)
class Bundle:
    """A trained router with all that serving it needs.

    Attributes
    ----------
    router : Router
    embedding : EmbeddingSettings
        How to build the encoder it was trained with (secrets are never stored).
    calibration : Calibration
    golden : tuple of (prompt, win rate)
        Predictions that every loaded copy must reproduce.
    snapshot : str
        Digest of the snapshot it was trained on.
    simulated : bool
        Whether any of its battles were simulated.
    curve : QualityCurve or None
        On the benchmark that promotion looks at; None in versions from before there was one.
    """

    router: Router
    embedding: EmbeddingSettings
    calibration: Calibration
    golden: tuple[tuple[str, float], ...]
    snapshot: str
    simulated: bool
    code_version: str
    curve: QualityCurve | None = None

    @property
    def kind(self) -> str:
        return self.router.kind

    @property
    def pair(self) -> Pair:
        return self.router.pair

    def check_golden(self) -> None:
        """Raise BundleError unless the golden predictions come out as they were logged."""
        if not self.golden:
            return
        now = self.router.win_rate([prompt for prompt, _ in self.golden])
        worst = float(np.abs(now - np.array([rate for _, rate in self.golden])).max())
        if not worst <= self.router.golden_tolerance:
            raise BundleError(
                f"the {self.kind} router gives other win rates than when it was registered (off "
                f"by {worst:.4f} on its golden prompts): its files or its encoder "
                f"({self.router.encoder.identity}) have changed; register it again"
            )

    def thresholds(
        self, threshold: float | None = None, strong_fraction: float | None = None
    ) -> float:
        """Return the threshold that a target asks for; half to strong if none is given."""
        if threshold is not None and strong_fraction is not None:
            raise UsageError("give a threshold or a strong fraction, not both")
        if threshold is not None:
            self.calibration.strong_fraction(threshold)  # refuses what is outside [0, 1]
            return threshold
        return self.calibration.threshold(0.5 if strong_fraction is None else strong_fraction)


def golden_predictions(
    router: Router, prompts: Sequence[str], n: int = 16
) -> tuple[tuple[str, float], ...]:
    """Return predictions on `n` prompts spread over a sample."""
    rows = np.unique(np.linspace(0, len(prompts) - 1, min(n, len(prompts))).astype(int))
    some = [prompts[i] for i in rows]
    return tuple(zip(some, (float(v) for v in router.win_rate(some)), strict=True))


def save_bundle(bundle: Bundle, directory: Path) -> None:
    """Write a bundle so that `directory` holds all of it or does not exist.

    An existing bundle there is replaced.
    """
    arrays, doc = bundle.router.state()
    document: dict[str, Any] = {
        "kind": bundle.kind,
        "pair": asdict(bundle.pair),
        "options": bundle.router.options.model_dump(mode="json"),
        "state": doc,
        "platt": asdict(bundle.router.platt),
        "encoder": bundle.router.encoder.identity,
        "embedding": bundle.embedding.model_dump(exclude={"api_key"}),
        "calibration": asdict(bundle.calibration),
        "golden": bundle.golden,
        "snapshot": bundle.snapshot,
        "simulated": bundle.simulated,
        "code_version": bundle.code_version,
        "curve": None if bundle.curve is None else asdict(bundle.curve),
    }
    write_model(directory, arrays, document, _DOCUMENT)


def load_bundle(
    directory: Path, *, cache_path: Path | None = None, encoder: Encoder | None = None
) -> Bundle:
    """Read a bundle, checking every file against its digest.

    Parameters
    ----------
    encoder : Encoder, optional
        One that is loaded already; by default the one that the bundle describes.

    Raises
    ------
    BundleError
        If a file is missing, damaged, or was made with another encoder than is at hand.
    """
    again = "load another version or register the router again"
    try:
        arrays, doc = read_model(directory, _DOCUMENT, again=again)
        embedding = EmbeddingSettings(**doc["embedding"])
        encoder = encoder or get_encoder(embedding, cache_path)
        if router_class(doc["kind"]).reads_embeddings and encoder.identity != doc["encoder"]:
            raise BundleError(
                f"the router in {directory} was trained on {doc['encoder']}, found "
                f"{encoder.identity}: install the encoder it names"
            )
        router = make_router(doc["kind"], encoder, Pair(**doc["pair"]), doc["options"])
        router.load_state(arrays, doc["state"])
        router.platt = Platt(**doc.get("platt", {}))  # bundles from before have none
        calibration, curve = doc["calibration"], doc.get("curve")
        return Bundle(
            router=router,
            embedding=embedding,
            calibration=Calibration(
                calibration["sample"], calibration["n"], tuple(calibration["quantiles"])
            ),
            golden=tuple((p, r) for p, r in doc["golden"]),
            snapshot=doc["snapshot"],
            simulated=doc["simulated"],
            code_version=doc["code_version"],
            curve=curve and QualityCurve(curve["benchmark"], curve["n"], tuple(curve["pgr"])),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"no whole router in {directory} ({type(error).__name__}: {error}): {again}"
        ) from error


def content_key(*parts: str) -> str:
    """Return a short SHA-256 key over text parts: what a piece of work is known by."""
    out = hashlib.sha256()
    for part in parts:
        out.update(hashlib.sha256(part.encode()).digest())
    return out.hexdigest()[:24]
