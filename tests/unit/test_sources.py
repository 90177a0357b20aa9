import csv
import gzip
import json
import zipfile
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from routellm.battles import BATTLE_SCHEMA
from routellm.errors import SourceError, UsageError
from routellm.settings import IngestSettings, Settings
from routellm.sources import open_source

KAGGLE = {
    "id": 30192, "model_a": "GPT-4-1106-preview", "model_b": "gpt-4-0613",
    "prompt": json.dumps(["Is it morally right?", "And now?"]), "response_a": "[]",
    "response_b": "[]", "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0,
}  # fmt: skip
TURNS = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}]
ARENA = {
    "question_id": "q1", "model_a": "chatglm-6b", "model_b": "koala-13b",
    "winner": "tie (bothbad)", "judge": "arena_user_2", "conversation_a": TURNS,
    "conversation_b": TURNS, "turn": 1, "anony": True, "language": "English",
    "tstamp": 1682351591.1322,
}  # fmt: skip
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "Read this"}, {"type": "image"}]},
    {"role": "assistant", "content": []},
]
ARENA_140K = {
    "id": "abc", "model_a": "a", "model_b": "b", "winner": "both_bad",
    "evaluation_session_id": "s", "evaluation_order": 1, "conversation_a": PARTS,
    "conversation_b": PARTS, "language": "pl", "is_code": True,
    "timestamp": "2025-06-18 13:11:44.302",
}  # fmt: skip
ALPACA = {
    "prompt": "Name actors", "dataset": "helpful_base", "model_a": "gpt4_1106_preview",
    "model_b": "Mixtral-8x7B-Instruct-v0.1", "preference": 1.25, "judge": "gpt4",
}  # fmt: skip
POOL = {"prompt": "1+1", "task": "math", "a": 1.0, "b": 0.0, "c": 1.0}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def battles(path, **settings):
    source = open_source(str(path), Settings(ingest=IngestSettings(**settings)))
    return pa.Table.from_batches(source.batches(None), schema=BATTLE_SCHEMA).to_pylist()


def test_the_55k_shape(tmp_path):
    (row,) = battles(write_lines(tmp_path / "train.jsonl", [KAGGLE]))
    assert row["prompt"] == "Is it morally right?"
    assert (row["model_a"], row["winner"], row["turns"]) == ("gpt-4-1106-preview", "model_a", 2)
    assert (row["label_kind"], row["preference_a"]) == ("human", 1.0)


def test_the_55k_shape_judged_by_a_model(tmp_path):
    (row,) = battles(write_lines(tmp_path / "gpt4_judge_battles.jsonl", [KAGGLE]))
    assert row["label_kind"] == "judge"


def test_the_33k_and_100k_shape(tmp_path):
    (row,) = battles(write_lines(tmp_path / "a.jsonl", [ARENA]))
    assert (row["prompt"], row["winner"], row["preference_a"]) == ("What is 2+2?", "tie", 0.5)
    assert row["voted_at"].replace(microsecond=0) == datetime(2023, 4, 24, 15, 53, 11, tzinfo=UTC)


def test_the_140k_shape_with_content_parts(tmp_path):
    (row,) = battles(write_lines(tmp_path / "a.jsonl", [ARENA_140K]))
    assert (row["prompt"], row["winner"], row["category"]) == ("Read this", "tie", "code")
    assert row["voted_at"].year == 2025


def test_judgements_keep_the_judge_and_its_probability(tmp_path):
    (row,) = battles(write_lines(tmp_path / "a.jsonl", [ALPACA]))
    assert (row["winner"], row["preference_a"], row["judge"]) == ("model_a", 0.75, "gpt4")
    assert row["model_b"] == "mixtral-8x7b-instruct-v0.1"


def test_scores_become_every_pair_of_models(tmp_path):
    rows = battles(write_lines(tmp_path / "a.jsonl", [POOL]))
    found = {(r["model_a"], r["model_b"]): r["winner"] for r in rows}
    assert found == {("a", "b"): "model_a", ("a", "c"): "tie", ("b", "c"): "model_b"}
    assert {r["label_kind"] for r in rows} == {"golden"}


