# SPDX-License-Identifier: Apache-2.0
"""The measuring part: nothing here runs when a model does.

What is measured is in `suites`, what it is compared with in `peers` and `runtimes`, how in `comparison` (candidates in
turns, checked first), `timing`, `device_clock` and `peak_memory`; `ceilings` are the machine's own rates, `results` the
rows and `origin` where they come from; `profiling` tells what a call's time is spent on.
"""
