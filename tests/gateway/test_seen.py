"""What can be seen of the gateway: its logs, its traces, and the dashboard over its metrics."""

import contextlib
import http.server
import io
import json
import logging
import logging.config
import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
import yaml
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from routellm.errors import UsageError
from routellm.feedback.store import FeedbackStore
from routellm.feedback.writer import Writer
from routellm.gateway.app import create_app
from routellm.gateway.decide import Routed
from routellm.gateway.exchange import Exchange
from routellm.gateway.feedback import FeedbackParts
from routellm.gateway.figures import Figures
from routellm.gateway.logs import MOST_PROMPT, RequestLog, flush_logs, write_logs
from routellm.gateway.money import Money
from routellm.gateway.server import running
from routellm.gateway.traces import Traces
from routellm.gateway.usage import Usage
from routellm.settings import AutoMixSettings, FeedbackSettings, GatewaySettings, Price, Upstream
from tests.conftest import REPOSITORY
from tests.gateway.test_faithful import ASK, gateway
from tests.gateway.test_gateway import Versions, bundle, wait_for
from tests.support import upstream as scripted
from tests.support.gateway_process import SECRET, gateway_process
from tests.support.servers import free_port, mlflow_over
from tests.support.upstream import CHAT, chat_chunk, json_reply, stream_reply

PROMPT = "my secret plan for tomorrow"
KEY = "rlk_0123456789ab_" + "5" * 64
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def exchange(**changes):
    """Return a request that is over."""
    one = Exchange("req-1", "chat/completions")
    one.routed = Routed("weak", "small", "win rate against threshold 0.5", "7", "mf", 0.25, 0.5)
    one.route, one.model, one.status = "weak", "small", 200
    one.routing_s, one.upstream_s, one.total_s = 0.002, 0.5, 0.503
    one.usage, one.usd, one.saved_usd = Usage("chatcmpl-1", 100, 20), 0.0001, 0.0019
    for name, value in changes.items():
        setattr(one, name, value)
    return one


# --- logs --------------------------------------------------------------------------------------


class Stderr(io.StringIO):
    """Where lines go; it can be full, as a pipe is that nobody reads."""

    def __init__(self):
        super().__init__()
        self.room = threading.Event()
        self.room.set()

    def write(self, text):
        self.room.wait()
        return super().write(text)

    def lines(self, n=1):
        wait_for(lambda: self.getvalue().count("\n") >= n)
        return self.getvalue().splitlines()


@pytest.fixture
def stderr():
    ours = logging.getLogger("routellm"), logging.getLogger("routellm.gateway.requests")
    before = [logger.level for logger in ours]
    found = Stderr()
    yield found
    found.room.set()
    root = logging.getLogger()
    for handler in [h for h in root.handlers if type(h).__name__ == "_Lines"]:
        root.removeHandler(handler)
        handler.end()
    for logger, level in zip(ours, before, strict=True):
        logger.setLevel(level)
        logger.disabled = False


def test_a_request_is_one_line_of_json_with_what_is_known_of_it(stderr):
    write_logs("json", stderr)
    RequestLog().seen(exchange())
    (line,) = stderr.lines()
    doc = json.loads(line)
    assert doc.pop("time").endswith("Z")
    assert doc == {
        "level": "info", "logger": "routellm.gateway.requests", "message": "request",
        "request_id": "req-1", "endpoint": "chat/completions", "key_id": None, "status": 200,
        "route": "weak", "model": "small", "version": "7", "kind": "mf", "win_rate": 0.25,
        "threshold": 0.5, "policy": None, "confidence": None, "canary": False,
        "reason": "win rate against threshold 0.5",
        "stood_in": None, "broken": None, "streamed": False, "routing_s": 0.002,
        "upstream_s": 0.5, "total_s": 0.503, "input_tokens": 100, "output_tokens": 20,
        "other_calls": 0, "usd": 0.0001, "saved_usd": 0.0019, "trace_id": None,
    }  # fmt: skip


