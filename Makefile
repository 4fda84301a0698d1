# make demo   set up .venv, then the whole story on the embedded model
# make test   set up .venv, then the fast tests
# make test-all   the rest of the tests: all cases, the real model, processes that are killed
# make lint   format and lint, as .ci/run does
# make bench  what is faster than what, measured side by side
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# GPU machines get unsloth as well; everything else is the same.
PINS   := $(if $(shell command -v nvidia-smi 2>/dev/null),requirements-gpu.txt,requirements.txt)
# What llama.cpp is built without: multimodal (LLAVA_BUILD) and its common library (slim.cmake). On 2 cores that is a
# build of about 100 seconds instead of 5 to 9 minutes.
SLIM   := -DLLAVA_BUILD=OFF -DCMAKE_PROJECT_INCLUDE=$(CURDIR)/kardia/llama/slim.cmake
CUDA   := $(if $(shell command -v nvcc 2>/dev/null),$(if $(findstring gpu,$(PINS)),-DGGML_CUDA=ON))

.PHONY: demo test test-all lint bench clean
demo: $(VENV)/ready
	$(BIN)/python kardia_lite.py demo

test: $(VENV)/ready-to-test
	$(BIN)/python -m pytest -q -m "not slow and not gpu" tests

test-all: $(VENV)/ready-to-test
	$(BIN)/python -m pytest -q -m "slow and not gpu" tests

lint: $(VENV)/ready-to-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

bench: $(VENV)/ready
	$(BIN)/python tests/bench_judge.py
	$(BIN)/python tests/bench_grpo.py

# The stamp is written last: an interrupted set-up is simply done again.
$(VENV)/ready: requirements.txt requirements-gpu.txt kardia/llama/slim.cmake
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	@echo "building llama.cpp and installing the rest: a few minutes"
	CMAKE_ARGS="$(SLIM) $(CUDA) $(CMAKE_ARGS)" $(BIN)/python -m pip install --quiet -r $(PINS)
	touch $@

$(VENV)/ready-to-test: tests/requirements.txt $(VENV)/ready
	$(BIN)/python -m pip install --quiet -r tests/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) runs
