"""The published way, written plainly in PyTorch: the same network and its Krylov loops.

Everything here is batched over independent images: the Jacobian of the batch is block diagonal, so
one product serves every image, and dot products are taken per image. PyTorch is imported inside
the functions; it is a peer, not a dependency.
"""

from typing import Any

import numpy as np


def unet(module, weights: dict, points):
    """The twin of a U-Net of ours: a function of images, channels first, and those images.

    Args:
        module: our U-Net; one residual block a level, no attention.
        weights: its weights, as flax keeps them.
        points: images, channels last.

    Returns:
        ``(function, images)``: PyTorch, float32, images [batch, channels, height, width].
    """
    import torch
    from torch.nn import functional

    if module.attention or module.num_blocks != 1 or module.num_conditions:
        raise ValueError("the twin has one block a level, no attention and no conditions")

    def tensor(array):
        return torch.from_numpy(np.array(array))

    tree = weights["params"]
    widths = module.channels

    def prepare(node: dict[str, Any]) -> dict[str, Any]:
        out = {}
        for name, child in node.items():
            if isinstance(child, dict):
                out[name] = prepare(child)
            elif name == "kernel" and child.ndim == 4:
                out[name] = tensor(child).permute(3, 2, 0, 1).contiguous()
            elif name == "kernel":
                out[name] = tensor(child).T.contiguous()
            else:
                out[name] = tensor(child)
        return out

    tree = prepare(tree)

    def conv(layer, x, stride=1):
        if stride == 1:
            return functional.conv2d(x, layer["kernel"], layer["bias"], padding=1)
        # An even side and stride 2: "same" padding puts its one row and column behind.
        x = functional.pad(x, (0, 1, 0, 1))
        return functional.conv2d(x, layer["kernel"], layer["bias"], stride=stride)

    def norm(layer, x):
        return functional.group_norm(x, module.groups, layer["scale"], layer["bias"], 1e-6)

    # One noise level: the embedding and what the blocks take from it are constants.
    frequencies = torch.logspace(0, float(np.log10(36.0)), 16)
    angles = 0.0 * frequencies
    first, second = (tree["Embedding_0"][name] for name in ("Dense_0", "Dense_1"))
    embedding = torch.cat([angles.sin(), angles.cos()])
    embedding = functional.silu(functional.linear(embedding, first["kernel"], first["bias"]))
    embedding = functional.silu(functional.linear(embedding, second["kernel"], second["bias"]))

    def block(name, x):
        layers = tree[name]
        h = conv(layers["conv0"], functional.silu(norm(layers["norm0"], x)))
        film = functional.linear(embedding, layers["film"]["kernel"], layers["film"]["bias"])
        scale, shift = film.reshape(2, 1, -1, 1, 1)
        h = conv(layers["conv1"], functional.silu((1 + scale) * norm(layers["norm1"], h) + shift))
        if "skip" in layers:
            kernel = layers["skip"]["kernel"]
            x = functional.conv2d(x, kernel[:, :, None, None], layers["skip"]["bias"])
        return x + h

    def run(x):
        h, skips = conv(tree["in"], x), []
        for k in range(len(widths)):
            if k:
                h = conv(tree[f"down{k}"], h, stride=2)
            h = block(f"down{k}_block0", h)
            skips.append(h)
        h = block("middle_block1", block("middle_block0", h))
        for k in reversed(range(len(widths))):
            h = block(f"up{k}_block0", torch.cat([h, skips[k]], dim=1))
            if k:
                h = conv(tree[f"up{k}"], functional.interpolate(h, scale_factor=2, mode="nearest"))
        return conv(tree["out"], functional.silu(norm(tree["out_norm"], h)))

    return run, to_torch(points)


def to_torch(images):
    """Images, channels last, as a PyTorch tensor with channels first."""
    import torch

    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).contiguous()


def evaluate(function, x) -> np.ndarray:
    """The network's images, channels last."""
    import torch

    with torch.no_grad():
        return function(x).permute(0, 2, 3, 1).contiguous().numpy()


def arnoldi(function, x, start, num_products: int):
    """Ritz values by Arnoldi with ``torch.func.jvp``, one Hessenberg matrix per image.

    Modified Gram-Schmidt, one pass. Every product evaluates the network anew, as the published
    helper does.

    Returns:
        Eigenvalues of the Hessenberg matrices, complex [batch, num_products].
    """
    import torch

    def product(v):
        return torch.func.jvp(function, (x,), (v,))[1]

    with torch.no_grad():
        hessenberg = _gram_schmidt(product, start, num_products)
        return torch.linalg.eigvals(hessenberg).numpy()


def _gram_schmidt(product, start, num_products: int):
    import torch

    batch = start.shape[0]
    hessenberg = torch.zeros(batch, num_products, num_products)
    basis = [start / _norms(start)]
    for j in range(num_products):
        w = product(basis[j])
        for i, q in enumerate(basis):
            coefficient = (q * w).sum((1, 2, 3), keepdim=True)
            w = w - coefficient * q
            hessenberg[:, i, j] = coefficient[:, 0, 0, 0]
        if j + 1 < num_products:
            norms = _norms(w)
            hessenberg[:, j + 1, j] = norms[:, 0, 0, 0]
            basis.append(w / norms)
    return hessenberg


def _norms(v):
    return (v * v).sum((1, 2, 3), keepdim=True).sqrt()


def lanczos(function, x, start, num_products: int, *, fresh: bool = False):
    """Ritz values of (J + J^T)/2 by Lanczos, ``torch.func.jvp`` and ``torch.func.vjp``.

    Orthogonalized against the whole basis, by modified Gram-Schmidt.

    Args:
        function: images -> images.
        x: the images.
        start: the first vectors.
        num_products: products.
        fresh: evaluate the network anew for every transposed product, as for every forward one;
            otherwise one forward evaluation serves all of them.

    Returns:
        Ritz values, ascending, [batch, num_products].
    """
    import torch

    kept = None if fresh else torch.func.vjp(function, x)[1]

    def product(v):
        transposed = torch.func.vjp(function, x)[1] if kept is None else kept
        return (torch.func.jvp(function, (x,), (v,))[1] + transposed(v)[0]) / 2

    with torch.no_grad():
        return ritz_values(product, start, num_products)


def ritz_values(product, start, num_products: int):
    """Ritz values of a symmetric operator, ascending, [batch, num_products]."""
    import torch

    projected = _gram_schmidt(product, start, num_products)
    return torch.linalg.eigvalsh((projected + projected.mT) / 2).numpy()
