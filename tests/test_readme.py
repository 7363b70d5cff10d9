"""README.md: os comandos que ele dá existem e, os rápidos, mostram o que ele diz."""

import io
import re
import shlex
import shutil
from contextlib import redirect_stdout

import pytest
from conftest import ROOT, chdir, run_main

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
# (marcado como testado?, os comandos, a saída que o README mostra)
BLOCKS = re.findall(r"(?s)(<!-- testado -->\n)?```sh\n(.*?)```\n(?:```text\n(.*?)```)?", TEXT)
COMMANDS = [line for _, commands, _ in BLOCKS for line in commands.splitlines()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Uma pasta como a de quem acaba de chegar: só o que o projeto traz."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("prepare.py", "model.py", "train.py", "sample.py", "config", "data/contos.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (shutil.copytree if name == "config" else shutil.copy)(ROOT / name, folder / name)
    return folder


def run_line(line, cwd):
    """Roda uma linha `python ...` neste processo e devolve o que ela escreve."""
    program, script, *arguments = shlex.split(line)
    assert program == "python"
    if script != "-c":
        return run_main(script, *arguments, cwd=cwd).stdout
    with chdir(cwd), redirect_stdout(io.StringIO()) as stdout:
        exec(arguments[0], {})
    return stdout.getvalue()


def test_tested_commands_print_what_the_readme_shows(clone):
    tested = [(commands, output) for mark, commands, output in BLOCKS if mark]
    assert len(tested) >= 6
    for commands, output in tested:
        printed = run_line(*commands.splitlines(), clone)
        # sem saída ao lado, é a resposta de um exercício, mais adiante
        assert printed == output or not output and f"`{printed.strip()}`" in TEXT, commands


@pytest.mark.parametrize("script", ["prepare.py", "train.py", "sample.py"])
def test_every_option_and_file_exists(script, tmp_path):
    known = set(re.findall(r"--\w+", run_main(script, "--help", cwd=tmp_path).stdout))
    lines = [*COMMANDS, *re.findall(r"`(python [^`]*)`", TEXT)]
    lines = [part.partition("&&")[0] for line in lines for part in line.split(script)[1:]]
    assert len(lines) > 3
    for line in lines:
        assert set(re.findall(r"--\w+", line)) <= known, line
        for path in re.findall(r"config/\w+\.py", line):
            assert (ROOT / path).exists(), line


def test_sample_commands_work_with_a_trained_model(clone):
    run_main("prepare.py", cwd=clone)
    run_main("train.py", "config/tiny.py", "--max_iters=1", "--eval_iters=1", cwd=clone)
    own = [line for line in COMMANDS if re.match(".*load_model|python sample", line)
           and not re.search("--init_from|out/livros", line)]
    assert len(own) >= 7
    for line in own:
        quick = " --max_new_tokens=5" if "--start" in line else ""
        assert run_line(line + quick, clone), line
    assert (clone / "out/atencao.svg").stat().st_size > 10_000


def test_links_lead_somewhere():
    headings = re.findall(r"^#+ (.*)", TEXT, flags=re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert target[1:] in slugs if target[0] == "#" else (
            target.startswith("https://") or (ROOT / target).exists()), target
