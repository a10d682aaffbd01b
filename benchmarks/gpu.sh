#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds, checks and measures everything on a machine with a GPU within a time budget, the most valuable steps first:
#
#     benchmarks/gpu.sh [FOLDER] [MINUTES]
#
# Requires only torch, triton and pytest; other libraries that are installed (timm, transformers, ...) are measured too.
# FOLDER (default: $OUT, or gpu_results) gets a few files, written line by line, so that an interrupted run keeps its
# results:
#
#     report.txt      what ran, how it ended, how long it took: read this first
#     log.txt         everything that was printed
#     <suite>.csv     the rows of operators, models, training, blocks, as in benchmarks/results/<device>/
#
# MINUTES (default: $BUDGET, or 9) is the budget of the whole run. Environment variables:
#
#     PYTHON                  the interpreter (default: python3)
#     MVIT_KERNELS_LIBRARIES  a folder of libraries that were built elsewhere; if they do not load, they are built here
#     MVIT_KERNELS_COMMIT     the commit, if this is not a git checkout
#     STEPS                   some of: build correctness speed sanitizer tests cpu (default: all, in this order)
#     SUITES                  some of: operators models training blocks (default: all). The rows of torch.compile need
#                             several minutes for a suite: SUITES=models STEPS="build speed" benchmarks/gpu.sh FOLDER 9
#
# Without a GPU it says so and runs the CPU's part. It installs nothing and does not change settings of the GPU. The exit
# code is 0 if every step that ran succeeded.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

OUT=$(realpath -m "${1:-${OUT:-gpu_results}}")
MINUTES=${2:-${BUDGET:-9}}
PYTHON=${PYTHON:-python3}
STARTED=$(date +%s)
END=$((STARTED + $(awk "BEGIN { print int($MINUTES * 60) }")))
BAD=0 MARK=0
mkdir -p "$OUT" || exit 2
LOG=$OUT/log.txt REPORT=$OUT/report.txt
: >"$LOG" && : >"$REPORT" || exit 2

export PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 # tests: for gates.every_kernel
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/build/inductor}

elapsed() { echo $(($(date +%s) - STARTED)); }
left() { echo $((END - $(date +%s))); }
note() { printf '%4d s  %s\n' "$(elapsed)" "$*" | tee -a "$REPORT" "$LOG"; }
wanted() { [[ " ${STEPS:-build correctness speed sanitizer tests cpu} " == *" $1 "* ]]; }

# step NAME SECONDS COMMAND...: run COMMAND for at most SECONDS and the rest of the budget, and note how it ended.
step() {
  local name=$1 seconds=$2 code before
  shift 2
  if (($(left) < seconds)); then seconds=$(left); fi
  if ((seconds < 5)); then
    note "$name: skipped, the budget is spent"
    return 1
  fi
  before=$(elapsed) MARK=$(wc -l <"$LOG")
  { echo; echo "=== $name: $*"; } >>"$LOG"
  timeout --signal=INT --kill-after=15 "$seconds" "$@" >>"$LOG" 2>&1 # SIGINT: pytest then lists the failures so far
  code=$?
  case $code in
    0) note "$name: ok in $(($(elapsed) - before)) s" ;;
    124 | 137) note "$name: cut after $(($(elapsed) - before)) s" ;;
    *) note "$name: FAILED with $code after $(($(elapsed) - before)) s" && BAD=1 ;;
  esac
  return $code
}

summary() { # summary PATTERN: copy the last step's matching log lines into the report
  tail -n "+$((MARK + 1))" "$LOG" | grep -E "$1" | tail -n 12 | cut -c1-200 | sed 's/^/        /' | tee -a "$REPORT"
}
PYTEST_LINES='^[0-9]+ (passed|failed|skipped|error|deselected)|^(FAILED|ERROR) '

# --------------------------------------------------------------------------------------------------------- the machine

note "mvit_kernels ${MVIT_KERNELS_COMMIT:-}, $MINUTES minutes, into $OUT"
"$PYTHON" -c '
import sys, torch
print(f"        Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    print(f"        {p.name}, {p.multi_processor_count} multiprocessors, {p.L2_cache_size / 2**20:.0f} MiB of L2, {p.total_memory / 2**30:.0f} GiB")
sys.exit(0 if torch.cuda.is_available() else 3)' 2>&1 | tee -a "$REPORT" "$LOG"
case ${PIPESTATUS[0]} in
  0) DEVICE=cuda ;;
  3) DEVICE=cpu && note "no GPU is visible to torch: only the CPU part runs" ;;
  *) note "$PYTHON has no torch that works: nothing can be done" && exit 2 ;;
esac

# -------------------------------------------------------------------------------------------------------------- build

# loads BACKEND: whether the library of the backend exists and loads.
loads() { "$PYTHON" -c "import sys; from mvit_kernels.backends import library; why = library.load('$1'); print(why); sys.exit(bool(why))" >>"$LOG" 2>&1; }

