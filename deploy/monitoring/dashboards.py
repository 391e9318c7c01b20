#!/usr/bin/env python3
"""Makes the Grafana dashboards in dashboards/, which are committed.

    dashboards.py           writes them
    dashboards.py --check   fails when what is there is something else

Panels are laid out from left to right in rows; ids are numbered. Queries are by `query`, so that
each goes by the variables `namespace` and `service`. tests/tools/dashboards.sh asks a Prometheus
for each of them over a clone: what has no value then, or one that does not move, is in STILL with
the reason.
"""

import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
DASHBOARDS = HERE / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
GRID_COLUMNS = 24
MATCHERS = 'namespace=~"$namespace", service=~"$service"'

# What is rightly empty, or does not move, in a clone that is throttled, interrupted and resumed, by
# the panel's title or the alert's name.
STILL = {
    "Paused": "nobody pauses it",
    "Waiting for a person": "it needs nobody",
    "Wrong checksums": "no byte arrives wrong",
    "Copies that were not right": "none is",
    "Roll-backs": "no server's data are replaced",
    "Install steps": "no server's data are replaced",
    "Time at a step of an install": "no server's data are replaced",
    "Commits waited": "engine `files` takes no lock",
    "DDL waited": "engine `files` takes no lock",
    "A commit takes": "engine `files` has no server",
    "Clones give way": "engine `files` has no server",
    "Clones that wait": "there is one clone at a time",
    "MarcotDonorImpact": "engine `files` has no server",
    "Old data kept": "no server's data are replaced",
    "Old data": "no server's data are replaced",
    "Leases that ran out": "no recipient is silent for a minute",
    "Short of space": "no server's data are replaced",
    "Encrypted": "it is, from the begin to the end",
    "Versions": "both daemons are of one build",
    "Descriptors at most": "it is the system's",
    "MarcotStrangers": "daemons without accounts know no strangers",
    "MarcotRolledBack": "no server's data are replaced",
}


def query(metric, more=""):
    """A selector of a metric, by the dashboard's variables."""
    return metric + "{" + MATCHERS + (", " + more if more else "") + "}"


def rate(metric, more=""):
    return f"rate({query(metric, more)}[$__rate_interval])"


def increase(metric, more=""):
    return f"increase({query(metric, more)}[$__rate_interval])"


def target(expr, legend="", instant=False):
    return {"expr": expr, "legendFormat": legend or "__auto", "instant": instant}


def panel(kind, title, targets, unit="short", width=6, height=7, about="", **options):
    """A panel without a place."""
    if isinstance(targets, str):
        targets = [target(targets)]
    defaults = {"unit": unit}
    for name in ("min", "max", "decimals"):
        if name in options:
            defaults[name] = options.pop(name)
    if "mappings" in options:
        defaults["mappings"] = options.pop("mappings")
    defaults["custom"] = options.pop("custom", {})
    transformations = options.pop("transformations", [])
    overrides = options.pop("overrides", [])
    if kind == "timeseries":
        options.setdefault("legend", {"displayMode": "list", "placement": "bottom"})
        options.setdefault("tooltip", {"mode": "multi", "sort": "desc"})
    elif kind in ("stat", "bargauge"):
        last = {"calcs": ["lastNotNull"], "fields": "", "values": False}
        options.setdefault("reduceOptions", last)
    return {
        "type": kind,
        "title": title,
        "description": about,
        "datasource": DATASOURCE,
        "targets": [
            {"refId": chr(ord("A") + n), "datasource": DATASOURCE, **one}
            for n, one in enumerate(targets)
        ],
        "fieldConfig": {"defaults": defaults, "overrides": overrides},
        "options": options,
        "transformations": transformations,
        "size": (width, height),
    }


def graph(title, targets, unit="short", width=8, **more):
    return panel("timeseries", title, targets, unit, width, min=more.pop("min", 0), **more)


def stat(title, expr, unit="short", width=4, height=4, **more):
    return panel("stat", title, [target(expr, more.pop("legend", ""))], unit, width, height, **more)


