"""O treinamento: mostra texto ao modelo e corrige os seus pesos, milhares de vezes.

É o passo 5 do *LLM do Zero*. O modelo lê um trecho e dá nota a cada candidato a próximo token; a
loss mede o quanto ele se espantou com o token que veio de verdade; o gradiente diz para que lado
mexer cada peso; o otimizador mexe um pouco. É isso, repetido.

Como rodar:

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
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from model import GPT, GPTConfig, choose_device, choose_dtype, load_weights, read_checkpoint
from prepare import (
    build_encoding, group, parse_arguments, quote, read_meta, run, show_progress, token_sample,
    whole_file)


@dataclass
class Config:
    """As opções do treino, com os nomes do nanoGPT; `--help` mostra estes mesmos comentários."""

    out_dir: str = ""  # a pasta do treino (vazio: out/NOME, com o nome do arquivo de configuração)
    dataset: str = "contos"  # o conjunto de dados: data/NOME, feito por prepare.py
    init_from: str = "scratch"  # de onde parte: scratch (do zero) ou um .pt; resume: só continua
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


# ------------------------------------------------------------------------------------------------
# As opções: o arquivo de configuração, e por cima dele a linha de comando


def read_options(arguments=None):
    """Lê o arquivo de configuração e, por cima dele, a linha de comando; devolve um Config."""
    kinds = {field.name: field.type for field in fields(Config)}
    meanings = dict(re.findall(r"(\w+): .*?  # (.*)", inspect.getsource(Config)))
    parser = argparse.ArgumentParser(
        usage="python train.py [config/ARQUIVO.py] [--nome=valor ...]", allow_abbrev=False,
        description="Treina um GPT. A mesma linha de novo continua o treino de onde parou.")
    parser.add_argument("config", nargs="?", help="um arquivo de linhas `nome = valor`")
    for name, kind in kinds.items():
        meaning = f"{meanings[name]} [{getattr(Config, name)}]".replace("%", "%%")
        parse = boolean if kind is bool else kind
        parser.add_argument(f"--{name}", type=parse, metavar=kind.__name__, help=meaning)

    def read(arguments):
        options = vars(parse_arguments(parser, arguments))
        return {name: value for name, value in options.items() if value is not None}

    values = read(arguments)
    path = values.pop("config", None)
    if path:  # o arquivo passa pela mesma leitura, e a linha de comando vence
        lines = read_config_file(path)
        parser.error = partial(config_error, path)
        values = read(lines) | values
    config = Config(**values)
    config.out_dir = config.out_dir or f"out/{Path(path).stem if path else 'gpt2'}"

    from_zero = ("warmup_iters", "lr_decay_iters", "seed")
    for name, kind in kinds.items():
        value, least = getattr(config, name), 0 if kind is float or name in from_zero else 1
        if kind in (int, float) and not least <= value < math.inf:
            raise SystemExit(f"{name} = {value} não serve: o mínimo é {least}.")
        if name in ("dropout", "beta1", "beta2") and value >= 1:
            raise SystemExit(f"{name} = {value} não serve: use uma fração menor que 1.")
    if config.seed >= 2**32:
        raise SystemExit(f"seed = {config.seed} não serve: o máximo é {2**32 - 1}.")
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
    except OSError:
        raise SystemExit(f"Não consegui ler {path}. Os arquivos de configuração ficam em config/.")
    except (SyntaxError, AttributeError, ValueError) as error:
        number = getattr(error, "lineno", number)
        raise SystemExit(f"{path}, linha {number}: só cabem linhas simples, como `n_layer = 4`.")
    return arguments


def config_error(path, message):
    raise SystemExit(f"{path}: {message}")


# ------------------------------------------------------------------------------------------------
# Os dados: o batch de um passo só depende da semente e do passo


class Tokens:
    """Os tokens de um arquivo .bin, lidos do disco conforme a necessidade (np.memmap).

    O texto é cortado em janelas de block_size tokens. A cada volta (epoch), as janelas vêm em
    outra ordem, e os cortes caem em outros lugares.
    """

    def __init__(self, path, split, vocab_size, block_size, seed=0):
        """split: o que meta.json diz do arquivo; o que não bate com ele encerra com mensagem."""
        if not path.exists():
            raise SystemExit(f"Não achei {path}: rode `python prepare.py` primeiro.")
        if path.stat().st_size != 2 * split["tokens"]:
            problem = f"{path.stat().st_size} bytes, e não {split['tokens']} tokens de 2 bytes"
        elif split["tokens"] <= block_size:
            raise SystemExit(
                f"{path} tem {split['tokens']} tokens, e block_size = {block_size} pede mais que "
                "isso: prepare um texto maior ou diminua block_size.")
        elif (largest := token_sample(path).max()) >= vocab_size:
            problem = f"o token {largest}, e o vocabulário só vai até {vocab_size - 1}"
        elif hashlib.sha256(token_sample(path)).hexdigest() != split["sha256"]:
            problem = "tokens diferentes dos que meta.json descreve (a soma SHA-256 não bate)"
        else:
            problem = None
        if problem:
            raise SystemExit(f"{path} tem {problem}. Rode prepare.py de novo.")
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
        """O batch de número `number`, desde o começo do treino: x e y, ambos (B, T)."""
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


# ------------------------------------------------------------------------------------------------
# O otimizador


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
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                # a média dos gradientes recentes, e um passo adiante dela (momento de Nesterov)
                momentum = state["momentum"].lerp_(p.grad, 1 - settings["momentum"])
                update = orthogonalize(p.grad.lerp(momentum, settings["momentum"]), self.dtype)
                scale = max(1, p.size(0) / p.size(1)) ** 0.5  # mais linhas que colunas: passo maior
                p.mul_(1 - settings["lr"] * settings["weight_decay"])
                p.add_(update, alpha=-settings["lr"] * scale)


def orthogonalize(matrix, dtype):
    """A matriz com todos os valores singulares perto de 1, pela iteração de Newton-Schulz.

    Os três coeficientes são os do artigo: levam depressa os valores entre 0 e 1 para perto de 1.
    """
    x = matrix.to(dtype)
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x  # com a matriz deitada, x @ x.T é a menor das duas opções
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        a = torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315)  # -4,7750·a + 2,0315·a·a
        x = torch.addmm(x, a, x, beta=3.4445)  # 3,4445·x + a·x
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
    for optimizer in optimizers:
        for param_group in optimizer.param_groups:
            param_group["initial_lr"] = param_group["lr"]
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


# ------------------------------------------------------------------------------------------------
# O treino

LOG_HEADER = "step,tokens,seconds,lr,train_loss,val_loss,val_bpb"


class Trainer:
    """Um treino: o modelo, os otimizadores, os dados e o passo em que se está."""

    def __init__(self, config):
        self.config = config
        self.out = Path(config.out_dir)
        self.last_path, self.log_path = self.out / "last.pt", self.out / "log.csv"
        self.join_processes()
        self.dtype = choose_dtype(self.device, config.dtype)
        # as contas pesadas vão em self.dtype; os pesos e o que precisa de exatidão, em float32
        self.autocast = torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype != torch.float32)

        folder = Path("data", config.dataset)
        self.meta, self.tokenizer = read_meta(folder)
        self.encoding = build_encoding(self.tokenizer)
        self.train_data, self.val_data = (
            Tokens(folder / f"{part}.bin", self.meta["splits"][part], self.tokenizer["vocab_size"],
                   config.block_size, config.seed) for part in ("train", "val"))
        self.fingerprint = {part: split["sha256"] for part, split in self.meta["splits"].items()}

        # quando o torchrun reinicia processos que caíram, é para continuar
        self.restart = config.restart and restart_count() == 0
        checkpoint = self.find_checkpoint()
        torch.manual_seed(config.seed)  # para o sorteio dos pesos iniciais
        names = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
        self.model_config = {name: getattr(config, name) for name in names}
        self.model_config["vocab_size"] = self.tokenizer["vocab_size"]
        self.model = GPT(GPTConfig(**self.model_config))
        if checkpoint:
            path, contents = checkpoint
            load_weights(self.model, contents["model"], path)
        self.model.to(self.device)
        self.optimizers = make_optimizers(self.model, config, self.dtype)
        # float16 não alcança números muito pequenos: o GradScaler multiplica a loss para caberem
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.skipped = 0  # passos pulados em seguida, em float16
        self.step, self.began, self.best_val_loss, self.log = 0, time.perf_counter(), math.inf, []
        if checkpoint and path == self.last_path:
            self.resume(contents)
        self.tokens_per_step = (
            config.batch_size * config.gradient_accumulation_steps * config.block_size)

    # --- um processo ou vários

    def join_processes(self):
        """Escolhe o dispositivo e, sob torchrun, encontra os outros processos deste treino."""
        # torchrun diz a cada processo quem ele é; sem torchrun, há um só
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
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
        store, _, _ = next(distributed.rendezvous("env://"))
        store = distributed.PrefixStore(f"vez {restart_count()}", store)
        distributed.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo", store=store, rank=self.rank,
            world_size=self.world_size)
        if self.rank:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # só o processo 0 escreve

    def gather(self, *values):
        """A soma de cada valor em todos os processos."""
        if self.world_size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(sums)
        return sums.tolist()

    # --- continuar e guardar

    def find_checkpoint(self):
        """De onde partir: (caminho, conteúdo) de last.pt ou do init_from; None é do zero."""
        config, best = self.config, self.out / "best.pt"
        if self.rank == 0:
            for leftover in self.out.glob(".*.tmp"):  # de um treino interrompido à força
                leftover.unlink()
        if self.last_path.exists() and not self.restart:
            try:
                contents = read_checkpoint(self.last_path)
            except SystemExit as error:
                raise SystemExit(f"{error}\nPara um treino novo, a partir do melhor modelo: "
                                 f"--init_from={best} --out_dir=OUTRA_PASTA")
            if "optimizers" not in contents:
                raise SystemExit(f"{self.last_path} é uma cópia de best.pt, e não basta para "
                                 "continuar. Dê-lhe outro nome e use --init_from=NOME.pt")
            check_same_run(contents, config, self.tokenizer, self.fingerprint)
            return self.last_path, contents
        # (um best.pt do passo 0 não ensinou nada: o treino caiu logo depois de começar)
        if best.exists() and not self.restart and read_checkpoint(best)["step"] > 0:
            raise SystemExit(f"{self.out} tem best.pt, mas não last.pt, e um treino novo o "
                             "apagaria. Use outro --out_dir (e --init_from, para partir dele), ou "
                             "--restart=True.")
        if config.init_from == "resume":
            raise SystemExit(f"Não há treino a continuar: falta {self.last_path}.")
        if config.init_from == "scratch":
            return None
        path = Path(config.init_from)
        contents = read_checkpoint(path)
        if contents["tokenizer"] != self.tokenizer:
            raise SystemExit(f"{path} foi treinado com outro vocabulário que o de data/"
                             f"{config.dataset}: os mesmos números seriam outros tokens.")
        return path, contents

    def resume(self, contents):
        """Retoma o treino do ponto em que last.pt foi gravado."""
        for optimizer, state in zip(self.optimizers, contents["optimizers"]):
            # do arquivo vem a memória do otimizador; as taxas são as das opções de agora
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        self.scaler.load_state_dict(contents["scaler"])
        self.step, self.best_val_loss = contents["step"], contents["best_val_loss"]
        self.began -= contents["seconds"]
        if self.log_path.exists():  # o que veio depois deste passo vai ser refeito
            lines = self.log_path.read_text(encoding="utf-8").splitlines()[1:]
            self.log = [line for line in lines
                        if re.match(r"\d+,", line) and int(line.split(",")[0]) <= self.step]

    def save(self, path, **more):
        """Grava um checkpoint inteiro; se algo falha no meio, o anterior fica como estava."""
        if self.rank == 0:
            if not all(p.isfinite().all() for p in self.model.parameters()):
                raise SystemExit(f"Passo {self.step}: há pesos que deixaram de ser números. {path} "
                                 "ficou como estava. Tente uma learning_rate menor.")
            contents = {
                "model": self.model.state_dict(), "model_config": self.model_config,
                "tokenizer": self.tokenizer, "step": self.step, "config": asdict(self.config)}
            with whole_file(path) as file:
                torch.save(contents | more, file)

    def save_last(self):
        """Grava last.pt, com tudo o que é preciso para continuar."""
        states = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
        self.save(
            self.last_path, optimizers=states, scaler=self.scaler.state_dict(),
            fingerprint=self.fingerprint, best_val_loss=self.best_val_loss,
            seconds=time.perf_counter() - self.began)

    # --- um passo

    def train_step(self):
        """Um passo: soma os gradientes de alguns batches e corrige os pesos. Devolve a loss."""
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

        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        self.check_finite(total, norm)
        if norm.isfinite():
            factor = lr_factor(self.step, config)
            for optimizer in self.optimizers:
                for param_group in optimizer.param_groups:
                    param_group["lr"] = param_group["initial_lr"] * factor
                self.scaler.step(optimizer)
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        return total

    def check_finite(self, loss, norm):
        """Interrompe o treino antes de estragar os pesos, se a loss ou o gradiente não é um número.

        Em float16 o gradiente transborda de vez em quando: o passo é pulado e a escala baixa.
        """
        if (loss + norm).isfinite():
            self.skipped = 0
            return
        self.skipped += 1
        if self.scaler.is_enabled() and loss.isfinite() and self.skipped < 20:
            return
        raise SystemExit(
            f"Passo {self.step}: a loss ({loss:.3f}) ou o gradiente (norma {norm:.3f}) deixou de "
            f"ser um número. {self.last_path} guarda um ponto anterior. Tente uma learning_rate "
            "menor, um warmup_iters maior ou --dtype=float32.")

    def compile(self):
        """Prepara o modelo para rodar: compilado, em cuda, e repartido, se há vários processos."""
        self.forward = self.model
        if self.device.type == "cuda" and self.config.compile:
            batch = self.train_data.batch(0, self.config.batch_size)
            self.forward = compile_model(self.model, batch, self.autocast, self.device)
        self.parallel = self.forward
        if self.world_size > 1:
            self.parallel = torch.nn.parallel.DistributedDataParallel(self.forward)

    def memory(self):
        """Uma estimativa, em bytes, do que um passo ocupa: (o que é fixo, as ativações).

        Fixos são os pesos, os gradientes e os otimizadores. Ativações são o que a passada para a
        frente guarda para o gradiente: mede-se com uma e com duas sequências, porque o resto é
        proporcional. As notas e o gradiente delas, de curta duração, entram também.
        """
        config = self.config
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}

        def saved_bytes(batch_size):
            sizes = {}

            def note(tensor):
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
                return tensor

            x = torch.zeros(batch_size, config.block_size, dtype=torch.long, device=self.device)
            hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
            with hooks, self.autocast:
                _, loss = self.model(x, x)  # loss segura os tensores guardados até a soma
            return sum(size for storage, size in sizes.items() if storage not in weights)

        one = saved_bytes(1)
        each = saved_bytes(2) - one if config.batch_size > 1 else 0
        logits = config.batch_size * config.block_size * self.tokenizer["vocab_size"]
        activations = one + (config.batch_size - 1) * each + 8 * logits
        averages = sum(  # o Muon guarda uma média de cada gradiente; o AdamW, duas
            p.numel() * (1 if isinstance(optimizer, Muon) else 2)
            for optimizer in self.optimizers for g in optimizer.param_groups for p in g["params"])
        return 4 * (2 * self.model.num_params() + averages), activations

    # --- avaliar

    def evaluate(self):
        """Devolve a loss de treino e a de validação (nats por token), e esta em bits por byte."""
        batch_size, tokens = self.config.batch_size, len(self.val_data.tokens)
        # batches fixos: toda a validação, se couber em eval_iters, e outro tanto do treino
        all_of_it = math.ceil(tokens / (batch_size * self.config.block_size))
        most = min(self.config.eval_iters, all_of_it)
        train_loss, val_loss = (self.mean_loss(data.fixed_batches(batch_size, most))
                                for data in (self.train_data, self.val_data))
        # nats por token -> bits por token -> bits por byte, que não depende do vocabulário
        val = self.meta["splits"]["val"]
        return train_loss, val_loss, val_loss / math.log(2) * val["tokens"] / val["bytes"]

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
        prompt = self.config.sample_prompt
        ids = [self.encoding.eot_token, *self.encoding.encode_ordinary(prompt)]
        random = torch.Generator(self.device).manual_seed(self.config.seed)
        self.model.eval()
        with self.autocast:
            tokens = self.model.generate(
                torch.tensor([ids], device=self.device), length, temperature=0.8, top_k=20,
                stop_token=self.encoding.eot_token, generator=random)
            ids = [token.item() for token in tokens]
        self.model.train()
        return prompt + self.encoding.decode(ids, errors="ignore").replace("\n", " ")

    def log_evaluation(self):
        """Avalia, acrescenta uma linha a log.csv, mostra um texto e guarda o melhor modelo."""
        if self.log and self.log[-1].startswith(f"{self.step},"):
            return  # já feita, antes de uma parada
        train_loss, val_loss, val_bpb = self.evaluate()
        if not math.isfinite(val_loss):
            raise SystemExit(f"Passo {self.step}: a loss de validação deixou de ser um número. "
                             "Tente uma learning_rate menor.")
        seconds = time.perf_counter() - self.began
        rate = self.config.learning_rate * lr_factor(self.step, self.config)
        self.log.append(f"{self.step},{self.step * self.tokens_per_step},{seconds:.1f},{rate:.3e},"
                        f"{train_loss:.4f},{val_loss:.4f},{val_bpb:.4f}")
        if self.rank:
            return
        with whole_file(self.log_path) as file:
            file.write("\n".join([LOG_HEADER, *self.log, ""]).encode())
        show_progress("", end="\r")
        print(f"passo {self.step} | {duration(seconds)} | treino {train_loss:.3f} | "
              f"validação {val_loss:.3f} | {val_bpb:.3f} bits por byte")
        print(f"    {self.write_sample()}", flush=True)
        if memorising(self.log) and not memorising(self.log[:-1]):
            print("O modelo começou a decorar: a loss de validação sobe, e a de treino desce. "
                  "best.pt guarda o melhor; mais texto, ou dropout, ajudaria.")
        if val_loss < self.best_val_loss:
            self.best_val_loss = val_loss
            self.save(self.out / "best.pt", val_loss=val_loss, val_bpb=val_bpb)

    # --- o laço

    def train(self):
        """Treina até max_iters ou até um pedido para parar; devolve o sinal recebido, ou 0."""
        config = self.config
        if self.restart and self.rank == 0 and self.out.exists():
            keep_old_run(self.out)
        request = StopRequest()
        mark, mark_step = time.perf_counter(), self.step
        while True:
            (stop,) = self.gather(request.signal)  # basta um processo receber o pedido
            finished = self.step >= config.max_iters
            if not stop and (finished or self.step % config.eval_interval == 0):
                self.log_evaluation()
                mark, mark_step = time.perf_counter(), self.step
            if stop or finished or self.step % config.save_interval == 0:
                self.save_last()
            if stop or finished:
                return (request.signal or signal.SIGTERM) if stop else 0
            loss = self.train_step()
            if self.step % config.log_interval == 0:
                speed = (self.step - mark_step) / (time.perf_counter() - mark)  # passos por segundo
                mark, mark_step = time.perf_counter(), self.step
                (loss,) = self.gather(loss.item())
                show_progress(
                    f"passo {self.step}/{config.max_iters} | loss {loss:.3f} | "
                    f"{group(round(speed * self.tokens_per_step))} tokens/s | "
                    f"faltam {duration((config.max_iters - self.step) / speed)}", plain=True)


def memorising(log):
    """Diz se, nas três últimas avaliações, a loss de validação só subiu e a de treino só desceu."""
    losses = [list(map(float, line.split(",")[4:6])) for line in log[-4:]]
    pairs = list(zip(losses, losses[1:]))
    return len(pairs) == 3 and all(b[0] < a[0] and b[1] > a[1] for a, b in pairs)


def compile_model(model, batch, autocast, device):
    """O modelo com código próprio para a placa (torch.compile); se não der, o modelo como é."""
    compiled = torch.compile(model)
    try:  # a compilação só acontece, e só falha, na primeira chamada
        with autocast:
            compiled(*(tensor.to(device) for tensor in batch))[1].backward()
        model.zero_grad(set_to_none=True)
        return compiled
    except Exception as error:
        print(f"torch.compile não funcionou ({type(error).__name__}); sigo sem ele.")
        return model


def restart_count():
    """Quantas vezes o torchrun já reiniciou os processos deste treino."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


