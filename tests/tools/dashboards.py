"""Asks a Prometheus what deploy/monitoring asks it.

    dashboards.py URL wait
    dashboards.py URL running|ended CLONE MARCOT RECIPIENT CA
    dashboards.py URL all INSTANCE

`running` and `ended` compare the clone's resource with what was scraped: at most 1 % apart, while
it runs with what it has moved meanwhile. `all` asks every query of every panel, rule and variable,
over the time that Prometheus knows: an error, no value, or one that never changes (a quantile may)
is a failure, but of what STILL in deploy/monitoring/dashboards.py names.
"""

import datetime
import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
WAIT_SECONDS = 30
APART_MAX = 0.01
# As a dashboard over minutes would put it, with a scrape every second.
RATE_INTERVAL = "10s"
SELECTOR = re.compile(r"\b(?:marcot|process|rpc)[a-z0-9_:]*(?:\{[^}]*\})?")


def die(text):
    sys.exit(f"dashboards: {text}")


class Prometheus:
    def __init__(self, url):
        self.url = url

    def get(self, path, **parameters):
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            die(f"{parameters}: {json.load(error).get('error')}")

    def now(self, expression):
        """The sum of an instant query; None without a sample."""
        found = self.get("query", query=expression)["result"]
        return sum(float(one["value"][1]) for one in found) if found else None

    def over(self, expression, begin, end):
        """All values of a query over a time, by series."""
        found = self.get("query_range", query=expression, start=begin, end=end, step="1s")["result"]
        return [[float(value) for _, value in one["values"]] for one in found]


def wait(prometheus):
    """Until both daemons have been scraped."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        try:
            if prometheus.now("sum(up) == 2"):
                return
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.2)
    die("Prometheus has not scraped both daemons")


def resource(clone, marcot, recipient, ca):
    command = [marcot, "--recipient", recipient, "--ca-file", ca, "--output", "json", "get", clone]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def stage_seconds(row):
    if not row["begin_time"]:
        return 0.0
    at = [datetime.datetime.fromisoformat(row[name].replace("Z", "+00:00"))
          for name in ("begin_time", "end_time") if row[name]]
    end = at[1] if len(at) == 2 else datetime.datetime.now(datetime.timezone.utc)
    return (end - at[0]).total_seconds()


def figures(clone):
    """What the resource says, by the query that says the same."""
    for row in clone["stages"]:
        by = '{stage="%s"}' % row["stage"].replace(" ", "_")
        yield "marcot_clone_copied_bytes" + by, row["data_bytes"]
        yield "marcot_clone_received_bytes" + by, row["network_bytes"]
        yield "marcot_clone_expected_bytes" + by, row["estimate_bytes"]
        yield "marcot_clone_stage_seconds" + by, stage_seconds(row)
    yield "marcot_clone_verified_bytes", clone["verified_bytes"]
    yield "marcot_clone_reused_bytes", clone["reused_bytes"]
    yield "marcot_clone_resent_bytes", clone["resent_bytes"]
    yield "marcot_clone_throttled_seconds", clone["throttled_seconds"]
    yield "marcot_clone_files_expected", clone["files_expected"]


def agree(prometheus, ended, get):
    before = dict(figures(get()))
    told = {query: prometheus.now(query) for query in before}
    after = dict(figures(get()))
    compared = 0
    for query, value in told.items():
        if value is None:
            die(f"{query} has no value")
        # A scrape is up to a second old: while a clone runs, what it was then is what counts.
        least, most = sorted((before[query], after[query]))
        least -= 0 if ended else 1.5 * rate_of(prometheus, query)
        if not least * (1 - APART_MAX) - 0.01 <= value <= most * (1 + APART_MAX) + 0.01:
            die(f"{query} is {value}, the clone says {before[query]} to {after[query]}")
        compared += value > 0
    if ended and compared < 8:
        die(f"only {compared} figures were more than zero")
    print(f"dashboards: {len(told)} figures agree with the clone's resource", file=sys.stderr)


def rate_of(prometheus, query):
    return max(0.0, prometheus.now(f"max_over_time({query}[2s])") or 0.0) - max(
        0.0, prometheus.now(f"min_over_time({query}[3s])") or 0.0)


def boards():
    path = ROOT / "deploy/monitoring/dashboards.py"
    spec = importlib.util.spec_from_file_location("boards", path)
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode = True
    spec.loader.exec_module(module)
    return module


def questions(prometheus, instance):
    """Titles and queries of all that is committed, and what it takes of a query to be answered."""
    made = {path.name: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted((ROOT / "deploy/monitoring/dashboards").glob("*.json"))}
    values = {"$__rate_interval": RATE_INTERVAL, "$namespace": "db", "$service": ".*",
              "$instance": instance}
    for board in made.values():
        for one in board["panels"]:
            for target in one.get("targets", []):
                expression = target["expr"]
                for name, value in values.items():
                    expression = expression.replace(name, value)
                yield one["title"], expression
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                selector = variable["definition"].removeprefix("label_values(").rsplit(",", 1)[0]
                for name, value in values.items():
                    selector = selector.replace(name, value)
                yield None, selector
    for group in prometheus.get("rules")["groups"]:
        for rule in group["rules"]:
            if rule["health"] != "ok":
                die(f"rule {rule['name']}: {rule['lastError'] or rule['health']}")
            if rule["type"] == "recording":
                yield rule["name"], rule["query"]
                continue
            # An alert's query is empty while all is well: what it asks for must be there.
            for selector in set(SELECTOR.findall(rule["query"])):
                yield rule["name"], selector


def ask_all(prometheus, instance):
    end = time.time()
    begin = end - prometheus.now("time() - min(min_over_time(timestamp(up)[1h:1s]))") - 1
    still, used, wrong, count = boards().STILL, set(), [], 0
    alerts = {rule["name"] for group in prometheus.get("rules")["groups"] for rule in group["rules"]
              if rule["type"] == "alerting"}
    for title, expression in questions(prometheus, instance):
        found = prometheus.over(expression, begin, end)
        values = [[value for value in series if not math.isnan(value)] for series in found]
        moves = any(len(set(series)) > 1 for series in values)
        # Of an alert, and of what a variable offers, a value is enough; and of a quantile: it is told by
        # buckets, and all that comes may fall into one.
        a_value_is_enough = title is None or title in alerts or "histogram_quantile" in expression
        is_right = any(values) if a_value_is_enough else moves
        count += 1
        if is_right:
            continue
        if title in still:
            used.add(title)
            continue
        what = "does not move" if any(values) else "has no value"
        wrong.append(f"{title}: {expression} {what}")
    known = {title for title, _ in questions(prometheus, instance)}
    wrong += [f"STILL names {title}, which asks nothing" for title in still if title not in known]
    wrong += [f"STILL names {title}, which moves" for title in still
              if title in known and title not in used]
    if wrong:
        die("\n".join(wrong))
    for title in sorted(used):
        print(f"dashboards: still: {title}: {still[title]}", file=sys.stderr)
    print(f"dashboards: {count} expressions answered")


def main():
    prometheus = Prometheus(sys.argv[1])
    what, rest = sys.argv[2], sys.argv[3:]
    if what == "wait":
        wait(prometheus)
    elif what == "all":
        ask_all(prometheus, *rest)
    else:
        agree(prometheus, what == "ended", lambda: resource(*rest))


if __name__ == "__main__":
    main()
