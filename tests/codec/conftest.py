from collections.abc import Iterator

import pytest
from isa_workers import InstructionSets


@pytest.fixture(scope="session")
def instruction_sets() -> Iterator[InstructionSets]:
    workers = InstructionSets()
    yield workers
    workers.shutdown()
