"""The Prometheus endpoint: names and figures as a scrape sees them, read by Prometheus' own parser."""

from __future__ import annotations

import http.client
import shutil
import socket
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from crio_native.api.runtime.v1 import api_pb2 as pb

from .conftest import Client

pytestmark = pytest.mark.root
PREFIX = "container_runtime_crio_"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def enable(client: Client, **settings: str) -> int:
    """Restart the daemon with metrics on; the port."""
    port = free_port()
    lines = {"enable_metrics": "true", "metrics_port": str(port), **settings}
    text = "".join(f"{name} = {value}\n" for name, value in lines.items())
    (client.daemon.directory / "crio.conf.d/20-metrics.conf").write_text(f"[crio.metrics]\n{text}")
    client.restart()
    return port


class Scraper:
    def __init__(self, client: Client, port: int) -> None:
        self.client, self.port = client, port

    def text(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=20) as answer:
            return str(answer.read().decode())

    def samples(self) -> dict[tuple[str, ...], float]:
        """(name without prefix, label values...) -> value."""
        return {
            (sample.name.removeprefix(PREFIX), *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(self.text())
            for sample in family.samples
        }


@pytest.fixture(scope="module")
def shared() -> Iterator[Client]:
    with Client.serving() as client:
        yield client


@pytest.fixture(scope="module")
def scraper(shared: Client) -> Scraper:
    return Scraper(shared, enable(shared))


def test_calls_are_counted(scraper: Scraper, cri: Client) -> None:
    before = scraper.samples()
    for _ in range(3):
        cri.call("Version")
    with pytest.raises(grpc.RpcError):
        cri.call("ContainerStatus", container_id="none")
    after = scraper.samples()

    def grown(*key: str) -> float:
        return after[key] - before.get(key, 0)

    assert grown("operations_total", "Version") == 3 and grown("operations_errors_total", "Version") == 0
    assert grown("operations_total", "ContainerStatus") == 1 == grown("operations_errors_total", "ContainerStatus")
    assert grown("operations_latency_seconds_total_count", "Version") == 3
    assert 0 < after["operations_latency_seconds_total", "Version", "0.5"] < 1
    assert (
        after["operations_latency_seconds_total", "Version", "0.99"]
        >= after["operations_latency_seconds", "Version"] / 2
    )
    assert after["default_runtime", "builtin"] == 1
    assert after["processes_defunct",] >= 0


def test_ends_and_pulls_are_counted(scraper: Scraper, cri: Client) -> None:
    before = scraper.samples()
    with pytest.raises(grpc.RpcError):
        cri.call("PullImage", image=pb.ImageSpec(image="127.0.0.1:9/no/such:image"))
    pod = cri.pod(name="oom")
    script = "x=x; while :; do x=$x$x; done"
    config = cri.container_config("sh", "-c", script, name="eater", resources={"memory_limit_in_bytes": 32 << 20})
    container = cri.start(pod, config=config)
    assert cri.ended(container, 30).reason == "OOMKilled"
    after = scraper.samples()
    assert after["containers_oom_total",] - before["containers_oom_total",] == 1
    [named] = [key for key in after if key[0] == "containers_oom_count_total" and "eater" in key[1]]
    assert after[named] == 1
    failures = [key for key in after if key[0] == "image_pulls_failure_total"]
    assert sum(after[key] - before.get(key, 0) for key in failures) == 1
    assert after["image_pulls_success_total",] == before["image_pulls_success_total",]
    assert after["image_pulls_layer_size_bucket", "+Inf"] == after["image_pulls_layer_size_count",]


def test_every_collector_has_its_name(scraper: Scraper) -> None:
    text = scraper.text()
    told = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    from crio_native.config.tables import METRICS

    assert {name.removeprefix(PREFIX) for name in told} == set(METRICS)


def test_only_metrics_are_there(scraper: Scraper) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"http://127.0.0.1:{scraper.port}/containers/x", timeout=20)
    assert error.value.code == 404


def test_collectors_socket_and_off(fresh: Client) -> None:
    path = fresh.daemon.directory / "metrics.sock"
    enable(fresh, metrics_socket=f'"{path}"', metrics_collectors='["default_runtime"]')
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(path))
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    assert f'{PREFIX}default_runtime{{runtime="builtin"}} 1.0' in text and "operations" not in text
    assert path.stat().st_mode & 0o777 == 0o660
    (fresh.daemon.directory / "crio.conf.d/20-metrics.conf").unlink()
    fresh.restart()
    assert not path.exists()


def test_a_port_that_is_taken(fresh: Client) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        (fresh.daemon.directory / "crio.conf.d/20-metrics.conf").write_text(
            f"[crio.metrics]\nenable_metrics = true\nmetrics_port = {other.getsockname()[1]}\n"
        )
        fresh.stop_daemon()
        with pytest.raises(AssertionError, match="the condition did not come"):
            start_quickly(fresh)
        assert fresh.daemon.process is not None and fresh.daemon.process.wait(10) == 1
        assert "metrics cannot be served on 127.0.0.1" in fresh.daemon.log_tail()
    (fresh.daemon.directory / "crio.conf.d/20-metrics.conf").unlink()
    fresh.start_daemon()


def start_quickly(client: Client) -> None:
    until = client.until
    client.until = lambda condition, seconds=10: until(condition, 3)  # type: ignore[method-assign]
    try:
        client.start_daemon()
    finally:
        client.until = until  # type: ignore[method-assign]


def certificate(directory: Path, name: str) -> None:
    subject = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            "key.pem",
            "-out",
            "cert.pem",
            *subject,
        ],
        cwd=directory,
        check=True,
        capture_output=True,
    )


def test_tls_and_a_certificate_that_is_renewed(fresh: Client, tmp_path: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificates")
    certificate(tmp_path, "first")
    port = enable(fresh, metrics_cert=f'"{tmp_path}/cert.pem"', metrics_key=f'"{tmp_path}/key.pem"')

    def scrape() -> Any:
        context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        with urllib.request.urlopen(f"https://127.0.0.1:{port}/metrics", timeout=20, context=context) as answer:
            return answer.read()

    assert PREFIX.encode() in scrape()
    certificate(tmp_path, "second")
    assert PREFIX.encode() in scrape()