def test_what_was_refused_has_the_same_fields(stderr):
    write_logs("json", stderr)
    RequestLog().seen(exchange())
    RequestLog().seen(Exchange("req-2", "messages", status=401))
    first, second = map(json.loads, stderr.lines(2))
    assert first.keys() == second.keys()
    assert (second["status"], second["route"], second["version"]) == (401, None, None)


@pytest.mark.parametrize(
    ("changes", "level"),
    [({"status": 404}, "info"), ({"broken": "client_left"}, "info"), ({"status": 502}, "warning"),
     ({"broken": "upstream_broke_off"}, "warning")],
)  # fmt: skip
def test_what_went_wrong_on_our_side_is_a_warning(stderr, changes, level):
    write_logs("json", stderr)
    RequestLog().seen(exchange(**changes))
    assert json.loads(stderr.lines()[0])["level"] == level


def test_a_prompt_is_written_only_if_that_is_switched_on_and_never_whole_if_long(stderr):
    write_logs("json", stderr)
    RequestLog().seen(exchange(prompt=PROMPT * 1000))
    RequestLog(prompts=True).seen(exchange(prompt=PROMPT * 1000))
    RequestLog(prompts=True).seen(exchange(prompt="half a pair \ud83d\nand a line"))
    without, cut, odd = stderr.lines(3)
    assert "secret plan" not in without
    assert json.loads(cut)["prompt"] == (PROMPT * 1000)[:MOST_PROMPT]
    assert json.loads(odd)["prompt"] == "half a pair \ud83d\nand a line"


@pytest.mark.parametrize("how", ["json", "plain"])
def test_a_text_of_the_request_cannot_forge_a_line(stderr, how):
    write_logs(how, stderr)
    RequestLog().seen(exchange(model='x"\n{"level": "critical"}\u2028\x1b[31m', reason="y"))
    (line,) = stderr.getvalue().split("\n")[:-1] or stderr.lines()
    assert line.isascii()
    assert line.isprintable()


@pytest.mark.parametrize("how", ["json", "plain"])
def test_a_key_sent_as_a_request_id_or_a_model_is_not_written(stderr, how):
    write_logs(how, stderr)
    RequestLog().seen(exchange(id=KEY, model=KEY))
    (line,) = stderr.lines()
    assert KEY not in line
    assert line.count("rlk_0123456789ab_***") == 2


@pytest.mark.parametrize("how", ["json", "plain"])
def test_an_error_is_told_by_type_and_place_not_by_its_message(stderr, how):
    write_logs(how, stderr)
    try:
        raise ValueError(PROMPT)
    except ValueError:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
    (line,) = stderr.lines()
    assert "ValueError" in line
    assert "test_seen.py:" in line
    assert "secret plan" not in line


def test_plain_lines_can_be_read_and_leave_out_what_is_not_known(stderr):
    write_logs("plain", stderr)
    RequestLog().seen(exchange())
    (line,) = stderr.lines()
    assert (
        "INFO    request request_id=req-1 endpoint=chat/completions status=200 route=weak" in line
    )
    assert 'reason="win rate against threshold 0.5"' in line
    assert "broken" not in line


def test_off_is_without_requests_and_with_warnings(stderr):
    write_logs("off", stderr)
    RequestLog().seen(exchange(status=500))
    logging.getLogger("routellm.gateway").info("loaded version 2")
    logging.getLogger("routellm.gateway").warning("cannot follow the alias: %s", "it is gone")
    assert ["cannot follow" in line for line in stderr.lines()] == [True]


def test_the_last_call_holds(stderr):
    before = Stderr()
    write_logs("json", before)
    write_logs("json", stderr)
    RequestLog().seen(exchange())
    assert len(stderr.lines()) == 1
    assert before.getvalue() == ""


def test_another_set_up_of_logging_does_not_end_it(stderr):
    write_logs("json", stderr)
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
    RequestLog().seen(exchange())
    flush_logs()
    assert json.loads(stderr.getvalue())["request_id"] == "req-1"