def laid_out(rows):
    """Panels with ids and places: rows of panels that fill the grid from left to right."""
    panels, at = [], 0
    for title, row in rows:
        panels.append({"type": "row", "title": title, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": at, "w": GRID_COLUMNS, "h": 1}})
        at += 1
        x = highest = 0
        for one in row:
            width, height = one.pop("size")
            if x + width > GRID_COLUMNS:
                at, x, highest = at + highest, 0, 0
            panels.append({**one, "gridPos": {"x": x, "y": at, "w": width, "h": height}})
            x, highest = x + width, max(highest, height)
        at += highest
    return [{"id": n, **one} for n, one in enumerate(panels, 1)]


def variable(name, label, values, multi=True):
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": values, "refId": name},
        "definition": values,
        "refresh": 2,
        "sort": 1,
        "multi": multi,
        "includeAll": multi,
        # Also where there is no such label.
        "allValue": ".*" if multi else None,
        "current": {"text": "All", "value": "$__all"} if multi else {},
    }


def dashboard(uid, title, about, rows, more_variables=()):
    return {
        "uid": uid,
        "title": title,
        "description": about,
        "tags": ["marcot"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [{"type": "dashboards", "tags": ["marcot"], "asDropdown": False,
                   "includeVars": True, "keepTime": True, "title": "Marcot"}],
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource",
                 "query": "prometheus", "current": {}},
                variable("namespace", "Namespace", "label_values(marcot_build_info, namespace)"),
                variable("service", "Service",
                         'label_values(marcot_build_info{namespace=~"$namespace"}, service)'),
                *more_variables,
            ]
        },
        "panels": laid_out(rows),
    }


YES = [{"type": "value", "options": {"0": {"text": "no", "color": "yellow"},
                                     "1": {"text": "yes", "color": "green"}}}]

COPIED = query("marcot_clone_copied_bytes")


def clones_table():
    """What runs, a line for each recipient."""
    by = "by (namespace, service, instance)"
    limit = query("marcot_rate_limit_bytes_per_second", 'resource="data"')
    begun = query("marcot_clone_start_timestamp_seconds")
    moved = query("marcot_last_progress_timestamp_seconds")
    runs = f"max {by} ({query('marcot_operations_in_progress')}) == 1"
    columns = [
        ("Copied", f"sum {by} ({COPIED}) and {runs}", "bytes"),
        ("Expected", f"sum {by} ({query('marcot_clone_expected_bytes')}) and {runs}", "bytes"),
        ("Rate", f"sum {by} ({rate('marcot_raw_bytes_total')}) and {runs}", "Bps"),
        ("Time left", f"max {by} ({query('marcot_clone_eta_seconds')}) and {runs}", "s"),
        ("Age", f"time() - max {by} ({begun}) and {runs}", "s"),
        ("Last moved", f"time() - max {by} ({moved}) and {runs}", "s"),
        ("Limit", f"max {by} ({limit}) and {runs}", "Bps"),
    ]
    names = {f"Value #{chr(ord('A') + n)}": name for n, (name, _, _) in enumerate(columns)}
    return panel(
        "table", "Clones that run", [{**target(expr, name, instant=True), "format": "table"}
                                     for name, expr, _ in columns],
        width=24, height=7,
        transformations=[
            {"id": "merge", "options": {}},
            {"id": "organize", "options": {"excludeByName": {"Time": True}, "renameByName": names}},
        ],
        overrides=[{"matcher": {"id": "byName", "options": name},
                    "properties": [{"id": "unit", "value": unit}]} for name, _, unit in columns],
    )


