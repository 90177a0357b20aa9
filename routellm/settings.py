"""One typed settings object for the whole system.

Order of precedence, weakest first: the defaults below, ``routellm.toml`` in the working
directory, ``ROUTELLM_*`` environment variables (nested with ``__``, as in
``ROUTELLM_GATEWAY__PORT=8000``), command-line flags. Every default works with no server and
no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from routellm.errors import UsageError

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
    """One endpoint that answers queries."""

    via: Literal["http", "litellm"] = Field(
        "http",
        description="how it is asked: over HTTP, as an OpenAI-compatible endpoint, or through "
        "LiteLLM (an extra), which speaks other protocols; `model` is then LiteLLM's name",
    )
    base_url: str | None = Field(
        None,
        pattern=r"^https?://[^\s?#]+$",
        description="up to and including /v1; with litellm, by default the provider's own",
    )
    model: str = Field(min_length=1, description="model name sent to it")
    api_key: SecretStr | None = Field(None, description="sent as a bearer token; never logged")
    api_key_file: Path | None = Field(
        None, description="file that holds the key, instead of api_key"
    )
    speaks: tuple[Literal["openai", "anthropic"], ...] = Field(
        ("openai",), description="protocols: anthropic adds /v1/messages"
    )

    @model_validator(mode="after")
    def _one_way(self) -> Upstream:
        if self.via == "http" and self.base_url is None:
            raise ValueError("base_url is needed, unless via is litellm")
        if self.via == "litellm" and "anthropic" in self.speaks:
            raise ValueError("through litellm an upstream speaks openai only")
        return self

    @model_validator(mode="after")
    def _one_key(self) -> Upstream:
        if self.api_key is not None and self.api_key_file is not None:
            raise ValueError("give api_key or api_key_file, not both")
        return self

    def key(self) -> str | None:
        """Return the key that requests carry; None if there is none.

        Raises
        ------
        UsageError
            If its file cannot be read or is empty.
        """
        if self.api_key is not None:
            return self.api_key.get_secret_value()
        if self.api_key_file is None:
            return None
        try:
            key = self.api_key_file.read_text().strip()
        except (OSError, ValueError) as error:
            raise UsageError(f"the key file {self.api_key_file} cannot be read: {error}") from error
        if not key or "\n" in key:
            raise UsageError(f"the key file {self.api_key_file} must hold one line, the key")
        return key


class FeedbackSettings(_Group):
    """What the gateway keeps of its decisions and of what users made of them."""

    enabled: bool = Field(False, description="record decisions, and take POST /v1/feedback")
    store: str | None = Field(
        None, description="address of the store: sqlite:///FILE or postgresql://...; by default "
        "SQLite in the home folder"
    )  # fmt: skip
    store_prompts: bool = Field(
        False, description="store prompts, redacted: battles can be made only of these"
    )
    keep_days: float = Field(30.0, gt=0, description="days after which prompts are removed")
    phone_regions: tuple[str, ...] = Field(
        ("US",), description="countries whose phone numbers are recognised without country code"
    )
    queue: int = Field(10_000, ge=100, description="records that may wait to be written")
    duel_fraction: float = Field(
        0.0, ge=0, le=1,
        description="share of routed chat completions that both models answer and the judge "
        "(`judge`) compares",
    )  # fmt: skip
    duel_usd_per_day: float = Field(
        1.0, ge=0, description="dollars a day that duels may spend, in each process"
    )


class CascadeSettings(_Group):
    """The policy `cascade` (FrugalGPT): a trained scorer reads the weak model's answer."""

    scorer: Path | None = Field(
        None,
        description="folder of the scorer, as `routellm policies` writes it; without one there is "
        "no such policy",
    )
    threshold: float = Field(
        0.5, ge=0, le=1, description="score below which the strong model is asked"
    )
    timeout_s: float = Field(2.0, gt=0, description="seconds for a score; then `fallback` holds")


class AutoMixSettings(_Group):
    """The policy `automix`: the weak model checks its own answer."""

    samples: int = Field(
        0,
        ge=0,
        le=16,
        description="times that it is asked whether its answer is right (paper: 8); 0: no such "
        "policy",
    )
    temperature: float = Field(1.0, ge=0, le=2, description="temperature of that question")
    max_output_tokens: int = Field(256, ge=16, description="longest reply to it")
    threshold: float = Field(
        0.5, ge=0, le=1, description="share of yes below which the strong model is asked"
    )
    timeout_s: float = Field(30.0, gt=0, description="seconds for all; then `fallback` holds")