if [[ -n ${MVIT_KERNELS_LIBRARIES:-} ]]; then
  ready=
  for library in "$MVIT_KERNELS_LIBRARIES"/libmvit_kernels_*.so; do
    backend=${library##*_} backend=${backend%.so}
    if loads "$backend"; then ready+=" $backend"; else ready= && break; fi
  done
  if [[ -n $ready ]]; then
    note "libraries of $MVIT_KERNELS_LIBRARIES:$ready"
  else
    note "libraries of $MVIT_KERNELS_LIBRARIES: not all load here, so they are built"
    unset MVIT_KERNELS_LIBRARIES
  fi
fi
if wanted build && [[ -z ${MVIT_KERNELS_LIBRARIES:-} ]]; then
  step build $(($(left) / 3)) "$PYTHON" setup.py -q build_native --inplace
fi
"$PYTHON" -m mvit_kernels info >>"$LOG" 2>&1 && sed -n '/^backends/,$p' "$LOG" | cut -c1-160 | sed 's/^/        /' >>"$REPORT"

# -------------------------------------------------------------------------------------------------------- correctness

# The operators' own tests; -k selects the backend. A few tests beyond them run last, in the step "tests".
OPERATORS=(tests/ops/test_layer_norm_linear.py tests/ops/test_patch_attention.py tests/ops/test_linear_residual.py
  tests/ops/test_layer_norm_mlp.py tests/ops/test_layer_norm.py tests/ops/test_transformer_layer.py tests/ops/test_transformer.py
  tests/ops/test_inverted_residual.py)

suite() { # suite NAME SECONDS: append its rows to $OUT/NAME.csv; resume it, up to twice, if the GPU was lost
  local name=$1 seconds=$2 try
  for try in 1 2 3; do
    if (($(left) < seconds)); then seconds=$(left); fi
    if ((seconds < 25)); then # the first case of networks is not begun with less than 20 s
      note "speed, $name: skipped, the budget is spent"
      return
    fi
    step "speed, $name" $((seconds + 30)) "$PYTHON" -m mvit_kernels bench --suite "$name" --device "$DEVICE" \
      --budget "$(awk "BEGIN { print $seconds / 60 }")" --results "$OUT" --resume && break
    (($? == 2)) || break # 2: an error such as a lost GPU; the case at fault has a row, and is skipped now
  done
}

suites() { # suites SECONDS NAME WEIGHT ...: run those in $SUITES, each for its share of SECONDS
  local seconds=$1 total=0 name
  shift
  local -A weight=()
  local order=()
  while (($#)); do
    if [[ -z ${SUITES:-} || " $SUITES " == *" $1 "* ]]; then
      weight[$1]=$2
      total=$((total + $2))
      order+=("$1")
    fi
    shift 2
  done
  for name in "${order[@]}"; do suite "$name" $((seconds * weight[$name] / total)); done
}

if [[ $DEVICE == cuda ]]; then
  part=$(($(left) / 4))
  if wanted correctness; then
    step "correctness, every kernel once" 100 "$PYTHON" -m gates.every_kernel
    summary 'WRONG|refused|Error'
    for backend in cuda triton; do # not -x, which would hide whether the other operators are right
      step "correctness, $backend" $((part / 2)) "$PYTHON" -m pytest -q -p no:cacheprovider --tb=short --maxfail=20 \
        "${OPERATORS[@]}" -k "$backend"
      summary "$PYTEST_LINES"
    done
    step "correctness, S and XXS" 40 "$PYTHON" - <<'PY'
import torch, mvit_kernels
from mvit_kernels.zoo import load
right = True
for name in ("own/s", "own/xxs"):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = load(name).cuda().to(dtype)
        images = torch.rand(2, 3, 256, 256, device="cuda", dtype=dtype)
        for what, report in (
            ("accelerated", mvit_kernels.verify(model, images)),
            ("frozen", mvit_kernels.verify(mvit_kernels.freeze(model), images, reference=model)),
        ):
            print(name, dtype, what, "ok" if report.ok else f"TOO LARGE\n{report}", flush=True)
            right &= report.ok
raise SystemExit(not right)
PY
  fi
  if wanted speed; then
    # All but 100 s, which are for the sanitizer and the remaining tests; if little is left, three quarters.
    budget=$(($(left) - 100))
    ((budget < 60)) && budget=$(($(left) * 3 / 4))
    suites "$budget" operators 45 models 35 training 10 blocks 10
  fi
  SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda*/{bin,compute-sanitizer}/compute-sanitizer 2>/dev/null | head -n 1)
  if wanted sanitizer && [[ -n $SANITIZER ]]; then
    for tool in memcheck racecheck; do
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "sanitizer, $tool" 60 "$SANITIZER" --tool "$tool" --error-exitcode 9 \
        "$PYTHON" -m gates.every_kernel --run # judged above: here the time goes into kernels
      summary 'ERROR SUMMARY|RACECHECK SUMMARY|========= (Invalid|Error)'
    done
  elif wanted sanitizer; then
    note "sanitizer: there is no compute-sanitizer here"
  fi
  if wanted tests; then
    step "tests, the rest" "$(left)" "$PYTHON" -m pytest -q -p no:cacheprovider -x tests/backends/test_gpu.py tests/ops/test_compile.py tests/backends/test_choice.py
    summary "$PYTEST_LINES"
  fi
else
  if wanted correctness; then
    step "correctness" "$(($(left) / 3))" "$PYTHON" -m pytest -q -p no:cacheprovider --maxfail=20 "${OPERATORS[@]}" -k "cpu and not float16"
    summary "$PYTEST_LINES"
  fi
  if wanted cpu; then
    budget=$(($(left) - 20))
    suites "$budget" operators 40 models 60
  fi
fi

note "done; bad: $BAD"
for file in "$OUT"/*.csv; do
  [[ -e $file ]] && note "$(basename "$file"): $(($(wc -l <"$file") - 1)) rows"
done
exit $BAD
