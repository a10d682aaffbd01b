# SPDX-License-Identifier: Apache-2.0
"""What every test needs."""

import torch

from mvit_kernels import _third_party

# Before any test module imports timm, which imports torchvision.
_third_party.prepare_torchvision()

# The shapes are small, and OpenMP's threads spin while they wait for each other: beside any other process two threads
# were ten times slower than one. What is about threads sets their number itself.
torch.set_num_threads(1)
