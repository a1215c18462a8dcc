# SPDX-License-Identifier: Apache-2.0
"""A device that changes between int4 and int8 of one model, with real packages."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tests.server.compile.conftest import TASK

from lorikit.proto.manifest import BlobRef
from lorikit.quantization.patches import patched
from lorikit.sdk._blobs import BlobCache
from lorikit.sdk._config import ClientConfig
from lorikit.sdk._connection import Connection
from lorikit.sdk._packages import Packages
from lorikit.server.compile import Compiler
from lorikit.server.store.blobs import FolderBlobs


@pytest.fixture(scope="module")
def wide_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers whose rows fill blocks of 64."""
    folder = tmp_path_factory.mktemp("wide-bert")
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    shutil.copy(tiny_model / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def progressive(wide_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    return Compiler(
        wide_model,
        TASK,
        targets=("query", "value"),
        blobs=FolderBlobs(tmp_path_factory.mktemp("progressive")),
        is_progressive=True,
    )


class Shop:
    """Hands out a server's blobs and notes how many bytes of each were asked for."""

    def __init__(self, blobs: FolderBlobs) -> None:
        self.blobs = blobs
        self.asked: dict[str, int] = {}

    def download(self, blob: BlobRef, offset: int) -> Iterator[bytes]:
        data = self.blobs.read_whole(blob.digest)[offset:]
        self.asked[blob.digest] = len(data)
        yield data


def device(shop: Shop, folder: Path) -> Packages:
    return Packages(
        BlobCache(folder),
        shop,  # type: ignore[arg-type]  # all that is asked of it is to download
        Connection(ClientConfig(), emit=lambda _: None),
        emit=lambda _: None,
    )


def get(compiler: Compiler, packages: Packages, precision: str) -> dict[str, int]:
    """Sizes of the weight blobs of a package by digest, after the device fetched it."""
    package = compiler.package(precision=precision, lowest_trained_layer=0)
    adapter = compiler.blobs.put(b"an adapter")
    packages.fetch_package(package.ref, adapter, engine="onnx")
    return {blob.digest: blob.size for blob in package.manifest.weight_blobs}


def test_both_packages_agree_with_torch_on_their_own_base(progressive: Compiler) -> None:
    for precision in ("int4", "int8"):
        manifest = progressive.package(precision=precision, lowest_trained_layer=0).manifest
        codecs = {weight.codec for weight in manifest.weights if "query" in weight.name}

        assert codecs == {"fp32", f"{precision}-row64"}
        assert manifest.facts["verified_relative_error"] < 1e-4
        assert manifest.patches


def test_the_eight_bit_base_is_the_finer_one(progressive: Compiler) -> None:
    bases = progressive.bases(("int4", "int8"))
    module = progressive.space(4).pairs()[0][0].module

    fine, coarse = (np.linalg.norm(bases.error(p, module)) for p in ("int8", "int4"))

    assert coarse > 10 * fine


def test_a_device_climbs_without_the_int4_part_and_comes_back_for_nothing(
    progressive: Compiler, tmp_path: Path
) -> None:
    shop = Shop(progressive.blobs)
    packages = device(shop, tmp_path)
    small = get(progressive, packages, "int4")
    shop.asked.clear()

    fine = get(progressive, packages, "int8")

    asked = sum(shop.asked[patch] for patch in shop.asked if patch in _patches(progressive, "int8"))
    lacking = {digest: size for digest, size in fine.items() if digest not in small}
    assert not set(lacking) & set(shop.asked)
    assert 0 < asked < 0.75 * sum(lacking.values())
    for digest in fine:
        assert (tmp_path / digest).read_bytes() == progressive.blobs.read_whole(digest)

    for digest in small.keys() - fine.keys():
        (tmp_path / digest).unlink()
    shop.asked.clear()
    get(progressive, packages, "int4")

    back = sum(shop.asked[patch] for patch in shop.asked if patch in _patches(progressive, "int4"))
    assert not set(small) & set(shop.asked)
    assert back < 0.1 * sum(small.values())
    for digest in small:
        assert (tmp_path / digest).read_bytes() == progressive.blobs.read_whole(digest)


def test_a_device_with_a_damaged_base_fetches_the_whole_blob(
    progressive: Compiler, tmp_path: Path
) -> None:
    shop = Shop(progressive.blobs)
    packages = device(shop, tmp_path)
    small = get(progressive, packages, "int4")
    for digest in small:
        data = bytearray((tmp_path / digest).read_bytes())
        data[: len(data) // 2] = bytes(len(data) // 2)
        (tmp_path / digest).write_bytes(bytes(data))

    fine = get(progressive, packages, "int8")

    assert set(fine) & set(shop.asked)
    for digest in fine:
        assert (tmp_path / digest).read_bytes() == progressive.blobs.read_whole(digest)


def test_a_device_that_holds_nothing_fetches_whole_blobs(
    progressive: Compiler, tmp_path: Path
) -> None:
    shop = Shop(progressive.blobs)

    fine = get(progressive, device(shop, tmp_path), "int8")

    assert set(fine) <= set(shop.asked)
    assert not _patches(progressive, "int8") & set(shop.asked)


def test_patches_make_the_blobs_bit_for_bit(progressive: Compiler) -> None:
    manifest = progressive.package(precision="int8", lowest_trained_layer=0).manifest

    for way in manifest.patches:
        patch = io.BytesIO(progressive.blobs.read_whole(way.patch.digest))
        base = io.BytesIO(progressive.blobs.read_whole(way.base))

        made = b"".join(patched(patch, base))

        assert made == progressive.blobs.read_whole(way.target)


def test_a_base_that_is_not_progressive_has_no_patches(compiler: Compiler) -> None:
    assert compiler.package(precision="int4", lowest_trained_layer=0).manifest.patches == ()


def _patches(compiler: Compiler, precision: str) -> set[str]:
    manifest = compiler.package(precision=precision, lowest_trained_layer=0).manifest
    return {way.patch.digest for way in manifest.patches}
