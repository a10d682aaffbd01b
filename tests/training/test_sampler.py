# SPDX-License-Identifier: Apache-2.0
"""The multi-scale batch sampler: the published table, equal plans on all ranks, true lengths, exact resuming."""

import copy
import itertools
import json
import math
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mvit_kernels import MultiScaleSampler
from mvit_kernels.training.sampler import resolutions
from support.processes import in_two_processes
from support.training import sample_two_epochs


def batches(sampler, epoch=0, start=0):
    sampler.set_epoch(epoch, start)
    return list(sampler)


def indices(batch):
    return [index for index, _ in batch]


def sizes(found):
    return [batch[0][1] for batch in found]


# --- the table of resolutions


def test_the_published_table():
    published = [(160, 327), (192, 227), (256, 128), (288, 101), (320, 81)]
    assert resolutions() == tuple((side, side, batch) for side, batch in published)
    assert MultiScaleSampler(10, 128).sizes == resolutions()
    for batch_size in (8, 16, 32, 64, 100, 1024):
        for height, width, batch in resolutions(batch_size):
            assert batch == math.floor(256 * 256 * batch_size / (height * width) + 0.005)


def test_a_batch_is_never_empty_and_rounding_is_to_two_digits_first():
    assert {batch for *_, batch in resolutions(1, 64, 64, 1024)} == {1}
    table = {height: batch for height, _, batch in resolutions(116, 256, 256, 480, 2)}
    assert table[480] == 33  # of 32.9956 images, by int(round(x, 2)); a plain floor would give 32
    assert resolutions(128, 256, 160, 160, 1)[0].batch == 327  # of 327.68


def by_the_letter(batch_size, size, smallest, largest, count, divisor):
    """The rule of models.md, in exact words: linspace, the base, make divisible, pair in order, floor."""
    lists = []
    for base, low, high in zip(size, smallest, largest, strict=True):
        values = {low + (high - low) * k / (count - 1) for k in range(count)} | {base}
        rounded = []
        for value in values:
            near = max(divisor, math.floor((value + divisor / 2) / divisor) * divisor)
            rounded.append(near + divisor if near < 0.9 * value else near)
        lists.append(sorted(rounded))
    pairs = set(zip(*lists, strict=False))
    area = size[0] * size[1]
    return sorted((h, w, max(1, math.floor(round(area * batch_size / (h * w), 2)))) for h, w in pairs)


def test_rectangles_by_the_letter():
    rng = random.Random(0)
    for _ in range(200):
        size = rng.randrange(32, 700), rng.randrange(32, 700)
        smallest = rng.randrange(32, 300), rng.randrange(32, 300)
        largest = smallest[0] + 4 * rng.randrange(100), smallest[1] + 4 * rng.randrange(100)
        arguments = rng.randrange(1, 300), size, smallest, largest, 5, rng.choice([1, 16, 32])
        assert list(resolutions(*arguments)) == by_the_letter(*arguments), arguments


def test_a_rectangular_base_size():
    sampler = MultiScaleSampler(1000, 32, size=(256, 512), smallest=(160, 320), largest=(320, 640))
    assert sampler.sizes == (
        (160, 320, 81),
        (192, 416, 52),
        (256, 480, 34),
        (256, 512, 32),
        (288, 576, 25),
        (320, 640, 20),
    )
    assert {size for found in map(sizes, (batches(sampler, e) for e in range(5))) for size in found} == {
        size[:2] for size in sampler.sizes
    }


# --- an epoch


def test_an_epoch_covers_everything_once_and_pads_the_last_batch_from_the_front():
    sampler = MultiScaleSampler(1000, 16)
    table = {(h, w): batch for h, w, batch in sampler.sizes}
    for epoch in range(4):
        found = batches(sampler, epoch)
        assert all(len(batch) == table[batch[0][1]] and len({size for _, size in batch}) == 1 for batch in found)
        order = list(itertools.chain(*map(indices, found)))
        padding = order[1000:]
        assert sorted(order[:1000]) == list(range(1000)) and order[:1000] != sorted(order[:1000])
        assert len(padding) < len(found[-1]) and padding == order[: len(padding)]
        assert len(found) == len(sampler) == sampler.steps


