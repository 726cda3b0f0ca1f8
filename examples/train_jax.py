"""νSAM in JAX: a small network learns handwritten digits, some of which have wrong labels.

pip install "nusam[jax]" scikit-learn
python examples/train_jax.py --rho 0.3
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import nusam.jax


def initial(key: jax.Array, sizes: list[int]) -> list[dict[str, jax.Array]]:
    layers = []
    for n, m in itertools.pairwise(sizes):
        key, own = jax.random.split(key)
        layers.append({"W": jax.random.normal(own, (n, m)) * (2 / n) ** 0.5, "b": jnp.zeros(m)})
    return layers


def logits(layers: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer["W"] + layer["b"])
    return x @ layers[-1]["W"] + layers[-1]["b"]


def loss(layers: list[dict[str, jax.Array]], x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(layers, x), y).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rho", type=float, default=0.3, help="0 is AdamW alone")
    parser.add_argument("--wrong", type=float, default=0.4, help="share of the training labels drawn anew")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = np.random.default_rng(args.seed)
    images, labels = load_digits(return_X_y=True)
    images, labels = images / 16, labels.copy()
    order = rng.permutation(len(images))
    train, test = order[:400], order[1000:]
    drawn = train[rng.random(len(train)) < args.wrong]
    labels[drawn] = rng.integers(0, 10, len(drawn))

    layers = initial(jax.random.key(args.seed), [64, 128, 128, 10])
    steps = args.epochs * len(train) // 25
    base = optax.adamw(optax.cosine_decay_schedule(4e-3, steps), weight_decay=0.05)
    optimizer = nusam.jax.nusam(base, args.rho, seed=args.seed, opaque_mode=True)
    state = optimizer.init(layers)

    @jax.jit
    def step(layers, state, x, y):
        updates, state = optimizer.update(
            jax.grad(loss)(layers, x, y), state, layers, grad_fn=jax.grad(lambda moved, _: loss(moved, x, y))
        )
        return optax.apply_updates(layers, updates), state

    for epoch in range(args.epochs):
        for rows in rng.permutation(train).reshape(-1, 25):
            layers, state = step(layers, state, images[rows], labels[rows])
        if (epoch + 1) % 10 == 0:
            right = float((logits(layers, images[test]).argmax(1) == labels[test]).mean())
            print(
                f"epoch {epoch + 1}: loss {loss(layers, images[train], labels[train]):.3f}, test accuracy {right:.2%}"
            )


if __name__ == "__main__":
    main()
