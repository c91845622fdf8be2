"""Options that commands share: each is some command's, and says what it is for."""

from typing import Annotated, get_origin

import pytest
from typer.main import get_command

from difa_compile.cli import options
from difa_compile.cli.app import app

SHARED = {name: value for name, value in vars(options).items() if get_origin(value) is Annotated}


@pytest.mark.parametrize("name", SHARED)
def test_each_is_an_option_of_a_command_and_explained(name):
    (info,) = SHARED[name].__metadata__
    assert info.help
    explained = {
        parameter.help for command in get_command(app).commands.values() for parameter in command.params
    }  # fmt: skip
    assert any(text is not None and info.help in text for text in explained)
