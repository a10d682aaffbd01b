# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: nothing in here runs when a model does.

`suites` define what is measured, `peers` and `runtimes` what it is compared with. `comparison` checks the candidates
and times them in turns; `timing`, `device_clock` and `peak_memory` are its instruments, and `tables` shows what came
out. `ceilings` measures the machine's own rates, `results` reads and writes rows, `origin` says where they were
measured, and `profiling` breaks a call's time down by category. `changes` tells two sets of results apart, `commits`
measures two commits in turns for it, and `plots` draws either.
"""
