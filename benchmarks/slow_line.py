"""A slow line to a host, as ssh's ProxyCommand: every byte arrives DELAY_MS later, each way.

ssh -o 'ProxyCommand python -m benchmarks.slow_line DELAY_MS %h %p' ...
"""

from __future__ import annotations

import asyncio
import os
import sys

PIECE = 1 << 16


async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter, delay_s: float) -> None:
    """Pass on what comes, in order, each piece after its delay."""
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=1024)

    async def give() -> None:
        while True:
            due, data = await pieces.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not data:
                sink.close()
                return
            sink.write(data)
            await sink.drain()

    giving = asyncio.create_task(give())
    data = b"x"
    while data:
        data = await source.read(PIECE)
        await pieces.put((loop.time() + delay_s, data))
    await giving


async def main(delay_s: float, host: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    reader, writer = await asyncio.open_connection(host, port)
    given = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(given), os.fdopen(0, "rb"))
    transport, protocol = await loop.connect_write_pipe(
        lambda: asyncio.streams.FlowControlMixin(loop=loop), os.fdopen(1, "wb")
    )
    taken = asyncio.StreamWriter(transport, protocol, None, loop)
    await asyncio.wait(
        [asyncio.create_task(carry(given, writer, delay_s)), asyncio.create_task(carry(reader, taken, delay_s))],
        return_when=asyncio.FIRST_COMPLETED,
    )


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]) / 1e3, sys.argv[2], int(sys.argv[3])))
