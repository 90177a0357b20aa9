"""What a server remembers of prompts: in memory, bounded, one encoder for all versions."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from routellm.embeddings.cache import CachedEncoder
from routellm.embeddings.memory import Encoders, RememberingEncoder
from tests.conftest import HashEncoder


class Counting(HashEncoder):
    def __init__(self):
        self.batches = []

    def encode(self, prompts, *, progress=None):
        self.batches.append(list(prompts))
        return super().encode(prompts)


def test_each_prompt_is_encoded_once_and_its_vector_is_the_encoders():
    inner = Counting()
    encoder = RememberingEncoder(inner)
    first = encoder.encode(["a", "b", "a"])
    again = encoder.encode(["b", "c"])
    assert inner.batches == [["a", "b"], ["c"]]
    assert np.array_equal(first, HashEncoder().encode(["a", "b", "a"]))
    assert np.array_equal(again, HashEncoder().encode(["b", "c"]))
    assert encoder.encode([]).shape == (0, HashEncoder.dimensions)


def test_the_oldest_are_forgotten():
    inner = Counting()
    encoder = RememberingEncoder(inner, size=3)
    for prompt in ["a", "b", "c", "a", "d", "a", "b"]:
        encoder.encode([prompt])
    assert inner.batches == [["a"], ["b"], ["c"], ["d"], ["b"]]


def test_versions_share_an_encoder_and_leave_the_disk_alone(tmp_path):
    path, encoders = tmp_path / "embeddings.db", Encoders()
    one = encoders.shared(CachedEncoder(HashEncoder(), path))
    two = encoders.shared(CachedEncoder(HashEncoder(), path))
    other = HashEncoder()
    other.identity = "test/other@1"
    assert one is two
    assert encoders.shared(other) is not one
    one.encode(["a"])
    assert not path.exists()


def test_one_thread_encodes_at_a_time():
    class Strict(HashEncoder):
        busy = False

        def encode(self, prompts, *, progress=None):
            assert not self.busy
            self.busy = True
            vectors = super().encode(prompts * 200)[: len(prompts)]
            self.busy = False
            return vectors

    encoder = RememberingEncoder(Strict())
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: encoder.encode([f"prompt {i}"]), range(200)))
    assert found[7][0] == pytest.approx(HashEncoder().encode(["prompt 7"])[0])
