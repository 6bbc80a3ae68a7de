"""infra/: everything that can be known without a cluster; and each check finds the error that is planted for it."""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_lines
import dockerfile
import jsonschema
import manifests
import metrics_names
import pytest
import yaml
from kustomize import Doc, Refused, render

from jobs import backfill
from jobs.rayjob import _LIKE as LIKE

ROOT = Path(__file__).parents[1]
K8S = ROOT / "infra" / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
MONITORING = K8S / "monitoring"
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
DOCKERFILE, IGNORED = ((ROOT / "infra" / name).read_text() for name in ("Dockerfile", "Dockerfile.dockerignore"))


@functools.cache
def _rendered(name: str) -> list[Doc]:
    return render(K8S / "overlays" / name)


def overlay(name: str) -> list[Doc]:
    """Its resources, to be changed at will."""
    return copy.deepcopy(_rendered(name))


def the(docs: list[Doc], kind: str) -> Doc:
    """The first resource of a kind."""
    return next(doc for doc in docs if doc["kind"] == kind)


def command_problems(docs: list[Doc]) -> list[str]:
    """What is wrong with the commands in manifests; every job is given the files that Ray's head mounts."""
    files = {f"/etc/twotower/{key}": text for key, text in manifests.config_maps(docs)["twotower-settings"].items()}
    return [
        f"{where}: {problem}"
        for where, words, environment, in_shell in manifests.commands(docs)
        for problem in command_lines.problems(words, environment, files, in_shell=in_shell)
    ]


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_has_no_problem(name: str) -> None:
    docs = overlay(name)
    assert manifests.problems(docs) == []
    assert command_problems(docs) == []
    assert len(list(manifests.commands(docs))) == 4  # backfill, reindex, the CronJob's own, the status page


def test_the_monitoring_has_no_problem() -> None:
    docs = render(MONITORING)
    assert manifests.problems(docs) == []
    assert json.loads(the(docs, "ConfigMap")["data"]["twotower.json"]) == DASHBOARD


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which carries kustomize, is not installed")
@pytest.mark.parametrize("folder", [*(f"overlays/{name}" for name in OVERLAYS), "monitoring"])
def test_kustomize_makes_the_same_of_it(folder: str) -> None:
    done = subprocess.run(["kubectl", "kustomize", str(K8S / folder)], capture_output=True, text=True, check=True)

    def key(doc: Doc) -> tuple[str, str]:
        return doc["kind"], doc["metadata"]["name"]

    theirs = sorted((doc for doc in yaml.safe_load_all(done.stdout)), key=key)
    assert sorted(render(K8S / folder), key=key) == theirs


def planted(change: Callable[[list[Doc]], object]) -> list[Doc]:
    docs = overlay("gpu")
    change(docs)
    return docs


def rayjob(change: Callable[[Doc], object]) -> Callable[[list[Doc]], object]:
    return lambda docs: change(the(docs, "RayJob")["spec"])


def toml(old: str, new: str) -> Callable[[list[Doc]], object]:
    def change(docs: list[Doc]) -> None:
        data = next(d for d in docs if d["metadata"]["name"] == "twotower-settings")["data"]
        assert old in data["twotower.toml"]
        data["twotower.toml"] = data["twotower.toml"].replace(old, new)

    return change


def head(spec: Doc) -> Doc:
    return spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]


def worker(spec: Doc, number: int = 0) -> Doc:
    return spec["rayClusterSpec"]["workerGroupSpecs"][number]


def container(pod: Doc) -> Doc:
    return pod["spec"]["containers"][0]


def sidecar(spec: Doc) -> None:
    spec["submissionMode"] = "SidecarMode"


def selects_a_cluster(spec: Doc) -> None:
    del spec["rayClusterSpec"], spec["suspend"]
    spec["clusterSelector"] = {"ray.io/cluster": "shared"}


def renamed(kind: str, name: str) -> Callable[[list[Doc]], object]:
    return lambda docs: the(docs, kind)["metadata"].update(name=name)


