"""The time left of a study, from records made up here."""

import pytest

from plasticity_jax.study.time_left import Declared, Finished, Left, TimeLeft, in_words, seconds_left

PRETRAIN, GAP, EVALUATE = (Declared(stage, work, True) for stage, work in (("pretrain", 100.0), ("gap", 10.0), ("evaluate", 20.0)))
PREPARE = Declared("prepare", None)


def finished(stage, seconds, *, runs=1, work=None):
    return Finished(stage, runs, work, seconds)


def test_nothing_is_said_while_nothing_is_known():
    assert seconds_left([Left(PRETRAIN)], []) is None
    assert seconds_left([Left(PRETRAIN, seconds=5.0)], []) is None
    assert seconds_left([Left(PREPARE), Left(PRETRAIN)], [finished("prepare", 3.0)]) is None, "a pace of runs says nothing about FLOPs"


def test_a_stage_goes_on_at_its_own_pace():
    done = [finished("pretrain", 50.0, work=100.0), finished("pretrain", 70.0, work=100.0), finished("gap", 20.0, work=10.0)]
    assert seconds_left([Left(PRETRAIN), Left(PRETRAIN), Left(GAP)], done) == (pytest.approx(60 + 60 + 20), False)
    larger = Declared("pretrain", 300.0, True)
    assert seconds_left([Left(larger)], done) == (pytest.approx(180), False)


def test_a_stage_without_a_finished_run_borrows_the_pace_of_all_others():
    done = [finished("pretrain", 60.0, work=100.0), finished("gap", 20.0, work=10.0)]
    assert seconds_left([Left(PRETRAIN), Left(EVALUATE)], done) == (pytest.approx(60 + 20 * 80 / 110), True)


def test_a_run_in_progress_lends_its_pace():
    """100 FLOPs take 10 seconds and 30 more: 0.4 s per FLOP, also of the 100 and 10 that have not begun."""
    left = [Left(PRETRAIN, seconds=10.0, shown=30.0), Left(PRETRAIN), Left(GAP)]
    assert seconds_left(left, []) == (pytest.approx(30 + 0.4 * (100 + 10)), True)


def test_what_has_begun_is_not_counted_twice_and_never_negative():
    done = [finished("pretrain", 60.0, work=100.0)]
    assert seconds_left([Left(PRETRAIN, seconds=45.0)], done) == (pytest.approx(15), False)
    assert seconds_left([Left(PRETRAIN, seconds=90.0)], done) == (0.0, False)
    assert seconds_left([Left(PRETRAIN, seconds=90.0, shown=70.0)], done) == (pytest.approx(70), False), "what it shows itself is better known"


def test_runs_without_declared_work_count_by_their_number():
    done = [finished("prepare", 9.0, runs=3)]
    assert seconds_left([Left(PREPARE), Left(PREPARE)], done) == (pytest.approx(6), False)
    unknown = Declared("norms", None)
    assert seconds_left([Left(PREPARE), Left(unknown)], done) == (pytest.approx(3), True), "what is left out makes it a guess"


def test_runs_side_by_side_share_the_time_but_none_is_faster_than_itself():
    done = [finished("pretrain", 60.0, work=100.0), finished("prepare", 5.0)]
    assert seconds_left([Left(PRETRAIN)] * 6, done, at_once=3) == (pytest.approx(120), False)
    assert seconds_left([Left(PRETRAIN)], done, at_once=3) == (pytest.approx(60), False)
    assert seconds_left([Left(PREPARE)] * 3, done, at_once=3) == (pytest.approx(15), False), "of a stage whose runs are not side by side"


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (None, ""),
        ((0.0, False), "less than a minute left"),
        ((29.0, True), "less than a minute left"),
        ((95.0, False), "2 min left"),
        ((540.0, True), "about 9 min left"),
        ((12_000.0, True), "about 3 h 20 min left"),
        ((4.4e6, False), "1,222 h left"),
    ],
)
def test_in_words(left, said):
    assert in_words(left) == said


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_the_clock_of_a_study():
    clock, runs = Clock(), {"p1": PRETRAIN, "p2": PRETRAIN, "p3": PRETRAIN, "g1": GAP, "g2": GAP}
    left = TimeLeft(runs, clock)
    assert left.text() == ""
    left.begin(["p1"])
    clock.now += 300
    assert left.text() == "", "it has shown nothing"
    left.show(["p1"], 300.0)
    assert left.text() == "about 27 min left"  # 6 s per FLOP: 50 + 2 * 100 + 2 * 10
    clock.now += 300
    left.end(["p1"], finished=True)
    assert left.text() == "about 22 min left"
    left.begin(["p2"])
    clock.now += 5
    left.end(["p2"], finished=False)  # failed: no pace, and not left
    left.end(["g1"], finished=False)  # waits for it
    left.begin(["g2"])
    clock.now += 90
    left.end(["g2"], finished=True)
    assert left.text() == "10 min left"
    left.end(["p3", "none of these"], finished=False)
    assert left.text() == "less than a minute left"


def test_members_of_one_program_share_its_seconds():
    clock, ids = Clock(), [f"p{number}" for number in range(4)]
    left = TimeLeft({run: PRETRAIN for run in ids} | {"more": PRETRAIN}, clock)
    left.begin(ids)
    clock.now += 120
    left.show(ids, 120.0)
    assert left.text() == "about 3 min left"  # 120 s for the other halves, and a quarter of 240 s
    clock.now += 120
    left.end(ids, finished=True)
    assert left.text() == "1 min left"


def test_nothing_is_said_of_a_single_run():
    clock = Clock()
    left = TimeLeft({"p1": PRETRAIN}, clock)
    left.begin(["p1"])
    clock.now += 600
    left.show(["p1"], 5400.0)
    assert left.text() == "", "its own display says it"