class PoolSettings(_Group):
    """The policy `pool`: further models beside strong and weak, by one version of the router."""

    models: dict[str, Upstream] = Field(
        default_factory=dict,
        description="further endpoints, by the model's name in the battles that the router learnt "
        'from: `[gateway.pool.models."NAME"]` as gateway.strong; none: there is no such policy',
    )
    cost_weight: float = Field(
        30.0, ge=0, description="quality (score in [0, 1]) that a dollar more a query must bring"
    )

    @field_validator("models")
    @classmethod
    def _named(cls, models: dict[str, Upstream]) -> dict[str, Upstream]:
        taken = sorted({"strong", "weak", "embeddings"} & set(models))
        if taken:
            raise ValueError(f"a model of the pool cannot be called {taken[0]}: that is a route")
        return models


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
        0.5, ge=0, le=1, description="share of queries for strong, when nothing else is set"
    )
    quality: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the gap between weak and strong to recover, instead of a fraction",
    )
    max_usd: float | None = Field(
        None, ge=0, description="most dollars that a query may cost on average, instead"
    )
    pacer: bool = Field(
        True, description="keep the strong fraction asked for while the traffic drifts"
    )
    pacer_window: int = Field(
        500, ge=50, le=100_000, description="queries that the paced threshold is taken from"
    )
    pacer_most_odds: float = Field(
        8.0,
        ge=1,
        description="how far the pacer may move the odds of the calibrated fraction, as a factor",
    )
    fallback: Literal["strong", "weak"] = Field(
        "strong", description="route when there is no router to ask"
    )
    workers: int = Field(
        1, ge=1, le=64, description="processes that serve, each with a router of its own"
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
    nudge_secret: SecretStr | None = Field(
        None,
        description="key of the signature of webhooks (MLflow's, or our own) that have it look at "
        "the alias at once (POST /admin/look); never logged",
    )
    nudge_jitter_s: float = Field(
        0.0, ge=0, description="longest random wait before such a look: spreads a large fleet's"
    )
    scored: Literal["user_turns", "last_user_turn", "first_user_turn"] = Field(
        "user_turns",
        description="what of a conversation is scored: as many of the latest user turns as are "
        "within scored_tokens, the last, or the first, as in training",
    )
    scored_tokens: int = Field(
        512, ge=1, le=100_000, description="tokens that are scored, at four characters each"
    )
    routing_timeout_s: float = Field(
        2.0, gt=0, description="seconds for a decision; then `fallback` answers"
    )
    cascade: CascadeSettings = CascadeSettings()
    automix: AutoMixSettings = AutoMixSettings()
    pool: PoolSettings = PoolSettings()
    timeout_s: float = Field(600.0, gt=0, description="seconds to wait for an upstream")
    connect_timeout_s: float = Field(5.0, gt=0, description="seconds to connect to an upstream")
    retries: int = Field(
        2, ge=0, le=10, description="further tries of a query that an upstream has not worked on"
    )
    retry_wait_s: float = Field(
        0.25, gt=0, description="longest wait before the first further try; doubles with each"
    )
    retry_longest_s: float = Field(
        2.0, gt=0, description="longest wait before any try, also where an upstream asks for more"
    )
    breaker_failures: int = Field(
        5, ge=1, description="failures in a row after which an upstream is left alone"
    )
    breaker_open_s: float = Field(
        10.0, gt=0, description="seconds that it is left alone before the next try"
    )
    stand_in: bool = Field(
        True, description="let the other model answer a routed query when the chosen one fails"
    )
    open_metrics: bool = Field(
        True, description="whether /metrics and the status page need no (admin) key"
    )
    max_concurrent: int = Field(
        512, ge=1, description="requests at once; more are told to come again (429)"
    )
    max_body_bytes: int = Field(10_000_000, ge=1, description="largest request body accepted")
    log_format: Literal["json", "plain", "off"] = Field(
        "json",
        description="lines on stderr: JSON or plain, one a request; or warnings and errors alone",
    )
    log_prompts: bool = Field(False, description="write the text that was scored into the log")
    otlp_endpoint: str | None = Field(
        None, description="OTLP/HTTP address that traces are sent to, such as an MLflow server's"
    )
    embeddings: Upstream | None = Field(
        None, description="endpoint of /v1/embeddings, which is not routed; by default weak's"
    )

    @property
    def routes(self) -> dict[str, Upstream]:
        """The endpoints that queries go to, by route: strong, weak, and the pool's by name."""
        pair = {"strong": self.strong, "weak": self.weak}
        return {route: one for route, one in pair.items() if one is not None} | self.pool.models

    @property
    def url(self) -> str:
        """Where this machine reaches the gateway."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


class WorkersSettings(_Group):
    """Prefect's work pools, on which deployments run, and what a run does side by side."""

    train: Literal["here", "deployments"] = Field(
        "here",
        description="where routers are trained: in the process that retrains, or each as a run of "
        "`train-router` on a work pool",
    )
    cpu_pool: str = Field("cpu", min_length=1, description="work pool of what needs no GPU")
    gpu_pool: str = Field(
        "gpu", min_length=1, description="work pool of `gpu_kinds`; without one, `cpu_pool`'s"
    )
    gpu_kinds: tuple[str, ...] = Field(
        ("bert", "causal_llm"), description="router kinds to train on a GPU where there is one"
    )
    gpus: int = Field(
        1, ge=1, description="CUDA devices that trainings may hold at once, over all machines"
    )
    wait_s: float = Field(
        30.0, ge=0, description="seconds to wait for a worker of a work pool to be online"
    )
    runner: Literal["threads", "ray"] = Field(
        "threads",
        description="what embeds, and trains routers and trials, side by side within a retraining: "
        "threads of its process, or a Ray cluster",
    )
    at_once: int | None = Field(
        None,
        ge=1,
        description="how much is done side by side: by default 1 with threads, and as many as the "
        "machine has cores on a Ray cluster that is started for the run; one that `ray_address` "
        "names does as many as it has CPUs",
    )
    ray_address: str | None = Field(
        None,
        min_length=1,
        description="Ray cluster that runs already, as host:6379 or ray://host:10001; by default "
        "one is started on this machine for the run",
    )
    min_fresh_battles: int = Field(
        1000, ge=1, description="battles not yet trained on that ask for a retraining at once"
    )
    folder: Path | None = Field(
        None,
        description="where runs of a worker find routellm.toml and start relative paths; set it in "
        "the worker's environment, since Prefect starts runs in a temporary folder",
    )


class Latency(_Group):
    """How long a model takes: so many seconds, and so many more for each token it writes."""

    first_token_s: float = Field(0.4, ge=0, description="seconds to the first token")
    token_s: float = Field(0.015, ge=0, description="seconds for each token written")


class ScorerSettings(_Group):
    """The small encoder that policies fine-tune to score, rank and choose answers."""

    model: str = Field(
        "sentence-transformers/all-MiniLM-L6-v2", description="local folder or hub name"
    )
    revision: str = Field(
        EmbeddingSettings.model_fields["revision"].default,
        description="pinned hub revision of `model`",
    )
    max_length: int = Field(192, ge=16, description="tokens read of a prompt and its answers")
    batch_size: int = Field(16, ge=1, description="texts in a step")
    learning_rate: float = Field(3e-4, gt=0, description="highest of a training")
    epochs: int = Field(2, ge=1, description="most passes over the examples")
    trained_layers: int = Field(
        2, ge=1, description="of the encoder's last layers; what is below stays as it is"
    )
    examples: int = Field(
        600, ge=50, description="most examples trained on, drawn at random; time grows with it"
    )
    usd_per_million: float = Field(
        0.02, ge=0, description="dollars that reading a million tokens is counted with"
    )
    seconds: float = Field(0.02, ge=0, description="seconds that reading one text is counted with")


class VerifierSettings(_Group):
    """AutoMix's self-verification: the small model is asked whether its own answer is right."""

    endpoint: JudgeSettings = Field(
        JudgeSettings(),
        description="the small model's endpoint; without its base_url votes are made up, and the "
        "rows say SIMULATED",
    )
    samples: int = Field(8, ge=1, le=64, description="votes on an answer (paper)")
    temperature: float = Field(
        1.0, gt=0, le=2, description="at which votes are drawn: above 0, for them to differ (paper)"
    )
    planted_right: float = Field(
        0.75, ge=0, le=1, description="SIMULATED votes: chance of yes where an answer is right"
    )
    planted_wrong: float = Field(0.65, ge=0, le=1, description="the same where it is wrong")


class BartScoreSettings(_Group):
    """What scores answers for Hybrid-LLM's labels, where it is not the table."""

    model: str | None = Field(
        None,
        description="local folder or hub name of a sequence-to-sequence model, as "
        "`facebook/bart-large-cnn`; by default, and where no answers were recorded, a table's "
        "own scores are taken",
    )
    revision: str = Field("main", description="hub revision of `model`: pin a commit")


class PoliciesSettings(_Group):
    """How policies are compared on recorded tables."""

    tokenizer: str = Field(
        "sentence-transformers/all-MiniLM-L6-v2",
        description="what counts tokens: a hub name or a folder; the default is installed",
    )
    latency: dict[str, Latency] = Field(
        {PAPER_STRONG: Latency(first_token_s=0.6, token_s=0.03)},
        description="seconds that a call takes, by model: `[policies.latency.MODEL]` with "
        "first_token_s and token_s; others take 0.4 s and 15 ms a token",
    )

    rows: int = Field(
        2_000, ge=50, description="most rows of a table that are measured on, drawn by their hash"
    )
    scorer: ScorerSettings = ScorerSettings()
    verifier: VerifierSettings = VerifierSettings()
    bart_score: BartScoreSettings = BartScoreSettings()

    def latency_of(self, model: str) -> Latency:
        """Return how long a model takes."""
        return self.latency.get(model, Latency())


class UpSettings(_Group):
    """`routellm up`: all parts on one machine."""

    host: str = Field("127.0.0.1", description="address that Prefect's server and MLflow listen on")
    prefect_port: int = Field(4200, ge=1, le=65535, description="port of Prefect's server")
    mlflow_port: int = Field(5000, ge=1, le=65535, description="port of MLflow's server")
    runs_at_once: int = Field(
        6,
        ge=3,
        le=256,
        description="flow runs at once in a pool; a retraining is one, and one more for each "
        "router that it has trained",
    )


class MonitorSettings(_Group):
    """What is watched while the loop runs by itself, and from where on it is said."""

    gateways: tuple[str, ...] = Field(
        (), description="addresses of gateways to look at, without /v1; by default the one of "
        "`gateway.host` and `gateway.port`",
    )  # fmt: skip
    timeout_s: float = Field(5.0, gt=0, description="seconds to wait for a gateway")
    follow_s: float = Field(
        60.0, ge=0, description="seconds that a gateway may take to serve what the alias points at"
    )
    max_snapshot_age_days: float = Field(7.0, gt=0, description="age of the newest snapshot")
    max_champion_age_days: float = Field(
        30.0, gt=0, description="days since the champion was trained"
    )
    window_hours: float = Field(24.0, gt=0, description="hours of traffic that are looked at")
    min_decisions: int = Field(500, ge=50, description="fewest decisions, or prompts, to judge by")
    warn_psi: float = Field(
        0.1, gt=0, description="drift of the traffic that is warned of (PSI; 0.1 is a small shift)"
    )
    max_psi: float = Field(
        0.25, gt=0, description="drift that fails and asks for a retraining (0.25: a major shift)"
    )
    strong_fraction_tolerance: float = Field(
        0.1, gt=0, le=1, description="distance of the strong fraction from what is asked for"
    )
    usd_per_day: float | None = Field(
        None, gt=0, description="dollars that all answers of a day (UTC) may cost"
    )
    warn_share: float = Field(
        0.8, gt=0, le=1, description="share of any other limit from which on it is warned of"
    )


class RetentionSettings(_Group):
    """What `routellm compact` keeps."""

    snapshots: int = Field(10, ge=1, description="newest snapshots that are kept")
    snapshot_days: float = Field(
        30.0, ge=1, description="days that a snapshot is kept, and what the history names"
    )
    versions: int = Field(20, ge=1, description="newest versions of the router that are kept")
    run_days: float = Field(
        30.0, ge=1, description="days that runs of trials, and those without a version, are kept"
    )
    quarantine_days: float = Field(90.0, ge=1, description="days that quarantined rows are kept")
    leftover_days: float = Field(
        7.0, ge=1, description="days that what killed runs left is kept, for them to go on from"
    )


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
    storage: str | None = Field(
        None,
        description="where several machines keep snapshots, embeddings and trained routers in "
        "common: s3://bucket/prefix, or file:///folder that they all mount; by default each home "
        "has its own",
    )
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
    inbox: Path | None = Field(
        None, description="folder that files of new battles are dropped into; by default `inbox` "
        "in the home folder"
    )  # fmt: skip
    inbox_settle_s: float = Field(
        10.0, ge=0, description="seconds for which a file in the inbox must not have changed"
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
    feedback: FeedbackSettings = FeedbackSettings()
    monitor: MonitorSettings = MonitorSettings()
    retention: RetentionSettings = RetentionSettings()
    workers: WorkersSettings = WorkersSettings()
    policies: PoliciesSettings = PoliciesSettings()
    up: UpSettings = UpSettings()

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
    def inbox_dir(self) -> Path:
        """Where files of new battles are dropped."""
        return self.inbox or self.home / "inbox"

    @property
    def quarantine_dir(self) -> Path:
        return self.home / "quarantine"

    @property
    def embeddings_path(self) -> Path:
        return self.home / "embeddings.db"

    @property
    def verdicts_path(self) -> Path:
        return self.home / "verdicts.db"

    @property
    def votes_path(self) -> Path:
        return self.home / "votes.db"

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
            default = field.get_default(call_default_factory=True)
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
