"""Matrices in blocks and sums over processes; who shares a batch."""
