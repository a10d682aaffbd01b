# SPDX-License-Identifier: Apache-2.0
"""Compiled GPU kernels executed on the CPU: `parse` reads PTX, `translate` makes C++ of it, `program` runs that, and
`serve_cpu_tensors` puts Triton's kernels behind their operators."""
