"""What a key may use: in one process, in several, and across restarts."""

import sqlite3
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from routellm.errors import GatewayError, UsageError
from routellm.gateway.key_file import add_key
from routellm.gateway.keys import Caller
from routellm.gateway.limits import Limits

NOON = datetime(2026, 3, 30, 12, tzinfo=UTC).timestamp()


class Clock:
    now = NOON

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def opened(tmp_path, clock):
    """Open the file once more; everything is closed at the end."""
    made = []

    def again():
        limits = Limits(tmp_path / "spend.db", clock)
        limits.open()
        made.append(limits)
        return limits

    yield again
    for one in made:
        one.close()


@pytest.fixture
def caller(tmp_path):
    def make(**limits):
        return Caller(add_key(tmp_path / "keys.json", "alice", **limits)[0])

    return make


def refused(limits, caller):
    with pytest.raises(GatewayError) as caught:
        limits.enter(caller)
    assert caught.value.status == 429
    return caught.value


def test_a_caller_without_a_key_has_no_limits_and_is_not_charged(opened):
    limits = opened()
    for _ in range(100):
        limits.enter(Caller())
        limits.leave(Caller(), 5.0)
    assert limits.spent("").month_requests == 0


def test_requests_in_a_minute_are_bounded_and_come_back_evenly(opened, caller, clock):
    limits, alice = opened(), caller(requests_per_minute=6)
    for _ in range(6):
        limits.enter(alice)
    error = refused(limits, alice)
    assert error.code == "rate_limit_exceeded"
    assert error.retry_after_s == pytest.approx(10.0)
    clock.now += error.retry_after_s - 0.5
    assert refused(limits, alice).retry_after_s == pytest.approx(0.5)
    clock.now += 0.5
    limits.enter(alice)
    refused(limits, alice)
    clock.now += 3600
    for _ in range(6):
        limits.enter(alice)
    refused(limits, alice)


def test_over_an_hour_no_more_get_in_than_the_limit_says(opened, caller, clock):
    limits, alice = opened(), caller(requests_per_minute=30)
    let_in = 0
    for _ in range(3600):
        clock.now += 1.0
        try:
            limits.enter(alice)
        except GatewayError:
            continue
        let_in += 1
        limits.leave(alice, 0.0)
    assert 30 * 60 <= let_in <= 30 * 61


def test_a_clock_that_is_set_back_keeps_nobody_out(opened, caller, clock):
    limits, alice = opened(), caller(requests_per_minute=2)
    for _ in range(2):
        limits.enter(alice)
    refused(limits, alice)
    clock.now -= 86_400
    limits.enter(alice)
    limits.enter(alice)
    assert refused(limits, alice).retry_after_s == pytest.approx(30.0)


def test_requests_at_once_are_bounded_until_one_is_answered(opened, caller):
    limits, alice, bob = opened(), caller(concurrent=2), caller(concurrent=2)
    limits.enter(alice)
    limits.enter(alice)
    assert refused(limits, alice).code == "rate_limit_exceeded"
    limits.enter(bob)
    limits.leave(alice, 0.0)
    limits.enter(alice)
    refused(limits, alice)


def test_a_request_that_is_refused_takes_no_token(opened, caller):
    limits, alice = opened(), caller(concurrent=1, requests_per_minute=2)
    other = opened()
    other.enter(alice)
    for _ in range(5):
        refused(limits, alice)
    other.leave(alice, 0.0)
    limits.enter(alice)


def test_limits_hold_over_all_processes_together(opened, caller):
    first, second = opened(), opened()
    alice, bob = caller(requests_per_minute=4), caller(concurrent=2)
    for limits in (first, second, first, second):
        limits.enter(alice)
    refused(first, alice)
    refused(second, alice)
    first.enter(bob)
    second.enter(bob)
    refused(first, bob)
    second.leave(bob, 0.0)
    first.enter(bob)


