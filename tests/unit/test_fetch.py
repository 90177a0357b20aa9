"""Fetching the published tables, from a local repository of the same layout over real HTTP."""

import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from routellm.errors import BenchmarkError, UsageError
from routellm.evaluation import fetch
from routellm.evaluation.benchmarks import load_benchmarks
from routellm.evaluation.fetch import TABLES, fetch_published
from tests.support.git_server import can_serve, commit_files, git, git_server

pytestmark = [
    pytest.mark.slow,  # it starts servers
    pytest.mark.skipif(not can_serve(), reason="no git that can serve over HTTP"),
]

STRONG, WEAK = "gpt-4-1106-preview", "mixtral-8x7b-instruct-v0.1"
MMLU = "routellm/evals/mmlu/responses/mmlu_{}.csv"
GSM8K = "routellm/evals/gsm8k/gsm8k_responses.csv"
QUESTIONS = "routellm/evals/mt_bench/question.jsonl"
JUDGEMENTS = "routellm/evals/mt_bench/judgements.jsonl"
BALLAST = 300_000  # bytes of a file that nobody needs


def table(header, *rows):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue().encode()


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def seen(*prompts):
    return lines(*({"train_prompt": p, "eval_prompt": p, "eval_idx": 0} for p in prompts))


def judgement(question, model, turn, score):
    return {"question_id": question, "model": model, "judge": ["gpt-4", "single"], "turn": turn,
            "user_prompt": "…", "judgment": "…", "score": score, "tstamp": 1.5}  # fmt: skip


def published(**changes):
    """Return the files of a repository of the published layout; None takes one away."""
    files = {
        MMLU.format("anatomy"): table(
            ["prompt", WEAK, STRONG],
            ["Which bone, if any?\nA. this\nB. that\nAnswer:", True, True],
            ['The "longest" nerve is\nA. here\nAnswer:', False, True],
        ),
        # another order and spelling, and a prompt that is two numbers
        MMLU.format("world_history"): table(
            ["prompt", "openai/" + STRONG, "mistralai/Mixtral-8x7B-Instruct-v0.1"],
            ["1789", False, False],
            ["1914", True, False],
        ),
        "routellm/evals/mmlu/contaminated_prompts.jsonl": seen("1914"),
        GSM8K: table(
            ["prompt", WEAK, STRONG, f"{WEAK}_response", f"{STRONG}_response"],
            ["Two and two?", False, True, "5", "True"],
            ["Three pens, one lost?", True, True, "2,\n\n2", "2"],
            ["Half of ten — exactly?", True, False, "5", "6"],
        ),
        "routellm/evals/gsm8k/contaminated_prompts.jsonl": seen("Half of ten — exactly?"),
        QUESTIONS: lines(
            {"question_id": 81, "category": "writing", "turns": ["Write", "Again"]},
            {"question_id": 82, "category": "math", "turns": ["Add", "Now without fingers"]},
            {"question_id": 83, "category": "stem", "turns": ["Explain", "Shorter"]},
        ),
        JUDGEMENTS: lines(
            *(judgement(q, STRONG, turn, 9) for q in (82, 81, 83) for turn in (2, 1)),
            *(judgement(q, "mistralai/Mixtral-8x7B-Instruct-v0.1", 1, 7.0) for q in (81, 82, 83)),
            *(judgement(q, WEAK, 2, 5.5) for q in (81, 82, 83)),
        ),
        # of the second turn
        "routellm/evals/mt_bench/contaminated_prompts.jsonl": seen("Now without fingers"),
        "assets/picture.bin": os.urandom(BALLAST),
        "README.md": b"# A repository\n",
    }  # fmt: skip
    files |= changes.pop("files", {})
    return {path: content for path, content in files.items() if content is not None}


@pytest.fixture
def repository(tmp_path):
    return tmp_path / "published.git"


def visible(folder):
    return sorted(p.name for p in folder.glob("*") if p.name != ".fetch.lock")


