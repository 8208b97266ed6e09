import jax.numpy as jnp
import numpy as np

from memjax._core.hashing import fingerprint


def test_fingerprint_sees_dtype_shape_and_order():
    a, b = np.zeros(4, np.float32), np.ones(4, np.float32)
    digests = {
        fingerprint(a, b),
        fingerprint(b, a),
        fingerprint(a, a),
        fingerprint(a.reshape(2, 2), b),
        fingerprint(a.astype(np.float64), b),
    }
    assert len(digests) == 5


def test_fingerprint_sees_the_leaves_of_any_tree():
    a, b = np.zeros(4, np.float32), np.ones(4, np.float32)
    assert fingerprint({"x": a, "y": (b,)}) == fingerprint(jnp.asarray(a), jnp.asarray(b))
    assert fingerprint(None) == fingerprint()
