"""`fae doctor`: arithmetic on nodes that are not there, and buckets on a server that is."""

from __future__ import annotations

import http.server
import math
import socket
import threading
from dataclasses import replace

import boto3
import pytest
from click.testing import Result
from typer.testing import CliRunner

from fae.cli import app
from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.config.sections import TrackingSection
from fae.pipelines.doctor.bucket import RULE_ID, check_bucket, clock_skew, covering_rule
from fae.pipelines.doctor.cluster import check_fit, matches
from fae.pipelines.doctor.diagnosis import check_tracking, doctor
from fae.pipelines.doctor.nodes import Node, check_nodes
from fae.pipelines.runtime.packages import versions
from fae_core.errors import UserError
from tests.fault_proxy import FaultProxy

GIB = float(2**30)


def cpu_node(name: str = "c1", cpus: float = 16, store: float = 10 * GIB) -> Node:
    return Node(name, cpus, 0, store, {"fae-nodes": "cpu"}, 12 * GIB, versions())


def gpu_node(name: str = "g1", gpus: float = 1, cpus: float = 8) -> Node:
    return Node(name, cpus, gpus, 10 * GIB, {"fae-nodes": "gpu"}, 12 * GIB, versions())


def fit(nodes, *overrides, scaled=None):
    """Findings about precompute by subject; training wants one CPU only."""
    small = [
        f"{name}.training.{key}"
        for name in ("autoencoder", "pixel_decoder", "generator")
        for key in ("num_workers=1", "use_gpu=false")
    ]
    recipe = load_recipe("photos-dinov2s", [*small, "precompute.shard_size=512", *overrides])
    return {finding.subject: finding for finding in check_fit(recipe, nodes, scaled)}


EIGHT = ["precompute.num_actors=8", "precompute.gpus_per_actor=1"]


# The cluster


def test_eight_gpu_actors_fit_on_eight_gpu_nodes_and_not_on_five():
    eight = [cpu_node(), *(gpu_node(f"g{i}") for i in range(8))]
    assert fit(eight, *EIGHT)["actors"].level == "ok"
    found = fit(eight[:6], *EIGHT)["actors"]
    assert found.level == "problem"
    for word in ("5 fit", "GPU nodes are missing", "precompute.num_actors=5"):
        assert word in found.message


def test_actors_that_share_a_gpu_or_lack_its_cpus_are_counted_by_both():
    shared = [*EIGHT[:1], "precompute.gpus_per_actor=0.5"]
    assert fit([cpu_node(), gpu_node(gpus=4)], *shared)["actors"].level == "ok"
    assert "2 fit" in fit([gpu_node(gpus=8, cpus=2)], *EIGHT)["actors"].message


def test_what_an_autoscaler_may_still_bring_is_no_problem():
    scaled = {"GPU": 8.0, "CPU": 64.0}
    found = fit([cpu_node()], *EIGHT, scaled=scaled)["actors"]
    assert found.level == "warning" and "autoscaler" in found.message
    assert fit([cpu_node()], *EIGHT, scaled={"GPU": 7.0})["actors"].level == "problem"


def test_a_head_without_cpus_may_be_all_that_is_up_before_an_autoscaler_starts_nodes():
    unknown = {"CPU": math.inf, "GPU": math.inf}
    recipe = load_recipe("photos-dinov2s", EIGHT)
    found = list(check_fit(recipe, [cpu_node(cpus=0)], unknown))
    assert {finding.level for finding in found} == {"warning"}
    assert {f.subject for f in found} == {"actors", "decode", "training"}
    assert all("autoscaler" in f.message for f in found if f.subject != "training")
    assert "limits" in fit([cpu_node(cpus=0)], *EIGHT, scaled=unknown)["actors"].message
    at_its_limit = fit([cpu_node(cpus=1)], scaled={"CPU": 1.0})["decode"]
    assert at_its_limit.level == "problem"
    assert {f.level for f in check_fit(recipe, [cpu_node(cpus=0)])} == {"problem"}


