"""A TCP proxy in front of an S3 server that adds the latency of a network, and counts the requests."""

import asyncio
import re
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

REQUEST = re.compile(rb"(GET|HEAD|PUT|POST|DELETE) \S+ HTTP/1\.1\r\n")


class DelayingProxy:
    """Forwards to a local port; a connection and each of its requests take `seconds` longer.

    `requests` counts requests, recognized by their first line at the start of the received data.
    """

    def __init__(self, target: int, seconds: float) -> None:
        self.target, self.seconds, self.requests = target, seconds, 0
        self.port = 0
        self._tasks: set[asyncio.Task] = set()

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    def _keep(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)  # the event loop keeps weak references only
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self.seconds)
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.target)
        self._keep(self._forward(reader, server_writer, self.seconds))
        self._keep(self._forward(server_reader, writer, 0))

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float
    ) -> None:
        """Forward data in order, each piece `seconds` after its arrival."""
        loop = asyncio.get_running_loop()
        while data := await reader.read(1 << 16):
            if seconds:
                self.requests += bool(REQUEST.match(data))
                loop.call_later(seconds, writer.write, data)
            else:
                writer.write(data)
                await writer.drain()
        loop.call_later(seconds, writer.close)


@contextmanager
def delaying_proxy(target: int, seconds: float) -> Iterator[DelayingProxy]:
    proxy, loop = DelayingProxy(target, seconds), asyncio.new_event_loop()
    server = loop.run_until_complete(proxy.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield proxy
    loop.call_soon_threadsafe(server.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
