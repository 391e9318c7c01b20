#!/usr/bin/env python3
"""Takes out one mechanism after the other, and has the stories that guard it run: each must fail.

    removals.py [--only REGEX] [--area REGEX] [--page FILE]

tests/removals.toml names them. The sources stay as they are: a copy of the tree is changed, in one
build, so that each mechanism is left out where MARCOT_REMOVED holds its name. Each story runs first
with nothing taken out. What is known for the same sources, story and removal is not run again:
results are kept in target/removals. Ends with an error where a story passes without its mechanism.

LIST=FILE is another list, as tests/removals-untried.toml. CARGO=COMMAND stands for cargo; JOBS=N stories run at a time; FRESH=1 forgets what is known; with
KNOWN=1 nothing runs, and what is known is told.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOME = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve() / "removals"
TREE = HOME / "tree"
TARGET = HOME / "target"
RESULTS = HOME / "results.json"
CARGO = shlex.split(os.environ.get("CARGO", "cargo"))
JOBS = int(os.environ.get("JOBS", "2"))

# Longer than a story that fails by waiting (90 s, `PATIENCE`) on a machine that is busy.
RUN_SECONDS_MAX = 240

# After its panic a story ends its servers.
END_SECONDS_MAX = 30

PANIC = re.compile(r"panicked at [^\n]*:\d+:\d+:\n(.*)")

# Stands in a replacement for the question whether its mechanism is taken out.
SWITCH = "REMOVED"

# Appended to the crate that all others know.
FUNCTION = """
/// Whether the mechanism of this name is taken out.
pub fn removed(name: &str) -> bool {
    static REMOVED: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    REMOVED.get_or_init(|| std::env::var("MARCOT_REMOVED").ok()).as_deref() == Some(name)
}
"""
FUNCTION_FILE = "common/src/lib.rs"

# Marks the processes of one story, to end those that it leaves.
MARK = "MARCOT_REMOVALS_RUN"


def die(text):
    sys.exit(f"removals: {text}")


def say(text):
    print(f"removals: {text}", file=sys.stderr, flush=True)


def entries():
    """The removals, each with its edits as (file, find, replace)."""
    text = (ROOT / os.environ.get("LIST", "tests/removals.toml")).read_text()
    found, names = tomllib.loads(text)["removal"], set()
    for entry in found:
        if entry["name"] in names:
            die(f"{entry['name']} is there twice")
        names.add(entry["name"])
        also = entry.get("also", [])
        entry["edits"] = [(e["file"], e["find"], e["replace"]) for e in [entry, *also]]
    return found


def story_id(story):
    """`innodb matrix::x` is of marcot-tests; other packages are named, as nextest does."""
    binary, name = story.split(" ")
    return (binary if binary.startswith("marcot-") else f"marcot-tests::{binary}"), name


def changed_sources(removals):
    """Files of the tree that are changed, and what they hold then."""
    edits = {}
    for entry in removals:
        for file, find, replace in entry["edits"]:
            crate = "crate" if file.startswith("common/src/") else "marcot_common"
            call = f'{crate}::removed("{entry["name"]}")'
            if not re.search(rf"\b{SWITCH}\b", replace):
                die(f"{entry['name']}: a replacement in {file} does not ask for {SWITCH}")
            text = (ROOT / file).read_text()
            if text.count(find) != 1:
                die(f"{entry['name']}: {text.count(find)} places in {file} instead of one: {find}")
            start = text.index(find)
            new = re.sub(rf"\b{SWITCH}\b", call, replace)
            edits.setdefault(file, []).append((start, start + len(find), new, entry["name"]))
    changed = {}
    for file, places in edits.items():
        text, end, parts = (ROOT / file).read_text(), 0, []
        last = None
        for start, stop, new, name in sorted(places):
            if start < end:
                die(f"{name} and {last} change the same place of {file}")
            parts += [text[end:start], new]
            end, last = stop, name
        changed[file] = "".join(parts) + text[end:]
    common = changed.get(FUNCTION_FILE, (ROOT / FUNCTION_FILE).read_text())
    changed[FUNCTION_FILE] = common + FUNCTION
    return changed


def copy_tree(changed):
    """Writes only what differs, so that cargo builds only that."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = {name for name in names.split("\0") if name and (ROOT / name).is_file()}
    for path in TREE.rglob("*"):
        if path.is_file() and not path.is_symlink() and str(path.relative_to(TREE)) not in names:
            path.unlink()
    for name in names:
        source, copy = ROOT / name, TREE / name
        wanted = changed[name].encode() if name in changed else source.read_bytes()
        if not copy.is_file() or copy.read_bytes() != wanted:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(wanted)
        copy.chmod(source.stat().st_mode & 0o777)
    tools = TREE / ".tools"
    if not tools.is_symlink():
        tools.symlink_to((ROOT / ".tools").resolve())


