"""The convolution against XLA's own, in value and every derivative, under every transformation."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.networks.convolution import conv, doubled_conv

CASES = {
    "same": ((2, 6, 5, 3), (3, 3, 3, 4), 1, "SAME"),
    "one image": ((6, 5, 3), (3, 3, 3, 4), 1, "SAME"),
    "two leading axes": ((2, 3, 4, 4, 2), (3, 3, 2, 2), 1, "SAME"),
    "even kernel": ((1, 6, 6, 2), (2, 4, 2, 3), 1, "SAME"),
    "stride 2": ((2, 8, 8, 3), (3, 3, 3, 4), 2, "SAME"),
    "stride 2, odd size": ((2, 7, 9, 3), (3, 3, 3, 4), 2, "SAME"),
    "stride 2, padded below": ((1, 8, 6, 2), (3, 3, 2, 2), 2, ((0, 1), (0, 1))),
    "stride 2, remainder unused": ((1, 8, 8, 2), (3, 3, 2, 2), 2, ((0, 0), (0, 0))),
    "stride 3": ((1, 8, 7, 2), (3, 2, 2, 2), 3, "SAME"),
    "stride over the kernel": ((1, 7, 7, 2), (1, 1, 2, 3), 2, "SAME"),
    "pointwise": ((2, 4, 4, 3), (1, 1, 3, 5), 1, "SAME"),
    "padding over the kernel": ((1, 4, 4, 2), (2, 2, 2, 3), 1, ((3, 0), (0, 4))),
    "cropping": ((1, 6, 6, 2), (3, 3, 2, 3), 1, ((-1, 1), (1, -1))),
    "kernel as large as the image": ((1, 3, 3, 2), (3, 3, 2, 2), 1, ((0, 0), (0, 0))),
    "image smaller than the kernel": ((1, 1, 1, 2), (3, 3, 2, 2), 1, "SAME"),
}


def xla(x, kernel, stride, padding):
    flat = x.reshape(-1, *x.shape[-3:])
    out = jax.lax.conv_general_dilated(
        flat,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    return out.reshape(*x.shape[:-3], *out.shape[1:])


def arrays(shape_x, shape_kernel, dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (shape_x, shape_kernel, shape_x, shape_kernel)
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def close(found, expected):
    tolerance = 1e-13 if jax.tree.leaves(found)[0].dtype == np.float64 else 1e-5
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, atol=tolerance * (1 + np.abs(b).max()), rtol=0
        ),
        found,
        expected,
    )


def check(case, dtype):
    shape_x, shape_kernel, stride, padding = CASES[case]
    x, kernel, dx, dkernel = arrays(shape_x, shape_kernel, dtype)

    def products(f, x, kernel, dx, dkernel):
        y, tangent_map = jax.linearize(f, x, kernel)
        _, pullback = jax.vjp(f, x, kernel)
        # A second derivative through both transposition rules.
        second = jax.grad(lambda x, k: (jax.grad(lambda k: (f(x, k) ** 2).sum())(k) ** 2).sum())
        transposed = jax.linear_transpose(lambda dx: tangent_map(dx, jnp.zeros_like(kernel)), x)
        u = jnp.cos(y)
        return y, tangent_map(dx, dkernel), pullback(u), transposed(u), second(x, kernel)

    def ours(x, k):
        return conv(x, k, stride=stride, padding=padding)

    def theirs(x, k):
        return xla(x, k, stride, padding)

    found, expected = (
        jax.jit(functools.partial(products, f))(x, kernel, dx, dkernel) for f in (ours, theirs)
    )
    close(found, expected)
    close(ours(x, kernel), expected[0])


@pytest.mark.parametrize("case", CASES)
def test_equals_xla_float32(case):
    check(case, np.float32)


@pytest.mark.parametrize("case", CASES)
def test_equals_xla_float64(case, x64):
    check(case, np.float64)


def test_definition():
    """The sum in the docstring, with loops in NumPy."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 4, 2)).astype(np.float32)
    kernel = rng.normal(size=(3, 2, 2, 3)).astype(np.float32)
    padded = np.pad(x, ((1, 2), (0, 1), (0, 0)))
    expected = np.array(
        [
            [
                np.einsum("ijc,ijck->k", padded[2 * p : 2 * p + 3, 2 * q : 2 * q + 2], kernel)
                for q in range(2)
            ]
            for p in range(3)
        ]
    )
    found = conv(jnp.asarray(x), jnp.asarray(kernel), stride=2, padding=((1, 2), (0, 1)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("axes", [(0, None), (2, None), (None, 0), (None, 3), (0, 0), (1, 4)])
def test_vmap(axes, stride):
    """Mapped over images, kernels or both; products and gradients of each member."""
    keys = jax.random.split(jax.random.key(1), 2)
    size = 3
    xs = jax.random.normal(keys[0], (size, 2, 6, 6, 3), jnp.float32)
    kernels = jax.random.normal(keys[1], (size, 3, 3, 3, 4), jnp.float32)

    @jax.jit
    def products(x, kernel):
        f = lambda x, k: conv(x, k, stride=stride)  # noqa: E731
        y, pullback = jax.vjp(f, x, kernel)
        return y, jax.jvp(f, (x, kernel), (jnp.sin(x), jnp.cos(kernel)))[1], pullback(y)

    members = [
        products(xs[0 if axes[0] is None else i], kernels[0 if axes[1] is None else i])
        for i in range(size)
    ]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    args = [
        a[0] if axis is None else jnp.moveaxis(a, 0, axis)
        for a, axis in zip((xs, kernels), axes, strict=True)
    ]
    close(jax.vmap(products, in_axes=axes)(*args), expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (None, 2), (3, 4)])
def test_transposed_product(axes, stride):
    """J^T u as a function of u and the kernel: values, gradients and J^T^T, mapped over members."""
    keys = jax.random.split(jax.random.key(2), 3)
    x = jax.random.normal(keys[0], (6, 6, 2), jnp.float32)
    us = jax.random.normal(keys[1], (3, -(-6 // stride), -(-6 // stride), 5), jnp.float32)
    kernels = jax.random.normal(keys[2], (3, 3, 3, 2, 5), jnp.float32)

    def products(f, u, kernel):
        def pull(u, kernel):
            return jax.linear_transpose(lambda x: f(x, kernel), x)(u)[0]

        gradient = jax.grad(lambda u, k: (pull(u, k) ** 2).sum(), (0, 1))(u, kernel)
        twice = jax.linear_transpose(lambda u: pull(u, kernel), u)(x)
        return pull(u, kernel), gradient, twice

    ours = functools.partial(products, lambda x, k: conv(x, k, stride=stride))
    theirs = functools.partial(products, lambda x, k: xla(x, k, stride, "SAME"))
    members = [
        theirs(us[0 if axes[0] is None else i], kernels[0 if axes[1] is None else i])
        for i in range(3)
    ]
    args = [
        a[0] if axis is None else jnp.moveaxis(a, 0, axis)
        for a, axis in zip((us, kernels), axes, strict=True)
    ]
    found = jax.jit(jax.vmap(ours, in_axes=axes))(*args)
    close(found, jax.tree.map(lambda *leaves: jnp.stack(leaves), *members))


def test_nested_vmap_and_gradient_of_an_ensemble():
    xs, kernels, _, _ = arrays((2, 3, 4, 4, 2), (2, 3, 3, 2, 2), np.float32)

    def loss(kernels):
        over_images = jax.vmap(conv, in_axes=(0, None))
        return (jax.vmap(over_images)(xs, kernels) ** 2).sum()

    def loop(kernels):
        return sum((xla(xs[i], kernels[i], 1, "SAME") ** 2).sum() for i in range(2))

    close(jax.grad(loss)(kernels), jax.grad(loop)(kernels))


def test_gradients_per_example():
    x, kernel, _, _ = arrays((4, 5, 5, 2), (3, 3, 2, 3), np.float32)
    per_example = jax.vmap(jax.grad(lambda k, x: (conv(x, k) ** 2).sum()), in_axes=(None, 0))
    expected = [jax.grad(lambda k, x=x: (xla(x, k, 1, "SAME") ** 2).sum())(kernel) for x in x]
    close(per_example(kernel, x), jnp.stack(expected))


def test_products_in_a_loop():
    """A linearisation made outside and applied, forward and transposed, in a loop."""
    x, kernel, v, _ = arrays((2, 6, 6, 3), (3, 3, 3, 3), np.float32)

    @jax.jit
    def iterate(x, kernel, v):
        _, tangent_map = jax.linearize(lambda x: jnp.tanh(conv(x, kernel)), x)
        transposed = jax.linear_transpose(tangent_map, x)

        def body(_, v):
            v = tangent_map(v) + transposed(v)[0]
            return v / jnp.sqrt((v**2).sum())

        return jax.lax.fori_loop(0, 4, body, v)

    jacobian = jax.jacrev(lambda x: jnp.tanh(xla(x, kernel, 1, "SAME")))(x).reshape(x.size, -1)
    w = v.reshape(-1)
    for _ in range(4):
        w = jacobian @ w + jacobian.T @ w
        w = w / np.linalg.norm(w)
    np.testing.assert_allclose(iterate(x, kernel, v).reshape(-1), w, atol=1e-5)


def called_from(text, name):
    """The computations of a program in HLO that one of them calls, itself included."""
    blocks = dict(re.findall(r"^(?:ENTRY )?(%[\w.-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    found, queue = {}, [name]
    while queue:
        name = queue.pop()
        if name in blocks and name not in found:
            found[name] = blocks[name]
            queue += re.findall(r"%[\w.-]+", blocks[name])
    return found


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere left to XLA")
@pytest.mark.parametrize("stride", [1, 2])
def test_kernels_are_flipped_before_the_loop(stride):
    """Once, not at every product: twenty times a network's weights are what that costs."""
    x, kernel, v, _ = arrays((1, 6, 6, 3), (3, 3, 3, 3), np.float32)

    @jax.jit
    def iterate(x, kernel, v):
        _, tangent_map = jax.linearize(lambda x: jnp.tanh(conv(x, kernel, stride=stride)), x)
        transposed = jax.linear_transpose(tangent_map, x)
        return jax.lax.fori_loop(0, 4, lambda _, v: transposed(tangent_map(v))[0], v)

    text = iterate.lower(x, kernel, v).compile().as_text()
    (body,) = re.findall(r"body=(%[\w.-]+)", text)
    inside = called_from(text, body).values()
    assert any(" convolution(" in block or " dot(" in block for block in inside)
    assert " reverse(" in text
    assert not any(" reverse(" in block for block in inside)


def test_every_product_lowers_to_channels_last():
    """No derivative may ask for the layouts that are slow in loops."""
    x, kernel, _, _ = arrays((2, 6, 6, 3), (3, 3, 3, 4), np.float32)
    gradient = jax.jit(jax.grad(lambda x, k: (conv(x, k, stride=2) ** 2).sum(), argnums=(0, 1)))
    text = gradient.lower(x, kernel).as_text()
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(convolutions) == 2 + 4  # value, kernel's gradient; the image's in four phases
    assert all("[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line for line in convolutions)
    assert all("reverse = [true" not in line for line in convolutions)


@pytest.mark.parametrize(
    ("shape_x", "shape_kernel", "kwargs", "message"),
    [
        ((4, 4, 3), (3, 3, 2, 4), {}, r"x, kernel: .*got \[4, 4, 3\] and \[3, 3, 2, 4\]"),
        ((4, 3), (3, 3, 3, 4), {}, r"x, kernel: expected"),
        ((4, 4, 3), (3, 3, 3), {}, r"x, kernel: expected"),
        ((4, 4, 3), (3, 3, 3, 4), {"stride": 0}, r"stride: expected at least 1, got 0"),
        ((2, 4, 3), (3, 3, 3, 4), {"padding": ((0, 0), (0, 0))}, r"padding: .*kernel \[3, 3\]"),
    ],
)
def test_bad_input(shape_x, shape_kernel, kwargs, message):
    # Shapes that contradict the annotation are refused by the type checker where it is on.
    with pytest.raises((InputError, TypeError)) as caught:
        conv(jnp.ones(shape_x), jnp.ones(shape_kernel), **kwargs)
    if isinstance(caught.value, InputError):
        caught.match(message)


def test_mixed_dtypes_are_refused():
    with pytest.raises(InputError, match="kernel: expected the dtype of x, float32, got float16"):
        conv(jnp.ones((4, 4, 3), jnp.float32), jnp.ones((3, 3, 3, 1), jnp.float16))


@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_doubled_pixels(lead):
    """Equal to doubling and convolving, in value and in every derivative."""
    shape = (*lead, 4, 3, 2)
    x, kernel, dx, dkernel = arrays(shape, (3, 3, 2, 5), np.float32)

    def plainly(x, kernel):
        return conv(jnp.repeat(jnp.repeat(x, 2, axis=-3), 2, axis=-2), kernel)

    def products(f):
        y, push = jax.linearize(f, x, kernel)
        return y, push(dx, dkernel), jax.vjp(f, x, kernel)[1](jnp.sin(y))

    found, expected = (jax.jit(lambda f=f: products(f))() for f in (doubled_conv, plainly))
    assert found[0].shape == (*lead, 8, 6, 5)
    close(found, expected)


def test_doubled_pixels_take_a_three_by_three_kernel():
    with pytest.raises(InputError, match=r"^kernel: expected \[3, 3, c, k\], got \[1, 1, 2, 2\]$"):
        doubled_conv(jnp.zeros((4, 4, 2)), jnp.zeros((1, 1, 2, 2)))
