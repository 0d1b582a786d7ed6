# Two commands do everything on a fresh machine: `make train` and `make test`. No root, no compiler.
#
#   make setup   .venv with pinned packages, an MPI included      make lint    ruff, mypy, shellcheck, codespell and others
#   make train   a first model, on English found on this machine  make bench   the benchmarks of benchmarks/
#   make test    all tests                                        make soak    kill a run 20 times, compare to the bit
#   make quick   the tests without MPI jobs, about a minute: run them after each change
#   make simulate MINUTES=10   the server under random schedules; or SCHEDULES=15000, so many of them
#   make mutants   the same with each guard of the protocol removed in turn, which the simulator must notice
#   make transports   the server on every transport of this machine: MPICH without CMA, Open MPI, TCP, 16 ranks as 2 to 16 nodes
#   make docs    the documentation as a site, in site/
#   make native  compile the C code ahead, for compute nodes without a compiler that share the cache directory
#   make clean   remove .venv, .venv-docs and site/ (data/ and runs/ stay)

PYTHON ?= python3
# Preprocessing runs on cores. Training has one rank per GPU where there are GPUs, else one per core. Both are counted
# when they are used, as .venv must be there first.
PREPROCESS_RANKS ?= $(shell .venv/bin/python -m lapse_elmo.mpi.host cores)
RANKS ?= $(if $(findstring --device cpu,$(TRAIN_OPTIONS)),$(PREPROCESS_RANKS),$(shell .venv/bin/python -m lapse_elmo.mpi.host))
MPIRUN ?= .venv/bin/mpirun
TRAIN_OPTIONS ?= --max-minutes 5
# The first run of `make train` is runs/first, which the README opens. Later ones leave it alone: bin/train names them by time.
RUN_DIR ?= $(if $(wildcard runs/first/checkpoints/*),,runs/first)
TEST_OPTIONS ?=
MINUTES ?= 10
TRANSPORTS_OPTIONS ?=

# On this machine alone. Within a job of Slurm, MPICH's mpirun would ask srun for its processes; in a shell of `srun --pty`,
# many versions of Slurm let that wait forever.
data/demo-text data/shards train: export HYDRA_LAUNCHER ?= fork
data/demo-text data/shards train: export HYDRA_RMK ?= user

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: setup native train test quick soak simulate mutants transports lint prose bench docs clean dev

PIP = .venv/bin/python -m pip --disable-pip-version-check install --quiet --no-warn-conflicts

setup: .venv/.installed

# The stamp is written last, so that an interrupted set-up is repeated.
.venv/.installed: requirements.txt requirements-nodeps.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"lapse-elmo needs Python 3.10 to 3.13, but $(PYTHON) is {v[0]}.{v[1]}: name another one with PYTHON=")'
	@echo "Installing into .venv: one to three minutes, 1.2 GB without CUDA"
	@$(PYTHON) -m venv .venv || { echo "no virtual environment could be made: install your system's python3-venv, or name another Python with PYTHON="; exit 1; }
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps -r requirements-nodeps.txt
	@touch $@

dev: .venv/.installed-dev

.venv/.installed-dev: .venv/.installed requirements-dev.txt requirements-dev-nodeps.txt
	@$(PIP) -r requirements-dev.txt
	@$(PIP) --no-deps -r requirements-dev-nodeps.txt
	@touch $@

data/demo-text: | .venv/.installed
	$(MPIRUN) -n $(PREPROCESS_RANKS) bin/preprocess demo-text --output $@

data/vocab.txt: | data/demo-text
	bin/preprocess vocab 'data/demo-text/train-*' --output $@

data/shards: | data/vocab.txt
	$(MPIRUN) -n $(PREPROCESS_RANKS) bin/preprocess shards 'data/demo-text/train-*' --heldout 'data/demo-text/heldout-*' --vocab data/vocab.txt --output $@

train: .venv/.installed | data/shards
	$(MPIRUN) -n $(RANKS) bin/train $(if $(RUN_DIR),--run-dir $(RUN_DIR)) $(TRAIN_OPTIONS)

native: .venv/.installed
	.venv/bin/python -m lapse_elmo.native

test: .venv/.installed-dev
	.venv/bin/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations=25 --durations-min=1 $(TEST_OPTIONS)

QUICK_TESTS = tests/config tests/corpus tests/model/test_bilm.py tests/model/test_softmax.py tests/model/test_optimizers.py \
	tests/ps/test_solo.py tests/ps/test_rows.py tests/ps/test_protocol_document.py tests/test_batches.py tests/test_requirements.py \
	tests/test_rng.py tests/test_schedule.py tests/test_structure.py tests/test_tables.py
quick: .venv/.installed-dev
	.venv/bin/python -m pytest $(QUICK_TESTS) $(TEST_OPTIONS)

soak: .venv/.installed-dev
	.venv/bin/python -m tests.training.soak $(SEED)

simulate: .venv/.installed-dev
	.venv/bin/python -m tests.simulator $(if $(SCHEDULES),--schedules $(SCHEDULES),--minutes $(MINUTES))

mutants: .venv/.installed-dev
	.venv/bin/python -m tests.simulator.mutants

transports: .venv/.installed-dev
	.venv/bin/python -m tests.ps.transports $(TRANSPORTS_OPTIONS)

# Harper checks the prose of the documents: spelling, with the words of tests/vocabulary.txt, sentences above 40 words, and
# its rules of grammar and style, without those that tables, letters for shapes and nodes, and British English would break.
PROSE = README.md CONTRIBUTING.md $(wildcard docs/*.md docs/decisions/*.md)
NO_RULES = AnA,CapitalizePersonalPronouns,CompoundNouns,DiscourseMarkers,DisjointPrefixes,ExpandConfiguration,ExpandControl,$\
	ExpandMemoryShorthands,ExpandTimeShorthands,HavePronoun,MassNouns,MergeWords,MissingPreposition,MissingTo,$\
	NumericRangeEnDash,OneOfTheSingular,OrthographicConsistency,Overall,OxfordComma,PronounVerbAgreement,$\
	QuantifierNumeralConflict,SentenceCapitalization,SingleBe,SplitWords,ToTwoToo,UseEllipsisCharacter,UseTitleCase
HARPER = RUST_BACKTRACE=0 .venv/bin/harper lint --dialect gb --no-color --format compact --quiet --user-dict-path tests/vocabulary.txt \
	--ignore $(NO_RULES) $(PROSE)

prose: .venv/.installed-dev
	@$(HARPER)

lint: .venv/.installed-dev
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/shellcheck --external-sources slurm/*.s* slurm/sites/* slurm/others/* .ci/run
	.venv/bin/codespell
	.venv/bin/lint-imports
	@$(HARPER)

bench: .venv/.installed-dev | data/shards
	.venv/bin/python -m benchmarks

docs: .venv-docs/.installed
	.venv-docs/bin/mkdocs build --strict
	@echo "open site/index.html"

# An environment of its own: mkdocs shares no package with training.
.venv-docs/.installed: requirements-docs.txt
	@$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip --disable-pip-version-check install --quiet -r requirements-docs.txt
	@touch $@

clean:
	rm -rf .venv .venv-docs site
