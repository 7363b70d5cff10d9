"""O treinamento: mostra texto ao modelo e corrige os seus pesos, milhares de vezes.

É o passo 5 do *LLM do Zero*. O modelo lê um trecho e dá nota a cada candidato a próximo token; a
loss mede o quanto ele se espantou com o token que veio de verdade; o gradiente diz para que lado
mexer cada peso; o otimizador mexe um pouco. É isso, repetido.

    python train.py config/tiny.py                      treina; de novo, continua de onde parou
    python train.py config/tiny.py --learning_rate=1e-3 muda uma opção do arquivo
    python train.py --help                              mostra todas as opções

O resultado fica em out/NOME/: best.pt (o modelo com a menor loss de validação, que sample.py usa),
last.pt (tudo o que é preciso para continuar) e log.csv (uma linha por avaliação).
"""

import argparse
import ast
import hashlib
import inspect
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

from model import (  # antes do torch: model.py ajusta o ambiente dele
    GPT, GPTConfig, choose_device, choose_dtype, load_weights, read_checkpoint, read_pretrained)
from prepare import (
    build_encoding, duration, fetch_pretrained, group, parse_arguments, quote, read_meta,
    read_pretrained_tokenizer, run, show_progress, token_sample, whole_file)

import torch
from torch import distributed


@dataclass
class Config:
    """As opções do treino, com os nomes do nanoGPT; `--help` mostra estes mesmos comentários."""

    out_dir: str = ""  # a pasta do treino (vazio: out/NOME, com o nome do arquivo de configuração)
    dataset: str = "contos"  # o conjunto de dados: data/NOME, feito por prepare.py
    init_from: str = "scratch"  # scratch (do zero), ou um .pt, uma pasta, gpt2, DONO/NOME
    restart: bool = False  # True: começa de novo e guarda o treino antigo com outro nome
    # o modelo; estes valores são os do GPT-2 menor
    n_layer: int = 12  # quantos blocos
    n_head: int = 12  # quantas cabeças de atenção por bloco
    n_embd: int = 768  # o tamanho do vetor de cada token
    block_size: int = 1024  # quantos tokens o modelo enxerga de uma vez
    dropout: float = 0.0  # fração apagada ao acaso; 0.1 ou 0.2 ajuda quando o texto é pouco
    bias: bool = True  # usar vieses, como o GPT-2
    # um passo: batch_size * gradient_accumulation_steps * block_size tokens
    batch_size: int = 12  # quantas sequências por vez: o que cabe na memória
    gradient_accumulation_steps: int = 40  # quantos batches por passo, somando os gradientes
    max_iters: int = 600000  # quantos passos ao todo
    # o otimizador
    optimizer: str = "adamw"  # adamw, ou muon (as matrizes dos blocos com Muon, o resto com AdamW)
    learning_rate: float = 6e-4  # o tamanho das correções do AdamW, no ponto mais alto
    muon_learning_rate: float = 0.02  # o mesmo para o Muon
    weight_decay: float = 0.1  # encolhe as matrizes um pouco a cada passo
    beta1: float = 0.9  # AdamW: a memória da média dos gradientes
    beta2: float = 0.95  # AdamW: a memória da média dos quadrados
    grad_clip: float = 1.0  # limite para a norma do gradiente (0: sem limite)
    decay_lr: bool = True  # baixar as taxas ao longo do treino
    warmup_iters: int = 2000  # passos em que as taxas sobem desde quase zero
    lr_decay_iters: int = 0  # o passo em que as taxas chegam ao mínimo (0: max_iters)
    min_lr: float = 6e-5  # o mínimo de learning_rate; a taxa do Muon baixa na mesma proporção
    # acompanhar e guardar
    eval_interval: int = 2000  # de quantos em quantos passos avaliar
    eval_iters: int = 200  # no máximo quantos batches por avaliação
    eval_only: bool = False  # só avaliar o modelo e terminar
    log_interval: int = 10  # de quantos em quantos passos mostrar o progresso
    save_interval: int = 1000  # de quantos em quantos passos gravar last.pt
    sample_prompt: str = "O gato"  # o começo do texto que o modelo escreve a cada avaliação
    # a máquina
    device: str = "auto"  # auto, cuda, mps, cpu
    dtype: str = "auto"  # a precisão das contas: auto, float32, bfloat16, float16
    compile: bool = True  # torch.compile: gera código próprio para o modelo; só vale em cuda
    seed: int = 1337  # a semente de todos os sorteios


