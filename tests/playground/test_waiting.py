"""The queue in front of the model: order, limit, cancelling."""

import threading

import pytest

from fvdm.playground.waiting import RequestQueue


def test_requests_are_served_in_their_order_and_the_limit_is_a_sentence():
    queue = RequestQueue(max_waiting=1)
    with queue.enter("a") as first:
        with queue.enter("b") as second:
            assert (queue.ahead(first), queue.ahead(second)) == (0, 1)
            with pytest.raises(ValueError, match="1 requests wait already"), queue.enter("c"):
                pass
        with queue.enter("c") as third:
            assert queue.ahead(third) == 1


def test_a_session_cancels_its_own_requests_alone():
    queue = RequestQueue(max_waiting=3)
    with queue.enter("a") as first, queue.enter("b") as second, queue.enter("a") as third:
        queue.cancel("a")
        assert [turn.cancelled.is_set() for turn in (first, second, third)] == [True, False, True]


def test_waiting_ends_when_the_one_before_leaves_and_when_it_is_cancelled():
    queue, ended = RequestQueue(max_waiting=3), []

    def wait(session):
        with queue.enter(session) as turn:
            entered.set()
            queue.wait(turn, queue.ahead(turn))
            ended.append((session, turn.cancelled.is_set()))

    with queue.enter("served"):
        threads = []
        for session in ("cancelled", "next"):
            entered = threading.Event()
            threads.append(threading.Thread(target=wait, args=(session,)))
            threads[-1].start()
            entered.wait()
        queue.cancel("cancelled")
        threads[0].join()
        assert ended[0] == ("cancelled", True)
    threads[1].join()
    assert ended[1] == ("next", False)
