"""The yardstick: files over TCP by sendfile, received and written with 1 MiB buffers.

No protocol, no checks, no list: what the kernel and Python's loop of three system calls cost. One
process for each end of each stream.
"""

import os
import pathlib
import socket
import subprocess
import sys

BUFFER_BYTES = 1 << 20


def send(connection, paths):
    for path in paths:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            offset = 0
            while offset < size:
                offset += os.sendfile(connection.fileno(), file.fileno(), offset, size - offset)


def receive(connection, paths, sizes):
    buffer = memoryview(bytearray(BUFFER_BYTES))
    for path, size in zip(paths, sizes):
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        offset = 0
        while offset < size:
            count = connection.recv_into(buffer[: min(BUFFER_BYTES, size - offset)])
            if count == 0:
                sys.exit(f"raw: the stream ended at byte {offset} of {path}")
            written = 0
            while written < count:
                written += os.pwrite(file, buffer[written:count], offset + written)
            offset += count
        os.close(file)


def main(copy, source, streams):
    source, copy = pathlib.Path(source), pathlib.Path(copy)
    copy.mkdir()
    paths = sorted(source.iterdir())
    processes = []
    for number in range(int(streams)):
        share = paths[number :: int(streams)]
        sizes = [path.stat().st_size for path in share]
        with socket.create_server(("127.0.0.1", 0)) as listener:
            there = socket.create_connection(listener.getsockname())
            here, _ = listener.accept()
        for work in (
            lambda: send(there, share),
            lambda: receive(here, [copy / path.name for path in share], sizes),
        ):
            pid = os.fork()
            if pid == 0:
                work()
                os._exit(0)
            processes.append(pid)
        there.close()
        here.close()
    if any(os.waitpid(pid, 0)[1] != 0 for pid in processes):
        sys.exit("raw: a stream failed")


def command(source, copy, streams):
    return [sys.executable, __file__, copy, source, str(streams)]


if __name__ == "__main__":
    main(*sys.argv[1:])
