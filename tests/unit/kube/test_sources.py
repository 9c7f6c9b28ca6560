"""A folder of manifests: what is read, what is kept, and what is followed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from svcdp.errors import ManifestError, SourceError
from svcdp.kube import Change, ManifestSource, read_folder

SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: %s}
spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}
"""
DEADLINE = 20.0  # seconds, for what takes some milliseconds


def names(changes: list[Change]) -> dict[str, list[str]]:
    return {change.origin: [each.metadata.name for each in change.objects] for change in changes}


def test_which_files_count(tmp_path: Path) -> None:
    for name in ("b.yml", "a.yaml", ".hidden.yaml", "notes.txt", "web.yaml.bak"):
        (tmp_path / name).write_text(SERVICE % name[0].replace(".", "x"))
    (tmp_path / "c.json").write_text('{"apiVersion": "v1", "kind": "List", "items": []}')
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "folder.yaml" / "d.yaml").write_text(SERVICE % "d")
    (tmp_path / "dangling.yaml").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.yaml")
    source = ManifestSource(tmp_path)
    assert names(source.scan()) == {"a.yaml": ["a"], "b.yml": ["b"]}
    assert [str(error) for error in source.errors] == [
        f"{tmp_path}/c.json:1: holds no object; remove the file to remove its objects"
    ]
    assert source.scan() == []


def test_a_bad_file_keeps_what_it_had(tmp_path: Path) -> None:
    file = tmp_path / "web.yaml"
    file.write_text(SERVICE % "web")
    source = ManifestSource(tmp_path)
    assert names(source.scan()) == {"web.yaml": ["web"]}
    file.write_text((SERVICE % "web").replace("80", "0"))
    assert source.scan() == []
    [error] = source.errors
    assert isinstance(error, ManifestError)
    assert (error.file, error.line, error.field) == (str(file), 4, "$.spec.ports[0].port")
    assert (source.scan(), source.errors) == ([], (error,))
    file.write_text(SERVICE % "web2")
    assert names(source.scan()) == {"web.yaml": ["web2"]}
    assert source.errors == ()


@pytest.mark.parametrize("size", [0, 1, 30, 60, 90])
def test_a_half_written_file_is_a_bad_one(tmp_path: Path, size: int) -> None:
    file = tmp_path / "web.yaml"
    file.write_text(SERVICE % "web")
    source = ManifestSource(tmp_path)
    source.scan()
    file.write_text((SERVICE % "web")[:size])
    assert source.scan() == []
    assert len(source.errors) == 1
    file.write_text(SERVICE % "web")
    source.scan()
    assert source.errors == ()


def test_a_file_that_goes_takes_its_objects(tmp_path: Path) -> None:
    (tmp_path / "web.yaml").write_text(SERVICE % "web")
    source = ManifestSource(tmp_path)
    source.scan()
    (tmp_path / "web.yaml").unlink()
    assert source.scan() == [Change("web.yaml", replace=True)]


def test_a_file_with_an_error_in_it_gives_nothing_at_first(tmp_path: Path) -> None:
    (tmp_path / "web.yaml").write_text(SERVICE % "web" + "---\n" + SERVICE % "WEB")
    found = read_folder(tmp_path)
    assert found.objects == []
    assert [error.object for error in found.errors] == ["Service default/WEB"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere: cannot be read: No such file"):
        ManifestSource(tmp_path / "nowhere").scan()

    async def follow() -> None:
        async for _ in ManifestSource(tmp_path / "nowhere").changes():
            pytest.fail("it has nothing to say")

    with pytest.raises(SourceError, match="nowhere: cannot be read: No such file"):
        asyncio.run(follow())


@asynccontextmanager
async def following(source: ManifestSource) -> AsyncIterator[Callable[[], object]]:
    """The first batch was read; what is yielded awaits the next one that is."""
    batches = source.changes()
    await anext(batches)
    try:
        async with asyncio.timeout(DEADLINE):
            yield batches.__anext__
    finally:
        await batches.aclose()  # type: ignore[attr-defined]


def test_a_folder_is_followed(tmp_path: Path) -> None:
    async def follow() -> None:
        async with following(ManifestSource(tmp_path)) as following_batch:
            (tmp_path / "web.yaml").write_text(SERVICE % "web")
            found = {}
            while "web.yaml" not in found:  # an event may come between open() and write()
                found = names(await following_batch())
            assert found == {"web.yaml": ["web"]}
            (tmp_path / "web.yaml").unlink()
            assert names(await following_batch()) == {"web.yaml": []}

    asyncio.run(follow())


def test_a_config_map_volume_is_followed(tmp_path: Path) -> None:
    def publish(version: str) -> None:
        """As kubelet does: a new folder, then the link ``..data`` is swapped."""
        folder = tmp_path / f"..{version}"
        folder.mkdir()
        (folder / "web.yaml").write_text(SERVICE % version)
        (tmp_path / "..tmp").symlink_to(folder.name)
        os.replace(tmp_path / "..tmp", tmp_path / "..data")

    publish("one")
    (tmp_path / "web.yaml").symlink_to("..data/web.yaml")

    async def follow() -> None:
        async with following(ManifestSource(tmp_path)) as following_batch:
            for version in ("two", "three"):
                publish(version)
                assert names(await following_batch()) == {"web.yaml": [version]}

    asyncio.run(follow())


def test_a_rescan_needs_no_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(*_: object, stop_event: asyncio.Event, **__: object) -> AsyncIterator[None]:
        """A file system that has no events."""
        await stop_event.wait()
        for event in ():
            yield event

    monkeypatch.setattr("watchfiles.awatch", silent)
    source = ManifestSource(tmp_path)

    async def follow() -> None:
        async with following(source) as following_batch:
            for name in ("one", "two"):
                (tmp_path / f"{name}.yaml").write_text(SERVICE % name)
                batch = asyncio.ensure_future(following_batch())
                await asyncio.sleep(0)
                source.rescan()
                assert names(await batch) == {f"{name}.yaml": [name]}

    asyncio.run(follow())


def test_a_folder_that_goes_and_comes_back(tmp_path: Path) -> None:
    folder, away = tmp_path / "manifests", tmp_path / "away"
    folder.mkdir()
    (folder / "web.yaml").write_text(SERVICE % "web")
    source = ManifestSource(folder, interval=0.05)

    async def follow() -> None:
        async with following(source) as following_batch:
            folder.rename(away)
            assert await following_batch() == []
            assert [type(error) for error in source.errors] == [SourceError]
            (away / "more.yaml").write_text(SERVICE % "more")
            away.rename(folder)
            found = {}
            while not found:
                found = names(await following_batch())
            assert found == {"more.yaml": ["more"]}
            assert source.errors == ()

    asyncio.run(follow())
