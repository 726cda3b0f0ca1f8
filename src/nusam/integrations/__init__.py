"""Adapters, in files that are named after their framework, each with an extra: ``pip install "nusam[timm]"``.

``closures`` and ``fetching`` are Lightning's parts, ``rows`` and ``model_calls`` those of transformers' Trainer.
``replay``, ``riding``, ``state`` and ``batches`` are shared.
"""
