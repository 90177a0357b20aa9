"""What deploy/k8s says is so: as kustomize renders it, held to Kubernetes' own schemas."""

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import uuid
import warnings

import kubernetes_validate
import pytest
import yaml

from tests.conftest import REPOSITORY

K8S = REPOSITORY / "deploy" / "k8s"
OVERLAYS = ("base", "overlays/one-node", "overlays/gpu")
POOLS = ("cpu", "gpu")
VERSION = "1.33"  # of Kubernetes
PROBED_BY_NOTHING = {"prefect-services", "watch"}  # they answer nothing, and end if they fail
NO_KUSTOMIZE = (
    "no kustomize was found: install its program, or the library that .ci/run installs "
    "(pip install --no-deps --ignore-requires-python pykustomize)"
)

pytestmark = pytest.mark.slow


def build(folder):
    """Return what kustomize makes of a folder."""
    if shutil.which("kustomize"):
        done = subprocess.run(["kustomize", "build", folder], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return list(yaml.safe_load_all(done.stdout))
    if importlib.util.find_spec("pykustomize") is None:
        if os.environ.get("CI"):
            pytest.fail(NO_KUSTOMIZE)
        warnings.warn(f"deploy/k8s was NOT tested: {NO_KUSTOMIZE}", stacklevel=1)
        pytest.skip(NO_KUSTOMIZE)
    import pykustomize

    return list(yaml.safe_load_all(asyncio.run(pykustomize.build(folder)).yaml))


@pytest.fixture(scope="module", params=OVERLAYS)
def rendered(request):
    return build(K8S / request.param)


@pytest.fixture(scope="module")
def base():
    return build(K8S / "base")


def named(docs, kind):
    return {d["metadata"]["name"]: d for d in docs if d["kind"] == kind}


def pods(docs):
    """Return the pod templates of everything that runs, by name."""
    running = [d for d in docs if d["kind"] in ("Deployment", "StatefulSet")]
    return {d["metadata"]["name"]: d["spec"]["template"] for d in running}


def containers(pod):
    return [*pod.get("initContainers", []), *pod["containers"]]


def flow_run(pool):
    """Return the job that Prefect's worker makes of a flow run, out of the pool's template."""
    from prefect.client.schemas.objects import FlowRun
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    template = json.loads((K8S / "base" / f"pool-{pool}.json").read_text())
    values = {"env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}}  # deploy/prefect.yaml's
    job = asyncio.run(
        KubernetesWorkerJobConfiguration.from_template_and_values(
            template, values, client=object()  # which is for blocks alone, and there are none
        )
    )  # fmt: skip
    job.prepare_for_flow_run(
        FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), name="retrain", parameters={})
    )
    # Prefect insists on them in the pod, where Kubernetes passes over them
    for name in ("completions", "parallelism"):
        del job.job_manifest["spec"]["template"]["spec"][name]
    return job.job_manifest


def test_everything_is_as_kubernetes_wants_it(rendered):
    for doc in rendered:
        kubernetes_validate.validate(doc, VERSION, strict=True)
        if doc["kind"] != "Namespace":
            assert doc["metadata"]["namespace"] == "routellm", doc["metadata"]["name"]


@pytest.mark.parametrize("pool", POOLS)
def test_the_job_of_a_flow_run_is_as_kubernetes_wants_it(pool, base):
    job = flow_run(pool)
    kubernetes_validate.validate(job, VERSION, strict=True)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    environment = {one["name"]: one for one in container["env"]}
    assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]["value"] == "30"
    assert "valueFrom" in environment["PGPASSWORD"]
    assert container["args"] == ["prefect", "flow-run", "execute"]
    # of the same release as the worker that makes it
    tag = pods(base)["worker-cpu"]["spec"]["containers"][0]["image"].rpartition(":")[2]
    assert container["image"] == f"routellm/worker-{pool}:{tag}"
    asks_for_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
    assert asks_for_gpu is (pool == "gpu")


