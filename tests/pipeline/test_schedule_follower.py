"""The position in the schedule, for schedulers that know it, for those that do not, and for starts half way."""

import pytest
import torch

from difa_compile.errors import ScheduleError, UnsupportedPipelineError
from difa_compile.pipeline.schedule_follower import ScheduleFollower
from difa_compile.plan.schedule import normalised_progress
from tests.support.fake_run import FakeRun

diffusers = pytest.importorskip("diffusers")


class Followed:
    """A scheduler with its follower, driven as a pipeline drives them."""

    def __init__(self, scheduler, *, one_call_each=True, conditional_first=False):
        self.scheduler = scheduler
        self.runs = []
        self.stats = []
        self.follower = ScheduleFollower(
            scheduler,
            self.open_run,
            one_call_each=one_call_each,
            conditional_first=conditional_first,
            finished=self.stats.append,
        )

    def open_run(self, progress):
        self.runs.append(FakeRun(progress))
        return self.runs[-1]

    def set(self, steps):
        self.scheduler.set_timesteps(steps)
        self.follower.schedule_set()

    def call(self):
        self.follower.begin_call()
        return self.runs[-1].steps[-1]


def progress_of(scheduler):
    return normalised_progress(scheduler.timesteps.tolist(), 1000)


def test_counts_steps_and_opens_at_the_first_call():
    followed = Followed(diffusers.DDIMScheduler())
    followed.set(4)
    assert not followed.runs
    seen = []
    for t in followed.scheduler.timesteps:
        followed.follower.at(t)
        seen.append(followed.call())
        followed.follower.stepped()
    assert seen == [0, 1, 2, 3]
    assert followed.runs[0].progress == progress_of(followed.scheduler)
    assert followed.runs[0].active
    followed.follower.close()
    assert not followed.runs[0].active
    assert followed.runs[0].resets == 1
    (stats,) = followed.stats
    assert (stats.steps, stats.calls, stats.peak_cache_bytes) == (4, 4, 12)
    assert stats.seconds > 0


@pytest.mark.parametrize("begin", [0, 1, 3])
def test_start_half_way_is_told_by_memory(begin):
    """Schedulers without begin index: image-to-image pipelines slice the timesteps and hand out views."""
    followed = Followed(diffusers.DDIMScheduler())
    followed.set(4)
    expected = progress_of(followed.scheduler)[begin:]
    for t in followed.scheduler.timesteps[begin:]:
        followed.follower.at(t)
        followed.call()
        followed.follower.stepped()
    assert followed.runs[0].progress == expected
    assert followed.runs[0].steps == list(range(4 - begin))


def test_start_half_way_is_told_by_begin_index():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    followed = Followed(scheduler)
    followed.set(5)
    scheduler.set_begin_index(2)
    followed.follower.begin_at(2)
    followed.call()
    assert followed.runs[0].progress == progress_of(scheduler)[2:]


def test_start_by_value_where_the_host_holds_the_timestep():
    followed = Followed(diffusers.DDIMScheduler())
    followed.set(4)
    followed.follower.at(followed.scheduler.timesteps[2].clone())
    followed.call()
    assert len(followed.runs[0].progress) == 2

    followed.set(4)
    followed.follower.at(int(followed.scheduler.timesteps[3]))
    followed.call()
    assert len(followed.runs[1].progress) == 1


def test_timestep_of_another_device_is_not_read():
    """A meta tensor has no value to read: reading it would raise."""
    followed = Followed(diffusers.DDIMScheduler())
    followed.set(4)
    followed.follower.at(torch.zeros((), device="meta"))
    followed.call()
    assert len(followed.runs[0].progress) == 4


def test_second_order_schedulers_have_one_row_per_call():
    scheduler = diffusers.HeunDiscreteScheduler()
    followed = Followed(scheduler)
    followed.set(3)
    for _ in scheduler.timesteps:
        followed.call()
        followed.follower.stepped()
    assert len(scheduler.timesteps) == 5
    assert followed.runs[0].steps == [0, 1, 2, 3, 4]


def test_setting_timesteps_again_starts_a_new_run():
    followed = Followed(diffusers.DDIMScheduler())
    followed.set(2)
    followed.call()
    followed.set(3)
    assert followed.runs[0].resets == 1
    followed.call()
    assert [len(run.progress) for run in followed.runs] == [2, 3]


def test_call_beyond_the_last_step():
    followed = Followed(diffusers.DDIMScheduler())
    followed.set(1)
    followed.call()
    followed.follower.stepped()
    with pytest.raises(ScheduleError, match="after the last of 1 steps"):
        followed.call()


