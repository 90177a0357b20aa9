"""API keys: who gets in, what is on disk, and what happens to the file of them."""

import json
import re
import stat
import subprocess
import sys

import pytest

from routellm.errors import GatewayError, UsageError
from routellm.gateway.key_file import add_key, revoke_key
from routellm.gateway.keys import Caller, Keys
from routellm.gateway.targets import Target


@pytest.fixture
def path(tmp_path):
    return tmp_path / "home" / "keys.json"


def bearer(text):
    return {"authorization": f"Bearer {text}"}


def refused(call, headers):
    with pytest.raises(GatewayError) as caught:
        call(headers)
    return caught.value


def test_without_a_key_file_everyone_is_let_in_without_limits(path):
    keys = Keys(path)
    assert not keys.needed
    assert keys.caller(bearer("whatever")) == keys.caller({}) == Caller(None)
    assert keys.caller({}).id == ""


def test_a_key_is_known_by_both_protocols_headers(path):
    key, text = add_key(path, "alice", strong_fraction=0.3, requests_per_minute=5)
    keys = Keys(path)
    for headers in (
        bearer(text),
        {"authorization": f"bearer  {text} "},
        {"authorization": text},
        {"x-api-key": text},
        {"authorization": "Bearer something-else", "x-api-key": text},
    ):
        caller = keys.caller(headers)
        assert caller.key == key
        assert caller.target == Target(strong_fraction=0.3, asked_by="key")


@pytest.mark.parametrize("how", ["unknown", "other secret", "longer", "empty", "not ascii", "none"])
def test_any_other_key_is_refused(path, how):
    _, text = add_key(path, "alice")
    headers = {
        "unknown": bearer("rlk_" + "0" * 12 + "_" + "0" * 64),
        "other secret": bearer(text[:-1] + ("0" if text[-1] != "0" else "1")),
        "longer": bearer(text + "0"),
        "empty": {"authorization": "Bearer "},
        "not ascii": bearer("é\udcff" * 20),
        "none": {},
    }[how]
    error = refused(Keys(path).caller, headers)
    assert (error.status, error.code) == (401, "invalid_api_key")
    assert text not in str(error)


def test_the_file_holds_no_key_and_is_its_owners_alone(path):
    _, text = add_key(path, "alice")
    secret = text.rsplit("_", 1)[1]
    for file in path.parent.iterdir():
        assert secret not in file.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert re.fullmatch(r"rlk_[0-9a-f]{12}_[0-9a-f]{64}", text)


def test_a_digest_is_not_shown_with_a_key(path):
    key, text = add_key(path, "alice")
    assert key.digest not in repr(key)
    assert text not in repr(Keys(path).caller(bearer(text)))


def test_a_key_that_is_made_or_revoked_counts_at_the_next_request(path):
    keys = Keys(path)
    key, text = add_key(path, "alice")
    assert refused(keys.caller, {}).status == 401
    assert keys.caller(bearer(text)).id == key.id
    revoke_key(path, key.id)
    assert refused(keys.caller, bearer(text)).status == 401


def test_a_gateway_whose_keys_were_all_revoked_is_closed(path):
    key, _ = add_key(path, "alice")
    revoke_key(path, key.id)
    assert refused(Keys(path).caller, {}).status == 401


def test_admin_keys_and_others_open_different_doors(path):
    _, query = add_key(path, "alice")
    _, admin = add_key(path, "root", admin=True)
    keys = Keys(path)
    assert keys.admin(bearer(admin)).key.name == "root"
    assert keys.caller(bearer(query)).key.name == "alice"
    assert refused(keys.caller, bearer(admin)).status == 403
    assert refused(keys.admin, bearer(query)).status == 403
    assert refused(keys.admin, {}).status == 401


def test_without_keys_the_admin_endpoints_are_closed(path):
    assert refused(Keys(path).admin, {}).status == 401


@pytest.mark.parametrize("what", ["gone", "damaged", "cut off", "newer", "with a bad limit"])
def test_a_file_that_cannot_be_read_any_more_opens_nothing(path, what):
    _, text = add_key(path, "alice")
    keys = Keys(path)
    whole = path.read_text()
    if what == "gone":
        path.unlink()
    else:
        doc = json.loads(whole)
        if what == "newer":
            doc["format"] = 99
        if what == "with a bad limit":
            doc["keys"][0]["concurrent"] = -1
        path.write_text(
            {"damaged": "[]", "cut off": whole[:-5]}.get(what, json.dumps(doc, indent=2))
        )
    for _ in range(2):
        assert refused(keys.caller, {}).status == 401
        assert keys.caller(bearer(text)).key.name == "alice"
    assert str(path) in keys.problem
    if what != "gone":
        with pytest.raises(UsageError, match=r"keys\.json"):
            Keys(path)
    path.write_text(whole)
    assert keys.caller(bearer(text)).key.name == "alice"
    assert keys.problem == ""


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"usd_per_day": -1.0}, "usd_per_day"),
        ({"usd_per_month": float("nan")}, "usd_per_month"),
        ({"strong_fraction": 1.5}, "strong_fraction"),
        ({"strong_fraction": 0.5, "quality": 0.5}, "one target"),
    ],
)
def test_a_limit_that_is_none_is_refused(path, limits, says):
    with pytest.raises(UsageError, match=says):
        add_key(path, "alice", **limits)
    assert not path.exists()


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 101])
def test_a_name_that_would_spoil_a_log_is_refused(path, name):
    with pytest.raises(UsageError, match="name"):
        add_key(path, name)


def test_only_a_key_that_holds_can_be_revoked(path):
    key, _ = add_key(path, "alice")
    with pytest.raises(UsageError, match="no key 'nobody'"):
        revoke_key(path, "nobody")
    revoke_key(path, key.id)
    with pytest.raises(UsageError, match="already"):
        revoke_key(path, key.id)


def test_processes_that_add_keys_at_once_lose_none(path):
    code = (
        "import sys, pathlib\n"
        "from routellm.gateway.key_file import add_key\n"
        "for i in range(10): add_key(pathlib.Path(sys.argv[1]), sys.argv[2])\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(path), n]) for n in "abc"]
    assert [one.wait(60) for one in started] == [0, 0, 0]
    assert len(Keys(path).all()) == 30
