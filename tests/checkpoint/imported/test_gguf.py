"""GGUF files keep their integers, under Hugging Face's names and in its order of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from entrollm import CompressOptions, _core, compress, load
from entrollm.checkpoint.gguf_tokenizer import convert_tokenizer
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.cli.main import app
from entrollm.compress.verify import verify
from entrollm.errors import EntroLLMError, FormatError, UnsupportedError
from entrollm.format.reader import CompressedModel
from tests.support.gguf_sources import BLOCKS, GgufSource, llama_values, write_gguf
from tests.support.quantized_sources import CONFIG, TOLERANCE, imported_weights, write_dense


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer" / "config.json").write_text("{}")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_weights_are_exactly_the_sources(kind: str, tmp_path: Path, tokenizer: Path) -> None:
    expected = write_gguf(tmp_path / "model.gguf", kind)
    compress(tmp_path / "model.gguf", tmp_path / "out", CompressOptions(tokenizer=tokenizer))
    found = imported_weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        np.testing.assert_array_equal(found[name], weights)


def test_the_model_is_whole(tmp_path: Path, tokenizer: Path) -> None:
    expected = write_gguf(tmp_path / "model.gguf", "Q6_K")
    result = compress(tmp_path / "model.gguf", tmp_path / "out", CompressOptions(tokenizer=tokenizer))
    assert result.imported is not None and result.imported.format == "GGUF"
    assert result.source_bytes == (tmp_path / "model.gguf").stat().st_size
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in CONFIG if key != "torch_dtype"} == {
        key: value for key, value in CONFIG.items() if key != "torch_dtype"
    }
    assert (config["bos_token_id"], config["tie_word_embeddings"]) == (1, False)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    with CompressedModel.open(tmp_path / "out") as model, Checkpoint.open(tmp_path / "model.gguf") as source:
        assert verify(model, _core.ThreadPool(2), source).compared
        assert model.dtype("model.norm.weight") == "F32" and model.dtype("lm_head.weight") == "F16"
    (tmp_path / "out" / "tokenizer.json").unlink()
    ids = [5, 300, 17, 17, 9, 211]
    wanted = load(write_dense(tmp_path / "dense", expected)).logits(ids)
    for path in ("model.gguf", "out"):
        found = load(tmp_path / path).logits(ids)
        np.testing.assert_allclose(found, wanted, atol=TOLERANCE * float(np.abs(wanted).max()))


def test_a_tokenizer_is_converted_or_asked_for(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "Q8_0")
    arguments = ["compress", str(tmp_path / "model.gguf"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    said = " ".join(result.stderr.split())
    assert result.exit_code == 1 and "splits text as 'strange' cannot be converted; add --tokenizer FOLDER" in said
    message = "cannot be converted; add tokenizer=FOLDER, a folder with the tokenizer"
    with pytest.raises(UnsupportedError, match=message):
        compress(tmp_path / "model.gguf", tmp_path / "out")
    result = CliRunner().invoke(app, [*arguments, "--tokenizer", str(tmp_path)])
    assert result.exit_code == 1 and "is not a folder with a tokenizer.json" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    write_gguf(tmp_path / "known.gguf", "Q8_0", {"tokenizer.ggml.pre": "gpt-2"})
    compress(tmp_path / "known.gguf", tmp_path / "out")
    tokenizer = load(tmp_path / "out").tokenizer
    assert tokenizer is not None and tokenizer.get_vocab_size() == 320


def test_the_numbers_are_printed(tmp_path: Path, tokenizer: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "Q8_0")
    arguments = ["compress", str(tmp_path / "model.gguf"), "-o", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    output = " ".join(CliRunner().invoke(app, arguments).stdout.split())
    assert "GGUF: 147 k weights keep their integers; source 8.500 bits/weight, stored 8." in output
    assert "use nearly all of their integers, so little can be removed" in output


def test_a_folder_of_gguf_files_asks_for_one(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "Q8_0")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds GGUF files; name the file, such as .*model\.gguf"):
        Checkpoint.open(tmp_path)


def test_a_folder_cannot_pose_as_a_gguf_file(tmp_path: Path) -> None:
    quantization = {"quant_method": "gguf", "types": {"a": "Q8_0"}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    with pytest.raises(UnsupportedError, match="the weights are quantized by 'gguf', which is not supported"):
        Checkpoint.open(tmp_path)


def source(values: dict[str, Any], *tensors: tuple[str, tuple[int, ...], int, bytes]) -> GgufSource:
    embedding = ("token_embd.weight", (320, 128), 1, np.zeros(320 * 128, np.float16).tobytes())
    merged = {key: value for key, value in (llama_values() | values).items() if value is not None}
    return GgufSource(merged, [embedding, *tensors])


def open_source(tmp_path: Path, made: GgufSource) -> dict[str, Any]:
    (tmp_path / "model.gguf").write_bytes(made.to_bytes())
    with Checkpoint.open(tmp_path / "model.gguf") as checkpoint:
        return checkpoint.config


def rope_factors(factor: float) -> tuple[str, tuple[int, ...], int, bytes]:
    """As llama.cpp's converter writes them for Llama 3: head size 32, base 10000."""
    values = []
    for i in range(16):
        wavelength = 2 * np.pi * 10000 ** (i / 16)
        if wavelength < 8192 / 4:
            values.append(1.0)
        elif wavelength > 8192:
            values.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            values.append(1 / ((1 - smooth) / factor + smooth))
    return "rope_freqs.weight", (16,), 0, np.array(values, np.float32).tobytes()