def test_decode_needs_a_cpu_beside_the_actors():
    full = ["precompute.num_actors=2", "precompute.cpus_per_actor=1"]
    found = fit([cpu_node(cpus=2)], *full)["decode"]
    assert found.level == "problem" and "wait for ever" in found.message
    assert fit([cpu_node(cpus=3)], *full)["decode"].level == "ok"


def test_decode_needs_a_cpu_beside_a_trainings_workers():
    full = ["autoencoder.training.num_workers=2", "autoencoder.training.cpus_per_worker=1"]
    recipe = load_recipe("photos-dinov2s", full)
    text = "autoencoder.training.num_workers=2, each 1 CPU, leave no 0.5 CPU"
    found = [f for f in check_fit(recipe, [cpu_node(cpus=2)]) if text in f.message]
    assert [f.level for f in found] == ["problem"]
    assert not [f for f in check_fit(recipe, [cpu_node(cpus=3)]) if text in f.message]


def test_decode_on_nodes_that_no_label_names_is_a_problem_that_shows_the_labels():
    labelled = "precompute.decode_labels.fae-nodes=cpu"
    assert "16" not in fit([gpu_node()], labelled)["decode"].message
    found = fit([gpu_node()], labelled)["decode"]
    assert found.level == "problem" and "fae-nodes=gpu" in found.message
    assert "30 tasks" in fit([cpu_node(), gpu_node()], labelled)["decode"].message  # one actor


def test_unlabelled_decoding_beside_gpu_actors_is_advised_against():
    nodes = [cpu_node(), gpu_node()]
    one = ["precompute.num_actors=1", "precompute.gpus_per_actor=1"]
    assert fit(nodes, *one)["decode"].level == "warning"
    assert fit(nodes, *one, "precompute.decode_labels.fae-nodes=cpu")["decode"].level == "ok"


def test_shards_in_flight_are_compared_with_the_object_stores():
    # 512 × 256 × 256 × 3 bytes are 101 MB; 32 decodes and 2 queued are 3.4 GB.
    assert fit([cpu_node(cpus=17)])["object store"].level == "ok"
    assert "34 at once are 3.4 GB" in fit([cpu_node(cpus=17)])["object store"].message
    assert fit([cpu_node(cpus=17, store=2 * GIB)])["object store"].level == "warning"
    found = fit([cpu_node(store=90e6)])["object store"]
    assert found.level == "problem" and "precompute.shard_size" in found.message


@pytest.mark.parametrize(
    ("selector", "fits"),
    [
        ("cpu", True),
        ("gpu", False),
        ("!gpu", True),
        ("!cpu", False),
        ("in(gpu, cpu)", True),
        ("!in(gpu, cpu)", False),
    ],
)
def test_label_selectors_mean_what_ray_means_by_them(selector, fits):
    assert matches(cpu_node(), {"fae-nodes": selector}) == fits


def test_other_versions_and_small_shm_are_found_on_the_node_that_has_them():
    old = Node("c2", 4, 0, GIB, {}, 12 * GIB, {**versions(), "torch": "1.0"})
    small = Node("c3", 4, 0, 8 * GIB, {}, 64e6, versions())
    found = {f.subject: f for f in check_nodes([cpu_node(), old, small])}
    assert found["versions"].level == "problem" and "c2 has torch 1.0" in found["versions"].message
    assert found["/dev/shm"].level == "warning" and "c3" in found["/dev/shm"].message


def test_a_full_disk_and_a_wrong_clock_are_found_on_the_node_that_has_them():
    full = replace(cpu_node("c2"), disk=("/tmp", 1e9, 100e9))
    late = replace(cpu_node("c3"), disk=("/tmp", 50e9, 100e9), clock_ahead=-3600.0)
    found = {f.subject: f for f in check_nodes([cpu_node(), full, late])}
    assert found["disk"].level == "problem" and "c2 has 1.0 GB of 100.0 GB" in found["disk"].message
    assert found["clock"].level == "problem" and "c3 is 3600 s behind" in found["clock"].message
    found = {f.subject: f for f in check_nodes([replace(late, clock_ahead=-60.0)])}
    assert found["disk"].level == "ok" and found["clock"].level == "ok"