@pytest.mark.parametrize("filters", [True, False])
def test_the_tables_come_out_as_the_benchmarks_read_them(tmp_path, repository, filters):
    commit = commit_files(repository, published())
    with git_server(repository, filters=filters) as server:
        got = fetch_published(tmp_path / "kept", url=server.url, commit=commit)
    assert got == tmp_path / "kept" / commit[:12]
    assert sorted(p.name for p in got.iterdir()) == sorted([*TABLES, "digests.json"])
    assert visible(tmp_path / "kept") == [commit[:12]]
    if filters:  # what nobody needs stays there, and all the rest comes in one request
        assert server.sent < BALLAST
        posts = [line for line in server.asked if line.startswith("POST")]
        assert len(posts) <= 4, posts
    else:
        assert server.sent > BALLAST

    mmlu = pq.read_table(got / "mmlu.parquet").to_pylist()
    assert mmlu[0] == {
        "prompt": "Which bone, if any?\nA. this\nB. that\nAnswer:", "domain": "anatomy",
        STRONG: True, WEAK: True, "contaminated": False,
    }  # fmt: skip
    assert [(row["prompt"], row["domain"], row[STRONG], row[WEAK]) for row in mmlu[1:]] == [
        ('The "longest" nerve is\nA. here\nAnswer:', "anatomy", True, False),
        ("1789", "world_history", False, False),
        ("1914", "world_history", True, False),
    ]
    assert [row["contaminated"] for row in mmlu] == [False, False, False, True]
    gsm8k = pq.read_table(got / "gsm8k.parquet")
    assert gsm8k.column_names == ["prompt", STRONG, WEAK, "contaminated"]
    assert gsm8k[WEAK].to_pylist() == [False, True, True]
    questions = pq.read_table(got / "mt_bench_questions.parquet").to_pylist()
    assert questions[0] == {
        "question_id": 81, "category": "writing", "turns": ["Write", "Again"],
        "contaminated": False,
    }  # fmt: skip
    judged = pq.read_table(got / "mt_bench_judgements.parquet")
    assert judged.column_names == ["question_id", "model", "turn", "score"]
    assert judged["model"].to_pylist() == [STRONG] * 6 + [WEAK] * 6

    of = {b.name: b for b in load_benchmarks(got)}
    assert {name: (len(b), b.excluded) for name, b in of.items()} == {
        "gsm8k": (2, 1), "mmlu": (3, 1), "mt_bench": (2, 1),
    }  # fmt: skip
    assert of["mt_bench"].prompts == ("Write", "Explain")
    assert of["mt_bench"].scores[WEAK].tolist() == [6.25, 6.25]
    assert of["gsm8k"].prompts == ("Two and two?", "Three pens, one lost?")
    assert of["mmlu"].scores[STRONG].tolist() == [1, 1, 0]


def test_the_published_tables_survive_the_way(tmp_path, repository, real_data):
    """The real tables, written in the published layout, come back as they were."""
    import pandas as pd

    def read(name):
        return pd.read_parquet(real_data / f"{name}.parquet")

    def text(frame):
        return frame.to_csv(index=False).encode()

    mmlu, gsm8k, questions = read("mmlu"), read("gsm8k"), read("mt_bench_questions")
    files = {
        MMLU.format(domain): text(part[["prompt", WEAK, STRONG]])
        for domain, part in mmlu.groupby("domain")
    }
    renamed = gsm8k.rename(columns=lambda name: name.replace(":response", "_response"))
    files[GSM8K] = text(renamed.drop(columns="contaminated"))
    rows = questions.assign(turns=questions["turns"].map(list)).to_dict("records")
    files[QUESTIONS] = lines(*rows)
    files[JUDGEMENTS] = lines(*read("mt_bench_judgements").to_dict("records"))
    contaminated = {
        "mmlu": mmlu.prompt, "gsm8k": gsm8k.prompt, "mt_bench": questions["turns"].str[0],
    }  # fmt: skip
    for (name, prompts), frame in zip(contaminated.items(), (mmlu, gsm8k, questions), strict=True):
        files[f"routellm/evals/{name}/contaminated_prompts.jsonl"] = seen(
            *prompts[frame.contaminated]
        )
    commit = commit_files(repository, files)
    with git_server(repository) as server:
        got = fetch_published(tmp_path / "kept", url=server.url, commit=commit)
    fetched = pd.read_parquet(got / "mmlu.parquet")
    order = ["domain", "prompt"]
    expected = mmlu.drop(columns="split").sort_values(order, kind="stable", ignore_index=True)
    pd.testing.assert_frame_equal(
        fetched.sort_values(order, kind="stable", ignore_index=True), expected, check_dtype=False
    )
    pd.testing.assert_frame_equal(
        pd.read_parquet(got / "gsm8k.parquet"),
        gsm8k[["prompt", STRONG, WEAK, "contaminated"]], check_dtype=False,
    )  # fmt: skip
    fresh, kept = ({b.name: b for b in load_benchmarks(f)} for f in (got, real_data))
    assert fresh["gsm8k"].digest == kept["gsm8k"].digest
    assert fresh["mt_bench"].digest == kept["mt_bench"].digest


