"""Settings of all tests, and the fixture that several folders share."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.support.isa_workers import InstructionSets

# Shared machines stall for longer than any deadline that would say something about the code.
settings.register_profile("project", deadline=None)
settings.load_profile("project")


@pytest.fixture(scope="session")
def instruction_sets() -> Iterator[InstructionSets]:
    """A worker for each instruction set."""
    workers = InstructionSets()
    yield workers
    workers.shutdown()
