"""Several models in one process: loaded when asked for, released when idle."""

from __future__ import annotations

import asyncio
import gc
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from entrollm import load
from entrollm.serve.api import Settings
from entrollm.serve.catalog import Catalog, Entry
from entrollm.serve.engines import CpuEngine
from entrollm.serve.errors import ApiError
from entrollm.serve.served import ServedModel
from entrollm.serve.server import LoadOptions, open_models
from tests.serve.running import Running
from tests.serve.test_refusals import refused

IDLE_S = 600.0


@pytest.fixture(scope="module")
def folders(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The example model under two names."""
    other = tmp_path_factory.mktemp("more") / "other"
    shutil.copytree(folder, other)
    (other / "chat_template.jinja").unlink()
    return [folder, other]


@pytest.fixture(scope="module")
def running(folders: list[Path]) -> Iterator[Running]:
    options = LoadOptions(slots=2, engine=CpuEngine(threads=2), idle_release_s=IDLE_S)
    found = Running(open_models([str(each) for each in folders], options), Settings(), None)
    yield found
    found.stop()


def loaded(running: Running) -> dict[str, bool]:
    models = httpx.get(running.url + "/v1/models").json()["data"]
    return {model["id"]: model["loaded"] for model in models}


def release(running: Running) -> list[str]:
    """Let the time of idleness pass for all models."""
    catalog = running.service.api._catalog
    for entry in catalog.entries:
        entry.last_use_s -= 2 * IDLE_S
    return catalog.release_idle(running.service.scheduler.runs)


def test_models_come_and_go(running: Running, folders: list[Path]) -> None:
    assert loaded(running) == {"tiny": True, "other": False}
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        expected = load(folders[1], threads=1).generate("The king", max_tokens=8).text
        assert client.completions.create(model="other", prompt="The king", max_tokens=8).choices[0].text == expected
        assert loaded(running) == {"tiny": True, "other": True}
        served = running.service.api._catalog.find("other").served
        assert served is not None
        model = weakref.ref(served.model)
        del served
        running.wait_until_idle()
        assert release(running) == ["tiny", "other"]
        gc.collect()
        assert model() is None
        assert loaded(running) == {"tiny": False, "other": False}
        for name in ("other", "tiny"):
            text = client.completions.create(model=name, prompt="The king", max_tokens=8).choices[0].text
            assert text == expected
        with pytest.raises(openai.NotFoundError, match="there is no model 'third' here, only tiny, other"):
            client.completions.create(model="third", prompt="x")
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("third")
        assert client.models.retrieve("other").id == "other"


def test_a_running_answer_keeps_its_model(running: Running) -> None:
    body = {"model": "tiny", "prompt": "The king", "max_tokens": 450, "logit_bias": {"1": -100}, "stream": True}
    with httpx.stream("POST", running.url + "/v1/completions", json=body, timeout=60) as stream:
        next(stream.iter_lines())
        assert "tiny" not in release(running)
    running.wait_until_idle()
    assert "tiny" in release(running)


def test_what_is_known_of_models_that_are_not_loaded(running: Running) -> None:
    release(running)
    models = httpx.get(running.url + "/v1/models").json()["data"]
    assert [(model["id"], model["chat"], model["context_length"]) for model in models] == [
        ("tiny", True, 512),
        ("other", False, 512),
    ]
    with httpx.Client(base_url=running.url, timeout=60) as client:
        error = refused(client.post("/v1/completions", json={"prompt": "x"}), 400)
        assert error["message"] == "name one of the models: tiny, other"


def test_idle_models_are_released_by_themselves(running: Running) -> None:
    served = running.models[0]
    catalog = Catalog([Entry("tiny", 512, True, lambda: served)], idle_release_s=0.02)

    async def use() -> None:
        releasing = asyncio.create_task(catalog.keep_releasing(lambda _: False))
        assert await catalog.get("tiny") is served
        async with asyncio.timeout(20):
            while catalog.find("tiny").served is not None:
                await asyncio.sleep(0.01)
        releasing.cancel()

    asyncio.run(use())


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError])
def test_a_model_that_does_not_fit_is_named(kind: type[Exception]) -> None:
    def load_it() -> ServedModel:
        raise kind("out of memory")

    with pytest.raises(ApiError, match="large does not load: out of memory"):
        asyncio.run(Catalog([Entry("large", 512, True, load_it)]).get("large"))


def test_a_model_that_vanishes_is_named(folders: list[Path], tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(folders[1], gone)
    options = LoadOptions(slots=1, engine=CpuEngine(threads=1))
    running = Running(open_models([str(folders[0]), str(gone)], options), Settings(), None)
    shutil.rmtree(gone)
    with httpx.Client(base_url=running.url, timeout=60) as client:
        error = refused(client.post("/v1/completions", json={"model": "gone", "prompt": "x"}), 503)
        assert error["code"] == "model_not_loaded"
        assert error["message"].startswith("gone does not load: ")
        assert client.post("/v1/completions", json={"model": "tiny", "prompt": "x"}).status_code == 200
    running.stop()