@pytest.mark.parametrize("kind", ["closed", "full", "silent", "other"])
def test_an_address_without_ray_is_an_error_at_once(monkeypatch, kind):
    monkeypatch.setattr("fae.pipelines.runtime.session.CONNECT_SECONDS", 1.0)
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("ray.init waits for minutes"))
    attempts = []
    connect = socket.create_connection

    def recorded(address, timeout):
        attempts.append((address, timeout))
        return connect(address, timeout)

    monkeypatch.setattr("fae.pipelines.runtime.session.socket.create_connection", recorded)
    with socket.socket() as listener, socket.socket() as queued:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        if kind == "full":  # the kernel then drops what knocks, as a firewall does
            listener.listen(0)
            queued.connect(("127.0.0.1", port))
        elif kind != "closed":
            listener.listen()
        if kind == "other":

            def answer() -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

            threading.Thread(target=answer, daemon=True).start()
        said = "another kind of server" if kind == "other" else ".*"
        with pytest.raises(UserError, match=f"tried port {port} of 127.0.0.1.*{said}.*6379"):
            doctor([], address=f"127.0.0.1:{port}")
        assert attempts == [(("127.0.0.1", port), 1.0)]


# A bucket


@pytest.fixture
def client(s3_server, monkeypatch):
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "not-for-messages",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    made = boto3.client("s3", endpoint_url=s3_server)
    made.create_bucket(Bucket="doctor")
    made.put_object(Bucket="doctor", Key="latents/kept", Body=b"x")
    yield made
    for item in made.list_objects_v2(Bucket="doctor").get("Contents", []):
        made.delete_object(Bucket="doctor", Key=item["Key"])
    made.delete_bucket(Bucket="doctor")


def test_a_good_bucket_passes_and_is_left_as_it_was(client):
    found = {f.subject: f for f in check_bucket("s3://doctor/latents")}
    names = ["list", "clock", "write, read", "write once", "multipart", "lifecycle"]
    assert list(found) == names
    assert {name: found[name].level for name in names[:-1]} == dict.fromkeys(names[:-1], "ok")
    assert [o["Key"] for o in client.list_objects_v2(Bucket="doctor")["Contents"]] == [
        "latents/kept"
    ]
    assert "Uploads" not in client.list_multipart_uploads(Bucket="doctor")


def test_a_server_that_reads_no_ranges_is_a_problem(client, s3_server, monkeypatch):
    with FaultProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert {f.subject: f for f in check_bucket("s3://doctor/x")}["write, read"].level == "ok"
        proxy.ignores_ranges = True
        *_, found = check_bucket("s3://doctor/x")
    assert (found.subject, found.level) == ("write, read", "problem")
    assert "does not read in ranges" in found.message


def test_the_lifecycle_rule_is_offered_then_added_beside_the_others(client):
    other = {
        "ID": "theirs",
        "Status": "Enabled",
        "Filter": {"Prefix": "tmp/"},
        "Expiration": {"Days": 3},
    }
    client.put_bucket_lifecycle_configuration(
        Bucket="doctor", LifecycleConfiguration={"Rules": [other]}
    )
    before = list(check_bucket("s3://doctor/latents"))[-1]
    assert before.level == "warning" and "--fix" in before.message
    fixed = list(check_bucket("s3://doctor/latents", fix=True))[-1]
    assert fixed.level == "ok" and "1 others kept" in fixed.message
    rules = client.get_bucket_lifecycle_configuration(Bucket="doctor")["Rules"]
    assert {rule["ID"] for rule in rules} == {"theirs", RULE_ID}
    assert next(r for r in rules if r["ID"] == "theirs")["Expiration"] == {"Days": 3}
    after = list(check_bucket("s3://doctor/latents", fix=True))[-1]
    assert after.level == "ok" and "after 7 days" in after.message
    assert len(client.get_bucket_lifecycle_configuration(Bucket="doctor")["Rules"]) == 2


