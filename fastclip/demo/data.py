"""The demo's data, which comes with scikit-learn and needs no download, and the order of the batches."""

from __future__ import annotations

import torch
from torch import Tensor


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 1,797 real handwritten digits, each 8x8 image as a sequence of 8 rows.

    Args:
        seed: decides which fifth of the digits is the test set.

    Returns:
        Train images (N, 8, 8) in 0..1, train labels, test images, test labels.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, random_state=seed, stratify=labels)
    train_x, test_x = (torch.tensor(x / 16.0, dtype=torch.float32).view(-1, 8, 8) for x in parts[:2])
    train_y, test_y = (torch.tensor(y, dtype=torch.int64) for y in parts[2:])
    return train_x, train_y, test_x, test_y


def regression() -> tuple[Tensor, Tensor]:
    """The article's regression problem: 1,000 samples of 20 features, targets of shape (1000, 1).

    Targets of shape (1000,) would broadcast against the net's (batch, 1) outputs: every output would be compared with
    every target of the batch, and nothing could be learned but their mean.
    """
    from sklearn.datasets import make_regression

    x, y = make_regression(n_samples=1000, n_features=20, noise=0.1, random_state=1)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32).unsqueeze(1)


def batches(samples: int, size: int, steps: int, seed: int) -> list[Tensor]:
    """Index tensors of `steps` batches, the samples shuffled anew in every epoch; the same list for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    order: list[Tensor] = []
    while len(order) < steps:
        order.extend(torch.randperm(samples, generator=generator).split(size))
    return order[:steps]
