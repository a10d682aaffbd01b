# SPDX-License-Identifier: Apache-2.0
"""The tuner of the Triton tiles, without a GPU: what it tries, and that it leaves the tables alone."""

import itertools

import pytest
import torch


def test_the_tuner_says_that_it_needs_a_gpu(monkeypatch, capsys):
    from mvit_kernels.backends.triton import tune

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--width", "144"]) == 2
    assert capsys.readouterr().err.startswith("tune: it measures on a GPU, and the Triton backend has none here: ")


def test_the_tuner_finds_the_fastest_row_and_leaves_the_table_alone():
    """Timed by a fake clock, over plans for GPUs that are not there."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from mvit_kernels.backends.triton import (
        _row_gradients,
        _weight_gradients,
        layer_norm_linear,
        layer_norm_mlp,
        linear_residual,
        tune,
    )
    from mvit_kernels.backends.triton._launch import watching

    modules = [_row_gradients, _weight_gradients, layer_norm_linear, layer_norm_mlp, linear_residual]
    seen = set()

    def clock(run):
        launches.clear()
        run()
        plan = launches[0].plan
        seen.add((plan.num_warps, plan.num_stages))
        if plan.num_stages == 1:
            raise RuntimeError("out of resources")
        return 1.0 if (plan.num_warps, plan.num_stages) == (8, 3) else 2.0

    with watching(target=90) as launches:
        for job in tune.jobs(64, 1, torch.bfloat16, "meta"):
            before = dict(job.table)
            row, times = tune.best_row(job, tune.candidates(job, search=True), clock, modules)
            assert (times[row], times[before[job.key]]) == (1.0, 2.0), job.name
            assert 8 in row and 3 in row and len(row) == len(before[job.key])
            assert job.table == before
    assert seen == {(warps, stages) for warps in (4, 8) for stages in (1, 2, 3)}


def test_the_tuner_tries_what_is_listed():
    """Every listed row is of a table, can be planned, and differs from the one that stands."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from mvit_kernels.backends.triton import layer_norm_linear, layer_norm_mlp, linear_residual, tune
    from mvit_kernels.backends.triton._launch import watching

    met = set()
    with watching(target=90) as launches:
        for width, batch in itertools.product((96, 144, 192, 240), (1, 256)):
            for job in tune.jobs(width, batch, torch.bfloat16, "meta", backward=False):
                rows = tune.candidates(job, search=False)
                assert rows == [job.table[job.key], *tune.TRIED[job.name][job.key]] and len(set(rows)) == len(rows)
                met.add((job.name, job.key))
                plans = []

                def clock(run, plans=plans):
                    launches.clear()
                    run()
                    plans.append((launches[0].plan.constants, launches[0].plan.options, launches[0].grid))
                    return 1.0

                tune.best_row(job, rows, clock, [layer_norm_linear, layer_norm_mlp, linear_residual])
                assert len({str(plan) for plan in plans}) == len(rows), (job.name, job.key)
    assert met == {(name, key) for name, rows in tune.TRIED.items() for key in rows}
