"""One typed settings object for the whole system.

Order of precedence, weakest first: the defaults below, ``routellm.toml`` in the working
directory, ``ROUTELLM_*`` environment variables (nested with ``__``, as in
``ROUTELLM_GATEWAY__PORT=8000``), command-line flags. Every default works with no server and
no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

PAPER_STRONG = "gpt-4-1106-preview"
PAPER_WEAK = "mixtral-8x7b-instruct-v0.1"


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EmbeddingSettings(_Group):
    """How prompts become vectors."""

    provider: Literal["sentence-transformers", "openai"] = Field(
        "sentence-transformers", description="which encoder implementation to use"
    )
    model: str = Field(
        "sentence-transformers/all-MiniLM-L6-v2",
        description="hub name or local folder, or the endpoint's model name",
    )
    revision: str = Field(
        "c9745ed1d9f207416be6d2e6f8de32d1f16199bf", description="pinned hub revision"
    )
    batch_size: int = Field(32, ge=1, le=4096, description="prompts encoded at once")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    base_url: str | None = Field(None, description="OpenAI-compatible endpoint (provider openai)")
    api_key: SecretStr | None = Field(None, description="its key, if it needs one")
    dimensions: int | None = Field(None, ge=1, description="vector length asked of the endpoint")
    timeout_s: float = Field(30.0, gt=0, description="seconds to wait for the endpoint")


class IngestSettings(_Group):
    """How sources are read."""

    batch_rows: int = Field(20_000, ge=1, description="rows read and written at once")
    max_cell_chars: int = Field(
        200_000, ge=1, description="longest text cell read from a file before it is refused"
    )
    hub_endpoint: str | None = Field(None, description="another Hugging Face endpoint")


class ValidationSettings(_Group):
    """Ranges that good preference data stays in. Shares are fractions in [0, 1]."""

    max_prompt_chars: int = Field(100_000, ge=1, description="longest prompt kept")
    max_quarantine_share: float = Field(
        0.2, ge=0, le=1, description="more failing rows than this stops the flow"
    )
    min_battles: int = Field(100, ge=1, description="fewest battles worth training on")
    tie_share: tuple[float, float] = Field((0.0, 0.75), description="ties among all battles")
    min_battles_per_model: int = Field(10, ge=1, description="fewest battles for a model")
    max_other_language_share: float = Field(
        0.9, ge=0, le=1, description="battles in any language but the commonest"
    )
    max_label_kind_share: float = Field(
        1.0, ge=0, le=1, description="battles with labels of one kind"
    )
    max_age_days: float = Field(1500.0, gt=0, description="age of the newest dated battle")
    max_population_stability: float = Field(
        0.25, gt=0, description="drift against the previous snapshot (PSI; 0.25 is a major shift)"
    )


class TrainingSettings(_Group):
    """How routers are trained."""

    routers: tuple[str, ...] = Field(
        ("random", "sw_ranking", "mf", "knn", "gaussian_process"),
        description="router kinds to train, or `all` that can be trained on this machine",
    )
    augment: tuple[Literal["golden", "judge", "human", "feedback"], ...] = Field(
        ("human", "golden", "judge", "feedback"), description="label kinds to train on"
    )
    label_weights: dict[str, float] | None = Field(
        None,
        description="how much each label kind counts; by default chosen on the pair's battles of "
        "the most trusted kind",
    )
    validation_share: float = Field(
        0.1, gt=0, lt=0.5, description="prompts kept to choose epochs and neighbours"
    )
    heldout_share: float = Field(0.05, ge=0, lt=0.5, description="prompts kept to measure on")
    seed: int = Field(0, ge=0, description="seed of everything random")
    options: dict[str, dict[str, Any]] = Field(
        {}, description="by router kind, its own options; docs/routers.md lists them"
    )


class JudgeSettings(_Group):
    """The LLM that judges recorded answers."""

    base_url: str | None = Field(
        None, description="OpenAI-compatible endpoint of the judge, up to and including /v1"
    )
    model: str = Field("gpt-4-1106-preview", description="model that judges")
    api_key: SecretStr | None = Field(None, description="sent as a bearer token; never logged")
    concurrency: int = Field(8, ge=1, le=256, description="calls in flight at once")
    timeout_s: float = Field(60.0, gt=0, description="seconds to wait for one reply")
    attempts: int = Field(5, ge=1, le=20, description="calls for one reply before giving up")
    max_answer_chars: int = Field(
        20_000, ge=1, description="longest answer shown to the judge; the rest is cut off"
    )
    max_output_tokens: int = Field(512, ge=16, description="longest reply of the judge")
    budget_usd: float = Field(10.0, ge=0, description="dollars that one run may spend")
    usd_per_million_input: float = Field(
        10.0, ge=0, description="the judge's price of a million input tokens, in dollars"
    )
    usd_per_million_output: float = Field(
        30.0, ge=0, description="the judge's price of a million output tokens, in dollars"
    )


class Price(_Group):
    """What a model's tokens cost, in dollars per million."""

    input: float = Field(ge=0, description="a million tokens read")
    output: float = Field(ge=0, description="a million tokens written")


