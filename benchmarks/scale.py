"""What 100 million battles and 10,000 requests a second come to: arithmetic on what was measured.

``python -m benchmarks.scale`` prints the tables of ``docs/scale.md``; a test compares. Nothing here
was run at that size. Each measured figure names the command that gives it, and where a page of
`docs` has it already, the words there, which a test looks up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.fleet import table

BATTLES = 100_000_000
BATTLES_A_PROMPT = 1.3  # as `benchmarks.simulated` draws them
REQUESTS_PER_S = 10_000
TOKENS = 95  # of a query (the paper's average)
ROOM = 0.6  # of a core or database that is used, so that queues stay short
JUDGED_SHARE = 0.01  # of answers that somebody judges
DAY_S = 86_400
PREFECT_RUNS = 24 + 288 + 1 + 5  # deploy/prefect.yaml: ingest, monitor, retrain, five trainings


@dataclass(frozen=True)
class Figure:
    """A figure that the arithmetic starts from.

    Attributes
    ----------
    command : str
        What measures it; "" is an assumption.
    quoted, page : str
        Words of a page of `docs` that have it; "" where `command` alone does.
    """

    what: str
    value: float
    unit: str
    command: str
    quoted: str = ""
    page: str = ""


GATEWAY = "python -m benchmarks.gateway"
ENCODER = "python -m benchmarks.encoder"
GROWTH = "python -m benchmarks growth"
STORES = "python -m benchmarks.stores"
FLEET = "python -m benchmarks.fleet"
PERFORMANCE = "performance.md"

request_ms = Figure(
    "a request, without the encoder", 1.0, "ms of a core", GATEWAY,
    "A request costs about a millisecond of one core", "gateway.md",
)  # fmt: skip
encode_32_ms = Figure(
    "one prompt of 32 tokens encoded", 19, "ms of a core", ENCODER,
    "| 32 | 19 ms | 151 prompts/s |", PERFORMANCE,
)  # fmt: skip
encode_128_ms = Figure(
    "one prompt of 128 tokens encoded", 49, "ms of a core", ENCODER,
    "| 128 | 49 ms | 34 prompts/s |", PERFORMANCE,
)  # fmt: skip
batch_32_per_s = Figure(
    "prompts of 32 tokens, batches, two cores", 151, "prompts/s", ENCODER,
    "| 32 | 19 ms | 151 prompts/s |", PERFORMANCE,
)  # fmt: skip
batch_128_per_s = Figure(
    "prompts of 128 tokens, batches, two cores", 34, "prompts/s", ENCODER,
    "| 128 | 49 ms | 34 prompts/s |", PERFORMANCE,
)  # fmt: skip
battle_bytes = Figure("a battle in a snapshot, 95 random words", 770, "bytes", STORES)
vector_bytes = Figure("a vector in the cache of embeddings", 4689, "bytes", STORES)
decision_bytes = Figure("a decision without its prompt, PostgreSQL", 605, "bytes", STORES)
prompt_bytes = Figure("a decision with its prompt, PostgreSQL", 1608, "bytes", STORES)
decisions_per_s = Figure("decisions that one writer adds, PostgreSQL", 9200, "rows/s", STORES)
limits_per_s = Figure("requests of a key with a budget, one file", 16_300, "requests/s", STORES)
lookup_ms = Figure("a lookup of the alias, PostgreSQL", 10.6, "ms of MLflow", FLEET)
load_ms = Figure("a new version at a replica (`mf`)", 98, "ms of MLflow", FLEET)

MILLION = 1_000_000
PROMPTS_AT_MILLION = 300_000  # distinct: `benchmarks.simulated` draws no more
mf_fit_s = Figure("`mf` trained on a million battles", 97, "s", GROWTH, "| 97* |", PERFORMANCE)
sw_query_ms = Figure(
    "`sw_ranking`, a query, 300,000 prompts", 47, "ms", GROWTH, "47; 381", PERFORMANCE
)
knn_query_ms = Figure("`knn`, a query, 300,000 prompts", 87, "ms", GROWTH, "87*; 918*", PERFORMANCE)
gp_query_ms = Figure(
    "`gaussian_process`, a query, 300,000 prompts", 89, "ms", GROWTH, "89*; 690*", PERFORMANCE
)
knn_fit_s = Figure(
    "`knn` trained on a million battles", 121, "s", GROWTH, "| 1.1 | 21 | 121* |", PERFORMANCE
)
sw_fit_s = Figure(
    "`sw_ranking` trained on a million battles", 30, "s", GROWTH, "| 0.1 | 4.3 | 30 |", PERFORMANCE
)
gp_fit_s = Figure(
    "`gaussian_process` trained on a million battles", 323, "s", GROWTH, "| 29 | 74 | 323* |",
    PERFORMANCE,
)  # fmt: skip
data_mb = Figure(
    "a million battles with 300,000 vectors, in memory", 714, "MB", GROWTH,
    "| the battles alone, MB | 140 | 277 | 714 | |", PERFORMANCE,
)  # fmt: skip
data_small_mb = Figure(
    "100,000 battles with 77,000 vectors, in memory", 277, "MB", GROWTH,
    "| the battles alone, MB | 140 | 277 | 714 | |", PERFORMANCE,
)  # fmt: skip
gpu_per_s = Figure(
    "ASSUMED: short sentences that a V100 encodes, by the tables of sentence-transformers' "
    "documentation (`models_en_sentence_embeddings.html`)", 14_200, "sentences/s", "",
)  # fmt: skip

FIGURES = tuple(found for found in list(globals().values()) if isinstance(found, Figure))


def at_tokens(at_32: float, at_128: float, tokens: int = TOKENS) -> float:
    """Return a time between those at 32 and 128 tokens, on a straight line."""
    return at_32 + (at_128 - at_32) * (tokens - 32) / 96


PROMPTS = BATTLES / BATTLES_A_PROMPT
encode_s = at_tokens(encode_32_ms.value, encode_128_ms.value) / 1000
batch_s = at_tokens(1 / batch_32_per_s.value, 1 / batch_128_per_s.value)  # two cores
gpu_s = 1 / gpu_per_s.value * batch_s * batch_32_per_s.value  # slower for longer, as the CPU is
encode_core_h = PROMPTS * batch_s * 2 / 3600
gpu_h = PROMPTS * gpu_s / 3600
vector_gb = PROMPTS * 384 * 4 / 1e9
# what a battle takes beside its prompt's vector, from the two sizes of the table
more_prompts = PROMPTS_AT_MILLION - 100_000 / BATTLES_A_PROMPT
battle_kb = (data_mb.value - data_small_mb.value - more_prompts * 1536 / 1e6) / 900
memory_gb = vector_gb + BATTLES * battle_kb / 1e6
plain_cores = REQUESTS_PER_S * request_ms.value / 1000 / ROOM
encoder_cores = REQUESTS_PER_S * (request_ms.value / 1000 + encode_s) / ROOM
replicas = -(-encoder_cores // 4)  # of four cores, four processes
decision_gb = REQUESTS_PER_S * DAY_S * decision_bytes.value / 1e9
prompt_gb = REQUESTS_PER_S * DAY_S * prompt_bytes.value / 1e9


def longer(fit_s: float, power: float) -> float:
    """Return hours of training, from seconds at a million battles and the growth last seen."""
    return fit_s * float((BATTLES / MILLION) ** power) / 3600


def slower_s(query_ms: float) -> float:
    """Return seconds of a query that reads all prompts, in proportion to them."""
    return query_ms / 1000 * PROMPTS / PROMPTS_AT_MILLION


def sizes() -> list[Sequence[str]]:
    """Return the first table: what, how much, what breaks, what to do."""
    rows_per_s = REQUESTS_PER_S * (1 + JUDGED_SHARE)
    worst = slower_s(knn_query_ms.value)
    follows = 4 * replicas  # each process follows the alias
    poll_s = follows * lookup_ms.value / 1000 / ROOM
    return [
        ("snapshots", f"{BATTLES * battle_bytes.value / 1e9:.0f} GB",
         "nothing: a snapshot adds only what is new", "S3"),
        ("embeddings, on disk", f"{PROMPTS * vector_bytes.value / 1e9:.0f} GB",
         "one SQLite file, on one machine",
         "the cache on S3; a row is three times its vector (below)"),
        ("embedding all prompts once",
         f"{encode_core_h:,.0f} core hours; {gpu_h:.0f} GPU hours (assumed)",
         "a night has 8 hours: "
         f"{encode_core_h / 8:,.0f} cores", "GPU workers, once; then only what is new"),
        ("training, memory", f"{memory_gb:.0f} GB with all vectors",
         f"**first**: {vector_gb:.0f} GB of vectors fit no ordinary worker",
         "train on a million battles, the newest and the pair's own: no setting does that yet"),
        ("a query of `knn`", f"{worst:.0f} s over all prompts",
         f"**first**: over the 2 s of `gateway.routing_timeout_s` from {2 / worst:.0%} of them on",
         "serve `mf` (its query does not grow), or `knn` on a sample"),
        ("gateway, encoder included", f"{encoder_cores:,.0f} cores, {replicas:,.0f} replicas of 4",
         f"the encoder: {encode_s * 1000:.0f} of {encode_s * 1000 + request_ms.value:.0f} ms",
         "encode on a GPU (`embedding.base_url`), or short `gateway.scored_tokens`"),
        ("gateway, without it", f"{plain_cores:.0f} cores", "nothing", "`--workers`"),
        ("alias lookups", f"{follows:,.0f} processes that follow",
         f"the default poll of 2 s: one MLflow process carries one of {poll_s:.0f} s",
         "`gateway.poll_s = 60` and a nudge, or a read-through"),
        ("a new version, at every replica",
         f"{follows * load_ms.value / 1000:.0f} s of an MLflow process",
         "it, not the poll, decides when all serve",
         "a cache in front of MLflow's files; more `--workers`"),
        ("decisions and judgements", f"{rows_per_s:,.0f} rows/s, {decision_gb:,.0f} GB a day "
         f"({prompt_gb:,.0f} with prompts)",
         f"the database's disk; a replica's writer adds {rows_per_s / replicas:.0f} of the "
         f"{decisions_per_s.value:,.0f} rows/s it can",
         "record a share, partition by day; many writers at once are not measured"),
        ("keys' limits", f"{REQUESTS_PER_S / replicas:.0f} requests/s a replica",
         "nothing in speed; budgets hold per machine, not over the fleet",
         "divide budgets by the replicas, or keep them in the proxy in front"),
        ("Prefect", f"{PREFECT_RUNS} flow runs a day",
         "nothing: they grow with the schedules, not with the traffic", ""),
    ]  # fmt: skip


def kinds() -> list[Sequence[str]]:
    """Return the table of router kinds at 100 million battles."""
    all_memory = f"{memory_gb:.0f} GB"
    return [
        ("`mf`", f"{longer(mf_fit_s.value, 0.6):.1f} h", all_memory, "0.03 ms: does not grow"),
        ("`sw_ranking`", f"{longer(sw_fit_s.value, 0.8):.1f} h", all_memory,
         f"{slower_s(sw_query_ms.value):.0f} s"),
        ("`knn`", f"{longer(knn_fit_s.value, 0.8):.1f} h", all_memory,
         f"{slower_s(knn_query_ms.value):.0f} s"),
        ("`gaussian_process`", f"{longer(gp_fit_s.value, 0.6):.1f} h", all_memory,
         f"{slower_s(gp_query_ms.value):.0f} s"),
        ("`bert`, `causal_llm`", "bounded by `max_steps`", "the model's", "the model's"),
    ]  # fmt: skip


def sources() -> list[Sequence[str]]:
    """Return the table of what the arithmetic starts from."""
    return [
        (f.what, f"{f.value:,g} {f.unit}", f"`{f.command}`" if f.command else "an assumption")
        for f in FIGURES
    ]


def tables() -> list[str]:
    """Return the tables of the page."""
    at = f"{BATTLES / 1e6:.0f} million battles, {REQUESTS_PER_S:,} requests/s"
    return [
        table(["what", at, "what breaks first", "what to do"], sizes()),
        table(["kind", "training, at the growth last seen", "memory", "a query"], kinds()),
        table(["figure", "value", "from"], sources()),
    ]


if __name__ == "__main__":
    print("\n".join(tables()))
