"""Dar vida ao modelo: ele lê um começo e escreve o resto, um token de cada vez.

É o passo 6 do *LLM do Zero*. O modelo dá uma nota a cada token do vocabulário; as notas viram
probabilidades; um sorteio escolhe o próximo token; ele entra no texto, e tudo se repete.

Como rodar, depois de um treino:

    python sample.py --start "O gato"
    python sample.py --start "O gato" --temperature 1.2 --num_samples 3
    python sample.py --init_from gpt2 --start "The cat"     o GPT-2 publicado, baixado
    python sample.py --export modelo                        grava no formato do Hugging Face

O texto sai em stdout e as informações em stderr: `python sample.py > conto.txt` guarda só o texto.
"""

import argparse
import codecs
import json
import sys
import time
from pathlib import Path

from model import (  # antes do torch: model.py ajusta o ambiente dele
    GPT, GPTConfig, choose_device, choose_dtype, load_weights, read_checkpoint, read_pretrained,
    to_pretrained, write_safetensors)
from prepare import (
    END_OF_TEXT, build_encoding, fetch_pretrained, parse_arguments, read_pretrained_tokenizer, run,
    to_pretrained_tokenizer, whole_file)

import torch


def find_checkpoint(out_dir):
    """O best.pt da pasta dada ou, sem pasta, o do treino mais recente em out/."""
    if out_dir:
        return Path(out_dir, "best.pt")
    found = sorted(Path("out").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit("Não há treino em out/. Rode `python train.py config/tiny.py` primeiro.")
    print(f"[modelo: {found[-1]}]", file=sys.stderr)
    return found[-1]


def load_model(path):
    """Lê um .pt, uma pasta ou um modelo publicado: devolve o modelo e o tokenizador, descrito."""
    if str(path).endswith(".pt"):
        checkpoint = read_checkpoint(path)
    else:
        folder = fetch_pretrained(path)
        checkpoint = read_pretrained(folder)
        checkpoint["tokenizer"] = read_pretrained_tokenizer(folder)
    tokenizer = checkpoint["tokenizer"]
    with torch.device("meta"):  # só as formas: os pesos vêm do arquivo, não de um sorteio
        model = GPT(GPTConfig(**checkpoint["model_config"]))
    load_weights(model, checkpoint["model"], path)
    if model.config.vocab_size != tokenizer["vocab_size"]:
        raise SystemExit(f"{path}: o modelo dá notas a {model.config.vocab_size} tokens, e o "
                         f"vocabulário tem {tokenizer['vocab_size']}.")
    return model.eval(), tokenizer


def sampling_dtype(model, device, name="auto"):
    """A precisão para gerar: a que o chip faz melhor, ou a do nome dado."""
    if name == "auto" and device.type == "cpu" and model.num_params() < 25e6:
        return torch.float32  # cabe no cache do processador: não há leitura da memória a poupar
    return choose_dtype(device, name)


def export(folder, model, tokenizer):
    """Grava o modelo no formato do Hugging Face: AutoModelForCausalLM e AutoTokenizer o abrem."""
    folder = Path(folder)
    if folder.exists():
        raise SystemExit(f"{folder} já existe: dê a --export uma pasta nova.")
    config, weights = to_pretrained(model)
    end = tokenizer["special_tokens"][END_OF_TEXT]
    ends = {"bos_token_id": end, "eos_token_id": end}
    names = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    contents = {
        "generation_config.json": ends | {"do_sample": True, "temperature": 0.8, "top_k": 20},
        "tokenizer.json": to_pretrained_tokenizer(tokenizer),
        "tokenizer_config.json": names | {"tokenizer_class": "PreTrainedTokenizerFast",
                                          "model_max_length": model.config.block_size},
        "config.json": config | ends}
    with whole_file(folder / "model.safetensors") as file:
        write_safetensors(file, weights)
    for name, content in contents.items():
        with whole_file(folder / name) as file:
            file.write(json.dumps(content, ensure_ascii=False, indent=2).encode())
    print(f"Pronto: {folder}/ abre com AutoModelForCausalLM.from_pretrained({str(folder)!r}).")


def read_start(start):
    """O começo do texto: o que foi escrito na linha de comando, ou FILE:caminho, de um arquivo."""
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SystemExit(f"Não achei {path}, pedido em --start.")
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path} não está em UTF-8 (byte {error.start}). Salve-o como UTF-8.")


