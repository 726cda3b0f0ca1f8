"""νSAM in JAX: the ascent over the nuclear-norm ball as an optax transform, to be used with ``optax.contrib.sam``."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

try:
    import jax
    import jax.numpy as jnp
    import optax
    from optax.contrib import SAMState, sam
except ImportError as error:
    raise ImportError('nusam.jax needs jax and optax, which are not both there; pip install "nusam[jax]".') from error

__all__ = ["NuclearState", "matrices", "nuclear", "nusam"]

TAU = 1e-12  # τ of Algorithm 2, relative to the largest entry of the vector that it regularises

Shape = tuple[int, int]
AsMatrix = Callable[[str, Any], Shape | None]


class NuclearState(NamedTuple):
    """What the power iterations start from."""

    u: dict[str, Any]  # (n,) of every n×m matrix, by its path


def matrices(path: str, leaf: Any) -> Shape | None:
    """Two-dimensional leaves, as they are."""
    return tuple(leaf.shape) if leaf.ndim == 2 else None


def nusam(
    optimizer: optax.GradientTransformation,
    rho: float = 0.05,
    *,
    power_iterations: int = 1,
    as_matrix: AsMatrix | None = None,
    seed: int = 0,
    opaque_mode: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """νSAM (Algorithm 1) around an optax optimizer.

    Called twice a step, as ``optax.contrib.sam`` is: the first call's gradient gives ε, which the returned update adds
    to the weights, and the second call's, taken there, gives the optimizer's step from where the weights were. With
    ``opaque_mode=True`` one call does both, and needs ``grad_fn=``::

        optimizer = nusam.jax.nusam(optax.adamw(1e-3), rho=0.05, opaque_mode=True)
        state = optimizer.init(params)
        for batch in batches:
            gradient = jax.grad(loss)(params, batch)
            updates, state = optimizer.update(
                gradient, state, params, grad_fn=jax.grad(lambda params, _: loss(params, batch))
            )
            params = optax.apply_updates(params, updates)

    Args:
        optimizer: the base optimizer, which is given gradients and weights, and no ``value=``.
        rho: radius ρ ≥ 0 of the ball, in the units of the weights.
        power_iterations: T of Algorithm 2, at least 1.
        as_matrix: from a leaf's path and the leaf to the (n, m) as which it is seen, or to None for what is not
            perturbed. Two-dimensional leaves as they are, unless told otherwise.
        seed: of the warm starts.
        opaque_mode: see :func:`optax.contrib.sam`.

    Raises:
        TypeError, ValueError: for arguments that can't be, and at ``init`` if the parameters hold nothing to perturb,
            or a matrix in less than float32, which would round ε away.
    """
    if isinstance(optimizer, type) or not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"optimizer must be one of optax, such as optax.adamw(1e-3), got {optimizer!r}.")
    ascent = nuclear(rho, power_iterations=power_iterations, as_matrix=as_matrix, seed=seed)
    # with its own default optax would begin from the same random u in every step
    around = sam(optimizer, ascent, reset_state=False, opaque_mode=opaque_mode)

    def init(params: Any) -> Any:
        for path, (leaf, _) in _matrices(params, as_matrix).items():
            if leaf.dtype != _working_dtype(leaf):
                raise ValueError(
                    f"{path} is of {leaf.dtype}, which would round ε away; keep the parameters in float32 and cast "
                    "them in the loss, or leave it out with as_matrix=."
                )
        return around.init(params)

    def in_two_calls(gradients: Any, state: Any, params: Any = None, **_: Any) -> Any:
        # optax picks by sums, through which what counts not in this call would be seen if it is NaN
        pick = partial(jax.tree.map, partial(jnp.where, state.steps_since_sync == 0))
        negative, adv_state = ascent.update(gradients, state.adv_state, params)
        step, opt_state = optimizer.update(gradients, state.opt_state, state.cache)
        back = jax.tree.map(lambda was, now, step: was - now + step, state.cache, params, step)
        in_ascent = jax.tree.map(jnp.negative, negative), state.opt_state, adv_state, params
        updates, *others = pick(in_ascent, (back, opt_state, state.adv_state, state.cache))
        return updates, SAMState(1 - state.steps_since_sync, *others)

    return optax.GradientTransformationExtraArgs(init, around.update if opaque_mode else in_two_calls)


def nuclear(
    rho: float, *, power_iterations: int = 1, as_matrix: AsMatrix | None = None, seed: int = 0
) -> optax.GradientTransformation:
    """The ascent alone: gradients to −ρ·u·vᵀ, by one warm-started power iteration for each matrix (Lemma 3.1).

    The sign is that of ``optax.sgd``, since ``optax.contrib.sam`` takes the adversary's updates the other way round.
    Everything that is no matrix gets 0, and so does a gradient that is zero, infinite or NaN. For the arguments see
    :func:`nusam`.
    """
    if callable(rho):
        raise ValueError("rho must be a number, got a function; a schedule goes through optax.inject_hyperparams.")
    known = not isinstance(rho, jax.core.Tracer)
    if known and (isinstance(rho, bool | str) or jnp.ndim(rho) or not (math.isfinite(float(rho)) and rho >= 0)):
        raise ValueError(f"rho must be a finite number of at least 0, got {rho!r}.")
    if not (as_matrix is None or callable(as_matrix)):
        raise TypeError(f"as_matrix must be a function of a leaf's path and the leaf, got {as_matrix!r}.")
    if isinstance(power_iterations, bool) or not isinstance(power_iterations, int) or power_iterations < 1:
        raise ValueError(f"power_iterations must be a whole number of at least 1, got {power_iterations!r}.")

    def init(params: Any) -> NuclearState:
        found = _matrices(params, as_matrix)
        if not found:
            raise ValueError(
                "νSAM has nothing to perturb: the parameters hold no matrix; hand over such parameters, or say with "
                "as_matrix= how they are matrices."
            )
        keys = jax.random.split(jax.random.key(seed), len(found))
        us = {}
        for key, (path, (leaf, (n, _))) in zip(keys, found.items(), strict=True):
            u = jax.random.normal(key, (n,), _working_dtype(leaf))
            us[path] = u / jnp.linalg.norm(u)
        return NuclearState(us)

    def update(updates: Any, state: NuclearState, params: Any = None) -> tuple[Any, NuclearState]:
        found = _matrices(updates, as_matrix)
        if found.keys() != state.u.keys():
            raise ValueError(
                f"The gradients hold {len(found)} matrices, and the state {len(state.u)} others; use the state that "
                "init() or update() gave for these parameters."
            )
        us, epsilons = {}, {}
        for path, (leaf, shape) in found.items():
            G = (leaf if leaf.shape == shape else leaf.reshape(shape)).astype(_working_dtype(leaf))
            us[path], v = _power_iteration(G, state.u[path], power_iterations)
            epsilons[path] = -rho * (us[path][:, None] * v)

        def negative(path: Any, leaf: Any) -> Any:
            epsilon = epsilons.get(jax.tree_util.keystr(path))
            if epsilon is None:
                return jnp.zeros_like(leaf)
            return (epsilon if epsilon.shape == leaf.shape else epsilon.reshape(leaf.shape)).astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(negative, updates), NuclearState(us)

    return optax.GradientTransformation(init, update)


def _matrices(tree: Any, as_matrix: AsMatrix | None) -> dict[str, tuple[Any, Shape]]:
    """The leaves that are perturbed, by their path, each with its shape as a matrix."""
    found, leaves = {}, jax.tree_util.tree_flatten_with_path(tree)[0]
    for path, leaf in ((jax.tree_util.keystr(keys), leaf) for keys, leaf in leaves):
        is_array = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size
        shape = (as_matrix or matrices)(path, leaf) if is_array else None
        if shape is None:
            continue
        if not isinstance(shape, tuple | list) or len(shape) != 2 or min(shape) < 1 or math.prod(shape) != leaf.size:
            raise ValueError(
                f"as_matrix gave {shape!r} for {path} of shape {tuple(leaf.shape)}; return (n, m) with as many "
                "entries, or None."
            )
        found[path] = leaf, (int(shape[0]), int(shape[1]))
    return found


def _power_iteration(G: Any, warm_start: Any, iterations: int) -> tuple[Any, Any]:
    """T rounds of v = Gᵀu/‖Gᵀu‖, u = Gv/‖Gv‖ (Algorithm 2); the warm start and v = 0 if G is zero or not finite.

    G and its vectors are divided by their largest entry first, so that no scale is too large or too small. Random
    numbers that u rounds away, no two of one size, let the iteration begin anew where G has no row that u lives on.
    """
    n, G = G.shape[0], _by_its_largest(G)
    r = jax.random.normal(jax.random.key(n), (n,), G.dtype)
    u = warm_start + r * (jnp.finfo(G.dtype).eps ** 2 * n**-0.5)
    for _ in range(iterations):
        v = _by_its_largest((G * u[:, None]).sum(0))  # of arrays in shards too, whatever their sharding
        u = _by_its_largest((G * v).sum(1))
    alive = jnp.isfinite(u).all() & jnp.isfinite(v).all() & (u != 0).any()
    u, v = (x / (jnp.linalg.norm(x) + TAU) for x in (u, v))
    # a sum, since a choice is between arrays of one sharding
    return jnp.where(alive, u, 0) + jnp.where(alive, 0, warm_start), jnp.where(alive, v, 0)


def _by_its_largest(x: Any) -> Any:
    largest = jnp.abs(x).max()
    return x / jnp.where(largest > 0, largest, 1)


def _working_dtype(leaf: Any) -> Any:
    """In which products are computed: the leaf's own, but at least float32."""
    return jnp.promote_types(leaf.dtype, jnp.float32)
