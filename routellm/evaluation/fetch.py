"""Fetching the paper's benchmark tables from the repository that published them.

::

    <folder>/<first 12 digits of the commit>/    appears whole, in one step
        mmlu.parquet  gsm8k.parquet  mt_bench_questions.parquet  mt_bench_judgements.parquet
        digests.json                             SHA-256 of each table, checked before each use
    <folder>/.fetch-<random>/                    a fetch under way, or what a killed one left
    <folder>/.fetch.lock                         one fetch at a time

The transport is the ``git`` command. Git names every object by the hash of its content: a commit
names its tree, a tree its files, so the full id of one commit is the checksum of every file in
it, and what arrives under another content does not arrive at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from routellm.battles import canonical_model
from routellm.errors import BenchmarkError, UsageError
from routellm.snapshots import file_sha256

PUBLISHED_URL: Final = "https://github.com/lm-sys/RouteLLM"
PUBLISHED_COMMIT: Final = "0b64fdafe049e596a3f5657c219329f24af24198"
TABLES: Final = (
    "gsm8k.parquet",
    "mmlu.parquet",
    "mt_bench_judgements.parquet",
    "mt_bench_questions.parquet",
)
TIMEOUT_S: Final = 300.0  # for one git command; the tables are a few megabytes

_DIGESTS: Final = "digests.json"
_EVALS: Final = "routellm/evals"
_MMLU: Final = re.compile(rf"{_EVALS}/mmlu/responses/mmlu_(\w+)\.csv")
_MMLU_SEEN: Final = f"{_EVALS}/mmlu/contaminated_prompts.jsonl"
_GSM8K: Final = f"{_EVALS}/gsm8k/gsm8k_responses.csv"
_GSM8K_SEEN: Final = f"{_EVALS}/gsm8k/contaminated_prompts.jsonl"
_QUESTIONS: Final = f"{_EVALS}/mt_bench/question.jsonl"
_JUDGEMENTS: Final = f"{_EVALS}/mt_bench/judgements.jsonl"
_MT_BENCH_SEEN: Final = f"{_EVALS}/mt_bench/contaminated_prompts.jsonl"
_NEEDED: Final = (_MMLU_SEEN, _GSM8K, _GSM8K_SEEN, _QUESTIONS, _JUDGEMENTS, _MT_BENCH_SEEN)

# What the pinned commit is known to hold at least. The commit's id vouches for the files; this
# holds our own reading of them to account.
_PINNED_AT_LEAST: Final = {
    "domains of mmlu": 57,
    "rows of mmlu": 9_844,
    "rows of gsm8k": 1_319,
    "questions of mt_bench": 80,
}

_INSTEAD: Final = "set `evaluation.benchmarks` to a folder of tables"

# Nothing of the person's own git settings is read, so these are all that is in force.
_CONFIG: Final = tuple(
    argument
    for setting in (
        "fetch.fsckObjects=true",  # malformed objects are refused, beside those of another hash
        "protocol.allow=never",  # a redirect leads to http or https, or nowhere
        "protocol.http.allow=always",
        "protocol.https.allow=always",
        "credential.helper=",
        "core.hooksPath=" + os.devnull,
        "gc.auto=0",
        "maintenance.auto=false",
        # a git whose parent was killed gives up by itself when the server stalls
        "http.lowSpeedLimit=1",
        "http.lowSpeedTime=60",
    )
    for argument in ("-c", setting)
)
# the certificates a company's proxy needs are the one thing taken over
_GIT_VARIABLES_KEPT: Final = {"GIT_SSL_CAINFO", "GIT_SSL_CAPATH"}


def fetch_published(
    folder: Path, *, url: str = PUBLISHED_URL, commit: str = PUBLISHED_COMMIT
) -> Path:
    """Return a folder with the published tables, fetching them if they are not there whole.

    Parameters
    ----------
    folder : Path
        Where fetched tables are kept, a subfolder for each commit. It is made if missing.
    url : str
        The git repository, by http or https.
    commit : str
        Full id of the commit to read. Because git names every object by the hash of its content,
        this one id is the checksum of every file read.

    Returns
    -------
    Path
        ``folder / commit[:12]``, in the form that `load_benchmarks` reads. It appears in one
        step: a process that is killed, or two at once, leave it whole or absent. Where it is
        there and its digests hold, nothing is downloaded.

    Raises
    ------
    UsageError
        If `url` is not of http or https, or `commit` is not a full commit id.
    BenchmarkError
        If git is not installed, the repository cannot be reached, it has no such commit, or the
        commit does not hold the tables; also if a damaged table cannot be fetched anew.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise UsageError(
            f"{commit!r} is not a full commit id (40 hex digits), which is what vouches for the "
            "files: give the whole id"
        )
    if not url.startswith(("https://", "http://")):
        raise UsageError(f"cannot fetch from {url!r}: give an address that starts with https://")
    final = folder / commit[:12]
    damage = _damage(final)
    if damage is None:
        _tidy(folder)
        return final
    was_there = os.path.lexists(final)
    try:
        with _lock(folder):
            if _damage(final) is not None:  # else another process fetched it while we waited
                _fetch(folder, final, _Commit(url, commit))
    except OSError as error:
        raise BenchmarkError(
            f"cannot write benchmark tables under {folder} ({error.strerror or error}): make it "
            f"writable and free some space, or {_INSTEAD}"
        ) from error
    except BenchmarkError as error:
        if was_there:
            raise BenchmarkError(
                f"the benchmark tables in {final} are damaged ({damage}) and could not be fetched "
                f"anew, because {error}"
            ) from error
        raise
    return final


