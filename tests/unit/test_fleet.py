"""The simulated fleet obeys the laws that are known; the page on scale says what they come to."""

import numpy as np
import pytest

from benchmarks.fleet_simulation import HEAR_S, Costs, Fleet, Plan, Process, Request
from benchmarks.scale import FIGURES, request_ms, tables
from tests.conftest import REPOSITORY

SERVICE_S = 0.008


def responses(utilisation, threads, services, seed=0):
    """Serve Poisson arrivals with one process; returns the seconds that each spent there (n,)."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(services.mean() / utilisation, len(services)))
    process, took = Process(threads), []

    def leave():
        at, _, request = process.leave()
        took.append(at - request.sent)

    for at, service_s in zip(arrivals, services, strict=True):
        while process.next_s() <= at:
            leave()
        process.arrive(at, Request(0, at, service_s))
    while np.isfinite(process.next_s()):
        leave()
    assert process.busy_s == pytest.approx(services.sum())  # no work is lost or done twice
    return np.array(took)


@pytest.mark.parametrize("utilisation", [0.3, 0.6, 0.8])
def test_one_at_a_time_it_is_the_m_d_1_queue(utilisation):
    took = responses(utilisation, 1, np.full(100_000, SERVICE_S))
    wait_s = SERVICE_S * utilisation / (2 * (1 - utilisation))  # Pollaczek and Khinchine
    assert took.mean() - SERVICE_S == pytest.approx(wait_s, rel=0.05)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_shared_evenly_the_mean_depends_on_the_utilisation_alone(spread):
    services = np.random.default_rng(1).gamma(1 / max(spread, 1e-9), size=100_000)
    services = services / services.mean() if spread else np.ones(100_000)
    took = responses(0.6, 10**6, services)
    assert took.mean() == pytest.approx(1 / (1 - 0.6), rel=0.05)


def run(poll_s=10.0, service_s=SERVICE_S, load=(0, 0.0, 0.0), **plan):
    fleet = Fleet(Plan(poll_s, **plan), Costs(np.array([service_s]), *load))
    return fleet, fleet.run()


@pytest.mark.parametrize(("replicas", "processes"), [(100, 1), (1000, 4), (1000, 1)])
def test_a_lookup_is_asked_once_in_every_poll_and_answer(replicas, processes):
    fleet, found = run(2.0, replicas=replicas, processes=processes)
    assert found.per_s * (2.0 + found.response_s.mean()) == pytest.approx(replicas, rel=0.02)
    assert found.utilisation == pytest.approx(found.per_s * SERVICE_S / processes, rel=0.02)
    waiting = sum(len(p._active) + len(p._line) for p in fleet.processes)
    assert fleet.asked == fleet.answered + waiting


def test_more_replicas_than_a_process_can_answer_wait_for_each_other():
    _, found = run(2.0)
    assert found.utilisation == pytest.approx(1.0, abs=0.01)
    assert np.median(found.response_s) == pytest.approx(1000 * SERVICE_S - 2.0, rel=0.02)


def test_polling_serves_evenly_over_the_interval_and_a_nudge_at_once():
    _, polled = run(replicas=200)
    assert np.median(polled.serving_s) == pytest.approx(5.0, abs=1.0)
    assert 9.5 < polled.serving_s.max() < 10.1
    _, nudged = run(replicas=200, nudge_per_s=1000.0)
    at_least = 200 * SERVICE_S  # one process answers all of them
    assert at_least <= nudged.serving_s.max() <= at_least + 0.2 + HEAR_S
    _, spread = run(replicas=200, nudge_per_s=1000.0, jitter_s=4.0)
    assert spread.longest_s < nudged.longest_s / 5
    assert spread.serving_s.max() < 4.5


def test_a_nudge_that_meets_an_old_copy_is_lost_until_the_next_poll():
    _, found = run(30.0, nudge_per_s=1000.0, cache_s=1.0)
    assert found.per_s < 1.0  # 33 without the read-through
    assert found.serving_s.max() > 20.0
    _, alone = run(2.0, cache_s=1.0)
    assert alone.per_s < 1.01
    assert alone.serving_s.max() < 2.0 + 1.0 + 0.1


def test_what_a_version_costs_is_asked_of_mlflow_by_every_replica():
    _, found = run(replicas=200, load=(10, 0.1, 0.05), nudge_per_s=1000.0)
    all_s = 200 * (0.1 + SERVICE_S)
    assert all_s <= found.serving_s.max() <= 1.2 * all_s


def test_the_page_on_scale_has_the_tables_that_the_script_prints():
    page = (REPOSITORY / "docs" / "scale.md").read_text()
    for one in tables():
        assert one in page


def test_what_the_arithmetic_quotes_stands_on_the_page_that_it_names():
    quoted = [figure for figure in FIGURES if figure.page]
    assert len(quoted) > 10
    for figure in quoted:
        text = (REPOSITORY / "docs" / figure.page).read_text()
        assert figure.quoted in text, figure.what
        assert f"{figure.value:g}" in figure.quoted or figure is request_ms