def take_dependencies():
    """Those that were built for the tree itself: a build of them takes many minutes."""
    built = HOME.parent / "debug"
    if TARGET.exists() or not built.is_dir():
        return
    say("taking the dependencies that are built")
    for part in ["deps", "build", ".fingerprint"]:
        (TARGET / "debug").mkdir(parents=True, exist_ok=True)
        shutil.copytree(
            built / part,
            TARGET / "debug" / part,
            symlinks=True,
            ignore=lambda _, names: [n for n in names if re.match(r"(lib)?marcot", n)],
        )


def build():
    """Builds all programs and tests; the tests by binary: path, directory, names."""
    take_dependencies()
    environment = dict(os.environ, CARGO_TARGET_DIR=str(TARGET))

    def run_in_tree(*command, **options):
        done = subprocess.run(command, cwd=TREE, env=environment, **options)
        if done.returncode != 0:
            die(f"{' '.join(command)} ended with {done.returncode}")
        return done.stdout

    say("building")
    # Programs and tests at once: one set of features, one build.
    run_in_tree(*CARGO, "build", "--quiet", "--locked", "--workspace", "--bins", "--tests")
    listed = run_in_tree(
        *["cargo", "nextest", "list", "--locked", "--workspace", "--cargo-quiet"],
        *["--message-format", "json"],
        stdout=subprocess.PIPE,
    )
    suites = json.loads(listed)["rust-suites"]
    return {
        name: (suite["binary-path"], suite["cwd"], set(suite.get("testcases", {})))
        for name, suite in suites.items()
    }


def processes(mark):
    """Those that carry a mark."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                pass
    return found


def end_processes(mark):
    for _ in range(10):
        left = processes(mark)
        if not left:
            return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.1)


def run(suite, name, switch):
    """One story: how it ended, what it said, and for how long it ran."""
    path, directory, _ = suite
    mark = f"{os.getpid()}-{threading.get_ident()}-{time.monotonic_ns()}"
    environment = dict(os.environ, CARGO_MANIFEST_DIR=directory)
    environment[MARK] = mark
    environment.pop("MARCOT_REMOVED", None)
    if switch:
        environment["MARCOT_REMOVED"] = switch
    begun = time.monotonic()
    log = HOME / "logs" / f"{switch or 'whole'}--{name.replace('::', '.')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        child = subprocess.Popen(
            [path, "--exact", name, "--nocapture"],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        code = wait(child, log)
        if code is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    end_processes(mark)
    text = log.read_text(errors="replace")
    # One that has failed may hang as it ends: what it waits for is what was taken out.
    panic = PANIC.search(text)
    ended = "passed" if code == 0 else "failed" if code is not None or panic else "hung"
    if ended == "passed" and not re.search(r"^test result: ok\. 1 passed", text, re.MULTILINE):
        die(f"{name} was not run; see {log}")
    seconds = time.monotonic() - begun
    return {"ended": ended, "how": how(ended, text, code), "seconds": round(seconds)}


def wait(child, log):
    """The exit code; none where it does not end, or not soon after its panic."""
    begun, panicked = time.monotonic(), None
    while True:
        try:
            return child.wait(1)
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        if panicked is None and PANIC.search(log.read_text(errors="replace")):
            panicked = now
        if now - begun > RUN_SECONDS_MAX or (panicked and now - panicked > END_SECONDS_MAX):
            return None


def how(ended, text, code):
    """The first line of the panic."""
    if ended == "passed":
        return ""
    if ended == "hung":
        return f"runs for more than {RUN_SECONDS_MAX} s"
    if code is not None and code < 0:
        return f"killed by signal {-code}"
    said = PANIC.search(text)
    said = said or re.search(r"^Error: (.*)", text, re.MULTILINE)
    line = said.group(1).strip() if said else "no panic"
    line = re.sub(r"/\S*/", "", line)
    return line if len(line) <= 110 else line[:107] + "..."


def hashed(*parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:24]


def sources():
    """What all stories depend on: the programs and the harness."""
    found = []
    for crate in ["proto", "common", "donor", "recipient", "tests/src"]:
        for path in sorted((ROOT / crate).rglob("*")):
            if path.suffix not in {".rs", ".proto", ".toml", ".html"}:
                continue
            found += [str(path.relative_to(ROOT)).encode(), path.read_bytes()]
    return hashed(*found, (ROOT / "Cargo.lock").read_bytes())


def story_files(binary):
    """The files of a story of marcot-tests."""
    package, _, name = binary.partition("::")
    if package != "marcot-tests" or not name:
        return b""
    single = ROOT / f"tests/tests/{name}.rs"
    paths = [single] if single.is_file() else sorted((ROOT / "tests/tests" / name).rglob("*.rs"))
    return b"".join(path.read_bytes() for path in paths)


def table(rows):
    lines = ["| taken out | where | story | without it | how |", "|---|---|---|---|---|"]
    for entry, story, result in rows:
        files = dict.fromkeys(file for file, _, _ in entry["edits"])
        where = ", ".join(f"`{file}`" for file in files)
        said = result["how"].replace("|", "\\|").replace("`", "'")
        lines.append(f"| {entry['what']} | {where} | `{story}` | {result['result']} | {said} |")
    return "\n".join(lines) + "\n"


HEAD = """# What stories were seen to fail without

