"""What is in progress in a thread."""

import threading

from difa_compile.backend.current import enter, in_progress, leave


def test_what_begins_last_is_last_and_goes_wherever_it_stands():
    one, two = object(), object()
    before = in_progress()
    for each in (one, two, one):
        enter(each)
    assert in_progress() == (*before, one, two, one)
    leave(one)
    assert in_progress() == (*before, one, two), "the innermost"
    leave(one)
    assert in_progress() == (*before, two), "from beneath what is still in progress"
    leave(one)
    leave(two)
    assert in_progress() == before


def test_equal_is_not_the_same():
    enter([])
    held = in_progress()
    leave([])
    assert in_progress() == held
    leave(held[-1])


def test_threads_see_their_own():
    mark, seen = object(), []
    enter(mark)
    try:
        thread = threading.Thread(target=lambda: seen.append(in_progress()))
        thread.start()
        thread.join()
    finally:
        leave(mark)
    assert seen == [()]
