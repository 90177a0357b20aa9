"""GenFuser: what it is asked, what it costs, and that no answer is paid for twice."""

import hashlib
import logging

import numpy as np
import pytest

from routellm.errors import JudgeError, UsageError
from routellm.policies.fuse import FUSE_SYSTEM, FUSE_VERSION, Fusion, GenFuser
from routellm.settings import JudgeSettings
from tests.support.chat_server import Answer, chat_server

pytestmark = pytest.mark.slow  # it starts servers

KEY = "sk-very-secret-0123456789"
PROMPTS = [f"question {i}" for i in range(6)]
RANKED = [[f"best of {i}", f"second of {i}", f"third of {i}", f"last of {i}"] for i in range(6)]


@pytest.fixture
def server():
    with chat_server(KEY) as one:
        one.rule = fused
        yield one


def fused(asked):
    return Answer(f" {asked.part('CANDIDATE 1')} and {asked.part('CANDIDATE 2')}\n")


def fuser(server, tmp_path, *, top=3, **changes):
    how = {"base_url": server.url, "model": "fuser-1", "api_key": KEY, "max_output_tokens": 64}
    settings = JudgeSettings(**(how | changes))
    return GenFuser(settings, tmp_path / "fused.db", top=top, backoff_s=0.005)


def test_the_first_three_candidates_are_fused_in_their_order_and_usage_is_told(server, tmp_path):
    found = fuser(server, tmp_path).fuse(PROMPTS, RANKED)
    assert found.answers == tuple(f"best of {i} and second of {i}" for i in range(6))
    assert found.fused.all()
    assert found.reasons == (None,) * 6
    asked = next(a for a in server.asked if a.prompt == "question 0")
    names = [f"CANDIDATE {i}" for i in range(1, 5)]
    assert [asked.part(one) for one in names] == ["best of 0", "second of 0", "third of 0", ""]
    assert asked.body["temperature"] == 0
    assert found.input_tokens.sum() == server.input_tokens
    assert found.output_tokens.sum() == server.output_tokens
    billed = (server.input_tokens * 10 + server.output_tokens * 30) / 1e6
    assert found.usd.sum() == pytest.approx(billed)
    assert (found.calls, found.cached) == (6, 0)


def test_fewer_candidates_than_top_are_fused_all(server, tmp_path):
    fuser(server, tmp_path, top=2).fuse(["q", "r"], [["only"], ["a", "b", "c"]])
    shown = {a.prompt: [a.part(f"CANDIDATE {i}") for i in (1, 2, 3)] for a in server.asked}
    assert shown == {"q": ["only", "", ""], "r": ["a", "b", ""]}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Answer("best of", finish="length"), "cut off"),
        (Answer("", refusal="I cannot."), "a refusal"),
        (Answer(" \n"), "an empty reply"),
        (Answer(status=400, code="too_long"), "status 400 (too_long)"),
    ],
)
def test_where_nothing_is_fused_the_best_candidate_stands_and_it_is_said(
    server, tmp_path, reply, reason
):
    server.rule = lambda asked: reply if asked.prompt == "question 2" else fused(asked)
    found = fuser(server, tmp_path).fuse(PROMPTS, RANKED)
    assert found.answers[2] == "best of 2"
    assert found.reasons[2] == reason
    assert found.fused.tolist() == [True, True, False, True, True, True]
    assert len(server.asked) == 6  # at temperature 0 it would say the same again


def test_what_may_pass_is_tried_again(server, tmp_path):
    server.script = [Answer(status=429, headers={"Retry-After": "0"}), Answer(raw=b"{")]
    found = fuser(server, tmp_path, concurrency=1).fuse(PROMPTS, RANKED)
    assert found.fused.all()
    assert (found.calls, len(server.asked)) == (8, 8)


def test_a_second_run_asks_nothing_and_another_order_is_another_question(server, tmp_path):
    first = fuser(server, tmp_path).fuse(PROMPTS, RANKED)
    again = fuser(server, tmp_path, base_url=None).fuse(PROMPTS, RANKED)
    assert (again.calls, again.cached, again.cost_usd) == (0, 6, 0.0)
    assert again.answers == first.answers
    assert again.usd.tolist() == first.usd.tolist()  # what they took, whenever it was spent
    fuser(server, tmp_path).fuse(PROMPTS, [some[::-1] for some in RANKED])
    assert len(server.asked) == 12


def test_the_budget_stops_it_with_one_sentence_and_running_again_goes_on(server, tmp_path):
    with pytest.raises(
        JudgeError, match=r"^the budget of .*`fuser\.budget_usd` \(\d of 6 answers remain to be"
    ):
        fuser(server, tmp_path, budget_usd=0.025, concurrency=2).fuse(PROMPTS, RANKED)
    done = len(server.asked)
    assert 0 < done < 6
    found = fuser(server, tmp_path).fuse(PROMPTS, RANKED)
    assert (found.cached, found.calls, len(server.asked)) == (done, 6 - done, 6)


def test_usage_that_is_not_reported_is_not_made_up(server, tmp_path):
    server.rule = lambda asked: Answer("an answer", usage=False)
    found = fuser(server, tmp_path).fuse(PROMPTS[:1], RANKED[:1])
    assert np.isnan([found.input_tokens[0], found.output_tokens[0]]).all()
    assert found.usd[0] > 64 * 30 / 1e6  # the most it could be


def test_neither_texts_nor_the_key_are_in_errors_or_logs(server, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    server.rule = lambda asked: Answer(status=403, text=f"{KEY} {asked.prompt}")
    with pytest.raises(JudgeError) as refused:
        fuser(server, tmp_path).fuse(PROMPTS, RANKED)
    said = str(refused.value)
    assert "check `fuser.base_url`" in said
    for secret in (KEY, "question 1", "best of"):
        assert secret not in said + caplog.text


def test_what_cannot_be_fused_is_refused(server, tmp_path):
    one = fuser(server, tmp_path)
    with pytest.raises(UsageError, match="prompt 1 has no candidates to fuse"):
        one.fuse(["p", "q"], [["a"], []])
    with pytest.raises(UsageError, match="2 prompts have 1 lists of candidates"):
        one.fuse(["p", "q"], [["a"]])
    with pytest.raises(UsageError, match="top 1 candidate or more, not 0"):
        fuser(server, tmp_path, top=0)
    with pytest.raises(UsageError, match=r"set `fuser\.base_url`"):
        fuser(server, tmp_path, base_url=None).fuse(["p"], [["a"]])
    nothing = fuser(server, tmp_path, base_url=None).fuse([], [])
    assert (nothing.answers, nothing.calls) == ((), 0)


def test_the_template_does_not_change_without_its_version():
    texts = FUSE_SYSTEM + Fusion("p", ("a", "b")).text()
    digest = hashlib.sha256(texts.encode()).hexdigest()[:16]
    # a change of the texts: raise FUSE_VERSION, then write the new pair here
    assert (FUSE_VERSION, digest) == ("fuse/1", "25f1d0cddad56848")