def test_a_stderr_that_nobody_reads_costs_lines_and_no_time(stderr):
    write_logs("json", stderr)
    stderr.room.clear()
    began = time.monotonic()
    for _ in range(12_000):
        RequestLog().seen(exchange())
    assert time.monotonic() - began < 10
    stderr.room.set()
    wait_for(lambda: "were dropped" in stderr.getvalue())
    (said,) = re.findall(r"(\d+) log lines were dropped", stderr.getvalue())
    requests = stderr.lines(12_000 - int(said) + 1)
    assert len(requests) == 12_000 - int(said) + 1
    assert 0 < int(said) <= 2000


@pytest.mark.slow
def test_all_that_a_gateway_writes_on_stderr_is_json_until_its_last_request(tmp_path):
    with gateway_process(tmp_path / "home") as (url, process):
        for i in range(50):
            body = {"model": "router", "messages": [{"role": "user", "content": PROMPT}]}
            headers = {"x-request-id": f"req-{i}", "traceparent": f"00-{TRACE}-{PARENT}-01"}
            httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers)
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    written = (tmp_path / "home" / "stderr").read_text()
    assert "secret plan" not in written
    assert SECRET not in written
    lines = [json.loads(line) for line in written.splitlines()]
    requests = [line for line in lines if line["message"] == "request"]
    assert [line["request_id"] for line in requests] == [f"req-{i}" for i in range(50)]
    assert {line["trace_id"] for line in requests} == {TRACE}
    assert {line["version"] for line in requests} == {"1"}


# --- traces ------------------------------------------------------------------------------------


@pytest.fixture
def traced():
    """Return a function that makes an exchange's spans, by their names."""
    kept = InMemorySpanExporter()
    traces = Traces(kept)

    def spans_of(*exchanges):
        for one in exchanges:
            traces.seen(one)
        traces.stop()
        return {span.name: span for span in kept.get_finished_spans()}

    return spans_of


def test_a_request_is_a_span_with_one_for_the_decision_and_one_for_the_upstream(traced):
    one = exchange()
    spans = traced(one)
    assert set(spans) == {"POST /v1/chat/completions", "decide", "chat small"}
    whole, decision, upstream = (
        spans[name] for name in ("POST /v1/chat/completions", "decide", "chat small")
    )
    assert whole.parent is None
    for part in (decision, upstream):
        assert part.parent.span_id == whole.context.span_id
        assert part.context.trace_id == whole.context.trace_id
        assert whole.start_time <= part.start_time <= part.end_time <= whole.end_time
    assert whole.start_time == int(one.at.timestamp() * 1e9)
    assert decision.end_time == upstream.start_time
    for span, seconds in ((whole, 0.503), (decision, 0.002), (upstream, 0.5)):
        assert (span.end_time - span.start_time) / 1e9 == pytest.approx(seconds, abs=1e-6)
    assert decision.attributes["routellm.version"] == "7"
    assert decision.attributes["routellm.win_rate"] == 0.25
    assert upstream.attributes["gen_ai.usage.input_tokens"] == 100
    assert whole.attributes["http.response.status_code"] == 200
    assert whole.status.is_unset


def test_a_request_that_was_refused_is_a_span_alone(traced):
    assert set(traced(Exchange("r", "messages", status=429))) == {"POST /v1/messages"}


def test_what_failed_on_our_side_is_an_error(traced):
    spans = traced(exchange(status=502))
    assert not spans["POST /v1/chat/completions"].status.is_ok
    assert spans["chat small"].status.status_code.name == "ERROR"


@pytest.mark.parametrize(
    "changes", [{"prompt": PROMPT}, {"routed": None, "prompt": PROMPT}, {"model": "m" * 10_000}]
)
def test_no_span_holds_a_prompt_or_a_text_without_end(traced, changes):
    for name, span in traced(exchange(**changes)).items():
        assert "secret plan" not in span.to_json()
        assert len(name) <= 300
        assert all(len(v) <= 300 for v in span.attributes.values() if isinstance(v, str))