class StopRequest:
    """Um pedido para parar (Ctrl+C ou SIGTERM): o passo em curso termina, e o treino é guardado."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.signal = number
        if "RANK" not in os.environ:  # (o torchrun repete o pedido por conta própria)
            signal.signal(number, signal.SIG_DFL)  # o segundo pedido encerra na hora


PRODUCT = "batch_size * gradient_accumulation_steps"
# o que define um treino: mudar um destes no meio daria outro treino
FIXED = ("n_layer", "n_head", "n_embd", "block_size", "bias", "optimizer", "seed", PRODUCT)
# o que não muda o resultado, ou só o muda através do que já se confere
FREE = ("out_dir", "dataset", "init_from", "restart")


def check_same_run(contents, config, tokenizer, fingerprint):
    """Confere se last.pt é deste mesmo treino; recusa o que não podia mudar e avisa do resto."""
    old, new = contents["config"], asdict(config)
    for values in (old, new):
        values[PRODUCT] = values["batch_size"] * values["gradient_accumulation_steps"]
    refused = [f"{name}: era {old[name]}, agora é {new[name]}"
               for name in FIXED if old[name] != new[name]]
    if contents["tokenizer"] != tokenizer:
        refused.append("o vocabulário é outro")
    elif contents["fingerprint"] != fingerprint:
        refused.append(f"os tokens de data/{config.dataset} são outros")
    if refused:
        raise SystemExit(
            "\n    ".join([f"O treino guardado em {config.out_dir} é outro:", *refused])
            + "\nPara um treino novo, use --out_dir=OUTRA_PASTA, ou --restart=True (o antigo fica "
            "guardado com outro nome). Para continuar o antigo, desfaça a mudança.")
    if config.init_from not in ("scratch", "resume", old["init_from"]):
        print("init_from só vale para um treino novo: este continua de last.pt.")
    for name in sorted(old.keys() - FREE):
        if old[name] != new[name]:
            print(f"Mudou desde a última vez: {name}, de {old[name]!r} para {new[name]!r}.")
    if old["max_iters"] != new["max_iters"] and not new["lr_decay_iters"]:
        print("As taxas acompanham max_iters: a curva delas muda também (veja lr_decay_iters).")
    if old["batch_size"] != new["batch_size"] and new["dropout"]:
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


def duration(seconds):
    """Um tempo fácil de ler: duration(200) -> "3min20s"."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}min{seconds:02}s"
    return f"{minutes // 60}h{minutes % 60:02}min"


