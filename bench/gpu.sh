#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, without git or network: build with CUDA, test, measure, in one call.
#
#   bench/gpu.sh              what fits $LIMIT seconds (570), in the order of worth
#   bench/gpu.sh STAGE ...    these, which share $LIMIT evenly; one that ends early leaves more to the next
#
# After every stage everything lies in one archive, $OUT/gpu-results.tar.gz (OUT=build): logs, results,
# the extension and the caches of compiled kernels. On a machine that was bare, put it back to
# build/gpu-results.tar.gz: the next call goes on where this one was stopped. $DIVQAT_COMMIT names the
# sources where there is no git. Needs python3 with torch (CUDA), pytest, hypothesis, ninja, and nvcc.
# REHEARSE=1 runs on a machine without a GPU what does not need one (make rehearse).
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build} LIMIT=${LIMIT:-570} PYTHON=${PYTHON:-python3} REHEARSE=${REHEARSE:-}
WORK=build/gpu
# stage:seconds, in the order of worth. The first six are LIMIT together; the others run if these were
# quicker.
PLAN='build:150 test:120 ops:120 steps:70 large:40 compiled:70 sanitize:60 scaling:60 host:30 tune:60 profile:60'
[[ -d $WORK || ! -f build/gpu-results.tar.gz ]] || tar xzf build/gpu-results.tar.gz
mkdir -p "$OUT" "$WORK"
export TRITON_CACHE_DIR=$PWD/$WORK/triton TORCHINDUCTOR_CACHE_DIR=$PWD/$WORK/inductor PYTHONUNBUFFERED=1
device=cuda

run() {  # command …, for the seconds of the stage. SIGINT first: pytest and bench say what they have.
  if [[ $REHEARSE && $1 =~ ^(compute-sanitizer|ncu)$ ]]; then echo "only on a GPU: $*"; return; fi
  timeout -s INT -k 10 "$seconds" env --default-signal=INT "$@"
}

bench() {  # the arguments of python -m bench, which starts no case in the last tenth of the time
  local minutes small=()
  minutes=$(awk "BEGIN { print $seconds * 0.9 / 60 }")
  if [[ $REHEARSE ]]; then  # one case or two
    small=(--seconds 0.001) minutes=0.05
    [[ $1 == step ]] && small+=(--network ResNet-20 --batch 2 --mode eager --contender divqat)
    if [[ $1 == tune ]]; then echo "only on a GPU: $*"; return; fi
  fi
  run $PYTHON -m bench "$@" "${small[@]}" --minutes "$minutes"
}

sources() { cat setup.py csrc/*.* csrc/*/*.* | sha256sum; }

build() {
  if [[ $(sources) == "$(cat $WORK/sources 2>/dev/null)" ]] && 
    run $PYTHON -c "import sys; from divqat.ops import _native; sys.exit(_native.missing('$device') or 0)"; then
    echo "the extension is that of these sources"
  else
    DIVQAT_BUILD=$([[ $device == cuda ]] && echo cuda || echo auto) MAX_JOBS=$(nproc) \
      run $PYTHON setup.py build_ext --inplace || return
    sources >$WORK/sources
  fi
  run $PYTHON -m divqat info
}

# On each backend a case of every test first; a line for each test as it ends.
tests() {
  if [[ $REHEARSE ]]; then  # 5: there are none without a GPU
    run $PYTHON -m pytest -m gpu -q --collect-only -p no:cacheprovider "$@" || (($? == 5))
  else
    run $PYTHON -m pytest -m gpu -v -rfE --tb=short --durations 10 -p no:cacheprovider "$@"
  fi
}

stage() {
  case $1 in
    build) build ;;
    test) tests --by-worth tests/test_cuda.py tests/test_dispatch.py tests/test_divergence_loss.py \
      tests/test_fake_quantize*.py tests/test_op_*.py tests/test_bench.py \
      tests/test_train_captured.py tests/test_train_speed.py ;;
    ops) bench run --device $device --layout contiguous --seconds 0.05 --by-turns \
      --without torch.compile --json $WORK/cuda-ops.json --csv $WORK/cuda-ops.csv ;;
    steps) bench step --device $device --seconds 0.5 --dtype bfloat16 --batch 256 \
      --network ResNet-50 ResNet-20 MobileNetV2 --mode eager "CUDA graph" \
      --json $WORK/cuda-steps.json ;;
    large) bench step --device $device --seconds 0.5 --dtype bfloat16 --batch 1024 \
      --network ResNet-50 --mode eager "CUDA graph" --contender "divqat cuda" \
      --json $WORK/cuda-options.json ;;
    compiled) bench step --device $device --seconds 0.5 --dtype bfloat16 --batch 256 \
      --network ResNet-50 --mode compiled --json $WORK/cuda-steps-compiled.json
      bench run --device $device --layout contiguous --seconds 0.05 --by-turns \
      --contender torch.compile --contender "divqat cuda" --json $WORK/cuda-ops-compiled.json ;;
    sanitize) PYTORCH_NO_CUDA_MEMORY_CACHING=1 run compute-sanitizer --error-exitcode 9 \
      --target-processes all $PYTHON -m pytest tests/test_cuda.py -m gpu -k small ;;
    scaling) bench scale --device $device --seconds 0.05 --json $WORK/cuda-scaling.json ;;
    host) bench host --seconds 0.2 --json $WORK/triton-host.json ;;
    tune) bench tune --seconds 0.02 --json $WORK/triton-tune.json ;;
    profile) run ncu --clock-control none --launch-count 200 --csv --log-file $WORK/profile.csv \
      --kernel-name 'regex:quantize|divergence|observe' \
      $PYTHON -m bench run --device cuda --layout contiguous --dtype bfloat16 --seconds 0.001 \
      --by-turns --contender "divqat cuda" --contender "divqat triton" ;;
  esac
}

pack() {  # a new archive takes the place of the old one when it is whole
  find divqat -maxdepth 1 -name '_C*.so' >"$WORK/files"
  echo "$WORK" >>"$WORK/files"
  tar czf "$OUT/gpu-results.tmp" -T "$WORK/files" && mv "$OUT/gpu-results.tmp" "$OUT/gpu-results.tar.gz"
}

for name in "$@"; do
  [[ " $PLAN" == *" $name:"* ]] || { echo "gpu.sh: stage: wanted some of $PLAN, got $name" >&2; exit 2; }
done
if [[ $REHEARSE ]]; then
  device=cpu
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0}
else
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$($PYTHON -c \
    'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')} || exit
  export TORCH_CUDA_ARCH_LIST
fi

# shellcheck disable=SC2206
[[ $# == 0 ]] && todo=($PLAN) || todo=("$@")
failed=0
for ((i = 0; i < ${#todo[@]}; ++i)); do
  name=${todo[i]%%:*} left=$((LIMIT - SECONDS)) start=$SECONDS
  if ((left < 5)); then
    echo "$name: not run, $LIMIT s are over"
    continue
  fi
  [[ ${todo[i]} == *:* ]] && seconds=${todo[i]##*:} || seconds=$((left / (${#todo[@]} - i)))
  seconds=$((seconds < left ? seconds : left))
  (stage "$name") >"$WORK/$name.log" 2>&1
  code=$?
  echo "$name: $([[ $code == 0 ]] && echo ok || echo "FAILED with exit code $code"), $((SECONDS - start)) s"
  [[ $code == 0 ]] || failed=1
  grep -v '^not measured' "$WORK/$name.log" | tail -n 25 | cut -c 1-200
  pack
done
exit $failed
