"""What deploy/ says is so: the compose file and the images, as far as no engine is needed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema
from typer.testing import CliRunner

from routellm import __version__
from routellm.cli.app import app
from routellm.settings import Settings
from tests.conftest import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
ONCE = {"bucket", "prefect-database", "deployments"}
PROBED_BY_NOTHING = {"prefect-services", "watch"}  # they answer nothing, and end if they fail


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.fixture
def services(compose):
    return compose["services"]


# --- compose.yaml ------------------------------------------------------------------------------


def test_the_compose_file_is_one_by_the_specification(compose):
    jsonschema.validate(compose, get_builtin_schema("vendor.compose-spec"))


def test_only_the_proxy_is_reachable_from_outside(services):
    for name, one in services.items():
        for port in one.get("ports", []):
            assert name == "proxy" or port.startswith("127.0.0.1:"), name
    caddy = (DEPLOY / "Caddyfile").read_text()
    assert "flush_interval -1" in caddy
    for path in ("/metrics", "/status.json", "/readyz"):
        assert re.search(rf"@operators path .*{path}\b", caddy), path


def test_databases_have_no_way_out_and_redis_is_prefects_alone(compose, services):
    assert all(compose["networks"][name]["internal"] for name in ("data", "queue"))
    on = {net: {n for n, s in services.items() if net in s["networks"]}
          for net in compose["networks"]}  # fmt: skip
    assert on["queue"] == {"redis", "prefect-database", "prefect-server", "prefect-services"}
    for name in ("postgres", "minio"):
        assert services[name]["networks"] == ["data"]
    assert on["edge"] == {"proxy", "gateway"}


def test_what_is_mounted_is_there_and_cannot_be_written(services):
    mounts = [v for one in services.values() for v in one.get("volumes", []) if v[0] == "."]
    assert len(mounts) > 10
    for mount in mounts:
        path, _, mode = mount.split(":")
        assert (DEPLOY / path).exists(), path
        assert mode == "ro", mount


def test_secrets_come_from_files_that_git_does_not_take(compose, services):
    for name, secret in compose["secrets"].items():
        assert secret == {"file": f"./secrets/{name}"}
    given = {n: set(one.get("secrets", [])) for n, one in services.items()}
    assert set().union(*given.values()) == set(compose["secrets"])
    for name, one in services.items():
        used = set(re.findall(r"/run/secrets/(\w+)", json.dumps(one)))
        assert used <= given[name], name
        for variable, value in one.get("environment", {}).items():
            hidden = re.search("PASSWORD|SECRET|API_KEY", variable)
            assert not hidden or value.startswith("/run/secrets/"), (name, variable)
    assert set(re.findall(r"/run/secrets/(\w+)", (DEPLOY / "settings/routellm.toml").read_text())
               ) <= given["gateway"]  # fmt: skip
    ignored = subprocess.run(
        ["git", "check-ignore", *(f"deploy/secrets/{name}" for name in compose["secrets"])],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert len(ignored.stdout.splitlines()) == len(compose["secrets"])


def test_every_service_says_how_it_is_and_comes_back(services):
    for name, one in services.items():
        assert one["cap_drop"] == ["ALL"], name
        assert one["security_opt"] == ["no-new-privileges:true"], name
        if name in ONCE:
            assert one["restart"] == "on-failure", name
            continue
        assert one["restart"] == "unless-stopped", name
        assert one["stop_grace_period"], name
        if name in PROBED_BY_NOTHING:
            assert one.get("healthcheck", {"disable": True}) == {"disable": True}
        else:
            assert {"test", "interval", "timeout", "retries", "start_period"} == set(
                one["healthcheck"]
            ), name


def test_who_waits_for_a_service_waits_for_what_that_service_can_say(services):
    for name, one in services.items():
        for other, how in one.get("depends_on", {}).items():
            expected = "service_completed_successfully" if other in ONCE else "service_healthy"
            assert how == {"condition": expected}, (name, other)
            assert other not in PROBED_BY_NOTHING, (name, other)


def test_ours_run_without_root_on_a_file_system_they_cannot_write(services):
    targets = set(re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE.read_text(), re.M))
    ours = {name: one for name, one in services.items() if "build" in one}
    assert len(ours) == 10
    for name, one in ours.items():
        assert one["read_only"] is True, name
        assert one["build"]["target"] in targets, name
        assert one["image"].startswith(f"routellm/{one['build']['target']}:"), name


def test_images_of_others_are_pinned_and_can_be_pinned_by_digest(services):
    for name, one in services.items():
        if "build" not in one:
            image = re.fullmatch(r"\$\{[A-Z]+_IMAGE:-(\S+)\}", one["image"])
            assert image, name
            tag = image.group(1).rpartition(":")[2]
            assert re.search(r"\d+\.\d+|\d{4}-\d{2}", tag), image.group(1)


def test_commands_of_ours_are_ones_that_the_command_takes(services):
    runner, seen = CliRunner(), set()
    for one in services.values():
        if one.get("command", [""])[0] != "routellm":
            continue
        _, verb, *words = one["command"]
        shown = runner.invoke(app, [verb, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, verb
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.output, (verb, option)
        seen.add(verb)
    assert seen == {"deploy", "serve", "watch"}


# --- every variable exists ---------------------------------------------------------------------

OF_IMAGES = {  # of others; their manuals name them
    "POSTGRES_PASSWORD_FILE", "PGDATA", "MINIO_ROOT_USER", "MINIO_ROOT_USER_FILE",
    "MINIO_ROOT_PASSWORD_FILE", "MINIO_UPDATE", "GATEWAY_DOMAIN",
    "GF_SECURITY_ADMIN_PASSWORD__FILE", "GF_ANALYTICS_REPORTING_ENABLED",
    "GF_ANALYTICS_CHECK_FOR_UPDATES", "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES",
}  # fmt: skip
OF_PYTHON = {"PATH", "HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "PYTHONUNBUFFERED",
             "PIP_DISABLE_PIP_VERSION_CHECK"}  # fmt: skip
OF_CONVENTION = {"DO_NOT_TRACK", "PGPASSWORD"}  # libpq and asyncpg read the second


def variables():
    """Return (file, name, value) of every environment variable in deploy/; value may be None."""
    found = []

    def add(file, name, value):
        found.append((file, name.removesuffix("_FROM_FILE"), value))

    def walk(doc, file):
        if isinstance(doc, list):
            for one in doc:
                walk(one, file)
        if not isinstance(doc, dict):
            return
        if doc.get("kind") == "ConfigMap":
            for name, value in doc["data"].items():
                add(file, name, value)
        for entry in doc["env"] if isinstance(doc.get("env"), list) else []:
            add(file, entry["name"], entry.get("value"))
        for one in doc.values():
            walk(one, file)

    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for one in compose["services"].values():
        for name, value in one.get("environment", {}).items():
            add("compose.yaml", name, None if name.endswith("_FROM_FILE") else value)
    for path in sorted((DEPLOY / "k8s").rglob("*.yaml")):
        for doc in yaml.safe_load_all(path.read_text()):
            walk(doc, path.name)
    for path in sorted((DEPLOY / "k8s").rglob("*.json")):
        walk(json.loads(path.read_text()), path.name)
    for path in sorted((DEPLOY / "k8s").rglob("*.env")):
        for line in path.read_text().splitlines():
            add(path.name, *line.split("=", 1))
    for line in (DEPLOY / "k8s/overlays/gpu/kustomization.yaml").read_text().splitlines():
        for name, value in re.findall(r"literals: \[(\w+)=(\S+)\]", line):
            add("overlays/gpu", name, value)
    for block in re.findall(r"^ENV (.+?)(?<!\\)\n", DOCKERFILE.read_text(), re.M | re.S):
        for name, value in re.findall(r"(\w+)=(\S+)", block):
            add("Dockerfile", name, value)
    return found


def of_prefect():
    from prefect.settings.legacy import _get_settings_fields
    from prefect.settings.models.root import Settings as PrefectSettings
    from prefect_kubernetes.settings import KubernetesObserverSettings
    from prefect_redis.client import RedisMessagingSettings

    names = {name.upper() for name in _get_settings_fields(PrefectSettings)}
    for extra in (RedisMessagingSettings, KubernetesObserverSettings):
        prefix = extra.model_config["env_prefix"]
        names |= {f"{prefix}{field}".upper() for field in extra.model_fields}
    return names


def of_mlflow():
    import mlflow.cli
    import mlflow.environment_variables as declared

    server = {
        p.envvar for p in mlflow.cli.cli.commands["server"].params if isinstance(p.envvar, str)
    }
    return server | {name for name in dir(declared) if name.startswith("MLFLOW_")}


def is_setting(name):
    fields = Settings.model_fields
    *groups, last = name.removeprefix("ROUTELLM_").lower().split("__")
    for group in groups:
        if group not in fields:
            return False
        fields = type(fields[group].default).model_fields
    return last in fields


@pytest.mark.slow
def test_every_variable_that_is_named_exists():
    found = variables()
    assert len(found) > 100
    known = of_prefect() | of_mlflow() | OF_IMAGES | OF_PYTHON | OF_CONVENTION
    families = {name.split("_")[0] for _, name, _ in found}
    assert {"ROUTELLM", "PREFECT", "MLFLOW", "AWS"} <= families
    for file, name, _ in found:
        if name.startswith("ROUTELLM_"):
            assert is_setting(name), f"{file}: no setting is called {name}"
        elif not name.startswith("AWS_"):  # those: the next test
            assert name in known, f"{file}: nothing reads {name}"


def test_boto_does_as_the_variables_say(monkeypatch):
    import boto3

    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    given = {n: v or "secret" for _, n, v in variables() if n.startswith("AWS_")}
    assert set(given) == {"AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID",
                          "AWS_SECRET_ACCESS_KEY"}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    session = boto3.Session()
    client = session.client("s3")
    assert client.meta.endpoint_url == given["AWS_ENDPOINT_URL_S3"]
    assert client.meta.region_name == given["AWS_DEFAULT_REGION"]
    assert session.get_credentials().access_key == given["AWS_ACCESS_KEY_ID"]
    assert session.get_credentials().secret_key == given["AWS_SECRET_ACCESS_KEY"]


@pytest.mark.parametrize("where", ["compose", "k8s"])
def test_the_settings_load_as_they_are_given(where, services, monkeypatch):
    if where == "compose":
        given = services["gateway"]["environment"]
        monkeypatch.chdir(DEPLOY / "settings")
    else:
        lines = (DEPLOY / "k8s/base/settings.env").read_text().splitlines()
        given = dict(line.split("=", 1) for line in lines)
        monkeypatch.chdir(DEPLOY / "k8s/base")
    for name, value in given.items():
        if name.startswith("ROUTELLM_"):
            monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.home == Path("/var/lib/routellm")
    assert settings.resolved_tracking_uri == "http://mlflow:5000"
    assert settings.monitor.gateways == ("http://gateway:6060",)
    assert settings.workers.train == "deployments"
    assert settings.feedback.enabled
    assert settings.gateway.strong.api_key_file.name == "strong_key"


# --- the images --------------------------------------------------------------------------------


def test_the_dockerfile_keeps_hadolints_rules():
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_images_run_as_a_user_without_rights_through_the_secrets_command():
    stages = re.split(r"^FROM ", DOCKERFILE.read_text(), flags=re.M)[1:]
    images = [s for s in stages if s.startswith("base AS ")]
    assert len(images) == 5
    for stage in images:
        assert "USER 10001:10001" in stage
        assert re.search(r'^CMD \["', stage, re.M), "a shell would keep signals to itself"
    assert 'ENTRYPOINT ["with-secrets"]' in DOCKERFILE.read_text()


def test_what_is_copied_into_images_is_there_and_not_kept_out():
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(), re.M)
    copied = [path for line in lines for path in line.split() if not path.startswith("--")]
    let_in = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in let_in
    assert {"routellm", "requirements.lock", "deploy/prefect.yaml"} <= set(copied)
    for path in copied:
        assert (REPOSITORY / path).exists(), path
        assert f"!{path}" in let_in, path
    assert {line[1:] for line in let_in if line.startswith("!")} == set(copied)


def test_what_images_install_is_pinned_and_as_the_package_has_it():
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {*project["dependencies"], *(one for extra in extras.values() for one in extra)}
    text = DOCKERFILE.read_text()
    for requirement in re.findall(r'"([a-z-]+(?:\[\w+\])?[<>=]+[^"]+)"', text):
        assert requirement in declared, requirement
    for listed in re.findall(r'"\$1\[([\w,]+)\]"', text):
        assert set(listed.split(",")) <= set(extras)
    installs = re.findall(r"pip install (.+)", text)
    assert installs
    for line in installs:
        assert "--constraint requirements.lock" in line, line
    locked = (REPOSITORY / "requirements.lock").read_text().lower().replace("_", "-")
    for requirement in (*project["dependencies"], *extras["server"], *extras["kubernetes"]):
        name = re.match(r"[A-Za-z0-9-]+", requirement).group().lower()
        assert f"\n{name}==" in locked, f"{name} is not in requirements.lock"


def test_all_images_of_ours_have_the_packages_version():
    files = [DEPLOY / "compose.yaml", *(DEPLOY / "k8s").rglob("kustomization.yaml"),
             *(DEPLOY / "k8s").rglob("pool-*.json")]  # fmt: skip
    seen = set()
    for file in files:
        text = file.read_text()
        pattern = r"routellm/[a-z-]+(?::|, newTag: )(?:\$\{IMAGE_TAG:-)?([\w.]+)"
        for tag in re.findall(pattern, text):
            assert tag == __version__, file
            seen.add(file)
    assert len(seen) == 5


def test_secrets_are_read_from_their_files(tmp_path):
    command = DEPLOY / "docker" / "with-secrets"
    show = [command, sys.executable, "-c", "import os, json; print(json.dumps(dict(os.environ)))"]
    (tmp_path / "one").write_text("it's $HOME `x`\n")
    given = {"PATH": os.environ["PATH"], "PGPASSWORD_FROM_FILE": str(tmp_path / "one"),
             "API_KEY_FILE": "/left/alone"}  # fmt: skip
    done = subprocess.run(show, env=given, capture_output=True, text=True, check=True)
    environment = json.loads(done.stdout)
    assert environment["PGPASSWORD"] == "it's $HOME `x`"
    assert environment["API_KEY_FILE"] == "/left/alone"
    assert "PGPASSWORD_FROM_FILE" not in environment

    (tmp_path / "one").write_text("\n")
    for file, why in ((tmp_path / "one", "is empty"), (tmp_path / "two", "cannot be read")):
        given["PGPASSWORD_FROM_FILE"] = str(file)
        done = subprocess.run(show, env=given, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"with-secrets: PGPASSWORD is to come from {file}, which {why}\n"
