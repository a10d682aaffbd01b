# SPDX-License-Identifier: Apache-2.0
"""Helpers for every part of the package, which depend on none of its other parts."""
