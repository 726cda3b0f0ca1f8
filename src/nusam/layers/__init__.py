"""What a model's layers do with their weights, and how a pass gets between them."""
