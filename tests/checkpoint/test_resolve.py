"""Finding a model: a folder, or the Hub through a stand-in for its download."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from entrollm.checkpoint.resolve import resolve

# Which HTTP package the Hub client uses depends on its version; its errors only look at these.
RESPONSE: Any = SimpleNamespace(headers={}, request=None)


def answer_with(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo: str, **options: Any) -> str:
        calls.append({"repo": repo, **options})
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path


def test_a_hub_id_is_fetched_without_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = answer_with(monkeypatch, tmp_path)
    assert resolve("owner/some-model.v1") == tmp_path
    assert (calls[0]["repo"], calls[0]["revision"]) == ("owner/some-model.v1", None)
    names = ["model.safetensors", "model.safetensors.index.json", "config.json", "modeling_x.py"]
    names += ["preprocessor_config.json"]
    names += ["additional_chat_templates/tool.jinja", "1_Pooling/config.json", "2_Dense/model.safetensors", "x.model"]
    ignored = ["pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", "original/x.safetensors", "x.gguf"]
    left = list(filter_repo_objects([*names, *ignored, "demo.mp4"], ignore_patterns=calls[0]["ignore_patterns"]))
    assert left == names


def test_a_revision_follows_an_at_sign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = answer_with(monkeypatch, tmp_path)
    resolve("owner/name@refs/pr/1")
    assert (calls[0]["repo"], calls[0]["revision"]) == ("owner/name", "refs/pr/1")


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "a/b/c", "what is this", "../x"])
def test_a_name_that_is_neither_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answer_with(monkeypatch, AssertionError("the Hub must not be asked"))
    with pytest.raises(ValueError, match="no such folder, and it cannot be a Hub id") as caught:
        resolve(name)
    assert name in str(caught.value)
    assert calls == []


def test_a_missing_path_object_never_asks_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, AssertionError("the Hub must not be asked"))
    with pytest.raises(ValueError, match="no such folder"):
        resolve(Path("owner/name"))


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a file; give a \.gguf file or the folder"):
        resolve(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (errors.RepositoryNotFoundError("no", response=RESPONSE), ValueError, "the Hub has no such public model"),
        (errors.GatedRepoError("no", response=RESPONSE), ValueError, "it is gated: accept its licence"),
        (errors.RevisionNotFoundError("no", response=RESPONSE), ValueError, "no revision 'v2'"),
        (errors.HFValidationError("bad id"), ValueError, "it is not a Hub id: bad id"),
        (errors.LocalEntryNotFoundError("offline"), ConnectionError, "the Hub cannot be reached"),
        (errors.HfHubHTTPError("500", response=RESPONSE), ConnectionError, "the Hub refused to send it"),
    ],
)
def test_what_the_hub_answers_is_said(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], message: str
) -> None:
    answer_with(monkeypatch, error)
    with pytest.raises(kind, match=message) as caught:
        resolve("owner/name@v2")
    assert "'owner/name' is not a folder here" in str(caught.value)


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ValueError, match="the model's name is empty"):
        resolve("")
