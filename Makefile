# `make up` and `make test` do everything; the rest is for daily work.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PORT   ?= 8000
HOST   ?= 127.0.0.1

TEMPLATES := templates evaluation/templates
# what an installation for a team sets (docs/operations.md)
PRODUCTION = PORTAL_DATA_DIR=$$(mktemp -d) PORTAL_ALLOWED_HOSTS=portal.example PORTAL_HTTPS=1 \
             PORTAL_TRUSTED_ORIGINS=https://portal.example

.PHONY: up test test-all test-postgres check coverage chaos attack schema bench messages clean

up: $(VENV)/.runtime  ## set up what is missing, then run the portal
	@$(BIN)/python manage.py up --host $(HOST) --port $(PORT)

test: $(VENV)/.dev  ## the default tests: CPU, no network, no weights
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(VENV)/.dev  ## with the slow ones and PostgreSQL (TEST_POSTGRES_URL)
	$(BIN)/python -m pytest -m "not gpu"

test-postgres: $(VENV)/.dev  ## the model tests on the server that TEST_POSTGRES_URL names
	$(BIN)/python -m pytest -m postgres

check: $(VENV)/.dev  ## everything but the tests: style, templates, imports, types, texts, docs, settings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/djangofmt --check $(TEMPLATES)
	$(BIN)/djangofmt check $(TEMPLATES)
	$(BIN)/lint-imports
	$(PRODUCTION) $(BIN)/python manage.py check --deploy --fail-level WARNING
	$(PRODUCTION) $(BIN)/python manage.py makemigrations --check --dry-run
	$(BIN)/python -m pytest tests/test_texts.py tests/test_docs.py
	$(BIN)/mypy

coverage: $(VENV)/.dev  ## what the default tests run through, their worker and trainer processes included
	$(BIN)/coverage erase
	-$(BIN)/coverage run -m pytest -n 2 --dist loadfile
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

chaos: $(VENV)/.dev  ## a portal at work and 50 faults: make chaos SEED=7 (last line: figures)
	$(BIN)/python -m tests.chaos --seed $(or $(SEED),1) --faults $(or $(FAULTS),50)

attack: $(VENV)/.dev  ## a portal of its own under hostile requests: make attack SEED=7 (last line: figures)
	$(BIN)/python -m tests.attack --seed $(or $(SEED),1) --requests $(or $(REQUESTS),4000)

schema: $(VENV)/.dev  ## every operation of the OpenAPI schema, by schemathesis; minutes
	$(BIN)/python -m pytest -m slow tests/attack/test_schema.py

bench: $(VENV)/.dev  ## one benchmark: make bench NAME=engine
	$(BIN)/python -m tests.bench.$(NAME) --json

messages: $(VENV)/.runtime  ## collect and compile the Chinese texts (needs GNU gettext)
	$(BIN)/python manage.py makemessages -l zh_Hans --no-obsolete --no-location -i .venv -i var -i tests
	$(BIN)/python manage.py compilemessages -l zh_Hans -i .venv

# torch first and alone, so that no other package chooses its build
$(VENV)/.runtime: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install $$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)
	$(BIN)/python -m pip install -r requirements.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	@touch $@

clean:  ## remove the virtual environment; data under var/ stays
	rm -rf $(VENV)
