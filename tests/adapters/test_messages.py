# SPDX-License-Identifier: Apache-2.0
"""Messages whose lists could grow long stay short: the first few, and how many more there are."""

import logging

import pytest
import torch
from torch import nn

from mvit_kernels import accelerate, freeze, report
from mvit_kernels._utils.text import some, some_lines
from support import models
from support.models import LIBRARIES

X = models.images(1, 64, 64)


def with_hooks_everywhere(model: nn.Module) -> nn.Module:
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)
    return model


def test_some():
    assert some("abcd") == "a, b, c, d"
    assert some(range(6), joint="; ") == "0; 1; 2; 3 and 2 more"
    assert some(range(6), 1) == "0 and 5 more"
    assert some_lines("ab", "there") == ["a", "b"]
    assert some_lines("abcde", "there", 2) == ["a", "b", "  … and 3 more, in there"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_hooks_on_every_module(library, caplog):
    """Tools that hook every module (profilers, feature viewers) cause a few lines, not pages; the report keeps all
    reasons."""
    caplog.set_level(logging.INFO, logger="mvit_kernels")
    accelerated = with_hooks_everywhere(accelerate(models.build(library)))
    with torch.no_grad():
        accelerated(X)
    plain = with_hooks_everywhere(models.build(library))
    accelerate(plain)
    with pytest.raises(ValueError, match="3 MobileViT blocks") as error:
        accelerate(plain, strict=True)
    frozen = freeze(accelerated)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([text for text in warnings if "runs unaccelerated" in text]) == 3
    assert len([text for text in warnings if "is not accelerated" in text]) == 3
    for text in warnings:
        assert len(text) < 600 and "carries a hook" in text and text.split()[-1] == "more"
    most = max(len(block.reasons) for block in report(plain).blocks)
    assert most > 30 and f"and {most - 4} more" in str(error.value) and f"and {most - 4} more" in str(report(plain))
    assert len(str(error.value)) < 2000
    assert "× were not frozen (" in str(frozen.freeze_report)
    assert len(str(frozen.freeze_report).splitlines()) < len(frozen.freeze_report.left) > 16
    assert max(len(record.getMessage()) for record in caplog.records) < 4000