def read_options(arguments=None):
    """Lê o arquivo de configuração e, por cima dele, a linha de comando; devolve um Config."""
    parser = argparse.ArgumentParser(
        usage="python train.py [config/ARQUIVO.py] [--nome=valor ...]", allow_abbrev=False,
        description="Treina um GPT. A mesma linha de novo continua o treino de onde parou.",
        argument_default=argparse.SUPPRESS)
    parser.add_argument("config", nargs="?", help="um arquivo de linhas `nome = valor`")
    meanings = dict(re.findall(r"(\w+): .*?  # (.*)", inspect.getsource(Config)))
    for field in fields(Config):
        meaning = f"{meanings[field.name]} [{field.default}]".replace("%", "%%")
        kind = boolean if field.type is bool else field.type
        parser.add_argument(f"--{field.name}", type=kind, metavar=field.type.__name__, help=meaning)
    options = vars(parse_arguments(parser, arguments))
    if path := options.pop("config", ""):  # as linhas do arquivo são lidas como opções também
        parser.error = lambda message: sys.exit(f"{path}: {message}")
        options = vars(parse_arguments(parser, read_config_file(path))) | options
    config = Config(**options)
    config.out_dir = config.out_dir or f"out/{Path(path).stem or 'gpt2'}"
    for name, value in vars(config).items():
        from_zero = type(value) is float or name in ("warmup_iters", "lr_decay_iters", "seed")
        least = 0 if from_zero else 1
        most = 1 if name in ("dropout", "beta1", "beta2") else 2**32
        if type(value) in (int, float) and not least <= value < most:
            raise SystemExit(f"{name} = {value} não serve: de {least} até menos de {most}.")
    if config.optimizer not in ("adamw", "muon"):
        raise SystemExit(f"optimizer = {config.optimizer!r} não existe: use 'adamw' ou 'muon'.")
    return config


def boolean(text):
    """boolean("True") -> True; só aceita True e False, escritos assim."""
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"{text!r} não é True nem False")
    return text == "True"


def read_config_file(path):
    """As linhas `nome = valor` de um arquivo, como ["--nome=valor"]: lidas, nunca executadas."""
    arguments, number = [], 1
    try:
        for line in ast.parse(Path(path).read_text(encoding="utf-8-sig")).body:
            number = line.lineno
            (target,) = line.targets
            arguments.append(f"--{target.id}={ast.literal_eval(line.value)}")
        return arguments
    except OSError:
        raise SystemExit(f"Não consegui ler {path}. Os arquivos de configuração ficam em config/.")
    except (SyntaxError, AttributeError, ValueError) as error:
        number = getattr(error, "lineno", number)
        raise SystemExit(f"{path}, linha {number}: só cabem linhas simples, como `n_layer = 4`.")