def test_nothing_runs_as_root_or_writes_its_own_file_system(rendered):
    found = pods(rendered) | {f"run-{p}": flow_run(p)["spec"]["template"] for p in POOLS}
    assert len(found) >= 8
    for name, template in found.items():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] > 0, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        speaks_to_kubernetes = pod.get("serviceAccountName") == "worker"
        assert pod.get("automountServiceAccountToken", True) is speaks_to_kubernetes, name
        for one in containers(pod):
            assert one["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, (name, one["name"])
            assert {"cpu", "memory"} <= set(one["resources"]["requests"]), (name, one["name"])
            assert "memory" in one["resources"]["limits"], (name, one["name"])
            tag = one["image"].partition(":")[2]
            assert tag not in ("", "latest"), (name, one["image"])


def test_what_answers_is_probed_and_is_what_the_probe_asks(rendered):
    for name, template in pods(rendered).items():
        (one,) = template["spec"]["containers"]
        probes = {probe for probe in one if probe.endswith("Probe")}
        if name in PROBED_BY_NOTHING:
            assert not probes
            continue
        assert probes == {"startupProbe", "livenessProbe", "readinessProbe"}, name
        ports = {port["name"] for port in one["ports"]}
        for probe in probes:
            get = one[probe].get("httpGet")
            assert get is None or get["port"] in ports, (name, probe)


def test_names_that_are_used_are_there(rendered):
    maps, accounts = named(rendered, "ConfigMap"), named(rendered, "ServiceAccount")
    claims = named(rendered, "PersistentVolumeClaim")
    secrets = {
        "routellm-secrets": {"database-prefect", "database-mlflow", "database-routellm",
                             "database-postgres", "s3-access-key", "s3-key"},
        "routellm-models": {"strong_key", "weak_key"}, "routellm-keys": {"keys.json"},
    }  # fmt: skip
    said = (K8S / "base/kustomization.yaml").read_text() + (
        K8S / "overlays/one-node/kustomization.yaml"
    ).read_text()
    for name, keys in secrets.items():
        assert name in said
        assert all(key in said for key in keys)
    found = pods(rendered) | {f"run-{p}": flow_run(p)["spec"]["template"] for p in POOLS}
    for name, template in found.items():
        pod = template["spec"]
        assert pod.get("serviceAccountName", "default") in {*accounts, "default"}, name
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        volumes |= {claim: {} for claim in ("data",) if name in ("postgres", "redis", "s3")}
        for volume in volumes.values():
            if "configMap" in volume:
                assert volume["configMap"]["name"] in maps, name
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims, name
            if "secret" in volume:
                wanted = {item["key"] for item in volume["secret"].get("items", [])}
                assert wanted <= secrets[volume["secret"]["secretName"]], name
        for one in containers(pod):
            for mount in one.get("volumeMounts", []):
                assert mount["name"] in volumes, (name, mount["name"])
            for source in one.get("envFrom", []):
                assert source["configMapRef"]["name"] in maps, name
            for entry in one.get("env", []):
                if "valueFrom" in entry:
                    ref = entry["valueFrom"]["secretKeyRef"]
                    assert ref["key"] in secrets[ref["name"]], name


def test_services_budgets_and_autoscalers_find_their_pods(rendered):
    found = pods(rendered)
    for service in named(rendered, "Service").values():
        hit = [t for t in found.values() if matches(service["spec"]["selector"], t)]
        assert len(hit) == 1, service["metadata"]["name"]
        ports = {port["name"] for port in hit[0]["spec"]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for budget in named(rendered, "PodDisruptionBudget").values():
        assert any(matches(budget["spec"]["selector"]["matchLabels"], t) for t in found.values())
    scaler = named(rendered, "HorizontalPodAutoscaler")["gateway"]["spec"]
    gateway = named(rendered, "Deployment")[scaler["scaleTargetRef"]["name"]]
    assert "replicas" not in gateway["spec"], "each apply would undo what the autoscaler did"


def test_a_worker_may_make_jobs_and_a_run_may_do_nothing(rendered):
    (role,) = named(rendered, "Role").values()
    assert not named(rendered, "ClusterRole")
    verbs = {(r, v) for rule in role["rules"] for r in rule["resources"] for v in rule["verbs"]}
    assert {("jobs", "create"), ("jobs", "watch"), ("pods", "watch"), ("pods/log", "get")} <= verbs
    assert not {r for r, _ in verbs} & {"secrets", "configmaps", "deployments"}
    (binding,) = named(rendered, "RoleBinding").values()
    assert [s["name"] for s in binding["subjects"]] == ["worker"]
    for pool in POOLS:
        pod = flow_run(pool)["spec"]["template"]["spec"]
        assert pod["serviceAccountName"] == "flow-run"


# --- who may speak to whom ---------------------------------------------------------------------


def matches(labels, template):
    return labels.items() <= template["metadata"]["labels"].items()


def selects(selector, template):
    have = template["metadata"]["labels"]
    return matches(selector.get("matchLabels", {}), template) and all(
        have.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", [])
    )


def lets(docs, source, target, port):
    """Return whether network policies let one pod reach a port of another."""
    policies = named(docs, "NetworkPolicy").values()

    def passes(one, other, direction, peers):
        mine = [p for p in policies if direction in p["spec"]["policyTypes"]
                and selects(p["spec"]["podSelector"], one)]  # fmt: skip
        assert mine, "nothing is denied by default"
        for rule in (r for p in mine for r in p["spec"].get(direction.lower(), [])):
            to = rule.get(peers)
            if port in [p["port"] for p in rule["ports"]] and (
                to is None
                or any("podSelector" in t and selects(t["podSelector"], other) for t in to)
            ):
                return True
        return False

    return passes(source, target, "Egress", "to") and passes(target, source, "Ingress", "from")


def test_each_may_reach_what_it_has_to_and_nothing_else():
    docs = build(K8S / "overlays/one-node")
    there = pods(docs) | {"flow-run": flow_run("cpu")["spec"]["template"]}
    assert {t["metadata"]["labels"]["app.kubernetes.io/name"] for t in there.values()} == set(there)
    port = {"gateway": 6060, "mlflow": 5000, "prefect-server": 4200, "postgres": 5432,
            "redis": 6379, "s3": 9000}  # fmt: skip
    allowed = {
        (one, other) for one in there for other in port
        if one != other and lets(docs, there[one], there[other], port[other])
    }  # fmt: skip
    assert allowed == {
        ("gateway", "mlflow"), ("gateway", "postgres"),
        ("mlflow", "postgres"), ("mlflow", "s3"),
        ("prefect-server", "postgres"), ("prefect-server", "redis"),
        ("prefect-services", "postgres"), ("prefect-services", "redis"),
        ("worker-cpu", "prefect-server"), ("watch", "prefect-server"),
        ("flow-run", "prefect-server"), ("flow-run", "mlflow"), ("flow-run", "gateway"),
        ("flow-run", "postgres"), ("flow-run", "s3"),
    }  # fmt: skip


def test_who_uses_the_home_is_on_one_node():
    watch = pods(build(K8S / "base"))["watch"]
    run = flow_run("cpu")["spec"]["template"]
    (term,) = run["spec"]["affinity"]["podAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    assert selects(term["labelSelector"], watch)
    for template in (watch, run):
        claims = [v["persistentVolumeClaim"]["claimName"] for v in template["spec"]["volumes"]
                  if "persistentVolumeClaim" in v]  # fmt: skip
        assert claims == ["home"]
