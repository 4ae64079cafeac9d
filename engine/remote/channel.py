"""Messages over a stream socket: four bytes of length, little-endian, then MessagePack."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

Received = TypeVar("Received")

_LENGTH = 4
_READ = 1 << 18  # bytes at once
_ENCODER = msgspec.msgpack.Encoder()


class ClosedError(Exception):
    """The other side has gone."""


def framed(message: msgspec.Struct) -> bytes:
    """A message as it is on the wire."""
    buffer = bytearray(_LENGTH)
    _ENCODER.encode_into(message, buffer, _LENGTH)
    buffer[:_LENGTH] = (len(buffer) - _LENGTH).to_bytes(_LENGTH, "little")
    return bytes(buffer)


class Framer(Generic[Received]):
    """Cuts what comes in into messages.

    Args:
        kind: what they are, a union of tagged Structs.
    """

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Received]:
        """Take bytes in; yields the messages that are whole."""
        self._buffer += data
        at, size = 0, len(self._buffer)
        try:
            while size - at >= _LENGTH:
                start = at + _LENGTH
                end = start + int.from_bytes(self._buffer[at:start], "little")
                if end > size:
                    break
                at = end
                with memoryview(self._buffer) as view, view[start:end] as frame:
                    message = self._decoder.decode(frame)
                yield message
        finally:
            del self._buffer[:at]


class Channel(Generic[Received]):
    """A side of the boundary that never waits unless it says so.

    What the other side does not take at once is kept and sent on later: a reader that is late stalls nobody.

    Args:
        sock: of the other side.
        kind: what it sends.
    """

    def __init__(self, sock: socket.socket, kind: Any) -> None:
        sock.setblocking(False)
        self._sock, self._framer = sock, Framer[Received](kind)
        self._unsent = bytearray()

    def send(self, message: msgspec.Struct) -> None:
        """Send a message, or keep it until the other side reads.

        Raises:
            ClosedError: it has gone.
        """
        self._unsent += framed(message)
        self._flush()

    def receive(self, seconds: float = 0.0) -> list[Received]:
        """What has come in; waits so long for the first message.

        Raises:
            ClosedError: the other side has gone.
        """
        if seconds:
            wanted = select.POLLIN | (select.POLLOUT if self._unsent else 0)
            poll = select.poll()
            poll.register(self._sock, wanted)
            poll.poll(seconds * 1000)
        if self._unsent:
            self._flush()
        messages: list[Received] = []
        while True:
            try:
                data = self._sock.recv(_READ)
            except BlockingIOError:
                return messages
            except OSError as error:
                raise ClosedError(str(error)) from None
            if not data:
                raise ClosedError("the other side has gone")
            messages += self._framer.feed(data)
            if len(data) < _READ:
                return messages

    def drain(self, seconds: float) -> None:
        """Wait until all is sent, so long at most."""
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT)
        while self._unsent and poll.poll(seconds * 1000):
            self._flush()

    def _flush(self) -> None:
        while self._unsent:
            try:
                sent = self._sock.send(self._unsent)
            except BlockingIOError:
                return
            except OSError as error:
                raise ClosedError(str(error)) from None
            del self._unsent[:sent]
