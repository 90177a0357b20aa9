"""What threads of one process do at once, and get what they get one after the other."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from routellm.embeddings.sentence import SentenceTransformerEncoder
from routellm.settings import EmbeddingSettings
from routellm.training import train
from tests.support.tiny_bert import hard_battles, save_tiny_bert


def test_one_thread_at_a_time_is_in_the_encoders_tokenizer():
    inside, met = [], []

    class Model:
        def encode(self, prompts, **_):
            inside.append(1)
            time.sleep(0.01)
            met.append(len(inside))
            inside.pop()
            return np.ones((len(prompts), 384), np.float32)

    encoder = SentenceTransformerEncoder(EmbeddingSettings())
    encoder._model = Model()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(encoder.encode, [["a", "b"], ["c"], ["d", "e"], ["f"]]))
    assert met == [1] * 4


@pytest.mark.slow
def test_fine_tuned_routers_trained_in_threads_have_the_weights_of_those_trained_alone(tmp_path):
    options = {"model": str(save_tiny_bert(tmp_path / "tiny")), "max_steps": 6}
    battles, start = hard_battles(), threading.Barrier(2)

    def weights(seed, wait=lambda: None):
        wait()
        router, _ = train("bert", battles, None, seed=seed, options=options)
        return router.state()[0]

    alone = [weights(seed) for seed in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda seed: weights(seed, start.wait), (0, 1)))
    for mine, theirs in zip(together, alone, strict=True):
        assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    assert any(not np.array_equal(together[0][n], together[1][n]) for n in together[0])
