"""Triton kernels and the thin functions that launch them.

Everything here knows tensors and nothing else; ``egrsd_kernels.triton_backend`` puts the kernels together.
One chunk of student rows goes through them in this order:

    gather.py    hidden states of the chunk's rows, and the logit of each row's target token
    vocab.py     one pass over the vocabulary: softmax statistics, or stored exponentials and their sums
    credit.py    entropy lookahead, gate, magnitude and token advantage: what each row's gradient is worth
    gradient.py  hidden, head and bias gradients from the stored exponentials
    sparse.py    or sparse ones with a certified bound; the rows that are not sparse gather for gradient.py
"""
