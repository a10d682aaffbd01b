# SPDX-License-Identifier: Apache-2.0
"""What every test needs."""

from mvit_kernels import _third_party

# Before any test module imports timm, which imports torchvision.
_third_party.prepare_torchvision()
