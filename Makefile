# Every target but clean first installs the package into $(VENV), if necessary.
#
# make demo       draws nuclei with the weights of this repository, then trains and
#                 evaluates a small Mask R-CNN, and plots its predictions
# make demo-clip  compares few-shot methods on an image encoder of ImageNet, on drawn
#                 images, or on photographs with CIFAR10=cifar10_jpg.zip
# make page       starts the interactive demo in a browser, on this machine only
# make test       runs the tests
# make test-asan  runs the tests of the compiled ops under AddressSanitizer and UBSan
# make test-gpu   runs the tests on the GPU and times the network there
# make soak       kills trainings and other runs again and again, for 25 minutes
# make docs       writes the documentation into build/site
# make lint       checks style and formatting
# make format     corrects style and formatting
# make doctor     reports the installed packages, the compiled ops and any problem
# make lock       writes requirements/onedl.txt: the versions that setup installs
# make clean      removes the virtual environment and the build

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SCENES := data/scenes
CSRC := $(shell find dsnet_mm/ops/csrc -type f)
SHIM := $(wildcard tests/cuda_on_cpu/*)
LOCKS := $(wildcard requirements/*)
CLS_CONFIG := configs/dsnet/dsnet-demo_scenes.py
DET_CONFIG := configs/dsnet/mask_rcnn_dsnet_demo_scenes.py
NUCLEI := work_dirs/demo_nuclei
DET_DIR := work_dirs/mask_rcnn_dsnet_demo_scenes
# The sanitized ops are built in a copy of the package. The ordinary build is kept.
ASAN_COPY := build/asan
ASAN_TESTS := tests/ops/test_ops.py tests/ops/test_inference_ops.py \
	tests/ops/test_feed_forward.py tests/ops/test_memory_bounds.py \
	tests/ops/test_random_calls.py
ASAN_LIBRARIES = $(shell for name in asan stdc++; do \
	$${CXX:-g++} -print-file-name=lib$$name.so; done)
# Processes that run tests, and the threads of each. A file of tests stays in one process.
TEST_PROCESSES ?= 2
PYTEST = OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m pytest -n $(TEST_PROCESSES) --dist loadfile
SOAK := work_dirs/soak

# Waiting OpenMP threads spin by default. If other processes need the cores, this makes
# the program ten times slower. A smaller count lets the threads sleep sooner.
export GOMP_SPINCOUNT ?= 10000

.PHONY: setup demo demo-clip page test test-asan test-gpu soak docs lint format doctor lock clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py tools/install.sh $(LOCKS) $(CSRC)
	PYTHON=$(PYTHON) bash tools/install.sh $(VENV)
	touch $@

demo: setup $(NUCLEI)/predictions.json
	$(BIN)/python tools/make_scenes.py $(SCENES)
	$(BIN)/python tools/train.py $(CLS_CONFIG) --resume
	$(BIN)/python tools/train.py $(DET_CONFIG) --resume
	$(BIN)/python tools/test.py $(DET_CONFIG) $(DET_DIR)/last.pth
	$(BIN)/python tools/analysis_tools/plot_predictions.py $(DET_CONFIG) \
		$(DET_DIR)/last.pth $(DET_DIR)/predictions.png --overwrite

# A result within seconds, from weights that were trained on real images.
$(NUCLEI)/predictions.json: | setup
	rm -rf $(NUCLEI)
	$(BIN)/python tools/infer.py mask_rcnn_dsnet_long_nuclei \
		weights/mask_rcnn_dsnet_long_nuclei.safetensors docs/images/nuclei.jpg \
		--out $(NUCLEI) --score-thr 0.5
	@echo 'The nuclei are drawn in $(NUCLEI)/images/nuclei.jpg. Now the training starts.'

demo-clip: setup
	$(BIN)/python tools/demo_clip.py $(if $(CIFAR10),--cifar10 $(CIFAR10))

page: setup
	$(BIN)/python -m dsnet_mm.demo

test: setup
	$(PYTEST)

test-asan: setup
	rm -rf $(ASAN_COPY)/dsnet_mm $(ASAN_COPY)/tests
	mkdir -p $(ASAN_COPY)
	cp -a dsnet_mm tests setup.py pyproject.toml $(ASAN_COPY)
	rm -f $(ASAN_COPY)/dsnet_mm/ops/_C.*.so
	cd $(ASAN_COPY) && DSNET_MM_SANITIZE=1 DSNET_MM_WITH_OPS=1 \
		$(abspath $(BIN))/python setup.py build_ext --inplace
	cd $(ASAN_COPY) && export LD_PRELOAD='$(ASAN_LIBRARIES)' \
		ASAN_OPTIONS=detect_leaks=0 && \
		$(abspath $(BIN))/python -c \
		'from dsnet_mm.ops import native; exit(native.WHY_NOT)' && \
		$(PYTEST) $(ASAN_TESTS)

test-gpu: setup
	$(BIN)/python -c 'from dsnet_mm.ops import native; exit(native.why_not_cuda())'
	$(BIN)/python -m pytest tests/ops/test_gpu.py
	$(BIN)/python tools/analysis_tools/benchmark.py --device cuda

soak: setup
	rm -rf $(SOAK)
	$(BIN)/python tools/soak.py --out $(SOAK)

docs: setup
	$(BIN)/python -m sphinx -E -W --keep-going -q -c docs . build/site
	@echo 'The first page is build/site/index.html.'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC) $(SHIM)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC) $(SHIM)

doctor: setup
	$(BIN)/python -m dsnet_mm

# Versions stay as they are where they fit; delete the file for the newest ones.
lock: setup
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip compile -q --python $(BIN)/python --universal --python-version 3.10 \
		--generate-hashes --no-annotate --custom-compile-command "make lock" \
		--no-build-isolation requirements/build.in pyproject.toml \
		$(addprefix --extra ,onedl clip demo export parquet docs test lint) \
		-o requirements/onedl.txt

clean:
	rm -rf $(VENV) build dist *.egg-info dsnet_mm/ops/_C.*.so dsnet_mm/ops/build_info.json
