"""How messages travel: one gRPC stream in both directions for each conversation, of plain bytes.

TLS with a certificate on both sides, or nothing on this machine's own loopback. gRPC's own checks notice a machine that
has stopped answering: a ping after some seconds of silence, and an end when no answer comes.
"""

from __future__ import annotations

import ipaddress
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from runtime.distributed.keys import INSTALL, Keys
from runtime.distributed.messages import MOST_MESSAGE_BYTES
from runtime.errors import UsageError, WorkerError

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # a child of ours renders a template and ends: no call is in it
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what went wrong is said here, in one line
_ENGINE_OFF = "-event_engine_client,-event_engine_listener"  # it hands every message to one more thread, of a pool
_ENGINE_KNOWN = (1, 85)  # releases up to this one have these switches; another would say so on standard error

_SWITCHES = "GRPC_EXPERIMENTS"
_theirs = os.environ.get(_SWITCHES)

try:
    if tuple(int(part) for part in version("grpcio").split(".")[:2]) <= _ENGINE_KNOWN:
        os.environ.setdefault(_SWITCHES, _ENGINE_OFF)
    import grpc
except ImportError:
    raise UsageError("the package `grpcio` is not installed, which workers need", INSTALL) from None
finally:
    if _theirs is None:
        os.environ.pop(_SWITCHES, None)  # they were read: Ray brings a gRPC of its own into this process

