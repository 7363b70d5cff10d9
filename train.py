"""O treinamento (passo 5 do *LLM do Zero*): mostra texto ao modelo e corrige os seus pesos.

O modelo dá nota a cada candidato a próximo token; a loss mede o quanto ele se espantou com o que
veio; o gradiente diz para que lado mexer cada peso; o otimizador mexe um pouco. É isso, repetido.

    python train.py config/tiny.py                      treina; de novo, continua de onde parou
    python train.py config/tiny.py --learning_rate=1e-3 muda uma opção do arquivo

O resultado fica em out/NOME/: best.pt (o modelo de menor loss de validação, que sample.py usa),
last.pt (tudo o que é preciso para continuar) e log.csv (uma linha por avaliação).
"""

import argparse
import ast
import inspect
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np

# antes do torch: model.py ajusta o ambiente dele
from model import GPT, GPTConfig, choose_device, choose_dtype, from_pretrained, read_checkpoint
from prepare import (build_encoding, content_hash, normalize, open_tokenizer, parse_arguments,
                     read_meta, run, show_progress, whole_file)

import torch
from torch import distributed


@dataclass
class Config(GPTConfig):
    """As opções do treino, além das medidas do modelo (GPTConfig), com os nomes do nanoGPT."""

    out_dir: str = ""  # a pasta do treino (vazio: out/NOME, com o nome do arquivo de configuração)
    dataset: str = "contos"  # o conjunto de dados: data/NOME, feito por prepare.py
    init_from: str = "scratch"  # scratch (do zero), ou um modelo publicado: gpt2, DONO/NOME, pasta
    batch_size: int = 12  # quantas sequências por vez, de block_size tokens: o que cabe na memória
    gradient_accumulation_steps: int = 40  # quantos batches por passo, somando os gradientes
    max_iters: int = 600000  # quantos passos ao todo
    optimizer: str = "adamw"  # adamw, ou muon (as matrizes dos blocos com Muon, o resto com AdamW)
    learning_rate: float = 6e-4  # o tamanho das correções do AdamW, no ponto mais alto
    muon_learning_rate: float = 0.02  # o mesmo para o Muon
    weight_decay: float = 0.1  # encolhe as matrizes um pouco a cada passo
    beta1: float = 0.9  # AdamW: a memória da média dos gradientes
    beta2: float = 0.95  # AdamW: a memória da média dos quadrados
    grad_clip: float = 1.0  # limite para a norma do gradiente (0: sem limite)
    warmup_iters: int = 2000  # passos em que as taxas sobem desde quase zero
    min_lr: float = 6e-5  # a learning_rate do fim; a do Muon baixa na mesma proporção
    eval_interval: int = 2000  # de quantos em quantos passos avaliar
    eval_iters: int = 200  # no máximo quantos batches por avaliação
    log_interval: int = 10  # de quantos em quantos passos mostrar o progresso
    save_interval: int = 1000  # de quantos em quantos passos gravar last.pt
    sample_prompt: str = "O gato"  # o começo do texto que o modelo escreve a cada avaliação
    device: str = "auto"  # auto, cuda, mps, cpu
    dtype: str = "auto"  # a precisão das contas: auto, float32, bfloat16, float16
    compile: bool = True  # torch.compile: gera código próprio para o modelo; só vale em cuda
    seed: int = 1337  # a semente de todos os sorteios


