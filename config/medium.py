# Para uma placa de 12 a 16 GB: o GPT-2 menor, com uma janela mais curta.
# Prepare o texto com `python prepare.py --input ... --name NOME` e treine com --dataset=NOME.

# o modelo: 89 milhões de parâmetros, com um vocabulário de 4.096
n_layer = 12  # como o GPT-2 menor
n_head = 12  # cabeças de 64 canais
n_embd = 768  # como o GPT-2 menor
block_size = 512  # metade da janela do GPT-2: metade das ativações

# um passo: 131.072 tokens
batch_size = 16  # o que cabe em 12 GB com folga
gradient_accumulation_steps = 16  # completa o passo sem gastar mais memória
max_iters = 10000  # 1,3 bilhão de tokens

# o otimizador
optimizer = "muon"  # aprende mais por passo que o AdamW
muon_learning_rate = 0.02  # a dos autores do Muon
learning_rate = 1e-3  # embeddings e vieses
min_lr = 0.0  # o fim do treino é o acabamento
warmup_iters = 300  # uma partida lenta
weight_decay = 0.1  # o usual

# acompanhar
eval_interval = 500  # de quantos em quantos passos avaliar
save_interval = 500  # se a máquina cair, perdem-se no máximo estes passos
