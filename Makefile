# One command for each thing that people and CI do here. `make demo` and `make test` do all their
# set-up themselves.

export PATH := $(CURDIR)/.tools/bin:$(PATH)
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: help demo test lint compare clients bench descriptor api-reference \
	soak crash-matrix faults fuzz test-mysql deploy-test audit sbom dashboards packages removals skew

help:
	@echo "make demo                   clone a sample directory over TLS, and check the copy"
	@echo "make demo ENGINE=mariadb    clone a live MariaDB, attach the clone as a replica"
	@echo "make test                   install what the tests need, then run all tests"
	@echo "make lint                   fmt, clippy, docs, cargo-deny, buf"
	@echo "make compare [PLANT=1]      clone a tree of every kind of entry three ways and compare"
	@echo "make clients                drive both services by grpcio and grpcurl"
	@echo "make bench [JSON=FILE]      rates, CPU and memory beside peers and targets; BENCH=name for one:"
	@echo "                            memory-to-memory, durable, small-files, local, live, memory"
	@echo "make bench BENCH=mariadb    clones of a live server beside mariadb-backup, end to end"
	@echo "make bench BENCH=cuts       how long commits are blocked, CUTS=200 times"
	@echo "make bench BENCH=delta      a changed database onto an older copy, beside rsync"
	@echo "make bench BENCH=resume     what is left to do after a kill"
	@echo "make test-mysql             install MySQL 9.7 in a tree of its own, clone it live, check"
	@echo "make soak N=20 [SABOTAGE=x] [DATABASE=mysql]"
	@echo "                            clone a live server over and over, and check each clone"
	@echo "make crash-matrix KILLS=100 CUTS=50"
	@echo "                            kill and power-cut installs after every step and at random"
	@echo "make faults N=200 [SEED=x]  break something in each of N clones of a live MariaDB"
	@echo "make removals [ONLY=x] [AREA=x]"
	@echo "                            take out one mechanism after the other: the stories that guard it must fail"
	@echo "make fuzz [EACH=seconds]    run the parsers' fuzz targets, and tell the lines that they reach"
	@echo "make fuzz PLANT=1           find a bug that is planted in each parser"
	@echo "make skew                   clone between the programs of today and the first ones of v1"
	@echo "make dashboards             ask a Prometheus all that dashboards and alerts ask, over a real clone"
	@echo "make audit                  look the dependencies up among the published advisories"
	@echo "make sbom                   bill of materials of what ships (CycloneDX), checked"
	@echo "make api-reference          write docs/api.md from the .proto files"
	@echo "make deploy-test            build images, check every manifest, play two overlays by podman"
	@echo "make packages               Debian packages: built, linted, installed in a clean Debian, upgraded, purged"
	@echo "make descriptor             accept the API as it is now for buf breaking"

ENGINE ?= files
demo:
	@case "$(ENGINE)" in \
	  files) tests/tools/demo.sh ;; \
	  mariadb) tests/tools/demo_mariadb.sh ;; \
	  *) echo "make demo: ENGINE is '$(ENGINE)', files and mariadb are there" >&2; exit 1 ;; \
	esac

test:
	@tests/tools/setup.sh test
	@tests/tools/test.sh

lint:
	@tests/tools/setup.sh lint
	@tests/tools/lint.sh

compare:
	@tests/tools/compare.sh

clients:
	@tests/tools/setup.sh test
	@tests/tools/clients.sh

BENCH ?= all
bench:
	@tests/tools/bench.sh $(BENCH)

descriptor:
	@tests/tools/setup.sh lint
	@tests/tools/descriptor.sh

api-reference:
	@tests/tools/setup.sh lint
	@.tools/venv/bin/python tests/tools/api_reference.py

soak:
	@tests/tools/setup.sh test $(if $(filter mysql,$(DATABASE)),mysql)
	@tests/tools/soak.sh

fuzz:
	@tests/tools/setup.sh test
	@tests/tools/fuzz.sh

crash-matrix:
	@tests/tools/setup.sh test
	@tests/tools/crash_matrix.sh

faults:
	@tests/tools/setup.sh test
	@tests/tools/faults.sh

removals:
	@tests/tools/setup.sh test
	@tests/tools/setup.sh mysql || [ $$? -eq 3 ]
	@tests/tools/removals.py --only "$(ONLY)" --area "$(AREA)"

skew:
	@tests/tools/skew.sh

test-mysql:
	@tests/tools/test_mysql.sh

dashboards:
	@tests/tools/setup.sh test
	@tests/tools/dashboards.sh

# Ends with an error also where it could not run.
audit:
	@tests/tools/setup.sh lint
	@tests/tools/audit.sh

sbom:
	@python3 tests/tools/sbom.py "$${CARGO_TARGET_DIR:-target}/sbom/marcot.cdx.json"

deploy-test:
	@tests/tools/setup.sh test deploy
	@tests/tools/deploy_test.sh

packages:
	@tests/tools/setup.sh packages
	@tests/tools/packages.sh
