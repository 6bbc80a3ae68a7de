"""Query images without measure: refused in a sentence, in a process whose memory is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from model_folder import write_folder
from query_tables import facts, jpeg, make_db, release

from jobs.search import main
from pipeline.model import canary, load_model

MOST_MIB = 250
"""An image of 64 megapixels, the most that may be, is 183 MiB as RGB."""

SCRIPT = r"""
import io, mmap, os, resource, struct, sys, zlib
from pathlib import Path
from PIL import Image
from pipeline.errors import QueryError
from pipeline.query import Mixture, Searcher

ROWS = zlib.compress(bytes(3_000_000), 9)

def png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", ROWS) + chunk(b"IEND", b"")

searcher, folder = Searcher.open(sys.argv[1]), Path(sys.argv[2])
small = io.BytesIO()
Image.new("RGB", (60, 60)).save(small, "JPEG")
jpeg = small.getvalue()
at = jpeg.index(b"\xff\xc0")
searcher.search(jpeg, mode="image")  # loads the tower, which is not what is measured
os.mkfifo(folder / "fifo")
with open(folder / "large.jpg", "wb") as file:
    file.truncate(200_000_000)
with open(folder / "large.jpg", "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
(folder / "bomb.png").write_bytes(png(60_000, 60_000))
queries = {
    "a pipe": folder / "fifo",
    "zeros": Path("/dev/zero"),
    "a folder": folder,
    "a file of 200 MB": folder / "large.jpg",
    "bytes of 200 MB": memoryview(mapped),
    "a PNG": png(60_000, 60_000),
    "a wide PNG": png(2**31 - 1, 1),
    "a PNG in a file": folder / "bomb.png",
    "a JPEG": jpeg[: at + 5] + struct.pack(">HH", 65_000, 65_000) + jpeg[at + 9 :],
    "a PNG of few rows": png(7_000, 7_000),
    "a Pillow image": Image.new("1", (20_000, 20_000)),
    "in a mixture": Mixture([(Path("/dev/zero"), 1.0), (jpeg, 1.0)]),
}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, query in queries.items():
    try:
        searcher.search(query, mode="image")
    except QueryError as error:
        print(f"{name}: {error}")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""

SAID = {
    "a pipe": "it is no file",
    "zeros": "it is no file",
    "a folder": "it is no file",
    "a file of 200 MB": "has 200000000 bytes; 50000000 are the most",
    "bytes of 200 MB": "has 200000000 bytes; 50000000 are the most",
    "a PNG": "decompression bomb",
    "a wide PNG": "decompression bomb",
    "a PNG in a file": "decompression bomb",
    "a JPEG": "decompression bomb",
    "a PNG of few rows": "cannot be used",
    "a Pillow image": "20000 x 20000 pixels are over the limit",
    "in a mixture": "it is no file",
}


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("refusals")
    model = load_model(str(write_folder(folder / "model")))
    canary.write(model)  # or a warning says that there is none
    columns = {name: values[:2] for name, values in facts(2).items()}
    image = model.embed_images([jpeg((200, 0, 0)), jpeg((0, 0, 200))])
    path = make_db(folder / "db", text=model.embed_texts(["red", "blue"]), image=image, columns=columns)
    release(path, model=str(folder / "model"), model_id=model.model_id)
    return path


def test_images_without_measure_cost_a_sentence_and_no_memory(db, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, db, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    *lines, grown_mib = done.stdout.splitlines()
    said = dict(line.split(": ", 1) for line in lines)
    assert said.keys() == SAID.keys()
    for name, words in SAID.items():
        assert words in said[name]
        assert said[name].isprintable()
    assert int(grown_mib) < MOST_MIB


@pytest.mark.parametrize("as_json", [[], ["--json"]])
@pytest.mark.parametrize("image", ["/dev/zero", "fifo", "large.jpg", "."])
def test_on_the_command_line(db, tmp_path, capsys, monkeypatch, as_json, image):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    with Path("large.jpg").open("wb") as file:
        file.truncate(200_000_000)
    assert main(["--image", image, "--db", db, *as_json]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.startswith("error: The query image ")
    assert (json.loads(out)["error"] in err) if as_json else out == ""
