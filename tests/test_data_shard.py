"""Batches of which each process takes its own rows, and their way to a device."""

from functools import partial

import pytest
import torch
from testing import assert_same_batches, no_waiting, seeded

from divqat import data
from divqat.data import ImageSet
from divqat.data.upload import to_device

SHIFT = partial(data.augment, pad=2, flip=True)
N = 70
FULL = ImageSet(
    torch.randint(256, (N, 3, 8, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    torch.arange(N),
)


class TestShards:
    # 70 images: a last batch of 6, 2 or 1, less than some numbers of shards.
    @pytest.mark.parametrize(("batch_size", "size"), [(16, 2), (16, 5), (17, 4), (23, 3)])
    @pytest.mark.parametrize("augment", [None, SHIFT])
    def test_are_slices_of_the_whole_batches(self, batch_size, size, augment):
        whole = list(data.batches(FULL, batch_size, generator=seeded(1), augment=augment))
        for rank in range(size):
            options = dict(augment=augment, shard=(rank, size))
            own = data.batches(FULL, batch_size, generator=seeded(1), **options)
            rows = [slice(rank, None, size) if rank < len(y) else slice(1) for _, y in whole]
            wanted = [(x[r], y[r]) for (x, y), r in zip(whole, rows, strict=True)]
            assert_same_batches(own, wanted)

    def test_rows_can_be_cut_in_parts_as_the_whole_batch_is(self):
        for total, size, count in ((13, 2, 2), (13, 4, 1), (16, 3, 5), (3, 4, 2)):
            for rank in range(size):
                own = range(total)[data.shard_rows(total, (rank, size))]
                for index in range(count if rank < total else 0):
                    part = range(total)[rank + index * size :: size * count]
                    assert own[index::count] == part or not (own[index::count] or part)

    def test_too_few_images_leave_the_first(self):
        assert [range(2)[data.shard_rows(2, (rank, 4))] for rank in range(4)] == [
            range(0, 2, 4), range(1, 2, 4), range(1), range(1),
        ]  # fmt: skip

    def test_refuse(self):
        for shard in ((2, 2), (-1, 2), (0, 0)):
            with pytest.raises(ValueError, match=r"shard must be \(rank, size\)"):
                data.batches(FULL, 4, shard=shard)
        with pytest.raises(ValueError, match=r"wanted 2 images, as for .* of 4, got 4"):
            data.augment(FULL.images[:4], seeded(), pad=1, rows=slice(1, 4, 2), total=4)


def test_gather_has_the_rows_in_batches_of_any_length():
    rows = torch.tensor([5, 0, 0, 69])
    got = FULL.gather(rows, [1, 0, 3])
    assert_same_batches(got, [(FULL.images[i], FULL.labels[i]) for i in rows.split([1, 0, 3])])


def test_to_device_leaves_alone_what_is_there():
    tensor = torch.arange(3)
    assert to_device(tensor, torch.device("cpu")) is tensor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_do_not_wait_for_it():
    on_gpu = FULL.to(torch.device("cuda"))
    options = dict(augment=SHIFT, shard=(1, 2))
    wanted = list(data.batches(FULL, 16, generator=seeded(), **options))
    list(data.batches(on_gpu, 16, generator=seeded(), **options))  # loads the kernels
    with no_waiting():
        got = list(data.batches(on_gpu, 16, generator=seeded(), **options))
    assert_same_batches([(x.cpu(), y.cpu()) for x, y in got], wanted)