def test_a_callers_trace_goes_on(traced):
    whole = traced(exchange(traceparent=f"00-{TRACE}-{PARENT}-01"))["POST /v1/chat/completions"]
    assert f"{whole.context.trace_id:032x}" == TRACE
    assert f"{whole.parent.span_id:016x}" == PARENT


def test_a_trace_that_its_caller_does_not_record_is_not_recorded(traced):
    assert traced(exchange(traceparent=f"00-{TRACE}-{PARENT}-00")) == {}


@pytest.mark.parametrize("header", ["", "x", f"00-{'0' * 32}-{PARENT}-01", "00-" + "é" * 52])
def test_a_header_that_is_no_traceparent_begins_a_trace(traced, header):
    assert traced(exchange(traceparent=header))["POST /v1/chat/completions"].parent is None


def test_without_an_endpoint_there_are_no_traces_and_opentelemetry_is_not_loaded():
    code = (
        "import sys; from routellm.gateway.traces import Traces; assert Traces.to(None) is None;"
        "print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("endpoint", ["localhost:4318", "ftp://x", "http://", "http://me:pw@x/y"])
def test_an_endpoint_that_is_no_address_is_refused_in_one_sentence(endpoint):
    with pytest.raises(UsageError, match="otlp_endpoint must be") as raised:
        Traces.to(endpoint)
    assert "pw" not in str(raised.value)


def test_an_exporter_that_is_missing_is_said_with_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(UsageError, match=r"routellm-mlops\[otlp\]"):
        Traces.to("http://127.0.0.1:4318")


class Collector(http.server.ThreadingHTTPServer):
    """Takes OTLP/HTTP posts, and keeps each one's path, headers and span names."""

    def __init__(self):
        self.took = []
        super().__init__(("127.0.0.1", 0), self.Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
                ExportTraceServiceRequest,
            )

            raw = self.rfile.read(int(self.headers["content-length"]))
            sent = ExportTraceServiceRequest.FromString(raw)
            names = [
                span.name
                for resource in sent.resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
            ]
            self.server.took.append((self.path, dict(self.headers), names))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass


@pytest.mark.parametrize("path", ["", "/v1/traces", "/my/own"])
def test_spans_go_to_the_endpoint_by_otlp_with_the_headers_of_the_environment(monkeypatch, path):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=routing")
    collector = Collector()
    try:
        traces = Traces.to(collector.url + path)
        traces.seen(exchange())
        traces.stop()
    finally:
        collector.shutdown()
    ((at, headers, names),) = collector.took
    assert at == (path or "/v1/traces")
    assert headers["x-team"] == "routing"
    assert sorted(names) == ["POST /v1/chat/completions", "chat small", "decide"]


@pytest.mark.slow
def test_a_collector_that_is_away_costs_a_request_nothing_and_a_stop_a_moment():
    traces = Traces.to(f"http://127.0.0.1:{free_port()}")
    began = time.monotonic()
    for _ in range(5000):  # more than wait
        traces.seen(exchange())
    assert time.monotonic() - began < 20
    began = time.monotonic()
    traces.stop()
    assert time.monotonic() - began < 6


@pytest.mark.slow
def test_mlflow_takes_the_traces_of_a_gateway(tmp_path, monkeypatch):
    import mlflow

    server = mlflow_over(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path)
    root = server.url
    up = scripted.Upstream(json_reply(CHAT))
    seen = []
    with server, running(up.app) as behind, gateway(tmp_path, behind, behind, seen=seen) as url:
        client = mlflow.MlflowClient(root, root)
        experiment = client.create_experiment("gateway")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"x-mlflow-experiment-id={experiment}")
        traces = Traces.to(root)
        body = {"model": "router", "messages": [{"role": "user", "content": PROMPT}]}
        httpx.post(f"{url}/v1/chat/completions", json=body, headers={"x-request-id": "req-9"})
        wait_for(lambda: seen)
        # as in a gateway that runs: sent after a moment, and what a server that has just
        # started was too slow to take is lost
        for _ in range(5):
            traces.seen(seen[0])
            with contextlib.suppress(AssertionError):
                wait_for(lambda: client.search_traces(locations=[experiment]), timeout_s=20)
                break
        traces.stop()
        trace = client.search_traces(locations=[experiment])[0]
    spans = {span.name: span for span in trace.data.spans}
    assert {"POST /v1/chat/completions", "decide"} < set(spans)
    assert spans["POST /v1/chat/completions"].attributes["routellm.request_id"] == "req-9"
    assert spans["decide"].attributes["routellm.version"] == "1"
    assert spans["decide"].parent_id == spans["POST /v1/chat/completions"].span_id
    assert trace.info.token_usage["total_tokens"] == 120
    assert "secret plan" not in trace.to_json()


