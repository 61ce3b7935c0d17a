"""Packed checkpoints: weights that other programs have quantized, made plain again, one tensor at a time.

formats.py has the arithmetic of each format, checkpoint.py finds which tensors make up a weight. The package imports
the ground only. Start reading at checkpoint.py.
"""