class EvaluationSettings(_Group):
    """How routers are measured."""

    benchmarks: str | None = Field(
        None,
        description="folder of benchmark tables, or `routellm` to fetch the paper's own; "
        "by default the data folder, if it has any",
    )
    primary: str = Field(
        "auto", description="benchmark that promotion looks at; auto takes the widest one"
    )
    bootstrap: int = Field(1000, ge=100, le=100_000, description="bootstrap resamples")
    contamination_similarity: float = Field(
        0.95, gt=0, le=1, description="cosine similarity at which a prompt counts as seen"
    )
    contamination_ngram: int = Field(
        13,
        ge=0,
        le=100,
        description="words of a run that counts when prompts are compared by their words; 0 "
        "compares no words",
    )
    contamination: Literal["drop_evaluation", "drop_training"] = Field(
        "drop_evaluation",
        description="what is left out where an evaluation and a training prompt match",
    )
    input_tokens: float = Field(
        95.0, ge=0, description="tokens of a query, for its cost (the paper's average)"
    )
    output_tokens: float = Field(
        264.0, ge=0, description="tokens of an answer, for its cost (the paper's average)"
    )


class PromotionSettings(_Group):
    """What a candidate must show before it takes the champion's place."""

    resamples: int = Field(
        2000, ge=2000, le=100_000, description="paired bootstrap resamples of each comparison"
    )
    confidence: float = Field(
        0.95, ge=0.5, lt=1, description="of the intervals that comparisons are decided by"
    )
    margin: float = Field(
        0.0,
        ge=0,
        le=1,
        description="APGR that a candidate must surely gain on the primary benchmark",
    )
    benchmark_margin: float = Field(
        0.05, ge=0, le=1, description="APGR that a candidate may lose on another benchmark"
    )
    slice_margin: float = Field(
        0.1, ge=0, le=1, description="APGR that a candidate may lose on a slice of the primary one"
    )
    min_slice_prompts: int = Field(
        400,
        ge=2,
        description="fewer prompts of a slice, or of another benchmark, can speak "
        "against a candidate, but their doubt does not hold it back",
    )
    cost_tolerance: float = Field(
        0.05, ge=0, description="share by which the cost of the champion's quality may rise"
    )
    max_latency_ms: float = Field(
        500.0, gt=0, description="median time of one query in a fresh process, encoder included"
    )
    max_calibration_error: float = Field(
        0.1,
        gt=0,
        le=1,
        description="expected calibration error of the win rates, beyond what chance gives over "
        "as many battles",
    )
    max_excluded_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="prompts of a benchmark that may be left out as seen in training",
    )
    max_snapshot_age_days: float = Field(
        30.0, gt=0, description="age of the snapshot that a candidate was trained on"
    )
    min_canary_requests: int = Field(
        500,
        ge=1,
        description="requests that a challenger must answer or shadow before its online "
        "figures count",
    )
    max_canary_error_share: float = Field(
        0.01, ge=0, le=1, description="share of them on which it may fail"
    )
    lease_s: float = Field(
        30.0,
        gt=0,
        description="seconds that one move of an alias may take before another process finishes it",
    )
    webhook_url: str | None = Field(
        None, description="address that decisions are posted to, as signed JSON"
    )
    webhook_secret: SecretStr | None = Field(
        None, description="key of the signature (HMAC-SHA256); never logged"
    )
    webhook_timeout_s: float = Field(5.0, gt=0, description="seconds to wait for the webhook")
    webhook_attempts: int = Field(
        4, ge=1, le=20, description="posts of one decision before giving up"
    )


class Upstream(_Group):
    """One OpenAI-compatible endpoint that answers queries."""

    base_url: str = Field(description="up to and including /v1")
    model: str = Field(description="model name sent to it")
    api_key: SecretStr | None = Field(None, description="sent as a bearer token; never logged")


