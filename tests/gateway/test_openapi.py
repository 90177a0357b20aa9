"""The gateway against its own OpenAPI document, by schemathesis."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from routellm.gateway.app import create_app
from routellm.gateway.endpoints import ENDPOINTS
from routellm.gateway.server import running
from routellm.settings import GatewaySettings, Upstream
from tests.gateway.test_gateway import Versions, bundle
from tests.support import upstream as scripted
from tests.support.upstream import CHAT, json_reply

pytestmark = pytest.mark.slow

NEGATIVE = GenerationMode.NEGATIVE
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def schema_of_the_gateway(tmp_path_factory):
    up = scripted.Upstream(json_reply(CHAT))
    with running(up.app) as behind:
        one = {"base_url": f"{behind}/v1", "speaks": ("openai", "anthropic")}
        options = GatewaySettings(
            strong=Upstream(model="big", **one), weak=Upstream(model="small", **one)
        )
        home = tmp_path_factory.mktemp("gateway")
        app = create_app(options, Versions(v1=bundle(1)), home=home)
        with running(app) as url:
            yield schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_whatever_is_sent_the_answer_is_as_documented(schema_of_the_gateway):
    asked = []
    for found in schema_of_the_gateway.get_all_operations():
        operation = found.ok()
        asked.append(operation.label)

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy() | operation.as_strategy(generation_mode=NEGATIVE))
        def ask(case):
            case.call_and_validate(checks=CHECKS, timeout=20)

        ask()
    assert {f"POST /v1/{endpoint.path}" for endpoint in ENDPOINTS} < set(asked)
