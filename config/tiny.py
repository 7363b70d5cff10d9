# Um modelo que aprende a contar histórias em menos de cinco minutos, em dois núcleos de processador.

# o modelo: 2,6 milhões de parâmetros
n_layer = 4  # quatro blocos: a gramática precisa de alguns, um depois do outro
n_embd = 192  # mais largo aprende mais por passo, mas cada passo demora mais
n_head = 6  # cabeças de 32 canais
block_size = 128  # quase uma história inteira (153 tokens, em média)

# o treino
batch_size = 16  # 2.048 tokens por passo: menos que isso mal ocupa o processador
gradient_accumulation_steps = 1  # tudo cabe na memória de uma vez
max_iters = 1700  # cerca de 10 voltas no texto: depois disso, o modelo decora
optimizer = "muon"  # no mesmo tempo, chega mais longe que o AdamW
muon_learning_rate = 0.02  # o valor recomendado por quem inventou o Muon
learning_rate = 3e-3  # para embeddings e vieses; um modelo pequeno suporta uma taxa alta
min_lr = 0.0  # as taxas descem até zero: o fim do treino é o acabamento
warmup_iters = 50  # o Muon mal precisa de aquecimento
weight_decay = 0.1  # o usual

# acompanhar
eval_interval = 100  # um texto novo a cada meio minuto
save_interval = 100  # e o máximo que se perde