# --- metrics, the dashboard and the alerts -----------------------------------------------------


@pytest.fixture(scope="module")
def exposition(tmp_path_factory):
    """What /metrics says after traffic of every kind, with a challenger in shadow."""
    up, beside = scripted.Upstream(json_reply(CHAT)), Versions(v2=bundle(2))
    beside.alias = "2"
    ends = {"strong": "big", "weak": "small"}
    with running(up.app) as behind:
        options = GatewaySettings(
            **{route: Upstream(base_url=f"{behind}/v1", model=m) for route, m in ends.items()},
            poll_s=0.1, challenger="shadow", automix=AutoMixSettings(samples=1), retries=1,
            retry_wait_s=0.01, breaker_failures=100,
        )  # fmt: skip
        home = tmp_path_factory.mktemp("home")
        writer = Writer(FeedbackStore(f"sqlite:///{home / 'feedback.db'}"), flush_s=0.05)
        app = create_app(
            options, Versions(v1=bundle(1)), home=home, challenger=beside,
            money=Money({"big": Price(input=10, output=30), "small": Price(input=1, output=1)}),
            feedback=FeedbackParts(FeedbackSettings(enabled=True), writer),
        )  # fmt: skip
        served = app.state.gateway
        with running(app) as url, httpx.Client(base_url=url) as http:

            def ask(**body):
                body = {"model": "router", "messages": ASK, **body}
                try:
                    return http.post("/v1/chat/completions", json=body)
                except httpx.RemoteProtocolError:  # it broke off, as scripted
                    return None

            wait_for(lambda: served.challenger.follower.serving)
            for i in range(30):
                ask(messages=[{"role": "user", "content": f"query {i}"}])
            ask(model="nobody")
            ask(routing={"policy": "automix"})
            up.say(json_reply({}, status=503), json_reply(CHAT))
            ask()  # tried again
            up.say(json_reply({}, status=500), json_reply(CHAT))
            ask()  # stood in for
            up.say(stream_reply(chat_chunk(content="half"), breaks_off=True))
            ask(stream=True)
            up.say(json_reply(CHAT))

            def broken(prompts):
                raise ValueError("as scripted")

            router = served.follower.serving.bundle.router
            rate, router.win_rate = router.win_rate, broken
            ask(messages=[{"role": "user", "content": "a query not scored yet"}])  # a fallback
            router.win_rate = rate
            said = {"id": ask().headers["x-routellm-id"], "thumbs": "up"}
            wait_for(lambda: http.post("/v1/feedback", json=said).status_code == 200)
            # what needs a machine under load, and a judge
            served.metrics.duels.labels("strong").inc()
            served.metrics.dropped(served.challenger.follower.serving.ref, "shadow")
            wait_for(lambda: "agreements_total{" in http.get("/metrics").text)
            yield http.get("/metrics").text


