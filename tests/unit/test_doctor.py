"""``routellm doctor``: each part's finding, on parts that are as they should be and broken ones."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from routellm.cli import doctor
from routellm.errors import SnapshotError, UsageError
from routellm.settings import GatewaySettings, Settings, Upstream
from tests.support.servers import free_port


def only(check, settings):
    (found,) = check(settings)
    return found


def test_the_packages_of_this_environment_are_those_it_was_built_against(settings):
    assert only(doctor.packages, settings).outcome == "ok"


def test_a_package_of_another_version_is_named_with_what_was_wanted(settings, monkeypatch):
    import importlib.metadata

    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda n: "0.0.1" if n == "pyarrow" else real(n)
    )
    found = only(doctor.packages, settings)
    assert found.outcome == "fail"
    assert "pyarrow is 0.0.1, wanted" in found.found
    assert "pip install" in found.to_do


def test_a_home_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    found = only(doctor.home, Settings(home=tmp_path / "file" / "home"))
    assert found.outcome == "fail"
    assert "cannot be written" in found.found


def test_a_full_disk_is_said_before_it_is_full(settings, monkeypatch):
    settings.home.mkdir()
    for free, outcome in ((9e9, "ok"), (2e9, "warn"), (1e8, "fail")):
        usage = type("usage", (), {"free": free})
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, usage=usage: usage)
        assert only(doctor.home, settings).outcome == outcome


def test_a_storage_is_written_and_read_and_left_as_it_was(settings, tmp_path):
    assert only(doctor.storage, settings).outcome == "off"
    shared = tmp_path / "shared"
    shared.mkdir()
    at = settings.model_copy(update={"storage": f"file://{shared}"})
    found = only(doctor.storage, at)
    assert found.outcome == "ok"
    assert f"file://{shared}" in found.found
    assert not [path for path in shared.rglob("*") if path.is_file()]


def test_a_storage_that_cannot_be_written_is_said(settings, tmp_path):
    (tmp_path / "file").write_text("")
    at = settings.model_copy(update={"storage": f"file://{tmp_path}/file"})
    (found,) = doctor._safely(doctor.storage, at)
    assert found.outcome == "fail"
    assert f"cannot write file://{tmp_path}/file" in found.found


def test_what_one_check_dies_of_is_its_finding():
    def snapshots(settings):
        raise SnapshotError("it is damaged")
        yield

    def mlflow(settings):
        raise ZeroDivisionError("division by zero")
        yield

    assert doctor._safely(snapshots, None) == [doctor.Checked("snapshots", "fail", "it is damaged")]
    (found,) = doctor._safely(mlflow, None)
    assert (found.outcome, found.found) == ("fail", "ZeroDivisionError: division by zero")


def with_upstreams(settings, **more):
    both = {
        route: Upstream(base_url=f"http://127.0.0.1:{port}/v1", model=route, **more)
        for route, port in (("strong", free_port()), ("weak", free_port()))
    }
    return settings.model_copy(update={"gateway": GatewaySettings(**both)})


def test_an_upstream_is_connected_to_and_one_that_is_not_there_is_named(settings):
    assert [f.outcome for f in doctor.upstreams(settings)] == ["off", "off"]
    set_up = with_upstreams(settings)
    with socket.create_server(
        ("127.0.0.1", int(set_up.gateway.strong.base_url.split(":")[2].split("/")[0]))
    ):
        strong, weak = doctor.upstreams(set_up)
    assert (strong.part, strong.outcome) == ("strong", "ok")
    assert (weak.part, weak.outcome) == ("weak", "fail")
    assert "gateway.weak.base_url" in weak.to_do


def test_a_key_file_that_is_not_there_is_one_sentence_and_no_key_is_shown(settings, tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        list(doctor.upstreams(with_upstreams(settings, api_key_file=tmp_path / "none")))
    told = doctor._safely(doctor.upstreams, with_upstreams(settings, api_key="sk-planted"))
    assert "sk-planted" not in str(told)


@pytest.mark.parametrize(
    ("ready", "outcome", "says"),
    [
        ('{"version": "3", "kind": "knn", "problem": null}', "ok", "version 3 (knn) serves"),
        ('{"version": "3", "kind": "knn", "problem": "MLflow is away"}', "warn", "MLflow is away"),
        ('{"version": null, "fallback": "strong", "problem": "no alias"}', "warn", "from strong"),
        ("<html>", "off", "no gateway at"),
    ],
)
def test_the_gateways_own_word_is_passed_on(settings, ready, outcome, says):
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/readyz" else 404)
            self.end_headers()
            self.wfile.write(ready.encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        gateway = GatewaySettings(port=server.server_port)
        found = only(doctor.gateway, settings.model_copy(update={"gateway": gateway}))
        server.shutdown()
    assert found.outcome == outcome
    assert says in found.found


def test_a_prefect_server_that_is_set_and_away_fails_and_one_that_is_not_set_is_off(
    settings, monkeypatch
):
    alone = settings.model_copy(
        update={"up": settings.up.model_copy(update={"prefect_port": free_port()})}
    )
    assert only(doctor.prefect, alone).outcome == "off"
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    assert only(doctor.prefect, alone).outcome == "fail"