def test_a_share_smaller_than_a_batch_is_repeated_once():
    (batch,) = batches(MultiScaleSampler(10, 128, multi_scale=False))
    assert len(batch) == 20 and indices(batch)[:10] == indices(batch)[10:]


def test_epochs_and_seeds_differ_and_repeat():
    def plan(seed, epoch):
        return batches(MultiScaleSampler(2000, 16, seed=seed), epoch)

    plans = {(seed, epoch): plan(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    assert all(plan(*key) == value for key, value in plans.items())
    for one, other in itertools.combinations(plans, 2):
        assert sizes(plans[one]) != sizes(plans[other]) and indices(plans[one][0]) != indices(plans[other][0])
    assert len({len(value) for value in plans.values()}) > 3  # the number of batches differs, and len() knew: above


def test_resolutions_are_drawn_evenly():
    sampler = MultiScaleSampler(100_000, 16)
    drawn = Counter(size for epoch in range(10) for size in sizes(batches(sampler, epoch)))
    total = sum(drawn.values())
    assert len(drawn) == 5 and all(abs(count / total - 0.2) < 0.02 for count in drawn.values())


def test_no_other_generator_is_read_or_moved():
    def draw(seed):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        found = batches(MultiScaleSampler(500, 8), 3)
        assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        return found

    assert draw(1) == draw(2)


def test_fixed_size():
    sampler = MultiScaleSampler(100, 8, size=(200, 300), multi_scale=False)  # as given: not made divisible
    found = batches(sampler)
    assert {*sizes(found)} == {(200, 300)} and [len(batch) for batch in found] == [8] * 13 and len(sampler) == 13
    assert indices(found[-1])[4:] == indices(found[0])[:4]
    assert indices(found[0]) != indices(batches(sampler, 1)[0])
    ordered = batches(MultiScaleSampler(100, 8, multi_scale=False, shuffle=False))
    assert list(itertools.chain(*map(indices, ordered)))[:100] == list(range(100))


@pytest.mark.parametrize("samples, world", [(10, 1), (11, 4), (3, 4), (64, 2)])
def test_evaluation_has_each_sample_exactly_once(samples, world):
    found = [MultiScaleSampler(samples, 4, size=224, training=False, rank=r, world_size=world) for r in range(world)]
    seen = [index for sampler in found for batch in sampler for index in indices(batch)]
    assert sorted(seen) == list(range(samples))
    for sampler in found:
        assert len(list(sampler)) == len(sampler) and {*sizes(list(sampler))} <= {(224, 224)}
    assert indices(next(iter(found[0]))) == list(range(0, samples, world))[:4]


# --- several ranks


def test_all_ranks_take_the_same_steps_of_disjoint_shares():
    rng = random.Random(1)
    for _ in range(60):
        samples, world, epoch = rng.randrange(1, 800), rng.randrange(1, 9), rng.randrange(50)
        options = dict(batch_size=rng.randrange(1, 40), seed=rng.randrange(9), multi_scale=rng.random() < 0.8)
        ranks = [
            batches(MultiScaleSampler(samples, **options, rank=rank, world_size=world), epoch) for rank in range(world)
        ]
        shapes = [[(size, len(batch)) for size, batch in zip(sizes(r), r, strict=True)] for r in ranks]
        assert all(shape == shapes[0] for shape in shapes), (samples, world, options)
        share = math.ceil(samples / world)
        shares = [list(itertools.chain(*map(indices, r)))[:share] for r in ranks]
        counts = Counter(itertools.chain(*shares))
        # Each once; what makes the number divisible comes from the front of the indices.
        extra = Counter(itertools.islice(itertools.cycle(range(samples)), share * world - samples))
        assert counts == Counter(range(samples)) + extra, (samples, world)


def test_shares_are_every_nth_of_one_order():
    whole = list(itertools.chain(*map(indices, batches(MultiScaleSampler(96, 8, rank=0, world_size=1), 2))))[:96]
    for rank in range(3):
        mine = batches(MultiScaleSampler(96, 8, rank=rank, world_size=3), 2)
        assert list(itertools.chain(*map(indices, mine)))[:32] == whole[rank::3]


def test_two_processes_train_in_step(tmp_path):
    # They import torch alone, which takes 2 seconds each. The fork server of support.training would import 10 for both.
    in_two_processes("spawn", sample_two_epochs, [(rank, tmp_path) for rank in range(2)])
    read = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for first, second in zip(*read, strict=True):
        assert [shape for shape, _ in first] == [shape for shape, _ in second] and len(first) > 5
        shares = [list(itertools.chain(*(index for _, index in steps)))[:102] for steps in (first, second)]
        assert set(shares[0]) | set(shares[1]) == set(range(203))
        assert len(set(shares[0]) & set(shares[1])) <= 1  # the one that makes 203 even


def test_under_torchrun_a_process_group_is_wanted(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="started 2 processes, and torch.distributed is not initialised"):
        MultiScaleSampler(10)
    assert MultiScaleSampler(10, rank=1, world_size=2).rank == 1


# --- resuming


def test_resuming_yields_the_rest_of_the_epoch():
    for start in (0, 1, 7, 11):
        sampler = MultiScaleSampler(700, 32, seed=5)
        whole = batches(sampler, 6)
        assert batches(MultiScaleSampler(700, 32, seed=5), 6, start) == whole[start:]
        sampler.set_epoch(6, start)
        assert len(sampler) == len(whole) - start and sampler.steps == len(whole)
        sampler.set_epoch(7)
        assert len(sampler) == sampler.steps and sampler.start == 0
    assert batches(sampler, 6, len(whole)) == [] and len(sampler) == 0


def test_state_goes_through_json_and_torch_save(tmp_path):
    sampler = MultiScaleSampler(700, 32, size=(256, 320), rank=1, world_size=2)
    whole = batches(sampler, 4)
    state = sampler.state_dict(5)
    torch.save(state, tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    for one in (state, json.loads(json.dumps(state)), read):
        other = MultiScaleSampler(700, 32, size=(256, 320), rank=1, world_size=2)
        other.load_state_dict(one)
        assert (other.epoch, other.start) == (4, 5) and list(other) == whole[5:]
    first_rank = MultiScaleSampler(700, 32, size=(256, 320), rank=0, world_size=2)
    assert first_rank.state_dict(0) | {"epoch": 4, "start": 5} == state  # one file serves all ranks


def test_a_state_of_other_settings_is_refused():
    state = MultiScaleSampler(700, 32, rank=0, world_size=2).state_dict(1)
    with pytest.raises(
        ValueError, match=r"does not fit: batch_size was 32 and is 16, world_size was 2 and is 4; to res"
    ):
        MultiScaleSampler(700, 16, rank=0, world_size=4).load_state_dict(state)
    with pytest.raises(ValueError, match="this is no state"):
        MultiScaleSampler(700).load_state_dict({"epoch": 1})


class Pairs(Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, pair):
        index, (height, width) = pair
        return index, torch.zeros(1, height, width, dtype=torch.uint8)


def test_workers_that_fetch_ahead_do_not_disturb_resuming():
    """The state is what the caller says was consumed, whatever workers have asked the sampler for."""
    sampler = MultiScaleSampler(300, 8)
    loader = DataLoader(Pairs(300), batch_sampler=sampler, num_workers=2, prefetch_factor=4, persistent_workers=True)
    sampler.set_epoch(2)
    whole = [index.tolist() for index, _ in loader]
    state = None
    for done, (index, images) in enumerate(loader, start=1):
        assert images.shape[2:] == sampler._steps[done - 1][:2] and len(index) == sampler._steps[done - 1].batch
        if done == 3:
            state = sampler.state_dict(done)
            break
    resumed = MultiScaleSampler(300, 8)
    resumed.load_state_dict(state)
    rest = [index.tolist() for index, _ in DataLoader(Pairs(300), batch_sampler=resumed, num_workers=1)]
    assert rest == whole[3:]


def test_an_iteration_that_has_begun_goes_on():
    sampler = MultiScaleSampler(300, 8)
    whole = batches(sampler, 0)
    sampler.set_epoch(0)
    running = iter(sampler)
    sampler.set_epoch(1)
    assert list(running) == whole != list(sampler)


def test_it_can_be_copied():
    sampler = MultiScaleSampler(300, 8)
    sampler.set_epoch(3, 2)
    for other in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert list(other) == list(sampler) and repr(other) == repr(sampler)
    assert "epoch 3, 2 of " in repr(sampler) and "160×160: 20" in repr(sampler)


def test_others_loops_reach_set_epoch():
    """Lightning and Accelerate look for `loader.batch_sampler.sampler.set_epoch`."""
    loader = DataLoader(Pairs(50), batch_sampler=MultiScaleSampler(50, 8))
    loader.batch_sampler.sampler.set_epoch(3)
    assert loader.batch_sampler.epoch == 3 and len(loader) == len(loader.batch_sampler)


# --- growing resolutions


def test_resolutions_grow_from_their_epoch_on():
    sampler = MultiScaleSampler(5000, 64, scale_inc=True, scale_epochs=[2, 4], smallest_inc=0.25, largest_inc=0.5)

    def table(epoch):
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler) and {*sizes(list(sampler))} <= {size[:2] for size in sampler.sizes}
        return sampler.sizes

    assert table(0) == table(1) == resolutions(64)
    assert table(2) == table(3) == resolutions(64, 256, 200, 480)
    assert table(4) == table(9) == resolutions(64, 256, 250, 720)
    assert table(1) == resolutions(64)  # a jump back, as in a second run
    assert (256, 256, 64) in table(9)  # the base stays


def test_by_default_nothing_grows_and_if_asked_both_double_at_40():
    sampler = MultiScaleSampler(500, 64)
    sampler.set_epoch(299)
    assert sampler.sizes == resolutions(64)
    sampler = MultiScaleSampler(500, 64, scale_inc=True)
    sampler.set_epoch(39)
    assert sampler.sizes == resolutions(64)
    sampler.set_epoch(40)
    assert sampler.sizes == resolutions(64, 256, 320, 640)


# --- errors


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((0,), {}, ValueError, "data (the number of samples) is 0; give 1 or more"),
        (([],), {}, ValueError, "data (the number of samples) is 0; give 1 or more"),
        ((iter([1]),), {}, TypeError, "give a data set with a length, or the number of samples"),
        ((True,), {}, TypeError, "data is True (bool)"),
        ((10, 0), {}, ValueError, "batch_size is 0; give 1 or more"),
        ((10, 2.5), {}, TypeError, "batch_size is 2.5 (float); give an int"),
        ((10,), {"size": (1, 2, 3)}, TypeError, "size is (1, 2, 3) (tuple); give a side in pixels, or (height, width)"),
        ((10,), {"size": "256"}, TypeError, "size is '256' (str)"),
        ((10,), {"smallest": 0}, ValueError, "smallest is 0; give 1 or more"),
        ((10,), {"smallest": (160, 400)}, ValueError, "smallest=(160, 400) is above largest=320"),
        ((10,), {"seed": -1}, ValueError, "seed is -1; give 0 or more"),
        ((10,), {"rank": 0}, ValueError, "rank is given without world_size; give both or neither"),
        ((10,), {"world_size": 2}, ValueError, "world_size is given without rank"),
        ((10,), {"rank": 2, "world_size": 2}, ValueError, "rank is 2 of world_size 2; ranks are 0 to world_size - 1"),
        ((10,), {"largest_inc": -0.5}, ValueError, "largest_inc is -0.5; give 0 or more"),
        ((10,), {"smallest_inc": "x"}, TypeError, "smallest_inc is 'x' (str); give a number"),
        ((10,), {"scale_epochs": [1, 2.5]}, TypeError, "scale_epochs is 2.5 (float)"),
    ],
)
def test_errors_say_what_is_wanted(arguments, options, error, message):
    with pytest.raises(error) as caught:
        MultiScaleSampler(*arguments, **options)
    assert str(caught.value).startswith("MultiScaleSampler: ") and message in str(caught.value)


def test_errors_of_epochs_leave_the_sampler_as_it_was():
    sampler = MultiScaleSampler(100, 8, multi_scale=False)
    sampler.set_epoch(2, 4)
    for call, message in (
        (lambda: sampler.set_epoch(3, 14), "start=14 is beyond epoch 3, which has 13 batches"),
        (lambda: sampler.set_epoch(-1), "epoch is -1; give 0 or more"),
        (lambda: sampler.state_dict(14), "done=14, but epoch 2 has 13 batches"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert (sampler.epoch, sampler.start, len(sampler)) == (2, 4, 9)
    with pytest.raises(TypeError, match="done"):
        sampler.state_dict()  # nobody but the caller knows
