"""Redaction: what must not be kept is not, and the rest of a prompt stays as it was."""

from __future__ import annotations

import random
import string
import subprocess
import sys
import time

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from routellm.errors import UsageError
from routellm.feedback.redact import CARD, EMAIL, PHONE, SECRET, Redactor, redact

pytest.importorskip("kingfisher_sdk")
phonenumbers = pytest.importorskip("phonenumbers")

BASE62 = string.ascii_letters + string.digits
LOWER = string.ascii_lowercase
HEX = "0123456789abcdef"


def drawn(seed: int, n: int, letters: str = BASE62) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(letters) for _ in range(n))


def card(seed: int, prefix: str, length: int) -> str:
    """Return a number with a right check digit."""
    body = prefix + drawn(seed, length - len(prefix) - 1, string.digits)
    total = 0
    for i, digit in enumerate(reversed(body)):
        doubled = int(digit) * (2 if i % 2 == 0 else 1)
        total += doubled - 9 if doubled > 9 else doubled
    return body + str(-total % 10)


def grouped(number: str, by: str) -> str:
    sizes = (4, 6, 5) if len(number) == 15 else (4, 4, 4, 4)
    at, out = 0, []
    for size in sizes:
        out.append(number[at : at + size])
        at += size
    return by.join(out)


seeds = st.integers(0, 2**32)
emails = st.builds(
    lambda seed, first, domain, end: f"{first}{drawn(seed, 6, LOWER)}@{domain}.{end}",
    seeds, st.sampled_from(["", "ada.", "x+tag-", "o'neil_", "ünï."]),
    st.sampled_from(["example", "mail.example", "my-host", "exämple"]),
    st.sampled_from(["com", "co.uk", "museum", "рф", "travel"]),
)  # fmt: skip
cards = st.builds(
    lambda seed, kind, by: grouped(card(seed, *kind), by),
    seeds,
    st.sampled_from([("4", 16), ("5412", 16), ("2221", 16), ("6011", 16), ("34", 15), ("37", 15)]),
    st.sampled_from(["", " ", "-"]),
)  # fmt: skip
phones = st.builds(
    lambda region, form: phonenumbers.format_number(phonenumbers.example_number(region), form),
    st.sampled_from(sorted(phonenumbers.SUPPORTED_REGIONS)),
    st.sampled_from([phonenumbers.PhoneNumberFormat.E164,
                     phonenumbers.PhoneNumberFormat.INTERNATIONAL]),
)  # fmt: skip
american = st.builds(
    lambda form, seed: form.format(drawn(seed, 1, "23456789"), drawn(seed + 1, 4, string.digits)),
    st.sampled_from(["(415) 5{}2-{}", "415-5{}2-{}", "415.5{}2.{}", "4155{}2{}", "+1 415 5{}2 {}"]),
    seeds,
)
keys = st.builds(
    lambda form, seed: form(seed),
    st.sampled_from([
        lambda s: "sk-proj-" + drawn(s, 74) + "T3BlbkFJ" + drawn(s + 1, 74),
        lambda s: "sk-ant-api03-" + drawn(s, 93) + "AA",
        lambda s: "ghp_" + drawn(s, 36),
        lambda s: "hf_" + drawn(s, 34, string.ascii_letters),
        lambda s: "AKIA" + drawn(s, 16, string.ascii_uppercase + "234567"),
        lambda s: "AIza" + drawn(s, 35),
        lambda s: "xoxb-" + drawn(s, 12, string.digits) + "-" + drawn(s, 12, string.digits) + "-"
        + drawn(s, 24),
        lambda s: "glpat-" + drawn(s, 20),
        lambda s: "rlk_" + drawn(s, 12, HEX) + "_" + drawn(s, 64, HEX),
    ]),
    seeds,
)  # fmt: skip
# what may stand beside it: words and marks, no digits, which would be another number
around = st.text(
    st.characters(exclude_categories=["Nd", "Cs", "Nl", "No"], exclude_characters="@"), max_size=60
)
joint = st.sampled_from([" ", "\n", ", ", " (", '"', ": ", "\t"])


def kept(text: str, secret: str) -> bool:
    return secret in redact(text)


@given(before=around, join=joint, email=emails, after=around)
def test_no_email_address_is_kept(before, join, email, after):
    text = f"{before}{join}{email} {after}"
    assert not kept(text, email)
    assert EMAIL in redact(text) or SECRET in redact(text)