@dataclass(frozen=True)
class _Commit:
    """One commit of one repository."""

    url: str
    id: str

    def __str__(self) -> str:
        return f"commit {self.id[:12]} of {_without_user(self.url)}"


def _fetch(folder: Path, final: Path, commit: _Commit) -> None:
    _sweep(folder)
    work = folder / f".fetch-{uuid.uuid4().hex}"
    work.mkdir()
    try:
        files = _download(work / "repository.git", commit)
        tables = work / "tables"
        tables.mkdir()
        for name, table in _tables(files, commit).items():
            pq.write_table(table, tables / name)
        sums = {name: file_sha256(tables / name) for name in TABLES}
        (tables / _DIGESTS).write_text(json.dumps(sums, indent=1) + "\n")
        if os.path.lexists(final):
            final.rename(work / "damaged")
        tables.rename(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


# --- the folder ---------------------------------------------------------------------------------


def _damage(folder: Path) -> str | None:
    """Say what is wrong with a folder of fetched tables, or return None if it is whole."""
    try:
        sums = json.loads((folder / _DIGESTS).read_bytes())
        for name in TABLES:
            if file_sha256(folder / name) != sums[name]:
                return f"{name} is not as it was written"
    except OSError as error:
        return f"{Path(str(error.filename)).name}: {error.strerror}"
    except (ValueError, TypeError, KeyError):
        return f"{_DIGESTS} is not as it was written"
    return None


@contextlib.contextmanager
def _lock(folder: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """One fetch at a time; the kernel lets go of the lock when its holder dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".fetch.lock").open("w") as file:
        fcntl.flock(file, how)
        yield


def _sweep(folder: Path) -> None:
    """Remove what killed fetches left. Whoever holds the lock knows that none is under way."""
    for left in folder.glob(".fetch-*"):
        shutil.rmtree(left, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Remove what killed fetches left, unless one is under way or the folder is read-only."""
    if any(folder.glob(".fetch-*")):
        with contextlib.suppress(OSError), _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
            _sweep(folder)


# --- git ----------------------------------------------------------------------------------------


class _GitFailedError(Exception):
    """Git ended with an error; the message is its own account, on one line."""


def _download(repository: Path, commit: _Commit) -> dict[str, bytes]:
    """Return the files needed, by path, fetched into a bare repository that may be deleted."""
    try:
        _git("init", "--quiet", "--bare", "--template=", str(repository))
        here = f"--git-dir={repository}"
        # A server that knows no filters sends everything, which is merely more: git says so in a
        # warning and goes on.
        fetch = (here, "fetch", "--quiet", "--no-tags", "--filter=blob:none")
        try:
            _git(*fetch, "--depth=1", commit.url, commit.id)
        except _GitFailedError as error:
            # the two ways in which servers say that they have no such commit, or show none
            if re.search("not our ref|unadvertised object", str(error)):
                raise BenchmarkError(
                    f"there is no {commit}: check the address and the commit, or {_INSTEAD}"
                ) from error
            raise
        got = _git(here, "rev-parse", "--verify", "FETCH_HEAD^{commit}").decode().strip()
        if got != commit.id:
            raise BenchmarkError(
                f"asked for {commit} and got the commit {got}: check the commit's id, or {_INSTEAD}"
            )
        ids = _ids(_git(here, "ls-tree", "-r", "-z", commit.id, "--", f"{_EVALS}/"), commit)
        # One request for all contents that did not come: left to itself, git makes one for each.
        walk = (here, "rev-list", "--objects", "--no-walk", "--missing=print", commit.id)
        absent = {line[1:] for line in _git(*walk).decode().splitlines() if line.startswith("?")}
        wanted = sorted(absent.intersection(ids.values()))
        if wanted:
            _git(*fetch, commit.url, *wanted)
        names = "".join(f"{one}\n" for one in ids.values())
        return _contents(_git(here, "cat-file", "--batch", stdin=names.encode()), ids)
    except _GitFailedError as error:
        raise BenchmarkError(
            f"cannot fetch {commit} (git: {error}): check the network and its proxy, or {_INSTEAD}"
        ) from error


def _ids(listing: bytes, commit: _Commit) -> dict[str, str]:
    """Return the object id of each file needed, from what ``git ls-tree -r -z`` prints."""
    found: dict[str, str] = {}
    for entry in listing.decode("utf-8", "surrogateescape").split("\0")[:-1]:
        about, path = entry.split("\t", 1)
        mode, _, one = about.split(" ")
        if mode.startswith("100") and (path in _NEEDED or _MMLU.fullmatch(path)):
            found[path] = one
    missing = [path for path in _NEEDED if path not in found]
    if not any(_MMLU.fullmatch(path) for path in found):
        missing.append(f"{_EVALS}/mmlu/responses/mmlu_*.csv")
    if missing:
        raise BenchmarkError(
            f"{commit} has no file {', '.join(missing)}: fetch another commit, or {_INSTEAD}"
        )
    return found


def _contents(batch: bytes, ids: Mapping[str, str]) -> dict[str, bytes]:
    """Cut up what ``git cat-file --batch`` prints: a line about each object, then its content."""
    files: dict[str, bytes] = {}
    at = 0
    for path, one in ids.items():
        end = batch.find(b"\n", at)
        about = batch[at:end].split()
        if len(about) != 3 or about[0].decode() != one:
            raise _GitFailedError(f"the content of {path} did not arrive")
        size = int(about[2])
        files[path] = batch[end + 1 : end + 1 + size]
        at = end + 1 + size + 1
    return files


def _git(*arguments: str, stdin: bytes = b"") -> bytes:
    """Run git and return what it prints.

    Raises
    ------
    _GitFailedError
        If it ends with an error.
    BenchmarkError
        If it is not installed or does not end in time.
    """
    try:
        with subprocess.Popen(
            ["git", *_CONFIG, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,  # so that its children can be ended with it
        ) as process:
            try:
                out, err = process.communicate(stdin, timeout=TIMEOUT_S)
            except BaseException:  # out of time, or interrupted
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(
            f"git did not fetch the benchmark tables within {TIMEOUT_S:g} seconds: check the "
            f"network and its proxy, or {_INSTEAD}"
        ) from error
    except OSError as error:
        raise BenchmarkError(
            f"cannot run git, which fetches the benchmark tables ({error.strerror}): install "
            f"git, or {_INSTEAD}"
        ) from error
    if process.returncode != 0:
        raise _GitFailedError(_account(err, process.returncode))
    return out


def _environment() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or name in _GIT_VARIABLES_KEPT
    }
    return kept | {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "",  # nor a window that asks for a password
        "LC_ALL": "C",  # we look for git's words
    }


def _account(stderr: bytes, status: int) -> str:
    """Return git's own account of an error: its first complaint, which the others follow from."""
    lines = stderr.decode("utf-8", "replace").splitlines()
    for line in lines:
        kind, _, rest = line.partition(": ")
        if kind in ("fatal", "error"):
            return _without_user(rest)[:300]
    return _without_user(lines[-1])[:300] if lines else f"exit status {status}"


def _without_user(text: str) -> str:
    """Take user names and passwords out of the addresses in a text."""
    return re.sub(r"//[^/@\s]*@", "//", text)


# --- from the published files to tables ---------------------------------------------------------


def _tables(files: Mapping[str, bytes], commit: _Commit) -> dict[str, pa.Table]:
    """Return the four tables, by file name."""
    try:
        parts = _mmlu(files, commit)
        mmlu = _marked(pa.concat_tables(parts), "prompt", _seen(files, _MMLU_SEEN, commit))
        gsm8k = _marked(
            _responses(files, _GSM8K, commit), "prompt", _seen(files, _GSM8K_SEEN, commit)
        )
        questions = _marked(
            _questions(files, commit), "turns", _seen(files, _MT_BENCH_SEEN, commit)
        )
        judgements = _judgements(files, questions["question_id"].to_pylist(), commit)
    except UnicodeError as error:  # a lone half of a surrogate pair, which Parquet cannot hold
        raise BenchmarkError(
            f"a text in {commit} is not Unicode ({error}): fetch another commit, or {_INSTEAD}"
        ) from error
    if commit.id == PUBLISHED_COMMIT:
        sizes = (len(parts), len(mmlu), len(gsm8k), len(questions))
        for (what, least), size in zip(_PINNED_AT_LEAST.items(), sizes, strict=True):
            if size < least:
                raise BenchmarkError(
                    f"read {size} {what} from {commit}, which holds {least} or more: report this "
                    f"as a bug, and {_INSTEAD}"
                )
    return {
        "gsm8k.parquet": gsm8k,
        "mmlu.parquet": mmlu,
        "mt_bench_judgements.parquet": judgements,
        "mt_bench_questions.parquet": questions,
    }


def _mmlu(files: Mapping[str, bytes], commit: _Commit) -> list[pa.Table]:
    """Return one table for each domain, all with the same columns."""
    parts: list[pa.Table] = []
    for path in sorted(files):
        match = _MMLU.fullmatch(path)
        if match is None:
            continue
        part = _responses(files, path, commit)
        domain = pa.array([match[1]] * len(part), pa.string())
        part = part.add_column(1, "domain", domain)
        if parts and part.column_names != parts[0].column_names:
            raise _unlike(
                path, commit, "has other models than the domains before it", part.column_names
            )
        parts.append(part)
    return parts


def _responses(files: Mapping[str, bytes], path: str, commit: _Commit) -> pa.Table:
    """Return a CSV's prompts with True/False for each model, in the order of canonical names."""
    raw = files[path]
    try:
        table = csv.read_csv(
            pa.BufferReader(raw),
            # one block, for no value may be longer than a block
            read_options=csv.ReadOptions(use_threads=False, block_size=len(raw) + 1),
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types={"prompt": pa.string()}),
        )
    except pa.ArrowException as error:
        first = str(error).splitlines()[0][:200]
        raise BenchmarkError(
            f"{path} in {commit} is not a CSV table ({first}): fetch another commit, or {_INSTEAD}"
        ) from error
    if "prompt" not in table.column_names:
        raise _unlike(path, commit, "has no column `prompt`", table.column_names)
    models: dict[str, pa.ChunkedArray] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if name == "prompt" or name.endswith("_response"):
            continue
        if pa.types.is_boolean(column.type) and column.null_count == 0:
            models[_model(name)] = column
    if len(models) < 2:
        raise _unlike(
            path, commit, "lacks a column of True and False for each of two models",
            table.column_names,
        )  # fmt: skip
    return pa.table({"prompt": table["prompt"]} | {name: models[name] for name in sorted(models)})


def _questions(files: Mapping[str, bytes], commit: _Commit) -> pa.Table:
    rows = _json_lines(files, _QUESTIONS, ("question_id", "category", "turns"), commit)
    schema = pa.schema(
        [
            ("question_id", pa.int64()),
            ("category", pa.string()),
            ("turns", pa.list_(pa.string())),
        ]
    )
    table = _typed(rows, schema, _QUESTIONS, commit)
    times = Counter(table["question_id"].to_pylist())
    for row in table.to_pylist():
        one, turns = row["question_id"], row["turns"]
        if times[one] != 1 or len(turns) != 2 or None in turns:
            what = f"needs one row with two turns for question {one}"
            raise _unlike(_QUESTIONS, commit, what, [f"{times[one]} with {len(turns)}"])
    return table


def _judgements(files: Mapping[str, bytes], questions: list[int], commit: _Commit) -> pa.Table:
    rows = _json_lines(files, _JUDGEMENTS, ("question_id", "model", "turn", "score"), commit)
    schema = pa.schema(
        [
            ("question_id", pa.int64()),
            ("model", pa.string()),
            ("turn", pa.int64()),
            ("score", pa.float64()),
        ]
    )
    table = _typed(rows, schema, _JUDGEMENTS, commit)
    named = pa.array([_model(name) for name in table["model"].to_pylist()], pa.string())
    table = table.set_column(1, "model", named)
    bad = [score for score in table["score"].to_pylist() if not 1 <= score <= 10]
    if bad:
        raise _unlike(_JUDGEMENTS, commit, "has a score outside 1 to 10", [str(bad[0])])
    models = sorted(set(named.to_pylist()))
    if len(models) < 2:
        raise _unlike(_JUDGEMENTS, commit, "judges fewer than two models", models)
    columns = (table[name].to_pylist() for name in ("model", "question_id", "turn"))
    times = Counter(zip(*columns, strict=True))
    expected = set(product(models, questions, (1, 2)))
    for model, question, turn in sorted(expected | set(times)):
        key = (model, question, turn)
        if times[key] != 1 or key not in expected:
            raise _unlike(
                _JUDGEMENTS, commit,
                f"needs one judgement of every model on both turns of every question of "
                f"{Path(_QUESTIONS).name}",
                [f"{times[key]} of {model} on turn {turn} of question {question}"],
            )  # fmt: skip
    return table


def _typed(rows: list[dict[str, Any]], schema: pa.Schema, path: str, commit: _Commit) -> pa.Table:
    """Return rows as a table without nulls."""
    columns = {}
    for field in schema:
        values = [row[field.name] for row in rows]
        try:
            column = pa.array(values, field.type)
        except (pa.ArrowException, TypeError, OverflowError) as error:
            first = str(error).splitlines()[0][:200]
            raise _unlike(path, commit, f"has a `{field.name}` of another type", [first]) from error
        if column.null_count:
            raise _unlike(path, commit, f"has a row without `{field.name}`", ["null"])
        columns[field.name] = column
    if not rows:
        raise _unlike(path, commit, "has no rows", ["nothing"])
    return pa.table(columns, schema=schema)


def _seen(files: Mapping[str, bytes], path: str, commit: _Commit) -> frozenset[str]:
    """Return the prompts that the publisher found in its training data."""
    rows = _json_lines(files, path, ("eval_prompt",), commit)
    return frozenset(str(row["eval_prompt"]) for row in rows)


def _marked(table: pa.Table, column: str, seen: frozenset[str]) -> pa.Table:
    """Add the column ``contaminated``: the text, or one of several, is among those seen."""
    marks = [
        value in seen if isinstance(value, str) else any(text in seen for text in value)
        for value in table[column].to_pylist()
    ]
    return table.append_column("contaminated", pa.array(marks, pa.bool_()))


def _json_lines(
    files: Mapping[str, bytes], path: str, keys: tuple[str, ...], commit: _Commit
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(files[path].split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _unlike(
                path, commit, f"has a line {number} that is not JSON", [str(error)]
            ) from (error)
        lacking = [key for key in keys if not isinstance(row, dict) or key not in row]
        if lacking:
            found = list(row) if isinstance(row, dict) else [type(row).__name__]
            raise _unlike(path, commit, f"lacks `{lacking[0]}` in line {number}", found)
        rows.append(row)
    return rows


def _model(name: str) -> str:
    """Return the canonical name of a model, less the organisation before it."""
    return canonical_model(name.rsplit("/", 1)[-1])


def _unlike(path: str, commit: _Commit, what: str, found: list[str]) -> BenchmarkError:
    return BenchmarkError(
        f"{path} in {commit} {what}: found {', '.join(found)}; fetch another commit, or {_INSTEAD}"
    )
