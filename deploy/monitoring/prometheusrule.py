#!/usr/bin/env python3
"""Makes prometheusrule.yaml, which is committed, of alerts.yaml: the rules as the operator takes them.

    prometheusrule.py           writes it
    prometheusrule.py --check   fails when what is there is something else
"""

import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
HEAD = """# Made by prometheusrule.py of alerts.yaml: change that.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: marcot
spec:
"""


def main():
    rules = (HERE / "alerts.yaml").read_text(encoding="utf-8")
    body = rules[rules.index("groups:\n") :].splitlines()
    text = HEAD + "".join(f"  {line}\n" if line else "\n" for line in body)
    made = HERE / "prometheusrule.yaml"
    if sys.argv[1:] == ["--check"]:
        if not made.exists() or made.read_text(encoding="utf-8") != text:
            sys.exit(f"{made} is not what prometheusrule.py makes: run it")
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        made.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