def test_a_second_call_needs_no_server(tmp_path, repository):
    commit = commit_files(repository, published())
    with git_server(repository) as server:
        first = fetch_published(tmp_path / "kept", url=server.url, commit=commit)
        asked = len(server.asked)
        assert fetch_published(tmp_path / "kept", url=server.url, commit=commit) == first
        assert len(server.asked) == asked
    assert fetch_published(tmp_path / "kept", url=server.url, commit=commit) == first


def test_two_commits_are_kept_apart(tmp_path, repository):
    first = commit_files(repository, published())
    second = commit_files(
        repository,
        published(files={GSM8K: table(["prompt", WEAK, STRONG], ["One?", False, True])}),
    )
    with git_server(repository) as server:
        a, b = (fetch_published(tmp_path, url=server.url, commit=c) for c in (first, second))
    assert [len(pq.read_table(f / "gsm8k.parquet")) for f in (a, b)] == [3, 1]


def refused(folder, url, commit, *words):
    """Fetch, which must fail in one sentence with these words, leaving nothing."""
    with pytest.raises(BenchmarkError) as error:
        fetch_published(folder, url=url, commit=commit)
    said = str(error.value)
    for word in (*words, "`evaluation.benchmarks`"):
        assert word in said, said
    assert "\n" not in said
    assert "Traceback" not in said
    assert visible(folder) == []
    return said


def test_a_commit_that_is_not_there(tmp_path, repository):
    commit_files(repository, published())
    with git_server(repository) as server:
        refused(
            tmp_path / "kept",
            server.url,
            "5" * 40,
            "there is no commit 555555555555 of",
            server.url,
        )


def test_a_tag_is_not_the_commit_it_names(tmp_path, repository):
    commit = commit_files(repository, published())
    git(repository, "tag", "--annotate", "--message=v1", "v1", commit)
    tag = git(repository, "rev-parse", "v1")
    assert tag != commit
    with git_server(repository) as server:
        refused(
            tmp_path / "kept",
            server.url,
            tag,
            f"asked for commit {tag[:12]}",
            f"got the commit {commit}",
        )


def test_an_answer_of_megabytes(tmp_path, repository):
    """Longer than the reader's usual block; and answers are text though they look like numbers."""
    header = ["prompt", WEAK, STRONG, f"{WEAK}_response", f"{STRONG}_response"]
    rows = [["A?", False, True, "1", "so on\n" * 500_000], ["B?", True, False, "two", "2"]]
    commit = commit_files(repository, published(files={GSM8K: table(header, *rows)}))
    with git_server(repository) as server:
        got = fetch_published(tmp_path / "kept", url=server.url, commit=commit)
    assert pq.read_table(got / "gsm8k.parquet")["prompt"].to_pylist() == ["A?", "B?"]


def test_a_host_that_does_not_answer(tmp_path):
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://someone:secret@127.0.0.1:{taken.getsockname()[1]}/published.git"
        said = refused(tmp_path, url, "5" * 40, "cannot fetch commit 555555555555", "127.0.0.1")
    assert "secret" not in said


def test_a_server_that_never_ends_its_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/published.git"
        refused(tmp_path / "kept", url, "5" * 40, "within 0.5 seconds")
        silent.settimeout(5)
        connection, _ = silent.accept()
        with connection:  # git's child, which held the connection, was ended too
            connection.settimeout(5)
            while connection.recv(4096):
                pass


def test_a_repository_that_is_not_there(tmp_path, repository):
    commit = commit_files(repository, published())
    with git_server(repository) as server:
        refused(tmp_path / "kept", server.url + "x", commit, "cannot fetch", "not found")


def test_git_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    refused(tmp_path / "kept", "https://example.org/a", "5" * 40, "cannot run git", "install git")


@pytest.mark.parametrize("url", ["file:///a/b", "ext::sh -c true", "--upload-pack=true", "a/b"])
def test_other_ways_than_http_are_not_tried(tmp_path, url):
    with pytest.raises(UsageError, match="https://"):
        fetch_published(tmp_path / "kept", url=url, commit="5" * 40)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("commit", ["main", "5" * 12, "../" + "5" * 37, "G" * 40])
def test_only_a_full_commit_id_will_do(tmp_path, commit):
    with pytest.raises(UsageError, match="40 hex digits"):
        fetch_published(tmp_path / "kept", commit=commit)
    assert not (tmp_path / "kept").exists()


