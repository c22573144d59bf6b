from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable

import torch
from torch import Tensor

from fdscale.data.lending import Lender, handed_over, room_for

SHAPE = (2, 3, 3)
IMAGES = torch.arange(18, dtype=torch.uint8).view(SHAPE)


def in_worker(lender: Lender, worker: int, work: Callable[[], bytes]) -> bytes:
    """What `work` sends from a process that is forked now and that the lender lends to."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def begin_and_work() -> None:
        torch.set_num_threads(1)  # as in a DataLoader's worker: threads that there were are not forked
        lender.begin(worker)
        theirs.send_bytes(work())

    process = context.Process(target=begin_and_work)
    process.start()
    sent = ours.recv_bytes()
    process.join()
    return sent


def filled() -> bytes:
    images = room_for(SHAPE)
    images[:] = IMAGES
    return pickle.dumps(handed_over(images.permute(2, 0, 1)))


def test_what_a_worker_puts_down_is_seen_by_the_rank_without_being_sent() -> None:
    lender = Lender(workers=2, places=1, size=2**20)
    sent = in_worker(lender, 1, filled)
    assert len(sent) < 200
    images = pickle.loads(sent).received()
    assert torch.equal(images, IMAGES.permute(2, 0, 1))
    assert images.stride() == IMAGES.permute(2, 0, 1).stride()


def test_a_place_is_lent_as_long_as_anybody_looks_at_it() -> None:
    lender = Lender(workers=1, places=1, size=18)
    images = pickle.loads(in_worker(lender, 0, filled)).received()
    view = images[1:].numpy()
    del images
    assert lender.take(0, SHAPE) is None
    assert view.tolist() == IMAGES.permute(2, 0, 1)[1:].tolist()
    del view
    assert lender.take(0, SHAPE) is not None


def test_places_are_taken_from_the_lowest_and_each_worker_has_its_own() -> None:
    lender = Lender(workers=2, places=2, size=18)
    taken = [lender.take(worker, SHAPE) for worker in (0, 1, 1, 0, 0)]
    lent = [None if images is None else lender.lent(images) for images in taken]
    assert [one and one.place for one in lent] == [0, 2, 3, 1, None]


def test_a_part_of_a_place_arrives_as_that_part() -> None:
    lender = Lender(workers=1, places=1, size=2**12)

    def second_half() -> bytes:
        images = room_for(SHAPE)
        images[:] = IMAGES
        return pickle.dumps(handed_over(images[1:, :, ::2]))

    assert torch.equal(pickle.loads(in_worker(lender, 0, second_half)).received(), IMAGES[1:, :, ::2])


def test_a_fork_that_lets_go_does_not_give_back_what_the_rank_looks_at() -> None:
    lender = Lender(workers=1, places=1, size=18)
    held = [pickle.loads(in_worker(lender, 0, filled)).received()]
    context = multiprocessing.get_context("fork")
    process = context.Process(target=held.clear)
    process.start()
    process.join()
    assert lender.take(0, SHAPE) is None
    held.clear()
    assert lender.take(0, SHAPE) is not None


def test_memory_of_its_own_is_handed_over_whole() -> None:
    lender = Lender(workers=1, places=1, size=18)

    def more_than_lent() -> bytes:
        kinds = [type(handed_over(room_for(shape))) for shape in ((18,), SHAPE, (19,))]
        return pickle.dumps([kind is Tensor for kind in kinds])

    assert pickle.loads(in_worker(lender, 0, more_than_lent)) == [False, True, True]
    assert handed_over(IMAGES) is IMAGES  # nobody lends to a rank
    assert room_for(SHAPE).shape == SHAPE


def test_large_places_lie_apart_by_large_pages_and_arrive_whole() -> None:
    size = 2**21 + 18
    lender = Lender(workers=1, places=2, size=size)

    def both() -> bytes:
        sent = []
        for value in (1, 2):
            images = room_for((size,))
            images.fill_(value)
            sent.append(handed_over(images))
        return pickle.dumps(sent)

    first, second = (one.received() for one in pickle.loads(in_worker(lender, 0, both)))
    assert second.data_ptr() - first.data_ptr() == 2 * 2**21
    assert (first.unique().tolist(), second.unique().tolist()) == ([1], [2])
