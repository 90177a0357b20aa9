"""An upstream that keeps failing is left alone, then tried by one request at a time."""

from routellm.gateway.breaker import Breaker


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def broken(clock, failures=3):
    breaker = Breaker(failures, open_s=10.0, clock=clock)
    for _ in range(failures):
        assert breaker.wait_s() == 0.0
        breaker.failed()
    return breaker


def test_it_opens_after_failures_in_a_row_only():
    clock = Clock()
    breaker = Breaker(3, 10.0, clock)
    for outcome in "ffsffsff":
        assert breaker.wait_s() == 0.0
        breaker.failed() if outcome == "f" else breaker.succeeded()
    assert not breaker.is_open
    breaker.failed()
    assert breaker.is_open
    assert breaker.wait_s() == 10.0


def test_after_its_time_one_request_tries_and_the_others_wait_on():
    clock = Clock()
    breaker = broken(clock)
    clock.now = 9.9
    assert 0 < breaker.wait_s() < 0.2
    clock.now = 10.1
    assert [breaker.wait_s() == 0.0 for _ in range(5)] == [True, False, False, False, False]


def test_a_try_that_works_closes_it_and_one_that_fails_opens_it_anew():
    clock = Clock()
    breaker = broken(clock)
    clock.now = 11.0
    assert breaker.wait_s() == 0.0
    breaker.failed()
    assert breaker.wait_s() == 10.0
    clock.now = 22.0
    assert breaker.wait_s() == 0.0
    breaker.succeeded()
    assert not breaker.is_open
    assert [breaker.wait_s() for _ in range(3)] == [0.0, 0.0, 0.0]


def test_a_try_that_never_ends_does_not_keep_it_open_for_good():
    clock = Clock()
    breaker = broken(clock)
    clock.now = 11.0
    assert breaker.wait_s() == 0.0
    clock.now = 22.0
    assert breaker.wait_s() == 0.0
