"""Triton kernels and the thin functions that launch them.

Everything here knows tensors and nothing else; ``egrsd_kernels.triton_backend`` puts the kernels together.
One chunk of student rows goes through them in this order:

    gather.py    hidden states of the chunk's rows, and the logit of each row's target token
    vocab.py     one pass over the vocabulary: softmax statistics, or stored exponentials and their sums
    credit.py    entropy lookahead, gate, magnitude and token advantage: what each row's gradient is worth
    sparse.py    sparse gradients with a certified bound, from the statistics; what is not sparse goes through vocab.py
                 and gradient.py
    gradient.py  hidden, head and bias gradients from the stored exponentials
"""
