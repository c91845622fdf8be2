"""Where the transformers and the scheduler of a pipeline are, and which of them a plan cannot work with."""

import pytest
import torch
from torch import nn

from difa_compile.errors import UnsupportedPipelineError
from difa_compile.pipeline.transformers import check_scheduler, check_transformer, find_transformer, find_transformers
from tests.support.tiny_pipelines import tiny_pipeline, tiny_transformer


class Parts:
    """A pipeline by its components alone."""

    def __init__(self, **components):
        self.components = components
        vars(self).update(components)


def test_find_transformer():
    pipe = tiny_pipeline()
    assert find_transformer(pipe) == ("transformer", pipe.transformer)
    module = nn.Linear(2, 2)
    assert find_transformer(module) == ("", module)
    with pytest.raises(UnsupportedPipelineError, match=r"no transformer \(components: unet, vae\)"):
        find_transformer(Parts(unet=None, vae=None))


def test_two_transformers_one_of_them_and_the_same_twice():
    one, two = tiny_transformer(), tiny_transformer(seed=1)
    assert find_transformers(Parts(transformer=one, transformer_2=two)) == (one, two)
    assert find_transformers(Parts(transformer=None, transformer_2=two)) == (two,)
    assert find_transformers(Parts(transformer=one, transformer_2=one)) == (one,)


def test_a_transformer_in_the_wrapper_of_torch_compile():
    model = torch.compile(tiny_transformer(), backend="eager")
    with pytest.raises(UnsupportedPipelineError, match=r"wrapped by torch\.compile.*pipe\.transformer\._orig_mod"):
        check_transformer(Parts(), model)


def test_a_pipeline_without_a_scheduler_that_can_be_followed():
    pipe = tiny_pipeline()
    check_scheduler(pipe)
    pipe.scheduler = None
    with pytest.raises(UnsupportedPipelineError, match="no scheduler"):
        check_scheduler(pipe)
    with pytest.raises(UnsupportedPipelineError, match="object without set_timesteps and step"):
        check_scheduler(Parts(scheduler=object()))
