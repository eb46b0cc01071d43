"""What docs/serving.md ships: the manifest for Kubernetes, and the dashboard for Grafana."""

import json
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import kubernetes_validate
import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML

from megatron.config.load import config_from_flat
from megatron.serving.app import State, make_app
from megatron.serving.gate import OPEN
from megatron.serving.http_thread import LAST_ANSWERS_SECONDS
from megatron.serving.loop import EngineLoop
from megatron.serving.metrics import Metrics

FOLDER = Path(__file__).parents[2] / "docs" / "serving"
YAML_1_2 = YAML(typ="safe", pure=True)
RESOURCES = list(YAML_1_2.load_all((FOLDER / "kubernetes.yml").read_text()))
DASHBOARD = json.loads((FOLDER / "grafana.json").read_text())
# those of the row Training are asked of a real run, in tests/end_to_end/test_watching.py
QUERIES = [
    target["expr"]
    for panel in takewhile(lambda panel: panel["title"] != "Training", DASHBOARD["panels"])
    for target in panel["targets"]
]
ADDED_BY_PROMETHEUS = {"instance", "job"}
MODEL = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 1, "seq_length": 4096}  # what `load` would tell


def resource(kind: str) -> dict[str, object]:
    [found] = [one for one in RESOURCES if one["kind"] == kind]
    return found


@pytest.fixture(scope="module")
def figures() -> dict[str, set[str]]:
    """The labels of each figure that a server has, once it has answered."""
    metrics = Metrics()
    metrics.observe_request("/generate", 200, 1.0)
    metrics.observe_error("timeout")
    page = metrics.page().decode()
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples if not sample.name.endswith("_created")}


@pytest.mark.parametrize("kind", [one["kind"] for one in RESOURCES])
def test_kubernetes_accepts_each_resource(kind):
    kubernetes_validate.validate(resource(kind), kubernetes_validate.latest_version(), strict=True)


def test_a_field_that_kubernetes_does_not_have_is_found():
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            {**resource("Service"), "specs": {}}, kubernetes_validate.latest_version(), strict=True
        )


def test_the_manifest_fits_the_server_and_itself():
    config = config_from_flat(MODEL | YAML_1_2.load(resource("ConfigMap")["data"]["served.yml"]))
    pod = resource("Deployment")["spec"]["template"]
    [container] = pod["spec"]["containers"]
    [port] = container["ports"]
    assert port["containerPort"] == config.serving.serve_port
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(config.serving.serve_port)
    assert pod["metadata"]["labels"] == resource("Service")["spec"]["selector"]
    assert resource("Service")["spec"]["ports"][0]["targetPort"] == port["name"]
    patience = config.serving.serve_shutdown_timeout + LAST_ANSWERS_SECONDS
    assert pod["spec"]["terminationGracePeriodSeconds"] > patience
    assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["spec"]["volumes"]}
    assert config.checkpoint.load.removeprefix("hf:").startswith(container["volumeMounts"][1]["mountPath"])


def test_probes_and_prometheus_ask_for_paths_that_the_server_has():
    pod = resource("Deployment")["spec"]["template"]
    [container] = pod["spec"]["containers"]
    routes = make_app(State(), EngineLoop(Metrics(), 1, 1.0), Metrics(), log_prompts=False).routes
    probes = {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert probes <= set(OPEN)  # the kubelet has no key
    assert {*probes, pod["metadata"]["annotations"]["prometheus.io/path"]} <= {route.path for route in routes}


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_of_the_dashboard_asks_for_figures_and_labels_that_exist(query, figures):
    for name, labels in asked(query):
        assert name in figures
        assert labels <= figures[name] | ADDED_BY_PROMETHEUS


def test_every_figure_of_the_server_is_on_the_dashboard(figures):
    shown = {name.removesuffix("_bucket") for query in QUERIES for name, _ in asked(query)}
    missing = {name.removesuffix("_bucket") for name in figures if not name.endswith(("_sum", "_count"))} - shown
    assert not missing


def asked(query: str) -> Iterator[tuple[str, set[str]]]:
    """Each figure of a query, with the labels by which it is chosen or summed."""
    found: list[tuple[str, set[str]]] = []
    summed: set[str] = set()

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            summed.update(node.modifier.labels)
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node.name, {matcher.name for matcher in node.matchers.matchers} | summed))

    promql_parser.walk(promql_parser.parse(query.replace("$__rate_interval", "5m")), visit)
    assert found
    return iter(found)
