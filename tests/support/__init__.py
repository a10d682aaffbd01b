# SPDX-License-Identifier: Apache-2.0
"""What the tests share: `cases` has the operators' arguments, `layouts` their strides, `oracle` the right results,
`usual` the textbook path, `tolerance` the rule that errors are held to, `checks` what is asked of an operator,
`operator_tests` the tests that every operator has, `models` other libraries' networks."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
