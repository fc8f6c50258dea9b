# make demo   the whole workflow on a small data set that needs no download
# make test   linters, type checker and all tests
# make quick  linters, type checker and one case of every fast test, during development
# make test-networks   the networks of torchvision and timm, an hour or two; not in make test
# make test-examples   the examples in Lightning, Hugging Face and timm; not in make test
# make test-runtimes   exported files in ExecuTorch and OpenVINO; not in make test
# make docs   the pages of docs/ as a site, in build/site
# make rehearse   bench/gpu.sh, as far as a machine without a GPU can; not in make test
# make test-docs, make test-package   the notebook and the look of the pages; wheel and sdist
# All of them set up a fresh machine; PYTHON=python3.12 selects an interpreter (3.10 or later).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo fashion-mnist docs test test-docs test-package test-networks test-examples test-runtimes quick rehearse test-triton triton-newest triton-oldest lint sanitize \
	install clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/divqat run --config configs/digits.yaml --out runs/digits

fashion-mnist: .venv/installed
	$(BIN)/divqat run --config configs/fashion-mnist.yaml --out runs/fashion-mnist

# One thread and one import of torch per worker; the tests of a file share a worker and its trainings.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: lint .venv/kernels
	$(PYTEST)
	$(MAKE) test-triton

# The site; its build and its links are in make test.
docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "results  build/site/index.html"

# The notebook runs, and no page is wider than a telephone's or a notebook's screen (needs chromium).
test-docs: .venv/docs docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/check_docs.py

# Wheel and sdist build, and the wheel runs the five lines of README.md in an empty environment.
test-package: .venv/docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/check_package.py

# One case of each test that is not marked slow; lists tests whose mark should change.
quick: lint .venv/kernels
	$(PYTEST) --quick --durations 10 --durations-min 1

# The Triton kernels in Triton's interpreter, which is on or off for a whole process: all suites with the
# installed release; with the oldest supported one, and a numpy that its interpreter supports, only the
# comparison of each kernel with its reference.
TRITON_TESTS := tests/test_triton.py tests/test_dispatch.py tests/test_divergence_loss.py \
	tests/test_fake_quantize.py $(wildcard tests/test_fake_quantize_*.py tests/test_op_*.py)
OLDEST_TRITON := .venv/triton-3.6.0
test-triton: .venv/dev $(OLDEST_TRITON)
	$(MAKE) -j2 --output-sync triton-newest triton-oldest

triton-newest:
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -p no:cacheprovider -n 2 $(TRITON_TESTS)

triton-oldest:
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 PYTHONPATH=$(OLDEST_TRITON) \
		$(BIN)/python -m pytest -p no:cacheprovider tests/test_triton.py

$(OLDEST_TRITON): .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ triton==3.6.0 numpy==2.2.6
	@touch $@

# The examples, each in its framework. These are installed beside .venv's packages, which stay as they are.
EXAMPLES := .venv/examples
test-examples: .venv/dev $(EXAMPLES)
	OMP_NUM_THREADS=1 PYTHONPATH=$(EXAMPLES) $(BIN)/python -m pytest -p no:cacheprovider -n 2 tests/examples

# The networks of torchvision and timm, in a folder of their own: PyPI's torchvision needs a CUDA torch, and
# other packages fail if they find it beside one for the CPU (bench/architectures.py can import it).
NETWORKS := .venv/networks
test-networks: .venv/dev $(NETWORKS)
	OMP_NUM_THREADS=1 PYTHONPATH=$(NETWORKS) $(BIN)/python -m bench networks --again --check --least 100 --seconds 5 --runs runs/test-networks

# Exported files in the runtimes that .venv lacks, which are in a folder of their own.
RUNTIMES := .venv/runtimes
test-runtimes: .venv/dev $(RUNTIMES)
	OMP_NUM_THREADS=1 PYTHONPATH=$(RUNTIMES) $(BIN)/python -m pytest -p no:cacheprovider -n 2 tests/runtimes
	PYTHONPATH=$(RUNTIMES) $(BIN)/python -m bench runtimes --check

$(EXAMPLES) $(NETWORKS) $(RUNTIMES): .venv/%: requirements-%.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ -r $<
	@touch $@

# bench/gpu.sh without a GPU: it builds, imports what it needs, measures a case or two on the CPU, and packs
# the archive. With a torch for CUDA and nvcc, which .venv does not have, it compiles the CUDA kernels:
# make rehearse REHEARSE_PYTHON=/path/of/its/python. In a copy, so that the extension here stays.
REHEARSE_PYTHON ?= $(CURDIR)/$(BIN)/python
rehearse: .venv/dev
	rm -rf build/rehearse && mkdir -p build/rehearse
	cp -r bench csrc divqat docs kernels tests zoo pyproject.toml setup.py README.md build/rehearse
	rm -f build/rehearse/divqat/_C*.so
	cd build/rehearse && REHEARSE=1 LIMIT=3600 PYTHONPATH=. PYTHON=$(REHEARSE_PYTHON) OUT=$(CURDIR)/build \
		bash bench/gpu.sh build test ops steps large compiled sanitize scaling host tune profile

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, with the tests' odd shapes.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
sanitize: .venv/dev
	@mkdir -p build
	CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" DIVQAT_BUILD=cpu $(BIN)/python setup.py --quiet build \
		--build-base build/sanitize --build-lib build/sanitize/lib > build/sanitize.log 2>&1 || (cat build/sanitize.log; false)
	cd build/sanitize/lib && ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		../../../$(BIN)/python -m pytest -p no:cacheprovider ../../../tests/test_native.py

install: .venv/installed

# Compiles the native kernels if there is a compiler, and prints the result.
.venv/installed: requirements.txt pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "divqat needs Python 3.10 or later; use PYTHON=python3.x")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(BIN)/python -c 'import divqat; [print("native kernels,", *item) for item in divqat.ops.native_kernels().items()]'
	@touch $@

# The CUDA kernels for the tests: for the emulator on the CPU and, if there is nvcc, for GPUs,
# disassembled.
.venv/kernels: .venv/dev tests/cubins.py $(wildcard csrc/cuda/*.* tests/cuda_emulator/*.* tests/cuda_emulator/include/*.* \
	tests/cuda_emulator/include/*/*.*)
	PYTHONPATH=tests $(BIN)/python -m cuda_emulator.build
	PYTHONPATH=tests $(BIN)/python -m cubins
	@touch $@

.venv/dev: .venv/installed requirements-dev.txt requirements-bench.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-bench.txt
	@touch $@

.venv/docs: .venv/dev requirements-docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