class Tokens:
    """Os tokens de um arquivo .bin, lidos do disco conforme a necessidade (np.memmap).

    O texto é cortado em janelas de block_size tokens. A cada volta (epoch), as janelas vêm em
    outra ordem, e os cortes caem em outros lugares.
    """

    def __init__(self, path, split, vocab_size, block_size, seed=0):
        """split: o que meta.json diz do arquivo; o que não bate com ele encerra o programa."""
        size = path.stat().st_size if path.exists() else 0
        if size != 2 * split["tokens"]:
            raise SystemExit(f"{path} falta ou está danificado: tem {size} bytes, e não "
                             f"{split['tokens']} tokens de 2 bytes. Rode prepare.py de novo.")
        if split["tokens"] <= block_size:
            raise SystemExit(f"{path} tem {split['tokens']} tokens, e block_size = {block_size} "
                             "pede mais que isso: prepare um texto maior ou diminua block_size.")
        sample = token_sample(path)
        if sample.max() >= vocab_size or hashlib.sha256(sample).hexdigest() != split["sha256"]:
            raise SystemExit(f"{path} tem tokens diferentes dos que meta.json descreve: a soma "
                             f"SHA-256 não bate, ou o maior, {sample.max()}, passa de "
                             f"{vocab_size - 1}. Rode prepare.py de novo.")
        self.tokens = np.memmap(path, dtype="<u2", mode="r")
        self.block_size, self.seed = block_size, seed
        # uma janela a menos que o possível deixa folga para os cortes mudarem de lugar
        self.windows = max(1, len(self.tokens) // block_size - 1)

    @lru_cache(maxsize=2)
    def starts(self, epoch):
        """Onde começa cada janela de uma volta, na ordem sorteada: (windows,)."""
        random = np.random.default_rng((self.seed, epoch))
        slack = len(self.tokens) - self.windows * self.block_size
        offset = random.integers(min(slack, self.block_size))
        return offset + self.block_size * random.permutation(self.windows)

    def batch(self, number, batch_size):
        """O batch de número `number`, desde o começo do treino: x e y, ambos (B, T).

        Só depende da semente e do número: continuar um treino é igual a nunca ter parado.
        """
        sequences = range(number * batch_size, (number + 1) * batch_size)
        return self.read([self.starts(s // self.windows)[s % self.windows] for s in sequences])

    def fixed_batches(self, batch_size, most):
        """Os batches da avaliação, sempre os mesmos: o texto todo ou `most` batches espaçados."""
        starts = np.arange(0, len(self.tokens) - self.block_size, self.block_size)
        if len(starts) > most * batch_size:
            starts = starts[np.linspace(0, len(starts) - 1, most * batch_size).astype(int)]
        for i in range(0, len(starts), batch_size):
            yield self.read(starts[i : i + batch_size])

    def read(self, starts):
        """As janelas que começam em `starts`: os tokens x e, para cada um, o seguinte, y."""
        rows = [self.tokens[start : start + self.block_size + 1] for start in starts]
        rows = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T + 1)
        return rows[:, :-1], rows[:, 1:]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) para as matrizes dos blocos.

    O gradiente de uma matriz costuma apontar quase todo para poucas direções. O Muon iguala a força
    de todas antes de corrigir: aprende-se mais por passo.
    """

    def __init__(self, params, lr, weight_decay, dtype):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for settings in self.param_groups:
            for p in settings["params"]:
                # a média dos gradientes recentes, e um passo adiante dela (momento de Nesterov)
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - settings["momentum"])
                update = orthogonalize(p.grad.lerp(momentum, settings["momentum"]), self.dtype)
                scale = max(1, p.size(0) / p.size(1)) ** 0.5  # mais linhas que colunas: passo maior
                p.mul_(1 - settings["lr"] * settings["weight_decay"])
                p.add_(update, alpha=-settings["lr"] * scale)


# a·x + b·x³ + c·x⁵, três vezes, leva qualquer x de 0,01 a 1 para entre 0,73 e 1,27. Os coeficientes
# vêm do método de Amsel et al. 2025 ("The Polar Express"); os do artigo do Muon pedem cinco vezes.
NEWTON_SCHULZ = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))


def orthogonalize(matrix, dtype):
    """A matriz com os valores singulares perto de 1, pela iteração de Newton-Schulz.

    Um polinômio ímpar de uma matriz é o mesmo polinômio em cada valor singular dela.
    """
    x = matrix.to(dtype)
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x  # com a matriz deitada, x @ x.T é a menor das duas opções
    x = x / (x.norm() + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        square = x @ x.T
        square = torch.addmm(square, square, square, beta=b, alpha=c)  # b·x·xᵀ + c·(x·xᵀ)²
        x = torch.addmm(x, square, x, beta=a)  # a·x + (b·x·xᵀ + c·(x·xᵀ)²)·x
    return (x.T if tall else x).to(matrix.dtype)


def make_optimizers(model, config, dtype):
    """Reparte os pesos entre os otimizadores; só as matrizes encolhem com weight_decay."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizers = []
    if config.optimizer == "muon":
        hidden = [p for p in model.h.parameters() if p.dim() == 2]
        matrices = [model.wte.weight, model.wpe.weight]
        muon_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        optimizers.append(Muon(hidden, config.muon_learning_rate, config.weight_decay, muon_dtype))
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    optimizers.append(torch.optim.AdamW(  # Loshchilov e Hutter 2019
        groups, config.learning_rate, (config.beta1, config.beta2), fused=True))
    for settings in (settings for optimizer in optimizers for settings in optimizer.param_groups):
        settings["initial_lr"] = settings["lr"]
    return optimizers


def lr_factor(step, config):
    """A fração das taxas a usar num passo: sobe até 1 em linha reta e desce em curva de cosseno."""
    if step < config.warmup_iters:
        return (step + 1) / (config.warmup_iters + 1)
    if not config.decay_lr:
        return 1.0
    end = config.lr_decay_iters or config.max_iters
    progress = min(1, (step - config.warmup_iters) / max(1, end - config.warmup_iters))
    lowest = config.min_lr / (config.learning_rate or 1)
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * progress)) / 2