MANIFEST_FAULTS: list[tuple[Callable[[list[Doc]], object], str]] = [
    (rayjob(lambda s: s.update(shutdownAfterJobFinish=s.pop("shutdownAfterJobFinishes"))),
     "'shutdownAfterJobFinish' was unexpected"),
    (rayjob(lambda s: worker(s).update(maxReplica=3)), "'maxReplica' was unexpected"),
    (rayjob(lambda s: s.update(submissionMode="K8SJobMode")), "submissionMode K8SJobMode does not exist"),
    (rayjob(lambda s: s.update(shutdownAfterJobFinishes=False)), "a TTL without shutdownAfterJobFinishes"),
    (rayjob(selects_a_cluster), "clusterSelector with a backoffLimit"),
    (rayjob(sidecar), "SidecarMode with settings of a submitter"),
    (rayjob(lambda s: head(s).update(restartPolicy="Always")), "group head: restartPolicy Always with autoscaler v2"),
    (rayjob(lambda s: worker(s)["template"]["spec"].update(restartPolicy="OnFailure")),
     "group gpu: restartPolicy OnFailure with autoscaler v2"),
    (rayjob(lambda s: s["rayClusterSpec"].pop("rayVersion")), "authentication without rayVersion"),
    (rayjob(lambda s: s["rayClusterSpec"].update(rayVersion="2.51.0")), "is not that of constraints.txt"),
    (rayjob(lambda s: s["rayClusterSpec"].pop("authOptions")), "the cluster asks for no token"),
    (rayjob(lambda s: s["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].pop("num-cpus")), "the head takes tasks"),
    (rayjob(lambda s: s.update(entrypointNumGpus=1)), "entrypointNumGpus takes from the pool"),
    (rayjob(lambda s: s.update(runtimeEnvYAML="env_vars")), "runtimeEnvYAML is no YAML mapping"),
    (rayjob(lambda s: head(s)["containers"][0].pop("readinessProbe")), "group head: no readinessProbe"),
    (rayjob(lambda s: head(s)["containers"][0]["resources"].pop("limits")), "'limits' is a required property"),
    (rayjob(lambda s: head(s)["volumes"].pop()), "there is no volume shm"),
    (rayjob(lambda s: head(s)["volumes"][1]["emptyDir"].pop("medium")), "/dev/shm is no emptyDir in memory"),
    (rayjob(lambda s: worker(s)["rayStartParams"].update({"object-store-memory": "4000000000"})),
     "object-store-memory does not fit into /dev/shm"),
    (rayjob(lambda s: container(worker(s)["template"])["resources"]["limits"].update({"nvidia.com/gpu": 2})),
     "GPUs requested are not the limit"),
    (rayjob(lambda s: worker(s).update(maxReplicas=4)), "pool.actors = 8, and the worker groups hold 4 at most"),
    (rayjob(lambda s: worker(s).update(minReplicas=9)), "group gpu: not minReplicas <= replicas"),
    (rayjob(lambda s: worker(s, 1).update(groupName="gpu")), "two groups of one name"),
    (rayjob(lambda s: worker(s)["template"]["spec"].update(serviceAccountName="twotwer")), "no ServiceAccount twotwer"),
    (rayjob(lambda s: worker(s)["template"]["metadata"]["labels"].clear()), "no NetworkPolicy selects this pod"),
    (rayjob(lambda s: head(s)["securityContext"].update(runAsNonRoot=False)), "True was expected"),
    (rayjob(lambda s: head(s)["containers"][0].update(image="shop/twotower:latest")), "has no version"),
    (rayjob(lambda s: container(s["submitterPodTemplate"])["envFrom"][0]["configMapRef"].update(name="x")),
     "there is no ConfigMap x"),
    (renamed("RayJob", "t" * 48), "is longer than 47 characters"),
    (renamed("RayJob", "Twotower_1"), "is no DNS label"),
    (renamed("CronJob", "t" * 40), "is longer than 32 characters"),
    (toml("decode_threads = 30", "decode_threads = 99"), "99 decode_threads an actor, on 31 CPUs"),
    (toml("gpus_per_actor = 1\n", ""), "set pool.actors and pool.gpus_per_actor"),
    (toml("gpus_per_actor = 1\n", "gpus_per_actor = 0\n"), "actors that reserve nothing"),
    (toml("decode_threads", "decode_thread"), "unknown setting pool.decode_thread"),
    (lambda docs: the(docs, "CronJob")["spec"].update(concurrencyPolicy="Allow"), "two runs at once are not forbidden"),
    (lambda docs: the(docs, "CronJob")["spec"].update(schedule="at night"), "'at night' does not match"),
    (lambda docs: the(docs, "CronJob")["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]
     .update(containerName="waits"), "names a container that does not exist"),
    (lambda docs: container(the(docs, "CronJob")["spec"]["jobTemplate"]["spec"]["template"])["args"]
     .__setitem__(1, "--name=$(JOB_NAME)"), "a Job of the name that this Job has"),
    (lambda docs: the(docs, "RoleBinding")["roleRef"].update(name="other"), "there is no Role other"),
    (lambda docs: the(docs, "Role")["rules"][0].update(verbs=["*"]), "allows everything"),
    (lambda docs: the(docs, "NetworkPolicy")["spec"]["ingress"][1].pop("ports"), "lets others reach all ports"),
    (lambda docs: the(docs, "NetworkPolicy")["spec"]["policyTypes"].remove("Ingress"), "lets everyone in"),
    (lambda docs: the(docs, "Deployment")["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["tcpSocket"]
     .update(port="metric"), "names the port metric, which does not exist"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), MANIFEST_FAULTS, ids=[said for _, said in MANIFEST_FAULTS])
def test_a_planted_error_in_a_manifest_is_found(change: Callable[[list[Doc]], object], said: str) -> None:
    assert any(said in problem for problem in manifests.problems(planted(change)))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("jobs.backfill", "jobs.bakfill", "there is no job bakfill"),
        ("--json", "--jsn", "jobs.backfill does not take"),
        ("--json", "--set pool.actor=2", "unknown setting pool.actor"),
        ("--json", "--set pool.actors=many", "pool.actors takes"),
        ("$CATALOG", "$CATALOGUE", "names a variable that is not set"),
        ("/etc/twotower/twotower.toml", "/etc/twotower/other.toml", "no pod mounts /etc/twotower/other.toml"),
        ("python -m jobs.backfill", "backfill", "is no job of ours"),
    ],
)
def test_a_planted_error_in_an_entrypoint_is_found(old: str, new: str, said: str) -> None:
    def change(spec: Doc) -> None:
        assert old in spec["entrypoint"]
        spec["entrypoint"] = spec["entrypoint"].replace(old, new)

    assert any(said in problem for problem in command_problems(planted(rayjob(change))))


def test_a_planted_error_in_the_cronjobs_inner_command_is_found() -> None:
    def change(docs: list[Doc]) -> None:
        args = the(docs, "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["args"]
        args[-1] = args[-1].replace("--json", "--confirm-delete 3 --jsno")

    assert any("jobs.reindex does not take" in problem for problem in command_problems(planted(change)))


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_shell_hands_the_entrypoint_on_as_it_is_meant(name: str) -> None:
    """KubeRay's submitter puts the entrypoint behind `ray job submit --` in a script for bash."""
    docs = overlay(name)
    settings = manifests.config_maps(docs)["twotower-run"]
    script = 'ray() { printf "%s\\n" "$@"; }; ray job submit -- ' + the(docs, "RayJob")["spec"]["entrypoint"]
    done = subprocess.run(["bash", "-ce", script], env=settings, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()[3:]
    assert words[:3] == ["python", "-m", "jobs.backfill"]
    given = vars(backfill.parser().parse_args(words[3:]))
    assert [given[key] for key in ("catalog", "db", "model")] == [settings[key] for key in ("CATALOG", "DB", "MODEL")]


def test_the_cronjob_asks_for_a_rayjob_that_is_there() -> None:
    docs = overlay("gpu")
    container = the(docs, "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    assert f"--like={the(docs, 'RayJob')['metadata']['name']}" in container["args"]
    assert the(docs, "RayJob")["spec"]["suspend"]
    assert set(the(docs, "Role")["rules"][0]["verbs"]) == {"get", "list", "create"}
    assert re.fullmatch(r"[a-z]+/[a-z]+", LIKE)  # a label's key


KUSTOMIZE_FAULTS: list[tuple[str, str, str, str]] = [
    ("base/kustomization.yaml", "- status.yaml", "- stats.yaml", "names stats.yaml, which does not exist"),
    ("base/kustomization.yaml", "namespace:", "nameSpace:", "unknown keys: nameSpace"),
    ("base/kustomization.yaml", "- status.yaml", "- status.yaml\n  - status.yaml", "resources of the same name"),
    ("overlays/gpu/kustomization.yaml", "../../base", "../../bases", "which does not exist"),
    ("overlays/gpu/kustomization.yaml", "name: twotower-run", "name: twotower-runs", "no resource matches the patch"),
    ("overlays/gpu/kustomization.yaml", "kind: RayJob", "kind: RayCluster", "no resource is the target"),
    ("overlays/gpu/kustomization.yaml", "workerGroupSpecs/1/", "workerGroupSpecs/2/", "meets nothing in RayJob"),
    ("overlays/gpu/kustomization.yaml", "/maxReplicas,", "/maxReplica,", "meets nothing in RayJob"),
    ("overlays/gpu/kustomization.yaml", "- name: twotower\n", "- name: towtower\n", "no container has the image"),
    ("monitoring/kustomization.yaml", "=dashboard.json", "=dashbord.json", "names dashbord.json, which does not exist"),
]


@pytest.mark.parametrize(("file", "old", "new", "said"), KUSTOMIZE_FAULTS)
def test_a_planted_error_in_a_kustomization_is_found(tmp_path: Path, file: str, old: str, new: str, said: str) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    path = tmp_path / "k8s" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(Refused, match=said):
        render(tmp_path / "k8s" / ("monitoring" if "monitoring" in file else "overlays/gpu"))


@pytest.fixture(scope="module")
def kuberay(shared: Path) -> jsonschema.Draft202012Validator:
    """KubeRay's own definition of a RayJob, where it is at hand."""
    file = shared / "reference" / "kuberay" / "rayjobs.yaml"
    if not file.is_file():
        pytest.skip("KubeRay's definitions are not there")
    with file.open() as stream:
        told = yaml.load(stream, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(version for version in told["spec"]["versions"] if version["name"] == "v1")
    schema = manifests.openapi(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", OVERLAYS)
def test_kuberays_own_definition_takes_the_rayjob(kuberay: jsonschema.Draft202012Validator, name: str) -> None:
    assert [error.message for error in kuberay.iter_errors(the(overlay(name), "RayJob"))] == []


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(shutdownAfterJobFinish=True),
        lambda s: s.update(ttlSecondsAfterFinished="soon"),
        lambda s: s["rayClusterSpec"]["authOptions"].update(mode="tokens"),
        lambda s: worker(s).pop("groupName"),
        lambda s: head(s)["containers"][0].update(volumeMount=[]),
        lambda s: s["rayClusterSpec"]["autoscalerOptions"].update(version="v3"),
    ],
    ids=["field", "type", "value", "missing", "deep", "autoscaler"],
)
def test_kuberays_own_definition_finds_a_planted_error(
    kuberay: jsonschema.Draft202012Validator, change: Callable[[Doc], object]
) -> None:
    docs = planted(rayjob(change))
    assert list(kuberay.iter_errors(the(docs, "RayJob")))
    assert manifests.problems(docs), "our own schema sees it too"


def test_the_metrics_that_dashboards_rely_on_are_in_the_code() -> None:
    code = metrics_names.names_in_code()
    assert code == set(metrics_names.CONTRACT)
    labels = metrics_names.labels_in_code()
    assert {"twotower_release_rejects", "twotower_last_run_seconds"} < set(labels)
    for name, found in labels.items():
        assert metrics_names.CONTRACT[name].labels == found, name


def expressions() -> list[tuple[str, str]]:
    """Every query of the dashboard, and every expression of the rules."""
    found = [
        (f"panel {panel['title']}", target["expr"])
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", [])
    ]
    for name, rule in rules().items():
        found.append((f"rule {name}", rule["expr"]))
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()
            inner = f"rate({metric}[5m])" if metric.endswith("_total") else metric
            found.append((f"variable {variable['name']}", f"count by ({label}) ({inner})"))
    return found


@functools.cache
def rules() -> dict[str, Any]:
    groups = the(render(MONITORING), "PrometheusRule")["spec"]["groups"]
    return {rule.get("record") or rule["alert"]: rule for group in groups for rule in group["rules"]}


def recorded() -> dict[str, set[str]]:
    return {name: metrics_names.labels_of(rule["expr"]) for name, rule in rules().items() if "record" in rule}


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_a_query_asks_for_what_exists(where: str, expression: str) -> None:
    assert list(metrics_names.problems(expression, recorded())) == []


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("rate(ray_twotower_input_total[5m])", "the metric ray_twotower_input_total does not exist"),
        ("rate(ray_twotower_inputs[5m])", "does not exist"),
        ("max(twotower_release_age_second)", "does not exist"),
        ("sum(rate(ray_twotower_inputs_total[5m])", "is no PromQL"),
        ("sum by (outcomes) (rate(ray_twotower_inputs_total[5m]))", "the label outcomes"),
        ('rate(ray_twotower_inputs_total{stage="read"}[5m])', "has no label stage"),
        ("sum(ray_twotower_inputs_total)", "is a counter: take its rate"),
        ("rate(twotower_release_products[5m])", "is a gauge: it has no rate"),
        ("twotower:inputs:rate1h > 0", "does not exist"),
    ],
)
def test_a_planted_error_in_a_query_is_found(expression: str, said: str) -> None:
    assert any(said in problem for problem in metrics_names.problems(expression, recorded()))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, which comes with Prometheus, is not installed")
def test_the_alerts_fire_when_they_should(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(the(render(MONITORING), "PrometheusRule")["spec"]))
    shutil.copy(ROOT / "tests" / "promtool_rules.yaml", tmp_path / "test.yaml")
    done = subprocess.run(["promtool", "test", "rules", str(tmp_path / "test.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_one() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel.get("description") for panel in panels if panel["type"] != "row")
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not mine & cells, f"{panel['title']} lies on another panel"
        cells |= mine
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)\}?", json.dumps(DASHBOARD))) - {"__rate_interval"}
    assert used == variables


def test_the_dockerfile_has_no_problem() -> None:
    assert dockerfile.problems(DOCKERFILE, IGNORED) == []


DOCKERFILE_FAULTS: list[tuple[str, str, str]] = [
    ("python:3.11.14-slim-bookworm\n", "python\n", "pinned neither by tag nor by digest"),
    ("python:3.11.14-slim-bookworm\n", "python:latest\n", "pinned neither by tag nor by digest"),
    ("USER 1000:1000", "USER root", "USER is root"),
    ("USER 1000:1000\n", "", "USER is not set"),
    ("COPY jobs jobs", "ADD jobs jobs", "COPY does not"),
    ("COPY jobs jobs", "ADD https://shop.example/jobs.tar jobs", "COPY does not"),
    ("COPY jobs jobs", "COPY jbos jobs", "it does not exist"),
    ("COPY jobs jobs", "COPY tests tests", "the .dockerignore keeps it out"),
    ("COPY --from=model", "COPY --from=models", "there is no such stage"),
    ("--no-install-recommends ", "", "DL3015"),
    ("    && rm -rf /var/lib/apt/lists/* \\\n", "", "the removal of lists"),
    ("apt-get update \\\n    && ", "", "update, install"),
    ("--constraint constraints.txt setuptools", "setuptools", "without constraints.txt"),
    ('ENTRYPOINT ["python", "-m"]', "ENTRYPOINT python -m", "ENTRYPOINT is not in exec form"),
    ("python -m jobs.check_model", "echo", "the model folder is not checked"),
    ("FROM app AS cuda", "FROM app AS gpu", "there is no target cuda"),
    ("ARG MODEL=demo", "ARG MODEL=demo\nARG HF_TOKEN", "a secret would stay in the image"),
    ("RUN python -c", "RUM python -c", "DL1000"),
]


@pytest.mark.parametrize(("old", "new", "said"), DOCKERFILE_FAULTS)
def test_a_planted_error_in_the_dockerfile_is_found(old: str, new: str, said: str) -> None:
    assert old in DOCKERFILE
    found = dockerfile.problems(DOCKERFILE.replace(old, new), IGNORED)
    assert any(said in problem for problem in found), found


def test_the_table_of_sizes_follows_from_its_formulas() -> None:
    readme = (ROOT / "infra" / "README.md").read_text().split("## Sizes")[1]
    table = {
        row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]]
        for row in readme.split("| | 1 million |")[1].splitlines()
        if row.startswith("| ")
    }
    i, v, t, h, s, w, q = 2, 3072, 600, 10_150, 100_000, 2900, 775
    for column, products in enumerate([10**6, 10**7, 10**8]):
        hours = {cpus: (products * i / r + products / w) / 3600 for cpus, r in ((32, 903), (4, 220))}
        figures = {
            "`products`": products * (3 * v + t) / 1e9,
            "`images`": products * i * (v + h) / 1e9,
            "indices": 3 * products * q / 1e9,
            "staged": (products * (v + 300) + products * i * (v + h)) / 1e9,
            "GPU-hours with 32": hours[32],
            "GPU-hours with 4": hours[4],
            "minutes on 8": hours[32] / 8 * 60,
            "partitions": products * i * s / 256e6,
            "index:": min(max(products / 800, 16), 4096),
        }
        for name, figure in figures.items():
            told = next(cells for label, cells in table.items() if label.startswith(name))[column]
            assert float(told.removesuffix(" GB").replace(",", "")) == pytest.approx(figure, rel=0.02), (name, told)


def test_the_readme_names_what_is_there() -> None:
    readme = (ROOT / "infra" / "README.md").read_text()
    for name in OVERLAYS:
        assert f"overlays/{name}" in readme
    for path in re.findall(r"infra/[\w/.-]+\w", readme):
        assert (ROOT / path).exists(), path
