"""Find a model: a local folder or GGUF file, or a repository on the Hugging Face Hub."""

import re
from pathlib import Path

from entrollm.checkpoint.side_files import WEIGHT_SUFFIXES
from entrollm.files.shards import is_gguf

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
# Weights that are not read, which some repositories hold a second time, and demonstrations. Folders that begin with a
# digit hold layers after the main model, as sentence-transformers numbers them.
_IGNORE_PATTERNS = (
    "consolidated*.safetensors",
    "[!0-9]*/*.safetensors",
    *("*.mp4", "*.mov", "*.webm", "*.gif", "*.mp3", "*.wav", "*.flac"),
    *(f"*{suffix}" for suffix in WEIGHT_SUFFIXES if suffix not in (".safetensors", ".index.json")),
)


def resolve(model: str | Path) -> Path:
    """The folder or GGUF file of a model, fetched from the Hub if it is not local.

    Args:
        model: a folder, a .gguf file, or a Hub id: 'owner/name', or 'owner/name@revision'.
    Raises:
        ValueError: the model is none of these; the message says what was tried.
        ConnectionError: the model is not in the local cache, and the Hub cannot be reached.
    """
    if not str(model):
        raise ValueError("the model's name is empty; give a folder or a Hub id")
    path = Path(model)
    if path.is_dir() or is_gguf(path):
        return path
    if path.exists():
        raise ValueError(
            f"{model} is a file; give a .gguf file or the folder that holds config.json and the safetensors files"
        )
    hub_id = _HUB_ID.fullmatch(str(model))
    if isinstance(model, Path) or hub_id is None or str(model).startswith("."):
        raise ValueError(f"{model}: no such folder, and it cannot be a Hub id ('owner/name')")
    return _fetch(hub_id["repo"], hub_id["revision"])


def _fetch(repo: str, revision: str | None) -> Path:
    # Imported here, because the import takes longer than everything else that a local model needs.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    tried = f"{repo!r} is not a folder here"
    try:
        folder = snapshot_download(repo, revision=revision, ignore_patterns=list(_IGNORE_PATTERNS))
    except GatedRepoError:
        raise ValueError(
            f"{tried}, and on the Hub it is gated: accept its licence at https://huggingface.co/{repo} and log in "
            "with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(f"{tried}, and the Hub has no such public model; for a private one, `hf auth login`") from None
    except RevisionNotFoundError:
        raise ValueError(f"{tried}, and on the Hub it has no revision {revision!r}") from None
    except HFValidationError as error:
        raise ValueError(f"{tried}, and it is not a Hub id: {error}") from None
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{tried}, nor in the Hub's local cache, and the Hub cannot be reached: {error}"
        ) from error
    except HfHubHTTPError as error:
        raise ConnectionError(f"{tried}, and the Hub refused to send it: {error}") from error
    return Path(folder)
