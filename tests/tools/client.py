#!/usr/bin/env python3
"""A client that is not ours: grpcio, with code generated from the .proto files at run time.

    client.py read DONOR [--path PATH]        opens a snapshot on a donor without accounts, lists
                                              its files, reads one through ReadRanges, checks the
                                              CRC-32C of each chunk; default: the largest file
                                              without holes
    client.py clone RECIPIENT STATEMENT       triggers a clone and watches it to its end

Addresses are HOST:PORT on loopback, in plaintext. Run it with .tools/venv/bin/python. Prints what
it did; exit 0 when all of it was right. `read --output FILE` keeps what was read.
"""

import argparse
import importlib
import os
import pathlib
import sys
import tempfile
import uuid

import grpc
from grpc_tools import protoc

PROTO = pathlib.Path(__file__).resolve().parent.parent.parent / "proto"
RANGE_BYTES_MAX = 64 << 20
CALL_SECONDS = 60
CLONE_SECONDS = 1800


def generate(directory):
    """Compiles the .proto files as any user of the API would, and returns their modules."""
    files = sorted(str(path.relative_to(PROTO)) for path in PROTO.glob("marcot/**/*.proto"))
    outputs = [f"--python_out={directory}", f"--grpc_python_out={directory}"]
    include = os.path.join(os.path.dirname(protoc.__file__), "_proto")
    if protoc.main(["protoc", f"-I{PROTO}", f"-I{include}", *outputs, *files]) != 0:
        sys.exit("client.py: protoc failed")
    sys.path.insert(0, directory)
    names = ["common.v1.common", "donor.v1.donor", "recipient.v1.recipient"]
    kinds = ["_pb2", "_pb2_grpc"]
    return [importlib.import_module(f"marcot.{name}{kind}") for name in names for kind in kinds]


def crc32c_tables():
    """Eight tables: the bytes of a word are looked up side by side."""
    tables = [[]]
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        tables[0].append(byte)
    for _ in range(7):
        tables.append([tables[0][value & 255] ^ value >> 8 for value in tables[-1]])
    return tables


TABLES = crc32c_tables()