def test_guidance_branches_follow_cache_context():
    followed = Followed(diffusers.DDIMScheduler())
    followed.set(2)
    for _ in range(2):
        with followed.follower.branch("cond"):
            followed.call()
        with followed.follower.branch("uncond"):
            followed.call()
        followed.follower.stepped()
    assert followed.runs[0].branches == ["cond", "uncond"] * 2


def test_second_unmarked_call_of_a_step_is_a_branch_of_its_own():
    followed = Followed(diffusers.DDIMScheduler())
    followed.set(2)
    for _ in range(2):
        followed.call()
        followed.call()
        followed.follower.stepped()
    assert followed.runs[0].branches == [None, "uncond"] * 2


def test_the_first_unmarked_call_is_the_conditional_one_where_the_order_is_known():
    followed = Followed(diffusers.DDIMScheduler(), conditional_first=True)
    followed.set(3)
    for calls in (2, 1, 2):  # guidance may be left out at some steps
        for _ in range(calls):
            followed.call()
        followed.follower.stepped()
    assert followed.runs[0].branches == ["cond", "uncond", "cond", "cond", "uncond"]


@pytest.mark.parametrize("names", [("uncond", "cond"), ("pred_uncond", "pred_cond")])
def test_names_go_before_the_order_of_calls(names):
    """Diffusers' guiders name the predictions; their further ones (skipped layers) are no branch of guidance."""
    followed = Followed(diffusers.DDIMScheduler(), conditional_first=True)
    followed.set(1)
    for name in (*names, "pred_cond_skip"):
        with followed.follower.branch(name):
            followed.call()
    assert followed.runs[0].branches == ["uncond", "cond", None]


def test_a_name_that_is_none_of_guidance_says_nothing_of_the_order():
    followed = Followed(diffusers.DDIMScheduler(), conditional_first=True)
    followed.set(1)
    with followed.follower.branch("pred_modality"):
        followed.call()
    assert followed.runs[0].branches == [None]


def test_a_second_call_under_a_name_of_its_own_is_no_half_of_guidance():
    """LTX2 names what it perturbs: ``uncond_stg`` after ``cond_uncond``. That is not the unconditional call."""
    followed = Followed(diffusers.DDIMScheduler())
    followed.set(1)
    with followed.follower.branch("cond_uncond"):
        followed.call()
    with (
        followed.follower.branch("uncond_stg"),
        pytest.raises(UnsupportedPipelineError, match="called 2 times without"),
    ):
        followed.call()


def test_calls_that_would_take_caches_from_each_other_are_refused():
    followed = Followed(diffusers.DDIMScheduler())
    followed.set(2)
    followed.call()
    followed.call()
    with pytest.raises(UnsupportedPipelineError, match="step 0: the transformer was called 3 times without"):
        followed.call()

    followed.set(2)
    with followed.follower.branch("cond"):
        followed.call()
        with pytest.raises(UnsupportedPipelineError, match="2 times in branch 'cond'"):
            followed.call()

    free = Followed(diffusers.DDIMScheduler(), one_call_each=False)
    free.set(2)
    assert [free.call() for _ in range(5)] == [0] * 5


def test_schedulers_that_cannot_be_followed():
    class Odd:
        timesteps = torch.tensor([3.0, -2.0])
        config = type("Config", (), {"num_train_timesteps": 1000})()

    with pytest.raises(UnsupportedPipelineError, match="Odd cannot be followed"):
        Followed(Odd()).call()
    with pytest.raises(UnsupportedPipelineError, match="no timesteps"):
        Followed(object()).call()
    Odd.config = None
    with pytest.raises(UnsupportedPipelineError, match="num_train_timesteps"):
        Followed(Odd()).call()


def test_closing_without_a_call_reports_nothing():
    followed = Followed(diffusers.DDIMScheduler())
    followed.set(3)
    followed.follower.close()
    assert followed.stats == []


def test_what_the_scheduler_is_given_is_told_before_it_steps():
    seen = []
    followed = Followed(diffusers.DDIMScheduler())
    followed.follower = ScheduleFollower(
        followed.scheduler, followed.open_run, one_call_each=True, told_output=seen.append
    )
    followed.set(2)
    followed.follower.given("before a run")
    for number in range(2):
        followed.call()
        followed.follower.given(number)
        followed.follower.stepped()
    assert seen == [0, 1]
    plain = Followed(diffusers.DDIMScheduler())
    plain.set(1)
    plain.call()
    plain.follower.given("nobody asks")