ALL_JUDGED = [judgement(q, m, t, 9) for q in (81, 82, 83) for m in (STRONG, WEAK) for t in (1, 2)]


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        (GSM8K, None, ["has no file", GSM8K]),
        ("routellm/evals/mmlu/contaminated_prompts.jsonl", None, ["has no file", "mmlu/conta"]),
        (GSM8K, table(["question", WEAK, STRONG], ["a", True, True]),
         ["no column `prompt`", "found question, mixtral-8x7b-instruct-v0.1, gpt-4-1106-preview"]),
        (GSM8K, table(["prompt", WEAK, f"{STRONG}_response"], ["a", True, True]),
         ["each of two models", f"found prompt, {WEAK}, {STRONG}_response"]),
        (GSM8K, table(["prompt", WEAK, STRONG], ["a", True, True], ["b", True, ""]),
         ["each of two models"]),
        (GSM8K, table(["prompt", WEAK, STRONG]), ["each of two models"]),
        (GSM8K, b"prompt,a,b\nx,True\n", ["not a CSV table"]),
        (GSM8K, b"", ["not a CSV table"]),
        (MMLU.format("anatomy"), table(["prompt", "a", "b"], ["x", True, True]),
         ["mmlu_world_history.csv", "other models", STRONG]),
        (QUESTIONS, lines({"question_id": 81, "turns": ["a", "b"]}),
         ["lacks `category` in line 1", "found question_id, turns"]),
        (QUESTIONS, b"{]\n", ["line 1 that is not JSON"]),
        (QUESTIONS, b"", ["question.jsonl", "has no rows"]),
        (QUESTIONS, lines({"question_id": 81, "category": "a", "turns": ["one"]}),
         ["two turns for question 81", "found 1 with 1"]),
        (QUESTIONS, lines(*[{"question_id": 81, "category": "a", "turns": ["a", "b"]}] * 2),
         ["one row", "question 81", "found 2 with 2"]),
        (QUESTIONS, lines({"question_id": 81, "category": "a", "turns": ["\ud800", "b"]}),
         ["is not Unicode"]),
        (JUDGEMENTS, lines(*ALL_JUDGED[1:]), ["0 of", "turn 1 of question 81"]),
        (JUDGEMENTS, lines(*ALL_JUDGED, ALL_JUDGED[0]), ["found 2 of"]),
        (JUDGEMENTS, lines(*ALL_JUDGED, judgement(99, WEAK, 1, 1)), ["question 99"]),
        (JUDGEMENTS, lines(judgement(81, WEAK, 1, -1)), ["outside 1 to 10", "found -1"]),
        (JUDGEMENTS, lines(judgement(81, WEAK, 1, None)), ["without `score`"]),
        (JUDGEMENTS, lines(judgement("x", WEAK, 1, 5)), ["`question_id` of another type"]),
    ],
)  # fmt: skip
def test_a_commit_that_lacks_what_is_needed(tmp_path, repository, path, content, words):
    commit = commit_files(repository, published(files={path: content}))
    with git_server(repository) as server:
        said = refused(tmp_path / "kept", server.url, commit, commit[:12], server.url, *words)
    assert len(said) < 700, said


def test_no_domain_of_mmlu(tmp_path, repository):
    gone = {MMLU.format(domain): None for domain in ("anatomy", "world_history")}
    commit = commit_files(repository, published(files=gone))
    with git_server(repository) as server:
        refused(tmp_path / "kept", server.url, commit, "has no file", "mmlu_*.csv")


def test_the_pinned_commit_must_hold_what_it_is_known_to(tmp_path, repository, monkeypatch):
    commit = commit_files(repository, published())
    monkeypatch.setattr(fetch, "PUBLISHED_COMMIT", commit)
    with git_server(repository) as server:
        refused(tmp_path / "kept", server.url, commit, "read 2 domains of mmlu", "57 or more")


def test_a_byte_changed_on_the_way_is_noticed(tmp_path, repository):
    commit = commit_files(repository, published())
    with git_server(repository, filters=False) as server:
        server.spoil = True
        refused(tmp_path / "kept", server.url, commit, "cannot fetch")
        server.spoil = False
        assert fetch_published(tmp_path / "kept", url=server.url, commit=commit).is_dir()


def test_a_malformed_object_is_refused(tmp_path, repository):
    tree = git(repository, "rev-parse", commit_files(repository, published()) + "^{tree}")
    text = f"tree {tree}\nauthor nobody 0 +0000\ncommitter nobody 0 +0000\n\nno address\n"
    commit = git(
        repository, "hash-object", "-t", "commit", "-w", "--literally", "--stdin",
        stdin=text.encode(),
    )  # fmt: skip
    with git_server(repository) as server:
        refused(tmp_path / "kept", server.url, commit, "cannot fetch", "missingEmail")