SERVICE = "h2o.Worker"
_PATH = f"/{SERVICE}/Converse"
_PORTS = 65535
_QUIET_S, _ANSWER_S = 3.0, 3.0  # without data until a ping is sent; for its answer
_CONNECT_S = 5.0
_POLL_S = 0.1
_LAST_S = 0.5  # for the last message to arrive
_CLOSED = "it closed the connection"
_CONVERSATIONS = 16  # at once: one computes, the others ask what the worker offers
_SIZES = [
    ("grpc.max_receive_message_length", MOST_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MOST_MESSAGE_BYTES),
    # What may be on its way unread: else it grows with the link to 8 MB, also of a message that is refused.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 2**20),
]
_PINGS = [
    ("grpc.keepalive_time_ms", int(1000 * _QUIET_S)),
    ("grpc.keepalive_timeout_ms", int(1000 * _ANSWER_S)),
    ("grpc.http2.ping_timeout_ms", int(1000 * _ANSWER_S)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_SERVER = [
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
]


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[::1]:port". Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > _PORTS:
        raise UsageError(f"{text!r} is no address", "give host:port, for example 127.0.0.1:9999")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def keys_for(address: str, folder: Path | None) -> Keys | None:
    """The keys an address needs: any but loopback has to have some. Raises UsageError."""
    if folder is not None:
        return Keys.load(folder)
    if not is_loopback(parse_address(address)[0]):
        raise UsageError(
            f"{address} can be reached from other machines, so it needs certificates",
            "make them with `h2o keys DIR --host NAME` and give --tls DIR/NAME",
        )
    return None


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# --- a worker's side ------------------------------------------------------------------------------------------------


class Visitor(Protocol):
    """A conversation at the worker's side."""

    def take(self, message: bytes, /) -> None:
        """A message came. Called one after the other, in gRPC's own thread: what takes long is for another one."""

    def leave(self, *, is_cut: bool) -> None:
        """The other side is gone, or all was said. is_cut: gRPC ended the stream, not this side and not the other."""


class Listener:
    """Takes conversations: `begin(send)` is called for each. send(bytes) sends, send(None) closes."""

    def __init__(
        self, address: str, keys: Keys | None, begin: Callable[[Callable[[bytes | None], None]], Visitor]
    ) -> None:
        """Listen. Raises WorkerError where the address cannot be taken."""
        self._server = grpc.server(
            ThreadPoolExecutor(_CONVERSATIONS, "conversation"),
            options=_SIZES + _PINGS + _SERVER,
            maximum_concurrent_rpcs=_CONVERSATIONS,
        )
        self._server.add_generic_rpc_handlers((_Handler(begin),))
        self._add_services()
        host, port = parse_address(address)
        try:
            self.port = self._bind(_joined(host, port), keys)
        except RuntimeError:
            raise WorkerError(
                f"{address} cannot be listened on", "is it taken? give another one with --listen"
            ) from None
        self.address = _joined(host, self.port)
        self._server.start()

    def _bind(self, address: str, keys: Keys | None) -> int:
        if keys is None:
            return int(self._server.add_insecure_port(address))
        pair = (keys.key, keys.certificate)
        credentials = grpc.ssl_server_credentials([pair], keys.authority, require_client_auth=True)
        return int(self._server.add_secure_port(address, credentials))

    def _add_services(self) -> None:
        """gRPC's own: is it well, and what is here."""
        try:
            from grpc_health.v1 import health, health_pb2, health_pb2_grpc
            from grpc_reflection.v1alpha import reflection
        except ImportError:
            return
        servicer = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)
        for name in (SERVICE, health.OVERALL_HEALTH):
            servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    def close(self) -> None:
        """Take no more conversations and end those that go on."""
        self._server.stop(0).wait(1)


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Makes a conversation of every call. Its messages are taken where gRPC would decode them: that is in its thread
    that they arrive in, one thread less on the way to the one that computes."""

    def __init__(self, begin: Callable[[Callable[[bytes | None], None]], Visitor]) -> None:
        self._begin = begin

    def service(self, handler_call_details: Any) -> Any:
        """How a call is handled."""
        if handler_call_details.method != _PATH:
            return None
        answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        visitor = self._begin(answers.put)

        def handle(requests: Iterator[None], context: Any) -> Iterator[bytes]:
            context.add_callback(lambda: answers.put(None))
            threading.Thread(target=_listen, args=(requests, visitor), name="conversation", daemon=True).start()
            return iter(answers.get, None)

        def take(message: bytes) -> bytes:
            visitor.take(message)
            return message

        return grpc.stream_stream_rpc_method_handler(handle, take)


def _listen(requests: Iterable[object], visitor: Visitor) -> None:
    """Ask for message after message until the other side is gone."""
    is_cut = True
    try:
        for _ in requests:
            pass
        is_cut = False
    except grpc.RpcError:
        return
    except Exception as error:
        if type(error) is not Exception:
            raise
    finally:
        visitor.leave(is_cut=is_cut)


# --- a root's side --------------------------------------------------------------------------------------------------


class Wire:
    """A stream to the worker at an address."""

    def __init__(self, address: str, keys: Keys | None) -> None:
        """Raises WorkerError where nobody answers there."""
        self.address = address
        host, port = parse_address(address)
        target, options = _joined(host, port), _SIZES + _PINGS
        if keys is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            credentials = grpc.ssl_channel_credentials(keys.authority, keys.key, keys.certificate)
            self._channel = grpc.secure_channel(target, credentials, options)
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._in: queue.SimpleQueue[bytes | str] = queue.SimpleQueue()
        self._has_answered = False
        self._until_s: float | None = None  # the other side may say something
        converse = self._channel.stream_stream(_PATH, None, self._take)
        self._call = converse(iter(self._out.get, None))
        self._reader = threading.Thread(target=self._read, name=f"from {address}", daemon=True)
        self._reader.start()

    def _take(self, message: bytes) -> bytes:
        """A message arrived; where gRPC would decode it is one thread less on its way than where it is read."""
        self._has_answered = True
        self._in.put(message)
        return message

    def _read(self) -> None:
        """Ask for message after message until the worker is gone."""
        try:
            for _ in self._call:
                pass
            self._in.put(_CLOSED)
        except grpc.RpcError as error:
            reason = _reason(error)
            hint = " (does it want a certificate?)" if reason == _CLOSED and not self._has_answered else ""
            self._in.put(reason + hint)

    def send(self, message: bytes) -> None:
        """Send it; whether it arrives is seen at the answer."""
        self._out.put(message)

    def receive(self, check: Callable[[], object] = lambda: None, timeout_s: float = 0.0) -> bytes:
        """The next message. `check` is called all the while and may raise. Raises WorkerError when the worker is gone,
        or when nothing came in timeout_s (0: no limit)."""
        waited = 0.0
        while True:
            try:
                message = self._in.get(timeout=_POLL_S)
            except queue.Empty:
                check()
                waited += _POLL_S
                if timeout_s and waited > timeout_s:
                    raise WorkerError(f"the worker {self.address} does not answer", "is it running?") from None
                continue
            if isinstance(message, bytes):
                return message
            self._in.put(message)
            raise WorkerError(f"the worker {self.address} is gone: {message}", "start it, and run again")

    def end(self) -> None:
        """Say that nothing more comes: messages under way still arrive if they can, and the other side ends, too."""
        if self._until_s is None:
            self._until_s = time.monotonic() + _LAST_S
            self._out.put(None)

    def close(self) -> None:
        """End the stream, and wait a moment, from end() on, until the other side has ended it."""
        self.end()
        self._reader.join(max(0.0, (self._until_s or 0.0) - time.monotonic()))
        self._call.cancel()
        self._channel.close()


def _reason(error: grpc.RpcError) -> str:
    """gRPC's reason in some words."""
    details = " ".join(str(error.details()).split())
    for sign, text in (
        ("Connection refused", "nothing listens there"),
        ("CERTIFICATE_VERIFY_FAILED", "its certificate is not one of this authority, or expired"),
        ("Hostname Verification", "its certificate is for another name"),
        ("hostname", "its certificate is for another name"),
        ("DNS", "its name is not known"),
        ("Socket closed", _CLOSED),
        ("reset by peer", _CLOSED),
        ("Handshake read failed", _CLOSED),
        ("ping timeout", "it does not answer any more"),
        ("keepalive", "it does not answer any more"),
    ):
        if sign in details:
            return text
    return details[-160:] or str(error.code())
