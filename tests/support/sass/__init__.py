# SPDX-License-Identifier: Apache-2.0
"""Machine code for sm_90, as far as it computes integers: see `support.sass.block`."""