class Trainer:
    """Um treino: o modelo, os otimizadores, os dados e o passo em que se está."""

    def __init__(self, config):
        self.config, self.out = config, Path(config.out_dir)
        self.step, self.best_val_loss, self.log, self.began = 0, math.inf, [], time.perf_counter()
        self.join_processes()
        self.dtype = choose_dtype(self.device, config.dtype)
        config.dtype = str(self.dtype)[6:]  # a escolhida: check_same_run avisa, se mudar
        # as contas pesadas vão em self.dtype; os pesos e o que precisa de exatidão, em float32
        self.autocast = torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        # float16 não alcança números muito pequenos: o GradScaler multiplica a loss para caberem
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.skipped = 0  # passos pulados em seguida, em float16
        self.stop_signal = 0

        folder = Path("data", config.dataset)
        meta, self.tokenizer = read_meta(folder)
        self.encoding, vocab_size = build_encoding(self.tokenizer), self.tokenizer["vocab_size"]
        self.train_data, self.val_data = (
            Tokens(folder / f"{part}.bin", meta["splits"][part], vocab_size, config.block_size,
                   config.seed) for part in ("train", "val"))
        self.bytes_per_token = meta["splits"]["val"]["bytes"] / meta["splits"]["val"]["tokens"]
        self.batches_per_step = config.batch_size * config.gradient_accumulation_steps
        # com as opções em FIXED, o que define um treino: mudar algo no meio daria outro treino
        self.fingerprint = {
            "batch_size * gradient_accumulation_steps": self.batches_per_step,
            "vocabulário": hashlib.sha256(self.tokenizer["vocab"].encode()).hexdigest()[:16],
            **{f"{part}.bin": split["sha256"][:16] for part, split in meta["splits"].items()}}

        path, checkpoint = self.find_checkpoint()
        torch.manual_seed(config.seed)  # para o sorteio dos pesos iniciais
        self.model = GPT(GPTConfig(config.block_size, vocab_size, config.n_layer, config.n_head,
                                   config.n_embd, config.dropout, config.bias))
        if checkpoint:
            load_weights(self.model, checkpoint["model"], path)
        self.model.to(self.device)
        self.optimizers = make_optimizers(self.model, config, self.dtype)
        self.is_new = path != self.out / "last.pt"
        if not self.is_new:
            self.resume(checkpoint)

    def join_processes(self):
        """Escolhe o dispositivo e, sob torchrun, encontra os outros processos deste treino."""
        # torchrun diz a cada processo quem ele é; sem torchrun, há um só
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        self.device = choose_device(self.config.device)
        if self.world_size == 1:
            return
        if self.config.gradient_accumulation_steps % self.world_size:
            raise SystemExit(
                f"gradient_accumulation_steps = {self.config.gradient_accumulation_steps} não se "
                f"reparte por {self.world_size} processos: use um múltiplo de {self.world_size}.")
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        # a cada vez que o torchrun reinicia os processos, os endereços vão para uma lista nova
        store, rank, size = next(distributed.rendezvous("env://"))
        store = distributed.PrefixStore(f"vez {self.restarts}", store)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
        if self.rank:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # só o processo 0 escreve

    def gather(self, *values):
        """A soma de cada valor em todos os processos."""
        if self.world_size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(sums)
        return sums.tolist()

    def find_checkpoint(self):
        """De onde partir: (caminho, conteúdo) de last.pt ou do init_from; (None, None): do zero."""
        last, config = self.out / "last.pt", self.config
        # quando o torchrun reinicia processos que caíram, é para continuar
        if last.exists() and (self.restarts or not config.restart):
            try:
                checkpoint = read_checkpoint(last, "optimizers")
            except SystemExit as error:
                raise SystemExit(f"{error}\nPara um treino novo, a partir do melhor modelo: "
                                 f"--init_from={self.out / 'best.pt'} --out_dir=OUTRA_PASTA")
            check_same_run(checkpoint, config, self.fingerprint)
            return last, checkpoint
        if config.init_from == "resume":
            raise SystemExit(f"Não há treino a continuar: falta {last}.")
        if config.init_from == "scratch":
            return None, None
        start = config.init_from
        if start.endswith(".pt"):
            checkpoint, vocabulary = read_checkpoint(start), "a pasta de dados daquele treino"
        else:
            folder, vocabulary = fetch_pretrained(start), start
            checkpoint = read_pretrained(folder)
            checkpoint["tokenizer"] = read_pretrained_tokenizer(folder)
        if checkpoint["tokenizer"]["vocab"] != self.tokenizer["vocab"]:
            raise SystemExit(
                f"{start} foi treinado com outro vocabulário, e não o de data/{config.dataset}: os "
                "mesmos números seriam outros tokens. Prepare os dados com o dele: python "
                f"prepare.py --input TEXTO --name {config.dataset} --tokenizer {vocabulary}")
        needed = GPTConfig(**checkpoint["model_config"])
        if wrong := [f"--{name}={getattr(needed, name)}" for name in
                     ("n_layer", "n_head", "n_embd", "bias")
                     if getattr(needed, name) != getattr(config, name)]:
            raise SystemExit(f"{start} tem outro formato: use {' '.join(wrong)}")
        # o contexto pode ser mais curto: sobram posições
        weights = checkpoint["model"]
        weights["wpe.weight"] = weights["wpe.weight"][: config.block_size]
        return start, checkpoint

    def resume(self, checkpoint):
        """Retoma o treino do ponto em que last.pt foi gravado."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizers"]):
            # do arquivo vem a memória do otimizador; as taxas são as das opções de agora
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.step, self.best_val_loss = checkpoint["step"], checkpoint["best_val_loss"]
        self.log, self.began = checkpoint["log"], self.began - checkpoint["seconds"]

    def save(self, name, **more):
        """Grava um checkpoint inteiro; se algo falha no meio, o anterior fica como estava."""
        if self.rank:
            return
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise SystemExit(f"Passo {self.step}: há pesos que deixaram de ser números. {name} "
                             "ficou como estava. Tente uma learning_rate menor.")
        checkpoint = {"model": self.model.state_dict(), "model_config": asdict(self.model.config),
                      "tokenizer": self.tokenizer, "step": self.step, "config": asdict(self.config)}
        with whole_file(self.out / name) as file:
            torch.save(checkpoint | more, file)

    def save_last(self):
        """Grava last.pt, com tudo o que é preciso para continuar."""
        self.save("last.pt", optimizers=[o.state_dict()["state"] for o in self.optimizers],
                  scaler=self.scaler.state_dict(), fingerprint=self.fingerprint, log=self.log,
                  best_val_loss=self.best_val_loss, seconds=time.perf_counter() - self.began)

    def memory(self):
        """Uma estimativa, em bytes, do que um passo ocupa: (o que é fixo, o que depende do batch).

        O dropout não entra; na CPU, ele faz a atenção guardar também os pesos dela, (B, nh, T, T).
        """
        config, size = self.config, self.dtype.itemsize
        # o Muon guarda uma média de cada gradiente; o AdamW, duas
        averages = sum(p.numel() * (1 if isinstance(optimizer, Muon) else 2)
                       for optimizer in self.optimizers for settings in optimizer.param_groups
                       for p in settings["params"])
        copies = (size % 4) * self.model.num_params()  # os pesos em 2 bytes; em float32, nada
        # As ativações são o que se guarda para o gradiente. Um bloco guarda por token, em vetores
        # de tamanho C: o que entra em cada LayerNorm (2), em float32; o que sai delas (2) e os 4C
        # antes e depois da GELU (8), em dtype; q, k, v e o resultado da atenção (4). No fim, três
        # vezes as notas: elas, as probabilidades e o gradiente, em float32.
        attention = 4 if self.device.type == "cpu" else size
        block = (2 * 4 + 10 * size + 4 * attention) * config.n_embd
        token = block * config.n_layer + 3 * 4 * self.tokenizer["vocab_size"]
        activations = config.batch_size * config.block_size * token + copies
        return 4 * (2 * self.model.num_params() + averages), activations

    def compile(self):
        """Prepara o modelo para rodar: compilado, em cuda, e repartido, se há vários processos."""
        # forward avalia; parallel treina, e soma os gradientes dos processos
        self.forward = self.parallel = self.model
        if self.config.compile and self.device.type == "cuda":
            try:  # a compilação só acontece, e só falha, na primeira chamada
                compiled = torch.compile(self.model)
                x, y = self.train_data.batch(0, self.config.batch_size)
                with self.autocast:
                    compiled(x.to(self.device), y.to(self.device))[1].backward()
                self.forward = self.parallel = compiled
            except Exception as error:
                print(f"torch.compile não funcionou ({type(error).__name__}); sigo sem ele.")
            self.model.zero_grad(set_to_none=True)
        if self.world_size > 1:
            self.parallel = torch.nn.parallel.DistributedDataParallel(self.forward)

    def train_step(self):
        """Um passo: soma os gradientes de alguns batches e corrige os pesos. Devolve a loss.

        Com vários processos, devolve a parte deste: a loss é a soma das partes.
        """
        config, accumulation = self.config, self.config.gradient_accumulation_steps
        total = 0.0
        for micro in range(self.rank, accumulation, self.world_size):  # cada processo faz os seus
            number = self.step * accumulation + micro
            x, y = self.train_data.batch(number, config.batch_size)
            torch.manual_seed(config.seed * 1_000_003 + number)  # o sorteio do dropout
            # os processos somam os gradientes uma vez por passo, no último batch de cada um
            self.parallel.require_backward_grad_sync = micro >= accumulation - self.world_size
            with self.autocast:
                _, loss = self.parallel(x.to(self.device), y.to(self.device))
            # dividir faz da soma dos gradientes a média: o mesmo que um só batch grande
            # (entre os processos, quem tira a média é o DistributedDataParallel)
            self.scaler.scale(loss * self.world_size / accumulation).backward()
            total += loss.detach() / accumulation

        for optimizer in self.optimizers:  # em float16, desfaz a multiplicação antes de medir
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        if self.is_finite(total, norm):
            factor = lr_factor(self.step, config)
            for optimizer in self.optimizers:
                for settings in optimizer.param_groups:
                    settings["lr"] = settings["initial_lr"] * factor
                self.scaler.step(optimizer)
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        return total

    def is_finite(self, loss, norm):
        """Diz se um passo pode corrigir os pesos; se loss ou gradiente não é um número, não pode.

        Em float16 o gradiente transborda de vez em quando: o passo é pulado e a escala baixa. Fora
        disso, o treino termina antes que os pesos se estraguem.
        """
        finite = (loss + norm).isfinite().item()
        self.skipped = 0 if finite else self.skipped + 1
        if not finite and not (self.scaler.is_enabled() and loss.isfinite() and self.skipped < 20):
            raise SystemExit(
                f"Passo {self.step}: a loss ({loss:.3f}) ou o gradiente (norma {norm:.3f}) deixou "
                f"de ser um número. {self.out / 'last.pt'} guarda um ponto anterior. Tente uma "
                "learning_rate menor, um warmup_iters maior ou --dtype=float32.")
        return finite

    def evaluate(self):
        """Devolve a loss de treino e a de validação (nats por token), e esta em bits por byte."""
        batch_size, tokens = self.config.batch_size, len(self.val_data.tokens)
        # batches fixos: toda a validação, se couber em eval_iters, e outro tanto do treino
        most = min(self.config.eval_iters,
                   math.ceil(tokens / (batch_size * self.config.block_size)))
        train_loss, val_loss = (self.mean_loss(data.fixed_batches(batch_size, most))
                                for data in (self.train_data, self.val_data))
        # nats por token -> bits por token -> bits por byte, que não depende do vocabulário
        return train_loss, val_loss, val_loss / math.log(2) / self.bytes_per_token

    @torch.no_grad()
    def mean_loss(self, batches):
        """A loss média de alguns batches, em nats por token; não muda nada no treino."""
        self.model.eval()
        total, count = 0.0, 0
        for x, y in islice(batches, self.rank, None, self.world_size):
            with self.autocast:
                _, loss = self.forward(x.to(self.device), y.to(self.device))
            total += loss.item() * len(x)
            count += len(x)
        self.model.train()
        total, count = self.gather(total, count)
        return total / count

    def write_sample(self, length=40):
        """Um texto curto do modelo, para ver a língua aparecer; o sorteio é sempre o mesmo."""
        prompt, stop = self.config.sample_prompt, self.encoding.eot_token
        ids = torch.tensor([[stop, *self.encoding.encode_ordinary(prompt)]], device=self.device)
        random = torch.Generator(self.device).manual_seed(self.config.seed)
        self.model.eval()
        with self.autocast:
            tokens = self.model.generate(ids, length, temperature=0.8, top_k=20, stop_token=stop,
                                         generator=random)
            text = self.encoding.decode([token.item() for token in tokens], errors="ignore")
        self.model.train()
        return prompt + text.replace("\n", " ")

    def log_evaluation(self):
        """Avalia, acrescenta uma linha a log.csv, mostra um texto e guarda o melhor modelo."""
        if self.log and self.log[-1][0] == self.step:
            return  # já feita, antes de uma parada
        train_loss, val_loss, val_bpb = self.evaluate()
        if not math.isfinite(val_loss):
            raise SystemExit(f"Passo {self.step}: a loss de validação deixou de ser um número. "
                             "Tente uma learning_rate menor.")
        seconds = round(time.perf_counter() - self.began, 1)
        tokens = self.step * self.batches_per_step * self.config.block_size
        rate = self.config.learning_rate * lr_factor(self.step, self.config)
        self.log.append([self.step, tokens, seconds, rate, train_loss, val_loss, val_bpb])
        if self.rank:
            return
        with whole_file(self.out / "log.csv") as file:
            file.write(b"step,tokens,seconds,lr,train_loss,val_loss,val_bpb\n")
            file.writelines(b"%d,%d,%.1f,%.3e,%.4f,%.4f,%.4f\n" % tuple(row) for row in self.log)
        show_progress("", end="\r")
        print(f"passo {self.step} | {duration(seconds)} | treino {train_loss:.3f} | "
              f"validação {val_loss:.3f} | {val_bpb:.3f} bits por byte\n    {self.write_sample()}",
              flush=True)
        if memorising(self.log) and not memorising(self.log[:-1]):
            print("O modelo começou a decorar: a loss de validação sobe, e a de treino desce. "
                  "best.pt guarda o melhor; mais texto, ou dropout, ajudaria.")
        if val_loss < self.best_val_loss:
            self.best_val_loss = val_loss
            self.save("best.pt", val_loss=val_loss, val_bpb=val_bpb)

    def ask_to_stop(self, number, frame):
        """Um pedido para parar (Ctrl+C ou SIGTERM): o passo em curso termina, e tudo é guardado."""
        self.stop_signal = number
        if self.world_size == 1:  # o segundo encerra na hora (o torchrun repete por conta própria)
            signal.signal(number, signal.SIG_DFL)

    def train(self):
        """Treina até max_iters ou até um pedido para parar; devolve o sinal recebido, ou 0."""
        config = self.config
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask_to_stop)
        if self.rank == 0 and self.is_new and list(self.out.glob("*.pt")):
            keep_old_run(self.out)  # um treino novo não apaga nada
        elif self.rank == 0:
            for leftover in self.out.glob(".*.tmp"):  # de um treino interrompido à força
                leftover.unlink()
        mark, mark_step = time.perf_counter(), self.step
        while True:
            (stop,) = self.gather(self.stop_signal)  # basta um processo receber o pedido
            finished = self.step >= config.max_iters
            if not stop and (finished or self.step % config.eval_interval == 0):
                self.log_evaluation()
                mark, mark_step = time.perf_counter(), self.step
            if stop or finished or self.step % config.save_interval == 0:
                self.save_last()
            if stop or finished:
                return (self.stop_signal or signal.SIGTERM) if stop else 0
            loss = self.train_step()
            if self.step % config.log_interval == 0:
                speed = (self.step - mark_step) / (time.perf_counter() - mark)  # passos por segundo
                mark, mark_step = time.perf_counter(), self.step
                (loss,) = self.gather(loss.item())
                rate = round(speed * self.batches_per_step * config.block_size)
                show_progress(
                    f"passo {self.step}/{config.max_iters} | loss {loss:.3f} | {group(rate)} "
                    f"tokens/s | faltam {duration((config.max_iters - self.step) / speed)}",
                    plain=True)


def memorising(log):
    """Diz se, nas três últimas avaliações, a loss de validação só subiu e a de treino só desceu."""
    pairs = list(zip(log[-4:], log[-3:]))
    return len(pairs) == 3 and all(b[4] < a[4] and b[5] > a[5] for a, b in pairs)


# o que define um treino, com a fingerprint, e o que não muda o seu resultado
FIXED = ("n_layer", "n_head", "n_embd", "block_size", "bias", "optimizer", "seed")
FREE = ("out_dir", "dataset", "init_from", "restart")


def check_same_run(checkpoint, config, fingerprint):
    """Confere se last.pt é deste mesmo treino; recusa o que não podia mudar e avisa do resto."""
    old, new = checkpoint["config"] | checkpoint["fingerprint"], asdict(config) | fingerprint
    changed = [name for name in new if old[name] != new[name] and name not in FREE]
    if refused := [name for name in changed if name in FIXED or name in fingerprint]:
        raise SystemExit(
            f"O treino guardado em {config.out_dir} é outro:\n"
            + "".join(f"    {name}: era {old[name]}, agora é {new[name]}\n" for name in refused)
            + "Para um treino novo, use --out_dir=OUTRA_PASTA, ou --restart=True (o antigo fica "
            "guardado com outro nome). Para continuar o antigo, desfaça a mudança.")
    for name in changed:
        print(f"Mudou desde a última vez: {name}, de {old[name]!r} para {new[name]!r}.")
    if "max_iters" in changed and not config.lr_decay_iters:
        print("As taxas acompanham max_iters: a curva delas muda também (veja lr_decay_iters).")
    if "batch_size" in changed and config.dropout:
        print("Com outra divisão entre batch_size e gradient_accumulation_steps, o dropout sorteia "
              "outros valores: o resultado não é idêntico.")


def keep_old_run(folder):
    """Dá outro nome à pasta de um treino antigo: out/tiny vira out/tiny.1 (ou .2, .3...)."""
    number = 1
    while (old := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(old)
    print(f"O treino que estava em {folder} agora está em {old}.")


def sparkline(values):
    """Uma curva numa linha: sparkline([3, 2, 1]) -> "█▅▁"."""
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / (high - low or 1))] for value in values)


def main(arguments=None):
    config = read_options(arguments)
    try:
        train_and_report(config)
    except RuntimeError as error:  # na CPU, a falta de memória não tem um tipo de erro só dela
        if "memory" not in str(error):
            raise
        size = config.batch_size
        half = max((part for part in range(1, size) if size % part == 0), default=1)
        times = config.gradient_accumulation_steps * size // half
        raise SystemExit(
            f"Faltou memória. O mesmo treino com menos: --batch_size={half} "
            f"--gradient_accumulation_steps={times} (ou diminua block_size, n_layer ou n_embd).")


def train_and_report(config):
    trainer = Trainer(config)
    out, step = trainer.out, trainer.step
    write = f'    python sample.py --out_dir={quote(str(out))} --start "{config.sample_prompt}"'
    if step >= config.max_iters and not config.eval_only:
        print(f"Este treino já terminou, com {step} passos. Veja o que ele escreve:\n{write}\n"
              f"ou treine mais, com a mesma linha e --max_iters={2 * step}")
        return
    introduce(trainer)
    trainer.compile()
    if config.eval_only:
        train_loss, val_loss, val_bpb = trainer.evaluate()
        print(f"passo {step} | treino {train_loss:.4f} | validação {val_loss:.4f} | "
              f"{val_bpb:.4f} bits por byte")
        return
    stopped_by = trainer.train()
    if trainer.world_size > 1:
        distributed.barrier()  # ninguém sai enquanto outro ainda trabalha
        trainer.parallel = trainer.forward  # solta o que a comunicação ainda segura
        distributed.destroy_process_group()
    if stopped_by:
        print(f"\nParei no passo {trainer.step}, guardado em {out / 'last.pt'}. "
              "A mesma linha continua daqui.")
        sys.exit(128 + stopped_by)
    print(f"\nloss de validação, do começo ao fim: {sparkline([row[5] for row in trainer.log])}\n"
          f"Agora veja o que o modelo escreve:\n{write}")


def introduce(trainer):
    """Diz o que vai ser feito, e com quê."""
    config, device, step = trainer.config, trainer.device, trainer.step
    train, val = (len(data.tokens) for data in (trainer.train_data, trainer.val_data))
    vocab_size, per_step = trainer.encoding.n_vocab, trainer.batches_per_step * config.block_size
    epochs = config.max_iters * per_step / train
    fixed, activations = (size / 1e6 for size in trainer.memory())
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "mps":
        total = torch.mps.recommended_max_memory()
    elif hasattr(os, "sysconf"):  # (o Windows não tem)
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        total = math.nan
    print(f"""\
máquina        {trainer.world_size} × {device.type}, contas em {config.dtype}
modelo         {group(trainer.model.num_params())} parâmetros
memória        {fixed + activations:.0f} MB, estimados, de {total / 1e6:.0f} MB
               ({fixed:.0f} de pesos, gradientes e otimizador, {activations:.0f} de ativações)
dados          {config.dataset}: {group(train)} tokens de treino, {group(val)} de validação
cada passo     {group(per_step)} tokens
ao todo        {config.max_iters} passos, {epochs:.1f} voltas (epochs) no texto""")
    if step:
        print(f"Continuo {trainer.out / 'last.pt'} do passo {step}.")
    elif config.init_from == "scratch":
        print(f"primeira loss  perto de ln({vocab_size}) = {math.log(vocab_size):.2f}, a de quem "
              "chuta")


if __name__ == "__main__":
    run(main)