def read_options(arguments):
    """Lê o arquivo de configuração e, por cima dele, a linha de comando; devolve um Config."""
    parser = argparse.ArgumentParser(
        usage="python train.py [config/ARQUIVO.py] [--nome=valor ...]", allow_abbrev=False)
    source = inspect.getsource(GPTConfig) + inspect.getsource(Config)
    meanings = dict(re.findall(r"(\w+): .*?  # (.*)", source))
    options = [f for f in fields(Config) if f.name != "vocab_size"]  # (é a dos dados)
    for f in options:
        kind = (lambda x: {"True": True, "False": False}.get(x, x)) if f.type is bool else f.type
        parser.add_argument(f"--{f.name}", type=kind, default=f.default,
                            help=f"{meanings[f.name]} [%(default)s]")
    path = "" if not arguments or arguments[0].startswith("-") else arguments[0]
    if path:  # as linhas do arquivo vêm antes: vale a opção que vem por último
        lines = Path(path).read_text(encoding="utf-8-sig", errors="replace").splitlines()
        arguments = sum(map(read_config_line, lines), []) + arguments[1:]
    config = Config(**vars(parse_arguments(parser, arguments)))
    config.out_dir = config.out_dir or f"out/{Path(path).stem or 'gpt2'}"
    for name, kind, value in ((f.name, f.type, getattr(config, f.name)) for f in options):
        least = 1 if kind is int and name not in ("warmup_iters", "seed") else 0
        most = 1 if name in ("dropout", "beta1", "beta2") else 2**32
        if type(value) is not kind or kind in (int, float) and not least <= value < most or (
                name == "optimizer" and value not in ("adamw", "muon")):
            parser.error(f"{name} = {value!r} não serve")
    if config.min_lr > config.learning_rate > 0:
        parser.error(f"min_lr = {config.min_lr} passa de learning_rate = {config.learning_rate}")
    if config.warmup_iters >= config.max_iters:
        print("Atenção: o treino acaba antes que as taxas subam de todo (veja warmup_iters).")
    return config


def read_config_line(line):
    """read_config_line("n_layer = 4  # blocos") -> ["--n_layer=4"]: é lida, e não executada."""
    try:
        return [f"--{target.id}={ast.literal_eval(node.value)}"
                for node in ast.parse(line.strip()).body for target in node.targets]
    except (SyntaxError, AttributeError, ValueError):
        raise SystemExit(f"Na configuração só cabem linhas como `n_layer = 4`, e não {line!r}.")


