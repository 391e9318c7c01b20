"""Writes docs/api.md from the .proto files: what each service, method, message and value is.

    api_reference.py [--check]

With --check nothing is written: it fails where the page is not what the files say.
"""

import difflib
import pathlib
import subprocess
import sys

from google.protobuf import descriptor_pb2

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/api.md"

# Numbers of fields in FileDescriptorProto and its parts: paths of comments are made of them.
MESSAGE, ENUM, SERVICE = 4, 5, 6
FIELD, VALUE, METHOD = 2, 2, 2
NESTED = 3

Field = descriptor_pb2.FieldDescriptorProto

HEAD = """# API reference

Made from the files in `proto/marcot` by `make api-reference`; they are what counts. Errors are `google.rpc.Status` with an
`ErrorInfo` of domain `marcot.dev`: [troubleshooting.md](troubleshooting.md) has each reason. Both ports serve reflection and
`grpc.health.v1`.
"""


def descriptors():
    """All files of the API, with their comments."""
    buf = ROOT / ".tools/venv/bin/buf"
    built = subprocess.run(
        [buf, "build", "--as-file-descriptor-set", "-o", "-#format=binpb"],
        cwd=ROOT / "proto",
        check=True,
        stdout=subprocess.PIPE,
    )
    files = descriptor_pb2.FileDescriptorSet.FromString(built.stdout).file
    return [file for file in files if file.package.startswith("marcot.")]


class File:
    """A file, and the comments in it by the path of what they stand before."""

    def __init__(self, file):
        self.file = file
        self.comments = {
            tuple(place.path): place.leading_comments for place in file.source_code_info.location
        }

    def paragraphs(self, *path):
        text = self.comments.get(path, "")
        lines = [line.removeprefix(" ") for line in text.splitlines()]
        return "\n".join(lines).strip()

    def line(self, *path):
        """A comment in one line, as a cell of a table."""
        return " ".join(self.paragraphs(*path).split()).replace("|", "\\|")


def short(name):
    """`.marcot.common.v1.Stage` as `Stage`."""
    return name.rsplit(".", 1)[-1]


def type_of(field, maps):
    if field.type_name in maps:
        key, value = maps[field.type_name].field
        return f"map<{type_of(key, {})}, {type_of(value, {})}>"
    if field.type_name:
        name = field.type_name.removeprefix(".")
        own = name.startswith("marcot.")
        text = f"[{short(name)}](#{short(name).lower()})" if own else f"{name}"
    else:
        text = Field.Type.Name(field.type).removeprefix("TYPE_").lower()
    if field.label == Field.LABEL_REPEATED:
        return f"repeated {text}"
    return f"optional {text}" if field.proto3_optional else text


def service(file, number, out):
    described = file.file.service[number]
    out.append(f"## {described.name}\n\n`{file.file.package}.{described.name}`\n")
    out.append(file.paragraphs(SERVICE, number) + "\n")
    for i, method in enumerate(described.method):
        stream = "stream " if method.server_streaming else ""
        asks = "stream " if method.client_streaming else ""
        out.append(
            f"### {method.name}\n\n"
            f"{asks}[{short(method.input_type)}](#{short(method.input_type).lower()}) -> "
            f"{stream}[{short(method.output_type)}](#{short(method.output_type).lower()})\n"
        )
        out.append(file.paragraphs(SERVICE, number, METHOD, i) + "\n")


def message(file, number, out):
    described = file.file.message_type[number]
    maps = {
        f".{file.file.package}.{described.name}.{nested.name}": nested
        for nested in described.nested_type
        if nested.options.map_entry
    }
    out.append(f"### {described.name}\n")
    out.append(file.paragraphs(MESSAGE, number) + "\n")
    if not described.field:
        return
    out.append("| field | number | type | |\n|---|---|---|---|")
    for i, field in enumerate(described.field):
        one_of = ""
        if field.HasField("oneof_index") and not field.proto3_optional:
            one_of = f" (one of `{described.oneof_decl[field.oneof_index].name}`)"
        text = file.line(MESSAGE, number, FIELD, i)
        out.append(
            f"| `{field.name}` | {field.number} | {type_of(field, maps)} | {text}{one_of} |"
        )
    out.append("")


def enum(file, number, out):
    described = file.file.enum_type[number]
    out.append(f"### {described.name}\n")
    out.append(file.paragraphs(ENUM, number) + "\n")
    out.append("| value | number | |\n|---|---|---|")
    for i, value in enumerate(described.value):
        out.append(f"| `{value.name}` | {value.number} | {file.line(ENUM, number, VALUE, i)} |")
    out.append("")


def page(files):
    out = [HEAD]
    # What people call comes first.
    order = ["marcot.recipient.v1", "marcot.donor.v1", "marcot.auth.v1", "marcot.common.v1"]
    for described in sorted(files, key=lambda file: order.index(file.package)):
        file = File(described)
        if not described.service:
            out.append(f"## {described.package}\n")
        for number in range(len(described.service)):
            service(file, number, out)
        for number in range(len(described.message_type)):
            message(file, number, out)
        for number in range(len(described.enum_type)):
            enum(file, number, out)
    return "\n".join(out).rstrip() + "\n"


def main():
    text = page(descriptors())
    if sys.argv[1:] == ["--check"]:
        old = PAGE.read_text() if PAGE.exists() else ""
        if old != text:
            lines = difflib.unified_diff(
                old.splitlines(), text.splitlines(), "docs/api.md", "proto/marcot", lineterm="", n=0
            )
            for line in list(lines)[:40]:
                print(line, file=sys.stderr)
            sys.exit("api_reference: docs/api.md is not what the .proto files say: make api-reference")
        return
    if sys.argv[1:]:
        sys.exit(__doc__)
    PAGE.write_text(text)
    print(f"docs/api.md: {len(text.splitlines())} lines")


if __name__ == "__main__":
    main()