def operators():
    quantile = "histogram_quantile({q}, sum by (le, {by}) ({rate}))".format
    stage_bucket = rate("marcot_stage_duration_seconds_bucket")
    step_bucket = rate("marcot_install_step_duration_seconds_bucket")
    rpc_bucket = rate("rpc_server_call_duration_seconds_bucket")
    rows = [
        ("Now", [
            stat("Running", f"sum({query('marcot_operations_in_progress')})"),
            stat("Paused", f"sum({query('marcot_operations_paused')})"),
            stat("Waiting for a person", f"sum({query('marcot_operations_waiting')})"),
            stat("Snapshots held", f"sum({query('marcot_donor_leases_active')})"),
            stat("First lease ends in",
                 f"min({query('marcot_donor_lease_remaining_seconds')})", "s"),
            stat("Certificates, revocation lists end in",
                 f"min({query('marcot_tls_certificate_expiry_timestamp_seconds')} or "
                 f"{query('marcot_tls_crl_next_update_timestamp_seconds')}) - time()", "s"),
            clones_table(),
        ]),
        ("Throughput", [
            graph("Data staged", [target(rate("marcot_raw_bytes_total"), "{{instance}}")], "Bps"),
            graph("Network", [
                target(rate("marcot_wire_received_bytes_total"), "{{instance}} received"),
                target(rate("marcot_wire_sent_bytes_total"), "{{instance}} sent"),
            ], "Bps"),
            graph("Data per byte sent", [target(
                f"{rate('marcot_raw_bytes_total')} / ({rate('marcot_wire_sent_bytes_total')} > 0)",
                "{{instance}}")], "short", about="Above 1 where compression pays."),
            graph("Streams", [
                target(query("marcot_streams_active"), "{{instance}}"),
                target(query("marcot_streams_limit"), "{{instance}} at most"),
            ]),
            graph("Data by stage", [target(
                f"sum by (stage) ({rate('marcot_stage_raw_bytes_total')})", "{{stage}}")], "Bps"),
            graph("Bytes received by stage", [target(
                f"sum by (stage) ({rate('marcot_stage_received_bytes_total')})",
                "{{stage}}")], "Bps"),
        ]),
        ("Where the time goes", [
            graph("Stages, 95 of 100", [target(
                quantile(q=0.95, by="stage", rate=stage_bucket), "{{stage}}")], "s",
                about="Of stages that ended within the interval."),
            graph("Waits for limits", [target(
                "marcot:throttled:ratio5m{" + MATCHERS + "}", "{{instance}}")], "percentunit",
                about="How much of its time a stream waits: marcot_throttled_seconds_total."),
            graph("Limits", [target(query("marcot_rate_limit_bytes_per_second"),
                                    "{{instance}} {{resource}}")], "Bps", about="0: none."),
        ]),
        ("Reliability", [
            graph("Clones ended", [target(
                f"sum by (outcome, reason) ({increase('marcot_operations_finished_total')})",
                "{{outcome}} {{reason}}")]),
            graph("Clones begun and gone on with", [
                target(f"sum({increase('marcot_operations_started_total')})", "begun"),
                target(f"sum by (cause) ({increase('marcot_resumes_total')})", "{{cause}}"),
            ]),
            graph("Retries", [target(f"sum by (reason) ({increase('marcot_retries_total')})",
                                     "{{reason}}")]),
            graph("Came again", [target(increase("marcot_resent_bytes_total"), "{{instance}}")],
                  "bytes"),
            graph("Wrong checksums", [target(increase("marcot_checksum_failures_total"),
                                             "{{instance}}")]),
            graph("Copies that were not right", [target(
                increase("marcot_verification_failures_total"), "{{instance}}")]),
            graph("Calls that failed", [target(
                f"sum by (reason) ({increase('marcot_calls_failed_total')})", "{{reason}}")]),
            graph("Leases that ran out", [target(increase("marcot_donor_leases_expired_total"),
                                                 "{{instance}}")]),
        ]),
        ("Donors", [
            graph("Snapshots", [
                target(query("marcot_donor_leases_active"), "{{instance}} held"),
                target(increase("marcot_donor_snapshots_opened_total"), "{{instance}} opened"),
                target(f"sum by (outcome) ({increase('marcot_donor_snapshots_finished_total')})",
                       "{{outcome}}"),
            ]),
            graph("Oldest snapshot", [target(query("marcot_donor_snapshot_age_seconds"),
                                             "{{instance}}")], "s"),
            graph("Commits waited", [target(
                quantile(q=0.99, by="instance", rate=rate("marcot_commit_block_seconds_bucket")),
                "{{instance}}")], "s", about="99 of 100, of points within the interval."),
            graph("DDL waited", [target(
                quantile(q=0.99, by="instance", rate=rate("marcot_ddl_block_seconds_bucket")),
                "{{instance}}")], "s", about="99 of 100, of points within the interval."),
            graph("A commit takes", [
                target(query("marcot_donor_commit_latency_seconds"), "{{instance}}"),
                target(query("marcot_donor_commit_latency_limit_seconds"), "{{instance}} may"),
            ], "s", about="As the donor probes it while snapshots are held."),
            graph("Clones give way", [target(query("marcot_donor_give_way_bytes_per_second"),
                                             "{{instance}}")], "Bps", about="0: they need not."),
            graph("Clones that wait", [target(query("marcot_donor_queue_length"),
                                              "{{instance}}")]),
            graph("Connections", [target(query("marcot_connections_active"),
                                         "{{instance}} {{protection}}")]),
        ]),
        ("Installs and space", [
            graph("Install steps", [target(
                f"sum by (step) ({increase('marcot_install_steps_total')})", "{{step}}")]),
            graph("Time at a step of an install", [target(
                quantile(q=0.95, by="step", rate=step_bucket), "{{step}}")], "s"),
            graph("Roll-backs", [target(f"sum by (reason) ({increase('marcot_rollbacks_total')})",
                                        "{{reason}}")]),
            graph("Staged", [target(query("marcot_staging_bytes"),
                                    "{{instance}} {{state}}")], "bytes"),
            graph("Old data", [target(query("marcot_old_data_bytes"), "{{instance}}")], "bytes"),
            stat("Old data kept", f"sum({query('marcot_old_data_kept')})"),
            stat("Short of space", f"sum({query('marcot_old_data_low_space')})",
                 about="Recipients that keep old data with less than 5 % free."),
        ]),
        ("History", [
            graph("Since the last clone", [target(
                f"time() - {query('marcot_last_success_timestamp_seconds')}",
                "{{instance}}")], "s"),
            graph("It took", [target(query("marcot_last_success_duration_seconds"),
                                     "{{instance}}")], "s"),
            graph("How long clones take", [target(
                quantile(q=0.5, by="outcome",
                         rate=rate("marcot_operation_duration_seconds_bucket")),
                "{{outcome}}")], "s", about="The median of those that ended within the interval."),
        ]),
        ("Processes", [
            graph("CPU", [target(rate("process_cpu_seconds_total"), "{{instance}}")], "short",
                  about="Cores."),
            graph("Memory", [target(query("process_resident_memory_bytes"), "{{instance}}"),
                             target(query("process_virtual_memory_bytes"), "{{instance}} virtual")],
                  "bytes"),
            graph("Descriptors", [target(query("process_open_fds"), "{{instance}}")]),
            graph("Calls", [target(
                "sum by (rpc_method, rpc_response_status_code) "
                f"({rate('rpc_server_call_duration_seconds_count')})",
                "{{rpc_method}} {{rpc_response_status_code}}")], "ops", width=12),
            graph("Calls, 95 of 100", [target(quantile(q=0.95, by="rpc_method", rate=rpc_bucket),
                                              "{{rpc_method}}")], "s", width=12),
            stat("Running since", f"time() - min({query('process_start_time_seconds')})", "s"),
            stat("Descriptors at most", f"min({query('process_max_fds')})"),
            panel("table", "Versions", [{**target(query("marcot_build_info"), instant=True),
                                         "format": "table"}], width=16, height=4,
                  transformations=[{"id": "organize", "options": {"excludeByName": {
                      name: True for name in ("Time", "Value", "__name__", "job")}}}]),
        ]),
    ]
    return dashboard("marcot-operators", "Marcot: all clones",
                     "Recipients and donors of a namespace, for who looks after them.", rows)