def expressions():
    board = json.loads((REPOSITORY / "deploy/grafana/routellm-gateway.json").read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    rules = yaml.safe_load((REPOSITORY / "deploy/prometheus-rules.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


FROM_THE_SCRAPE = {"instance", "job"}


@pytest.mark.slow
def test_every_metric_and_label_of_the_dashboard_and_the_alerts_is_there(exposition):
    samples = Figures.of(exposition.encode()).samples
    labels = {name: set().union(*(have for have, _ in found)) for name, found in samples.items()}
    for title, expression in expressions():
        metrics = re.findall(r"\broutellm_\w+", expression)
        assert metrics or expression.startswith("up{"), title
        for name in metrics:
            assert name in samples, f"{title}: /metrics has no {name}"
        for name, matchers in re.findall(r"\b(routellm_\w+)\{([^}]*)\}", expression):
            used = set(re.findall(r"(\w+)\s*[=!]", matchers))
            assert used <= labels[name] | FROM_THE_SCRAPE, f"{title}: {name} has not all of {used}"
        have = set().union(*(labels[name] for name in metrics)) | FROM_THE_SCRAPE
        for grouped in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression):
            used = {label.strip() for label in grouped.split(",")}
            assert used <= have, f"{title}: no metric has all of {used}"


@pytest.mark.slow
def test_no_metric_of_the_gateway_is_missing_from_the_dashboard(exposition):
    shown = " ".join(expression for _, expression in expressions())
    for name in re.findall(r"^# TYPE (routellm_\w+)", exposition, re.MULTILINE):
        if not name.endswith("_created"):  # when its counter began: nobody draws that
            assert re.search(rf"\b{name}(_bucket)?\b", shown), name


def test_the_dashboard_is_whole():
    board = json.loads((REPOSITORY / "deploy/grafana/routellm-gateway.json").read_text())
    (source,) = [v for v in board["templating"]["list"] if v["type"] == "datasource"]
    assert source["query"] == "prometheus"
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"])
                 for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert at["x"] + at["w"] <= 24
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["targets"], f"{panel['title']} is empty"
        assert panel["datasource"]["uid"] == f"${{{source['name']}}}"
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]
            expression = target["expr"]
            for opening, closing in ("()", "{}", "[]"):
                assert expression.count(opening) == expression.count(closing), expression


def test_the_scrape_config_names_the_rules_and_the_gateways_own_port():
    config = yaml.safe_load((REPOSITORY / "deploy/prometheus.yml").read_text())
    for name in config["rule_files"]:
        assert (REPOSITORY / "deploy" / name).is_file()
    (job,) = config["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"127.0.0.1:{GatewaySettings().port}"]
    jobs = {found for _, e in expressions() for found in re.findall(r'job="([^"]+)"', e)}
    assert jobs == {job["job_name"]}


# --- figures read back -------------------------------------------------------------------------


def test_a_quantile_is_prometheuss():
    text = "\n".join(
        ["# TYPE t histogram", 't_bucket{le="0.1",r="a"} 10', 't_bucket{le="0.2",r="a"} 30',
         't_bucket{le="+Inf",r="a"} 40', 't_count{r="a"} 40', 't_sum{r="a"} 9', ""]
    )  # fmt: skip
    figures = Figures.of(text.encode())
    # 20 of 40 lie halfway through the bucket (0.1, 0.2], which holds the 11th to the 30th
    assert figures.quantile(0.5, "t", r="a") == pytest.approx(0.15)
    assert figures.quantile(0.25, "t") == pytest.approx(0.1)
    assert figures.quantile(0.99, "t") == 0.2  # beyond the last bound that has an end
    assert figures.quantile(0.5, "t", r="b") is None


@pytest.mark.slow
def test_figures_are_of_all_processes(tmp_path):
    count = (
        "import sys; from routellm.gateway.metrics import Metrics; m = Metrics();"
        "m.requests.labels('strong', '200').inc(int(sys.argv[1])); m.routing.observe(0.01)"
    )
    ask = (
        "from routellm.gateway.metrics import Metrics;"
        "from routellm.gateway.figures import Figures;"
        "f = Figures.of(Metrics().exposition());"
        "print(f.total('routellm_requests_total'), f.total('routellm_routing_seconds_count'))"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for code, n in ((count, "2"), (count, "3"), (ask, "")):
        done = subprocess.run(
            [sys.executable, "-c", code, n], env=environment, cwd=REPOSITORY,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert done.stdout.split() == ["5.0", "2.0"]