def test_the_places_of_a_process_that_was_killed_are_given_back(opened, caller, tmp_path):
    alice = caller(concurrent=2)
    code = (
        "import os, signal, sys, pathlib\n"
        "from routellm.gateway.key_file import read_keys\n"
        "from routellm.gateway.keys import Caller\n"
        "from routellm.gateway.limits import Limits\n"
        "home = pathlib.Path(sys.argv[1])\n"
        "limits = Limits(home / 'spend.db'); limits.open()\n"
        "(key,) = read_keys(home / 'keys.json').values()\n"
        "limits.enter(Caller(key)); limits.enter(Caller(key)); limits.leave(Caller(key), 0.25)\n"
        "limits.enter(Caller(key)); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert done.returncode == -9
    limits = Limits(tmp_path / "spend.db")
    limits.open()
    limits.enter(alice)
    limits.enter(alice)
    refused(limits, alice)
    assert limits.spent(alice.id).month_usd == 0.25  # what was charged outlives the kill
    limits.close()


def test_a_days_budget_is_there_again_the_next_day(opened, caller, clock):
    limits, alice = opened(), caller(usd_per_day=1.0)
    limits.enter(alice)
    limits.leave(alice, 0.6)
    limits.enter(alice)
    limits.leave(alice, 0.6)
    error = refused(limits, alice)
    assert error.code == "insufficient_quota"
    assert "$1.20 of its $1.00" in str(error)
    assert error.retry_after_s == 12 * 3600
    clock.now += error.retry_after_s
    limits.enter(alice)


def test_a_months_budget_is_there_again_the_next_month(opened, caller, clock):
    limits, alice = opened(), caller(usd_per_month=1.0)
    limits.enter(alice)
    limits.leave(alice, 2.0)
    clock.now += 86_400  # the 31st
    assert refused(limits, alice).retry_after_s == 12 * 3600
    clock.now += 12 * 3600
    limits.enter(alice)
    assert limits.spent(alice.id).month_usd == 0.0


def test_what_was_spent_outlives_a_restart_and_is_seen_by_other_processes(opened, caller):
    first, alice = opened(), caller(usd_per_day=1.0)
    second = opened()
    first.enter(alice)
    first.leave(alice, 1.5)
    assert refused(second, alice).code == "insufficient_quota"
    spent = opened().spent(alice.id)
    assert (spent.today_usd, spent.month_usd, spent.month_requests) == (1.5, 1.5, 1)


def test_a_file_that_is_locked_costs_no_request_and_no_dollar(opened, caller, tmp_path):
    limits, alice = opened(), caller(usd_per_day=1.0, requests_per_minute=5)
    holder = sqlite3.connect(tmp_path / "spend.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    for _ in range(3):
        limits.enter(alice)
        limits.leave(alice, 0.5)
    assert limits.failures == 1  # then it is left alone for a moment
    assert limits.spent(alice.id).month_usd == 1.5
    holder.execute("ROLLBACK")
    holder.close()
    limits.close()
    again = opened()
    spent = again.spent(alice.id)
    assert (spent.month_usd, spent.month_requests) == (1.5, 3)
    refused(again, alice)
    limits.open()  # for the fixture to close


def test_a_budget_whose_answers_have_no_price_is_told_once(opened, caller, caplog):
    limits, alice = opened(), caller(usd_per_day=1.0)
    for _ in range(3):
        limits.enter(alice)
        limits.leave(alice, None)
    assert [r.message for r in caplog.records if "prices.MODEL" in r.message] == [
        f"key {alice.id} has a budget and its answers no price: set [prices.MODEL]"
    ]


def test_a_file_that_cannot_be_opened_is_told_in_a_sentence(tmp_path):
    (tmp_path / "spend.db").write_text("this is not a database, and long enough to be read as one")
    with pytest.raises(UsageError, match=r"spend\.db"):
        Limits(tmp_path / "spend.db").open()