def text_pieces(ids, encoding):
    """Transforma números de tokens em pedaços de texto, conforme chegam.

    Uma letra como "ã" tem dois bytes e pode estar cortada entre dois tokens: o decodificador guarda
    o começo dela até que o resto chegue.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        yield decoder.decode(encoding.decode_single_token_bytes(i))


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description="Escreve textos com um modelo treinado.", allow_abbrev=False)
    add = parser.add_argument
    add("--start", default="", metavar="TEXTO", help="o começo do texto, ou FILE:arquivo.txt")
    add("--num_samples", type=int, default=1, metavar="N", help="quantos textos escrever [1]")
    add("--max_new_tokens", type=int, default=500, metavar="N",
        help="no máximo quantos tokens tem cada um [500]")
    add("--temperature", type=float, default=0.8, metavar="X",
        help="quanto arriscar: 0 fica com o mais provável, 1 segue as probabilidades [0.8]")
    add("--top_k", type=int, default=20, metavar="K",
        help="sortear só entre os K tokens mais prováveis; 0 não limita [20]")
    add("--seed", type=int, default=1337, metavar="N",
        help="a mesma semente dá o mesmo texto [1337]")
    add("--out_dir", metavar="PASTA", help="a pasta do treino; sem isto, o mais recente em out/")
    add("--init_from", metavar="MODELO",
        help="em vez de um treino seu: um .pt, gpt2 (gpt2-medium, gpt2-large, gpt2-xl), DONO/NOME "
        "no Hugging Face, ou uma pasta nesse formato")
    add("--export", metavar="PASTA", help="só grava o modelo no formato do Hugging Face")
    add("--device", default="auto", metavar="NOME", help="auto, cuda, mps ou cpu [auto]")
    add("--dtype", default="auto", metavar="NOME", help="auto, float32, bfloat16 ou float16 [auto]")
    options = parse_arguments(parser, arguments)
    least = {"num_samples": 1, "max_new_tokens": 1, "temperature": 0, "top_k": 0, "seed": 0}
    for name, limit in least.items():
        if not getattr(options, name) >= limit:
            raise SystemExit(f"--{name} {getattr(options, name)} não serve: o mínimo é {limit}.")
    if options.seed >= 2**32:
        raise SystemExit(f"--seed {options.seed} não serve: o máximo é {2**32 - 1}.")

    start = read_start(options.start)
    device = choose_device(options.device)
    model, tokenizer = load_model(options.init_from or find_checkpoint(options.out_dir))
    if options.export:
        return export(options.export, model, tokenizer)
    model = model.to(device, sampling_dtype(model, device, options.dtype))
    encoding = build_encoding(tokenizer)
    # no treino, o <|endoftext|> fecha um documento; logo depois dele começa outro
    ids = [encoding.eot_token, *encoding.encode_ordinary(start)]
    idx = torch.tensor([ids] * options.num_samples, device=device)  # (B, T)
    random = torch.Generator(device).manual_seed(options.seed)
    began = time.perf_counter()
    tokens = model.generate(idx, options.max_new_tokens, options.temperature, options.top_k,
                            stop_token=encoding.eot_token, generator=random)
    if options.num_samples == 1:
        count = 0
        print(start, end="", flush=True)
        for count, piece in enumerate(text_pieces((token.item() for token in tokens), encoding), 1):
            print(piece, end="", flush=True)
        print()
    else:
        rows = [[] for _ in range(options.num_samples)]
        for column in tokens:  # (B,): um token de cada texto; os que já acabaram repetem o do fim
            for row, token in zip(rows, column.tolist()):
                if token != encoding.eot_token:
                    row.append(token)
        count = sum(map(len, rows))
        texts = [start + "".join(text_pieces(row, encoding)) for row in rows]
        print("\n---------------\n".join(texts))
    seconds = time.perf_counter() - began
    print(f"[{count} tokens, {count / seconds:.0f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    run(main)