def one_clone():
    one = 'instance=~"$instance"'

    def of(metric, more=""):
        return query(metric, one + (", " + more if more else ""))

    def rate_of(metric, more=""):
        return f"rate({of(metric, more)}[$__rate_interval])"

    def increase_of(metric):
        return f"increase({of(metric)}[$__rate_interval])"

    total = f"sum({of('marcot_clone_copied_bytes')})"
    expected = f"sum({of('marcot_clone_expected_bytes')})"
    rows = [
        ("Where it stands", [
            stat("Copied", total, "bytes"),
            stat("Of what is expected", f"{total} / ({expected} > 0)", "percentunit", min=0, max=1),
            stat("Time left", f"max({of('marcot_clone_eta_seconds')})", "s",
                 about="Of the stage; none while there is no basis for it."),
            stat("Age", f"time() - max({of('marcot_clone_start_timestamp_seconds')})", "s"),
            stat("Last moved",
                 f"time() - max({of('marcot_last_progress_timestamp_seconds')})", "s"),
            stat("Encrypted", f"min({of('marcot_clone_encrypted')})", mappings=YES),
            panel("state-timeline", "Stage", [target(
                of("marcot_stage_in_progress"), "{{stage}}")], width=24, height=6, mappings=YES),
        ]),
        ("Stages", [
            panel("bargauge", "Copied by stage", [target(
                of("marcot_clone_copied_bytes"), "{{stage}}")], "bytes", 8, 7),
            panel("bargauge", "Expected by stage", [target(
                of("marcot_clone_expected_bytes"), "{{stage}}")], "bytes", 8, 7),
            panel("bargauge", "Time by stage", [target(
                of("marcot_clone_stage_seconds"), "{{stage}}")], "s", 8, 7),
        ]),
        ("Rates", [
            graph("Data and network", [
                target(f"sum({rate_of('marcot_raw_bytes_total')})", "data"),
                target(f"sum({rate_of('marcot_wire_received_bytes_total')})", "network"),
                target(f"sum by (resource) ({of('marcot_rate_limit_bytes_per_second')})",
                       "limit of {{resource}}"),
            ], "Bps", width=12),
            graph("Bytes received by stage of the clone", [target(
                of("marcot_clone_received_bytes"), "{{stage}}")], "bytes", width=12),
            graph("Streams at work", [target(of("marcot_streams_active"), "{{instance}}")]),
            graph("Waits for limits, seconds", [target(of("marcot_clone_throttled_seconds"),
                                                       "{{instance}}")], "s",
                  about="Summed over streams."),
            graph("CPU of the recipient", [target(rate_of("process_cpu_seconds_total"),
                                                  "{{instance}}")]),
        ]),
        ("Bytes and files", [
            graph("Checked on arrival", [
                target(of("marcot_clone_verified_bytes"), "of the clone"),
                target(f"sum({rate_of('marcot_verified_bytes_total')})", "a second"),
            ], "bytes"),
            graph("Reused", [target(of("marcot_clone_reused_bytes"), "of the clone"),
                             target(f"sum({rate_of('marcot_reused_bytes_total')})", "a second")],
                  "bytes"),
            graph("Came again, of the clone", [target(of("marcot_clone_resent_bytes"),
                                                      "{{instance}}")], "bytes"),
            graph("Files", [
                target(of("marcot_clone_files_copied"), "copied"),
                target(of("marcot_clone_files_expected"), "expected"),
            ]),
            graph("Space", [
                target(of("marcot_staging_free_bytes"), "free"),
                target("marcot:clone_left_bytes{" + MATCHERS + ", " + one + "}", "left to copy"),
            ], "bytes"),
        ]),
        ("What went wrong", [
            graph("Retries of the recipient", [target(
                f"sum by (reason) ({increase_of('marcot_retries_total')})", "{{reason}}")]),
            graph("Gone on with", [target(
                f"sum by (cause) ({increase_of('marcot_resumes_total')})", "{{cause}}")]),
            graph("Came again, of what came", [target(
                "marcot:resent:ratio15m{" + MATCHERS + ", " + one + "}", "{{instance}}")],
                "percentunit"),
        ]),
    ]
    instance = variable(
        "instance", "Recipient",
        'label_values(marcot_operations_in_progress{namespace=~"$namespace", service=~"$service"}, '
        "instance)", multi=False)
    return dashboard("marcot-clone", "Marcot: one clone",
                     "The clone that runs on a recipient, or ran last: what its resource says.",
                     rows, [instance])