def crc32c(data):
    """CRC-32C (Castagnoli) by RFC 3720, B.4."""
    t0, t1, t2, t3, t4, t5, t6, t7 = TABLES
    crc = 0xFFFFFFFF
    whole = len(data) // 8 * 8
    for a, b, c, d, e, f, g, h in zip(*(iter(data[:whole]),) * 8):
        a ^= crc & 255
        b ^= crc >> 8 & 255
        c ^= crc >> 16 & 255
        d ^= crc >> 24
        crc = t7[a] ^ t6[b] ^ t5[c] ^ t4[d] ^ t3[e] ^ t2[f] ^ t1[g] ^ t0[h]
    for byte in data[whole:]:
        crc = t0[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def require(holds, what):
    if not holds:
        raise AssertionError(what)


class Donor:
    """One snapshot of a donor, opened, read and closed."""

    def __init__(self, channel, common, donor, donor_grpc):
        self.common, self.donor = common, donor
        self.stub = donor_grpc.DonorServiceStub(channel)

    def read(self, path, output):
        info = self.stub.GetServerInfo(self.donor.GetServerInfoRequest(), timeout=CALL_SECONDS)
        print(f"donor {info.version}, engine {info.engine}, {info.machine}")
        request = self.donor.OpenSnapshotRequest(
            public_key=os.urandom(32), request_id=str(uuid.uuid4()), clone="clones/python"
        )
        opened = self.stub.OpenSnapshot(request, timeout=CALL_SECONDS)
        print(f"opened {opened.snapshot}, about {opened.estimate.size_bytes} bytes")
        outcome = self.donor.OUTCOME_FAILED
        try:
            entry = self.choose(opened, path)
            self.read_file(opened, entry, output)
            outcome = self.donor.OUTCOME_COMPLETED
        finally:
            close = self.donor.CloseSnapshotRequest(snapshot=opened.snapshot, outcome=outcome)
            self.stub.CloseSnapshot(close, timeout=CALL_SECONDS)
            print(f"closed {opened.snapshot}")

    def choose(self, opened, path):
        """Reads the whole list, checks its order and numbers, and picks a file."""
        request = self.donor.ListFilesRequest(
            snapshot=opened.snapshot, stage=opened.stage, round=opened.round
        )
        chosen, last, entries, end = None, None, 0, None
        for answer in self.stub.ListFiles(request, timeout=CALL_SECONDS):
            require(end is None, "nothing comes after the end of the list")
            for entry in answer.entries:
                require(entry.number == entries, f"entry {entries} has number {entry.number}")
                components = entry.path.split(b"/")
                require(last is None or last < components, f"order at {entry.path!r}")
                last, entries = components, entries + 1
                if entry.type != self.donor.FILE_TYPE_REGULAR:
                    continue
                if path is None:
                    full = entry.size_bytes <= min(entry.allocated_bytes, RANGE_BYTES_MAX)
                    wanted = full and (chosen is None or entry.size_bytes > chosen.size_bytes)
                else:
                    wanted = entry.path == path
                chosen = entry if wanted else chosen
            end = answer.end if answer.HasField("end") else None
        require(end is not None, "the list ends with its totals")
        require(end.totals.entries == entries, f"{end.totals.entries} entries in the totals")
        print(f"listed {entries} entries in order, {end.totals.files} regular files")
        require(chosen is not None, "the list has the file that is to be read")
        return chosen

    def read_file(self, opened, entry, output):
        """Reads one file by as many calls as the donor's bounds need."""
        position, chunks = 0, 0
        while position < entry.size_bytes:
            length = entry.size_bytes - position
            request = self.donor.ReadRangesRequest(
                snapshot=opened.snapshot,
                stage=opened.stage,
                round=opened.round,
                ranges=[{"file_id": entry.file_id, "offset": position, "length": length}],
                codecs=[self.common.CODEC_NONE],
            )
            end, begin = None, position
            for frame in self.stub.ReadRanges(request, timeout=CALL_SECONDS):
                require(end is None, "nothing comes after End")
                require(not frame.HasField("failure"), f"range failed: {frame.failure}")
                if frame.HasField("end"):
                    end = frame.end
                    continue
                position = self.chunk(opened, entry, frame.chunk, position, output)
                chunks += 1
            require(end is not None, "a stream without End is an error")
            require(end.ranges_done == 1 or end.offset_done == position - begin, "End's count")
            require(position > begin or end.ranges_done == 1, "a call makes progress")
        require(position == entry.size_bytes, f"{position} of {entry.size_bytes} bytes")
        print(f"read {entry.path!r}: {position} bytes in {chunks} chunks, each CRC-32C is right")

    def chunk(self, opened, entry, chunk, position, output):
        """Checks a chunk against all that it says of itself; returns where the next one begins."""
        require((chunk.stage, chunk.round) == (opened.stage, opened.round), "stage and round")
        require(chunk.codec == self.common.CODEC_NONE, f"codec {chunk.codec} was not asked for")
        data = chunk.payload
        require(len(data) == chunk.raw_length, f"{len(data)} bytes, not {chunk.raw_length}")
        require(crc32c(data) == chunk.crc32c, f"CRC-32C at byte {position}")
        taken = 0
        for extent in chunk.extents:
            require(extent.file_id == entry.file_id, "the chunk is of the file asked for")
            require(extent.offset == position, f"extent at {extent.offset}, not {position}")
            if not extent.hole:
                if output:
                    output.seek(position)
                    output.write(data[taken : taken + extent.length])
                taken += extent.length
            position += extent.length
        require(taken == len(data), "the extents cover the payload")
        if output:
            output.truncate(position)
        return position


def clone(channel, recipient, recipient_grpc, statement):
    stub = recipient_grpc.RecipientServiceStub(channel)
    request = recipient.CloneStatementRequest(statement=statement)
    request.options.request_id = str(uuid.uuid4())
    started = stub.CloneStatement(request, timeout=CALL_SECONDS).clone
    again = stub.CloneStatement(request, timeout=CALL_SECONDS).clone
    require(started.name == again.name, "the same request_id returns the same clone")
    print(f"started {started.name} from {started.source}")
    watch, last = recipient.WatchCloneRequest(name=started.name), started
    for answer in stub.WatchClone(watch, timeout=CLONE_SECONDS):
        last = answer.clone
        rows = ((row.stage, row.state, row.data_bytes) for row in last.stages)
        print(f"  {recipient.State.Name(last.state)} {last.files_copied} files {list(rows)}")
    require(last.state == recipient.STATE_COMPLETED, f"ended {last.state}: {last.error.message}")
    got = stub.GetClone(recipient.GetCloneRequest(name=started.name), timeout=CALL_SECONDS).clone
    require(got.state == recipient.STATE_COMPLETED, "GetClone agrees with the last of the watch")
    print(f"completed: {last.files_copied} files, {last.verified_bytes} bytes verified")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    read = commands.add_parser("read")
    read.add_argument("address")
    read.add_argument("--path", type=os.fsencode)
    read.add_argument("--output", type=argparse.FileType("wb"))
    start = commands.add_parser("clone")
    start.add_argument("address")
    start.add_argument("statement")
    options = parser.parse_args()
    require(crc32c(b"123456789") == 0xE3069283, "CRC-32C's check value")
    with tempfile.TemporaryDirectory() as directory:
        common, _, donor, donor_grpc, recipient, recipient_grpc = generate(directory)
        with grpc.insecure_channel(options.address) as channel:
            try:
                if options.command == "read":
                    Donor(channel, common, donor, donor_grpc).read(options.path, options.output)
                else:
                    clone(channel, recipient, recipient_grpc, options.statement)
            except grpc.RpcError as error:
                sys.exit(f"client.py: {error.code().name}: {error.details()}")
            except AssertionError as error:
                sys.exit(f"client.py: does not hold: {error}")


if __name__ == "__main__":
    main()