def main(arguments=None):
    config = read_options(arguments)
    try:
        train_and_report(config)
    except RuntimeError as error:  # o torch não tem um tipo de erro só para a falta de memória
        if "memory" not in str(error):
            raise
        raise SystemExit(f"Faltou memória. {smaller_batch(config)}")


def train_and_report(config):
    trainer = Trainer(config)
    step, last_path = trainer.step, trainer.last_path
    out, prompt = quote(str(trainer.out)), config.sample_prompt
    write = f'    python sample.py --out_dir={out} --start "{prompt}"'
    if step >= config.max_iters and not config.eval_only:
        print(f"Este treino já terminou, com {step} passos. Veja o que ele escreve:\n{write}\n"
              f"ou treine mais, com a mesma linha e --max_iters={2 * step}")
        return
    introduce(trainer, config)
    trainer.compile()
    if config.eval_only:
        train_loss, val_loss, val_bpb = trainer.evaluate()
        print(f"passo {step} | treino {train_loss:.4f} | validação {val_loss:.4f} | "
              f"{val_bpb:.4f} bits por byte")
        return
    stopped_by = trainer.train()
    if trainer.world_size > 1:
        distributed.destroy_process_group()
    if stopped_by:
        print(f"\nParei no passo {trainer.step}, guardado em {last_path}. "
              "A mesma linha continua daqui.")
        sys.exit(128 + stopped_by)
    curve = sparkline([float(line.split(",")[5]) for line in trainer.log])
    print(f"\nloss de validação, do começo ao fim: {curve}\n"
          f"Agora veja o que o modelo escreve:\n{write}")