def test_the_persons_own_git_settings_are_left_out(tmp_path, repository, monkeypatch):
    commit = commit_files(repository, published())
    elsewhere = '[url "http://127.0.0.1:1/"]\n\tinsteadOf = http://127.0.0.1:\n'
    for name in (".gitconfig", "named"):
        (tmp_path / name).write_text(elsewhere)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "named"))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "url.http://127.0.0.1:1/.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "http://127.0.0.1:")
    with git_server(repository) as server:
        assert fetch_published(tmp_path / "kept", url=server.url, commit=commit).is_dir()


@pytest.mark.parametrize("name", [*TABLES, "digests.json"])
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_damaged_file_is_fetched_anew(tmp_path, repository, name, how):
    commit = commit_files(repository, published())
    with git_server(repository) as server:
        got = fetch_published(tmp_path / "kept", url=server.url, commit=commit)
        before = (got / name).read_bytes()
        if how == "gone":
            (got / name).unlink()
        else:
            (got / name).write_bytes(before[:20] + b"?" + before[21:])
        assert fetch_published(tmp_path / "kept", url=server.url, commit=commit) == got
        assert (got / name).read_bytes() == before
    assert visible(tmp_path / "kept") == [commit[:12]]


def test_a_damaged_file_that_cannot_be_fetched_anew(tmp_path, repository):
    commit = commit_files(repository, published())
    with git_server(repository) as server:
        got = fetch_published(tmp_path / "kept", url=server.url, commit=commit)
    (got / "mmlu.parquet").write_bytes(b"PAR1")
    with pytest.raises(BenchmarkError, match=r"damaged \(mmlu.parquet is not .* cannot fetch") as e:
        fetch_published(tmp_path / "kept", url=server.url, commit=commit)
    assert "\n" not in str(e.value)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchmarkError, match="cannot write benchmark tables under"):
        fetch_published(tmp_path / "file" / "kept", url="http://127.0.0.1:1/a", commit="5" * 40)


def another_process(folder, server, commit):
    code = (
        "import sys, pathlib; from routellm.evaluation.fetch import fetch_published as f; "
        "print('ready', flush=True); "
        "print(f(pathlib.Path(sys.argv[1]), url=sys.argv[2], commit=sys.argv[3]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), server.url, commit],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_what_a_killed_fetch_left_is_removed(tmp_path, repository):
    commit = commit_files(repository, published())
    kept = tmp_path / "kept"
    with git_server(repository) as server:
        server.hold_first = threading.Event()
        with another_process(kept, server, commit) as killed:
            assert server.arrived.wait(60)
            os.kill(killed.pid, signal.SIGKILL)
        (left,) = visible(kept)
        assert left.startswith(".fetch-")
        got = fetch_published(kept, url=server.url, commit=commit)
        assert visible(kept) == [commit[:12]]
        assert len(load_benchmarks(got)) == 3
        # killed after the tables were in place: nothing is fetched any more, and yet it goes
        (kept / ".fetch-0" / "repository.git").mkdir(parents=True)
        fetch_published(kept, url=server.url, commit=commit)
        assert visible(kept) == [commit[:12]]


def test_a_fetch_under_way_is_not_taken_for_a_leftover(tmp_path, repository):
    first = commit_files(repository, published())
    second = commit_files(repository, published())
    with git_server(repository) as server:
        fetch_published(tmp_path / "kept", url=server.url, commit=first)
        asked, server.asked = server.asked, []
        server.hold_first = threading.Event()
        with another_process(tmp_path / "kept", server, second) as other:
            assert server.arrived.wait(60)
            fetch_published(tmp_path / "kept", url=server.url, commit=first)
            server.hold_first.set()
            assert other.stdout.readline() == "ready\n"
            out, err = other.communicate(timeout=60)
        assert other.returncode == 0, err
        assert load_benchmarks(Path(out.strip()))
        assert asked


def test_two_processes_at_once_both_end_with_a_whole_folder(tmp_path, repository):
    commit = commit_files(repository, published())
    with git_server(repository) as server:
        fetch_published(tmp_path / "alone", url=server.url, commit=commit)
        once = len(server.asked)
        server.asked.clear()
        server.hold_first = threading.Event()
        two = [another_process(tmp_path / "kept", server, commit) for _ in range(2)]
        assert server.arrived.wait(60)
        assert [process.stdout.readline() for process in two] == ["ready\n"] * 2
        time.sleep(0.3)  # one holds the lock, the other has come to it
        server.hold_first.set()
        for process in two:
            with process:
                out, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
            assert {b.name for b in load_benchmarks(Path(out.strip()))} == {
                "gsm8k", "mmlu", "mt_bench",
            }  # fmt: skip
        assert len(server.asked) == once  # the second used what the first fetched
    assert visible(tmp_path / "kept") == [commit[:12]]
