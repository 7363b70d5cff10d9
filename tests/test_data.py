"""prepare.py: formatos, downloads de um servidor que falha de vários modos, quedas, muito texto."""

import gzip
import hashlib
import io
import json
import random
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import ROOT, assert_short_error, run_main

import prepare
from prepare import END_OF_TEXT, build_encoding, read_meta, token_sample

STORIES = [
    f"História {i}. O gato viu a ação do pássaro no coração da árvore número {i}."
    for i in range(60)
]
TEXT = f"\n{END_OF_TEXT}\n".join(STORIES)
JSON = "".join(json.dumps({"text": story, "n": 1}, ensure_ascii=False) + "\n" for story in STORIES)


def documents(folder):
    """Os documentos de um conjunto preparado, decodificados e em ordem."""
    _, tokenizer = read_meta(folder)
    encoding = build_encoding(tokenizer)
    texts = []
    for part in ("train", "val"):
        ids = np.fromfile(folder / f"{part}.bin", "<u2")
        ends = np.flatnonzero(ids == encoding.eot_token)
        texts += [
            encoding.decode(piece[piece != encoding.eot_token]) for piece in np.split(ids, ends)
        ]
    return sorted(filter(None, texts))


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"pasta/{name.replace('_', '.')}", content)
    return file.getvalue()


