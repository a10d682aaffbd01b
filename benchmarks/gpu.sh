#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds, checks and measures everything on a machine with a GPU within a time budget, the most valuable steps first:
#
#     benchmarks/gpu.sh [FOLDER] [MINUTES]
#
# Requires only torch, triton and pytest; other libraries that are installed (pytest-xdist, timm, ...) are used too. With
# a quarter of an hour of a GPU, its start included, in three runs of which each finds what the first built:
#
#     STEPS="library warm fault" benchmarks/gpu.sh "$OUT" 4
#     STEPS="library correctness verify tests speed" benchmarks/gpu.sh "$OUT" 4.5
#     STEPS="library compiled counters sanitizer" benchmarks/gpu.sh "$OUT" 3
#
# FOLDER (default: $OUT, or gpu_results) gets at most eight files. Every line is in them as soon as it is known, so that
# they are whole after any cut:
#
#     report.txt      what ran, how it ended, how long it took, measured beside predicted: read this first
#     log.txt         everything that was printed
#     lines.jsonl     checks, warm-up, provoked faults and counters, a line of JSON each
#     <suite>.csv     the rows of operators, models, training, as in benchmarks/results/<device>/; compiled.csv beside
#                     torch.compile
#     fault.core      a small core dump, only where a fault came and there is no cuda-gdb
#
# MINUTES (default: $BUDGET, or 9) is the budget of the whole run. Environment variables:
#
#     PYTHON                  the interpreter (default: python3)
#     MVIT_KERNELS_LIBRARIES  a folder of libraries that were built elsewhere
#     MVIT_KERNELS_COMMIT     the commit, if this is not a git checkout
#     STEPS                   some of (default: all, in this order):
#                               library      the CUDA library loads, or is built for this GPU alone
#                               warm         Triton's cache, in ten processes
#                               fault        provokes the illegal memory access, under six conditions (faults.py)
#                               correctness  every kernel against float64, a process for each operator
#                               verify       whole networks, a process for each and dtype
#                               tests        the operators' own tests, in twelve processes
#                               speed        the suites of `mvit-kernels bench`, then predictions beside them
#                               compiled     networks and training steps beside torch.compile
#                               counters     what Nsight Compute counts in a call of each kernel
#                               sanitizer    memcheck and racecheck
#     SUITES                  some of: operators models training blocks (default: the first three)
#     ROUNDS                  how often the fault is provoked under each condition (default: 4)
#
# The CUDA library is wanted where MVIT_KERNELS_LIBRARIES is set or nvcc is there. If it then neither loads nor can be
# built, the run says so and has failed, whatever else succeeds. Without a GPU it says so and runs the CPU's part. It
# installs nothing and does not change settings of the GPU. The exit code is 0 if every step that ran succeeded, 1 if
# one failed, 2 if nothing could run.

set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
export PYTHONPATH="$root:$root/tests${PYTHONPATH:+:$PYTHONPATH}" # tests: for gates.every_kernel
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$root/build/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$root/build/inductor}
exec "$PYTHON" "$root/benchmarks/gpu_run/main.py" "$@"