def test_only_the_gold_split_of_mmlu_is_trained_on(tmp_path):
    rows = [
        {"prompt": p, "domain": "d", "m1": True, "m2": False, "contaminated": False, "split": s}
        for p, s in (("train me", "gold"), ("measure me", "eval"))
    ]
    assert {r["prompt"] for r in battles(write_lines(tmp_path / "a.jsonl", rows))} == {"train me"}


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".parquet", ".jsonl.gz", ".json", ".zip"])
def test_every_format_gives_the_same_battles(tmp_path, ending):
    plain = write_lines(tmp_path / "plain.jsonl", [ALPACA])
    path = tmp_path / f"data{ending}"
    if ".csv" in ending:
        opener = gzip.open if ending.endswith("gz") else open
        with opener(path, "wt", newline="") as file:
            writer = csv.DictWriter(file, ALPACA)
            writer.writeheader()
            writer.writerow(ALPACA)
    elif ending == ".parquet":
        pq.write_table(pa.Table.from_pylist([ALPACA]), path)
    elif ending == ".json":
        path.write_text(json.dumps([ALPACA]))
    elif ending == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(plain, "inner.jsonl")
    else:
        path.write_bytes(gzip.compress(plain.read_bytes()))
    (one,), (two,) = battles(path), battles(plain)
    assert one["battle_id"] == two["battle_id"]


def bad_files(tmp_path):
    table = pa.Table.from_pylist([ALPACA] * 1000)
    pq.write_table(table, tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    header = ",".join(ALPACA)
    cell = "x" * 1_000_000
    return {
        "empty.csv": b"",
        "truncated.parquet": whole[: len(whole) // 2],
        "truncated.jsonl.gz": gzip.compress(json.dumps(ALPACA).encode() * 50)[:60],
        "broken.zip": b"PK\x03\x04 nothing",
        "cell.csv": f"{header}\n{cell},a,b,c,1,j\n".encode(),
        "mixed.csv": f"{header}\nfine,a,b,c,1,j\n".encode() + b"caf\xe9,a,b,c,1,j\n",
        "mixed.jsonl": b'{"prompt": "caf\xe9"}\n',
        "cells.csv": f"{header}\nonly,two\n".encode(),
        "notjson.jsonl": b"{nope\n",
        "shape.csv": b"prompt,model_a,model_b\np,a,b\n",
        "array.json": b"[1, 2]",
    }


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("empty.csv", "empty"),
        ("truncated.parquet", "truncated"),
        ("truncated.jsonl.gz", "truncated"),
        ("broken.zip", "damaged"),
        ("cell.csv", "over 200000 characters near line 2"),
        ("mixed.csv", "not UTF-8"),
        ("mixed.jsonl", "line 1 is not UTF-8"),
        ("cells.csv", "row 1 has 2 cells"),
        ("notjson.jsonl", "line 1 is not JSON"),
        ("shape.csv", "needs the column"),
        ("array.json", "expected an object"),
    ],
)
def test_a_bad_file_is_one_sentence_that_names_it(tmp_path, name, says):
    path = tmp_path / name
    path.write_bytes(bad_files(tmp_path)[name])
    with pytest.raises(SourceError, match=says) as raised:
        battles(path)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_benchmark_table_is_no_source(tmp_path):
    path = write_lines(tmp_path / "gsm8k.jsonl", [{"prompt": "p", "m": 1, "contaminated": False}])
    with pytest.raises(SourceError, match="--benchmarks"):
        battles(path)


@pytest.mark.parametrize("spec", ["nowhere.csv", "./no/such", "what is this", "ftp://x"])
def test_an_unknown_source_is_refused(spec):
    with pytest.raises(UsageError, match="no source"):
        open_source(spec, Settings())


@pytest.mark.parametrize(
    "spec",
    [
        "simulated://area",
        "simulated://arena?battles=x",
        "simulated://arena?n=3",
        "simulated://arena?battles=0",
    ],
)
def test_a_simulated_arena_is_asked_for_exactly(spec):
    with pytest.raises(UsageError):
        open_source(spec, Settings())


def test_a_longer_simulated_arena_extends_a_shorter_one():
    def ids(n, since=None):
        source = open_source(f"simulated://arena?battles={n}", Settings())
        return [i for b in source.batches(since) for i in b.column("battle_id").to_pylist()]

    assert ids(2500)[:1200] == ids(1200)
    assert ids(2500, {"battles": 1200}) == ids(2500)[1200:]


def test_simulated_votes_follow_the_qualities():
    from routellm.sources.simulated import SIM_STRONG, SIM_WEAK, simulated_benchmark

    one = simulated_benchmark(n=300)
    assert one.simulated
    assert one.scores[SIM_STRONG].mean() > one.scores[SIM_WEAK].mean() + 0.1
    source = open_source("simulated://arena?battles=4000", Settings())
    rows = [r for b in source.batches(None) for r in b.to_pylist()]
    own = [r for r in rows if {r["model_a"], r["model_b"]} == {SIM_STRONG, SIM_WEAK}]
    won = [r["preference_a"] if r["model_a"] == SIM_STRONG else 1 - r["preference_a"] for r in own]
    assert sum(won) / len(won) > 0.6
    assert not set(one.prompts) & {r["prompt"] for r in rows}
