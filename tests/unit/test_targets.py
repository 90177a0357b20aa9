"""What a request asks for, who is heard, and the threshold that this means."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routellm.bundle import Bundle, QualityCurve
from routellm.calibration import Calibration
from routellm.errors import GatewayError, UsageError
from routellm.evaluation.metrics import exact_curve
from routellm.gateway.money import Money
from routellm.gateway.targets import FIELDS, QueryPrices, Target, target_of
from routellm.routers.base import Pair
from routellm.routers.random import RandomRouter
from routellm.settings import EmbeddingSettings, Price

DEFAULT = Target(strong_fraction=0.5)
PRICES = QueryPrices("big", "small", 0.01, 0.001)
# 61 % of the gap at 30 % of the calls, and a dent at the start
CURVE = QualityCurve("test", 400, tuple(float(v) for v in np.linspace(0, 1, 101) ** 0.41))


@pytest.fixture
def version(encoder):
    router = RandomRouter(encoder, Pair("s", "w"))
    calibration = Calibration.of(np.linspace(0.0, 1.0, 2001), "test")
    return Bundle(router, EmbeddingSettings(), calibration, (), "d", False, "0.1.0", CURVE)


def asked(model="router", routing=None, headers=None, key=None, default=DEFAULT):
    fields = {"model": model} if routing is None else {"model": model, "routing": routing}
    return target_of(fields, headers or {}, key, default)


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_is_read_from_the_body_and_from_its_header(field):
    in_body = asked(routing={field: 0.25})
    in_header = asked(headers={f"x-routellm-{field.replace('_', '-')}": "0.25"})
    assert getattr(in_body, field) == getattr(in_header, field) == 0.25
    assert (in_body.asked_by, in_header.asked_by) == ("body", "header")
    assert in_body.by_request
    assert in_header.by_request


def test_the_strongest_that_says_anything_is_heard():
    key = Target(quality=0.8, asked_by="key")
    places = [
        {"default": Target(threshold=0.1)},
        {"key": key},
        {"headers": {"x-routellm-strong-fraction": "0.3"}},
        {"routing": {"max_usd": 0.01}},
        {"model": "router-mf-0.116"},
    ]
    said = {}
    for place in places:
        said |= place
        found = asked(**said)
    assert found == Target(threshold=0.116, kind="mf", asked_by="model name")
    heard = []
    while places:
        one = asked(**{k: v for place in places for k, v in place.items()})
        heard.append(one.asked_by)
        places.pop()
    assert heard == ["model name", "body", "header", "key", "settings"]


@pytest.mark.parametrize("nothing", [None, {}, {"threshold": None}])
def test_routing_that_says_nothing_leaves_it_to_the_next(nothing):
    assert asked(routing=nothing) == DEFAULT


@pytest.mark.parametrize("name", ["router", "router-mf", "router-mf-0.1-x", "Router-mf-0.1", "gpt"])
def test_other_model_names_ask_for_nothing(name):
    assert asked(model=name) == DEFAULT


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        ({"routing": {"threshold": 0.1, "quality": 0.5}}, "ask for one of"),
        ({"headers": {"x-routellm-threshold": "0", "x-routellm-max-usd": "1"}}, "ask for one of"),
        ({"routing": {"cost": 1}}, r"not \['cost'\]"),
        ({"routing": 3}, "must be an object"),
        ({"routing": {"threshold": "x"}}, "threshold 'x' is not a number"),
        ({"routing": {"strong_fraction": 1.5}}, "strong fraction 1.5 is not a number"),
        ({"routing": {"threshold": True}}, "not a number"),
        ({"routing": {"quality": [[[]]]}}, "quality list is not a number"),
        ({"routing": {"max_usd": -1}}, "max usd int is not a number dollars"),
        ({"routing": {"max_usd": float("inf")}}, "not a number"),
        ({"routing": {"threshold": float("nan")}}, "not a number"),
        ({"routing": {"threshold": 10**400}}, "not a number"),
        ({"headers": {"x-routellm-quality": "high"}}, "quality 'high' is not a number"),
        ({"model": "router-random-1.5"}, "threshold '1.5' is not a number"),
        ({"model": "router-random-1e"}, "not a number"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(ask, says):
    with pytest.raises(GatewayError, match=says) as caught:
        asked(**ask)
    assert caught.value.status == 400


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(FIELDS) | st.text()


@given(
    st.dictionaries(st.sampled_from(["model", "routing"]), json_values)
    | st.fixed_dictionaries({"routing": st.dictionaries(names, json_values, max_size=3)}),
    st.dictionaries(st.sampled_from([f"x-routellm-{f}" for f in FIELDS]), st.text(), max_size=2),
)
def test_whatever_is_sent_is_a_target_or_a_refusal(fields, headers):
    try:
        found = target_of(fields, headers, None, DEFAULT)
    except GatewayError as error:
        found = error
    if isinstance(found, GatewayError):
        assert found.status == 400
        assert len(str(found)) < 400
    else:
        (value,) = [v for name in FIELDS if (v := getattr(found, name)) is not None]
        assert value >= 0


def test_the_settings_have_one_target():
    made = Target.of_settings
    assert made(threshold=None, strong_fraction=0.4) == Target(strong_fraction=0.4)
    assert made(threshold=0.2, strong_fraction=0.5) == Target(threshold=0.2)
    assert made(threshold=None, strong_fraction=0.5, quality=0.8) == Target(quality=0.8)
    with pytest.raises(UsageError, match=r"gateway\.threshold, gateway\.max_usd are set"):
        made(threshold=0.2, strong_fraction=0.5, max_usd=0.1)


def test_a_quality_is_the_smallest_fraction_that_reaches_it_on_the_versions_curve(version):
    for quality in (0.0, 0.2, 0.5, 0.8, 1.0):
        fraction = Target(quality=quality).fraction_on(version, PRICES)
        assert np.interp(fraction, np.linspace(0, 1, 101), CURVE.pgr) == pytest.approx(quality)
        assert Target(quality=quality).threshold_on(version, PRICES) == pytest.approx(
            version.calibration.threshold(fraction)
        )


def test_a_quality_on_the_stored_curve_is_close_to_cpt_on_the_exact_one():
    rng = np.random.default_rng(0)
    rates = rng.random(3000)
    strong = (rng.random(3000) < 0.8).astype(float)
    weak = (rng.random(3000) < 0.8 - 0.6 * rates).astype(float)
    exact = exact_curve(rates, strong, weak, np.ones(3000))
    at = np.linspace(0.0, 1.0, 101)
    stored = QualityCurve("t", 3000, tuple(np.interp(at, exact.fraction, exact.pgr).tolist()))
    for quality in (0.2, 0.5, 0.8):
        assert stored.strong_fraction(quality) == pytest.approx(exact.cpt(quality), abs=0.01)


def test_a_quality_of_a_version_without_a_curve_is_refused_in_a_sentence(version):
    with pytest.raises(GatewayError, match="carries no curve") as caught:
        Target(quality=0.5).threshold_on(replace(version, curve=None), PRICES)
    assert caught.value.code == "target_cannot_be_met"


@given(st.floats(0.001, 0.02))
def test_a_most_dollars_is_kept_and_used_up(max_usd):
    fraction = Target(max_usd=max_usd).fraction_on(None, PRICES)
    costs = fraction * PRICES.strong_usd + (1 - fraction) * PRICES.weak_usd
    assert costs <= max_usd * (1 + 1e-9)
    assert fraction == 1.0 or costs == pytest.approx(max_usd)


@pytest.mark.parametrize(
    ("prices", "max_usd", "says"),
    [
        (PRICES, 0.0009, r"small alone costs \$0.001"),
        (replace(PRICES, strong_usd=None), 0.1, "no price is set for big"),
        (replace(PRICES, weak_usd=None), 0.1, "no price is set for small"),
    ],
)
def test_dollars_that_cannot_be_kept_to_are_refused_in_a_sentence(prices, max_usd, says):
    with pytest.raises(GatewayError, match=says):
        Target(max_usd=max_usd).fraction_on(None, prices)


def test_prices_are_of_a_query_with_as_many_tokens_as_the_settings_say():
    money = Money({"big": Price(input=10, output=30)}, 95.0, 264.0)
    found = QueryPrices.of(money, "big", "small")
    assert found.strong_usd == pytest.approx((95 * 10 + 264 * 30) / 1e6)
    assert found.weak_usd is None


def test_only_shares_of_the_traffic_are_paced():
    paced = [f for f in FIELDS if Target.of({f: 0.5}).paced]
    assert paced == ["strong_fraction", "max_usd"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_target_says_what_it_is(field):
    assert "0.25" in str(Target.of({field: 0.25}))
