# Start with `make demo` and `make test`. Both install what they need into .venv, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_DATA := $(CURDIR)/data/demo
# A tiny backbone on small images learns drawn people in a minute on two cores. Leave these flags out for a real model.
DEMO_TRAINING := --name demo --backbone test_convnext --init none --image-size 80 --lr 2e-3 \
	--photos-per-person 6 --epochs 10 --triplets-per-epoch 2000

# A machine without a GPU saves most of the download: make TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
SIZE := $(if $(TORCH_INDEX),with PyTorch from $(TORCH_INDEX),about 7 GB)
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

IMAGE ?= conv-facenet:$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

# Test files side by side: while the jobs of one file wait, those of another compute. One thread each is enough then.
TEST_PROCESSES ?= 3
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-all test-slurm test-image check lock docs bench image clean
.DEFAULT_GOAL := demo

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1): make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "making $(VENV) with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) has no venv module; on Debian: apt-get install python3-venv" >&2; exit 2; }
	@# Python of this environment, and no other, finds lib from any folder.
	@echo "$(CURDIR)" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/conv-facenet.pth"
	@touch $@

$(VENV)/.runtime: requirements.txt constraints.txt $(VENV)/.created
	@echo "installing requirements.txt into $(VENV) ($(SIZE), some minutes the first time)"
	@$(PIP_INSTALL) -r requirements.txt
	@touch $@

$(VENV)/.development: requirements-dev.txt requirements-track.txt requirements.txt constraints.txt $(VENV)/.created
	@echo "installing requirements-dev.txt into $(VENV) ($(SIZE), some minutes the first time)"
	@$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@ $(VENV)/.runtime

# From photos to a model with its report, on drawn people or on your own data: make demo DATA_URL=/my/folder
demo: $(VENV)/.runtime
ifdef DATA_URL
	@$(BIN)/python jobs/preprocess.py --data "$(DATA_URL)"
	@$(BIN)/python jobs/train.py --data "$(DATA_URL)" $(DEMO_TRAINING)
	@$(BIN)/python jobs/evaluate.py --data "$(DATA_URL)" --model "$(DATA_URL)/runs/demo"
else
	@echo "drawing people who do not exist into $(DEMO_DATA)"
	@$(BIN)/python jobs/sample.py --data "$(DEMO_DATA)" --identities 100
	@$(BIN)/python jobs/preprocess.py --data "$(DEMO_DATA)"
	@$(BIN)/python jobs/train.py --data "$(DEMO_DATA)" $(DEMO_TRAINING)
	@$(BIN)/python jobs/evaluate.py --data "$(DEMO_DATA)" --model "$(DEMO_DATA)/runs/demo"
endif

# Each behaviour once, in minutes. TESTS names some files or folders: then all that is in them runs.
test: $(VENV)/.development
	@$(PYTEST) --durations=20 --durations-min=5 $(or $(TESTS),-m "not slow and not slurm and not image")

# What takes longer: killed processes, lost nodes, full disks, interrupted sweeps, clusters that want a token.
test-slow: $(VENV)/.development
	@$(PYTEST) -m "slow and not slurm and not image"

test-all: test test-slow test-slurm test-image

# Tests the launchers on a real Slurm cluster. Needs root to start one, and installs Slurm if it is missing.
test-slurm: $(VENV)/.development
	@$(BIN)/python -m pytest -m slurm --durations=20 --durations-min=5 tests/slurm

# Builds the container image and runs it: some minutes, 12 GB of disk, and root if buildah has to be installed.
test-image: $(VENV)/.development
	@$(BIN)/python -m pytest -m image tests/image

check: $(VENV)/.development
	@$(BIN)/shellcheck --external-sources slurm/*.sh tests/slurm/*.sh .ci/run
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/python -m pip check

# Write constraints.txt anew, after a change of the requirements. pip resolves them from nothing, which takes minutes.
lock: $(VENV)/.created
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --dry-run --ignore-installed \
		--report $(VENV)/report.json --requirement requirements-dev.txt
	@{ echo "# Every package that requirements-dev.txt comes to, written by \`make lock\`."; \
		$(BIN)/python -c 'import json; found = json.load(open("$(VENV)/report.json"))["install"]; \
		print(*sorted("{name}=={version}".format(**each["metadata"]).lower().replace("_", "-") for each in found), sep="\n")'; \
		} > constraints.txt

# Write docs/flags.md anew from the code. `make test` fails when it is stale.
docs: $(VENV)/.development
	@$(BIN)/python docs/flags.py

# The figures of docs/measurements.md. BENCH_DATA names a folder with celeba/, lfw/ and weights/. Default: drawn photos.
bench: $(VENV)/.development
	@for script in detector_runtimes preprocess_quality turned_photos preprocess_speed preprocess_memory preprocess_batches hostile_photos planning aligned_sets forgetting curation_loop metrics_speed face_cache node_copies negative_search feature_precision confusable_people usage_counts gallery_search ijb train_speed training_job embed_speed sweep_speed start_up hostile_configurations kills scale_soak lost_nodes; do \
		echo "== bench/$$script.py"; $(BIN)/python -m bench.$$script || exit 1; done

# Builds the container image with docker, podman or buildah: make image IMAGE=registry/me/conv-facenet:0.1.0
# BUILD_ARGS passes build arguments of the Dockerfile: make image BUILD_ARGS="--build-arg BASE=python:3.11-slim"
image:
	@for builder in docker podman buildah; do \
		if $$builder info > /dev/null 2>&1; then \
			echo "building $(IMAGE) with $$builder (7 GB, some minutes the first time)"; \
			$$builder build --tag $(IMAGE) --build-arg VERSION=$(lastword $(subst :, ,$(IMAGE))) \
				--build-arg REVISION=$$(git rev-parse HEAD 2> /dev/null || echo unknown) $(BUILD_ARGS) . && exit; exit 1; fi; done; \
		echo "error: docker, podman or buildah is needed to build an image, and none of them works here" >&2; exit 2

clean:
	rm -rf $(VENV) data/demo