`tests/tools/removals.py` writes this page, with `--page`: each mechanism was left out, alone, and the stories that guard it
ran again; with nothing left out each of them passes. How to add one: the head of `tests/removals.toml`.
"""


def page(rows):
    """The results for people: by file, one removal after the other."""
    files = {}
    for entry, story, result in rows:
        files.setdefault(entry["file"], {}).setdefault(entry["what"], []).append((story, result))
    parts = [HEAD]
    for file in sorted(files):
        parts.append(f"## `{file}`\n")
        for what, stories in files[file].items():
            parts.append(wrapped(f"- {what}", "  "))
            for story, result in stories:
                said = result["how"].replace("`", "'")
                word = "" if result["result"] == "caught" else f" **{result['result']}**"
                parts.append(wrapped(f"  - `{story}`{word}: {said}", "    "))
        parts.append("")
    caught = sum(result["result"] == "caught" for _, _, result in rows)
    parts.append(f"{caught} of {len(rows)} stories failed.\n")
    return "\n".join(parts)


def wrapped(text, indent):
    return textwrap.fill(
        text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def main():
    parser = argparse.ArgumentParser(description="see the head of the file")
    parser.add_argument("--only", default="", help="names of removals, a regular expression")
    parser.add_argument("--area", default="", help="binaries of stories, a regular expression")
    parser.add_argument("--page", default="", help="write the results there, for people")
    arguments = parser.parse_args()

    removals = entries()
    changed = changed_sources(removals)
    HOME.mkdir(parents=True, exist_ok=True)
    TREE.mkdir(exist_ok=True)
    copy_tree(changed)
    suites = build()

    known = {}
    if RESULTS.is_file() and os.environ.get("FRESH") != "1":
        known = json.loads(RESULTS.read_text())
    base = sources().encode()
    lock = threading.Lock()

    def result_of(entry, story):
        binary, name = story_id(story)
        if binary not in suites or name not in suites[binary][2]:
            die(f"{entry['name'] if entry else ''}: there is no story `{story}`")
        edits = json.dumps(entry["edits"] if entry else None).encode()
        key = hashed(base, story.encode(), story_files(binary), edits)
        if key not in known and os.environ.get("KNOWN") == "1":
            return None
        if key not in known:
            ended = run(suites[binary], name, entry["name"] if entry else None)
            with lock:
                known[key] = ended
                RESULTS.with_suffix(".new").write_text(json.dumps(known, indent=1))
                RESULTS.with_suffix(".new").replace(RESULTS)
            say(f"{entry['name'] if entry else 'nothing'} out: {story}: {ended['ended']}, "
                f"{ended['seconds']} s: {ended['how']}")
        return known[key]

    wanted = [
        (entry, story)
        for entry in removals
        for story in entry["stories"]
        if re.search(arguments.only, entry["name"])
        and re.search(arguments.area, story.split(" ")[0])
    ]
    if not wanted:
        die("no removal is of that name and area")
    turns = {story: threading.Lock() for _, story in wanted}
    words = {"failed": "caught", "hung": "hung", "passed": "missed"}

    def row_of(pair):
        entry, story = pair
        # Once for all removals of a story.
        with turns[story]:
            whole = result_of(None, story)
        if whole and whole["ended"] != "passed":
            return entry, story, {"result": "red", "how": whole["how"]}
        result = result_of(entry, story)
        if result is None or whole is None:
            return entry, story, {"result": "not run", "how": ""}
        word = words[result["ended"]]
        if word == "hung" and entry.get("hangs"):
            word = "caught"
        return entry, story, dict(result, result=word)

    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        rows = list(pool.map(row_of, wanted))
    text = table(rows)
    print(text)
    (HOME / "table.md").write_text(text)
    if arguments.page:
        pathlib.Path(arguments.page).write_text(page(rows))
    for entry, story, result in rows:
        if result["result"] != "caught":
            print(f"{result['result']}: {entry['name']}: {story}")
    caught = sum(result["result"] == "caught" for _, _, result in rows)
    print(f"removals: caught {caught}/{len(rows)}")
    sys.exit(caught < len(rows))


if __name__ == "__main__":
    main()