def test_rotations_are_translated(tmp_path: Path) -> None:
    plain = open_source(tmp_path, source({}))
    assert plain["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0} and plain["tie_word_embeddings"]
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert open_source(tmp_path, source(scaling))["rope_parameters"]["factor"] == 4.0
    scaling = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    yarn = open_source(tmp_path, source(scaling | {"llama.rope.scaling.original_context_length": 32}))
    assert yarn["rope_parameters"]["original_max_position_embeddings"] == 32
    for factor in (8.0, 32.0):
        llama3 = open_source(tmp_path, source({}, rope_factors(factor)))["rope_parameters"]
        assert llama3 == {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }


def test_other_architectures_have_their_biases(tmp_path: Path) -> None:
    values = {key.replace("llama.", "qwen3."): value for key, value in llama_values().items()}
    made = GgufSource(values | {"general.architecture": "qwen3", "qwen3.attention.key_length": 64}, source({}).tensors)
    config = open_source(tmp_path, made)
    assert (config["model_type"], config["head_dim"], config["attention_bias"]) == ("qwen3", 64, False)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (
            {"general.architecture": "mamba"},
            UnsupportedError,
            "architecture 'mamba' is not supported; supported are llama",
        ),
        ({"general.architecture": None}, UnsupportedError, "architecture None is not supported"),
        ({"llama.block_count": None}, FormatError, "llama.block_count is None, expected a positive integer"),
        ({"llama.context_length": 0}, FormatError, "llama.context_length is 0, expected a positive integer"),
        ({"llama.rope.freq_base": "x"}, FormatError, "llama.rope.freq_base is 'x', expected a number"),
        ({"llama.rope.freq_base": 1e300}, FormatError, r"freq_base is 1e\+300, expected a number of 32 bits"),
        ({"llama.rope.scaling.type": 3}, FormatError, "llama.rope.scaling.type is 3, expected a string"),
        ({"llama.rope.scaling.type": "longrope"}, UnsupportedError, "rope scaling 'longrope' is not supported"),
        ({"llama.expert_count": 8}, FormatError, "llama.expert_used_count is None, expected a positive integer"),
        ({"split.count": 2}, FormatError, r"is one of several parts \(split.count is 2\).* join them with"),
    ],
)
def test_other_models_are_refused(values: dict[str, Any], error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message) as raised:
        open_source(tmp_path, source(values))
    has_way = error is UnsupportedError
    assert ("use the safetensors checkpoint that it was made from" in str(raised.value)) == has_way


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (("blk.0.ssm_in.weight", (2, 2), 0, bytes(16)), UnsupportedError, "is not part of a supported architecture"),
        (("output_norm.weight", (32,), 8, bytes(34)), UnsupportedError, r"of shape \[32\] is Q8_0"),
        (
            ("rope_freqs.weight", (16,), 0, np.ones(16, np.float32).tobytes()),
            UnsupportedError,
            "holds factors that are not those",
        ),
    ],
)
def test_other_tensors_are_refused(tensor: Any, error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        open_source(tmp_path, source({}, tensor))


def test_a_file_without_embeddings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"there is no matrix token_embd\.weight"):
        open_source(tmp_path, GgufSource(llama_values()))


def test_rows_that_heads_do_not_share_are_refused(tmp_path: Path) -> None:
    made = source({}, ("blk.0.attn_q.weight", (12, 32), 8, bytes(12 * 34)))
    (tmp_path / "model.gguf").write_bytes(made.to_bytes())
    with (
        Checkpoint.open(tmp_path / "model.gguf") as checkpoint,
        pytest.raises(FormatError, match="has 12 rows, which 4 heads do not share"),
    ):
        checkpoint.read_float32("model.layers.0.self_attn.q_proj.weight")


def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    block = np.float16(np.nan).tobytes() + bytes(32)
    (tmp_path / "model.gguf").write_bytes(source({}, ("output.weight", (1, 32), 8, block)).to_bytes())
    with (
        Checkpoint.open(tmp_path / "model.gguf") as checkpoint,
        pytest.raises(FormatError, match=r"lm_head\.weight: its group_scale has a value that is not finite"),
    ):
        checkpoint.read_float32("lm_head.weight")


def small_source() -> bytes:
    """A file of a few small tensors, all of whose metadata matters."""
    made = source(
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "tokenizer.ggml.tokens": list("abcd")}
    )
    made.values["llama.rope.scaling.original_context_length"] = 32
    half = np.ones(16, np.float16).tobytes()
    made.tensors[0] = ("token_embd.weight", (4, 4), 1, half)
    made.tensors.append(("blk.0.attn_q.weight", (8, 32), 8, bytes(8 * 34)))
    made.tensors.append(("blk.0.ffn_down.weight", (2, 256), 12, bytes(2 * 144)))
    return made.to_bytes()


SMALL = small_source()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(4, len(SMALL) - 1), octets=st.binary(min_size=1, max_size=9))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_damage_gives_an_error_or_other_numbers(at: int, octets: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes((SMALL[:at] + octets + SMALL[at + len(octets) :])[: len(SMALL)])
    try:
        with Checkpoint.open(path) as checkpoint:
            for name in checkpoint.tensors:
                checkpoint.read_float32(name)
        convert_tokenizer(path)
    except EntroLLMError as error:
        assert str(path) in str(error) or "weight" in str(error)
