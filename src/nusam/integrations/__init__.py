"""One small file per framework, each with an extra of its own: ``pip install "nusam[timm]"``."""
