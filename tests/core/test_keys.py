"""Keys: a function of their purpose alone."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from memjax._core.keys import derive_key


def bits(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_seed_and_key_are_the_same_root():
    assert bits(derive_key(7, "noise", 3)) == bits(derive_key(jax.random.key(7), "noise", 3))


def test_different_purposes_draw_different_numbers():
    keys = [
        derive_key(seed, name, index)
        for seed in (0, 1)
        for name in ("noise", "probe", "")
        for index in range(20)
    ]
    assert len({bits(key) for key in keys}) == len(keys)


def test_order_of_names_matters_and_nesting_composes():
    assert bits(derive_key(0, "a", "b")) != bits(derive_key(0, "b", "a"))
    assert bits(derive_key(derive_key(0, "a"), "b", 2)) == bits(derive_key(0, "a", "b", 2))


def test_traced_indices_give_the_same_keys():
    keys = jax.jit(jax.vmap(lambda i: derive_key(5, "row", i)))(jnp.arange(4))
    assert [bits(key) for key in keys] == [bits(derive_key(5, "row", i)) for i in range(4)]


def test_same_in_another_process():
    # Python's own string hash is salted per process; ours must not be.
    code = (
        "import jax; from memjax._core.keys import derive_key; "
        "print(jax.random.key_data(derive_key(11, 'detector', 4)).tolist())"
    )
    out = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert out.stdout.strip() == str(list(bits(derive_key(11, "detector", 4))))


def test_derived_streams_are_not_correlated():
    draws = jax.vmap(lambda i: jax.random.normal(derive_key(0, "row", i), (200,)))(jnp.arange(50))
    correlation = np.corrcoef(np.asarray(draws))[np.triu_indices(50, 1)]
    # 1225 correlations of 200 pairs: standard deviation 1/sqrt(200), largest about 3.3 of them.
    assert np.abs(correlation).max() < 5 / np.sqrt(200)
