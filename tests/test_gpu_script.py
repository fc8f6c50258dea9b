"""bench/gpu.sh with stand-ins for Python and timeout: order, times, archive, what goes on."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "bench" / "gpu.sh"
WORTH = ["build", "test", "ops", "steps", "large", "compiled"]
WORTH += ["sanitize", "scaling", "host", "tune", "profile"]
# Notes what it is asked for; the extension is there once it was built, results when bench ran.
PYTHON = """#!/bin/bash
echo "$DIVQAT_BUILD $*" >>calls
case "$*" in
  *get_device_capability*) echo 9.0 ;;
  *build_ext*) touch divqat/_C.so ;;
  *_native.missing*) [[ -f divqat/_C.so ]] ;;
  *pytest*) echo "2 failed"; exit 1 ;;
  *"bench run"*) echo "[1.5 ms]" >build/gpu/cuda-ops.json ;;
esac
"""
TIMEOUT = '#!/bin/bash\necho "$1 $2 $3 $4 $5" >>timeouts\nshift 5\nexec "$@"\n'
TOOL = '#!/bin/bash\necho "$(basename $0) $PYTORCH_NO_CUDA_MEMORY_CACHING $*" >>calls\n'


@pytest.fixture
def machine(tmp_path):
    """A function that runs the script in a new checkout, with or without an old archive."""

    def call(*stages, root="checkout", archive=None, **environment):
        here = tmp_path / root
        for folder in ("bench", "csrc/cuda", "divqat", "bin", "build"):
            (here / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(SCRIPT, here / "bench")
        for file in ("setup.py", "csrc/a.h", "csrc/cuda/b.cu"):
            (here / file).touch()
        tools = {"python3": PYTHON, "timeout": TIMEOUT, "ncu": TOOL, "compute-sanitizer": TOOL}
        for name, text in tools.items():
            (here / "bin" / name).write_text(text)
            (here / "bin" / name).chmod(0o755)
        if archive is not None:
            shutil.copy(archive, here / "build/gpu-results.tar.gz")
        path = f"{here / 'bin'}:/usr/bin:/bin"
        done = subprocess.run(
            ["bash", str(here / "bench/gpu.sh"), *stages],
            env={"PATH": path} | environment,
            capture_output=True,
            text=True,
        )
        return done, here

    return call


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_all_stages_run_in_the_order_of_worth_and_a_failure_stops_none(machine):
    done, here = machine()
    said = [line for line in done.stdout.splitlines() if line.split(":")[0] in WORTH]
    assert [line.split(":")[0] for line in said] == WORTH
    assert "test: FAILED with exit code 1" in done.stdout and "2 failed" in done.stdout
    assert done.stdout.count("FAILED") == 1 and done.returncode == 1 and not done.stderr
    calls = lines(here / "calls")
    assert "cuda setup.py build_ext --inplace" in calls
    assert any(line.startswith("compute-sanitizer 1 --error-exitcode 9") for line in calls)
    assert any(line.startswith("ncu  --clock-control none") for line in calls)
    assert all("--device cuda" in line for line in calls if "bench run" in line)


def test_every_command_is_interrupted_before_it_is_killed(machine):
    _, here = machine("ops", "steps", LIMIT="100")
    given = lines(here / "timeouts")
    assert [line.split()[:4] for line in given] == [["-s", "INT", "-k", "10"]] * 2
    first, second = (int(line.split()[4]) for line in given)
    assert 45 <= first <= 50 and 90 <= second <= 100  # what is left, not half of the whole
    (minutes, _) = (
        float(line.split("--minutes ")[1]) for line in lines(here / "calls") if "bench" in line
    )
    assert minutes == pytest.approx(first * 0.9 / 60, rel=1e-4)


def test_the_first_six_stages_are_planned_for_570_seconds(machine):
    (plan,) = [line for line in lines(SCRIPT) if line.startswith("PLAN=")]
    seconds = [int(entry.split(":")[1]) for entry in plan.strip("PLAN='").split()]
    assert sum(seconds[:6]) == 570
    done, here = machine(LIMIT="4")
    assert done.stdout.count("not run, 4 s are over") == len(WORTH)
    assert done.returncode == 0 and not lines(here / "timeouts")


def test_one_archive_has_all_and_a_bare_machine_goes_on_with_it(machine, tmp_path):
    _, first = machine("build", "ops", OUT=str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gpu-results.tar.gz"]
    archive = tmp_path / "out/gpu-results.tar.gz"
    with tarfile.open(archive) as packed:
        names = set(packed.getnames())
    wanted = {"divqat/_C.so", *(f"build/gpu/{n}" for n in ("build.log", "ops.log", "sources"))}
    assert wanted | {"build/gpu/cuda-ops.json"} <= names
    done, second = machine("build", root="bare", archive=archive)
    assert done.returncode == 0 and (second / "build/gpu/cuda-ops.json").exists()
    assert not any("build_ext" in line for line in lines(second / "calls"))
    (first / "csrc/cuda/b.cu").write_text("changed")
    machine("build")
    assert sum("build_ext" in line for line in lines(first / "calls")) == 2


def test_a_rehearsal_asks_nothing_of_a_gpu(machine):
    done, here = machine(*WORTH, REHEARSE="1")
    calls = "\n".join(lines(here / "calls"))
    assert "cuda" not in calls.replace("tests/test_cuda.py", "").replace(
        "build/gpu/cuda", ""
    ).replace("--contender divqat cuda", "").replace("missing('cpu')", "")
    assert "compute-sanitizer" not in calls and "ncu" not in calls and "bench tune" not in calls
    assert "--collect-only" in calls and "--batch 2" in calls
    assert "only on a GPU" in done.stdout


def test_no_gpu_and_an_unknown_stage_are_said_before_anything_is_built(machine, tmp_path):
    done, here = machine("bild")
    assert done.returncode == 2 and "got bild" in done.stderr and not lines(here / "timeouts")


def test_by_worth_each_test_runs_on_each_backend_before_any_other_case():
    here = Path(__file__).parent
    words = ["-m", "pytest", "--collect-only", "-q", "--by-worth", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, *words, "test_fake_quantize_lsq.py"],
        cwd=here,
        capture_output=True,
        text=True,
    )
    names = [line for line in done.stdout.splitlines() if "::" in line]
    backends = {name.partition("[")[2].split("-")[0].rstrip("]") for name in names}
    first = {(n.partition("[")[0], b) for n in names for b in backends if f"[{b}" in n}
    turns = [(n.partition("[")[0], b) for n in names for b in backends if f"[{b}" in n]
    assert len(names) > len(first) > 10
    assert set(turns[: len(first)]) == first
