"""Who may run, and when."""

from __future__ import annotations

import threading
import time

import pytest

from demos.turns import Busy, Turns
from mmeff.pipelines import Cancelled


def test_a_visitor_has_a_limit_and_gets_places_back():
    turns = Turns(per_user=2, total=10)
    with turns.admit("a"), turns.admit("a"):
        with pytest.raises(Busy, match="you have 2 runs waiting or running, and 2 is the most"), turns.admit("a"):
            pass
        with turns.admit("b"):
            assert turns.waiting == 3
    assert turns.waiting == 0
    with turns.admit("a"):
        pass


def test_the_server_has_a_limit():
    turns = Turns(per_user=2, total=2)
    with turns.admit("a"), turns.admit("b"), pytest.raises(Busy, match="the server has 2 runs"), turns.admit("c"):
        pass


def test_a_place_is_given_back_after_an_error():
    turns = Turns(per_user=1, total=1)
    with pytest.raises(ZeroDivisionError), turns.admit("a"):
        raise ZeroDivisionError
    assert turns.waiting == 0


def test_turns_come_one_at_a_time_in_the_order_of_arrival():
    turns, order, inside, told = Turns(per_user=9, total=9), [], [], []

    def visit(number):
        with turns.admit("a") as ticket, turns.turn(ticket, lambda before: told.append((number, before))):
            inside.append(number)
            assert len(inside) == 1
            time.sleep(0.03)
            inside.remove(number)
            order.append(number)

    threads = []
    for number in range(5):
        threads.append(threading.Thread(target=visit, args=(number,)))
        threads[-1].start()
        time.sleep(0.005)
    for thread in threads:
        thread.join()
    assert order == list(range(5))
    assert [before for number, before in told if number == 4] == sorted(
        {before for number, before in told if number == 4}, reverse=True
    )


def test_a_run_that_waits_can_be_cancelled_and_leaves_the_line():
    turns = Turns(per_user=9, total=9)
    caught, waits = [], threading.Event()

    def wait():
        try:
            with turns.admit("b") as ticket, turns.turn(ticket, lambda before: waits.set()):
                caught.append("ran")
        except Cancelled as error:
            caught.append(str(error))

    with turns.admit("a") as ticket, turns.turn(ticket):
        thread = threading.Thread(target=wait)
        thread.start()
        assert waits.wait(5)
        assert turns.cancel("b") == 1 and turns.cancel("nobody") == 0
        thread.join(5)
        assert caught == ["cancelled while it waited for its turn"] and turns.waiting == 1
        assert not ticket.cancelled()
    with turns.admit("c") as ticket, turns.turn(ticket):
        pass
