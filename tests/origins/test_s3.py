"""A model in an S3 bucket of a local server. Needs s3fs and `moto[server]`, which the environment of the tests has not:

pip install --target FOLDER s3fs 'moto[server]' && PYTHONPATH=$PWD:FOLDER pytest tests/origins/test_s3.py
"""

from __future__ import annotations

import pytest

from helpers.paths import ROOT
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import SourceError, StaleError
from tenp_dist.origins import origin as origins
from tenp_dist.origins.bucket import open_bucket

pytestmark = [pytest.mark.slow, pytest.mark.beside, pytest.mark.filterwarnings("ignore")]
s3fs = pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")

MODEL = ROOT / "jobs" / "quickstart" / "moe-4m"
ADDRESS = "s3://models/tiny"


@pytest.fixture
def bucket(monkeypatch):
    """The file system of a server of its own, with the quickstart's model in a bucket."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    system.mkdir("models")
    system.put([str(path) for path in MODEL.iterdir()], "models/tiny/")
    yield system
    system.rm("models", recursive=True)  # what servers of a process hold is one
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_headers_then_weights(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(origins, "_FIRST_BYTES", 8)
    origin = open_bucket(ADDRESS, tmp_path)
    assert origin.open().fingerprint == open_source(MODEL).fingerprint
    assert not list(origin.folder.glob("*.safetensors"))
    assert origin.fetch(lambda done, total: None) == sum(path.stat().st_size for path in MODEL.glob("*.safetensors"))
    assert all((origin.folder / path.name).read_bytes() == path.read_bytes() for path in MODEL.glob("*.safetensors"))
    assert open_bucket(ADDRESS, tmp_path).version == origin.version


def test_another_content_is_another_version(bucket, tmp_path):
    origin = open_bucket(ADDRESS, tmp_path)
    bucket.pipe("models/tiny/generation_config.json", b"{}")
    with pytest.raises(StaleError):
        origin.fetch(lambda done, total: None)
    assert open_bucket(ADDRESS, tmp_path).version != origin.version


def test_a_bucket_that_is_not_there(bucket, tmp_path):
    with pytest.raises(SourceError) as error:
        open_bucket("s3://nowhere/tiny", tmp_path)
    assert error.value.where == "s3://nowhere/tiny" and error.value.next_step
