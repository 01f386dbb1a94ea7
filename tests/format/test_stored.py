"""A stored matrix: its text, checksum and entries are made once and agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from entrollm.format import layout
from entrollm.format.grid import GridKind
from entrollm.format.reader import CompressedModel
from entrollm.format.spec import TensorSpec
from entrollm.format.stored import StoredMatrix, store_matrix
from entrollm.format.writer import ShardWriter
from entrollm.matrix import matrix_of
from tests.support.folders import CONSTANT, MULTI_ROW, SPLIT_ROW, example_tensors, write_config


@pytest.mark.parametrize("name", [MULTI_ROW, SPLIT_ROW, CONSTANT])
def test_the_text_is_that_of_the_spec_and_has_its_checksum(name: str) -> None:
    spec, arrays = example_tensors()[name]
    matrix = store_matrix(name, replace(spec, checksum=7), arrays)
    assert matrix.spec_text == matrix.spec.to_json()
    assert matrix.spec == TensorSpec.from_json(matrix.spec_text, name)
    assert matrix.spec.checksum == layout.checksum(name, matrix.spec_text, matrix.entries) != 7


def test_entries_are_sealed_as_they_are() -> None:
    spec, arrays = example_tensors()[SPLIT_ROW]
    matrix = store_matrix(SPLIT_ROW, spec, arrays)
    again = store_matrix(SPLIT_ROW, matrix.spec, matrix.entries)
    assert again.spec_text == matrix.spec_text
    assert again.entries[layout.CODED] is matrix.entries[layout.CODED]
    renamed = StoredMatrix.seal("other", matrix.spec, matrix.entries)
    assert renamed.spec.checksum != matrix.spec.checksum


def test_what_is_written_is_what_was_stored(tmp_path: Path) -> None:
    write_config(tmp_path, version=2)
    matrices = [store_matrix(name, *tensor) for name, tensor in example_tensors().items()]
    with ShardWriter(tmp_path / "model.safetensors") as writer:
        for matrix in matrices:
            writer.add_matrix(matrix)
    with CompressedModel.open(tmp_path) as model:
        for matrix in matrices:
            assert model.specs[matrix.name] == matrix.spec
            found = model.entries(matrix.name)
            assert list(found) == list(matrix.entries)
            assert all(np.array_equal(found[suffix], matrix.entries[suffix]) for suffix in found)
            model.check_checksum(matrix.name)


def test_a_constant_matrix_keeps_a_scale_that_was_stored_alone(tmp_path: Path) -> None:
    """Files of version 1 may store the one scale of a matrix that has no other bytes."""
    write_config(tmp_path, version=2)
    spec, arrays = example_tensors()[CONSTANT]
    spec = replace(spec, kind=GridKind())
    with ShardWriter(tmp_path / "model.safetensors") as writer:
        writer.add_matrix(store_matrix(CONSTANT, spec, arrays | {layout.SCALE: np.array([0.5], np.float32)}))
    with CompressedModel.open(tmp_path) as model:
        assert model.specs[CONSTANT].kind == GridKind(0.5)
        assert matrix_of(model, CONSTANT).scale.tolist() == [0.5]
