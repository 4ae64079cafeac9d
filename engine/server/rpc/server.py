"""Listens for gRPC beside HTTP, in the same event loop."""

from __future__ import annotations

from pathlib import Path

import grpc
from smg_grpc_proto.generated.sglang_scheduler_pb2_grpc import add_SglangSchedulerServicer_to_server

from makeready.engine.server.rpc.scheduler import Scheduler
from makeready.engine.server.service import Service

PING_MS = 5_000  # clients may ask so often whether this one lives, with or without calls


class RpcServer:
    """A gRPC server.

    Args:
        address: host and port, 0 for one that is free.
        most_bytes: of a message; larger ones are RESOURCE_EXHAUSTED.
        certificate, key: files of TLS; None for none.

    Attributes:
        port: where it listens.

    Raises:
        OSError: the address cannot be had, or a file not be read.
    """

    def __init__(
        self, host: str, port: int, most_bytes: int, certificate: str | None, key: str | None
    ) -> None:
        self._server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", most_bytes),
                ("grpc.so_reuseport", 0),  # another server at this port is told of
                ("grpc.http2.min_recv_ping_interval_without_data_ms", PING_MS),
                ("grpc.keepalive_permit_without_calls", 1),
            )
        )
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if certificate is None or key is None:
                self.port = self._server.add_insecure_port(address)
            else:
                pair = Path(key).expanduser().read_bytes(), Path(certificate).expanduser().read_bytes()
                credentials = grpc.ssl_server_credentials([pair])
                self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise OSError(str(error)) from None

    async def start(self, service: Service) -> None:
        """Answer calls from now on."""
        add_SglangSchedulerServicer_to_server(Scheduler(service), self._server)
        await self._server.start()

    async def stop(self, seconds: float) -> None:
        """Take no further calls; those under way are ended after so long."""
        await self._server.stop(seconds)
