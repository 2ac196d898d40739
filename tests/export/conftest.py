"""The edge's library, and the model in the box as it has it."""

import pytest

from edges import content_of, library
from meristem.models.load import load


@pytest.fixture(scope="module")
def core():
    return library()


@pytest.fixture(scope="module")
def shipped():
    return load()


@pytest.fixture(scope="module")
def content(shipped):
    return content_of(shipped.model, shipped.tokenizer)
