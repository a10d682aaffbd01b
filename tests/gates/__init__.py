# SPDX-License-Identifier: Apache-2.0
"""What commands other than `make test` run: compilers' tables, sanitizers, interpreter (`make help` lists them).

Each is run from tests/: ``python -m gates.cuda_gate --help``.
"""
