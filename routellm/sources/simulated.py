"""A SIMULATED arena: models with known skills vote on prompts whose text shows what they need.

It exists so that the whole loop runs, and can be checked, with no data from anywhere. Each
prompt has a topic and a difficulty, both readable from its words; each model has a skill per
topic that falls with difficulty at its own rate. Votes are Bradley-Terry with ties (Davidson
1970) on the gap of qualities. The held-out prompts' true qualities are known, so a router can be
measured against the truth. Nothing here says how routers do on real traffic.

By default the arena stands still, and asks the same 2,000 prompts again and again. With ``drift``
it is a stream as real traffic is: every battle asks a prompt of its own, models are specialists
(their skills differ from topic to topic by 1, in log-odds of a vote), and what they are good at
turns: after d days a model's skills have a correlation of cos(90 degrees * drift * d / 30) with
those of the first day. ``drift=1`` leaves nothing of them after 30 days; ``drift=0`` is such a
stream that stands still. No model gets better or worse over all topics. ``per_day`` says how many
battles are fought in a day (1,440, one a minute). The benchmark knows of no stream: its qualities
are the arena's that stands still.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from routellm.battles import BATTLE_SCHEMA, battle_id
from routellm.errors import UsageError
from routellm.evaluation.benchmarks import Benchmark
from routellm.sources.base import NOTHING

SIM_STRONG = "simulated-strong"
SIM_WEAK = "simulated-weak"
_BLOCK = 1000  # battles drawn from one generator: a longer run extends a shorter one
_PROMPTS = 2000  # distinct prompts that battles are fought over
_TIE = 0.6  # Davidson's tie parameter
_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
_PER_DAY = 1440
_TURN_DAYS = 30  # in which drift=1 turns skills by a quarter
_OWN_PROMPTS = 1_000_000  # number of a stream's first prompt: the others have smaller ones

# topic: (how a question starts, what it is about)
_TOPICS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "chat": (("Say something nice about", "Tell me a joke about", "Chat with me about"),
             ("my cat", "rainy Mondays", "coffee", "my grandmother's garden", "old trains")),
    "facts": (("What is the capital of", "Which continent is", "How many people live in"),
              ("Peru", "Mongolia", "Senegal", "New Zealand", "Norway", "Laos")),
    "code": (("Write a Python function that handles", "Fix the bug in my code for",
              "Implement in Rust"),
             ("a binary search tree", "a rate limiter", "JSON parsing", "a thread pool",
              "matrix multiplication")),
    "maths": (("Compute", "Prove a statement about", "Solve this exercise on"),
              ("prime numbers", "definite integrals", "group homomorphisms", "probability",
               "linear recurrences")),
    "writing": (("Write a short story about", "Draft an email about", "Compose a poem on"),
                ("a lighthouse keeper", "a late delivery", "the first snow", "moving abroad")),
    "law": (("Explain the contract clause on", "Summarise case law about",
             "What are my rights regarding"),
            ("tenant deposits", "software licences", "employment notice", "data protection")),
    "health": (("What causes", "How should one treat", "Explain the mechanism of"),
               ("migraine", "iron deficiency", "type 2 diabetes", "seasonal allergies")),
    "logic": (("Solve the puzzle of", "Find the contradiction in", "Work out the schedule for"),
              ("five houses and five owners", "three liars", "a seating plan",
               "overlapping meetings")),
}  # fmt: skip
# what a prompt asks on top, easiest first: the words that show its difficulty. Two of a row are
# asked for, so that hardly two prompts share a long stretch of words (the contamination check
# would take one for a copy of the other)
_DEMANDS: tuple[tuple[str, ...], ...] = (
    ("Keep it short.", "One sentence is enough.", "Just the basics, please.", "No details.",
     "Plain words will do.", "Off the top of your head."),
    ("Give an example.", "Use simple words.", "List two reasons.", "Add a summary.",
     "Say where it matters.", "Name one exception."),
    ("Compare two approaches.", "Explain each step of your reasoning.", "Weigh the trade-offs.",
     "Cover the common mistakes.", "Say how to check the result.", "Order them by importance."),
    ("Handle every edge case.", "Justify each design choice.", "Analyse the worst case rigorously.",
     "Derive it from first principles.", "State all assumptions formally.",
     "Prove that none can be dropped.", "Give a counterexample for each relaxed assumption."),
)  # fmt: skip
# model: (level, loss of quality per step of difficulty)
_MODELS: dict[str, tuple[float, float]] = {
    SIM_STRONG: (1.6, 0.10),
    "simulated-strong-2": (1.4, 0.20),
    "simulated-mid-1": (1.2, 0.50),
    "simulated-mid-2": (1.1, 0.60),
    SIM_WEAK: (1.2, 0.85),
    "simulated-weak-2": (1.0, 0.85),
    "simulated-tiny-1": (0.5, 1.0),
    "simulated-tiny-2": (0.3, 1.1),
}
_NOTES = (
    "Thanks!", "I am in a hurry.", "This is for a friend.", "It is for work.", "Be kind.",
    "I asked this last year too.", "My colleague insists on it.", "No hurry at all.",
)  # fmt: skip

# who asks, in a stream: so that its thousands of prompts are no copies of each other
_ASKERS = (
    "a baker", "a nurse", "my uncle", "a pilot", "a student", "a violinist", "our landlord",
    "a beekeeper", "a referee", "a plumber", "a sailor", "my boss", "a tailor", "a goalkeeper",
    "a librarian", "a geologist", "a clown", "an astronaut", "a shepherd", "a dentist", "a florist",
    "a fisherman", "a judge", "a skier", "a barber", "a welder", "a novelist", "a chess player",
)  # fmt: skip
_PLACES = (
    "Lisbon", "Nairobi", "Osaka", "Quito", "Oslo", "Cairo", "Hanoi", "Toronto", "Naples", "Tbilisi",
    "Dublin", "Havana", "Lagos", "Perth", "Seoul", "Vienna", "Tunis", "Riga", "Manila", "Bogota",
    "the Alps", "the Sahara", "Alaska", "Siberia", "Patagonia", "a submarine", "a monastery",
)  # fmt: skip
_THINGS = (
    "umbrellas", "goats", "bicycles", "pancakes", "telescopes", "cacti", "drums", "volcanoes",
    "spreadsheets", "kites", "mushrooms", "passports", "penguins", "candles", "tractors", "mirrors",
    "blankets", "onions", "wolves", "keyboards", "balloons", "castles", "sardines", "elevators",
    "chocolate", "thunder", "sandals", "turbines", "orchids", "ladders", "dinosaurs", "carpets",
)  # fmt: skip


class SimulatedArena:
    """The source ``simulated://arena?battles=20000&seed=0``, with ``drift`` and ``per_day``."""

    simulated = True
    passed_over: Mapping[str, str] = NOTHING

    def __init__(self, spec: str = "simulated://arena") -> None:
        url = urlsplit(spec)
        options = {k: v[-1] for k, v in parse_qs(url.query).items()}
        try:
            self.battles = int(options.pop("battles", "20000"))
            self.seed = int(options.pop("seed", "0"))
            self.per_day = int(options.pop("per_day", str(_PER_DAY)))
            drift = options.pop("drift", None)
            self.drift = None if drift is None else float(drift)
        except ValueError as error:
            raise UsageError(
                f"{spec}: battles, seed and per_day must be whole numbers, drift a number"
            ) from error
        sound = self.battles >= 1 and self.seed >= 0 and self.per_day >= 1
        if url.netloc != "arena" or options or not (sound and 0.0 <= (self.drift or 0.0) <= 100.0):
            raise UsageError(
                f"{spec!r} is not simulated://arena?battles=N&seed=S with N > 0 (and, if wanted, "
                "per_day=M with M > 0 and drift=D with D from 0 to 100)"
            )
        self.name = f"simulated://arena?seed={self.seed}"
        if self.drift is not None:
            self.name += f"&drift={self.drift:g}"
        if self.per_day != _PER_DAY:
            self.name += f"&per_day={self.per_day}"

    def cursor(self) -> dict[str, Any]:
        return {"battles": self.battles}

    def batches(self, since: dict[str, Any] | None) -> Iterator[pa.RecordBatch]:
        done = int(since["battles"]) if since else 0
        world = _World(self.seed) if self.drift is None else None
        names = list(_MODELS)
        pairs = list(itertools.permutations(range(len(names)), 2))
        target = {names.index(SIM_STRONG), names.index(SIM_WEAK)}
        share = np.array([8.0 if set(p) == target else 1.0 for p in pairs])
        for block in range(done // _BLOCK, -(-self.battles // _BLOCK)):
            rng = np.random.default_rng([self.seed, 1, block])
            prompt = rng.integers(_PROMPTS, size=_BLOCK)
            if self.drift is not None:
                world, prompt = self._stream(block), np.arange(_BLOCK)
            assert world is not None
            pair = rng.choice(len(pairs), size=_BLOCK, p=share / share.sum())
            coin = rng.random(_BLOCK)
            rows: dict[str, list[Any]] = {name: [] for name in BATTLE_SCHEMA.names}
            for i in range(_BLOCK):
                number = block * _BLOCK + i
                if not done <= number < self.battles:
                    continue
                a, b = pairs[pair[i]]
                gap = world.quality[prompt[i], a] - world.quality[prompt[i], b]
                winner = _vote(gap, coin[i])
                row = {
                    "prompt": world.prompts[prompt[i]],
                    "model_a": names[a],
                    "model_b": names[b],
                    "winner": winner,
                    "preference_a": {"model_a": 1.0, "model_b": 0.0, "tie": 0.5}[winner],
                    "label_kind": "human",
                    "judge": None,
                }
                row["battle_id"] = battle_id(row_key=f"{self.name}/{number}", **row)
                row |= {
                    "source": self.name,
                    "category": world.topics[prompt[i]],
                    "language": "English",
                    "turns": 1,
                    "voted_at": _EPOCH + timedelta(days=1) * number / self.per_day,
                }
                for name, values in rows.items():
                    values.append(row[name])
            yield pa.RecordBatch.from_pydict(rows, schema=BATTLE_SCHEMA)

    def _stream(self, block: int) -> _World:
        """Return a block's prompts, one a battle, with the qualities of the days they are asked."""
        first = block * _BLOCK
        world = _World(self.seed, first=_OWN_PROMPTS + first, n=_BLOCK, varied=True)
        days = (first + np.arange(_BLOCK)) / self.per_day
        turned = np.pi / 2 * (self.drift or 0.0) * days / _TURN_DAYS
        rng = np.random.default_rng([self.seed, 3])
        skills = rng.normal(0.0, 1.0, (2, len(_MODELS), len(_TOPICS)))  # to turn between
        skills -= skills.mean(axis=2, keepdims=True)
        topic = np.array([list(_TOPICS).index(name) for name in world.topics])
        then, other = skills[:, :, topic].transpose(0, 2, 1)  # (_BLOCK, models) each
        world.quality += np.cos(turned)[:, None] * then + np.sin(turned)[:, None] * other
        return world


def _vote(gap: float, u: float) -> str:
    """Draw a vote: Bradley-Terry with Davidson's ties."""
    a, b = np.exp(gap / 2.0), np.exp(-gap / 2.0)
    total = a + b + _TIE
    return "model_a" if u < a / total else "model_b" if u < (a + b) / total else "tie"


def simulated_benchmark(seed: int = 0, n: int = 1000) -> Benchmark:
    """Return prompts that no battle is fought over, with the models' true qualities.

    A model's score is its expected share of votes against an average answer, in [0, 1].
    """
    world = _World(seed, first=_PROMPTS, n=n)
    scores = 1.0 / (1.0 + np.exp(-world.quality))
    return Benchmark(
        "simulated",
        tuple(world.prompts),
        {name: scores[:, i] for i, name in enumerate(_MODELS)},
        simulated=True,
        category=tuple(world.topics),
    )


class _World:
    """Prompts, their topics, and every model's true quality on each (n, m)."""

    def __init__(
        self, seed: int, *, first: int = 0, n: int = _PROMPTS, varied: bool = False
    ) -> None:
        self.prompts: list[str] = []
        self.topics: list[str] = []
        topic_names = list(_TOPICS)
        skill = np.random.default_rng([seed, 0]).normal(0.0, 0.35, (len(_MODELS), len(_TOPICS)))
        level = np.array([v[0] for v in _MODELS.values()])
        slope = np.array([v[1] for v in _MODELS.values()])
        quality: list[NDArray[np.float64]] = []
        for number in range(first, first + n):
            rng = np.random.default_rng([seed, 2, number])
            topic = int(rng.integers(len(topic_names)))
            difficulty = int(rng.integers(len(_DEMANDS)))
            starts, things = _TOPICS[topic_names[topic]]
            sentence = f"{rng.choice(starts)} {rng.choice(things)}"
            demands = " ".join(rng.choice(_DEMANDS[difficulty], 2, replace=False))
            note = f"{rng.choice(_NOTES)} (case {number})"
            if varied:
                one, other = rng.choice(_THINGS, 2, replace=False)
                note = f"For {rng.choice(_ASKERS)} in {rng.choice(_PLACES)}: {one} and {other}."
            self.prompts.append(f"{sentence}. {demands} {note}")
            self.topics.append(topic_names[topic])
            # what the words do not show: every prompt is a little harder or easier than it reads
            hidden = rng.normal(0.0, 0.7)
            quality.append(level + skill[:, topic] - slope * (difficulty + hidden))
        self.quality = np.array(quality)
