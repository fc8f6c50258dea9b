#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and no network: build with CUDA, run the GPU tests, check memory
# accesses, time. One call; no stage begins or goes on after $LIMIT seconds (580). Logs and results lie
# under $OUT (gpu-results).
# Needs python3 with torch (CUDA), pytest, hypothesis, ninja, and nvcc.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-results}
LIMIT=${LIMIT:-580}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
failed=0

stage() {  # name, seconds, command …
  local name=$1 seconds=$2 start=$SECONDS left=$((LIMIT - SECONDS))
  shift 2
  if ((left < 5)); then
    echo "$name: NOT RUN, $LIMIT seconds are over"
    failed=1
    return
  fi
  seconds=$((seconds < left ? seconds : left))
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
stage build 240 env DIVQAT_BUILD=cuda MAX_JOBS="$(nproc)" $PYTHON setup.py build_ext --inplace
stage info 60 $PYTHON -m divqat info
stage test 150 $PYTHON -m pytest -m gpu
if command -v compute-sanitizer >/dev/null; then
  stage sanitizer 60 compute-sanitizer --error-exitcode 9 --target-processes all \
    $PYTHON -m pytest tests/test_cuda.py -m gpu -k small
else
  echo "sanitizer: there is no compute-sanitizer here"
fi
# Results are written after every case: a stage that runs out of time keeps what it has measured.
stage ops 150 $PYTHON -m bench run --device cuda --layout contiguous --seconds 0.05 --minutes 2 \
  --json "$OUT/cuda-ops.json" --csv "$OUT/cuda-ops.csv" --plot "$OUT/cuda-ops.png"
stage steps 90 $PYTHON -m bench step --device cuda --seconds 0.5 --dtype bfloat16 \
  --network ResNet-50 ResNet-20 MobileNetV2 --batch 256 --mode eager "CUDA graph" --minutes 1 \
  --json "$OUT/cuda-steps.json" --plot "$OUT/cuda-steps.png"
stage large 60 $PYTHON -m bench step --device cuda --seconds 0.5 --dtype bfloat16 \
  --network ResNet-50 --batch 1024 --mode eager "CUDA graph" --contender "divqat cuda" \
  --json "$OUT/cuda-options.json" --plot "$OUT/cuda-options.png"
stage scaling 60 $PYTHON -m bench scale --device cuda --seconds 0.05 --minutes 0.7 \
  --json "$OUT/cuda-scaling.json" --plot "$OUT/cuda-scaling.png"
stage host 30 $PYTHON -m bench host --seconds 0.2 --json "$OUT/triton-host.json"
stage tune 60 $PYTHON -m bench tune --seconds 0.02 --minutes 0.7 --json "$OUT/triton-tune.json"
stage compiled 120 $PYTHON -m bench step --device cuda --seconds 0.5 --dtype bfloat16 \
  --network ResNet-50 --batch 256 --mode compiled --json "$OUT/cuda-steps-compiled.json"
for log in ops steps large scaling host tune compiled; do
  if [[ -f $OUT/$log.log ]]; then echo "== $log"; tail -n 40 "$OUT/$log.log"; fi
done
exit $failed