def test_only_a_rule_that_is_on_and_wide_enough_covers_a_prefix():
    rule = {"Status": "Enabled", "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1}}
    assert covering_rule([{**rule, "Filter": {"Prefix": ""}}], "latents/")
    assert covering_rule([{**rule, "Prefix": "lat"}], "latents/")
    assert not covering_rule([{**rule, "Filter": {"Prefix": "latents/a"}}], "latents/")
    assert not covering_rule([{**rule, "Filter": {"Prefix": ""}, "Status": "Disabled"}], "latents/")
    assert not covering_rule([{**rule, "Filter": {"Tag": {"Key": "a", "Value": "b"}}}], "latents/")


def test_a_bucket_that_is_not_there_and_a_server_that_is_not_there_are_problems(
    client, monkeypatch
):
    (found,) = (f for f in check_bucket("s3://nowhere/x") if f.level == "problem")
    assert "does not exist (404)" in found.message
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    (found,) = check_bucket("s3://doctor/x")
    assert found.level == "problem" and "Check AWS_ENDPOINT_URL" in found.message
    assert "not-for-messages" not in found.message


def test_a_bucket_is_asked_with_the_settings_of_every_other_command(client, monkeypatch):
    monkeypatch.setenv("FAE_S3_ADDRESSING", "pat")
    with pytest.raises(UserError, match="FAE_S3_ADDRESSING='pat'"):
        list(check_bucket("s3://doctor/latents"))


def test_the_clock_is_compared_with_the_servers_date():
    date = "Tue, 24 Nov 2026 08:00:00 GMT"
    server = 1795507200.0
    assert clock_skew(date, server + 400) == 400 and clock_skew(date, server - 70) == -70


def test_the_command_ends_with_one_where_there_is_a_problem(client):
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["doctor", *arguments])

    good, bad = run("s3://doctor/latents"), run("s3://doctor/latents", "s3://nowhere/x")
    assert good.exit_code == 0 and "no problems" in good.output, good.output
    assert bad.exit_code == 1 and "1 problem" in bad.output
    assert "not-for-messages" not in good.output + bad.output


# Tracking, and mistakes
# -----------------------------------------------------------------------------------------------


def test_a_dead_tracking_server_is_a_problem_that_shows_no_password():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        uri = f"http://me:marker@127.0.0.1:{listener.getsockname()[1]}"
        (found,) = check_tracking(TrackingSection(uri=uri))
    assert found.level == "problem" and "marker" not in found.message
    assert "without metrics" in found.message


def test_a_tracking_server_that_answers_is_ok_and_gets_the_password_of_the_environment(monkeypatch):
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Authorization"]))
            self.answer()

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def answer(self):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *arguments):
            pass

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "marker")
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (found,) = check_tracking(TrackingSection(uri=f"http://127.0.0.1:{server.server_port}"))
        server.shutdown()
    assert found.level == "ok" and "marker" not in found.message
    assert asked[0] == ("/api/2.0/mlflow/experiments/search", "Basic bWU6bWFya2Vy")


@pytest.mark.parametrize(
    ("words", "address", "message"),
    [
        (["precompute.num_actors=8"], None, "need a recipe before them"),
        (["photos-dinov2"], None, "Did you mean 'photos-dinov2s'?"),
        ([], "http://head:8265", "fae submit doctor"),
    ],
)
def test_a_mistake_is_explained(words, address, message):
    with pytest.raises(UserError) as refusal:
        doctor(words, address=address)
    assert message in str(refusal.value)


@pytest.mark.integration
def test_a_local_cluster_is_looked_at_by_its_own_nodes(capsys):
    import ray

    try:
        assert doctor(["photos-dinov2s", "precompute.shard_size=8", "tracking.enabled=false"])
        shown = capsys.readouterr().out
        for word in (
            "1 alive",
            "equal on all nodes",
            "tasks at once",
            "object store",
            "no problems",
        ):
            assert word in shown
    finally:
        ray.shutdown()


@pytest.mark.integration
def test_a_cluster_of_a_head_without_cpus_has_no_problem(capsys):
    import ray

    try:
        ray.init(num_cpus=0, include_dashboard=False, log_to_driver=False)
        assert doctor(["photos-dinov2s", "tracking.enabled=false"]), capsys.readouterr().out
        assert "The autoscaler may start the missing CPU nodes" in capsys.readouterr().out
    finally:
        ray.shutdown()