FORMATS = {
    "a.txt": TEXT.encode(),
    "a.md": TEXT.encode("utf-8-sig"),
    "windows.txt": TEXT.replace("\n", "\r\n").encode(),
    "a.txt.gz": gzip.compress(TEXT.encode()),
    "a.jsonl": JSON.encode(),
    "a.json.gz": gzip.compress(JSON.encode()),
    "a.zip": zipped(um_txt=TEXT[:2000].rpartition("\n<")[0], dois_jsonl=JSON, foto_png=b"\xff"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, tmp_path):
    (tmp_path / name).write_bytes(FORMATS[name])
    run_main("prepare.py", "--input", name, "--name=x", "--vocab_size=300", cwd=tmp_path)
    assert set(documents(tmp_path / "data/x")) == set(STORIES)
    assert {path.name for path in tmp_path.iterdir()} == {name, "data"}  # nada extraído


def test_folders_and_files_together(tmp_path):
    (tmp_path / "p").mkdir()
    for name, content in FORMATS.items():
        (tmp_path / "p" / name).write_bytes(content)
    (tmp_path / "outro.txt").write_text("Outro texto.")
    run_main("prepare.py", "--input", "p", "outro.txt", "--vocab_size=300", cwd=tmp_path)
    assert set(documents(tmp_path / "data/p")) == {*STORIES, "Outro texto."}


def test_old_encoding_and_other_field(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT.replace("gato", "gato —").encode("cp1252"))
    run_main("prepare.py", "--input=a.txt", "--encoding=cp1252", "--vocab_size=300", cwd=tmp_path)
    assert "gato — viu a ação" in documents(tmp_path / "data/a")[0]
    (tmp_path / "b.jsonl").write_text(JSON.replace('"text"', '"corpo"'))
    options = ["--input=b.jsonl", "--vocab_size=300"]
    result = run_main("prepare.py", *options, cwd=tmp_path, check=False)
    assert_short_error(result, "b.jsonl, linha 1", "'text'", "--text_field")
    run_main("prepare.py", *options, "--text_field=corpo", cwd=tmp_path)
    assert documents(tmp_path / "data/b") == sorted(STORIES)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", JSON.encode() + b'{"text": 3}\n', ["linha 61"]),
        ("a.jsonl", JSON.encode()[:-5], ["linha 60"]),
        ("a.txt.gz", gzip.compress(TEXT.encode() * 9)[:-20], ["a.txt.gz", "danificado"]),
        ("a.txt.gz", TEXT.encode(), ["a.txt.gz", "danificado"]),
        ("a.zip", FORMATS["a.zip"][:-30], ["a.zip", "danificado"]),
        ("a.zip", zipped(foto_png=b"1"), ["0 caracteres"]),
        ("a.txt.gz", gzip.compress(b"\xef\xbb\xbf" + b"abc\n" * 300 + b"\xff"), ["posição 1203"]),
        ("a.txt", b"abc\n" * 2**18 + "á".encode()[:1], ["posição 1048576"]),
        ("a.txt", b"a" + "á".encode() * 2**19 + b"\xff", ["posição 1048577"]),
    ],
)
def test_damaged_files(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    result = run_main("prepare.py", "--input", name, cwd=tmp_path, check=False)
    assert_short_error(result, *words)
    assert not (tmp_path / "data").exists()


def test_max_mb_uses_the_beginning(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    run_main("prepare.py", "--input=a.txt", "--max_mb=0.002", "--vocab_size=300", cwd=tmp_path)
    found = documents(tmp_path / "data/a")
    assert found == sorted(STORIES[: len(found)]) and len("".join(found).encode()) in range(
        2000, 2100
    )


def test_a_repeated_document_falls_on_one_side_and_adding_moves_nothing(tmp_path):
    sides = []
    for name, stories in (("a", STORIES), ("b", STORIES * 2 + ["Mais um. " * 9])):
        (tmp_path / f"{name}.txt").write_text(f"\n{END_OF_TEXT}\n".join(stories))
        run_main("prepare.py", "--input", f"{name}.txt", "--vocab_size=300", cwd=tmp_path)
        encoding = build_encoding(read_meta(tmp_path / "data" / name)[1])
        texts = [
            encoding.decode(np.fromfile(tmp_path / f"data/{name}/{part}.bin", "<u2"))
            for part in ("train", "val")
        ]
        sides.append([{story for story in STORIES if story in text} for text in texts])
    assert sides[0] == sides[1] and not sides[0][0] & sides[0][1] and all(sides[0])


def test_reusing_a_vocabulary(workdir):
    (workdir / "a.txt").write_text(TEXT)
    run_main("prepare.py", "--input=a.txt", "--tokenizer=data/contos", cwd=workdir)
    a, b = (workdir / "data" / name / "vocab.tiktoken" for name in ("a", "contos"))
    assert a.read_bytes() == b.read_bytes()
    assert documents(workdir / "data/a") == sorted(STORIES)


# ------------------------------------------------------------------------------------------------
# Downloads


class Server(ThreadingHTTPServer):
    """Um servidor que erra como se pede: faults é a lista do que fazer em cada pedido."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.ranges = files, [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.server.files.get(self.path.strip("/"))
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.server.ranges.append(start)
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if content is None or isinstance(fault, int):
            return self.send_error(fault or 404)
        if start >= len(content):
            return self.send_error(416)
        if fault == "sem Range":
            start = 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", len(content) - start)
        self.send_header("Content-Type", "text/html" if fault == "html" else "text/plain")
        self.end_headers()
        body = bytes(len(content)) if fault == "outros bytes" else content
        if fault in ("cai", "trava"):
            self.wfile.write(body[start : start + 20_000])
            if fault == "trava":
                time.sleep(3)
        else:
            self.wfile.write(body[start:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(prepare, "WAIT", 0.01)
    server = Server(FORMATS | {"machado.zip": MACHADO, "mc4-00000.json.gz": LONG})
    server.files["long.txt"] = f"{TEXT}\n{END_OF_TEXT}\n".encode() * 15
    yield server
    server.shutdown()


TITLE = "Conto, Contos Fluminenses, 1870\r\n\r\nContos Fluminenses\r\n\r\nTexto-fonte:\r\n"
TITLE += "Obra Completa, Machado de Assis, vol. II,\r\nRio de Janeiro, 1994.\r\n \r\n"
TITLE += "Publicado originalmente pela Editora Garnier, Rio de Janeiro, em 1870.\r\n\r\n"
BODY = "Era uma vez — disse\r\nele — uma\r\n  ação.\r\n\r\nFim do parágrafo.\r\n" * 40
with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
    for name in ("contos/a.txt", "romance/b.txt", "cronica/c.txt", "contos/leia.pdf"):
        archive.writestr(f"machado/{name}", (TITLE + name + "\r\n\r\n" + BODY).encode("cp1252"))
MACHADO = file.getvalue()
LONG = gzip.compress(
    "".join(
        json.dumps({"text": hashlib.sha512(bytes([i % 256, i // 256])).hexdigest() * 3}) + "\n"
        for i in range(3000)
    ).encode()
)


def fetch(server, name, *options, cwd, check=True):
    return run_main(
        "prepare.py",
        "--url",
        server.url(name),
        "--name=x",
        "--vocab_size=300",
        *options,
        cwd=cwd,
        check=check,
    )


@pytest.mark.parametrize(
    "faults, ranges",
    [
        ([], [0]),
        (["cai"], [0, 1]),
        (["cai", 503, "cai"], [0, 1, 1, 2]),
        (["trava"], [0, 1]),
        (["cai", "sem Range"], [0, 1]),
        ([500, 429], [0, 0, 0]),
        ([503] * 4, [0] * 5),
    ],
)
def test_downloads_survive_faults(server, faults, ranges, tmp_path, monkeypatch):
    get = prepare.requests.get
    monkeypatch.setattr(  # esperar 1 s, e não 30, por um servidor que travou
        prepare.requests, "get", lambda url, timeout, **rest: get(url, timeout=(1, 1), **rest)
    )
    server.faults = faults
    fetch(server, "long.txt", cwd=tmp_path)
    assert [start // 2**14 for start in server.ranges] == ranges
    (cached,) = (tmp_path / "data/.cache").iterdir()
    assert cached.read_bytes() == server.files["long.txt"]
    assert set(documents(tmp_path / "data/x")) == set(STORIES)
    fetch(server, "long.txt", cwd=tmp_path)  # já está no disco
    assert len(server.ranges) == len(ranges)


@pytest.mark.parametrize(
    "name, faults, words",
    [
        ("nada.txt", [], ["nada.txt", "404"]),
        ("a.txt", ["html"], ["a.txt", "página"]),
        ("a.txt", [503] * 5, ["a.txt", "HTTPError", "--input"]),
    ],
)
def test_downloads_that_fail(server, name, faults, words, tmp_path):
    server.faults = faults
    assert_short_error(fetch(server, name, cwd=tmp_path, check=False), *words)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".cache"]


def test_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "WAIT", 0.01)
    result = run_main("prepare.py", "--url=http://127.0.0.1:9/a.txt", cwd=tmp_path, check=False)
    assert_short_error(result, "ConnectionError", "Sem rede", "--input")


def machado(server, monkeypatch, tmp_path, **changes):
    source = prepare.SOURCES["machado"] | {"url": server.url("machado.zip")} | changes
    monkeypatch.setitem(prepare.SOURCES, "machado", source)
    return run_main(
        "prepare.py", "--dataset=machado", "--vocab_size=300", cwd=tmp_path, check=False
    )


def test_machado(server, monkeypatch, tmp_path):
    assert (
        machado(server, monkeypatch, tmp_path, md5=hashlib.md5(MACHADO).hexdigest()).returncode == 0
    )
    texts = documents(tmp_path / "data/machado")
    assert [text.split("\n\n")[0] for text in texts] == ["contos/a.txt", "romance/b.txt"]
    assert texts[0].split("\n\n")[1:3] == [
        "Era uma vez — disse ele — uma ação.",
        "Fim do parágrafo. Era uma vez — disse ele — uma ação.",
    ]


def test_wrong_bytes_are_refused_and_fetched_anew(server, monkeypatch, tmp_path):
    server.faults = ["outros bytes"]
    md5 = hashlib.md5(MACHADO).hexdigest()
    assert_short_error(machado(server, monkeypatch, tmp_path, md5=md5), "MD5", "Rode de novo")
    assert not list((tmp_path / "data/.cache").iterdir())
    assert machado(server, monkeypatch, tmp_path, md5=md5).returncode == 0


def test_a_large_download_stops_at_what_is_wanted(server, monkeypatch, tmp_path):
    source = prepare.SOURCES["mc4"] | {"url": server.url("mc4-{:05d}.json.gz")}
    monkeypatch.setitem(prepare.SOURCES, "mc4", source)
    result = run_main(
        "prepare.py", "--dataset=mc4", "--max_mb=0.3", "--vocab_size=300", cwd=tmp_path
    )
    (part,) = (tmp_path / "data/.cache").iterdir()
    assert part.name.endswith(".json.gz.part") and part.stat().st_size < len(LONG)
    assert "não foi conferido" in result.stdout
    assert len(documents(tmp_path / "data/mc4")) > 100
    run_main("prepare.py", "--dataset=mc4", "--vocab_size=300", cwd=tmp_path)  # e agora tudo
    (whole,) = (tmp_path / "data/.cache").iterdir()
    assert whole.read_bytes() == LONG and server.ranges[1] > 100_000
    assert len(documents(tmp_path / "data/mc4")) == 3000


# ------------------------------------------------------------------------------------------------
# Quedas, e muito texto


def test_killed_at_any_moment_the_set_is_whole(tmp_path):
    moments = random.Random(0)
    for name, text in (("a", TEXT * 3), ("b", TEXT[::-1] * 40)):
        (tmp_path / f"{name}.txt").write_text(text)
    run_main("prepare.py", "--input=a.txt", "--name=x", "--vocab_size=300", cwd=tmp_path)
    command = [sys.executable, ROOT / "prepare.py", "--input=b.txt", "--name=x", "--vocab_size=700"]
    began = time.perf_counter()
    subprocess.run([*command[:-2], "--name=y", "--vocab_size=700"], cwd=tmp_path, check=True)
    whole = time.perf_counter() - began
    for _ in range(12):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
        time.sleep(whole * moments.uniform(0.3, 1))
        process.kill()
        process.wait()
        folder = tmp_path / "data/x"
        if (folder / "meta.json").exists():  # o conjunto antigo ou o novo, inteiros
            meta, tokenizer = read_meta(folder)
            for part, split in meta["splits"].items():
                tokens = token_sample(folder / f"{part}.bin")
                assert hashlib.sha256(tokens).hexdigest() == split["sha256"]
                assert tokens.max() == tokenizer["vocab_size"] - 1
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    for name in ("train.bin", "val.bin", "vocab.tiktoken"):
        assert (tmp_path / "data/x" / name).read_bytes() == (
            tmp_path / "data/y" / name
        ).read_bytes()
    assert not list((tmp_path / "data/x").glob(".*"))


def test_memory_stays_flat(tmp_path):
    """60 MB numa linha só, com o limite de memória do próprio sistema: menos que o texto aberto."""
    with open(tmp_path / "a.txt", "w") as file:
        for _ in range(60):
            file.write("abcdefghij" * 100_000)
    peaks = []
    for code in ("import prepare", "import prepare; prepare.main(['--input=a.txt', '--name=x'])"):
        report = "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        result = subprocess.run(
            [sys.executable, "-c", code + report],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
        )
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout.split()[-1]))  # em KB
    assert peaks[1] - peaks[0] < 100_000
