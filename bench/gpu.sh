#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and no network: build with CUDA, run the GPU tests, check memory
# accesses, time. One call, under ten minutes; logs and results under $OUT (gpu-results).
# Needs python3 with torch (CUDA), pytest, hypothesis, ninja, and nvcc.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-results}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
failed=0

stage() {  # name, seconds, command …
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  if timeout "$seconds" "$@" >"$OUT/$name.log" 2>&1; then
    echo "$name: ok, $((SECONDS - start)) s"
  else
    echo "$name: FAILED with exit code $?, $((SECONDS - start)) s; the end of $OUT/$name.log:"
    tail -n 25 "$OUT/$name.log"
    failed=1
  fi
}

export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$($PYTHON -c \
  'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')}
stage build 300 env DIVQAT_BUILD=cuda MAX_JOBS="$(nproc)" $PYTHON setup.py build_ext --inplace
stage info 60 $PYTHON -m divqat info
stage test 240 $PYTHON -m pytest -m gpu
if command -v compute-sanitizer >/dev/null; then
  stage sanitizer 180 compute-sanitizer --error-exitcode 9 --target-processes all \
    $PYTHON -m pytest tests/test_cuda.py -m gpu -k small
else
  echo "sanitizer: there is no compute-sanitizer here"
fi
stage bench 180 $PYTHON -m bench.cuda --json "$OUT/cuda.json"
stage host 60 $PYTHON -m bench.triton_host --json "$OUT/triton-host.json"
stage tune 120 $PYTHON -m bench.cuda --tune --json "$OUT/triton-tune.json"
tail -n 60 "$OUT/bench.log" "$OUT/host.log" "$OUT/tune.log"
exit $failed
