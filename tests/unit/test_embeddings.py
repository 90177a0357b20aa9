import json
import multiprocessing
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest

from routellm.embeddings import get_encoder
from routellm.embeddings.cache import CachedEncoder
from routellm.embeddings.openai import OpenAIEncoder
from routellm.embeddings.sentence import SentenceTransformerEncoder
from routellm.errors import EmbeddingError, UsageError
from routellm.settings import EmbeddingSettings
from tests.conftest import HashEncoder


class Counting(HashEncoder):
    def __init__(self):
        self.encoded = []

    def encode(self, prompts, *, progress=None):
        self.encoded += prompts
        return super().encode(prompts)


def test_a_prompt_is_encoded_once(tmp_path):
    inner = Counting()
    first = CachedEncoder(inner, tmp_path / "e.db").encode(["a b", "c d", "a b"])
    again = CachedEncoder(inner, tmp_path / "e.db").encode(["c d", "a b", "new one"])
    assert inner.encoded == ["a b", "c d", "new one"]
    assert np.array_equal(first[0], first[2])
    assert np.array_equal(first[0], again[1])


def test_encoders_do_not_share_vectors(tmp_path):
    one, two = Counting(), Counting()
    two.identity = "test/other@1"
    CachedEncoder(one, tmp_path / "e.db").encode(["a"])
    CachedEncoder(two, tmp_path / "e.db").encode(["a"])
    assert two.encoded == ["a"]


def fill(path, start):
    CachedEncoder(HashEncoder(), path).encode([f"prompt {i}" for i in range(start, start + 3000)])


@pytest.mark.slow
def test_two_processes_fill_one_cache(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=fill, args=(tmp_path / "e.db", s)) for s in (0, 1500)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    inner = Counting()
    CachedEncoder(inner, tmp_path / "e.db").encode([f"prompt {i}" for i in range(4500)])
    assert inner.encoded == []


def test_a_damaged_cache_says_which_file_to_delete(tmp_path):
    (tmp_path / "e.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(EmbeddingError, match=r"e\.db.*delete that file"):
        CachedEncoder(HashEncoder(), tmp_path / "e.db").encode(["a"])


@pytest.mark.slow
def test_the_default_encoder_needs_no_network_and_tells_meanings_apart():
    encoder = get_encoder(EmbeddingSettings())
    assert encoder.identity == "sentence-transformers/all-MiniLM-L6-v2@53aa51172d14"
    v = encoder.encode(["Prove a theorem", "Give a proof of the theorem", "Bake a cake", "\ud800"])
    assert v.shape == (4, 384)
    assert np.linalg.norm(v, axis=1) == pytest.approx(1.0, abs=1e-5)
    assert v[0] @ v[1] > v[0] @ v[2] + 0.3


@pytest.mark.slow
def test_a_vector_does_not_depend_on_what_else_is_in_the_batch():
    prompts = [
        "",
        " ",
        "one",
        "word " * 40,
        "long " * 3000,
        "日本語のテキスト",
        "Привет",
        "\udfff?",
    ]
    encoder = get_encoder(EmbeddingSettings(device="cpu"))
    alone = np.concatenate([encoder.encode([p]) for p in prompts])
    assert np.isfinite(alone).all()
    assert np.abs(encoder.encode(prompts) - alone).max() < 1e-5


@pytest.mark.slow
def test_a_model_that_cannot_be_had_is_one_sentence(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    encoder = SentenceTransformerEncoder(EmbeddingSettings(model=str(tmp_path)))
    with pytest.raises(EmbeddingError, match="cannot load the encoder"):
        encoder.encode(["a"])


class Endpoint(BaseHTTPRequestHandler):
    script: ClassVar[list[int]] = []
    size = 8

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = self.script.pop(0) if self.script else 200
        data = [
            {"index": i, "embedding": [float(len(t))] * self.size}
            for i, t in enumerate(body["input"])
        ]
        raw = json.dumps({"data": data[::-1]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


@pytest.fixture
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    Endpoint.script, Endpoint.size = [], 8


def remote(url, **changes):
    settings = EmbeddingSettings(
        provider="openai", base_url=url, model="m", batch_size=2, **changes
    )
    return OpenAIEncoder(settings, backoff_s=0.01)


def test_an_endpoint_is_asked_in_batches_and_retried(endpoint):
    Endpoint.script = [429, 500]
    vectors = remote(endpoint).encode(["a", "bb", "ccc"])
    assert vectors.shape == (3, 8)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0)


def test_an_endpoint_that_refuses_is_one_sentence(endpoint):
    Endpoint.script = [401]
    with pytest.raises(EmbeddingError, match="status 401"):
        remote(endpoint).encode(["a"])


def test_vectors_of_the_wrong_length_are_refused(endpoint):
    with pytest.raises(EmbeddingError, match=r"embedding\.dimensions"):
        remote(endpoint, dimensions=16).encode(["a"])


def test_an_endpoint_needs_an_address():
    with pytest.raises(UsageError, match="base_url"):
        get_encoder(EmbeddingSettings(provider="openai"))
