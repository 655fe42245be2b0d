"""The headers of older torch releases, without their gigabytes: read out of the wheels by ranges of bytes, and kept.

python tests/abi/old_headers.py     # fetches them all and prints where they are, and their digests
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

FOLDER = Path(__file__).parent.parent.parent / "build" / "torch-headers"
# release -> digest of the headers below. The oldest release that the
# package promises, and the next: those before 2.13 have fewer names.
RELEASES = {
    "2.10.0": "fd3fa467f34138cb76211d614fcb128da80652b71c9f835efeb34f81f334ce1d",
    "2.11.0": "b42b2627b92a0b7cd23686f5bb966d0e06f356d708b60ee3f6d74d41371cfe0c",
}
# what csrc/ includes, directly or by way of these
WANTED = (
    "torch/include/torch/csrc/stable/",
    "torch/include/torch/csrc/inductor/aoti_torch/",
    "torch/include/torch/headeronly/",
)
BLOCK = 1 << 20
ATTEMPTS = 3


class HeadersError(RuntimeError):
    """The headers are not those that the digest was taken of."""


class RemoteFile(io.RawIOBase):
    """A file behind an address that serves ranges of bytes; blocks that were read are kept."""

    def __init__(self, url: str) -> None:
        self.url, self.position = url, 0
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=60) as answer:
            length = answer.headers["Content-Length"]
        if length is None:
            raise OSError(f"no length of {url}")
        self.size = int(length)
        self.blocks: dict[int, bytes] = {}

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        index, start = divmod(self.position, BLOCK)
        if self.position >= self.size:
            return 0
        piece = self._block(index)[start : start + len(buffer)]
        buffer[: len(piece)] = piece
        self.position += len(piece)
        return len(piece)

    def _block(self, index: int) -> bytes:
        if index not in self.blocks:
            last = min((index + 1) * BLOCK, self.size) - 1
            request = urllib.request.Request(self.url, headers={"Range": f"bytes={index * BLOCK}-{last}"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                if answer.status != 206:
                    raise OSError(f"no ranges of bytes from {self.url}")
                self.blocks[index] = answer.read()
        return self.blocks[index]


def _pip(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    return done.stdout.strip()


def _index() -> str:
    """The package index that pip asks: as it is configured, else its own default."""
    asked = os.environ.get("PIP_INDEX_URL") or _pip("config", "get", "global.index-url")
    if asked:
        return asked
    default = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    return subprocess.run([sys.executable, "-c", default], capture_output=True, text=True, check=True).stdout.strip()


def _wheel(release: str) -> str:
    """The address of a Linux wheel of a release; which Python it is for does not matter to its headers."""
    request = urllib.request.Request(
        f"{_index().rstrip('/')}/torch/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        page = answer.read()
    try:
        files = json.loads(page)["files"]
    except (ValueError, KeyError) as problem:
        raise OSError(f"the index does not list torch as JSON: {problem}") from problem
    pattern = re.compile(rf"torch-{re.escape(release)}(-\d+)?-cp311-cp311-manylinux\w*_x86_64\.whl")
    found = [file["url"] for file in files if pattern.fullmatch(file["filename"])]
    if not found:
        raise OSError(f"the index has no Linux wheel of torch {release}")
    return found[-1]


def digest_of(folder: Path) -> str:
    """Of names and contents of all files below a folder."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _fetch(release: str, folder: Path) -> None:
    with zipfile.ZipFile(io.BufferedReader(RemoteFile(_wheel(release)), BLOCK)) as wheel:
        for name in wheel.namelist():
            if name.startswith(WANTED) and not name.endswith("/"):
                target = folder / Path(name).relative_to("torch/include")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(wheel.read(name))


def include_folder(release: str) -> Path:
    """The folder to give to a compiler; fetched if it is not there yet.

    Raises:
        OSError: the index can't be reached, lacks the release, or does not serve what is asked of it.
        HeadersError: what was fetched is not what the digest in `RELEASES` was taken of.
    """
    folder = FOLDER / release
    if folder.exists() and digest_of(folder) == RELEASES[release]:
        return folder
    work = folder.with_name(f"{release}.{os.getpid()}")
    try:
        for attempt in range(ATTEMPTS):
            shutil.rmtree(work, ignore_errors=True)
            try:
                _fetch(release, work)
                break
            except (OSError, http.client.HTTPException, zipfile.BadZipFile) as problem:
                if attempt == ATTEMPTS - 1:
                    raise OSError(f"{type(problem).__name__}: {problem}") from problem
                time.sleep(2.0**attempt)
        if (found := digest_of(work)) != RELEASES[release]:
            raise HeadersError(f"the headers of torch {release} have the digest {found}, not {RELEASES[release]!r}")
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


if __name__ == "__main__":
    for one in RELEASES:
        try:
            print(one, include_folder(one))
        except HeadersError as problem:
            print(problem)
