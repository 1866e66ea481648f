"""Tensors in, tensors out: torch only, no models, no tokenizers.

Letters of shapes, here and in other rooms: ``B`` rows (in RL rollouts), ``K`` pairs of rows, ``P`` prompt
tokens, ``R`` response tokens, ``T = P + R``, ``H`` hidden size, ``V`` vocabulary. A file with others names them.
"""
