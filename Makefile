# make demo and make test create .venv if it is missing and install into it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

PYTHON312 ?= python3.12
COMPAT := .venv-compat

.PHONY: install demo adapt mini-study test test-compat test-slow test-gpu soak bench bench-gpu bench-conversion bench-memory fp8-study lint clean

install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Real text -> tokenizer -> data set -> CLM then MLM on 2 processes -> resume -> Hugging Face model. Results in build/demo.
demo: install
	$(BIN)/python examples/quickstart/demo.py --output-dir build/demo

# A decoder -> checkpoint -> MLM -> Hugging Face encoder, compared before and after on film reviews. Results in build/adapt_decoder.
adapt: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/adapt_decoder/run.sh

# A small study from text to report: 12 models as a tree, hundreds of fine-tuning runs. Hours; results in build/mini_study.
mini-study: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/mini_study/run.sh

# Three files at a time: most tests wait for processes of their own, so that two cores have room for a third. In their order:
# the long files come first, so that none of them runs alone at the end.
test: install
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# The same tests under the newest megatron-core that is supported, which needs Python 3.12. What came out: docs/results/compatibility.md.
test-compat: $(COMPAT)/.installed
	$(COMPAT)/bin/python -m pytest --numprocesses 3 --dist loadfile

$(COMPAT)/.installed: setup.py constraints-compat.txt
	test -x $(COMPAT)/bin/python || $(PYTHON312) -m venv $(COMPAT)
	$(COMPAT)/bin/pip install --quiet --constraint constraints-compat.txt --editable '.[dev]'
	touch $@

test-slow: install
	$(BIN)/python -m pytest -m slow

# What only a GPU can show, Transformer Engine and FP8 included: run it on a machine that has them. Skips say why.
test-gpu: install
	$(BIN)/python -m pytest -s tests/gpu

# One run killed at random 30 times, with damaged checkpoints, against the undisturbed one. Results in build/soak.
soak: install
	$(BIN)/python -m tests.soak.run --output-dir build/soak

# Speed beside the alternatives and the hardware's limits, in turns: 36 minutes on an idle machine. Results in build/bench.
bench: install
	$(BIN)/python -m benchmarks --output-dir build/bench

# A training step on one GPU, beside transformers, megatron-core and the predictions. Results in build/bench_gpu.
bench-gpu: install
	$(BIN)/python -m benchmarks.gpu --output-dir build/bench_gpu

# Time and memory of import and export beside a plain copy, and parity for each family. Results in build/conversion.
bench-conversion: install
	$(BIN)/python -m tests.conversion.measure --output-dir build/conversion

# Peak memory of training on a CPU, predicted and measured. Results in build/memory, and in docs/results/memory.md.
bench-memory: install
	$(BIN)/python -m benchmarks.memory --output-dir build/memory

# The demo's plan in float32, bfloat16 and every FP8 recipe, emulated: losses side by side. Results in build/fp8_study.
fp8-study: install
	$(BIN)/python -m benchmarks.fp8_study --output-dir build/fp8_study

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build .pytest_cache .ruff_cache
