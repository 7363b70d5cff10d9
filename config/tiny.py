# Um modelo que aprende a contar histórias em uns seis minutos, com dois núcleos.
# Os valores foram escolhidos medindo, na validação de data/contos, os bits por byte, a coerência
# (os personagens ficam na história?) e a concordância, com o mesmo tempo de processador.

# o modelo: 1,3 milhão de parâmetros
n_layer = 4  # quatro blocos bastam para a gramática; seis mais estreitos deram quase o mesmo
n_embd = 128  # com 192 aprende mais por passo, mas cada passo demora mais: no mesmo tempo, empatam
n_head = 4  # cabeças de 32 canais; com 16, menos coerência
block_size = 192  # uma história inteira, quase sempre; com 128, menos coerência

# um passo
batch_size = 11  # 2.112 tokens por passo: com a metade, ou com 3.072, ficou atrás no mesmo tempo
gradient_accumulation_steps = 1  # tudo cabe na memória de uma vez
max_iters = 1600  # quase cinco voltas no texto

# o otimizador
optimizer = "muon"  # no mesmo tempo, chega mais longe que o AdamW
muon_learning_rate = 0.02  # a dos autores do Muon; 0.03 deu quase o mesmo, e 0.04, pior
learning_rate = 6e-3  # a dos embeddings e vieses, com AdamW; 3e-3 foi pior
beta2 = 0.99  # os embeddings de palavras raras mudam pouco: uma memória mais longa
min_lr = 0.0  # as taxas descem até zero: o fim do treino é o acabamento
warmup_iters = 50  # poucos passos para partir com cuidado
weight_decay = 0.3  # alto, porque o texto é pouco: com 0.1 o modelo decora mais

# acompanhar
eval_interval = 320  # um texto novo a cada minuto, mais ou menos
eval_iters = 40  # o bastante para toda a validação
save_interval = 320  # se a máquina cair, perdem-se no máximo estes passos