class GatewaySettings(_Group):
    """The OpenAI-compatible gateway."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(6060, ge=1, le=65535, description="port to listen on")
    strong: Upstream | None = Field(None, description="the strong model's endpoint")
    weak: Upstream | None = Field(None, description="the weak model's endpoint")
    threshold: float | None = Field(
        None, ge=0, le=1, description="win rate from which a query goes to strong"
    )
    strong_fraction: float = Field(
        0.5, ge=0, le=1, description="share of queries for strong, when no threshold is set"
    )
    fallback: Literal["strong", "weak"] = Field(
        "strong", description="route when there is no router to ask"
    )
    alias: str = Field("champion", description="alias to serve")
    challenger: Literal["off", "shadow", "canary"] = Field(
        "off",
        description="what the challenger does: nothing, be scored beside the champion (shadow), "
        "or decide for a share of requests (canary)",
    )
    canary_fraction: float = Field(
        0.05, gt=0, le=0.5, description="share of requests that a canary decides for"
    )
    poll_s: float = Field(2.0, gt=0, description="seconds between looks at the alias")
    timeout_s: float = Field(600.0, gt=0, description="seconds to wait for an upstream")
    max_body_bytes: int = Field(10_000_000, ge=1, description="largest request body accepted")


class Settings(BaseSettings):
    """Everything that can be set, with its default and meaning."""

    model_config = SettingsConfigDict(
        env_prefix="ROUTELLM_",
        env_nested_delimiter="__",
        toml_file="routellm.toml",
        extra="forbid",
        frozen=True,
    )

    home: Path = Field(Path(".routellm"), description="folder for everything this software writes")
    tracking_uri: str | None = Field(
        None, description="MLflow tracking server; by default SQLite in the home folder"
    )
    experiment: str = Field("routellm", description="MLflow experiment")
    model: str = Field("router", description="registered model's name in MLflow")
    strong: str | None = Field(
        None, description="strong model; by default the paper's, or the simulated arena's own"
    )
    weak: str | None = Field(
        None, description="weak model; by default the paper's, or the simulated arena's own"
    )
    sources: tuple[str, ...] = Field(
        ("simulated://arena",), description="where battles come from: files, folders, hub names"
    )
    prices: dict[str, Price] = Field(
        {PAPER_STRONG: Price(input=10.0, output=30.0), PAPER_WEAK: Price(input=0.24, output=0.24)},
        description="dollars per million tokens, by model: `[prices.MODEL]` with input and output",
    )
    embedding: EmbeddingSettings = EmbeddingSettings()
    ingest: IngestSettings = IngestSettings()
    validation: ValidationSettings = ValidationSettings()
    training: TrainingSettings = TrainingSettings()
    judge: JudgeSettings = JudgeSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    promotion: PromotionSettings = PromotionSettings()
    gateway: GatewaySettings = GatewaySettings()

    @model_validator(mode="after")
    def _pair_is_whole(self) -> Settings:
        if (self.strong is None) != (self.weak is None):
            raise ValueError("set both `strong` and `weak`, or neither")
        if self.strong is not None and self.strong == self.weak:
            raise ValueError(f"`strong` and `weak` are the same model ({self.strong})")
        return self

    @property
    def resolved_tracking_uri(self) -> str:
        """The MLflow tracking URI in force."""
        return self.tracking_uri or f"sqlite:///{(self.home / 'mlflow.db').resolve()}"

    def usd_per_query(self, model: str) -> float | None:
        """Return what a query costs with a model, in dollars; None if its price is not set."""
        price = self.prices.get(model)
        if price is None:
            return None
        read, written = self.evaluation.input_tokens, self.evaluation.output_tokens
        return (price.input * read + price.output * written) / 1e6

    def snapshots_dir(self, *, simulated: bool = False) -> Path:
        """Where snapshots live; simulated battles never share a snapshot with real ones."""
        return self.home / ("snapshots-simulated" if simulated else "snapshots")

    @property
    def quarantine_dir(self) -> Path:
        return self.home / "quarantine"

    @property
    def embeddings_path(self) -> Path:
        return self.home / "embeddings.db"

    @property
    def verdicts_path(self) -> Path:
        return self.home / "verdicts.db"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def settings_table() -> str:
    """Return every setting as a Markdown table: name, default, meaning."""
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]

    def add(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            default = field.default
            if isinstance(default, BaseModel):
                add(type(default), f"{prefix}{name}.")
                continue
            if isinstance(default, tuple):
                shown = ", ".join(map(str, default))
            elif default and isinstance(default, dict):
                shown = "; ".join(f"{k}: {v}" for k, v in default.items())
            else:
                shown = str(default)
            lines.append(f"| `{prefix}{name}` | `{shown}` | {field.description} |")

    add(Settings, "")
    return "\n".join(lines) + "\n"
