"""Certificates: who gets in, and who is told why not."""

from __future__ import annotations

import stat

import pytest

pytest.importorskip("grpc", reason="the extra `workers` is not installed")
pytest.importorskip("cryptography", reason="the extra `workers` is not installed")

import grpc
from cryptography import x509

from h2o_cli.main import run_command as h2o
from h2o_cli.worker_log import explained
from runtime.distributed.keys import Keys, make_keys, names_of
from runtime.distributed.wire import Listener, Wire, is_loopback, keys_for, parse_address
from runtime.errors import UsageError, WorkerError

HERE = "localhost,127.0.0.1"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Folders of keys: `me`, `worker` (this machine), `elsewhere` (another name), `late` (expired), `foreign`."""
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder / "a", ["me", f"worker,{HERE}", "elsewhere"])
    make_keys(folder / "a", ["late"], days=-1)
    make_keys(folder / "b", ["foreign"])
    places = {name: folder / "a" / name for name in ("me", "worker", "elsewhere", "late")}
    return places | {"foreign": folder / "b" / "foreign", "root": folder / "a"}


def unchecked(folder):
    """Keys as somebody might have them who does not care whether they are any good."""
    return Keys(*((folder / name).read_bytes() for name in ("authority.pem", "machine.pem", "machine.key")))


def test_files_are_the_users_alone(cluster):
    for path in cluster["root"].rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
    assert not list(cluster["me"].glob("authority.key"))


def test_a_certificate_names_its_machine_and_expires(cluster):
    certificate = x509.load_pem_x509_certificate((cluster["worker"] / "machine.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["worker", "localhost"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert 365 <= lifetime.days <= 366
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_an_authority_is_made_once_and_a_machine_gets_new_keys(cluster, tmp_path, capsys):
    assert h2o(["keys", str(tmp_path), "--host", "a", "--host", "b,10.0.0.1"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "a"), str(tmp_path / "b")]
    authority, old = (tmp_path / "authority.pem").read_bytes(), (tmp_path / "a" / "machine.pem").read_bytes()
    assert h2o(["keys", str(tmp_path), "--host", "a", "--days", "9"]) == 0
    assert (tmp_path / "authority.pem").read_bytes() == authority == (tmp_path / "a" / "authority.pem").read_bytes()
    assert (tmp_path / "a" / "machine.pem").read_bytes() != old


@pytest.mark.parametrize("name", ["", "a b", "../x", "a,/etc", "-", "a" * 300])
def test_what_is_no_name_is_refused(name, tmp_path, capsys):
    with pytest.raises(UsageError):
        names_of(name)
    assert h2o(["keys", str(tmp_path), "--host", name]) == 2
    assert not list(tmp_path.glob("*.key"))


def test_keys_that_cannot_be_used_are_named(cluster, tmp_path):
    assert Keys.load(cluster["me"]) == unchecked(cluster["me"])
    with pytest.raises(UsageError, match="expired on"):
        Keys.load(cluster["late"])
    with pytest.raises(UsageError, match="cannot be read"):
        Keys.load(tmp_path)
    for path in cluster["me"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "machine.key").chmod(0o644)
    with pytest.raises(UsageError, match="read by others"):
        Keys.load(tmp_path)


def test_addresses():
    assert parse_address("127.0.0.1:9999") == ("127.0.0.1", 9999)
    assert parse_address("[::1]:0") == ("::1", 0)
    for text in ("host", ":1", "host:", "host:x", "host:65536", "host:-1"):
        with pytest.raises(UsageError):
            parse_address(text)
    assert [is_loopback(h) for h in ("127.9.9.9", "::1", "localhost", "0.0.0.0", "10.0.0.1", "a")] == [True] * 3 + [
        False
    ] * 3
    assert keys_for("127.0.0.1:1", None) is None
    with pytest.raises(UsageError, match="needs certificates"):
        keys_for("0.0.0.0:1", None)


# --- who gets in ----------------------------------------------------------------------------------------------------


class Echo:
    """A conversation that says everything again."""

    def __init__(self, send):
        self.take = send

    def leave(self, *, is_cut):
        self.take(None)


@pytest.fixture(scope="module")
def listener(cluster):
    """A worker's port that says everything again."""
    opened = Listener("127.0.0.1:0", Keys.load(cluster["worker"]), Echo)
    yield opened
    opened.close()


def heard(address, keys):
    """What comes back from an address; fails with WorkerError."""
    wire = Wire(address, keys)
    try:
        wire.send(b"hello")
        return wire.receive(timeout_s=5)
    finally:
        wire.close()


def test_who_has_a_certificate_gets_in(cluster, listener):
    for name in ("me", "elsewhere"):
        assert heard(listener.address, Keys.load(cluster[name])) == b"hello"


def test_others_do_not_and_the_port_stays_open(cluster, listener):
    me, foreign = unchecked(cluster["me"]), unchecked(cluster["foreign"])
    for keys, reason in (
        (None, "closed the connection"),
        (foreign, "not one of this authority"),
        (Keys(me.authority, foreign.certificate, foreign.key), "closed the connection"),
        (unchecked(cluster["late"]), "closed the connection"),
    ):
        with pytest.raises(WorkerError, match=reason):
            heard(listener.address, keys)
    assert heard(listener.address, me) == b"hello"


def test_a_worker_has_to_have_the_name_it_is_called_by(cluster):
    opened = Listener("127.0.0.1:0", Keys.load(cluster["elsewhere"]), Echo)
    try:
        with pytest.raises(WorkerError, match="another name"):
            heard(opened.address, Keys.load(cluster["me"]))
    finally:
        opened.close()


def test_grpcs_own_services_are_there(cluster, listener):
    health_pb2 = pytest.importorskip("grpc_health.v1.health_pb2")
    health_pb2_grpc = pytest.importorskip("grpc_health.v1.health_pb2_grpc")
    keys = Keys.load(cluster["me"])
    credentials = grpc.ssl_channel_credentials(keys.authority, keys.key, keys.certificate)
    with grpc.secure_channel(listener.address, credentials) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="h2o.Worker"))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_long_message_is_not_even_sent_and_the_port_stays_open(listener, cluster):
    keys = Keys.load(cluster["me"])
    wire = Wire(listener.address, keys)
    try:
        wire.send(bytes(65 * 2**20))
        with pytest.raises(WorkerError):
            wire.receive(timeout_s=5)
    finally:
        wire.close()
    assert heard(listener.address, keys) == b"hello"


def test_an_address_in_use_is_refused(listener):
    with pytest.raises(WorkerError, match="cannot be listened on"):
        Listener(listener.address, None, Echo)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            "Handshake failed with error SSL_ERROR_SSL: error:100000c0:SSL routines:OPENSSL_internal:"
            "PEER_DID_NOT_RETURN_A_CERTIFICATE: Invalid certificate verification context",
            "refused a connection: it showed no certificate",
        ),
        (
            "Handshake failed with error SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:"
            "CERTIFICATE_VERIFY_FAILED: certificate has expired",
            "refused a connection: its certificate has expired",
        ),
        (
            "Handshake failed with error SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:"
            "CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate",
            "refused a connection: its certificate is not of this authority",
        ),
        ("anything else", ""),
    ],
)
def test_the_librarys_words_are_put_into_ours(line, text):
    assert explained(line) == text