def text_of(board):
    return json.dumps(board, indent=1, ensure_ascii=False) + "\n"


def faults(board):
    """What no Grafana would tell: ids that come twice, panels that overlap, a fixed data source."""
    ids, cells = set(), set()
    for one in board["panels"]:
        where = f"{board['uid']}: {one['title']}"
        if one["id"] in ids:
            yield f"{where}: id {one['id']} comes twice"
        ids.add(one["id"])
        grid = one["gridPos"]
        own = {(x, y) for x in range(grid["x"], grid["x"] + grid["w"])
               for y in range(grid["y"], grid["y"] + grid["h"])}
        if cells & own or grid["x"] + grid["w"] > GRID_COLUMNS:
            yield f"{where}: it lies on another, or beside the grid"
        cells |= own
        if one["type"] == "row":
            continue
        sources = [one["datasource"], *(target["datasource"] for target in one["targets"])]
        if any(source["uid"] != "${datasource}" for source in sources):
            yield f"{where}: a data source that is not the variable"
        if not one["targets"] or any("$namespace" not in t["expr"] or "$service" not in t["expr"]
                                     for t in one["targets"]):
            yield f"{where}: a query without the variables"


def main():
    boards = {"marcot-operators.json": operators(), "marcot-clone.json": one_clone()}
    wrong = [fault for board in boards.values() for fault in faults(board)]
    titles = [one["title"] for board in boards.values() for one in board["panels"]]
    wrong += [f"{title}: two panels have this title" for title in titles if titles.count(title) > 1]
    check = sys.argv[1:] == ["--check"]
    if sys.argv[1:] and not check:
        sys.exit(__doc__)
    for name, board in boards.items():
        path = DASHBOARDS / name
        if not check:
            path.write_text(text_of(board), encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text_of(board):
            wrong.append(f"{path} is not what dashboards.py makes: run it")
    if check and {path.name for path in DASHBOARDS.iterdir()} != set(boards):
        wrong.append(f"{DASHBOARDS} holds what dashboards.py does not make")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