def introduce(trainer, config):
    """Diz o que vai ser feito, e com quê."""
    train, val = (len(data.tokens) for data in (trainer.train_data, trainer.val_data))
    vocab_size, per_step = trainer.tokenizer["vocab_size"], trainer.tokens_per_step
    processes = f" em {trainer.world_size} processos" if trainer.world_size > 1 else ""
    dtype, epochs = str(trainer.dtype)[6:], config.max_iters * per_step / train
    fixed, activations = (size / 1e6 for size in trainer.memory())
    print(f"""\
máquina        {trainer.device.type}{processes}, contas em {dtype}
modelo         {group(trainer.model.num_params())} parâmetros
memória        {fixed + activations:.0f} MB, estimados; {device_memory(trainer.device)}
               ({fixed:.0f} de pesos, gradientes e otimizador, {activations:.0f} de ativações)
dados          {config.dataset}: {group(train)} tokens de treino, {group(val)} de validação
cada passo     {group(per_step)} tokens
ao todo        {config.max_iters} passos, {epochs:.1f} voltas (epochs) no texto""")
    if trainer.step:
        print(f"Continuo {trainer.last_path} do passo {trainer.step}.")
    elif config.init_from == "scratch":
        guess = math.log(vocab_size)
        print(f"primeira loss  perto de ln({vocab_size}) = {guess:.2f}, a de quem chuta")


def device_memory(device):
    """Quanta memória o dispositivo tem, numa frase."""
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "mps":
        size = torch.mps.recommended_max_memory()
    elif hasattr(os, "sysconf"):
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return "confira quanta a máquina tem"
    return f"a máquina tem {size / 1e6:.0f} MB"


def smaller_batch(config):
    """O mesmo treino com menos memória: batches menores, mais vezes por passo."""
    size = config.batch_size
    if size == 1:
        return "Diminua block_size, n_layer ou n_embd."
    half = max(part for part in range(1, size) if size % part == 0)
    times = config.gradient_accumulation_steps * size // half
    options = f"--batch_size={half} --gradient_accumulation_steps={times}"
    return f"O mesmo treino com menos memória: {options}"


if __name__ == "__main__":
    run(main)
