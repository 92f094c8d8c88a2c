"""Entropies and mutual information of features of your own: what each layer of an encoder knows of the nuclei.

    python examples/entropies.py

Every fourth patch is a sample. Its features come from one layer; its label says whether it shows a nucleus.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F
from transformers import SamModel

from renyi_kd import feature_entropy, feature_mutual_information, gram_matrix, renyi_entropy

ASSETS = Path(__file__).parent / "assets"
N_IMAGES = 8


def nuclei():
    """Return images ``[b, 3, 192, 192]``, and how much of every fourth patch is nucleus, ``[b, 12, 12]``."""
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    images, shares = [], []
    for path in sorted((ASSETS / "nuclei/images").glob("*.jpg"))[:N_IMAGES]:
        image = np.asarray(ImageOps.fit(Image.open(path).convert("RGB"), (192, 192)))
        mask = ImageOps.fit(Image.open(ASSETS / f"nuclei/masks/{path.stem}.png").convert("L"), (192, 192))
        images.append(torch.tensor((image - mean) / std).float().permute(2, 0, 1))
        shares.append(F.avg_pool2d(torch.tensor(np.asarray(mask) / 255.0)[None], 8)[0, ::2, ::2])
    return torch.stack(images), torch.stack(shares)


@torch.no_grad()
def main():
    """Print entropy and mutual information for the pixels and each layer."""
    images, shares = nuclei()
    sam = SamModel.from_pretrained(ASSETS / "mini_sam").eval()
    layers = {"pixels": F.unfold(images, 8, stride=8).mT.unflatten(1, (24, 24))}
    for number, layer in enumerate(sam.vision_encoder.layers, 1):
        # [b, 24, 24, d]
        layer.register_forward_hook(
            lambda _module, _args, output, name=f"layer {number}": layers.update({name: output})
        )
    sam.get_image_embeddings(images)

    # One-hot, so that a linear kernel is 1 within a class and 0 between them.
    labels = F.one_hot((shares > 0.5).long().flatten(), 2).float()
    print(f"{len(labels)} patches, entropy of the label {feature_entropy(labels):.3f} bits")
    print(f"{'':<8} {'entropy':>8} {'information on the label':>26}")
    for name, values in layers.items():
        features = values[:, ::2, ::2].flatten(0, 2)
        # A Gaussian kernel of the median distance; no n x n matrix is made.
        entropy = feature_entropy(features, kernel="rbf")
        information = feature_mutual_information(features, labels, kernel=("rbf", "linear"))
        print(f"{name:<8} {entropy:>8.3f} {information:>26.3f}")

    # Of few samples also at other orders, from their Gram matrix: here whole images.
    gram = gram_matrix(layers["layer 6"].mean((1, 2)), "rbf")
    orders = ", ".join(f"{renyi_entropy(gram, alpha=alpha):.3f} of order {alpha:g}" for alpha in (0.5, 1, 2))
    print(f"{N_IMAGES} images in layer 6: {orders}; at most {np.log2(N_IMAGES):.0f}")


if __name__ == "__main__":
    main()
