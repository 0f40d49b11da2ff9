# Each target is one line that a person could type. PYTHON picks the interpreter.
PYTHON ?= python3
URL ?= http://127.0.0.1:8000/v1
MODEL ?= smollm2-135m

.PHONY: setup serve test lint bench

setup:
	$(PYTHON) -m pip install '.[test]'

serve:
	$(PYTHON) -m pip install . && $(PYTHON) -m server

test:
	$(PYTHON) -m pip install '.[test]' && $(PYTHON) -m pytest

lint:
	ruff check . && ruff format --check . && mypy --strict server engine && clang-format --dry-run -Werror $$(find cpp -name '*.h' -o -name '*.cpp')

bench:
	$(PYTHON) -m bench.serve --url $(URL) --model $(MODEL) --ignore-eos