@given(before=around, join=joint, number=cards, after=around)
def test_no_card_number_is_kept(before, join, number, after):
    out = redact(f"{before}{join}{number} {after}")
    assert number not in out
    assert number[-7:] not in out


@given(before=around, join=joint, phone=phones | american, after=around)
@example(before="", join=" ", phone="+1 555 123 4567", after="")
def test_no_phone_number_is_kept(before, join, phone, after):
    assert not kept(f"{before}{join}{phone} {after}", phone)


@given(before=around, join=joint, key=keys, after=around)
def test_no_key_is_kept(before, join, key, after):
    out = redact(f"{before}{join}{key} {after}")
    assert key not in out
    assert key[-12:] not in out


@given(st.lists(st.one_of(emails, cards, phones, keys), min_size=2, max_size=6))
def test_of_many_side_by_side_none_is_kept(found):
    out = redact(" ".join(found))
    for one in found:
        assert one not in out


@given(st.text(max_size=300) | st.lists(st.one_of(emails, cards, phones, keys)).map("; ".join))
def test_what_was_redacted_stays_as_it_is(text):
    once = redact(text)
    assert redact(once) == once


@given(st.text(st.characters(codec="utf-8", categories=["L", "Zs"]), max_size=300))
def test_words_alone_are_left_as_they_are(text):
    assume(max(map(len, text.split() or [""])) < 32)
    assert redact(text) == text


@given(st.text(max_size=200))
def test_any_text_at_all_comes_back_as_valid_text(text):
    redact(text).encode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to ada@example.com or call +44 20 7946 0958.",
         f"Write to {EMAIL} or call {PHONE}."),
        ("ünï ☃ ghp_" + drawn(1, 36) + " ö", f"ünï ☃ {SECRET} ö"),
        ("card 4111 1111 1111 1111, 12/27", f"card {CARD}, 12/27"),
        ("postgres://admin:s3cr3tPass99@db.prod.net:5432/x", f"postgres://admin:{SECRET}:5432/x"),
        ('password = "correct horse"', f'password = "{SECRET} horse"'),
        ("Authorization: Bearer " + drawn(2, 40), f"Authorization: Bearer {SECRET}"),
        ("my api_key: " + drawn(3, 32, HEX), f"my api_key: {SECRET}"),
        ("-----BEGIN RSA PRIVATE KEY-----\n" + "\n".join(drawn(i, 64) for i in range(12))
         + "\n-----END RSA PRIVATE KEY-----", SECRET),
    ],
)  # fmt: skip
def test_what_is_found_is_replaced_and_nothing_else(text, expected):
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "What is 1234567890123456 modulo 7, and 12 * 345678?",
        "4111111111111112 is no card: its check digit is wrong",
        "@dataclass\nclass A:\n    x: int = a @ b  # npm i lodash@4.17.21",
        "token = text.split()[0]\nkey = token.lower()",
        "It happened on 2024-01-02 at 10:20:30, ISBN 978-3-16-148410-0",
        "commit 123e4567-e89b-12d3-a456-426614174000 on 192.168.100.200",
        "pi is 3.14159265358979, 1,000,000,000 is a billion",
    ],
)
def test_what_only_looks_like_it_is_kept(text):
    assert redact(text) == text


@pytest.mark.parametrize(
    "text", ["@" * 20_000, "a@" * 10_000, "1 " * 10_000, "+1 (2) " * 3_000, "password=" * 2_000,
             "key key" * 3_000, "-" * 20_000, "4111 " * 4_000, "a.b" * 6_000],
)  # fmt: skip
def test_no_text_takes_long(text):
    redact("warm")
    began = time.perf_counter()
    redact(text)
    assert time.perf_counter() - began < 5.0


def test_numbers_of_the_countries_that_are_set_are_found_without_their_code(tmp_path):
    here = Redactor(phone_regions=("GB", "DE"))
    assert here("ring 020 7946 0958 or 030 901820") == f"ring {PHONE} or {PHONE}"
    with pytest.raises(UsageError, match="'XX' is not the two-letter code"):
        Redactor(phone_regions=("XX",))


def test_without_the_libraries_it_says_what_to_install():
    code = (
        "import sys; sys.modules['kingfisher_sdk'] = None\n"
        "from routellm.errors import UsageError\n"
        "from routellm.feedback.redact import Redactor\n"
        "try: Redactor()\n"
        "except UsageError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "kingfisher_sdk is not installed: pip install 'routellm-mlops[feedback]'" in done.stdout