class Tokens:
    """Os tokens de um .bin, lidos do disco conforme a necessidade (np.memmap), em janelas: cada uma
    começa onde começa um documento, como os textos que o modelo vai escrever; um que seja maior que
    block_size continua em outras, que começam em qualquer lugar dele."""

    def __init__(self, path, split, end, block_size, seed=0):  # end: o número do <|endoftext|>
        size = path.stat().st_size if path.exists() else 0
        if size != 2 * split["tokens"] or split["tokens"] <= block_size:
            raise SystemExit(f"{path} tem {size} bytes, para {split['tokens']} tokens de 2 bytes e "
                             f"block_size = {block_size}. Rode prepare.py de novo, com mais texto.")
        self.tokens = np.memmap(path, dtype="<u2", mode="r")
        self.end, self.block_size, self.seed = end, block_size, seed
        self.count = len(self.tokens) // block_size  # quantas janelas há numa volta (epoch)

    def window(self, place, back=0):
        """Onde começa a janela que tem um lugar do texto: no <|endoftext|> antes do documento (o do
        primeiro é o fim do arquivo, -1) ou, se ele fica longe, `back` tokens antes do lugar."""
        first = max(0, place - 2**16)  # basta: prepare.py corta os documentos em 2**16 caracteres
        ends = np.flatnonzero(self.tokens[first : place + 1] == self.end)
        document = first + int(ends[-1]) if len(ends) else first - 1
        return document if place - document < self.block_size else place - back

    @lru_cache(maxsize=2)
    def places(self, epoch):
        """Um lugar a cada block_size tokens, em ordem sorteada; são outros a cada volta."""
        random = np.random.default_rng((self.seed, epoch))
        return random.integers(self.block_size) + self.block_size * random.permutation(self.count)

    def batch(self, number, batch_size):
        """O batch de número `number`: x e y, ambos (B, T). Só depende da semente e do número."""
        sequences = range(number * batch_size, (number + 1) * batch_size)
        places = [self.places(s // self.count)[s % self.count] for s in sequences]
        return self.read([self.window(int(place), self.block_size // 2) for place in places])

    def fixed_batches(self, batch_size, most):
        """Os batches da avaliação: cada token conta uma vez; num texto grande, `most` batches."""
        starts, counts, place, size = [], [], -1, len(self.tokens)
        skip = max(0, size // (most * batch_size) - self.block_size)  # espalhados pelo texto
        while place < size - 1 and len(starts) < most * batch_size:
            starts.append(self.window(place))
            ends = np.flatnonzero(self.tokens[starts[-1] + 1 :][: self.block_size] == self.end)
            counts.append(int(ends[0]) + 1 if len(ends) else self.block_size)
            place = starts[-1] + counts[-1] + skip
        for i in range(0, len(starts), batch_size):
            x, y = self.read(starts[i : i + batch_size])  # o que passa do documento não conta aqui
            length = torch.tensor(counts[i : i + batch_size])[:, None]
            yield x, y.masked_fill(torch.arange(self.block_size) >= length, -100)

    def read(self, starts):
        """As janelas que começam em `starts`: os tokens x e, para cada um, o seguinte, y."""
        places = np.array(starts)[:, None] + np.arange(self.block_size + 1)  # (B, T + 1)
        rows = torch.from_numpy(self.tokens[places % len(self.tokens)].astype(np.int64))
        return rows[:, :-1], rows[:, 1:]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), para as matrizes dos blocos: o
    gradiente de uma aponta quase todo para poucas direções, e o Muon iguala a força delas."""

    def __init__(self, params, lr, weight_decay, dtype):
        super().__init__(params, {"lr": lr, "peak": lr, "weight_decay": weight_decay})
        self.dtype = dtype if dtype == torch.bfloat16 else torch.float32  # (float16 não basta)

    @torch.no_grad()
    def step(self):
        for settings in self.param_groups:
            for p in settings["params"]:
                # a média dos gradientes recentes, e um passo adiante dela (momento de Nesterov)
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = p.grad.lerp(momentum, 0.95).to(self.dtype)
                parts = 3 if p.size(0) == 3 * p.size(1) else 1  # c_attn junta três: q, k e v
                update = orthogonalize(update.reshape(parts, -1, p.size(1))).reshape(p.shape)
                scale = max(1, p.size(0) / p.size(1)) ** 0.5  # mais linhas que colunas: passo maior
                p.mul_(1 - settings["lr"] * settings["weight_decay"])
                p.add_(update, alpha=-settings["lr"] * scale)


# a·x + b·x³ + c·x⁵, três vezes, leva qualquer x de 0,01 a 1 para entre 0,73 e 1,27. Os coeficientes
# vêm do método de Amsel et al. 2025 ("The Polar Express"); os do artigo do Muon pedem cinco vezes.
NEWTON_SCHULZ = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))


def orthogonalize(x):  # (n, linhas, colunas): n matrizes, cada uma por si
    """Leva os valores singulares a perto de 1: um polinômio ímpar da matriz age em cada um."""
    tall = x.size(1) > x.size(2)
    x = (x.mT if tall else x) / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # deitada, custa menos
    for a, b, c in NEWTON_SCHULZ:
        square = x @ x.mT
        square = torch.baddbmm(square, square, square, beta=b, alpha=c)  # b·x·xᵀ + c·(x·xᵀ)²
        x = torch.baddbmm(x, square, x, beta=a)  # a·x + (b·x·xᵀ + c·(x·xᵀ)²)·x
    return x.mT if tall else x


def make_optimizers(model, config, dtype):
    """Reparte os pesos entre os otimizadores; só as matrizes encolhem com weight_decay."""
    matrices, optimizers = [p for p in model.parameters() if p.dim() == 2], []
    if config.optimizer == "muon":
        matrices, hidden = matrices[:2], matrices[2:]  # as duas primeiras são os embeddings
        optimizers.append(Muon(hidden, config.muon_learning_rate, config.weight_decay, dtype))
    vectors, peak = [p for p in model.parameters() if p.dim() < 2], config.learning_rate
    optimizers.append(torch.optim.AdamW(  # Loshchilov e Hutter 2019
        [{"params": matrices, "weight_decay": config.weight_decay, "peak": peak},
         {"params": vectors, "weight_decay": 0.0, "peak": peak}],
        betas=(config.beta1, config.beta2), fused=True))
    return optimizers


def lr_factor(step, config):
    """A fração das taxas a usar num passo: sobe até 1 e desce, sempre em linha reta."""
    if step < config.warmup_iters:
        return (step + 1) / (config.warmup_iters + 1)
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    lowest = config.min_lr / (config.learning_rate or 1)
    return 1 - (1 - lowest) * progress


def train_step(step, loss_of, data, optimizers, scaler, config, rank, world_size):
    """Soma os gradientes de alguns batches e corrige os pesos; devolve a loss deste processo."""
    accumulation, total = config.gradient_accumulation_steps, 0.0
    for micro in range(rank, accumulation, world_size):  # os processos repartem os batches
        number, sync = step * accumulation + micro, micro >= accumulation - world_size
        torch.manual_seed(config.seed * 1_000_003 + number)  # o sorteio do dropout
        loss = loss_of(*data.batch(number, config.batch_size), sync)
        # dividir faz da soma dos gradientes a média: o mesmo que um só batch grande
        loss = loss * world_size / accumulation  # (entre os processos, quem tira a média é o DDP)
        scaler.scale(loss).backward()
        total += loss.detach()
    for optimizer in optimizers:  # em float16, desfaz a multiplicação antes de medir
        scaler.unscale_(optimizer)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    norm = torch.nn.utils.clip_grad_norm_(
        [p for group in groups for p in group["params"]], config.grad_clip or math.inf)
    # em float16 o gradiente transborda de vez em quando: pula-se o passo, e o scaler se ajusta
    if not (total if scaler.is_enabled() else total + norm).isfinite():
        raise SystemExit(f"Passo {step}: a loss ({total:.3f}) ou o gradiente ({norm:.3f}) não é um "
                         "número. last.pt é de antes: tente uma learning_rate menor.")
    for group in groups:
        group["lr"] = group["peak"] * lr_factor(step, config)
    for optimizer in optimizers:
        if norm.isfinite():
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return total


@torch.no_grad()
def evaluate(model, loss_of, encoding, config, *datasets):
    """A loss média de cada conjunto, em nats por token, e um texto curto que o modelo escreve."""
    model.eval()
    losses = []
    for data in datasets:
        total, count = 0.0, 0
        for x, y in data.fixed_batches(config.batch_size, config.eval_iters):
            counted = (y >= 0).sum().item()
            total, count = total + loss_of(x, y).item() * counted, count + counted
        losses.append(total / count)
    prompt, end = normalize(config.sample_prompt), encoding.eot_token
    ids = torch.tensor([[end, *encoding.encode_ordinary(prompt)]], device=model.wte.weight.device)
    tokens = [token.item() for token in model.generate(ids, 40, 0.8, 20, end)]
    model.train()
    return *losses, (prompt + encoding.decode(tokens, errors="ignore")).replace("\n", " ")


def starting_point(config, tokenizer, identity):
    """De onde partir: (pesos ou None, last.pt ou {}). identity: o que não muda ao continuar."""
    path, start = Path(config.out_dir, "last.pt"), config.init_from
    if path.exists():
        last = read_checkpoint(path, "identity", "config", "step", "seconds", "log", "optimizers")
        if wrong := [f"{name} (era {last['identity'].get(name)}, agora é {value})" for name, value
                     in identity.items() if last["identity"].get(name) != value]:
            raise SystemExit(f"O treino de {config.out_dir} é outro: {', '.join(wrong)}. Para um "
                             "novo, use --out_dir=OUTRA_PASTA, ou apague esta.")
        for name, value in asdict(config).items():
            if (before := last["config"].get(name, value)) != value and name != "out_dir":
                print(f"Mudou desde a última vez: {name}, de {before!r} para {value!r}.")
        return last["model"].state_dict(), last
    if start == "scratch":
        return None, {}
    if open_tokenizer(start)["vocab"] != tokenizer["vocab"]:
        raise SystemExit(f"{start} tem outro vocabulário: prepare com --tokenizer {start}.")
    gpt = from_pretrained(start)
    for name in ("n_layer", "n_head", "n_embd", "bias", "block_size"):
        value, ours = getattr(gpt.config, name), getattr(config, name)
        if value < ours or value != ours and name != "block_size":  # (a janela pode ser menor)
            raise SystemExit(f"{start} tem outro formato: use --{name}={value}")
    return gpt.state_dict() | {"wpe.weight": gpt.wpe.weight.data[: config.block_size].clone()}, {}


def train(config):
    """Treina até max_iters, ou até um pedido para parar (Ctrl+C, SIGTERM)."""
    # o torchrun diz a cada processo quem ele é; sem ele, há um só
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and torch.cuda.is_available() and config.device != "cpu":  # antes de tudo
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = choose_device(config.device)
    if config.gradient_accumulation_steps % world_size:
        raise SystemExit(f"gradient_accumulation_steps não se reparte por {world_size} processos.")
    if world_size > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # só o processo 0 escreve
    dtype = choose_dtype(device, config.dtype)
    config.dtype = str(dtype).removeprefix("torch.")  # a escolhida: se mudar, starting_point avisa
    out, data = Path(config.out_dir), Path("data", config.dataset)
    meta, tokenizer = read_meta(data)
    encoding, splits = build_encoding(tokenizer), meta["splits"]
    config.vocab_size = V = encoding.n_vocab
    train_data, val_data = (Tokens(data / f"{part}.bin", splits[part], encoding.eot_token,
                                   config.block_size, config.seed) for part in ("train", "val"))
    per_step = config.batch_size * config.gradient_accumulation_steps * config.block_size
    shape = {field.name: getattr(config, field.name) for field in fields(GPTConfig)}
    identity = shape | {"dropout": 0, "optimizer": config.optimizer, "seed": config.seed,
                        "tokens por passo": per_step, "texto": splits,  # (o dropout pode mudar)
                        "vocabulário": content_hash(tokenizer["vocab"])}
    weights, last = starting_point(config, tokenizer, identity)
    torch.manual_seed(config.seed)  # para o sorteio dos pesos iniciais
    model = GPT(GPTConfig(**shape), weights).to(device)
    optimizers = make_optimizers(model, config, dtype)
    for optimizer, state in zip(optimizers, last.get("optimizers", [])):
        # do arquivo vem a memória do otimizador; as taxas são as das opções de agora
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    # float16 não alcança números muito pequenos: o GradScaler multiplica a loss para caberem
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if last.get("scaler"):
        scaler.load_state_dict(last["scaler"])
    step, log = last.get("step", 0), last.get("log", [])
    began = time.perf_counter() - last.get("seconds", 0)
    epochs = config.max_iters * per_step / splits["train"]["tokens"]
    print(f"máquina  {world_size} × {device.type}, contas em {config.dtype}\n"
          f"modelo   {model.num_params()} parâmetros; quem chuta tem loss {math.log(V):.2f}\n"
          f"ao todo  {config.max_iters} passos de {per_step} tokens, {epochs:.1f} voltas no texto"
          + (f"\nContinuo {out}/last.pt do passo {step}." if last else ""))
    parallel = model  # o que treina: o modelo, compilado e repartido se é o caso

    def loss_of(x, y, sync=True):
        module = parallel if model.training else model
        module.require_backward_grad_sync = sync  # os processos somam os gradientes uma vez só
        # as contas pesadas vão em dtype; os pesos e o que precisa de exatidão, em float32
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return module(x.to(device), y.to(device))[1]

    if config.compile and device.type == "cuda":  # só se compila, e só falha, na primeira chamada
        try:
            parallel = torch.compile(model)
            loss_of(*train_data.batch(0, config.batch_size)).backward()
        except Exception as error:
            print(f"torch.compile não funcionou ({type(error).__name__}); sigo sem ele.")
            parallel = model
        model.zero_grad(set_to_none=True)
    if world_size > 1:
        parallel = torch.nn.parallel.DistributedDataParallel(parallel)

    def save(name, **more):
        checkpoint = {"model": model.state_dict(), "model_config": shape, "tokenizer": tokenizer,
                      "config": asdict(config), "step": step}
        if rank == 0:
            with whole_file(out / name) as file:
                torch.save(checkpoint | more, file)

    try:  # a pasta é deste treino enquanto .lock está aberto
        import fcntl  # (o Windows não tem)
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a")
        fcntl.flock(lock, fcntl.LOCK_UN if rank else fcntl.LOCK_EX | fcntl.LOCK_NB)  # o 0 tranca
    except BlockingIOError:
        raise SystemExit(f"Outro treino está usando {out}: espere, ou use outra --out_dir.")
    except (ImportError, OSError):
        pass
    asked = torch.zeros(1, device=device)  # um pedido para parar: o passo em curso termina
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: asked.fill_(number))
    while True:
        stop = asked.clone()  # um pedido que chega durante a conta abaixo fica para o próximo passo
        if world_size > 1:  # basta um processo receber o pedido
            distributed.all_reduce(stop, distributed.ReduceOp.MAX)
        ending, known = bool(stop) or step >= config.max_iters, step in [row[0] for row in log]
        if not (stop or known) and (ending or step % config.eval_interval == 0):
            *losses, text = evaluate(model, loss_of, encoding, config, train_data, val_data)
            seconds, rate = time.perf_counter() - began, lr_factor(step, config)
            # nats por token -> bits por byte, que não dependem do vocabulário
            bits = losses[1] / math.log(2) * splits["val"]["tokens"] / splits["val"]["bytes"]
            print(f"passo {step} | {seconds / 60:.1f} min | treino {losses[0]:.3f} | validação "
                  f"{losses[1]:.3f} | {bits:.3f} bits por byte\n    {text}", flush=True)
            log.append([step, step * per_step, seconds, rate, *losses, bits])  # [5]: validação
            if rank == 0:
                with whole_file(out / "log.csv") as file:
                    file.write(b"step,tokens,seconds,lr_factor,train_loss,val_loss,val_bpb\n")
                    file.writelines(b"%d,%d,%.1f,%.4f,%.4f,%.4f,%.4f\n" % tuple(row) for row in log)
            if losses[1] == min(row[5] for row in log):
                save("best.pt", val_loss=losses[1])
        if step > last.get("step", -1) and (ending or step % config.save_interval == 0):
            save("last.pt", identity=identity, log=log, seconds=time.perf_counter() - began,
                 optimizers=[optimizer.state_dict()["state"] for optimizer in optimizers],
                 scaler=scaler.state_dict())
        if ending:
            break
        start = time.perf_counter()
        loss = train_step(step, loss_of, train_data, optimizers, scaler, config, rank, world_size)
        step += 1
        if device.type == "cuda" and step == last.get("step", 0) + 1:
            print(f"memória  {torch.cuda.max_memory_allocated() / 1e9:.1f} GB, no primeiro passo")
        if step % config.log_interval == 0:
            took = time.perf_counter() - start
            left = f"faltam {(config.max_iters - step) * took / 60:.1f} min"
            show_progress(f"passo {step}/{config.max_iters} | loss {loss:.3f} | "
                          f"{per_step / took:.0f} tokens/s | {left}", plain=True)
    if world_size > 1:
        distributed.barrier()  # ninguém sai enquanto outro ainda trabalha
        parallel = model  # solta o que a comunicação ainda segura
        distributed.destroy_process_group()
    if stop:
        print(f"\nParei no passo {step}, guardado em {out}/last.pt. A mesma linha continua daqui.")
        sys.exit(128 + int(stop))
    print(f"\nO treino terminou, com {step} passos.\n"
          "Veja o que o modelo escreve (ou treine mais, com um max_iters maior):\n"
          f'    python sample.py --out_dir={out} --start "{config.sample_prompt}"')


def main(arguments=None):
    config = read_options(sys.argv[1:] if arguments is None else arguments)
    try:
        train(config)
    except RuntimeError as error:  # na CPU, a falta de memória não tem um tipo de erro só dela
        if not re.search("(out of|allocate) memory", str(error)):
            raise
        size, times = config.batch_size, config.gradient_accumulation_steps
        less = max((part for part in range(1, size) if size % part == 0), default=1)
        raise SystemExit(f"Faltou memória. O mesmo treino com menos: --batch_size={less} "
                         f"--gradient_accumulation_steps={times * size // less}")


if __name__ == "__main__":
    run(main)
